"""The network: the tutorial's, and unchanged by what makes it fast."""

import subprocess
import sys

import pytest
import torch
from helpers import ROOT, assert_same
from torch import nn

from mnist_lit.kernels.dropout import keep_mask
from mnist_lit.network import TutorialCNN


def literal_port(network: TutorialCNN) -> nn.Sequential:
    """The tutorial's layers in the tutorial's order and PyTorch's default memory layout, with the same weights."""
    copy = TutorialCNN(network.dropout.p).double()
    copy.load_state_dict(network.state_dict())
    copy.to(memory_format=torch.contiguous_format)
    return nn.Sequential(
        copy.conv1,
        nn.ReLU(),
        copy.conv2,
        nn.ReLU(),
        nn.MaxPool2d(3),
        nn.Flatten(),
        copy.dense1,
        nn.Sigmoid(),
        copy.dense2,
    )


def test_parameter_count() -> None:
    assert sum(p.numel() for p in TutorialCNN().parameters()) == 1_045_576


def test_logits_and_gradients_are_those_of_the_literal_port(sample) -> None:
    # In double precision, where rounding does not decide which of two nearly equal values wins a pooling window.
    torch.manual_seed(0)
    network = TutorialCNN(dropout=0.0).double()
    literal = literal_port(network)
    images, labels = next(iter(sample.test_dataloader()))
    images, labels = images[::10].double(), labels[::10]
    for model in (network, literal):
        nn.functional.cross_entropy(model(images), labels).backward()
    torch.testing.assert_close(network(images), literal(images), rtol=1e-12, atol=1e-12)
    ours = [p.grad for p in network.parameters()]
    theirs = [p.grad for p in literal.parameters()]
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("cpu_kernel", [True, False])
def test_dropout_drops_its_share_of_the_features_in_training_only(cpu_kernel: bool, sample) -> None:
    torch.manual_seed(0)
    network = TutorialCNN(dropout=0.25, cpu_kernel=cpu_kernel)
    seen: list[torch.Tensor] = []
    network.dense1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = next(iter(sample.test_dataloader()))[0]
    for mode in (False, False, True, True):
        network.train(mode)(images)
    evaluated, again, first, second = seen
    assert_same(evaluated, again)
    alive = evaluated != 0
    kept = first != 0
    assert abs(kept[alive].float().mean() - 0.75) < 0.002
    torch.testing.assert_close(first[kept], evaluated[kept] / 0.75)
    assert abs((kept & (second != 0))[alive].float().mean() - 0.75**2) < 0.002  # drawn anew, and independently


@pytest.mark.parametrize("dropout", [0.5, 0.1, 0.3, 0.9])
def test_keep_mask_keeps_each_value_equally_often_and_the_mean_as_it_was(dropout: float) -> None:
    torch.manual_seed(0)
    kept, scale = keep_mask((4001, 251), dropout)
    assert kept.shape == (4001, 251) and kept.dtype == torch.bool
    spread = (dropout * (1 - dropout)) ** 0.5
    assert abs(kept.float().mean() - (1 - dropout)) < 4 * spread / kept.numel() ** 0.5
    for axis in (0, 1):  # no row and no column is better off than chance allows
        shares = kept.float().mean(axis)
        assert (shares - (1 - dropout)).abs().max() < 6 * spread / kept.shape[axis] ** 0.5 + 1e-3
    neighbours = (kept[:, 1:] & kept[:, :-1]).float().mean()
    assert abs(neighbours - (1 - dropout) ** 2) < 0.002
    assert scale == pytest.approx(1 / (1 - dropout), rel=2e-4)
    torch.manual_seed(0)
    assert_same(kept, keep_mask((4001, 251), dropout)[0])


def test_a_dropout_that_keeps_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\)"):
        TutorialCNN(dropout=1.0)


def test_network_needs_torch_and_nothing_else() -> None:
    code = "import sys, mnist_lit.network; print({m.split('.')[0] for m in sys.modules} & {'lightning', 'hydra', 'torchvision', 'torchmetrics'})"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"
