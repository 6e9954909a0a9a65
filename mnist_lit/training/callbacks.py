"""Callbacks that ``conf/callbacks/`` offers beside Lightning's own: throughput, CUDA graphs."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ThroughputMonitor

from mnist_lit import UserError


class Throughput(ThroughputMonitor):
    """Lightning's ``ThroughputMonitor`` for batches of images and labels; its arguments are those of ``Throughput``."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(batch_size_fn=lambda batch: len(batch[0]), **arguments)


class CUDAGraphs(L.Callback):
    """Replays the network's forward and backward pass as CUDA graphs: two launches a step instead of some fifty.

    They are captured at the first batch, for batches of its size; other batches, validation and test run as usual.
    The values are the same. A hook inside the network runs only while it is captured.

    Raises:
        UserError: From Lightning's hooks, if the run is not on a single CUDA device, or accumulates gradients.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        asked = {"devices": trainer.world_size, "accumulate_grad_batches": trainer.accumulate_grad_batches}
        for key, value in asked.items():
            if value != 1:
                raise UserError(f"CUDAGraphs needs trainer.{key}=1, not {value}")
        if pl_module.device.type != "cuda":
            raise UserError(f"CUDAGraphs needs trainer.accelerator=gpu and a CUDA device, not {pl_module.device.type}")

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        network = pl_module.network
        if "forward" in vars(network):  # captured already
            return
        images, shape, eager = batch[0], batch[0].shape, network.forward
        # Capturing draws dropout's masks and must not move the generator, or a resumed run would draw others.
        with torch.random.fork_rng([images.device]), trainer.precision_plugin.forward_context(), _autocast_uncached():
            torch.cuda.make_graphed_callables(network, (torch.empty_like(images),))  # replaces its forward
        graphed = network.forward
        network.forward = lambda x: (graphed if x.shape == shape else eager)(x)

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        vars(pl_module.network).pop("forward", None)


def _autocast_uncached() -> Any:
    """Autocast as it is, without its cache of cast weights, which a graph would go on reading."""
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    return torch.autocast("cuda", dtype=dtype, enabled=enabled, cache_enabled=False)
