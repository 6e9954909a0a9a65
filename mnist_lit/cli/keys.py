"""The keys of the configuration that stand for more than a value; ``schema`` has the types of all."""

from collections.abc import Iterable

# Their values are paths: Hydra's grammar would choke on spaces, =, commas, ~ or umlauts in them.
PATHS = (
    *("data.dir", "hydra.run.dir", "hydra.sweep.dir", "storage", "resume", "ckpt"),
    *("images", "output", "contact_sheet", "source", "target", "folder"),
)
QUOTED = (*PATHS, "where")  # and this is a text with =
NULLABLE = ("resume", "output", "contact_sheet", "where")  # of these: null is not the text "null"
# They may change without changing the run: where the data are (their checksum is compared), what is shown and recorded,
# and the hardware, although another device or number of threads changes the last bits.
MAY_CHANGE = (
    *("resume", "trust", "data.dir", "data.source", "logger"),
    *("checkpoint.every_n_epochs", "checkpoint.every_n_steps"),
    *("model.cpu_kernel", "model.compile"),
    *(f"trainer.{key}" for key in ("accelerator", "profiler", "log_every_n_steps", "detect_anomaly")),
    *(f"trainer.enable_{what}" for what in ("progress_bar", "model_summary")),
)
# Null stands for the length of the whole run, which then cannot change: ``schedulers.LENGTHS``, whose module needs torch.
RUN_LENGTH_KEYS = ("scheduler.T_max", "scheduler.total_steps", "scheduler.total_iters")
# Sections whose keys are the arguments of one class: naming another on the command line drops those of the file.
SINGLE_GROUPS = ("data", "augment", "model", "loss", "optimizer", "scheduler")
# Sections that have a class and its arguments by name.
MULTI_GROUPS = ("metrics", "callbacks", "logger")
# Groups whose files change other sections.
GLOBAL_GROUPS = ("experiment", "debug", "local")
# Of a search; the other keys of conf/tune.yaml are those of its trials.
TUNE_KEYS = ("n_trials", "storage", "study", "sampler", "pruner", "sampler_seed", "workers", "space")
# What ``data.dir`` is in the files of conf/data/, where nobody has chosen.
DATA_DIR = "data"


def is_under(key: str, keys: Iterable[str]) -> bool:
    """Whether ``key``, or a section that it is in, is among ``keys``."""
    return any(key == each or key.startswith(f"{each}.") for each in keys)
