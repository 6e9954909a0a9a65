"""The network: the tutorial's, and unchanged by what makes it fast."""

import subprocess
import sys

import torch
from conftest import ROOT
from torch import nn

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


def test_dropout_drops_its_share_of_the_pooled_values_in_training_only(sample) -> None:
    torch.manual_seed(0)
    network = TutorialCNN(dropout=0.25)
    seen = []
    network.dropout.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    images = next(iter(sample.test_dataloader()))[0]
    network.eval()(images)
    network.train()(images)
    (before, evaluated), (_, trained) = seen
    assert torch.equal(before, evaluated)
    alive = before != 0
    assert abs((trained[alive] == 0).float().mean() - 0.25) < 0.01
    assert before.shape == (500, 64, 8, 8)


def test_network_needs_torch_and_nothing_else() -> None:
    code = "import sys, mnist_lit.network; print({m.split('.')[0] for m in sys.modules} & {'lightning', 'hydra', 'torchvision', 'torchmetrics'})"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"
