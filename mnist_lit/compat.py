"""Every use of a private or undocumented name of another library, in one place.

Each function says why no public way will do and with which versions it was seen to work; ``tests/test_compat.py`` has
a test for each, which fails by name when an upgrade breaks it. The upper bounds in ``pyproject.toml`` keep untested
versions out. Libraries are imported inside the functions, so importing this module loads none of them.

Two classes override undocumented methods of a library's class and stay in their own modules: uvicorn's ``H11Protocol`` in
``inference/connections.py``, and Optuna's ``RDBStorage`` in ``sweeps/database.py``. The tests check these, too. So do two
names that are single words: ``ensure_running`` of multiprocessing's servers in ``cli/job.py``, and ``restarted_mid_epoch`` of
Lightning's loop of epochs in ``training/``.
"""

import atexit
import threading
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lightning as L
    from torch import Tensor, nn
    from torchmetrics import Metric

# Hydra 1.3.8


def parse_hydra_arguments(arguments: list[str]) -> Any:
    """Hydra's own command line, parsed: its flags, and the overrides wherever they stand.

    ``hydra.main`` does not tell the task its flags, and parses only when it is called.
    """
    from hydra._internal.utils import get_args_parser

    return get_args_parser().parse_intermixed_args(arguments)


def expand_sweep(overrides: list[Any]) -> list[list[str]]:
    """The overrides of each job of a grid, in the order of Hydra's basic sweeper, which offers them only to a launcher."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    (jobs,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    return jobs


def run_composed(task: Any, config: Any) -> None:
    """What ``hydra.main`` does after composing the configuration: make the folder, set up logging, call the task.

    ``hydra.main`` with a configuration as its argument skips all of that.
    """
    from hydra._internal.callbacks import Callbacks
    from hydra.core.utils import JobRuntime, run_job, setup_globals
    from hydra.types import HydraContext

    setup_globals()
    JobRuntime.instance().set("name", config.hydra.job.name)
    context = HydraContext(config_loader=None, callbacks=Callbacks())  # type: ignore[arg-type]
    _ = run_job(task, config, job_dir_key="hydra.run.dir", job_subdir_key=None, hydra_context=context).return_value


# Lightning 2.6.6


def estimated_steps(trainer: "L.Trainer") -> float:
    """``trainer.estimated_stepping_batches``, after which a resumed run still goes on within its epoch.

    To know the length, Lightning makes the training loader. In a resumed run that is too early: the loader's state has not
    been read yet, and Lightning would not make it again.
    """
    steps = trainer.estimated_stepping_batches
    trainer.fit_loop._combined_loader = None
    return steps


def epoch_goes_on(trainer: "L.Trainer") -> None:
    """Say, when a batch is trained, that the resumed run has left the point where it was resumed.

    Otherwise Lightning does not step a ``ReduceLROnPlateau`` at the end of an epoch that was resumed within. The public
    ``restarting`` would change the other loops, too.
    """
    trainer.fit_loop._restarting = False


def validation_follows(trainer: "L.Trainer") -> bool:
    """Whether Lightning runs a validation loop right after the current training batch.

    A checkpoint written between the batch and its validation would make the resumed run skip that validation. The
    decision depends on the number of batches, the epoch, ``should_stop`` and the clock; the hooks are not told of it.
    """
    loop = trainer.fit_loop
    fetcher = loop._data_fetcher
    return fetcher is not None and loop.epoch_loop._should_check_val_fx(fetcher)


def restart_train_loaders(trainer: "L.Trainer") -> None:
    """Make the iterators of the training loaders anew, as Lightning does before every epoch but a process's first.

    Those of the first epoch are made before any hook, and with worker processes they have drawn the order by then.
    """
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    iter(fetcher)


def launched_processes(trainer: "L.Trainer") -> list[Any]:
    """The ``subprocess.Popen`` objects of the ranks that this process has launched; empty if it has launched none.

    It is the launcher's own list: Lightning's observer thread polls it, and kills this process when one of them fails.
    """
    return getattr(trainer.strategy.launcher, "procs", [])


def leave_notebook() -> None:
    """Make Lightning treat this process, forked from a notebook's, as a script's.

    Lightning checks only once, when it is imported, whether the session is interactive, and would refuse ``strategy="ddp"`` here.
    """
    from lightning.pytorch.trainer.connectors import accelerator_connector

    accelerator_connector._IS_INTERACTIVE = False


def as_within_epoch(fit_loop: dict[str, Any]) -> None:
    """Turn the loops of a checkpoint from the end of an epoch that was cut short into those of one from within it.

    Lightning ends such an epoch like any other, and would resume with the next.
    """
    for counts in fit_loop["epoch_progress"].values():
        counts["processed"] -= 1


def as_start_of_epoch(fit_loop: dict[str, Any]) -> None:
    """Turn the loops of a checkpoint from the end of an epoch into those of one from the start of the next.

    With ``max_steps``, Lightning takes the former for an unfinished epoch, and trains on more batches of it.
    """
    for counts in fit_loop["epoch_progress"].values():
        counts["ready"] += 1
        counts["completed"] = counts["processed"]
    optimizer = fit_loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    progress = [fit_loop[f"epoch_loop.{name}_progress"] for name in ("batch", "scheduler")]
    for each in (*progress, *optimizer.values()):
        each["current"] = dict.fromkeys(each["current"], 0)
    fit_loop["epoch_loop.batch_progress"]["is_last_batch"] = False
    fit_loop["state_dict"]["combined_loader"] = []  # a new epoch's loader starts at its beginning


def is_restoring(trainer: "L.Trainer") -> bool:
    """Whether Lightning is between reading a checkpoint to resume from and having restored all of it.

    No hook marks the end: optimizers and loops are restored after the last ``on_load_checkpoint``, and before any other
    hook.
    """
    return bool(trainer._checkpoint_connector._loaded_checkpoint)


# torchmetrics 1.9.0


def compute_locally(metric: "Metric") -> "Tensor":
    """The metric's value over this process's data, with neither synchronization nor caching.

    ``metric.compute()`` waits for all other ranks. ``Metric.__init__`` wraps ``compute`` on the instance to do so; the
    class's own method is the bare computation.
    """
    return type(metric).compute(metric)


# torch 2.15.0


def in_functorch_transform() -> bool:
    """Whether the caller runs under ``torch.func``: ``vmap``, ``grad``, ``functionalize`` ...

    Tensors look ordinary there, but have no storage whose address could be handed to C.
    """
    import torch

    return torch._C._functorch.peek_interpreter_stack() is not None


def has_hooks(module: "nn.Module") -> bool:
    """Whether calling ``module`` would run a hook, one of its own or one that is registered for all modules.

    PyTorch can register hooks but not list them.
    """
    import torch

    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch.nn.modules.module._has_any_global_hook()
    )


# Python 3.11 to 3.13. A process that multiprocessing has forked ends by os._exit, skipping the interpreter's shutdown.


def run_finalizers() -> None:
    """Call all pending ``weakref.finalize`` callbacks, as at exit.

    ``weakref`` registers this with ``atexit`` when the first finalizer is made; Python 3.13 forgets that in a fork.
    """
    weakref.finalize._exitfunc()  # type: ignore[attr-defined]


def shut_down_like_interpreter() -> None:
    """Wait for all non-daemon threads, then run the ``atexit`` handlers, in the interpreter's own order."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
