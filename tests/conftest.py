"""What several subjects' tests share: golden vectors and how to compare with them, the command line."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor


def pytest_configure(config: pytest.Config) -> None:
    """Tests mean the processor, also where there is a GPU; `-m gpu` runs those that mean the GPU."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Callable[[str], tuple[dict[str, Tensor], dict]]:
    """golden(name) -> (tensors, configuration) of one published-code vector."""
    facts = json.loads((GOLDEN / "golden.json").read_text())

    def load(name: str) -> tuple[dict[str, Tensor], dict]:
        return load_file(GOLDEN / f"{name}.safetensors"), facts[name]

    return load


@pytest.fixture(scope="session")
def schedules_golden() -> list[dict]:
    return json.loads((GOLDEN / "golden.json").read_text())["schedules"]


@pytest.fixture(scope="session")
def agree() -> Callable[..., None]:
    """agree(name, ours, theirs, tolerance): max|a-b| / max|b| within tolerance."""

    def check(name: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
        assert ours.shape == theirs.shape, f"{name}: {ours.shape} against {theirs.shape}"
        ours, theirs = ours.detach().double(), theirs.double()
        scale = theirs.abs().max().clamp_min(1e-30)
        error = ((ours - theirs).abs().max() / scale).item()
        assert error <= tolerance, f"{name}: relative error {error:.2e} above {tolerance:.0e}"

    return check


@pytest.fixture
def xdino(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """xdino(*arguments) -> (exit code, standard output, standard error), run in this process."""
    from xdino_launch import cli

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            cli.main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    # Tensors here are tiny, and threads that wait for each other cost more.
    torch.set_num_threads(1)
