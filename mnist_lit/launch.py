"""The door of every command: what Hydra would do too late or not at all, then Hydra.

Hydra composes the configuration after it has made the run's folder, prints a traceback for a mistyped key, and its
help drops the YAML's comments. So the command line is composed and checked here first, before Hydra makes a folder
and the work imports torch; Hydra then does it again and calls the work.
"""

import contextlib
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mnist_lit import Refusal, Stopped, ranks, runs
from mnist_lit.configuration import CONF, ConfigFiles, check, flat, quoted

log = logging.getLogger(__name__)


def launch(verb: str, work: Callable[..., Any], run_folder: bool = False) -> None:
    """Run ``work`` with the configuration ``conf/<verb>.yaml`` and the command line's changes to it.

    Args:
        work: Gets the configuration's sections as plain values, and ``folder`` if ``run_folder``.
        run_folder: Whether each run has a folder of its own, which no other run may share.
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
    try:
        with files.errors_as_refusals(flags.overrides):
            overrides = flags.overrides
            if not _only_shows(flags):
                overrides, job.continued = _prepare_all(files, flags, run_folder)
            # Hydra wants the overrides side by side.
            sys.argv[1:] = [*(a for a in arguments if a not in flags.overrides), *overrides]
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=verb)(job)()
        if job.refusal:
            raise job.refusal
    except Refusal as refusal:
        if not (ranks.is_first() or isinstance(refusal, ranks.LostProcessError)):  # it may concern all: one says it
            time.sleep(ranks.FIRST_SAYS_IT)
        sys.exit(f"{verb}: {refusal}")
    except (Stopped, KeyboardInterrupt) as stopped:
        if ranks.is_first():
            print(f"{verb}: {stopped if isinstance(stopped, Stopped) else 'stopped'}", file=sys.stderr)
        sys.exit(128 + (stopped.signal if isinstance(stopped, Stopped) else signal.SIGINT))


class _Job:
    """What Hydra calls with the composed configuration, once a run."""

    def __init__(self, verb: str, files: ConfigFiles, work: Callable[..., Any], run_folder: bool) -> None:
        self.verb, self.files, self.work, self.run_folder = verb, files, work, run_folder
        self.refusal: Refusal | None = None
        self.continued: dict[str, Any] | None = None  # the configuration of a run that goes on

    def __call__(self, config: Any) -> None:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        of_hydra = HydraConfig.get()
        is_sweep = of_hydra.mode is RunMode.MULTIRUN
        folder = Path(of_hydra.runtime.output_dir)
        try:
            values = self.continued or self.files.checked_values(config, of_hydra.runtime.choices)
            if is_sweep and _has_several_processes(values.get("trainer", {})):
                raise Refusal(
                    "a sweep (-m) cannot start several processes a job: start such runs one by one, without -m"
                )
            with ranks.loss_as_refusal(lambda: runs.how_to_go_on(folder)):
                self.work(**{"folder": folder} if self.run_folder else {}, **values)
        except Refusal as refusal:
            if is_sweep:
                log.error("refused: %s", refusal)
                raise  # the sweep's other jobs go on
            if self.run_folder and ranks.is_first():
                _remove_traces(folder, self.verb)
            self.refusal = refusal  # raised here, Hydra would print a line of its own


def _has_several_processes(trainer: dict[str, Any]) -> bool:
    """Lightning starts them by running the command again, which with -m would start the sweep again."""
    devices = trainer.get("devices", 1)
    one = str(devices) == "1" or (isinstance(devices, list) and len(devices) == 1)
    return not one or trainer.get("num_nodes", 1) > 1


def help_text(verb: str, overrides: list[str]) -> str:
    """The configuration's YAML files with their comments; of the groups, the files that ``overrides`` choose."""
    import yaml

    text = (CONF / f"{verb}.yaml").read_text(encoding="utf-8")
    chosen = dict(override.split("=", 1) for override in overrides if "=" in override)
    parts = [text.rstrip()]
    groups = [entry for entry in yaml.safe_load(text)["defaults"] if isinstance(entry, dict)]
    for group, default in (pair for entry in groups for pair in entry.items() if not pair[0].startswith("override")):
        option = chosen.get(group, default)
        options = ", ".join(sorted(path.stem for path in (CONF / group).glob("*.yaml")))
        parts.append(f"# ---- {group}: {option or 'none'}  (there are {options})")
        if (path := CONF / group / f"{option}.yaml").is_file():
            body = path.read_text(encoding="utf-8").rstrip()
            parts.append(body if group == "experiment" else f"{group}:\n  " + body.replace("\n", "\n  "))
    return "\n\n".join(parts)


def _only_shows(flags: Any) -> bool:
    return bool(flags.cfg or flags.info or flags.hydra_help or flags.shell_completion or flags.experimental_rerun)


def _prepare_all(files: ConfigFiles, flags: Any, run_folder: bool) -> tuple[list[str], dict[str, Any] | None]:
    """``_prepare`` in one of several processes, too."""
    overrides: list[str] = flags.overrides
    multirun = flags.multirun or "hydra.mode=MULTIRUN" in overrides
    if not run_folder or not ranks.is_started_by_another():
        ranks.tell_children()
        return _prepare(files, overrides, multirun, run_folder)
    ranks.end_with_parent()

    def prepare(overrides: list[str]) -> tuple[list[str], dict[str, Any] | None]:
        if ranks.by_torchrun():
            if multirun:
                raise Refusal("torchrun starts the processes of one run: leave out -m")
            overrides = ranks.with_torchruns_numbers(overrides)
        return _prepare(files, overrides, multirun, run_folder)

    prepared, continued = ranks.prepared_by_first(overrides, prepare) if ranks.by_torchrun() else prepare(overrides)
    return prepared if ranks.is_first() else [*prepared, *ranks.QUIET], continued


def _prepare(
    files: ConfigFiles, overrides: list[str], multirun: bool, run_folder: bool
) -> tuple[list[str], dict[str, Any] | None]:
    """Check the command line and claim the run's folder, all before Hydra starts.

    Returns:
        What to call Hydra with; and the configuration of the run that goes on, if one does.
    """
    from omegaconf.errors import InterpolationResolutionError

    config = files.compose(_first_job(overrides) if multirun else overrides)
    if config.get("resume"):
        if multirun:
            raise Refusal("resume= goes on with one run: leave out -m")
        return _prepare_resume(files, overrides, config)
    if not multirun:  # each job of a sweep checks its own values, so that the others run
        with contextlib.suppress(InterpolationResolutionError):  # ${hydra:...} has a value only inside of Hydra's run
            values = files.checked_values(config, config.hydra.runtime.choices)
            _refuse_what_is_missing(values.get("trainer", {}))
    if not run_folder or not ranks.is_first():  # the first one has the folder already
        return overrides, None
    key, value = ("hydra.sweep.dir", config.hydra.sweep.dir) if multirun else ("hydra.run.dir", config.hydra.run.dir)
    if not value:
        raise Refusal(f"{key}= is empty: give it a folder, or leave it out")
    folder = Path(value)
    if not any(override.startswith(f"{key}=") for override in overrides):
        folder = runs.claim(folder)
    elif runs.holds_run(folder):
        more = "" if multirun else f", or go on with it: resume={folder}"
        raise Refusal(f"{folder} holds a run already: choose another {key}{more}")
    else:
        runs.make(folder)
    return [*overrides, quoted(f"{key}={folder}")], None


def _prepare_resume(files: ConfigFiles, overrides: list[str], config: Any) -> tuple[list[str], dict[str, Any]]:
    """The same for a run that goes on in its own folder, with its own configuration."""
    from mnist_lit import resume

    if ranks.is_first() and any(override.startswith("hydra.run.dir=") for override in overrides):
        raise Refusal("resume= goes on in the run's own folder: leave out hydra.run.dir")
    values, choices = files.checked_values(config, config.hydra.runtime.choices), config.hydra.runtime.choices
    run = resume.find(values["resume"], files.outputs_folder())
    # Typed: named by an override, or set by a group that was chosen.
    unchanged, new = flat(files.defaults({})), flat(values)
    named = {override.split("=", 1)[0].lstrip("+~") for override in overrides}
    typed = {key for key, value in new.items() if key in named or unchanged.get(key) != value} - {"resume"}
    continued = resume.continued(run, values, typed)
    check(continued, files.defaults(choices))
    _refuse_what_is_missing(continued["trainer"])
    kept = [override for override in overrides if ranks.key(override) not in ranks.FOLDER_KEYS]
    # The path itself, for further processes of this run: by then something else may be the latest.
    where = [quoted(f"resume={run.start}"), quoted(f"hydra.run.dir={run.folder}"), "hydra.output_subdir=null"]
    return [*kept, *where], continued


def _refuse_what_is_missing(trainer: dict[str, Any]) -> None:
    accelerator, machines = trainer.get("accelerator"), trainer.get("num_nodes", 1)
    if machines > 1 and not ranks.by_torchrun():  # each would prepare a folder of its own, and wait for the others
        raise Refusal(f"trainer.num_nodes={machines}: several machines are started with torchrun (see README.md)")
    # Where the system itself has no GPU there is no need to import torch to find that out.
    devices = ("nvidia[0-9]*", "nvidiactl", "nvmap", "nvhost-gpu", "dxg", "kfd")  # NVIDIA, Jetson, WSL, ROCm
    if accelerator in ("gpu", "cuda") and sys.platform == "linux":
        if not any(found for device in devices for found in Path("/dev").glob(device)):
            raise Refusal(f"trainer.accelerator={accelerator}: this machine has no GPU; auto takes what there is")


def _first_job(overrides: list[str]) -> list[str]:
    """The overrides of a sweep's first job."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import ValueType

    first = []
    for override in OverridesParser.create().parse_overrides(overrides):
        if not override.is_sweep_override() and override.input_line:
            first.append(override.input_line)
        elif override.is_discrete_sweep() and override.value_type is not ValueType.GLOB_CHOICE_SWEEP:
            first.append(f"{override.get_key_element()}={next(override.sweep_string_iterator())}")
    return first


def _remove_traces(folder: Path, verb: str) -> None:
    """A run that was refused leaves no folder behind, where nothing else is in it."""
    if {path.name for path in folder.iterdir()} <= {".hydra", f"{verb}.log"}:
        shutil.rmtree(folder / ".hydra", ignore_errors=True)
        (folder / f"{verb}.log").unlink(missing_ok=True)
        folder.rmdir()
