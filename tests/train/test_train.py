"""Whole runs: what they leave behind, and that stopping and going on changes nothing."""

import json
import math
import os
import resource
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

from xdino import checkpoint, config, pretraining
from xdino.errors import RunFailed, Stopped, UsageError
from xdino.pretraining import pretrain

from .listening import Ear, assert_same_networks, rows


def test_a_run_directory_says_everything(tiny, tmp_path):
    run = tmp_path / "run"
    path = pretrain(tiny(), run)
    assert path == run / "backbone.safetensors"
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "checkpoints/last.pt",
                 "checkpoints/initial.safetensors", "views.png"):  # fmt: skip
        assert (run / name).is_file(), name
    assert [r["iteration"] for r in rows(run)] == [1, 2, 3, 4, 5, 6]
    last = rows(run)[-1]
    assert last["kl"] == pytest.approx(last["loss"] - last["teacher_entropy"], abs=1e-5)
    assert 0 <= last["wait_share"] <= 1
    assert last["teacher_entropy"] <= math.log(32) + 1e-5
    start = json.loads((run / "environment.json").read_text())["starts"][0]
    assert start["seed"] == 0
    assert start["packages"]["torch"] == str(torch.__version__).split("+")[0] or start["packages"]
    backbone = checkpoint.load_backbone(run)
    assert (backbone.input_size, backbone.in_chans, backbone.training) == (24, 3, False)
    assert backbone.origin.facts["iteration"] == 6
    state = checkpoint.load_state(run / "checkpoints" / "last.pt")
    assert {"learner", "sampler", "config", "iteration", "versions"} <= set(state)
    assert state["sampler"]["epoch"] == 2
    picture = Image.open(run / "views.png")
    assert picture.width > 4 * 24


@pytest.mark.parametrize("stop_at", [2, 3, 4])
def test_six_iterations_equal_some_then_a_stop_then_the_rest(tiny, tmp_path, stop_at):
    # Drop path draws from torch's generator, which every step seeds anew.
    configuration = tiny(model__drop_path=0.3, runtime__checkpoint_every=2)
    pretrain(configuration, tmp_path / "whole")
    broken = tmp_path / "broken"
    ear = Ear(at=stop_at, act=lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match=f"stopped by SIGTERM after iteration {stop_at} of 6"):
        pretrain(configuration, broken, listener=ear)
    torch.manual_seed(99)
    pretrain(configuration, broken)
    one, two = (
        checkpoint.load_state(tmp_path / name / "checkpoints" / "last.pt")
        for name in ("whole", "broken")
    )
    for role in ("student", "teacher"):
        for name, value in one["learner"][role].items():
            assert torch.equal(value, two["learner"][role][name]), name
    assert torch.equal(one["learner"]["centre"], two["learner"]["centre"])
    for name in ("backbone.safetensors", "checkpoints/initial.safetensors"):
        a, b = (checkpoint.sha256(tmp_path / run / name) for run in ("whole", "broken"))
        assert a == b, name
    assert [r["iteration"] for r in rows(broken)] == [1, 2, 3, 4, 5, 6], "each told once"
    losses = [[r["loss"] for r in rows(tmp_path / name)] for name in ("whole", "broken")]
    assert losses[0] == losses[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stop_at", [1, 5])
def test_a_stop_changes_no_bit_on_a_gpu(tiny, tmp_path, stop_at, accumulate):
    """Before the passes are recorded as a CUDA graph, and behind it."""
    configuration = tiny(
        runtime__device="cuda", train__epochs=3, train__batch_size=6 // accumulate,
        train__accumulate=accumulate, model__drop_path=0.3, loss__warmup_teacher_temp_epochs=2,
    )  # fmt: skip
    pretrain(configuration, tmp_path / "whole")
    broken = tmp_path / "broken"
    ear = Ear(at=stop_at, act=lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        pretrain(configuration, broken, listener=ear)
    pretrain(configuration, broken)
    assert_same_networks(tmp_path / "whole", broken)


def test_a_crash_while_a_state_is_written_changes_nothing(tiny, tmp_path, monkeypatch):
    configuration = tiny()
    pretrain(configuration, tmp_path / "whole")
    broken = tmp_path / "broken"
    save_state = checkpoint.save_state

    def crash(path, state):
        if state["iteration"] == 6:
            path.with_name(".last.pt.1.tmp").write_bytes(b"half")  # as a killed writer leaves it
            raise KeyboardInterrupt
        save_state(path, state)

    monkeypatch.setattr(checkpoint, "save_state", crash)
    with pytest.raises(KeyboardInterrupt):
        pretrain(configuration, broken)
    monkeypatch.undo()
    assert checkpoint.load_state(broken / "checkpoints" / "last.pt")["iteration"] == 3
    pretrain(configuration, broken)
    a, b = (checkpoint.sha256(tmp_path / r / "backbone.safetensors") for r in ("whole", "broken"))
    assert a == b


def test_a_finished_run_is_left_alone(tiny, tmp_path):
    pretrain(tiny(), tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    ear = Ear()
    pretrain(tiny(), tmp_path, listener=ear)
    assert "finished run of 6 iterations: left alone" in ear.notices[0]
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}


def test_another_configuration_names_the_differing_keys(tiny, tmp_path):
    pretrain(tiny(), tmp_path)
    with pytest.raises(UsageError, match=r"optim.lr \(0.0005 against 0.1\)"):
        pretrain(tiny(optim__lr=0.1), tmp_path)
    pretrain(tiny(runtime__log_every=7), tmp_path)  # does not change results: no objection


def test_a_folder_that_holds_something_else(tiny, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="not empty and not a run"):
        pretrain(tiny(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UsageError, match="is a file"):
        pretrain(tiny(), tmp_path / "thesis.tex")


def test_states_that_are_all_damaged_are_a_sentence_and_are_kept(tiny, tmp_path):
    pretrain(tiny(), tmp_path)
    last, previous = (tmp_path / "checkpoints" / name for name in ("last.pt", "previous.pt"))
    for path in (last, previous):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RunFailed, match=r"damaged.*no other good state"):
        pretrain(tiny(), tmp_path)
    assert last.stat().st_size == 1000


def test_mistakes_leave_no_folder_behind(tiny, tmp_path):
    run = tmp_path / "run"
    for overrides, message in (
        ({"data__path": ""}, "data.path is not set"),
        ({"data__path": str(tmp_path / "nothing")}, "nothing"),
        ({"train__batch_size": 64}, "64"),
        ({"model__arch": "xcit_smal_12_p16"}, "did you mean"),
        ({"model__arch": "resnet181", "model__embed_dim": None}, "did you mean"),
        ({"model__num_heads": 5}, "multiple of num_heads"),
        ({"crops__mean": [0.5], "crops__std": [0.5]}, "one value a channel"),
        ({"runtime__device": "gpu"}, "choose auto, cpu or cuda"),
        ({"train__init": str(tmp_path / "none.pt")}, "no weights file"),
    ):
        with pytest.raises(UsageError) as error:
            pretrain(tiny(**overrides), run)
        assert message in str(error.value), overrides
        assert not run.exists(), overrides


def test_folders_that_cannot_be(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "self").symlink_to(tmp_path / "self")
    for run, message in (
        (tmp_path / "file" / "run", "file is a file"),
        (tmp_path / "self", "a link that leads nowhere"),
        (tmp_path / "self" / "run", "Too many levels of symbolic links"),
    ):
        with pytest.raises(UsageError, match=message):
            pretrain(tiny(), run)
    with pytest.raises(RunFailed, match="cannot write to the run folder"):
        pretrain(tiny(), "/proc/run")  # where nobody may make a folder


def test_a_full_disk_names_the_last_good_checkpoint(tiny, tmp_path, monkeypatch):
    save_state = checkpoint.save_state

    def full(path, state):
        if state["iteration"] > 3:
            raise OSError(28, "No space left on device")
        save_state(path, state)

    monkeypatch.setattr(checkpoint, "save_state", full)
    with pytest.raises(
        RunFailed, match=r"No space left.*last good checkpoint is .*last.pt, iteration 3"
    ):
        pretrain(tiny(), tmp_path)


def test_an_infinite_loss_names_the_last_good_checkpoint(tiny, tmp_path):
    with pytest.raises(RunFailed, match=r"the loss became .*No checkpoint was written yet"):
        pretrain(tiny(optim__lr=1e30, optim__warmup_epochs=0, train__precision="fp32"), tmp_path)


def test_unreadable_images_are_skipped_and_named(tiny, images, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for path in images.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "00.png").write_bytes(b"")
    (folder / "text.jpg").write_text("not an image")
    ear = Ear()
    pretrain(tiny(data__path=str(folder), data__max_bad_share=0.2), tmp_path / "run", listener=ear)
    told = [n for n in ear.notices if "unreadable" in n]
    assert sum("00.png" in n for n in told) == 1
    assert sum("text.jpg" in n for n in told) == 1
    with pytest.raises(RunFailed, match="max_bad_share"):
        pretrain(tiny(data__path=str(folder), data__max_bad_share=0.05), tmp_path / "strict")


def test_evaluation_during_training_changes_no_bit(tiny, tmp_path):
    seen = []

    def evaluator(backbone):
        was = backbone.training
        backbone.eval()
        with torch.no_grad():
            seen.append(backbone(torch.rand(2, 3, 24, 24, generator=torch.Generator())).shape)
        backbone.train(was)
        return {"knn_top1": 12.5}

    pretrain(tiny(), tmp_path / "plain")
    pretrain(tiny(evaluate__every=1), tmp_path / "judged", evaluator=evaluator)
    assert seen == [(2, 32)] * 3
    told = [(r["iteration"], r["knn_top1"]) for r in rows(tmp_path / "judged") if "knn_top1" in r]
    assert told == [(0, 12.5), (3, 12.5), (6, 12.5)]
    states = [
        checkpoint.load_state(tmp_path / n / "checkpoints" / "last.pt")["learner"]
        for n in ("plain", "judged")
    ]
    for name, value in states[0]["student"].items():
        assert torch.equal(value, states[1]["student"][name])


LEVEL = {"optim__warmup_epochs": 0, "optim__min_lr": 1e-5, "optim__lr": 256e-5 / 6,
         "optim__weight_decay_end": 0.04, "teacher__momentum_end": 0.996,
         "optim__freeze_last_layer": 0}  # fmt: skip


@pytest.mark.parametrize(("epochs", "number", "every"), [(3, 13, 1), (1, 36, 1), (6, 6, 2)])
def test_epochs_of_another_number_of_images_meet_the_same_ones(
    tiny, tmp_path, epochs, number, every
):
    """Passes over the 20 images are of 3 steps whatever an epoch is; so are schedules that are level."""
    passes = pretrain(tiny(**LEVEL), tmp_path / "passes")
    configuration = tiny(
        **LEVEL, train__epochs=epochs, train__images_per_epoch=number, evaluate__every=every
    )
    judged = []
    cut = pretrain(
        configuration, tmp_path / "cut", evaluator=lambda backbone: judged.append(1) or {}
    )
    losses = [
        [r["loss"] for r in rows(tmp_path / name) if "loss" in r] for name in ("passes", "cut")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6
    assert len(judged) == 1 + epochs // every
    last = [r["epoch"] for r in rows(tmp_path / "cut") if "loss" in r]
    assert last == [1 + i * epochs // 6 for i in range(6)]
    weights = [checkpoint.load_backbone(path).state_dict() for path in (passes, cut)]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_a_stop_within_such_an_epoch_changes_nothing(tiny, tmp_path):
    configuration = tiny(train__epochs=3, train__images_per_epoch=13, model__drop_path=0.3)
    whole = pretrain(configuration, tmp_path / "whole")
    ear = Ear(at=3, act=lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match="after iteration 3 of 6"):
        pretrain(configuration, tmp_path / "broken", listener=ear)
    broken = pretrain(configuration, tmp_path / "broken")
    assert checkpoint.sha256(whole) == checkpoint.sha256(broken)


def test_an_epoch_of_fewer_images_than_a_step(tiny, tmp_path):
    with pytest.raises(UsageError, match="images_per_epoch is 5, less than the 6 images of a step"):
        pretrain(tiny(train__images_per_epoch=5), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_starting_from_weights(tiny, tmp_path):
    pretrain(tiny(), tmp_path / "first")
    configuration = tiny(train__init=str(tmp_path / "first"), train__seed=5)
    pretrain(configuration, tmp_path / "second")
    a = checkpoint.load_backbone(tmp_path / "first")
    b = checkpoint.load_backbone(tmp_path / "second" / "checkpoints" / "initial.safetensors")
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def test_kept_epochs(tiny, tmp_path):
    pretrain(tiny(runtime__keep_every=1), tmp_path)
    kept = sorted(p.name for p in (tmp_path / "checkpoints").glob("epoch_*.pt"))
    assert kept == ["epoch_0001.pt", "epoch_0002.pt"]
    assert checkpoint.load_state(tmp_path / "checkpoints" / "epoch_0001.pt")["iteration"] == 3


@pytest.mark.parametrize("optimiser", ["sgd", "lars"])
def test_other_optimisers_and_accumulation(tiny, tmp_path, optimiser):
    configuration = tiny(optim__name=optimiser, train__accumulate=2, train__batch_size=5)
    pretrain(configuration, tmp_path)
    assert [r["iteration"] for r in rows(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("size", ["s12_p16", "s12_p8", "m24_p16", "m24_p8"])
def test_every_imagenet_recipe_takes_a_step(size, tmp_path):
    """On small crops with batch 2; the networks and the heads are the real ones."""
    generator = np.random.default_rng(0)
    for i in range(2):
        array = generator.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(array).save(tmp_path / f"{i}.png")
    small = {
        "data.path": str(tmp_path),
        "train.batch_size": "2",
        "crops.global_size": "32",
        "crops.local_size": "16",
    }
    began = time.perf_counter()
    plan = pretraining.make_plan(config.load(f"imagenet_{size}", small))
    learner = pretraining.build_learner(plan)
    built = time.perf_counter()
    batch = next(iter(pretraining.CropLoader(plan.source, plan.crops, 2, 0).iterate(0, 1)))
    views = pretraining.to_device(batch, plan.crops, plan.device)
    result = learner.step([views], plan.schedules.at(0))
    # The first loss: centred at nothing, student and teacher say nearly the same of every image.
    assert 0 < result.loss < math.log(65536) + 1
    assert len(plan.schedules) == 300
    step = time.perf_counter() - built
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{size}: built in {built - began:.1f} s, step {step:.1f} s, process peak {peak:.1f} GiB")
