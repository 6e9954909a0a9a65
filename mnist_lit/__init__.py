"""The Keras MNIST CNN tutorial as a PyTorch Lightning project."""

__version__ = "0.1.0"


class Refusal(ValueError):
    """Something that the user can put right: commands print it as one sentence, without a traceback."""
