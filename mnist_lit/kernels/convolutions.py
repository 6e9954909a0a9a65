"""The tutorial's convolutional part as one operator: compiled C where that applies, plain PyTorch everywhere else.

``convolutions`` chooses between the two; ``convolutions.c`` says how the compiled one works. It needs single precision
on a CPU and the library that ``make setup``, or installing the package with a C compiler, builds; nothing else changes
with it: same values up to rounding, same gradients.
"""

import ctypes
import functools
import importlib.machinery
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnist_lit import compat
from mnist_lit.kernels.dropout import Dropout, is_plain_call, keep_mask

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
# The best first: torch's name of a CPU's abilities, and the library that pyproject.toml compiles for it.
LIBRARIES = {"AVX512": "_convolutions_avx512", "AVX2": "_convolutions_avx2", "DEFAULT": "_convolutions"}

# The layers that ``features`` stands for.
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
    """Whether ``features`` gives what these layers give one after the other, with ReLU behind conv1 and pool.

    It does not where a layer is another one than the tutorial's, or where something is attached to it that would be
    skipped: hooks, parametrizations, pruning.
    """
    if not is_plain_call(images):
        return False
    named = {"conv1": conv1, "conv2": conv2, "pool": pool, "dropout": dropout}
    reason = next((f"{name} {why}" for name, layer in named.items() if (why := _why_called(name, layer))), "")
    reason = reason or why_plain(images, conv1.weight, conv1.bias, conv2.weight, conv2.bias)
    if reason:
        _say(f"convolutions: plain PyTorch, because {reason}")
    return not reason


def features(conv1: Any, conv2: Any, pool: nn.MaxPool2d, dropout: Dropout, images: Tensor) -> Tensor:
    """What these layers give one after the other, with ReLU behind conv1 and pool: [N, F2, P, Q].

    Dropout draws what it draws by itself.
    """
    kept, scale = None, 1.0
    if dropout.training and dropout.p:
        shape = (len(images), conv2.out_channels, (images.shape[2] - 4) // 3, (images.shape[3] - 4) // 3)
        kept, scale = keep_mask(shape, dropout.p)
    return _compiled(images, conv1.weight, conv1.bias, conv2.weight, conv2.bias, kept, scale)


def _why_called(name: str, layer: nn.Module) -> str:
    """Why a layer has to be called itself; empty if ``features`` can stand for it."""
    cls, arguments = LAYERS[name]
    others = type(layer) is not cls or any(getattr(layer, key) != value for key, value in arguments.items())
    if others or getattr(layer, "bias", True) is None:
        return "is another layer than the tutorial's"
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
    """Convolution, ReLU, convolution, 3x3 max-pooling, ReLU and dropout: features [N, F2, P, Q].

    Args:
        images: [N, 1, H, W]. P is (H - 4) // 3, Q is (W - 4) // 3.
        weight1: [F1, 1, 3, 3]; bias1: [F1].
        weight2: [F2, F1, 3, 3]; bias2: [F2].
        kept: Which features dropout keeps, bool [N, F2, P, Q]; None keeps all.
        scale: What those that are kept are multiplied by.

    Where the compiled operator differs from plain PyTorch by more than rounding of the values:

    - Outputs of a window that are within 4e-6 of its largest, relative to its size, count as equal: the first of them
      takes the gradient, and a feature so near to zero is zero. PyTorch does this with values that are equal to the
      last bit.
    - Infinity in images or weights can come out as NaN, because Winograd's sums of it cancel.
    - An incoming gradient that is NaN or infinite always reaches the weights' gradients, also where ReLU masks it.
    - Where a gradient is zero nothing is added up; a dense sum has NaN for 0 times infinity there.
    """
    if reason := why_plain(images, weight1, bias1, weight2, bias2):
        _say(f"convolutions: plain PyTorch, because {reason}")
        return plain(images, weight1, bias1, weight2, bias2, kept=kept, scale=scale)
    return _compiled(images, weight1, bias1, weight2, bias2, kept, scale)


def _compiled(images: Tensor, *others: Any) -> Tensor:
    _say(f"convolutions: compiled for {instruction_set()}")
    # Without gradients the function itself: the operator's first call imports torch._dynamo, three seconds of it.
    run = forward if torch.is_grad_enabled() else _forward
    features: Tensor = run(images, *others)[0]
    return features


def plain(
    images: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    *,
    kept: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """The same in plain PyTorch: what the compiled operator is measured by, and what runs where it cannot."""
    x = torch.relu(F.conv2d(images, weight1, bias1))
    # ReLU after the pooling gives the same values and gradients as before it, on a ninth of the numbers.
    x = torch.relu(F.max_pool2d(F.conv2d(x, weight2, bias2), 3))
    # Of x's own type: a mask in single precision would lift half precision, and round double precision's scale.
    return x * (scale if kept is None else kept.to(x.dtype) * scale)


def why_plain(images: Tensor, *parameters: Tensor) -> str:
    """Why the compiled operator cannot run on these; empty where it can."""
    tensors = (images, *parameters)
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return "the compiled ones are for the CPU"
    if any(tensor.dtype != torch.float32 for tensor in tensors) or torch.is_autocast_enabled("cpu"):
        return "the compiled ones are for single precision"
    if images.requires_grad and torch.is_grad_enabled():
        return "the compiled ones have no gradient with respect to the images"
    if images.shape[1] != 1 or min(images.shape[2:]) < 7:
        return "the compiled ones are for images of one channel and at least 7x7 pixels"
    if not is_plain_call(images):
        return "the compiled ones cannot be exported or transformed"
    return _library()[1]


def instruction_set() -> str:
    """For which CPUs the library is compiled: AVX512, AVX2 or DEFAULT; none where there is no library."""
    return _library()[2]


def _forward(
    images: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, kept: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Features [N, F2, P, Q] float32, and the place 0..8 of each in its pooling window, uint8.

    Raises:
        ValueError: Shapes that do not fit together.
        MemoryError: The few megabytes that it works in are not there.
    """
    features, winners = _features_and_winners(images, weight1, bias1, weight2)
    f1, f2 = len(bias1), len(bias2)
    if weight1.shape != (f1, 1, 3, 3) or weight2.shape != (f2, f1, 3, 3):  # C would read past their ends
        raise ValueError(f"weights [F1, 1, 3, 3] and [F2, F1, 3, 3] are needed, not {weight1.shape}, {weight2.shape}")
    if kept is not None and (kept.shape != features.shape or kept.dtype != torch.bool):
        raise ValueError(f"kept must be bool {tuple(features.shape)}, not {kept.dtype} {tuple(kept.shape)}")
    _call("mnist_lit_forward", images, weight1, bias1, weight2, bias2, kept, scale, features, winners)
    return features, winners


forward = torch.library.custom_op("mnist_lit::convolutions", _forward, mutates_args=(), device_types="cpu")


@torch.library.custom_op("mnist_lit::convolutions_backward", mutates_args=(), device_types="cpu")
def backward(
    images: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    scale: float,
    features: Tensor,
    winners: Tensor,
    gradient: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of weight1, bias1, weight2 and bias2 from that of the features.

    Raises:
        MemoryError: The few megabytes that it works in are not there.
    """
    gradients = _gradients(images, weight1, bias1, weight2)
    _call("mnist_lit_backward", images, weight1, bias1, weight2, scale, features, winners, gradient, *gradients)
    return gradients


@forward.register_fake
def _features_and_winners(
    images: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    shape = (images.shape[0], weight2.shape[0], (images.shape[2] - 4) // 3, (images.shape[3] - 4) // 3)
    return images.new_empty(shape), images.new_empty(shape, dtype=torch.uint8)


@backward.register_fake
def _gradients(
    images: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    filters1, filters2 = weight1.shape[0], weight2.shape[0]
    shapes = [(filters1, 1, 3, 3), (filters1,), (filters2, filters1, 3, 3), (filters2,)]
    dw1, db1, dw2, db2 = (images.new_empty(shape) for shape in shapes)
    return dw1, db1, dw2, db2


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    images, weight1, bias1, weight2, _, _, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(images, weight1, bias1, weight2, *output)


def _formula(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    images, weight1, bias1, weight2, features, winners = ctx.saved_tensors
    gradients = backward(images, weight1, bias1, weight2, ctx.scale, features, winners, gradient)
    wanted = [each if needed else None for each, needed in zip(gradients, ctx.needs_input_grad[1:5], strict=True)]
    return None, *wanted, None, None


forward.register_autograd(_formula, setup_context=_remember)


def _call(name: str, images: Tensor, weight1: Tensor, *others: Tensor | float | None) -> None:
    """Call the library: the sizes, and then the addresses of the tensors in the order of the C function."""
    library, reason, _ = _library()
    if library is None:
        raise RuntimeError(f"there is no compiled operator: {reason}")
    count, _, height, width = images.shape
    filters1, filters2 = weight1.shape[0], next(o for o in others[1:] if isinstance(o, Tensor)).shape[0]
    # Held here until the call is over: the library gets addresses only. An output is contiguous, so it is itself.
    held = [each.contiguous() if isinstance(each, Tensor) else each for each in (images, weight1, *others)]
    sizes = [ctypes.c_long(size) for size in (count, height, width, filters1, filters2)]
    arguments = [_argument(each) for each in held]
    if getattr(library, name)(ctypes.c_uint(torch.get_num_threads()), *sizes, *arguments):
        raise MemoryError("the compiled convolutions: not enough memory")


def _argument(value: Tensor | float | None) -> Any:
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_void_p(value.data_ptr() if value is not None else None)


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str, str]:
    """The library; why there is none; for which CPUs it is compiled."""
    names = list(LIBRARIES)
    capability = torch.backends.cpu.get_cpu_capability()
    for cpus in names[names.index(capability) if capability in names else -1 :]:
        for path in (FOLDER / (LIBRARIES[cpus] + suffix) for suffix in importlib.machinery.EXTENSION_SUFFIXES):
            if not path.exists():
                continue
            source = FOLDER / "convolutions.c"
            if source.exists() and source.stat().st_mtime > path.stat().st_mtime:
                return None, f"{path.name} is older than its source (make setup builds it anew)", "none"
            try:
                return ctypes.CDLL(str(path)), "", cpus
            except OSError as error:
                return None, f"their library does not load ({error})", "none"
    return None, "their library was not built (it takes a C compiler and make setup)", "none"


@functools.cache
def _say(line: str) -> None:
    log.info(line)
