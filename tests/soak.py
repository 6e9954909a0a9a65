"""Kill a small run with kill -9 at random moments, go on with it to its end, and require the same bits every time.

python tests/soak.py [KILLS [SEED]]

Each run is a whole command in a process of its own, forked from this one, which has imported everything and computed
nothing. A byte that both share says what the run is doing, so that steps, writes of checkpoints and the time between
the last step and the results are all hit.
"""

import json
import mmap
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers import differences, shortened, unmeasured

PHASES = (
    "before the first step",
    "in a step",
    "while a checkpoint is written",
    "between the last step and the results",
)
BEFORE, STEP, WRITING, AFTER = range(4)
LONGEST = {STEP: 0.03, WRITING: 0.06, AFTER: 0.6}  # seconds that a phase takes here, more or less
LAST_OCCURRENCE = {STEP: 11, WRITING: 7, AFTER: 1}
RUN = [
    *("data.source=sample", "data.batch_size=100", "data.val_size=200", "checkpoint.every_n_steps=2"),
    *("trainer.max_epochs=2", "trainer.limit_train_batches=6", "trainer.limit_test_batches=2"),
    *("trainer.accelerator=cpu", "trainer.enable_model_summary=false"),
]

shared = mmap.mmap(-1, 8)  # the phase, and how often each has begun


def fork(*arguments: str) -> int:
    """The command ``train`` in another process; returns its id."""
    shared[:] = bytes(8)
    if process := os.fork():
        return process
    code = 1
    try:
        with Path("soak.log").open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        say_what_it_does()
        from mnist_lit.train import main

        sys.argv[1:] = arguments
        main()
        code = 0
    except SystemExit as error:
        code = 1 if error.code else 0
        print(error, file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def say_what_it_does() -> None:
    import lightning as L

    from mnist_lit.model import MNISTClassifier
    from mnist_lit.training.checkpoints import Checkpoints

    def mark(owner: Any, name: str, phase: int, then: int | None) -> None:
        original = getattr(owner, name)

        def marked(*arguments: Any, **options: Any) -> Any:
            shared[0], shared[phase] = phase, shared[phase] + 1
            result = original(*arguments, **options)
            if then is not None:
                shared[0] = then
            return result

        setattr(owner, name, marked)

    mark(MNISTClassifier, "training_step", STEP, None)
    mark(Checkpoints, "_save_last", WRITING, STEP)
    mark(L.Trainer, "test", AFTER, None)


def wait(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill_somewhere(folder: Path, phase: int, draw: random.Random) -> int | None:
    """Start a run and kill it in that phase; returns in which it was, or None if it was faster and ended well."""
    occurrence, delay = draw.randint(1, LAST_OCCURRENCE[phase]), draw.uniform(0, LONGEST[phase])
    process = fork(*RUN, f"hydra.run.dir={folder}")
    while not (shared[0] == phase and shared[phase] >= occurrence):
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.0002)
    time.sleep(delay)
    os.kill(process, signal.SIGKILL)
    return shared[0] if wait(process) == -signal.SIGKILL else None


def outcome(folder: Path) -> Any:
    """All that a run ends with, but for what was measured."""
    import torch

    paths = [path for name in ("last", "best") if (path := folder / f"checkpoints/{name}.ckpt").exists()]
    files = [torch.load(path, weights_only=True) for path in paths]
    table = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    rows = [dict(zip(table[0], row, strict=True)) for row in table]
    return unmeasured([files, rows, json.loads((folder / "metrics.json").read_text())])


def main(kills: int = 100, seed: int = 0) -> None:
    import hydra  # noqa: F401
    import lightning  # noqa: F401
    import torchmetrics  # noqa: F401
    import torchvision  # noqa: F401

    draw = random.Random(seed)
    os.chdir(tempfile.mkdtemp())
    if wait(fork(*RUN, "hydra.run.dir=whole")):
        sys.exit(Path("soak.log").read_text())
    expected = outcome(Path("whole"))
    hits, equal, number = [0] * len(PHASES), 0, 0
    while sum(hits) < kills:
        folder, number = Path(f"run{number}"), number + 1
        phase = kill_somewhere(folder, min((STEP, WRITING, AFTER), key=lambda each: hits[each]), draw)
        if phase is None:
            continue
        hits[phase] += 1
        if wait(fork(f"resume={folder}")):
            print(f"{folder}, killed {PHASES[phase]}: does not go on; see {Path.cwd()}/soak.log")
        elif other := shortened(differences(outcome(folder), expected)):
            print(f"{folder}, killed {PHASES[phase]}: other bits; see {Path.cwd()}", *other, sep="\n  ")
        elif leftover := list(folder.rglob(".part-*")):
            print(f"{folder}, killed {PHASES[phase]}: {leftover} is left")
        else:
            equal += 1
        if sum(hits) % 10 == 0:
            print(f"{equal} of {sum(hits)} equal", flush=True)
    for name, count in zip(PHASES, hits, strict=True):
        print(f"killed {name}: {count}")
    print(f"{equal} of {kills} equal")
    sys.exit(equal != kills)


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
