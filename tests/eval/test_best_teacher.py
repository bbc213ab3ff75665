"""The teacher whose k-NN was best: kept, told, judged again where the protocol changed."""

from dataclasses import replace

import pytest
import torch

from xdino import checkpoint
from xdino.backbone import Origin
from xdino.backbones import BackboneSpec
from xdino.checkpoint import load_backbone
from xdino_eval import results
from xdino_eval.knn.best_teacher import BestTeacher, best_of
from xdino_eval.results import Row

ROW = Row("k-NN", {"k": 20, "temperature": 0.07}, 50.0, 90.0, "toy", "as it is", 8, 4)
SPEC = BackboneSpec("xcit_nano_12_p8", shape={"embed_dim": 32, "depth": 1, "num_heads": 2})


@pytest.fixture
def network():
    return SPEC.build()


@pytest.fixture
def shown(network, tmp_path):
    """shown(iteration, top1) -> whether a teacher of that iteration, all 0.01 x iteration, is kept."""

    def show(iteration, top1, judge=None, notice=None, **row):
        with torch.no_grad():
            for p in network.parameters():
                p.fill_(0.01 * iteration)
        network.origin = Origin(facts={"iteration": iteration, "iterations": 40, "data": "toy"})
        best = BestTeacher(tmp_path, 100, notice or pytest.fail)
        rows = [replace(ROW, top1=top1, **row), replace(ROW, top1=1.0, settings={"k": 100})]
        return best.look(network, rows, judge or pytest.fail)

    return show


def kept(run):
    """The iteration that the weights themselves tell."""
    first = next(load_backbone(run / "best.safetensors").parameters())
    return round(first.flatten()[0].item() / 0.01)


def test_a_better_one_takes_the_place_and_an_equal_one_does_not(shown, tmp_path):
    for iteration, top1, better in [(1, 50.0, True), (2, 49.0, False), (3, 60.0, True),
                                    (4, 60.0, False), (5, 59.9, False)]:  # fmt: skip
        assert shown(iteration, top1) is better
    best = best_of(tmp_path)
    assert (best.iteration, best.top1, best.path) == (3, 60.0, tmp_path / "best.safetensors")
    assert kept(tmp_path) == 3
    assert load_backbone(best.path).origin.name == "teacher, iteration 3"


def test_its_rows_are_those_of_the_file_alone(shown, tmp_path):
    others = [replace(ROW, checkpoint="abc", features="teacher, iteration 1")]
    results.append(tmp_path / "results.json", others)
    for iteration, top1 in [(1, 50.0), (2, 55.0), (3, 53.0)]:
        shown(iteration, top1)
    rows = results.load(tmp_path / "results.json")
    assert rows[0] == others[0]
    digest = checkpoint.sha256(tmp_path / "best.safetensors")
    assert [(row.checkpoint, row.features, row.top1) for row in rows[1:]] == [
        (digest, "teacher, iteration 2", 55.0),
        (digest, "teacher, iteration 2", 1.0),
    ]
    assert [row.settings["k"] for row in rows[1:]] == [20, 100]
    assert {row.settings["weights"] for row in rows[1:]} == {"best"}
    assert rows[1].settings["during training, images of a split at most"] == 100


def test_killed_between_weights_and_rows(shown, tmp_path, monkeypatch):
    shown(1, 50.0)
    with monkeypatch.context() as patch:
        patch.setattr(results, "append", lambda *rest, **more: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            shown(2, 55.0)
    assert kept(tmp_path) == 2
    before = (tmp_path / "best.safetensors").read_bytes()
    shown(2, 55.0)  # the evaluation is made again
    rows = results.load(tmp_path / "results.json")
    assert {row.checkpoint for row in rows} == {checkpoint.sha256(tmp_path / "best.safetensors")}
    assert (tmp_path / "best.safetensors").read_bytes() == before
    told = (tmp_path / "results.json").read_bytes()
    shown(2, 55.0)
    assert (tmp_path / "results.json").read_bytes() == told


def test_the_untrained_network_and_rows_without_a_score_are_none(shown, tmp_path):
    assert not shown(0, 99.0)
    assert not shown(1, None)
    assert best_of(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("again", "expected"), [(40.0, 2), (70.0, 1), (60.0, 1)])
def test_another_protocol_judges_the_file_again_first(shown, tmp_path, again, expected):
    shown(1, 50.0)
    asked = []

    def judge(backbone):
        asked.append(backbone.origin.facts["iteration"])
        return [replace(ROW, top1=again, val_size=400)]

    shown(2, 60.0, judge, val_size=400)
    assert asked == [1]
    best = best_of(tmp_path)
    assert (best.iteration, best.top1, kept(tmp_path)) == (expected, max(again, 60.0), expected)
    rows = results.load(tmp_path / "results.json")
    assert {row.features for row in rows} == {f"teacher, iteration {expected}"}
    assert rows[0].val_size == 400
    shown(3, 30.0, val_size=400)  # and not a second time
    assert asked == [1]


def test_a_damaged_file_is_none_and_is_replaced(shown, tmp_path):
    shown(1, 90.0)
    path = tmp_path / "best.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert best_of(tmp_path) is None
    shown(2, 50.0)
    assert best_of(tmp_path).iteration == 2


def test_what_cannot_be_kept_is_said(shown, tmp_path):
    (tmp_path / "results.json").write_text("{")
    said = []
    assert not shown(1, 50.0, notice=said.append)
    assert len(said) == 1
    assert said[0].startswith("the best teacher so far could not be kept: ")
    assert "results.json" in said[0]
    assert (tmp_path / "results.json").read_text() == "{"


def test_whether_it_is_the_last(shown, network, tmp_path):
    shown(3, 50.0)
    assert not best_of(tmp_path).last
    for iteration, last in ((3, True), (4, False)):
        checkpoint.save_backbone(tmp_path / "backbone.safetensors", network, SPEC, role="teacher",
                                 iteration=iteration)  # fmt: skip
        assert best_of(tmp_path).last is last
