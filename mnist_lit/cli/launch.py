"""The door of every command: what Hydra would do too late or not at all, then Hydra.

Hydra composes the configuration after it has made the run's folder, prints a traceback for a mistyped key, and its
help drops the YAML's comments. So the command line is composed and checked here first, before Hydra makes a folder
and the work imports torch; Hydra then does it again and calls the work.
"""

import atexit
import contextlib
import gc
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

from mnist_lit import Interrupted, UserError
from mnist_lit.cli import ranks
from mnist_lit.cli.configuration import CONF, ConfigFiles, check, flatten, plain_values, quoted
from mnist_lit.storage import runs

log = logging.getLogger(__name__)

composed: Any = None  # a run's configuration, Hydra's part included, where another process has composed and checked it


def launch(
    verb: str, work: Callable[..., Any], run_folder: bool = False, sweep: Callable[..., Any] | None = None
) -> None:
    """Run ``work`` with the configuration ``conf/<verb>.yaml`` and the command line's changes to it.

    Args:
        work: Gets the configuration's sections as plain values, and ``folder`` if ``run_folder``.
        run_folder: Whether each run has a folder of its own, which no other run may share.
        sweep: What runs many at once, which is asked for with -m: ``sweeps.sweep.run``.
    """
    import hydra
    from hydra._internal.utils import get_args_parser

    arguments = [quoted(argument) for argument in sys.argv[1:]]
    flags = get_args_parser().parse_intermixed_args(arguments)
    if flags.help:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # --help | head ends quietly
        print(help_text(verb, flags.overrides))
        return
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # exceptions come to us as they are, not as Hydra's printed text
    files = ConfigFiles(flags.config_name or verb, flags.config_dir)
    job = _Job(verb, files, work, run_folder)
    hydra_main = hydra.main(version_base="1.3", config_path=str(CONF), config_name=verb)
    try:
        with files.errors_as_refusals(flags.overrides):
            overrides = flags.overrides
            multirun = flags.multirun or "hydra.mode=MULTIRUN" in overrides
            if multirun and not _only_shows(flags):
                if not sweep:
                    raise UserError("-m: only train makes sweeps")
                if ranks.by_torchrun():
                    raise UserError("torchrun starts the processes of one run: leave out -m")
                sweep(verb, files, flags, arguments, hydra_main)
                return
            if composed:
                _run(job, composed)
                job.raise_refusal()
                return
            if not _only_shows(flags):
                overrides, job.continued = _prepare_all(files, overrides, run_folder)
            hand_over(arguments, flags, overrides)
            hydra_main(job)()
            job.raise_refusal()
    except UserError as refusal:
        if not (ranks.is_first() or isinstance(refusal, ranks.LostProcessError)):  # it may concern all: one says it
            time.sleep(ranks.FIRST_SAYS_IT)
        sys.exit(f"{verb}: {refusal}")
    except (Interrupted, KeyboardInterrupt) as stopped:
        if ranks.is_first():
            print(f"{verb}: {stopped if isinstance(stopped, Interrupted) else 'stopped'}", file=sys.stderr)
        sys.exit(128 + (stopped.signal if isinstance(stopped, Interrupted) else signal.SIGINT))


class _Job:
    """What Hydra calls with the composed configuration, once a run."""

    def __init__(self, verb: str, files: ConfigFiles, work: Callable[..., Any], run_folder: bool) -> None:
        self.verb, self.files, self.work, self.run_folder = verb, files, work, run_folder
        self.refusal: UserError | None = None
        self.continued: dict[str, Any] | None = None  # the configuration of a run that goes on

    def __call__(self, config: Any) -> None:
        from hydra.core.hydra_config import HydraConfig

        of_hydra = HydraConfig.get()
        folder = Path(of_hydra.runtime.output_dir)
        try:
            if composed:
                values = plain_values(config)
            else:
                values = self.continued or self.files.checked_values(config, of_hydra.runtime.choices)
            with ranks.loss_as_refusal(lambda: runs.resume_hint(folder)):
                self.work(**{"folder": folder} if self.run_folder else {}, **values)
        except UserError as refusal:
            if self.run_folder and ranks.is_first():
                _remove_traces(folder, self.verb)
            self.refusal = refusal  # raised here, Hydra would print a line of its own

    def raise_refusal(self) -> None:
        if self.refusal:
            raise self.refusal


def _run(job: _Job, config: Any) -> None:
    """What hydra.main does with a configuration, once it has composed it."""
    from hydra._internal.callbacks import Callbacks
    from hydra.core.utils import JobRuntime, run_job, setup_globals
    from hydra.types import HydraContext

    ranks.tell_children()
    setup_globals()
    JobRuntime.instance().set("name", config.hydra.job.name)
    context = HydraContext(config_loader=None, callbacks=Callbacks())  # type: ignore[arg-type]
    _ = run_job(job, config, job_dir_key="hydra.run.dir", job_subdir_key=None, hydra_context=context).return_value


def for_another_process(files: ConfigFiles, config: Any) -> Any:
    """A composed run's configuration, checked, for the process that shall be that run.

    Returns:
        None where its own command shall compose it, because it has something to refuse.
    """
    from omegaconf import OmegaConf, open_dict, read_write

    try:
        _check(files, config)
    except UserError:
        return None
    with read_write(config.hydra), open_dict(config.hydra):
        for plugin in ("launcher", "sweeper"):  # plain values: pickle refuses classes that Hydra has imported anew
            config.hydra[plugin] = OmegaConf.to_container(config.hydra[plugin])
    return config


def _check(files: ConfigFiles, config: Any) -> None:
    from omegaconf.errors import InterpolationResolutionError

    with contextlib.suppress(InterpolationResolutionError):  # ${hydra:...} has a value only inside of Hydra's run
        values = files.checked_values(config, config.hydra.runtime.choices)
        _refuse_what_is_missing(values.get("trainer", {}))


def help_text(verb: str, overrides: list[str]) -> str:
    """The configuration's YAML files with their comments; of the groups, the files that ``overrides`` choose."""
    import yaml

    text = (CONF / f"{verb}.yaml").read_text(encoding="utf-8")
    chosen = dict(override.split("=", 1) for override in overrides if "=" in override)
    parts = [text.rstrip()]
    defaults = yaml.safe_load(text)["defaults"]
    parts += [f"# ---- {name}\n\n{help_text(name, overrides)}" for name in defaults if name == "train"]
    groups = [entry for entry in defaults if isinstance(entry, dict)]
    for group, default in (pair for entry in groups for pair in entry.items() if not pair[0].startswith("override")):
        option = chosen.get(group, default)
        options = ", ".join(sorted(path.stem for path in (CONF / group).glob("*.yaml")))
        parts.append(f"# ---- {group}: {option or 'none'}  (there are {options})")
        if (path := CONF / group / f"{option}.yaml").is_file():
            body = path.read_text(encoding="utf-8").rstrip()
            parts.append(body if group == "experiment" else f"{group}:\n  " + body.replace("\n", "\n  "))
    return "\n\n".join(parts)


@contextlib.contextmanager
def loading(what: str) -> Iterator[None]:
    """In this block, which imports, collect no garbage, and say after a second what is being loaded."""
    # Imports leave no garbage; to look for it among half a million objects takes a sixth of their time, and later 0.4 s
    # again and again. What was there before torch is hardly worth a thought.
    first, collects = "torch" not in sys.modules, gc.isenabled()
    gc.disable()
    timer = threading.Timer(1.0, print, [f"loading {what} ..."], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    if ranks.is_first():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if first and "torch" in sys.modules:
            gc.freeze()
            atexit.register(gc.unfreeze)  # or some of them complain that they were not taken down
        if collects:
            gc.enable()


def _only_shows(flags: Any) -> bool:
    return bool(flags.cfg or flags.info or flags.hydra_help or flags.shell_completion or flags.experimental_rerun)


def hand_over(arguments: list[str], flags: Any, overrides: list[str]) -> None:
    """Let Hydra find these overrides on the command line, where it wants them side by side."""
    sys.argv[1:] = [*(argument for argument in arguments if argument not in flags.overrides), *overrides]


def _prepare_all(files: ConfigFiles, overrides: list[str], run_folder: bool) -> tuple[list[str], dict[str, Any] | None]:
    """``_prepare`` in one of several processes, too."""
    if not run_folder or not ranks.is_started_by_another():
        ranks.tell_children()
        return _prepare(files, overrides, run_folder)
    ranks.end_with_parent()

    def prepare(overrides: list[str]) -> tuple[list[str], dict[str, Any] | None]:
        numbered = ranks.with_torchruns_numbers(overrides) if ranks.by_torchrun() else overrides
        return _prepare(files, numbered, run_folder)

    prepared, continued = ranks.prepared_by_first(overrides, prepare) if ranks.by_torchrun() else prepare(overrides)
    return prepared if ranks.is_first() else [*prepared, *ranks.QUIET], continued


def _prepare(files: ConfigFiles, overrides: list[str], run_folder: bool) -> tuple[list[str], dict[str, Any] | None]:
    """Check the command line and claim the run's folder, all before Hydra starts.

    Returns:
        What to call Hydra with; and the configuration of the run that goes on, if one does.
    """
    config = files.compose(overrides)
    if str(config.hydra.mode) == "RunMode.MULTIRUN":
        raise UserError("hydra.mode is MULTIRUN: a sweep is asked for with -m")
    if config.get("resume") and run_folder:
        return _prepare_resume(files, overrides, config)
    _check(files, config)
    if not run_folder or not ranks.is_first():  # the first one has the folder already
        return overrides, None
    folder = claimed(overrides, "hydra.run.dir", config.hydra.run.dir)
    if runs.contains_run(folder):
        raise UserError(
            f"{folder} holds a run already: choose another hydra.run.dir, or go on with it: resume={folder}"
        )
    return [*overrides, quoted(f"hydra.run.dir={folder}")], None


def claimed(overrides: list[str], key: str, value: str | None) -> Path:
    """The folder that ``key`` names, made if it is not there; if it was not named, one that nobody else has."""
    if not value:
        raise UserError(f"{key}= is empty: give it a folder, or leave it out")
    folder = Path(value)
    if not any(override.startswith(f"{key}=") for override in overrides):
        return runs.claim(folder)
    runs.make_folder(folder)
    return folder


def _prepare_resume(files: ConfigFiles, overrides: list[str], config: Any) -> tuple[list[str], dict[str, Any]]:
    """The same for a run that goes on in its own folder, with its own configuration."""
    from mnist_lit.cli import resume

    if ranks.is_first() and any(override.startswith("hydra.run.dir=") for override in overrides):
        raise UserError("resume= goes on in the run's own folder: leave out hydra.run.dir")
    values, choices = files.checked_values(config, config.hydra.runtime.choices), config.hydra.runtime.choices
    run = resume.find(values["resume"], files.outputs_folder())
    # Typed: named by an override, or set by a group that was chosen.
    unchanged, new = flatten(files.defaults({})), flatten(values)
    named = {override.split("=", 1)[0].lstrip("+~") for override in overrides}
    typed = {key for key, value in new.items() if key in named or unchanged.get(key) != value} - {"resume"}
    continued = resume.continued(run, values, typed)
    # Which network, optimizer and loggers it has is said by the run, not by this command's choices.
    check(
        continued,
        files.defaults(choices) | {section: continued[section] for section in ("model", "optimizer", "logger")},
    )
    _refuse_what_is_missing(continued["trainer"])
    kept = [override for override in overrides if ranks.key(override) not in ranks.FOLDER_KEYS]
    # The path itself, for further processes of this run: by then something else may be the latest.
    where = [quoted(f"resume={run.start}"), quoted(f"hydra.run.dir={run.folder}"), "hydra.output_subdir=null"]
    return [*kept, *where], continued


def _refuse_what_is_missing(trainer: dict[str, Any]) -> None:
    accelerator, machines = trainer.get("accelerator"), trainer.get("num_nodes", 1)
    if machines > 1 and not ranks.by_torchrun():  # each would prepare a folder of its own, and wait for the others
        raise UserError(f"trainer.num_nodes={machines}: several machines are started with torchrun (see README.md)")
    # Where the system itself has no GPU there is no need to import torch to find that out.
    devices = ("nvidia[0-9]*", "nvidiactl", "nvmap", "nvhost-gpu", "dxg", "kfd")  # NVIDIA, Jetson, WSL, ROCm
    if accelerator in ("gpu", "cuda") and sys.platform == "linux":
        if not any(found for device in devices for found in Path("/dev").glob(device)):
            raise UserError(f"trainer.accelerator={accelerator}: this machine has no GPU; auto takes what there is")


def _remove_traces(folder: Path, verb: str) -> None:
    """A run that was refused leaves no folder behind, where nothing else is in it."""
    if {path.name for path in folder.iterdir()} <= {".hydra", f"{verb}.log"}:
        shutil.rmtree(folder / ".hydra", ignore_errors=True)
        (folder / f"{verb}.log").unlink(missing_ok=True)
        folder.rmdir()
