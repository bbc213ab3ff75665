"""What judges a run while it trains, and what it keeps of it."""

from xdino_eval.during_training.best_teacher import BestTeacher, best_of
from xdino_eval.during_training.callback import Remembering, callback, numbers

__all__ = ["BestTeacher", "Remembering", "best_of", "callback", "numbers"]
