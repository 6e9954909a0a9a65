"""``python -m mnist_lit.train``: train the network, test it, and leave everything in one run folder."""

import json
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from mnist_lit.cli.launch import launch, loading
from mnist_lit.storage import runs
from mnist_lit.storage.provenance import SAMPLE_NAME

log = logging.getLogger("mnist_lit.train")


def train(
    folder: str | Path,
    seed: int,
    data: dict[str, Any],
    model: dict[str, Any],
    optimizer: dict[str, Any],
    trainer: dict[str, Any],
    checkpoint: dict[str, Any] | None = None,
    logger: dict[str, dict[str, Any]] | None = None,
    resume: str | Path | None = None,
) -> dict[str, Any]:
    """Train and test; the arguments after ``folder`` are the sections of ``conf/train.yaml`` as plain values.

    Args:
        folder: The run's folder; it may exist, but only hold a run if that is resumed.
        resume: The checkpoint in ``folder`` that the run goes on from, or ``folder`` itself to go on from its
            beginning; None for a new run.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        UserError: A value, the data or this machine do not allow the run, or it fails.
        Interrupted: A signal came; what there is so far is in a checkpoint.
    """
    folder = Path(folder)
    if resume and (finished := _results_of_finished_run(folder, trainer)):
        log.info("%s is finished:\n\n%s", runs.display_path(folder), _table(finished, folder))
        return finished
    # Here and not at the top: they take ten seconds, which --help and a mistyped key need not wait for.
    with loading("PyTorch and Lightning"):
        import lightning as L
        from tqdm.contrib.logging import logging_redirect_tqdm

        from mnist_lit.data import MNISTDataModule
        from mnist_lit.model import MNISTClassifier
        from mnist_lit.reports.report import learning_curve, write_report
        from mnist_lit.reports.scores import PredictionCollector, scores
        from mnist_lit.training import memory
        from mnist_lit.training.checkpoints import Checkpoints, StopOnNaN
        from mnist_lit.training.randomness import SeedEachBatch
        from mnist_lit.training.recorder import RunRecorder
        from mnist_lit.training.trainer import build_trainer, check_batches, device_name

    config = {"seed": seed, "data": data, "model": model, "optimizer": optimizer, "trainer": trainer}
    config |= {"checkpoint": checkpoint or {}, "logger": logger}
    memory.keep_freed_memory()

    L.seed_everything(seed, verbose=False)
    classifier = MNISTClassifier(model, optimizer)
    datamodule = MNISTDataModule(**data, seed=seed)
    recorder = RunRecorder(folder)
    wanted = trainer["enable_checkpointing"] and not trainer["fast_dev_run"]
    checkpoints = Checkpoints(folder, **(checkpoint or {}), enabled=wanted)
    if not datamodule.val_size:
        trainer = {**trainer, "limit_val_batches": 0, "val_check_interval": None}  # nothing to validate on
    answers = PredictionCollector()
    callbacks = [SeedEachBatch(seed), StopOnNaN(), recorder, checkpoints, answers]
    lightning_trainer = build_trainer(folder, trainer, logger, callbacks, resumed=bool(resume))
    datamodule.prepare_data()
    datamodule.setup()
    check_batches(lightning_trainer, datamodule, trainer)
    with runs.locked(folder) if lightning_trainer.is_global_zero else nullcontext():
        if lightning_trainer.is_global_zero:
            (runs.reopen if resume else runs.create)(folder, config, datamodule.facts)
        _log_run_header(lightning_trainer, classifier, datamodule, trainer["enable_model_summary"], seed)
        start = Path(resume) if resume and Path(resume).is_file() else None
        if resume:
            log.info("going on with %s from %s", runs.display_path(folder), start.name if start else "its beginning")
        # A line of the log goes above the bar, not into it; there is one bar.
        with logging_redirect_tqdm() if lightning_trainer.is_global_zero else nullcontext():
            lightning_trainer.fit(classifier, datamodule=datamodule, ckpt_path=start)
        best_path = checkpoints.best_path
        (test,) = lightning_trainer.test(classifier, datamodule, ckpt_path=best_path, verbose=False)

        final = recorder.history[-1]
        # The first of the best, as the checkpoint callback keeps it.
        tested = max(recorder.validations, key=lambda row: row["val/acc"]) if best_path else final
        results: dict[str, Any] = {
            "test/loss": test["test/loss"],
            "test/acc": test["test/acc"],
            "train/loss": final["train/loss"],
            "train/acc": final["train/acc"],
            **{key: tested[key] for key in ("val/loss", "val/acc") if key in tested},
            "tested_weights": f"best (epoch {tested['epoch']})" if best_path else "final",
            "epochs": len(recorder.history),
            "epoch_seconds": [row["epoch_seconds"] for row in recorder.history],
            "max_epochs": trainer["max_epochs"],
            "fit_seconds": recorder.fit_seconds,
            "peak_memory_bytes": memory.peak_memory_bytes(),
            "device": device_name(lightning_trainer),
            "precision": str(lightning_trainer.precision),
            "data": datamodule.facts,
            "seed": seed,
            "versions": runs.versions(),
            **scores(answers.probabilities, answers.labels),
        }
        if lightning_trainer.is_global_zero:
            learning_curve(recorder.history, results, folder / "learning_curve.png")
            write_report(folder / "report.html", results, config, answers, classifier.network, recorder.history)
            log.info("\n%s", _table(results, folder))
            runs.write_json(folder / "metrics.json", results)
            print("loss=", results["test/loss"])  # the tutorial's own two lines
            print("accuracy=", results["test/acc"])
        return results


def _log_run_header(trainer: Any, classifier: Any, datamodule: Any, summary: bool, seed: int) -> None:
    if summary:
        log.info("%s\n%s parameters", classifier.network, f"{sum(p.numel() for p in classifier.parameters()):,}")
    counts = [f"{datamodule.facts[key]:,}" for key in ("train", "val", "test")]
    name, checksum = datamodule.facts["name"], datamodule.facts["sha256"]
    log.info("data: %s, %s images to train on, %s to validate, %s to test, sha256 %s", name, *counts, checksum[:16])
    for each in trainer.loggers:
        each.log_hyperparams({"data": name, "data_sha256": checksum, "seed": seed})


def _results_of_finished_run(folder: Path, trainer: dict[str, Any]) -> dict[str, Any] | None:
    """What ``metrics.json`` has, if no more epochs are asked for than it is of."""
    try:
        results = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return results if results["max_epochs"] == trainer["max_epochs"] else None


def _table(results: dict[str, Any], folder: Path) -> str:
    rows = [
        ("train, last epoch", "train"),
        ("validation", "val"),
        (f"test, {results['tested_weights']} weights", "test"),
    ]
    lines = [f"{'':28}{'loss':>8}{'accuracy':>10}"]
    for title, stage in rows:
        if f"{stage}/loss" in results:
            lines.append(f"{title:28}{results[f'{stage}/loss']:8.4f}{results[f'{stage}/acc']:10.4f}")
    count, seconds = results["epochs"], results["fit_seconds"]
    lines.append(f"{count} epoch{'s' * (count > 1)} in {seconds:.0f} s on {results['device']}")
    data = results["data"]["name"]
    warning = ", NOT THE FULL MNIST" if data == SAMPLE_NAME else ""
    lines.append(f"data: {data}{warning}; everything is in {runs.display_path(folder)}")
    return "\n".join(lines)


def main() -> None:
    from mnist_lit.sweeps import sweep

    launch("train", train, run_folder=True, sweep=sweep.run)


if __name__ == "__main__":
    main()
