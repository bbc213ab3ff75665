"""How good features are, measured without a label: how many directions they use, and for what.

Four numbers, each from its paper. RankMe counts the directions that features use. LiDAR counts
those that tell images from their own augmented views, so noise that a view adds does not count.
Agreement is how often a view's nearest neighbour is the other view of its own image. The standard
deviation of features on the unit sphere is zero where a network says the same of every image. None
of them is an accuracy: compare them between checkpoints of one kind, measured alike.

Letters: N images, q views of each, D width of a feature.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from xdino_eval.accuracy import ranks

EPSILON = 1e-7  # RankMe's, for features in float32
DELTA = 1e-4  # keeps the within-image covariance invertible


def rankme(features: Tensor, epsilon: float = EPSILON) -> float:
    """The effective rank of features.

    RankMe (Garrido et al. 2023, https://arxiv.org/abs/2210.02885, equation 1), with sigma_k the
    singular values of the matrix of features Z, not centred:

        RankMe(Z) = exp(-sum_k p_k log p_k),    p_k = sigma_k(Z) / ||sigma(Z)||_1 + epsilon

    r equal singular values give r, features that are all the same give 1, and none exceeds
    min(N, D). The paper takes 25,600 images; fewer than D cannot show D directions.

    Args:
        features: float [N, D], as the network gave them.

    Returns:
        From 1 to min(N, D), but for `epsilon`; 0 where every feature is zero.
    """
    return _effective_rank(torch.linalg.svdvals(_matrix(features, 2).double()), epsilon)


def lidar(features: Tensor, delta: float = DELTA, epsilon: float = EPSILON) -> float:
    """The effective rank of what tells images from their own views.

    LiDAR (Thilak et al. 2023, https://arxiv.org/abs/2312.04000, section 4): every image is a class,
    its augmented views are the members, mu_i is the mean of image i and mu that of all. With

        Sigma_b = E_i (mu_i - mu)(mu_i - mu)^T
        Sigma_w = E_i E_j (z_ij - mu_i)(z_ij - mu_i)^T + delta I
        lambda  = eigenvalues of Sigma_w^(-1/2) Sigma_b Sigma_w^(-1/2)

        LiDAR = exp(-sum_k p_k log p_k),    p_k = lambda_k / ||lambda||_1 + epsilon

    The paper takes 1,000 images with 50 views; N images show at most N - 1 directions. With
    Sigma_w = L L^T the eigenvalues are those of L^-1 Sigma_b L^-T, which is what is computed.

    Args:
        features: float [N, q, D], q views of each image.
        delta: in the features' own units squared, so it matters where features are tiny.

    Returns:
        From 1 to min(N - 1, D), but for `epsilon`; 0 where all images have the same mean.
    """
    z = _matrix(features, 3).double()
    N, q, D = z.shape
    if N < 2 or q < 2:
        raise ValueError(f"LiDAR needs 2 images with 2 views of each, got {N} with {q}")
    means = z.mean(1)  # [N, D]
    between = means - means.mean(0)
    within = (z - means[:, None]).flatten(0, 1)  # [N * q, D]
    # Means of equal views differ by rounding; without views to divide by, that would look like rank.
    if between.abs().max() <= 1e-12 * z.abs().max():
        return 0.0
    sigma_b = between.T @ between / N
    sigma_w = within.T @ within / (N * q) + delta * torch.eye(D, dtype=z.dtype, device=z.device)
    L = torch.linalg.cholesky(sigma_w)
    half = torch.linalg.solve_triangular(L, sigma_b, upper=False)  # L^-1 Sigma_b
    whitened = torch.linalg.solve_triangular(L, half.T, upper=False)
    eigenvalues = torch.linalg.eigvalsh((whitened + whitened.T) / 2).clamp_min(0)
    return _effective_rank(eigenvalues, epsilon)


def feature_std(features: Tensor) -> float:
    """The standard deviation of features on the unit sphere, the mean over dimensions.

    SimSiam's measure of collapse (Chen & He 2021, https://arxiv.org/abs/2011.10566, section 4.1):

        std = mean_d std_i (z_i / ||z_i||_2)_d

    Features spread evenly over the sphere give 1 / sqrt(D); the same feature for every image, 0.

    Args:
        features: float [N, D].
    """
    unit = F.normalize(_matrix(features, 2).double(), dim=1)
    return unit.std(0, correction=0).mean().item()


def agreement(features: Tensor) -> float:
    """Per cent of views whose nearest neighbour is the other view of their own image.

    Instance discrimination (Wu et al. 2018, https://arxiv.org/abs/1805.01978, section 3.1: every
    image is a class of its own), answered by one neighbour. The first views of all images are asked
    among the second ones, and these among the first; cosine similarity, among equals the earlier
    image. Guessing gives 100 / N, and so does a network that says the same of every image.

    Args:
        features: float [N, q, D], of which two views are compared.
    """
    z = F.normalize(_matrix(features, 3).double(), dim=2)
    N, q, _ = z.shape
    if q < 2:
        raise ValueError(f"agreement needs 2 views of each image, got {q}")
    similarity = z[:, 0] @ z[:, 1].T  # [N, N]
    own = torch.arange(N, device=z.device)
    hits = [(ranks(asked, own) == 0).double().mean().item() for asked in (similarity, similarity.T)]
    return 50.0 * sum(hits)


def _effective_rank(spectrum: Tensor, epsilon: float) -> float:
    """exp of the entropy of a spectrum, float [K], none negative."""
    total = spectrum.sum()
    if total == 0:
        return 0.0
    p = spectrum / total + epsilon
    return (-(p * p.log()).sum()).exp().item()


def _matrix(features: Tensor, dimensions: int) -> Tensor:
    if features.ndim != dimensions or not features.numel():
        raise ValueError(f"features need {dimensions} dimensions, got {list(features.shape)}")
    if not features.isfinite().all():
        raise ValueError("features must be finite")
    return features
