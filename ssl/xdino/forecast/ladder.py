"""Networks and crops that `choices` climbs through, and every constant of its rules.

A rung is a network with its crops and batch. The better a machine and the longer the time, the higher
the rung: each names how many updates it needs before it is worth its price. Where a number was tried,
its line says so; the others follow a published recipe, or are marked as not measured.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from xdino.forecast.facts import Images, Machine


@dataclass(frozen=True)
class Family:
    """What belongs together beside the network: keys, values and reasons.

    Args:
        lr: peak at a total batch of 256. least, most: bounds of the peak that it comes to.
        keys: dotted key -> (value, reason).
    """

    lr: float
    least: float
    most: float
    keys: Mapping[str, tuple[str, str]] = field(default_factory=dict)


SHORT = "few updates: a mild schedule"

#: Images of the size of thumbnails: the demo's recipe.
SMALL = Family(
    lr=8.0e-3,  # the demo: 2e-3 at 64 images
    least=1.25e-4,  # not measured
    most=2.0e-3,  # the demo
    keys={
        "model.drop_path": ("0.0", "a small network: nothing to drop"),
        "model.tokens_norm": ("true", "as in all XCiTs but nano"),
        "head.hidden_dim": ("256", "as wide as such a network needs (the demo)"),
        "head.bottleneck_dim": ("64", "as the width of the network (the demo)"),
        "head.use_bn": ("true", "tells images apart from the first step on (the demo)"),
        "crops.global_blur": ("0.0,0.0", "a pixel here is what a patch is elsewhere"),
        "crops.global_solarize": ("0.0,0.0", "garments were learned better without (the demo)"),
        "crops.local_blur": ("0.0", "a pixel here is what a patch is elsewhere"),
        "crops.local_scale": ("0.15,0.5", "smaller parts of so few pixels show nothing"),
        "optim.weight_decay_end": ("0.04", SHORT),
    },
)

#: Photographs at 64 pixels: what the learning board trains. The rest are the published defaults, which
#: it keeps: drop path, head, colours, blur, scales.
SHRUNK = Family(
    lr=2.0e-3,  # four times the published: 2.5e-4 at 32 images
    least=2.5e-4,  # where it was tried: smaller batches keep it
    most=2.0e-3,
    keys={"loss.objective": ("simdino", "learned more a minute than prototypes, on the board")},
)

#: The same with prototypes, for who asks for them.
SHRUNK_WITH_PROTOTYPES = Family(
    lr=5.0e-4,  # published; 6.25e-5 at 32 images, where 5e-4 made features fall after an epoch
    least=6.25e-5,  # where it was tried last: smaller batches keep it
    most=5.0e-4,  # the published peak at 256
)

#: Photographs at their own size: the published recipe of XCiT.
PUBLISHED = Family(
    lr=5.0e-4,
    least=6.25e-5,
    most=2.0e-3,  # published for XCiT-S12 at 1,024 images
    keys={
        "model.drop_path": ("0.05", "published for XCiT-S12"),
        "head.norm_last_layer": ("false", "published for XCiT: does better"),
        "loss.teacher_temp": ("0.07", "published for XCiT"),
        "loss.warmup_teacher_temp": ("0.04", "published for XCiT"),
        "loss.warmup_teacher_temp_epochs": ("10%", "30 of 300 epochs, as published"),
        "crops.global_scale": ("0.3,1.0", "published for XCiT"),
        "crops.local_scale": ("0.05,0.3", "published for XCiT"),
        "optim.min_lr": ("1.0e-5", "published for XCiT"),
    },
)


@dataclass(frozen=True)
class Rung:
    """A network, its crops and its batch.

    Args:
        shape: keys of `model` that differ from the name's.
        cost: seconds that one core, or one GPU, takes for an image in bf16, crops and all. Only to
            begin with: the steps that are timed decide.
        updates: that it needs at least.
        least_side: of the images, in pixels.
        bytes_an_image: of memory, about, while it trains.
    """

    arch: str
    patch: int
    global_size: int
    local_size: int
    local_count: int
    batch: int
    family: Family
    cost: float
    updates: int
    least_side: int
    bytes_an_image: int
    shape: Mapping[str, str] = field(default_factory=dict)
    why: str = ""


def _rung(name: str, sizes: tuple[int, int, int, int, int], family: Family, cost: float,
          updates: int, least_side: int, megabytes: int, why: str, **shape: str) -> Rung:  # fmt: skip
    patch, global_size, local_size, local_count, batch = sizes
    return Rung(name, patch, global_size, local_size, local_count, batch, family, cost, updates,
                least_side, megabytes * 2**20, shape, why)  # fmt: skip


NANO, TINY, SMALL_12 = "xcit_nano_12", "xcit_tiny_12", "xcit_small_12"

# The sizes are patch, global and local crops in pixels, local crops, images of a batch. Costs on a
# CPU: CPU seconds of Zen 5, measured for the last four; the first two are not measured. Costs on a GPU:
# not measured (bytes and FLOPs of an H200, with a margin).
# least_side: local crops of large networks want details that small images do not have.
ON_CPU = (
    _rung(f"{TINY}_p16", (16, 224, 96, 6, 32), PUBLISHED, 0.25, 30_000, 192, 300,
          "many cores, or a long time: the published crops"),
    _rung(f"{TINY}_p8", (8, 96, 48, 4, 32), SHRUNK, 0.065, 20_000, 96, 120,
          "time enough for crops of 96 pixels", depth="4"),
    _rung(f"{TINY}_p8", (8, 64, 32, 4, 32), SHRUNK, 0.025, 300, 48, 60,
          "what a CPU trains in minutes: crops of 64 pixels, 8 by 8 patches", depth="4"),
    _rung(f"{NANO}_p8", (8, 64, 32, 2, 32), SHRUNK, 0.009, 0, 48, 30,
          "little time: a network of two blocks", depth="2", tokens_norm="true"),
    _rung(f"{NANO}_p4", (4, 32, 16, 2, 64), SMALL, 0.0033, 150, 0, 15,
          "small images want small patches, and as many tokens (the demo's network)",
          embed_dim="64", depth="3", num_heads="2"),
    _rung(f"{NANO}_p4", (4, 32, 16, 2, 64), SMALL, 0.0018, 0, 0, 10,
          "little time: the demo's network with one block",
          embed_dim="64", depth="1", num_heads="2"),
)  # fmt: skip
ON_GPU = (
    _rung(f"{SMALL_12}_p16", (16, 224, 96, 8, 64), PUBLISHED, 0.002, 100_000, 192, 420,
          "time enough for the published network and crops"),
    _rung(f"{TINY}_p16", (16, 224, 96, 6, 64), PUBLISHED, 0.001, 5_000, 160, 300,
          "the smaller of the published networks, at the published crops"),
    _rung(f"{TINY}_p8", (8, 64, 32, 4, 64), SHRUNK, 0.0005, 0, 48, 60,
          "crops of 64 pixels, 8 by 8 patches", depth="4"),
    _rung(f"{NANO}_p4", (4, 32, 16, 2, 64), SMALL, 0.0003, 0, 0, 15,
          "small images want small patches, and as many tokens (the demo's network)",
          embed_dim="64", depth="3", num_heads="2"),
)  # fmt: skip

SLOWER_IN_FP32 = 1.8  # 1.3 to 2.1 measured on Zen 5; emulated bf16 is never taken
SMALL_BELOW = 48  # pixels of the shorter side: below, patches of 4
MEMORY_SHARE = 0.7  # of what is free, for a batch

#: Prototypes by the number of images: up to so many images, so many. The demo's 1,024, the board's
#: 2,048 and the published 65,536 were tried; what lies between is not measured.
PROTOTYPES = ((20_000, 1024), (100_000, 2048), (1_000_000, 4096), (2**40, 65_536))
MOST_ON_CPU = 2048  # prototypes: the last layer's time grows with them
#: Momentum by the number of updates: an average over 1 / (1 - m) of them must fit in the run often.
MOMENTUM = ((10_000, 0.99), (50_000, 0.996), (2**40, 0.9995))
FEW_EPOCHS = 10  # below, the last layer is free from the start
WARM_UP = "10%"  # of the run; the published 10 of 100 epochs
CHECKPOINT_SECONDS = 300  # between states, where epochs are longer
KEPT_STATES = 5  # copies along the way


def ladder(images: Images, machine: Machine, objective: str | None = None) -> list[Rung]:
    """The rungs for such images on such a machine, the largest network first.

    Args:
        objective: that a person has set (`loss.objective`); None for the rung's own.
    """
    rungs = ON_GPU if machine.device == "cuda" else ON_CPU
    small = images.side < SMALL_BELOW
    fit = [
        rung for rung in rungs if images.side >= rung.least_side and (rung.family is SMALL) == small
    ]
    if objective in (None, "simdino"):
        return fit
    return [
        replace(rung, family=SHRUNK_WITH_PROTOTYPES) if rung.family is SHRUNK else rung
        for rung in fit
    ]


def first_rung(rungs: list[Rung], machine: Machine, images: Images, seconds: float | None) -> int:
    """The highest rung that the seconds are enough for by its estimate; None: no bound.

    Without a bound of time it is the one for an epoch an hour: nobody asked for more than to begin.
    """
    least = images.count if seconds is None else 0
    seconds = 3600.0 if seconds is None else seconds
    for place, rung in enumerate(rungs):
        speed = machine.processes * (machine.cores if machine.device == "cpu" else 1) / rung.cost
        speed /= 1 if machine.bf16 else SLOWER_IN_FP32
        if speed * seconds >= max(rung.updates * rung.batch, least):
            return place
    return len(rungs) - 1
