"""The random maps of the training images: each alone against torchvision's, or against where a dot may be."""

from typing import Any

import pytest
import torch
from helpers import assert_same
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import affine

from mnist_lit.training.augment import AffineElastic

NONE: dict[str, Any] = {"degrees": 0, "translate": (0, 0), "scale": (1, 1), "shear": 0, "alpha": 0, "sigma": 4}


def changed(images: Tensor, **what: Any) -> Tensor:
    torch.manual_seed(0)
    return AffineElastic(**{**NONE, **what})(images)


@pytest.fixture(scope="module")
def digits(sample) -> Tensor:
    return sample.test_images[:500].unsqueeze(1).float().div(255)


def dots(count: int = 1000) -> Tensor:
    """A soft dot in the middle of each image, which is sampled without loss."""
    row = torch.exp(-((torch.arange(28) - 13.5) ** 2) / 8)
    return (row.view(28, 1) * row).expand(count, 1, 28, 28).clone()


def centres(images: Tensor) -> Tensor:
    """x and y [N, 2] of the middle of each image's mass, in pixels from the middle of the image."""
    places, mass = torch.arange(28) - 13.5, images.sum(dim=(1, 2, 3))
    x, y = (images.sum(dim=(1, axis)) @ places / mass for axis in (2, 3))
    return torch.stack([x, y], dim=1)


def test_nothing_asked_for_is_nothing_changed(digits: Tensor) -> None:
    torch.testing.assert_close(changed(digits), digits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [0.8, 1.25])
def test_size_is_torchvisions(size: float, digits: Tensor) -> None:
    expected = affine(digits, 0, [0, 0], size, [0, 0], InterpolationMode.BILINEAR)
    torch.testing.assert_close(changed(digits, scale=(size, size)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("what", "named"), [({"degrees": 30.0}, "angle"), ({"shear": 30.0}, "shear")])
def test_angles_are_torchvisions_and_not_larger(what: dict[str, float], named: str, digits: Tensor) -> None:
    """Each is found among those that torchvision makes of it by degrees, and they are from all over the range."""
    digits = torch.nn.functional.pad(digits, (6, 6))  # wider than high
    found = changed(digits, **what)
    candidates = torch.stack(
        [
            affine(
                digits,
                angle if named == "angle" else 0,
                [0, 0],
                1,
                [angle if named == "shear" else 0, 0],
                InterpolationMode.BILINEAR,
            )
            for angle in range(-40, 41)
        ]
    )
    errors, places = (candidates - found).square().mean(dim=(2, 3, 4)).min(dim=0)
    assert errors.max() < 1e-3
    angles = places - 40
    assert -31 <= angles.min() < -25 and 25 < angles.max() <= 31


def test_shifts_are_up_to_their_fraction_in_x_and_in_y() -> None:
    moved = centres(changed(dots(), translate=(0.1, 0.2)))
    torch.testing.assert_close(moved.abs().amax(dim=0), torch.tensor([2.8, 5.6]), rtol=0.02, atol=0)
    assert (moved.mean(dim=0).abs() < 0.3).all()


def test_the_elastic_map_moves_neighbours_alike_and_the_far_apart_each_on_its_own() -> None:
    def both(apart: int) -> Tensor:
        images = torch.zeros(500, 1, 28, 28)
        images[:, :, 14, 14 - apart // 2] = images[:, :, 14, 14 + apart // 2] = 1.0
        left, right = images.clone(), images.clone()
        left[..., 14:], right[..., :14] = 0.0, 0.0
        return torch.corrcoef(torch.stack([centres(changed(each, alpha=1.0))[:, 1] for each in (left, right)]))[0, 1]

    assert both(2) > 0.6 and both(20) < 0.3


def test_the_fractions_are_those_of_the_images() -> None:
    images = dots()
    for what in ({"translate": (0.1, 0.1), "p": 0.3}, {"alpha": 2.0, "p_elastic": 0.3}):
        count = int((centres(changed(images, **what)).norm(dim=1) > 1e-3).sum())
        assert 250 < count < 350, what


def test_draws_are_of_torchs_generator(digits: Tensor) -> None:
    every = {"degrees": 10, "translate": (0.1, 0.1), "scale": (0.9, 1.1), "shear": 8, "alpha": 1.0}
    assert_same(changed(digits, **every), changed(digits, **every))
    assert not torch.equal(AffineElastic(**{**NONE, **every})(digits), changed(digits, **every))


def test_colours_are_moved_alike() -> None:
    grey = torch.rand(5, 1, 17, 32)
    every = {"degrees": 10, "alpha": 1.0}
    assert_same(changed(grey.expand(5, 3, 17, 32), **every), changed(grey, **every).expand(5, 3, 17, 32))


def test_half_precision_is_that_of_the_images_and_not_of_the_places(digits: Tensor) -> None:
    found = changed(digits.bfloat16(), degrees=10, alpha=1.0)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), changed(digits, degrees=10, alpha=1.0), rtol=0, atol=0.01)


@pytest.mark.parametrize(
    "what", [{"degrees": -5}, {"scale": (1.1, 0.9)}, {"sigma": 0}, {"p": 2.0}, {"translate": (0, -1)}]
)
def test_what_is_out_of_range_is_named(what: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"out of range: {next(iter(what))}$"):
        changed(torch.rand(1, 1, 28, 28), **what)
