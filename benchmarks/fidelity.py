"""Does a whole training here end where Keras' own does? Train both with many seeds; write docs/fidelity.md, .json, .png.

python benchmarks/fidelity.py DATA [--keras 12] [--ours 20] [--keras-jax 0] [--variant NAME SEEDS OVERRIDE ...]
                              [--jobs 1] [--add FILE ...]

A process for each training, Keras and this project in turn. What is finished is in docs/fidelity.json; the same command
goes on after a kill, and with more seeds after a finished one. A variant is this project with something changed, to find
the cause of a difference: --variant "plain path" 8 model.cpu_kernel=false

On a GPU Keras runs on JAX: --keras 0 --ours 0 --keras-jax 50 --variant "mnist_lit on a GPU" 50 trainer.accelerator=gpu
--jobs 4. What was trained on another machine is added from its fidelity.json by --add.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from scipy import stats

ROOT = Path(__file__).parents[1]
DOCS, RUNS = ROOT / "docs", ROOT / "outputs" / "fidelity"
KERAS, KERAS_JAX, OURS = "Keras on TensorFlow", "Keras on JAX", "mnist_lit"
ONE_ORDER = ", one order"  # the images in the same order in every epoch
MARK = 0.0005  # the half-width of a test accuracy's interval that settles it

HEAD = """\
# Fidelity

The tutorial, 12 epochs of the full MNIST with Adadelta's learning rate set to 1.0, trained with many seeds by Keras on
TensorFlow (`benchmarks/tutorial_keras.py`) and by this project as it is shipped. `make fidelity DATA=FOLDER` made this
page, `fidelity.json` and the picture. Intervals are of 95 %: of a mean by Student's t, of a difference by Welch's.

On a GPU, Keras runs on JAX, and this project without its compiled operator and its own draws for dropout: plain PyTorch.

"One order" is for trainings that see the images in the same order in every epoch. Keras does that on TensorFlow once
TensorFlow has a seed, as `keras.utils.set_random_seed` gives it one (`KERAS_BACKEND=tensorflow python
benchmarks/keras_order.py 0` shows it); without a seed, as in the tutorial, and on JAX and PyTorch it shuffles anew. Earlier
comparisons were with such runs, and found Keras' test accuracy higher by 0.0005.

![every seed's test accuracy, and the training loss of each epoch](fidelity.png)
"""


def train_keras(data: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    python = ROOT / ".venv-bench" / "bin" / "python"
    done = subprocess.run(
        [python, "benchmarks/tutorial_keras.py", data, str(seed)],
        cwd=ROOT,
        env=os.environ | dict(override.split("=") for override in overrides),
        stdout=subprocess.PIPE,
        check=True,
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def train_here(folder: Path, data: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """The results of a training in ``folder``, which goes on there if it has begun."""
    where = f"resume={folder}" if (folder / "config.yaml").exists() else f"hydra.run.dir={folder}"
    # On the CPU unless a variant says otherwise: a GPU would not run the operator as shipped.
    asked = ["trainer.accelerator=cpu", *overrides, f"data.dir={data}", "data.source=mnist", f"seed={seed}"]
    command = [sys.executable, "-m", "mnist_lit.train", where, *asked]
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    results: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return results


def train_ours(data: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    folder = RUNS / "_".join([*overrides, f"seed={seed}"])
    results = train_here(folder, data, seed, overrides)
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    return {
        **{key: results[key] for key in ("test/acc", "test/loss", "device", "versions")},
        **{key: [float(row[key]) for row in rows] for key in ("train/acc", "train/loss")},
        "seconds": results["fit_seconds"],
    }


def commit() -> str:
    """The last commit that changed what is trained, with ``-dirty`` if files differ from it."""

    def git(*arguments: str) -> str:
        asked = ["git", *arguments, "--", "mnist_lit", "conf", "benchmarks/tutorial_keras.py"]
        return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    return git("log", "-1", "--format=%h") + ("-dirty" if git("status", "--porcelain") else "")


def mean_and_half(values: list[float]) -> tuple[float, float]:
    """The mean and the half-width of its interval."""
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), float(half)


def difference(ours: list[float], keras: list[float]) -> tuple[float, float]:
    """The difference of the means and the half-width of its interval."""
    interval = stats.ttest_ind(ours, keras, equal_var=False).confidence_interval(0.95)
    return statistics.mean(ours) - statistics.mean(keras), float(interval.high - interval.low) / 2


def values(runs: list[dict[str, Any]], key: str, epoch: int | None = None) -> list[float]:
    return [run[key] if epoch is None else run[key][epoch] for run in runs]


def document(state: dict[str, list[dict[str, Any]]]) -> str:
    def with_half(pair: tuple[float, float], sign: str = "") -> str:
        return f"{pair[0]:{sign}.5f} ± {pair[1]:.5f}"

    reference = reference_of(state)
    keras, ours = state[reference], state[OURS]
    lines = [HEAD, "| | seeds | test accuracy | test loss | train accuracy, last epoch | train loss, last epoch |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    numbers = [("test/acc", None), ("test/loss", None), ("train/acc", -1), ("train/loss", -1)]
    for name, runs in state.items():
        cells = [with_half(mean_and_half(values(runs, *number))) for number in numbers]
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    for name, other in pairs_of(state):
        cells = [with_half(difference(values(state[name], *n), values(state[other], *n)), "+") for n in numbers]
        lines.append(f"| **{name} minus {other}** | | {' | '.join(cells)} |")
    every = [run for name in state if name.startswith(OURS) and not name.endswith(ONE_ORDER) for run in state[name]]
    cells = [with_half(difference(values(every, *n), values(keras, *n)), "+") for n in numbers]
    lines.append(f"| **all of mnist_lit with new orders minus {reference}** | {len(every)} | {' | '.join(cells)} |")
    for name in (KERAS, KERAS_JAX):
        if len(state.get(name, [])) > 1:
            lines += ["", verdict(name, [difference(values(ours, *n), values(state[name], *n)) for n in numbers])]
    lines += ["", "## Training, epoch by epoch", "", f"| epoch | train loss: {reference} | here | difference |"]
    lines[-1] += f" train accuracy: {reference} | here | difference |"
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    outside = 0
    for epoch in range(len(ours[0]["train/loss"])):
        cells = []
        for key in ("train/loss", "train/acc"):
            mean, half = difference(values(ours, key, epoch), values(keras, key, epoch))
            outside += abs(mean) > half
            cells += [f"{statistics.mean(values(runs, key, epoch)):.5f}" for runs in (keras, ours)]
            cells.append(with_half((mean, half), "+"))
        lines.append(f"| {epoch + 1} | {' | '.join(cells)} |")
    count = 2 * len(ours[0]["train/loss"])
    lines += ["", f"{outside} of these {count} intervals do not contain 0; by chance alone 1 in 20 would not."]
    lines += one_epoch()
    lines += ["", "## Every seed", "", "| | seed | test accuracy | test loss | device | seconds | commit |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for name, runs in state.items():
        for run in sorted(runs, key=lambda run: run["seed"]):
            cells = [f"{run['test/acc']:.4f}", f"{run['test/loss']:.4f}", run["device"]]
            cells += [f"{run['seconds']:.0f}", run["commit"]]
            lines.append(f"| {name} | {run['seed']} | {' | '.join(cells)} |")
    pairs = [pair for runs in state.values() for run in runs for pair in run["versions"].items()]
    versions = dict.fromkeys(f"{name} {number}" for name, number in pairs)
    lines += ["", f"Versions: {', '.join(versions)}."]
    return "\n".join(lines) + "\n"


def verdict(name: str, differences: list[tuple[float, float]]) -> str:
    """Whether this project equals a Keras in all ``differences``, of which the first is that of test accuracy."""
    equal = all(abs(mean) <= half for mean, half in differences)
    which = "**equal**: each" if equal else "**not equal**: not each"
    half = differences[0][1]
    settled = "at most" if half <= MARK else "not yet at most"
    return (
        f"{OURS} and {name}: {which} of the four intervals contains 0, and that of test accuracy is {settled} {MARK} wide on "
        f"either side ({half:.5f})."
    )


def reference_of(state: dict[str, Any]) -> str:
    """The Keras with the most seeds."""
    return max((KERAS, KERAS_JAX), key=lambda name: len(state.get(name, [])))


def pairs_of(state: dict[str, Any]) -> list[tuple[str, str]]:
    """This project against each Keras that has the images in an order of the same kind; then one order against new ones."""
    kerases = [name for name in state if name.startswith("Keras")]
    pairs = [(name, keras) for name in state if name not in kerases for keras in kerases]
    pairs = [pair for pair in pairs if pair[0].endswith(ONE_ORDER) == pair[1].endswith(ONE_ORDER)]
    changed = {name: name.removesuffix(ONE_ORDER) for name in state if name.endswith(ONE_ORDER)}
    return pairs + [(name, other if other in state else KERAS_JAX) for name, other in changed.items()]


def one_epoch() -> list[str]:
    """What ``same_epoch.py`` has found."""
    path = DOCS / "same_epoch.json"
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    lines = [
        "",
        "## One epoch from the same weights",
        "",
        "`benchmarks/same_epoch.py` gives all that is random to both: the weights, the order of the images and what",
        "dropout drops. Then only arithmetic is left. The distance between the weights of two trainings, divided by how far",
        "they have come from the start:",
        "",
        "| after step | this project, Keras on TensorFlow | plain PyTorch, Keras | this project, plain PyTorch |",
        "| --- | --- | --- | --- |",
    ]
    for row in found["rows"]:
        cells = [f"{row[pair]:.1e}" for pair in ("ours, keras", "plain, keras", "ours, plain")]
        lines.append(f"| {row['step']} | {' | '.join(cells)} |")
    accuracies = ", ".join(f"{name} {found['test/acc'][name]:.4f}" for name in ("ours", "plain", "keras"))
    lines += ["", f"Test accuracy after this epoch: {accuracies}. The compiled operator lets the first of nearly equal"]
    lines += ["values win a pooling window, about one window in a million; rounding does the rest."]
    return lines


def picture(state: dict[str, list[dict[str, Any]]]) -> None:
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    every_seed, epochs = figure.subplots(1, 2)
    for number, runs in enumerate(state.values()):
        accuracies = values(runs, "test/acc")
        mean, half = mean_and_half(accuracies)
        every_seed.plot([number] * len(runs), accuracies, ".", color=f"C{number}", alpha=0.4)
        every_seed.errorbar(number + 0.15, mean, half, fmt="o", capsize=4, color=f"C{number}")
    every_seed.set_xticks(
        range(len(state)),
        [
            f"{name.replace(' on', chr(10) + 'on', 1).replace(', ', ',' + chr(10))}\n{len(runs)} seeds"
            for name, runs in state.items()
        ],
    )
    every_seed.set_xlim(-0.5, len(state) - 0.5)
    every_seed.set_title("test accuracy: seeds, mean, 95 % interval")
    differences = [
        difference(values(state[OURS], "train/loss", epoch), values(state[reference_of(state)], "train/loss", epoch))
        for epoch in range(len(state[OURS][0]["train/loss"]))
    ]
    means, halves = zip(*differences, strict=True)
    epochs.errorbar(range(1, len(means) + 1), means, halves, fmt="o", capsize=4)
    epochs.axhline(0, color="black", linewidth=0.8)
    epochs.set_title(f"train loss, {OURS} minus {reference_of(state)}")
    epochs.set_xlabel("epoch")
    figure.savefig(DOCS / "fidelity.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--keras", type=int, default=12, metavar="SEEDS")
    parser.add_argument("--ours", type=int, default=20, metavar="SEEDS")
    parser.add_argument("--keras-jax", type=int, default=0, metavar="SEEDS")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--add", nargs="+", default=[], metavar="FILE", help="fidelity.json of other machines")
    parser.add_argument("--variant", nargs="+", action="append", default=[], metavar="NAME SEEDS OVERRIDE")
    arguments = parser.parse_args()
    data = str(Path(arguments.data).absolute())
    wanted: dict[str, tuple[int, Any, list[str]]] = {
        KERAS: (arguments.keras, train_keras, []),
        OURS: (arguments.ours, train_ours, []),
        KERAS_JAX: (arguments.keras_jax, train_keras, ["KERAS_BACKEND=jax"]),
    }
    wanted |= {name: (int(count), train_ours, overrides) for name, count, *overrides in arguments.variant}
    path = DOCS / "fidelity.json"
    state: dict[str, list[dict[str, Any]]] = {}
    for file in [path, *map(Path, arguments.add)]:
        for name, runs in json.loads(file.read_text()).items() if file.exists() else ():
            known = [run["seed"] for run in state.setdefault(name, [])]
            state[name] += [run for run in runs if run["seed"] not in known]
    missing = [
        ((seed + 0.5) / count, name, seed)
        for name, (count, *_) in wanted.items()
        for seed in range(count)
        if seed not in [run["seed"] for run in state.get(name, [])]
    ]

    def train(name: str, seed: int) -> dict[str, Any]:
        print(f"{name}, seed {seed}", flush=True)
        _, function, overrides = wanted[name]
        return {"seed": seed, "commit": commit(), **function(data, seed, overrides)}

    failed = 0
    pool = ThreadPoolExecutor(arguments.jobs)
    started = {pool.submit(train, name, seed): name for _, name, seed in sorted(missing)}
    try:
        for done, future in enumerate(as_completed(started), 1):
            name = started[future]
            try:
                run = future.result()
            except subprocess.CalledProcessError as error:  # its own messages are above
                failed += 1
                print(f"{done} of {len(missing)}: {name}: {error}", flush=True)
                continue
            state.setdefault(name, []).append(run)
            path.with_suffix(".part").write_text(json.dumps(state, indent=1) + "\n")
            path.with_suffix(".part").replace(path)
            print(
                f"{done} of {len(missing)}: {name}, seed {run['seed']}: test accuracy {run['test/acc']:.4f}, "
                f"loss {run['test/loss']:.4f}, {run['seconds']:.0f} s",
                flush=True,
            )
    finally:
        pool.shutdown(cancel_futures=True)
    if failed:
        sys.exit(f"{failed} trainings failed; the same command tries them again")
    if min(len(runs) for runs in state.values()) < 2:
        sys.exit("an interval needs two seeds")
    (DOCS / "fidelity.md").write_text(document(state))
    picture(state)
    print((DOCS / "fidelity.md").read_text())


if __name__ == "__main__":
    main()
