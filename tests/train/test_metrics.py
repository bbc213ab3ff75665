"""metrics.jsonl, wandb without an account, warnings of collapse, the picture of the views."""

import json
import math
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import ClassVar

import pytest

from xdino import metrics
from xdino.errors import RunFailed
from xdino.metrics import CollapseAlarm, EmbeddingAlarm, MetricsLog, collapse_warning


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_continued_log_tells_every_iteration_once(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for i in range(1, 6):
        log.write({"iteration": i, "loss": i / 3})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 6, "lo')  # killed while writing
    log = MetricsLog(tmp_path, 3)
    log.write({"iteration": 4, "loss": 0.5})
    log.close()
    assert [(r["iteration"], r["loss"]) for r in rows(tmp_path)] == [
        (1, 0.3333333), (2, 0.6666667), (3, 1.0), (4, 0.5),
    ]  # fmt: skip


def test_lines_that_are_no_rows_are_left_out(tmp_path):
    good = b'{"iteration": 1, "loss": 2.5}'
    bad = (b"[]", b"7", b"null", b'{"loss": 1}', b'{"iteration": "2"}', b'{"iteration": true}',
           b"\xff\xfe", b"[" * 100_000, b"", b'{"iteration": 1, "lo')  # fmt: skip
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([good, *bad]))
    assert metrics.read_rows(tmp_path / "metrics.jsonl") == ([{"iteration": 1, "loss": 2.5}], 9)
    MetricsLog(tmp_path, 5).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == good + b"\n"


def test_a_whole_log_is_not_written_again(tmp_path):
    """A restart that is killed in the middle of writing would lose every row."""
    log = MetricsLog(tmp_path, 0)
    log.write({"iteration": 1, "loss": 0.25, "lr": 1e-7})
    log.close()
    before = (tmp_path / "metrics.jsonl").stat()
    MetricsLog(tmp_path, 1).close()
    after = (tmp_path / "metrics.jsonl").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    MetricsLog(tmp_path, 0).close()
    assert (tmp_path / "metrics.jsonl").stat().st_ino != before.st_ino, "written beside"


def test_a_log_that_cannot_be_written_is_a_sentence(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log._file.close()
    log._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    with pytest.raises(RunFailed, match=r"cannot write .*metrics\.jsonl: No space left"):
        log.write({"iteration": 1})
    log.close()
    (tmp_path / "other" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(RunFailed, match=r"cannot read .*metrics\.jsonl: Is a directory"):
        MetricsLog(tmp_path / "other", 0)


class Refusing:
    """Stands in for the module: whatever is asked of it fails."""

    Error = RuntimeError

    class Settings(SimpleNamespace):
        model_fields: ClassVar = {}

    def __init__(self, key: bool) -> None:
        self.key, self.modes = key, []

    def login(self, **_: object) -> bool:
        return self.key

    def init(self, mode: str, **_: object) -> None:
        self.modes.append(mode)
        raise Exception(f"no {mode}")

    def teardown(self) -> None:
        pass


@pytest.mark.parametrize(("key", "modes"), [(True, ["online", "offline"]), (False, ["offline"])])
def test_wandb_that_fails_does_not_end_a_run(tmp_path, monkeypatch, key, modes):
    wandb, told = Refusing(key), []
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log = MetricsLog(tmp_path, 0, "online", notice=told.append)
    log.write({"iteration": 1})
    log.close()
    assert wandb.modes == modes
    assert ("cannot be reached (no online)" if key else "has no API key") in told[0]
    assert told[1:] == ["wandb failed (no offline): the run goes on without its page"]
    assert rows(tmp_path) == [{"iteration": 1}]


@pytest.mark.slow
def test_wandb_offline_continues_the_same_run(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    ids = []
    for iteration in (0, 1):
        log = MetricsLog(tmp_path, iteration, "offline", "test", {"optim": {"lr": 1}})
        log.write({"iteration": iteration + 1, "loss": 1.0})
        log.write({"iteration": iteration + 1, "knn_top1": 50.0})  # at the same iteration
        log.write({"iteration": 1, "linear_top1": 60.0})  # and one that comes late
        ids.append(log._pages[0].run.id)
        log.close()
    assert ids[0] == ids[1] == (tmp_path / "wandb-id.txt").read_text()
    kept = list(tmp_path.glob(f"wandb/offline-run-*-{ids[0]}/*.wandb"))
    assert kept
    names, deadline = (b"loss", b"knn_top1", b"linear_top1"), time.monotonic() + 20
    for file in kept:  # its service may write the last block after it has said that it is done
        while not all(name in file.read_bytes() for name in names):
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_collapse_is_said_in_words():
    K = 64
    flat = {"teacher_entropy": math.log(K), "kl": 0.0, "centre_norm": 0.0}
    assert "ln K = 4.159" in collapse_warning(math.log(K), flat, K)
    point = {"teacher_entropy": 1e-6, "kl": 1e-6, "centre_norm": 9.0}
    assert "same prototype" in collapse_warning(2e-6, point, K)
    healthy = {"teacher_entropy": 2.0, "kl": 0.5, "centre_norm": 1.0}
    assert collapse_warning(2.5, healthy, K) is None


def test_each_collapse_is_said_once_until_it_has_recovered():
    K = 64
    flat = {"teacher_entropy": math.log(K), "kl": 1e-5}
    point = {"teacher_entropy": 1e-6, "kl": 1e-6}
    healthy = {"teacher_entropy": 2.0, "kl": 0.5}
    nearly = {"teacher_entropy": math.log(K), "kl": 1.5e-3}  # outside of the limits, but not well
    alarm = CollapseAlarm(K, after=10)
    assert alarm.look(10, math.log(K), flat) is None, "every run begins there"
    assert "says nothing about any image" in alarm.look(11, math.log(K), flat)
    told = [alarm.look(i, math.log(K), [flat, nearly][i % 2]) for i in range(12, 60)]
    assert told == [None] * 48
    assert "same prototype" in alarm.look(60, 1e-6, point)
    assert alarm.look(61, 1e-6, point) is None
    assert alarm.look(62, 2.5, healthy) is None
    assert "same prototype" in alarm.look(63, 1e-6, point)


def test_a_loss_that_hovers_at_ln_k_is_said_once():
    K, spread = 1000, {"teacher_entropy": 4.0, "kl": 2.9}
    alarm = CollapseAlarm(K)
    near = math.log(K)
    told = [alarm.look(i, near * (1 + 0.009 * (-1) ** i), spread) for i in range(20)]
    assert [i for i, words in enumerate(told) if words] == [5]
    assert "has stayed at ln K = 6.908 for 5 logged rows" in told[5]
    assert alarm.look(20, 6.0, spread) is None
    again = [alarm.look(i, near, spread) for i in range(21, 27)]
    assert [bool(words) for words in again] == [False, False, False, False, True, False]
    passing = CollapseAlarm(K)
    assert not any(passing.look(i, near * (1 - 0.003 * i), spread) for i in range(40))


def test_ln_k_is_compared_with_the_loss_without_koleo():
    K = 64
    flat = {"teacher_entropy": math.log(K), "kl": 0.0, "koleo": 3.0}
    assert "says nothing" in CollapseAlarm(K).look(1, math.log(K) + 0.3, flat)
    well = {"teacher_entropy": 1.5, "kl": 0.9, "koleo": 17.0}
    told = [CollapseAlarm(K).look(i, math.log(K), well) for i in range(9)]
    assert not any(told), "2.4 and the rest is KoLeo's"


def test_embeddings_that_are_one_point_are_said_once_until_they_have_recovered():
    alarm = EmbeddingAlarm("simdino", after=10)
    point = {"spread": 0.004, "agreement": -0.2}
    nearly, well = {"spread": 0.015, "agreement": 0.5}, {"spread": 0.5, "agreement": 0.5}
    assert alarm.look(10, -1.0, point) is None, "every run begins there"
    told = alarm.look(11, -1.0, point)
    assert "nearly the same embedding (spread 0.004" in told
    assert "loss.coding_rate_weight" in told
    assert [alarm.look(i, -1.0, [nearly, point][i % 2]) for i in range(12, 40)] == [None] * 28
    assert alarm.look(40, -1.0, well) is None
    assert "same embedding" in alarm.look(41, -1.0, point)


def test_views_that_stay_strangers_are_said_after_some_rows():
    alarm = EmbeddingAlarm("sigreg")
    strangers = {"spread": 0.9, "agreement": 0.01}
    told = [alarm.look(i, 0.5, strangers) for i in range(1, 10)]
    assert [i for i, words in enumerate(told) if words] == [4]
    assert "no more alike than views of two images (agreement 0.01) for 5 logged rows" in told[4]
    assert "loss.sigreg_weight" in told[4]


def scalars(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    return {
        tag: [(event.step, round(event.value, 4)) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def test_tensorboard_has_the_rows_and_hides_what_is_made_again(tmp_path):
    log = MetricsLog(tmp_path, 0, tensorboard=True)
    for i in (1, 2, 3):
        log.write({"iteration": i, "epoch": 1, "loss": float(i), "note": "no number"})
    log.close()
    log = MetricsLog(tmp_path, 1, tensorboard=True)
    log.write({"iteration": 2, "loss": 20.0})
    log.write({"iteration": 2, "knn_top1": 50.5})
    log.close()
    assert scalars(tmp_path) == {
        "epoch": [(1, 1.0)],
        "loss": [(1, 1.0), (2, 20.0)],
        "knn_top1": [(2, 50.5)],
    }


def test_tensorboard_that_fails_or_is_not_there_does_not_end_a_run(tmp_path, monkeypatch):
    told = []
    (tmp_path / "tensorboard").write_text("in the way")
    log = MetricsLog(tmp_path, 0, notice=told.append, tensorboard=True)
    log.write({"iteration": 1, "loss": 1.0})
    log.close()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    MetricsLog(tmp_path, 1, notice=told.append, tensorboard=True).close()
    assert rows(tmp_path) == [{"iteration": 1, "loss": 1.0}]
    assert told[0].startswith("TensorBoard failed (")
    assert "pip install 'xdino[tensorboard]'" in told[1]
    assert all(sentence.endswith("the run goes on without its page") for sentence in told)


def test_pages_are_imported_only_where_they_are_asked_for(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom xdino.metrics import MetricsLog\n"
        f"log = MetricsLog(Path({str(tmp_path)!r}), 0)\nlog.write({{'iteration': 1}})\n"
        "assert not {'wandb', 'tensorboard', 'torch.utils.tensorboard'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
