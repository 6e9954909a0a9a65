"""Train the tutorial and the speedrun on a GPU, with this project and without; write docs/gpu.md and docs/gpu.json.

python benchmarks/gpu.py DATA

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
from mnist_lit.build import build
from mnist_lit.cli.config import settings
from mnist_lit.network import TutorialCNN
from mnist_lit.schedulers import build_scheduler
from mnist_lit.train import train
from mnist_lit.training.callbacks import capture

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
    values = settings("train", f"data.dir={data}", "data.source=mnist", "trainer.accelerator=gpu", *overrides)
    values["trainer"]["callbacks"] = [{"_target_": f"{__name__}.Clock"}]
    with tempfile.TemporaryDirectory() as folder:
        results = train(Path(folder) / "run", **{**values, "seed": seed})
    return {"seconds": Clock.seconds, "test/acc": results["test/acc"]}


def loop(data: str, seed: int, overrides: list[str], graphs: str) -> dict[str, Any]:
    """The same training by a hand-written loop over tensors on the device.

    Args:
        graphs: "" for none; "passes" for those of ``callbacks=cuda_graphs``; "step" for one of the whole step, with the
            optimizer, the loss and the accuracy.
    """
    values = settings("train", *overrides)
    batch_size, half = values["data"]["batch_size"], values["trainer"]["precision"] == "bf16-mixed"
    torch.manual_seed(seed)
    images, labels = (torch.tensor(array).cuda() for array in pixels(data))
    network = TutorialCNN(values["model"]["dropout"]).cuda()
    criterion = nn.CrossEntropyLoss(label_smoothing=values.get("loss", {}).get("label_smoothing", 0.0))
    optimizer = build("optimizer", values["optimizer"], torch.optim.Optimizer, network.parameters())
    steps = EPOCHS * len(labels) // batch_size
    scheduler = build_scheduler(values["scheduler"], optimizer, steps) if "scheduler" in values else None
    chosen = torch.zeros(batch_size, dtype=torch.int64, device="cuda")
    loss_sum, correct = torch.zeros((), device="cuda"), torch.zeros((), device="cuda")

    def step() -> None:
        x, y = images[chosen].unsqueeze(1).float().div(255), labels[chosen]
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=half, cache_enabled=False):
            logits = network(x)
            loss = criterion(logits, y)
        loss.backward()
        optimizer.step()
        loss_sum.add_(loss.detach())
        correct.add_((logits.argmax(1) == y).sum())

    run = step
    if graphs == "passes":
        with torch.autocast("cuda", torch.bfloat16, enabled=half, cache_enabled=False):
            capture(network, images[:batch_size].unsqueeze(1).float().div(255))
    elif graphs == "step":
        for group in optimizer.param_groups:  # read from the device at each replay
            group.update(capturable=True, lr=torch.tensor(group["lr"], device="cuda"))
        run = _captured(step, network, optimizer)
    started = 0.0
    for epoch in range(EPOCHS):
        for batch in epoch_order(seed, epoch, len(labels)).cuda().split(batch_size):
            chosen.copy_(batch)
            run()
            if scheduler:
                scheduler.step()
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


def _captured(step: Callable[[], None], network: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """The step as one CUDA graph; weights and optimizer are as before."""
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
    return captured.replay


def tutorials(data: str, seed: int, workers: int) -> dict[str, Any]:
    """Its second epoch, twelve times."""
    return {"seconds": EPOCHS * lightning(workers, data, 2, 60_000 // BATCH, "gpu")[1], "test/acc": None}


SPEEDRUN, GRAPHS = ["experiment=speedrun_gpu"], ["callbacks=cuda_graphs"]
OURS, PEER = "mnist_lit: experiment=speedrun_gpu", "speedrun_gpu by a hand-written loop, the same graphs"
LIGHTNING = [f"the tutorial by Lightning as tutorials write it, {workers} workers" for workers in (0, 8)]
TUTORIAL = "mnist_lit: trainer.accelerator=gpu callbacks=cuda_graphs"
# The seeds and the training of each.
CONTENDERS: dict[str, tuple[int, Callable[[str, int], dict[str, Any]]]] = {
    OURS: (5, partial(ours, overrides=SPEEDRUN)),
    PEER: (5, partial(loop, overrides=SPEEDRUN, graphs="passes")),
    "speedrun_gpu by a hand-written loop, the step one graph": (3, partial(loop, overrides=SPEEDRUN, graphs="step")),
    LIGHTNING[0]: (1, partial(tutorials, workers=0)),
    LIGHTNING[1]: (1, partial(tutorials, workers=8)),
    TUTORIAL: (5, partial(ours, overrides=GRAPHS)),
    "mnist_lit: trainer.accelerator=gpu": (3, partial(ours, overrides=[])),
    "the tutorial by a hand-written loop": (3, partial(loop, overrides=[], graphs="")),
    "the tutorial by a hand-written loop, the same graphs": (3, partial(loop, overrides=[], graphs="passes")),
    "the tutorial by a hand-written loop, the step one graph": (3, partial(loop, overrides=[], graphs="step")),
}
MOST_SECONDS, LEAST_ACCURACY, LEAST_TIMES, MOST_SHARE = 1.5, 0.9906, 10, 1.1  # the marks


def main(data: str) -> None:
    measured: dict[str, list[dict[str, Any]]] = {}
    facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "lightning": L.__version__}
    facts["note"] = (
        f"On {time.strftime('%Y-%m-%d')}, at commit {commit()}; nothing else ran on the machine and its "
        f"{os.cpu_count()} cores."
    )
    for name in CONTENDERS:
        asked = [sys.executable, "benchmarks/gpu.py", data, name]
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
        f"Twelve epochs on one {facts['device']}, torch {facts['torch']}, Lightning {facts['lightning']}.",
        "`python benchmarks/gpu.py DATA` made this page and `gpu.json`. Seconds from the end of the first step to the end",
        "of the last, the median over seeds (lowest to highest); of the Lightning port as tutorials write it, twelve times",
        "its second epoch. A command's first seconds, for imports, CUDA's start and the capture, are not in it.",
        "`callbacks=cuda_graphs`, which the speedrun has, captures the network's passes; what is called one graph has the",
        "optimizer, the loss and the accuracy in it, too. The hand-written loops write no checkpoints.",
        "The tutorial's precision is 32-true, in which convolutions use TF32, as cuDNN's default is; the speedrun's is",
        "bf16-mixed. It was chosen on 10,000 of the training images; these are the test's.",
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
        batch_size = settings("train", *SPEEDRUN)["data"]["batch_size"] if "speedrun" in name else BATCH
        step = middle[name] / EPOCHS / (60_000 / batch_size) * 1000
        lines.append(
            f"| {name} | {middle[name]:.2f} ({min(seconds):.2f}–{max(seconds):.2f}) | {step:.2f} | {spread} | {len(runs)} |"
        )
    return "\n".join([*lines, "", *_marks(measured, middle)]) + "\n"


def _marks(measured: dict[str, list[dict[str, Any]]], middle: dict[str, float]) -> list[str]:
    """A sentence for each mark whose rows are there."""

    def verdict(is_reached: bool) -> str:
        return "reached" if is_reached else "**missed**"

    lines = []
    if OURS in middle:
        accuracy = statistics.mean(run["test/acc"] for run in measured[OURS])
        reached = middle[OURS] <= MOST_SECONDS and accuracy >= LEAST_ACCURACY
        lines.append(
            f"- `experiment=speedrun_gpu`: {middle[OURS]:.2f} s and {accuracy:.4f}; the marks are {MOST_SECONDS} s and "
            f"{LEAST_ACCURACY}: {verdict(reached)}."
        )
    if OURS in middle and PEER in middle:
        share = middle[OURS] / middle[PEER]
        lines.append(
            f"- That is {share:.2f} times a hand-written loop with the same graphs; the mark is {MOST_SHARE}: "
            f"{verdict(share <= MOST_SHARE)}."
        )
    for name in LIGHTNING:
        if name in middle and TUTORIAL in middle:
            times = middle[name] / middle[TUTORIAL]
            mark = f"; the mark is {LEAST_TIMES}: {verdict(times >= LEAST_TIMES)}" if name == LIGHTNING[0] else ""
            lines.append(f"- The tutorial is {times:.1f} times as fast as {name.removeprefix('the tutorial ')}{mark}.")
    return lines


if __name__ == "__main__":
    if len(sys.argv) > 2:
        count, training = CONTENDERS[sys.argv[2]]
        print(json.dumps([training(sys.argv[1], seed) for seed in range(count)]))
    else:
        main(sys.argv[1])
