"""Golden vectors of the published downstream code."""

import json
from collections.abc import Callable
from pathlib import Path

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
