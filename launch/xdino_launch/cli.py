"""The command line: every command parses here and does its work in a room of its own.

Standard output carries results (a table, or JSON with --json); everything else goes to standard
error. Exit codes: 0 done, 1 failed, 2 wrong usage, 75 stopped by a signal and resumable.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from xdino.errors import RunFailed, Stopped, UsageError, nearest

# torch and the rest take seconds to import: commands import what they need, so that --help and
# mistakes in the command line answer at once.

EXIT_FAILED, EXIT_USAGE, EXIT_STOPPED = 1, 2, 75


class Commands(click.Group):
    """A group that names the nearest command when there is no such one."""

    group_class = type

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            hint = nearest(args[0], self.list_commands(ctx))
            raise UsageError(f'there is no command "{args[0]}": {hint}')
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="xdino")
def xdino() -> None:
    """Pretrain XCiT without labels (DINO), judge the features, look at the attention."""


# --- pretrain ---------------------------------------------------------------------------------


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """["--optim.lr", "1e-3", "--train.epochs=10"] -> {"optim.lr": "1e-3", "train.epochs": "10"}."""
    from xdino import config

    overrides: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        key, equals, value = option.removeprefix("--").partition("=")
        if not option.startswith("--") or "." not in key:
            leaves = {known.split(".")[1]: known for known in config.dotted_keys()}
            name = leaves.get(key.replace("-", "_"))
            hint = f'did you mean "--{name}"?' if name else "overrides are --section.key value"
            raise UsageError(f'"{option}" is not an option of pretrain: {hint}')
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UsageError(f"--{key} needs a value: --{key} VALUE")
            value = rest.pop(0)
        overrides[key] = value
    return overrides


@xdino.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    epilog="Every key of the configuration is an option: --optim.lr 1e-3 --data.path FOLDER ...",
)
@click.argument("config")
@click.option("--run", "run_dir", required=True, type=click.Path(), help="The run's folder.")
@click.option("--init", help="Weights to start from (a new run; continuing needs nothing).")
@click.option("--print-config", is_flag=True, help="Print the resolved configuration and stop.")
@click.pass_context
def pretrain(
    ctx: click.Context, config: str, run_dir: str, init: str | None, print_config: bool
) -> None:
    """Pretrain by a recipe's name or a YAML file; continue the run that RUN holds.

    Under a launcher the processes find each other: torchrun --nproc-per-node 8 -m xdino_launch
    pretrain CONFIG --run DIR.
    """
    from xdino import config as configuration

    overrides = parse_overrides(ctx.args)
    if init is not None:
        overrides["train.init"] = init
    resolved = configuration.load(config, overrides)
    if print_config:
        click.echo(configuration.to_yaml(resolved), nl=False)
        return
    from xdino_launch.local import run_pretraining

    path = run_pretraining(resolved, run_dir, command=sys.argv[1:])
    click.echo(str(path))


@xdino.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.argument("config")
@click.option("--run", "run_dir", required=True, type=click.Path(), help="The run's folder.")
@click.option("--nodes", default=1, show_default=True, type=click.IntRange(1))
@click.option("--gpus-per-node", default=8, show_default=True, type=click.IntRange(0))
@click.option("--cpus-per-gpu", default=10, show_default=True, type=click.IntRange(1))
@click.option("--hours", default=24.0, show_default=True, type=click.FloatRange(0, min_open=True))
@click.option("--partition", help="SLURM partition.")
@click.option("--slurm", multiple=True, metavar="KEY=VALUE", help="More SLURM parameters.")
@click.option("--cluster", type=click.Choice(["slurm", "local"]), help="local: here, to try it.")
@click.pass_context
def submit(
    ctx: click.Context, config: str, run_dir: str, slurm: tuple[str, ...], **how: Any
) -> None:
    """Pretrain on a SLURM cluster; goes on by itself when its time is up."""
    overrides = parse_overrides(ctx.args)
    extra = dict(pair.partition("=")[::2] for pair in slurm)
    if not all(extra.values()):
        raise UsageError(f"--slurm takes KEY=VALUE, got {' '.join(slurm)}")
    from xdino_launch import slurm as cluster

    job = cluster.PretrainingJob(config, overrides, str(Path(run_dir).resolve()))
    click.echo(cluster.submit(job, **how, extra=extra))


# --- evaluation -------------------------------------------------------------------------------


def evaluation_options(command: Callable[..., None]) -> Callable[..., None]:
    """What every evaluation of a backbone on labelled data takes."""
    options = [
        click.argument("weights"),
        click.option(
            "--data", required=True, help="Folder with train/ and val/, or a named source."
        ),
        click.option("--arch", help="Architecture, where the file does not say."),
        click.option("--role", default="teacher", type=click.Choice(["teacher", "student"])),
        click.option("--out", type=click.Path(), help="Append to this results.json."),
        click.option("--json", "as_json", is_flag=True, help="JSON on standard output."),
        click.option("--size", type=click.IntRange(1), help="Centre crop in pixels."),
        click.option("--resize", type=click.IntRange(1), help="Shorter side before it, in pixels."),
        click.option("--mean", help="Per channel, comma-separated, 0..1."),
        click.option("--std", help="Per channel, comma-separated, 0..1."),
        click.option("--batch-size", default=128, type=click.IntRange(1), show_default=True),
        click.option("--workers", default=min(8, os.cpu_count() or 1), type=click.IntRange(1)),
        click.option("--device", default="auto", show_default=True),
        click.option("--precision", default="fp32", type=click.Choice(["fp32", "bf16"])),
        click.option(
            "--cache",
            type=click.Path(),
            help="Keep features in this folder for the next command; files count by name.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def numbers(
    text: str | None, name: str, kind: Callable[[str], Any] = float
) -> tuple[Any, ...] | None:
    """ "10,20" -> (10, 20)."""
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f'--{name} takes numbers with commas between them, got "{text}"') from None


def results_file(weights: str, out: str | None) -> Path | None:
    """Where rows are kept: --out, else results.json of a run's folder, else nowhere."""
    if out:
        return Path(out)
    return Path(weights) / "results.json" if Path(weights).is_dir() else None


def finish(rows: Sequence[Any], weights: str, out: str | None, as_json: bool) -> None:
    """Where rows go: results.json of the run or --out, and standard output."""
    from xdino_eval import results
    from xdino_launch.console import stdout_console

    target = results_file(weights, out)
    if target is not None:
        results.append(target, rows)
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        stdout_console().print(results.table(rows))


@xdino.command()
@evaluation_options
@click.option("--k", "ks", default="10,20,100,200", show_default=True, help="Neighbours.")
@click.option("--temperature", default=0.07, show_default=True, type=float)
def knn(ks: str, temperature: float, **options: Any) -> None:
    """Weighted k-NN of the frozen features: train/ votes on val/."""
    parsed = numbers(ks, "k", int)
    if not parsed or min(parsed) < 1:
        raise UsageError(f"--k takes numbers of neighbours from 1 up, got {ks}")
    if temperature <= 0:
        raise UsageError(f"--temperature must be above 0, got {temperature}")
    from xdino_eval import knn as rooms
    from xdino_launch.evaluate import Subject

    subject = Subject.open(**_subject(options))
    train, val = subject.features()
    rows = subject.sign(rooms.evaluate(train, val, parsed, temperature))
    finish(rows, options["weights"], options["out"], options["as_json"])


@xdino.command()
@evaluation_options
@click.option(
    "--protocol",
    default="logistic",
    show_default=True,
    type=click.Choice(["logistic", "sgd", "sgd-features", "grid", "grid-features"]),
    help="logistic: scikit-learn on features extracted once; sgd: the published protocol, augmented "
    "images every epoch; sgd-features: its optimiser on features extracted once; grid, "
    "grid-features: the same for many settings in one pass, a held-out tenth of train/ chooses.",
)
@click.option("--epochs", default=100, show_default=True, type=click.IntRange(1), help="Of SGD.")
@click.option("--lr", default=0.001, show_default=True, type=float, help="Of SGD, for batch 256.")
@click.option("--lrs", help="Grid: learning rates, for batch 256; 13 from 1e-5 to 0.1 by default.")
@click.option("--wds", help="Grid: weight decays; 0 by default.")
@click.option("--features", help="Grid: any of class,patches,both; class by default.")
@click.option("--c", "cs", default="default", help="Logistic: default, dino (45), or values.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--save-head", type=click.Path(), help="SGD: keep the head, as safetensors.")
def linear(
    protocol: str,
    epochs: int,
    lr: float,
    lrs: str | None,
    wds: str | None,
    features: str | None,
    cs: str,
    seed: int,
    save_head: str | None,
    **options: Any,
) -> None:
    """A linear probe of the frozen features, trained on train/, scored on val/.

    The protocols over images leave their state after each epoch beside the results; the same
    command goes on from there.
    """
    if lr <= 0:
        raise UsageError(f"--lr must be above 0, got {lr}")
    chosen = {"--lrs": lrs, "--wds": wds, "--features": features}
    for name, value in chosen.items():
        if value is not None and not protocol.startswith("grid"):
            raise UsageError(f"{name} belongs to --protocol grid or grid-features, not {protocol}")
    from xdino_eval import linear as rooms
    from xdino_eval.grid import Grid, Tokens, grid_probe, grid_probe_features
    from xdino_eval.logistic import GRIDS, logistic_probe
    from xdino_launch.evaluate import Subject

    given: dict[str, Any] = {
        "lrs": numbers(lrs, "lrs"),
        "weight_decays": numbers(wds, "wds"),
        "features": numbers(features, "features", str),
    }
    many = Grid(**{name: values for name, values in given.items() if values is not None})
    strengths = cs if cs in GRIDS else numbers(cs, "c")
    subject = Subject.open(**_subject(options))
    how = rooms.Sgd(epochs=epochs, batch_size=options["batch_size"], lr=lr, seed=seed)
    kept = results_file(options["weights"], options["out"])
    over_images: dict[str, Any] = {
        "transform": subject.transform,
        "how": how,
        "device": subject.device,
        "workers": options["workers"],
        "precision": options["precision"],
        "save_to": save_head,
        "progress": subject.progress("epoch"),
        "keep_in": kept.parent if kept else None,
    }
    three = subject.backbone, subject.train, subject.val
    if protocol == "sgd":
        row = rooms.sgd_probe(*three, **over_images)
    elif protocol == "grid":
        row = grid_probe(*three, grid=many, **over_images)
    elif protocol == "grid-features":
        network = Tokens(subject.backbone, many.features)
        train, val = replace(subject, backbone=network).features()
        row = grid_probe_features(train, val, many, how, save_to=save_head)
    else:
        train, val = subject.features()
        if protocol == "sgd-features":
            row = rooms.sgd_probe_features(train, val, how, save_to=save_head)
        else:
            row = logistic_probe(train, val, strengths or "default", seed=seed)
    finish(subject.sign([row]), options["weights"], options["out"], options["as_json"])


def _subject(options: dict[str, Any]) -> dict[str, Any]:
    """The evaluation options that say what is judged and on what, parsed."""
    names = (
        "weights data arch role size resize batch_size workers device precision cache".split()  # noqa: SIM905
    )
    subject = {name: options[name] for name in names}
    return subject | {name: numbers(options[name], name) for name in ("mean", "std")}


@xdino.command()
@click.argument("weights")
@click.argument("images", nargs=-1, required=True, type=click.Path())
@click.option("--out", required=True, type=click.Path(), help="Folder for the pictures.")
@click.option("--arch", help="Architecture, where the file does not say.")
@click.option("--size", type=click.IntRange(1), help="Shorter side in pixels.")
@click.option("--mass", default=0.6, show_default=True, type=float, help="Share held by the mask.")
def attention(
    weights: str, images: tuple[str, ...], out: str, arch: str | None, size: int | None, mass: float
) -> None:
    """Draw an XCiT's class attention on images: heads, mean, overlay, mask."""
    if not 0 < mass <= 1:
        raise UsageError(f"--mass must be above 0 and at most 1, got {mass}")
    from xdino_launch.evaluate import draw_attention

    for path in draw_attention(weights, images, out, arch, size, mass):
        click.echo(str(path))


@xdino.command()
@evaluation_options
def features(**options: Any) -> None:
    """Write the frozen features of train/ and val/ to a safetensors file (--out)."""
    if not options["out"]:
        raise UsageError("features needs --out FILE.safetensors")
    from xdino_launch.evaluate import Subject, save_features

    subject = Subject.open(**_subject(options))
    path = save_features(subject, Path(options["out"]))
    click.echo(str(path))


@xdino.command()
@click.argument("weights")
@click.option("--out", required=True, type=click.Path(), help="FILE.safetensors")
@click.option("--format", "names", default="published", type=click.Choice(["published", "timm"]))
@click.option("--arch", help="Architecture, where the file does not say.")
@click.option("--role", default="teacher", type=click.Choice(["teacher", "student"]))
def export(weights: str, out: str, names: str, arch: str | None, role: str) -> None:
    """Write a backbone as safetensors, under the published parameter names or timm's."""
    from xdino_launch.evaluate import export_backbone

    click.echo(str(export_backbone(weights, Path(out), names, arch, role)))


@xdino.command()
@click.argument("weights")
@click.option("--data", required=True, help="Images, labelled or not: folder, list, named source.")
@click.option("--split", default="train", show_default=True, type=click.Choice(["train", "val"]))
@click.option("--limit", default=25_600, show_default=True, type=click.IntRange(2), help="Images.")
@click.option("--lidar-images", default=1_000, show_default=True, type=click.IntRange(2))
@click.option("--views", default=50, show_default=True, type=click.IntRange(2), help="For LiDAR.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--arch", help="Architecture, where the file does not say.")
@click.option("--role", default="teacher", type=click.Choice(["teacher", "student"]))
@click.option("--out", type=click.Path(), help="Append to this file, else to the run's.")
@click.option("--batch-size", default=128, type=click.IntRange(1), show_default=True)
@click.option("--workers", default=min(8, os.cpu_count() or 1), type=click.IntRange(1))
@click.option("--device", default="auto", show_default=True)
@click.option("--precision", default="fp32", type=click.Choice(["fp32", "bf16"]))
def quality(weights: str, data: str, split: str, out: str | None, **how: Any) -> None:
    """RankMe, LiDAR and the spread of the frozen features, as JSON; no labels needed."""
    from xdino_eval.quality import judge
    from xdino_launch.console import counter, stderr_console

    progress = counter(stderr_console(), "features")
    found = judge(weights, data, split, Path(out) if out else None, progress=progress, **how)
    click.echo(json.dumps(asdict(found), indent=2))


@xdino.command()
@click.argument("run_dir", metavar="RUN", type=click.Path(path_type=Path))
@click.argument("other", metavar="[RUN2]", required=False, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="File; default: report.html in RUN.")
def report(run_dir: Path, other: Path | None, out: Path | None) -> None:
    """Write a run, or two side by side, as one HTML file that needs nothing else."""
    from xdino_launch.report import write_report

    click.echo(str(write_report([run_dir, other] if other else [run_dir], out)))


@xdino.command()
@click.option("--run", "run_dir", default="runs/demo", show_default=True, type=click.Path())
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")
def demo(run_dir: str, seed: int, as_json: bool) -> None:
    """Pretrain a small XCiT on shipped images, score it, draw its attention (minutes, no GPU)."""
    from xdino_launch.demo import run_demo

    rows = run_demo(Path(run_dir), seed)
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))


# --- benchmarks -------------------------------------------------------------------------------


@xdino.group()
def bench() -> None:
    """Time this code, and a checkout of the published code beside it: arms in turn, with an A/A."""


def bench_options(threads: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """What every benchmark takes; `threads` is the default (0: all cores)."""
    options = [
        click.option("--rounds", default=9, show_default=True, type=click.IntRange(1)),
        click.option(
            "--threads", default=threads, show_default=True, type=click.IntRange(0), help="0: all."
        ),
        click.option("--seconds", type=click.FloatRange(0), help="Begin no round after these."),
        click.option("--out", type=click.Path(dir_okay=False), help="Write a JSON file."),
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def reference_option(name: str = "reference", of: str = "dino") -> Callable[..., Any]:
    return click.option(
        f"--{name}", metavar=f"{of.upper()}_DIR", help=f"A checkout of facebookresearch/{of}."
    )


def finish_bench(report: Any, out: str | None) -> None:
    """A benchmark's tables on standard output, and everything in `out`."""
    from xdino_launch.bench_timing import CLAIM_ROUNDS, write
    from xdino_launch.console import stderr_console, stdout_console

    for table in report.tables():
        stdout_console().print(table)
    for name, fact in report.facts.items():
        click.echo(f"{name}: {fact}")
    if report.rounds < CLAIM_ROUNDS:
        stderr_console().print(f"fewer than {CLAIM_ROUNDS} rounds: a look, not a measurement")
    if out is not None:
        write(report, Path(out), sys.argv[1:])


@bench.command("pipeline")
@click.option("--data", help="Folder of images; without it, tiles of two photographs.")
@reference_option()
@click.option("--batch", default=16, show_default=True, type=click.IntRange(1))
@click.option("--images", default=64, show_default=True, type=click.IntRange(1), help="A round.")
@bench_options(threads=1)
def bench_pipeline(
    data: str | None, reference: str | None, batch: int, images: int, out: str | None, **how: Any
) -> None:
    """Milliseconds an image from JPEG to crops, on as many cores as threads."""
    from xdino_launch import bench as rooms

    report = rooms.pipeline(data, reference, batch, images, rooms.Protocol(**how))
    finish_bench(report, out)


@bench.command("step")
@click.option("--arch", default="xcit_nano_12_p16", show_default=True)
@click.option("--batch", default=8, show_default=True, type=click.IntRange(1), help="Images.")
@click.option("--prototypes", default=65536, show_default=True, type=click.IntRange(2))
@click.option("--global-size", default=224, show_default=True, type=click.IntRange(16))
@click.option("--local-size", default=96, show_default=True, type=click.IntRange(16))
@click.option("--local-count", default=8, show_default=True, type=click.IntRange(0))
@click.option("--precision", default="fp32", show_default=True, help="fp32,bf16,fp16")
@click.option("--device", default="cpu", show_default=True)
@click.option("--memory", is_flag=True, help="Peak memory instead of time, in child processes.")
@reference_option()
@reference_option("xcit", "xcit")
@bench_options(threads=1)
def bench_step(
    precision: str,
    memory: bool,
    reference: str | None,
    xcit: str | None,
    rounds: int,
    threads: int,
    seconds: float | None,
    out: str | None,
    **shape: Any,
) -> None:
    """Seconds of an optimisation step on fixed crops, or the memory that it takes."""
    if (reference is None) != (xcit is None):
        raise UsageError("the published step needs both --reference DINO_DIR and --xcit XCIT_DIR")
    from xdino_launch import bench as rooms

    report = rooms.step(
        rooms.StepShape(**shape),
        tuple(precision.split(",")),
        (reference, xcit) if reference and xcit else None,
        memory,
        rooms.Protocol(rounds, threads, seconds),
    )
    finish_bench(report, out)


@bench.command("knn")
@click.option("--bank", default=100_000, show_default=True, type=click.IntRange(1))
@click.option("--queries", default=5_000, show_default=True, type=click.IntRange(1))
@click.option("--dim", default=384, show_default=True, type=click.IntRange(1))
@click.option("--classes", default=1_000, show_default=True, type=click.IntRange(1))
@reference_option()
@bench_options(threads=0)
def bench_knn(
    bank: int,
    queries: int,
    dim: int,
    classes: int,
    reference: str | None,
    out: str | None,
    **how: Any,
) -> None:
    """Seconds of the k-NN evaluation at k = 10, 20, 100 and 200, and whether both agree."""
    from xdino_launch import bench as rooms

    report = rooms.knn(bank, queries, dim, classes, reference, rooms.Protocol(**how))
    finish_bench(report, out)


@bench.command("scaling")
@click.option("--arch", default="xcit_small_12_p16", show_default=True)
@click.option("--against", default="vit_small_patch16_224", show_default=True, help="Of timm.")
@click.option("--sizes", default="224,384,512,768,1024", show_default=True, help="Pixels.")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1))
@click.option("--precision", default="fp32", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@bench_options(threads=1)
def bench_scaling(
    arch: str,
    against: str,
    sizes: str,
    batch: int,
    precision: str,
    device: str,
    out: str | None,
    **how: Any,
) -> None:
    """Forward time against image size: the exponent in tokens, and a transformer beside it."""
    pixels = numbers(sizes, "sizes", int)
    assert pixels is not None
    from xdino_launch import bench as rooms

    report = rooms.scaling(arch, against, pixels, batch, precision, device, rooms.Protocol(**how))
    finish_bench(report, out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: one sentence for a person, never a traceback for a mistake."""
    try:
        xdino.main(args=list(arguments) if arguments is not None else None, standalone_mode=False)
    except click.ClickException as error:
        fail(error.format_message(), EXIT_USAGE)
    except UsageError as error:
        fail(str(error), EXIT_USAGE)
    except RunFailed as error:
        fail(str(error), EXIT_FAILED)
    except Stopped as error:
        fail(str(error), EXIT_STOPPED)
    except (KeyboardInterrupt, click.Abort):
        fail("interrupted", 130)
    except BrokenPipeError:  # the reader of our output left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILED)


def fail(sentence: str, code: int) -> None:
    click.echo(f"xdino: {' '.join(sentence.split())}", err=True)
    sys.exit(code)
