"""Training support: the Trainer, its callbacks, checkpoints and exact resume."""

from mnist_lit.training.checkpoints import Checkpoints, StopOnNaN
from mnist_lit.training.randomness import SeedEachBatch
from mnist_lit.training.recorder import RunRecorder

__all__ = ["Checkpoints", "RunRecorder", "SeedEachBatch", "StopOnNaN"]
