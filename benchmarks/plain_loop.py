"""The tutorial's training as a plain PyTorch loop over tensors in memory; prints the seconds of each epoch as JSON.

python benchmarks/plain_loop.py DATA literal|ours EPOCHS BATCHES

literal: NCHW, convolution -> ReLU -> pooling, as one writes it down from the tutorial.
ours: this project's network and its setting of the allocator, without Lightning.
"""

import json
import sys
import time
from pathlib import Path

import torch
from torch import nn

from mnist_lit.memory import keep_freed_memory
from mnist_lit.mnist_files import read_mnist
from mnist_lit.network import TutorialCNN


def literal_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(3),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(4096, 250),
        nn.Sigmoid(),
        nn.Linear(250, 10),
    )


def main(data: str, which: str, epochs: int, batches: int) -> list[float]:
    torch.manual_seed(0)
    if which == "ours":
        keep_freed_memory()
    pixels, labels, _, _ = read_mnist(Path(data) / "MNIST" / "raw")
    images = pixels.unsqueeze(1).to(torch.float32).div(255)
    network = TutorialCNN() if which == "ours" else literal_network()
    optimizer = torch.optim.Adadelta(network.parameters(), lr=1.0, rho=0.95, eps=1e-7)
    seconds = []
    for _ in range(epochs):
        order = torch.randperm(len(labels))
        started = time.perf_counter()
        for batch in order.split(500)[:batches]:
            loss = nn.functional.cross_entropy(network(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds.append(time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
