"""What a second process brings on one machine, and what many GPUs would on paper: docs/scaling.md.

python benchmarks/scaling.py DATA [REPEATS]

A whole run for each measurement, the three kinds in turn (A B C A B C ...), medians, and ratios repeat by repeat.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
EPOCH, STEPS = 120, 60  # of 500 images: in the tutorial's epoch, and timed, after as many to warm up
PARAMETERS = 1_045_576
SIZE = 4 * PARAMETERS  # bytes of a step's gradients
KINDS = {  # processes, threads of each
    "one process, one thread": (1, 1),
    "one process, two threads": (1, 2),
    "two processes, one thread each": (2, 1),
}
# Assumptions of the calculation: a GPU's sustained FLOP/s on this network, what a step takes for no image at all (some
# sixty kernels to start, 5 µs each), and of a message between neighbours of the ring the seconds and the bytes a second.
FLOPS, FLOP_OF_IMAGE, FIXED = 10e12, 70.6e6, 300e-6
RINGS = {8: (5e-6, 300e9, "one machine, NVLink"), 64: (10e-6, 25e9, "eight machines, InfiniBand of 200 Gb/s a GPU")}
WORTH = 0.8  # the efficiency from which on the GPUs would be called well used

PAGE = """\
# Several processes

`python benchmarks/scaling.py DATA` made this page on {cores} cores ({cpu}), with {repeats} repeats in turn. The
machine's load was {load} before and {load_after} after: the difference to this page's own load is other work on the same cores.
An epoch is 120 steps of 500 images, of which {steps} were timed.{disturbed}

| | seconds an epoch, repeat by repeat | median | times as fast as one thread | efficiency |
| --- | --- | --- | --- | --- |
{rows}

How many times as fast: the median of the ratios within a repeat. The efficiency is that divided by the number of threads.
Two processes do the same work as two threads, but
pass the gradients: {parameters:,} float32 numbers, {megabytes:.2f} MB a step. To sum them over two processes,
gloo takes {reduce:.1f} ms (median of 100, on this machine's loopback), {share:.1f} % of their fastest step. So
several processes are for several GPUs or machines; on one CPU one process takes all threads by itself.

## Many GPUs, on paper

A ring adds the gradients of N GPUs up in 2(N-1) messages between neighbours, in which each GPU sends 2(N-1)/N times the
{megabytes:.2f} MB. **Nothing in this section is measured**; it assumes {flops:.0f} TFLOP/s sustained ({image:.1f} µs an
image, of 70.6 MFLOP forward and backward), {fixed:.0f} µs that each step takes however few its images are, and that
nothing overlaps:

| GPUs | assumed: each message, bandwidth | ring, ms | compute for 500/N images, ms | step, ms | times as fast as one | efficiency | batch for {worth:.0f} % |
| --- | --- | --- | --- | --- | --- | --- | --- |
| 1 | | 0 | {one:.2f} | {one:.2f} | 1 | 100 % | |
{paper}

At the tutorial's 500 images a step this network does not profit from many GPUs: with 64 each has eight images, and waits
for messages most of the time. It would take the batch of the last column for the GPUs to be well used. For 64 GPUs that
is {compared} the 60,000 images of an epoch, and far from the tutorial's training either way: a larger batch takes fewer
steps an epoch, and would need another learning rate and its own proof of accuracy. Overlapping the messages with the
backward pass, and trees instead of rings, shorten the waiting, but not the {fixed:.0f} µs.
"""


DISTURBED = """

**Other work has disturbed this measurement**: repeats of the same kind differ by more than half. It slows what takes
two cores more than what takes one, so the medians and the efficiency below say too little; the repeat in which two
threads were fastest says most: two threads {threads:.2f} and two processes {processes:.2f} times as fast as one thread."""


def main(data: str, repeats: int) -> None:
    load = f"{os.getloadavg()[0]:.1f}"
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(repeats):
        for kind, processes_and_threads in KINDS.items():
            seconds[kind].append(epoch_seconds(data, *processes_and_threads))
            print(f"{seconds[kind][-1]:8.2f} s an epoch  {kind}", flush=True)
    reduce = all_reduce_seconds()
    base, threads, two = seconds.values()
    quietest = threads.index(min(threads))
    is_disturbed = any(max(each) > 1.5 * min(each) for each in seconds.values())
    speeds = {"threads": base[quietest] / threads[quietest], "processes": base[quietest] / two[quietest]}
    text = PAGE.format(
        cores=os.cpu_count(),
        cpu=cpu(),
        repeats=repeats,
        load=load,
        load_after=f"{os.getloadavg()[0]:.1f}",
        steps=STEPS,
        disturbed=DISTURBED.format(**speeds) if is_disturbed else "",
        rows="\n".join(_row(kind, KINDS[kind][0] * KINDS[kind][1], seconds[kind], base) for kind in KINDS),
        parameters=PARAMETERS,
        megabytes=SIZE / 1e6,
        reduce=1e3 * reduce,
        share=100 * reduce / (min(two) / EPOCH),
        flops=FLOPS / 1e12,
        image=1e6 * FLOP_OF_IMAGE / FLOPS,
        fixed=1e6 * FIXED,
        worth=100 * WORTH,
        one=1e3 * step_on_paper(1)[0],
        paper="\n".join(map(_paper_row, RINGS)),
        compared="more than" if batch_on_paper(64) > 60_000 else "a large part of",
    )
    (ROOT / "docs" / "scaling.md").write_text(text, encoding="utf-8")
    print(text)


def epoch_seconds(data: str, processes: int, threads: int) -> float:
    """Of a run of two short epochs the second one, at the length of a whole one."""
    limits = [f"trainer.limit_train_batches={STEPS}", "trainer.limit_test_batches=1", "trainer.max_epochs=2"]
    own = ["data.source=mnist", "trainer.accelerator=cpu", f"trainer.devices={processes}", *limits]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "mnist_lit.train", f"data.dir={data}", f"hydra.run.dir={folder}/run", *own],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            check=True,
            capture_output=True,
        )
        results = json.loads((Path(folder) / "run" / "metrics.json").read_text())
    return results["epoch_seconds"][1] * EPOCH / STEPS


def all_reduce_seconds() -> float:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *torchrun, __file__, "all-reduce"], check=True, capture_output=True, text=True
    )
    return float(done.stdout.splitlines()[-1])


def all_reduce() -> None:
    """In each of two processes: prints the median seconds, in the first one."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    numbers, seconds = torch.rand(PARAMETERS), []
    for _ in range(110):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(numbers)
        seconds.append(time.perf_counter() - started)
    if dist.get_rank() == 0:
        print(statistics.median(seconds[10:]))
    dist.destroy_process_group()


def step_on_paper(gpus: int, batch: int = 500) -> tuple[float, float]:
    """Seconds of a step, and of its messages alone."""
    message, bandwidth, _ = RINGS.get(gpus, (0.0, 1.0, ""))
    ring = 2 * (gpus - 1) * message + 2 * (gpus - 1) / gpus * SIZE / bandwidth
    return batch / gpus * FLOP_OF_IMAGE / FLOPS + FIXED + ring, ring


def batch_on_paper(gpus: int) -> float:
    """The batch from which on the efficiency is WORTH: where one GPU's step takes WORTH x gpus steps of all of them."""
    step_of_none = step_on_paper(gpus, 0)[0]
    return (WORTH * gpus * step_of_none - FIXED) / (1 - WORTH) / (FLOP_OF_IMAGE / FLOPS)


def _paper_row(gpus: int) -> str:
    (step, ring), (message, bandwidth, where) = step_on_paper(gpus), RINGS[gpus]
    speed = step_on_paper(1)[0] / step
    assumed = f"{1e6 * message:.0f} µs, {bandwidth / 1e9:.0f} GB/s ({where})"
    return (
        f"| {gpus} | {assumed} | {1e3 * ring:.2f} | {1e3 * (step - ring):.2f} | {1e3 * step:.2f} | {speed:.1f} | "
        f"{100 * speed / gpus:.0f} % | {batch_on_paper(gpus):,.0f} |"
    )


def _row(kind: str, threads: int, seconds: list[float], base: list[float]) -> str:
    speed = statistics.median(one / own for one, own in zip(base, seconds, strict=True))
    figures = f"{', '.join(f'{each:.1f}' for each in seconds)} | {statistics.median(seconds):.1f}"
    return f"| {kind} | {figures} | {speed:.2f} | {100 * speed / threads:.0f} % |"


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    if sys.argv[1] == "all-reduce":
        all_reduce()
    else:
        main(str(Path(sys.argv[1]).absolute()), int(sys.argv[2]) if len(sys.argv) > 2 else 5)
