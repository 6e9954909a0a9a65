"""``python -m mnist_lit.evaluate``: test a trained model, and show what it gets wrong."""

import logging
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from mnist_lit.cli import latest
from mnist_lit.cli.launch import launch, loading
from mnist_lit.storage import runs
from mnist_lit.storage.provenance import SAMPLE_NAME

log = logging.getLogger("mnist_lit.evaluate")


def evaluate(folder: str | Path, ckpt: str | Path, data: dict[str, Any], trainer: dict[str, Any]) -> dict[str, Any]:
    """Test a trained model; the arguments after ``folder`` are the keys of ``conf/evaluate.yaml`` as plain values.

    Args:
        folder: Where ``metrics.json`` and ``report.html`` go.
        ckpt: A checkpoint, a run's folder, or ``latest``.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        UserError: The checkpoint, a value, the data or this machine do not allow the test, or it would mean nothing.
    """
    folder = Path(folder)
    with loading("PyTorch"):
        from mnist_lit.inference.trained import find

    path = find(latest.resolve(ckpt))  # before the imports that take ten seconds
    with loading("torchvision and Lightning"):
        from mnist_lit.data import MNISTDataModule
        from mnist_lit.inference.trained import load_classifier
        from mnist_lit.reports.report import write_report
        from mnist_lit.reports.scores import PredictionCollector, scores
        from mnist_lit.training import memory
        from mnist_lit.training.trainer import build_trainer, check_limit, device_name

    classifier = load_classifier(path)
    datamodule, answers = MNISTDataModule(**data), PredictionCollector()
    lightning_trainer = build_trainer(folder, trainer, None, [answers])
    datamodule.prepare_data()
    datamodule.setup()
    check_limit("test", datamodule, trainer)
    with runs.locked(folder) if lightning_trainer.is_global_zero else nullcontext():
        started = time.perf_counter()
        (test,) = lightning_trainer.test(classifier, datamodule, verbose=False)
        results = {
            "test/loss": test["test/loss"],
            "test/acc": test["test/acc"],
            **scores(answers.probabilities, answers.labels),
            "ckpt": runs.display_path(path.absolute()),
            "trained_on": classifier.trained_on,
            "test_seconds": time.perf_counter() - started,
            "peak_memory_bytes": memory.peak_memory_bytes(),
            "device": device_name(lightning_trainer),
            "precision": str(lightning_trainer.precision),
            "data": datamodule.facts,
            "versions": runs.versions(),
        }
        if lightning_trainer.is_global_zero:
            config = {"ckpt": results["ckpt"], "model": classifier.hparams["model"], "data": data, "trainer": trainer}
            write_report(folder / "report.html", results, config, answers, classifier.network)
            log.info("\n%s", _table(results, folder))
            runs.write_json(folder / "metrics.json", results)
        return results


def _table(results: dict[str, Any], folder: Path) -> str:
    lines = ["digit  images  precision  recall      F1"]
    for row in results["test/digits"]:
        lines.append(f"{row['digit']:5}{row['images']:8}{row['precision']:11.4f}{row['recall']:8.4f}{row['f1']:8.4f}")
    lines.append("")
    for key, title in (("loss", "loss"), ("acc", "accuracy"), ("calibration_error", "calibration error")):
        lines.append(f"test {title:18}{results[f'test/{key}']:.4f}")
    data = results["data"]["name"]
    warning = ", NOT THE FULL MNIST" if data == SAMPLE_NAME else ""
    lines.append(f"{results['test/images']:,} images of {data}{warning}, with {results['ckpt']}")
    lines.append(f"the report: {runs.display_path(folder)}/report.html")
    return "\n".join(lines)


def main() -> None:
    launch("evaluate", evaluate, run_folder=True)


if __name__ == "__main__":
    main()
