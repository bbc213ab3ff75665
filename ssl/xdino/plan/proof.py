"""Proof that a plan can start: its networks take its crops, and there is room for them."""

import dataclasses
from pathlib import Path

from torch import nn

from xdino.backbones import of_timm
from xdino.config import Config
from xdino.errors import UsageError
from xdino.plan import feasibility
from xdino.plan.networks import build_head
from xdino.plan.plan import Plan


def prove(plan: Plan, world_size: int) -> int:
    """Networks that take the crops, and fit: the bytes of a checkpoint.

    Raises:
        UsageError: they do not; the message names the key and the nearest size.
    """
    config, spec = plan.config, plan.spec
    _check_strangers(config, config.train.batch_size * world_size)
    backbone = feasibility.on_meta(lambda: spec.build(drop_path=config.model.drop_path))
    head = feasibility.on_meta(lambda: build_head(config.head, backbone.embed_dim, config.loss))
    student = nn.ModuleList([backbone, head])
    state = feasibility.state_bytes(student, config.optim.name)
    feasibility.check_memory(
        "networks, gradients and optimiser",
        state + feasibility.trained_bytes(student),
        plan.device,
        "take a smaller model.arch, or fewer head.prototypes",
    )
    for section, crops in (("crops", plan.crops), ("curriculum", plan.early_crops)):
        pixels = sum(view.size**2 for view in crops.views) if crops else 0
        feasibility.check_memory(
            "the crops of a micro-batch",
            4 * config.train.batch_size * spec.in_chans * pixels,
            plan.device,
            f"lower train.batch_size, {section}.global_size or crops.local_count",
        )

    def rebuilt(size: int) -> nn.Module:
        return feasibility.on_meta(dataclasses.replace(spec, input_size=size).build)

    own = (spec.input_size, of_timm(spec.arch).input_size)
    trials = _trials(plan, world_size)
    feasibility.check_sizes(backbone, spec.arch, spec.in_chans, trials, rebuilt, own, spec.build)
    return state


def _check_strangers(config: Config, images: int) -> None:
    """Raises UsageError where a term compares the images of a micro-batch and there is one alone."""
    loss = config.loss
    for key, compares in (
        (f"loss.objective {loss.objective}", loss.objective != "dino"),
        (f"loss.koleo {loss.koleo:g}", loss.koleo > 0),
    ):
        if compares and images < 2:
            raise UsageError(
                f"{key} compares the images of a micro-batch, and train.batch_size is 1: raise it"
            )


def _trials(plan: Plan, world_size: int) -> list[feasibility.Trial]:
    """The forward passes of a run: each crop size in training, and the size of its evaluations."""
    config, size = plan.config, plan.spec.input_size
    judged = feasibility.Trial("evaluate.input_size", size, 1, training=False, builds=True)
    trials = [judged] if config.evaluate.input_size else []
    images = config.train.batch_size * world_size
    for section, crops in (("crops", plan.crops), ("curriculum", plan.early_crops)):
        for place, (size, views) in enumerate(crops.groups if crops else ()):
            key = f"{section}.{'local' if place else 'global'}_size"
            builds = key == "crops.global_size" and not config.evaluate.input_size
            trials.append(feasibility.Trial(key, size, min(images * views, 2), builds=builds))
    return trials


def check_disk(plan: Plan, run_dir: str | Path) -> None:
    """Raises UsageError where the disk has no room for the newest checkpoints of the run."""
    states = plan.config.runtime.keep_last
    feasibility.check_disk(Path(run_dir), states * plan.state_bytes, states)
