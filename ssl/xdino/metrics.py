"""Numbers of a run as they appear: metrics.jsonl always, wandb on request, a picture of the views.

Names in metrics.jsonl: iteration (completed updates), epoch, loss, lr, weight_decay, momentum,
global_size and local_size (of the crops, in pixels), images_per_second (over all processes),
wait_share (of the time, for data), resident_mb (Linux: what this process holds now), peak_memory_mb
(CUDA), and knn_* and linear_* (per cent) where they were evaluated.

Of the objective: teacher_temp, teacher_entropy and kl (nats; with koleo, of the rest of the loss) and
centre_norm of DINO, the last not with Sinkhorn-Knopp; koleo (the sum over the global views, before its
weight); cosine (of the views that are compared) and coding_rate (nats) of SimDINO; invariance and
sigreg of SIGReg; spread and agreement of both of these (see `loss.embedding`).
"""

import contextlib
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from xdino.errors import RunFailed, reason, world
from xdino.runtime.atomic import write_text, written_beside

METRICS_FILE = "metrics.jsonl"
WANDB_SECONDS = 30.0  # that a run waits for wandb at its start, and at its end
VIEW_PIXELS = 96  # a global view in the picture of the views is drawn at least so large


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
    """Appends rows to metrics.jsonl, and to the run's wandb page where that is wanted.

    A continued run drops the rows that lie beyond the iteration it continues from, so that every
    iteration is told once. wandb is a convenience: where it cannot be had, `notice` is told so and
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
    ) -> None:
        self._path = run_dir / METRICS_FILE
        rows, _ = read_rows(self._path)
        kept = [json.dumps(row) + "\n" for row in rows if row["iteration"] <= iteration]
        write_text(self._path, "".join(kept))
        with world(f"write {self._path}"):
            # Without a buffer: what a full disk refuses must not come up again when it is closed.
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
        self._page: _WandbPage | None = None
        if wandb_mode != "off":
            self._page = _WandbPage(run_dir, wandb_mode, wandb_project, config, notice)

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
        if self._page is not None:
            self._page.log(plain)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # nothing is left to be written
            self._file.close()
        if self._page is not None:
            self._page.finish()


class _WandbPage:
    """A run's page at wandb. Whatever fails there costs the page, never the run."""

    def __init__(
        self,
        run_dir: Path,
        mode: str,
        project: str,
        config: dict[str, Any] | None,
        notice: Callable[[str], None],
    ) -> None:
        self._notice = notice
        self.run: Any = None
        try:
            import wandb  # slow to import, and only wanted here
        except ImportError as error:
            notice(f"wandb is not installed ({error}): the run goes on without its page")
            return
        if mode == "online" and not _has_key(wandb):
            # wandb would ask for one, or raise where nobody can be asked.
            notice(
                "wandb has no API key: the page is kept offline in the run's folder wandb/ "
                "(`wandb login`, then `wandb sync`, sends it)"
            )
            mode = "offline"
        try:
            self.run = self._start(wandb, run_dir, mode, project, config)
        except Exception as error:  # noqa: BLE001 -- see `_or_without`
            if mode == "offline":
                notice(f"wandb failed ({reason(error)}): the run goes on without its page")
                return
            notice(
                f"wandb cannot be reached ({reason(error)}): the page is kept offline in the run's "
                "folder wandb/ (`wandb sync` sends it)"
            )
            with self._or_without():
                wandb.teardown()  # its service still holds the page that could not be begun
                self.run = self._start(wandb, run_dir, "offline", project, config)

    @staticmethod
    def _start(
        wandb: Any, run_dir: Path, mode: str, project: str, config: dict[str, Any] | None
    ) -> Any:
        id_file = run_dir / "wandb-id.txt"
        if not id_file.exists():
            write_text(id_file, secrets.token_hex(4))
        told = id_file.read_text(errors="replace").strip()
        settings = {"console": "off", "silent": True, "init_timeout": WANDB_SECONDS}
        known = wandb.Settings.model_fields
        settings |= {"finish_timeout": WANDB_SECONDS} if "finish_timeout" in known else {}
        run = wandb.init(
            project=project,
            id=told,
            name=run_dir.name,
            resume="allow",
            mode=mode,
            dir=str(run_dir),
            config=config,
            settings=wandb.Settings(**settings),
        )
        # Rows lie at their iteration, in whatever order they come: by its own counter wandb drops
        # what a continued run, or an evaluation after the last step, says of an earlier one.
        run.define_metric("iteration")
        run.define_metric("*", step_metric="iteration")
        return run

    @contextlib.contextmanager
    def _or_without(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 -- wandb's service raises nearly anything
            self.run = None
            self._notice(f"wandb failed ({reason(error)}): the run goes on without its page")

    def log(self, row: dict[str, Any]) -> None:
        if self.run is not None:
            with self._or_without():
                self.run.log(row)

    def finish(self) -> None:
        """Send what is left, for `WANDB_SECONDS` at most."""
        if self.run is not None:
            with self._or_without():
                self.run.finish()


def _has_key(wandb: Any) -> bool:
    """Whether somebody is logged in; nobody is asked and nothing is sent."""
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except TypeError:  # before wandb had `prompt`
        return bool(wandb.api.api_key)
    except (wandb.Error, OSError, ValueError):
        return True  # what is wrong with the key is said when it is used


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


def save_views(
    path: Path,
    groups: Sequence[Tensor],
    mean: Sequence[float],
    std: Sequence[float],
    images: int = 8,
) -> None:
    """A picture of the views as the networks see them: a row an image, a column a view.

    Args:
        groups: normalised crops, each `[V_r, B, C, h, w]`.

    Raises:
        RunFailed: it cannot be written.
    """
    size, gap = groups[0].shape[-1], 2
    views = [view[:images] for group in groups for view in group]
    rows = len(views[0])
    sheet = torch.full((3, rows * (size + gap) - gap, len(views) * (size + gap) - gap), 255.0)
    for column, view in enumerate(views):
        shape = (1, -1, 1, 1)
        pixels = view.float().cpu() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
        pixels = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)
        for row, image in enumerate(pixels):
            h, w = image.shape[-2:]
            top, left = row * (size + gap), column * (size + gap)
            sheet[:, top : top + h, left : left + w] = image * 255
    array = sheet.clamp(0, 255).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(array)
    enlarge = max(1, VIEW_PIXELS // size)  # crops of small images would be stamps
    picture = picture.resize(
        (picture.width * enlarge, picture.height * enlarge), Image.Resampling.NEAREST
    )
    with written_beside(path) as beside:
        picture.save(beside)


class Clock:
    """Seconds and waiting for data between two logged steps.

    `wait_seconds`: how long was waited so far.
    """

    def __init__(self, wait_seconds: Callable[[], float]) -> None:
        self.wait_seconds = wait_seconds
        self.restart()

    def restart(self) -> None:
        """Leave out what went by since the last lap (evaluation, checkpoints)."""
        self.time, self.waited = time.perf_counter(), self.wait_seconds()
        self.iteration: int | None = None

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


def check_writable(run_dir: Path) -> None:
    """Make the run folder, or say in a sentence why it cannot be.

    Raises:
        RunFailed: the folder cannot be made or written to.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunFailed(f"cannot write to the run folder {run_dir}: {error.strerror}") from None
