"""`xdino bench`: the statistics of paired arms, the shape of each report, wrong reference folders.

What is timed here is tiny and says nothing about speed: tests/benchmarks holds the measurements.
"""

import json
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from PIL import Image

from xdino_launch import cli
from xdino_launch.bench import dense_scaling, linear, step
from xdino_launch.bench.step import StepShape, Work, step_ratios
from xdino_launch.bench.timing import (
    Arm,
    Interval,
    Protocol,
    Ratio,
    again,
    divided,
    interval,
    measure,
    on_cores,
)

STEP = (
    "step", "--batch", "2", "--prototypes", "64", "--global-size", "32", "--local-size", "16",
    "--local-count", "2",
)  # fmt: skip


@pytest.fixture
def run(capsys, tmp_path):
    """run("knn", ...) -> the JSON report of two rounds; the tables go to standard output."""

    def of(*arguments: str) -> dict:
        out = tmp_path / "report.json"
        cli.main(["bench", *arguments, "--rounds", "2", "--threads", "1", "--out", str(out)])
        shown = capsys.readouterr()
        assert "A/A: " in shown.out
        assert "a look, not a measurement" in shown.err
        report = json.loads(out.read_text())
        assert {"benchmark", "date", "command", "commit", "machine", "settings", "rounds", "unit",
                "method", "arms", "ratios", "figures", "facts"} == set(report)  # fmt: skip
        assert {"cpu", "cores", "gpu", "packages"} <= set(report["machine"])
        assert report["settings"]["threads"] == 1
        for found in (report["arms"] | report["ratios"]).values():
            assert len(found["values"]) == report["rounds"] == 2
            assert min(found["values"]) > 0
        return report

    return of


def test_step_with_an_arm_for_each_kind_of_kernels(run, monkeypatch):
    compiled = []
    monkeypatch.setattr(step, "compile_backbone", compiled.append)
    report = run(*STEP, "--kernels", "plain,auto,compiled")
    assert {f"ours ({kind}), fp32" for kind in ("plain", "auto", "compiled")} <= set(report["arms"])
    assert "ours (plain), fp32 / ours (auto), fp32" in report["ratios"]
    assert report["settings"]["kernels"] == ["plain", "auto", "compiled"]
    assert len(compiled) == 2  # student and teacher, of one arm alone


# Statistics


def test_bounds_of_a_median_by_order_statistics():
    found = interval([9, 1, 8, 2, 7, 3, 6, 4, 5])
    assert (found.median, found.lower, found.upper) == (5, 3, 7)
    assert interval([2.0, 1.0]).lower is None
    assert interval([4, 3, 2, 1]).lower == 1


def test_the_lower_bound_covers_as_it_says():
    generator = np.random.default_rng(0)
    for n in (9, 11, 20):
        rows = generator.lognormal(size=(2000, n))  # median 1, and skewed
        below = np.mean([interval(list(row)).lower <= 1 for row in rows])
        assert 0.88 <= below <= 0.98, n


def test_arms_run_in_turn_and_are_divided_within_a_round():
    calls: list[str] = []

    def arm(name: str, seconds: float) -> Arm:
        def work(number: int) -> float:
            calls.append(name)
            return seconds * (1 + number)  # a machine that slows down: the ratio stays

        return Arm(name, work)

    fast, slow = arm("fast", 1.0), arm("slow", 2.5)
    values = measure([fast, slow, again(fast)], rounds=4)
    assert calls == ["fast", "slow"] + ["fast", "slow", "fast"] * 4
    ratios = divided(values, [Ratio("speed", "slow", "fast"), Ratio("not run", "slower", "fast")])
    assert ratios == {"A/A: fast, again / fast": [1.0] * 4, "speed": [2.5] * 4}
    assert interval(ratios["speed"]) == Interval(2.5, 2.5, 2.5)


def test_no_round_begins_after_the_time_given():
    values = measure([Arm("a", lambda number: 1.0)], rounds=1000, seconds=0.0)
    assert values == {"a": [1.0]}


# Reports


def test_pipeline(run, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(4):
        noise = np.random.default_rng(i).integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.jpg")
    report = run("pipeline", "--data", str(folder), "--batch", "2", "--images", "2")
    assert report["unit"] == "ms an image"
    assert report["settings"]["median megapixels"] == 0.005
    assert "ours, all / ours, uint8 crops" in report["ratios"]


def test_step(run):
    report = run(*STEP)
    assert list(report["arms"]) == ["ours, fp32", "ours, fp32, again"]


def test_a_step_is_compared_in_its_own_precision_and_with_the_first():
    def names(memory: bool) -> list[str]:
        return [ratio.name for ratio in step_ratios(("fp32", "bf16"), memory)]

    assert names(memory=False) == [
        "published, fp32 / ours, fp32",
        "published, bf16 / ours, bf16",
        "published, fp32 / ours, bf16",
        "ours, fp32 / ours, bf16",
    ]
    assert names(memory=True)[0] == "ours, fp32 / published, fp32"


def test_memory_is_measured_in_a_process_of_its_own():
    shape = StepShape(batch=2, prototypes=2**14, global_size=32, local_size=16)
    found = Work(shape, "fp32").peak_megabytes(threads=1)
    # The last layer alone: weights, gradient, two moments and the teacher's, 256 floats a row.
    assert found > 5 * 2**14 * 256 * 4 / 1e6


def test_knn(run):
    report = run("knn", "--bank", "400", "--queries", "50", "--dim", "8", "--classes", "5")
    scores = report["facts"]["top-1, top-5 in per cent, ours"]
    assert list(scores) == ["k = 10", "k = 20", "k = 100", "k = 200"]
    assert scores["k = 200"][1] == 100.0  # of five classes


def test_linear(run):
    report = run(
        "linear", "--images", "6", "--size", "32", "--features", "40", "--dim", "8",
        "--classes", "5", "--batch", "4", "--lrs", "3",
    )  # fmt: skip
    assert {"grid / one, cached features", "grid / one, images"} < set(report["ratios"])
    assert sum(name.startswith("A/A") for name in report["ratios"]) == 2
    arithmetic = report["facts"]["arithmetic of a batch, cached features, GFLOP"]
    assert arithmetic["grid"] == pytest.approx(3 * arithmetic["one probe"])


def test_both_arms_of_linear_see_the_same_images(tmp_path):
    """And the grid's first head, which has the least learning rate, moves with them."""
    shape = linear.LinearShape(images=5, size=32, batch=4, lrs=2, features=0, classes=2)
    with ExitStack() as stack:
        source = linear._source(shape, None, stack)
        arms = linear._over_images(shape, source, torch.device("cpu"), Protocol(rounds=1), stack)
        read: list[int] = []
        take = source.read
        source.read = lambda index: (read.append(index), take(index))[1]
        seen = []
        for arm in arms:
            assert arm.measure(0) > 0
            seen.append(sorted(read))
            read.clear()
    assert seen == [[0, 1, 2, 3, 4]] * 2


def test_scaling(run):
    report = run(
        "scaling", "--arch", "xcit_nano_12_p16", "--against", "vit_tiny_patch16_224",
        "--sizes", "32,64",
    )  # fmt: skip
    assert len(report["figures"]) == 2
    assert "vit_tiny_patch16_224 / xcit_nano_12_p16, 64 px" in report["ratios"]


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_scaling_of_whole_networks(run, task, monkeypatch):
    def here(measure, *wanted, lower):
        assert lower == "--sizes"
        return measure(*wanted)

    monkeypatch.setattr(dense_scaling, "in_a_process", here)
    memory = ["--memory"] if task == "segment" else []
    report = run(
        "scaling", "--task", task, "--arch", "xcit_tiny_12_p16", "--against", "vit_tiny_patch16_224",
        "--sizes", "32,64", *memory,
    )  # fmt: skip
    assert report["settings"]["sizes"] == [[32, 48], [64, 112]]
    assert report["settings"]["tokens"] == [6, 28]
    assert set(report["figures"]) == {
        "exponent in tokens, 6 to 28: xcit_tiny_12_p16",
        "exponent in tokens, 6 to 28: vit_tiny_patch16_224",
    }
    assert "vit_tiny_patch16_224 / xcit_tiny_12_p16, 64 x 112" in report["ratios"]
    assert report["unit"] == ("MB above the process's own" if memory else "s a forward pass")


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with on_cores(2, pinned=True):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == before


# Wrong usage


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["knn", "--reference", "EMPTY"], "is not a checkout of facebookresearch/dino: it has no"),
        (["pipeline", "--reference", "EMPTY"], "is not a checkout of facebookresearch/dino"),
        (["knn", "--reference", "BROKEN"], "cannot be imported: No module named 'nowhere_at_all'"),
        ([*STEP, "--reference", "EMPTY"], "needs both --reference DINO_DIR and --xcit XCIT_DIR"),
        ([*STEP, "--reference", "EMPTY", "--xcit", "EMPTY"], "is not a checkout"),
        ([*STEP, "--precision", "fp64"], "--precision takes fp32, bf16, fp16, got fp64"),
        ([*STEP, "--arch", "xcit_nano_12_p17"], "did you mean"),
        (["knn", "--reference", "EMPTY", "--queries", "50"], "needs 100 queries or more"),
        (["linear", "--images", "0", "--features", "0"], "nothing to time"),
        (["linear", "--data", "nowhere"], "nowhere"),
        (["scaling", "--sizes", "224"], "two or more different sizes"),
        (["scaling", "--sizes", "big"], "--sizes takes numbers"),
        (["scaling", "--memory"], "--memory goes with --task"),
        (["scaling", "--task", "segment", "--batch", "2"], "leave out --batch"),
        (
            ["scaling", "--task", "detect", "--against", "vit_base_patch16_224"],
            "384 wide with patches of 16 pixels and 12 blocks, and vit_base_patch16_224 has",
        ),
        (["scaling", "--task", "detect", "--against", "resnet50"], "resnet50 is no transformer"),
        (
            ["scaling", "--task", "detect", "--arch", "xcit_small_12_p4"],
            "patches of 16 or 8 pixels",
        ),
        (["pipeline", "--data", "nowhere"], "nowhere"),
        (["pipelin"], 'there is no command "pipelin": did you mean "pipeline"?'),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(
    capsys, tmp_path, monkeypatch, arguments, message
):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "BROKEN").mkdir()
    for name in ("utils", "vision_transformer", "main_dino", "eval_knn"):
        (tmp_path / "BROKEN" / f"{name}.py").write_text("import nowhere_at_all\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", *arguments])
    shown = capsys.readouterr()
    assert (stop.value.code, shown.out, shown.err.count("\n")) == (2, "", 1)
    assert message in shown.err
