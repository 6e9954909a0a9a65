"""``python -m warm mnist_lit.train ...``: that command, whose own jobs and trials come from the tests' server, too."""

import runpy
import sys
from multiprocessing import forkserver

if __name__ == "__main__":
    # What its docstring promises for a process that comes from a server. In Python 3.11 to 3.13 it starts another one.
    forkserver.ensure_running = forkserver._forkserver.ensure_running = lambda: None  # type: ignore[method-assign]
    module = sys.argv.pop(1)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
