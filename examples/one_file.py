"""The Keras MNIST tutorial on one page of plain Lightning and torchvision: copy it, and change what you like."""
# pip install lightning torchvision, then python one_file.py. The weights go to lightning_logs/; as in the tutorial, no
# images are held out for validation.

import argparse

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import MNIST

BATCH_SIZE = 500


class TutorialCNN(L.LightningModule):
    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(1, 32, 3),  # [B, 32, 26, 26]
            nn.ReLU(),
            nn.Conv2d(32, 64, 3),  # [B, 64, 24, 24]
            nn.ReLU(),
            nn.MaxPool2d(3),  # [B, 64, 8, 8]
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(4096, 250),
            nn.Sigmoid(),
            nn.Linear(250, 10),  # logits: the softmax of the tutorial's last layer is part of cross_entropy
        )
        for name, parameter in self.network.named_parameters():  # Keras' initial values, not PyTorch's
            if name.endswith("weight"):
                nn.init.xavier_uniform_(parameter)  # named after Xavier Glorot
            else:
                nn.init.zeros_(parameter)

    def forward(self, images: Tensor) -> Tensor:
        """Probabilities [B, 10] of images [B, 1, 28, 28] in [0, 1]."""
        return self.network(images).softmax(dim=1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.network(images), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self.network(images)
        # Lightning averages what is logged here over the batches, each weighted by its size.
        self.log("test/loss", nn.functional.cross_entropy(logits, labels))
        self.log("test/acc", (logits.argmax(dim=1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Keras' defaults when the tutorial was written; today's lr is 0.001.
        return torch.optim.Adadelta(self.parameters(), lr=1.0, rho=0.95, eps=1e-7)


def loader(folder: str, train: bool) -> DataLoader[tuple[Tensor, ...]]:
    mnist = MNIST(folder, train=train, download=True)
    images = mnist.data.unsqueeze(1).float() / 255  # all at once, as in the tutorial: 190 MB, and no worker processes
    return DataLoader(TensorDataset(images, mnist.targets), BATCH_SIZE, shuffle=train)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="data", metavar="FOLDER", help="where MNIST/raw/ is, or is downloaded to")
    parser.add_argument("--epochs", default=12, type=int)
    arguments = parser.parse_args()

    L.seed_everything(0)  # the same initial weights, order of the images and dropout in every run
    model, trainer = TutorialCNN(), L.Trainer(max_epochs=arguments.epochs)
    trainer.fit(model, loader(arguments.data, train=True))
    (result,) = trainer.test(model, loader(arguments.data, train=False), verbose=False)
    print("loss=", result["test/loss"])
    print("accuracy=", result["test/acc"])


if __name__ == "__main__":
    main()
