"""Every command that a page shows is run, or read as far as this machine allows, as the page says."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pytest
import tifffile
from documented import PAGES, PROGRAMS, ROOT, blocks, commands
from PIL import Image

from xdino import config
from xdino_launch import cli
from xdino_launch.commands.overrides import Keyed, parse_overrides, schema_of

# What makes a documented `pretrain` a matter of seconds: the same keys, a tiny network.
TINY = {
    "model.arch": "xcit_nano_12_p8", "model.embed_dim": "16", "model.depth": "1", "model.num_heads": "2",
    "head.prototypes": "32", "head.hidden_dim": "16", "head.bottleneck_dim": "8",
    "crops.global_size": "32", "crops.local_size": "16", "crops.local_count": "1",
    "train.epochs": "1", "train.batch_size": "6", "runtime.workers": "1",
}  # fmt: skip


def annotated(root: Path, picture: Callable[..., None]) -> None:
    """Four images to learn from and two that score, of COCO's layout, with an object each."""
    box = {"bbox": [8, 8, 24, 20], "area": 480, "iscrowd": 0}
    outline = [[8, 8, 32, 8, 32, 28, 8, 28]]
    for split, count in (("train", 4), ("val", 2)):
        images, rows = [], []
        for i in range(1, count + 1):
            picture(root / f"{split}2017" / f"{i:012}.jpg")
            images.append({"id": i, "file_name": f"{i:012}.jpg", "width": 48, "height": 40})
            rows.append({"id": i, "image_id": i, "category_id": 3, "segmentation": outline, **box})
        tree = {
            "images": images, "annotations": rows, "categories": [{"id": 3, "name": "car"}]
        }  # fmt: skip
        (root / "annotations").mkdir(exist_ok=True)
        path = root / "annotations" / f"instances_{split}2017.json"
        path.write_text(json.dumps(tree))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with what the pages name: photos/, classes/ with train/ and val/, fields/ of 13 bands."""
    root = tmp_path_factory.mktemp("documented")
    generator = np.random.default_rng(0)

    def picture(path: Path, size: tuple[int, int] = (48, 40)) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)

    picture(root / "photo.jpg", (96, 72))
    for i in range(9):
        picture(root / "photos" / f"{'deep/' * (i % 2)}{i}.png")
    for split, count in (("train", 5), ("val", 2)):
        for name in ("cat", "dog"):
            for i in range(count):
                picture(root / "classes" / split / name / f"{i}.png")
    random = np.random.default_rng(1)
    for split, count in (("train", 5), ("val", 2)):
        for name in ("flower", "temple"):
            (root / "fields" / split / name).mkdir(parents=True)
            for i in range(count):
                bands = random.integers(0, 4096, (40, 48, 13), np.uint16)
                path = root / "fields" / split / name / f"{i:03}.tif"
                tifffile.imwrite(path, bands, photometric="minisblack", planarconfig="contig")
    for split, count in (("train", 5), ("val", 2)):
        for i in range(count):
            picture(root / "masked" / "images" / split / f"{i}.png")
            (root / "masked" / "masks" / split).mkdir(parents=True, exist_ok=True)
            labels = generator.integers(0, 3, (40, 48), dtype=np.uint8)
            Image.fromarray(labels).save(root / "masked" / "masks" / split / f"{i}.png")
    shutil.copytree(root / "masked", root / "parcels")
    for path in (root / "parcels" / "images").rglob("*.png"):
        path.unlink()
        bands = random.integers(0, 4096, (40, 48, 13), np.uint16)
        tifffile.imwrite(
            path.with_suffix(".tif"), bands, photometric="minisblack", planarconfig="contig"
        )
    for name in ("masked", "parcels"):
        (root / name / "classes.txt").write_text("sky\nroad\ntree\n")
    annotated(root / "objects", picture)
    shown = re.search(r"```yaml\n(.*?)```", (ROOT / "docs" / "classify.md").read_text(), re.DOTALL)
    assert shown is not None
    (root / "suite.yaml").write_text(shown[1])
    return root


# The same of `finetune`, whose network comes with weights.
TINY_TUNING = {"train.epochs": "1", "train.batch_size": "4", "view.size": "32"}
TINY_MASKS = {
    "train.epochs": "1", "train.batch_size": "4", "view.crop": "32", "view.shorter": "40",
    "view.longer": "64", "model.channels": "8", "evaluate.every": "0",
}  # fmt: skip
TINY_OBJECTS = {
    "train.epochs": "1", "train.batch_size": "4", "view.sides": "40", "view.longer": "64",
    "view.before_crop": "40", "view.crop": "32,40", "view.test_side": "40", "heads.width": "16",
    "heads.hidden": "16", "heads.mask_width": "8", "heads.anchors": "32", "heads.candidates": "60",
    "heads.proposals": "30", "heads.regions": "16", "evaluate.every": "0",
}  # fmt: skip


def learned(words: list[str]) -> list[str]:
    """The words, those of a training command made a matter of seconds."""
    smaller = {"finetune": TINY_TUNING, "segment": TINY_MASKS, "detect": TINY_OBJECTS}.get(
        "".join(words[:1])
    )
    if smaller is None or "--data.path" not in words:
        return pretrained(words)
    given = {word.removeprefix("--") for word in words}
    more = {**smaller, "runtime.workers": "1"}
    if "--init" not in words:
        more |= {key: value for key, value in TINY.items() if key.startswith("model.")}
    return [*words, *(w for k, v in more.items() if k not in given for w in (f"--{k}", v))]


def pretrained(words: list[str]) -> list[str]:
    """The words, those of `pretrain` with a tiny network; what the page sets stays, but for minutes."""
    if words[:1] != ["pretrain"] or "--data.path" not in words:
        return words
    given = {word.removeprefix("--") for word in words}
    if "minutes" in given:
        place = words.index("--minutes")
        words = [*words[:place], "--epochs", "1", *words[place + 2 :]]
        given.add("train.epochs")
    return [
        *words,
        *(w for key, value in TINY.items() if key not in given for w in (f"--{key}", value)),
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_every_documented_command_does_as_it_says(page, world, xdino, monkeypatch, tmp_path):
    if page.stem == "README":  # begins with nothing
        shutil.copytree(world, tmp_path / "new", ignore=shutil.ignore_patterns("runs"))
        world = tmp_path / "new"
    monkeypatch.chdir(world)
    if (
        page.stem != "README" and not (world / "runs" / "mine").exists()
    ):  # pages go on where others end
        begin = "pretrain small_data --run runs/mine --data.path photos"
        assert xdino(*pretrained(begin.split()))[0] == 0
    for block in blocks(page):
        for words, target in [
            c for line in block.lines if block.how == "run" for c in commands(line)
        ]:
            assert words[0] == "xdino", f"{page.name}: mark what is none of ours: {' '.join(words)}"
            code, out, error = xdino(*learned(words[1:]))
            assert code == 0, f"{page.name}: {' '.join(words)}: {error}"
            if target is not None:
                Path(target).write_text(out)


def understood(words: list[str]) -> None:
    """Raises where the command line would refuse these words, whatever there is on this machine."""
    command: click.Command = cli.xdino
    rest = list(words)
    while isinstance(command, click.Group):
        name = rest.pop(0)
        command = command.commands[name]
    context = command.make_context(name, rest)
    if isinstance(command, Keyed):
        overrides = parse_overrides(context.args, command.kind)
        config.load(context.params["config"], overrides, schema_of(command.kind))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_what_needs_more_than_this_machine_is_understood(page):
    for block in blocks(page):
        assert block.how == "run" or len(block.why) > 10
        for words, _ in [
            c for line in block.lines if block.how == "parsed" for c in commands(line)
        ]:
            if words[0] == "torchrun":
                words = ["xdino", *words[words.index("-m") + 2 :]]
            assert words[0] == "xdino", words
            understood(words[1:])


def test_what_is_not_run_is_none_of_ours():
    """But for the demo, which has a test of its own."""
    for page in PAGES:
        for line in [
            line for block in blocks(page) if block.how == "not run" for line in block.lines
        ]:
            ours = re.match(r"(srun .*)?xdino\b", line.strip())
            assert not ours or line == "xdino demo" or "srun" in line, (page.name, line)
    assert (
        sum(len(block.lines) for page in PAGES for block in blocks(page) if block.how == "run") > 30
    )
    assert set(PROGRAMS) >= {"xdino", "torchrun"}


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)
    named = set(re.findall(r"\]\(docs/([\w-]+\.md)\)", PAGES[0].read_text()))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= named, "a page that nobody finds"


def test_the_readme_is_two_screens():
    assert len(PAGES[0].read_text().splitlines()) <= 110
