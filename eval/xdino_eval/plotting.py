"""matplotlib, brought in without remarks about folders and fonts.

Where its folder of settings cannot be written (a home that is read-only), matplotlib makes another
and says so, once a process: that is nothing a person who asked for a picture can use. Of a folder
that is nowhere to be had it makes an error, which is said in a sentence here.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator

from xdino.errors import world


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, matplotlib says nothing of its cache, nor of letters that its font lacks."""
    log = logging.getLogger("matplotlib")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            warnings.filterwarnings("ignore", message="Matplotlib")
            yield
    finally:
        log.setLevel(level)


with quiet(), world("find a folder for matplotlib's cache"):
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

__all__ = [
    "Axes",
    "Figure",
    "FigureCanvasAgg",
    "FigureCanvasSVG",
    "Rectangle",
    "matplotlib",
    "quiet",
]
