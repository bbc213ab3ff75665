"""docs/proofs.md names tests that are there, and every golden file of the downstream code."""

import ast
import re

from documented import ROOT

PAGE = (ROOT / "docs" / "proofs.md").read_text()
GOLDEN = ROOT / "tests" / "golden" / "downstream"


def test_every_named_test_is_there():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
    assert len(named) > 50
    assert len(named) == PAGE.count("::")
    functions = {
        file: {node.name for node in ast.walk(ast.parse((ROOT / file).read_text()))
               if isinstance(node, ast.FunctionDef)}
        for file in {file for file, _ in named}
    }  # fmt: skip
    assert [(file, name) for file, name in named if name not in functions[file]] == []


def test_every_golden_file_is_named():
    files = {path.name for path in GOLDEN.iterdir()}
    assert set(re.findall(r"`([\w-]+\.(?:safetensors|json))`", PAGE)) == files


def test_every_test_of_a_golden_file_stands_there():
    """A function that asks for `downstream`, the fixture of those files, is a proof."""
    for path in sorted((ROOT / "tests" / "transfer").glob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            is_test = isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
            if is_test and "downstream" in {argument.arg for argument in node.args.args}:
                assert f"`tests/transfer/{path.name}::{node.name}`" in PAGE
