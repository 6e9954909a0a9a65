"""A trained network, from a checkpoint or a run's folder, ready to use; without Lightning."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mnist_lit import UserError
from mnist_lit.build import build
from mnist_lit.storage import runs
from mnist_lit.storage.checkpoint_file import corruption, hyper_parameters, read_checkpoint, require_same_shapes
from mnist_lit.storage.provenance import trained_on

if TYPE_CHECKING:
    from mnist_lit.model import MNISTClassifier


class TrainedModel(nn.Module):
    """A trained network with softmax behind it, in evaluation mode, on the CPU.

    Attributes:
        network: Turns images into logits.
        path: The checkpoint that it is from.
        description: The section ``model`` of the configuration, which ``build`` takes.
        trained_on: Name, counts and checksum of each data set that the weights have been trained on.
    """

    def __init__(
        self, network: nn.Module, path: Path, description: dict[str, Any], trained_on: list[dict[str, Any]]
    ) -> None:
        super().__init__()
        self.network, self.path, self.description, self.trained_on = network, path, description, trained_on
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Probabilities [N, 10] of images [N, 1, 28, 28] with values from 0 to 1."""
        return self.network(images).softmax(dim=1)


def load(ckpt: str | Path) -> TrainedModel:
    """The model that ``ckpt`` means, as ``find`` says; nothing in its file is executed.

    Raises:
        UserError: As ``find``; or the file is damaged or not from this project, or its weights are another network's.
    """
    path = find(ckpt)
    checkpoint = read_checkpoint(path)
    description = hyper_parameters(checkpoint, path)["model"]
    network = build("model", description, nn.Module)
    weights = {key: value for key, value in checkpoint["state_dict"].items() if key.startswith("network.")}
    require_same_shapes({f"network.{key}": value for key, value in network.state_dict().items()}, weights)
    network.load_state_dict({key.removeprefix("network."): value for key, value in weights.items()})
    return TrainedModel(network, path, description, trained_on(checkpoint))


def load_classifier(path: Path) -> "MNISTClassifier":
    """The model of a checkpoint as a ``MNISTClassifier``, which Lightning's Trainer can test or go on training.

    Raises:
        UserError: As ``load``.
    """
    from mnist_lit.model import MNISTClassifier

    checkpoint = read_checkpoint(path)
    classifier = MNISTClassifier(**hyper_parameters(checkpoint, path))
    classifier.on_load_checkpoint(checkpoint)
    classifier.load_state_dict(checkpoint["state_dict"])
    return classifier


def find(ckpt: str | Path) -> Path:
    """The checkpoint that ``ckpt`` means.

    Args:
        ckpt: A checkpoint, or a run's folder, which means its best one by validation, or else its last.

    Raises:
        UserError: There is none, or it is damaged; then the message names the run's newest whole one.
    """
    path = Path(ckpt).expanduser()
    if path.is_dir():
        folder = path
        if not (checkpoint := runs.checkpoint_of(folder)):
            raise UserError(f"ckpt={ckpt}: there is no checkpoint in this folder ({runs.BEST} or {runs.LAST})")
        if reason := corruption(checkpoint):
            raise UserError(f"ckpt={ckpt}: {reason}{runs.suggest_intact(folder, checkpoint, 'ckpt')}")
        return checkpoint
    if not path.is_file():
        raise UserError(f"ckpt={ckpt}: there is no such checkpoint or run")
    return path
