"""Time this project's epoch against plain PyTorch loops, and its start-up; write docs/overhead.md.

python benchmarks/overhead.py DATA [REPEATS]

A process for each measurement, the contenders in turn (A B C A B C ...), the median of the ratios pair by pair.
"""

import contextlib
import json
import os
import pty
import statistics
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
EPOCHS, BATCHES = 3, 40


def epoch_of_train(data: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        limits = [f"trainer.max_epochs={EPOCHS}", f"trainer.limit_train_batches={BATCHES}", "trainer.accelerator=cpu"]
        on_terminal(
            ["-m", "mnist_lit.train", f"data.dir={data}", "data.source=mnist", f"hydra.run.dir={folder}/run", *limits]
        )
        results = json.loads((Path(folder) / "run" / "metrics.json").read_text())
    return min(results["epoch_seconds"][1:])


def epoch_of_loop(data: str, which: str) -> float:
    printed = call(["benchmarks/plain_loop.py", data, which, str(EPOCHS), str(BATCHES)])
    return min(json.loads(printed)[1:])


def seconds_of(arguments: list[str]) -> float:
    started = time.perf_counter()
    call(arguments, check=False)
    return time.perf_counter() - started


def on_terminal(arguments: list[str]) -> None:
    """Run Python with ``arguments`` on a terminal, where a run draws its progress bar."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=ENVIRONMENT, stdout=theirs, stderr=theirs)
    os.close(theirs)
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while os.read(ours, 4096):
            pass
    os.close(ours)
    if process.wait():
        sys.exit(f"{arguments} failed")


def call(arguments: list[str], check: bool = True) -> str:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=ENVIRONMENT, check=check, capture_output=True, text=True
    ).stdout


def main(data: str, repeats: int) -> None:
    data = str(Path(data).absolute())
    contenders = {
        "python -m mnist_lit.train, with its bar": lambda: epoch_of_train(data),
        "the same network in a plain loop": lambda: epoch_of_loop(data, "ours"),
        "the literal port in a plain loop": lambda: epoch_of_loop(data, "literal"),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats):
        for name, measure in contenders.items():
            times[name].append(measure())
            print(f"{repeat + 1}/{repeats}  {times[name][-1]:7.2f} s  {name}", flush=True)
    own, *_ = times.values()
    lines = [
        "# The price of Lightning",
        "",
        f"Seconds for {BATCHES} training steps of 500 images on a CPU; each measurement is a process of its own (the",
        f"faster of its second and third epoch), the contenders in turn, {repeats} times. `make overhead DATA=FOLDER`",
        "made this file. The mark is a ratio of at most 1.05 against a plain loop over tensors in memory.",
        "",
        "| | median | lowest | highest | this project's time divided by it, median of the pairs |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, values in times.items():
        ratio = statistics.median(ours / theirs for ours, theirs in zip(own, values, strict=True))
        low, high = min(values), max(values)
        lines.append(f"| {name} | {statistics.median(values):.2f} | {low:.2f} | {high:.2f} | {ratio:.3f} |")
    lines += ["", "| answer | median seconds of five |", "| --- | --- |"]
    for arguments in (["--help"], ["optimizer.lrr=1"]):
        median = statistics.median(seconds_of(["-m", "mnist_lit.train", *arguments]) for _ in range(5))
        lines.append(f"| `python -m mnist_lit.train {' '.join(arguments)}` | {median:.2f} |")
    text = "\n".join(lines) + "\n"
    (ROOT / "docs" / "overhead.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 5)
