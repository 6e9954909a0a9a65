"""Command-line entry point: ``hydra.main``, with the run folder chosen before Hydra makes it and errors in one sentence."""

import atexit
import contextlib
import gc
import inspect
import io
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mnist_lit import Interrupted, UserError, compat
from mnist_lit.cli import parent, ranks, resume
from mnist_lit.cli.config import (
    CONF,
    ConfigFiles,
    absolute_paths,
    arguments,
    checked_values,
    flatten,
    key_of,
    plain_values,
    quoted,
)
from mnist_lit.cli.keys import is_under
from mnist_lit.storage import runs
from mnist_lit.storage.trust import require_trusted, targets

log_crash = logging.getLogger("mnist_lit.crash")  # goes to the log file alone

composed: Any = None  # the configuration, with Hydra's part, if another process has composed and checked it
current: Any = None  # the ``VerbRun``, or the sweep, of this process, for ``callbacks.Prepare``
tracebacks = False  # whether HYDRA_FULL_ERROR=1 asks for the traceback of a UserError


class InCallback(BaseException):
    """Carries an exception out of a Hydra callback, which would turn it into a warning."""


def launch(
    verb: str, work: Callable[..., Any], run_folder: bool = False, sweep: Callable[..., Any] | None = None
) -> None:
    """Run ``work`` with the configuration ``conf/<verb>.yaml`` and the overrides of the command line.

    Args:
        work: Called with the sections of the configuration as plain values, and with ``folder`` if ``run_folder``.
        run_folder: Whether each run needs its own folder.
        sweep: Called instead for a multirun (-m): ``sweeps.sweep.run``.
    """
    global current
    import hydra

    several = not {"-m", "--multirun", "hydra.mode=MULTIRUN"}.isdisjoint(sys.argv)
    sys.argv[1:] = [quoted(argument, multirun=several) for argument in sys.argv[1:]]
    flags = compat.parse_hydra_arguments(sys.argv[1:])
    # Hydra wants the overrides side by side.
    sys.argv[1:] = [*(argument for argument in sys.argv[1:] if argument not in flags.overrides), *flags.overrides]
    files = ConfigFiles(flags.config_name or verb, flags.config_dir)
    multirun = flags.multirun or "hydra.mode=MULTIRUN" in flags.overrides
    if flags.help:
        from mnist_lit.cli.help import help_text

        print_for_pipes()
        print(help_text(files.name, flags.overrides, files.user_folder))
        return
    command = VerbRun(verb, files, work, run_folder)
    hydra_main = hydra.main(version_base="1.3", config_path=str(CONF), config_name=verb)
    try:
        with files.errors_as_user_errors(flags.overrides), _exceptions_from_hydra():
            if run_folder and not multirun:
                ranks.adopt_srun()
            else:
                ranks.leave_srun(multirun)
            if composed:
                parent.tell_children()
                compat.run_composed(command, composed)
            elif multirun:
                if not sweep:
                    raise UserError("-m: only train makes sweeps")
                if ranks.started_together():
                    raise UserError("torchrun starts the processes of one run: leave out -m")
                sweep(verb, files, flags, hydra_main)
            else:
                current = command
                hydra_main(command)()
            if command.error:
                raise command.error
    except UserError as error:
        if tracebacks:
            raise
        if not (ranks.is_rank_zero() or isinstance(error, ranks.LostProcessError)):  # all may have it: one reports it
            time.sleep(ranks.RANK_ZERO_DELAY)
        sys.exit(f"{verb}: {error}")
    except (Interrupted, KeyboardInterrupt) as stopped:
        if ranks.is_rank_zero():
            print(f"{verb}: {stopped if isinstance(stopped, Interrupted) else 'stopped'}", file=sys.stderr)
        sys.exit(128 + (stopped.signal if isinstance(stopped, Interrupted) else signal.SIGINT))


@contextlib.contextmanager
def _exceptions_from_hydra() -> Iterator[None]:
    """In this block, Hydra raises errors of composition instead of printing them."""
    global tracebacks
    tracebacks = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    except InCallback as error:
        raise error.__cause__ or error from None


def print_for_pipes() -> None:
    """From now on, end quietly when nobody reads any more (``| head``), and print names of files of any encoding."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def show_tracebacks_as_asked() -> None:
    """From now on, Hydra prints the traceback of an exception: all of it, or without Hydra's own frames."""
    os.environ["HYDRA_FULL_ERROR"] = "1" if tracebacks else "0"


class VerbRun:
    """A single run of a verb, called by Hydra with the composed configuration.

    Attributes:
        error: The ``UserError`` that ended the run, if one did.
    """

    def __init__(self, verb: str, files: ConfigFiles, work: Callable[..., Any], run_folder: bool) -> None:
        self.verb, self.files, self.work, self.run_folder = verb, files, work, run_folder
        self.error: UserError | None = None
        self.continued: dict[str, Any] | None = None  # the configuration of a resumed run

    def prepare(self, config: Any) -> None:
        """Check the configuration and choose the run folder, before Hydra makes it."""
        global tracebacks
        from omegaconf import OmegaConf, open_dict, read_write

        if str(config.hydra.mode).endswith("MULTIRUN"):  # by a file: too late for a sweep
            raise UserError("hydra.mode=MULTIRUN: a sweep needs -m on the command line")
        tracebacks = tracebacks or str(config.hydra.job.env_set.get("HYDRA_FULL_ERROR")) == "1"
        if self.run_folder and ranks.is_started_by_another():
            ranks.end_with_starter()
        else:
            parent.tell_children()
        if not self.run_folder:
            _check(self.verb, config)
            return
        if ranks.started_together():
            ranks.take_starters_numbers(config)
            folder, start = ranks.decided_by_first(lambda earlier: self._decide(config, *(earlier or ())[:1]))
        elif ranks.is_rank_zero():
            folder, start = self._decide(config)
        else:  # Lightning passes the folder on
            folder, start = str(config.hydra.run.dir), config.get("resume")
            start = folder if start and not Path(start).is_file() else start
        if start:
            self.continued = self._continued(config, start)
        with read_write(config.hydra), open_dict(config.hydra):
            config.hydra.run.dir = folder
            if start or not ranks.is_rank_zero():
                config.hydra.output_subdir = None  # the first process or run has written it
            if not ranks.is_rank_zero():
                quiet = CONF / "hydra" / "job_logging" / "further_process.yaml"
                config.hydra.job_logging = OmegaConf.load(quiet)

    def __call__(self, config: Any) -> None:
        from hydra.core.hydra_config import HydraConfig

        hydra_config = HydraConfig.get()
        folder = Path(hydra_config.runtime.output_dir)
        try:
            values = self.continued or checked_values(self.verb, config)
            if hydra_config.job.chdir:
                values = absolute_paths(values, hydra_config.runtime.cwd)
            values = arguments(self.verb, values)
            show_tracebacks_as_asked()
            if self.run_folder:
                values = {"folder": folder, **values}
            try:
                inspect.signature(self.work).bind(**values)
            except TypeError as error:
                raise UserError(f"the configuration does not fit: {error} (--help shows the keys)") from error
            with ranks.lost_process_as_user_error(folder):
                self.work(**values)
        except UserError as error:
            if self.run_folder and ranks.is_rank_zero():
                if error.__cause__ and not isinstance(error, ranks.LostProcessError):
                    log_crash.error("%s", error, exc_info=error)  # a user need not see it, a developer may have to
                _remove_traces(folder, self.verb)
            self.error = error  # if raised here, Hydra would print a traceback
        except Exception:
            log_crash.exception("the run failed")
            raise

    def _decide(self, config: Any, earlier: str | None = None) -> tuple[str, str | None]:
        """The run folder, claimed for this run, and the checkpoint to resume from, if any.

        Args:
            earlier: The folder, if this run's processes have been started before.
        """
        typed = any(key_of(override) == "hydra.run.dir" for override in config.hydra.overrides.hydra)
        named = config.hydra.run.dir if typed else str(ranks.folder_of_job(Path(config.hydra.run.dir)))
        if ranks.is_requeued():
            earlier = named
        if earlier and (Path(earlier) / "config.yaml").exists():
            return earlier, str(resume.find(earlier).start)
        if wanted := config.get("resume"):
            if typed:
                raise UserError("resume= uses the folder of the run: remove hydra.run.dir")
            run = resume.find(wanted)
            return str(run.folder), str(run.start)
        _check(self.verb, config)
        folder = claimed("hydra.run.dir", earlier or named, typed or bool(earlier))
        if runs.contains_run(folder):
            raise UserError(
                f"{folder} already contains a run: choose another hydra.run.dir, or resume it: resume={folder}"
            )
        return str(folder), None

    def _continued(self, config: Any, start: str) -> dict[str, Any]:
        """The configuration of the resumed run, with the overrides that are allowed."""
        from mnist_lit.cli.schema import check

        asked = checked_values(self.verb, config)
        # Typed means named by an override, or set by a chosen group. Only here does Hydra compose a second time.
        unchanged, new = flatten(plain_values(self.files.compose([]))), flatten(asked)
        named = {key_of(override) for override in config.hydra.overrides.task}
        typed = {key for key, value in new.items() if is_under(key, named) or unchanged.get(key) != value} - {"resume"}
        typed |= {key for key in named if asked.get(key) == {}}  # GROUP=none
        run = resume.find(start)
        continued = resume.continued(run, asked, typed)
        require_trusted(continued, run.folder / "config.yaml", asked.get("trust", ()), chosen=targets(asked))
        check(self.verb, continued)
        _refuse_what_is_missing(continued["trainer"])
        return continued


def _check(verb: str, config: Any) -> None:
    from omegaconf.errors import InterpolationKeyError, InterpolationResolutionError

    try:
        values = checked_values(verb, config)
    except InterpolationKeyError:  # of a key that there is not
        raise
    except InterpolationResolutionError:  # ${hydra:...} needs the folder
        return
    _refuse_what_is_missing(values.get("trainer", {}))


def for_another_process(verb: str, config: Any) -> Any:
    """A composed configuration, checked, for the process that will run it.

    Returns:
        None if it is invalid: then the process composes it itself, and reports the error.
    """
    from omegaconf import OmegaConf, open_dict, read_write

    try:
        _check(verb, config)
    except UserError:
        return None
    with read_write(config.hydra), open_dict(config.hydra):
        for plugin in ("launcher", "sweeper"):  # pickle rejects classes that Hydra has reimported
            config.hydra[plugin] = OmegaConf.to_container(config.hydra[plugin])
    return config


@contextlib.contextmanager
def loading(what: str) -> Iterator[None]:
    """In this block, which imports packages, collect no garbage, and after a second print what is being loaded."""
    # Imports create no garbage, and scanning half a million objects for it takes a sixth of their time, and 0.4 s each
    # time later. That is why they are frozen.
    first, collects = "torch" not in sys.modules, gc.isenabled()
    gc.disable()
    timer = threading.Timer(1.0, print, [f"loading {what} ..."], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    if ranks.is_rank_zero():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if first and "torch" in sys.modules:
            gc.freeze()
            atexit.register(gc.unfreeze)  # otherwise some report a leak at exit
        if collects:
            gc.enable()


@contextlib.contextmanager
def stopped_by_signals(hint: Callable[[], str]) -> Iterator[None]:
    """In this block, Ctrl-C and SIGTERM raise ``Interrupted``.

    Args:
        hint: Gives the end of the message: how to continue.
    """

    def stop(number: int, frame: Any) -> None:
        raise Interrupted(number, f"stopped by SIGTERM{hint()}")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(signal.SIGINT, f"stopped by Ctrl-C{hint()}") from error
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None: one that Python does not know


def claimed(key: str, value: str | None, typed: bool) -> Path:
    """The folder ``value`` of ``key``, created if missing; unless typed, a new one that no other run has."""
    if not value:
        raise UserError(f"{key}= is empty: give it a folder, or leave it out")
    folder = Path(value)
    if not typed:
        return runs.claim(folder)
    runs.make_folder(folder)
    return folder


def _refuse_what_is_missing(trainer: dict[str, Any]) -> None:
    accelerator, machines = trainer.get("accelerator"), trainer.get("num_nodes", 1)
    several = isinstance(machines, int) and machines > 1  # Lightning refuses what is no number
    if several and not ranks.started_together():  # each would make its own folder and wait for the others
        raise UserError(f"trainer.num_nodes={machines}: start several machines with torchrun or srun (see README.md)")
    # Where the system itself has no GPU there is no need to import torch to find that out.
    devices = ("nvidia[0-9]*", "nvidiactl", "nvmap", "nvhost-gpu", "dxg", "kfd")  # NVIDIA, Jetson, WSL, ROCm
    if accelerator in ("gpu", "cuda") and sys.platform == "linux":
        if not any(found for device in devices for found in Path("/dev").glob(device)):
            raise UserError(f"trainer.accelerator={accelerator}: this machine has no GPU; auto uses what is available")


def _remove_traces(folder: Path, verb: str) -> None:
    """Delete the folder of a rejected run if nothing else is in it."""
    if {path.name for path in folder.iterdir()} <= {".hydra", f"{verb}.log"}:
        shutil.rmtree(folder / ".hydra", ignore_errors=True)
        (folder / f"{verb}.log").unlink(missing_ok=True)
        folder.rmdir()
