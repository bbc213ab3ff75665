"""Which precision "auto" is, and that a run keeps it."""

import json

import pytest
import torch

from xdino.pretraining import Pretraining, pretrain
from xdino.runtime import device as devices
from xdino.runtime.device import multiplies_bf16, resolve_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def able(monkeypatch):
    """able(True): this processor multiplies in bf16, from here on."""

    def set_to(flag):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: flag)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)

    return set_to


def test_auto_is_bf16_where_the_device_multiplies_in_it(able):
    able(True)
    assert multiplies_bf16(CPU)
    assert resolve_precision("auto", CPU) == "bf16"
    able(False)
    assert not multiplies_bf16(CPU)
    assert resolve_precision("auto", CPU) == "fp32"
    assert resolve_precision("auto", CUDA) == "bf16"


def test_without_onednn_bf16_is_emulated(able, monkeypatch):
    able(True)
    monkeypatch.setattr(devices.torch.backends.mkldnn, "is_available", lambda: False)
    assert resolve_precision("auto", CPU) == "fp32"


@pytest.mark.parametrize(
    ("able_to", "before", "expected"),
    [
        (True, "fp32", "fp32"),  # begun on an older processor, or by an older version
        (True, "bf16", "bf16"),
        (False, "fp32", "fp32"),
        (False, "bf16", "fp32"),  # rather than ten times as slow
        (True, "nonsense", "bf16"),
        (True, None, "bf16"),
    ],
)
def test_a_run_keeps_what_it_was(able, able_to, before, expected):
    able(able_to)
    assert resolve_precision("auto", CPU, before) == expected
    for name in ("fp32", "bf16", "fp16"):
        assert resolve_precision(name, CPU, before) == name, "what is asked for is done"


def test_a_run_that_moves_goes_on_in_the_precision_that_it_began_with(tiny, tmp_path, able):
    config = tiny(train__epochs=1)
    assert config.train.precision == "auto"
    able(False)
    pretrain(config, tmp_path / "run")
    able(True)
    longer = Pretraining(config)
    longer.last_start = json.loads((tmp_path / "run" / "environment.json").read_text())["starts"][
        -1
    ]
    longer.make_plan(config)
    assert longer.plan.precision == "fp32"
    # The loop hears it from the folder; a damaged file says nothing.
    for text, expected in ((None, "fp32"), ("{", "bf16"), ('{"starts": [3]}', "bf16")):
        if text is not None:
            (tmp_path / "run" / "environment.json").write_text(text)
        (tmp_path / "run" / "checkpoints" / "last.pt").unlink(missing_ok=True)
        (tmp_path / "run" / "checkpoints" / "previous.pt").unlink(missing_ok=True)
        (tmp_path / "run" / "backbone.safetensors").unlink(missing_ok=True)
        pretrain(config, tmp_path / "run")
        starts = json.loads((tmp_path / "run" / "environment.json").read_text())["starts"]
        assert starts[-1]["precision"] == expected
