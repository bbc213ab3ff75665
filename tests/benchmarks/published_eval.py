"""Top-1 and top-5 of the published `main.py --eval` and of `xdino score`, of the same files.

    python tests/benchmarks/published_eval.py XCIT_DIR [--arch xcit_nano_12_p16 ...] [--images 200]

XCIT_DIR is a checkout of facebookresearch/xcit. A network of theirs with random weights is saved as
their classification files are, `{"model": ...}`; images of the packaged Fashion-MNIST sample are
written, enlarged to odd sizes, to class folders. Both sides evaluate: by the full crop and by 256/224,
with ImageNet's 1,000 outputs on folders that are called by its first ten synsets, and with the 196 of
the cars on train/ and test/ folders that are called otherwise. Where a class has images to learn from,
its row of the head is the direction of their mean feature, so that some answers are right. Printed:
their numbers and ours; they must be equal to the digit that theirs prints.

What their code needs here, and nothing else of it changes: `timm.models.registry` and
`timm.models.layers` are stood in for (timm moved them), and `create_model` finds their network by its
name. It runs in a process of its own, on the CPU.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo

from xdino import checkpoint, data
from xdino_eval.features import extract
from xdino_transfer.classification.scoring import published_transform

GARMENTS = 10


def main() -> int:
    if sys.argv[1:2] == ["--theirs"]:
        return theirs(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("xcit")
    parser.add_argument("--arch", nargs="+", default=["xcit_nano_12_p16", "xcit_tiny_12_p16"])
    parser.add_argument("--images", type=int, default=200, help="images that are scored")
    options = parser.parse_args()
    equal = True
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        synsets = list(ImageNetInfo().label_names())[:GARMENTS]
        write_images(root / "IMNET", ("train", "val"), synsets, options.images)
        cars = [f"car {number:03}" for number in range(196)]
        write_images(root / "CARS", ("train", "test"), cars, max(options.images, 196))
        for arch in options.arch:
            for name, classes in (("IMNET", 1000), ("CARS", 196)):
                weights = root / f"{arch}_{name}.pth"
                save(options.xcit, arch, classes, root / name, weights)
                equal &= compare(options.xcit, arch, root / name, weights)
    return 0 if equal else 1


def write_images(root: Path, splits: tuple[str, str], classes: list[str], count: int) -> None:
    """PNG files of odd sizes; garment g lies in a folder whose number is g, modulo ten."""
    generator = np.random.default_rng(0)
    sources = data.open_splits("fashion_mnist_sample", 3)
    for split, source in zip(splits, sources, strict=True):
        labels = np.asarray(source.labels)
        for number in range(count):
            folder = classes[number % len(classes)]
            places = np.flatnonzero(labels == number % GARMENTS)
            image = Image.fromarray(source.read(int(places[number // GARMENTS % len(places)])))
            path = root / split / folder / f"{number:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.resize(tuple(generator.integers(40, 300, 2))).save(path)


def save(xcit: str, arch: str, classes: int, images: Path, path: Path) -> None:
    """A file as they publish them, its head a little better than chance."""
    torch.manual_seed(0)
    network = networks(xcit)[arch](pretrained=False, num_classes=classes)
    state = network.state_dict()
    for name, value in state.items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif value.is_floating_point():
            value.add_(torch.randn(value.shape) * 0.02)
    torch.save({"model": state}, path)
    backbone = checkpoint.load_backbone(path)
    source = data.open_source(str(images), "train", 3, labelled=True)
    found = extract(backbone, source, published_transform(backbone.spec))
    assert found.labels is not None
    centre = found.features.mean(0)
    rows = torch.randn(state["head.weight"].shape) * 0.3 / centre.numel() ** 0.5
    for label in found.labels.unique().tolist():
        mean = found.features[found.labels == label].mean(0) - centre
        rows[label] = mean / mean.norm()
    rows *= 10 / (found.features - centre).norm(dim=1).mean()
    state["head.weight"].copy_(rows)
    state["head.bias"].copy_(-rows @ centre)
    torch.save({"model": state}, path)


def compare(xcit: str, arch: str, images: Path, weights: Path) -> bool:
    """Print what both sides say of one file on one set; whether it is the same."""
    agree = True
    for full_crop in (True, False):
        crop = ["--full_crop"] if full_crop else []
        options = ("--eval", "--model", arch, "--pretrained", str(weights), "--device", "cpu",
                   "--data-set", images.name, "--data-path", str(images), "--num_workers", "0",
                   "--no-model-ema", "--output_dir", str(images), *crop)  # fmt: skip
        told = run(sys.executable, __file__, "--theirs", xcit, *options)
        published = re.findall(r"Acc@1 ([\d.]+) Acc@5 ([\d.]+)", told)[-1]
        ratio = "1" if full_crop else "0.875"
        line = (sys.executable, "-m", "xdino_launch", "score", str(weights), "--data", str(images),
                "--device", "cpu", "--crop-ratio", ratio, "--json")  # fmt: skip
        (row,) = json.loads(run(*line))
        ours = f"{row['top1']:.3f}", f"{row['top5']:.3f}"
        agree &= ours == published
        print(
            f"{arch} {images.name} {'full crop' if full_crop else '256/224'}: published "
            f"{published}, xdino {ours} of {row['val_size']} images, labels "
            f"{row['settings']['labels']}: {'equal' if ours == published else 'DIFFERENT'}",
            flush=True,
        )
    return agree


def theirs(xcit: str, arguments: list[str]) -> int:
    """Their main.py, as `python main.py ARGUMENTS` runs it."""
    known = networks(xcit)
    import main as published  # type: ignore[import-not-found]

    def create_model(name: str, pretrained: bool, num_classes: int, **options: Any) -> Any:
        options.pop("drop_block_rate", None)
        return known[name](pretrained=pretrained, num_classes=num_classes, **options)

    published.create_model = create_model
    parser = argparse.ArgumentParser(parents=[published.get_args_parser()])
    published.main(parser.parse_args(arguments))
    return 0


def networks(xcit: str) -> dict[str, Callable[..., Any]]:
    """The networks of a checkout by their names."""
    found: dict[str, Callable[..., Any]] = {}

    def register_model(build: Callable[..., Any]) -> Callable[..., Any]:
        found[build.__name__] = build
        return build

    registry = ModuleType("timm.models.registry")
    registry.register_model = register_model  # type: ignore[attr-defined]
    sys.modules["timm.models.registry"] = registry
    sys.modules["timm.models.layers"] = timm.layers
    sys.modules.pop("xcit", None)
    # Before this script's folder, whose files may be called as theirs are.
    sys.path.insert(0, str(Path(xcit).resolve()))
    sys.dont_write_bytecode = True
    import xcit as module  # type: ignore[import-not-found]  # noqa: F401

    return found


def run(*command: str) -> str:
    """Standard output of one command."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
