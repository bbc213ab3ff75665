"""The shape of the house: the standard library's ssl survives, recipes are found, imports run one way.

And its measures: files that fit in the mind, functions that fit on a screen, rooms whose names can be
read at a glance, arrows that a reader of the imports sees.
"""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from xdino import config
from xdino_launch.commands.overrides import schema_of

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for top in ("ssl", "eval", "launch") for path in (ROOT / top).rglob("*.py"))
PACKAGES = sorted(path.parent for path in SOURCES if path.name == "__init__.py")

LONGEST_FILE, LONGEST_FUNCTION = 450, 60  # lines
#: Functions that may be longer. A line here says why.
LONG_FUNCTIONS: set[str] = set()

MOST_NAMES = 16  # modules and packages of a package
# The method, a room a part, as the paper has them, and the loop: `ls ssl/xdino` is the contents page.
MOST_NAMES_OF = {"xdino": 31}


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_ssl_from_the_root_is_the_standard_library():
    assert not (ROOT / "ssl" / "__init__.py").exists()
    code = "import ssl, asyncio; ssl.SSLContext; print(ssl.__file__)"
    for where in ((sys.executable, "-c", code), (sys.executable, "-I", "-c", code)):
        done = run(*where)
        assert done.returncode == 0, done.stderr
        assert str(ROOT) not in done.stdout


def test_imports_run_one_way():
    done = run(str(Path(sys.executable).parent / "lint-imports"))
    assert done.returncode == 0, done.stdout


# Measures


def trees() -> Iterator[tuple[str, ast.Module]]:
    """Every module of ours: its path from the root, and what Python reads."""
    for path in SOURCES:
        yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def test_files_fit_in_the_mind():
    lines = {path: len(path.read_text().splitlines()) for path in SOURCES}
    assert [f"{path}: {n}" for path, n in lines.items() if n > LONGEST_FILE] == []


def test_functions_fit_on_a_screen():
    """From `def` to the last line, docstring included."""
    long = {
        f"{path}: {node.name}": lines
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := node.end_lineno - node.lineno + 1) > LONGEST_FUNCTION
    }
    assert {name: n for name, n in long.items() if name not in LONG_FUNCTIONS} == {}
    assert set(long) >= LONG_FUNCTIONS, "these are short by now: take them off the list"


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_a_level_is_read_at_a_glance(package):
    modules = [path.stem for path in package.glob("*.py") if not path.stem.startswith("__")]
    inside = [path.parent.name for path in package.glob("*/__init__.py")]
    most = MOST_NAMES_OF.get(package.name, MOST_NAMES)
    assert len(modules + inside) <= most, sorted(modules + inside)


def test_names_say_what_is_inside():
    vague = {"utils", "util", "helpers", "misc", "common", "tools"}
    assert [str(path) for path in [*SOURCES, *PACKAGES] if path.stem in vague] == []


def test_imports_are_written_where_readers_and_linters_see_them():
    """Not as texts: `import_module` is for code that is none of ours."""
    foreign = {"launch/xdino_launch/bench/reference.py"}  # a checkout of the published code
    named = {
        path
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute | ast.Name | ast.alias)
        and {getattr(node, field, None) for field in ("attr", "id", "name")}
        & {"import_module", "__import__"}
    }
    assert named - foreign == set()


def test_every_package_has_its_contract():
    """import-linter's layers; a package of one module has none to put in order."""
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layered = {name for contract in told["contracts"] for name in contract.get("containers", [])}
    assert all(
        contract.get("exhaustive") for contract in told["contracts"] if "containers" in contract
    )
    wings = {
        ".".join(package.relative_to(ROOT).parts[1:])
        for package in PACKAGES
        if len([path for path in package.glob("*.py") if not path.stem.startswith("__")]) > 1
    }
    assert wings - layered == set()


# What the README and docs/ promise


def test_what_the_pages_import_is_there():
    pages = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    blocks = [
        block
        for page in pages
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    ]
    assert "## From Python" in pages[0].read_text()
    imports = [
        (node.module, alias.name)
        for block in blocks
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert len(imports) >= 7
    for module, name in imports:
        assert hasattr(importlib.import_module(module), name), (module, name)


def test_what_is_cited_is_this_version():
    import yaml

    import xdino

    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == xdino.__version__
    assert cited["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "license"} <= set(cited)


# Recipes


def test_every_recipe_parses_and_is_found():
    names = config.recipes()
    assert {"demo", "debug", "fashion_mnist", "small_data", "imagenet_s12_p16"} <= set(names)
    for name in names:
        config.load(name)
    others = config.recipes("finetune")
    assert {"finetune_small", "finetune_imagenet_s12_p16", "finetune_cifar10"} <= set(others)
    assert {"segment_small", "segment_ade20k_fpn_s12_p16"} <= set(config.recipes("segment"))
    assert {"detect_small", "detect_coco_s12_p16"} <= set(config.recipes("detect"))
    for kind in set(config.KINDS) - {"pretrain"}:
        for name in config.recipes(kind):
            config.load(name, None, schema_of(kind))
            names.append(name)
    assert sorted(names) == config.recipes(None)


def test_every_recipe_says_how_to_run_it_and_what_to_expect():
    for name in config.recipes(None):
        header = (config.recipes_dir() / f"{name}.yaml").read_text().split("\n\n")[0]
        for word in ("command:", "hardware:", "hours:", "expected:"):
            assert word in header, (name, word)
        assert name in header


def test_every_recipe_s_command_is_understood(xdino):
    for name in config.recipes(None):
        (line,) = [
            line
            for line in (config.recipes_dir() / f"{name}.yaml").read_text().splitlines()
            if line.startswith("# command:")
        ]
        words = line.removeprefix("# command:").split()
        assert words[0] == "xdino", line
        if words[1] in config.KINDS:
            code, told, error = xdino(*words[1:], "--print-config")
            assert (code, error) == (0, ""), line
            assert told.startswith("model:" if words[1] == "pretrain" else f"kind: {words[1]}\n")


def test_torchrun_is_never_given_an_option_that_it_takes_for_its_own():
    """It reads --run as --run-path, and does not start; --run-dir reaches us."""
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("configs/*.yaml")):
        text = path.read_text().replace("\\\n", " ")
        for line in text.splitlines():
            if "torchrun" in line or "distributed.run" in line:
                assert " --run " not in line, (path.name, line)
