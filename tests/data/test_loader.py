"""The loader: one order for any workers, ranks and restarts; images that cannot be read."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image

from xdino.augment.multi_crop import boxes, crop, draw_batch, multi_crop
from xdino.data.loader import CropLoader, epoch_order, steps_per_epoch
from xdino.data.sources import ArraySource, open_source
from xdino.errors import RunFailed, UsageError

CROPS = multi_crop(16, local_count=2, local_size=8, local_scale=(0.2, 0.5), mean=(0.5,), std=(0.5,))
COLOUR = multi_crop(16, local_count=1, local_size=8)


@pytest.fixture
def source():
    """50 gray images, 28 x 28; 8 a step make 6 steps an epoch."""
    images = np.random.default_rng(0).integers(0, 256, (50, 28, 28), dtype=np.uint8)
    return ArraySource("gray", images, np.zeros(50, np.int64), ("one",))


@pytest.fixture
def folder(tmp_path):
    """20 colour pictures of mixed sizes, 00.png to 19.png."""
    rng = np.random.default_rng(1)
    for i in range(20):
        pixels = rng.integers(0, 256, (20 + i, 40 - i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i:02}.png")
    return tmp_path


def same(a, b) -> bool:
    return (
        (a.iteration, a.epoch) == (b.iteration, b.epoch)
        and (a.indices == b.indices).all()
        and (a.table == b.table).all()
        and all(torch.equal(x, y) for x, y in zip(a.crops, b.crops, strict=True))
    )


def test_epoch_order_is_a_pure_permutation():
    order = epoch_order(1000, 3, 4)
    assert order.dtype == np.int64
    assert (np.sort(order) == np.arange(1000)).all()
    epoch_order.cache_clear()
    assert (epoch_order(1000, 3, 4) == order).all()
    assert (epoch_order(1000, 3, 5) != order).any()
    assert (epoch_order(1000, 4, 4) != order).any()
    assert epoch_order(6, 0, 0).tolist() == [2, 1, 3, 5, 0, 4]  # what seed 0 means, for good


def test_steps_per_epoch():
    assert steps_per_epoch(100, 30) == 3
    with pytest.raises(UsageError, match=r"takes 128 images .* holds 100; lower the batch size"):
        steps_per_epoch(100, 128)
    assert steps_per_epoch(100, 30, 95) == 3
    assert steps_per_epoch(100, 30, 30) == 1
    assert steps_per_epoch(100, 30, 1000) == 33
    with pytest.raises(UsageError, match=r"images_per_epoch is 29, less than the 30 images"):
        steps_per_epoch(100, 30, 29)


def test_batches_hold_what_augment_makes(source):
    batch = next(CropLoader(source, CROPS, 8, seed=5, workers=0).iterate(7, 8))
    assert (batch.iteration, batch.epoch) == (7, 1)
    assert [tuple(c.shape) for c in batch.crops] == [(2, 8, 16, 16, 1), (2, 8, 8, 8, 1)]
    assert (batch.indices == epoch_order(50, 5, 1)[8:16]).all()
    assert (batch.table == draw_batch(CROPS, 5, 1, batch.indices)).all()
    image = source.read(int(batch.indices[3]))
    expected = crop(image, boxes(batch.table[2, 3], 28, 28), 8)
    assert (batch.crops[1][0, 3].numpy() == expected).all()


@pytest.mark.parametrize("workers", [1, 4])
def test_any_number_of_workers_gives_the_same_pixels(source, folder, workers):
    for data, crops in ((source, CROPS), (open_source(str(folder)), COLOUR)):
        alone = list(CropLoader(data, crops, 8, 0, workers=0).iterate(0, 5))
        shared = list(CropLoader(data, crops, 8, 0, workers=workers, prefetch=2).iterate(0, 5))
        assert len(alone) == len(shared) == 5
        assert all(same(a, b) for a, b in zip(alone, shared, strict=True))


def test_resuming_is_exact_across_an_epoch(source):
    loader = CropLoader(source, CROPS, 4, 0, accumulate=2, workers=2)
    whole = list(loader.iterate(3, 9))
    parts = list(loader.iterate(3, 5)) + list(loader.iterate(5, 9))
    assert [batch.epoch for batch in whole[::2]] == [0, 0, 0, 1, 1, 1]
    assert all(same(a, b) for a, b in zip(whole, parts, strict=True))


def test_an_epoch_shows_every_image_once(source):
    batches = CropLoader(source, CROPS, 8, 0, workers=0).iterate(0, 6)
    seen = np.concatenate([batch.indices for batch in batches])
    assert len(set(seen.tolist())) == 48


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_an_iteration_is_the_same_however_it_is_shared(source, world, accumulate):
    loaders = [
        CropLoader(source, CROPS, 8 // (world * accumulate), 0, accumulate, rank, world, workers=0)
        for rank in range(world)
    ]
    for iteration in (0, 8):
        micro = [list(loader.iterate(iteration, iteration + 1)) for loader in loaders]
        union = [micro[rank][m].indices for m in range(accumulate) for rank in range(world)]
        epoch, step = divmod(iteration, 6)
        expected = epoch_order(50, 0, epoch)[step * 8 : step * 8 + 8]
        assert np.concatenate(union).tolist() == expected.tolist()


# Images that cannot be read


def test_the_next_readable_image_stands_in(folder):
    (folder / "05.png").write_bytes(b"")
    (folder / "06.png").write_text("no picture")
    source = open_source(str(folder))
    loader = CropLoader(source, COLOUR, 20, 0, workers=2, max_bad_share=0.1)
    batch = next(loader.iterate(0, 1))
    for lost in (5, 6):
        slot = batch.indices.tolist().index(lost)
        stand_in = source.read(7)
        box = boxes(batch.table[0, slot], *stand_in.shape[:2])[None][0]
        assert (batch.crops[0][0, slot].numpy() == crop(stand_in, box, 16)).all()
    assert loader.bad == {
        5: (str(folder / "05.png"), "the file is empty"),
        6: (str(folder / "06.png"), "not an image, or of a kind that cannot be read"),
    }
    assert len(loader.take_bad_report()) == 2
    assert loader.take_bad_report() == []
    list(loader.iterate(1, 3))
    assert loader.take_bad_report() == []


def test_a_file_that_is_gone_counts_as_unreadable(folder):
    source = open_source(str(folder))
    (folder / "19.png").unlink()  # the last one: image 0 stands in
    loader = CropLoader(source, COLOUR, 20, 0, workers=0)
    list(loader.iterate(0, 1))
    assert list(loader.bad) == [19]


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_unreadable_images_stop_the_run(folder, workers):
    for i in (3, 4, 5, 6):
        (folder / f"{i:02}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    loader = CropLoader(open_source(str(folder)), COLOUR, 20, 0, workers=workers, max_bad_share=0.1)
    # Two workers may find the third and the fourth before either of them is heard.
    found = "3 of 20 images .*15.00%" if workers == 0 else "[34] of 20 images .*(15|20).00%"
    sentence = (
        found.replace(" .*", r" .* cannot be read \(") + r"; data\.max_bad_share allows 10\.00%\)"
    )
    with pytest.raises(RunFailed, match=sentence) as caught:
        list(loader.iterate(0, 3))
    assert ".png" in str(caught.value)
    assert not workers_alive()


def test_all_unreadable(folder):
    for path in folder.iterdir():
        path.write_bytes(b"")
    loader = CropLoader(open_source(str(folder)), COLOUR, 4, 0, workers=2, max_bad_share=1.0)
    with pytest.raises(RunFailed, match="none of the 20 images"):
        list(loader.iterate(0, 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_defect_keeps_its_type_and_names_the_image(source, workers):
    def broken(index):
        raise ZeroDivisionError("a defect")

    source.read = broken
    loader = CropLoader(source, CROPS, 8, 0, workers=workers)
    with pytest.raises(ZeroDivisionError) as caught:
        list(loader.iterate(0, 2))
    assert any("while reading train image" in note for note in caught.value.__notes__)
    assert not workers_alive()


# Threads


def workers_alive() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("xdino-crops")]


def test_stopping_early_leaves_no_thread(source):
    loader = CropLoader(source, CROPS, 8, 0, workers=3, prefetch=4)
    batches = loader.iterate(0, 10_000)
    next(batches)
    assert workers_alive()
    batches.close()
    assert not workers_alive()


def test_two_iterations_at_once(source):
    loader = CropLoader(source, CROPS, 8, 0, workers=1)
    pairs = zip(loader.iterate(0, 4), loader.iterate(0, 4), strict=True)
    assert all(same(a, b) for a, b in pairs)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_callers_threads_are_left_alone(source, workers):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        inside: list[int] = []
        read = source.read
        source.read = lambda index: (inside.append(torch.get_num_threads()), read(index))[1]
        for _ in CropLoader(source, CROPS, 8, 0, workers=workers).iterate(0, 3):
            assert torch.get_num_threads() == 2
        assert set(inside) == {1}
        fresh: list[int] = []
        thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert fresh == [2]
    finally:
        torch.set_num_threads(before)


def test_waiting_is_counted(source):
    loader = CropLoader(source, CROPS, 8, 0, workers=1)
    list(loader.iterate(0, 3))
    assert loader.wait_seconds > 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"workers": -1}, "workers must be at least 0"),
        ({"prefetch": 0}, "prefetch must be at least 1"),
        ({"batch_size": 64}, r"takes 64 images .* holds 50"),
        ({"max_bad_share": 2}, "max_bad_share must be from 0 to 1"),
        ({"rank": 1}, "rank must be from 0 to 0"),
        ({"crops": COLOUR}, "gray has 1 channels, but mean and std have 3"),
    ],
)
def test_impossible_loaders_are_refused(source, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        CropLoader(source, **{"crops": CROPS, "batch_size": 8, "seed": 0, **options})
