"""What each key's value may be, where that is more than the type of its default."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    """``allowed`` completes the sentence "must be ..."."""

    allowed: str
    holds: Callable[[Any], bool]


def whole(low: int, high: int | None = None) -> Rule:
    text = f"a whole number of at least {low}" if high is None else f"a whole number from {low} to {high}"
    return Rule(text, lambda v: _is_whole(v) and low <= v and (high is None or v <= high))


def number(low: float, high: float = math.inf, below: float = math.inf) -> Rule:
    text = f"a number from {low:g}" + (f" to {high:g}" if high < math.inf else "")
    text += f" to below {below:g}" if below < math.inf else ""
    return Rule(text, lambda v: _is_number(v) and low <= v <= high and (v < below))


def one_of(*choices: str) -> Rule:
    return Rule(f"one of {', '.join(choices)}", lambda v: v in choices)


def either(*rules: Rule) -> Rule:
    return Rule(", or ".join(rule.allowed for rule in rules), lambda v: any(rule.holds(v) for rule in rules))


def of_type(default: Any) -> Rule:
    """For a key without a range: any value of its default's type."""
    match default:
        case None:
            return Rule("anything", lambda v: True)
        case bool():
            return SWITCH
        case int():
            return Rule("a whole number", _is_whole)
        case float():
            return Rule("a number", _is_number)
        case str():
            return Rule("text", lambda v: isinstance(v, str))
        case _:
            return Rule(f"a {type(default).__name__}", lambda v: isinstance(v, type(default)))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


SWITCH = Rule("true or false", lambda v: isinstance(v, bool))
BETA = number(0, below=1)
BETAS = Rule("two numbers from 0 to below 1", lambda v: isinstance(v, list) and len(v) == 2 and all(map(BETA.holds, v)))
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true")
NO_LIMIT = either(whole(1), Rule("-1 for no limit", lambda v: v == -1))
SHARE = either(whole(0), number(0.0, 1.0))
SOME = either(whole(1), Rule("a share above 0.0 up to 1.0", lambda v: number(0.0, 1.0).holds(v) and v > 0))
DEVICES = Rule(
    "a whole number of at least 1, -1 for all, auto, or a list of device numbers",
    lambda v: v in ("auto", -1) or whole(1).holds(v) or isinstance(v, (str, list)),
)

PATH = Rule("a path", lambda v: isinstance(v, str) and v != "")

RANGES = {
    "ckpt": Rule("a checkpoint, a run's folder, or latest", PATH.holds),
    "images": Rule(
        "a file, a folder, a pattern such as scans/*.png, or a list of these",
        lambda v: PATH.holds(v) or (isinstance(v, list) and v != [] and all(map(PATH.holds, v))),
    ),
    "preprocess": one_of("mnist", "none"),
    "output": PATH,
    "contact_sheet": PATH,
    "overwrite": SWITCH,
    "port": whole(0, 65_535),
    "allow_remote": SWITCH,
    "open_browser": SWITCH,
    "resume": Rule("latest, a run's folder, or a checkpoint", lambda v: isinstance(v, str) and v != ""),
    "n_trials": whole(1),
    "storage": Rule("a database's address, such as sqlite:///outputs/tune.db", PATH.holds),
    "study": Rule(
        "a name of letters, digits, - and _", lambda v: re.fullmatch(r"[\w-]+", str(v), re.ASCII) is not None
    ),
    "sampler": one_of("tpe", "random"),
    "pruner": one_of("median", "none"),
    "sampler_seed": whole(0, 2**32 - 1),
    "workers": whole(1),
    "seed": whole(0, 2**32 - 1),
    "data.dir": Rule("the name of a folder", lambda v: isinstance(v, str) and v != ""),
    "data.source": one_of("auto", "mnist", "sample"),
    "data.batch_size": whole(1),
    "data.val_size": whole(0, 59_999),
    "data_format": one_of("channels_last", "channels_first"),
    "model.compiled": SWITCH,
    "model.dropout": number(0, below=1),
    "optimizer.lr": number(0),
    "optimizer.rho": number(0, 1),
    "optimizer.alpha": number(0, 1),
    "optimizer.eps": number(0),
    "optimizer.momentum": number(0),
    "optimizer.momentum_decay": number(0),
    "optimizer.weight_decay": number(0),
    "optimizer.betas": BETAS,
    "checkpoint.every_n_steps": whole(1),
    "checkpoint.every_n_epochs": whole(1),
    "trainer.max_epochs": NO_LIMIT,
    "trainer.min_epochs": whole(1),
    "trainer.max_steps": NO_LIMIT,
    "trainer.max_time": Rule(
        "DD:HH:MM:SS, such as 00:01:30:00",
        lambda v: isinstance(v, dict) or re.fullmatch(r"\d+(:\d\d){3}", str(v)) is not None,
    ),
    "trainer.min_steps": whole(1),
    "trainer.accelerator": one_of("auto", "cpu", "gpu", "cuda", "mps", "tpu"),
    "trainer.devices": DEVICES,
    "trainer.num_nodes": whole(1),
    "trainer.precision": Rule(f"one of {', '.join(PRECISIONS)}", lambda v: str(v) in (*PRECISIONS, "16", "32", "64")),
    "trainer.fast_dev_run": either(SWITCH, whole(1)),
    "trainer.limit_train_batches": SOME,
    "trainer.limit_val_batches": SHARE,
    "trainer.limit_test_batches": SOME,
    "trainer.limit_predict_batches": SHARE,
    "trainer.overfit_batches": SHARE,
    "trainer.val_check_interval": either(whole(1), number(0.0, 1.0)),
    "trainer.check_val_every_n_epoch": whole(1),
    "trainer.num_sanity_val_steps": whole(-1),
    "trainer.log_every_n_steps": whole(1),
    "trainer.accumulate_grad_batches": whole(1),
    "trainer.gradient_clip_val": number(0),
    "trainer.gradient_clip_algorithm": one_of("norm", "value"),
    "trainer.profiler": one_of("simple", "advanced", "pytorch"),
}
