"""`xdino submit`: a pretraining run on a SLURM cluster, through submitit.

One task a GPU; each task finds the others from what SLURM says. When SLURM is about to end the job,
submitit puts the same job into the queue again, which continues the run from its last checkpoint.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xdino.errors import UsageError


@dataclass(frozen=True)
class PretrainingJob:
    """What each task runs. Pickled by submitit, so it holds plain values only."""

    config: str
    overrides: Mapping[str, str]
    run_dir: str

    def __call__(self) -> str:
        import submitit

        from xdino import config
        from xdino_launch.local import run_pretraining

        # RANK, WORLD_SIZE, MASTER_ADDR and the rest, as torchrun would set them.
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        resolved = config.load(self.config, self.overrides)
        return str(run_pretraining(resolved, self.run_dir, command=["submit", self.config]))

    def checkpoint(self) -> Any:
        """What submitit puts into the queue when SLURM preempts the job or its time is up."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def submit(
    job: PretrainingJob,
    nodes: int = 1,
    gpus_per_node: int = 8,
    cpus_per_gpu: int = 10,
    hours: float = 24.0,
    partition: str | None = None,
    cluster: str | None = None,
    extra: Mapping[str, str] | None = None,
) -> Any:
    """Hand the job to the cluster; returns submitit's job, which has its number and awaits its end.

    Logs go to `RUN-slurm/` beside the run.

    Args:
        hours: of one submission; the run is submitted again until it is done.
        cluster: None for SLURM where there is one; "local" runs it here (for trying out).
        extra: more SLURM parameters, {"account": "..."}.

    Raises:
        UsageError: submitit is not installed, or there is no SLURM here.
    """
    try:
        import submitit
    except ImportError:
        raise UsageError("submit needs submitit: pip install 'xdino[slurm]'") from None
    # Found out now rather than in the queue: the recipe, its keys, and what the folder holds.
    from xdino import config
    from xdino.run import RunDirectory

    RunDirectory(job.run_dir).resolve(config.load(job.config, job.overrides))
    logs = Path(job.run_dir).resolve().parent / f"{Path(job.run_dir).name}-slurm"
    try:
        executor = submitit.AutoExecutor(folder=logs, cluster=cluster, slurm_max_num_timeout=1000)
    except RuntimeError as error:
        raise UsageError(f"cannot submit here: {error}") from None
    parameters: dict[str, Any] = {
        "name": Path(job.run_dir).name,
        "nodes": nodes,
        "tasks_per_node": max(gpus_per_node, 1),
        "gpus_per_node": gpus_per_node,
        "cpus_per_task": cpus_per_gpu,
        "timeout_min": round(hours * 60),
        "slurm_signal_delay_s": 120,
    }
    if partition is not None:
        parameters["slurm_partition"] = partition
    if extra:
        parameters["slurm_additional_parameters"] = dict(extra)
    executor.update_parameters(**parameters)
    os.environ.setdefault("OMP_NUM_THREADS", str(cpus_per_gpu))
    return executor.submit(job)
