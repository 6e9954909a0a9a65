"""Whether an image in MNIST's form shows a digit at all, which a network that knows nothing else cannot say."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

WEIGHTS = Path(__file__).with_name("detector.npz")  # written by benchmarks/detector.py
CHANNELS = 12
NO_DIGIT = "shows something other than a digit"  # what a picture is refused for


class DigitDetector(nn.Sequential):
    """A small network, trained to tell digits from letters, shapes, textures and noise.

    It maps images [N, 1, 28, 28] from 0 to 1 to scores [N]: the logarithm of how many times likelier a digit is.

    Attributes:
        threshold: The score that 99.8 % of MNIST's digits exceed.
    """

    def __init__(self, threshold: float = 0.0) -> None:
        c = CHANNELS
        super().__init__(
            *(nn.Conv2d(1, c, 5, stride=2, padding=2), nn.ReLU()),  # 14x14
            *(nn.Conv2d(c, 2 * c, 3, stride=2, padding=1), nn.ReLU()),  # 7x7
            *(nn.Conv2d(2 * c, 4 * c, 3, stride=2, padding=1), nn.ReLU()),  # 4x4
            *(nn.Flatten(), nn.Dropout(0.2), nn.Linear(16 * 4 * c, 32), nn.ReLU(), nn.Linear(32, 1), nn.Flatten(0)),
        )
        self.threshold = threshold

    def shows_digit(self, images: Tensor) -> Tensor:
        """Which of the images [N, 1, 28, 28] show a digit: bool [N]."""
        return self(images) > self.threshold


def load_detector() -> DigitDetector:
    """The detector that comes with the package, in evaluation mode and with frozen parameters."""
    with np.load(WEIGHTS) as file:
        weights = {name: torch.from_numpy(file[name].astype(np.float32)) for name in file.files}
    detector = DigitDetector(float(weights.pop("threshold")))
    detector.load_state_dict(weights)
    return detector.eval().requires_grad_(False)
