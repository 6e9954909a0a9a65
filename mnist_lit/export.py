"""``python -m mnist_lit.export``: export a trained model to ONNX, torch.export or safetensors."""

import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnist_lit import UserError, __version__, require_packages
from mnist_lit.cli import latest
from mnist_lit.cli.data_of_run import with_data_of_run
from mnist_lit.cli.launch import launch, loading
from mnist_lit.storage.atomic import atomic_path, require_free
from mnist_lit.storage.provenance import facts_of, why_not_to_test
from mnist_lit.storage.tables import one_line

if TYPE_CHECKING:
    from torch import Tensor

    from mnist_lit.inference.trained import TrainedModel

    Model = Callable[[Tensor], Tensor]  # from images float32 [N, C, H, W] to probabilities [N, classes]

TOLERANCE = 1e-5  # largest absolute difference allowed between the probabilities of the file and of the model
BATCH_SIZES = (1, 7)  # compared in addition to batches of 500, since the batch size is dynamic


def export(
    output: str | Path,
    ckpt: str | Path = "latest",
    data: dict[str, Any] | None = None,
    overwrite: bool = False,
    trust: Iterable[str] = (),
) -> dict[str, str]:
    """Export a trained model and verify the file against it on all test images.

    Args:
        output: Its suffix selects the format. ``.onnx``: a graph of standard operators with the input ``image``,
            float32 [N, 1, 28, 28] from 0 to 1 (or whatever ``data`` has), and the output ``probabilities``, float32
            [N, 10], for any N. ``.pt2``: the same as a torch.export program. ``.safetensors``: the weights of the network,
            whose logits become the probabilities by softmax once they are divided by the ``temperature`` in its metadata.
        data: The data module's class (``_target_``) and arguments. Without ``_target_``, the data are those of the
            checkpoint's run, but for the keys given; without ``dir``, they are looked for where the run had them.
        trust: Packages whose classes the checkpoint and its run may name, besides this project's.

    Returns:
        The metadata in the file: ``version``, ``network``, ``trained_on``, ``temperature``, ``tested_on`` and
        ``test_accuracy``.

    Raises:
        UserError: The file cannot be written, a package is missing, the checkpoint or the data cannot be loaded, or the
            predictions of the exported model differ; in no case is a file left behind.
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

    model = load(latest.resolve(ckpt), trust)
    with loading("torchvision and Lightning"):
        import lightning as L

        from mnist_lit.build import instantiate

    data = with_data_of_run(data or {}, model.path, trust)
    datamodule: Any = instantiate("data", data, L.LightningDataModule)
    datamodule.prepare_data()
    datamodule.setup("test")
    images, labels = (torch.cat(each) for each in zip(*datamodule.test_dataloader(), strict=True))
    name = facts_of(datamodule)["name"]
    with torch.inference_mode():
        try:
            expected = torch.cat([model(batch) for batch in images.split(500)])
        except Exception as error:
            where = f"images [N, {', '.join(map(str, images.shape[1:]))}] of {name}"
            raise UserError(
                f"{model.path} is a model for other data: its network takes no {where} ({one_line(error)})"
            ) from error
    reason = why_not_to_test(model.trained_on, facts_of(datamodule))
    metadata = {
        "version": f"mnist_lit {__version__}",
        "network": json.dumps(model.description),
        "trained_on": json.dumps(model.trained_on),
        "temperature": str(model.temperature),
        "tested_on": "" if reason else name,
        "test_accuracy": "" if reason else f"{(expected.argmax(1) == labels).double().mean():.4f}",
    }
    with atomic_path(path) as temporary:
        _require_same_predictions(write(model, images[:2], temporary, metadata), images, expected)
    print(f"{output}: written; its predictions for {len(images):,} test images match those of {model.path}")
    if reason:
        print(f"test accuracy not measured: {reason}", file=sys.stderr)
    return metadata


def _write_onnx(model: "TrainedModel", images: "Tensor", path: Path, metadata: dict[str, str]) -> "Model":
    import onnxruntime
    import torch

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    names: dict[str, Any] = {"input_names": ["image"], "output_names": ["probabilities"], "verbose": False}
    program: Any = torch.onnx.export(_program(model, images), **names, dynamic_shapes={"images": {0: "N"}})
    if domains := {node.domain for node in program.model.graph} - {""}:
        raise UserError(f"the network needs non-standard ONNX operators, from {', '.join(domains)}")
    program.model.metadata_props.update(metadata)
    program.save(path)
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["probabilities"], {"image": images.numpy()})[0])


def _write_pt2(model: "TrainedModel", images: "Tensor", path: Path, metadata: dict[str, str]) -> "Model":
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No complete tensor found")  # about weights that share memory
        torch.export.save(_program(model, images), path, extra_files={"mnist_lit.json": json.dumps(metadata)})
    return torch.export.load(path).module()


def _program(model: "TrainedModel", images: "Tensor") -> Any:
    """The model as a torch.export program with a dynamic batch size and without stack traces, which name local files."""
    import torch

    batch = {"images": {0: torch.export.Dim("N")}}
    try:
        program = torch.export.export(model, (torch.zeros_like(images),), dynamic_shapes=batch)
    except Exception as error:  # a user-defined network can fail in any way
        raise UserError(f"the network cannot be exported: {type(error).__name__}: {one_line(error, 300)}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def _write_safetensors(model: "TrainedModel", images: "Tensor", path: Path, metadata: dict[str, str]) -> "Model":
    from safetensors.torch import load_model, save_model
    from torch import nn

    from mnist_lit.build import build

    save_model(model.network, str(path), metadata)  # writes weights that layers share once
    network = build("model", model.description, nn.Module).eval()
    load_model(network, path)
    return lambda images: (network(images) / model.temperature).softmax(dim=1)


# By suffix: a function that writes the file and returns what reads it back, from images to probabilities; and the packages
# that it needs.
WRITERS: dict[str, tuple[Callable[..., "Model"], tuple[str, ...]]] = {
    ".onnx": (_write_onnx, ("onnx", "onnxscript", "onnxruntime")),
    ".pt2": (_write_pt2, ()),
    ".safetensors": (_write_safetensors, ("safetensors",)),
}


def _require_same_predictions(exported: "Model", images: "Tensor", expected: "Tensor") -> None:
    """Raise a UserError if a predicted class differs, or a probability by more than ``TOLERANCE``."""
    import torch

    for size in (*BATCH_SIZES, len(images)):
        with torch.inference_mode():
            found = torch.cat([exported(batch) for batch in images[:size].split(500)])
        difference = float((found - expected[:size]).abs().max())
        others = int((found.argmax(1) != expected[:size].argmax(1)).sum())
        if not difference <= TOLERANCE or others:  # "not <=" also catches NaN
            raise UserError(
                f"the exported model differs from the original: of {size:,} test images it predicts another class for "
                f"{others:,}, and its probabilities differ by up to {difference:.2g}, where {TOLERANCE:g} is allowed; "
                "nothing was written"
            )


def main() -> None:
    launch("export", export)


if __name__ == "__main__":
    main()
