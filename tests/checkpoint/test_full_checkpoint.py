"""A full checkpoint of the published trainer goes on here: six steps, a run, files that cannot."""

import json
import os
import signal
from pathlib import Path

import pytest
import safetensors
import torch
from tiny_run import write_images

from xdino import checkpoint, config
from xdino.checkpoint import load_backbone, read_full
from xdino.checkpoint.plain import load_plain
from xdino.errors import RunFailed, Stopped, UsageError
from xdino.job import Listener
from xdino.plan import build_learner, continue_published, make_plan
from xdino.pretraining import pretrain

GOLDEN = Path(__file__).parents[1] / "golden"
FULL = GOLDEN / "published_full.pth"  # see record_published.py


@pytest.fixture(scope="module")
def recorded():
    with safetensors.safe_open(GOLDEN / "published_full.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["facts"])


@pytest.fixture(scope="module")
def nine(tmp_path_factory):
    """Nine images: three steps an epoch, as there were."""
    folder = write_images(tmp_path_factory.mktemp("full") / "images")
    for path in sorted(folder.iterdir())[9:]:
        path.unlink()
    return folder


@pytest.fixture
def as_published(nine, recorded):
    """as_published(**overrides) -> the configuration of the recorded trainer; "__" for the dot."""
    said = recorded[1]["arguments"]

    def make(**overrides):
        tree = {
            "model": {**recorded[1]["network"], "arch": "xcit_nano_12_p8", "drop_path": 0},
            "head": {**recorded[1]["head"], "prototypes": said["out_dim"]},
            "loss": {
                k: said[k]
                for k in ("warmup_teacher_temp", "teacher_temp", "warmup_teacher_temp_epochs")
            },
            "teacher": {"momentum": said["momentum_teacher"]},
            "crops": {"global_size": 24, "local_size": 16, "local_count": 2},
            "data": {"path": str(nine)},
            "optim": {
                k: said[k]
                for k in ("lr", "min_lr", "warmup_epochs", "weight_decay", "weight_decay_end",
                          "clip_grad", "freeze_last_layer")
            },
            "train": {"epochs": 4, "batch_size": 3, "precision": "fp32", "continue_from": str(FULL)},
            "runtime": {"device": "cpu", "workers": 0, "log_every": 1, "keep_every": 0},
        }  # fmt: skip
        for key, value in overrides.items():
            section, leaf = key.split("__")
            tree.setdefault(section, {})[leaf] = value
        return config.parse(tree)

    return make


def begun(settings):
    plan = make_plan(settings)
    learner = build_learner(plan)
    return plan, learner, continue_published(plan, learner)


def steps(learner, plan, tensors):
    """The losses and centres of the six recorded steps, made by ours."""
    losses, centres = [], []
    for i in range(6):
        crops = [tensors[f"global/{i}"].float(), tensors[f"local/{i}"].float()]
        losses.append(learner.step([crops], plan.schedules.at(6 + i)).tensor)
        centres.append(learner.loss.centre[0].clone())
    return torch.stack(losses), torch.stack(centres)


def test_six_steps_from_a_full_checkpoint(as_published, recorded, agree):
    tensors, _ = recorded
    plan, learner, found = begun(as_published())
    assert (found.iteration, plan.iterations) == (6, 12)
    assert found.notices == (
        f"going on from {FULL}: student, teacher, centre and optimiser after 2 epochs, which are "
        "6 iterations here",
    )
    losses, centres = steps(learner, plan, tensors)
    agree("losses", losses, tensors["losses"], 1e-4)
    agree("centres", centres, tensors["centres"], 1e-4)
    for role in ("student", "teacher"):
        final = getattr(learner, role).state_dict()
        for key, value in final.items():
            theirs = tensors[f"{role}/{key}"]
            if "cls_attn_blocks" in key and key.endswith("qkv.bias"):
                # The key bias moves by the sign of noise under Adam (its gradient is zero).
                D = len(value) // 3
                value, theirs = value.clone(), theirs.clone()
                value[D : 2 * D] = theirs[D : 2 * D] = 0
            agree(f"{role} {key}", value, theirs, 1e-4)


def test_the_moments_are_what_makes_them_equal(as_published, recorded):
    plan, learner, _ = begun(as_published())
    learner.stepping.optimiser.state.clear()
    losses, _ = steps(learner, plan, recorded[0])
    assert (losses - recorded[0]["losses"]).abs().max() > 0.01


class Ear(Listener):
    def __init__(self, at=None):
        self.notices, self.at = [], at

    def step(self, row):
        if row["iteration"] == self.at:
            os.kill(os.getpid(), signal.SIGUSR2)

    def notice(self, sentence):
        self.notices.append(sentence)


def test_a_run_goes_on_from_it_and_needs_it_no_more(as_published, tmp_path):
    ear, own = Ear(), tmp_path / "theirs.pth"
    own.write_bytes(FULL.read_bytes())
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings = as_published(train__continue_from=str(own), optim__weight_decay_end=0.2)
    pretrain(settings, whole, listener=ear)
    assert any("weight_decay_end 0.4 (here 0.2)" in notice for notice in ear.notices)
    assert [json.loads(x)["iteration"] for x in (whole / "metrics.jsonl").open()] == [*range(7, 13)]
    assert (whole / "views.png").exists()
    first = load_backbone(whole / "checkpoints" / "initial.safetensors")
    assert first.origin.facts["iteration"] == 6
    theirs = read_full(FULL).teacher
    assert all(torch.equal(v, theirs[f"backbone.{k}"]) for k, v in first.state_dict().items())
    with pytest.raises(Stopped):
        pretrain(settings, broken, listener=Ear(at=8))
    own.unlink()
    pretrain(settings, broken)
    # As every run's: a recipe that does not name it any more continues it, too.
    pretrain(as_published(optim__weight_decay_end=0.2, train__continue_from=None), broken)
    one, two = (checkpoint.sha256(run / "backbone.safetensors") for run in (whole, broken))
    assert one == two
    assert f"continue_from: {own}" in (broken / "config.yaml").read_text()


def test_a_finished_checkpoint_goes_on_behind_its_schedules(as_published, tmp_path):
    with pytest.raises(
        UsageError, match=r"trained for 2 epochs, and this run ends after 2: .*exte"
    ):
        begun(as_published(train__epochs=2, loss__warmup_teacher_temp_epochs=2))
    settings = as_published(
        train__epochs=2, train__extended=[1], loss__warmup_teacher_temp_epochs=2
    )
    plan, _, found = begun(settings)
    assert (found.iteration, plan.iterations) == (6, 9)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"head__prototypes": 64}, r"another head .*\(prototypes 64\): --head.prototypes 32"),
        ({"head__layers": 2, "head__bottleneck_dim": 16}, "--head.bottleneck_dim 8 --head.layers 3"),
        ({"head__use_bn": True}, "--head.use_bn false"),
        ({"head__norm_last_layer": True}, "--head.norm_last_layer false"),
        ({"model__depth": 2}, "does not fit xcit_nano_12_p8: student's tensors 2[0-9] missing"),
        ({"model__arch": "resnet18", **dict.fromkeys(
            (f"model__{k}" for k in ("patch_size", "embed_dim", "depth", "num_heads", "eta",
                                     "tokens_norm")), None)}, "does not fit resnet18"),
        ({"model__in_chans": 1}, "does not fit"),
        ({"optim__name": "sgd"}, "--optim.name adamw"),
        ({"train__init": "w.pth"}, "train.init and train.continue_from cancel each other"),
        ({"train__continue_from": "absent.pth"}, "there is no checkpoint absent.pth"),
        ({"train__continue_from": "."}, "is a folder"),
    ],
)  # fmt: skip
def test_another_configuration_is_told_what_would_fit(as_published, overrides, sentence):
    with pytest.raises(UsageError, match=sentence):
        begun(as_published(**overrides))


@pytest.fixture
def changed(tmp_path):
    """changed(act) -> the path of the checkpoint after act(tree)."""

    def make(act):
        tree = load_plain(FULL)
        torch.save(act(tree) or tree, tmp_path / "changed.pth")
        return tmp_path / "changed.pth"

    return make


def without(name):
    return lambda tree: {key: value for key, value in tree.items() if key != name}


def spoilt(tree):
    next(iter(tree["student"].values())).view(-1)[0] = float("nan")


def of_infinite_moments(tree):
    tree["optimizer"]["state"][0]["exp_avg"][:] = float("inf")


def of_too_few_moments(tree):
    del tree["optimizer"]["param_groups"][0]["params"][-2:]
    kept = {n for group in tree["optimizer"]["param_groups"] for n in group["params"]}
    state = tree["optimizer"]["state"]
    tree["optimizer"]["state"] = {n: own for n, own in state.items() if n in kept}


@pytest.mark.parametrize(
    ("act", "kind", "sentence"),
    [
        (without("optimizer"), UsageError, "lacks optimizer: weights alone begin a run by --init"),
        (without("dino_loss"), UsageError, "lacks dino_loss"),
        (
            lambda tree: tree["teacher"],
            UsageError,
            "lacks student, teacher, optimizer, epoch, dino",
        ),
        (lambda tree: [1, 2], UsageError, "is no full checkpoint"),
        (lambda tree: tree | {"learner": {}}, UsageError, "continue that run by --run"),
        (lambda tree: tree | {"epoch": "two"}, RunFailed, "no epoch 'two'"),
        (lambda tree: tree | {"dino_loss": {}}, RunFailed, "is no centre"),
        (lambda tree: tree | {"optimizer": {}}, RunFailed, "none of two groups"),
        (lambda tree: tree | {"student": {"x": 1}}, RunFailed, "its student is no network"),
        (lambda tree: tree | {"student": {"x": torch.ones(1)}}, UsageError, "none of the publish"),
        (spoilt, RunFailed, "not finite .the student's"),
        (of_infinite_moments, RunFailed, "not finite .the optimiser's"),
        (of_too_few_moments, RunFailed, "its optimizer is of .* parameters"),
    ],
)
def test_files_that_are_none_end_in_a_sentence(as_published, changed, act, kind, sentence):
    path = changed(act)
    with pytest.raises(kind, match=sentence) as error:
        begun(as_published(train__continue_from=str(path)))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_files_cut_short_or_of_weights_alone(as_published, tmp_path):
    for end in (0, 10, 5000, -100):
        (tmp_path / "cut.pth").write_bytes(FULL.read_bytes()[:end])
        with pytest.raises(RunFailed, match=r"cut\.pth is damaged"):
            read_full(tmp_path / "cut.pth")
    weights = GOLDEN / "xcit_p16.safetensors"
    with pytest.raises(UsageError, match=r"is no full checkpoint .* --init"):
        begun(as_published(train__continue_from=str(weights)))


def test_the_command_line_names_it(as_published, nine, tmp_path, xdino):
    (tmp_path / "recipe.yaml").write_text(config.to_yaml(as_published(train__continue_from=None)))
    command = ("pretrain", tmp_path / "recipe.yaml", "--run", tmp_path / "run")
    code, out, told = xdino(*command, "--continue-from", FULL)
    assert (code, out.strip()) == (0, str(tmp_path / "run" / "backbone.safetensors"))
    assert "going on from" in told
    assert "iteration 6 of 12" in told
    code, _, told = xdino(*command, "--continue-from", "a", "--train.continue_from", "b")
    assert (code, told.count("\n")) == (2, 1)
    assert "--continue-from is 'a', but --train.continue_from is 'b': give one" in told
    code, _, told = xdino(*command[:2], "--run", tmp_path / "new", "--continue-from", tmp_path)
    assert (code, told.count("\n")) == (2, 1)
    assert not (tmp_path / "new").exists()
