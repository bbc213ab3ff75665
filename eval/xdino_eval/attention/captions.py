"""What stands below a picture: whose weights, what was shown to them, what its colours mean.

A picture goes its own way, into a talk or a letter. So each says from which weights it is and how
long these learned, how large the image was shown, and what a colour is worth.
"""

from collections.abc import Sequence

import numpy as np

from xdino.backbone import Backbone
from xdino.checkpoint import BACKBONE_FILE
from xdino_eval.attention.colours import TABLE, Scale
from xdino_eval.attention.sizes import Shown
from xdino_eval.sheets import Bar


def weights(backbone: Backbone) -> str:
    """ "runs/mine, teacher, iteration 1234 of 5000 · xcit_nano_12_p4, embed_dim 64, depth 3"."""
    origin, spec = backbone.origin, backbone.spec
    facts, path = origin.facts, origin.path
    name = path.absolute().parent if path.name == BACKBONE_FILE else path
    place = "/".join(part for part in name.parts[-3:] if part != "/")
    if name.parent.name != "checkpoints":
        place = name.name
    said = [place or "weights of no file"]
    if "iteration" in facts:
        end = f" of {facts['iterations']}" if facts.get("iterations") else ""
        untrained = " (untrained)" if facts["iteration"] == 0 else ""
        said.append(f"{origin.role}, iteration {facts['iteration']}{end}{untrained}")
    elif origin.role == "student":
        said.append("student")
    shape = {"embed_dim": backbone.embed_dim, **spec.shape}
    told = [f"{key} {shape[key]}" for key in ("embed_dim", "depth") if key in shape]
    return f"{', '.join(said)} · {', '.join([spec.arch or backbone.kind, *told])}"


def inputs(backbone: Backbone, seen: Sequence[Shown]) -> str:
    """ "shown at 480 x 320 pixels, 30 x 20 patches of 16 (the longer side at 480)"."""
    patch = backbone.patch_size
    if len({(one.width, one.height) for one in seen}) == 1:
        return f"shown at {seen[0].told} of {patch} ({seen[0].why})"
    longer = sorted(max(one.width, one.height) for one in seen)
    whys = ", or ".join(dict.fromkeys(one.why for one in seen))
    between = f"{longer[0]}" if longer[0] == longer[-1] else f"{longer[0]} to {longer[-1]}"
    return f"shown at {between} pixels along the longer side, in patches of {patch} ({whys})"


def bar(scale: Scale) -> Bar:
    """The colours of attention: from nothing over the even share to the scale's end."""
    places = [0, 1, *(scale.top * i / 4 for i in range(1, 5) if scale.top * i / 4 > 1)]
    labels = ["0", *(f"{place:g}x" for place in places[1:])]
    at = [float(scale.level(np.array(place))) for place in places]
    title = "attention of a patch; 1x is an even share among all patches"
    return Bar(TABLE, list(zip(at, labels, strict=True)), title)


def kept(share: float, mass: float) -> str:
    """ "60% of it on 23% of the patches; even: 60%"."""
    return f"{mass:.0%} of it on {share:.0%} of the patches; even: {mass:.0%}"
