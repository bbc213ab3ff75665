"""Whether a run has learned anything, from the rows of its metrics.jsonl: a sentence, and what to do.

Scores are compared with the network before its first step, which is the same images judged by the
same protocol, and with chance. A difference that so few images could show by chance is not called
one: two standard errors of the difference of two shares. (Both scores are of the same images, so
their difference varies less than that: the bound is on the careful side.)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from xdino.metrics import collapse_warning
from xdino_launch.report.curves import is_number

Rows = Sequence[Mapping[str, Any]]

#: Scores that judge, the first that a run has: key of metrics.jsonl, what a sentence calls it, the
#: key of what guessing scores. All but RankMe in per cent.
MEASURES = (
    ("val_top1", "top-1", "chance_top1"),  # of a classifier
    ("val_miou", "mIoU", ""),  # of a segmenter
    ("val_box_ap", "box AP", ""),  # of a detector
    ("knn_top1", "k-NN", "chance_top1"),
    ("logistic_top1", "linear probe", "chance_top1"),
    ("grid_top1", "linear probe", "chance_top1"),
    ("quality_agreement", "agreement of two views", "chance_agreement"),
    ("quality_rankme", "RankMe", ""),
)
#: Those that are no share of so many images, whose chance differences nobody knows.
NO_SHARES = ("val_miou", "val_box_ap", "quality_rankme")
LITTLE = 1.0  # points that the first two may fall without a word
NEAR = 0.01  # of ln K: a loss so near to it has not moved

TRY = (
    "look at views.png (is what the crops show still recognisable?), train longer, halve or double "
    "optim.lr; with few images take fewer head.prototypes and teacher.momentum 0.99 (the recipe "
    "small_data), or let `xdino pretrain auto` choose"
)
ADVICE = {
    "worse": f"What to try: {TRY}",
    "no better": f"What to try: {TRY}",
    "unclear": "Score more images (evaluate.limit, a larger val/) or train longer to know",
    "fell": "What to try: a lower optim.lr or loss.teacher_temp, or fewer epochs. "
    "runtime.keep_every keeps the states of epochs",
    "at ln K": f"What to try: lower optim.lr or loss.teacher_temp; {TRY}",
    "unscored": "A falling loss does not say that features are good: score them, as below, or while "
    "training by evaluate.every",
}
#: The same of networks that learn with labels, whose scores are called val_....
TUNING = {
    "worse": "What to try: another optim.lr, longer training, a look at views.png and at the labels",
    "fell": "What to try: a lower optim.lr or fewer epochs; best.safetensors holds the best",
}
TUNING["no better"] = TUNING["worse"]


@dataclass(frozen=True)
class Verdict:
    """`kind`: "learned", "fell", "unclear", "no better", "worse", "collapsed", "at ln K",
    "unscored", "begun" or "empty". Numbers are None where the run has none."""

    kind: str
    sentence: str
    advice: str = ""
    measure: str | None = None
    score: float | None = None
    untrained: float | None = None
    chance: float | None = None
    best: float | None = None
    best_epoch: int | None = None
    epoch: int | None = None
    loss: float | None = None
    ln_k: float | None = None

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Scores:
    """One measure of a run, a row an evaluation, in order. `guessed`: what guessing scores."""

    key: str
    name: str
    rows: Rows
    guessed: float | None

    @property
    def untrained(self) -> float | None:
        """Of the network before its first step."""
        first = self.rows[0]
        return float(first[self.key]) if first["iteration"] == 0 else None

    @property
    def last(self) -> float:
        return float(self.rows[-1][self.key])

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The highest row after the first step, of equals the first."""
        later = [row for row in self.rows if row["iteration"]]
        return max(later, key=lambda row: float(row[self.key])) if later else None

    @property
    def images(self) -> int | None:
        """That were scored; None where nobody knows, or it does not matter."""
        images = self.rows[-1].get("val_images")
        if self.key == "quality_agreement":
            images = 100 / self.guessed if self.guessed else None
        if self.key in NO_SHARES or not is_number(images) or images < 1:
            return None
        return round(images)

    def noise(self, *scores: float) -> float:
        """What two scores may differ by without a reason, in points; 0 where nobody knows."""
        images = self.images
        if images is None:
            return 0.0
        # One more hit and one more miss, so that scores of 0 and 100 are not certain.
        shares = [(min(max(s, 0), 100) / 100 * images + 1) / (images + 2) for s in scores]
        return 200 * math.sqrt(sum(p * (1 - p) for p in shares) / images)


def scores_of(rows: Rows) -> Scores | None:
    """The measure that judges a run; None where it was never scored."""
    for key, name, guess in MEASURES:
        scored = [row for row in rows if is_number(row.get(key))]
        if scored:
            guessed = scored[-1].get(guess)
            return Scores(key, name, scored, float(guessed) if is_number(guessed) else None)
    return None


def judge(
    rows: Rows, prototypes: int | None, finished: bool = True, start: str = "untrained"
) -> Verdict:
    """The verdict on a run.

    Args:
        rows: of metrics.jsonl, in order.
        prototypes: K, for ln K; None where it is not known.
        finished: else the sentence says that it is so far.
        start: what the network was before its first step: "untrained", or where it began with
            weights "at the start".
    """
    losses = [row for row in rows if is_number(row.get("loss"))]
    ln_k = math.log(prototypes) if prototypes and prototypes > 1 else None
    scores = scores_of(rows)
    if scores is not None:
        found = _scored(scores, start)
    else:
        found = _unscored(losses, ln_k)
    if losses:
        found = replace(found, loss=float(losses[-1]["loss"]), ln_k=ln_k)
        found = replace(found, epoch=losses[-1].get("epoch"))
        found = _collapsed(found, losses[-1], prototypes)
    if not finished and losses:
        found = replace(found, sentence=f"so far: {found.sentence}")
    return found


def _scored(scores: Scores, start: str) -> Verdict:
    last, before, best = scores.last, scores.untrained, scores.best
    numbers = [f"{scores.name} {last:.1f}"]
    numbers += [] if before is None else [f"{start} {before:.1f}"]
    numbers += [] if scores.guessed is None else [f"chance {scores.guessed:.1f}"]
    rank = [row["quality_rankme"] for row in scores.rows if is_number(row.get("quality_rankme"))]
    if scores.key == "quality_agreement" and rank:
        numbers.append(f"RankMe {rank[-1]:.1f}" + f", {rank[0]:.1f} at first" * (len(rank) > 1))
    told = Verdict("begun", f"before the first step: {'; '.join([numbers[0], *numbers[2:]])}",
                   measure=scores.name, score=last, untrained=before, chance=scores.guessed)  # fmt: skip
    if best is None:
        return told
    top, epoch = float(best[scores.key]), best.get("epoch")
    numbers.append(f"best at epoch {epoch}" if top == last else f"best {top:.1f} at epoch {epoch}")
    if top == last and epoch == scores.rows[-1].get("epoch"):
        numbers[-1] += ", the last"
    told = replace(told, best=top, best_epoch=epoch)
    against, name = (before, start) if before is not None else (scores.guessed, "chance")
    lead, kind = "", "learned"
    if against is not None and last <= against:
        lead, kind = f"no better than {name}: ", "no better"
        if against - last > scores.noise(last, against):
            lead, kind = f"worse than {name}: ", "worse"
    elif against is not None and last - against <= (few := scores.noise(last, against)):
        lead, kind = f"not clearly better than {name}: ", "unclear"
        numbers.append(f"of {scores.images:,} images, differences up to {few:.1f} may be chance")
    elif top - last > max(scores.noise(top, last), LITTLE * (scores.key in NO_SHARES[:2])):
        lead, kind = "learned, and lost some of it again: ", "fell"
    advice = ADVICE.get(kind, "")
    if scores.key.startswith("val_"):
        advice = TUNING.get(kind, "")
    return replace(told, kind=kind, sentence=lead + "; ".join(numbers), advice=advice)


def _unscored(losses: Rows, ln_k: float | None) -> Verdict:
    if not losses:
        return Verdict("empty", "nothing was logged yet")
    first, last = (float(row["loss"]) for row in (losses[0], losses[-1]))
    against = "" if ln_k is None else f"; ln K {ln_k:.2f}"
    if ln_k and abs(last - ln_k) < NEAR * ln_k:
        words = f"nothing learned yet: loss {last:.2f}{against}, where every run begins"
        return Verdict("at ln K", words, ADVICE["at ln K"])
    words = f"not scored while training: loss {last:.2f}, {first:.2f} at first{against}"
    return Verdict("unscored", words, ADVICE["unscored"])


def _collapsed(found: Verdict, last: Mapping[str, Any], prototypes: int | None) -> Verdict:
    """The verdict, or that the last row of the loss is one of a collapse."""
    seen = {key: last.get(key) for key in ("teacher_entropy", "kl")}
    seen |= {"koleo": last["koleo"]} if is_number(last.get("koleo")) else {}
    if not prototypes or prototypes < 2 or not all(map(is_number, seen.values())):
        return found
    alarm = collapse_warning(float(last["loss"]), seen, prototypes)  # type: ignore[arg-type]
    if alarm is None:
        return found
    what, _, advice = alarm.partition(". " if ". " in alarm else ": ")
    return replace(
        found,
        kind="collapsed",
        sentence=f"collapsed: {what}; {found.sentence}",
        advice=f"What to try: {advice}",
    )


class BelowUntrained:
    """Says once that a score has fallen below the untrained network's, again after it recovered.

    By more than chance makes of so many images (`Scores.noise`).
    """

    def __init__(self, start: str = "untrained") -> None:
        self._start, self._below = start, False

    def look(self, rows: Rows) -> str | None:
        """A sentence about the last of all rows so far, or None."""
        scores = scores_of(rows)
        if scores is None or scores.untrained is None or scores.rows[-1] is not rows[-1]:
            return None
        last, before = scores.last, scores.untrained
        below = before - last > scores.noise(last, before)
        new, self._below = below and not self._below, below or (self._below and last < before)
        if not new:
            return None
        if scores.key.startswith("val_"):
            return (
                f"{scores.name} {last:.1f} has fallen below {before:.1f}, that of before the first "
                "step: it can pass while optim.lr warms up; if it stays, lower optim.lr"
            )
        who = "the untrained network's" if self._start == "untrained" else "that of the start,"
        return (
            f"{scores.name} {last:.1f} has fallen below {who} {before:.1f}: what is learned does "
            "not show in the features, or takes something from them. It can pass in the first "
            "epochs, while optim.lr warms up; if it stays, lower optim.lr or loss.teacher_temp, "
            "and see whether views.png still shows what the classes differ in"
        )
