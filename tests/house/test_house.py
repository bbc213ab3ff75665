"""The shape of the house: the standard library's ssl survives, recipes are found, imports run one way."""

import subprocess
import sys
from pathlib import Path

from xdino import config

ROOT = Path(__file__).parents[2]


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


def test_every_recipe_parses_and_is_found():
    names = config.recipes()
    assert {"demo", "debug", "fashion_mnist", "small_data", "imagenet_s12_p16"} <= set(names)
    for name in names:
        config.load(name)


def test_every_recipe_says_how_to_run_it_and_what_to_expect():
    for name in config.recipes():
        header = (config.recipes_dir() / f"{name}.yaml").read_text().split("\n\n")[0]
        for word in ("command:", "hardware:", "hours:", "expected:"):
            assert word in header, (name, word)
        assert name in header


def test_every_recipe_s_command_is_understood(xdino):
    for name in config.recipes():
        (line,) = [
            line
            for line in (config.recipes_dir() / f"{name}.yaml").read_text().splitlines()
            if line.startswith("# command:")
        ]
        words = line.removeprefix("# command:").split()
        assert words[0] == "xdino", line
        if words[1] == "pretrain":
            code, told, error = xdino(*words[1:], "--print-config")
            assert (code, error) == (0, ""), line
            assert told.startswith("model:")


def test_torchrun_is_never_given_an_option_that_it_takes_for_its_own():
    """It reads --run as --run-path, and does not start; --run-dir reaches us."""
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("configs/*.yaml")):
        text = path.read_text().replace("\\\n", " ")
        for line in text.splitlines():
            if "torchrun" in line or "distributed.run" in line:
                assert " --run " not in line, (path.name, line)
