"""A recipe for a person's own images: from what they are, where they train and for how long.

Pure: the same facts give the same choices. Each is a key of the configuration with its value, as the
command line takes it, and the reason for it in a sentence. What a person has set is left alone, and
the rest goes by it. Every number of the rules stands in `ladder`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from xdino import config as configuration
from xdino.config import Config
from xdino.forecast import ladder
from xdino.forecast.facts import Images, Machine
from xdino.forecast.ladder import PUBLISHED, SHRUNK, SMALL, Rung

GIVEN = "given"


@dataclass(frozen=True)
class Choice:
    """key: dotted. value: as on the command line."""

    key: str
    value: str
    reason: str


def choose(
    images: Images,
    machine: Machine,
    rung: Rung,
    updates: int,
    epochs: int,
    given: Mapping[str, str],
) -> list[Choice]:
    """Every key that is not left to its default, in the order of the configuration.

    Args:
        updates, epochs: that the run is going to make, about.
        given: dotted keys that a person has set; they are listed as such.
    """
    found: dict[str, Choice] = {}
    for key, value, reason in _all(images, machine, rung, updates, epochs, given):
        found.setdefault(key, Choice(key, value, reason))
    for key, value in given.items():
        found[key] = Choice(key, value, GIVEN)
    order = {key: place for place, key in enumerate(configuration.dotted_keys())}
    return sorted(found.values(), key=lambda choice: order.get(choice.key, len(order)))


def configured(choices: Sequence[Choice]) -> Config:
    """The recipe that they are.

    Raises:
        UsageError: a key or a value of a person's is none.
    """
    tree: dict[str, dict[str, str]] = {}
    for choice in choices:
        section, _, leaf = choice.key.partition(".")
        tree.setdefault(section, {})[leaf] = choice.value
    return configuration.parse(tree, "pretrain auto")


def settings_of(given: Mapping[str, str]) -> Config:
    """What a person has set, among choices for photographs on a CPU.

    Raises:
        UsageError: a key or a value of theirs is none, or contradicts another.
    """
    images = Images(count=10_000, side=256, smallest=256, largest=256)
    machine = Machine("cpu", cores=1, cpus=1, bf16=False)
    rung = ladder.ladder(images, machine)[0]
    return configured(choose(images, machine, rung, 1000, 10, given))


def _whole(given: Mapping[str, str], key: str, otherwise: int) -> int:
    """The number that a person has set; what is none is for `configured` to say."""
    text = given.get(key, "")
    return max(1, int(text)) if text.strip().isdecimal() else otherwise


Line = tuple[str, str, str]  # key, value, reason


def _all(
    images: Images,
    machine: Machine,
    rung: Rung,
    updates: int,
    epochs: int,
    given: Mapping[str, str],
) -> Iterator[Line]:
    """Every choice, whether a person has set its key or not."""
    batch = batch_of(images, machine, rung, given)
    total = batch * _whole(given, "train.accumulate", 1) * machine.processes
    yield from _network(images, rung, given)
    with_prototypes = _objective(rung, given) == "dino"
    if with_prototypes:
        prototypes = _up_to(ladder.PROTOTYPES, images.count)
        if machine.device == "cpu":
            prototypes = min(int(prototypes), ladder.MOST_ON_CPU)
        yield "head.prototypes", f"{prototypes}", f"for {images.count:,} images"
    yield from _crops(images, rung, given)
    own_network = "model.arch" in given
    for key, (value, reason) in rung.family.keys.items():
        if not (own_network and key.startswith("model.")):
            yield key, value, reason
    momentum = _up_to(ladder.MOMENTUM, updates)
    yield "teacher.momentum", f"{momentum}", f"for some {_about(updates)} updates"
    yield "optim.lr", *_rate(rung, total)
    yield "optim.warmup_epochs", ladder.WARM_UP, "a tenth of the run, as published"
    if with_prototypes and epochs < ladder.FEW_EPOCHS:
        free = "few epochs: the last layer learns from the start"
        yield "optim.freeze_last_layer", "0", free
    yield "train.batch_size", f"{batch}", _why_batch(images, machine, rung, batch)
    yield "train.precision", *_precision(machine)
    yield "runtime.workers", *_workers(machine)


def _objective(rung: Rung, given: Mapping[str, str]) -> str:
    own = rung.family.keys.get("loss.objective", ("dino", ""))[0]
    return given.get("loss.objective", own)


def _up_to(table: Sequence[tuple[int, float]], number: int) -> float:
    return next(value for most, value in table if number <= most)


def _about(number: int) -> str:
    """
    >>> _about(12345)
    '12,000'
    """
    digits = max(0, len(str(number)) - 2)
    return f"{round(number, -digits):,}"


# The network and its crops


def _network(images: Images, rung: Rung, given: Mapping[str, str]) -> Iterator[Line]:
    if "model.arch" not in given:
        yield "model.arch", rung.arch, rung.why
        for key, value in rung.shape.items():
            yield f"model.{key}", value, "of that network"
    if images.channels == 1 or images.grey:
        why = (
            "the data set is grey" if images.channels == 1 else "every image of the sample is grey"
        )
        yield "model.in_chans", "1", why
        if not {"crops.mean", "crops.std", "model.in_chans"} & set(given):
            yield "crops.mean", f"{images.mean}", "of a sample of the images"
            yield "crops.std", f"{images.std}", "of a sample of the images"


def patch_of(rung: Rung, given: Mapping[str, str]) -> int:
    """The patch in pixels; of a network that a person named, what its name says, else 16."""
    if "model.patch_size" in given:
        return _whole(given, "model.patch_size", rung.patch)
    if "model.arch" not in given:
        return rung.patch
    said = re.search(r"(?:_p|patch)(\d+)", given["model.arch"])
    return int(said[1]) if said else 16


def sizes_of(images: Images, rung: Rung, given: Mapping[str, str]) -> tuple[int, int]:
    """Global and local crops, in pixels: multiples of the patch, never larger than the images.

    But never so small that there is nothing to see: two patches a side.
    """
    patch = patch_of(rung, given)
    whole = min(rung.global_size, max(images.side, 2 * patch))
    if rung.family is SMALL:
        whole = min(max(images.side, 4 * patch), 40)
    size = _whole(given, "crops.global_size", max(2 * patch, whole // patch * patch))
    share = rung.local_size / rung.global_size
    local = max(2 * patch, round(size * share / patch) * patch)
    return size, min(local, size)


def _crops(images: Images, rung: Rung, given: Mapping[str, str]) -> Iterator[Line]:
    size, local = sizes_of(images, rung, given)
    sides = f"{images.smallest} to {images.largest}"
    if images.smallest == images.largest:
        sides = f"{images.side}"
    yield (
        "crops.global_size",
        f"{size}",
        f"images of {sides} pixels, patches of {patch_of(rung, given)}",
    )
    yield "crops.local_size", f"{local}", "about half of the global crops"
    yield "crops.local_count", f"{rung.local_count}", "of that recipe"
    if rung.family is not PUBLISHED:
        resize = "evaluate.resize"
        if images.side <= size * 256 / 224:
            yield resize, f"{size}", "judged whole: the images are hardly larger than a crop"


# The batch and what goes with it


def batch_of(images: Images, machine: Machine, rung: Rung, given: Mapping[str, str]) -> int:
    """Images a process: the rung's, or the power of two below half of the images."""
    if "train.batch_size" in given:
        return _whole(given, "train.batch_size", rung.batch)
    together = machine.processes * _whole(given, "train.accumulate", 1)
    share = max(1, images.count // (2 * together))
    batch = min(rung.batch, 1 << (share.bit_length() - 1))
    if machine.device == "cpu":  # processes share its cores: they share the batch, too
        batch = min(batch, max(1, rung.batch // machine.processes))
    while batch > 1 and not _fits(batch, machine, rung):
        batch //= 2
    return batch


def _fits(batch: int, machine: Machine, rung: Rung) -> bool:
    if machine.memory is None:
        return True
    here = machine.processes if machine.device == "cpu" else 1
    return here * batch * rung.bytes_an_image <= ladder.MEMORY_SHARE * machine.memory


def _why_batch(images: Images, machine: Machine, rung: Rung, batch: int) -> str:
    if not _fits(2 * batch, machine, rung) and batch < rung.batch:
        return f"what {(machine.memory or 0) / 1e9:.0f} GB of memory hold"
    if batch < rung.batch and machine.processes > 1:
        return f"{batch * machine.processes} over {machine.processes} processes"
    if batch < rung.batch:
        return f"at most half of the {images.count:,} images"
    return "of that recipe"


def _rate(rung: Rung, total: int) -> tuple[str, str]:
    """The key, which is for 256 images, so that the peak stays within the family's bounds."""
    family = rung.family
    peak = family.lr * total / 256
    kept = min(max(peak, family.least), family.most)
    value = f"{kept * 256 / total:.4g}"
    if kept > peak:
        return value, f"a peak of {kept:.3g} at {total} images: the rule's {peak:.2g} is too little"
    if kept < peak:
        return value, f"a peak of {kept:.3g} at {total} images: the largest that was tried"
    told = {SMALL.lr: "demo's rule", SHRUNK.lr: "board's rule"}.get(family.lr, "published rule")
    return value, f"a peak of {kept:.3g} at {total} images, by the {told}"


def _precision(machine: Machine) -> tuple[str, str]:
    who = "the GPU" if machine.device == "cuda" else "this processor"
    if machine.bf16:
        return "bf16", f"{who} multiplies faster in it"
    return "fp32", f"{who} is not faster in bf16"


def _workers(machine: Machine) -> tuple[str, str]:
    """Threads that make crops: on a CPU they compete with the step for its cores."""
    per_process = max(1, machine.cpus // machine.processes)
    if machine.device == "cuda":
        return f"{min(16, per_process)}", f"of {machine.cpus} cores"
    return f"{max(1, min(8, per_process // 2))}", f"of {machine.cpus} cores, the rest compute"
