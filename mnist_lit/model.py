"""``MNISTClassifier``: a LightningModule with the network, loss, metrics and optimizer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from mnist_lit.build import build
from mnist_lit.checkpointed import CheckpointedModule
from mnist_lit.metrics import StageMetrics
from mnist_lit.schedulers import build_scheduler, for_lightning
from mnist_lit.storage.checkpoint_file import with_current_names

TUTORIAL_MODEL = {"_target_": "mnist_lit.network.TutorialCNN", "dropout": 0.5, "cpu_kernel": True}
TUTORIAL_OPTIMIZER = {"_target_": "torch.optim.Adadelta", "lr": 1.0, "rho": 0.95, "eps": 1e-7, "weight_decay": 0.0}


class MNISTClassifier(CheckpointedModule):  # a LightningModule whose checkpoints are safe to load
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
        metrics: What to measure besides loss and accuracy in each epoch, by name.

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
        # By name: else a subclass's own arguments, which may be None, would take their place. (Lightning compares these
        # with each of them: an array among them has no truth value.)
        self.save_hyperparameters({"model": model, "optimizer": optimizer, "scheduler": scheduler})
        self.network = build("model", model, nn.Module)
        if compiles:
            self.network.compile()
        self.augment, self.loss = augment, loss or nn.CrossEntropyLoss()
        self.metrics = nn.ModuleDict({f"{stage}_metrics": StageMetrics(metrics) for stage in ("train", "val", "test")})
        built = self._optimizer()  # fail early on invalid arguments
        if scheduler:
            build_scheduler(scheduler, built, length=1000)

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
