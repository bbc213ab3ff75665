"""How long training waits for a state: until it is on the disk, and until it is copied.

    python tests/benchmarks/saving.py [FOLDER] [--arch xcit_small_12_p16] [--prototypes 65536]

Student, teacher, AdamW's moments and the centre of a run, written into FOLDER (a temporary one beside
the current folder) as the loop does: once while it waits, then by the thread, three times, so that the
memory of the copy is fresh the first time and used again after. A row of JSON for each: begun_s is
what training waits for in any case, copied_s until everything may move, which a step's forward and
backward passes hide if they take as long.
"""

import argparse
import json
import os
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from xdino import checkpoint, config
from xdino.backbones import BackboneSpec
from xdino.learner import Learner
from xdino.loss import DINOLoss
from xdino.plan import build_head
from xdino.run_directory import RunDirectory
from xdino.run_directory.background import StateWriter
from xdino.student_teacher import MultiCropNetwork, make_teacher


def learner_of(arch: str, prototypes: int) -> Learner:
    """With moments, as after a step."""
    head = config.parse({"head": {"prototypes": prototypes}}).head
    backbone = BackboneSpec(arch).build()
    student = MultiCropNetwork(backbone, build_head(head, backbone.embed_dim))
    teacher = make_teacher(student, BackboneSpec(arch).build())
    learner = Learner(student, teacher, DINOLoss(prototypes))
    for p in student.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    learner.stepping.optimiser.step()
    return learner


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", default=".")
    parser.add_argument("--arch", default="xcit_small_12_p16")
    parser.add_argument("--prototypes", type=int, default=65536)
    given = parser.parse_args()
    learner = learner_of(given.arch, given.prototypes)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        run = RunDirectory(Path(folder))
        writer = StateWriter(run, 2, lambda iteration: None)
        spec, backbone = BackboneSpec(given.arch), learner.teacher.backbone
        export = partial(checkpoint.save_backbone, model=backbone, spec=spec, role="teacher")

        def state() -> dict:
            return {"iteration": 1, "learner": learner.state_dict(), "config": {}}

        def tell(how: str, begun: float, copied: float, wrote: float) -> None:
            told = {"begun_s": begun, "copied_s": copied, "wrote_s": wrote, "share": begun / wrote}
            told = {name: round(value, 4) for name, value in told.items()}
            size = round(run.state_file.stat().st_size / 1e6)
            load = os.getloadavg()[0]
            print(json.dumps({"how": how, **told, "megabytes": size, "load": load}), flush=True)

        began = time.perf_counter()
        writer.begin(1, state(), export, None)
        whole = time.perf_counter() - began
        tell("waiting", whole, whole, whole)
        for number in range(3):
            began = time.perf_counter()
            writer.begin(2 + number, state(), export, export)
            begun = time.perf_counter() - began
            writer.copied()
            copied = time.perf_counter() - began
            writer.wait()
            tell(f"by the thread, {number + 1}", begun, copied, time.perf_counter() - began)


if __name__ == "__main__":
    main()
