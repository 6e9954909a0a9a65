"""The results of a run: the content of ``metrics.json``, and the tables on the terminal."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mnist_lit import UserError
from mnist_lit.storage import runs
from mnist_lit.storage.provenance import SAMPLE_NAME
from mnist_lit.storage.tables import one_line


def training_results(recorder: Any, checkpoints: Any) -> dict[str, Any]:
    """The results of training.

    Args:
        recorder: The ``RunRecorder`` of the run.
        checkpoints: Its ``Checkpoints``, which know the best weights by validation, if those are tested.
    """
    final, best = recorder.history[-1] if recorder.history else {}, checkpoints.best
    is_best = checkpoints.best_path is not None
    tested = next(row for row in recorder.validations if _agree(row, best)) if is_best else final
    return {
        **{key: value for key, value in final.items() if key.startswith("train/")},
        **{key: value for key, value in tested.items() if key.startswith("val/")},
        "tested_weights": f"best (epoch {tested['epoch']})" if is_best else "final",
        "epochs": len(recorder.history),
        "epoch_seconds": [row["epoch_seconds"] for row in recorder.history],
        "fit_seconds": recorder.fit_seconds,
        "test_seconds": recorder.test_seconds,
    }


def _agree(row: dict[str, Any], best: dict[str, Any]) -> bool:
    """Whether a validation has the values of the best one, which may be NaN."""
    return all(row.get(key) == value or math.isnan(value) for key, value in best.items())


LIMITS = ("max_epochs", "max_steps", "max_time")  # they end a run, and may be raised to let it go on


def limits(trainer: dict[str, Any]) -> dict[str, Any]:
    """What ends a run, of the section ``trainer``."""
    return {key: trainer.get(key) for key in LIMITS}


ALL_IMAGES: dict[str, tuple[Any, ...]] = {  # arguments of the Trainer, with their values for which all images are used
    "fast_dev_run": (None, False, 0),
    "overfit_batches": (None, 0),
    **dict.fromkeys(("limit_train_batches", "limit_val_batches", "limit_test_batches"), (None, 1.0)),
}


def limited_by(trainer: dict[str, Any]) -> list[str]:
    """What in the section ``trainer`` keeps a run from using all images, such as ``fast_dev_run=1``.

    Its figures are then no results. A ``limit_train_batches`` of 1 is one batch, and of 1.0 all of them.
    """
    given = {key: trainer.get(key) for key in ALL_IMAGES}
    one_batch = {key for key, value in given.items() if key.startswith("limit") and type(value) is int}
    return [f"{key}={value}" for key, value in given.items() if value not in ALL_IMAGES[key] or key in one_batch]


def results_of_finished_run(folder: Path, trainer: dict[str, Any]) -> dict[str, Any] | None:
    """The content of ``metrics.json``, if the run is finished and no more is asked for than it had as limits.

    Raises:
        UserError: The file is damaged.
    """
    path = folder / "metrics.json"
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({one_line(error)}); without it, resume= tests the run once more"
        ) from error
    same = all(results.get(key, value) == value for key, value in limits(trainer).items())
    return results if same else None


@contextmanager
def only_showing(what: str, folder: Path, results: str = "metrics.json") -> Iterator[None]:
    """In this block, which only shows results, any exception becomes a ``UserError`` that says where they are.

    Args:
        what: What the block writes.
        results: The file in ``folder`` that has them.
    """
    try:
        yield
    except Exception as error:
        reason = one_line(error, 1000)  # of a UserError every word counts
        reason = reason if isinstance(error, UserError) else f"{type(error).__name__}: {reason}"
        where = runs.display_path(folder.absolute() / results)
        raise UserError(f"{what} cannot be written ({reason}); the results are in {where}") from error


OWN_SCORES = {
    "test/loss": "loss",
    "test/acc": "accuracy",
    "test/calibration_error": "calibration error",
    "test/calibration_error_scaled": "... as predict gives it",
}


def extra_metrics(results: dict[str, Any]) -> list[str]:
    """The names of the metrics that a run had besides loss and accuracy."""
    found = [key for key, value in results.items() if key.startswith("test/") and isinstance(value, float)]
    return [key.removeprefix("test/") for key in found if key not in OWN_SCORES]


def training_table(results: dict[str, Any], folder: Path) -> str:
    rows = [
        ("train, last epoch", "train"),
        ("validation", "val"),
        (f"test, {results['tested_weights']} weights", "test"),
    ]
    widths = {"acc": 10, **{name: max(10, len(name) + 2) for name in extra_metrics(results)}}
    names = "".join(f"{'accuracy' if name == 'acc' else name:>{width}}" for name, width in widths.items())
    lines = [f"{'':28}{'loss':>8}{names}"]
    for title, stage in rows:
        if f"{stage}/loss" in results:
            found = {name: results.get(f"{stage}/{name}") for name in widths}  # a callback may log to one stage alone
            cells = {name: f"{value:.4f}" if isinstance(value, float) else "" for name, value in found.items()}
            values = "".join(f"{cells[name]:>{width}}" for name, width in widths.items())
            lines.append(f"{title:28}{results[f'{stage}/loss']:8.4f}{values}".rstrip())
    count, seconds = results["epochs"], results["fit_seconds"]
    lines.append(f"{count} epoch{'s' * (count != 1)} in {seconds:.0f} s on {results['device']}")
    lines.append(f"data: {_data(results)}; everything is in {runs.display_path(folder)}")
    lines += _limited(results)
    return "\n".join(lines)


def evaluation_table(results: dict[str, Any], folder: Path) -> str:
    lines = [f"{kind_of_class(results)}  images  precision  recall      F1"]
    for row in results["test/digits"]:
        figures = f"{row['precision']:11.4f}{row['recall']:8.4f}{row['f1']:8.4f}"
        lines.append(f"{row['digit']:5}{row['images']:8}{figures}  {row.get('name', '')}".rstrip())
    lines.append("")
    titles = {**OWN_SCORES, **{f"test/{name}": name for name in extra_metrics(results)}}
    lines += [f"test {title:26}{results[key]:.4f}" for key, title in titles.items() if key in results]
    lines.append(f"{results['test/images']:,} images of {_data(results)}, with {results['ckpt']}")
    lines.append(f"the report: {runs.display_path(folder)}/report.html")
    return "\n".join(lines + _limited(results))


def kind_of_class(results: dict[str, Any]) -> str:
    """What each of the classes is called: "digit", or "class" where they have names."""
    return "class" if "name" in results["test/digits"][0] else "digit"


def _limited(results: dict[str, Any]) -> list[str]:
    found = results.get("limited")
    return [f"NOT ALL IMAGES WERE USED ({', '.join(found)}): these figures are not comparable"] if found else []


def _data(results: dict[str, Any]) -> str:
    name: str = results["data"]["name"]
    return f"{name}, NOT THE FULL MNIST" if name == SAMPLE_NAME else name
