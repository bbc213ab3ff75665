"""What `look` and `plan` found, as a person reads it: eighty columns, names left and facts right."""

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence

from xdino.data.listing import first
from xdino.forecast.costs import Workload
from xdino.forecast.machines import Machine
from xdino.forecast.outlook import Outlook
from xdino.forecast.survey import STRETCHED, TINY, Quantiles, Survey
from xdino.values import span
from xdino_launch.forecasting.candidates import Candidate
from xdino_launch.remaining import binary_bytes

WIDTH, NAME = 80, 12  # columns


def facts(lines: Iterable[tuple[str, str]]) -> str:
    """Names and facts, the facts wrapped under each other; a name is not said twice."""
    told, before = [], None
    for name, fact in lines:
        shown = name if name != before else ""
        before = name
        told.append(
            textwrap.fill(
                fact,
                WIDTH,
                initial_indent=f"{shown:<{NAME}}",
                subsequent_indent=" " * NAME,
                break_on_hyphens=False,
            )
        )
    return "\n".join(told)


def assumptions(sentences: Sequence[str]) -> str:
    """Each a line of its own."""
    return "\n".join(
        textwrap.fill(sentence, WIDTH, initial_indent="  - ", subsequent_indent="    ")
        for sentence in sentences
    )


# The images


def survey_lines(found: Survey) -> Iterator[tuple[str, str]]:
    """What lies there."""
    yield "data", found.data
    parts = ", ".join(f"{name} {count:,}" for name, count in found.splits.items())
    yield "images", f"{found.images:,} to train on ({parts}), {binary_bytes(found.bytes)}"
    yield "formats", _counts(found.formats)
    if found.classes:
        counts = sorted(found.classes.values())
        yield (
            "classes",
            (
                f"{len(counts):,} folders or labels, of {counts[0]:,} to {counts[-1]:,} images; "
                "pretraining does not look at them"
            ),
        )
    yield from _sizes(found)
    if found.left_out:
        yield "left out", f"{sum(found.left_out.values()):,} files: {_counts(found.left_out)}"
    for hint in dict.fromkeys(found.hints.values()):
        names = first([suffix for suffix, told in found.hints.items() if told == hint])
        yield "left out", f"{names}: {hint}"
    yield from _bad(found)
    for notice in found.notices:
        if "left out" not in notice:
            yield "note", notice


def _sizes(found: Survey) -> Iterator[tuple[str, str]]:
    if found.shorter is None or found.longer is None:
        return
    of = "all" if found.sampled == found.images else f"a sample of {found.sampled:,}"
    yield (
        "sizes",
        (
            f"shorter side {_quantiles(found.shorter)}; longer {_quantiles(found.longer)} pixels "
            f"({of})"
        ),
    )
    yield "colours", _counts(found.colours, found.sampled)
    if found.stretched:
        yield (
            "note",
            (
                f"{found.stretched:,} of {found.sampled:,} are {STRETCHED:g} times longer than wide and "
                "more: crops see a part of them only; cut them into tiles"
            ),
        )
    if found.tiny and not found.shorter.high < 2 * TINY:
        yield (
            "note",
            (f"{found.tiny:,} of {found.sampled:,} are below {TINY} pixels: crops enlarge them"),
        )
    if found.decode_seconds > 0.05:
        yield (
            "note",
            (
                f"one takes {found.decode_seconds * 1e3:.0f} ms to decode: `xdino pack --shorter-side` "
                "writes smaller ones once"
            ),
        )


def _bad(found: Survey) -> Iterator[tuple[str, str]]:
    of = "all" if found.decoded == found.images else f"{found.decoded:,}"
    if not found.unreadable_count:
        yield "unreadable", f"none of {of} that were decoded"
    else:
        yield "unreadable", f"{found.unreadable_count:,} (decoded: {of}):"
        for where, why in found.unreadable:
            yield "unreadable", f"{where}: {why}"
    compared = "" if found.compared == found.images else f" of {found.compared:,} compared"
    if not found.copies:
        yield "duplicates", f"none{compared}"
        return
    yield "duplicates", f"{found.copies:,} images equal another one byte by byte{compared}, such as"
    for group in found.equal[:3]:
        yield "duplicates", first(list(group), 3)


def _quantiles(q: Quantiles) -> str:
    if q.least == q.most:
        return f"{q.median:.0f}"
    return f"{q.least:.0f} to {q.most:.0f}, median {q.median:.0f}"


def _counts(counts: Mapping[str, int], of: int = 0) -> str:
    """`jpg 300, png 2`; nothing but the name where it is all."""
    if of and len(counts) == 1:
        return next(iter(counts))
    return first([f"{name} {count:,}" for name, count in counts.items()], 8)


# The candidates


def candidate_table(made: Sequence[Candidate], chosen: Candidate, minutes: float) -> str:
    """One line a network, the chosen one marked."""
    rows = [("", "network", "crops", "batch", "s a step", "an epoch", "epochs", "memory")]
    for each in made:
        seen = each.outlook
        epoch = seen.steps_per_epoch * seen.step_seconds
        rows.append(
            (
                ">" if each is chosen else "",
                each.network,
                f"{each.value('crops.global_size')}/{each.value('crops.local_size')}",
                each.value("train.batch_size"),
                f"{seen.step_seconds:.3g}",
                span(epoch),
                f"{each.epochs:,}" if each.epochs else "none",
                binary_bytes(seen.memory),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([f"In {span(60 * minutes)} this machine trains:", *lines])


def chosen_lines(chosen: Candidate, minutes: float, file: str) -> str:
    """What to type, and what it will take."""
    seen = chosen.outlook
    lines = [
        ("forecast", f"about {span(seen.seconds)} and {binary_bytes(seen.memory)} of memory, "
         f"{binary_bytes(seen.disk_bytes)} on disk"),
        ("", f"xdino pretrain {file} --run runs/mine"),
    ]  # fmt: skip
    if not chosen.epochs:
        lines.append(("note", f"{span(60 * minutes)} is too short: this is one epoch"))
    elif not chosen.enough:
        lines.append(
            ("note", f"{chosen.epochs * seen.steps_per_epoch:,} steps are few for this network: "
             "longer would be better")
        )  # fmt: skip
    return facts(lines) + "\n\nassumed:\n" + assumptions(seen.assumptions)


# The outlook


def too_large(seen: Outlook, work: Workload) -> str:
    """What to do where the memory does not suffice; nothing where it does."""
    if not seen.room or seen.memory <= seen.room:
        return ""
    batch = work.config.train.batch_size
    fits = max(1, int(batch * 0.9 * seen.room / seen.memory))
    mend = f"lower train.batch_size to about {fits} and raise train.accumulate"
    if not work.config.runtime.activation_checkpointing:
        mend += ", or set runtime.activation_checkpointing true"
    return textwrap.fill(f"It does not fit into the memory: {mend}.", WIDTH)


def outlook_lines(seen: Outlook, network: str) -> Iterator[tuple[str, str]]:
    """What a run will take."""
    each = "process" if seen.device == "cpu" else "GPU"
    yield "network", f"{network}, {seen.parameters / 1e6:.1f} M parameters with its head"
    yield (
        "run",
        (
            f"{seen.epochs:,} epochs x {seen.steps_per_epoch:,} steps = {seen.iterations:,} steps of "
            f"{seen.total_batch:,} images, out of {seen.images:,} images"
        ),
    )
    where = f"{seen.processes:,} x {seen.device}" if seen.processes > 1 else seen.device
    machines = f" on {seen.nodes:,} machines" if seen.nodes > 1 else ""
    yield "on", f"{where}{machines}, {seen.precision}"
    yield (
        "a step",
        (
            f"{seen.flops / 1e12:,.3g} TFLOP and {seen.moved / 1e9:,.3g} GB moved a {each}; "
            f"{seen.step_seconds:.3g} s; {seen.images_per_second:,.0f} images/s"
        ),
    )
    yield "time", f"about {span(seen.seconds)}"
    room = f" of {binary_bytes(seen.room)}" if seen.room else ""
    yield "memory", f"{binary_bytes(seen.memory)}{room} a {each}"
    if seen.loader_cores:
        a_machine = " a machine" if seen.nodes > 1 else ""
        yield "loader", f"{_cores(seen.loader_cores)} cores{a_machine} to keep it fed"
    if seen.network:
        yield "network", f"{binary_bytes(seen.network)} a step, sent by each {each}"
    parts = ", ".join(f"{name} {binary_bytes(size)}" for name, size in seen.disk.items() if size)
    yield "disk", f"{binary_bytes(seen.disk_bytes)}: {parts}"


def _cores(count: float) -> str:
    return f"{count:,.0f}" if count >= 9.5 else f"{max(count, 0.1):.1f}"


def machine_line(machine: Machine, cores: int) -> str:
    """This machine in a line."""
    memory = f", {binary_bytes(machine.memory)} of memory free" if machine.memory else ""
    if machine.is_cpu:
        return f"{cores} CPU cores ({machine.cores} threads of torch){memory}, no GPU"
    return f"{machine.name}, {binary_bytes(machine.memory)}; {cores} CPU cores"
