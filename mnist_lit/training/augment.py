"""Augmentation that the group ``augment`` offers beside the classes of kornia."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class AffineElastic(nn.Module):
    """A random affine map of each image and a random elastic one, as Simard et al. (2003) trained on MNIST.

    The images are sampled once for both: sampled twice, by a module for each, their strokes would be blurred twice.

    Args:
        degrees: The largest angle by which an image is turned.
        translate: The largest shift in x and y, as a fraction of the size, before the image is turned and scaled.
        scale: The smallest and the largest factor of its size.
        shear: The largest angle of the shear.
        alpha: The size of the elastic displacements: they are noise in [-1, 1], smoothed, times this many halves of the side.
        sigma: Standard deviation in pixels of the Gaussian that smooths the noise.
        p: The fraction of the images that get an affine map.
        p_elastic: The fraction that get an elastic one.

    Raises:
        ValueError: An argument is out of its range.
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
        is_right = {
            "degrees": degrees >= 0,
            "translate": min(translate) >= 0,
            "scale": 0 < scale[0] <= scale[1],
            "shear": shear >= 0,
            "alpha": alpha >= 0,
            "sigma": sigma > 0,
            "p": 0 <= p <= 1,
            "p_elastic": 0 <= p_elastic <= 1,
        }
        if wrong := [name for name, is_so in is_right.items() if not is_so]:
            raise ValueError(f"out of range: {', '.join(wrong)}")
        self.degrees, self.translate, self.scale, self.shear = degrees, translate, scale, shear
        self.alpha, self.p, self.p_elastic = alpha, p, p_elastic
        radius = round(2.5 * sigma)
        weights = torch.exp(-((torch.arange(-radius, radius + 1) / sigma) ** 2) / 2)
        self.register_buffer("gaussian", weights / weights.sum(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Other images [N, C, H, W] of images [N, C, H, W]."""
        exact = images.to(torch.promote_types(images.dtype, torch.float32))  # half would round the places
        grid = functional.affine_grid(self._affine(exact), list(exact.shape), align_corners=False)
        if self.alpha and self.p_elastic:
            grid = grid + self._elastic(exact)
        return functional.grid_sample(exact, grid, align_corners=False).to(images.dtype)

    def _affine(self, images: Tensor) -> Tensor:
        """Maps [N, 2, 3] from where a pixel will be to where it is taken from, in halves of the sides."""

        def uniform(low: float, high: float) -> Tensor:
            return images.new_empty(len(images)).uniform_(low, high)

        angle, shear = (uniform(-largest, largest).deg2rad() for largest in (self.degrees, self.shear))
        cos, sin, tan = angle.cos(), angle.sin(), shear.tan()
        x, y = (uniform(-2 * largest, 2 * largest) for largest in self.translate)
        tall = images.shape[2] / images.shape[3]
        linear = torch.stack([cos, (cos * tan - sin) * tall, sin / tall, sin * tan + cos]) / uniform(*self.scale)
        maps = torch.stack([linear[0], linear[1], x, linear[2], linear[3], y], dim=1).view(-1, 2, 3)
        unchanged = torch.eye(2, 3, dtype=images.dtype, device=images.device)
        return torch.where(self._chosen(images, self.p), maps, unchanged)

    def _elastic(self, images: Tensor) -> Tensor:
        """Displacements [N, H, W, 2] in x and y, in halves of the sides."""
        count, _, height, width = images.shape
        noise = images.new_empty(2 * count, 1, height, width).uniform_(-1, 1)
        row, radius = self.gaussian.to(images.dtype).view(1, 1, 1, -1), len(self.gaussian) // 2
        smooth = functional.conv2d(noise, row, padding=(0, radius))
        smooth = functional.conv2d(smooth, row.transpose(2, 3), padding=(radius, 0))
        displacements = self.alpha * smooth.view(count, 2, height, width).permute(0, 2, 3, 1)
        return displacements * self._chosen(images, self.p_elastic).unsqueeze(-1)

    def _chosen(self, images: Tensor, fraction: float) -> Tensor:
        """Of each image [N, 1, 1], whether it is among this fraction."""
        return images.new_empty(len(images), 1, 1).uniform_() < fraction
