"""``python -m mnist_lit.train``: train the network, test it, and leave everything in one run folder."""

import logging
import time
from pathlib import Path
from typing import Any

from mnist_lit.launch import launch

log = logging.getLogger("mnist_lit.train")


def train(
    folder: str | Path,
    seed: int,
    data: dict[str, Any],
    model: dict[str, Any],
    optimizer: dict[str, Any],
    trainer: dict[str, Any],
    logger: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Train and test; the arguments after ``folder`` are the sections of ``conf/train.yaml`` as plain values.

    Args:
        folder: The run's folder; it may exist, but not hold a run.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        Refusal: A value, the data or this machine do not allow the run.
    """
    # Here and not at the top: they take ten seconds, which --help and a mistyped key need not wait for.
    import lightning as L
    from tqdm.contrib.logging import logging_redirect_tqdm

    from mnist_lit import memory, runs
    from mnist_lit.data import MNISTDataModule
    from mnist_lit.model import MNISTClassifier
    from mnist_lit.recorder import RunRecorder
    from mnist_lit.report import learning_curve
    from mnist_lit.trainer import best_checkpoint, build_trainer, check_batches, device_name, last_checkpoint

    config = {"seed": seed, "data": data, "model": model, "optimizer": optimizer, "trainer": trainer, "logger": logger}
    folder = Path(folder)
    memory.keep_freed_memory()

    L.seed_everything(seed, verbose=False)
    classifier = MNISTClassifier(model, optimizer)
    datamodule = MNISTDataModule(**data, seed=seed)
    recorder = RunRecorder(folder)
    if not datamodule.val_size:
        trainer = {**trainer, "limit_val_batches": 0, "val_check_interval": None}  # nothing to validate on
    best = best_checkpoint(folder) if datamodule.val_size and trainer["enable_checkpointing"] else None
    last = last_checkpoint(folder) if trainer["enable_checkpointing"] else None
    callbacks: list[L.Callback] = [callback for callback in (recorder, last, best) if callback]
    lightning_trainer = build_trainer(folder, trainer, logger, callbacks)
    datamodule.prepare_data()
    datamodule.setup()
    check_batches(lightning_trainer, datamodule, trainer)
    if lightning_trainer.is_global_zero:
        runs.begin(folder, config, datamodule.facts)
    if trainer["enable_model_summary"]:
        log.info("%s\n%s parameters", classifier.network, f"{sum(p.numel() for p in classifier.parameters()):,}")
    counts = [f"{datamodule.facts[key]:,}" for key in ("train", "val", "test")]
    name, checksum = datamodule.facts["name"], datamodule.facts["sha256"]
    log.info("data: %s, %s images to train on, %s to validate, %s to test, sha256 %s", name, *counts, checksum[:16])
    for each in lightning_trainer.loggers:
        each.log_hyperparams({"data": name, "data_sha256": checksum, "seed": seed})

    started = time.perf_counter()
    with logging_redirect_tqdm():  # a line of the log goes above the bar, not into it
        lightning_trainer.fit(classifier, datamodule=datamodule)
    fit_seconds = time.perf_counter() - started
    best_path = best.best_model_path if best else None
    (test,) = lightning_trainer.test(classifier, datamodule, ckpt_path=best_path or None, verbose=False)

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
        "fit_seconds": fit_seconds,
        "peak_memory_bytes": memory.peak_memory_bytes(),
        "device": device_name(lightning_trainer),
        "precision": str(lightning_trainer.precision),
        "data": datamodule.facts,
        "seed": seed,
        "versions": runs.versions(),
    }
    if lightning_trainer.is_global_zero:
        learning_curve(recorder.history, results, folder / "learning_curve.png")
        log.info("\n%s", _table(results, folder))
        runs.write_json(folder / "metrics.json", results)
        print("loss=", results["test/loss"])  # the tutorial's own two lines
        print("accuracy=", results["test/acc"])
    return results


def _table(results: dict[str, Any], folder: Path) -> str:
    from mnist_lit.mnist_files import SAMPLE_NAME

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
    where = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    lines.append(f"data: {data}{', NOT THE FULL MNIST' if data == SAMPLE_NAME else ''}; everything is in {where}")
    return "\n".join(lines)


def main() -> None:
    launch("train", train, run_folder=True)


if __name__ == "__main__":
    main()
