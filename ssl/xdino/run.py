"""A run directory: what it holds, whether it may be started, continued or left alone.

config.yaml               the resolved configuration
environment.json          every start: iteration, commit, versions, device, processes, seed
metrics.jsonl             see `metrics`
unreadable.jsonl          images that could not be read, if any: index, image, reason, iteration
views.png                 the first batch as the networks saw it
checkpoints/last.pt       the whole state; checkpoints/epoch_0020.pt and so on are kept
checkpoints/initial.safetensors   the teacher before the first step
backbone.safetensors      the teacher, refreshed with every checkpoint
results.json, attention/  what the evaluations add
"""

import json
import platform
import subprocess
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from xdino import checkpoint, files
from xdino import config as configuration
from xdino.config import Config
from xdino.data import BadImage
from xdino.errors import UsageError
from xdino.metrics import check_writable

CONFIG_FILE = "config.yaml"
UNREADABLE_FILE = "unreadable.jsonl"
INITIAL_FILE = Path("checkpoints") / "initial.safetensors"


def commit() -> str:
    """The commit of the checkout that this code runs from, "+changes" behind it if it was edited."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return "not a checkout"
    try:
        head, status = (
            subprocess.run(
                ["git", "-C", str(root), *command], capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if status else "")


def environment(device: torch.device, world_size: int, seed: int) -> dict[str, Any]:
    """What a result may depend on besides the configuration."""
    packages = ("torch", "torchvision", "timm", "numpy", "pillow", "simplejpeg", "faiss-cpu")
    on_cuda = device.type == "cuda"
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: metadata.version(name) for name in ("xdino", *packages)},
        "device": torch.cuda.get_device_name(device) if on_cuda else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "processes": world_size,
        "seed": seed,
    }


class RunDirectory:
    """The folder of a run, opened for a configuration.

    Raises:
        UsageError: the folder holds something else, or a run of another configuration (the message
            names the differing keys). Nothing in it is touched.
        RunFailed: its checkpoint is damaged.
    """

    def __init__(self, path: str | Path, config: Config) -> None:
        self.path = Path(path)
        self.config = config
        self.state: dict[str, Any] | None = None
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise UsageError(f"{self.path} is a file; --run needs a folder")
        if not (self.path / CONFIG_FILE).exists():
            if any(self.path.iterdir()):
                raise UsageError(
                    f"{self.path} is not empty and not a run (it has no {CONFIG_FILE}): "
                    "choose another folder"
                )
            return
        before = configuration.load(str(self.path / CONFIG_FILE))
        differing = configuration.differing_keys(before, config)
        if differing:
            raise UsageError(
                f"{self.path} holds a run of another configuration (there against here): "
                f"{', '.join(differing)}. Continue it with its own {CONFIG_FILE}, "
                "or choose another folder"
            )
        if (self.path / checkpoint.STATE_FILE).exists():
            self.state = checkpoint.load_state(self.path / checkpoint.STATE_FILE)

    @property
    def iteration(self) -> int:
        """Completed updates; 0 for a new run."""
        return self.state["iteration"] if self.state else 0

    def create(self) -> None:
        """Make the folder and write its configuration, before anything else is put there."""
        check_writable(self.path)
        for left in self.path.rglob(".*.tmp"):  # of a process that was killed while writing
            left.unlink(missing_ok=True)
        (self.path / CONFIG_FILE).write_text(configuration.to_yaml(self.config))

    def record_start(self, facts: dict[str, Any]) -> None:
        """Add one start to environment.json."""
        path = self.path / "environment.json"
        starts = json.loads(path.read_text())["starts"] if path.exists() else []
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        starts.append({"iteration": self.iteration, "time": started, **facts})
        with files.written_beside(path) as beside:
            beside.write_text(json.dumps({"starts": starts}, indent=2) + "\n")

    def unreadable(self) -> list[BadImage]:
        """The images that earlier starts of this run could not read."""
        path = self.path / UNREADABLE_FILE
        found = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
                found.append(BadImage(int(row["index"]), str(row["image"]), str(row["reason"])))
            except (ValueError, KeyError, TypeError):
                continue  # a line cut short when the process was killed
        return found

    def add_unreadable(self, images: Iterable[BadImage], iteration: int) -> None:
        """Add images to the list, by their index; none twice."""
        known = {image.index for image in self.unreadable()}
        new = {image.index: image for image in images if image.index not in known}
        rows = [
            {"index": i, "image": new[i].where, "reason": new[i].why, "iteration": iteration}
            for i in sorted(new)
        ]
        if rows:
            with open(self.path / UNREADABLE_FILE, "a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))

    def save(self, state: dict[str, Any]) -> None:
        checkpoint.save_state(self.path / checkpoint.STATE_FILE, state)
