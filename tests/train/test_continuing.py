"""Who may continue a run, from which state, and what a start finds that a kill left behind."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from PIL import Image

from xdino import checkpoint
from xdino.errors import RunFailed, Stopped, UsageError
from xdino.pretraining import pretrain
from xdino.run_directory import RunDirectory
from xdino.runtime import lock
from xdino.runtime.lock import Lock

from .listening import Ear, rows


def ask_to_stop():
    os.kill(os.getpid(), signal.SIGUSR2)


@pytest.fixture
def finished(tiny, tmp_path):
    """A run of six iterations whose states are of iteration 6 and 3."""
    pretrain(tiny(), tmp_path / "run")
    return tmp_path / "run"


# --- states ---


def test_any_flipped_bit_of_a_state_is_noticed(finished):
    last = finished / "checkpoints" / "last.pt"
    good, generator = last.read_bytes(), random.Random(0)
    assert checkpoint.load_state(last)["iteration"] == 6
    assert torch.load(last, weights_only=True)["iteration"] == 6, "torch reads it as ever"
    places = [*generator.sample(range(len(good)), 50), 0, len(good) - 1, len(good) - 72]
    for place in places:
        spoilt = bytearray(good)
        spoilt[place] ^= 1 << generator.randrange(8)
        last.write_bytes(spoilt)
        with pytest.raises(RunFailed, match="damaged"):
            checkpoint.load_state(last)


def test_a_damaged_state_is_put_aside_and_the_one_before_taken(tiny, finished):
    last = finished / "checkpoints" / "last.pt"
    whole = checkpoint.sha256(finished / "backbone.safetensors")
    spoilt = bytearray(last.read_bytes())
    spoilt[len(spoilt) // 2] ^= 1
    last.write_bytes(spoilt)
    ear = Ear()
    pretrain(tiny(), finished, listener=ear)
    assert any("damaged" in n and "previous.pt, iteration 3" in n for n in ear.notices)
    assert (finished / "checkpoints" / "damaged.pt").read_bytes() == spoilt
    assert checkpoint.load_state(last)["iteration"] == 6
    assert checkpoint.sha256(finished / "backbone.safetensors") == whole
    assert [r["iteration"] for r in rows(finished)] == [1, 2, 3, 4, 5, 6]


def test_a_state_that_is_gone_is_not_begun_again(tiny, finished):
    before = (finished / "metrics.jsonl").read_text()
    (finished / "checkpoints" / "last.pt").unlink()
    with pytest.raises(UsageError, match=r"last.pt is missing: kept are .*previous.pt"):
        pretrain(tiny(), finished)
    (finished / "checkpoints" / "previous.pt").unlink()
    with pytest.raises(UsageError, match="by --init"):
        pretrain(tiny(), finished)
    assert (finished / "metrics.jsonl").read_text() == before


def test_the_backbone_follows_from_the_state(tiny, finished):
    """Killed between the two, the next start writes the backbone again."""
    whole = checkpoint.sha256(finished / "backbone.safetensors")
    shutil.copy(finished / "checkpoints" / "initial.safetensors", finished / "backbone.safetensors")
    pretrain(tiny(), finished)
    assert checkpoint.sha256(finished / "backbone.safetensors") == whole


@pytest.mark.parametrize("lost", ["iteration", "sampler", "spec", "learner"])
def test_a_state_that_lacks_something(tiny, finished, lost):
    last = finished / "checkpoints" / "last.pt"
    state = checkpoint.load_state(last)
    del state[lost]
    for path in (last, last.with_name("previous.pt")):
        checkpoint.save_state(path, state)
    (finished / "backbone.safetensors").unlink()
    with pytest.raises(RunFailed, match=r"last\.pt is"):
        pretrain(tiny(), finished)


def test_a_state_whose_learner_lacks_something(tiny, finished):
    last = finished / "checkpoints" / "last.pt"
    state = checkpoint.load_state(last)
    state["learner"]["student"].popitem()
    checkpoint.save_state(last, state)
    (finished / "backbone.safetensors").unlink()
    with pytest.raises(RunFailed, match="not a state of this configuration"):
        pretrain(tiny(), finished)


@pytest.mark.parametrize("drop_path", [0, 0.3])
def test_a_state_of_before_runs_could_move_goes_on(tiny, tmp_path, drop_path):
    """It holds the random numbers of two processes, and nothing says how a step was shared out."""
    run = tmp_path / "run"
    settings = tiny(model__drop_path=drop_path)
    pretrain(settings, tmp_path / "whole")
    with pytest.raises(Stopped):
        pretrain(settings, run, listener=Ear(4, ask_to_stop))
    last, told = run / "checkpoints" / "last.pt", run / "environment.json"
    state = checkpoint.load_state(last)
    assert state["iteration"] == 4
    checkpoint.save_state(last, {**state, "rng": [{"torch": torch.get_rng_state()}] * 2})
    starts = json.loads(told.read_text())["starts"]
    del starts[0]["batch"]
    starts[0]["processes"] = 2
    told.write_text(json.dumps({"starts": starts}))
    written = (run / "config.yaml").read_text()
    assert written.count("batch_size: 6\n") == 1
    (run / "config.yaml").write_text(written.replace("batch_size: 6\n", "batch_size: 3\n"))
    ear = Ear()
    pretrain(tiny(model__drop_path=drop_path, train__batch_size=3), run, listener=ear)
    assert any("1 process x 6 images x 1 micro-batch make the run's 6" in n for n in ear.notices)
    others = [notice for notice in ear.notices if "iteration 4 is of an earlier version" in notice]
    assert len(others) == (drop_path > 0)
    # Here the numbers of before are those of now, so that the end is, too.
    a, b = (checkpoint.sha256(tmp_path / r / "backbone.safetensors") for r in ("whole", "run"))
    assert a == b
    assert "rng" not in checkpoint.load_state(last)


def test_states_take_the_umask(tiny, tmp_path):
    before = os.umask(0o027)
    try:
        pretrain(tiny(), tmp_path / "run")
    finally:
        os.umask(before)
    for name in ("checkpoints/last.pt", "backbone.safetensors", "config.yaml"):
        assert (tmp_path / "run" / name).stat().st_mode & 0o777 == 0o640, name


# --- the same images, the same configuration ---


def copied(images, folder):
    shutil.copytree(images, folder)
    return folder


def test_other_images_of_the_same_number_are_refused(tiny, images, tmp_path):
    ear = Ear(at=4, act=ask_to_stop)
    here = copied(images, tmp_path / "images")
    with pytest.raises(Stopped):
        pretrain(tiny(data__path=str(here)), tmp_path / "run", listener=ear)
    one = here / "07.png"
    original = one.read_bytes()
    Image.new("RGB", (24, 24), "red").save(one)
    with pytest.raises(UsageError, match="other images"):
        pretrain(tiny(data__path=str(here)), tmp_path / "run")
    one.write_bytes(original)
    here.rename(tmp_path / "moved")
    pretrain(tiny(data__path=f"{tmp_path}/./moved/"), tmp_path / "run")
    assert [r["iteration"] for r in rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_the_weights_it_began_with_are_not_needed_again(tiny, finished, tmp_path):
    ear = Ear(at=2, act=ask_to_stop)
    start = copied(finished, tmp_path / "start")
    begun = tiny(train__init=str(start), train__seed=1)
    with pytest.raises(Stopped):
        pretrain(begun, tmp_path / "second", listener=ear)
    shutil.rmtree(start)
    pretrain(tiny(train__seed=1), tmp_path / "second")
    assert "init: /" in (tmp_path / "second" / "config.yaml").read_text(), "where it came from"


def test_what_is_judged_may_change(tiny, finished):
    ear = Ear()
    judged = tiny(evaluate__every=2)
    pretrain(judged, finished, evaluator=lambda backbone: {"knn_top1": 1.0}, listener=ear)
    assert [r for r in rows(finished) if "knn_top1" in r] == [
        {"iteration": 6, "epoch": 2, "knn_top1": 1.0}
    ]
    assert "every: 2" in (finished / "config.yaml").read_text()


def test_an_empty_configuration_is_read_from_the_state(tiny, finished):
    (finished / "config.yaml").write_text("")
    (finished / "backbone.safetensors").unlink()
    with pytest.raises(UsageError, match="another configuration"):
        pretrain(tiny(optim__lr=1.0), finished)
    pretrain(tiny(), finished)
    assert "embed_dim: 32" in (finished / "config.yaml").read_text()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"starts": 3}', b"\xff\xfe"])
def test_a_damaged_environment_is_put_aside(tiny, finished, content):
    (finished / "environment.json").write_bytes(content)
    (finished / "backbone.safetensors").unlink()
    ear = Ear()
    pretrain(tiny(), finished, listener=ear)
    assert any("environment.json was damaged" in notice for notice in ear.notices)
    assert (finished / "environment.damaged").read_bytes() == content
    assert len(json.loads((finished / "environment.json").read_text())["starts"]) == 1


# --- evaluations that are owed ---


def test_a_signal_during_an_evaluation_abandons_it_and_it_is_made_again(tiny, tmp_path):
    run, seen = tmp_path / "run", []

    def interrupted(backbone):
        seen.append("begun")
        if len(seen) == 1:
            return {"knn_top1": 1.0}  # before the first step
        ask_to_stop()
        time.sleep(30)  # a signal ends this at once
        seen.append("done")

    with pytest.raises(Stopped, match="SIGUSR2"):
        pretrain(tiny(evaluate__every=2), run, evaluator=interrupted)
    assert seen == ["begun", "begun"]
    assert checkpoint.load_state(run / "checkpoints" / "last.pt")["iteration"] == 6
    assert [r["iteration"] for r in rows(run) if "knn_top1" in r] == [0]

    def scored(backbone):
        seen.append("again")
        return {"knn_top1": 2.0}

    pretrain(tiny(evaluate__every=2), run, evaluator=scored)
    pretrain(tiny(evaluate__every=2), run, evaluator=scored)
    assert seen == ["begun", "begun", "again"]
    assert [r["iteration"] for r in rows(run)] == [0, 1, 2, 3, 4, 5, 6, 6]


def test_a_kill_during_an_evaluation_loses_no_step(tiny, tmp_path):
    scores = iter([{"knn_top1": 1.0}])  # before the first step, and then no more

    def killed(backbone):
        for found in scores:
            return found
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(tiny(evaluate__every=1), tmp_path, evaluator=killed)
    assert checkpoint.load_state(tmp_path / "checkpoints" / "last.pt")["iteration"] == 3
    pretrain(tiny(evaluate__every=1), tmp_path, evaluator=lambda backbone: {"knn_top1": 3.0})
    assert [r["iteration"] for r in rows(tmp_path) if "knn_top1" in r] == [0, 3, 6]


def test_a_signal_while_planning_leaves_nothing(tiny, tmp_path, monkeypatch):
    from xdino import pretraining

    def plan(*arguments):
        ask_to_stop()
        time.sleep(30)

    monkeypatch.setattr(pretraining, "make_plan", plan)
    with pytest.raises(Stopped, match="while it was planned"):
        pretrain(tiny(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- the lock ---


def test_a_run_that_is_under_way_is_not_touched_by_another_process(tiny, tmp_path):
    said = []

    def intrude():
        with pytest.raises(UsageError) as error:
            pretrain(tiny(), tmp_path / "run")
        said.append(str(error.value))

    pretrain(tiny(), tmp_path / "run", listener=Ear(at=3, act=intrude))
    assert f"in use by process {os.getpid()} on {socket.gethostname()}" in said[0]
    assert [r["iteration"] for r in rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "run" / ".lock").exists()


def held_elsewhere(folder, **who):
    facts = {"host": socket.gethostname(), "pid": 4_194_305, "start": "1", "since": "yesterday"}
    (folder / ".lock").write_text(json.dumps(facts | who))


def test_the_lock_of_a_dead_process_is_taken_over_and_said(tmp_path):
    held_elsewhere(tmp_path)
    with Lock(tmp_path) as held:
        assert "not running any more" in held.notice
    held_elsewhere(tmp_path, pid=os.getppid())  # its number was given to another since
    with Lock(tmp_path) as held:
        assert f"process {os.getppid()}" in held.notice


def test_where_the_kernel_cannot_tell_the_file_does(tmp_path, monkeypatch):
    """Another machine holds it, or the disk knows no locks."""
    held_elsewhere(tmp_path, host="another")
    with pytest.raises(UsageError, match=r"on another .*last sign of life"), Lock(tmp_path):
        pass
    old = time.time() - lock.SILENCE - 10
    os.utime(tmp_path / ".lock", (old, old))
    with Lock(tmp_path) as held:
        assert "no sign of life" in held.notice

    def no_locks(*arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    mine = {"pid": os.getppid(), "start": lock.start_time(os.getppid())}
    held_elsewhere(tmp_path, **mine)
    with pytest.raises(UsageError, match=f"process {os.getppid()}"), Lock(tmp_path):
        pass


def test_two_processes_at_once_one_is_refused(tmp_path, images):
    command = [
        sys.executable, "-m", "xdino_launch", "pretrain", "debug", "--run", str(tmp_path / "run"),
        "--evaluate.every", "0", "--crops.local_count", "0", "--crops.global_size", "12",
        "--train.epochs", "2", "--train.batch_size", "500",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        for _ in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], errors
    assert any("is in use by process" in error for error in errors), errors
    told = [r["iteration"] for r in rows(tmp_path / "run")]
    assert told == sorted(set(told))


def test_leftovers_of_killed_writers_go(tiny, finished):
    folder = finished / "checkpoints"
    (folder / ".tmpAb3dEf").write_bytes(b"half")  # as safetensors calls its own
    (folder / ".last.pt.77.tmp").mkdir()
    (folder / ".last.pt.77.tmp" / "last.pt").write_bytes(b"half")
    (finished / "backbone.safetensors").unlink()
    pretrain(tiny(), finished)
    assert not list(finished.rglob(".*"))


def test_a_run_directory_looks_before_it_writes(tmp_path, tiny):
    """A run that begins, or was killed when it began, is no folder of something else."""
    (tmp_path / ".lock").write_text("")
    (tmp_path / ".probe.77.tmp").write_text("")
    (tmp_path / ".config.yaml.77.tmp").mkdir()
    before = sorted(tmp_path.iterdir())
    assert RunDirectory(tmp_path).resolve(tiny()) == tiny()
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / ".hidden").write_text("")
    with pytest.raises(UsageError, match="not empty and not a run"):
        RunDirectory(tmp_path).resolve(tiny())


def test_a_holder_that_has_not_told_its_name_yet_is_waited_for(tmp_path):
    with Lock(tmp_path):
        told = (tmp_path / ".lock").read_text()
        (tmp_path / ".lock").write_text("")
        later = threading.Timer(0.3, lambda: (tmp_path / ".lock").write_text(told))
        later.start()
        with (
            pytest.raises(UsageError, match=f"in use by process {os.getpid()} on "),
            Lock(tmp_path),
        ):
            pass
        later.join()
