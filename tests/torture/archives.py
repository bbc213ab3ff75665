"""Tars, IDX files and lists of paths, mutated at random: a source, or UsageError, or RunFailed.

    PYTHONPATH=ssl python tests/torture/archives.py SEED COUNT

Archive `i` of a seed is the same on any machine. One that hangs ends the process with a traceback
of where.
"""

import gzip
import io
import json
import os
import struct
import sys
import tarfile
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from trials import judge

from xdino.data.decode import UnreadableImage
from xdino.data.sources import Source, fingerprint, open_source, splits_of
from xdino.data.tars import PACK_MEMBER
from xdino.errors import RunFailed, UsageError

_MEMORY = 1 << 28  # bytes that opening and reading may take at most
_NUMBERS = (0, 1, -1, 255, 511, 512, 2**31, 2**32, 2**33 - 1, 2**40, 2**62, 2**63 - 1)


# Whole archives


@lru_cache(maxsize=8)
def _picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), (shade, 40, 90)).save(buffer, ("PNG", "JPEG")[shade % 2])
    return buffer.getvalue()


def _tar(rng: np.random.Generator) -> bytes:
    """A tar of a random kind, with a random few of what tars can hold."""
    buffer = io.BytesIO()
    format = int(rng.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    roots = (("",), ("train/", "val/"), ("n01/", "n02/"), ("train/a/", "val/a/"), ("val/",))
    root = roots[rng.integers(0, len(roots))]
    with tarfile.open(
        fileobj=buffer, mode="w", format=format, encoding="utf-8", errors="surrogateescape"
    ) as tar:
        for number in range(int(rng.integers(0, 7))):
            folder = root[rng.integers(0, len(root))]
            stem = (
                f"{folder}{('', 'x' * 110, 'caf' + chr(0xDCE9), '.h')[rng.integers(0, 4)]}{number}"
            )
            kinds = ((".jpg",), (".png", ".cls"), ("",), (".jpg", ".png", ".json"), (".left.jpg",))
            try:
                for suffix in kinds[rng.integers(0, len(kinds))]:
                    _add(tar, stem + suffix, _content(rng, suffix))
                if rng.random() < 0.2:
                    _add_odd(rng, tar, stem)
            except ValueError:  # USTAR has no room for long names
                continue
        if rng.random() < 0.3:
            _add(tar, PACK_MEMBER, _pack_member(rng))
    return buffer.getvalue()


def _content(rng: np.random.Generator, suffix: str) -> bytes:
    if suffix == ".cls":
        return (b"1", b"2\n", b"cat", b"", b"\xff\xfe", b"99999999999999999999")[rng.integers(0, 6)]
    return b"{}" if suffix == ".json" else _picture(int(rng.integers(0, 4)))


def _pack_member(rng: np.random.Generator) -> bytes:
    odd: tuple[object, ...] = (None, 1, -1, "x", [], ["a", "b"], {}, {"classes": ["a", 1]}, True)
    keys = ("splits", "channels", "shorter_side", "images")
    told: dict[str, object] = {
        key: odd[rng.integers(0, len(odd))] for key in keys if rng.random() < 0.5
    }
    if rng.random() < 0.5:
        told["splits"] = {
            name: odd[rng.integers(0, len(odd))]
            if rng.random() < 0.3
            else {"classes": odd[rng.integers(0, len(odd))]}
            for name in ("train", "val", "all")
        }
    return (json.dumps(told).encode(), b"[]", b"{", b"[" * 100_000)[
        rng.choice(4, p=[0.85, 0.05, 0.05, 0.05])
    ]


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _add_odd(rng: np.random.Generator, tar: tarfile.TarFile, stem: str) -> None:
    member = tarfile.TarInfo(stem + (".jpg", ".dir", "")[rng.integers(0, 3)])
    kinds = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)
    member.type = kinds[rng.integers(0, len(kinds))]
    member.linkname = "a.jpg"
    tar.addfile(member)


# Mutations of tars


def _header(rng: np.random.Generator, data: bytes) -> bytes:
    """A field of a member's header changed, and its checksum made right."""
    raw = bytearray(data)
    places = [p for p in range(0, len(raw) - 511, 512) if raw[p + 257 : p + 262] == b"ustar"]
    if not places:
        return data
    place = places[rng.integers(0, len(places))]
    choice = rng.integers(0, 5)
    if choice == 0:  # the size, in base 256
        number = int(rng.choice(np.array(_NUMBERS, object)))
        raw[place + 124 : place + 136] = b"\x80" + (number % 2**88).to_bytes(11, "big")
        if number < 0:
            raw[place + 124 : place + 136] = b"\xff" * 12
    elif choice == 1:
        raw[place + 124 : place + 136] = b"%011o\0" % int(rng.integers(0, 8**11))
    elif choice == 2:
        raw[place + 156 : place + 157] = rng.choice(list("0123456789xgLKSVMDA")).encode()
    elif choice == 3:
        raw[place : place + 100] = rng.bytes(100)
    else:
        raw[place + rng.integers(0, 512)] = rng.integers(0, 256)
    raw[place + 148 : place + 156] = b" " * 8
    raw[place + 148 : place + 156] = b"%06o\0 " % sum(raw[place : place + 512])
    return bytes(raw)


def _flip(rng: np.random.Generator, data: bytes) -> bytes:
    raw = bytearray(data)
    for place in rng.integers(0, max(1, len(raw)), rng.integers(1, 9)) if raw else ():
        raw[place] = rng.integers(0, 256)
    return bytes(raw)


def _truncate(rng: np.random.Generator, data: bytes) -> bytes:
    return data[: rng.integers(0, len(data) + 1)]


def _chain(rng: np.random.Generator, data: bytes) -> bytes:
    """Headers that announce headers."""
    member = tarfile.TarInfo("x")
    member.type = rng.choice(list("LKxg")).encode()
    header = member.tobuf(tarfile.GNU_FORMAT)
    return header * int(rng.choice([1, 2, 5, 3000], p=[0.4, 0.3, 0.2, 0.1])) + data


def _joined(rng: np.random.Generator, data: bytes) -> bytes:
    return (
        data + (_tar(rng), rng.bytes(700), bytes(1024), rng.bytes(512) + data)[rng.integers(0, 4)]
    )


def _same(rng: np.random.Generator, data: bytes) -> bytes:
    return data


_MUTATIONS: tuple[Callable[[np.random.Generator, bytes], bytes], ...] = (
    _header, _header, _header, _flip, _truncate, _chain, _joined, _same,
)  # fmt: skip


# What is opened


def _write_tars(rng: np.random.Generator, folder: Path) -> str:
    names = ("a.tar", "x-train-0.tar", "x-val-0.tar", "val.tar", "test-1.tar", "of-a-train.tar")
    for _ in range(int(rng.integers(1, 4))):
        data = _tar(rng)
        for _ in range(int(rng.integers(0, 3))):
            data = _MUTATIONS[rng.integers(0, len(_MUTATIONS))](rng, data)
        (folder / names[rng.integers(0, len(names))]).write_bytes(data)
    if rng.random() < 0.1:  # kept indexes of other files, damaged ones
        (folder / ".a.tar.index.npz").write_bytes(rng.bytes(300))
    return str(folder if rng.random() < 0.5 else sorted(folder.glob("*.tar"))[0])


def _write_idx(rng: np.random.Generator, folder: Path) -> str:
    for split, kind, rank in (("train", "images", 3), ("train", "labels", 1), ("t10k", "images", 3),
                              ("t10k", "labels", 1)):  # fmt: skip
        shape = (5, 28, 28)[:rank]
        content = (rng.integers(0, 10, shape)).astype(np.uint8).tobytes()
        announced = list(shape)
        if rng.random() < 0.2:
            announced[rng.integers(0, rank)] = int(rng.choice([0, 1, 2**20, 2**31, 2**32 - 1]))
        raw = bytes([0, 0, 8, rank]) + struct.pack(f">{rank}I", *announced) + content
        if rng.random() < 0.2:
            raw = (_flip, _truncate)[rng.integers(0, 2)](rng, raw)
        if rng.random() < 0.1:
            raw += bytes(1 << 24)  # a bomb, where it is compressed
        packed = rng.random() < 0.5
        raw = gzip.compress(raw, 1) if packed else raw
        if rng.random() < 0.1:
            raw = (_flip, _truncate)[rng.integers(0, 2)](rng, raw)
        name = f"{split}-{kind}-idx{rank}-ubyte" + ".gz" * packed
        if rng.random() < 0.97:
            (folder / name).write_bytes(raw)
    return f"fashion_mnist:{folder}"


def _write_list(rng: np.random.Generator, folder: Path) -> str:
    (folder / "a.png").write_bytes(_picture(0))
    (folder / "b.jpg").write_bytes(_picture(1))
    os.mkfifo(folder / "pipe.png")
    os.symlink("self.png", folder / "self.png")
    lines = ("a.png", "b.jpg", f"{folder}/a.png", "./a.png", "# a word", "", "pipe.png", "self.png",
             "gone.png", "x" * 5000, "../" + folder.name + "/b.jpg", "~nobody/a.png", "a\0b")  # fmt: skip
    weights = np.array([9, 9, 9, 9, 3, 3, *[0.3] * 7])
    chosen = rng.choice(lines, rng.integers(0, 9), p=weights / weights.sum())
    text = ("\n", "\r\n", "\r")[rng.integers(0, 3)].join(chosen)
    codings = ("utf-8", "utf-8-sig", "utf-16", "utf-16-be")
    raw = text.encode(codings[rng.integers(0, 4)])
    if rng.random() < 0.3:
        raw = (_flip, _truncate)[rng.integers(0, 2)](rng, raw)
    if rng.random() < 0.2:
        raw = (gzip.compress(raw), b"PK\3\4" + raw, _picture(1), _tar(rng), b"")[rng.integers(0, 5)]
    path = folder / ("all.txt", "all", "all.zip", "all.png")[rng.choice(4, p=[0.7, 0.1, 0.1, 0.1])]
    path.write_bytes(raw)
    return str(path)


def make(seed: int, i: int, folder: Path) -> str:
    """Write archive `i` of a seed into an empty folder; what to open."""
    rng = np.random.default_rng((seed, i))
    write = (_write_tars, _write_tars, _write_tars, _write_idx, _write_list)[rng.integers(0, 5)]
    return write(rng, folder)


def _outcome(data: str, i: int) -> str:
    try:
        source = open_source(data, (None, "train", "val")[i % 3], labelled=i % 2 == 1)
        splits_of(data)
    except (UsageError, RunFailed) as error:
        told = error
    else:
        _use(source)
        return "opened"
    assert 0 < len(str(told)) < 20_000
    return type(told).__name__


def _use(source: Source) -> None:
    assert len(source) > 0
    assert len(fingerprint(source)) == 16
    assert source.stamps()
    assert all(isinstance(told, str) for told in source.notices())
    if source.labels is not None:
        assert source.labels.min() >= 0
        assert source.labels.max() < len(source.classes or ())
    for index in range(min(len(source), 8)):
        assert source.describe(index)
        assert source.member(index)
        try:
            image = source.read(index)
        except (UnreadableImage, OSError):
            continue
        assert image.dtype == np.uint8
        assert image.ndim == 3


def run(seed: int, count: int) -> dict[str, int]:
    """Open archives 0 to `count` of a seed and read them.

    Anything but "opened", "UsageError" and "RunFailed" is a defect.
    """

    def trial(i: int) -> str:
        with tempfile.TemporaryDirectory() as folder:
            return _outcome(make(seed, i, Path(folder)), i)

    return judge(
        f"archives, seed {seed}, archive",
        ("opened", "UsageError", "RunFailed"),
        range(count),
        _MEMORY,
        trial,
    )


if __name__ == "__main__":
    print(run(int(sys.argv[1]), int(sys.argv[2])))
