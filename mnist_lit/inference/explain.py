"""What a network makes of an image on the way to its answer: feature maps, and the pixels that the answer depends on."""

import base64
import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mnist_lit.inference.trained import TrainedModel

PATCH, STEP = 5, 2  # pixels: the side of the square that is covered, and from one to the next


def explanation(model: TrainedModel, image: Tensor) -> dict[str, Any]:
    """``occlusion`` and ``feature_maps`` of ``image`` [1, H, W], the maps as bytes that are 255 at their layer's maximum."""
    maps = feature_maps(model.network, image[None])
    return {
        "occlusion": occlusion(model, image).tolist(),
        "feature_maps": [
            {
                "layer": name,
                "shape": list(each.shape[1:]),
                "values": _base64(each / each.max().clamp(min=1e-9)),
            }
            for name, each in maps.items()
        ],
    }


def _base64(values: Tensor) -> str:
    return base64.b64encode((255 * values).byte().numpy().tobytes()).decode()


def feature_maps(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What the first two convolutions, with ReLU, make of ``images`` [N, 1, H, W]: [N, C, P, Q] by the layer's name.

    A layer that the network does not call has no entry; nor has any if the network cannot be copied.
    """
    names = [name for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d)][:2]
    if not names:
        return {}
    # A copy with the same weights: hooks on the layers themselves would see what other threads predict.
    weights: dict[int, Any] = {id(each): each for each in (*network.parameters(), *network.buffers())}
    try:
        network = copy.deepcopy(network, weights).eval()
    except Exception:  # noqa: BLE001  # a network of the user's own may hold what cannot be copied
        return {}
    vars(network)["cpu_kernel"] = False  # it would step aside for the hooks, and say so in the log
    outputs: dict[str, Tensor] = {}

    def keep(name: str, layer: nn.Module, _: Any, output: Tensor) -> None:
        outputs[name] = output.relu()

    for name in names:
        network.get_submodule(name).register_forward_hook(partial(keep, name))
    weight: Any = network.get_submodule(names[0]).weight
    with torch.inference_mode():
        network(images.to(weight.device, weight.dtype))
    return outputs


def occlusion(model: nn.Module, image: Tensor) -> Tensor:
    """How much of the answer's probability goes when a square of the image is covered (Zeiler and Fergus 2014).

    Args:
        model: Maps images to probabilities.
        image: [1, H, W].

    Returns:
        [H / STEP, W / STEP], for squares around pixels that are ``STEP`` apart: below zero where covering them makes the
        answer more probable.
    """
    height, width = image.shape[1:]
    rows, columns = torch.arange(0, height, STEP), torch.arange(0, width, STEP)
    near_rows = (torch.arange(height) - rows[:, None] - STEP // 2).abs() <= PATCH // 2  # [H / STEP, H]
    near_columns = (torch.arange(width) - columns[:, None] - STEP // 2).abs() <= PATCH // 2
    covered = near_rows[:, None, :, None] & near_columns[None, :, None, :]
    with torch.inference_mode():
        before = model(image[None])[0]
        after = model(image.masked_fill(covered.flatten(0, 1)[:, None], 0.0))
    return (before.max() - after[:, before.argmax()]).unflatten(0, (len(rows), len(columns)))
