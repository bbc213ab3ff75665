"""Whether a launcher started this process as one of several, and where they meet.

torchrun and `xdino pretrain --gpus` say so in RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT, SLURM's srun in variables of its own. Nothing here needs torch.
"""

import os
import re
from collections.abc import Mapping

from xdino.errors import UsageError

# How long processes wait for each other at the start, in seconds; nodes that wait are paid for.
LIMIT_VARIABLE = "XDINO_RENDEZVOUS_SECONDS"
LIMIT_SECONDS = 600.0


def local_rank() -> int:
    return whole_number(os.environ, "LOCAL_RANK", 0)


def whole_number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch(r"\d{1,9}", text.strip()):
        raise UsageError(
            f"the environment variable {name} must be a whole number, got {text!r}: launch with "
            "torchrun or `xdino pretrain --gpus N`, or unset WORLD_SIZE for a single process"
        )
    return int(text)


def described(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """(rank, world size) that the environment describes, None for a process on its own.

    Raises:
        UsageError: half a description, which would otherwise be several lone runs on one folder.
    """
    if "WORLD_SIZE" not in environment:
        return None
    world = whole_number(environment, "WORLD_SIZE")
    if world == 1:
        return None
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing or world < 1:
        what = f"{' and '.join(missing)} not" if missing else "a size of 0"
        raise UsageError(
            f"WORLD_SIZE is {world}, but {what} set: launch with torchrun or "
            "`xdino pretrain --gpus N`, or unset WORLD_SIZE for a single process"
        )
    here = whole_number(environment, "RANK")
    port = whole_number(environment, "MASTER_PORT")
    if here >= world or not 0 < port < 2**16:
        raise UsageError(
            f"RANK {here} of WORLD_SIZE {world} at port {port} cannot be: ranks count from 0, "
            "ports end at 65535"
        )
    return here, world


def from_slurm(environ: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would set, from what SLURM's srun has set for this task of several.

    Empty for a process on its own, in the batch script itself, and where a launcher set WORLD_SIZE.
    MASTER_ADDR and MASTER_PORT stay what they are where they are set. The port follows from job,
    step and restart: a job that is queued again does not meet what its last start left behind.

    Raises:
        UsageError: SLURM says that there are several tasks, but not which of them this is, or where.
    """
    step = "SLURM_STEP_NUM_TASKS" in environ
    count = environ.get("SLURM_STEP_NUM_TASKS" if step else "SLURM_NTASKS", "1")
    # The batch script is told of its tasks as well, and is none of them.
    script = not step and environ.get("ENVIRONMENT") == "BATCH"
    if "WORLD_SIZE" in environ or "SLURM_PROCID" not in environ or count == "1" or script:
        return {}
    rank, local = environ["SLURM_PROCID"], environ.get("SLURM_LOCALID", "")
    nodes = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    hosts = next((environ[name] for name in nodes if environ.get(name)), "")
    if not (count.isdecimal() and rank.isdecimal() and local.isdecimal() and hosts):
        raise UsageError(
            f"SLURM started this as task {rank} of {count}, but SLURM_LOCALID or "
            "SLURM_STEP_NODELIST does not say where: start it with srun, or set RANK, WORLD_SIZE, "
            "LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
        )
    starts = {"SLURM_JOB_ID": 101, "SLURM_RESTART_COUNT": 13, "SLURM_STEP_ID": 7}
    apart = sum(factor * whole_number(environ, name, 0) for name, factor in starts.items())
    return {
        "RANK": rank,
        "WORLD_SIZE": count,
        "LOCAL_RANK": local,
        "MASTER_ADDR": environ.get("MASTER_ADDR") or first_host(hosts),
        # Below the ports that the kernel gives to outgoing connections.
        "MASTER_PORT": environ.get("MASTER_PORT") or str(10_000 + apart % 20_000),
    }


def first_host(hosts: str) -> str:
    """The first of SLURM's list of hosts.

    >>> first_host("node[03-05,9],login1")
    'node03'
    """
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])*", hosts.strip())
    assert first is not None  # it matches the empty string
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group())
