"""``CheckpointedModule``: a LightningModule whose checkpoints say what it was trained on, and run no code of a file."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import lightning as L

from mnist_lit import UserError
from mnist_lit.build import require_fitting_weights
from mnist_lit.storage.checkpoint_file import (
    hyper_parameters,
    network_weights,
    read_checkpoint,
    require_same_shapes,
    with_current_names,
)
from mnist_lit.storage.provenance import UNKNOWN_DATA, facts_of, trained_on, why_not_to_test


class CheckpointedModule(L.LightningModule):
    """The base class of ``MNISTClassifier``, which has a ``network`` and saves its configuration as hyperparameters.

    Attributes:
        trained_on: Name, counts and checksum of each data set that the weights have been trained on.
        temperature: Of a loaded checkpoint: what ``mnist_lit.load`` divides the logits by for
            probabilities, and this class does not; None if it has none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trained_on: list[dict[str, Any]] = []
        self.temperature: float | None = None

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, map_location: Any = "cpu", trust: Iterable[str] = (), **sections: Any
    ) -> Self:
        """Load a checkpoint like Lightning, but without letting the file decide which code is imported.

        Args:
            map_location: The device to move the classifier to.
            trust: Packages whose networks and optimizers the checkpoint may name; those of this project and of PyTorch's
                ``optim`` need no trust.
            sections: ``model``, ``optimizer`` or ``scheduler``, to replace that of the checkpoint.

        Raises:
            UserError: The file is missing, damaged or not from this project, it names a class of another package, or
                its weights do not fit the network.
        """
        checkpoint = read_checkpoint(Path(checkpoint_path))
        # Without what only training needs, and the checkpoint does not describe.
        weights = [pair for pair in checkpoint["state_dict"].items() if not pair[0].startswith(("augment.", "loss."))]
        checkpoint["state_dict"] = dict(weights)
        sections = hyper_parameters(checkpoint, Path(checkpoint_path), trust, **sections)
        model = with_current_names(sections["model"])
        require_fitting_weights({key: model[key] for key in model if key != "compile"}, network_weights(checkpoint))
        classifier = cls(**sections)
        classifier.on_load_checkpoint(checkpoint)
        classifier.load_state_dict(checkpoint["state_dict"])
        return classifier.to(map_location)

    def on_train_start(self) -> None:
        facts = self._facts(self.trainer.train_dataloader)
        self.trained_on += [] if facts in self.trained_on else [facts]

    def on_test_start(self) -> None:
        if reason := why_not_to_test(self.trained_on, self._facts(self.trainer.test_dataloaders)):
            raise UserError(reason)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["data"] = self.trained_on

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """
        Raises:
            UserError: The weights do not fit this network.
        """
        self.trained_on, self.temperature = trained_on(checkpoint), checkpoint.get("temperature")
        require_same_shapes(self.state_dict(), checkpoint["state_dict"])

    def _facts(self, loaders: Any) -> dict[str, Any]:
        """The ``facts`` of the data set behind a loader, or behind the first of several; else those of the data module."""
        first = loaders[0] if isinstance(loaders, (list, tuple)) and loaders else loaders
        datamodule = getattr(self.trainer, "datamodule", None)
        others = facts_of(datamodule) if datamodule else UNKNOWN_DATA
        return getattr(getattr(first, "dataset", None), "facts", others)
