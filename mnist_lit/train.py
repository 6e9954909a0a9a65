"""``python -m mnist_lit.train``: train the network, test it, and write everything to one run folder."""

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from mnist_lit.cli.forked import in_each_process
from mnist_lit.cli.launch import launch, loading
from mnist_lit.reports.results import (
    limited_by,
    limits,
    only_showing,
    results_of_finished_run,
    training_results,
    training_table,
)
from mnist_lit.storage import runs
from mnist_lit.storage.provenance import facts_of

log = logging.getLogger("mnist_lit.train")


@in_each_process
def train(
    folder: str | Path,
    seed: int,
    data: dict[str, Any],
    model: dict[str, Any],
    optimizer: dict[str, Any],
    trainer: dict[str, Any],
    checkpoint: dict[str, Any] | None = None,
    scheduler: dict[str, Any] | None = None,
    augment: dict[str, Any] | None = None,
    loss: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
    callbacks: dict[str, Any] | None = None,
    logger: dict[str, dict[str, Any]] | None = None,
    float32_matmul_precision: str | None = None,
    resume: str | Path | None = None,
    **sections: Any,
) -> dict[str, Any]:
    """Train and test; the arguments after ``folder`` are the sections of ``conf/train.yaml`` as plain values.

    Args:
        folder: The run folder. It may exist, but must not contain a run unless that run is resumed.
        resume: The checkpoint in ``folder`` to resume from, or ``folder`` itself to start over; None for a new run.
        sections: Additional sections, which are saved with the configuration.

    Returns:
        The content of ``metrics.json``.

    Raises:
        UserError: The configuration, the data or this machine do not allow the run, the loss is not finite, or the report
            cannot be written, which loses no results.
        Interrupted: A signal arrived; the last checkpoint has the state.
    """
    folder = Path(folder)
    if resume and (finished := results_of_finished_run(folder, trainer)):
        log.info("%s is finished:\n\n%s", runs.display_path(folder), training_table(finished, folder))
        return finished
    # Imported here because they take ten seconds, for which --help and a mistyped key should not have to wait.
    with loading("PyTorch and Lightning"):
        import lightning as L

        from mnist_lit.build import instantiate
        from mnist_lit.kernels.memory import keep_freed_memory
        from mnist_lit.model import MNISTClassifier
        from mnist_lit.reports.report import learning_curve, write_report
        from mnist_lit.reports.scores import PredictionCollector, scores
        from mnist_lit.training import harness
        from mnist_lit.training.always import SeedEachBatch, StopOnNaN
        from mnist_lit.training.calibration import Calibration
        from mnist_lit.training.recorder import RunRecorder

    keep_freed_memory()
    L.seed_everything(seed, verbose=False)
    modules = harness.build_module("augment", augment), harness.build_module("loss", loss)
    classifier = MNISTClassifier(model, optimizer, scheduler, *modules, harness.build_metrics(metrics))
    datamodule: Any = instantiate("data", data, L.LightningDataModule, seed=seed)
    checkpoints = harness.build_checkpoints(folder, checkpoint or {}, trainer)
    recorder, predictions = RunRecorder(folder), PredictionCollector()
    own = [SeedEachBatch(seed), StopOnNaN(), Calibration(), recorder, checkpoints, predictions]
    own += harness.build_callbacks(callbacks)
    lightning_trainer = harness.build_trainer(folder, trainer, logger, own, datamodule, resumed=bool(resume))
    harness.prepare_data(lightning_trainer, datamodule, trainer, scheduler)

    config = {"seed": seed, "data": data, "augment": augment, "model": model, "loss": loss, "optimizer": optimizer}
    config |= {"scheduler": scheduler, "metrics": metrics, "trainer": trainer, "callbacks": callbacks}
    config |= {"checkpoint": checkpoint or {}, "logger": logger}
    config |= {"float32_matmul_precision": float32_matmul_precision, **sections}
    is_first = lightning_trainer.is_global_zero
    with runs.locked(folder) if is_first else nullcontext(), harness.matmul_precision(float32_matmul_precision):
        if is_first:
            (runs.reopen if resume else runs.create)(folder, config, facts_of(datamodule))
        harness.log_header(lightning_trainer, classifier, datamodule, config, resume)
        with harness.fitting(lightning_trainer, is_new=not resume):
            start = resume if resume and Path(resume).is_file() else None
            lightning_trainer.fit(classifier, datamodule=datamodule, ckpt_path=start)
        checkpoints.load_best(classifier)
        test = harness.tested(lightning_trainer, classifier, datamodule)
        results = {**test, **training_results(recorder, checkpoints), "seed": seed, **limits(trainer)}
        results |= {"limited": limited_by(trainer), **harness.conditions(lightning_trainer, datamodule)}
        classes, temperature = facts_of(datamodule).get("classes"), results.get("val/temperature")
        results |= scores(predictions.probabilities, predictions.labels, classes, temperature)
        if is_first:
            runs.write_json(folder / "metrics.json", results)
            log.info("\n%s", training_table(results, folder))
            print("loss=", results["test/loss"])  # the tutorial's own two lines
            print("accuracy=", results["test/acc"])
            with only_showing("the report", folder):
                learning_curve(recorder.history, results, folder / "learning_curve.png")
                write_report(folder / "report.html", results, config, predictions, classifier.network, recorder.history)
        return results


def main() -> None:
    from mnist_lit.sweeps import sweep

    launch("train", train, run_folder=True, sweep=sweep.run)


if __name__ == "__main__":
    main()
