"""The published retrieval, copy detection and video segmentation beside ours, on made sets.

    python tests/benchmarks/published_suite.py DINO_DIR [--xcit XCIT_DIR] [--scorer DAVIS_DIR]

DINO_DIR is a checkout of facebookresearch/dino, XCIT_DIR one of facebookresearch/xcit (retrieval is
the one of the three that takes an XCiT there), DAVIS_DIR one of
davisvideochallenge/davis2017-evaluation. Their scripts run whole and unchanged, as `__main__`, in
processes of their own, on the CPU; what that needs is replaced from outside, in `shims`. OpenCV
(`cv2`) must be importable for the video scripts. Both sides get one vit_tiny/16 with the same
weights: random, spread out so that patches differ, the last norm's bias centring the features; so does
xcit_nano_12_p16.
Nothing here measures time.
"""

import argparse
import contextlib
import io
import json
import os
import pickle
import re
import runpy
import subprocess
import sys
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

SEED = 0


# --- the published side -----------------------------------------------------------------------


def shims(dino: Path, xcit: Path | None) -> None:
    """One process, no GPU, no network, and the names that newer libraries dropped."""
    if xcit is not None:
        from xdino_launch.bench.reference import load_xcit

        published = load_xcit(xcit)
        torch.hub.load = lambda _, arch, **how: getattr(published, arch)(**how)
    sys.path.insert(0, str(dino))
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    np.in1d = np.isin  # type: ignore[attr-defined]
    Image.ANTIALIAS = Image.Resampling.LANCZOS  # type: ignore[attr-defined]

    import urllib.request

    from xdino_eval.suite.davis_dataset import pascal_palette

    colours = np.array(pascal_palette()).reshape(-1, 3)
    lines = [f"{r} {g} {b}\n".encode() for r, g, b in colours]
    urllib.request.urlopen = lambda *_, **__: lines  # type: ignore[assignment]

    import utils

    def alone(_: object) -> None:
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )

    utils.init_distributed_mode = alone


def run_published(dino: Path, xcit: Path | None, script: str, arguments: list[str]) -> None:
    """Run one published script as it stands; in a process of its own."""
    shims(dino, xcit)
    sys.argv = [script, *arguments]
    runpy.run_path(str(dino / script), run_name="__main__")


def run_scorer(folder: Path, data: Path, masks: Path) -> None:
    """The official measures of written masks, as JSON."""
    sys.path.insert(0, str(folder))
    # scikit-image gives only the disk: the pixels whose centres are not farther than the radius.
    morphology = types.ModuleType("skimage.morphology")

    def disk(radius: float) -> np.ndarray:
        along = np.arange(-radius, radius + 1)
        return (along[:, None] ** 2 + along**2 <= radius**2).astype(np.uint8)

    morphology.disk = disk  # type: ignore[attr-defined]
    sys.modules["skimage"] = types.ModuleType("skimage")
    sys.modules["skimage.morphology"] = morphology
    from davis2017.evaluation import DAVISEvaluation

    with contextlib.redirect_stdout(io.StringIO()):
        found = DAVISEvaluation(str(data), "semi-supervised", "val").evaluate(str(masks))
    out = {
        f"{name} {word}": 100 * float(np.mean(found[name][letter]))
        for name in "JF"
        for letter, word in (("M", "mean"), ("R", "recall"), ("D", "decay"))
    }
    print(json.dumps(out))


# --- made sets --------------------------------------------------------------------------------


def texture(rng: np.random.Generator, height: int, width: int, cells: int = 6) -> np.ndarray:
    """uint8 [H, W, 3]: coloured cells, smoothly joined."""
    small = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def noisy(rng: np.random.Generator, image: np.ndarray, level: float) -> np.ndarray:
    return np.clip(image + rng.normal(0, level, image.shape), 0, 255).astype(np.uint8)


def save(path: Path, image: np.ndarray, quality: int = 95) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, quality=quality)


def make_retrieval(root: Path, rng: np.random.Generator) -> None:
    """12 scenes; of each three noisy versions of growing difficulty, and a query."""
    scenes = [texture(rng, *rng.integers(150, 400, 2)) for _ in range(12)]
    images, queries, entries = [], [], []
    for number, scene in enumerate(scenes):
        start = len(images)
        for level in (30, 70, 110, 60):
            images.append(noisy(rng, scene, level))
        queries.append(noisy(rng, scene, 50))
        kinds = {"easy": [start], "hard": [start + 1, start + 2], "junk": [start + 3]}
        if number == 3:
            kinds["easy"] = []
        height, width = scene.shape[:2]
        box = [0.1 * width, 0.1 * height, 0.9 * width, 0.9 * height]
        entries.append({"bbx": box, **{k: np.array(v, dtype=np.int64) for k, v in kinds.items()}})
    folder = root / "roxford5k"
    for kind, pictures in (("db", images), ("query", queries)):
        for number, picture in enumerate(pictures):
            save(folder / "jpg" / f"{kind}_{number:03}.jpg", picture)
    truth = {
        "imlist": [f"db_{i:03}" for i in range(len(images))],
        "qimlist": [f"query_{i:03}" for i in range(len(queries))],
        "gnd": entries,
    }
    (folder / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(truth))


def make_copydays(root: Path, rng: np.random.Generator) -> None:
    """157 originals, 229 strong copies and 18 blocks of weaker ones: what the script counts on."""
    originals = [texture(rng, 48, 64, 4) for _ in range(157)]
    data = root / "copydays"
    weak = [("jpegqual", q) for q in (3, 5, 8, 10, 15, 20, 30, 50, 75)]
    weak += [("crops", share) for share in (10, 15, 20, 30, 40, 50, 60, 70, 80)]
    for number, image in enumerate(originals):
        name = f"{2000 + number}00.jpg"
        save(data / "original" / name, image)
        for kind, amount in weak:
            edge = 48 * amount // 250 if kind == "crops" else 0
            part = image[edge : 48 - edge, edge : 64 - edge]
            quality = amount if kind == "jpegqual" else 90
            save(data / kind / str(amount) / name, part, quality)
        for copy in range(1 + (number < 229 - 157)):
            strong = noisy(rng, image[::-1] if copy else image, 80)
            save(data / "strong" / f"{2000 + number}{copy + 1:02}.jpg", strong)
    for folder, count in (("distractors", 100), ("whitening", 500)):
        for number in range(count):
            save(root / folder / f"{number:04}.jpg", texture(rng, 48, 64, 4))


def make_davis(root: Path, rng: np.random.Generator) -> None:
    """Two videos of textured squares that move over a texture; one is upright."""
    for name, (height, width), count in (("wide", (120, 160), 5), ("tall", (150, 120), 4)):
        ground = texture(rng, height, width)
        squares = [texture(rng, 40, 40, 3), texture(rng, 30, 30, 3)]
        for frame in range(count):
            image, mask = ground.copy(), np.zeros((height, width), np.uint8)
            for label, square in enumerate(squares, 1):
                side = len(square)
                top, left = 10 + 50 * (label - 1) + 3 * frame, 12 + 40 * (label - 1) + 5 * frame
                image[top : top + side, left : left + side] = square
                mask[top : top + side, left : left + side] = label
            save(root / "JPEGImages/480p" / name / f"{frame:05}.jpg", noisy(rng, image, 4))
            picture = Image.fromarray(mask)
            picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
            path = root / "Annotations/480p" / name / f"{frame:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text("wide\ntall\n")


@dataclass(frozen=True)
class Network:
    """names: the published one and ours. path: of its weights."""

    published: tuple[str, ...]
    ours: str
    path: Path


def spread(model: nn.Module, path: Path) -> None:
    """Save random weights that tell patches and images apart, features about zero."""
    rng = np.random.default_rng(1)
    for name, value in model.eval().named_parameters():
        if value.ndim > 1 and "pos_embed" not in name:
            value.data *= 4
    shown = np.stack([texture(rng, 224, 224) for _ in range(16)])
    images = torch.from_numpy(shown).permute(0, 3, 1, 2).float() / 128 - 1
    with torch.no_grad():
        model.norm.bias -= model(images).mean(0)
    torch.save(model.state_dict(), path)


def make_vit(dino: Path, folder: Path) -> Network:
    sys.path.insert(0, str(dino))
    import vision_transformer

    torch.manual_seed(SEED)
    path = folder / "vit_tiny.pth"
    spread(vision_transformer.vit_tiny(patch_size=16, num_classes=0), path)
    return Network(("--arch", "vit_tiny", "--patch_size", "16"), "vit_tiny_patch16_224.dino", path)


def make_xcit(xcit: Path, folder: Path) -> Network:
    from xdino_launch.bench.reference import load_xcit

    torch.manual_seed(SEED)
    path, name = folder / "xcit_nano.pth", "xcit_nano_12_p16"
    spread(getattr(load_xcit(xcit), name)(num_classes=0), path)
    return Network(("--arch", name), name, path)


# --- side by side -----------------------------------------------------------------------------


def child(*arguments: str | Path) -> str:
    """What a process of this file or of `-m xdino_launch` printed."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


class Sides:
    """Runs both sides, prints figures beside each other, remembers whether all agreed."""

    def __init__(self, dino: Path, xcit: Path | None) -> None:
        self.dino, self.xcit, self.equal = dino, xcit, True

    def published(self, network: Network, script: str, *arguments: str | Path) -> str:
        """What a published script printed."""
        shimmed = [] if self.xcit is None else ["--xcit", self.xcit]
        weights = ("--pretrained_weights", network.path)
        return child(
            __file__, self.dino, *shimmed, "--script", script, *network.published, *weights,
            *arguments,
        )  # fmt: skip

    def ours(self, network: Network, command: str, *arguments: str | Path) -> dict[str, float]:
        """The metrics that `xdino COMMAND` gives."""
        how = ("--arch", network.ours, "--json", *arguments)
        return json.loads(child("-m", "xdino_launch", command, network.path, *how))[0]["metrics"]

    def show(self, name: str, theirs: float, mine: float, decimals: int) -> None:
        same = round(theirs, decimals) == round(mine, decimals)
        self.equal &= same
        verdict = "equal" if same else "DIFFERENT"
        print(f"{name:<46} {theirs:12.{decimals}f} {mine:12.{decimals}f}  {verdict}")


def compare_retrieval(sides: Sides, network: Network, root: Path) -> None:
    for scales in (False, True):
        text = sides.published(
            network, "eval_image_retrieval.py", "--data_path", root, "--multiscale", str(scales),
            "--use_cuda", "false", "--num_workers", "0",
        )  # fmt: skip
        found = sides.ours(
            network, "retrieval", "--data", root, *(["--multiscale"] if scales else [])
        )
        what = f"{network.ours.split('_')[0]} retrieval, {'3 scales' if scales else '1 scale'}"
        medium, hard = re.search(r"mAP M: ([\d.]+), H: ([\d.]+)", text).groups()
        sides.show(f"{what}: mAP medium", float(medium), found["mAP medium"], 2)
        sides.show(f"{what}: mAP hard", float(hard), found["mAP hard"], 2)
        rows = re.search(r"mP@k\[.*?\] M: \[(.*?)\], H: \[(.*?)\]", text).groups()
        for kind, row in zip(("medium", "hard"), rows, strict=True):
            for kappa, value in zip((1, 5, 10), row.split(), strict=True):
                mine = found[f"mP@{kappa} {kind}"]
                sides.show(f"{what}: mP@{kappa} {kind}", float(value), mine, 2)


def compare_copies(sides: Sides, network: Network, root: Path) -> None:
    data, none = root / "copydays", root / "none"
    for white in (False, True):
        distractors, whitening = root / "distractors", root / "whitening"
        text = sides.published(
            network, "eval_copy_detection.py", "--data_path", data, "--imsize", "48",
            "--num_workers", "0", "--use_cuda", "false", "--distractors_path", distractors,
            "--whitening_path", whitening if white else none,
        )  # fmt: skip
        found = sides.ours(
            network, "copydetection", "--data", data, "--size", "48", "--distractors",
            distractors, *(["--whitening", whitening] if white else []),
        )  # fmt: skip
        what = "copies, whitened" if white else "copies"
        for block, value in re.findall(r"eval on (\S+) mAP=([\d.]+)", text):
            sides.show(f"{what}: mAP {block}", float(value), found[f"mAP {block}"] / 100, 3)


def compare_davis(sides: Sides, network: Network, root: Path, scorer: Path | None) -> None:
    theirs, mine = root.parent / "masks_published", root.parent / "masks_ours"
    sides.published(
        network, "eval_video_segmentation.py", "--data_path", root, "--output_dir", theirs
    )
    found = sides.ours(network, "davis", "--data", root, "--out", mine)
    pixels = differing = objects = 0
    for path in sorted(theirs.rglob("*.png")):
        with Image.open(path) as a, Image.open(mine / path.relative_to(theirs)) as b:
            assert a.mode == b.mode == "P", "palette PNGs"
            a_labels, b_labels = np.asarray(a), np.asarray(b)
        pixels += a_labels.size
        differing += int((a_labels != b_labels).sum())
        objects += int((a_labels > 0).sum())
    print(f"davis: {pixels:,} pixels of {len(list(theirs.rglob('*.png')))} masks, "
          f"{objects:,} of them objects; {differing:,} differ")  # fmt: skip
    sides.equal &= differing == 0
    if scorer is not None:
        for name, masks in (("published masks", theirs), ("our masks", mine)):
            official = json.loads(child(__file__, scorer, "--score", root, masks))
            for key, value in official.items():
                sides.show(f"davis, {name}: official {key}", value, found[key], 6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dino", type=Path)
    parser.add_argument("--xcit", type=Path)
    parser.add_argument("--scorer", type=Path)
    parser.add_argument("--keep", type=Path, help="Folder for the made sets; else a temporary one.")
    parser.add_argument("--only", default="retrieval,copies,davis", help="Which of them.")
    parser.add_argument("--script", help=argparse.SUPPRESS)
    parser.add_argument("--score", nargs=2, type=Path, help=argparse.SUPPRESS)
    known, rest = parser.parse_known_args()
    if known.script:
        return run_published(known.dino, known.xcit, known.script, rest)
    if known.score:
        return run_scorer(known.dino, *known.score)
    if rest:
        parser.error(f"unknown: {' '.join(rest)}")
    rng = np.random.default_rng(SEED)
    with contextlib.ExitStack() as stack:
        root = known.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        root.mkdir(parents=True, exist_ok=True)
        vit = make_vit(known.dino, root)
        sides = Sides(known.dino, known.xcit)
        print(f"{'':<46} {'published':>12} {'ours':>12}")
        chosen = known.only.split(",")
        if "retrieval" in chosen:
            make_retrieval(root / "retrieval", rng)
            compare_retrieval(sides, vit, root / "retrieval")
            if known.xcit is not None:
                compare_retrieval(sides, make_xcit(known.xcit, root), root / "retrieval")
        if "copies" in chosen:
            make_copydays(root, rng)
            compare_copies(sides, vit, root)
        if "davis" in chosen:
            make_davis(root / "davis", rng)
            compare_davis(sides, vit, root / "davis", known.scorer)
    print("all equal" if sides.equal else "NOT all equal")
    sys.exit(0 if sides.equal else 1)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
