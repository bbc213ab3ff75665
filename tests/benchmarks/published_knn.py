"""k-NN of the published code and of `xdino knn`, on one folder of images with the same weights.

    python tests/benchmarks/published_knn.py DINO_DIR XCIT_DIR [--arch xcit_small_12_p16 ...]

DINO_DIR and XCIT_DIR are checkouts of facebookresearch/dino and facebookresearch/xcit. A random
network of theirs is saved as they save it (S12/16 as the teacher of a DINO checkpoint, the others as
classification weights with a class head), images of the packaged Fashion-MNIST sample are written to
class folders, and both sides extract features (shorter side 256, crop 224) and vote. Printed: the
largest difference of features relative to the largest, and top-1 and top-5 for each k.

The network is random, and its features would be so alike that votes tie: they are centred through
the bias of its last norm. Centring makes them small, not their rounding: the difference is held
against the largest feature before it (1e-5), and printed against the centred ones too. The published
vote runs with the data's number of classes. Where fewer than five classes get a vote, its fifth
prediction is an unstable sort's; how many queries that concerns is printed ("sparse"), and in rows
without any the figures must be equal to the digit. It cannot take k above the number of images.

What their code needs on one CPU process is named in `xdino_launch.bench.reference`; besides,
`Tensor.cuda` is the identity here while their extraction runs.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms

from xdino import data
from xdino_launch.bench.reference import Dino, build_xcit, group_of_one, load_dino, load_xcit

KS = (10, 20, 50, 100)
TEMPERATURE = 0.07
TOLERANCE = 1e-5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dino")
    parser.add_argument("xcit")
    parser.add_argument("--arch", nargs="+", default=["xcit_small_12_p16", "xcit_nano_12_p8"])
    parser.add_argument("--train", type=int, default=150, help="images that vote")
    parser.add_argument("--val", type=int, default=100, help="queries; theirs needs 100")
    options = parser.parse_args()
    dino, xcit = load_dino(options.dino), load_xcit(options.xcit)
    equal = True
    with tempfile.TemporaryDirectory() as folder, group_of_one(torch.device("cpu")):
        images = Path(folder) / "images"
        for split, count in (("train", options.train), ("val", options.val)):
            write_images(images / split, split, count)
        for arch in options.arch:
            equal &= compare(dino, xcit, arch, images, Path(folder))
    return 0 if equal else 1


def write_images(folder: Path, split: str, count: int) -> None:
    """The first `count` images of the sample's split as PNG files in class folders."""
    splits = dict(zip(("train", "val"), data.open_splits("fashion_mnist_sample", 1), strict=True))
    source = splits[split]
    labels = np.asarray(source.labels)
    for index in range(count):
        image = source.read(index)[:, :, 0]
        path = folder / f"class_{labels[index]}" / f"{index:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def compare(dino: Dino, xcit: Any, arch: str, images: Path, folder: Path) -> bool:
    """Print one network's comparison; whether features and figures agree."""
    torch.manual_seed(0)
    network = trained_looking(build_xcit(xcit, arch)).eval()
    weights = folder / f"{arch}.pth"
    with theirs_on_cpu():
        plain, _ = published_features(dino, network, images / "train")
        with torch.no_grad():
            network.norm.bias.sub_(plain.mean(0))  # type: ignore[union-attr, operator]
        theirs = {split: published_features(dino, network, images / split) for split in _SPLITS}
    save(network, weights, arch)

    ours_file, cache = folder / f"{arch}.safetensors", folder / f"{arch}_cache"
    ks = ",".join(str(k) for k in KS if k <= len(plain))
    common = (str(weights), "--data", str(images), "--device", "cpu", "--cache", str(cache))
    rows = json.loads(xdino("knn", *common, "--json", "--k", ks))
    xdino("features", *common, "--out", str(ours_file))
    ours = load_file(ours_file)

    agree = True
    for split, (features, labels) in theirs.items():
        difference = (ours[f"{split}_features"] - features).abs().max()
        error, centred = difference / plain.abs().max(), difference / features.abs().max()
        same = torch.equal(ours[f"{split}_labels"], labels)
        agree &= bool(error <= TOLERANCE) and same
        print(
            f"{arch} {split}: features differ by {error:.1e} of the largest, by {centred:.1e} of "
            f"the largest once centred; labels {'equal' if same else 'DIFFERENT'}",
            flush=True,
        )
    return agree & votes(dino, arch, theirs, rows)


def votes(dino: Dino, arch: str, theirs: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    """Print top-1 and top-5 of both sides for each k; whether they agree where they must."""
    bank, bank_labels = nn.functional.normalize(theirs["train"][0]), theirs["train"][1]
    queries, labels = nn.functional.normalize(theirs["val"][0]), theirs["val"][1]
    classes = int(bank_labels.max()) + 1
    agree = True
    for row in rows:
        k = row["settings"]["k"]
        published = dino.knn.knn_classifier(
            bank, bank_labels, queries, labels, k, TEMPERATURE, num_classes=classes
        )
        nearest = bank_labels[(queries @ bank.T).topk(k).indices]
        sparse = sum(len(set(line)) < 5 for line in nearest.tolist())
        same = published == (row["top1"], row["top5"])
        agree &= same or sparse > 0
        print(
            f"{arch} k={k}: published {published}, xdino {(row['top1'], row['top5'])}, "
            f"{'equal' if same else 'DIFFERENT'}, {sparse} of {len(labels)} queries sparse",
            flush=True,
        )
    return agree


def trained_looking(network: nn.Module) -> nn.Module:
    """Every parameter and statistic moved off its initial value, where mistakes would hide."""
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2)
            elif value.is_floating_point():
                value.add_(torch.randn(value.shape) * 0.02)
    return network


def save(network: nn.Module, path: Path, arch: str) -> None:
    """The weights in one of the published layouts."""
    state = {k: v for k, v in network.state_dict().items() if not k.startswith("head.")}
    if arch == "xcit_small_12_p16":
        args = argparse.Namespace(arch=arch, patch_size=16, lr=np.float64(5e-4))
        teacher = {f"module.backbone.{name}": value for name, value in state.items()}
        torch.save({"teacher": teacher, "epoch": 300, "args": args}, path)
    else:
        head = {"head.weight": torch.zeros(1000, 1), "head.bias": torch.zeros(1000)}
        torch.save({"model": {**state, **head}}, path)


_SPLITS = ("train", "val")


@contextlib.contextmanager
def theirs_on_cpu() -> Iterator[None]:
    """Their calls of `.cuda()` change nothing, their progress goes to standard error."""
    before = torch.Tensor.cuda
    torch.Tensor.cuda = lambda self, **_: self  # type: ignore[method-assign, assignment]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        torch.Tensor.cuda = before  # type: ignore[method-assign]


def published_features(dino: Dino, network: nn.Module, folder: Path) -> tuple[Tensor, Tensor]:
    """Features [N, D] and labels [N] by the published `extract_features`."""
    network.head = nn.Identity()  # as their `num_classes=0` leaves it
    transform = transforms.Compose(
        [
            transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    images = dino.knn.ReturnIndexDataset(str(folder), transform=transform)
    loader = DataLoader(images, batch_size=25)
    features = dino.knn.extract_features(network, loader, use_cuda=False)
    return features, torch.tensor([label for _, label in images.samples])


def xdino(*arguments: str) -> str:
    """Standard output of one command."""
    command = [sys.executable, "-m", "xdino_launch", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
