"""Every row of random numbers that the data and the evaluations take, each with a number of its own.

Counter-based (Philox 4x64; Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011): what
an image, an epoch or a class gets follows from the seed and its own place alone, whatever was drawn
before it, in whichever process. Raw numbers are the same in every version of numpy, which its own
shuffling is not.

A row is named by a key of two words and a counter of four. The key is (seed, `Stream`), the counter
(a place in the row, image, epoch, 0), so that two streams share no number. The probe's rows are older
and have the epoch where the others have their stream: they share no number among themselves, except
as `probe_held_out` says, but a few with the streams of the same number (image 0 of epochs 1 to 3 and
16 to 20); what is drawn from them has nothing to do with each other. torch's generator is seeded where
networks are built, and then anew for every micro-batch (`of_step`).
"""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """The second word of a key. A new kind of draw takes the next number."""

    CROPS = 1  # of an image in an epoch: boxes, flips, colours
    ORDER = 2  # of an epoch's images
    FEW_SHOT = 3  # which images of a class vote, in a repeat ("epoch")
    SCATTERING = 4  # of a garment's place and texture
    RANDAUGMENT = 16  # of a classifier's training images, as the next four
    ERASING = 17
    MIXING = 18  # of a batch
    CROPPING = 19
    SUBSETS = 20  # which images of a class are learned from
    SEGMENTING = 24  # of a picture with a mask: its scale, crop, flip and colours
    DETECTING = 25  # of a picture with objects: its flip, sizes and crop
    REGIONS = 26  # of such a picture in a step: which anchors and regions are learned from
    STEPS = 32  # of a micro-batch: torch's generator, from which paths are dropped


def raw(stream: Stream, seed: int, epoch: int, count: int) -> np.ndarray:
    """The first `count` numbers of an epoch: uint64 [count]."""
    counter = np.array([0, 0, epoch, 0], np.uint64)
    return np.random.Philox(key=_key(stream, seed), counter=counter).random_raw(count)


def raw_of_images(
    stream: Stream, seed: int, epoch: int, indices: np.ndarray, count: int
) -> np.ndarray:
    """The first `count` numbers of each of the images `indices` [B] in an epoch: uint64 [B, count]."""
    columns = np.broadcast_arrays(indices, epoch, 0)
    return raw_of_places(stream, seed, np.stack(columns, axis=-1).astype(np.uint64), count)


def raw_of_places(stream: Stream, seed: int, places: np.ndarray, count: int) -> np.ndarray:
    """The first `count` numbers at each of the places uint64 [B, 3]: uint64 [B, count]."""
    generator = np.random.Philox(key=_key(stream, seed))
    state = generator.state
    numbers = np.empty((len(places), count), np.uint64)
    for row, place in enumerate(places):  # setting the counter costs a tenth of a new generator
        state["state"]["counter"][0] = 0  # counts within the place
        state["state"]["counter"][1:] = place
        generator.state = state
        numbers[row] = generator.random_raw(count)
    return numbers


def of_step(seed: int, number: int, part: int = 0) -> int:
    """What torch's generator is seeded with for micro-batch `part` of step `number`."""
    return int(raw_of_places(Stream.STEPS, seed, np.array([[part, number, 0]], np.uint64), 1)[0, 0])


def _key(stream: Stream, seed: int) -> np.ndarray:
    return np.array([seed, stream], np.uint64)


# The linear probe


def probe_image(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Crop and flip of one image in one epoch."""
    return _probe(seed, epoch, (0, index))


def probe_order(seed: int, epoch: int) -> np.random.Generator:
    """The order of an epoch's images."""
    return _probe(seed, epoch, (1, 0))


def probe_held_out(seed: int) -> np.random.Generator:
    """Which images choose between probes. The numbers of epoch 0's order, for another row."""
    return probe_order(seed, 0)


def _probe(seed: int, epoch: int, place: tuple[int, int]) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, *place]))


# Subsets that are the same whatever the seed


def subset() -> np.random.Generator:
    """Which images are scored while training: always the same ones, so there is no seed."""
    return np.random.Generator(np.random.Philox(0))


def sample(key: bytes, most: int, n: int) -> np.ndarray:
    """At most `most` of the numbers 0 to n - 1, ascending: those that `key` (a digest) stands for."""
    if n <= most:
        return np.arange(n)
    draws = np.random.Philox(key=int.from_bytes(key[:16], "little"))
    return np.unique(draws.random_raw(most) % np.uint64(n))
