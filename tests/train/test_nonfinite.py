"""`train.nonfinite`: stop, skip, rollback; what is saved, what is recorded, that resuming is exact."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from xdino import checkpoint, data, nonfinite, pretraining
from xdino.errors import NonFinite, RunFailed, Stopped, UsageError
from xdino.job import Listener
from xdino.nonfinite import Guard, Policy
from xdino.pretraining import pretrain
from xdino_launch.replay import replay

WORKER = Path(__file__).with_name("nonfinite_worker.py")


class Ear(Listener):
    def __init__(self, at=None):
        self.notices, self.at = [], at

    def step(self, row):
        if row["iteration"] == self.at:
            os.kill(os.getpid(), signal.SIGTERM)

    def notice(self, sentence):
        self.notices.append(sentence)


@pytest.fixture
def break_at(monkeypatch):
    """break_at(2, 5): the pixels of those steps hold a NaN, whenever they come."""
    plain = pretraining.to_device

    def use(*numbers):
        def to_device(batch, *rest):
            groups = plain(batch, *rest)
            if batch.iteration + 1 in numbers:
                groups[0][0, 0, 0, 0, 0] = float("nan")
            return groups

        monkeypatch.setattr(pretraining, "to_device", to_device)

    return use


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def events(run):
    return json.loads((run / nonfinite.RECORD_FILE).read_text())


def state_of(run):
    return checkpoint.load_state(run / "checkpoints" / "last.pt")


def equal_states(one, two):
    a, b = (state_of(run)["learner"] for run in (one, two))
    for role in ("student", "teacher"):
        for name, value in a[role].items():
            assert torch.equal(value, b[role][name]), name
    assert torch.equal(a["centre"], b["centre"])


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("stop", Policy("stop")),
        ("skip 3", Policy("skip", most=3)),
        ("rollback", Policy("rollback", factor=0.5)),
        ("  rollback   0.3 ", Policy("rollback", factor=0.3)),
        ("rollback 1", Policy("rollback", factor=1.0)),
    ],
)
def test_policies(text, policy, tiny):
    assert Policy.parse(text) == policy
    assert tiny(train__nonfinite=text).train.nonfinite == " ".join(text.split())


@pytest.mark.parametrize(
    ("text", "mend"),
    [
        ("", "stop, skip n or rollback"),
        ("skp 3", 'did you mean "skip 3"'),
        ("skip", 'as in "skip 3"'),
        ("skip 0", 'as in "skip 3"'),
        ("skip -1", 'as in "skip 3"'),
        ("skip 1.5", 'as in "skip 3"'),
        ("skip ٣", 'as in "skip 3"'),
        ("skip 3 4", 'as in "skip 3"'),
        ("stop 1", "takes no number"),
        ("rollback 0", "above 0 and at most 1"),
        ("rollback 2", "above 0 and at most 1"),
        ("rollback nan", "above 0 and at most 1"),
        ("rollback 1e-1", "above 0 and at most 1"),
        ("rollback 0.5 0.5", "above 0 and at most 1"),
    ],
)
def test_what_is_no_policy_is_refused(text, mend, tiny):
    with pytest.raises(UsageError, match=r"train\.nonfinite") as raised:
        tiny(train__nonfinite=text)
    assert mend in str(raised.value)


def test_a_stop_keeps_the_state_before_and_says_what_works(tiny, tmp_path, break_at):
    break_at(5)
    run = tmp_path / "run"
    with pytest.raises(RunFailed) as raised:
        pretrain(tiny(train__precision="fp32"), run)
    sentence = str(raised.value)
    assert "the loss became nan (iteration 5)" in sentence
    for part in ('--train.nonfinite "skip 3"', "--train.nonfinite rollback", "xdino replay"):
        assert part in sentence
    assert sentence.endswith("last.pt, iteration 3")
    assert state_of(run)["iteration"] == 3
    (event,) = events(run)
    assert {k: event[k] for k in ("iteration", "epoch", "what", "action", "policy")} == {
        "iteration": 5, "epoch": 2, "what": "the loss became nan", "action": "stop",
        "policy": "stop",
    }  # fmt: skip
    assert event["loss"] == "nan", "JSON has no NaN"
    assert event["precision"] == "fp32"
    (mine,) = event["ranks"]
    expected = data.epoch_order(20, 0, 1)[6:12].tolist()
    assert mine["indices"] == expected
    assert mine["seeds"] == [[0, 1, index] for index in expected]
    assert [Path(name).name for name in mine["images"]] == [f"{i:02}.png" for i in expected]
    assert mine["views"] == [{"size": 24, "count": 2}, {"size": 16, "count": 2}]


def test_the_advice_works_on_that_run(tiny, tmp_path, break_at):
    break_at(5)
    run = tmp_path / "run"
    with pytest.raises(RunFailed):
        pretrain(tiny(), run)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("nonfinite: stop", "nonfinite: skip 3"))
    pretrain(tiny(train__nonfinite="skip 3"), run)
    assert [event["action"] for event in events(run)] == ["stop", "skip"]
    assert [row["iteration"] for row in rows(run)] == [1, 2, 3, 4, 5, 6]


def test_a_skipped_step_is_counted_and_moves_nothing(tiny, tmp_path, break_at):
    break_at(2, 4)
    run, ear = tmp_path / "run", Ear()
    pretrain(tiny(train__nonfinite="skip 1"), run, listener=ear)
    found = rows(run)
    assert [row["iteration"] for row in found] == [1, 2, 3, 4, 5, 6]
    assert [row.get("skipped", 0) for row in found] == [0, 1, 0, 1, 0, 0]
    assert "loss" not in found[1]
    assert "iteration 2 was skipped: the loss became nan" in ear.notices
    assert [event["action"] for event in events(run)] == ["skip", "skip"]
    steps = {int(m["step"]) for m in state_of(run)["learner"]["optimiser"]["state"].values()}
    assert steps == {4, 2}, "two of six moved nothing; the last layer is frozen for an epoch"


def test_too_many_skips_in_a_row_stop_the_run(tiny, tmp_path, break_at):
    break_at(2, 3, 4)
    with pytest.raises(RunFailed, match=r"\(iteration 4\).*rollback.*2 steps in a row") as raised:
        pretrain(tiny(train__nonfinite="skip 2"), tmp_path)
    assert '"skip 3"' not in str(raised.value)
    assert [event["action"] for event in events(tmp_path)] == ["skip", "skip", "stop"]


@pytest.mark.parametrize("broken", [2, 5])  # before the first saved state, and after it
def test_a_rollback_goes_on_from_the_last_state_with_a_lower_rate(tiny, tmp_path, break_at, broken):
    break_at(broken)
    run, ear = tmp_path / "run", Ear()
    path = pretrain(tiny(train__nonfinite="rollback 0.25"), run, listener=ear)
    assert path.exists()
    found = rows(run)
    assert [row["iteration"] for row in found] == [1, 2, 3, 4, 5, 6], "each told once"
    assert [row.get("skipped", 0) for row in found] == [int(i == broken) for i in range(1, 7)]
    base = 0 if broken == 2 else 3
    assert f"back to iteration {base}" in "".join(ear.notices)
    plain = pretraining.make_plan(tiny()).schedules
    for row in found:
        if "lr" in row:
            factor = 0.25 if row["iteration"] > base else 1
            assert row["lr"] == pytest.approx(plain.at(row["iteration"] - 1).lr * factor, rel=1e-6)
    assert state_of(run)["nonfinite"]["lr_factor"] == 0.25
    (event,) = events(run)
    assert (event["action"], event["state_iteration"]) == ("rollback", 0)


def test_a_state_saved_between_the_way_back_and_the_broken_step_knows_of_it(
    tiny, tmp_path, break_at
):
    break_at(5)
    configuration = tiny(train__nonfinite="rollback", train__epochs=3, model__drop_path=0.3)
    pretrain(configuration, tmp_path / "whole")

    class Second(Ear):
        def step(self, row):  # the second time that iteration 4 comes
            self.seen = getattr(self, "seen", 0) + (row["iteration"] == 4)
            if row["iteration"] == 4 and self.seen == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    broken = tmp_path / "broken"
    with pytest.raises(Stopped, match="after iteration 4"):
        pretrain(configuration, broken, listener=Second())
    assert state_of(broken)["nonfinite"]["left_out"] == [5]
    pretrain(configuration, broken)
    equal_states(tmp_path / "whole", broken)
    assert len(events(broken)) == 1


def test_going_back_ends(tiny, tmp_path, break_at):
    break_at(4, 5, 6, 7, 8, 9)
    with pytest.raises(RunFailed, match="going back 3 times did not help"):
        pretrain(tiny(train__nonfinite="rollback", train__epochs=3), tmp_path)
    assert [event["action"] for event in events(tmp_path)] == ["rollback"] * 3 + ["stop"]
    assert state_of(tmp_path)["iteration"] == 6, "the steps before it were left out"


def test_a_state_beyond_the_broken_step_begins_the_count_anew():
    guard = Guard(Policy.parse("rollback 0.5"))
    error = NonFinite("the loss became nan")
    assert [guard.decide(error, 5) for _ in range(4)] == ["rollback"] * 3 + ["stop"]
    guard.saved(5)
    assert guard.decide(error, 6) == "stop"
    guard.saved(7)
    assert guard.left_out == set()
    assert guard.decide(error, 8) == "rollback"
    again = Guard(guard.policy)
    again.restore(json.loads(json.dumps(guard.state())))
    assert again == guard


@pytest.mark.parametrize("policy", ["stop", "skip 3", "rollback"])
def test_weights_that_are_not_finite_are_never_saved(tiny, tmp_path, monkeypatch, policy):
    """An update that overflows leaves a finite loss behind, and is noticed before it is written."""
    step = pretraining.Learner.finish
    spoilt = []

    def spoil(self, *args, **kwargs):
        result = step(self, *args, **kwargs)
        if len(spoilt) < 6:
            spoilt.append(1)
        if len(spoilt) == 6:
            spoilt.append(2)
            with torch.no_grad():
                self.student.head.mlp[0].weight[0, 0] = float("inf")
        return result

    monkeypatch.setattr(pretraining.Learner, "finish", spoil)
    configuration = tiny(train__nonfinite=policy)
    if policy == "rollback":
        pretrain(configuration, tmp_path)
        assert events(tmp_path)[0]["what"].startswith("head.mlp.0.weight of the student became inf")
    else:
        with pytest.raises(RunFailed, match=r"head.mlp.0.weight of the student became inf.*on 3$"):
            pretrain(configuration, tmp_path)
        assert state_of(tmp_path)["iteration"] == 3
    assert all(x.isfinite().all() for x in state_of(tmp_path)["learner"]["student"].values())
    checkpoint.load_backbone(tmp_path)


@pytest.mark.parametrize("left", [b"", b"[1]", b'{"a": 1}', b"\xff[", b'[{"iteration": 1}]'])
def test_a_damaged_record_is_a_sentence_to_read_and_begun_anew_to_write(left, tmp_path):
    (tmp_path / nonfinite.RECORD_FILE).write_bytes(left)
    with pytest.raises(RunFailed, match="damaged"):
        nonfinite.read(tmp_path)
    nonfinite.add(tmp_path, {"iteration": 3, "ranks": [], "loss": float("inf")})
    assert [event["loss"] for event in nonfinite.read(tmp_path)] == ["inf"]


@pytest.mark.slow
def test_two_processes_do_the_same_about_it(images, tmp_path):
    environment = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20_000 + (os.getpid() + 13) % 20_000),
        "OMP_NUM_THREADS": "1",
    }
    policies = ["stop", "skip 2", "rollback"]
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(images), str(tmp_path), *policies],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert told[0] == told[1]
    assert told[0][0].startswith("the loss became nan (iteration 3)")
    assert told[0][1:] == ["done", "done"]
    for policy in policies:
        run = tmp_path / policy
        (event,) = events(run)
        assert event["action"] == policy.split()[0]
        shares = [rank["indices"] for rank in event["ranks"]]
        assert [len(share) for share in shares] == [5, 5]
        assert shares[0] + shares[1] == data.epoch_order(20, 0, 1)[:10].tolist()
        assert state_of(run)["iteration"] == (2 if policy == "stop" else 4)
    # One process makes the step of two again; here no pixel is broken.
    found = replay(tmp_path / "stop")
    assert (found.iteration, found.from_iteration, found.processes) == (3, 2, 2)
    assert [image["index"] for image in found.images] == shares[0] + shares[1]
    assert found.what is None
