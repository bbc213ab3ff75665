"""What a command imports before it begins: timm and what it brings take seconds, and an XCiT has none."""

import subprocess
import sys

import pytest

HEAVY = "{'timm', 'torchvision', 'torch._dynamo', 'sklearn', 'wandb'}"


@pytest.mark.parametrize(
    "code",
    [
        "import xdino.pretraining, xdino_eval.evaluators, xdino_launch.local",
        # A file is read into a network that was built without memory for it.
        "import torch; from xdino import checkpoint; from xdino.backbones import BackboneSpec, of_timm\n"
        "spec = of_timm('xcit_nano_12_p16')\n"
        "with torch.device('meta'): spec.build()",
    ],
)
def test_an_xcit_needs_no_timm(code):
    code += f"\nimport sys; print(sorted({HEAVY} & set(sys.modules)))"
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "[]"
