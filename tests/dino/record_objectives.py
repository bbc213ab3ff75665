"""What the authors' own code says of random numbers: writes recorded_objectives.json for the tests.

    python tests/dino/record_objectives.py DINOV2 SWAV SIMDINO LEJEPA

Each is a checkout: facebookresearch/dinov2 (recorded at b8931f7), facebookresearch/swav (06b1b7c),
RobinWu218/SimDINO (8149fc4), rbalestr-lab/lejepa (eddffdd). Their code is run in float64 (but for the
draw of LeJEPA's directions), on one process and a CPU, and nothing of it is kept but numbers.
"""

import ast
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

RECORDED = Path(__file__).with_name("recorded_objectives.json")


def noise(seed: int, *shape: int) -> Tensor:
    """The inputs: float64, the same wherever numpy runs."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def unit(seed: int, *shape: int) -> Tensor:
    return F.normalize(noise(seed, *shape), dim=-1)


def inputs() -> dict[str, Tensor]:
    return {
        "logits": unit(1, 12, 8) @ unit(2, 20, 8).T,  # two views of six images, 20 prototypes
        "tokens": noise(3, 8, 12),
        "student": noise(4, 4, 6, 8),
        "teacher": noise(5, 2, 6, 8),
        "embeddings": noise(6, 3, 10, 8),
        "directions": noise(7, 8, 16),
    }


NO_GROUP = SimpleNamespace(all_reduce=lambda x: x, is_initialized=lambda: False)


def defined(source: str, name: str, **scope: Any) -> Any:
    """What `source` defines as `name`, made from its text alone: their imports need GPUs."""
    node = next(n for n in ast.parse(source).body if getattr(n, "name", None) == name)
    known = {"torch": torch, "nn": nn, "F": F, "dist": NO_GROUP, **scope}
    exec(compile(ast.Module([node], []), name, "exec"), known)
    return known[name]


def record(dinov2: Path, swav: Path, simdino: Path, lejepa: Path) -> dict[str, Any]:
    given, out = inputs(), {}
    text = (dinov2 / "dinov2/loss/dino_clstoken_loss.py").read_text().replace(".float()", "")
    theirs = defined(text, "DINOLoss")(20)
    out["dinov2_sinkhorn"] = {"q": theirs.sinkhorn_knopp_teacher(given["logits"], 0.07, 3)}
    args = SimpleNamespace(epsilon=0.05, world_size=1, sinkhorn_iterations=3)
    sinkhorn = defined((swav / "main_swav.py").read_text(), "distributed_sinkhorn", args=args)
    out["swav_sinkhorn"] = {"q": sinkhorn(given["logits"])}

    tokens = given["tokens"].requires_grad_()
    loss = defined((dinov2 / "dinov2/loss/koleo_loss.py").read_text(), "KoLeoLoss")()(tokens)
    loss.backward()
    out["dinov2_koleo"] = {"loss": loss, "gradient": tokens.grad}

    raw = given["student"].requires_grad_()
    student, teacher = (F.normalize(x, dim=-1) for x in (raw, given["teacher"]))
    rate = defined((simdino / "simdino/main_dino.py").read_text(), "MCRLoss")
    rate = rate(4, reduce_cov=1, expa_type=1, eps=0.05, coeff=1.0)
    loss, cosine, expansion = rate(student.view(24, 8), teacher.view(12, 8))
    loss.backward()
    out["simdino"] = {"loss": loss, "cosine": cosine, "expansion": expansion}
    out["simdino"]["gradient"] = raw.grad

    sys.path.insert(0, str(lejepa))
    from lejepa.multivariate.slicing import SlicingUnivariateTest
    from lejepa.univariate.epps_pulley import EppsPulley

    torch.set_default_dtype(torch.float32)
    test = SlicingUnivariateTest(EppsPulley(), num_slices=16)
    z = given["embeddings"].float().requires_grad_()
    first, second = test(z), test(z)  # each with directions of its own
    first.backward()
    out["lejepa_sigreg"] = {"first": first, "second": second, "gradient": z.grad}

    torch.set_default_dtype(torch.float64)
    text = (lejepa / "MINIMAL.md").read_text()
    code = re.search(r"class SIGReg.*?return statistic.mean\(\)", text, re.S)
    assert code is not None
    text = re.sub(r'torch\.randn\(.*?device="cuda"\)', "GIVEN.clone()", code[0])
    text = text.replace("float32", "float64")
    z = given["embeddings"].detach()
    normality = defined(text, "SIGReg", GIVEN=given["directions"])()(z)
    invariance = (z.mean(0) - z).square().mean()
    loss = 0.05 * normality + 0.95 * invariance
    out["lejepa_minimal"] = {"loss": loss, "invariance": invariance, "sigreg": normality}
    return out


def main() -> None:
    torch.set_default_dtype(torch.float64)
    found = record(*(Path(place) for place in sys.argv[1:5]))
    plain = {
        name: {key: np.vectorize(lambda x: float(f"{x:.10g}"))(x.detach().numpy()).tolist()
               for key, x in values.items()}
        for name, values in found.items()
    }  # fmt: skip
    lines = (f"{json.dumps(name)}: {json.dumps(values)}" for name, values in plain.items())
    RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
