"""PyTorch's own tools work on the network, and see what they would see of plain layers."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from mnist_lit.kernels import convolutions
from mnist_lit.network import TutorialCNN

pytestmark = pytest.mark.skipif(
    convolutions.instruction_set() == "none", reason="no C compiler: the operator was not built"
)


@pytest.fixture
def images(sample: Any) -> Tensor:
    return next(iter(sample.test_dataloader()))[0][::20]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each call of the compiled operator."""
    seen: list[str] = []
    original = convolutions._call

    def counted(name: str, *arguments: Any) -> None:
        seen.append(name)
        original(name, *arguments)

    monkeypatch.setattr(convolutions, "_call", counted)
    return seen


def networks() -> tuple[TutorialCNN, TutorialCNN]:
    """One that may use the operator, and the same without it."""
    torch.manual_seed(0)
    network = TutorialCNN().eval()
    plain = copy.deepcopy(network)
    plain.cpu_kernel = False
    return network, plain


def assert_close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_without_any_of_them_the_operator_runs(images: Tensor, calls: list[str]) -> None:
    network, plain = networks()
    assert_close(network(images), plain(images))
    assert calls == ["mnist_lit_forward"]


def prune_half(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.5)


@pytest.mark.parametrize("layer", ["conv1", "conv2"])
@pytest.mark.parametrize("attach", [prune_half, parametrizations.weight_norm, parametrizations.spectral_norm])
def test_pruning_and_parametrizations(
    attach: Callable[[nn.Module], Any], layer: str, images: Tensor, calls: list[str]
) -> None:
    network, plain = networks()
    for each in (network, plain):
        torch.manual_seed(1)  # spectral_norm starts its iteration with random vectors
        attach(each.get_submodule(layer))
    before = network(images)
    assert_same(before, plain(images))
    assert not calls
    for parameter in network.get_submodule(layer).parameters():
        with torch.no_grad():
            parameter.mul_(1.5).add_(0.01)
    assert not torch.equal(network(images), before)
    network.train()(images).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("layer", ["conv1", "conv2", "pool", "dropout", "dense1", "dense2"])
@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_hooks_fire_on_every_layer(register: str, layer: str, images: Tensor, calls: list[str]) -> None:
    network, plain = networks()
    seen = []
    handle = getattr(network.get_submodule(layer), register)(lambda *arguments: seen.append(len(arguments)))
    out = network(images)
    assert_close(out, plain(images))
    out.sum().backward()
    assert len(seen) == 1
    handle.remove()
    calls.clear()
    network(images)
    assert len(seen) == 1 and calls


def test_hooks_on_all_modules_fire(images: Tensor) -> None:
    network, _ = networks()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        network(images)
    finally:
        handle.remove()
    assert seen == ["Conv2d", "Conv2d", "MaxPool2d", "Dropout", "Linear", "Linear", "TutorialCNN"]


def test_functional_call_and_gradients_of_single_images(images: Tensor) -> None:
    network, plain = networks()
    parameters = {key: value.detach() * 1.1 for key, value in network.named_parameters()}
    assert_close(
        torch.func.functional_call(network, parameters, images), torch.func.functional_call(plain, parameters, images)
    )
    labels = torch.arange(len(images)) % 10

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = torch.func.functional_call(network, parameters, image[None])
        return nn.functional.cross_entropy(logits, label[None])

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, images, labels)
    one = torch.func.grad(loss)(parameters, images[3], labels[3])
    for key, value in gradients.items():
        assert value.shape == (len(images), *parameters[key].shape)
        assert_close(value[3], one[key])
    network.train()  # then dropout draws for each image
    drawn = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), randomness="different")
    assert not torch.equal(drawn(parameters, images, labels)["dense2.weight"], gradients["dense2.weight"])


def test_a_copy_has_weights_of_its_own(images: Tensor) -> None:
    network, _ = networks()
    other = copy.deepcopy(network)
    assert_same(network(images), other(images))
    with torch.no_grad():
        other.conv1.weight.zero_()
    assert not torch.equal(network(images), other(images))


def test_torch_compile_warns_of_nothing_and_gives_the_same(images: Tensor) -> None:
    network, plain = networks()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled: Any = torch.compile(network, backend="eager", fullgraph=True)
        assert_close(compiled(images), plain(images))
        compiled.train()(images).sum().backward()
    assert network.conv1.weight.grad is not None


def test_export_and_trace_hold_plain_layers_only(images: Tensor) -> None:
    network, plain = networks()
    exported = torch.export.export(network, (images,))
    assert "mnist_lit" not in str(exported.graph)
    assert_close(exported.module()(images), plain(images))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated
        assert_close(torch.jit.trace(network, images)(images), plain(images))


def test_features_by_name(images: Tensor) -> None:
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    network, plain = networks()
    for names in get_graph_node_names(network):
        assert [name for name in names if name in dict(network.named_children())] == [
            "conv1",
            "conv2",
            "pool",
            *(["dropout"] if "dropout" in names else []),
            "dense1",
            "dense2",
        ]
    given = create_feature_extractor(network, ["conv1", "pool", "dense2"])(images)
    assert_same(given["conv1"], network.conv1(images))
    assert given["pool"].shape == (len(images), 64, 8, 8)
    assert_close(given["dense2"], plain(images))


def test_dynamic_quantization_of_the_dense_layers(images: Tensor) -> None:
    network, plain = networks()
    if "fbgemm" not in torch.backends.quantized.supported_engines and torch.backends.quantized.engine == "none":
        pytest.skip("this PyTorch cannot quantize")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated for another package
        quantized = torch.ao.quantization.quantize_dynamic(network, {nn.Linear})
    assert isinstance(quantized.dense1, torch.ao.nn.quantized.dynamic.Linear)
    torch.testing.assert_close(quantized(images), plain(images), rtol=0.1, atol=0.1)


def test_torchscript_is_refused_in_one_sentence() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(NotImplementedError, match=r"does not support torch.jit.script: take torch.export"):
            torch.jit.script(TutorialCNN())


def test_a_subclass_may_replace_and_add_layers(images: Tensor, calls: list[str]) -> None:
    class Wider(TutorialCNN):
        def __init__(self) -> None:
            super().__init__()
            self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
            self.pool = nn.MaxPool2d(3, padding=1)
            self.dense1 = nn.Linear(64 * 9 * 9, 250)
            self.norm = nn.LayerNorm(10)

        def forward(self, images: Tensor) -> Tensor:
            return self.norm(super().forward(images))

    torch.manual_seed(0)
    network = Wider().eval()
    assert network(images).shape == (len(images), 10) and not calls
    x = network.pool(network.conv2(network.conv1(images).relu())).relu()
    assert_same(network(images), network.norm(network.dense2(network.dense1(x.flatten(1)).sigmoid())))


def test_both_paths_drop_the_same_values(images: Tensor, calls: list[str]) -> None:
    network, plain = networks()
    outputs = []
    for each in (network, plain):
        torch.manual_seed(3)
        outputs.append(each.train()(images))
    assert calls == ["mnist_lit_forward"]
    assert_close(*outputs)
