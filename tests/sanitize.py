"""The kernel under the address, undefined-behaviour and thread sanitizers: ``make sanitize``; ARGS is a number of cases.

A report ends it with exit code 1.
"""

import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "mnist_lit" / "kernels" / "convolutions.c"
SANITIZERS = ("address,undefined", "thread")
LANES = (4, 8, 16)  # of any CPU's instructions: the compiler divides vectors that are too wide for them


def sanitize(source: Path, lanes: int, sanitizers: str, cases: int, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run ``sanitize.c`` with a kernel; what the sanitizers report is in stderr."""
    program = folder / "sanitize"
    flags = f"-g -O1 -pthread -Wall -Wextra -Wno-psabi -DLANES={lanes} -Daligned_alloc=limited_alloc"
    command = [*shlex.split(os.environ.get("CC", "cc")), *flags.split(), f"-fsanitize={sanitizers}"]
    command += ["-fno-sanitize-recover=all", str(source), str(ROOT / "tests" / "sanitize.c"), "-lm", "-o", str(program)]
    subprocess.run(command, check=True)
    return subprocess.run([program, str(cases)], capture_output=True, text=True, check=False)


def main(cases: int = 200) -> None:
    for sanitizers in SANITIZERS:
        for lanes in LANES:
            started = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                done = sanitize(SOURCE, lanes, sanitizers, cases, Path(folder))
            if done.returncode:
                sys.exit(f"{done.stderr}{sanitizers}, {lanes} lanes: exit code {done.returncode}")
            print(f"{sanitizers}, {lanes} lanes: {cases} cases, {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
