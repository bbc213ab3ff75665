"""Pictures of XCA: each head's softmax over channels as a heat map.

Letters: d channels of a head.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from xdino.errors import world
from xdino_eval import sheets
from xdino_eval.sheets import DRAWN, LARGEST, Figure, FigureCanvasAgg, broken


def draw_channels(
    matrices: Sequence[np.ndarray],
    out_dir: Path | str,
    stem: str,
    told: Sequence[str] = (),
    every: bool = False,
) -> list[Path]:
    """Write XCA's matrices, float [heads, d, d] a block, as heat maps of one scale.

    Args:
        told: lines that say of what they are.
        every: a file a block, too.

    Returns:
        The files written, the sheet of all blocks first.
    """
    out_dir = Path(out_dir)
    top = max(float(np.quantile(block, 0.999)) for block in matrices)
    written = [out_dir / f"{stem}-xca-sheet.png"]
    _figure(matrices, range(1, len(matrices) + 1), top, told, written[0])
    for i, block in enumerate(matrices, 1) if every else ():
        written.append(out_dir / f"{stem}-xca-block{i}.png")
        _figure([block], [i], top, told, written[-1])
    return written


NOTE = (
    "Cross-covariance attention mixes the channels of a head, so its matrices have no map over the "
    "image. Row: channel that is written; column: channel that is read; rows sum to 1."
)


def _figure(
    blocks: Sequence[np.ndarray],
    numbers: Sequence[int],
    top: float,
    told: Sequence[str],
    path: Path,
) -> None:
    rows, columns = len(blocks), max(len(block) for block in blocks)
    inches = 1.7 if rows > 1 else 2.6
    size = (max(7.0, columns * inches + 1.2), rows * inches + 1.3)
    dpi = min(100, LARGEST / max(size))
    figure = Figure(figsize=size, dpi=dpi, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for row, (number, block) in enumerate(zip(numbers, blocks, strict=True)):
        for column, matrix in enumerate(block):
            axes = grid[row, column]
            shown = axes.imshow(matrix, cmap="viridis", vmin=0, vmax=max(top, 1e-12))
            axes.set_xticks([0, len(matrix) - 1])
            axes.set_yticks([0, len(matrix) - 1])
            axes.tick_params(labelsize=6, length=2)
            if row == 0:
                axes.set_title(f"head {column + 1}", fontsize=9)
            if row == rows - 1:
                axes.set_xlabel("key channel", fontsize=8)
            if column == 0:
                axes.set_ylabel(f"block {number}\nquery channel", fontsize=8)
    figure.colorbar(shown, ax=list(grid.flat), label="attention weight", shrink=min(1, 3 / rows))
    lines = broken((*told, NOTE), lambda words: len(words) <= size[0] * 14)
    figure.suptitle("\n".join(lines), fontsize=8)
    with world(f"write {path}"), sheets.quiet():
        path.parent.mkdir(parents=True, exist_ok=True)
        FigureCanvasAgg(figure).print_png(path, metadata=DRAWN)
