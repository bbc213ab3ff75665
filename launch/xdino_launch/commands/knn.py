"""`xdino knn`."""

from dataclasses import replace
from functools import partial
from typing import Any

import click

from xdino import values
from xdino.errors import UsageError
from xdino_launch.commands.options import (
    SEED,
    Whole,
    evaluation_options,
    finish,
    numbers,
    subject_options,
)


@click.command()
@evaluation_options
@click.option("--k", "ks", default="10,20,100,200", show_default=True, help="Neighbours.")
@click.option("--temperature", default="0.07", show_default=True, help="One or several, with --k.")
@click.option(
    "--leave-one-out",
    is_flag=True,
    help="Judge every image of train/, or of one folder of class folders, by the others.",
)
@click.option("--shots", help="Banks of so many images a class, e.g. 1,5,10: means over draws.")
@click.option("--repeats", default=5, show_default=True, type=Whole(1, 10_000), help="Of --shots.")
@click.option("--seed", default=0, show_default=True, type=SEED, help="Of --shots.")
@click.option(
    "--search",
    default="auto",
    show_default=True,
    help="integers and faiss (CPU) and torch (--device) are exact and give the same numbers; ivf and "
    "hnsw find most neighbours of a very large bank, and the row says how many; auto is exact.",
)
@click.option(
    "--bank-block",
    type=Whole(-(2**31)),
    help="Keep the features on disk (--cache, else a temporary folder) and so many rows in memory.",
)
def knn(
    ks: str,
    temperature: str,
    leave_one_out: bool,
    shots: str | None,
    repeats: int,
    seed: int,
    search: str,
    bank_block: int | None,
    **options: Any,
) -> None:
    """Weighted k-NN of the frozen features: train/ votes on val/.

    A row for every k and temperature. Under torchrun every process extracts and searches its
    share, and the numbers are those of one process.
    """
    parsed = numbers(ks, "k", values.whole, least=1, what="numbers of neighbours")
    temperatures = numbers(temperature, "temperature", above=0)
    few = numbers(shots, "shots", values.whole, least=1, what="numbers of images")
    if few and leave_one_out:
        raise UsageError(
            "--shots draws from train/ and is judged on val/: not with --leave-one-out"
        )
    from xdino.runtime import distributed
    from xdino.runtime.device import resolve_device
    from xdino_eval import knn as rooms
    from xdino_eval.knn.search import How
    from xdino_eval.knn.sharding import folder_for
    from xdino_launch.evaluation.subject import Subject, open_one_split

    device = resolve_device(options["device"])
    how = How.named(search, device, bank_block)
    joined = distributed.start(device)
    try:
        subject = distributed.together(
            lambda: Subject.open(
                **subject_options(options), splits=open_one_split if leave_one_out else None
            )
        )
        distributed.together(subject.check_alike)
        with folder_for(subject.cache, bank_block is not None) as folder:
            subject = replace(subject, cache=folder)
            asked: dict[str, Any] = {
                "ks": parsed,
                "temperature": temperatures,
                "how": how,
                "shared": distributed.world_size() > 1,
            }
            train = subject.share("train", subject.train, bank_block)
            if leave_one_out:
                asked["classes"] = subject.train.classes
                judge = partial(rooms.leave_one_out, train, **asked)
            else:
                val = subject.share("val", subject.val, bank_block)
                judge = partial(rooms.evaluate, train, val, **asked)
                if few:
                    asked["classes"] = subject.train.classes
                    judge = partial(rooms.few_shot, train, val, few, repeats, seed, **asked)
            rows = subject.sign(judge())  # what it refuses, it refuses on every process

        def tell() -> None:
            if distributed.rank() == 0:
                finish(rows, options["weights"], options["out"], options["as_json"])

        distributed.together(tell)
    finally:
        if joined:
            distributed.stop()
