"""Runs that are stopped, killed or damaged, and go on; the numbers are the rows of docs/faults.md."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import Command
from helpers import ROOT, assert_same, differences, final, results, small
from soak import PHASES, outcome

from mnist_lit import Interrupted, UserError
from mnist_lit.cli.resume import continued, find
from mnist_lit.model import MNISTClassifier
from mnist_lit.storage import runs
from mnist_lit.train import train
from mnist_lit.training.always import SeedEachBatch

VARIANTS = {
    "plain": [],
    "validated": ["data.val_size=40"],
    "validated within the epoch": ["data.val_size=40", "trainer.val_check_interval=2"],
    "two batches a step": ["trainer.accumulate_grad_batches=2"],
    "so many steps": ["trainer.max_steps=5"],
}
FIRST = ("plain", "validated", "two batches a step")  # in every test run


class Batches:
    """Which batches a run was given, in order; sends itself a signal in the step that is to be the last."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[int, int, int]] = []
        self.stop_at: int | None = None
        original = MNISTClassifier.training_step

        def training_step(model: Any, batch: Any, batch_idx: int) -> Any:
            self.seen.append((model.current_epoch, batch_idx, hash(batch[0].numpy().tobytes())))
            if len(self.seen) == self.stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(model, batch, batch_idx)

        monkeypatch.setattr(MNISTClassifier, "training_step", training_step)

    def stopped_run(self, folder: Path, at: int, settings: dict[str, Any]) -> Interrupted:
        self.stop_at = at
        with pytest.raises(Interrupted) as stopped:
            train(folder, **settings)
        self.stop_at = None
        return stopped.value


def resumed(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    return train(folder, **{**settings, "resume": str(find(str(folder), folder.parent).start)})


@pytest.mark.parametrize(
    "variant", [*FIRST, *(pytest.param(each, marks=pytest.mark.slow) for each in VARIANTS if each not in FIRST)]
)
def test_01_stopped_at_any_step_a_run_goes_on_with_the_same_bits(variant: str, tmp_path: Path, monkeypatch) -> None:
    settings = small("data.batch_size=20", *VARIANTS[variant])
    batches = Batches(monkeypatch)
    train(tmp_path / "whole", **settings)
    expected, order = final(tmp_path / "whole"), batches.seen[:]
    for step in range(1, len(order) + 1):
        batches.seen.clear()
        folder = tmp_path / f"stopped at {step}"
        batches.stopped_run(folder, step, settings)
        resumed(folder, settings)
        assert_same(final(folder), expected)
        assert batches.seen == order, step


def test_01_control_without_the_rule_for_dropout_the_bits_differ(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(SeedEachBatch, "on_train_batch_start", lambda *_: None)
    settings = small("trainer.limit_train_batches=4")
    batches = Batches(monkeypatch)
    train(tmp_path / "whole", **settings)
    batches.seen.clear()
    batches.stopped_run(tmp_path / "stopped", 2, settings)
    resumed(tmp_path / "stopped", settings)
    assert [*differences(final(tmp_path / "stopped"), final(tmp_path / "whole"))]


def test_01_stopped_twice_and_without_any_checkpoint_yet(tmp_path: Path, monkeypatch, finished_run: Path) -> None:
    batches = Batches(monkeypatch)
    folder = tmp_path / "run"
    batches.stopped_run(folder, 2, small())
    batches.stop_at = 4
    with pytest.raises(Interrupted):
        resumed(folder, small())
    batches.stop_at = None
    resumed(folder, small())
    assert_same(final(folder), final(finished_run))

    (tmp_path / "begun").mkdir()
    shutil.copy(finished_run / "config.yaml", tmp_path / "begun")
    resumed(tmp_path / "begun", small())
    assert_same(final(tmp_path / "begun"), final(finished_run))


@pytest.mark.slow
def test_01_02_killed_at_random_moments() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "tests/soak.py", "9", str(time.time_ns() % 1000)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.endswith("9 of 9 equal\n"), done.stdout + done.stderr
    for phase in PHASES[1:]:
        assert re.search(f"killed {phase}: [1-9]", done.stdout), done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("number", "name", "code"), [(signal.SIGTERM, "SIGTERM", 143), (signal.SIGINT, "Ctrl-C", 130)])
def test_03_04_a_signal_stops_at_the_end_of_the_step_and_says_how_to_go_on(
    number: int, name: str, code: int, tmp_path: Path, command: Command
) -> None:
    process = started(tmp_path)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in errors
    sentence = errors.splitlines()[-1]
    found = re.fullmatch(
        rf"train: stopped by {name} after step (\d+) \(epoch \d+/9999\); "
        r"resume with: python -m mnist_lit.train (resume=outputs/\S+)",
        sentence,
    )
    assert found, errors
    (folder,) = (tmp_path / "outputs").iterdir()
    assert torch.load(folder / runs.LAST, weights_only=True)["global_step"] == int(found[1])
    # Going on with what the sentence says is refused for the number of epochs alone, so it found the run.
    done = command(found[2], "trainer.max_epochs=1", cwd=tmp_path)
    assert done.stderr == f"train: {folder.relative_to(tmp_path)} has max_epochs=9999: it can only be increased\n"


@pytest.mark.slow
def test_04_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    # A long step in many small parts: Python sees a signal only between two operations of PyTorch.
    process = started(tmp_path, "data.batch_size=1", "trainer.accumulate_grad_batches=1000")
    time.sleep(0.5)  # into the next epoch's first step: at an epoch's end the first signal would end the run
    process.send_signal(signal.SIGINT)
    assert process.stderr
    for line in process.stderr:
        if line.startswith("stopping after this step"):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1].startswith("train: stopped immediately by Ctrl-C")


def started(folder: Path, *overrides: str) -> "subprocess.Popen[str]":
    """A run without end, in its steps."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mnist_lit.train", "data.source=sample", "trainer.max_epochs=9999", *overrides],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # The shell that the tests were started from may have had it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )
    assert process.stdout
    for line in process.stdout:
        if line.startswith("epoch 1/"):
            return process
    raise AssertionError(process.communicate()[1])


def test_12_what_would_be_another_run_is_refused_and_what_may_change_is_taken(finished_run: Path) -> None:
    run = find(str(finished_run), finished_run.parent)
    asked = small("data.batch_size=64", "seed=7", "data.val_size=10", "trainer.max_epochs=5", "logger=csv")
    with pytest.raises(UserError) as refused:
        continued(run, asked, {"data.batch_size", "seed", "data.val_size", "trainer.max_epochs"})
    for part in ("data.batch_size was 100 and not 64", "seed was 0 and not 7", "data.val_size was 0 and not 10"):
        assert part in str(refused.value)
    assert "max_epochs" not in str(refused.value)
    config = continued(run, asked, {"trainer.max_epochs", "logger.csv"})
    assert config["trainer"]["max_epochs"] == 5 and config["data"]["batch_size"] == 100
    with pytest.raises(UserError, match="can only be increased"):
        continued(run, small("trainer.max_epochs=1"), {"trainer.max_epochs"})


def test_12_other_data_and_another_number_of_processes_are_refused(finished_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished_run, tmp_path / "run")
    settings = small("trainer.max_epochs=3")
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("sha256 3", "sha256 4", 1))
    with pytest.raises(UserError, match="was trained on other data"):
        resumed(folder, settings)
    (folder / "config.yaml").write_text(config)
    content = torch.load(folder / runs.LAST, weights_only=True)
    content["machine"]["processes"] = 2
    torch.save(content, folder / runs.LAST)
    with pytest.raises(UserError, match="this run used 2 processes, not 1"):
        resumed(folder, settings)


def test_12_another_version_is_a_warning(finished_run: Path, tmp_path: Path, caplog) -> None:
    folder = shutil.copytree(finished_run, tmp_path / "run")
    content = torch.load(folder / runs.LAST, weights_only=True)
    content["machine"]["versions"]["torch"] = "1.0"
    torch.save(content, folder / runs.LAST)
    resumed(folder, small("trainer.max_epochs=3"))
    assert "the environment has changed: torch was 1.0, is " in caplog.text


def test_13_latest_where_there_is_none_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run in"):
        find("latest", tmp_path)
    with pytest.raises(UserError, match="there is no such run"):
        find(str(tmp_path / "nowhere"), tmp_path)
    with pytest.raises(UserError, match="no run has begun"):
        find(str(tmp_path), tmp_path)


def test_the_best_checkpoint_is_not_to_be_gone_on_with_and_the_one_before_is(
    validated_run: Path, tmp_path: Path
) -> None:
    import yaml

    with pytest.raises(UserError, match=r"best\.ckpt cannot be resumed"):
        find(str(validated_run / runs.BEST), validated_run.parent)
    folder = shutil.copytree(validated_run, tmp_path / "run")
    (folder / "metrics.json").unlink()
    run = find(str(folder / runs.PREVIOUS), tmp_path)
    assert run.start == folder / runs.PREVIOUS
    train(folder, **{**yaml.safe_load((folder / "config.yaml").read_text()), "resume": str(run.start)})
    assert_same(outcome(folder), outcome(validated_run))


def test_a_finished_run_shows_its_results_and_takes_more_epochs(
    finished_run: Path, tmp_path: Path, command: Command
) -> None:
    folder = shutil.copytree(finished_run, tmp_path / "outputs" / "run")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    done = command("resume=latest", cwd=tmp_path)
    assert done.returncode == 0 and "outputs/run is finished:" in done.stdout and "final weights" in done.stdout
    assert all(path.read_bytes() == content for path, content in before.items())
    more = small("trainer.max_epochs=4")
    resumed(folder, more)
    train(tmp_path / "whole", **more)
    assert_same(final(folder), final(tmp_path / "whole"))


def test_a_checkpoint_is_resumed_from_within_its_folder_and_through_a_link(
    finished_run: Path, tmp_path: Path, command: Command
) -> None:
    folder = shutil.copytree(finished_run, tmp_path / "run")
    (tmp_path / "link.ckpt").symlink_to(folder / runs.LAST)
    for name, cwd in (("last.ckpt", folder / "checkpoints"), ("link.ckpt", tmp_path)):
        done = command(f"resume={name}", cwd=cwd)
        assert done.returncode == 0 and "is finished:" in done.stdout, done.stderr


def test_damaged_results_are_named(finished_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished_run, tmp_path / "run")
    (folder / "metrics.json").write_text("{")
    with pytest.raises(
        UserError, match=r"run/metrics\.json is damaged \(.*\); without it, resume= tests the run once more"
    ):
        resumed(folder, small())
    (folder / "metrics.json").unlink()
    resumed(folder, small())
    assert_same(outcome(folder), outcome(finished_run))


def test_what_to_type_has_quotes_where_the_shell_needs_them(finished_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished_run, tmp_path / "my run")
    assert runs.resume_hint(folder).endswith("/my run'") and " 'resume=" in runs.resume_hint(folder)


def test_killed_between_the_last_step_and_the_results_only_those_are_made(
    validated_run: Path, tmp_path: Path, monkeypatch
) -> None:
    folder = shutil.copytree(validated_run, tmp_path / "run")
    for name in ("metrics.json", "learning_curve.png"):
        (folder / name).unlink()
    batches = Batches(monkeypatch)
    import yaml

    resumed(folder, yaml.safe_load((folder / "config.yaml").read_text()))
    assert batches.seen == []
    assert_same(outcome(folder), outcome(validated_run))


@pytest.mark.parametrize("average", [["callbacks=ema", "callbacks.ema.decay=0.9"], ["callbacks=swa"]])
def test_killed_there_it_tests_the_averaged_weights_too(average: list[str], tmp_path: Path) -> None:
    values = small("model=mlp", "trainer.max_epochs=4", *average)
    train(tmp_path, **values)
    whole = final(tmp_path), results(tmp_path)["test/loss"]
    (tmp_path / "metrics.json").unlink()
    resumed(tmp_path, values)
    assert_same((final(tmp_path), results(tmp_path)["test/loss"]), whole)


def test_a_run_that_is_in_use_is_refused(finished_run: Path, monkeypatch) -> None:
    monkeypatch.setattr(runs, "SECONDS_TO_WAIT", 0)
    with runs.locked(finished_run), pytest.raises(UserError, match="another process"), runs.locked(finished_run):
        pass


def test_21_a_loss_that_is_not_finite_ends_the_run_with_the_facts(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=r"not finite (at|after) step \d+ \(epoch 1/2\)"):
        train(folder, **small("optimizer=sgd", "optimizer.lr=1e30", "data.val_size=200"))
    assert not (folder / runs.LAST).exists() and not (folder / runs.BEST).exists()
    assert not (folder / "metrics.json").exists()


def test_21_the_checkpoints_from_before_are_kept(tmp_path: Path, monkeypatch) -> None:
    original = MNISTClassifier.training_step

    def training_step(model: Any, batch: Any, batch_idx: int) -> Any:
        loss = original(model, batch, batch_idx)
        return loss * float("inf") if (model.current_epoch, batch_idx) == (1, 1) else loss

    monkeypatch.setattr(MNISTClassifier, "training_step", training_step)
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=r"the loss is not finite at step 5 \(epoch 2/2\), at a learning rate of 1:"):
        train(folder, **small("data.val_size=200"))
    for name in (runs.LAST, runs.BEST):
        content = torch.load(folder / name, weights_only=True)
        assert content["global_step"] == 3
        assert all(value.isfinite().all() for value in content["state_dict"].values())


def test_27_a_second_run_of_the_same_folder_and_a_sweep_cannot_resume(
    finished_run: Path, tmp_path: Path, command: Command
) -> None:
    shutil.copytree(finished_run, tmp_path / "outputs" / "run")
    for arguments, sentence in (
        (["hydra.run.dir=outputs/run"], "train: outputs/run already contains a run: choose another hydra.run.dir, or"),
        (["-m", "resume=latest", "seed=1,2"], "train: resume= resumes a single run"),
        (["resume=latest", "hydra.run.dir=x"], "train: resume= uses the folder of the run"),
    ):
        done = command(*arguments, cwd=tmp_path)
        assert done.returncode == 1 and done.stderr.startswith(sentence)


def test_a_run_with_another_optimizer_or_network_goes_on_without_naming_it_again(
    tmp_path: Path, command: Command
) -> None:
    train(tmp_path / "run", **small("optimizer=adam", "trainer.max_epochs=1"))
    done = command("resume=run", cwd=tmp_path)
    assert done.returncode == 0 and "run is finished" in done.stdout, done.stderr


def test_none_changes_a_run_that_is_resumed_as_any_other_choice_does(tmp_path: Path, command: Command) -> None:
    arguments = ["data.source=sample", "model=mlp", "augment=shift", "logger=csv", "trainer.max_epochs=1"]
    limits = ["trainer.accelerator=cpu", "trainer.limit_train_batches=1", "trainer.limit_test_batches=1"]
    assert command(*arguments, *limits, "hydra.run.dir=run", cwd=tmp_path).returncode == 0
    changed = command("resume=run", "augment=none", "trainer.max_epochs=2", cwd=tmp_path)
    assert changed.returncode == 1 and "run is another run: augment was {'_target_': " in changed.stderr
    default = command("resume=run", "model=tutorial", "trainer.max_epochs=2", cwd=tmp_path)
    assert default.returncode == 1 and "run is another run: model._target_ was " in default.stderr
    quiet = command("resume=run", "logger=none", "trainer.max_epochs=2", cwd=tmp_path)
    assert quiet.returncode == 0, quiet.stderr
    assert [path.name for path in (tmp_path / "run").glob("csv*")] == ["csv"]  # the resumed run would add csv_2


def test_a_run_with_the_keys_of_an_older_version_is_resumed(tmp_path: Path, command: Command) -> None:
    import yaml

    train(tmp_path / "run", **small("trainer.max_epochs=1"))
    path = tmp_path / "run" / "config.yaml"
    head, text = path.read_text().split("\n", 1)
    config = yaml.safe_load(text)
    for section in ("data", "trainer"):
        del config[section]["_target_"]
    config["optimizer"]["name"] = config["optimizer"].pop("_target_").rpartition(".")[2]
    model = config["model"]
    model |= {"network": model.pop("_target_"), "compiled": model.pop("cpu_kernel")}
    path.write_text(f"{head}\n{yaml.safe_dump(config)}")
    done = command("resume=run", "trainer.max_epochs=2", cwd=tmp_path)
    assert done.returncode == 0 and results(tmp_path / "run")["epochs"] == 2, done.stderr


def test_28_what_may_change_on_resume_is_checked_like_that_of_a_new_run(
    finished_run: Path, tmp_path: Path, command: Command
) -> None:
    folder = shutil.copytree(finished_run, tmp_path / "run")
    before = (folder / "config.yaml").read_text()
    for override, sentence in (
        ("checkpoint.every_n_steps=-1", "checkpoint.every_n_steps=-1: must be greater than or equal to 1"),
        ("trainer.max_epochs=abc", "trainer.max_epochs=abc: "),
        ("trainer.max_epochs=1", "run has max_epochs=2: it can only be increased"),
    ):
        done = command("resume=run", override, cwd=tmp_path)
        assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(f"train: {sentence}"), done.stderr
        assert "Traceback" not in done.stderr and (folder / "config.yaml").read_text() == before


@pytest.mark.parametrize(
    ("limits", "overrides"),
    [
        ((5, 8), []),  # within an epoch of three steps
        ((6, 7, 9), []),  # at its end, then within it
        ((5, 7), ["data.val_size=40", "scheduler=step", "scheduler.step_size=1"]),
        ((4, 6), ["data.val_size=40", "trainer.val_check_interval=2", "metrics=f1", "optimizer=adam"]),
        ((5, 10), ["data.val_size=40", "scheduler=plateau", "scheduler.patience=0", "+scheduler.threshold=10"]),
    ],
)
def test_a_run_of_so_many_steps_goes_on_with_more(
    limits: tuple[int, ...], overrides: list[str], tmp_path: Path
) -> None:
    def asked(steps: int) -> dict[str, Any]:
        return small("trainer.max_epochs=-1", f"trainer.max_steps={steps}", "model=mlp", *overrides)

    train(tmp_path / "whole", **asked(limits[-1]))
    train(tmp_path / "run", **asked(limits[0]))
    before = results(tmp_path / "run")
    assert resumed(tmp_path / "run", asked(limits[0])) == before  # finished, so nothing is done
    for steps in limits[1:]:
        run = find(str(tmp_path / "run"))
        resumed(run.folder, continued(run, asked(steps), {"trainer.max_steps"}))
    assert_same(final(tmp_path / "run"), final(tmp_path / "whole"))
    with pytest.raises(UserError, match=rf"max_steps={limits[-1]}: it can only be increased"):
        continued(find(str(tmp_path / "run")), asked(3), {"trainer.max_steps"})


def test_killed_after_its_last_step_it_has_the_same_results(tmp_path: Path) -> None:
    values = small("trainer.max_epochs=-1", "trainer.max_steps=5", "model=mlp")
    train(tmp_path, **values)
    whole = final(tmp_path)
    (tmp_path / "metrics.json").unlink()
    resumed(tmp_path, values)
    assert_same(final(tmp_path), whole)


def test_a_run_that_its_time_has_stopped_goes_on_with_more(tmp_path: Path) -> None:
    def asked(time: str) -> dict[str, Any]:
        return small("trainer.max_epochs=2", f"trainer.max_time={time}", "model=mlp", "trainer.limit_train_batches=15")

    train(tmp_path / "whole", **asked("00:01:00:00"))
    values = asked("00:00:00:01")
    values["trainer"]["callbacks"] = [{"_target_": f"{__name__}.Slow"}]  # more than a second in each epoch
    train(tmp_path / "run", **values)
    assert 0 < (stopped := torch.load(tmp_path / "run" / runs.LAST, weights_only=True)["global_step"]) < 30, stopped
    run = find(str(tmp_path / "run"))
    resumed(run.folder, continued(run, asked("00:01:00:00"), {"trainer.max_time"}))
    assert_same(final(tmp_path / "run"), final(tmp_path / "whole"))
    with pytest.raises(UserError, match="max_time=00:01:00:00: it can only be increased"):
        continued(find(str(tmp_path / "run")), asked("00:00:59:59"), {"trainer.max_time"})


class Slow(L.Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        time.sleep(0.1)
