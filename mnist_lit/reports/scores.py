"""Collect a model's predictions for the test images and compute scores from them."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torchmetrics.functional import classification as metrics

MAX_MISTAKES = 40  # whose images are kept
EXAMPLES = 3
BATCH = 2**32  # more than any batch has


class PredictionCollector(L.Callback):
    """Collects the predictions of a test from all processes.

    Attributes:
        labels: int64 [N], the true classes, in the order of the test set.
        probabilities: float32 [N, classes], predicted by the model.
        images: [C, H, W] of the most confident mistakes, by their number in the test set.
        examples: [N, C, H, W], the first images of the test set; None if several processes share it.
    """

    labels: Tensor
    probabilities: Tensor
    images: dict[int, Tensor]
    examples: Tensor | None = None

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Of this process: place in the test set, labels, outputs; and confidence, place, image.
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []
        self._mistakes: list[tuple[float, int, Tensor]] = []

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        images, labels, outputs = batch[0], batch[1].cpu(), outputs.cpu()
        if batch_idx == 0 and trainer.world_size == 1:
            self.examples = images[:EXAMPLES]
        # Each batch of the test set is dealt out to the processes one by one, as Lightning's sampler deals out a whole set.
        places = BATCH * batch_idx + torch.arange(len(labels)) * trainer.world_size + trainer.global_rank
        self._batches.append((places, labels, outputs))
        confidence, predicted = outputs.max(dim=1)
        wrong = (predicted != labels).nonzero()[:, 0]
        worst = wrong[confidence[wrong].argsort(descending=True, stable=True)][:MAX_MISTAKES].tolist()
        self._mistakes += [(float(confidence[i]), int(places[i]), images[i].cpu()) for i in worst]
        self._mistakes = sorted(self._mistakes, key=lambda mistake: (-mistake[0], mistake[1]))[:MAX_MISTAKES]

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        parts: list[Any] = [(self._batches, self._mistakes)]
        if trainer.world_size > 1:
            parts *= trainer.world_size
            torch.distributed.all_gather_object(parts, (self._batches, self._mistakes))
        places, labels, outputs = (
            torch.cat(each) for each in zip(*(b for part in parts for b in part[0]), strict=True)
        )
        order = places.argsort()
        self.labels, self.probabilities = labels[order], outputs[order]
        number = {place: number for number, place in enumerate(places[order].tolist())}
        self.images = {number[place]: image for part in parts for _, place, image in part[1]}


def scores(
    probabilities: Tensor, labels: Tensor, names: Sequence[str] | None = None, temperature: float | None = None
) -> dict[str, Any]:
    """Scores of the predicted probabilities [N, classes] for the true digits ``labels`` [N], besides loss and accuracy.

    Args:
        names: Those of the classes, if they are not digits; a network can have more outputs than the data have classes.
        temperature: What a trained model divides its logits by when it predicts, if that was measured.

    Returns:
        The entries of ``metrics.json``: ``test/images``, the number of images; ``test/calibration_error``, the expected
        calibration error with 15 equal bins, and ``test/calibration_error_scaled``, the same at the ``temperature``;
        ``test/digits``, the number of images, precision, recall and F1 of each digit, or of the class with that number
        and ``name``; and ``test/confusion_matrix``, with true digits as rows and predicted digits as columns.
    """
    classes = probabilities.shape[1]
    precision, recall, f1 = (
        metric(probabilities, labels, num_classes=classes, average="none").tolist()
        for metric in (metrics.multiclass_precision, metrics.multiclass_recall, metrics.multiclass_f1_score)
    )
    counts = labels.bincount(minlength=classes).tolist()
    names = names and [*names, *(f"class {n}" for n in range(len(names), classes))]
    calibration = {"test/calibration_error": probabilities}
    if temperature:  # softmax(logits / T) is softmax(log(probabilities) / T)
        calibration["test/calibration_error_scaled"] = (probabilities.log() / temperature).softmax(dim=1)
    return {
        "test/images": len(labels),
        **{
            name: float(metrics.multiclass_calibration_error(each, labels, classes))
            for name, each in calibration.items()
        },
        "test/digits": [
            {"digit": n, "images": counts[n], "precision": precision[n], "recall": recall[n], "f1": f1[n]}
            | ({"name": names[n]} if names else {})
            for n in range(classes)
        ],
        "test/confusion_matrix": metrics.multiclass_confusion_matrix(probabilities, labels, classes).tolist(),
    }
