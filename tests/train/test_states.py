"""What a run keeps of its states: written while it trains, the newest, milestones, and a way back."""

import json
import shutil
import threading
import weakref

import pytest
import torch

from xdino import checkpoint, train
from xdino.errors import RunFailed, UsageError
from xdino.pretraining import Pretraining, pretrain
from xdino.run_directory import background, states

from .listening import Ear, rows


def kept(run):
    return sorted(path.name for path in (run / "checkpoints").glob("*.pt"))


@pytest.fixture
def slowly(monkeypatch):
    """States are written when `slowly.set()` says so, and not before."""
    go, save = threading.Event(), checkpoint.save_state

    def wait_and_save(path, state):
        assert go.wait(60), "nobody said so"
        save(path, state)

    monkeypatch.setattr(checkpoint, "save_state", wait_and_save)
    return go


def test_training_goes_on_while_a_state_is_written_and_the_state_is_of_its_own_iteration(
    tiny, tmp_path, slowly
):
    settings = tiny(runtime__checkpoint_every=2, train__epochs=1, model__drop_path=0.3)
    told = []

    class Watched(Ear):
        def step(self, row):
            super().step(row)
            told.append((row["iteration"], (run / "checkpoints" / "last.pt").exists()))
            if row["iteration"] == 3:
                slowly.set()

    run = tmp_path / "run"
    pretrain(settings, run, listener=Watched())
    assert told == [(1, False), (2, False), (3, False)], "step 3 was made before state 2 was there"
    other = tmp_path / "other"
    pretrain(tiny(train__epochs=1, model__drop_path=0.3), other, listener=Ear())
    two = checkpoint.load_state(run / "checkpoints" / "previous.pt")
    assert two["iteration"] == 2
    # What was written is what was: going on from it ends in the bytes of the run that never was saved.
    shutil.copy(run / "checkpoints" / "previous.pt", run / "checkpoints" / "last.pt")
    pretrain(settings, run)
    a, b = (checkpoint.sha256(r / "backbone.safetensors") for r in (run, other))
    assert a == b


def test_what_the_disk_refuses_ends_the_run_within_a_step(tiny, tmp_path, monkeypatch):
    save = checkpoint.save_state

    def full(path, state):
        if state["iteration"] == 4:
            raise RunFailed(f"cannot write {path}: No space left on device")
        save(path, state)

    monkeypatch.setattr(checkpoint, "save_state", full)
    settings = tiny(runtime__checkpoint_every=2, train__epochs=200)
    with pytest.raises(RunFailed) as failed:
        pretrain(settings, tmp_path)
    assert "No space left on device. The last good checkpoint is" in str(failed.value)
    assert str(failed.value).endswith("iteration 3")
    assert rows(tmp_path)[-1]["iteration"] < 600


def test_without_memory_for_a_copy_training_waits(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(background, "free_memory", lambda device: 1000)
    names = []
    save = checkpoint.save_state
    monkeypatch.setattr(
        checkpoint,
        "save_state",
        lambda path, state: names.append(threading.current_thread().name) or save(path, state),
    )
    pretrain(tiny(train__epochs=1), tmp_path)
    assert names == ["MainThread"]


def test_a_snapshot_keeps_its_memory_and_what_lies_twice():
    x = torch.arange(6.0).reshape(2, 3)
    tree = {"a": x, "b": [x, (torch.ones(2), "text", None)], "c": x.t()}
    snapshot = checkpoint.Snapshot()
    assert snapshot.missing(tree) == 4 * (6 * 3 + 2)
    first = snapshot.take(tree)
    x.add_(1)
    assert first["a"] is first["b"][0], "one copy"
    assert torch.equal(first["c"], torch.arange(6.0).reshape(2, 3).t())
    assert first["b"][1][1:] == ("text", None)
    assert snapshot.missing(tree) <= 4 * 6
    held = first["a"].data_ptr()
    assert snapshot.take(tree)["a"].data_ptr() == held
    assert torch.equal(first["a"], x), "the copy before is no more"
    tree["a"] = torch.zeros(4)
    assert snapshot.take(tree)["a"].tolist() == [0, 0, 0, 0]


def test_the_loaded_state_is_let_go_of(tiny, tmp_path, monkeypatch):
    """Beside the networks, the moments and the copy that is written, memory holds none."""
    pretrain(tiny(runtime__checkpoint_every=2), tmp_path / "run", listener=(ear := Ear()))
    whole = ear.rows[-1]["loss"]
    held, load = [], checkpoint.load_state

    def loaded(path):
        state = load(path)
        held.append(weakref.ref(state["learner"]["student"]["head.last_layer.weight_v"]))
        return state

    class Looks(Ear):
        def started(self, facts):
            assert [ref() for ref in held] == [None]

    monkeypatch.setattr(checkpoint, "load_state", loaded)
    ear = Looks()
    settings = tiny(runtime__checkpoint_every=2)
    train.run(Pretraining(settings), tmp_path / "run", listener=ear, from_iteration=4)
    assert ear.rows[-1]["loss"] == whole


def test_the_newest_and_milestones_are_kept_and_one_goes_back(tiny, tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    settings = tiny(
        runtime__checkpoint_every=1, runtime__keep_last=3, runtime__keep_every=1, train__epochs=3,
        model__drop_path=0.3,
    )  # fmt: skip
    pretrain(settings, whole)
    shutil.copytree(whole, run)
    newest = [f"iteration_{n:08}.pt" for n in (7, 8, 9)]
    epochs = [f"epoch_{n:04}.pt" for n in (1, 2, 3)]
    assert kept(run) == sorted([*epochs, *newest, "last.pt", "previous.pt"])
    folder = whole / "checkpoints"
    names = ("last.pt", "iteration_00000009.pt", "epoch_0003.pt")
    assert len({(folder / name).stat().st_ino for name in names}) == 1, "one file, by hard links"

    with pytest.raises(UsageError) as refused:
        train.run(Pretraining(settings), run, from_iteration=5)
    assert "keeps no state of iteration 5: those of 3, 6, 7, 8, 9 are there" in str(refused.value)
    assert kept(run) == kept(whole)
    ear = Ear(at=7, act=lambda: None)
    train.run(Pretraining(settings), run, listener=ear, from_iteration=6)
    assert [row["iteration"] for row in rows(run)] == list(range(1, 10))
    left = ["left_epoch_0003.pt", "left_last.pt"]
    assert kept(run) == sorted([*epochs, *newest, "last.pt", "previous.pt", *left])
    a, b = (checkpoint.sha256(r / "backbone.safetensors") for r in (run, whole))
    assert a == b
    starts = json.loads((run / "environment.json").read_text())["starts"]
    assert [start["iteration"] for start in starts] == [0, 6]
    with pytest.raises(UsageError, match="there is none at all"):
        train.run(Pretraining(settings), tmp_path / "new", from_iteration=6)
    assert not (tmp_path / "new").exists()


def test_where_the_disk_knows_no_links_states_are_copied(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError

    monkeypatch.setattr(states.os, "link", refuse)
    (tmp_path / "a.pt").write_bytes(b"state")
    states.linked(tmp_path / "a.pt", tmp_path / "b.pt")
    assert (tmp_path / "b.pt").read_bytes() == b"state"
    monkeypatch.setattr(states.fcntl, "ioctl", refuse)
    states.linked(tmp_path / "a.pt", tmp_path / "c.pt")
    assert (tmp_path / "c.pt").read_bytes() == b"state"
