"""Callbacks that ``conf/callbacks/`` offers beside Lightning's own: throughput, CUDA graphs."""

import logging
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, ThroughputMonitor
from torch import Tensor, nn

from mnist_lit import UserError

log = logging.getLogger(__name__)


class Throughput(ThroughputMonitor):
    """Lightning's ``ThroughputMonitor`` for batches of images and labels.

    Args:
        arguments: Those of ``lightning.fabric.utilities.throughput.Throughput``.

    Raises:
        UserError: From Lightning's hooks, if there is no logger.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(batch_size_fn=lambda batch: len(batch[0]), **arguments)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not trainer.loggers:
            raise UserError("Throughput only writes to loggers: choose one, for instance logger=csv")
        super().setup(trainer, pl_module, stage)


class CUDAGraphs(L.Callback):
    """Replays the network's forward and backward pass as CUDA graphs: one launch each, instead of one for each kernel.

    They are captured at the first batch, for batches of its size; others (but for larger ones, for which they are captured
    anew), validation and test run as usual, as do augmentation, loss, metrics and the optimizer. The values are the same up
    to rounding. A hook inside the network runs only while it is captured.

    A run that is resumed where they cannot be used, for instance on a CPU, goes on without them.

    Raises:
        UserError: From Lightning's hooks, if the run is not on a single CUDA device, accumulates gradients, detects
            anomalies, or averages the weights of a network with buffers by ``StochasticWeightAveraging``.
    """

    _active, _captured = True, 0  # the latter: images in the batches that are replayed

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        lacks = _what_graphs_lack(trainer, pl_module)
        if lacks and not trainer.ckpt_path:
            raise UserError(f"CUDAGraphs needs {lacks}")
        if lacks:
            log.warning("resumed without CUDA graphs, which need %s", lacks)
        self._active = not lacks

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not self._active:
            return
        if trainer.accumulate_grad_batches != 1:  # a callback can change it later
            raise UserError(
                f"CUDAGraphs needs trainer.accumulate_grad_batches=1, not {trainer.accumulate_grad_batches}"
            )
        images, network = batch[0], pl_module.network
        if len(images) <= self._captured:
            return
        self._release(network)
        eager, buffers = network.forward, [buffer.clone() for buffer in network.buffers()]
        with trainer.precision_plugin.forward_context():
            capture(network, images)
        with torch.no_grad():
            for buffer, before in zip(network.buffers(), buffers, strict=True):
                buffer.copy_(before)  # the same memory, which the graph reads
        graphed, shape = network.forward, images.shape
        network.forward = lambda x: (graphed if x.shape == shape else eager)(x)
        self._captured = len(images)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._release(pl_module.network)  # there is no teardown

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        self._release(pl_module.network)

    def _release(self, network: nn.Module) -> None:
        vars(network).pop("forward", None)
        self._captured = 0


def capture(network: nn.Module, images: Tensor) -> None:
    """Replace the network's ``forward`` by CUDA graphs of its passes over images like these, [N, 1, 28, 28].

    Runs both passes over them a few times: the parameters stay, buffers such as BatchNorm's change.
    """
    # It draws dropout's masks and must not move the generator, or a resumed run would draw others.
    with torch.random.fork_rng([images.device]):
        torch.cuda.make_graphed_callables(network, (images.clone(),))


def _what_graphs_lack(trainer: L.Trainer, pl_module: Any) -> str | None:
    if trainer.world_size != 1:
        return f"a single process (trainer.devices=1), not {trainer.world_size}"
    if trainer.accumulate_grad_batches != 1:
        return f"trainer.accumulate_grad_batches=1, not {trainer.accumulate_grad_batches}"
    if torch.is_anomaly_enabled():
        return "trainer.detect_anomaly=false"
    averages = any(isinstance(each, StochasticWeightAveraging) for each in trainer.callbacks)  # type: ignore[attr-defined]
    if averages and any(True for _ in pl_module.network.buffers()):
        return "a network without BatchNorm where weights are averaged by StochasticWeightAveraging"
    if pl_module.device.type != "cuda":
        return f"trainer.accelerator=gpu and a CUDA device, not {pl_module.device.type}"
    return None
