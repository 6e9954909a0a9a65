"""What training left behind, ready to use: ``ckpt=``, and the network in a checkpoint without Lightning."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mnist_lit import Refusal, runs
from mnist_lit.checkpoint_file import hyper_parameters, read_checkpoint, require_same_shapes, trouble
from mnist_lit.configuration import ConfigFiles
from mnist_lit.network import build_network

UNKNOWN_DATA = {"name": "unknown"}  # what a checkpoint says of training data that do not come from MNISTDataModule


class TrainedModel(nn.Module):
    """A trained network with softmax behind it, in evaluation mode, on the CPU.

    Attributes:
        network: Turns images into logits.
        path: The checkpoint that it is from.
        description: The section ``model`` of the configuration, which ``build_network`` takes.
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
        Refusal: As ``find``; or the file is damaged or not from this project, or its weights are another network's.
    """
    path = find(ckpt)
    checkpoint = read_checkpoint(path)
    description = hyper_parameters(checkpoint, path)["model"]
    network = build_network(description)
    weights = {key: value for key, value in checkpoint["state_dict"].items() if key.startswith("network.")}
    require_same_shapes({f"network.{key}": value for key, value in network.state_dict().items()}, weights)
    network.load_state_dict({key.removeprefix("network."): value for key, value in weights.items()})
    return TrainedModel(network, path, description, trained_on(checkpoint))


def find(ckpt: str | Path) -> Path:
    """The checkpoint that ``ckpt`` means.

    Args:
        ckpt: A checkpoint; a run's folder, which means its best one by validation, or else its last; or ``latest``,
            the newest run in the outputs folder, or job of a sweep in it, that has one.

    Raises:
        Refusal: There is none, or it is damaged; then the message names the run's newest whole one.
    """
    path = Path(ckpt).expanduser()
    if str(ckpt) == "latest" and not path.exists():
        outputs = ConfigFiles("train").outputs_folder()
        folders = [folder for folder in runs.newest_first(outputs) if _checkpoint_of(folder)]
        if not folders:
            raise Refusal(
                f"ckpt=latest: there is no trained model in {outputs} (python -m mnist_lit.train makes one; "
                "ckpt= takes a checkpoint or a run's folder elsewhere)"
            )
        path = folders[0]
    if path.is_dir():
        folder = path
        if not (checkpoint := _checkpoint_of(folder)):
            raise Refusal(f"ckpt={ckpt}: there is no checkpoint in this folder ({runs.BEST} or {runs.LAST})")
        if reason := trouble(checkpoint):
            raise Refusal(f"ckpt={ckpt}: {reason}{runs.whole_one_instead(folder, checkpoint, 'ckpt')}")
        return checkpoint
    if not path.is_file():
        raise Refusal(f"ckpt={ckpt}: there is no such checkpoint or run")
    return path


def _checkpoint_of(folder: Path) -> Path | None:
    return next((path for name in (runs.BEST, runs.LAST) if (path := folder / name).is_file()), None)


def trained_on(checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The data sets that a checkpoint says it was trained on."""
    data: list[dict[str, Any]] = checkpoint.get("data", [UNKNOWN_DATA])
    return data


def why_not_to_test(trained_on: Iterable[Mapping[str, Any]], data: str) -> str:
    """Why a model's accuracy on the test digits of ``data`` would mean nothing; empty if it means something.

    The sample's test digits are training digits of the full set.
    """
    others = [facts["name"] for facts in trained_on if facts["name"] != runs.SAMPLE_NAME]
    if not others or data != runs.SAMPLE_NAME:
        return ""
    return (
        f"this model was trained on other data than the sample ({', '.join(others)}), and the sample's test "
        "digits are training digits of the full MNIST: test it on that (data.source=mnist)"
    )
