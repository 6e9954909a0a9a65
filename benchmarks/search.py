"""Does the search find better settings than random draws do at the same cost? Write docs/search.md and docs/search.json.

python benchmarks/search.py DATA [REPEATS]

Both search the ranges of conf/tune.yaml for the tutorial's network and optimizer, in short trainings: EPOCHS times
through SHARE of the training images, VALIDATION others to validate on. The cost is the number of epochs: random search ends
each trial, while the search as shipped (TPE, median pruner) prunes and has more of them. A repeat has the same seeds for
both. What each has found is then trained anew with three other seeds and tested.
"""

import json
import logging
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning as L
import optuna
from scipy import stats

from mnist_lit.cli.config import flatten, settings
from mnist_lit.data import MNISTDataModule
from mnist_lit.kernels import memory
from mnist_lit.model import MNISTClassifier
from mnist_lit.sweeps.search import distributions, make_pruner, make_sampler, suggest
from mnist_lit.training.always import SeedEachBatch

DOCS = Path(__file__).parents[1] / "docs"
TRIALS, EPOCHS, SHARE, VALIDATION, FRESH_SEEDS = 20, 4, 0.05, 2000, (100, 101, 102)
SEARCHES = {"random": ("random", "none"), "tpe, median pruner": ("tpe", "median")}

HEAD = """\
# Search against random draws

`python benchmarks/search.py DATA` made this page: {repeats} repeats, each with the same seeds for both searches, at the
cost of {cost} epochs each ({TRIALS} whole trials of {EPOCHS} epochs through {SHARE:.0%} of the full MNIST's training images).
The distributions and their ranges are those of `conf/tune.yaml`. Validation is on {VALIDATION:,} images; test is the mean of the found
settings over {seeds} seeds that no search had, on 10,000 images.

| repeat | random: trials | validation | test | search: trials (pruned) | validation | test | test, difference |
| --- | --- | --- | --- | --- | --- | --- | --- |"""


class Report(L.Callback):
    """Tells Optuna of each validation, and stops where its pruner says so."""

    def __init__(self, trial: Any, spent: list[int]) -> None:
        self.trial, self.spent, self.best = trial, spent, 0.0

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.spent[0] += 1
        self.best = max(self.best, float(trainer.callback_metrics["val/acc"]))
        if self.trial:
            self.trial.report(self.best, trainer.current_epoch + 1)
            if self.trial.should_prune():
                raise optuna.TrialPruned


def train(values: dict[str, Any], seed: int, folder: str, data_of: dict[tuple[int, int], Any], report: Report) -> Any:
    """Train with the settings ``values``; returns the trainer, the model and the data."""
    key = (values["data.batch_size"], seed)
    if key not in data_of:
        data_of[key] = MNISTDataModule(folder, "mnist", values["data.batch_size"], val_size=VALIDATION, seed=seed)
    L.seed_everything(seed, verbose=False)
    config = settings("train")
    model = config["model"] | {"dropout": values["model.dropout"]}
    optimizer = config["optimizer"] | {"lr": values["optimizer.lr"], "rho": values["optimizer.rho"]}
    quiet: dict[str, Any] = dict.fromkeys(
        ("enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
    )
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        limit_train_batches=SHARE,
        num_sanity_val_steps=0,
        accelerator="cpu",
        logger=False,
        callbacks=[SeedEachBatch(seed), report],
        **quiet,
    )
    classifier = MNISTClassifier(model, optimizer)
    trainer.fit(classifier, datamodule=data_of[key])
    return trainer, classifier, data_of[key]


def search(name: str, repeat: int, folder: str, data_of: dict[tuple[int, int], Any]) -> dict[str, Any]:
    sampler, pruner = SEARCHES[name]
    spent, budget = [0], TRIALS * EPOCHS
    study = optuna.create_study(
        direction="maximize", sampler=make_sampler(sampler, repeat, 0), pruner=make_pruner(pruner)
    )
    space = distributions(settings("tune")["space"], flatten(settings("train")))

    def objective(trial: Any) -> float:
        report = Report(trial, spent)
        train(suggest(trial, space), repeat, folder, data_of, report)
        return report.best

    while spent[0] < budget:
        study.optimize(objective, n_trials=1)
    tests = []
    for seed in FRESH_SEEDS:
        trainer, classifier, data = train(study.best_params, seed, folder, data_of, Report(None, [0]))
        (test,) = trainer.test(classifier, data, verbose=False)
        tests.append(test["test/acc"])
    return {
        "search": name,
        "repeat": repeat,
        "trials": len(study.trials),
        "pruned": sum(trial.state == optuna.trial.TrialState.PRUNED for trial in study.trials),
        "epochs": spent[0],
        "val/acc": study.best_value,
        "test/acc": statistics.mean(tests),
        "settings": study.best_params,
    }


def main(folder: str, repeats: int = 5) -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    memory.keep_freed_memory()
    found = []
    for repeat in range(repeats):
        data_of: dict[tuple[int, int], Any] = {}
        for name in SEARCHES:
            found.append(search(name, repeat, folder, data_of))
            print(json.dumps(found[-1]), flush=True)
    data_of = {}
    tutorial = {"optimizer.lr": 1.0, "optimizer.rho": 0.95, "model.dropout": 0.5, "data.batch_size": 500}
    baseline = []
    for seed in FRESH_SEEDS:
        trainer, classifier, data = train(tutorial, seed, folder, data_of, Report(None, [0]))
        baseline.append(trainer.test(classifier, data, verbose=False)[0]["test/acc"])
    (DOCS / "search.json").write_text(json.dumps({"found": found, "tutorial": baseline}, indent=1) + "\n")
    (DOCS / "search.md").write_text(document(found, statistics.mean(baseline)))
    print((DOCS / "search.md").read_text())


def document(found: list[dict[str, Any]], tutorial: float) -> str:
    repeats = sorted({each["repeat"] for each in found})
    by = {(each["search"], each["repeat"]): each for each in found}
    lines = [HEAD.format(repeats=len(repeats), cost=TRIALS * EPOCHS, seeds=len(FRESH_SEEDS), **globals())]
    random, searched = SEARCHES
    for repeat in repeats:
        one, other = by[random, repeat], by[searched, repeat]
        lines.append(
            f"| {repeat} | {one['trials']} | {one['val/acc']:.4f} | {one['test/acc']:.4f} | {other['trials']} "
            f"({other['pruned']}) | {other['val/acc']:.4f} | {other['test/acc']:.4f} "
            f"| {other['test/acc'] - one['test/acc']:+.4f} |"
        )
    lines.append("")
    for key, title in (("val/acc", "best validation accuracy"), ("test/acc", "test accuracy of what was found")):
        differences = [by[searched, repeat][key] - by[random, repeat][key] for repeat in repeats]
        mean = statistics.mean(differences)
        deviation = statistics.stdev(differences)
        half = float(stats.t.ppf(0.975, len(differences) - 1)) * deviation / len(differences) ** 0.5
        verdict = "better" if mean > half else "worse" if mean < -half else "no significant difference"
        lines.append(
            f"- {title}: search minus random {mean:+.4f} on average, standard deviation {deviation:.4f}, "
            f"{sum(d > 0 for d in differences)} of {len(differences)} above 0; 95 % interval (Student's t, paired) "
            f"{mean - half:+.4f} to {mean + half:+.4f}: {verdict}."
        )
    lines.append(
        f"- The tutorial's own settings, trained for as few steps with the same {len(FRESH_SEEDS)} seeds: {tutorial:.4f}."
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(sys.argv[1], *(int(argument) for argument in sys.argv[2:]))
