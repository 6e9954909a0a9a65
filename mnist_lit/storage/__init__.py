"""Files on disk: run folders, checkpoints, the MNIST files, and atomic writes."""
