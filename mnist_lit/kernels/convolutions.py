"""The tutorial's convolutions, pooling and dropout fused into one CPU operator, written in C.

The network calls it where ``can_replace`` says so, and its layers in plain PyTorch elsewhere; both agree up to rounding,
gradients included. The operator needs float32 on a CPU and the library that ``make setup``, or installing the package with a
C compiler, builds. ``convolutions.c`` explains the algorithm.
"""

import ctypes
import functools
import logging
from typing import Any

import torch
from torch import Tensor, nn

from mnist_lit import compat
from mnist_lit.kernels import library
from mnist_lit.kernels.dropout import Dropout, is_plain_call, keep_mask

log = logging.getLogger(__name__)

# The layers that ``features`` can replace.
CONV = {
    "kernel_size": (3, 3),
    "stride": (1, 1),
    "padding": (0, 0),
    "dilation": (1, 1),
    "groups": 1,
    "padding_mode": "zeros",
}
POOL = {"kernel_size": 3, "stride": 3, "padding": 0, "dilation": 1, "return_indices": False, "ceil_mode": False}
LAYERS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "conv1": (nn.Conv2d, CONV),
    "conv2": (nn.Conv2d, CONV),
    "pool": (nn.MaxPool2d, POOL),
    "dropout": (Dropout, {}),
}


def can_replace(conv1: Any, conv2: Any, pool: Any, dropout: Any, images: Tensor) -> bool:
    """Whether ``features`` is equivalent to calling these layers in turn, with ReLU after conv1 and pool.

    It is not if a layer differs from the tutorial's, or has something attached that would be skipped: hooks,
    parametrizations, pruning.
    """
    if not is_plain_call(images):
        return False
    layers = zip(LAYERS, (conv1, conv2, pool, dropout), strict=True)
    reason = next((f"{name} {why}" for name, layer in layers if (why := _why_not_replaceable(name, layer))), "")
    reason = reason or why_plain(images, conv1.weight, conv1.bias, conv2.weight, conv2.bias)
    if reason:
        _log_once(f"convolutions: plain PyTorch, because {reason}")
    return not reason


def features(conv1: Any, conv2: Any, pool: nn.MaxPool2d, dropout: Dropout, images: Tensor) -> Tensor:
    """These layers fused, with ReLU after conv1 and pool: [N, F2, P, Q]. Draws the same mask as ``dropout`` itself."""
    kept, scale = None, 1.0
    if dropout.training and dropout.p:
        kept, scale = keep_mask(_features_shape(images, conv2.weight), dropout.p)
    _log_once(f"convolutions: compiled for {instruction_set()}")
    return convolutions(images, conv1.weight, conv1.bias, conv2.weight, conv2.bias, kept=kept, scale=scale)


def _why_not_replaceable(name: str, layer: nn.Module) -> str:
    """Why ``features`` cannot replace a layer; empty if it can."""
    cls, arguments = LAYERS[name]
    differs = type(layer) is not cls or any(getattr(layer, key) != value for key, value in arguments.items())
    if differs or getattr(layer, "bias", True) is None:
        return "differs from the tutorial's layer"
    return "has hooks" if "forward" in vars(layer) or compat.has_hooks(layer) else ""


def convolutions(
    images: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    *,
    kept: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Convolution, ReLU, convolution, 3x3 max pooling, ReLU and dropout: features [N, F2, P, Q].

    Args:
        images: [N, 1, H, W]. P is (H - 4) // 3, Q is (W - 4) // 3.
        weight1: [F1, 1, 3, 3]; bias1: [F1].
        weight2: [F2, F1, 3, 3]; bias2: [F2].
        kept: Features that dropout keeps, bool [N, F2, P, Q]; None keeps all.
        scale: Factor for the kept features.

    It differs from plain PyTorch beyond rounding as follows:

    - Values of a pooling window within a relative 4e-6 of its maximum count as ties: the first one gets the gradient,
      and a feature that close to zero is zero. In PyTorch only bitwise equal values are ties.
    - Infinite images or weights can give NaN, because Winograd's sums cancel.
    - A NaN or infinite incoming gradient always reaches the weight gradients, even where ReLU masks it.
    - Gradients of features that ReLU or dropout has set to zero are skipped; a dense sum would give NaN for zero times infinity.

    Raises:
        ValueError: Shapes or dtypes do not match.
        MemoryError: A few megabytes of workspace cannot be allocated.
        RuntimeError: The library is not available.
    """
    result: tuple[Tensor, Tensor] = FusedConvolutions.apply(images, weight1, bias1, weight2, bias2, kept, scale)
    return result[0]


def why_plain(images: Tensor, *parameters: Tensor) -> str:
    """Why the compiled operator cannot run on these tensors; empty if it can."""
    tensors = (images, *parameters)
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return "the compiled operator runs on the CPU only"
    if any(tensor.dtype != torch.float32 for tensor in tensors) or torch.is_autocast_enabled("cpu"):
        return "the compiled operator needs float32"
    if images.requires_grad and torch.is_grad_enabled():
        return "the compiled operator has no gradient with respect to the images"
    if images.shape[1] != 1 or min(images.shape[2:]) < 7:
        return "the compiled operator needs images with one channel and at least 7x7 pixels"
    if not is_plain_call(images):
        return "the compiled operator cannot be exported or transformed"
    return _library()[1]


def instruction_set() -> str:
    """The instruction set of the library in use: AVX512, AVX2 or DEFAULT; none if there is no library."""
    return _library()[2]


class FusedConvolutions(torch.autograd.Function):
    """``convolutions``, and the index 0..8 of each maximum in its pooling window: uint8 [N, F2, P, Q]."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        weight1: Tensor,
        bias1: Tensor,
        weight2: Tensor,
        bias2: Tensor,
        kept: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        sizes, shape = _sizes(images, weight1, bias1, weight2), _features_shape(images, weight2)
        _check("bias2", bias2, (len(weight2),))
        if kept is not None:
            _check("kept", kept, shape, torch.bool)
        features, winners = images.new_empty(shape), images.new_empty(shape, dtype=torch.uint8)
        _call("mnist_lit_forward", sizes, images, weight1, bias1, weight2, bias2, kept, scale, features, winners)
        ctx.sizes, ctx.scale = sizes, scale
        ctx.mark_non_differentiable(winners)
        ctx.save_for_backward(images, weight1, bias1, weight2, features, winners)
        return features, winners

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        images, weight1, bias1, weight2, features, winners = ctx.saved_tensors
        shapes = weight1.shape, bias1.shape, weight2.shape, (len(weight2),)
        gradients = [images.new_empty(shape) for shape in shapes]  # contiguous, whatever the weights are
        arguments = images, weight1, bias1, weight2, ctx.scale, features, winners, gradient, *gradients
        _call("mnist_lit_backward", ctx.sizes, *arguments)
        needed = [each if needs else None for each, needs in zip(gradients, ctx.needs_input_grad[1:5], strict=True)]
        return None, *needed, None, None


def _features_shape(images: Tensor, weight2: Tensor) -> tuple[int, int, int, int]:
    return images.shape[0], weight2.shape[0], (images.shape[2] - 4) // 3, (images.shape[3] - 4) // 3


def _sizes(images: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor) -> tuple[int, ...]:
    """The sizes that C takes: of the images, and the numbers of filters. It would read past the end of other tensors."""
    if images.dim() != 4 or images.shape[1] != 1 or min(images.shape[2:]) < 7:
        raise ValueError(f"images must be [N, 1, H, W] of at least 7x7 pixels, not {list(images.shape)}")
    count, _, height, width = images.shape
    filters1, filters2 = len(weight1), len(weight2)
    _check("images", images, images.shape)
    _check("weight1", weight1, (filters1, 1, 3, 3))
    _check("bias1", bias1, (filters1,))
    _check("weight2", weight2, (filters2, filters1, 3, 3))
    return count, height, width, filters1, filters2


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype} {list(shape)}, not {tensor.dtype} {list(tensor.shape)}")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, not on {tensor.device}")


def _call(name: str, sizes: tuple[int, ...], *arguments: Tensor | float | None) -> None:
    """Call a function of the library with the number of threads, the sizes and its other parameters, in C's order."""
    functions, reason, _ = _library()
    if functions is None:
        raise RuntimeError(f"the compiled operator is not available: {reason}")
    # Keep copies alive during the call. Outputs are new tensors and need no copy, so they are written in place.
    held = [_plainly_stored(each) if isinstance(each, Tensor) else each for each in arguments]
    longs = [ctypes.c_long(size) for size in sizes]
    if getattr(functions, name)(ctypes.c_uint(torch.get_num_threads()), *longs, *map(_argument, held)):
        raise MemoryError("the compiled operator: out of memory")


def _plainly_stored(tensor: Tensor) -> Tensor:
    """The tensor itself if it is contiguous and aligned, which one made by ``torch.frombuffer`` need not be."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def _argument(value: Tensor | float | None) -> Any:
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_void_p(value.data_ptr() if value is not None else None)


def _library() -> tuple[ctypes.CDLL | None, str, str]:
    """The library, or why there is none, and its instruction set."""
    return library.load(torch.backends.cpu.get_cpu_capability())


@functools.cache
def _log_once(line: str) -> None:
    log.info(line)
