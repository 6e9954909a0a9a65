"""Where the time of a training step goes, before and after; and the seconds before the first one: docs/profile.md.

python benchmarks/profile_step.py DATA
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
DOCS = Path(__file__).parents[1] / "docs"
STEPS = 20
STAGES = """
import json, sys, time
seconds, started = {}, time.perf_counter()
def clock(what):
    global started
    seconds[what] = time.perf_counter() - started
    started = time.perf_counter()
from mnist_lit.cli.launch import loading
with loading("PyTorch and Lightning"):
    import torch; clock("import torch")
    import torchmetrics; clock("import torchmetrics, which imports torchvision")
    import lightning; clock("import lightning")
    import torch._dynamo; clock("import torch._dynamo, which every optimizer does")
    from mnist_lit.data import MNISTDataModule
    from mnist_lit.model import MNISTClassifier
    import mnist_lit.training.harness, mnist_lit.training.recorder; clock("import the rest")
classifier = MNISTClassifier(); clock("make the network and its metrics")
data = MNISTDataModule(sys.argv[1], source="mnist"); data.prepare_data(); data.setup()
clock("read the data and compare their checksums")
batch = next(iter(data.train_dataloader())); classifier.network(batch[0]).sum().backward(); clock("the first step")
print(json.dumps(seconds))
"""

IMPORTS = """\
Lightning imports torchmetrics, and that imports torchvision's models, with them torch._dynamo (which every optimizer
imports anyway) and matplotlib, and scipy.signal where SciPy is installed, whether they are used or not. That is nearly
all of these seconds, and this project cannot leave it out; `--help`, a mistyped key and a refused value import none of
it, not even torch. Garbage collection is off meanwhile, which saves a sixth."""


def profile(network: Any, data: str, size: int = 500, optimizer: Any = None) -> tuple[float, list[tuple[str, float]]]:
    """Milliseconds of a step, and of each operator that takes at least a hundredth of it.

    Args:
        size: Images in a batch.
        optimizer: None for the tutorial's.
    """
    import torch
    from contenders import pixels
    from torch.profiler import ProfilerActivity

    images, labels = (torch.tensor(array) for array in pixels(data))
    optimizer = optimizer or torch.optim.Adadelta(network.parameters(), lr=1.0, rho=0.95, eps=1e-7)

    def step(i: int) -> None:
        batch = slice(i * size, (i + 1) * size)
        loss = torch.nn.functional.cross_entropy(network(images[batch].unsqueeze(1).float().div(255)), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for i in range(5):
        step(i)
    started = time.perf_counter()
    for i in range(STEPS):
        step(i)
    each = 1e3 * (time.perf_counter() - started) / STEPS
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        for i in range(STEPS):
            step(i)
    rows = [(row.key, row.self_cpu_time_total / 1e3 / STEPS) for row in profiler.key_averages()]
    return each, sorted((row for row in rows if row[1] >= each / 100), key=lambda row: -row[1])


def main(data: str) -> None:
    import torch
    from contenders import literal_network

    from mnist_lit.kernels.memory import keep_freed_memory
    from mnist_lit.network import TutorialCNN

    call = [sys.executable, "-W", "ignore", "-c", STAGES, data]
    stages = json.loads(subprocess.run(call, cwd=DOCS.parent, check=True, capture_output=True, text=True).stdout)
    lines = [
        "# A step's profile, and the seconds before the first",
        "",
        f"Training steps of 500 images, {os.cpu_count()} cores with {torch.backends.cpu.get_cpu_capability()}, milliseconds",
        f"a step, mean of {STEPS}; `python benchmarks/profile_step.py DATA` made this page.",
    ]
    before = profile(literal_network(), data)
    keep_freed_memory()
    contenders = {
        "Before: a literal port in plain PyTorch": before,
        "Without the compiled operator": profile(TutorialCNN(cpu_kernel=False), data),
        "After: what runs by default": profile(TutorialCNN(), data),
    }
    for title, (total, rows) in contenders.items():
        lines += ["", f"## {title}: {total:.0f} ms", "", "| operator | ms |", "| --- | --- |"]
        lines += [f"| `{name}` | {milliseconds:.1f} |" for name, milliseconds in rows]
    lines += ["", "## Before the first step", "", "| | seconds |", "| --- | --- |"]
    lines += [f"| {what} | {seconds:.2f} |" for what, seconds in stages.items()]
    lines.append(f"| **together** | **{sum(stages.values()):.1f}** |")
    lines += ["", IMPORTS]
    text = "\n".join(lines) + "\n"
    (DOCS / "profile.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(str(Path(sys.argv[1]).absolute()))
