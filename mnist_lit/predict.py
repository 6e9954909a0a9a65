"""``python -m mnist_lit.predict``: predict the digits in images."""

import glob
import json
import math
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
from tqdm import tqdm

from mnist_lit import UserError, require_packages
from mnist_lit.cli import latest
from mnist_lit.cli.launch import launch, loading, print_for_pipes
from mnist_lit.inference.contact_sheet import MAX_IMAGES, contact_sheet_of
from mnist_lit.storage.atomic import atomic_write, require_free
from mnist_lit.storage.tables import one_line, printable, to_csv

if TYPE_CHECKING:
    from mnist_lit.inference.detector import DigitDetector
    from mnist_lit.inference.trained import TrainedModel

BATCH_SIZE = 128  # images that are read, and then predicted, together
MIN_PARALLEL = 512  # from this many images on, worker processes read them
COLUMNS = ("file", "digit", "probability", *(f"p{digit}" for digit in range(10)), "error")

LoadedImage = tuple[str, list[np.ndarray], str]  # path; its digits, uint8 [28, 28] each, or none and the reason


def predict(
    images: str | Path | list[str] | list[Path],
    ckpt: str | Path = "latest",
    output: str | Path | None = None,
    preprocess: str = "mnist",
    refuse: bool = True,
    segments: bool = False,
    contact_sheet: str | Path | None = None,
    overwrite: bool = False,
    trust: Iterable[str] = (),
) -> list[dict[str, Any]]:
    """Predict the digit in each image; the arguments are the keys of ``conf/predict.yaml``.

    Returns:
        A row per image, in the order of ``images``, with the keys ``COLUMNS``: the file, the predicted digit, its
        probability, the probabilities of all ten digits (``p0`` to ``p9``) and ``error``. If the image cannot be read, or
        shows no digit, ``error`` says why and the others are None; otherwise ``error`` is None. If the model's classes
        are not digits, ``digit`` is the number of the class and ``name`` its name. With ``segments``, ``digit`` is the
        text of all digits from left to right, such as ``"374"``, and ``probability`` that all of them are right.

    Raises:
        UserError: No image is found, an output cannot be written, or the checkpoint cannot be loaded.
    """
    require_packages("predict", "scipy")
    for key, path, endings in (("output", output, (".csv", ".json")), ("contact_sheet", contact_sheet, (".png",))):
        if path is not None:
            if Path(path).suffix.lower() not in endings:
                raise UserError(f"{key}={path}: must end in {' or '.join(endings)}")
            require_free(key, Path(path), overwrite)
    if segments and preprocess != "mnist":
        raise UserError("segments=true finds the digits in the ink, and needs preprocess=mnist")
    found = list(find_images([images] if isinstance(images, (str, Path)) else images))
    if not found:
        raise UserError("images= is empty: give it files or folders")
    if all(error for _, error in found):
        raise UserError("; ".join(f"images={path}: {error}" for path, error in found))
    rows: list[dict[str, Any]] = []
    cells: list[tuple[dict[str, Any], np.ndarray | None]] = []
    paths = [path for path, error in found if not error]
    load_batch = partial(_load_batch, preprocess=preprocess, refuse=refuse, segments=segments)
    with _loader(paths, load_batch) as batches, tqdm(total=len(paths), unit=" images", disable=None) as bar:
        with loading("PyTorch"):  # while the workers are already reading
            from mnist_lit.inference.detector import NO_DIGIT, load_detector
            from mnist_lit.inference.trained import load_for_pictures

        model = load_for_pictures(latest.resolve(ckpt), trust)
        detector = load_detector() if refuse and model.reads_digits else None
        for batch in batches:
            predicted = _predicted([digit for _, digits, _ in batch for digit in digits], model, detector)
            for path, digits, error in batch:
                each = [next(predicted) for _ in digits]
                if any(probabilities is None for probabilities in each):
                    error = NO_DIGIT
                parts = [_row(path, probabilities, error, model.names) for probabilities in each if not error]
                rows.append((_joined(parts) if segments else parts[0]) if parts else _row(path, None, error))
                if contact_sheet and len(cells) < MAX_IMAGES:
                    pictures: list[np.ndarray | None] = [*digits] or [None]
                    cells += zip(parts or [rows[-1]] * len(pictures), pictures, strict=True)
            bar.update(len(batch))
    if contact_sheet:
        atomic_write(Path(contact_sheet), contact_sheet_of(cells))
    in_order = iter(rows)
    rows = [_row(path, None, error) if error else next(in_order) for path, error in found]
    if output:
        is_csv = Path(output).suffix.lower() == ".csv"
        columns = [*COLUMNS[:2], "name", *COLUMNS[2:]] if any("name" in row for row in rows) else COLUMNS
        atomic_write(Path(output), to_csv(columns, rows) if is_csv else (json.dumps(rows, indent=1) + "\n").encode())
    return rows


def _predicted(
    images: list[np.ndarray], model: "TrainedModel", detector: "DigitDetector | None"
) -> Iterator[list[float] | None]:
    """The ten probabilities of each image, uint8 [28, 28]; None if the detector sees no digit in it."""
    import torch

    if not images:
        return iter(())
    with torch.inference_mode():
        inputs = torch.from_numpy(np.stack(images)).unsqueeze(1) / 255
        shown = detector.shows_digit(inputs).tolist() if detector else [True] * len(images)
        probabilities = model(inputs).tolist()
    return (each if digit else None for each, digit in zip(probabilities, shown, strict=True))


def find_images(patterns: Iterable[str | Path]) -> Iterator[tuple[str, str]]:
    """Each image file once, with an empty string; and each pattern that matches none, with the reason.

    Args:
        patterns: Files; folders, which are searched recursively; glob patterns such as ``a/*.png``; ``-``, which is the
            standard input. An ``.npy`` or ``.npz`` file yields a name for each of its images.
    """
    from mnist_lit.inference import arrays
    from mnist_lit.inference.images import EXTENSIONS
    from mnist_lit.inference.ink import ImageError

    def expand(path: str) -> list[str]:
        if not os.path.isdir(path):
            return [path]
        files = (file for file in Path(path).rglob("*") if file.suffix.lower() in EXTENSIONS and file.is_file())
        return sorted(str(file) for file in files if not is_hidden(file, Path(path)))

    seen = set()
    for pattern in map(os.path.expanduser, map(str, patterns)):
        if pattern == "-":
            if pattern not in seen:
                yield pattern, ""
            seen.add(pattern)
            continue
        if os.path.exists(pattern) or not glob.has_magic(pattern):
            matches, error = [pattern], f"this folder has no images ({', '.join(EXTENSIONS)})"
        else:
            matches, error = sorted(glob.glob(pattern, recursive=True)), "no file matches this pattern"
        files = [file for match in matches for file in expand(match)]
        if not files:
            yield pattern, error
        for file in files:
            if file in seen:
                continue
            seen.add(file)
            if not os.path.exists(file):
                yield file, "no such file"
            elif file.lower().endswith(arrays.EXTENSIONS):
                try:
                    yield from ((name, "") for name in arrays.names_in(file))
                except ImageError as error:
                    yield file, str(error)
            else:
                yield file, ""


def is_hidden(file: Path, folder: Path) -> bool:
    """Whether the file, or one of the folders between it and ``folder``, has a name that begins with a dot."""
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def skipped(patterns: Iterable[str | Path]) -> Iterator[tuple[str, str]]:
    """What is in the folders among ``patterns`` and not taken for an image, and why."""
    from mnist_lit.inference import arrays
    from mnist_lit.inference.images import EXTENSIONS

    for folder in (Path(os.path.expanduser(pattern)) for pattern in patterns):
        for file in sorted(folder.rglob("*")) if os.path.isdir(folder) else ():
            image = file.suffix.lower() in EXTENSIONS
            if file.is_dir():
                reason = "is a link to a folder" if file.is_symlink() else "is a folder" if image else ""
            elif not file.is_file():
                reason = "is not a regular file" if file.exists() else "is a broken link"
            elif is_hidden(file, folder):
                reason = "is hidden"
            elif file.suffix.lower() in arrays.EXTENSIONS:
                reason = "is an array file, which is read only if it is named"
            else:
                reason = "" if image else "has no image extension"
            if reason:
                yield str(file), reason


@contextmanager
def _loader(
    paths: list[str], load_batch: Callable[[list[str]], list[LoadedImage]]
) -> Iterator[Iterator[list[LoadedImage]]]:
    """Iterate over batches of images, which worker processes read ahead if there are many."""
    batches = [paths[start : start + BATCH_SIZE] for start in range(0, len(paths), BATCH_SIZE)]
    if len(paths) < MIN_PARALLEL or "-" in paths:  # the workers have another standard input
        yield map(load_batch, batches)
        return
    # spawn: a fork of a process in which torch has started threads may hang. SIG_IGN: the main process handles Ctrl-C.
    workers = ProcessPoolExecutor(
        mp_context=multiprocessing.get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )
    try:
        yield workers.map(load_batch, batches)
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process that reads images was killed (out of memory?), or cannot start (a script calls "
            "predict below `if __name__ == '__main__':`)"
        ) from error
    finally:
        workers.shutdown(cancel_futures=True)


def _load_batch(paths: list[str], preprocess: str, refuse: bool, segments: bool) -> list[LoadedImage]:
    from mnist_lit.inference import arrays
    from mnist_lit.inference.digit import each_to_mnist
    from mnist_lit.inference.images import normalized, read_grey, reduced_grey
    from mnist_lit.inference.ink import ImageError

    loaded: list[LoadedImage] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about unusual files
        for path in paths:
            try:
                if arrays.NAME.fullmatch(path):
                    grey = reduced_grey(arrays.read_named(path))
                else:
                    grey = read_grey(sys.stdin.buffer if path == "-" else path)
                digits = each_to_mnist(grey) if segments else [normalized(grey, preprocess, refuse)]
                loaded.append((path, digits, ""))
            except ImageError as error:
                loaded.append((path, [], str(error)))
            except Exception as error:  # noqa: BLE001  # one odd picture must not cost the answers for all others
                loaded.append((path, [], f"cannot be prepared ({type(error).__name__}: {one_line(error, limit=200)})"))
    return loaded


def _row(
    path: str, probabilities: list[float] | None, error: str, names: Sequence[str] | None = None
) -> dict[str, Any]:
    if probabilities is None:
        return {**dict.fromkeys(COLUMNS), "file": path, "error": error}
    digit = max(range(10), key=probabilities.__getitem__)
    rounded = {f"p{i}": round(probability, 6) for i, probability in enumerate(probabilities)}
    name = {"name": names[digit]} if names else {}
    return {"file": path, "digit": digit, **name, "probability": rounded[f"p{digit}"], **rounded, "error": None}


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of an image with several digits, from theirs."""
    text = (" " if "name" in parts[0] else "").join(str(part.get("name", part["digit"])) for part in parts)
    probability = round(math.prod(part["probability"] for part in parts), 6)
    return {**dict.fromkeys(COLUMNS), "file": parts[0]["file"], "digit": text, "probability": probability}


def _command(**values: Any) -> None:
    """Run ``predict`` and print the results; at the end, a UserError if some images could not be predicted."""
    rows = predict(**values)
    print_for_pipes()  # not earlier: a worker's broken pipe would end this process without a word
    failed = [row for row in rows if row["error"]]
    left_out = list(skipped([values["images"]] if isinstance(values["images"], str) else values["images"]))
    if values["output"]:
        print(f"{values['output']}: {len(rows) - len(failed):,} images")
    else:
        for row in rows:
            if not row["error"]:
                print(f"{_shown(row['file'], sys.stdout)}: {row.get('name', row['digit'])} ({row['probability']:.2%})")
    for row in failed[:20]:
        print(f"{_shown(row['file'], sys.stderr)}: {row['error']}", file=sys.stderr)
    for file, reason in left_out[:20]:
        print(f"{_shown(file, sys.stderr)}: skipped, {reason}", file=sys.stderr)
    if left_out:
        print(f"{len(left_out):,} file{'s' * (len(left_out) > 1)} skipped", file=sys.stderr)
    if failed:
        raise UserError(f"{len(failed):,} of {len(rows):,} images could not be predicted")


def _shown(file: str, stream: TextIO) -> str:
    """A file's name; on a terminal, which would obey some characters, with ? for those."""
    return printable(file, 1000) if stream.isatty() else file


def main() -> None:
    launch("predict", _command)


if __name__ == "__main__":
    main()
