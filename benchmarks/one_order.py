"""MNIST in one order: what Keras on TensorFlow trains on once TensorFlow is seeded. For ``fidelity.py --variant``."""

from torch.utils.data import DataLoader

from mnist_lit.data import MNISTDataModule


class OneOrder(MNISTDataModule):
    """The same batches in every epoch."""

    def train_dataloader(self) -> DataLoader:
        loader = super().train_dataloader()
        loader.sampler.set_epoch = lambda epoch: None  # type: ignore[attr-defined]
        return loader
