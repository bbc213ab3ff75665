"""A plan proves that a run can start; what cannot is refused before a file is written."""

import random
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn

from xdino import config
from xdino.errors import UsageError
from xdino.plan import check_disk, feasibility, make_plan
from xdino.runtime.device import check_compile, resolve_device


def small(**overrides):
    texts = {"model.embed_dim": "null", "model.depth": "null", "model.num_heads": "null"}
    texts |= {"evaluate.resize": "null", "train.batch_size": "2"}
    texts |= {key.replace("__", "."): text for key, text in overrides.items()}
    return config.load("debug", texts)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"model__arch": "test_vit", "crops__global_size": "64", "crops__local_size": "24"},
         r"crops\.local_size 24 is no multiple of the patch, 16: take 16 or 32"),
        ({"model__arch": "test_vit", "crops__global_size": "100", "crops__local_size": "32"},
         r"crops\.global_size 100 is no multiple of the patch, 16: take 96 or 112"),
        ({"model__arch": "test_vit", "crops__global_size": "64", "crops__local_size": "32",
          "evaluate__input_size": "70"}, r"evaluate\.input_size 70 is no multiple of the patch"),
        ({"model__arch": "mixer_s32_224", "crops__global_size": "224", "crops__local_size": "96"},
         r"crops\.local_size 96 is no size for mixer_s32_224 .*: take 224"),
        ({"model__arch": "resnet10t", "crops__global_size": "64", "crops__local_size": "16",
          "crops__local_count": "1", "train__batch_size": "1"}, "more than 1 value"),
        ({"model__arch": "test_vit.nothing"}, "Invalid pretrained tag"),
        ({"head__prototypes": "200000000"}, "take about"),
        ({"crops__global_size": "8000", "train__batch_size": "9000"}, "take about|a batch takes"),
        ({"train__epochs": "2000000000"}, "schedules of .* iterations take about"),
        ({"optim__lr": "1e300"}, r"optim\.lr or optim\.min_lr is too large"),
        ({"optim__weight_decay": "1e300"}, "is too large"),
        ({"optim__lr": "1e20", "optim__weight_decay": "1e20"}, r"optim\.lr times optim\.weight_decay"),
        ({"crops__mean": "0.1,0.2,0.3", "crops__std": "1,1,1"}, "one value a channel: 1, got 3"),
        ({"data__path": "~nosuchuser/x"}, "~nosuchuser/x cannot be read"),
        ({"data__path": "x" * 300}, "File name too long"),
        ({"runtime__device": "mps"}, "choose auto, cpu or cuda"),
    ],
)  # fmt: skip
def test_what_cannot_start_is_one_sentence(overrides, sentence):
    with pytest.raises(UsageError, match=sentence):
        make_plan(small(**overrides))


def test_networks_of_all_kinds_are_planned():
    for arch, width in (
        ("mobilenetv3_small_050", 1024),
        ("test_vit", 64),
        ("xcit_nano_12_p8", 128),
    ):
        made = make_plan(small(model__arch=arch, crops__global_size="32", crops__local_size="32"))
        assert made.spec.build().embed_dim == width
        assert made.state_bytes > 0


def test_a_plan_leaves_no_trace_in_random_numbers(monkeypatch):
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    before = states()
    make_plan(small())
    monkeypatch.setattr(feasibility, "_try", lambda *rest: "no")  # then real networks are tried
    with pytest.raises(UsageError):
        make_plan(small())
    assert states() == before


def test_a_network_is_left_as_it_was_tried():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    network.embed_dim = 4
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert feasibility.why_not(network, 3, feasibility.Trial("size", 8)) is None
    network.embed_dim = 5
    assert "it makes [2, 4]" in feasibility.why_not(network, 3, feasibility.Trial("size", 8))
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_networks_that_ask_for_values_are_tried_for_real():
    class Asks(nn.Linear):
        embed_dim = 2

        def forward(self, images):
            return super().forward(images.mean((2, 3))) * self.bias.sum().item()

    assert feasibility.why_not(Asks(3, 2), 3, feasibility.Trial("size", 8)) is None


def test_what_would_crash_on_a_cpu_is_not_compiled(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.12.1+cu130")
    with pytest.raises(
        UsageError, match=r"runtime\.compile on a CPU needs torch 2\.13: what torch 2\.12"
    ):
        make_plan(small(runtime__compile="true", runtime__device="cpu"))
    check_compile(False, torch.device("cpu"))
    check_compile(True, torch.device("cuda"))
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    check_compile(True, torch.device("cpu"))


@pytest.mark.parametrize(
    "name", ["mps", "meta", "xpu", "gpu", "", "CPU", "cpu:0", "cuda:-1", "cuda:x", "[/]"]
)
def test_devices_that_are_none(name):
    with pytest.raises(UsageError, match="choose auto, cpu or cuda"):
        resolve_device(name)


def test_devices_that_this_machine_has_or_lacks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match="no CUDA device here"):
        resolve_device("cuda:99")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda", 0)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UsageError, match="this machine has cuda:0 to cuda:1"):
        resolve_device("cuda:2")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(
        UsageError, match="process 2 of this machine finds no CUDA device of its own"
    ):
        resolve_device("cuda")


def test_disk_room_for_two_checkpoints(tmp_path, monkeypatch):
    made = make_plan(small())
    check_disk(made, tmp_path / "a" / "b")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage(10**12, 0, 2 * made.state_bytes - 1)
    )
    with pytest.raises(UsageError, match="two checkpoints take about"):
        check_disk(made, tmp_path / "a" / "b")
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    last.parent.mkdir(parents=True)
    last.write_bytes(b"x" * 100)
    check_disk(made, tmp_path / "run")  # one of the two is there

    def unknown(path):
        raise OSError("quota")

    monkeypatch.setattr(shutil, "disk_usage", unknown)
    check_disk(made, tmp_path / "a" / "b")


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    from xdino.pretraining import pretrain

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 5))
    with pytest.raises(UsageError, match="two checkpoints"):
        pretrain(config.load("debug"), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
