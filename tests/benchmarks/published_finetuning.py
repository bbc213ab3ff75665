"""Fine-tuning beside the published code on one machine: images a second and core, and steps.

    python tests/benchmarks/published_finetuning.py XCIT_CHECKOUT [--side 224] [--rounds 5]

XCIT_CHECKOUT is a checkout of facebookresearch/xcit, which is read from where it lies. Arms take turns,
with one thread each, and each is there twice (A/A), which says how far two equal arms are apart.

Loader: JPEG files of 500 x 375 pixels, cut from the photographs that scikit-learn ships. Published: timm's
create_transform (RandomResizedCrop, flip, rand-m9-mstd0.5-inc1, normalise, erase) on Pillow's images.
Step: engine.py's without a scaler (float32): mixed batch, soft targets, AdamW, timm's moving average.
"""

import argparse
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import create_transform
from timm.loss import SoftTargetCrossEntropy
from timm.utils import ModelEma

from xdino.backbones import BackboneSpec
from xdino.data import open_source
from xdino_transfer.classification import optim
from xdino_transfer.classification.classifier import Classifier
from xdino_transfer.classification.learner import ClassificationLearner, StepSettings
from xdino_transfer.classification.mixup import Mix, Mixup
from xdino_transfer.classification.views import TrainingView
from xdino_transfer.finetuning.loader import LabelledLoader

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photographs(root: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(picture) for picture in load_sample_images().images]
    for number in range(count):
        picture = pictures[number % len(pictures)]
        left, top = (int(rng.integers(0, side)) for side in (140, 52))
        tile = picture.crop((left, top, left + 500, top + 375))
        folder = root / ("a" if number % 2 else "b")
        folder.mkdir(parents=True, exist_ok=True)
        tile.save(folder / f"{number}.jpg", quality=90)


def loader_arms(root: Path, side: int) -> dict[str, Callable[[], int]]:
    paths = [path.read_bytes() for path in sorted(root.rglob("*.jpg"))]
    published = create_transform(
        side,
        is_training=True,
        color_jitter=0.4,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
    )

    def theirs() -> int:
        for path in paths:
            try:
                published(Image.open(io.BytesIO(path)).convert("RGB"))
            except ValueError:  # posterize at magnitude 10, which today's Pillow refuses
                continue
        return len(paths)

    source = open_source(str(root), "train", 3, labelled=True)
    view = TrainingView(side, MEAN, STD)
    loader = LabelledLoader(source, view, len(paths), seed=0, workers=0)
    number = [0]

    def ours() -> int:
        (batch,) = loader.iterate(number[0], number[0] + 1)
        view.finish(batch.crops, batch.drawn, 0)
        number[0] += 1
        return len(paths)

    return {"ours": ours, "published": theirs, "ours again": ours, "published again": theirs}


def step_arms(checkout: Path, side: int, batch: int) -> dict[str, Callable[[], int]]:
    sys.path.insert(0, str(checkout))
    import xcit  # the published network

    torch.manual_seed(0)
    images, labels = torch.randn(batch, 3, side, side), torch.randint(1000, (batch,))

    def theirs() -> Callable[[], int]:
        network = xcit.xcit_nano_12_p16(drop_path_rate=0.05).train()
        decayed = [p for n, p in network.named_parameters() if p.ndim > 1 and "cls_token" not in n]
        plain = [p for n, p in network.named_parameters() if p.ndim == 1 or "cls_token" in n]
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
        optimiser, average = torch.optim.AdamW(groups, lr=1e-4), ModelEma(network, 0.99996)
        loss = SoftTargetCrossEntropy()
        mixed, targets = Mixup()(images, labels, 1000, Mix(0.7))

        def step() -> int:
            given = network(mixed)
            found = loss(given[0] if isinstance(given, tuple) else given, targets)
            found.item()
            optimiser.zero_grad()
            found.backward()
            optimiser.step()
            average.update(network)
            return batch

        return step

    def ours() -> Callable[[], int]:
        spec = BackboneSpec("xcit_nano_12_p16")
        classifier = Classifier(spec.build(0.05), spec, 1000).train()
        groups = optim.parameter_groups(classifier, 0.05)
        learner = ClassificationLearner(classifier, optim.build("adamw", groups), 0.99996)
        mixed, targets = Mixup()(images, labels, 1000, Mix(0.7))

        def step() -> int:
            learner.step(mixed, targets, StepSettings(1e-4)).item()
            return batch

        return step

    arms: dict[str, Callable[[], int]] = {"ours": ours(), "published": theirs()}
    return arms | {"ours again": ours(), "published again": theirs()}


def race(title: str, arms: dict[str, Callable[[], int]], rounds: int) -> None:
    """Median CPU seconds an image of each arm, in turns; the processor's clock, not the wall's."""
    for arm in arms.values():
        arm()
    spent: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            began = time.process_time()
            count = arm()
            spent[name].append((time.process_time() - began) / count)
    middle = {name: statistics.median(times) for name, times in spent.items()}
    for name, seconds in middle.items():
        print(f"{title}: {name}: {1 / seconds:.1f} images a CPU second")
    print(f"{title}: published / ours {middle['published'] / middle['ours']:.2f}")
    for name in ("ours", "published"):
        print(f"{title}: A/A of {name} {middle[f'{name} again'] / middle[name]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        photographs(Path(folder), 32)
        race("loader", loader_arms(Path(folder), given.side), given.rounds)
    race("step", step_arms(given.checkout, given.side, given.batch), given.rounds)


if __name__ == "__main__":
    main()
