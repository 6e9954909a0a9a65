"""The packages of a training run, which the server of ``job`` imports once for all jobs.

Importing this elsewhere has no other effect. This project's own modules are not here, so each job reads them as they are
when it starts.
"""

# ruff: noqa: F401
import atexit
import gc

gc.disable()  # as in launch.loading

import inspect
import os
import sys

import filelock
import hydra
import jinja2
import lightning.pytorch.loggers
import matplotlib.backends.backend_agg
import matplotlib.backends.backend_svg
import PIL.Image
import pydantic
import torch._dynamo
import torchmetrics.classification
import torchvision.datasets
import tqdm.contrib.logging

PIL.Image.init()
inspect.getmodule(inspect.currentframe())  # makes a table of all modules, for which torch asks with each operator
if any("multiprocessing.forkserver" in argument for argument in sys.orig_argv):
    os.environ.pop("OPENBLAS_NUM_THREADS", None)  # was for the import
    gc.freeze()
    atexit.register(os._exit, 0)  # taking it all down takes seconds, in which a pipe that it has inherited stays open
gc.enable()
