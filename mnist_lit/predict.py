"""``python -m mnist_lit.predict``: which digits pictures show."""

import csv
import glob
import io
import json
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mnist_lit import UserError, require_packages
from mnist_lit.cli import latest
from mnist_lit.cli.launch import launch, loading
from mnist_lit.inference.contact_sheet import MAX_PICTURES, contact_sheet_of
from mnist_lit.storage.atomic import atomic_write, require_free

BATCH = 128  # pictures that are read, and then predicted, at a time
MANY = 512  # from so many pictures on, other processes read them
COLUMNS = ("file", "digit", "probability", *(f"p{digit}" for digit in range(10)), "error")

Read = tuple[str, np.ndarray | None, str]  # a picture's path, its 28x28 pixels if it could be read, and else why not


def predict(
    images: str | Path | list[str] | list[Path],
    ckpt: str | Path = "latest",
    output: str | Path | None = None,
    preprocess: str = "mnist",
    contact_sheet: str | Path | None = None,
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Predict the digit in each picture; the arguments are the keys of ``conf/predict.yaml``.

    Returns:
        A row a picture, in the order of ``images``, with the keys ``COLUMNS``: the digit, its probability and those
        of all ten (``p0`` to ``p9``), which are None for a picture that could not be read, and ``error``, which says
        why and else is None.

    Raises:
        UserError: No picture is found at all, or a value, a file that is in the way or the checkpoint does not allow it.
    """
    require_packages("predict", "scipy")
    for key, path, endings in (("output", output, (".csv", ".json")), ("contact_sheet", contact_sheet, (".png",))):
        if path is not None:
            if Path(path).suffix.lower() not in endings:
                raise UserError(f"{key}={path}: must end in {' or '.join(endings)}")
            require_free(key, Path(path), overwrite)
    found = list(find_pictures([images] if isinstance(images, (str, Path)) else images))
    if all(error for _, error in found):
        raise UserError("; ".join(f"images={path}: {error}" for path, error in found))
    rows: list[dict[str, Any]] = []
    pictures: list[np.ndarray | None] = []
    paths = [path for path, error in found if not error]
    missing = [_row(path, None, error) for path, error in found if error]
    with _reading(paths, preprocess) as batches, tqdm(total=len(paths), unit=" pictures", disable=None) as bar:
        with loading("PyTorch"):  # here, so that the other processes read meanwhile
            import torch

            from mnist_lit.inference.trained import load

        model = load(latest.resolve(ckpt))
        for batch in batches:
            pixels = [each for _, each, _ in batch if each is not None]
            answers: Iterator[list[float]] = iter(())
            if pixels:
                with torch.inference_mode():
                    answers = iter(model(torch.from_numpy(np.stack(pixels)).unsqueeze(1).float().div(255)).tolist())
            rows += [_row(path, None if each is None else next(answers), error) for path, each, error in batch]
            pictures += [each for _, each, _ in batch] if contact_sheet and len(pictures) < MAX_PICTURES else []
            bar.update(len(batch))
    if contact_sheet:
        atomic_write(Path(contact_sheet), contact_sheet_of(rows, pictures))
    rows += missing
    if output:
        atomic_write(Path(output), _csv(rows) if Path(output).suffix.lower() == ".csv" else _json(rows))
    return rows


def find_pictures(wanted: Iterable[str | Path]) -> Iterator[tuple[str, str]]:
    """Each picture that is meant, once, and what is meant but not there with the reason; the others have none.

    Args:
        wanted: Files; folders, of which all pictures are taken, also from those below; patterns such as ``a/*.png``.
    """
    from mnist_lit.inference.images import ENDINGS

    seen = set()
    for each in map(str, wanted):
        each = os.path.expanduser(each)
        if Path(each).is_dir():
            files, error = _in_folder(Path(each)), f"there are no pictures in this folder ({', '.join(ENDINGS)})"
        elif Path(each).exists() or not glob.has_magic(each):
            files, error = [each], ""
        else:
            matches = sorted(glob.glob(each, recursive=True))
            files = [
                file for match in matches for file in (_in_folder(Path(match)) if Path(match).is_dir() else [match])
            ]
            error = "no file is of this pattern"
        if not files:
            yield each, error
        for file in files:
            if file not in seen:
                seen.add(file)
                yield file, "" if Path(file).exists() else "there is no such file"


def _in_folder(folder: Path) -> list[str]:
    from mnist_lit.inference.images import ENDINGS

    files = (path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and not path.name.startswith("."))
    return sorted(str(path) for path in files if path.is_file())


@contextmanager
def _reading(paths: list[str], preprocess: str) -> Iterator[Iterator[list[Read]]]:
    """In this block the pictures are read, in batches: by other processes if there are many."""
    batches = [paths[start : start + BATCH] for start in range(0, len(paths), BATCH)]
    read = partial(_read, preprocess=preprocess)
    if len(paths) < MANY:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow has to say of odd files
            yield map(read, batches)
        return
    # spawn: a process that comes into being as a copy of one in which torch has threads may hang.
    processes = ProcessPoolExecutor(
        os.cpu_count(), mp_context=multiprocessing.get_context("spawn"), initializer=_begin_reading
    )
    try:
        yield processes.map(read, batches)
    except BrokenProcessPool as error:
        raise UserError("a process that reads pictures was killed; is there enough memory?") from error
    finally:
        processes.shutdown(cancel_futures=True)


def _begin_reading() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for them
    warnings.simplefilter("ignore")


def _read(paths: list[str], preprocess: str) -> list[Read]:
    from mnist_lit.inference.images import PictureError, prepare

    read: list[Read] = []
    for path in paths:
        try:
            read.append((path, prepare(path, preprocess), ""))
        except PictureError as error:
            read.append((path, None, str(error)))
    return read


def _row(path: str, probabilities: list[float] | None, error: str) -> dict[str, Any]:
    if probabilities is None:
        return {**dict.fromkeys(COLUMNS), "file": path, "error": error}
    best = max(range(10), key=probabilities.__getitem__)
    each = {f"p{digit}": round(probability, 6) for digit, probability in enumerate(probabilities)}
    return {"file": path, "digit": best, "probability": each[f"p{best}"], **each, "error": None}


def _csv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode(errors="surrogateescape")


def _json(rows: list[dict[str, Any]]) -> bytes:
    return (json.dumps(rows, indent=1) + "\n").encode()


def _command(**values: Any) -> None:
    """``predict`` with its results on the terminal.

    Raises:
        UserError: Some pictures could not be read: for the exit code, after the others have been predicted.
    """
    rows = predict(**values)
    failed = [row for row in rows if row["error"]]
    if not values["output"]:
        for row in rows:
            if not row["error"]:
                print(f"{row['file']}: {row['digit']} ({row['probability']:.2%})")
    else:
        print(f"{values['output']}: {len(rows) - len(failed):,} pictures")
    for row in failed[:20]:
        print(f"{row['file']}: {row['error']}", file=sys.stderr)
    if failed:
        raise UserError(f"{len(failed):,} of {len(rows):,} could not be predicted")


def main() -> None:
    launch("predict", _command)


if __name__ == "__main__":
    main()
