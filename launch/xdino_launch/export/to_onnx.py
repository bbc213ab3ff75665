"""A backbone as an ONNX graph, checked with onnxruntime before the file gets its name.

An XCiT takes any batch and any image size: the stem's grid and the Fourier positional encoding are
computed inside the graph from the size of what comes in. Other networks are written for their own
input size and any batch, for their position tables are resampled outside of what ONNX describes.

Needs the packages of the extra `onnx`; nothing here imports them before they are used.
"""

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xdino import xcit
from xdino.backbone import Spec
from xdino.errors import RunFailed, UsageError
from xdino.runtime.atomic import written_beside

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 18
TOLERANCE = 1e-4  # of the largest feature, or of 1 where all are smaller
BATCHES = (1, 3)


def require() -> None:
    """Raises UsageError where the packages of the extra `onnx` are not installed."""
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        raise UsageError(
            f"--format onnx needs {', '.join(absent)}: install them with pip install 'xdino[onnx]'"
        )


def write(
    backbone: nn.Module,
    spec: Spec,
    path: Path,
    about: Mapping[str, str],
    say: Callable[[str], None] = lambda sentence: None,
    output: str = "features",
) -> None:
    """Write `images` [batch, channels, height, width] -> `features` [batch, embed_dim], float32.

    Args:
        backbone: or a classifier, with `output` "logits" [batch, classes].
        about: what the file says of itself (metadata_props).
        say: told the largest difference at each size that was checked.

    Raises:
        RunFailed: torch cannot translate the network, or the graph computes something else.
    """
    any_size = _xcit_in(backbone) is not None
    size = spec.input_size
    # Unequal sides and a batch of two, so that no dimension is taken for another or for a constant.
    example = (size, size // 2 * 3) if any_size else (size, size)
    dims: dict[int, Any] = {0: "batch"} | ({2: "height", 3: "width"} if any_size else {})
    with _quiet():
        try:
            program = torch.onnx.export(
                backbone,
                (torch.randn(2, spec.in_chans, *example),),
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=[output],
                dynamic_shapes=(dims,),
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            first = str(error).strip().splitlines()[0]
            raise RunFailed(f"torch cannot write {spec.arch} as ONNX: {first}") from None
    assert program is not None
    sizes = "any" if any_size else f"{size} x {size}"
    program.model.metadata_props.update({**about, "image_size": sizes})
    with written_beside(path) as beside:
        program.save(beside, external_data=False)
        for where, difference in check(backbone, spec, beside):
            say(f"onnxruntime against torch, {where}: largest difference {difference:.1e}")


def _xcit_in(network: nn.Module) -> xcit.XCiT | None:
    """The XCiT that a network is, or that a classifier has below its head."""
    inner = getattr(network, "backbone", network)
    return inner if isinstance(inner, xcit.XCiT) else None


def check(backbone: nn.Module, spec: Spec, path: Path) -> Iterator[tuple[str, float]]:
    """The largest absolute difference of features, onnxruntime's from torch's, size by size.

    Raises:
        RunFailed: one is above `TOLERANCE`.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    side = spec.input_size
    sizes = [(side, side)]
    network = _xcit_in(backbone)
    if network is not None:
        patch = network.patch_size
        # Another shape of image, and one whose sides are no multiples of the patch.
        sizes += [(side - patch, side + 2 * patch), (max(side // 2, patch) + 5, side + 3)]
    generator = torch.Generator().manual_seed(0)
    for height, width in sizes:
        for batch in BATCHES:
            images = torch.randn(batch, spec.in_chans, height, width, generator=generator)
            with torch.no_grad():
                ours = backbone(images)
            theirs = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
            difference = (theirs - ours).abs().max().item()
            where = f"batch {batch} of {height} x {width}"
            if not difference <= TOLERANCE * max(1.0, ours.abs().max().item()):
                raise RunFailed(
                    f"the ONNX graph differs from {spec.arch} by {difference} ({where})"
                )
            yield where, difference


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's progress on standard output, which carries results."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
