"""`xdino pretrain auto`: look, time a few steps, choose, say why, and pretrain by what was chosen.

What was chosen stays in RUN/auto.json, and in RUN/config.yaml as an ordinary recipe. A run that is
continued goes on with it: nothing is looked at or timed again, for the machine may be in another mood.
"""

from xdino.forecast.choosing import Asked
from xdino_launch.automatic.starting import pretrain_auto, recipe_text

__all__ = ["Asked", "pretrain_auto", "recipe_text"]
