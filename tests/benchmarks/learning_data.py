"""The data sets of the learning board, made from Debian packages: none of them is shipped.

    python tests/benchmarks/learning_data.py fetch PACKAGES
    python tests/benchmarks/learning_data.py tiles OUT --packages PACKAGES [--size 96] [--seed 0]
    python tests/benchmarks/learning_data.py objects OUT --packages PACKAGES [--size 96] [--seed 0]
    python tests/benchmarks/learning_data.py pasted OUT --packages PACKAGES [--size 96] [--seed 0]

`fetch` asks apt for the packages named below and unpacks them into a folder; nothing is installed.
Each other command writes OUT/train and OUT/val, a folder of PNG files for each class, and
OUT/data.json, which says how. The same packages, size and seed give the same pixels.

- `tiles`: a class is a photograph. Its training tiles come from one half of it, its validation tiles
  from the other, so that no pixel is in both. What is common to two tiles of a photograph and in no
  other is light, colour, texture and blur: what a feature keeps that does not mind where a crop was
  taken, and what raw pixels do not show.
- `objects`: a class is a category of tuxpaint-stamps-default. A cut-out fills most of the frame, on a
  plain or softly textured ground. No object is in both splits, so the class has to be learned from
  other objects than those asked for.
- `pasted`: the same objects small, at a random place of a random photograph. A class is an object, in
  both splits; the photographs of the two splits are disjoint. The hard case: nearly all of an image
  is ground that says nothing of the class, and is what two crops of it have in common.

Photographs are chosen by rule (`photographs`): large enough, detailed nearly everywhere (which leaves
out most drawings and gradients), and not the same picture as one chosen before. The stamps are under
the GPL, the wallpapers under various free licences: the packages' copyright files say which.
"""

import json
import math
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import click
import numpy as np
from PIL import Image

WALLPAPERS = (
    "lomiri-wallpapers-16.04",
    "lomiri-wallpapers-20.04",
    "mate-backgrounds",
    "plasma-workspace-wallpapers",
    "ukui-wallpapers",
)
STAMPS = "tuxpaint-stamps-default"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
PHOTOGRAPH = 768  # shorter side in pixels, to which every photograph is shrunk first
SAME_PICTURE = 0.93  # correlation of two thumbnails from which they count as one picture
DETAIL = 1.5  # levels: standard deviation of the grey of a tile, in nine tiles of ten at least
# Categories of stamps that make a class: enough objects, and things rather than signs.
CATEGORIES = {
    "birds": "animals/birds",
    "fish": "animals/fish",
    "insects": "animals/insects",
    "mammals": "animals/mammals",
    "clothes": "clothes",
    "fruit": "food/fruit",
    "vegetables": "food/vegetables",
    "music": "hobbies/music",
    "household": "household",
    "flowers": "plants/flowers",
    "christmas": "seasonal/christmas",
    "halloween": "seasonal/halloween",
    "planets": "space/planets",
    "houses": "town/houses",
    "roadsigns": "town/roadsigns",
    "vehicles": "vehicles",
}


# Packages


def fetch_packages(folder: Path) -> None:
    """Download the packages that are not there yet, and unpack each into a folder of its name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*WALLPAPERS, STAMPS):
        if (folder / name).is_dir():
            continue
        subprocess.run(["apt-get", "download", name], cwd=folder, check=True)
        (archive,) = folder.glob(f"{name}_*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, folder / name], check=True)
        archive.unlink()


def _pictures(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    return sorted(path for path in found if path.is_file() and not path.is_symlink())


# Photographs


def _thumbnail(picture: Image.Image) -> np.ndarray:
    """Grey, 16 x 16, mean 0 and norm 1: float64 [256]."""
    grey = np.asarray(picture.convert("L").resize((16, 16), Image.Resampling.BOX), np.float64)
    grey = grey.ravel() - grey.mean()
    return grey / max(float(np.linalg.norm(grey)), 1e-6)


def _is_detailed(picture: Image.Image) -> bool:
    """Whether nine of ten 96-pixel squares of a grid have some structure."""
    grey = np.asarray(picture.convert("L"), np.float64)
    rows, columns = grey.shape[0] // 96, grey.shape[1] // 96
    squares = grey[: rows * 96, : columns * 96].reshape(rows, 96, columns, 96)
    deviation = squares.std(axis=(1, 3)).ravel()
    return bool(np.quantile(deviation, 0.1) >= DETAIL)


def photographs(packages: Path) -> Iterator[tuple[str, Image.Image]]:
    """(name, RGB picture with its shorter side at `PHOTOGRAPH` pixels), in a fixed order."""
    seen: list[np.ndarray] = []
    for package in WALLPAPERS:
        names: set[str] = set()  # sizes of one picture, upright and lying, have one name
        for path in _pictures(packages / package):
            name = _name(path, packages / package)
            if name in names:
                continue
            with Image.open(path) as opened:
                if min(opened.size) < PHOTOGRAPH:
                    continue
                opened.draft("RGB", (2 * PHOTOGRAPH, 2 * PHOTOGRAPH))  # JPEG: decode it smaller
                picture = opened.convert("RGB")
            scale = PHOTOGRAPH / min(picture.size)
            size = (round(picture.width * scale), round(picture.height * scale))
            picture = picture.resize(size, Image.Resampling.LANCZOS)
            thumbnail = _thumbnail(picture)
            if any(thumbnail @ other > SAME_PICTURE for other in seen):
                continue
            if _is_detailed(picture):
                seen.append(thumbnail)
                names.add(name)
                yield f"{len(seen):03d}-{name}", picture


def _name(path: Path, package: Path) -> str:
    """A folder's name for a picture; Plasma's files are called by their size only."""
    parts = path.relative_to(package).parts
    name = parts[parts.index("contents") - 1] if "contents" in parts else path.stem
    return "".join(c if c.isalnum() else "_" for c in name)[:40]


# Tiles


def _square(
    picture: Image.Image, generator: np.random.Generator, box: tuple[int, int, int, int], size: int
) -> Image.Image:
    """A square of 1 to 2 times `size` pixels, anywhere in `box`, shrunk to `size`."""
    left, top, right, bottom = box
    side = round(size * 2 ** generator.uniform(0, 1))
    side = min(side, right - left, bottom - top)
    x = int(generator.integers(left, right - side + 1))
    y = int(generator.integers(top, bottom - side + 1))
    square = picture.crop((x, y, x + side, y + side))
    return square.resize((size, size), Image.Resampling.LANCZOS)


def make_tiles(
    packages: Path, out: Path, size: int, seed: int, train: int, val: int
) -> dict[str, object]:
    """Write the tiles. Which half is the training half is drawn for each photograph."""
    names = []
    for number, (name, picture) in enumerate(photographs(packages)):
        generator = _generator(seed, 1, number)
        width, height = picture.size
        wide = width >= height
        halves = (
            [(0, 0, width // 2, height), (width // 2, 0, width, height)]
            if wide
            else [(0, 0, width, height // 2), (0, height // 2, width, height)]
        )
        if generator.random() < 0.5:
            halves.reverse()
        for split, count, box in zip(("train", "val"), (train, val), halves, strict=True):
            tiles = (_square(picture, generator, box, size) for _ in range(count))
            _write(out / split / name, tiles)
        names.append(name)
    return {"classes": len(names), "train a class": train, "val a class": val}


# Objects


def _cut_out(path: Path) -> Image.Image | None:
    """An RGBA cut-out at its bounding box; None where it has no ground to be cut from."""
    with Image.open(path) as opened:
        if "A" not in opened.getbands() and "transparency" not in opened.info:
            return None
        picture = opened.convert("RGBA")
    alpha = picture.getchannel("A")
    box = alpha.point(lambda value: 255 * (value > 64)).getbbox()
    if box is None or min(box[2] - box[0], box[3] - box[1]) < 24:
        return None
    share = np.asarray(alpha.crop(box), np.float64).mean() / 255
    return picture.crop(box) if 0.1 < share < 0.98 else None


def cut_outs(packages: Path) -> dict[str, list[tuple[str, Image.Image]]]:
    """(name, cut-out) of each class, in a fixed order."""
    root = packages / STAMPS / "usr/share/tuxpaint/stamps"
    found: dict[str, list[tuple[str, Image.Image]]] = {}
    for category, folder in CATEGORIES.items():
        pairs = ((path.stem, _cut_out(path)) for path in _pictures(root / folder))
        found[category] = [(name, cut) for name, cut in pairs if cut is not None]
    return found


def _ground(generator: np.random.Generator, size: int) -> Image.Image:
    """A plain colour, or two of them in soft clouds."""
    first, second = generator.integers(40, 216, (2, 3)).astype(np.float64)
    if generator.random() < 0.5:
        second = first
    noise = generator.random((6, 6)).astype(np.float32)
    clouds = Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)
    mixture = np.clip(np.asarray(clouds, np.float64), 0, 1)[..., None]
    return Image.fromarray(np.rint(first + (second - first) * mixture).astype(np.uint8))


def _placed(
    ground: Image.Image, cut: Image.Image, generator: np.random.Generator, low: float, high: float
) -> Image.Image:
    """`cut`, turned a little and maybe mirrored, its longer side a share low..high of the ground."""
    size = ground.width
    if generator.random() < 0.5:
        cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    cut.thumbnail((4 * size, 4 * size), Image.Resampling.BOX)  # turning a small one is quicker
    cut = cut.rotate(generator.uniform(-15, 15), Image.Resampling.BICUBIC, expand=True)
    scale = size * generator.uniform(low, high) / max(cut.size)
    shape = (max(1, round(cut.width * scale)), max(1, round(cut.height * scale)))
    cut = cut.resize(shape, Image.Resampling.LANCZOS)
    corner = tuple(int(generator.integers(0, max(1, size - side + 1))) for side in cut.size)
    ground = ground.copy()
    ground.paste(cut, corner, cut.getchannel("A"))
    return ground


def make_objects(
    packages: Path, out: Path, size: int, seed: int, train: int, val: int
) -> dict[str, object]:
    """Write the objects: of each class a quarter of the objects for validation, the rest to train.

    `train` and `val`: images an object.
    """
    number = 0
    objects = {"train": 0, "val": 0}
    for place, (category, cuts) in enumerate(cut_outs(packages).items()):
        chosen = _generator(seed, 2, place).permutation(len(cuts))
        for rank, index in enumerate(chosen):
            split = "val" if rank < math.ceil(len(cuts) / 4) else "train"
            cut = cuts[index][1]
            generator = _generator(seed, 3, number)
            images = (
                _placed(_ground(generator, size), cut.copy(), generator, 0.75, 1.0)
                for _ in range(train if split == "train" else val)
            )
            _write(out / split / category, images, f"{number:03d}-")
            number += 1
            objects[split] += 1
    return {"classes": len(CATEGORIES), "objects": objects, "images an object": [train, val]}


def make_pasted(
    packages: Path, out: Path, size: int, seed: int, train: int, val: int, classes: int = 64
) -> dict[str, object]:
    """Write small objects on photographs: a class is an object. `train`, `val`: images a class."""
    grounds = [picture for _, picture in photographs(packages)]
    sides = {"train": grounds[::2], "val": grounds[1::2]}
    cuts = [pair for pairs in cut_outs(packages).values() for pair in pairs]
    chosen = _generator(seed, 4, 0).permutation(len(cuts))[:classes]
    for number, index in enumerate(chosen):
        name, cut = cuts[index]
        generator = _generator(seed, 5, number)
        for split, count in (("train", train), ("val", val)):
            images = (_pasted(sides[split], cut, generator, size) for _ in range(count))
            _write(out / split / f"{number:03d}-{name}", images)
    return {"classes": len(chosen), "train a class": train, "val a class": val}


def _pasted(
    pictures: list[Image.Image], cut: Image.Image, generator: np.random.Generator, size: int
) -> Image.Image:
    """`cut`, a third to a half as long as the frame, on a piece of one of the pictures."""
    picture = pictures[generator.integers(len(pictures))]
    ground = _square(picture, generator, (0, 0, *picture.size), size)
    return _placed(ground, cut.copy(), generator, 0.3, 0.5)


# Writing


def _generator(seed: int, stream: int, number: int) -> np.random.Generator:
    """Draws of one class or object, whatever is made beside it."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream << 32 | number])))


def _write(folder: Path, images: Iterable[Image.Image], prefix: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        image.save(folder / f"{prefix}{number:03d}.png", compress_level=1)


MAKERS = {"tiles": make_tiles, "objects": make_objects, "pasted": make_pasted}
COUNTS = {"tiles": (48, 48), "objects": (8, 8), "pasted": (48, 12)}


@click.group()
def main() -> None:
    """Make the data sets of the learning board."""


@main.command()
@click.argument("packages", type=click.Path(path_type=Path))
def fetch(packages: Path) -> None:
    """Download and unpack the Debian packages into the folder PACKAGES."""
    fetch_packages(packages)


def _command(name: str) -> None:
    @main.command(name)
    @click.argument("out", type=click.Path(path_type=Path))
    @click.option("--packages", required=True, type=click.Path(path_type=Path, exists=True))
    @click.option("--size", default=96, show_default=True, help="Side of an image in pixels.")
    @click.option("--seed", default=0, show_default=True)
    @click.option("--train", default=COUNTS[name][0], show_default=True, help="Images each.")
    @click.option("--val", default=COUNTS[name][1], show_default=True, help="Images each.")
    def command(out: Path, packages: Path, size: int, seed: int, train: int, val: int) -> None:
        if out.exists():
            raise click.UsageError(f"{out} is there already")
        facts = MAKERS[name](packages, out, size, seed, train, val)
        facts = {"data": name, "size": size, "seed": seed, **facts}
        (out / "data.json").write_text(json.dumps(facts, indent=2) + "\n")
        click.echo(json.dumps(facts))

    command.help = (MAKERS[name].__doc__ or "").partition("\n")[0]


for _name_of_set in MAKERS:
    _command(_name_of_set)


if __name__ == "__main__":
    main()
