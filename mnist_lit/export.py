"""``python -m mnist_lit.export``: a trained model for other programs, as ONNX, torch.export or safetensors."""

import json
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mnist_lit import UserError, __version__, require_packages
from mnist_lit.cli import latest
from mnist_lit.cli.launch import launch, loading
from mnist_lit.storage.atomic import atomic_path, require_free

if TYPE_CHECKING:
    from mnist_lit.inference.trained import TrainedModel

TOLERANCE = 1e-5  # how far the probabilities of the file and of the model may lie apart
SIZES = (1, 7)  # of the batches besides that of all test images: any size must do

Answers = Callable[[np.ndarray], np.ndarray]  # probabilities [N, 10] of images float32 [N, 1, 28, 28]


def export(
    output: str | Path, ckpt: str | Path = "latest", data: dict[str, Any] | None = None, overwrite: bool = False
) -> dict[str, str]:
    """Write a trained model as ``output``, once the file has given the model's own answers to all test images.

    Args:
        output: ``.onnx``: a graph of standard operators with the input ``image``, float32 [N, 1, 28, 28] from 0 to 1,
            and the output ``probabilities``, float32 [N, 10], for any N. ``.pt2``: the same as a program of
            torch.export. ``.safetensors``: the network's weights.
        data: Arguments of ``MNISTDataModule``.

    Returns:
        What the file says of itself: ``version``, ``network``, ``trained_on``, ``tested_on``, ``test_accuracy``.

    Raises:
        UserError: The file would be in the way, a package is missing, the checkpoint or the data do not allow it, or the
            file answers otherwise than the model; then there is none.
    """
    path = Path(output)
    if path.suffix not in WRITERS:
        raise UserError(f"output={output}: must end in {', '.join(WRITERS)}")
    require_free("output", path, overwrite)
    write, packages = WRITERS[path.suffix]
    require_packages(f"output={output}", *packages)
    with loading("PyTorch"):
        import torch

        from mnist_lit.inference.trained import load
        from mnist_lit.storage.provenance import why_not_to_test

    model = load(latest.resolve(ckpt))
    with loading("torchvision and Lightning"):
        from mnist_lit.data import MNISTDataModule, scale

    datamodule = MNISTDataModule(**(data or {}))
    datamodule.prepare_data()
    datamodule.setup()
    images, labels = scale(datamodule.test_images), datamodule.test_labels.numpy()
    with torch.inference_mode():
        expected = np.concatenate([model(batch).numpy() for batch in images.split(500)])
    reason = why_not_to_test(model.trained_on, datamodule.facts["name"])
    facts = {
        "version": f"mnist_lit {__version__}",
        "network": json.dumps(model.description),
        "trained_on": json.dumps(model.trained_on),
        "tested_on": "" if reason else datamodule.facts["name"],
        "test_accuracy": "" if reason else f"{(expected.argmax(1) == labels).mean():.4f}",
    }
    with atomic_path(path) as temporary:
        answers = write(model, temporary, facts)
        _require_same_answers(answers, images.numpy(), expected)
    print(f"{output}: written, and gives the same {len(images):,} answers as {model.path}")
    if reason:
        print(f"its accuracy is not measured: {reason}", file=sys.stderr)
    return facts


def _write_onnx(model: "TrainedModel", path: Path, facts: dict[str, str]) -> Answers:
    import onnxruntime
    import torch

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    names: dict[str, Any] = {"input_names": ["image"], "output_names": ["probabilities"], "verbose": False}
    program: Any = torch.onnx.export(_program(model), **names, dynamic_shapes={"images": {0: "N"}})
    if others := {node.domain for node in program.model.graph} - {""}:
        raise UserError(f"the network needs operators that are not of ONNX's standard: {', '.join(others)}")
    program.model.metadata_props.update(facts)
    program.save(path)
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda images: np.asarray(session.run(["probabilities"], {"image": images})[0])


def _write_pt2(model: "TrainedModel", path: Path, facts: dict[str, str]) -> Answers:
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No complete tensor found")  # of weights that share their memory
        torch.export.save(_program(model), path, extra_files={"mnist_lit.json": json.dumps(facts)})
    loaded: Any = torch.export.load(path).module()

    def answers(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(loaded(torch.from_numpy(images)).numpy())

    return answers


def _program(model: "TrainedModel") -> Any:
    """The model as torch.export sees it, for batches of any size, without the places in this machine's files."""
    import torch

    batch = {"images": {0: torch.export.Dim("N")}}
    try:
        program = torch.export.export(model, (torch.zeros(2, 1, 28, 28),), dynamic_shapes=batch)
    except Exception as error:  # whatever a network of somebody's own may run into
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the network cannot be exported: {type(error).__name__}: {reason}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def _write_safetensors(model: "TrainedModel", path: Path, facts: dict[str, str]) -> Answers:
    import torch
    from safetensors.torch import load_file, save_file

    from mnist_lit.build import build

    weights = {key: value.contiguous() for key, value in model.network.state_dict().items()}
    save_file(weights, path, metadata=facts)
    loaded = build("model", model.description, torch.nn.Module).eval()
    loaded.load_state_dict(load_file(path))

    def answers(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return loaded(torch.from_numpy(images)).softmax(dim=1).numpy()

    return answers


# How each ending is written, and the packages that this takes.
WRITERS: dict[str, tuple[Callable[..., Answers], tuple[str, ...]]] = {
    ".onnx": (_write_onnx, ("onnx", "onnxscript", "onnxruntime")),
    ".pt2": (_write_pt2, ()),
    ".safetensors": (_write_safetensors, ("safetensors",)),
}


def _require_same_answers(answers: Answers, images: np.ndarray, expected: np.ndarray) -> None:
    """
    Raises:
        UserError: To one image the file gives another digit, or a probability that is not the same to ``TOLERANCE``.
    """
    for size in (*SIZES, len(images)):
        batches = [images[:size]] if size < len(images) else np.split(images, range(500, len(images), 500))
        found = np.concatenate([answers(batch) for batch in batches])
        difference = float(np.abs(found - expected[:size]).max())
        others = int((found.argmax(1) != expected[:size].argmax(1)).sum())
        if not difference <= TOLERANCE or others:
            raise UserError(
                f"the exported model is another one: of {size:,} test images it takes {others:,} for another digit, and "
                f"its probabilities differ by up to {difference:.2g} instead of {TOLERANCE:g}; nothing was written"
            )


def main() -> None:
    launch("export", export)


if __name__ == "__main__":
    main()
