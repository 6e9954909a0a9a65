"""``StageMetrics``: the mean loss and the accuracy of an epoch."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from mnist_lit import compat


class StageMetrics(nn.ModuleDict):
    """``loss`` and ``acc`` over the images of an epoch, of one stage: train, val or test."""

    def __init__(self) -> None:
        # "disable": a NaN loss makes the mean NaN instead of being skipped. torchmetrics 1.9 then ignores the weights
        # passed to update(), too, hence one value per image.
        loss = MeanMetric(nan_strategy="disable")
        super().__init__({"loss": loss, "acc": MulticlassAccuracy(10, average="micro", validate_args=False)})

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: its mean loss, logits [B, 10], and labels [B]."""
        metrics = dict(self._metrics())
        metrics["loss"].update(loss.detach().expand(len(labels)))
        metrics["acc"].update(logits.detach(), labels)

    def compute(self) -> dict[str, float]:
        """The values over all ranks."""
        return {name: float(metric.compute()) for name, metric in self._metrics()}

    def compute_locally(self) -> dict[str, float]:
        """The values on this rank so far, without waiting for the others."""
        return {name: float(compat.compute_locally(metric)) for name, metric in self._metrics()}

    def states(self) -> dict[str, dict[str, Tensor]]:
        """The states on this rank, to resume from in the middle of an epoch."""
        return {
            name: {key: value.clone() for key, value in metric.metric_state.items()} for name, metric in self._metrics()
        }

    def load_states(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        for name, metric in self._metrics():
            metric.load_state_dict({key: value.to(metric.device) for key, value in states[name].items()})

    def _metrics(self) -> Any:  # ModuleDict's items, which are metrics here
        return self.items()
