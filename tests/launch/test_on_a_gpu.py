"""On a GPU: what a person types, one command after the other."""

import json
import shutil

import pytest
import torch
from annotated_pictures import annotated

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = ("--runtime.device", "cuda", "--runtime.kernels", "plain")
NETWORK = (
    "--model.arch", "xcit_nano_12_p8", "--model.embed_dim", "32", "--model.depth", "4",
    "--model.num_heads", "2",
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """maps/, boxes/ and classes/ of noise."""
    root = tmp_path_factory.mktemp("gpu")
    annotated(root)
    for path in sorted((root / "classes" / "train").rglob("*.png")):
        for i in range(9):  # enough to hold some out
            shutil.copy(path, path.with_stem(f"{path.stem}-{i}"))
    return root


@pytest.fixture
def succeeds(xdino, world, monkeypatch):
    """succeeds("knn", ...) -> what the command printed."""
    monkeypatch.chdir(world)

    def run(*arguments):
        code, out, err = xdino(*arguments)
        assert code == 0, (arguments, out[-2000:], err[-2000:])
        return out + err

    return run


@pytest.fixture
def run(succeeds, world):
    """A run of `xdino pretrain`, begun once."""
    told = succeeds(
        "pretrain", "imagenet_s12_p16", "--run", "run", "--data.path", "classes", *NETWORK, *CUDA,
        "--crops.global_size", "32", "--crops.local_size", "16", "--train.batch_size", "2",
        "--train.epochs", "4", "--runtime.log_every", "1", "--head.prototypes", "64",
        "--loss.warmup_teacher_temp_epochs", "2",
    )  # fmt: skip
    assert "run without one" not in " ".join(told.split())
    return world / "run"


def test_pretrain_and_judge(succeeds, run):
    begun = json.loads((run / "environment.json").read_text())["starts"][0]
    assert begun["cuda_graphs"] is True
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["loss"] == pytest.approx(last["kl"] + last["teacher_entropy"], abs=1e-4)
    device = ("--device", "cuda")
    succeeds("knn", "run", "--data", "classes", *device)
    succeeds("linear", "run", "--data", "classes", "--epochs", "2", *device)
    succeeds("quality", "run", "--data", "classes", *device)
    succeeds("features", "run", "--data", "classes", "--out", "features.npz", *device)
    succeeds("attention", "run", "classes/val/sky/0.png", "--out", "maps-of-it", *device)
    succeeds("replay", "run", "--iteration", "3", *device)
    succeeds("export", "run", "--format", "hf", "--out", "exported")
    assert "finished" in succeeds("pretrain", "--run", "run")


def test_finetune(succeeds, run):
    succeeds(
        "finetune", "finetune_small", "--run", "tuned", "--init", "run", "--data.path", "classes",
        "--train.epochs", "2", "--train.batch_size", "2", "--runtime.device", "cuda",
    )  # fmt: skip
    succeeds("score", "tuned", "--data", "classes", "--device", "cuda")
    succeeds("predict", "tuned", "classes/val/sky/0.png", "--out", "said.csv", "--device", "cuda")


def test_segment(succeeds, run):
    succeeds(
        "segment", "segment_small", "--run", "masked", "--init", "run", "--data.path", "maps",
        "--train.epochs", "2", "--train.batch_size", "2", "--view.crop", "32",
        "--view.shorter", "32", "--runtime.device", "cuda",
    )  # fmt: skip
    succeeds("score", "masked", "--data", "maps", "--device", "cuda")


def test_detect(succeeds, run):
    pytest.importorskip("pycocotools")
    succeeds(
        "detect", "detect_small", "--run", "boxed", "--init", "run", "--data.path", "boxes",
        "--train.epochs", "2", "--train.batch_size", "1", "--view.sides", "[40]",
        "--view.test_side", "40", "--view.before_crop", "[40]", "--view.crop", "[30, 40]",
        "--runtime.device", "cuda",
    )  # fmt: skip
    succeeds("score", "boxed", "--data", "boxes", "--device", "cuda")
