"""What judges a run while it trains, and what it keeps of it."""

from xdino_eval.during_training.best_teacher import BestTeacher
from xdino_eval.during_training.callback import callback, numbers

__all__ = ["BestTeacher", "callback", "numbers"]
