"""Golden vectors of the published downstream code."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "golden" / "downstream"


@pytest.fixture(scope="session")
def downstream() -> Callable[[str], tuple[dict[str, Tensor], dict]]:
    """downstream(name) -> (tensors, configuration) of one vector."""
    facts = json.loads((FOLDER / "golden-downstream.json").read_text())

    def load(name: str) -> tuple[dict[str, Tensor], dict]:
        return load_file(FOLDER / f"{name}.safetensors"), facts[name]

    return load


@pytest.fixture(scope="session")
def detection_data() -> ModuleType:
    """tests/benchmarks/detection_data.py, which makes annotated pictures."""
    script = Path(__file__).parents[1] / "benchmarks" / "detection_data.py"
    spec = importlib.util.spec_from_file_location("detection_data", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
