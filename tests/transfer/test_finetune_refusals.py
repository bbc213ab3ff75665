"""What `xdino finetune` refuses in a sentence before anything is written, and what it takes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from xdino import checkpoint
from xdino.backbones import BackboneSpec
from xdino.errors import RunFailed, UsageError
from xdino.plan import feasibility
from xdino_transfer.classification.classifier import Classifier
from xdino_transfer.classification.files import read_classifier, write_classifier
from xdino_transfer.finetuning import plan as planning
from xdino_transfer.finetuning.job import ClassificationJob
from xdino_transfer.finetuning.recipe import FineTuning

TINY = {
    "model.arch": "xcit_nano_12_p4", "model.embed_dim": 16, "model.depth": 2, "model.num_heads": 2,
    "view.size": 16, "train.batch_size": 4, "train.epochs": 2, "runtime.device": "cpu",
    "runtime.workers": 0, "runtime.report": "false", "train.precision": "fp32",
}  # fmt: skip
SPEC = BackboneSpec(
    "xcit_nano_12_p4",
    shape={"embed_dim": 16, "depth": 2, "num_heads": 2},
    input_size=16,
    resize=16,
)


def fill(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = np.full((20, 20, 3), 20 * number + 5, np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


@pytest.fixture
def data(tmp_path) -> Path:
    root = tmp_path / "data"
    for split, count in (("train", 6), ("val", 2)):
        for name in ("cat", "dog"):
            fill(root / split / name, count)
    return root


@pytest.fixture
def finetune(xdino, tmp_path):
    """finetune(data, key=value, ...) -> (exit code, what was said, the run's folder)."""

    def run(data: Path, *more: object, **keys: object) -> tuple[int, str, Path]:
        given = {**TINY, "data.path": data, **{k.replace("__", "."): v for k, v in keys.items()}}
        pairs = [word for key, value in given.items() for word in (f"--{key}", value)]
        code, _, error = xdino(
            "finetune", "finetune_small", "--run", tmp_path / "run", *pairs, *more
        )
        return code, error, tmp_path / "run"

    return run


def refused(found: tuple[int, str, Path], sentence: str, code: int = 2) -> None:
    said, run = found[1], found[2]
    assert found[0] == code, said
    assert sentence in said
    assert not run.exists()


def test_class_folders_that_differ(data, finetune):
    (data / "val" / "cat").rename(data / "val" / "cow")
    refused(finetune(data), "cow")


def test_one_class(data, finetune):
    for split in ("train", "val"):
        shutil.rmtree(data / split / "dog")
    refused(finetune(data), "1 class")


def test_an_empty_class(data, finetune):
    shutil.rmtree(data / "train" / "dog")
    (data / "train" / "dog").mkdir()
    refused(finetune(data), "dog")


@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_that_cannot_be_mixed(batch, data, finetune):
    refused(finetune(data, train__batch_size=batch), f"train.batch_size is {batch}, and mixup")
    assert finetune(data, train__batch_size=3, mixup__probability=0, train__epochs=1)[0] == 0


def test_too_few_images(data, finetune):
    refused(finetune(data, view__repeats=3), "the data holds 12: switch it off (1 repeat)")
    refused(finetune(data, train__batch_size=14), "a batch takes 14 images")


def test_a_teacher_of_other_classes_or_none(data, finetune, tmp_path):
    teacher = tmp_path / "teacher.safetensors"
    write_classifier(teacher, Classifier(SPEC.build(), SPEC, 3), {})
    kind = {"distillation__kind": "hard", "distillation__teacher": teacher}
    refused(finetune(data, **kind), "the teacher has 3 classes and the network 2")
    write_classifier(teacher, Classifier(SPEC.build(), SPEC, ["dog", "cat"]), {})
    refused(finetune(data, **kind), "in another order")
    refused(finetune(data, distillation__kind="soft"), "there is no teacher")
    refused(finetune(data, distillation__teacher=teacher), "soft or hard?")
    name = {"distillation__kind": "soft", "distillation__teacher": "timm:none_such"}
    refused(finetune(data, **name), "timm has no network called")
    write_classifier(teacher, Classifier(SPEC.build(), SPEC, ["cat", "dog"]), {})
    assert finetune(data, **kind)[0] == 0


def test_contradictions_are_told_together(data, finetune):
    found = finetune(
        data, optim__warmup_epochs=9, data__fraction=0.5, data__images_a_class=2, view__mean="0.5"
    )
    refused(found, "longer than the run of 2 epochs")
    for part in ("give one", "view.mean and view.std must be given together"):
        assert part in found[1]


def test_labels_outside_of_the_classes_are_refused_by_the_plan(data):
    from xdino_transfer.datasets.checks import checked

    with pytest.raises(UsageError, match="has 1 labels outside of 0 to 1, the first 2"):
        checked([0, 1, 2], ("a", "b"), "the train split of x")


def test_a_step_without_room_is_refused_and_a_large_one_is_told(data, finetune, monkeypatch):
    monkeypatch.setattr(feasibility, "free_memory", lambda device: 100_000)
    refused(finetune(data), "steps of 4 images of 16 pixels take about")
    monkeypatch.undo()
    config = FineTuning()
    job = ClassificationJob(config)
    from types import SimpleNamespace

    job.plan = SimpleNamespace(  # type: ignore[assignment]
        train=SimpleNamespace(notices=list), step_bytes=5 * 2**30, spec=SPEC
    )
    assert [*job.notices()] == [
        "a step of 128 images of 16 pixels takes about 5.4 GB of memory (estimated)"
    ]


def test_a_timm_teacher_that_cannot_be_downloaded_is_told(data, monkeypatch):
    def offline(*arguments: object, **options: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(planning.timm, "create_model", offline)
    from xdino import config

    keys = {**TINY, "data.path": str(data), "distillation.kind": "hard",
            "distillation.teacher": "timm:resnet18"}  # fmt: skip
    plan = planning.make_plan(
        config.load("finetune_small", {k: str(v) for k, v in keys.items()}, FineTuning)
    )
    with pytest.raises(RunFailed, match="timm cannot get the weights of resnet18"):
        planning.build_teacher(plan)


def test_from_weights_with_another_head(data, finetune, tmp_path):
    """The head is dropped with a notice; what it began with stands in the run, its file may go."""
    start = tmp_path / "start.safetensors"
    write_classifier(start, Classifier(SPEC.build(), SPEC, 5), {})
    digest = checkpoint.sha256(start)
    keys = {"model__arch": "null", "model__embed_dim": "null", "model__depth": "null",
            "model__num_heads": "null", "model__frozen": 4, "data__images_a_class": 4,
            "train__epochs": 1}  # fmt: skip
    code, error, run = finetune(data, "--init", start, **keys)
    assert code == 0, error
    assert "knows 5 classes and the data has 2: a new one is trained" in error
    assert "fine-tuning on 8 images" in error
    (begun,) = json.loads((run / "environment.json").read_text())["starts"]
    assert (begun["init"], begun["init_sha256"]) == (str(start), digest)
    before, after = checkpoint.read_weights(start).tensors, checkpoint.load_backbone(run)
    for name, value in after.state_dict().items():
        assert torch.equal(value, before[name]), name  # frozen
    start.unlink()
    code, error, _ = finetune(data, "--init", start, **keys)
    assert code == 0, error
    assert "left alone" in error


def test_a_head_for_the_same_classes_stays_at_another_size(data, finetune, tmp_path):
    """224 to 384 pixels goes on so: positions are Fourier features of the grid."""
    start = tmp_path / "start.safetensors"
    network = Classifier(SPEC.build(), SPEC, ["cat", "dog"])
    write_classifier(start, network, {})
    code, error, run = finetune(data, "--init", start, view__size=24, train__epochs=1,
                                optim__lr=0, model__embed_dim="null")  # fmt: skip
    assert code == 0, error
    assert "a new one is trained" not in error
    found = read_classifier(run)
    assert found.size == 24
    assert torch.equal(found.classifier.head.weight, network.head.weight)


def test_weights_that_are_not_there_or_of_another_network(data, finetune, tmp_path):
    refused(finetune(data, "--init", tmp_path / "none"), "there is no weights file")
    start = tmp_path / "start.safetensors"
    spec = BackboneSpec("xcit_nano_12_p8", shape=SPEC.shape, input_size=16, resize=16)
    write_classifier(start, Classifier(spec.build(), spec, 2), {})
    refused(finetune(data, "--init", start), "does not fit xcit_nano_12_p4")
