"""Fused kernels: interpreted against the plain path, compiled for Hopper, chosen or not, on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from xdino import acceleration, augment, kernels, xcit
from xdino.acceleration import Choice, choice, equality, speed
from xdino.acceleration.speed import Comparison
from xdino.augment import photometric
from xdino.errors import UsageError
from xdino.head import DINOHead
from xdino.learner import Learner
from xdino.loss import DINOLoss
from xdino.schedules import StepSettings
from xdino.student_teacher import MultiCropNetwork, make_teacher

HERE = Path(__file__).parent
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
CROPS = augment.multi_crop(32, local_size=16, local_count=2)


def triton_here():
    return pytest.importorskip("triton")


def minor(module):
    """(major, minor) of its version."""
    return tuple(map(int, module.__version__.split(".")[:2]))


def interpreter_here():
    triton = triton_here()
    # It turns arrays of one element into numbers, which numpy no longer does.
    if minor(triton) < (3, 7) and minor(np) >= (2, 5):
        pytest.skip(f"triton {triton.__version__} cannot interpret with numpy {np.__version__}")


def run(*command, interpret):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, command)],
        env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-3000:]
    return ran.stdout


def interpreted(*options):
    return run(
        "-m", "pytest", HERE / "cases_in_interpreter.py", "-p", "no:cacheprovider", *options,
        interpret=True,
    )  # fmt: skip


def test_interpreted():
    interpreter_here()
    assert " passed" in interpreted("-m", "not slow")


@pytest.mark.slow
def test_interpreted_slow():
    interpreter_here()
    assert " passed" in interpreted("-m", "slow")


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, agree):
    triton_here()
    for world in (1, 2):
        run(HERE / "two_processes_fused.py", tmp_path / f"{world}.pt", world, interpret=True)
    alone, together = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, 2))
    assert alone.keys() == together.keys()
    for name, value in alone.items():
        agree(name, together[name], value, 2e-5)


@pytest.mark.slow
def test_kernels_compile_for_hopper():
    """With the widths of XCiT-small, in the precision of a run; the big tiles do not spill."""
    triton_here()
    said = run(HERE / "compile_for_hopper.py", "384,8,4,32,bf16", "views3", interpret=False)
    lines = [line.split(": ", 1) for line in said.splitlines()]
    names = {name.removeprefix("xdino.kernels.") for name, _ in lines}
    assert names == {
        "xca._forward", "xca._backward", "residual._forward", "residual._backward",
        "lpi._conv_gelu", "lpi._norm_conv_sum", "lpi._conv_backward", "lpi._gelu_backward",
        "batch_norm._moments", "batch_norm._finish", "batch_norm._apply",
        "batch_norm._backward_sums", "batch_norm._backward_apply", "mlp._gelu_backward",
        "sums._column_sums", "photometric._level_sums", "photometric._views",
    }  # fmt: skip
    for name, facts in lines:
        spilled = int(facts.split(" bytes spilled")[0].split()[-1])
        assert spilled <= 256, f"{name}: {facts}"


# The choice


@pytest.fixture
def no_triton(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)  # every import of it now fails
    for name in [name for name in sys.modules if name.startswith("xdino.kernels.")]:
        monkeypatch.delitem(sys.modules, name)


def tiny():
    return xcit.XCiT(8, 32, 1, 2)


def test_without_triton_everything_is_plain(no_triton):
    found = acceleration.choose("auto", tiny(), CROPS, CUDA)
    assert (found.network, found.views) == (False, False)
    assert (
        "the plain path is used, not the fused kernels, for the views and the network" in found.why
    )
    assert "triton cannot be imported" in found.why
    with pytest.raises(UsageError, match="triton cannot be imported"):
        acceleration.choose("fused", tiny(), CROPS, CUDA)
    one_step("auto", CPU)
    crops = torch.zeros(4, 16, 16, 3, dtype=torch.uint8)
    table = augment.draw_batch(CROPS, 0, 0, np.arange(4))[0]
    assert photometric.photometric(crops, table, CROPS).isfinite().all()


def one_step(mode, device):
    student = MultiCropNetwork(tiny(), DINOHead(32, 64, 32, 16))
    learner = Learner(student, make_teacher(student, tiny()), DINOLoss(64), device=device)
    choice = acceleration.choose(mode, student.backbone, CROPS, device)
    acceleration.use_kernels((learner.student, learner.teacher), choice.network)
    groups = [torch.randn(v, 2, 3, s, s, device=device) for v, s in ((2, 32), (2, 16))]
    settings = StepSettings(1e-3, 0.04, 0.9, 0.04, freeze_last_layer=False)
    return learner.step([groups], settings), learner


def test_a_cpu_stays_plain_without_a_word():
    assert acceleration.choose("auto", tiny(), CROPS, CPU) == Choice()
    assert acceleration.choose("plain", tiny(), CROPS, CUDA) == Choice()
    _, learner = one_step("auto", CPU)
    assert not learner.student.backbone.fused


def test_fused_says_why_it_cannot_be():
    if not kernels.interpreted():
        with pytest.raises(UsageError, match="for CUDA devices, and this one is cpu"):
            acceleration.choose("fused", tiny(), CROPS, CPU)
    with pytest.raises(UsageError, match='cannot be "fussed": did you mean "fused"'):
        acceleration.choose("fussed", tiny(), CROPS, CPU)


@pytest.fixture
def works(monkeypatch):
    """Kernels that can run, agree and are twice as fast: `works(views=..., network=...)` changes it.

    A text is why a part does not agree, a number its speed-up.
    """

    def claim(**parts):
        for part, claimed in ({"views": 2.0, "network": 2.0} | parts).items():
            why = claimed if isinstance(claimed, str) else None
            times = Comparison([claimed] * 3 if why is None else [], [1.0] * 3)
            single, several = {"views": ("views", "views"), "network": ("network", "networks")}[
                part
            ]
            monkeypatch.setattr(equality, f"check_{single}", lambda *a, why=why: why)
            monkeypatch.setattr(speed, f"compare_{several}", lambda *a, times=times: times)

    monkeypatch.setattr(kernels, "reason", lambda device: None)
    monkeypatch.setattr(choice, "_fuses_xca", lambda *a: True)
    claim()
    return claim


def test_auto_takes_what_agrees_and_is_faster(works, monkeypatch):
    fused = {"network": True, "xca": True, "views": True}
    found = acceleration.choose("auto", tiny(), CROPS, CUDA)
    assert (found.network, found.views, found.why) == (True, True, None)
    assert found.facts() == {
        "fused_kernels": fused, "compiled": False, "activation_checkpointing": False,
        "cuda_graphs": False, "fused_speedup": {"views": 2.0, "network": 2.0},
    }  # fmt: skip

    works(network="the output is 0.5 away")
    found = acceleration.choose("auto", tiny(), CROPS, CUDA)
    assert (found.network, found.views, found.speedup) == (False, True, {"views": 2.0})
    assert found.why == (
        "the plain path is used, not the fused kernels, for the network, since the output is 0.5 away"
    )
    works(network=1.01, views=0.5)
    found = acceleration.choose("auto", tiny(), CROPS, CUDA)
    assert (found.network, found.views) == (False, False)
    assert found.why == (
        "the plain path is used, not the fused kernels, for the views, since they are not faster here "
        "(1000.0 ms against 500.0 ms); for the network, since they are not faster here (1000.0 ms "
        "against 1010.0 ms)"
    )
    assert found.facts()["fused_kernels"] == dict.fromkeys(fused, False)
    assert found.facts()["fused_speedup"] == {"views": 0.5, "network": 1.01}

    # A network that is no XCiT has no kernels, and nobody would expect any.
    works()
    found = acceleration.choose("auto", nn.Linear(2, 2), CROPS, CUDA)
    assert (found.network, found.views, found.why) == (False, True, None)
    # One process must not go another way than the rest.
    monkeypatch.setattr(choice.distributed, "any_true", lambda flag: True)
    found = acceleration.choose("auto", tiny(), CROPS, CUDA)
    assert (found.network, found.views) == (False, False)
    assert found.why == (
        "the plain path is used, not the fused kernels, for the views and the network, since another "
        "process found that they do not work"
    )


def test_two_paths_are_timed_in_turns():
    ran, now = [], [0.0]

    def path(name, seconds):
        def work():
            ran.append(name)
            now[0] += next(seconds)

        return work

    warming = [50.0, 9.0]
    plain = path("plain", iter([*warming, 3.0, 3.0, 3.0, 3.0, 30.0, 3.0, 3.0]))
    fused = path("fused", iter([*warming, 2.0, 2.0, 20.0, 2.0, 20.0, 2.0, 2.0]))
    found = speed.in_turns(plain, fused, CPU, clock=lambda: now[0])
    assert ran == ["plain", "fused"] * 9
    assert found.fused == pytest.approx([2.0, 2.0, 20.0, 2.0, 20.0, 2.0, 2.0])
    assert found.speedup == pytest.approx(1.5)
    assert found.why_not() is None


def test_comparisons_run_and_leave_no_trace():
    """On the plain path twice, which is all that a CPU has."""
    model, before = tiny(), torch.get_rng_state()
    found = speed.compare_networks(model, CROPS, 1, CPU, torch.bfloat16)
    assert len(found.plain) == len(found.fused) == speed.ROUNDS
    assert min(found.plain + found.fused) > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_what_cannot_be_timed_stays_plain():
    triton_here()

    def full():
        raise torch.OutOfMemoryError("out of memory: tried to allocate 2 GiB")

    compared, why = speed.tried(full)
    assert compared is None
    assert why.startswith("they cannot be timed here (OutOfMemoryError: out of memory")


def test_what_needs_the_plain_path_gets_it(works):
    # torch.compile and the kernels would both run the network; what was asked for by name does.
    found = acceleration.choose("auto", tiny(), CROPS, CUDA, compile=True)
    assert (found.network, found.views, found.compiled) == (False, True, True)
    assert found.why.endswith("for the network, since runtime.compile needs the plain path")
    assert acceleration.choose("plain", tiny(), CROPS, CUDA, compile=True) == Choice(compiled=True)
    assert acceleration.choose("auto", tiny(), CROPS, CPU, compile=True) == Choice(compiled=True)
    thrifty = tiny()
    thrifty.set_grad_checkpointing(True)
    found = acceleration.choose("auto", thrifty, CROPS, CUDA)
    assert (found.network, found.views, found.activation_checkpointing) == (False, True, True)
    assert "activation_checkpointing needs" in found.why
    found = acceleration.choose("auto", thrifty, CROPS, CUDA, compile=True)
    assert "runtime.compile and runtime.activation_checkpointing need the plain path" in found.why
    for model, asked in ((thrifty, {}), (tiny(), {"compile": True})):
        with pytest.raises(UsageError, match="needs the plain path; use auto or plain"):
            acceleration.choose("fused", model, CROPS, CUDA, **asked)


def test_use_kernels_reaches_networks_inside():
    student = MultiCropNetwork(tiny(), DINOHead(32, 64, 32, 16))
    names = set(student.state_dict())
    acceleration.use_kernels((student, nn.Linear(2, 2)), True)
    assert student.backbone.fused
    assert set(student.state_dict()) == names
    acceleration.use_kernels((student,), False)
    assert not student.backbone.fused


# On a device


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("name", ["xcit_nano_12_p16", "xcit_small_12_p8", "xcit_medium_24_p16"])
def test_device_network(name):
    model = xcit.build(name)
    assert acceleration.check_network(model, CUDA, torch.bfloat16) is None
    assert acceleration.check_network(model, CUDA, torch.float16) is None


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("channels", [1, 3])
def test_device_views(channels):
    crops = augment.multi_crop(mean=(0.5,) * channels, std=(0.2,) * channels)
    assert acceleration.check_views(crops, CUDA) is None
    table = augment.draw_batch(crops, 1, 0, np.arange(32))[0]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (32, 224, 224, channels), generator=generator).to(torch.uint8)
    expected = photometric.photometric(pixels, table, crops)
    found = photometric.photometric(pixels.to(CUDA), table, crops, fused=True).cpu()
    assert (found - expected).abs().mean() * 0.2 * 255 < 0.01


@pytest.mark.gpu
@ON_GPU
def test_device_steps_are_those_of_the_plain_path():
    losses = {}
    for mode in ("plain", "fused"):
        torch.manual_seed(0)
        result, learner = one_step(mode, CUDA)
        losses[mode] = result.loss
        assert learner.student.backbone.fused == (mode == "fused")
    assert losses["fused"] == pytest.approx(losses["plain"], rel=1e-3)
