"""What the documents print runs as it is printed: in a folder with a few images, offline, on a CPU."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from xdino.backbones import BackboneSpec
from xdino_transfer.classification.classifier import Classifier
from xdino_transfer.classification.files import write_classifier

SHAPE = {"embed_dim": 16, "depth": 1, "num_heads": 2}
ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
OFFLINE = "import socket\nsocket.socket.connect = None\n"


def snippets(document: Path) -> list[str]:
    """The blocks that begin with an import of ours; fragments of others' code are none."""
    found = BLOCK.findall(document.read_text(encoding="utf-8"))
    return [
        block for block in found if re.search(r"^import xdino(_transfer)?\b", block, re.MULTILINE)
    ]


DOCUMENTS = [
    path for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))) if snippets(path)
]


@pytest.fixture
def laptop(tmp_path, paint, classes) -> Path:
    """A folder with photos/ and classes/, and a classifier in runs/tuned/."""
    spec = BackboneSpec("xcit_nano_12_p8", shape=SHAPE, input_size=32, resize=32)
    tuned = Classifier(spec.build(), spec, ("cat", "dog"))
    write_classifier(tmp_path / "runs" / "tuned" / "model.safetensors", tuned, {"iteration": 7})
    for number in range(8):
        paint(tmp_path / "photos" / f"{number}.png", number)
    shutil.copytree(classes, tmp_path / "classes")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_snippets_of_a_document_run(document, laptop):
    """One after the other in one folder, each in its own names, in one process: torch is heavy."""
    blocks = snippets(document)
    code = OFFLINE + "for block in __import__('json').load(open('blocks.json')):\n"
    code += (
        "    print(block)\n    exec(compile(block, 'snippet', 'exec'), {'__name__': 'snippet'})\n"
    )
    (laptop / "blocks.json").write_text(json.dumps(blocks))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=laptop, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def test_there_are_snippets_and_python_understands_them():
    assert ROOT / "docs" / "python.md" in DOCUMENTS
    for document in DOCUMENTS:
        for block in snippets(document):
            compile(block, document.name, "exec")


def test_importing_xdino_brings_no_torch():
    code = "import sys, xdino, xdino_eval, xdino_transfer\n"
    code += "print(sorted({'torch', 'numpy', 'timm'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
