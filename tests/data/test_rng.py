"""Random numbers: each kind of draw has its own row of them, and the rows never change."""

from pathlib import Path

import numpy as np

from xdino.augment import draw_batch, multi_crop
from xdino.data import epoch_order
from xdino.runtime import rng

ROOT = Path(__file__).parents[2]
LABELS = np.repeat(np.arange(3), 10)


def test_every_stream_gives_what_it_has_always_given():
    """Written down before they stood in one place: a run that goes on draws what it would have."""
    first = {
        rng.Stream.CROPS: [13842265018121420432, 11257523566242097324],
        rng.Stream.ORDER: [2406238767389017420, 6231312613656076686],
        rng.Stream.FEW_SHOT: [14202272653433690070, 11169665451076001206],
        rng.Stream.SCATTERING: [17718989256944951487, 12640904893691752795],
        rng.Stream.RANDAUGMENT: [16413745700467840621, 3918412631335091936],
        rng.Stream.ERASING: [3593769638329494522, 12564388200684783836],
        rng.Stream.MIXING: [17130347558422680106, 3890590815531505008],
        rng.Stream.CROPPING: [12556660312917698515, 8469149315118166682],
        rng.Stream.SUBSETS: [13258688754225584980, 4646783191420176013],
        rng.Stream.SEGMENTING: [17215974538332258373, 7165995321700846496],
        rng.Stream.DETECTING: [3415366512949239510, 7707426976658838364],
        rng.Stream.REGIONS: [4944207848047074178, 1777188504694572365],
        rng.Stream.STEPS: [7842761800205998815, 68252868045439758],
    }
    assert rng.raw_of_images(rng.Stream.CROPS, 3, 5, np.array([4, 9]), 2)[1].tolist() == first[1]
    for stream in set(rng.Stream) - {rng.Stream.CROPS}:
        assert rng.raw(stream, 3, 5, 2).tolist() == first[stream]
    assert set(first) == set(rng.Stream)
    assert rng.probe_image(4, 2, 9).random(2).tolist() == [0.861258484163283, 0.09187847492831491]
    assert rng.probe_order(4, 2).permutation(8).tolist() == [2, 1, 4, 7, 5, 3, 0, 6]
    key = bytes.fromhex("d161d71145abeec5ef15abcf0459cec6")
    assert rng.sample(key, 6, 1000).tolist() == [115, 495, 521, 753, 840, 850]
    assert rng.sample(key, 9, 9).tolist() == list(range(9))


def test_what_is_drawn_from_them():
    assert epoch_order(10, 3, 5).tolist() == [0, 5, 7, 1, 9, 8, 4, 2, 3, 6]
    table = draw_batch(multi_crop(), 2**64 - 1, 7, np.array([0, 1281166]))
    assert table["position"][0, 0].tolist() == [0.622845612718167, 0.25580199532708137]
    assert table["area"][3, 1, :2].tolist() == [0.287240465239093, 0.1991485399840171]


def test_what_is_drawn_for_evaluations():
    from xdino_eval.extraction import fixed_subset
    from xdino_eval.knn.protocols import sample_shots
    from xdino_eval.linear.sgd import held_out

    assert sample_shots(LABELS, 2, 5, 1).tolist() == [2, 4, 15, 16, 21, 29]
    assert fixed_subset(1000, 6).tolist() == [14, 134, 257, 386, 471, 934]
    assert np.flatnonzero(held_out(LABELS, 0.2, 6)).tolist() == [0, 6, 15, 17, 21, 29]


def test_there_is_no_stream_beside_these():
    sources = [path for top in ("ssl", "eval", "launch") for path in (ROOT / top).rglob("*.py")]
    drawing = [path.name for path in sources if "Philox(" in path.read_text()]
    assert drawing == ["rng.py"]


def test_no_two_streams_share_a_number():
    """One key each, so that no counter, however far it runs, meets another's."""
    assert len(set(rng.Stream)) == len(rng.Stream.__members__) == 13
    rows = [rng.raw(stream, 7, 2, 1000) for stream in rng.Stream]
    rows += list(rng.raw_of_images(rng.Stream.CROPS, 7, 3, np.arange(5), 200))
    assert len(np.unique(np.concatenate(rows))) == sum(map(len, rows))


def test_the_probes_rows_are_apart():
    drawn = [rng.probe_image(7, epoch, index) for epoch in range(3) for index in range(3)]
    drawn += [rng.probe_order(7, epoch) for epoch in range(3)]
    first = [generator.random() for generator in drawn]
    assert len(set(first)) == len(first)
    assert rng.probe_held_out(7).random() == rng.probe_order(7, 0).random()  # by name, see there
