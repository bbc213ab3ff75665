"""Random command lines for every command: each ends in a result or in a sentence.

python tests/torture/command_lines.py SEED COUNT runs them in this process on tiny data. An exit code
that is not documented, an exception that leaves `main`, or one that `main` itself had no sentence for
is a defect: it is printed, and comes again with the same seed.
"""

# ruff: noqa: E501, tables are read by column
import contextlib
import io
import os
import random
import shlex
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import numpy as np
from PIL import Image

from xdino_launch import cli, slurm

SHOWN = 10  # defects that are printed
SECONDS = 10  # a command may take; then it is left
CODES = {0, 1, 2, 75, 130}

WHOLE = ("2", "5", "3", "0", "1", "16", "20", "-1", "1000", "1000000000", "9" * 30, "1_000", "010", "1.5",
         "x", "", "nan", "inf", "0x10", "1e3", "٣")  # fmt: skip
FEW = ("1", "2", "3", "0", "-1", "1000000000", "x", "", "nan", "1.5")
NUMBER = (
    "0.1",
    "1",
    "0.5",
    "1e-3",
    "0",
    "-1",
    "nan",
    "inf",
    "-inf",
    "1e999",
    "1e300",
    "1e-300",
    "1,2",
    "x",
    "",
)
LIST = (
    "1",
    "1,2",
    "5,1",
    "0",
    "-1",
    "nan",
    "inf",
    "1,,2",
    ",",
    "x",
    "1_000",
    "1e999",
    "0.07",
    "1e3",
    "",
    "9" * 5000,
)
DEVICE = (
    "auto",
    "cpu",
    "cpu",
    "cuda",
    "cuda:99",
    "cuda:x",
    "mps",
    "meta",
    "xpu",
    "gpu",
    "",
    "CPU",
    "cpu:0",
)
SIZE = ("16", "24", "32", "17", "1", "0", "7", "8192", "1000000000", "x", "-1", "")
PLACES = ("data", "data", "[/]", "flat", "one.png", "bad.png", "empty", "absent", "~nosuchuser/x", "", "loop", "/dev/null",
          "fashion_mnits", "[/]", "photos #1", "run", "x" * 300, "text.txt", "[/]/train", "*", "-")  # fmt: skip
WEIGHTS = ("run", "weights.safetensors", "run", "bad.png", "absent", "data",
           "run/config.yaml", "run/checkpoints/last.pt", "", "loop", "~nosuchuser", "/dev/null", "empty")  # fmt: skip
OUT = ("out", "out.json", "absent/deep/o.json", "one.png", "data", "/dev/null", "/proc/x", "", "[/].json",
       "results.json", "loop", "x" * 300, "readonly/o.json", "text.txt/o")  # fmt: skip
MEAN = (
    "0.5,0.5,0.5",
    "0.4,0.5,0.6",
    "0.5,0.5,0.5",
    "0.5",
    "0,0",
    "nan,0,0",
    "inf,1,1",
    "1,2,3,4",
    "x",
    "",
    "-1,-1,-1",
    "0,0,0",
)
NAMES = ("xcit_nano_12_p4", "xcit_small_12_p16", "resnet18", "test_vit", "vit_small", "dino_vits16", "nothing",
         "", "[/]", "xcit_nano_12_p4x", "vit_tiny_patch16_224.none")  # fmt: skip
FLAG = ()

JUDGED = {
    "--data": PLACES, "--arch": NAMES, "--role": ("teacher", "student", "both"),
    "--out": OUT, "--json": FLAG, "--device": DEVICE, "--precision": ("fp32", "bf16", "fp64"),
}  # fmt: skip
EVALUATED = JUDGED | {
    "--size": SIZE, "--resize": SIZE, "--mean": MEAN, "--std": MEAN, "--batch-size": FEW,
    "--max-pixels": WHOLE, "--workers": FEW, "--cache": OUT,
}  # fmt: skip
TIMED = {
    "--rounds": ("1", "1", "1", "0", "x"), "--threads": FEW, "--seconds": NUMBER, "--out": OUT, "--batch": FEW,
}  # fmt: skip
SMALL_STEP = {"--prototypes": ("16", "2", "0", "x", "1000000000"), "--global-size": ("16", "32", "0", "x"),
              "--local-size": ("16", "32", "x"), "--local-count": ("0", "1", "x")}  # fmt: skip

#: Command -> (positional arguments, options that are always there, options that may be).
COMMANDS: dict[str, tuple[tuple[tuple[str, ...], ...], dict, dict]] = {
    "pretrain": (
        (("debug", "debug", "recipe.yaml", "debgu", "", "run/config.yaml", "loop", "data", "bad.png"),),
        {"--run": ("new", "new", "run", "data", "one.png", "loop", "/proc/x", "readonly/r", "x" * 300, "")},
        {"--print-config": FLAG, "--init": WEIGHTS, "--data.path": ("data", "flat", "data", *PLACES), "--optim.lr": NUMBER,
         "--train.batch_size": WHOLE, "--crops.local_size": SIZE, "--model.arch": NAMES, "--lr": NUMBER,
         "--runtime.device": DEVICE, "--evaluate.data": PLACES, "--optim.": ("1",), "--.lr": ("1",),
         "--train.seed": WHOLE, "--evaluate.every": FEW, "--runtime.wandb": ("off", "no", "on"),
         "--crops.global_scale": LIST, "--evaluate.linear": ("logistic", "null", "x")},
    ),
    "submit": (
        (("debug", "recipe.yaml", "debgu", ""),),
        {"--run": ("new", "run", "data", "")},
        {"--hours": (*NUMBER, "0.008", "0.02"), "--nodes": FEW, "--gpus-per-node": FEW, "--partition": NAMES,
         "--slurm": ("a=b", "a", "=", "a="), "--optim.lr": NUMBER, "--train.epochs": WHOLE},
    ),
    "knn": ((WEIGHTS,), {"--data": PLACES}, EVALUATED | {
        "--k": LIST, "--temperature": LIST, "--leave-one-out": FLAG, "--shots": LIST, "--repeats": FEW,
        "--seed": WHOLE, "--search": ("auto", "faiss", "torch", "ivf", "hnsw", "none", ""),
        "--bank-block": WHOLE}),
    "neighbours": ((WEIGHTS,), {"--data": PLACES}, EVALUATED | {
        "--queries": WHOLE, "--images": PLACES, "--k": WHOLE}),
    "linear": ((WEIGHTS,), {"--data": PLACES}, EVALUATED | {
        "--protocol": ("logistic", "sgd", "sgd-features", "grid", "grid-features", "svm"),
        "--epochs": ("1", "2", "1", "0", "x", "-1"), "--lr": NUMBER, "--lrs": LIST, "--wds": LIST,
        "--features": ("class", "patches", "both", "class,both", "x", ""), "--c": LIST, "--seed": WHOLE,
        "--save-head": OUT, "--apply": (*OUT, "head.safetensors"), "--split": ("train", "val", "x"),
        "--predictions": OUT}),
    "features": ((WEIGHTS,), {"--data": PLACES, "--out": OUT}, EVALUATED),
    "quality": ((WEIGHTS,), {"--data": PLACES}, JUDGED | {
        "--split": ("train", "val", "x"), "--limit": WHOLE, "--lidar-images": FEW, "--views": FEW,
        "--seed": WHOLE, "--batch-size": FEW, "--workers": FEW}),
    "retrieval": ((WEIGHTS,), {"--data": PLACES}, JUDGED | {
        "--dataset": ("roxford5k", "rparis6k", "x"), "--size": SIZE, "--multiscale": FLAG}),
    "copydetection": ((WEIGHTS,), {"--data": PLACES}, JUDGED | {
        "--size": SIZE, "--distractors": PLACES, "--whitening": PLACES, "--batch-size": FEW}),
    "davis": ((WEIGHTS,), {"--data": PLACES, "--out": OUT}, {
        "--size": SIZE, "--context": WHOLE, "--radius": WHOLE, "--topk": WHOLE, "--temperature": NUMBER,
        "--results": OUT, "--split": NAMES}),
    "attention": ((WEIGHTS, ("one.png", "one.png", "flat", *PLACES)), {"--out": OUT}, {
        "--arch": NAMES, "--size": SIZE, "--mass": NUMBER, "--layer": WHOLE, "--head": WHOLE, "--fps": NUMBER,
        "--pca": FLAG, "--foreground": FLAG, "--xca": FLAG, "--all": FLAG, "--limit": WHOLE,
        "--device": DEVICE}),
    "segment-score": ((WEIGHTS,), {"--data": ("masks", "masks", "masks", *PLACES)}, {
        "--arch": NAMES, "--size": SIZE, "--mass": NUMBER, "--layer": WHOLE, "--out": OUT, "--details": OUT,
        "--ignore": (*WHOLE, "none", "255"), "--device": DEVICE, "--json": FLAG}),
    "export": ((WEIGHTS,), {"--out": ("w.safetensors", *OUT)}, {
        "--format": ("published", "timm", "x"), "--arch": NAMES, "--role": ("teacher", "student")}),
    "pack": ((("data", "flat", "[/]", *PLACES),), {"--out": ("p.tar", *OUT)}, {
        "--shorter-side": SIZE, "--quality": WHOLE, "--shards": FEW, "--workers": FEW}),
    "report": ((("run", "run", "run", *PLACES),), {}, {"--out": OUT}),
    "demo": ((), {"--seed": ("-1", "x", "9" * 30, "")}, {"--run": OUT, "--json": FLAG}),
    "bench step": ((), {"--rounds": ("1",), "--arch": ("xcit_nano_12_p16",) * 3 + NAMES, "--batch": FEW, **SMALL_STEP},
                   TIMED | {"--precision": ("fp32", "bf16", "fp64", ""), "--device": DEVICE,
                            "--kernels": ("auto", "plain", "fused", "x"), "--reference": PLACES}),
    "bench knn": ((), {"--rounds": ("1",), "--bank": ("300", "200", "500", *WHOLE), "--queries": ("100", "150", "120", *FEW)},
                  TIMED | {"--dim": WHOLE, "--classes": WHOLE, "--reference": PLACES}),
    "bench linear": ((), {"--rounds": ("1",), "--images": ("0", "4", "0"), "--features": ("100", "20", "50", *WHOLE)},
                     TIMED | {"--data": PLACES, "--dim": WHOLE, "--classes": FEW, "--lrs": FEW, "--size": SIZE}),
    "bench scaling": ((), {"--rounds": ("1",), "--arch": ("xcit_nano_12_p16",) * 3 + NAMES, "--against": ("test_vit", "test_vit", "test_vit", *NAMES)},
                      TIMED | {"--sizes": ("32,64", "16,32,48", *LIST), "--precision": ("fp32", "x")}),
    "bench pipeline": ((), {"--rounds": ("1",), "--data": ("flat", "photos #1", "flat", *PLACES), "--images": ("4", *FEW)}, TIMED),
    "pretrian": (((),), {}, {}),
    "": (((),), {}, {"--help": FLAG, "--version": FLAG, "--x": ("1",)}),
}  # fmt: skip


def pick(choices: tuple[str, ...], rng: random.Random) -> str:
    """One of them, more often of the first three, which are good."""
    return rng.choice(choices[:3] if rng.random() < 0.8 else choices)


def one(rng: random.Random) -> list[str]:
    """A random command line."""
    command = rng.choice(list(COMMANDS))
    positional, always, options = COMMANDS[command]
    line = command.split()
    line += [pick(choices, rng) for choices in positional if choices]
    chosen = list(always.items())
    chosen += rng.sample(
        list(options.items()), min(len(options), rng.choice([0, 1, 1, 2, 2, 3, 5]))
    )
    for option, choices in chosen:
        line += [option, pick(choices, rng)] if choices else [option]
    if command == "pretrain":  # never long
        line += ["--train.epochs", "1", "--data.path", "flat"] if "--data.path" not in line else []
        line += ["--runtime.log_every", "1"]
    mishap = rng.random()
    if mishap < 0.05 and len(line) > 1:
        del line[rng.randrange(1, len(line))]
    elif mishap < 0.08:
        line.insert(
            rng.randrange(len(line) + 1), rng.choice(["--", "-x", "--nothing", "[/]", "ü", "-h"])
        )
    elif mishap < 0.1:
        line += rng.choice([["--data", "data"], ["--size"], ["--json", "--json"], ["--help"]])
    return line


class TooLong(BaseException):
    """No defect: the random line asked for much."""


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def leave(number: int, frame: FrameType | None) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, leave)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(line: list[str]) -> tuple[str, str]:
    """What became of a command line, and what to print of it."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), at_most(SECONDS):
            cli.main(line)
    except SystemExit as stop:
        code = stop.code or 0
    except TooLong:
        return "left", ""
    except BaseException:  # noqa: BLE001, whatever leaves `main` counts as a defect
        return "tracebacks", traceback.format_exc()
    told = err.getvalue()
    if "TooLong" in told:  # it was raised where Python cannot raise
        return "left", ""
    if code not in CODES or "Traceback" in told or "error.log" in told:
        return "tracebacks", f"exit code {code}: {told[-3000:]}"
    if code and told.count("xdino: ") != 1:
        return "tracebacks", f"exit code {code} without a sentence: {told[-3000:]}"
    return f"exit {code}", told


def fixtures(folder: Path) -> None:
    """A run, its weights, labelled and unlabelled images, masks, and things that are none of it."""
    noise = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for label in ("left", "[right]"):
            (folder / "data" / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(0, 255, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "data" / split / label / f"{i}.png")
    for name in (
        "flat",
        "photos #1",
        "[/]/train/a",
        "[/]/val/a",
        "masks/images",
        "masks/masks",
        "empty",
    ):
        (folder / name).mkdir(parents=True)
    for i in range(4):
        pixels = noise.integers(0, 255, (20, 24, 3), dtype=np.uint8)
        for name in ("flat", "photos #1", "[/]/train/a", "[/]/val/a", "masks/images"):
            Image.fromarray(pixels).save(folder / name / f"[b]{i}.png")
        Image.fromarray((pixels[..., 0] > 128).astype(np.uint8)).save(
            folder / f"masks/masks/[b]{i}.png"
        )
    Image.fromarray(pixels).save(folder / "one.png")
    (folder / "bad.png").write_text("no image")
    (folder / "text.txt").write_text("nothing\n")
    (folder / "readonly").mkdir(mode=0o555)
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "recipe.yaml").write_text(
        "data:\n  path: flat\ntrain:\n  epochs: 1\n  batch_size: 2\n"
    )


def run(seed: int, count: int) -> dict[str, int]:
    """`count` random command lines; how many ended which way."""
    counts: Counter[str] = Counter({"tracebacks": 0})
    here, submit = Path.cwd(), slurm.submit
    slurm.submit = lambda *given: "0"  # nothing is to be submitted
    with tempfile.TemporaryDirectory() as name:
        try:
            os.chdir(name)
            fixtures(Path(name))
            cli.main(shlex.split(
                "pretrain debug --run run --data.path data --train.batch_size 8 --evaluate.every 0 "
                "--crops.mean null --crops.std null --crops.global_size 16 --runtime.workers 1"
            ))  # fmt: skip
            cli.main(shlex.split("export run --out weights.safetensors"))
            for i in range(count):
                line = one(random.Random(f"{seed}/{i}"))
                became, told = outcome(line)
                counts[became] += 1
                if became == "tracebacks" and counts[became] <= SHOWN:
                    print(f"--- seed {seed}, line {i}: {shlex.join(line)}\n{told[-3000:]}")
        finally:
            os.chdir(here)
            slurm.submit = submit
    return dict(counts)


if __name__ == "__main__":
    print(run(*map(int, sys.argv[1:3])))
