"""Time this project against its peers; write docs/speed.md, docs/speed.json and docs/speed.png.

python benchmarks/bench.py DATA [REPEATS [BATCHES]]

A process for each measurement, the contenders in turn (A B C A B C ...), medians, and ratios pair by pair. No clock
starts before every contender has shown the same ten losses. An epoch is 120 steps of 500 images; the peers, whose steps
take up to a second and more, are timed over BATCHES of them, and their epoch is that much longer by calculation.
"""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
ENVIRONMENT = {**os.environ, "PYTHONWARNINGS": "ignore"}
EPOCH, EPOCHS = 120, 2  # the first warms up
TUTORIAL = 12  # its epochs
STEP_GFLOP = 500 * 70.6e-3  # forward and backward of one image: 70.6 MFLOP
OWN, OWN_STEP, FIELD = "mnist_lit, as shipped", "mnist_lit's step without Lightning", "Lightning as tutorials write it"
REFERENCE, TENSORFLOW = "plain PyTorch loop", "Keras 3 on TensorFlow"
PACKAGES = ["torch", "torchvision", "lightning", "keras", "tensorflow-cpu", "jax", "flax", "optax", "tinygrad", "numpy"]
MATMUL = """
import time, torch
a, b = torch.rand(3000, 3000), torch.rand(3000, 3000)
seconds = []
for _ in range(10):
    started = time.perf_counter(); a @ b; seconds.append(time.perf_counter() - started)
print(2 * 3000**3 / 1e9 / min(seconds))
"""


def call(*arguments: str) -> Any:
    """The last line that Python prints with these arguments, from JSON, or None and its last error line."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return json.loads(done.stdout.strip().splitlines()[-1]), ""


def agreement(names: list[str], data: str) -> tuple[dict[str, float], dict[str, str]]:
    """The largest relative difference of each contender's ten losses from the reference's; why others did not run."""
    reference, error = call("benchmarks/contenders.py", REFERENCE, data, "losses")
    if not reference:
        sys.exit(f"{REFERENCE}: {error}")
    differences, failed = {}, {}
    for name in names:
        losses, error = call("benchmarks/contenders.py", name, data, "losses")
        if losses is None:
            failed[name] = error
            continue
        differences[name] = max(abs(a - b) / b for a, b in zip(losses, reference, strict=True))
        print(f"losses of ten steps within {differences[name]:.1e}  {name}", flush=True)
        if not differences[name] <= 1e-5:
            sys.exit(f"{name} does not train as the others do, so its time would mean nothing")
    return differences, failed


def measure(name: str, data: str, batches: int) -> dict[str, float]:
    """Seconds of a steady epoch, of all else in the process, and of the tutorial's fit and process; bytes."""
    count = EPOCH if name in (OWN, OWN_STEP) else batches
    started = time.perf_counter()
    result, error = call("benchmarks/contenders.py", name, data, str(EPOCHS), str(count))
    process = time.perf_counter() - started
    if result is None:
        sys.exit(f"{name}: {error}")
    first, *others = result["epoch_seconds"]
    epoch = min(others) * EPOCH / count
    rest = process - sum(result["epoch_seconds"])
    fit = TUTORIAL * epoch + max(0, first - min(others))
    print(f"{epoch:8.2f} s an epoch, {rest:5.1f} s before and after  {name}", flush=True)
    memory = result["peak_memory_bytes"]
    return {"epoch": epoch, "rest": rest, "fit": fit, "process": rest + fit, "memory": memory, "measured": process}


def main(data: str, repeats: int, batches: int) -> None:
    from contenders import CONTENDERS, SAME_STEP

    data = str(Path(data).absolute())
    differences, failed = agreement([name for name in CONTENDERS if not name.startswith(SAME_STEP)], data)
    names = [name for name in CONTENDERS if name not in failed]
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    speeds = []
    for repeat in range(repeats):
        print(f"-- {repeat + 1} of {repeats}", flush=True)
        speeds.append(call("-c", MATMUL)[0])
        for name in list(measured):
            measured[name].append(measure(name, data, batches))
        if not repeat:  # the best number of workers counts, and only that goes on
            field = sorted((n for n in names if n.startswith(FIELD)), key=lambda n: measured[n][0]["epoch"])
            for slower in field[1:]:
                del measured[slower]
    field_name = field[0]
    dense = [STEP_GFLOP * EPOCH / speed for speed in speeds]

    def ratio(other: list[float], key: str = "epoch") -> float:
        return statistics.median(own[key] / o for own, o in zip(measured[OWN], other, strict=True))

    def of(name: str, key: str = "epoch") -> list[float]:
        return [each[key] for each in measured[name]]

    peers = [n for n in measured if n not in (OWN, OWN_STEP, "the same without the compiled operator")]
    fastest = min(peers, key=lambda n: statistics.median(of(n)))
    help_seconds = statistics.median(_seconds_of_help() for _ in range(5))
    targets = [
        (FIELD, field_name.removeprefix(FIELD).strip(", "), ratio(of(field_name)), 0.22),
        ("the fastest peer", fastest, ratio(of(fastest)), 0.50),
        ("the dense arithmetic of an epoch at this machine's speed of large matrix products",
         f"{statistics.median(speeds):.0f} GFLOP/s", ratio(dense), 0.95),
        ("its own step without Lightning", "", ratio(of(OWN_STEP)), 1.03),
    ]  # fmt: skip
    if TENSORFLOW in measured:
        targets.append(("peak memory against Keras on TensorFlow", "", ratio(of(TENSORFLOW, "memory"), "memory"), 1.0))
    versions = {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()}
    facts = {"machine": _machine(), "versions": versions, "repeats": repeats, "batches of the peers": batches}
    results = {"facts": facts, "losses": differences, "failed": failed, "measured": measured, "GFLOP/s": speeds}
    (DOCS / "speed.json").write_text(json.dumps(results, indent=1) + "\n")
    text = _document(facts, measured, differences, failed, targets, help_seconds, ratio)
    (DOCS / "speed.md").write_text(text)
    _picture({name: statistics.median(of(name)) for name in measured}, statistics.median(dense))
    print(text)


def _document(
    facts: Any, measured: Any, differences: Any, failed: Any, targets: Any, help_seconds: float, ratio: Any
) -> str:
    lines = [
        "# Speed",
        "",
        f"An epoch of the tutorial: 120 steps of 500 images, single precision, {facts['machine']}. `make bench",
        f"DATA=FOLDER` made this page, `speed.json` and the picture: {facts['repeats']} repeats, a process for each",
        "measurement, the contenders in turn, medians (lowest to highest), also of the ratios. The first epoch warms up and is not counted;",
        f"the peers' epochs are calculated from {facts['batches of the peers']} steps. The fit is the tutorial's twelve",
        "epochs and the extra time of the first; the process is that and the seconds before and after: imports,",
        "reading the data, and for this project a test batch and the run's files. Both are calculated.",
        "",
        "| | seconds an epoch | this project's divided by it | before and after | fit | process | peak memory | losses agree to |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    order = sorted(measured, key=lambda name: statistics.median(each["epoch"] for each in measured[name]))
    for name in order:
        columns = {key: [each[key] for each in measured[name]] for key in ("epoch", "rest", "fit", "process", "memory")}
        middle = {key: statistics.median(values) for key, values in columns.items()}
        low, high = min(columns["epoch"]), max(columns["epoch"])
        agrees = f"{differences[name]:.0e}" if name in differences else "–"
        lines.append(
            f"| {name} | {middle['epoch']:.2f} ({low:.2f}–{high:.2f}) | {ratio(columns['epoch']):.2f} "
            f"| {middle['rest']:.1f} | {middle['fit']:.0f} | {middle['process']:.0f} | {middle['memory'] / 1e9:.2f} GB | {agrees} |"
        )
    lines += [f"| {name} | did not run: {why} | | | | | | |" for name, why in failed.items()]
    lines += ["", "| against | ratio | target | |", "| --- | --- | --- | --- |"]
    for what, which, value, target in targets:
        reached = "reached" if value <= target else "missed"
        lines.append(f"| {what}{f' ({which})' if which else ''} | {value:.3f} | ≤ {target} | {reached} |")
    reached = "reached" if help_seconds <= 1.5 else "missed"
    lines.append(f"| `--help`, seconds | {help_seconds:.2f} | ≤ 1.5 | {reached} |")
    lines += ["", "![Seconds an epoch](speed.png)", ""]
    lines.append("Versions: " + ", ".join(f"{k} {v}" for k, v in facts["versions"].items() if v) + ".")
    return "\n".join(lines) + "\n"


def _picture(epochs: dict[str, float], dense: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    order = sorted(epochs, key=lambda name: -epochs[name])
    figure, axes = pyplot.subplots(figsize=(8, 0.42 * len(order) + 1.2), layout="constrained")
    colours = ["#c8501e" if name == OWN else "#8a949e" for name in order]
    bars = axes.barh(order, [epochs[name] for name in order], color=colours)
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.axvline(dense, color="black", lw=1, ls=":")
    axes.annotate(
        "all of the arithmetic at the speed\nof a large matrix product",
        (dense, len(order) - 1),
        (6, 0),
        textcoords="offset points",
        fontsize=8,
        va="center",
    )
    axes.set_xlabel("seconds an epoch (120 steps of 500 images)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(DOCS / "speed.png", dpi=110)


def _seconds_of_help() -> float:
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "mnist_lit.train", "--help"], cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True
    )
    return time.perf_counter() - started


def _machine() -> str:
    import torch

    return f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    more = [int(argument) for argument in sys.argv[2:]]
    main(sys.argv[1], *(more + [5, 20][len(more) :]))
