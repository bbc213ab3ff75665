"""`auto` chooses by facts alone, every recipe of it can be planned, and what is given is left alone."""

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdino.data import open_source
from xdino.errors import UsageError
from xdino.forecast import choices, ladder
from xdino.forecast.choices import Choice, choose, configured
from xdino.forecast.facts import Images, Machine, look_at
from xdino.plan import make_plan

CPU = Machine("cpu", cores=2, cpus=2, bf16=True, memory=20 * 10**9)
GPU = Machine("cuda", cores=8, cpus=16, bf16=True, memory=80 * 10**9)


def images(count=10_000, side=28, **facts):
    return Images(count, side, facts.pop("smallest", side), facts.pop("largest", side), **facts)


def chosen(seen, machine, rung=None, updates=1000, epochs=20, **given):
    own = {key.replace("__", "."): value for key, value in given.items()}
    rungs = ladder.ladder(seen, machine, own.get("loss.objective"))
    rung = rung or rungs[ladder.first_rung(rungs, machine, seen, 1800)]
    return {
        choice.key: choice.value for choice in choose(seen, machine, rung, updates, epochs, own)
    }


# What it comes to


def test_small_grey_images_get_the_demo_s_recipe():
    found = chosen(images(channels=1, grey=True, mean=0.286, std=0.353), CPU)
    assert found["model.arch"] == "xcit_nano_12_p4"
    assert (found["model.embed_dim"], found["model.depth"]) == ("64", "3")
    assert (found["crops.global_size"], found["crops.local_size"]) == ("28", "16")
    assert (found["model.in_chans"], found["crops.mean"]) == ("1", "0.286")
    assert float(found["optim.lr"]) * int(found["train.batch_size"]) / 256 == 2e-3
    assert found["head.use_bn"] == "true"
    assert found["evaluate.resize"] == "28"


def test_photographs_on_a_cpu_get_small_crops_and_what_the_board_learned_best():
    found = chosen(images(5_000, 480, largest=900), CPU)
    assert found["model.arch"] == "xcit_tiny_12_p8"
    assert (found["crops.global_size"], found["crops.local_size"]) == ("64", "32")
    assert found["loss.objective"] == "simdino"
    assert float(found["optim.lr"]) * 32 / 256 == pytest.approx(2.5e-4)
    assert not {"evaluate.resize", "head.prototypes", "optim.freeze_last_layer"} & set(found)


def test_who_asks_for_prototypes_gets_the_published_rate():
    found = chosen(images(5_000, 480, largest=900), CPU, epochs=3, loss__objective="dino")
    assert found["loss.objective"] == "dino"
    assert float(found["optim.lr"]) * 32 / 256 == pytest.approx(6.25e-5)
    assert (found["head.prototypes"], found["optim.freeze_last_layer"]) == ("1024", "0")


def test_photographs_on_a_gpu_get_the_published_crops():
    found = chosen(images(1_281_167, 400), GPU, updates=200_000)
    assert found["model.arch"].endswith("_p16")
    assert (found["crops.global_size"], found["crops.local_size"]) == ("224", "96")
    assert found["head.prototypes"] == "65536"
    assert found["teacher.momentum"] == "0.9995"


def test_the_rate_stays_where_it_was_tried():
    for count, batch in ((12, 4), (40, 16), (10_000, 32)):
        found = chosen(images(count, 300), CPU)
        assert int(found["train.batch_size"]) == batch
        assert float(found["optim.lr"]) * batch / 256 == pytest.approx(2.5e-4, rel=1e-3)


@pytest.mark.parametrize("count", [1, 2, 3, 12, 63])
def test_a_batch_is_never_more_than_the_images(count):
    for processes in (1, 2):
        if count >= processes:
            machine = dataclasses.replace(CPU, processes=processes)
            found = chosen(images(count, 300), machine)
            assert int(found["train.batch_size"]) * processes <= count


def test_a_gpu_s_memory_bounds_the_batch():
    roomy = chosen(images(100_000, 400), GPU)
    narrow = chosen(images(100_000, 400), dataclasses.replace(GPU, memory=4 * 10**9))
    assert int(narrow["train.batch_size"]) < int(roomy["train.batch_size"])


def test_little_time_takes_the_smaller_network():
    seen = images(2_000, 300)
    rungs = ladder.ladder(seen, CPU)
    places = [ladder.first_rung(rungs, CPU, seen, seconds) for seconds in (10, 600, 10**5, 10**7)]
    assert places == sorted(places, reverse=True)
    assert places[0] == len(rungs) - 1
    assert places[-1] == 0


def test_few_epochs_leave_the_last_layer_free():
    assert chosen(images(), CPU, epochs=3)["optim.freeze_last_layer"] == "0"
    assert "optim.freeze_last_layer" not in chosen(images(), CPU, epochs=30)


def test_a_processor_without_bf16_takes_fp32():
    assert chosen(images(), dataclasses.replace(CPU, bf16=False))["train.precision"] == "fp32"


# What a person has set


def test_what_is_given_is_kept_and_listed_so():
    own = {"crops.global_size": "48", "optim.lr": "1e-4", "train.seed": "7"}
    rung = ladder.ladder(images(side=300), CPU)[-1]
    found = {c.key: c for c in choose(images(side=300), CPU, rung, 100, 5, own)}
    for key, value in own.items():
        assert found[key] == Choice(key, value, choices.GIVEN)
    assert found["crops.local_size"].value == "24", "it follows from the global crops"


def test_the_rate_follows_a_batch_that_is_given():
    found = chosen(images(5_000, 300), CPU, train__batch_size="256")
    assert float(found["optim.lr"]) == 2e-3
    assert found["train.batch_size"] == "256"


def test_a_network_that_is_given_is_not_reshaped():
    found = chosen(images(5_000, 300), CPU, model__arch="vit_small_patch16_224")
    assert {key for key in found if key.startswith("model.")} == {"model.arch"}
    assert int(found["crops.global_size"]) % 16 == int(found["crops.local_size"]) % 16 == 0


def test_a_wrong_key_is_one_sentence():
    with pytest.raises(UsageError, match=r'optim\.lrr is not a known key: did you mean "lr"'):
        configured([Choice("optim.lrr", "1", "")])


# Every recipe can be planned

RUNGS = [(CPU, rung) for rung in ladder.ON_CPU] + [(GPU, rung) for rung in ladder.ON_GPU]


@pytest.mark.parametrize("place", range(len(RUNGS)))
def test_every_rung_makes_a_recipe_that_can_be_planned(place):
    """Of the sizes that it is for; the batch is what the machine of the test holds."""
    machine, rung = RUNGS[place]
    sides = (1, 28, 47) if rung.family is ladder.SMALL else (rung.least_side, 333)
    for side, grey in zip(sides, itertools.cycle((True, False)), strict=False):
        found = choose(
            images(12, side, grey=grey),
            machine,
            rung,
            updates=500,
            epochs=5,
            given={"data.path": "fashion_mnist_sample", "runtime.device": "cpu"},
        )
        keys = {choice.key: choice for choice in found}
        if not grey:
            keys["model.in_chans"] = Choice("model.in_chans", "3", "")
        assert all(choice.reason for choice in found)
        plan = make_plan(configured(list(keys.values())))
        assert 0 < plan.schedules.lr.max() <= rung.family.most


@settings(max_examples=200, deadline=None)
@given(
    count=st.integers(1, 2_000_000),
    side=st.integers(1, 8_000),
    device=st.sampled_from([CPU, GPU]),
    processes=st.sampled_from([1, 2, 8]),
    updates=st.integers(1, 10**6),
    seconds=st.floats(1, 1e7),
)
def test_every_choice_is_a_configuration(count, side, device, processes, updates, seconds):
    machine = dataclasses.replace(device, processes=processes)
    seen = images(count, side)
    rungs = ladder.ladder(seen, machine)
    rung = rungs[ladder.first_rung(rungs, machine, seen, seconds)]
    epochs = max(1, updates // 100)
    config = configured(choose(seen, machine, rung, updates, epochs, {}))
    crops = config.crops
    assert crops.local_size <= crops.global_size
    assert crops.global_size % rung.patch == crops.local_size % rung.patch == 0
    assert crops.global_size <= max(side, 4 * rung.patch)
    if count >= processes:
        assert config.train.batch_size * processes <= count
    again = configured(choose(seen, machine, rung, updates, epochs, {}))
    assert again == config


# The facts


def test_grey_photographs_are_seen_to_be_grey(tmp_path, write_pictures):
    write_pictures(tmp_path / "grey", 20, (30, 40), grey=True)
    write_pictures(tmp_path / "colour", 20, (30, 40))
    grey, colour = (look_at(open_source(str(tmp_path / n)), False) for n in ("grey", "colour"))
    assert (grey.grey, colour.grey) == (True, False)
    assert (grey.count, grey.side, grey.smallest, grey.largest) == (20, 30, 30, 30)
    assert 0 < grey.mean < 1


def test_a_look_ends_with_patience(tmp_path, write_pictures):
    write_pictures(tmp_path / "many", 40, (8, 8))
    ticks = itertools.count(0, 3)
    seen = look_at(open_source(str(tmp_path / "many")), False, clock=lambda: float(next(ticks)))
    assert seen.sampled < 10


def test_a_folder_that_cannot_be_read_at_all_is_one_sentence(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.jpg").write_bytes(b"\xff\xd8\xff no picture")
    with pytest.raises(UsageError, match=r"none of 3 images of .* can be read"):
        look_at(open_source(str(tmp_path)), False)
