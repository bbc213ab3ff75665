"""Label-free measures on matrices whose rank is known, and on networks and images end to end."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from xdino import checkpoint, config
from xdino.backbones import BackboneSpec
from xdino.config import Crops
from xdino.errors import RunFailed
from xdino_eval import quality, results
from xdino_eval.extraction import Options
from xdino_eval.quality import agreement, feature_std, lidar, rankme
from xdino_eval.quality.alarms import alarms
from xdino_eval.quality.evaluation import view_features


def orthonormal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """float64 [rows, columns] with columns at right angles and of length 1."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(matrix).Q


def of_spectrum(spectrum: list[float], N: int = 60, D: int = 24) -> torch.Tensor:
    """float64 [N, D] with these singular values."""
    r = len(spectrum)
    return (orthonormal(N, r) * torch.tensor(spectrum).double()) @ orthonormal(D, r, 1).T


def classes(
    directions: int, noise: torch.Tensor, N: int = 400, q: int = 20, D: int = 12, signal: float = 3
) -> torch.Tensor:
    """float64 [N, q, D]: images differ in the first directions, views by `noise`, float [D]."""
    generator = torch.Generator().manual_seed(0)
    means = torch.zeros(N, 1, D, dtype=torch.float64)
    means[:, 0, :directions] = signal * orthonormal(N, directions) * math.sqrt(N)
    return means + noise * torch.randn(N, q, D, generator=generator, dtype=torch.float64)


# --- RankMe -----------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [1, 2, 7, 24])
def test_equal_singular_values_give_their_number(r):
    assert rankme(of_spectrum([3.0] * r)) == pytest.approx(r, rel=1e-4)


def test_the_equation_by_hand():
    p = [4 / 7, 2 / 7, 1 / 7]
    expected = math.exp(-sum(x * math.log(x) for x in p))
    assert rankme(of_spectrum([4.0, 2.0, 1.0]), epsilon=1e-300) == pytest.approx(expected)
    with_epsilon = [x + 1e-3 for x in p] + [1e-3] * 21  # 24 singular values, 21 of them zero
    expected = math.exp(-sum(x * math.log(x) for x in with_epsilon))
    assert rankme(of_spectrum([4.0, 2.0, 1.0]), epsilon=1e-3) == pytest.approx(expected)


def test_constant_features_have_rank_one_and_zeros_none():
    constant = torch.full((50, 16), 0.3)
    assert rankme(constant) == pytest.approx(1, abs=1e-4)
    assert feature_std(constant) == pytest.approx(0, abs=1e-12)
    assert rankme(torch.zeros(50, 16)) == 0
    assert lidar(constant[:, None].expand(-1, 4, -1)) == 0


@settings(max_examples=50, deadline=None)
@given(
    N=st.integers(1, 12), D=st.integers(1, 12), seed=st.integers(0, 2**16),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
)  # fmt: skip
def test_rankme_is_bounded_and_blind_to_scale_and_rotation(N, D, seed, scale):
    z = torch.randn(N, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    value = rankme(z)
    assert 1 - 1e-4 <= value <= min(N, D) + 1e-3
    assert rankme(z * scale) == pytest.approx(value, rel=1e-9)
    assert rankme(z @ orthonormal(D, D, seed)) == pytest.approx(value, rel=1e-6)


# --- LiDAR ------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [1, 3, 8])
def test_lidar_counts_the_directions_that_tell_images_apart(r):
    even = torch.full((12,), 0.05)
    assert lidar(classes(r, even)) == pytest.approx(r, rel=0.01)


def test_noise_of_views_counts_for_rankme_and_not_for_lidar():
    noise = torch.full((12,), 0.05)
    noise[4:] = 3.0  # eight loud directions that say nothing about the image
    z = classes(2, noise, q=200)
    assert lidar(z) < 2.1
    assert rankme(z.flatten(0, 1)) > 8


def test_the_equation_of_lidar_by_hand():
    z = classes(3, torch.linspace(0.1, 1.0, 12), N=30, q=5)
    mu = z.mean(1)
    sigma_b = torch.cov(mu.T, correction=0).numpy()
    sigma_w = sum(np.cov(image.T, bias=True) for image in z.numpy()) / len(z) + 0.01 * np.eye(12)
    values, vectors = np.linalg.eigh(sigma_w)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    spectrum = np.linalg.eigvalsh(root @ sigma_b @ root).clip(min=0)
    p = spectrum / spectrum.sum() + 1e-7
    expected = float(np.exp(-(p * np.log(p)).sum()))
    assert lidar(z, delta=0.01) == pytest.approx(expected, rel=1e-9)


def test_lidar_is_blind_to_linear_maps():
    z = classes(4, torch.full((12,), 0.3), N=60)
    skewed = z @ torch.diag(torch.linspace(0.5, 4, 12).double()) @ orthonormal(12, 12)
    assert lidar(skewed, delta=1e-12) == pytest.approx(lidar(z, delta=1e-12), rel=1e-6)


def test_views_that_do_not_vary_need_the_delta():
    means = orthonormal(20, 4) - orthonormal(20, 4).mean(0)
    still = means[:, None].expand(-1, 3, -1)
    assert lidar(still) == pytest.approx(4, rel=0.1)


# --- the standard deviation, alarms -----------------------------------------------------------


def test_evenly_spread_features_have_one_over_root_d():
    z = torch.randn(20_000, 16, generator=torch.Generator().manual_seed(0))
    assert feature_std(z) == pytest.approx(1 / 4, rel=0.01)
    assert feature_std(z * 1000) == pytest.approx(feature_std(z), rel=1e-6)
    assert feature_std(z + 1000) < 0.001


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rankme(torch.zeros(3)), "2 dimensions"),
        (lambda: rankme(torch.zeros(0, 4)), "2 dimensions"),
        (lambda: rankme(torch.full((3, 3), math.nan)), "finite"),
        (lambda: lidar(torch.zeros(3, 4)), "3 dimensions"),
        (lambda: lidar(torch.zeros(1, 4, 2)), "2 images"),
        (lambda: lidar(torch.zeros(4, 1, 2)), "2 views"),
        (lambda: feature_std(torch.full((2, 2), math.inf)), "finite"),
    ],
)
def test_bad_features_are_refused_in_a_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_alarms_speak_of_what_is_lost_only():
    assert alarms(40.0, 20.0, 0.12, images=1000, lidar_images=500, dim=64) == []
    flat, narrow, blind = alarms(1.0, 1.2, 0.001, images=1000, lidar_images=500, dim=64)
    assert "every image has nearly the same feature" in flat
    assert "RankMe is 1 of 64 possible" in narrow
    assert "LiDAR is 1.2 of 64 possible" in blind
    (few,) = alarms(40.0, 20.0, 0.12, images=1000, lidar_images=50, dim=64)
    assert "too few images" in few
    assert "LiDAR" in few
    assert "RankMe" not in few


# --- agreement --------------------------------------------------------------------------------


def test_agreement_by_hand():
    east, north, west, south = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    pairs = torch.stack([torch.stack(p) for p in ((east, 3 * east), (north, north), (west, south))])
    assert agreement(pairs[:2]) == 100, "length does not count"
    # Asked first: west finds south of east, north, south? west.east -1, west.north 0, west.south 0:
    # the earlier. Asked second: south finds east at 0, and so not west.
    assert agreement(pairs) == pytest.approx(100 * 4 / 6)
    assert agreement(torch.ones(5, 2, 3)) == pytest.approx(20), "as good as guessing"
    assert agreement(pairs[:1]) == 100
    with pytest.raises(ValueError, match="2 views"):
        agreement(torch.ones(5, 1, 3))


def test_agreement_of_independent_views_is_chance():
    generator = torch.Generator().manual_seed(0)
    assert agreement(torch.randn(400, 2, 16, generator=generator)) < 2


# --- networks and images ----------------------------------------------------------------------

SMALL = Crops(global_size=24)


def test_views_follow_from_seed_and_index(frozen, make_source, rng_untouched):
    source = make_source(6)
    multi = quality.global_views(SMALL, 5, frozen.mean, frozen.std)
    assert [view.blur for view in multi.views] == [1.0, 0.1, 1.0, 0.1, 1.0]
    whole = view_features(frozen, source, multi, np.arange(6), Options())
    assert whole.shape == (6, 5, 8)
    alone = view_features(frozen, source, multi, np.array([4]), Options(batch_size=1, workers=1))
    torch.testing.assert_close(alone[0], whole[4])
    other = view_features(frozen, source, multi, np.arange(6), Options(), seed=1)
    assert not torch.allclose(other, whole)


def test_it_needs_no_labels_and_leaves_the_network_alone(frozen, make_source, rng_untouched):
    source = make_source(20, bad=(3,), labelled=False)
    frozen.train()
    found = quality.evaluate(frozen, source, Options(), SMALL, lidar_images=10, views=4)
    assert frozen.training
    other = Options(batch_size=7, workers=1)
    again = quality.evaluate(frozen, source, other, SMALL, lidar_images=10, views=4)
    assert found == replace(again, seconds=found.seconds)
    assert found.settings["images"] == found.train_size == 19
    assert found.notes[-1] == "1 images could not be read"
    assert 1 <= found.metrics["rankme"] <= 8
    assert 0 < found.metrics["lidar"] <= 8
    assert 0 <= found.metrics["agreement"] <= 100
    with pytest.raises(RunFailed, match="image 0 of stand-in: truncated"):
        quality.evaluate(frozen, make_source(2, bad=(0, 1)), Options(), SMALL, views=2)


def test_the_command_leaves_rows_beside_the_weights(tmp_path, xdino):
    spec = BackboneSpec("xcit_nano_12_p8", shape={"embed_dim": 32, "depth": 1, "num_heads": 2},
                        input_size=24, resize=28)  # fmt: skip
    weights = tmp_path / checkpoint.BACKBONE_FILE
    checkpoint.save_backbone(weights, spec.build(), spec, role="teacher", iteration=7)
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 255, (32, 40, 3), dtype=np.uint8)).save(images / f"{i}.png")
    command = ("--data", images, "--views", "3", "--device", "cpu")
    for _ in range(2):
        code, out, error = xdino("quality", tmp_path, *command, "--json")
        assert code == 0, error
    (told,) = json.loads(out)
    first, second = quality.rows_of(tmp_path)
    assert second.metrics == told["metrics"] == first.metrics
    assert first.features == "teacher, iteration 7"
    assert first.checkpoint == checkpoint.sha256(weights)
    assert any("too few images" in note for note in first.notes)
    assert first.settings["view_scale"] == [0.4, 1.0], "no run: the published crops"

    debug = config.load("debug", {"crops.global_scale": "[0.5, 1.0]", "crops.global_size": "16"})
    (tmp_path / "config.yaml").write_text(config.to_yaml(debug))
    (tmp_path / "checkpoints").mkdir()
    early = tmp_path / "checkpoints" / "initial.safetensors"
    shutil.copy(weights, early)
    out = tmp_path / "elsewhere.json"
    for path in (tmp_path, weights, early):
        code, told, _ = xdino("quality", path, *command, "--results", out)
        assert code == 0
        assert "rankme" in told
        assert "note: too few images" in told
    for row in results.load(out):
        assert row.settings["view_scale"] == [0.5, 1.0], "those of the run"
        assert row.settings["view_size"] == 16
    assert len(results.load(out)) == 3
    assert len(quality.rows_of(tmp_path)) == 2
