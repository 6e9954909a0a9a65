"""Files on disk: run folders, checkpoints, Keras' and MNIST files, which packages may be imported, and atomic writes."""
