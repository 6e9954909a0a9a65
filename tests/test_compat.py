"""The private names that ``mnist_lit.compat`` relies on, in the real libraries: each test names what an upgrade broke."""

import atexit
import itertools
import re
import signal
import subprocess
import sys
import threading
import tomllib
import weakref
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import ROOT
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from packaging.requirements import Requirement
from torch import nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from mnist_lit import compat
from mnist_lit.data import MNISTDataModule
from mnist_lit.model import MNISTClassifier
from mnist_lit.training.checkpoints import _is_end_of_epoch


def require(owner: Any, *names: str) -> None:
    """Fail with the name of what is gone."""
    for name in names:
        assert hasattr(owner, name), f"{owner!r} no longer has {name}, which mnist_lit.compat uses"


def trainer_for(**arguments: Any) -> L.Trainer:
    for name in ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"):
        arguments[name] = False
    return L.Trainer(accelerator="cpu", **arguments)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, "---v---v"),  # 4 batches an epoch
        ({"val_check_interval": 2}, "-v-v-v-v"),
        ({"check_val_every_n_epoch": 2}, "-------v"),
        ({"check_val_every_n_epoch": None, "val_check_interval": 3}, "--v--v--"),
        ({"limit_val_batches": 0}, "--------"),
        ({"limit_train_batches": 3}, "--v--v"),
    ],
)
def test_validation_follows(arguments: dict[str, Any], expected: str) -> None:
    predicted, happened = [], []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            predicted.append("v" if compat.validation_follows(trainer) else "-")
            happened.append("-")

        def on_validation_start(self, *_: Any) -> None:
            happened[-1] = "v"

    trainer = trainer_for(max_epochs=2, num_sanity_val_steps=0, callbacks=[Watch()], **arguments)
    require(trainer.fit_loop, "_data_fetcher")
    require(trainer.fit_loop.epoch_loop, "_should_check_val_fx")
    assert not compat.validation_follows(trainer)  # before fit
    trainer.fit(MNISTClassifier(), MNISTDataModule(source="sample", batch_size=980, val_size=80))
    assert "".join(predicted) == "".join(happened) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"max_epochs": 2}, "---e---e"),  # 4 batches an epoch
        ({"max_epochs": 2, "limit_train_batches": 3}, "--e--e"),
        ({"max_steps": 6}, "---e-e"),
        ({"max_epochs": 2, "accumulate_grad_batches": 3}, "aa-eaa-e"),
        ({"max_epochs": 9}, "-e"),  # stopped at the second batch
        ({"max_epochs": 9, "min_epochs": 1}, "---e"),
        ({"max_epochs": 9, "min_steps": 6}, "---e-e"),
    ],
)
def test_the_checkpoints_know_from_public_properties_when_an_epoch_ends(
    arguments: dict[str, Any], expected: str
) -> None:
    predicted: list[str] = []
    happened: list[str] = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            self.step_before = trainer.global_step

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if arguments.get("max_epochs") == 9 and len(happened) == 1:
                trainer.should_stop = True
            accumulating = trainer.global_step == self.step_before
            predicted.append("e" if _is_end_of_epoch(trainer) else "a" if accumulating else "-")
            happened.append("-")

        def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
            happened[-1] = "e"

    trainer = trainer_for(limit_val_batches=0, callbacks=[Watch()], **arguments)
    trainer.fit(MNISTClassifier(), MNISTDataModule(source="sample", batch_size=1000))
    assert "".join(predicted) == expected
    assert "".join(happened) == expected.replace("a", "-")


@pytest.mark.slow
def test_launched_processes(tmp_path: Path) -> None:
    """Lightning's observer thread would kill the parent for a child that fails, were it not taken from the list."""
    assert compat.launched_processes(trainer_for()) == []
    (tmp_path / "launch.py").write_text(f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
if "LOCAL_RANK" in os.environ:
    time.sleep(60)
import lightning as L
from mnist_lit import compat
trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
trainer.strategy.launcher.launch(lambda: None, trainer=trainer)
processes = compat.launched_processes(trainer)
assert len(processes) == 1, f"strategy.launcher.procs is {{processes}}: mnist_lit.compat expects one Popen"
copy = processes[:]
processes.clear()
copy[0].kill()
copy[0].wait()
time.sleep(3)  # the observer looks once a second
print("alive")
""")
    command = [sys.executable, "-W", "ignore", str(tmp_path / "launch.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode != -signal.SIGKILL, "Lightning's observer no longer looks at strategy.launcher.procs"
    assert done.stdout.endswith("alive\n"), done.stderr


class Restoring(L.Callback):
    """Notes when Lightning is restoring a checkpoint."""

    def __init__(self) -> None:
        self.seen: dict[str, bool] = {}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: Any) -> None:
        self.seen["loading"] = compat.is_restoring(trainer)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise RuntimeError("odd")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen["training"] = compat.is_restoring(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"state": 1}


def test_leave_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.trainer.connectors import accelerator_connector

    require(accelerator_connector, "_IS_INTERACTIVE")
    monkeypatch.setattr(accelerator_connector, "_IS_INTERACTIVE", True)
    with pytest.raises(MisconfigurationException, match="interactive"):
        trainer_for(strategy="ddp", devices=2)
    compat.leave_notebook()
    trainer_for(strategy="ddp", devices=2)


def test_what_a_run_that_is_resumed_within_an_epoch_needs() -> None:
    """That it goes on exactly is tested with each scheduler."""
    loop = trainer_for().fit_loop
    require(loop, "_combined_loader")
    require(loop, "_restarting")


def test_is_restoring(tmp_path: Path) -> None:
    """While hooks load, and still after one of them has failed; not in training."""
    data = MNISTDataModule(source="sample", batch_size=1000)
    require(trainer_for()._checkpoint_connector, "_loaded_checkpoint")
    first, second = Restoring(), Restoring()
    trainer = trainer_for(max_epochs=1, limit_train_batches=1, limit_val_batches=0, callbacks=[first])
    trainer.fit(MNISTClassifier(), data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert first.seen == {"training": False}
    trainer = trainer_for(max_epochs=2, callbacks=[second])
    with pytest.raises(RuntimeError, match="odd"):
        trainer.fit(MNISTClassifier(), data, ckpt_path=tmp_path / "a.ckpt")
    assert second.seen == {"loading": True} and compat.is_restoring(trainer)


def test_compute_locally() -> None:
    def gather(*_: Any, **__: Any) -> Any:
        raise AssertionError("type(metric).compute synchronizes: mnist_lit.compat expects the bare computation")

    distributed: dict[str, Any] = {"distributed_available_fn": lambda: True, "dist_sync_fn": gather}
    loss = MeanMetric(nan_strategy="disable", **distributed)
    acc = MulticlassAccuracy(num_classes=10, average="micro", validate_args=False, **distributed)
    for values, labels, mean, share in (([1.0, 2.0, 6.0], [0, 5, 0], 3.0, 1 / 3), ([5.0], [0], 3.5, 0.5)):
        loss.update(torch.tensor(values))
        acc.update(torch.eye(10)[: len(values)], torch.tensor(labels))
        with pytest.raises(AssertionError, match="synchronizes"):
            loss.compute()  # the control: ranks are asked for here
        assert float(compat.compute_locally(loss)) == mean  # anew, not from a cache
        assert float(compat.compute_locally(acc)) == pytest.approx(share, rel=1e-6)


def test_in_functorch_transform() -> None:
    require(torch._C._functorch, "peek_interpreter_stack")
    seen = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(compat.in_functorch_transform())
        return x.sum()

    x = torch.rand(2, 3)
    function(x)
    torch.func.vmap(function)(x)
    torch.func.grad(function)(x)
    torch.func.functionalize(function)(x)
    function(x)
    assert seen == [False, True, True, True, False]


def test_has_hooks() -> None:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    require(nn.Linear(1, 1), *names)
    require(nn.modules.module, "_has_any_global_hook")
    hook: Any = lambda *_: None
    for register in (
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ):
        module = nn.Linear(1, 1)
        assert not compat.has_hooks(module)
        handle = getattr(module, register)(hook)
        assert compat.has_hooks(module), f"mnist_lit.compat does not see {register}"
        handle.remove()
        assert not compat.has_hooks(module)
        handle = getattr(nn.modules.module, register.replace("register", "register_module"))(hook)
        assert compat.has_hooks(module), f"mnist_lit.compat does not see {register} for all modules"
        handle.remove()
        assert not compat.has_hooks(module)


def test_python_shutdown_in_a_process_that_would_skip_it() -> None:
    require(threading, "_shutdown")
    require(atexit, "_run_exitfuncs")
    require(weakref.finalize, "_exitfunc")
    code = """
import atexit, os, threading, time, weakref
from mnist_lit import compat

class Thing: pass
thing = Thing()
weakref.finalize(thing, print, "finalizer", flush=True)
atexit.register(print, "handler", flush=True)
atexit.unregister(weakref.finalize._exitfunc)
atexit.register(compat.run_finalizers)
threading.Thread(target=lambda: (time.sleep(0.3), print("thread", flush=True))).start()
compat.shut_down_like_interpreter()
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["thread", "finalizer", "handler"], done.stdout + done.stderr


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-dev.lock"])
def test_the_locked_versions_are_within_the_bounds_of_pyproject(lock: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = re.findall(r"^([\w.-]+)==([\w.+]+)", (ROOT / lock).read_text(), re.MULTILINE)
    for line in itertools.chain(project["dependencies"], *project["optional-dependencies"].values()):
        asked = Requirement(line)
        versions = [version for name, version in found if name == asked.name]
        assert all(asked.specifier.contains(version) for version in versions), f"{line}, but {lock} has {versions}"
        assert versions or line not in project["dependencies"], f"{lock} lacks {asked.name}"


def test_what_classes_elsewhere_extend() -> None:
    from optuna.storages import RDBStorage
    from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

    require(H11Protocol, "handle_events", "on_response_complete", "send_400_response", "shutdown", "connection_made")
    assert {"conn", "cycle", "flow", "transport"} <= set(H11Protocol.__init__.__code__.co_names)
    assert {"disconnected", "response_complete", "more_body"} <= set(RequestResponseCycle.__init__.__code__.co_names)
    require(RDBStorage, "_get_stale_trial_ids", "record_heartbeat")


def test_importing_it_loads_no_library() -> None:
    libraries = ("torch", "lightning", "torchmetrics", "optuna", "hydra")
    code = f"import sys, mnist_lit.compat; print([name for name in {libraries} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_hydras_arguments_are_parsed_wherever_they_stand() -> None:
    flags = compat.parse_hydra_arguments(["seed=1", "-m", "optimizer.lr=1,2", "--config-dir", "own"])
    assert flags.overrides == ["seed=1", "optimizer.lr=1,2"] and flags.multirun and flags.config_dir == "own"
    assert not flags.help and flags.config_name is None


def test_hydras_grid_has_the_order_of_its_basic_sweeper() -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides(["a=1,2", "b=range(2)", "c=3"])
    expected = [["a=1", "b=0", "c=3"], ["a=1", "b=1", "c=3"], ["a=2", "b=0", "c=3"], ["a=2", "b=1", "c=3"]]
    assert compat.expand_sweep(parsed) == expected


def test_a_composed_configuration_runs_as_hydra_main_would_run_it(tmp_path: Path) -> None:
    code = """
from hydra.core.hydra_config import HydraConfig
from mnist_lit import compat
from mnist_lit.cli.config import ConfigFiles
config = ConfigFiles("train").compose(["hydra.run.dir=run", "seed=3"])
compat.run_composed(lambda config: print(config.seed, HydraConfig.get().runtime.output_dir), config)
"""  # in a process of its own, because it sets up logging
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"3 {tmp_path}/run\n"
    assert "seed: 3" in (tmp_path / "run" / ".hydra" / "config.yaml").read_text()
    assert (tmp_path / "run" / "train.log").exists()
