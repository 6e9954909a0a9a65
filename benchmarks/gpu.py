"""Train the tutorial on a GPU, with this project and without; write docs/gpu.md and docs/gpu.json.

python benchmarks/gpu.py DATA [SEEDS]

A process for each contender, which trains with every seed in turn. The clock runs from the end of the first step to the
end of the last, the data being on the device; before that come imports, CUDA's start and the capture of graphs.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from contenders import BATCH, lightning, pixels
from fidelity import commit

from mnist_lit.batches import epoch_order
from mnist_lit.cli.config import settings
from mnist_lit.network import TutorialCNN
from mnist_lit.train import train

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
EPOCHS = 12


class Clock(L.Callback):
    """Seconds from the end of the first step to the end of the last."""

    seconds = started = 0.0

    def on_train_batch_end(self, *_: Any) -> None:
        if not Clock.started:
            torch.cuda.synchronize()
            Clock.started = time.perf_counter()

    def on_train_end(self, *_: Any) -> None:
        torch.cuda.synchronize()
        Clock.seconds = time.perf_counter() - Clock.started


def ours(data: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    Clock.started = 0.0
    values = settings("train", f"data.dir={data}", "data.source=mnist", *overrides)
    values["trainer"]["callbacks"] = [{"_target_": f"{__name__}.Clock"}]
    with tempfile.TemporaryDirectory() as folder:
        results = train(Path(folder) / "run", **{**values, "seed": seed})
    return {"seconds": Clock.seconds, "test/acc": results["test/acc"]}


def loop(data: str, seed: int, graph: bool, half: bool) -> dict[str, Any]:
    """A hand-written loop over tensors on the device, with the step as one CUDA graph or without."""
    torch.manual_seed(seed)
    images, labels = (torch.tensor(array).cuda() for array in pixels(data))
    network = TutorialCNN().cuda()
    optimizer = torch.optim.Adadelta(network.parameters(), lr=1.0, rho=0.95, eps=1e-7, capturable=graph)
    chosen = torch.zeros(BATCH, dtype=torch.int64, device="cuda")
    loss_sum, correct = torch.zeros((), device="cuda"), torch.zeros((), device="cuda")

    def step() -> None:
        x, y = images[chosen].unsqueeze(1).float().div(255), labels[chosen]
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            logits = network(x)
            loss = nn.functional.cross_entropy(logits, y)
        loss.backward()
        optimizer.step()
        loss_sum.add_(loss.detach())
        correct.add_((logits.argmax(1) == y).sum())

    run = step
    if graph:
        before = {name: value.clone() for name, value in network.state_dict().items()}
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        optimizer.zero_grad()
        with torch.cuda.graph(captured):
            step()
        network.load_state_dict(before)
        for state in optimizer.state.values():
            for value in state.values():
                value.zero_()
        run = captured.replay
    started = 0.0
    for epoch in range(EPOCHS):
        for batch in epoch_order(seed, epoch, len(labels)).cuda().split(BATCH):
            chosen.copy_(batch)
            run()
            if not started:
                torch.cuda.synchronize()
                started = time.perf_counter()
        loss_sum.item()
        loss_sum.zero_()
        correct.zero_()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    test_images, test_labels = (torch.tensor(array).cuda() for array in pixels(data, "t10k"))
    with torch.no_grad():
        logits = network.eval()(test_images.unsqueeze(1).float().div(255))
    return {"seconds": seconds, "test/acc": float((logits.argmax(1) == test_labels).float().mean())}


def tutorials(data: str, seed: int, workers: int) -> dict[str, Any]:
    """Its second epoch, twelve times."""
    return {"seconds": EPOCHS * lightning(workers, data, 2, 60_000 // BATCH, "gpu")[1], "test/acc": None}


LIGHTNING = [f"Lightning as tutorials write it, {workers} workers" for workers in (0, 8)]
GRAPHS = ["trainer.accelerator=gpu", "callbacks=cuda_graphs"]
OURS = [
    ["trainer.accelerator=gpu"],
    GRAPHS,
    [*GRAPHS, "trainer.precision=bf16-mixed", "checkpoint.every_n_epochs=12"],
]
LOOP, LOOP_GRAPH = "hand-written loop", "hand-written loop, the step one CUDA graph"
LOOP_HALF = f"{LOOP_GRAPH}, bf16-mixed"
CONTENDERS: dict[str, Callable[[str, int], dict[str, Any]]] = {
    LIGHTNING[0]: partial(tutorials, workers=0),
    LIGHTNING[1]: partial(tutorials, workers=8),
    LOOP: partial(loop, graph=False, half=False),
    LOOP_GRAPH: partial(loop, graph=True, half=False),
    LOOP_HALF: partial(loop, graph=True, half=True),
    **{f"mnist_lit: {' '.join(overrides)}": partial(ours, overrides=overrides) for overrides in OURS},
}


def main(data: str, seeds: int) -> None:
    measured: dict[str, list[dict[str, Any]]] = {}
    facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "lightning": L.__version__}
    facts["note"] = (
        f"At commit {commit()}; the load of the machine's {os.cpu_count()} cores was {os.getloadavg()[0]:.1f} before."
    )
    for name in CONTENDERS:
        count = seeds if name.startswith("mnist_lit") else 1 if name in LIGHTNING else 3
        asked = [sys.executable, "benchmarks/gpu.py", data, str(count), name]
        done = subprocess.run(asked, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            print(f"{name}: failed", flush=True)
            continue
        measured[name] = json.loads(done.stdout.splitlines()[-1])
        write(facts, measured)  # each time, in case the rest is not reached
        print(name, [f"{run['seconds']:.2f} s, {run['test/acc']}" for run in measured[name]], flush=True)
    print((DOCS / "gpu.md").read_text())


def write(facts: dict[str, str], measured: dict[str, list[dict[str, Any]]]) -> None:
    (DOCS / "gpu.json").write_text(json.dumps({"facts": facts, "measured": measured}, indent=1) + "\n")
    (DOCS / "gpu.md").write_text(document(facts, measured))


def document(facts: dict[str, str], measured: dict[str, list[dict[str, Any]]]) -> str:
    middle = {name: statistics.median(run["seconds"] for run in runs) for name, runs in measured.items()}
    lines = [
        "# On a GPU",
        "",
        f"The tutorial's twelve epochs on one {facts['device']}, torch {facts['torch']}, Lightning {facts['lightning']}.",
        "`python benchmarks/gpu.py DATA` made this page and `gpu.json`. Seconds from the end of the first step to the end",
        "of the last, the median over seeds (lowest to highest); of the Lightning port as tutorials write it, twelve times",
        "its second epoch.",
        "A command's first seconds, for imports, CUDA's start and the capture, are not in it. `callbacks=cuda_graphs` captures",
        "the network's passes only; the hand-written loop's graph also has the optimizer, the loss and the accuracy, and that",
        "loop writes no checkpoints.",
        "Convolutions use TF32, as cuDNN's default is, also where the precision is 32-true.",
        facts["note"],
        "",
        "| | seconds | milliseconds a step | test accuracy, mean ± sd | seeds |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in CONTENDERS:
        if not (runs := measured.get(name)):
            lines.append(f"| {name} | not measured | | | |")
            continue
        seconds = [run["seconds"] for run in runs]
        accuracy = [run["test/acc"] for run in runs if run["test/acc"] is not None]
        spread = f"{statistics.mean(accuracy):.4f} ± {statistics.stdev(accuracy):.4f}" if len(accuracy) > 1 else ""
        step = middle[name] / EPOCHS / (60_000 / BATCH) * 1000
        lines.append(
            f"| {name} | {middle[name]:.2f} ({min(seconds):.2f}–{max(seconds):.2f}) | {step:.2f} | {spread} | {len(runs)} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if len(sys.argv) > 3:
        print(json.dumps([CONTENDERS[sys.argv[3]](sys.argv[1], seed) for seed in range(int(sys.argv[2]))]))
    else:
        main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 5)
