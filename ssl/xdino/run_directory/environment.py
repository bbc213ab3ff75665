"""What a result may depend on besides the configuration: code, versions, machine."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def commit() -> str:
    """The commit of the checkout that this code runs from, "+changes" behind it if it was edited."""
    root = Path(__file__).parents[3]
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
