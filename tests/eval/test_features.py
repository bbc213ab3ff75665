"""Extraction, its cache, and the evaluator that a trainer calls."""

import numpy as np
import pytest
import torch
from torch import nn

from xdino.backbone import Origin
from xdino.config import Crops
from xdino.errors import RunFailed, UsageError
from xdino_eval import features as room
from xdino_eval.during_training import callback
from xdino_eval.evaluators import KNN, Quality
from xdino_eval.extraction import Options, fixed_subset
from xdino_eval.feature_cache import cache_key, cached
from xdino_eval.features import extract, pixels
from xdino_eval.transform import EvalTransform


@pytest.mark.usefixtures("rng_untouched")
def test_extract_is_the_network_on_each_image(frozen, make_source):
    source = make_source(23)
    transform = EvalTransform.of(frozen)
    frozen.train()
    frozen.stem.eval()  # a submodule frozen on its own stays so
    told = []
    found = extract(
        frozen, source, transform, batch_size=5, progress=lambda done, all: told.append((done, all))
    )
    assert frozen.training
    assert frozen.drop.training
    assert not frozen.stem.training
    assert told[-1] == (23, 23)
    frozen.eval()
    for index in range(len(source)):
        image = torch.from_numpy(transform.array(source.read(index)).copy())
        with torch.no_grad():
            alone = frozen(transform.normalise(image[None]))[0]
        torch.testing.assert_close(found.features[index], alone, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.labels, torch.from_numpy(source.labels))
    assert found.transform.endswith("fp32")


def test_batch_size_and_threads_do_not_matter(frozen, make_source):
    source, transform = make_source(17), EvalTransform.of(frozen)
    one = extract(frozen, source, transform, batch_size=1, workers=1)
    for batch_size, workers in ((4, 2), (17, 3), (100, 5)):
        other = extract(frozen, source, transform, batch_size=batch_size, workers=workers)
        torch.testing.assert_close(one.features, other.features, rtol=1e-5, atol=1e-5)
        assert torch.equal(one.indices, other.indices)


def test_unreadable_images_are_skipped_and_named(frozen, make_source):
    source, transform = make_source(12, bad=(0, 3, 4, 5)), EvalTransform.of(frozen)
    found = extract(frozen, source, transform, batch_size=3)  # one batch is nearly, one half bad
    assert found.indices.tolist() == [1, 2, 6, 7, 8, 9, 10, 11]
    assert found.labels.tolist() == source.labels[found.indices].tolist()
    assert found.skipped[0] == ("image 0 of stand-in", "truncated")
    assert len(found.skipped) == 4
    whole = extract(frozen, make_source(12), transform)
    torch.testing.assert_close(found.features, whole.features[found.indices])
    with pytest.raises(RunFailed, match=r"no image of stand-in.*image 0 of stand-in: truncated"):
        extract(frozen, make_source(3, bad=range(3)), transform)


def test_a_subset_and_no_labels(frozen, make_source):
    found = extract(
        frozen, make_source(9, labelled=False), EvalTransform.of(frozen), indices=[7, 2]
    )
    assert found.indices.tolist() == [7, 2]
    assert found.labels is None


def test_features_that_are_not_finite_name_the_first_image(frozen, make_source):
    class Breaks(nn.Module):
        def forward(self, images):
            out = images.flatten(1).clone()
            out[images.mean((1, 2, 3)) > 0] = torch.nan
            return out

    source = make_source(4)
    dark, bright = np.zeros((24, 24, 3), np.uint8), np.full((24, 24, 3), 255, np.uint8)
    source.images = [dark, bright, dark, bright]
    with pytest.raises(RunFailed, match=r"2 of 4 features of stand-in .* image 1 of"):
        extract(Breaks(), source, EvalTransform.of(frozen))


def test_precision(frozen, make_source):
    source, transform = make_source(4), EvalTransform.of(frozen)
    full, half = (extract(frozen, source, transform, precision=p) for p in ("fp32", "bf16"))
    assert half.features.dtype == torch.float32
    torch.testing.assert_close(full.features, half.features, rtol=0.05, atol=0.05)
    assert not torch.equal(full.features, half.features)
    with pytest.raises(UsageError, match='no precision "fp23"; did you mean "fp32"'):
        extract(frozen, source, transform, precision="fp23")


def test_pixels_are_the_image(make_source):
    source = make_source(3)
    source.images = [image[:26, :26] for image in source.images]
    found = pixels(source, 26)
    flat = source.images[1].transpose(2, 0, 1).reshape(-1)
    np.testing.assert_allclose(found.features[1].numpy(), flat / np.float32(255), rtol=1e-6)


def test_cache(frozen, make_source, tmp_path):
    source, transform = make_source(6, bad=(2,)), EvalTransform.of(frozen)
    key = cache_key(frozen, source, transform, "fp32")
    calls = []

    def compute():
        calls.append(1)
        return extract(frozen, source, transform)

    first = cached(tmp_path, key, compute)
    second = cached(tmp_path, key, compute)
    assert len(calls) == 1
    assert torch.equal(first.features, second.features)
    assert torch.equal(first.labels, second.labels)
    assert (first.skipped, first.transform) == (second.skipped, second.transform)
    (file,) = tmp_path.iterdir()

    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1  # one bit of a number
    for damaged in (b"", whole[:100], whole[:-9], bytes(flipped)):
        file.write_bytes(damaged)
        with pytest.warns(UserWarning, match="damaged"):
            again = cached(tmp_path, key, compute)
        assert torch.equal(again.features, first.features)
        assert torch.equal(cached(tmp_path, key, compute).features, first.features)
    assert len(calls) == 5
    assert list(tmp_path.iterdir()) == [file]


def test_cache_key_changes_with_everything(frozen, make_source):
    transform = EvalTransform.of(frozen)
    given = {"source": make_source(4), "transform": transform, "precision": "fp32",
             "tokens": ("class",), "part": ""}  # fmt: skip
    others = {"source": make_source(4, labelled=False), "transform": EvalTransform.of(frozen, 32),
              "precision": "bf16", "tokens": ("both",), "part": "0 to 3"}  # fmt: skip
    keys = {cache_key(frozen, **given)}
    keys |= {cache_key(frozen, **{**given, name: other}) for name, other in others.items()}
    limited = make_source(4)
    limited.max_pixels = 100
    keys.add(cache_key(frozen, **{**given, "source": limited}))
    for origin in (Origin(sha256="a"), Origin(facts={"role": "student"})):
        frozen.origin = origin
        keys.add(cache_key(frozen, **given))
    assert len(keys) == 9


@pytest.mark.usefixtures("rng_untouched")
def test_the_trainers_evaluator(frozen, make_source):
    chosen = {"knn": KNN((5, 20)), "quality": Quality(Crops(global_size=24), 10, 2)}
    evaluate = callback(chosen, make_source(60), make_source(40, seed=1), Options(limit=30))
    frozen.train()
    statistics = frozen.stem[1].running_mean.clone()
    first = evaluate(frozen)
    assert set(first) == {
        "knn_top1", "knn_top5", "knn_top1_k20", "knn_top5_k20",
        "quality_rankme", "quality_lidar", "quality_feature_std", "quality_agreement",
        "chance_agreement", "chance_top1", "val_images",
    }  # fmt: skip
    assert first == evaluate(frozen)
    assert frozen.training
    assert torch.equal(statistics, frozen.stem[1].running_mean)
    bare, other = make_source(4, labelled=False), make_source(4)
    with pytest.raises(UsageError, match="stand-in has none"):
        callback(chosen, make_source(4), bare, Options())
    callback({"quality": Quality()}, bare, bare, Options())
    other.classes = ("b", "a")
    with pytest.raises(UsageError, match="number their classes differently"):
        callback(chosen, make_source(4), other, Options())


def test_fixed_subset():
    assert fixed_subset(5, None).tolist() == fixed_subset(5, 9).tolist() == [0, 1, 2, 3, 4]
    chosen = fixed_subset(1000, 50)
    assert len(set(chosen)) == 50
    assert np.array_equal(chosen, fixed_subset(1000, 50))
    assert (np.diff(chosen) > 0).all()


def test_reading_ahead_is_bounded(make_source):
    source = make_source(200)
    read = []
    batches = room.read_batches(source, lambda image, i: read.append(i) or image[:26, :26],
                                np.arange(200), 10, 2, torch.device("cpu"))  # fmt: skip
    next(batches)
    batches.close()
    assert len(read) <= 30


def test_the_next_batch_is_computed_before_one_is_handed_out():
    images, none = torch.ones(2, 1, 1, 1, dtype=torch.uint8), torch.empty(0)
    read = [
        room.Batch(images, np.array([0, 1]), []),
        room.Batch(none, np.array([], dtype=np.int64), [(2, "torn")]),
        room.Batch(3 * images, np.array([3, 4]), []),
    ]
    told = []

    def compute(batch):
        told.append(("computed", int(batch.indices[0])))
        return batch.images.flatten(1).to(torch.float64)

    for batch, out in room.in_turn(iter(read), compute):
        told.append(("handed out", len(batch.indices)))
        assert out.dtype == torch.float32
        assert len(out) == len(batch.indices)
    assert told == [
        ("computed", 0), ("handed out", 2), ("computed", 3), ("handed out", 0), ("handed out", 2),
    ]  # fmt: skip
    assert list(room.in_turn([], compute)) == []
