"""The compiled operator: the same as plain PyTorch, on every instruction set that this machine has."""

import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, assert_same, small
from sanitize import sanitize
from torch import Tensor
from torch.nn import functional as F

from mnist_lit.kernels import convolutions as room
from mnist_lit.kernels import library
from mnist_lit.kernels.convolutions import FusedConvolutions, convolutions
from mnist_lit.kernels.dropout import keep_mask
from mnist_lit.network import TutorialCNN

SETS = list(library.LANES)
BEST = room.instruction_set()

pytestmark = pytest.mark.skipif(BEST == "none", reason="no C compiler: the operator was not built")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test finds the library, and says its lines, anew."""
    for cached in (library.load, room._log_once):
        cached.cache_clear()
    yield
    monkeypatch.undo()
    for cached in (library.load, room._log_once):
        cached.cache_clear()


@pytest.fixture(params=SETS)
def each_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if SETS.index(request.param) < SETS.index(BEST):
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
    assert room.instruction_set() == request.param


def parameters(filters1: int = 32, filters2: int = 64) -> list[Tensor]:
    shapes = [(filters1, 1, 3, 3), (filters1,), (filters2, filters1, 3, 3), (filters2,)]
    scales = (0.3, 0.1, 0.3 / filters1**0.5, 0.1)
    return [(torch.randn(shape) * scale).requires_grad_() for shape, scale in zip(shapes, scales, strict=True)]


def plain(
    images: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, kept: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """``convolutions`` in plain PyTorch."""
    x = F.max_pool2d(F.conv2d(F.conv2d(images, w1, b1).relu(), w2, b2), 3).relu()
    return x * (scale if kept is None else kept * scale)


def images_with_background(*shape: int) -> Tensor:
    """Some ink, and wide empty parts whose outputs are all equal, as in a digit."""
    images = torch.rand(shape)
    images[..., : shape[-2] // 2, :] = 0
    return images


def assert_agrees(images: Tensor, weights: list[Tensor], kept: Tensor | None = None, scale: float = 1.0) -> None:
    """Features and gradients against plain PyTorch in double precision."""
    assert room.why_plain(images, *weights) == ""
    features = convolutions(images, *weights, kept=kept, scale=scale)
    gradient = torch.randn(features.shape)
    ours = torch.autograd.grad(features, weights, gradient)
    doubles = [weight.detach().double().requires_grad_() for weight in weights]
    expected = plain(images.double(), *doubles, kept=kept, scale=scale)
    theirs = torch.autograd.grad(expected, doubles, gradient.double())
    torch.testing.assert_close(features.double(), expected, rtol=1e-5, atol=1e-5)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.double(), their, rtol=1e-4, atol=1e-4 * float(their.abs().max()))


@pytest.mark.usefixtures("each_set")
@pytest.mark.parametrize(
    ("count", "height", "width", "filters1", "filters2"),
    [
        (5, 28, 28, 32, 64),
        (1, 28, 28, 32, 64),  # one image, more threads than that
        (2, 7, 7, 1, 1),  # the smallest
        (3, 15, 9, 5, 3),  # sizes and filters that no vector divides; rows and columns that no window covers
        (4, 12, 31, 33, 70),
        (0, 28, 28, 32, 64),
    ],
)
@pytest.mark.parametrize("drops", [False, True])
def test_features_and_gradients_are_those_of_plain_pytorch(
    count: int, height: int, width: int, filters1: int, filters2: int, drops: bool
) -> None:
    torch.manual_seed(count + height)
    kept = torch.rand(count, filters2, (height - 4) // 3, (width - 4) // 3) < 0.5 if drops else None
    images = images_with_background(count, 1, height, width)
    if count:
        assert_agrees(images, parameters(filters1, filters2), kept, 2.0)
    else:
        assert convolutions(images, *parameters(filters1, filters2), kept=kept).shape == (0, filters2, 8, 8)


@pytest.mark.usefixtures("each_set")
@pytest.mark.parametrize("pattern", ["even", "rows", "columns"])
def test_of_equal_outputs_the_first_takes_the_gradient(pattern: str) -> None:
    """Where an image does not change along rows, columns or both, nine or three outputs of a window are equal."""
    torch.manual_seed(1)
    images = {
        "even": torch.full((3, 1, 28, 28), 0.3),
        "rows": torch.rand(3, 1, 28, 1).expand(3, 1, 28, 28),
        "columns": torch.rand(3, 1, 1, 28).expand(3, 1, 28, 28),
    }[pattern]
    assert_agrees(images, parameters())
    _, winners = FusedConvolutions.apply(images, *parameters(), None, 1.0)
    firsts = {"even": {0}, "rows": {0, 3, 6}, "columns": {0, 1, 2}}[pattern]
    assert set(winners.unique().tolist()) == firsts


@pytest.mark.usefixtures("each_set")
def test_on_digits_the_same_outputs_win_and_the_same_are_zero(sample) -> None:
    """At the start of a training, when biases are zero, most windows of a digit have outputs that are exactly zero."""
    torch.manual_seed(0)
    network = TutorialCNN()
    weights = [*network.conv1.parameters(), *network.conv2.parameters()]
    images, _ = next(iter(sample.test_dataloader()))
    features = convolutions(images[::5], *weights)
    w1, b1, w2, b2 = (weight.double() for weight in weights)
    outputs = F.conv2d(torch.relu(F.conv2d(images[::5].double(), w1, b1)), w2, b2)
    most, index = F.max_pool2d(outputs, 3, return_indices=True)
    places = index // 24 % 3 * 3 + index % 24 % 3
    winners = FusedConvolutions.apply(images[::5], *weights, None, 1.0)[1]
    active = most > 0
    assert ((features > 0) != active).float().mean() < 5e-5
    assert (winners != places)[active].float().mean() < 5e-5


@pytest.mark.usefixtures("each_set")
def test_windows_below_zero_pass_nothing_on() -> None:
    torch.manual_seed(2)
    weights = parameters()
    with torch.no_grad():
        weights[3].fill_(-100)
    features = convolutions(images_with_background(3, 1, 28, 28), *weights)
    assert not features.any()
    assert not any(each.any() for each in torch.autograd.grad(features.sum(), weights))


def test_inputs_that_are_not_contiguous() -> None:
    torch.manual_seed(3)
    images = torch.rand(28, 4, 28, 2).permute(1, 3, 0, 2)[:, 1:]
    weights = parameters()
    strided = [weight.detach().flip(-1).flip(-1).mT.contiguous().mT.requires_grad_() for weight in weights[::2]]
    weights[0], weights[2] = strided[0], strided[1].to(memory_format=torch.channels_last).detach().requires_grad_()
    assert not images.is_contiguous() and not weights[0].is_contiguous() and not weights[2].is_contiguous()
    kept = (torch.rand(4, 8, 8, 64) < 0.5).permute(0, 3, 1, 2)
    assert_agrees(images, weights, kept, 2.0)
    features = convolutions(images, *weights)
    one = torch.ones(())  # a gradient of strides zero, as sum() hands it back
    for ours, theirs in zip(
        torch.autograd.grad(features, weights, one.expand_as(features), retain_graph=True),
        torch.autograd.grad(features, weights, torch.ones(features.shape)),
        strict=True,
    ):
        assert_same(ours, theirs)


@pytest.mark.parametrize(
    ("changed", "to", "message"),
    [
        ("images", torch.rand(2, 28, 28), r"images must be \[N, 1, H, W\]"),
        ("images", torch.rand(2, 1, 3, 28), "at least 7x7 pixels"),
        ("images", torch.rand(2, 1, 28, 28, dtype=torch.float64), r"not torch\.float64"),
        ("weight1", torch.rand(32, 1, 1, 1), "weight1 must be"),
        ("bias1", torch.rand(31), "bias1 must be"),
        (
            "weight2",
            torch.rand(64, 16, 3, 3),
            r"weight2 must be torch\.float32 \[64, 32, 3, 3\], not .* \[64, 16, 3, 3\]",
        ),
        ("bias2", torch.rand(63), "bias2 must be"),
        ("kept", torch.ones(2, 64, 8, 8, dtype=torch.bool), r"kept must be torch\.bool \[2, 64, 12, 12\]"),
        ("kept", torch.ones(2, 64, 12, 12), "kept must be"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_before_c_reads_past_their_ends(
    changed: str, to: Tensor, message: str
) -> None:
    images, weights = torch.rand(2, 1, 40, 40), parameters()
    good: dict[str, Any] = dict(
        zip(("images", "weight1", "bias1", "weight2", "bias2"), (images, *weights), strict=True)
    )
    convolutions(**good, kept=torch.ones(2, 64, 12, 12, dtype=torch.bool))
    with pytest.raises(ValueError, match=message):
        convolutions(**good | {changed: to})


def test_what_is_on_another_device_does_not_reach_c() -> None:
    with pytest.raises(ValueError, match="bias1 must be on the CPU, not on meta"):
        room._check("bias1", torch.ones(32, device="meta"), (32,))
    with torch.device("meta"):  # the default device, of which the mask must not be
        assert keep_mask((2, 8), 0.5)[0].device.type == "cpu"


def test_floats_at_odd_addresses_are_copied_first() -> None:
    torch.manual_seed(8)
    images, weights = torch.rand(2, 1, 28, 28), [weight.detach() for weight in parameters()]
    shifted = bytearray(b"-" + images.numpy().tobytes())
    odd = torch.frombuffer(shifted, dtype=torch.float32, offset=1).view(images.shape)
    assert odd.is_contiguous() and odd.data_ptr() % 4
    held = room._plainly_stored(odd)
    assert held.data_ptr() % 4 == 0
    assert_same(held, images)
    assert_same(convolutions(odd, *weights), convolutions(images, *weights))
    assert room._plainly_stored(images) is images


def test_frozen_parameters_get_no_gradient_and_the_others_theirs() -> None:
    torch.manual_seed(4)
    images, weights = torch.rand(2, 1, 28, 28), parameters()
    everything = torch.autograd.grad(convolutions(images, *weights).sum(), weights)
    for frozen in range(4):
        some = [weight.detach().requires_grad_(i != frozen) for i, weight in enumerate(weights)]
        convolutions(images, *some).sum().backward()
        assert some[frozen].grad is None
        given = [i for i, each in enumerate(some) if each.grad is not None]
        assert_same([some[i].grad for i in given], [everything[i] for i in given])
        assert sum(each.grad is not None for each in some) == 3
    assert not convolutions(images, *(weight.detach() for weight in weights)).requires_grad


def test_batches_that_the_threads_do_not_divide_and_the_same_bits_each_time() -> None:
    torch.manual_seed(5)
    images, weights = images_with_background(7, 1, 28, 28), parameters()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            assert_agrees(images, weights)
            first, second = (torch.autograd.grad(convolutions(images, *weights).sum(), weights) for _ in range(2))
            assert_same(first, second)
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("each_set")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(value: float) -> None:
    torch.manual_seed(6)
    images, weights = torch.rand(2, 1, 28, 28), parameters()
    features = convolutions(images, *weights)
    for where in ((features > 0).nonzero()[0], (features == 0).nonzero()[0]):
        gradient = torch.zeros(features.shape)
        gradient[tuple(where)] = value
        gradients = torch.autograd.grad(features, weights, gradient, retain_graph=True)
        assert not all(each.isfinite().all() for each in gradients)
        assert not gradients[3].isfinite().all()
    images[1, 0, 14, 14] = torch.nan
    ours, theirs = convolutions(images, *weights), plain(images, *weights)
    assert_same(ours.isnan(), theirs.isnan())
    assert theirs.isnan().any()
    (through,) = torch.autograd.grad(ours.sum(), weights[2])
    assert through.isnan().any()


def test_its_gradient_has_no_gradient() -> None:
    images, weights = torch.rand(2, 1, 28, 28), parameters()
    (gradient,) = torch.autograd.grad(convolutions(images, *weights).square().sum(), weights[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def reasons() -> dict[str, tuple[Tensor, TutorialCNN, str]]:
    images, colour = torch.rand(2, 1, 28, 28), TutorialCNN()
    colour.conv1 = torch.nn.Conv2d(3, 32, 3)
    return {
        "double": (images.double(), TutorialCNN().double(), "needs float32"),
        "image gradient": (images.clone().requires_grad_(), TutorialCNN(), "no gradient with respect to the images"),
        "colour": (torch.rand(2, 3, 28, 28), colour, "images with one channel and at least 7x7 pixels"),
        "meta": (images.to("meta"), TutorialCNN().to("meta"), "on the CPU only"),
    }


def layers_of(network: TutorialCNN) -> tuple[Any, Any, Any, Any]:
    return network.conv1, network.conv2, network.pool, network.dropout


@pytest.mark.parametrize("name", ["double", "image gradient", "colour", "meta"])
def test_where_it_does_not_apply_plain_pytorch_runs_and_one_line_says_so(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    images, network, reason = reasons()[name]
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            ours = network.eval()(images)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("convolutions: plain PyTorch, because the compiled operator ") and reason in line
    network.cpu_kernel = False
    if not ours.is_meta:
        assert_same(ours, network(images))


def test_images_that_are_smaller_than_a_window_are_not_for_it() -> None:
    assert not room.can_replace(*layers_of(TutorialCNN()), torch.rand(2, 1, 6, 28))


def test_autocast_export_and_transforms_take_plain_pytorch() -> None:
    images = torch.rand(2, 1, 28, 28)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not room.can_replace(*layers_of(TutorialCNN()), images)
        assert TutorialCNN()(images).dtype == torch.bfloat16
    exported = torch.export.export(TutorialCNN().eval(), (images,))
    assert "conv2d" in str(exported.graph)
    network = TutorialCNN().eval()
    one_by_one = torch.func.vmap(lambda image: network(image[None])[0])(images)
    torch.testing.assert_close(one_by_one, network(images), rtol=1e-4, atol=1e-5)


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The source and the libraries in a folder to spoil."""
    shutil.copytree(library.FOLDER, tmp_path / "kernels")
    monkeypatch.setattr(library, "FOLDER", tmp_path / "kernels")
    return tmp_path / "kernels"


def change_source(folder: Path) -> None:
    with (folder / "convolutions.c").open("a") as file:
        file.write("\n")


def change_best_library(folder: Path) -> None:
    path = library.path_of(BEST)
    path.write_bytes(path.read_bytes().replace(b"The tutorial's", b"A tutorial's  "))


def delete_libraries(folder: Path) -> None:
    for path in folder.glob("*.so"):
        path.unlink()


def damage_libraries(folder: Path) -> None:
    for path in folder.glob("*.so"):
        path.write_bytes((folder / "convolutions.c").read_bytes())


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (change_source, "was compiled from another version of convolutions.c (make setup rebuilds it)"),
        (change_best_library, "was compiled from another version of convolutions.c (make setup rebuilds it)"),
        (delete_libraries, "was not built (make setup builds it, with a C compiler)"),
        (damage_libraries, "does not load"),
    ],
)
def test_39_without_a_good_library_plain_pytorch_runs_and_the_log_says_so_once(
    spoil: Callable[[Path], None], reason: str, copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(copied)
    for path in copied.glob("*.so"):
        os.utime(path, (2**31, 2**31))  # later than the source
    images, network = torch.rand(2, 1, 28, 28), TutorialCNN().eval()
    network_in_plain_pytorch = TutorialCNN(cpu_kernel=False).eval()
    network_in_plain_pytorch.load_state_dict(network.state_dict())
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert_same(network(images), network_in_plain_pytorch(images))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("convolutions: plain PyTorch, because ") and reason in line


def test_39_dates_do_not_matter_and_without_the_source_the_library_is_believed(copied: Path) -> None:
    os.utime(copied / "convolutions.c", (2**31, 2**31))
    assert room.instruction_set() == BEST
    library.load.cache_clear()
    (copied / "convolutions.c").unlink()
    assert room.instruction_set() == BEST


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("make") and shutil.which("cc")), reason="no make, or no C compiler")
def test_39_make_base_compiles_again_where_the_source_is_another_whatever_the_dates(tmp_path: Path) -> None:
    """The end of ``make base``, which comes after what needs the network."""
    for name in ("mnist_lit", "conf"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "Makefile", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    recipe = subprocess.check_output(
        ["make", "-n", "--no-print-directory", "base", f"RUN={sys.executable}"], cwd=tmp_path, text=True
    )
    compile_if_needed = recipe[recipe.index(f"{sys.executable} -m mnist_lit.kernels.library") :]
    folder = tmp_path / "mnist_lit" / "kernels"

    def compiled() -> set[Path]:
        """The libraries that a run of these lines makes."""
        before = {path: path.stat().st_mtime for path in folder.glob("*.so")}
        subprocess.run(compile_if_needed, shell=True, cwd=tmp_path, check=True)
        return {path for path in folder.glob("*.so") if path.stat().st_mtime != before.get(path)}

    everything = set(folder.glob("*.so"))
    os.utime(folder / "convolutions.c", (2**31, 2**31))
    assert not compiled()
    change_source(folder)
    assert compiled() == everything
    # Now build/ has libraries too: give them, and those in the package, a date later than the source's.
    change_source(folder)
    for path in tmp_path.rglob("*.so"):
        os.utime(path, (2**32, 2**32))
    assert compiled() == everything
    assert not compiled()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists what the CPU has")
def test_the_cpu_is_asked_and_torch_can_only_ask_for_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch believes ATEN_CPU_CAPABILITY, and does not ask for all that the compiler uses."""
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    there = set(flags[1].split()) if flags else set()  # none on other CPUs than Intel's and AMD's
    v3 = {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave", "sse4_2", "popcnt", "cx16", "lahf_lm"}
    v4 = v3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
    expected = "AVX512" if v4 <= there else "AVX2" if v3 <= there else "DEFAULT"
    for capability in SETS:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert room.instruction_set() == max(capability, expected, key=SETS.index)


def test_a_cpu_that_torch_knows_by_another_name_takes_the_library_for_any_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "SVE256")
    assert room.instruction_set() == "DEFAULT"


def test_where_the_best_library_is_missing_the_next_one_runs(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if BEST == "DEFAULT":
        pytest.skip("this CPU has no better library")
    library.path_of(BEST).unlink()
    assert room.instruction_set() == SETS[SETS.index(BEST) + 1]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_sanitizers_find_nothing_and_would_find_something(tmp_path: Path) -> None:
    """``make sanitize`` does more of it."""
    source = library.FOLDER / "convolutions.c"
    done = sanitize(source, 8, "address,undefined", 40, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "40 cases\n", "")
    broken = tmp_path / "convolutions.c"
    broken.write_text(source.read_text().replace("zeros(2 * size + up(Q, LANES))", "zeros(2 * size)"))
    done = sanitize(broken, 8, "address,undefined", 40, tmp_path)
    assert done.returncode and "heap-buffer-overflow" in done.stderr


def test_a_training_run_with_and_without_it_agrees(tmp_path: Path) -> None:
    """Dropout draws the same on both sides, so rounding is between them, and which of nearly equal values of a window
    takes the gradient. Over six seeds the training losses differed by at most 1e-5; the test loss comes after six of
    Adadelta's first, wild steps, and differed by at most 1.3e-4.
    """
    from mnist_lit.train import train

    with_it, without = (
        train(tmp_path / str(compiled), **small(f"model.cpu_kernel={compiled}")) for compiled in (True, False)
    )
    assert with_it["train/loss"] == pytest.approx(without["train/loss"], rel=2e-5)
    assert with_it["test/loss"] == pytest.approx(without["test/loss"], rel=5e-4)
    assert with_it["test/acc"] == pytest.approx(without["test/acc"], abs=0.011)  # of 200 images


def test_using_a_model_does_not_import_the_compiler() -> None:
    code = (
        "import sys, torch; from mnist_lit.network import TutorialCNN\n"
        "with torch.no_grad(): TutorialCNN().eval()(torch.rand(1, 1, 28, 28))\n"
        "print('torch._dynamo' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "False"
