"""Files: run folders, checkpoints, MNIST's own, and which data a model has seen."""
