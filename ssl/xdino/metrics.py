"""Numbers of a run as they appear: metrics.jsonl always, wandb on request, a picture of the views.

Names in metrics.jsonl: iteration (completed updates), epoch, loss, lr, weight_decay, momentum,
teacher_temp, global_size and local_size (of the crops, in pixels), images_per_second (over all
processes), wait_share (of the time, for data), teacher_entropy and kl (nats), centre_norm,
resident_mb (Linux: what this process holds now), peak_memory_mb (CUDA), and knn_* and linear_*
(per cent) where they were evaluated.
"""

import json
import math
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from xdino.errors import RunFailed

VIEW_PIXELS = 96  # a global view in the picture of the views is drawn at least so large


def resident_megabytes() -> float | None:
    """What this process holds in memory now, in units of 2**20 bytes; None where nobody tells."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class MetricsLog:
    """Appends rows to metrics.jsonl, and to the run's wandb page where that is wanted.

    A continued run drops the rows that lie beyond the iteration it continues from, so that every
    iteration is told once.
    """

    def __init__(
        self,
        run_dir: Path,
        iteration: int,
        wandb_mode: str = "off",
        wandb_project: str = "xdino",
        config: dict[str, Any] | None = None,
    ) -> None:
        path = run_dir / "metrics.jsonl"
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue  # a line cut short when the process was killed
                if row["iteration"] <= iteration:
                    kept.append(line)
        path.write_text("".join(line + "\n" for line in kept))
        self._file = open(path, "a", buffering=1)  # noqa: SIM115
        self._wandb = self._start_wandb(run_dir, wandb_mode, wandb_project, config)

    @staticmethod
    def _start_wandb(
        run_dir: Path, mode: str, project: str, config: dict[str, Any] | None
    ) -> Any | None:
        if mode == "off":
            return None
        import wandb  # slow to import, and only wanted here

        id_file = run_dir / "wandb-id.txt"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        run = wandb.init(
            project=project,
            id=id_file.read_text().strip(),
            name=run_dir.name,
            resume="allow",
            mode=mode,  # type: ignore[arg-type]
            dir=str(run_dir),
            config=config,
            settings=wandb.Settings(console="off", silent=True),
        )
        # Rows lie at their iteration, in whatever order they come: by its own counter wandb drops
        # what a continued run, or an evaluation after the last step, says of an earlier one.
        run.define_metric("iteration")
        run.define_metric("*", step_metric="iteration")
        return run

    def write(self, row: dict[str, Any]) -> None:
        """Add one row; it must say its iteration."""
        plain = {k: _rounded(v) for k, v in row.items()}
        self._file.write(json.dumps(plain) + "\n")
        if self._wandb is not None:
            self._wandb.log(plain)

    def close(self) -> None:
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def _rounded(value: Any) -> Any:
    return float(f"{value:.7g}") if isinstance(value, float) else value


def collapse_warning(loss: float, diagnostics: dict[str, float], prototypes: int) -> str | None:
    """A sentence when the teacher's outputs say that learning has stopped, else None.

    Two ways to collapse (DINO, section 5.3): uniform outputs, where the entropy is ln K and the
    loss sits there too, and one prototype for everything, where the entropy is zero.
    """
    uniform = math.log(prototypes)
    entropy, kl = diagnostics["teacher_entropy"], diagnostics["kl"]
    if kl > 1e-3:
        return None
    if abs(loss - uniform) < 0.01 * uniform and entropy > 0.99 * uniform:
        return (
            f"the loss sits at ln K = {uniform:.3f}: the teacher says nothing about any image. "
            "Lower loss.teacher_temp, warm it up, or lower optim.lr"
        )
    if entropy < 0.01 * uniform:
        return (
            "the teacher gives every image the same prototype: raise loss.teacher_temp, "
            "or check that loss.centre_momentum is below 1"
        )
    return None


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
    picture.resize(
        (picture.width * enlarge, picture.height * enlarge), Image.Resampling.NEAREST
    ).save(path)


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
