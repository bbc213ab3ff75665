"""Submission through submitit, on its local executor: SLURM itself is not at hand in a test."""

import pytest

from xdino import checkpoint
from xdino.errors import UsageError
from xdino_launch import cli
from xdino_launch.slurm import PretrainingJob, submit

SMALL = {"train.batch_size": "2500", "crops.global_size": "12", "crops.local_count": "0",
         "evaluate.every": "0"}  # fmt: skip


@pytest.mark.slow
def test_a_submitted_job_pretrains(tmp_path):
    job = PretrainingJob("debug", SMALL, str(tmp_path / "run"))
    # The job that `submit` returns waits for its process; one made from its number waits 15 s.
    submitted = submit(job, gpus_per_node=0, cpus_per_gpu=1, hours=0.2, cluster="local")
    assert submitted.result().endswith("backbone.safetensors")
    assert checkpoint.load_backbone(tmp_path / "run").weights["iteration"] == 4
    assert (tmp_path / "run-slurm" / f"{submitted.job_id}_0_log.err").is_file()
    again = job.checkpoint()
    assert again.function is job


def test_mistakes_are_found_before_the_queue(tmp_path, capsys):
    with pytest.raises(UsageError, match=r"optim\.lrr"):
        submit(PretrainingJob("debug", {"optim.lrr": "1"}, str(tmp_path / "run")), cluster="local")
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UsageError, match="not a run"):
        submit(PretrainingJob("debug", {}, str(tmp_path)), cluster="local")
    with pytest.raises(SystemExit) as stop:
        cli.main(["submit", "debug", "--run", str(tmp_path / "r"), "--slurm", "account"])
    assert stop.value.code == 2
    assert "KEY=VALUE" in capsys.readouterr().err
