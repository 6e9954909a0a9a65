"""Augmentation that the group ``augment`` offers beside the classes of kornia."""

from kornia.augmentation import RandomAffine, RandomElasticTransform
from torch import nn


class AffineElastic(nn.Sequential):
    """A random affine map of each image, then a random elastic one, as Simard et al. (2003) trained on MNIST.

    Args:
        degrees: The largest angle by which an image is turned.
        translate: The largest shift in x and y, as a fraction of the size.
        scale: The smallest and the largest factor of its size.
        shear: The largest angle of the shear.
        alpha: The size of the elastic displacements, in ``RandomElasticTransform``'s unit.
        sigma: Standard deviation in pixels of the Gaussian that smooths them.
        p: The fraction of the images that get an affine map.
        p_elastic: The fraction that get an elastic one; it blurs the strokes a little, and the test's are not blurred.
    """

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
        size = 2 * round(2.5 * sigma) + 1  # of the Gaussian's kernel
        super().__init__(
            RandomAffine(degrees, translate, scale, shear, p=p),
            RandomElasticTransform((size, size), (sigma, sigma), (alpha, alpha), p=p_elastic),
        )
