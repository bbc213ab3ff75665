"""Damaged, wrong and harmful weights files in any number: each gives a network or a sentence.

    python tests/torture/weights.py [SEED [COUNT]]

Small good files of every kind are cut, flipped, spliced, emptied, renamed, reshaped and filled with
what weights have no need of, and read by `load_backbone` under a random role and architecture. What
comes out is counted. Anything but a network, a UsageError or a RunFailed is a defect, and so is code
from a file that ran, a reading of more than ten seconds, and two gigabytes of memory.
"""

import argparse
import collections
import io
import json
import os
import pathlib
import pickle
import random
import resource
import struct
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch

from xdino import checkpoint, xcit
from xdino.backbones import BackboneSpec
from xdino.checkpoint import load_backbone
from xdino.checkpoint.plain import plain_types
from xdino.errors import RunFailed, UsageError

SECONDS, MEGABYTES = 10.0, 2000
SHAPE = {"embed_dim": 32, "depth": 1, "num_heads": 2}
ARCHS = (
    *(None, None, None, None, None, "test_vit", "test_vit", "test_vit", "xcit_nano_12_p8"),
    *("xcit_nano_12_p16_384.fb_dist_in1k", "vit_tiny", "test_convnext", "resnet18", "", "x" * 300),
    *("hf-hub:a/b", "vit_giant_patch14_224", "dino_vits0", "vit_tiny_patch16_99999999.dino"),
)


class Harm:
    """A pickle of this makes a folder."""

    def __init__(self, proof: Path, call: Callable[..., Any] = os.mkdir) -> None:
        self.proof, self.call = proof, call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, (str(self.proof),)


class Calls:
    """A pickle of this calls something with something."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.told = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.told


def good_files(folder: Path) -> list[Path]:
    """One small file of every kind that can be read."""
    torch.manual_seed(0)
    spec = BackboneSpec("xcit_nano_12_p8", shape=SHAPE, input_size=24, resize=27)
    model = spec.build()
    run = folder / "run"
    checkpoint.save_backbone(run / "backbone.safetensors", model, spec, role="teacher", iteration=7)
    network = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    network |= {"head.mlp.0.weight": torch.zeros(4, 4)}
    state = {
        "learner": {"student": network, "teacher": network, "optimizer": {"state": {}}},
        "iteration": 7,
        "spec": spec.to_dict(),
        "sampler": {},
        "rng": [],
    }
    checkpoint.save_state(run / checkpoint.STATE_FILE, state)
    convnext = BackboneSpec("test_convnext")
    checkpoint.save_backbone(folder / "convnext.safetensors", convnext.build(), convnext)
    args = argparse.Namespace(arch="test_vit", patch_size=16, output_dir=pathlib.Path("/x"))
    vit = timm.create_model("test_vit").state_dict()
    trainer = {f"module.backbone.{name}": value for name, value in vit.items()}
    tree = {"student": trainer, "teacher": trainer, "args": args, "epoch": np.int64(3)}
    torch.save(tree, folder / "published.pth")
    torch.save(tree, folder / "older.pth", _use_new_zipfile_serialization=False)
    lightning = {f"model.teacher.backbone.{n}": v for n, v in vit.items()}
    lightning |= {f"model.student.backbone.{n}": v for n, v in vit.items()}
    torch.save({"state_dict": lightning, "epoch": 1}, folder / "lightning.ckpt")
    safetensors.torch.save_file(vit, folder / "timm.safetensors")
    tiny = xcit.build("xcit_nano_12_p16", **SHAPE)
    torch.save(collections.OrderedDict(tiny.state_dict()), folder / "bare.pth")
    return [
        run, run / "backbone.safetensors", run / checkpoint.STATE_FILE,
        *sorted(path for path in folder.iterdir() if path.is_file()),
    ]  # fmt: skip


# --- what is done to the bytes of a file ------------------------------------------------------


def cut(content: bytes, rng: random.Random, _: list[bytes]) -> bytes:
    return content[: rng.randrange(len(content))]


def flipped(content: bytes, rng: random.Random, _: list[bytes]) -> bytes:
    out = bytearray(content)
    start = rng.choice((0, 0, max(0, len(out) - 400)))  # headers and directories matter most
    stop = rng.choice((min(len(out), start + 400), len(out)))
    for _ in range(rng.choice((1, 1, 3, 30))):
        out[rng.randrange(start, stop)] ^= 1 << rng.randrange(8)
    return bytes(out)


def spliced(content: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    other = rng.choice(others)
    return content[: rng.randrange(len(content))] + other[rng.randrange(len(other)) :]


def nothing(content: bytes, rng: random.Random, _: list[bytes]) -> bytes:
    return rng.choice((b"", b"\0" * 100, b"PK\x03\x04", b"\x80\x02.", b"version https://git-lfs.x",
                       b"<!DOCTYPE html>", b"{}", rng.randbytes(5000)))  # fmt: skip


def header_changed(content: bytes, rng: random.Random, _: list[bytes]) -> bytes:
    """Of a safetensors file, well formed as far as it goes; of others, the lengths."""
    size = int.from_bytes(content[:8], "little")
    if size > len(content):
        return struct.pack("<Q", rng.choice((0, 1, 2**40, 2**63, 2**64 - 1))) + content[8:]
    header = json.loads(content[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    one, other = rng.choice(names), rng.choice(names)
    match rng.randrange(7):
        case 0:
            header[one]["shape"] = [rng.choice((0, 2**31, 2**62))] * 2
        case 1:
            header[one]["data_offsets"] = [0, 2 ** rng.randrange(64)]
        case 2:
            header[one], header[other] = header[other], header[one]
        case 3:
            header[one]["dtype"] = rng.choice(("I32", "F16", "F8_E4M3", "U8", "X"))
        case 4:
            header.pop(one)
        case 5:
            header["__metadata__"] = {"xdino": rng.choice((
                "[" * 100_000, "{}", "1", "null", "NaN", '{"spec": {}}', '{"facts": []}',
                '{"spec": {"arch": "xcit_nano_12_p8", "in_chans": 3, "mean": [0,0,0], "std": [1,1,1], '
                '"shape": {"embed_dim": 90000, "depth": 90000}}, "facts": {}}',
                '{"spec": {"arch": "test_vit", "input_size": 99999, "mean": [0,0,0], '
                '"std": [1,1,1]}, "facts": {"role": 3}}',
            ))}  # fmt: skip
        case 6:
            header["__metadata__"] = rng.choice(({}, {"xdino": 3}, {"ydino": "{}"}, [], "x"))
    told = json.dumps(header).encode()
    return struct.pack("<Q", len(told)) + told + content[8 + size :]


def members_changed(content: bytes, rng: random.Random, _: list[bytes]) -> bytes:
    """Of a zip: a member missing, twice, of another's bytes, or packed from a gigabyte of nothing."""
    try:
        before = zipfile.ZipFile(io.BytesIO(content))
    except zipfile.BadZipFile:
        return content[::-1]
    out = io.BytesIO()
    names = before.namelist()
    one, what = rng.choice(names), rng.randrange(4)
    with zipfile.ZipFile(out, "w") as after:
        for name in names:
            told = before.read(name)
            if name == one and what == 0:
                continue
            if name == one and what == 1:
                told = before.read(rng.choice(names))
            if name == one and what == 2:
                after.writestr(name, bytes(1 << 27), zipfile.ZIP_DEFLATED)
                continue
            after.writestr(name, told[: len(told) // 2] if name == one else told)
    return out.getvalue()


BYTES = (cut, flipped, flipped, spliced, nothing, header_changed, members_changed)


# --- what is done to the tree of a checkpoint -------------------------------------------------


def _networks(tree: Any, depth: int = 0) -> list[dict[str, Any]]:
    """The dicts of tensors in a tree."""
    if not isinstance(tree, dict) or depth > 4:
        return []
    own = [tree] if any(isinstance(value, torch.Tensor) for value in tree.values()) else []
    return own + [n for value in tree.values() for n in _networks(value, depth + 1)]


def _values(rng: random.Random, old: torch.Tensor) -> Any:
    """Something else in the place of a tensor."""
    one = torch.zeros(1)
    return rng.choice((
        lambda: torch.full_like(old.float(), float("nan")),
        lambda: one.expand(2**31, 2**10) if old.numel() else one,
        lambda: torch.zeros(()).expand(old.shape),
        lambda: old.to(torch.int64),
        lambda: old.to(torch.complex64),
        lambda: old.float().to(torch.float8_e4m3fn),
        lambda: old.to("meta"),
        lambda: old.float().to_sparse(),
        lambda: torch.quantize_per_tensor(old.float(), 0.1, 0, torch.qint8),
        lambda: torch.zeros(()),
        lambda: torch.zeros(0, 3),
        lambda: old.flatten(),
        lambda: old.unsqueeze(0),
        lambda: None,
        lambda: [1, 2],
        lambda: "text",
        lambda: {"inner": old},
        lambda: 10**5000,
    ))()  # fmt: skip


def tree_changed(tree: Any, rng: random.Random, proof: Path) -> Any:
    """The tree of a checkpoint, with something in it that does not belong."""
    networks = _networks(tree)
    one = rng.choice(networks) if networks else {}
    name = rng.choice([n for n in one if isinstance(n, str)] or ["x"])
    match rng.randrange(14):
        case 0:
            one.pop(name, None)
        case 1 | 2:
            one[name] = _values(rng, one.get(name, torch.zeros(2)))
        case 3:
            one[rng.choice((3, None, ("a", 1), "", ".", "backbone.", "module." * 500))] = (
                torch.zeros(2)
            )
        case 4:
            tree[rng.choice(list(tree))] = rng.choice((None, {}, [], 3, "x", torch.zeros(2)))
        case 5:
            tree["epoch"] = Harm(proof, rng.choice((os.mkdir, os.makedirs, os.system, eval, exec)))
        case 6:
            size = rng.choice((10, 10**10))
            tree["args"] = rng.choice((
                Calls(bytearray, size),
                Calls(np._core.multiarray.scalar, np.dtype(f"V{min(size, 2**31 - 1)}")),
                Calls(np.dtype, "x" * 1000),
                Calls(torch.empty, size),
                Calls(range, size),
                Calls(pathlib.PosixPath, "/etc/passwd"),
                Calls(getattr, "text", "upper"),
            ))  # fmt: skip
        case 7:
            for place in ("teacher", "student", "model", "state_dict", "learner"):
                if place in tree:
                    tree[place] = tree  # a tree within itself
        case 8:
            deep: Any = {}
            for _ in range(rng.choice((50, 900))):
                deep = {"model": deep}
            tree = deep
        case 9:
            tree["args"] = argparse.Namespace(
                arch=rng.choice(("x" * 10**6, 3, None, "vit_tiny", "", "deit_tiny0")),
                patch_size=rng.choice((0, -1, "16", 10**30, None)),
            )
        case 10:
            tree["spec"] = rng.choice((
                None, [], {}, {"arch": 3}, {"arch": "xcit_nano_12_p8", "mean": 3, "std": []},
                {"arch": "xcit_nano_12_p8", "mean": (0, 0, 0), "std": (1, 1, 1),
                 "shape": {"depth": 10**9, "embed_dim": 10**9}},
                {"arch": "vit_giant_patch14_224", "mean": (0, 0, 0), "std": (1, 1, 1)},
            ))  # fmt: skip
        case 11:
            tree["iteration"] = rng.choice((None, "7", -1, 10**400, [1]))
        case 12:
            for key in [n for n in one if isinstance(n, str)]:
                one[rng.choice(("teacher.", "net.", "", "momentum_backbone.")) + key] = one.pop(key)
        case 13:
            shapes = [n for n, v in one.items() if isinstance(v, torch.Tensor)]
            if len(shapes) > 1:
                a, b = rng.sample(shapes, 2)
                one[a], one[b] = one[b], one[a]
    return tree


# --- the trial --------------------------------------------------------------------------------


def run(seed: int, count: int) -> dict[str, int]:
    """Read `count` damaged files: how many came to what.

    Keys: "network", "UsageError", "RunFailed"; and "tracebacks", "code ran", "slow", "too large",
    which are defects and 0.
    """
    rng, counts = random.Random(seed), collections.Counter[str]()
    for defect in ("tracebacks", "code ran", "slow", "too large"):
        counts[defect] = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        good = good_files(folder)
        contents = [path.read_bytes() for path in good if path.is_file()]
        trees = [path for path in good if path.suffix in (".pth", ".pt", ".ckpt")]
        proof = folder / "proof"
        for number in range(count):
            work = folder / "trial"
            work.mkdir(exist_ok=True)
            path, what = _trial(work, good, contents, trees, rng, proof)
            role, arch = rng.choice(("teacher", "student")), rng.choice(ARCHS)
            began = time.monotonic()
            try:
                load_backbone(path, arch, role)
                outcome = "network"
            except (UsageError, RunFailed) as error:
                outcome = type(error).__name__
                if not str(error) or "\n" in str(error).strip() or len(str(error)) > 3000:
                    print(f"{number} {what}: no sentence: {str(error)[:300]!r}", file=sys.stderr)
                    outcome = "tracebacks"
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                print(f"{number} {what} {role} {arch!r:.40}", file=sys.stderr)
                traceback.print_exc()
                outcome = "tracebacks"
            counts[outcome] += 1
            if time.monotonic() - began > SECONDS:
                print(f"{number} {what}: {time.monotonic() - began:.1f} s", file=sys.stderr)
                counts["slow"] += 1
            if proof.exists():
                counts["code ran"] += 1
                proof.rmdir()
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024 > MEGABYTES:
        counts["too large"] += 1
    return dict(counts)


def _trial(
    folder: Path,
    good: list[Path],
    contents: list[bytes],
    trees: list[Path],
    rng: random.Random,
    proof: Path,
) -> tuple[Path, str]:
    """One damaged file, and what was done to it."""
    if rng.random() < 0.1:
        return rng.choice(good), "nothing"
    if rng.random() < 0.5:
        source, work = rng.choice(trees), rng.choice(BYTES)
        with torch.serialization.safe_globals(plain_types()):
            tree = torch.load(source, weights_only=False)
        tree = tree_changed(tree, rng, proof)
        path = folder / f"tree{rng.choice((source.suffix, '.pth', '.safetensors', ''))}"
        older = rng.random() < 0.3
        try:
            torch.save(tree, path, _use_new_zipfile_serialization=not older)
        except (RuntimeError, NotImplementedError, RecursionError, pickle.PicklingError):
            path.write_bytes(b"")
        return path, f"tree of {source.name}"
    source = rng.choice([path for path in good if path.is_file()])
    work = rng.choice(BYTES)
    path = folder / rng.choice((f"c{source.suffix}", f"c{source.suffix}", "c.pth", "c.safetensors"))
    path.write_bytes(work(source.read_bytes(), rng, contents))
    return path, f"{work.__name__} {source.name}"


if __name__ == "__main__":
    given = [int(text) for text in sys.argv[1:]]
    found = run(*[*given, *(0, 400)[len(given) :]])
    print(json.dumps(found, indent=2))
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MB at most")
