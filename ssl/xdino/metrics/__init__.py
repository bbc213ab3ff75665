"""Numbers of a run as they appear: metrics.jsonl always, pages on request.

Names in metrics.jsonl: iteration (completed updates), epoch, loss, lr, weight_decay, momentum,
global_size and local_size (of the crops, in pixels), gradient_norm (of all parameters, before clipping;
not with fp16), images_per_second and tokens_per_second (patches of all views; both over all
processes), mfu (of what the device's maker says it can do, the share that the model's counted
operations are; on GPUs that `forecast.machines` knows), wait_share (of the time, for data),
resident_mb (Linux: what this process holds now), peak_memory_mb (CUDA), and knn_* and linear_* (per
cent) where they were evaluated, with val_images (that were scored) and chance_top1 (per cent that
always answering the commonest class scores). Iteration 0 is the network before its first step.

Of the objective: teacher_temp, teacher_entropy and kl (nats; with koleo, of the rest of the loss) and
centre_norm of DINO, the last not with Sinkhorn-Knopp; koleo (the sum over the global views, before its
weight); cosine (of the views that are compared) and coding_rate (nats) of SimDINO; invariance and
sigreg of SIGReg; spread and agreement of both of these (see `loss.embedding`).
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from xdino.errors import RunFailed, world
from xdino.metrics.pages import Page, TensorBoardPage, WandbPage
from xdino.runtime.atomic import write_text
from xdino.stepping import Work

METRICS_FILE = "metrics.jsonl"


def resident_megabytes() -> float | None:
    """What this process holds in memory now, in units of 2**20 bytes; None where nobody tells."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a metrics.jsonl, and how many of its lines are none; no row without a file.

    A row is an object that says its iteration. What else stands there was cut short when a process
    was killed, or damaged since.

    Raises:
        RunFailed: the file cannot be read.
    """
    with world(f"read {path}"):
        try:
            lines = [line for line in path.read_bytes().splitlines() if line.strip()]
        except FileNotFoundError:
            return [], 0
    rows = [row for line in lines if (row := _row(line)) is not None]
    return rows, len(lines) - len(rows)


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # brackets without end nest too deep
        return None
    said = row.get("iteration") if isinstance(row, dict) else None
    return row if isinstance(said, int) and not isinstance(said, bool) else None


class MetricsLog:
    """Appends rows to metrics.jsonl, and to the run's pages (wandb, TensorBoard) that are wanted.

    A continued run drops the rows that lie beyond the iteration it continues from, so that every
    iteration is told once. Pages are a convenience: where one cannot be had, `notice` is told so and
    the run goes on without.

    Raises:
        RunFailed: metrics.jsonl cannot be read or written.
    """

    def __init__(
        self,
        run_dir: Path,
        iteration: int,
        wandb_mode: str = "off",
        wandb_project: str = "xdino",
        config: dict[str, Any] | None = None,
        notice: Callable[[str], None] = lambda _: None,
        tensorboard: bool = False,
    ) -> None:
        self._path = run_dir / METRICS_FILE
        rows, _ = read_rows(self._path)
        kept = [json.dumps(row) + "\n" for row in rows if row["iteration"] <= iteration]
        write_text(self._path, "".join(kept))
        with world(f"write {self._path}"):
            # Without a buffer: what a full disk refuses must not come up again when it is closed.
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
        self._pages: list[Page] = []
        if wandb_mode != "off":
            self._pages.append(WandbPage(run_dir, wandb_mode, wandb_project, config, notice))
        if tensorboard:
            self._pages.append(TensorBoardPage(run_dir, iteration, notice))

    def write(self, row: dict[str, Any]) -> None:
        """Add one row; it must say its iteration.

        Raises:
            RunFailed: the disk is full, or gone.
        """
        plain = {k: _rounded(v) for k, v in row.items()}
        with world(f"write {self._path}"):
            left = memoryview((json.dumps(plain) + "\n").encode())
            while left:  # a disk that fills up takes a part first, and says why at the next try
                left = left[self._file.write(left) :]
        for page in self._pages:
            page.log(plain)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # nothing is left to be written
            self._file.close()
        for page in self._pages:
            page.finish()


def _rounded(value: Any) -> Any:
    return float(f"{value:.7g}") if isinstance(value, float) else value


def collapse_warning(loss: float, diagnostics: dict[str, float], prototypes: int) -> str | None:
    """A sentence when the teacher's outputs say that learning has stopped, else None.

    Two ways to collapse (DINO, section 5.3): uniform outputs, where the entropy is ln K and the
    loss sits there too, and one prototype for everything, where the entropy is zero.
    """
    loss = _cross_entropy(loss, diagnostics)
    kind = _collapse(loss, diagnostics, math.log(prototypes), 1.0)
    return None if kind is None else _WORDS[kind].format(ln_k=math.log(prototypes))


_WORDS = {
    "uniform": (
        "the loss sits at ln K = {ln_k:.3f}: the teacher says nothing about any image. "
        "Lower loss.teacher_temp, warm it up, or lower optim.lr"
    ),
    "point": (
        "the teacher gives every image the same prototype: raise loss.teacher_temp, "
        "or check that loss.centre_momentum is below 1"
    ),
    "hovering": (
        "the loss has stayed at ln K = {ln_k:.3f} for {rows} logged rows: nothing has been learned "
        "so far. Usual while optim.lr warms up; later lower optim.lr or loss.teacher_temp, "
        "or take larger batches"
    ),
}


def _cross_entropy(loss: float, diagnostics: dict[str, float]) -> float:
    """The loss without KoLeo, of which ln K knows nothing."""
    with_more = "koleo" in diagnostics
    return diagnostics["teacher_entropy"] + diagnostics["kl"] if with_more else loss


def _collapse(
    loss: float, diagnostics: dict[str, float], uniform: float, width: float
) -> str | None:
    """The kind of collapse within limits that are `width` times as wide as those of the alarm."""
    entropy, kl = diagnostics["teacher_entropy"], diagnostics["kl"]
    near = 0.01 * width * uniform
    if kl > 1e-3 * width:
        return None
    if abs(loss - uniform) < near and entropy > uniform - near:
        return "uniform"
    return "point" if entropy < near else None


class CollapseAlarm:
    """Says once that learning has stopped, and again only after it had recovered.

    Beside what `collapse_warning` sees in a single row, a loss within 1 % of ln K in `ROWS` rows one
    after the other. A kind has recovered in a row that lies outside of limits twice as wide, so that
    what hovers at a limit is said once too.

    Args:
        prototypes: K.
        after: nothing is said up to this iteration: every run begins at ln K.
    """

    ROWS = 5

    def __init__(self, prototypes: int, after: int = 0) -> None:
        self._uniform = math.log(prototypes)
        self._after = after
        self._near = 0  # rows in a row with a loss near ln K
        self._said: set[str] = set()

    def look(self, iteration: int, loss: float, diagnostics: dict[str, float]) -> str | None:
        """A sentence about the row of this iteration, or None."""
        if iteration <= self._after or not self._uniform:
            return None
        loss = _cross_entropy(loss, diagnostics)
        away = abs(loss - self._uniform) / self._uniform
        self._near = self._near + 1 if away < 0.01 else 0
        kind = _collapse(loss, diagnostics, self._uniform, 1.0)
        if kind is None and self._near >= self.ROWS and "uniform" not in self._said:
            kind = "hovering"
        still = {_collapse(loss, diagnostics, self._uniform, 2.0), kind}
        still |= {"hovering"} if away < 0.02 else set()
        self._said &= still
        if kind is None or kind in self._said:
            return None
        self._said.add(kind)
        return _WORDS[kind].format(ln_k=self._uniform, rows=self.ROWS)


_EMBEDDING_WORDS = {
    "point": (
        "every image gets nearly the same embedding (spread {spread:.2g}; 1 is what is aimed at): "
        "lower optim.lr, take larger batches, or raise {weight}"
    ),
    "strangers": (
        "two views of an image have been no more alike than views of two images (agreement "
        "{agreement:.2g}) for {rows} logged rows: lower {weight} or optim.lr, or crop less"
    ),
}
_WEIGHTS = {"simdino": "loss.coding_rate_weight", "sigreg": "loss.sigreg_weight"}


class EmbeddingAlarm:
    """`CollapseAlarm` of the objectives without prototypes, from their columns spread and agreement.

    They stop learning when every image has one embedding, which a single row shows, or when an
    image's views differ as much as images do, in `ROWS` rows one after the other. Said once, and again
    only after a row outside of limits twice as wide.

    Args:
        objective: "simdino" or "sigreg".
        after: nothing is said up to this iteration: every run begins with one embedding for all.
    """

    ROWS = 5
    SPREAD, AGREEMENT = 0.01, 0.05

    def __init__(self, objective: str, after: int = 0) -> None:
        self._weight = _WEIGHTS[objective]
        self._after = after
        self._low = 0  # rows in a row without agreement
        self._said: set[str] = set()

    def look(self, iteration: int, loss: float, diagnostics: dict[str, float]) -> str | None:
        """A sentence about the row of this iteration, or None."""
        if iteration <= self._after:
            return None
        spread, agreement = diagnostics["spread"], diagnostics["agreement"]
        self._low = self._low + 1 if agreement < self.AGREEMENT else 0
        found = {"point"} if spread < self.SPREAD else set()
        # Of embeddings that are all but one, agreement is a quotient of nothing by nothing.
        found |= {"strangers"} if self._low >= self.ROWS and not found else set()
        still = {"point"} if spread < 2 * self.SPREAD else set()
        still |= {"strangers"} if agreement < 2 * self.AGREEMENT else set()
        self._said &= still
        new = next(iter(found - self._said), None)
        if new is None:
            return None
        self._said.add(new)
        seen = {"spread": spread, "agreement": agreement, "rows": self.ROWS}
        return _EMBEDDING_WORDS[new].format(weight=self._weight, **seen)


class Clock:
    """Seconds and waiting for data between two logged steps.

    `wait_seconds`: how long was waited so far.
    """

    def __init__(self, wait_seconds: Callable[[], float]) -> None:
        self.wait_seconds = wait_seconds
        self.restart()

    def restart(self, iteration: int | None = None) -> None:
        """Leave out what went by since the last lap (evaluation, checkpoints).

        iteration: all steps up to it are done, and nothing of them is left for the next lap; None where
        a device may still be at work on one: then the next lap tells nothing.
        """
        self.time, self.waited = time.perf_counter(), self.wait_seconds()
        self.iteration = iteration

    def lap(self, iteration: int) -> tuple[int, float, float]:
        """Steps, seconds and seconds waited for data since the last lap; 0 steps at the first."""
        now, waited = time.perf_counter(), self.wait_seconds()
        lap = (
            iteration - self.iteration if self.iteration is not None else 0,
            max(now - self.time, 1e-9),
            waited - self.waited,
        )
        self.time, self.waited, self.iteration = now, waited, iteration
        return lap

    def measured(
        self, iteration: int, images_per_step: int, device: torch.device, work: Work | None = None
    ) -> dict[str, float]:
        """What metrics.jsonl tells of speed and memory at this iteration, which ends a lap."""
        steps, seconds, waited = self.lap(iteration)
        found: dict[str, float] = {}
        if steps:
            found["images_per_second"] = steps * images_per_step / seconds
            if work is not None:
                found["tokens_per_second"] = steps * work.tokens / seconds
                if work.peak and work.operations:
                    found["mfu"] = steps * work.operations / (seconds * work.peak)
            found["wait_share"] = waited / seconds
        resident = resident_megabytes()
        if resident is not None:
            found["resident_mb"] = round(resident, 1)
        if device.type == "cuda":
            found["peak_memory_mb"] = torch.cuda.max_memory_allocated(device) / 2**20
        return found


def check_writable(run_dir: Path) -> None:
    """Make the run folder, or say in a sentence why it cannot be.

    Raises:
        RunFailed: the folder cannot be made or written to.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / f".probe.{os.getpid()}.tmp"
        probe.touch()
        probe.unlink(missing_ok=True)  # whose run it is removes what others have left
    except OSError as error:
        raise RunFailed(f"cannot write to the run folder {run_dir}: {error.strerror}") from None
