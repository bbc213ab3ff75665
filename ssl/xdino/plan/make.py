"""From a configuration to its plan: data opened, networks named, schedules laid out, all proven."""

import dataclasses

from xdino import augment, data
from xdino.config import Config
from xdino.errors import UsageError, asked
from xdino.plan.crops import crops_of
from xdino.plan.measured import measured
from xdino.plan.networks import spec_of
from xdino.plan.plan import Plan
from xdino.plan.proof import prove
from xdino.plan.schedules import schedules_of
from xdino.runtime.device import check_compile, resolve_device, resolve_precision
from xdino.values import shown


def make_plan(config: Config, world_size: int = 1, precision: str | None = None) -> Plan:
    """Open the data, work everything out, and prove that the run can start; nothing is written.

    Args:
        precision: what "auto" was found to be by all processes, or by the run that is continued.

    Raises:
        UsageError: whatever cannot be done as configured.
    """
    if not config.data.path:
        raise UsageError("data.path is not set: name the images with --data.path FOLDER")
    device = resolve_device(config.runtime.device)
    check_compile(config.runtime.compile, device)
    precision = precision or resolve_precision(config.train.precision, device)
    with asked(f"cannot open data.path {shown(config.data.path)}"):
        source = data.open_source(
            config.data.path,
            split="train",
            channels=config.channels,
            max_pixels=config.data.max_pixels,
        )
    config = measured(config, source)
    spec = spec_of(config, source.channels)
    crops = crops_of(config, spec)
    total_batch = config.train.batch_size * config.train.accumulate * world_size
    steps = data.steps_per_epoch(len(source), total_batch, config.train.images_per_epoch)
    laid_out = schedules_of(config, steps, total_batch)
    early = config.curriculum
    plan = Plan(
        config,
        source,
        crops,
        spec,
        laid_out,
        device,
        precision,
        total_batch,
        steps,
        augment.at_sizes(crops, early.global_size, early.local_size) if early.share else None,
        round(early.share * config.train.epochs * steps),
    )
    return dataclasses.replace(plan, state_bytes=prove(plan, world_size))
