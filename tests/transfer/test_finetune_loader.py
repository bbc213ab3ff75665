"""Batches of fine-tuning: the same for any threads and processes, labels of what is shown."""

import numpy as np
import pytest
import torch

from xdino.data.decode import UnreadableImage
from xdino.data.idx import ArraySource
from xdino.errors import UsageError
from xdino.runtime.batch_layout import BatchLayout
from xdino_transfer.classification.views import TrainingView
from xdino_transfer.finetuning.loader import LabelledLoader

N = 520


class Source(ArraySource):
    """Images whose pixels say their number and whose labels are it; some cannot be read."""

    unreadable: frozenset[int] = frozenset()
    strip: int | None = None  # of another shape

    def read(self, index):
        if index in self.unreadable:
            raise UnreadableImage("torn")
        if index == self.strip:
            return np.zeros((3, 40, 3), np.uint8)
        return super().read(index)


@pytest.fixture
def source():
    pixels = np.zeros((N, 12, 12, 3), np.uint8)
    pixels[..., 0] = (np.arange(N) % 256)[:, None, None]
    pixels[..., 1] = (np.arange(N) // 256)[:, None, None]
    names = tuple(map(str, range(N)))
    return Source("numbers", pixels, np.arange(N), names, 3)


VIEW = TrainingView(12, (0.5,) * 3, (0.5,) * 3, randaugment=None, erasing=None)


def batches(source, **options):
    loader = LabelledLoader(source, VIEW, **{"batch_size": 8, "seed": 3, "workers": 0, **options})
    return [*loader.iterate(0, loader.steps_per_epoch)]


def shown(batch):
    """The numbers of the images that the crops show; their middles are never padding."""
    middle = batch.crops[:, 6, 6].to(torch.int64)
    return middle[:, 0] + 256 * middle[:, 1]


def test_labels_are_of_what_is_shown_also_of_stand_ins(source):
    source.unreadable = frozenset({5, 6, 100})
    found = batches(source)
    for batch in found:
        assert torch.equal(batch.labels, shown(batch))
    asked = np.concatenate([batch.indices for batch in found])
    assert {5, 6, 100} <= set(asked.tolist())
    assert not {5, 6, 100} & {int(n) for batch in found for n in batch.labels}


def test_an_image_without_room_for_a_crop_is_left_out(source):
    source.strip = 7
    loader = LabelledLoader(source, VIEW, 8, 3, workers=0)
    found = list(loader.iterate(0, loader.steps_per_epoch))
    assert 7 not in {int(n) for batch in found for n in batch.labels}
    assert loader.bad[7][1].startswith("an image of 3 x 40 pixels is too small for crops of 12")


def test_threads_change_nothing(source):
    for one, two in zip(batches(source), batches(source, workers=3), strict=True):
        assert torch.equal(one.crops, two.crops)
        assert torch.equal(one.labels, two.labels)


@pytest.mark.parametrize("repeats", [1, 3])
def test_processes_share_a_step_of_one(source, repeats):
    one = batches(source, repeats=repeats, batch_size=16)
    halves = [batches(source, repeats=repeats, rank=r, world_size=2) for r in (0, 1)]
    assert len(one) == len(halves[0]) == (512 if repeats == 3 else N) // 16
    for whole, *parts in zip(one, *halves, strict=True):
        together = torch.cat([part.crops for part in parts]).flatten(1)
        for ours, theirs in ((whole.crops.flatten(1), together),):
            assert sorted(map(tuple, ours.tolist())) == sorted(map(tuple, theirs.tolist()))
        assert [part.part for part in parts] == [0, 1]


@pytest.mark.parametrize("repeats", [1, 3])
def test_a_step_is_mixed_alike_however_it_is_shared_out(source, repeats):
    """Of images 0 to 15 of a part, image i faces 15 - i: with two processes and with one of both
    parts, with four that share them, and with eight."""

    def facing(found):
        pairs = set()
        for batch in found:
            size = batch.part_size
            for part, at in enumerate(range(0, len(batch.indices), size), start=batch.part):
                drawn = [*zip(batch.indices, batch.drawn.crops["position"][:, 0], strict=True)]
                mine = drawn[at : at + size]
                pairs |= {
                    (batch.iteration, part, *a, *b) for a, b in zip(mine, mine[::-1], strict=True)
                }
        return pairs

    first = BatchLayout(16, 2, 2)
    ways = [(16, 2, 2), (32, 2, 1), (8, 2, 4), (4, 2, 8), (16, 4, 1), (64, 1, 1)]
    told = [
        facing(
            batch
            for rank in range(processes)
            for batch in batches(
                source, repeats=repeats, batch_size=size, accumulate=accumulate, rank=rank,
                world_size=processes, first=first,
            )
        )
        for size, accumulate, processes in ways
    ]  # fmt: skip
    assert len(told[0]) == 512 // 64 * 64 if repeats == 3 else len(told[0]) == N // 64 * 64
    assert all(other == told[0] for other in told[1:])


def test_an_image_comes_three_times_in_a_row_cut_differently(source):
    first = batches(source, repeats=3)[0]
    assert first.indices[:3].tolist() == [first.indices[0]] * 3
    drawn = first.drawn.crops["position"]
    assert len({tuple(place) for place in drawn[:3].tolist()}) == 3
    few = ArraySource("few", np.zeros((9, 12, 12, 3), np.uint8), np.arange(9), ("a",) * 9, 3)
    with pytest.raises(UsageError, match="takes images by 256"):
        LabelledLoader(few, VIEW, 8, 0, repeats=3)
