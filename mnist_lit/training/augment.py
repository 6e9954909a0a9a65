"""Augmentation that the group ``augment`` offers beside the classes of kornia."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class AffineElastic(nn.Module):
    """A random affine map of each image and a random elastic one, as Simard et al. (2003) trained on MNIST.

    The images are sampled once for both: sampled twice, by a module for each, their strokes would be blurred twice.

    Args:
        degrees: The largest angle by which an image is turned.
        translate: The largest shift in x and y, as a fraction of the size.
        scale: The smallest and the largest factor of its size.
        shear: The largest angle of the shear.
        alpha: The size of the elastic displacements: they are noise in [-1, 1], smoothed, times this many halves of the side.
        sigma: Standard deviation in pixels of the Gaussian that smooths the noise.
        p: The fraction of the images that get an affine map.
        p_elastic: The fraction that get an elastic one.
    """

    gaussian: Tensor

    def __init__(
        self,
        degrees: float,
        translate: tuple[float, float],
        scale: tuple[float, float],
        shear: float,
        alpha: float,
        sigma: float,
        p: float = 1.0,
        p_elastic: float = 1.0,
    ) -> None:
        super().__init__()
        self.degrees, self.translate, self.scale, self.shear = degrees, translate, scale, shear
        self.alpha, self.p, self.p_elastic = alpha, p, p_elastic
        radius = round(2.5 * sigma)
        weights = torch.exp(-((torch.arange(-radius, radius + 1) / sigma) ** 2) / 2)
        self.register_buffer("gaussian", weights / weights.sum(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Other images [N, C, H, W] of images [N, C, H, W]."""
        grid = functional.affine_grid(self._affine(images), list(images.shape), align_corners=False)
        if self.alpha and self.p_elastic:
            grid = grid + self._elastic(images)
        return functional.grid_sample(images, grid, align_corners=False)

    def _affine(self, images: Tensor) -> Tensor:
        """Maps [N, 2, 3] from where a pixel will be to where it is taken from, in halves of the side."""

        def uniform(low: float, high: float) -> Tensor:
            return torch.empty(len(images), device=images.device).uniform_(low, high)

        angle, shear = (uniform(-largest, largest).deg2rad() for largest in (self.degrees, self.shear))
        cos, sin, tan = angle.cos(), angle.sin(), shear.tan()
        x, y = (uniform(-2 * largest, 2 * largest) for largest in self.translate)
        linear = torch.stack([cos, cos * tan - sin, sin, sin * tan + cos]) / uniform(*self.scale)
        maps = torch.stack([linear[0], linear[1], x, linear[2], linear[3], y], dim=1).view(-1, 2, 3)
        return torch.where(self._chosen(images, self.p), maps, torch.eye(2, 3, device=images.device))

    def _elastic(self, images: Tensor) -> Tensor:
        """Displacements [N, H, W, 2] in x and y, in halves of the side."""
        count, _, height, width = images.shape
        noise = torch.empty(2 * count, 1, height, width, device=images.device).uniform_(-1, 1)
        row, radius = self.gaussian.view(1, 1, 1, -1), len(self.gaussian) // 2
        smooth = functional.conv2d(noise, row, padding=(0, radius))
        smooth = functional.conv2d(smooth, row.transpose(2, 3), padding=(radius, 0))
        displacements = self.alpha * smooth.view(count, 2, height, width).permute(0, 2, 3, 1)
        return displacements * self._chosen(images, self.p_elastic).unsqueeze(-1)

    def _chosen(self, images: Tensor, fraction: float) -> Tensor:
        """Of each image [N, 1, 1], whether it is among this fraction."""
        return torch.rand(len(images), 1, 1, device=images.device) < fraction
