"""results.json: one schema, nothing lost, nothing overwritten by mistake."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from xdino.errors import RunFailed
from xdino_eval import results
from xdino_eval.results import Row, append, load, signed

ROW = Row(
    protocol="k-NN",
    settings={"k": 20, "temperature": 0.07},
    top1=71.25,
    top5=93.0,
    data="fashion_mnist",
    transform="shorter side 28, centre crop 28, fp32",
    train_size=10000,
    val_size=2000,
    checkpoint="0123abcd",
    features="teacher, iteration 1234",
    seconds=0.5,
    notes=["1 images of fashion_mnist could not be read"],
)


def test_append_and_load(tmp_path):
    path = tmp_path / "new" / "results.json"
    assert load(path) == []
    append(path, [ROW])
    append(path, [replace(ROW, top1=72.0), replace(ROW, top1=73.0)])
    assert [row.top1 for row in load(path)] == [71.25, 72.0, 73.0]
    assert load(path)[0] == ROW
    entries = json.loads(path.read_text())
    assert entries[0]["settings"] == {"k": 20, "temperature": 0.07}
    assert list(path.parent.iterdir()) == [path], "nothing is left beside it"


def changed(**fields):
    return json.dumps([asdict(ROW) | fields])


@pytest.mark.parametrize(
    "content",
    ["", "[{", "{}", '[{"protocol": "k-NN"}]', "[3]", b"\xff\xfe", "[" * 100_000, "[null]", '["x"]',
     changed(top1="71"), changed(top1=True), changed(settings=[]), changed(notes=[3]),
     changed(train_size=1.5), changed(metrics={"mAP": "x"}), changed(seconds=None), changed(more=1),
     changed(top1=float("nan")), changed(top1=10**400), changed(metrics={"mAP": 10**400})],
)  # fmt: skip
def test_a_damaged_file_is_left_alone(tmp_path, content):
    path = tmp_path / "results.json"
    content = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(content)
    with pytest.raises(RunFailed, match=r"results\.json does not hold result rows"):
        append(path, [ROW])
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path):
    (tmp_path / "results.json").mkdir()
    with pytest.raises(RunFailed, match=r"cannot read .*results\.json: Is a directory"):
        load(tmp_path / "results.json")


APPENDING = """
import sys, json, dataclasses
from xdino_eval.results import Row, append
row = Row(**json.loads(sys.argv[2]))
print("ready", flush=True)
sys.stdin.readline()
for number in range(10):
    append(sys.argv[1], [dataclasses.replace(row, train_size=10 * int(sys.argv[3]) + number)])
"""


def test_processes_that_append_at_once_lose_no_row(tmp_path):
    path = tmp_path / "results.json"
    (tmp_path / ".results.json.lock").touch()  # as one that was killed leaves it
    told = json.dumps(asdict(ROW))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", APPENDING, str(path), told, str(number)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for number in range(4)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.communicate("\n", timeout=60)
        assert process.returncode == 0
    assert sorted(row.train_size for row in load(path)) == list(range(40))
    assert list(tmp_path.iterdir()) == [path]


def test_one_waits_for_another_and_not_for_ever(tmp_path):
    path = tmp_path / "results.json"
    with results.locked(path):
        with (
            pytest.raises(RunFailed, match=r"cannot write .*: another process holds .*\.lock"),
            results.locked(path, patience=0.2),
        ):
            pass
        assert not path.exists()
    append(path, [ROW])


def test_names_that_are_no_unicode(tmp_path):
    path = tmp_path / "results.json"
    append(path, [replace(ROW, data="caf\udce9")])
    append(path, [ROW])
    assert [row.data for row in load(path)] == ["caf\udce9", "fashion_mnist"]


def test_a_failed_write_keeps_the_old_rows(tmp_path):
    path = tmp_path / "results.json"
    append(path, [ROW])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        append(path, [replace(ROW, top1=float("nan"))])
    with pytest.raises(ValueError, match="sign it"):
        append(path, [replace(ROW, checkpoint="")])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_rows_without_classes_and_rows_from_before_metrics(tmp_path):
    path = tmp_path / "results.json"
    append(path, [ROW])
    entries = json.loads(path.read_text())
    del entries[0]["metrics"]
    path.write_text(json.dumps(entries))
    assert load(path) == [ROW]
    other = replace(ROW, top1=None, top5=None, metrics={"jaccard best head": 41.5})
    append(path, [other])
    assert load(path) == [ROW, other]


def test_signed():
    (row,) = signed([replace(ROW, checkpoint="", features="")], "none", "raw pixels")
    assert (row.checkpoint, row.features) == ("none", "raw pixels")
