"""``MNISTClassifier``: a LightningModule with the network, loss, metrics and optimizer."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from mnist_lit import UserError
from mnist_lit.build import build, require_fitting_weights
from mnist_lit.metrics import StageMetrics
from mnist_lit.schedulers import build_scheduler, for_lightning
from mnist_lit.storage.checkpoint_file import (
    hyper_parameters,
    network_weights,
    read_checkpoint,
    require_same_shapes,
    with_current_names,
)
from mnist_lit.storage.provenance import UNKNOWN_DATA, facts_of, trained_on, why_not_to_test

TUTORIAL_MODEL = {"_target_": "mnist_lit.network.TutorialCNN", "dropout": 0.5, "cpu_kernel": True}
TUTORIAL_OPTIMIZER = {"_target_": "torch.optim.Adadelta", "lr": 1.0, "rho": 0.95, "eps": 1e-7, "weight_decay": 0.0}


class MNISTClassifier(L.LightningModule):
    """Trains and evaluates a network that maps images [N, 1, 28, 28] to logits [N, 10]; calling it gives probabilities.

    ``model`` and ``optimizer`` default to the tutorial's. They and ``scheduler`` are saved in checkpoints as plain values.

    Args:
        model: The network's class as a dotted path (``_target_``) and its keyword arguments; with ``compile=True`` it runs
            under ``torch.compile``.
        optimizer: Likewise for the optimizer.
        scheduler: Likewise for the schedule of the learning rate, or None; with ``interval``, ``frequency`` and
            ``monitor`` for Lightning.
        augment: Changes training images, [B, 1, 28, 28] on their device, at random; or None.
        loss: What training minimizes, a module that takes logits [B, 10] and labels [B]; None is cross-entropy, which
            validation and test measure in any case.
        metrics: What to measure beside loss and accuracy in each epoch, by name.

    Attributes:
        trained_on: Name, counts and checksum of each data set that the weights have been trained on.

    Raises:
        UserError: A class does not exist or does not accept its arguments.
    """

    def __init__(
        self,
        model: Mapping[str, Any] | None = None,
        optimizer: Mapping[str, Any] | None = None,
        scheduler: Mapping[str, Any] | None = None,
        augment: nn.Module | None = None,
        loss: nn.Module | None = None,
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        super().__init__()
        model = with_current_names(TUTORIAL_MODEL if model is None else model)
        optimizer = with_current_names(TUTORIAL_OPTIMIZER if optimizer is None else optimizer)
        compiles = model.pop("compile", False)  # how it runs, which is not for checkpoints to say
        self.save_hyperparameters(ignore=("augment", "loss", "metrics"))
        self.network = build("model", model, nn.Module)
        if compiles:
            self.network.compile()
        self.augment, self.loss = augment, loss or nn.CrossEntropyLoss()
        self.metrics = nn.ModuleDict({f"{stage}_metrics": StageMetrics(metrics) for stage in ("train", "val", "test")})
        self.trained_on: list[dict[str, Any]] = []
        built = self._optimizer()  # fail early on invalid arguments
        if scheduler:
            build_scheduler(scheduler, built, length=1000)

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

    def forward(self, images: Tensor) -> Tensor:
        """Probabilities [N, 10] of images [N, 1, 28, 28] in [0, 1]."""
        return self.network(images).softmax(dim=1)

    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer()
        if not (scheduler := self.hparams["scheduler"]):
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": for_lightning(scheduler, optimizer, self.trainer)}

    def _optimizer(self) -> torch.optim.Optimizer:
        return build("optimizer", self.hparams["optimizer"], torch.optim.Optimizer, self.parameters())

    def setup(self, stage: str) -> None:
        if self.trainer.strategy.root_device.type not in ("cpu", "cuda"):
            # On MPS, channels-last convolutions have wrong gradients before macOS 15 and are slow before torch 2.14.
            self.network.to(memory_format=torch.contiguous_format)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if self.augment:
            with torch.autocast(self.device.type, enabled=False):  # it would round the sampling coordinates
                batch = (self.augment(batch[0]), batch[1])
        return self._step("train", batch)[0]

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Logits [B, 10], which callbacks receive."""
        return self._step("val", batch)[1]

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Probabilities [B, 10], which callbacks receive."""
        return self._step("test", batch)[1].float().softmax(dim=1)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0] if isinstance(batch, (tuple, list)) else batch)

    def on_train_epoch_end(self) -> None:
        self._log("train")

    def on_validation_epoch_end(self) -> None:
        self._log("val")

    def on_test_epoch_end(self) -> None:
        self._log("test")

    def on_train_start(self) -> None:
        facts = self._facts(self.trainer.train_dataloader)
        self.trained_on += [] if facts in self.trained_on else [facts]

    def on_test_start(self) -> None:
        if reason := why_not_to_test(self.trained_on, self._facts(self.trainer.test_dataloaders)["name"]):
            raise UserError(reason)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["data"] = self.trained_on

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """
        Raises:
            UserError: The weights do not fit this network.
        """
        self.trained_on = trained_on(checkpoint)
        require_same_shapes(self.state_dict(), checkpoint["state_dict"])

    def _step(self, stage: str, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean loss and logits [B, 10], added to the stage's metrics."""
        images, labels = batch
        logits = self.network(images)
        loss = (self.loss if stage == "train" else nn.functional.cross_entropy)(logits, labels)
        if len(labels):  # the last batch can have fewer images than there are processes
            self.stage_metrics(stage).add(loss, logits, labels)
        return loss, logits

    def _log(self, stage: str) -> None:
        """Log once per epoch: at every step, Lightning's bookkeeping would cost more than a millisecond."""
        self.log_dict({f"{stage}/{name}": metric for name, metric in self.stage_metrics(stage).items()})

    def stage_metrics(self, stage: str) -> Any:
        """The ``StageMetrics`` of train, val or test."""
        return self.metrics[f"{stage}_metrics"]

    def _facts(self, loaders: Any) -> dict[str, Any]:
        """The ``facts`` of the data set behind a loader, or behind the first of several; else those of the data module."""
        first = loaders[0] if isinstance(loaders, (list, tuple)) and loaders else loaders
        datamodule = getattr(self.trainer, "datamodule", None)
        others = facts_of(datamodule) if datamodule else UNKNOWN_DATA
        return getattr(getattr(first, "dataset", None), "facts", others)
