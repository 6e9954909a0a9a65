"""What training needs besides the model: the Trainer, its callbacks, checkpoints and exact resume."""
