"""Load a trained network from a checkpoint or a run folder, without Lightning."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mnist_lit import UserError
from mnist_lit.build import build, require_fitting_weights
from mnist_lit.storage import runs
from mnist_lit.storage.checkpoint_file import (
    corruption,
    hyper_parameters,
    network_weights,
    read_checkpoint,
    require_same_shapes,
)
from mnist_lit.storage.provenance import MNIST_NAME, SAMPLE_NAME, UNKNOWN_DATA, trained_on
from mnist_lit.storage.tables import one_line, printable


class TrainedModel(nn.Module):
    """A trained network followed by softmax, on the CPU, in evaluation mode and with frozen parameters.

    Attributes:
        network: Maps images to logits.
        path: The checkpoint that the weights come from.
        description: The ``model`` section of the configuration, from which ``build`` makes the network.
        trained_on: Name, counts and checksum of each data set that the weights have been trained on.
        temperature: What the logits are divided by, as measured on the validation images; 1 without any.
    """

    def __init__(
        self,
        network: nn.Module,
        path: Path,
        description: dict[str, Any],
        trained_on: list[dict[str, Any]],
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.network, self.path, self.description, self.trained_on = network, path, description, trained_on
        self.temperature = temperature
        self.eval().requires_grad_(False)

    @property
    def names(self) -> list[str] | None:
        """The names of the ten classes, if the data that the weights have been trained on last have any."""
        found = self.trained_on[-1].get("classes") if self.trained_on else None
        if not isinstance(found, list) or not 0 < len(found) <= 10:
            return None
        return [*(printable(name, 40) for name in found), *(f"class {n}" for n in range(len(found), 10))]

    @property
    def reads_digits(self) -> bool:
        """Whether the classes are the ten digits, as far as the data that the weights have been trained on last say."""
        if self.names:
            return all(re.fullmatch(rf"{digit}( - \w+)?", name) for digit, name in enumerate(self.names))  # "7 - seven"
        known = (MNIST_NAME, SAMPLE_NAME, UNKNOWN_DATA["name"])
        return not self.trained_on or self.trained_on[-1]["name"] in known

    def forward(self, images: Tensor) -> Tensor:
        """Probabilities [N, 10] for images [N, 1, 28, 28] with values from 0 to 1."""
        return (self.network(images) / self.temperature).softmax(dim=1)


def load(ckpt: str | Path, trust: Iterable[str] = ()) -> TrainedModel:
    """Load the model that ``ckpt`` refers to (see ``find``), without executing anything stored in the file.

    Args:
        trust: Packages whose networks the checkpoint may name; those of this project need no trust.

    Raises:
        UserError: There is no such checkpoint, it is damaged or not from this project, it names a network of another
            package, or its weights do not fit the network.
    """
    path = find(ckpt)
    checkpoint = read_checkpoint(path)
    description = hyper_parameters(checkpoint, path, trust)["model"]
    weights = network_weights(checkpoint)
    require_fitting_weights(description, weights)
    network = build("model", description, nn.Module)
    require_same_shapes({f"network.{key}": value for key, value in network.state_dict().items()}, weights)
    network.load_state_dict({key.removeprefix("network."): value for key, value in weights.items()})
    return TrainedModel(network, path, description, trained_on(checkpoint), checkpoint.get("temperature", 1.0))


def load_for_pictures(ckpt: str | Path, trust: Iterable[str] = ()) -> TrainedModel:
    """``load`` a model for grey pictures of 28x28 pixels, which is what this project makes of any picture.

    Raises:
        UserError: As ``load``, or the network is for images of another kind, or not for ten classes.
    """
    model = load(ckpt, trust)
    try:
        with torch.inference_mode():
            classes = model(torch.zeros(1, 1, 28, 28)).shape[1]
    except Exception as error:
        reason = f"its network takes no images [N, 1, 28, 28]: {one_line(error)}"
        raise UserError(f"{model.path} is a model for data of another kind ({reason})") from error
    if classes != 10:
        raise UserError(f"{model.path} is a model for data of another kind ({classes} classes instead of ten)")
    return model


def find(ckpt: str | Path) -> Path:
    """The checkpoint that ``ckpt`` refers to.

    Args:
        ckpt: A checkpoint, or a run folder: its best checkpoint by validation, or else its last one.

    Raises:
        UserError: There is none, or the folder's is damaged; the message then names the newest intact one.
    """
    path = Path(os.path.expanduser(ckpt))
    if os.path.isfile(path):
        return path
    if not os.path.isdir(path):
        raise UserError(f"ckpt={ckpt}: there is no such checkpoint or run")
    if not (checkpoint := runs.checkpoint_of(path)):
        raise UserError(f"ckpt={ckpt}: there is no checkpoint in this folder ({runs.BEST} or {runs.LAST})")
    if reason := corruption(checkpoint):
        raise UserError(f"ckpt={ckpt}: {reason}{runs.suggest_intact(path, checkpoint, 'ckpt')}")
    return checkpoint
