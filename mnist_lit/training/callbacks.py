"""Small callbacks of a training run: seeding for exact resume, a stop at a loss that is not finite, CUDA graphs."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ThroughputMonitor

from mnist_lit import UserError
from mnist_lit.batches import number_from
from mnist_lit.training.progress import epoch_name


class SeedEachBatch(L.Callback):
    """Reseeds the generators that dropout uses before each training batch, from seed, epoch, batch index and rank.

    And before each epoch, for loaders that shuffle by PyTorch's global generator.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._loader_has_iterator = True

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        torch.default_generator.manual_seed(number_from("epoch", self.seed, trainer.current_epoch))
        # In the first epoch of a process, also of a resumed run, Lightning has made the loader's iterator before this.
        if self._loader_has_iterator:
            torch.empty((), dtype=torch.int64).random_()  # what making one draws
            self._loader_has_iterator = False

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, idx: int) -> None:
        number = number_from("batch", self.seed, trainer.current_epoch, idx, trainer.global_rank)
        # Not torch.manual_seed(): it also queues the call for unused devices, which takes a millisecond.
        torch.default_generator.manual_seed(number)
        if pl_module.device.type != "cpu":  # torch.cuda, torch.mps ...
            seed_device = getattr(getattr(torch, pl_module.device.type, None), "manual_seed", None)
            if seed_device:  # other devices draw from the CPU's generator
                seed_device(number)


class StopOnNaN(L.Callback):
    """Stops a run at the first NaN or infinite loss, before any checkpoint is overwritten.

    On a GPU the loss is checked every few steps, to avoid a synchronization at each; the step reported is exact.
    """

    CHECK_EVERY = 50

    def __init__(self) -> None:
        self._first: torch.Tensor | None = None  # the first step with such a loss; 0 for none

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        finite = outputs["loss"].detach().isfinite()
        if finite.device.type == "cpu":
            if not finite:
                self._stop(trainer, trainer.global_step)
            return
        step = torch.full_like(finite, trainer.global_step, dtype=torch.int64)
        now = torch.where(finite, 0, step)
        self._first = now if self._first is None else torch.where(self._first == 0, now, self._first)
        due = trainer.global_step % self.CHECK_EVERY == 0 or trainer.is_last_batch
        if due and (first := int(self._first)):
            self._stop(trainer, first)

    def _stop(self, trainer: L.Trainer, step: int) -> None:
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        raise UserError(
            f"the loss is not finite at step {step} ({epoch_name(trainer)}), with optimizer.lr={rate:g}: training "
            "stopped; earlier checkpoints are unchanged"
        )


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
