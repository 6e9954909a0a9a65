"""What using a trained model costs, measured from outside: predict's rate, the server's latency, limit and start.

python benchmarks/use.py DATA RUN      writes docs/use.md; DATA: the folder of the full MNIST, RUN: a trained run's
"""

import asyncio
import io
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scaling import cpu

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
REPEATS = 5
FEW, ALL = 10_000, 50_000  # pictures
SECONDS = 10  # that each rate of requests is held
CONNECTIONS = 128  # that the requests are spread over, each waiting for its answer before its next one


def main(data: str, run: str) -> None:
    from mnist_lit.data import MNISTDataModule

    datamodule = MNISTDataModule(data, source="mnist")
    datamodule.setup()
    lines = [
        HEAD.format(cpu=cpu(), cores=os.cpu_count(), repeats=REPEATS),
        *predicting(datamodule.train_images.numpy(), run),
        *serving(datamodule.test_images[0].numpy(), run),
    ]
    (ROOT / "docs" / "use.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


HEAD = """\
# What using a trained model costs

`python benchmarks/use.py DATA RUN` made this page on {cores} cores ({cpu}): {repeats} repeats, whole processes, the
requests from a second process on the same machine. Medians (lowest to highest).

| | figure | target | |
| --- | --- | --- | --- |"""


def predicting(images: np.ndarray, run: str) -> Iterator[str]:
    whole: dict[int, list[float]] = {FEW: [], ALL: []}
    with tempfile.TemporaryDirectory() as folder:
        for count in whole:
            (Path(folder) / str(count)).mkdir()
            for number, image in enumerate(images[:count]):
                Image.fromarray(image).save(Path(folder) / str(count) / f"{number:05}.png")
        for _, count in itertools.product(range(REPEATS), whole):
            start = time.perf_counter()
            arguments = [f"images={folder}/{count}", f"ckpt={run}", f"output={folder}/{count}.csv", "overwrite=true"]
            command = [sys.executable, "-m", "mnist_lit.predict", *arguments]
            done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
            if done.returncode and "could not be predicted" not in done.stderr:  # a few look like no digit
                sys.exit(done.stderr)
            whole[count].append(time.perf_counter() - start)
    rates = [(ALL - FEW) / (more - less) for less, more in zip(whole[FEW], whole[ALL], strict=True)]
    yield _row("predict: PNGs of 28x28 a second, once started", rates, ".0f", 2000, at_least=True)
    yield _row(f"predict: seconds for {ALL:,} of them, the start included", whole[ALL], ".1f")


def serving(image: np.ndarray, run: str) -> Iterator[str]:
    small = io.BytesIO()
    Image.fromarray(image).save(small, "PNG")
    drawing = Image.new("RGBA", (280, 280))
    ImageDraw.Draw(drawing).line([(80, 60), (200, 60), (120, 240)], fill="black", width=22, joint="curve")
    large = io.BytesIO()
    drawing.save(large, "PNG")
    starts = []
    for _ in range(REPEATS):
        with server(run) as (_, seconds):
            starts.append(seconds)
    with server(run) as (port, _):
        for name, body in (("PNG of 28x28", small), ("drawing of 280x280", large)):
            loads = [asyncio.run(load(port, body.getvalue(), 100)) for _ in range(REPEATS)]
            for answers in loads:
                assert {status for status, _ in answers} == {200}
            tails = [1000 * float(np.percentile([seconds for _, seconds in answers], 99)) for answers in loads]
            yield _row(f"serve: p99 of the latency at 100 requests a second, ms, {name}", tails, ".1f", 15)
        for name, body in (("PNG of 28x28", small), ("drawing of 280x280", large)):
            yield _most(port, name, body.getvalue())
    yield _row("serve: seconds from the start of the process to ready", starts, ".1f", 8)


def _most(port: int, name: str, body: bytes) -> str:
    """The highest rate, in steps of a tenth, of which no request is answered with 503."""
    held, rate = "none", 200.0
    while True:
        answers = asyncio.run(load(port, body, rate))
        statuses = Counter(status for status, _ in answers)
        assert set(statuses) <= {200, 503}, statuses
        if 503 in statuses:
            refused = statuses[503] / len(answers)
            return f"| serve: most requests a second before one is answered 503, {name} | {held}; at {rate:.0f} a second {100 * refused:.1f} % are | | |"
        tail = 1000 * float(np.percentile([seconds for _, seconds in answers], 99))
        held, rate = f"{rate:.0f} (p99 {tail:.0f} ms)", rate * 1.1


@contextmanager
def server(run: str) -> Iterator[tuple[int, float]]:
    """Its port, and the seconds until it was ready."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "mnist_lit.serve", f"ckpt={run}", "port=0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        ready = next(line for line in process.stdout if line.startswith("ready: "))
        yield int(ready.split()[1].rpartition(":")[2]), time.perf_counter() - start
    finally:
        process.terminate()
        process.wait()


async def load(port: int, body: bytes, rate: float) -> list[tuple[int, float]]:
    """Status and latency of each of ``rate`` requests a second, whether or not those before are answered.

    Latency counts from when a request was due, so that waiting for a free connection is a part of it.
    """
    request = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    answers: list[tuple[int, float]] = []
    begin = time.perf_counter() + 0.5
    due = iter([begin + number / rate for number in range(int(rate * SECONDS))])

    async def connection() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for moment in due:
            await asyncio.sleep(max(0.0, moment - time.perf_counter()))
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            await reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
            answers.append((int(head.split()[1]), time.perf_counter() - moment))
        writer.close()

    await asyncio.gather(*(connection() for _ in range(CONNECTIONS)))
    return answers


def _row(name: str, values: list[float], form: str, target: float | None = None, at_least: bool = False) -> str:
    middle = statistics.median(values)
    figure = f"{middle:{form}} ({min(values):{form}}–{max(values):{form}})"
    if target is None:
        return f"| {name} | {figure} | | |"
    reached = middle >= target if at_least else middle <= target
    return f"| {name} | {figure} | {'≥' if at_least else '≤'} {target:,} | {'reached' if reached else 'missed'} |"


if __name__ == "__main__":
    main(str(Path(sys.argv[1]).absolute()), str(Path(sys.argv[2]).absolute()))
