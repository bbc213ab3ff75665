"""Logistic regression on features extracted once.

The newer practice beside the SGD probe (DINOv2, https://arxiv.org/abs/2304.07193, appendix B.3):
L2-regularised, by scikit-learn, its strength chosen on images held out of the training split.

Letters: N images, D width, K classes.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from xdino.errors import UsageError, nearest
from xdino_eval.features import Features, Progress
from xdino_eval.linear.probe import Probe, Trained, Trial, check
from xdino_eval.linear.probe_state import Unfinished
from xdino_eval.linear.sgd import THREADS_PAY, held_out, small_products_alone

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

GRIDS = {
    "default": tuple(10.0 ** np.linspace(-4, 2, 7)),
    "dino": tuple(10.0 ** np.linspace(-6, 5, 45)),
}
"""Inverse strengths of the regularisation. "dino" is DINOv2's; the other takes a sixth of it."""

MAX_ITER = 1000  # of L-BFGS
CONSTANT = 1e-12  # of its mean: a dimension that varies by less says the same of every image


def logistic_probe(
    train: Features,
    val: Features,
    cs: str | Sequence[float] = "default",
    holdout: float = 0.1,
    seed: int = 0,
    keep_in: Path | str | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Logistic regression; C from a held-out part of `train`; `val` is scored once, at the end.

    Features are standardised by the mean and standard deviation of `train` (without it L-BFGS
    takes many times the iterations), and the chosen C, the smallest of equals, is fitted again on
    all of `train`.

    Args:
        cs: inverse strengths of the regularisation, or a name in `GRIDS`.
        holdout: the fraction of `train` that chooses among them, taken evenly from every class.
        keep_in: a folder for the scores of the fits that are done; the same call makes the others.
        progress: told (fits done, fits).

    Raises:
        UsageError: a split without labels, splits of different widths, fewer than two classes, too
            few images to hold any out, or a grid or a fraction that makes no sense. RunFailed: a
            feature is not finite.
    """
    grid = _grid(cs)
    if not 0 < holdout < 1:
        raise UsageError(f"holdout must lie between 0 and 1, got {holdout}")
    trial = Trial("linear, logistic regression", check(train, val))
    if len(trial.classes) < 2:
        raise UsageError(f"{train.data} has one class only: there is nothing to tell apart")
    mean, std = train.features.mean(0), train.features.std(0)
    std = torch.where(std > CONSTANT * mean.abs(), std, 1.0)
    x, y = ((train.features - mean) / std).numpy(), trial.train_class
    unfinished = Unfinished.of(
        keep_in, "logistic", train.features, torch.from_numpy(y), grid, holdout, seed, MAX_ITER
    )
    notes: list[str] = []
    chosen, scores = grid[0], list[float]()
    if len(grid) > 1:
        chosen, scores = _choose(x, y, holdout, seed, grid, notes, unfinished, progress)
    (model,) = _fits(x, y, [chosen])
    if model.n_iter_.max() >= MAX_ITER:
        notes.append(f"C = {chosen:g}: not converged after {MAX_ITER} iterations")
    of_grid = {f"C {c:g}": round(score, 4) for c, score in zip(grid, scores, strict=False)}
    settings: dict[str, object] = {
        "C": chosen,
        "cs": list(grid),
        "holdout": holdout,
        "holdout_top1": max(of_grid.values(), default=None),
        "holdout_top1_of_grid": of_grid,
        "features": "standardised by train mean and standard deviation",
        "solver": f"lbfgs, at most {MAX_ITER} iterations",
        "seed": seed,
    }
    probe = folded(model, mean, std, trial.classes)
    return trial.end(probe, settings, train, val, list(dict.fromkeys(notes)), unfinished)


def _choose(
    x: np.ndarray,
    y: np.ndarray,
    holdout: float,
    seed: int,
    grid: Sequence[float],
    notes: list[str],
    unfinished: Unfinished | None,
    progress: Progress | None,
) -> tuple[float, list[float]]:
    """The C that tells the images held out apart best, and the scores of all."""
    held = held_out(y, holdout, seed)
    if not held.any():
        raise UsageError(f"{len(y)} training images are too few to hold out {holdout:g} of them")
    scores = _held_out_scores(x, y, held, grid, notes, unfinished, progress)
    chosen = grid[int(np.argmax(scores))]
    if chosen in (grid[0], grid[-1]):
        notes.append(f"C = {chosen:g} is an end of the grid")
    return chosen, scores


def _grid(cs: str | Sequence[float]) -> tuple[float, ...]:
    if isinstance(cs, str) and cs not in GRIDS:
        raise UsageError(f'no grid "{cs}"; {nearest(cs, GRIDS)}')
    grid = tuple(sorted(float(c) for c in (GRIDS[cs] if isinstance(cs, str) else cs)))
    if not grid or not grid[0] > 0:
        raise UsageError(f"C must be positive, got {list(grid)}")
    return grid


def _held_out_scores(
    x: np.ndarray,
    y: np.ndarray,
    held: np.ndarray,
    grid: Sequence[float],
    notes: list[str],
    unfinished: Unfinished | None,
    progress: Progress | None,
) -> list[float]:
    """Top-1 in per cent of each C on the images `held` out; fits that did not converge are noted."""
    done, kept = unfinished.load() if unfinished else (0, {})
    scores, iterations = ([*kept[n].tolist()] if kept else [] for n in ("scores", "iterations"))
    for model in _fits(x[~held], y[~held], grid[done:]):
        # Every class has an image that is not held out, so the classes of the fit are 0..K-1.
        scores.append(100.0 * float(np.mean(model.predict(x[held]) == y[held])))
        iterations.append(int(model.n_iter_.max()))
        if unfinished:
            tensors = {"scores": torch.tensor(scores, dtype=torch.float64)}
            unfinished.save(len(scores), tensors | {"iterations": torch.tensor(iterations)})
        if progress:
            progress(len(scores), len(grid))
    notes += [
        f"C = {c:g}: not converged after {MAX_ITER} iterations"
        for c, number in zip(grid, iterations, strict=True)
        if number >= MAX_ITER
    ]
    if done:
        notes.append(f"{done} of {len(grid)} fits were made before; seconds are of the others")
    return scores


def _fits(x: np.ndarray, y: np.ndarray, grid: Sequence[float]) -> Iterator["LogisticRegression"]:
    """One model a value of C, in this order, small ones side by side."""
    multiplications = x.size * (int(y.max()) + 1)
    workers = os.cpu_count() if multiplications < THREADS_PAY else 1
    # A second of every start, where nobody fits: scikit-learn brings all of SciPy.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    models = [LogisticRegression(C=c, max_iter=MAX_ITER) for c in grid]
    with (
        warnings.catch_warnings(),
        small_products_alone(multiplications),
        ThreadPoolExecutor(workers) as pool,
    ):
        warnings.simplefilter("ignore", ConvergenceWarning)
        try:
            yield from pool.map(lambda model: model.fit(x, y), models)
        finally:
            pool.shutdown(cancel_futures=True)


def folded(model: "LogisticRegression", mean: Tensor, std: Tensor, classes: np.ndarray) -> Probe:
    """The fit on (x - mean) / std as a probe of x: weight w / std, bias b - sum(w mean / std).

    In double precision, and left so: where std is small against mean, the two terms cancel to what
    single precision does not hold. Of two classes scikit-learn keeps the second's scores alone; the
    first's are 0.
    """
    weight, bias = torch.from_numpy(model.coef_).double(), torch.from_numpy(model.intercept_)
    weight = weight / std.double()
    bias = bias.double() - weight @ mean.double()
    if len(weight) == 1:
        weight, bias = (torch.cat([torch.zeros_like(t), t]) for t in (weight, bias))
    return Probe(weight, bias, classes)
