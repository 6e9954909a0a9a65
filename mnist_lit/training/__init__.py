"""Training support: the Trainer, its callbacks, checkpoints and exact resume."""
