"""The library compiled from ``convolutions.c``: the best one for this CPU, if it was made from the source as it is now.

``python -m mnist_lit.kernels.library`` fails if the source has to be compiled; then ``make base`` does that.
"""

import ctypes
import functools
import sys
import sysconfig
from pathlib import Path

FOLDER = Path(__file__).parent
# As in pyproject.toml, best first: the instruction sets, as torch names them, and how many floats their vectors have.
LANES = {"AVX512": 16, "AVX2": 8, "DEFAULT": 4}


@functools.cache
def load(capability: str) -> tuple[ctypes.CDLL | None, str, str]:
    """The best library for this CPU and no better than ``capability``, or why there is none; and its instruction set.

    The CPU is asked too, because ``ATEN_CPU_CAPABILITY`` overrides what torch has found, and torch does not ask for all
    that a library needs.
    """
    if not path_of("DEFAULT").exists():
        return None, "the compiled library was not built (make setup builds it, with a C compiler)", "none"
    try:
        lanes = min(_open("DEFAULT").mnist_lit_lanes(), LANES.get(capability, LANES["DEFAULT"]))
        best = next(each for each in LANES if LANES[each] <= lanes and path_of(each).exists())
        return _open(best), "", best
    except OSError as error:
        return None, str(error), "none"


def path_of(instructions: str) -> Path:
    return FOLDER / f"_convolutions_{instructions.lower()}{sysconfig.get_config_var('EXT_SUFFIX')}"


def is_current(path: Path) -> bool:
    """Whether a library was compiled from the source as it is now. Dates do not tell: copies and checkouts change them."""
    source = FOLDER / "convolutions.c"
    return not source.exists() or source.read_bytes() in path.read_bytes()


def _open(instructions: str) -> ctypes.CDLL:
    path = path_of(instructions)
    if not is_current(path):
        raise OSError(f"{path.name} was compiled from another version of convolutions.c (make setup rebuilds it)")
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise OSError(f"the compiled library does not load ({error})") from error


if __name__ == "__main__":
    built = [path for path in map(path_of, LANES) if path.exists()]
    # The library for any CPU is the last to be built; not every compiler can make the others.
    sys.exit(not (path_of("DEFAULT") in built and all(map(is_current, built))))
