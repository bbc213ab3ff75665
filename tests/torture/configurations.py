"""Random configurations, ordinary, odd and absurd: each is planned or refused in a sentence.

python tests/torture/configurations.py SEED COUNT STARTED: recipes as YAML text with overrides go
through `config.load` and `make_plan`; some of those that can be planned are begun for one iteration.
An exception that is neither kind of sentence is a defect: it is printed with its recipe, and comes
again with the same seed.
"""

# ruff: noqa: E501, tables are read by column
import json
import os
import random
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image

from xdino import config
from xdino.errors import RunFailed, UsageError
from xdino.job import Listener
from xdino.plan import Plan, make_plan
from xdino.pretraining import pretrain

SHOWN = 10  # defects that are printed
ARCHS = (
    "xcit_nano_12_p4", "xcit_nano_12_p8", "xcit_nano_12_p16", "xcit_nano_12_p17", "test_vit",
    "test_resnet", "test_convnext", "test_efficientnet", "test_mambaout", "test_nfnet",
    "mobilenetv3_small_050", "vit_tiny_patch16_224.dino", "vit_tiny_patch14_224.dino", "resnet10t",
    "mixer_s32_224", "swin_tiny_patch4_window7_224", "pit_ti_224", "vit_tiny_patch16_224.none",
    "crossvit_9_240", "resnet181", "cait_xxs24_224", "levit_128s", "xcit_tiny_12_p8_224", "",
)  # fmt: skip
NUMBERS = (
    "0", "1", "2", "3", "7", "0.1", "0.5", "1e-3", "5e-4", "-1", "-0.5", "nan", "inf", "-inf",
    ".nan", ".inf", "1e300", "1e30", "1e38", "1e-300", "1e999", "010", "0x10", "1_000", "1:30",
    "on", "true", "yes", "~", "null", "", "1e3", "10.0", "12345678901234567890", "9" * 5000, "10%",
    "50%", "200%", "-5%", "٣", "1 000", "1,5", "ten", "+3", ".5", "5.", "2147483648", "--", "NaN",
)  # fmt: skip
WHOLE = (
    "0",
    "1",
    "2",
    "3",
    "4",
    "5",
    "8",
    "12",
    "14",
    "15",
    "16",
    "16",
    "20",
    "24",
    "32",
    "48",
    "1000",
)
TEXTS = (
    "photos #1", "@x", "*x", "&x", "%x", "[2024] x", "2024", "no", "~", "null", "", " ", "a: b", "!x",
    "~nosuchuser/x", "{x}", "x\ty", "x\ny", "[/]", "[bold]", "ü", "\u202e", "x" * 300, "x" * 5000,
    "'", '"', "a\0b", "\ud800", "-", "--", "|", ">", "#", "/dev/null", "/dev/zero", "/proc/self/mem",
)  # fmt: skip
LISTS = (
    "0.3,1.0", "[0.3, 1.0]", "0.2, 0.9", "[0.3 1.0]", "0.5", "1.0,0.3", "0.1,0.2,0.3", "[]", "[[1]]", "a,b", ",",
    "nan,nan", "0,1", "[0.5]", "[0.2]", "-1,1", "1e-300,1", "[0.5, 0.5, 0.5]",
)  # fmt: skip
BROKEN = (
    "a: [", "- 1", "3", "model: 3", "model: [1]", "\t", "model: {arch: x", "? [a]\n: b", "%YAML 9", "---\n---",
    "a: &a [x]\nb: *a", "model: !!python/object:os.system {}", "model:\n  arch: !!str x", "\0", "[" * 5000,
    "model:\n  arch: a\n  arch: b", "model: {}\nmodel: {}", "optim: {}\noptimizer: {lr: 1}", "1: 2",
    "loss: {center_momentum: 0.5, centre_momentum: 0.5}", "model: {arch: {a: {b: c}}}", "optim.lr: 1", "null",
)  # fmt: skip


class Enough(Exception):
    """One iteration is done."""


class Once(Listener):
    def step(self, row: dict[str, Any]) -> None:
        raise Enough


def tiny(rng: random.Random, places: list[str]) -> dict[str, dict[str, str]]:
    """A configuration that starts in a moment, as texts."""
    size = rng.choice(["16", "32", "32", "64", "224"])
    return {
        "model": {"arch": rng.choice(ARCHS[:3]), "embed_dim": "32", "depth": "1", "num_heads": "2"},
        "head": {"prototypes": "32", "hidden_dim": "16", "bottleneck_dim": "8"},
        "crops": {"global_size": size, "local_size": "16", "local_count": rng.choice("012")},
        "data": {"path": rng.choice(places)},
        "optim": {"warmup_epochs": rng.choice(["0", "10%", "1"])},
        "train": {"epochs": rng.choice("123"), "batch_size": rng.choice("112")},
        "runtime": {"device": "cpu", "workers": "1", "log_every": "1", "kernels": "auto"},
    }


def value_for(key: str, rng: random.Random, places: list[str]) -> str:
    """A text for a key: of its kind more often than not."""
    section, leaf = key.split(".")
    kinds = {
        "model.arch": ARCHS,
        "data.path": (*places, *TEXTS),
        "runtime.device": (
            "auto",
            "cpu",
            "cuda",
            "cuda:99",
            "mps",
            "meta",
            "xpu",
            "gpu",
            "",
            "CPU",
        ),
        "optim.name": ("adamw", "sgd", "lars", "adam", "no"),
        "train.precision": ("auto", "fp32", "bf16", "fp16", "fp64", "off"),
        "runtime.wandb": ("off", "offline", "online", "no", "false", "Off"),
        "runtime.kernels": ("auto", "plain", "fused", "none"),
        "model.patch_size": ("4", "8", "16", "14", "null", "~", "08"),
        "evaluate.linear": ("logistic", "grid", "null", "none", "svm"),
    }
    if rng.random() < 0.05:
        return rng.choice(NUMBERS + TEXTS + LISTS)
    if key in kinds:
        return rng.choice(kinds[key][:2] if rng.random() < 0.5 else kinds[key])
    told = str(config.KEYS[section][leaf])
    if "tuple" in told:
        return rng.choice(LISTS[:3] if rng.random() < 0.8 else LISTS)
    if "bool" in told:
        return rng.choice(["true", "false", "yes", "no", "on", "off", "1", "0", "maybe", "~"])
    if "int" in told and "float" not in told:
        return rng.choice(WHOLE if rng.random() < 0.9 else NUMBERS)
    if "float" in told:
        return rng.choice(NUMBERS) if rng.random() < 0.25 else f"{rng.random():.3g}"
    return rng.choice((*TEXTS, *places))


def yaml_of(tree: dict[str, dict[str, str]], rng: random.Random) -> str:
    """The tree as a person might write it: quoted, plain or as a list."""

    def written(text: str) -> str:
        how = rng.random()
        if how < 0.3:
            return text
        return json.dumps(text, ensure_ascii=rng.random() < 0.5)

    lines = []
    for section, below in tree.items():
        lines.append(f"{section}:")
        lines += [f"  {key}: {written(text)}" for key, text in below.items()]
    return "\n".join(lines) + "\n"


def one(rng: random.Random, folder: Path, places: list[str]) -> tuple[str, dict[str, str]]:
    """A recipe's text and overrides."""
    tree = tiny(rng, places)
    overrides: dict[str, str] = {}
    for _ in range(rng.choice([0, 1, 1, 2, 2, 3, 5])):
        key = rng.choice(config.dotted_keys())
        text = value_for(key, rng, places)
        section, leaf = key.split(".")
        if rng.random() < 0.02:
            leaf = rng.choice([leaf + "x", leaf.replace("e", "a"), "", "lr.x", "[/]"])
        if rng.random() < 0.5:
            tree.setdefault(section, {})[leaf] = text
        else:
            overrides[f"{section}.{leaf}"] = text
    if tree["model"]["arch"] not in ARCHS[:3] and rng.random() < 0.9:
        for leaf in ("embed_dim", "depth", "num_heads"):
            tree["model"].pop(leaf, None)
    text = yaml_of(tree, rng)
    if rng.random() < 0.05:
        text = rng.choice(BROKEN) if rng.random() < 0.5 else text + rng.choice(BROKEN)
    return text, overrides


def light(plan: Plan) -> bool:
    """Whether an iteration takes a moment, needs no network and no compiler."""
    runtime = plan.config.runtime
    pixels = sum(view.size**2 for view in plan.crops.views) * plan.total_batch
    return (
        plan.state_bytes < 3e8
        and pixels < 3e6
        and plan.iterations < 1e6
        and plan.config.train.accumulate < 20
        and runtime.wandb == "off"
        and not runtime.compile
        and plan.source.name != "/dev/zero"
    )


def _outcome(
    path: Path, overrides: dict[str, str], run: Path | None, bound: int
) -> tuple[str, str]:
    """What became of a configuration, and the sentence or the traceback."""
    try:
        resolved = config.load(str(path), overrides)
        plan = make_plan(resolved)
        if run is None or not light(plan):
            return "planned", ""
        pretrain(resolved, run, listener=Once())
        return "started", ""
    except Enough:
        return "started", ""
    except UsageError as error:
        if run is not None and run.exists():
            return "tracebacks", f"refused after writing: {error}"
        return ("refused", str(error)) if len(str(error)) < bound else ("tracebacks", str(error))
    except RunFailed as error:
        return "failed", str(error)
    except Exception:  # noqa: BLE001, whatever else there is counts as a defect
        return "tracebacks", traceback.format_exc()


def run(seed: int, count: int, started: int | None = None) -> dict[str, int]:
    """`count` random configurations, about `started` (a fifth) of them begun; how many ended how."""
    started = count // 5 if started is None else started
    counts: Counter[str] = Counter({"tracebacks": 0})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        places = _places(folder)
        for i in range(count):
            rng = random.Random(f"{seed}/{i}")
            text, overrides = one(rng, folder, places)
            path = folder / "recipe.yaml"
            path.write_bytes(text.encode("utf-8", "surrogatepass"))
            begin = counts["started"] + counts["failed"] < started
            outcome, told = _outcome(path, overrides, folder / f"run{i}" if begin else None, 20_000)
            counts[outcome] += 1
            if outcome == "tracebacks" and counts[outcome] <= SHOWN:
                print(
                    f"--- seed {seed}, configuration {i}: {overrides}\n{text[:2000]}\n{told[-3000:]}"
                )
    return dict(counts)


def _places(folder: Path) -> list[str]:
    """Data of all kinds: most of them can be trained on."""
    colours = folder / "colours"
    colours.mkdir()
    for i in range(8):
        Image.new("RGB", (20 + i, 24), (30 * i, 20, 90)).save(colours / f"{i}.png")
    (folder / "empty").mkdir()
    (folder / "text.txt").write_text("nothing\n")
    (folder / "photos #1").mkdir()
    Image.new("L", (20, 24), 50).save(folder / "photos #1" / "a.png")
    os.symlink(folder / "loop", folder / "loop")
    odd = ["empty", "text.txt", "loop", "absent"]
    good = ["fashion_mnist_sample", *[str(colours)] * 4, str(folder / "photos #1")]
    return [*good * 5, *(str(folder / name) for name in odd)]


if __name__ == "__main__":
    print(run(*map(int, sys.argv[1:4])))
