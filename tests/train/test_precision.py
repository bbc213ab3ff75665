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
    """able(True): this processor multiplies in bf16, and is faster in it, from here on."""

    def set_to(flag, faster=True):
        monkeypatch.setattr(devices, "_times_favour_bf16", lambda: faster)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: flag)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)

    return set_to


def test_auto_is_bf16_where_the_device_is_faster_in_it(able):
    able(True)
    assert multiplies_bf16(CPU)
    assert resolve_precision("auto", CPU) == "bf16"
    able(False)
    assert not multiplies_bf16(CPU)
    assert resolve_precision("auto", CPU) == "fp32"
    assert resolve_precision("auto", CUDA) == "bf16"


def test_a_processor_that_is_slower_in_bf16_takes_fp32(able):
    """Intel's without AMX. A run that began in bf16 elsewhere goes on in it."""
    able(True, faster=False)
    assert resolve_precision("auto", CPU) == "fp32"
    assert resolve_precision("auto", CPU, "bf16") == "bf16"
    assert resolve_precision("bf16", CPU) == "bf16"
    assert resolve_precision("auto", CUDA) == "bf16"


@pytest.mark.parametrize(("half", "faster"), [(0.5, True), (2.0, False)])
def test_the_quickest_product_of_each_precision_decides(monkeypatch, half, faster):
    noise = iter([30.0, 5.0, 1.0, 1.5] * devices.PRODUCTS)
    seconds = {torch.float32: 1.0, torch.bfloat16: half}
    monkeypatch.setattr(devices, "_product_seconds", lambda dtype: seconds[dtype] * next(noise))
    devices._times_favour_bf16.cache_clear()
    assert devices._times_favour_bf16() == faster
    devices._times_favour_bf16.cache_clear()


def test_asking_draws_no_random_number_and_is_asked_once():
    devices._times_favour_bf16.cache_clear()
    before = torch.get_rng_state()
    first = resolve_precision("auto", CPU)
    assert torch.equal(before, torch.get_rng_state())
    assert resolve_precision("auto", CPU) == first


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
