"""What is counted of a step, against torch's own counter and against formulas by hand."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from xdino import config
from xdino.errors import UsageError
from xdino.forecast import costs, machines
from xdino.forecast.costs import StepCost, Workload, count_step, kept, loss_cost, memory_bytes
from xdino.forecast.loading import Loading
from xdino.forecast.machines import GPUS, machine_of
from xdino.forecast.outlook import Trial, outlook
from xdino.forecast.rates import Rates
from xdino.learner import Learner
from xdino.loss import DINOLoss
from xdino.plan.networks import build_head
from xdino.schedules import StepSettings
from xdino.student_teacher import MultiCropNetwork, make_teacher

SMALL = {
    "model.arch": "xcit_nano_12_p8", "model.embed_dim": "32", "model.depth": "2",
    "model.num_heads": "2", "head.prototypes": "512", "head.hidden_dim": "64",
    "head.bottleneck_dim": "16", "crops.global_size": "32", "crops.local_size": "16",
    "crops.local_count": "2", "train.batch_size": "4", "train.epochs": "2", "loss.objective": "dino",
}  # fmt: skip


def workload(images=40, channels=3, processes=1, precision="fp32", **overrides):
    """`small_data`, made small, with prototypes; keys with "__" for the dot."""
    more = {key.replace("__", "."): str(value) for key, value in overrides.items()}
    return Workload.of(
        config.load("small_data", SMALL | more), images, channels, processes, precision
    )


def learner(work):
    student = MultiCropNetwork(work.spec.build(), build_head(work.config.head, 32))
    teacher = make_teacher(student, work.spec.build())
    return Learner(student, teacher, DINOLoss(work.config.head.prototypes))


class Products(FlopCounterMode):
    """torch's counter, but for depthwise convolutions' gradients, whose groups it forgets."""

    def without_convolutions(self):
        counts = self.get_flop_counts()["Global"]
        return sum(n for op, n in counts.items() if "convolution_backward" not in str(op))

    def convolutions_forward(self):
        counts = self.get_flop_counts()["Global"]
        return sum(n for op, n in counts.items() if str(op).endswith("convolution"))


def test_operations_are_those_of_a_real_step():
    work = workload()
    step = learner(work)
    views = [torch.rand(2, 4, 3, 32, 32), torch.rand(2, 4, 3, 16, 16)]
    with Products(display=False) as counter:
        step.step([views], StepSettings(1e-3, 0.04, 0.99, 0.04, False))
    with Products(display=False) as teacher, torch.no_grad():
        step.teacher([views[0]], embed=True)
    # A convolution's two gradients cost what it does, but for the image's, which nobody needs.
    student = counter.convolutions_forward() - teacher.convolutions_forward()
    stem = step.student.backbone.patch_embed.proj[0][0]
    pixels = sum(v * 4 * (s // 2) ** 2 for v, s in ((2, 32), (2, 16)))
    unneeded = 2 * pixels * stem.weight.numel()
    whole = counter.without_convolutions() + 2 * student - unneeded
    assert count_step(work).flops == pytest.approx(whole, rel=1e-6)


def test_the_loss_s_formula_is_what_its_products_take():
    V, B, K, d = 4, 3, 5000, 16
    head = build_head(config.load("debug", {"head.prototypes": str(K)}).head, 32)
    layer, teacher = (
        head.last_layer,
        build_head(config.load("debug", {"head.prototypes": str(K)}).head, 32).last_layer,
    )
    d = layer.weight_v.shape[1]
    z = torch.randn(V, B, d, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        found = DINOLoss(K).of_bottlenecks(z, torch.randn(2, B, d), layer, teacher, 0.04)
        found.loss.backward()
    assert loss_cost(V, B, K, d).flops == counter.get_total_flops()


def test_weights_and_states_are_those_of_a_real_learner():
    work = workload()
    step = learner(work)
    views = [torch.rand(2, 4, 3, 32, 32), torch.rand(2, 4, 3, 16, 16)]
    step.step([views], StepSettings(1e-3, 0.04, 0.99, 0.04, False))
    held, parameters = kept(work), list(step.student.parameters())
    assert held.parameters == sum(p.numel() for p in parameters)
    assert held.gradients == sum(p.grad.nbytes for p in parameters if p.grad is not None)
    moments = [s for state in step.stepping.optimiser.state.values() for s in state.values()]
    assert held.state == pytest.approx(
        2 * sum(p.nbytes for p in parameters) + sum(m.nbytes for m in moments), rel=1e-3
    )


def test_memory_grows_by_the_image_and_shrinks_with_recomputing():
    few, many = count_step(workload()), count_step(workload(train__batch_size=8))
    assert many.flops == pytest.approx(2 * few.flops, rel=0.01)  # the positions are encoded once
    assert 1.5 * few.peak < many.peak <= 2 * few.peak
    again = count_step(workload(runtime__activation_checkpointing="true"))
    assert again.peak < few.peak / 1.2
    assert again.flops > few.flops


def test_the_counted_memory_is_near_the_one_that_was_measured():
    """S12/16 at a batch of 16 in float32: 6,820 MB (tests/benchmarks/README.md, run 3)."""
    work = Workload.of(
        config.load("imagenet_s12_p16", {"train.batch_size": "16"}), 100, 3, 1, "fp32"
    )
    counted = memory_bytes(work, kept(work), count_step(work))
    assert machines.CPU_ALLOCATOR_SHARE * counted == pytest.approx(6820e6, rel=0.1)


def test_accumulating_repeats_a_micro_batch():
    one, two = count_step(workload()), count_step(workload(train__accumulate=2))
    assert two.flops == 2 * one.flops
    assert two.peak == one.peak
    work = workload(train__accumulate=2)
    assert work.total_batch == 8
    assert memory_bytes(work, kept(work), two) == (
        memory_bytes(workload(), kept(work), one) + kept(work).gradients
    )


def test_what_processes_send():
    work, held = workload(processes=4), kept(workload())
    assert costs.network_bytes(workload(), held) == 0
    least = 2 * 3 / 4 * 4 * (held.trained + 513)
    assert least < costs.network_bytes(work, held) < 2 * least


def test_disk_is_the_newest_states_the_kept_ones_and_weights():
    work = workload(train__epochs=50, runtime__keep_every=20)
    held = kept(work)
    expected = 4 * held.state + 2 * held.backbone
    assert sum(costs.disk_bytes(work, held).values()) == expected
    once = workload(train__epochs=1, runtime__keep_every=0)
    assert sum(costs.disk_bytes(once, held).values()) == held.state + 2 * held.backbone
    four = workload(train__epochs=10, runtime__keep_every=0, runtime__keep_last=4)
    assert sum(costs.disk_bytes(four, held).values()) == 4 * held.state + 2 * held.backbone
    assert sum(costs.disk_bytes(workload(runtime__keep_every=0), held).values()) == (
        2 * held.state + 2 * held.backbone
    )


def test_fewer_images_than_a_batch_is_a_sentence():
    with pytest.raises(UsageError, match="lower the batch size"):
        workload(images=3)


# Machines and outlooks


def test_devices_are_found_by_name():
    assert machine_of("H100")[0].name == "h100"
    assert machine_of("h100")[1] is False
    with pytest.raises(UsageError, match='did you mean "h100"'):
        machine_of("h1000")
    assert GPUS["v100"].precision("auto") == "fp16"
    assert GPUS["h100"].precision("auto") == "bf16"
    assert GPUS["h100"].precision("fp32") == "fp32"


def test_a_gpu_s_time_is_products_and_bytes_and_launches():
    gpu = dataclasses.replace(GPUS["h100"], half=1e12, bandwidth=1e12)
    step = StepCost(flops=1e12, bytes=1e12, launches=0, peak=0)
    half = 1 / machines.PRODUCTS_SHARE + machines.HALF_BYTES / machines.BANDWIDTH_SHARE
    assert gpu.seconds(step, "bf16") == pytest.approx(half)
    many = dataclasses.replace(step, launches=10**7)
    launched = 10**7 * machines.LAUNCH_SECONDS
    assert gpu.seconds(many, "bf16") == pytest.approx(half + launched)
    # Of several processes, Python may be what takes longest.
    assert gpu.seconds(step, "bf16", alone=False) == pytest.approx(half)
    assert gpu.seconds(many, "bf16", alone=False) == pytest.approx(10**7 * machines.WRITING_SECONDS)


@pytest.mark.parametrize(
    ("arch", "batch", "measured"),
    [
        ("xcit_nano_12_p16", 256, 0.0870),
        ("xcit_small_12_p16", 128, 0.1097),
        ("xcit_medium_24_p16", 64, 0.1360),
    ],
)
def test_an_h100_is_forecast_as_it_was_timed(arch, batch, measured):
    """tests/benchmarks/README.md has these times of fb636cf."""
    told = {"model.arch": arch, "train.batch_size": str(batch)}
    given = config.load("imagenet_s12_p16", told)
    step = count_step(Workload.of(given, 1_281_167, 3, 1, "bf16"))
    assert 0.78 < GPUS["h100"].seconds(step, "bf16") / measured < 1.25


CPU = machines.Machine("cpu", 1e10, 1e10, 1e10, 2**34, "", cores=2)


def rates(work, seconds=0.5, **more):
    facts = {
        "seconds_per_step": seconds, "images_per_step": work.total_batch, "peak_bytes": 10**9,
        "precision": "fp32", "device": "cpu", "cores": 2, "images": work.images, "steps": 20,
        "steps_per_epoch": work.steps_per_epoch, "plan_seconds": 1.0, "warm_seconds": 4.5,
        "state_seconds": 0.25,
    }  # fmt: skip
    return Rates(**(facts | more))


def test_a_run_that_was_tried_takes_its_steps_its_states_and_its_start():
    work = workload()  # two epochs of ten steps
    seen = outlook(work, CPU, trial=Trial(rates(work), work, 3.0))
    warm = work.config.runtime.prefetch + 2
    assert seen.step_seconds == 0.5
    assert seen.seconds == pytest.approx(20 * 0.5 + 2 * 0.25 + 3 + 1 + (4.5 - warm * 0.5))
    assert seen.memory == 10**9
    assert any("20 steps of 4 images timed here" in said for said in seen.assumptions)


def test_a_smaller_batch_is_scaled_by_what_is_counted():
    work = workload(train__batch_size=16)
    small = work.with_batch(4)
    seen = outlook(work, CPU, trial=Trial(rates(small), small))
    assert 3.5 * 0.5 < seen.step_seconds < 4 * 0.5  # the update does not grow
    grown = seen.memory - 10**9
    assert grown == pytest.approx(1.15 * (count_step(work).peak - count_step(small).peak), rel=0.01)
    assert any("scaled" in said for said in seen.assumptions)


def test_a_curriculum_s_small_steps_are_counted_as_such():
    early = {"curriculum__share": 0.5, "curriculum__global_size": 16, "curriculum__local_size": 8}
    seen = outlook(workload(**early), CPU)
    assert 0.5 < seen.seconds / (seen.iterations * seen.step_seconds) < 0.9


def test_several_machines_wait_for_the_network_where_it_is_slow(monkeypatch):
    work = workload(images=4000, processes=16, precision="bf16")
    fast = outlook(work, GPUS["h100"], nodes=2)
    monkeypatch.setattr(machines, "NODE_LINK", 1e6)
    slow = outlook(work, GPUS["h100"], nodes=2)
    assert slow.step_seconds > fast.step_seconds + 0.05
    assert any("between machines" in said for said in slow.assumptions)


def test_loader_cores_follow_the_images_of_a_machine():
    work = workload(images=4000, processes=16, precision="bf16")
    seen = outlook(work, GPUS["h100"], nodes=2, loading=Loading(0.01, "made"))
    assert seen.loader_cores == pytest.approx(seen.images_per_second / 2 * 0.01)
