"""Shards over HTTP and S3: the same batches as from disk, a bounded cache, networks that fail."""

import http.server
import os
import re
import shutil
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from xdino.augment.multi_crop import multi_crop
from xdino.data.loader import CropLoader
from xdino.data.pack import pack
from xdino.data.remote import shard_cache, transport
from xdino.data.sources import fingerprint, open_source, open_splits, splits_of
from xdino.errors import RunFailed, UsageError
from xdino.runtime import places

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")
CROPS = multi_crop(16, local_count=1, local_size=8)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files with ranges; `server.asked` counts requests, `server.fails` says how many go wrong.

    All do where `server.gone()`.
    """

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        name = os.path.basename(self.path)
        self.server.asked[name] += 1
        gone = self.server.gone()
        if self.server.fails or gone:
            self.server.fails -= not gone
            self.send_response(503)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        spoken = self.headers.get("Range")
        path = Path(self.translate_path(self.path))
        if spoken is None or not self.server.ranges or not path.is_file():
            return super().do_GET()
        first, last = spoken.removeprefix("bytes=").split("-")
        data = path.read_bytes()[int(first) : int(last) + 1]
        self.server.sent += len(data)
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three shards of train (24 images) and of val (9), two classes."""
    root = tmp_path_factory.mktemp("remote")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 5)):
        for name in ("cat", "dog"):
            for i in range(count):
                path = root / "photos" / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 255, (30 + i, 40, 3), dtype=np.uint8)).save(path)
    pack(str(root / "photos"), root / "shards", shards=3)
    return root / "shards"


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    """A cache of its own, and little patience."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDINO_NETWORK_SECONDS", "3")
    monkeypatch.setattr(transport, "_WAITS", (0.01, 0.02))
    return tmp_path / "cache" / "xdino"


@pytest.fixture
def server(shards, tmp_path):
    served = tmp_path / "served"
    shutil.copytree(shards, served, ignore=shutil.ignore_patterns(".*"))
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Handler, directory=str(served))
    )
    server.asked, server.fails, server.ranges, server.sent = Counter(), 0, True, 0
    server.gone = lambda: False
    server.folder, server.url = served, f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def batches(source, start: int = 0, end: int = 9) -> list:
    loader = CropLoader(source, CROPS, 8, 3, workers=3)
    return list(loader.iterate(start, end))


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(
        (x.indices == y.indices).all()
        and (x.table == y.table).all()
        and all(torch.equal(p, q) for p, q in zip(x.crops, y.crops, strict=True))
        for x, y in zip(a, b, strict=True)
    )


NAMES = "{train,val}-{00000..00002}.tar"


@pytest.mark.parametrize("gigabytes", ["0", "0.00003", "1"])
def test_batches_over_http_are_those_from_disk(shards, server, here, monkeypatch, gigabytes):
    """With no copy, with room for one shard, and with room for all."""
    monkeypatch.setenv("XDINO_CACHE_GB", gigabytes)
    data = f"{server.url}/{NAMES}"
    ours, theirs = open_splits(data), open_splits(str(shards))
    assert splits_of(data) == ("train", "val")
    for remote, local in zip(ours, theirs, strict=True):
        assert fingerprint(remote) == fingerprint(local)
        assert (remote.labels == local.labels).all()
        assert remote.classes == local.classes
    expected = batches(theirs[0])
    assert same(batches(ours[0]), expected)
    # A run that was stopped in the middle of a shard, in another process with another cache.
    monkeypatch.setenv("XDINO_CACHE", str(here / "other"))
    assert same(batches(open_source(data, "train"), 4), expected[4:])
    copies = [path.stat().st_size for path in (here / "shards").glob("*.tar")]
    assert sum(copies) <= float(gigabytes) * 1e9
    assert (len(copies) == 0) == (gigabytes == "0")
    assert ours[0].describe(0) == f"{server.url}/train-00000.tar: cat/0.png"


def test_what_was_read_is_not_asked_for_again(server, here):
    data = f"{server.url}/train-{{00000..00002}}.tar"
    source = open_source(data, "train")
    wanted = [source.encoded(i) for i in range(len(source))]
    server.asked.clear()
    again = open_source(data, "train")
    assert sum(server.asked.values()) == 0
    assert [again.encoded(i) for i in range(len(again))] == wanted
    assert sum(server.asked.values()) == 0, "every shard has its copy"
    assert sorted(path.suffix for path in (here / "shards").iterdir()) == ["", *[".tar"] * 3]


def test_a_shard_that_is_written_again_is_read_again(server, shards):
    data = f"{server.url}/train-00000.tar"
    before = open_source(data)
    shutil.copy(shards / "val-00000.tar", server.folder / "train-00000.tar")
    os.utime(server.folder / "train-00000.tar", (1, 10**9))
    after = open_source(data)
    assert len(after) != len(before)
    assert after.encoded(0) == open_source(str(shards / "val-00000.tar")).encoded(0)


def test_a_copy_makes_room_only_for_other_data(server, here, monkeypatch):
    size = (server.folder / "train-00000.tar").stat().st_size
    monkeypatch.setenv("XDINO_CACHE_GB", str(1.5 * size / 1e9))
    first = open_source(f"{server.url}/train-00000.tar")
    (copy,) = (here / "shards").glob("*.tar")
    open_source(f"{server.url}/train-00001.tar")
    (other,) = (here / "shards").glob("*.tar")
    assert other != copy
    assert first.encoded(0)  # now in pieces
    # What a killed process left counts for nothing.
    (here / "shards" / "0.tar.part").write_bytes(b"x" * size)
    cache = shard_cache.ShardCache([])
    assert cache._room(here / "shards" / "new.part", size)
    assert list((here / "shards").glob("*.part")) == []


def test_a_network_that_fails_for_a_moment_is_tried_again(server, monkeypatch):
    monkeypatch.setenv("XDINO_CACHE_GB", "0")
    source = open_source(f"{server.url}/train-00000.tar")
    server.fails = 3
    assert source.encoded(0)
    assert server.fails == 0


def test_a_network_that_fails_stops_the_reading_with_a_sentence(server, monkeypatch):
    """And never counts as unreadable images, which another would stand in for."""
    monkeypatch.setenv("XDINO_CACHE_GB", "0")
    source = open_source(f"{server.url}/train-00000.tar")
    monkeypatch.setenv("XDINO_NETWORK_SECONDS", "0.2")
    server.fails = 10**9
    with pytest.raises(
        RunFailed,
        match=r"train-00000\.tar cannot be read \(its .* 503 .*tried \d+ times",
    ):
        source.read(0)
    loader = CropLoader(source, CROPS, 4, 3, workers=2)
    with pytest.raises(RunFailed, match="cannot be read"):
        list(loader.iterate(0, 2))
    assert loader.bad == {}
    server.fails = 0
    (server.folder / "train-00000.tar").unlink()
    with pytest.raises(RunFailed, match="does not exist"):
        source.read(0)


def test_mistakes_about_addresses_are_sentences(server, monkeypatch):
    for data, sentence in (
        (f"{server.url}/gone.tar", "gone.tar does not exist"),
        (f"{server.url}/train-{{00000..00007}}.tar", r"train-0000\d\.tar does not exist"),
        (f"{server.url}/photos", "at an address data are tars"),
        (f"{server.url}/nothing-*.tar", "matches nothing"),
        ("ftq://host/a.tar", r"cannot be read: Protocol not known.*xdino\[remote\]"),
        (f"{server.url}/val-{{00000..00001}}.tar", "nothing to train on but"),
    ):
        with pytest.raises(UsageError, match=sentence):
            open_source(data, "train")
    monkeypatch.setenv("XDINO_CACHE_GB", "0")
    server.ranges = False
    source = open_source(f"{server.url}/train-00001.tar")  # a small one is one piece
    with pytest.raises(RunFailed, match="sends all of a file where a piece is asked for"):
        source.read(0)
    monkeypatch.setenv("XDINO_CACHE_GB", "much")
    with pytest.raises(UsageError, match="must be a number of gigabytes, got much"):
        open_source(f"{server.url}/train-00000.tar")
    monkeypatch.setenv("XDINO_NETWORK_SECONDS", "0.2")
    with pytest.raises(RunFailed, match=r"cannot be read \(.*tried \d+ times"):
        open_source("http://127.0.0.1:9/a.tar")


def test_a_damaged_shard_is_refused_by_its_address(server):
    path = server.folder / "train-00000.tar"
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(UsageError, match=rf"{server.url}/train-00000\.tar is damaged or cut short"):
        open_source(f"{server.url}/train-00000.tar")


TINY = {
    "--model.arch": "xcit_nano_12_p8",
    "--model.embed_dim": "16",
    "--model.depth": "1",
    "--model.num_heads": "2",
    "--head.prototypes": "32",
    "--head.hidden_dim": "16",
    "--head.bottleneck_dim": "8",
    "--crops.global_size": "32",
    "--crops.local_size": "16",
    "--crops.local_count": "1",
    "--train.epochs": "3",
    "--train.batch_size": "6",
    "--runtime.workers": "2",
    "--evaluate.every": "0",
    "--runtime.checkpoint_every": "1",
    "--runtime.prefetch": "1",
}


def test_a_run_whose_store_is_gone_names_its_checkpoint_and_goes_on_to_the_bit(
    shards, server, xdino, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDINO_CACHE_GB", "0")
    data = f"{server.url}/{NAMES}"
    place = tmp_path / "runs" / "remote"
    options = [word for pair in TINY.items() for word in pair]
    command = ["pretrain", "small_data", "--run", place, *options, "--data.path", data]
    server.gone = lambda: (place / "checkpoints" / "last.pt").exists()
    monkeypatch.setenv("XDINO_NETWORK_SECONDS", "0.1")
    code, _, error = xdino(*command)
    assert code == 1
    told = error.splitlines()[-1]
    assert re.search(
        r"train-0000\d\.tar cannot be read \(its server answers 503 .*tried \d+ times in \d+ s\. "
        rf"The last good checkpoint is {place}/checkpoint\S*, iteration [1-9]", error.replace("\n", " "),
    ), told  # fmt: skip
    server.gone = lambda: False
    assert xdino(*command)[0] == 0
    whole = tmp_path / "runs" / "disk"
    assert xdino("pretrain", "small_data", "--run", whole, *options, "--data.path", shards)[0] == 0
    ours, theirs = (load_file(run / "backbone.safetensors") for run in (place, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# S3


@pytest.fixture
def s3(shards, monkeypatch):
    server_of = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    import boto3

    running = server_of.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    fsspec.filesystem("s3").clear_instance_cache()
    client = boto3.client("s3")
    client.create_bucket(Bucket="images")
    for path in shards.glob("*.tar"):
        client.upload_file(str(path), "images", f"small/{path.name}")
    yield running
    running.stop()


def test_batches_from_s3_are_those_from_disk(shards, s3, here, monkeypatch):
    expected = batches(open_source(str(shards), "train"))
    for data, gigabytes in (("s3://images/small/", "1"), (f"s3://images/small/{NAMES}", "0")):
        monkeypatch.setenv("XDINO_CACHE_GB", gigabytes)
        train, val = open_splits(data)
        assert (len(train), len(val)) == (24, 10)
        assert same(batches(train), expected)
        assert same(batches(train, 4), expected[4:])
    with pytest.raises(UsageError, match=r"s3://images/small/gone\.tar does not exist"):
        open_source("s3://images/small/gone.tar")
    with pytest.raises(UsageError, match="matches nothing"):
        open_source("s3://images/nothing/")


# Patterns of files


def test_patterns_name_tars_on_disk(shards, monkeypatch):
    expected = fingerprint(open_source(str(shards), "train", labelled=True))
    for pattern in (NAMES, "*.tar", "{train,val}-*.tar", "train-0000?.tar"):
        source = open_source(str(shards / pattern), "train", labelled=True)
        assert fingerprint(source) == expected, pattern
        places.check_data(str(shards / pattern))
    assert len(open_splits(str(shards / "*.tar"))[1]) == 10
    assert splits_of(str(shards / "*.tar")) == ("train", "val")
    monkeypatch.chdir(shards)
    assert len(open_source("train-{00000..00001}.tar", "train")) == 16
    with pytest.raises(
        UsageError, match=r"2 of train-.* do not exist: train-00003\.tar, train-00004"
    ):
        open_source("train-{00000..00004}.tar", "train")
    with pytest.raises(UsageError, match="there is no data set or folder"):
        open_source("nothing-*.tar", "train")


def test_braces_are_those_of_a_shell():
    assert places.without_braces("a{1..3}b") == ["a1b", "a2b", "a3b"]
    assert places.without_braces("{098..101}") == ["098", "099", "100", "101"]
    assert places.without_braces("{3..1}{x,y}") == ["3x", "3y", "2x", "2y", "1x", "1y"]
    assert places.without_braces("a{b}c{..}") == ["a{b}c{..}"]
    with pytest.raises(UsageError, match="more than 1,000,000 names"):
        places.without_braces("{0..9999999}")
    with pytest.raises(UsageError, match="more than 1,000,000 names"):
        places.without_braces("{0..9999}{0..9999}")


def test_a_name_with_braces_or_brackets_is_still_a_name(tmp_path):
    folder = tmp_path / "a{1,2}[x]*"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "x.png")
    assert len(open_source(str(folder), "train")) == 1
    started = time.monotonic()
    assert places.matching(str(tmp_path / "nothing")) == []
    assert time.monotonic() - started < 1
