"""What a configuration comes to: data opened, networks named, schedules laid out.

Everything that can be asked wrongly is found here, before a file is written.
"""

from xdino.plan.continuing import Begun, continue_published
from xdino.plan.crops import photometric_of
from xdino.plan.make import make_plan
from xdino.plan.networks import build_head, build_learner, checkpoint_activations
from xdino.plan.plan import Plan
from xdino.plan.proof import check_disk

__all__ = [
    "Begun",
    "Plan",
    "build_head",
    "build_learner",
    "check_disk",
    "checkpoint_activations",
    "continue_published",
    "make_plan",
    "photometric_of",
]
