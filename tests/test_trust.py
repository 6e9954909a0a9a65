"""Files from strangers decide neither what is imported nor how much memory is taken; numbers are rows of docs/faults.md."""

import contextlib
import copy
import pickle
import resource
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Command
from helpers import assert_same, small
from test_groups import Killed
from torch import nn

from mnist_lit import UserError
from mnist_lit.cli.config import settings
from mnist_lit.convert import convert
from mnist_lit.evaluate import evaluate
from mnist_lit.export import export
from mnist_lit.inference.trained import load
from mnist_lit.model import TUTORIAL_MODEL, TUTORIAL_OPTIMIZER, MNISTClassifier
from mnist_lit.network import TutorialCNN
from mnist_lit.predict import predict
from mnist_lit.serve import serve
from mnist_lit.storage import runs
from mnist_lit.storage.checkpoint_file import read_checkpoint
from mnist_lit.train import train

OWN_NETWORK = """
from pathlib import Path
from mnist_lit.network import TutorialCNN
Path(__file__).with_name("imported").touch()
class Net(TutorialCNN):
    pass
"""


@pytest.fixture
def own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module in the working folder; ``tmp_path / "imported"`` is there once it has been imported."""
    (tmp_path / "strange.py").write_text(OWN_NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield "strange"
    sys.modules.pop("strange", None)


def contents(**changed: Any) -> dict[str, Any]:
    """A checkpoint with as little in it as possible."""
    weights = {f"network.{key}": value for key, value in TutorialCNN().state_dict().items()}
    sections = {"model": dict(TUTORIAL_MODEL), "optimizer": dict(TUTORIAL_OPTIMIZER)}
    return {"state_dict": weights, "hyper_parameters": sections, "data": [{"name": "mnist"}], **changed}


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def with_model(**model: Any) -> dict[str, Any]:
    return contents(hyper_parameters={"model": model, "optimizer": dict(TUTORIAL_OPTIMIZER)})


LOADERS: dict[str, Callable[..., Any]] = {
    "load": load,
    "load_from_checkpoint": MNISTClassifier.load_from_checkpoint,
    "evaluate": lambda ckpt, **trust: evaluate("evaluated", ckpt, {}, {}, **trust),
    "predict": lambda ckpt, **trust: predict(ckpt, ckpt, **trust),
    "export": lambda ckpt, **trust: export("model.onnx", ckpt, **trust),
    "convert": lambda ckpt, **trust: convert(str(ckpt), "model.keras", **trust),
    "serve": lambda ckpt, **trust: serve(ckpt, port=0, **trust),
}


@pytest.mark.parametrize("name", LOADERS)
def test_34_a_checkpoint_does_not_decide_what_is_imported(name: str, own_package: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "strange.ckpt", with_model(_target_=f"{own_package}.Net"))
    with pytest.raises(UserError, match=r"names strange.Net, .*add trust=\[strange\]"):
        LOADERS[name](path)
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"network": "strange.Net"}, "optimizer": TUTORIAL_OPTIMIZER},  # an older checkpoint
        {"model": TUTORIAL_MODEL, "optimizer": {"_target_": "strange.Net"}},
        {"model": {**TUTORIAL_MODEL, "deep": [{"_target_": "strange.Net"}]}, "optimizer": TUTORIAL_OPTIMIZER},
        {"model": {"_target_": "mnist_lit.network.strange.Net"}, "optimizer": TUTORIAL_OPTIMIZER},
        {"model": {"_target_": "lightning.pytorch.callbacks.model_checkpoint.os.system"}, "optimizer": {}},
        {"model": {"_target_": "strangely"}, "optimizer": {}},
        {"model": {**TUTORIAL_MODEL, "deep": ({"_target_": "strange.Net"},)}, "optimizer": TUTORIAL_OPTIMIZER},
        # No networks: what they are built with can take any memory.
        {
            "model": {"_target_": "torchmetrics.classification.MulticlassConfusionMatrix", "num_classes": 9},
            "optimizer": {},
        },
        {"model": {"_target_": "kornia.augmentation.RandomAffine", "degrees": 9}, "optimizer": {}},
        {"model": {"_target_": "."}, "optimizer": {}},
        {"model": {"_target_": 5}, "optimizer": {}},
    ],
)
def test_34_wherever_in_it_the_name_is(sections: dict[str, Any], own_package: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "strange.ckpt", contents(hyper_parameters=sections))
    for loader in (load, MNISTClassifier.load_from_checkpoint):
        with pytest.raises(UserError, match=r"add trust=|is not the dotted name") as refused:
            loader(path, trust=["strang"])  # the beginning of its name is not its name
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "imported").exists()


def test_34_a_trusted_package_is_imported(own_package: str, tmp_path: Path) -> None:
    content = with_model(_target_=f"{own_package}.Net")
    path = saved(tmp_path / "strange.ckpt", content)
    chosen = {"_target_": "strange.Net"}
    for loaded in (
        load(path, trust=["strange"]),
        load(path, trust="strange"),
        load(path, trust=["strange.Net"]),
        MNISTClassifier.load_from_checkpoint(path, trust=["strange"]),
        MNISTClassifier.load_from_checkpoint(path, model=chosen),  # the caller's own word
    ):
        assert type(loaded.network).__name__ == "Net"
        assert_same(loaded.network.state_dict()["conv1.weight"], content["state_dict"]["network.conv1.weight"])


@pytest.mark.slow
def test_34_a_resumed_run_imports_only_what_the_command_line_names(
    own_package: str, tmp_path: Path, command: Command, finished_run: Path
) -> None:
    config = yaml.safe_load((finished_run / "config.yaml").read_text())
    head = (finished_run / "config.yaml").read_text().splitlines()[0]

    def resume(section: str, target: str, *arguments: str) -> Any:
        changed = {**config, section: {**(config[section] or {}), "_target_": target}}
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "config.yaml").write_text(f"{head}\n{yaml.safe_dump(changed)}")
        return command("resume=run", *arguments, cwd=tmp_path)

    for section, target in (("model", "strange.Net"), ("data", "strange.Data"), ("logger", "strange.Logger")):
        done = resume(section, target)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].endswith("if you trust strange, add trust=[strange]"), done.stderr
        assert not (tmp_path / "imported").exists()
    for word in ("trust=[strange]", "model._target_=strange.Net"):
        done = resume("model", "strange.Net", word)
        assert done.returncode == 0 and (tmp_path / "imported").exists(), done.stderr
        (tmp_path / "imported").unlink()
        shutil.rmtree(tmp_path / "run")


def test_35_a_small_file_does_not_take_much_memory(tmp_path: Path) -> None:
    huge = with_model(_target_="torch.nn.Linear", in_features=40_000, out_features=40_000)
    layers = {"network.weight": torch.zeros(1).expand(40_000, 40_000), "network.bias": torch.zeros(40_000)}
    files = {
        "another architecture": saved(tmp_path / "layers.ckpt", huge),
        "must hold all its 1,600,000,000 values": saved(tmp_path / "expanded.ckpt", {**huge, "state_dict": layers}),
        "more than tensors": saved(tmp_path / "bytes.ckpt", contents(extra=Allocates(bytearray, 10**10))),
        "more than tensors and": saved(tmp_path / "tensor.ckpt", contents(extra=Allocates(torch.FloatTensor, 10**10))),
        "compressed entries": rewritten(saved(tmp_path / "zeros", contents()), tmp_path / "bomb.ckpt", compressed=True),
        "a data.pkl of": saved(tmp_path / "pickle.ckpt", contents(extra=list(range(10**6)))),
    }
    files["does not fit this architecture"] = files.pop("another architecture")
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, before[1]))
    try:
        for reason, path in files.items():
            for loader in (load, MNISTClassifier.load_from_checkpoint):
                started = time.monotonic()
                with pytest.raises(UserError, match=reason):
                    loader(path, trust=["torch"])
                assert time.monotonic() - started < 5
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("large", [False, True])
def test_35_an_archive_that_is_a_list_of_a_million_entries(large: bool, tmp_path: Path) -> None:
    path = saved(tmp_path / "list.ckpt", contents())
    content = path.read_bytes()
    end = content.rindex(b"PK\6\6")
    start = int.from_bytes(content[end + 48 : end + 56], "little")  # of the list
    entries = content[start:end] * 30_000
    record, locator, last = content[end : end + 56], content[end + 56 : end + 76], bytearray(content[end + 76 :])
    if large:
        record = record[:40] + len(entries).to_bytes(8, "little") + record[48:]
        locator = locator[:8] + (start + len(entries)).to_bytes(8, "little") + locator[16:]
        last[12:16] = b"\xff" * 4
        path.write_bytes(content[:start] + entries + record + locator + last)
    else:
        last[12:16] = len(entries).to_bytes(4, "little")
        path.write_bytes(content[:start] + entries + last)
    started = time.monotonic()
    with pytest.raises(UserError, match="too many entries"):
        load(path)
    assert time.monotonic() - started < 2


class Allocates:
    def __init__(self, function: Callable[..., Any], size: int) -> None:
        self.reduced = (function, (size,))

    def __reduce__(self) -> Any:
        return self.reduced


def rewritten(source: Path, target: Path, compressed: bool = False, twice: str = "") -> Path:
    """A copy of a checkpoint, with compressed entries, or with a first entry ``twice`` of other bytes."""
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", kind) as new:
        for entry in old.infolist():
            content = old.read(entry)
            if twice and entry.filename.endswith(twice):
                new.writestr(entry.filename, bytes(len(content)))
            new.writestr(entry.filename, content)
    return target


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_36_weights_that_are_not_finite_are_refused_by_name(value: float, tmp_path: Path) -> None:
    content = contents()
    content["state_dict"]["network.dense1.weight"][3, 5] = value
    path = saved(tmp_path / "nan.ckpt", content)
    for loader in (load, MNISTClassifier.load_from_checkpoint):
        with pytest.raises(UserError, match=r"NaN or infinite values in network\.dense1\.weight"):
            loader(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("entry", ["/data/0", "/data/5", "/data.pkl"])
def test_37_two_entries_of_one_name_are_refused(entry: str, tmp_path: Path) -> None:
    path = rewritten(saved(tmp_path / "good.ckpt", contents()), tmp_path / "twice.ckpt", twice=entry)
    with pytest.raises(UserError, match="two entries of one name"):
        load(path)


def with_integers() -> dict[str, Any]:
    content = contents()
    return {**content, "state_dict": {key: value.to(torch.int32) for key, value in content["state_dict"].items()}}


ODD: dict[str, Any] = {
    "a list": [1],
    "a number": 5,
    "no hyper_parameters": {"state_dict": {}},
    "hyper_parameters None": contents(hyper_parameters=None),
    "hyper_parameters a list": contents(hyper_parameters=[1]),
    "model None": contents(hyper_parameters={"model": None, "optimizer": {}}),
    "model empty": contents(hyper_parameters={"model": {}, "optimizer": {}}),
    "model's keys numbers": contents(hyper_parameters={"model": {1: 2}, "optimizer": {}}),
    "optimizer a string": contents(hyper_parameters={"model": TUTORIAL_MODEL, "optimizer": "adam"}),
    "dropout a string": with_model(_target_="mnist_lit.network.TutorialCNN", dropout="half"),
    "dropout a tensor": with_model(_target_="mnist_lit.network.TutorialCNN", dropout=torch.zeros(2)),
    "dropout too large": with_model(_target_="mnist_lit.network.TutorialCNN", dropout=1e9),
    "an unknown argument": with_model(_target_="mnist_lit.network.TutorialCNN", depth=5),
    "a class that is not a network": with_model(_target_="mnist_lit.data.MNISTDataModule"),
    "no class": with_model(_target_="mnist_lit.network.torch"),
    "state_dict None": contents(state_dict=None),
    "state_dict empty": contents(state_dict={}),
    "a weight that is a number": contents(state_dict={"network.conv1.weight": 5}),
    "a weight's name a number": contents(state_dict={5: torch.zeros(1)}),
    "sparse": contents(state_dict={"network.conv1.weight": torch.zeros(32, 1, 3, 3).to_sparse()}),
    "meta": contents(state_dict={"network.conv1.weight": torch.zeros(32, 1, 3, 3, device="meta")}),
    "complex": contents(state_dict={"network.conv1.weight": torch.zeros(32, 1, 3, 3, dtype=torch.complex64)}),
    "a long name": contents(state_dict={"x\n" * 10**5: torch.zeros(1)}),
    "many names": contents(state_dict={f"network.{n}": torch.zeros(1) for n in range(1000)}),
    "integers": with_integers(),
    "data None": contents(data=None),
    "data without a name": contents(data=[{}]),
    "epoch a string": contents(epoch="many"),
    "callbacks a list": contents(callbacks=[1]),
    "machine None": contents(machine=None),
    "_instantiator": contents(hyper_parameters={**contents()["hyper_parameters"], "_instantiator": "os.abort"}),
}


@pytest.mark.parametrize("name", ODD)
def test_38_odd_content_gets_one_sentence(name: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "odd.ckpt", ODD[name])
    for loader in (load, MNISTClassifier.load_from_checkpoint):
        with pytest.raises(UserError) as refused:
            loader(path)
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 1000


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in its first epoch, after a checkpoint."""
    folder, values = tmp_path_factory.mktemp("stopped") / "run", small("checkpoint.every_n_steps=2")
    killer = {"_target_": "test_groups.KillAt", "step": 3}
    with pytest.raises(Killed):
        train(folder, **{**values, "trainer": {**values["trainer"], "callbacks": [killer]}})
    return folder


def parts(content: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to each part of a checkpoint."""
    yield above
    if isinstance(content, (dict, list)):
        for key in content if isinstance(content, dict) else range(len(content)):
            yield from parts(content[key], (*above, key))


def with_part(content: Any, keys: Sequence[Any], value: Any) -> Any:
    """A copy of ``content`` with one part replaced, or without it if ``value`` is None."""
    content = inside = copy.deepcopy(content)
    for key in keys[:-1]:
        inside = inside[key]
    if value is None:
        del inside[keys[-1]]
    else:
        inside[keys[-1]] = value
    return content


@pytest.mark.parametrize("value", ["x", -3])
def test_38_a_count_of_lightnings_loops_that_is_none_is_refused(value: Any, stopped: Path, tmp_path: Path) -> None:
    content = torch.load(stopped / runs.LAST, weights_only=True)
    counts = [keys for keys in parts(content) if keys and keys[-1] in ("ready", "completed", "_batches_that_stepped")]
    assert len(counts) > 20
    for keys in [*counts, ("pytorch-lightning_version",), ("recorded", "seconds" if value == "x" else "history")]:
        path = saved(tmp_path / "odd.ckpt", with_part(content, keys, value))
        with pytest.raises(UserError, match=r"is not a checkpoint of this project: \S+ must|\S+ Invalid version"):
            read_checkpoint(path)


def test_38_an_optimizers_state_that_is_no_tensor_for_one_weight_is_refused(stopped: Path, tmp_path: Path) -> None:
    content = torch.load(stopped / runs.LAST, weights_only=True)
    states = content["optimizer_states"][0]["state"]
    assert len(states) == 8 and states[0]
    odd: list[Any] = ["x", [1], {}]
    for key in states[0]:
        for value in odd:
            path = saved(tmp_path / "odd.ckpt", with_part(content, ["optimizer_states", 0, "state", 3, key], value))
            with pytest.raises(UserError, match=rf"optimizer_states\.0\.state must have the same kind of {key} for"):
                read_checkpoint(path)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        *(([key], None) for key in ("pytorch-lightning_version", "loops", "optimizer_states", "recorded", "machine")),
        (["optimizer_states"], []),
        (["optimizer_states", 0, "param_groups"], None),
        (["optimizer_states", 0, "param_groups", 0, "params"], [5]),
        (["optimizer_states", 0, "state", 0], 5),
        (["loops", "fit_loop"], None),
        (["loops", "fit_loop", "epoch_loop.batch_progress"], None),
        (["callbacks", "Checkpoints", "best"], None),
        (["recorded", "metrics"], [{"loss": {}}]),
    ],
)
def test_38_a_run_whose_checkpoint_lacks_a_part_is_not_resumed(
    keys: list[Any], value: Any, stopped: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(stopped, tmp_path / "run")
    content = torch.load(folder / runs.LAST, weights_only=True)
    saved(folder / runs.LAST, with_part(content, keys, value))
    with pytest.raises(UserError, match=r"is not (the|a) checkpoint of|cannot be resumed: its state") as refused:
        train(folder, **{**small("checkpoint.every_n_steps=2"), "resume": str(folder / runs.LAST)})
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    "content", [b"", b"garbage", pickle.dumps({}, 2)[:-1], b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."]
)
def test_38_a_pickle_that_is_none(content: bytes, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "odd.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
    with pytest.raises(UserError, match=r"is not a checkpoint|is damaged"):
        load(tmp_path / "odd.ckpt")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- 1",
        "a: [",
        "data: 5\nmodel: {}\noptimizer: {}\ntrainer: {}",
        "a: &a [1]\nb: [*a, *a]",
        "a: !!python/name:os.abort",
        "data: {x: '${oc.create:{_target_:builtins.open}}'}\nmodel: {}\noptimizer: {}\ntrainer: {}",
        "data: {x: !!omap [y: {_target_: builtins.open}]}\nmodel: {}\noptimizer: {}\ntrainer: {}",
        "data: {x: !!pairs [y: {_target_: builtins.open}]}\nmodel: {}\noptimizer: {}\ntrainer: {}",
        "data: {x: '${oc.env:HOME}'}\nmodel: {}\noptimizer: {}\ntrainer: {}",
    ],
)
def test_38_a_run_with_an_odd_configuration_is_refused(text: str, tmp_path: Path) -> None:
    from mnist_lit.cli.resume import find

    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml is not the configuration of a run") as refused:
        find(str(tmp_path))
    assert "\n" not in str(refused.value)


def test_what_a_run_writes_can_be_read_back(finished_run: Path) -> None:
    expected = torch.load(finished_run / runs.LAST, weights_only=True)["state_dict"]
    assert_same(MNISTClassifier.load_from_checkpoint(finished_run / runs.LAST).state_dict(), expected)
    assert isinstance(load(finished_run).network, nn.Module)
    assert small()["model"] == {**load(finished_run).description, "compile": False}


def test_34_what_an_interpolation_in_a_configuration_names_is_not_called(finished_run: Path, tmp_path: Path) -> None:
    """Hydra resolves it after every check of the classes that are named."""
    run = shutil.copytree(finished_run, tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    call = f"${{oc.create:{{_target_:builtins.open,file:'{tmp_path}/opened',mode:w}}}}"
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "data": {**config["data"], "more": call}}))
    with pytest.raises(UserError):
        train(run, **settings("train", f"resume={run}"))
    with contextlib.suppress(UserError):
        evaluate(tmp_path / "evaluated", **settings("evaluate", f"ckpt={run}", "data.source=sample"))
    assert not (tmp_path / "opened").exists()


def test_35_a_weight_that_holds_some_values_several_times_is_refused(tmp_path: Path) -> None:
    """As a single changed bit in the pickle of an intact archive can make it."""
    content = contents()
    rows = content["state_dict"]["network.dense1.weight"]
    content["state_dict"]["network.dense1.weight"] = rows.as_strided(rows.shape, (4096, 0))
    with pytest.raises(UserError, match=r"network\.dense1\.weight must hold each of its values once"):
        load(saved(tmp_path / "bent.ckpt", content))
