"""What `xdino bench knn` times: the k-NN evaluation at every k, and whether both codes agree."""

from typing import Any

import faiss
import torch
from torch import Tensor

from xdino.errors import UsageError
from xdino_eval.knn import KS, classify, normalise
from xdino_launch.bench import reference as published
from xdino_launch.bench.timing import Arm, Protocol, Ratio, Report, again, divided, timed


def knn(
    bank: int,
    queries: int,
    dim: int,
    classes: int,
    reference: str | None,
    protocol: Protocol,
) -> Report:
    """Seconds for k = 10, 20, 100 and 200 together, on noisy unit vectors around class centres."""
    if min(bank, queries, dim, classes) < 1:
        raise UsageError("--bank, --queries, --dim and --classes must be at least 1")
    if reference and queries < 100:
        raise UsageError(f"the published k-NN needs 100 queries or more, got --queries {queries}")
    if reference and bank < max(KS):
        raise UsageError(f"the published k-NN needs a --bank of 200 or more, got {bank}")
    dino = published.load_dino(reference) if reference else None
    train, val = _splits(bank, queries, dim, classes)
    scores: dict[str, dict[int, tuple[float, float]]] = {}

    def ours(number: int) -> None:
        scores["ours"] = classify(*train, *val)

    def theirs(number: int) -> None:
        assert dino is not None
        scores["published"] = {
            k: dino.knn.knn_classifier(*train, *val, k, 0.07, num_classes=classes) for k in KS
        }

    arms = [Arm("ours", timed(ours))]
    if dino is not None:
        arms.append(Arm("published", timed(theirs)))
    arms.append(again(arms[0]))
    faiss_threads = faiss.omp_get_max_threads()
    try:
        faiss.omp_set_num_threads(protocol.used_threads)
        values = protocol.measure(arms)
    finally:
        faiss.omp_set_num_threads(faiss_threads)
    facts: dict[str, Any] = {
        f"top-1, top-5 in per cent, {name}": {f"k = {k}": list(top) for k, top in found.items()}
        for name, found in scores.items()
    }
    if dino is not None:
        facts["equal to the digit"] = scores["ours"] == scores["published"]
    settings = {
        "bank": bank,
        "queries": queries,
        "dim": dim,
        "classes": classes,
        "k": KS,
        "threads": protocol.used_threads,
    }
    ratios = divided(values, [Ratio("published / ours", "published", "ours")])
    return Report("knn", settings, "s", values, ratios, facts=facts)


def _splits(bank: int, queries: int, dim: int, classes: int) -> list[tuple[Tensor, Tensor]]:
    """Features of both splits, unit vectors [N, D], and their labels."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, dim, generator=generator)
    splits = []
    for count in (bank, queries):
        labels = torch.randint(classes, (count,), generator=generator)
        # Noise at which neighbours are often wrong (top-1 is 73 % at k = 10 by default), so that
        # the order of votes matters.
        noise = 3.0 * torch.randn(count, dim, generator=generator)
        splits.append((normalise(centres[labels] + noise), labels))
    return splits
