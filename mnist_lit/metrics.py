"""``StageMetrics``: the mean loss and the accuracy of an epoch, and what else is asked for."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from mnist_lit import UserError, compat


class StageMetrics(nn.ModuleDict):
    """``loss`` and ``acc`` over the images of an epoch, of one stage: train, val or test.

    Args:
        others: Further metrics by name, each updated with logits [B, classes] and labels [B].
    """

    def __init__(self, others: Mapping[str, Metric] | None = None) -> None:
        # "disable": a NaN loss makes the mean NaN instead of being skipped. torchmetrics 1.9 then ignores the weights
        # passed to update(), too, hence one value per image.
        loss = MeanMetric(nan_strategy="disable")
        # Micro-averaged, the accuracy does not depend on the number of classes.
        acc = MulticlassAccuracy(10, average="micro", validate_args=False)
        super().__init__({"loss": loss, "acc": acc, **{name: other.clone() for name, other in (others or {}).items()}})

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: its mean loss, logits [B, classes], and labels [B]."""
        for name, metric in self._metrics():
            if name == "loss":
                metric.update(loss.detach().expand(len(labels)))
            else:
                metric.update(logits.detach(), labels)

    def compute(self) -> dict[str, float]:
        """The values over all ranks.

        Raises:
            UserError: A metric gives something other than one number.
        """
        values = {}
        for name, metric in self._metrics():
            value = metric.compute()
            try:
                values[name] = float(value)
            except (TypeError, ValueError, RuntimeError) as error:
                raise UserError(f"metrics.{name}: gives no single number (does it need an average=?)") from error
        return values

    def compute_locally(self) -> dict[str, float]:
        """``loss`` and ``acc`` on this rank so far, without waiting for the others."""
        both = [(name, metric) for name, metric in self._metrics() if name in ("loss", "acc")]
        return {name: float(compat.compute_locally(metric)) for name, metric in both}

    def states(self) -> dict[str, dict[str, Tensor]]:
        """The states on this rank, to resume from in the middle of an epoch; with those of metrics within metrics."""
        return {
            name: {
                f"{prefix}.{key}".lstrip("."): value.clone()
                for prefix, each in metric.named_modules()
                if isinstance(each, Metric)
                for key, value in each.metric_state.items()
                if isinstance(value, Tensor)
            }
            for name, metric in self._metrics()
        }

    def load_states(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        for name, metric in self._metrics():
            found = {key: value.to(metric.device) for key, value in states[name].items()}
            metric.load_state_dict(found, strict=False)  # a metric's buffers are no states

    def _apply(self, fn: Callable[[Tensor], Tensor], *arguments: Any) -> Any:
        """Move to a device, or to a wider type; in a half one, sums over an epoch would be wrong after some batches."""

        def kept(value: Tensor) -> Tensor:
            moved = fn(value)
            return moved if moved.itemsize >= value.itemsize else value.to(moved.device)

        return super()._apply(kept, *arguments)

    def _metrics(self) -> Any:  # ModuleDict's items, which are metrics here
        return self.items()
