"""Dropout that draws its mask ten times faster than ``nn.Dropout`` on a CPU."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnist_lit import compat


class Dropout(nn.Module):
    """``nn.Dropout`` with a faster mask on a CPU, the same mask that ``convolutions.features`` draws.

    On other devices, and when compiled, exported or transformed, it is identical to ``nn.Dropout``.

    Args:
        p: Probability of dropping a value during training, in [0, 1).
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout must be in [0, 1), not {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        if not is_plain_call(x) or x.device.type != "cpu":
            return F.dropout(x, self.p)
        kept, scale = keep_mask(tuple(x.shape), self.p)
        # In x's dtype: a float32 mask would promote half precision, and round the scale in double precision.
        return x * (kept.to(x.dtype) * scale)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def keep_mask(shape: tuple[int, ...], dropout: float) -> tuple[Tensor, float]:
    """A bool mask of the values that dropout keeps, and the factor to scale them by.

    Each value uses 16 random bits, four values per draw of torch's CPU generator, in a tenth of the time that
    ``nn.Dropout`` takes. The actual probability is within 1/131,072 of ``dropout``, and at most 65,535/65,536.
    """
    count = math.prod(shape)
    dropped = min(round(dropout * 2**16), 2**16 - 1)
    bits = torch.empty((count + 3) // 4, dtype=torch.int64, device="cpu").random_(-(2**63), None)
    kept = bits.view(torch.int16)[:count].view(shape) >= dropped - 2**15
    return kept, 2**16 / (2**16 - dropped)


def is_plain_call(x: object) -> bool:
    """Whether ``x`` is an ordinary tensor in eager mode: not compiled, exported, traced or transformed."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and not torch.jit.is_tracing()
        and not compat.in_functorch_transform()
    )
