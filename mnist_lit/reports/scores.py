"""Collect a model's predictions for the test images and compute scores from them."""

from typing import Any

import lightning as L
from torch import Tensor
from torchmetrics.functional import classification as metrics


class PredictionCollector(L.Callback):
    """Collects the predictions of a test from all processes.

    Attributes:
        images: uint8 [N, 28, 28], the tested images.
        labels: int64 [N], their digits.
        probabilities: float32 [N, classes], predicted by the model.
    """

    images: Tensor
    labels: Tensor
    probabilities: Tensor

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self._rows: Tensor | None = None

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if self._rows is None:
            # The last column marks the rows with a prediction, since a test may be limited to some batches.
            self._rows = outputs.new_zeros(len(self._data.test_labels), outputs.shape[1] + 1)
        size = self._data.batch_size
        rows = self._rows[batch_idx * size : (batch_idx + 1) * size][trainer.global_rank :: trainer.world_size]
        rows[:, :-1] = outputs
        rows[:, -1] = 1

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        rows: Any = trainer.strategy.reduce(self._rows, reduce_op="sum")
        tested = rows[:, -1].cpu() > 0
        self.probabilities = rows[:, :-1].cpu()[tested]
        self.images, self.labels = self._data.test_images[tested], self._data.test_labels[tested]


def scores(probabilities: Tensor, labels: Tensor) -> dict[str, Any]:
    """Scores of the predicted probabilities [N, classes] for the true digits ``labels`` [N], besides loss and accuracy.

    Returns:
        The entries of ``metrics.json``: ``test/images``, the number of images; ``test/calibration_error``, the expected
        calibration error with 15 equal bins; ``test/digits``, the number of images, precision, recall and F1 of each
        digit; and ``test/confusion_matrix``, with true digits as rows and predicted digits as columns.
    """
    classes = probabilities.shape[1]
    precision, recall, f1 = (
        metric(probabilities, labels, num_classes=classes, average="none").tolist()
        for metric in (metrics.multiclass_precision, metrics.multiclass_recall, metrics.multiclass_f1_score)
    )
    counts = labels.bincount(minlength=classes).tolist()
    return {
        "test/images": len(labels),
        "test/calibration_error": float(metrics.multiclass_calibration_error(probabilities, labels, classes)),
        "test/digits": [
            {"digit": n, "images": counts[n], "precision": precision[n], "recall": recall[n], "f1": f1[n]}
            for n in range(classes)
        ],
        "test/confusion_matrix": metrics.multiclass_confusion_matrix(probabilities, labels, classes).tolist(),
    }
