"""Write docs/results.md and docs/results.json from finished sweeps over seeds.

python benchmarks/seeds.py SWEEP_FOLDER [SWEEP_FOLDER ...]      one folder a device
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"

HEAD = """\
# Results

The tutorial, {epochs} epochs each, on {data[train]:,} training and {data[test]:,} test images ({data[name]}),
precision {precision}. `make results DATA=FOLDER` made this file and `results.json`; on a GPU it is
`make results DATA=FOLDER ARGS=trainer.accelerator=gpu`, and `python benchmarks/seeds.py` with the sweeps' folders puts
several devices into one table.

| device | seed | test accuracy | test loss | train accuracy | seconds an epoch (median) | peak memory |
| --- | --- | --- | --- | --- | --- | --- |
"""


def main(folders: list[Path]) -> None:
    sweeps = {}
    for folder in folders:
        runs = [json.loads(path.read_text()) for path in folder.glob("*/metrics.json")]
        if not runs:
            sys.exit(f"{folder}: no finished runs")
        if (device := runs[0]["device"]) in sweeps:
            sys.exit(f"{folder}: a second sweep on {device}")
        sweeps[device] = sorted(runs, key=lambda run: run["seed"])
    every = [run for runs in sweeps.values() for run in runs]
    for what in ("epochs", "precision", "data"):
        if len({json.dumps(run[what]) for run in every}) > 1:
            sys.exit(f"these runs differ in {what}, so they do not belong into one table")
    lines = []
    for device, runs in sweeps.items():
        lines += [row(device, str(run["seed"]), [run]) for run in runs]
        lines.append(row(f"**{device}**", f"**mean of {len(runs)} ± sd; median; maximum**", runs))
    if not any("NVIDIA" in device for device in sweeps):
        lines.append("| GPU | | see fidelity.md and gpu.md | | | | |")
    versions = {json.dumps(run["versions"]) for run in every}
    text = HEAD.format(**every[0]) + "\n".join(lines) + "\n\n"
    text += "".join(
        "Versions: " + ", ".join(f"{name} {number}" for name, number in json.loads(version).items()) + ".\n"
        for version in sorted(versions)
    )
    text += f"\nsha256 of the images and labels: {every[0]['data']['sha256']}.\n\n"
    text += "For comparison with Keras over many seeds: [fidelity.md](fidelity.md).\n"
    (DOCS / "results.md").write_text(text)
    (DOCS / "results.json").write_text(json.dumps(sweeps, indent=1) + "\n")
    print(text)


def row(device: str, seed: str, runs: list[dict[str, Any]]) -> str:
    seconds = [statistics.median(run["epoch_seconds"]) for run in runs]
    cells = [
        device,
        seed,
        mean_and_sd([run["test/acc"] for run in runs]),
        mean_and_sd([run["test/loss"] for run in runs]),
        mean_and_sd([run["train/acc"] for run in runs]),
        f"{statistics.median(seconds):.2f}",
        f"{max(run['peak_memory_bytes'] for run in runs) / 1e9:.2f} GB",
    ]
    return f"| {' | '.join(cells)} |"


def mean_and_sd(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
