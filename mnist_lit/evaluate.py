"""``python -m mnist_lit.evaluate``: test a trained model, and show what it gets wrong."""

import logging
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from mnist_lit.cli import latest
from mnist_lit.cli.data_of_run import metrics_of_run, with_data_of_run
from mnist_lit.cli.forked import in_each_process
from mnist_lit.cli.launch import launch, loading
from mnist_lit.reports.results import evaluation_table, limited_by, only_showing
from mnist_lit.storage import runs
from mnist_lit.storage.provenance import facts_of

log = logging.getLogger("mnist_lit.evaluate")


@in_each_process
def evaluate(
    folder: str | Path,
    ckpt: str | Path,
    data: dict[str, Any],
    trainer: dict[str, Any],
    metrics: dict[str, Any] | None = None,
    trust: Iterable[str] = (),
) -> dict[str, Any]:
    """Test a trained model; the arguments after ``folder`` are the keys of ``conf/evaluate.yaml`` as plain values.

    Args:
        folder: Where ``metrics.json`` and ``report.html`` go.
        ckpt: A checkpoint, a run's folder, or ``latest``.
        data: Without ``_target_``, the data are those of the checkpoint's run, but for the keys given; without ``dir``,
            they are looked for where the run had them.
        metrics: What to measure besides loss and accuracy; None: what the run did.
        trust: Packages whose classes the checkpoint and its run may name, besides this project's.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        UserError: The checkpoint, a value, the data or this machine do not allow the test, or it would mean nothing.
    """
    folder = Path(folder)
    with loading("PyTorch"):
        from mnist_lit.inference.trained import find

    path = find(latest.resolve(ckpt))  # before the imports that take ten seconds
    data = with_data_of_run(data, path, trust)
    metrics = metrics_of_run(path, trust) if metrics is None else metrics
    with loading("torchvision and Lightning"):
        import lightning as L

        from mnist_lit.build import instantiate
        from mnist_lit.metrics import StageMetrics
        from mnist_lit.model import MNISTClassifier
        from mnist_lit.reports.report import write_report
        from mnist_lit.reports.scores import PredictionCollector, scores
        from mnist_lit.training import harness

    classifier = MNISTClassifier.load_from_checkpoint(path, trust=trust)
    classifier.metrics["test_metrics"] = StageMetrics(harness.build_metrics(metrics))
    datamodule, predictions = instantiate("data", data, L.LightningDataModule), PredictionCollector()
    lightning_trainer = harness.build_trainer(folder, trainer, None, [predictions], datamodule)
    harness.prepare_data(lightning_trainer, datamodule, trainer, stages=["test"])
    with runs.locked(folder) if lightning_trainer.is_global_zero else nullcontext():
        started = time.perf_counter()
        test = harness.tested(lightning_trainer, classifier, datamodule)
        results = {
            **test,
            **scores(
                predictions.probabilities,
                predictions.labels,
                facts_of(datamodule).get("classes"),
                classifier.temperature,
            ),
            "ckpt": runs.display_path(path.absolute()),
            "trained_on": classifier.trained_on,
            "limited": limited_by(trainer),
            "test_seconds": time.perf_counter() - started,
            **harness.conditions(lightning_trainer, datamodule),
        }
        if lightning_trainer.is_global_zero:
            runs.write_json(folder / "metrics.json", results)
            config = {"ckpt": results["ckpt"], "model": classifier.hparams["model"], "data": data, "trainer": trainer}
            log.info("\n%s", evaluation_table(results, folder))
            with only_showing("the report", folder):
                write_report(folder / "report.html", results, config, predictions, classifier.network)
        return results


def main() -> None:
    launch("evaluate", evaluate, run_folder=True)


if __name__ == "__main__":
    main()
