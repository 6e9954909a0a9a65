"""Random damage to each kind of file that a stranger may send; ``tests/fuzz.py`` says what counts as right."""

import json
import subprocess
import sys
from pathlib import Path

import fuzz
import pytest
from helpers import ROOT

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure memory")
NUMBERS = {
    "checkpoint": (25, 150),
    "keras": (25, 100),
    "keras_h5": (25, 200),
    "idx": (100, 700),
    "picture": (100, 500),
}  # quick, slow
ROWS = {"checkpoint": "07_09_38", "keras": "40", "keras_h5": "40", "idx": "14", "picture": "31"}  # of docs/faults.md


def check(name: str, count: int) -> None:
    command = [
        sys.executable,
        str(ROOT / "tests" / "fuzz.py"),
        name,
        str(count),
    ]  # not a fork of this process's threads
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stdout + done.stderr
    counts = {key.strip(): int(number.replace(",", "")) for key, number in
              (line.rsplit(maxsplit=1) for line in done.stdout.splitlines())}  # fmt: skip
    assert counts.keys() == set(fuzz.OUTCOMES) and sum(counts.values()) == count
    assert counts["refused"] > count / 3


@pytest.mark.parametrize("name", fuzz.READERS, ids=lambda name: f"{ROWS[name]}_{name}")
def test_damaged_files_are_refused_or_read_right(name: str) -> None:
    check(name, NUMBERS[name][0])


@pytest.mark.slow
@pytest.mark.parametrize("name", fuzz.READERS, ids=lambda name: f"{ROWS[name]}_{name}")
def test_many_damaged_files_are_refused_or_read_right(name: str) -> None:
    check(name, NUMBERS[name][1])


def test_the_fuzzer_notices_what_a_reader_does_wrong() -> None:
    cases = {
        "raise KeyError('x')": "exception",
        "raise UserError('two\\nlines')": "exception",
        "os.abort()": "exception",
        "found = None": "accepted wrong",
        "found = b'content'": "accepted right",
        "raise UserError('no')": "refused",
        "import this": "code run",
        "importlib.import_module('this')": "code run",
        "import fuzz_marker": "code run",
        "os.system('true')": "code run",
        "open('/dev/full', 'w').close()": "code run",
        "b'x' * 2**28": "over memory",
        "bytearray(2**40)": "over memory",
        "time.sleep(60)": "over time",
    }
    script = f"""
import importlib, json, os, sys, time
sys.path.insert(0, {str(ROOT / "tests")!r})
import fuzz
from mnist_lit import UserError

def outcomes(code):
    def read(path):
        if path.read_bytes() != b"changed":
            return b"content"
        names = {{**globals(), "found": b"content"}}
        exec(code, names)
        return names["found"]

    changes = [lambda content, draw: ("changed", b"changed")]
    fuzz.READERS["test"] = lambda folder: fuzz.Reader(
        b"unchanged", changes, read, (UserError,), "file", lambda found, expected: found == expected, 100)
    return [outcome for _, _, outcome, _ in fuzz.fuzz("test", 2)]

fuzz.SECONDS = 4
print(json.dumps([outcomes(code) for code in json.loads(sys.argv[1])]))
"""
    command = [sys.executable, "-c", script, json.dumps([*cases])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert dict(zip(cases, json.loads(done.stdout), strict=True)) == {
        code: [wanted] * 2 for code, wanted in cases.items()
    }
