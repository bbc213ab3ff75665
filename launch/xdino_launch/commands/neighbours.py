"""`xdino neighbours`."""

import os
from pathlib import Path

import click

from xdino.errors import UsageError
from xdino_launch.commands.options import Place, SubjectOptions, Whole, on_one_process, takes


@click.command()
@takes(judged=SubjectOptions)
@click.option(
    "--out", type=Place(), help="Folder for the sheets; of a run, its neighbours/ by default."
)
@click.option("--queries", type=Whole(1, 100_000), help="Images of val/ to ask for; default: 16.")
@click.option("--images", multiple=True, type=Place(), help="Ask for these files instead.")
@click.option("--k", default=8, show_default=True, type=Whole(1, 1000), help="Neighbours.")
@on_one_process
def neighbours(
    judged: SubjectOptions, out: str | None, queries: int | None, images: tuple[str, ...], k: int
) -> None:
    """Draw images beside their nearest neighbours in train/: blue frames are of their class.

    Labels are shown where there are any. Without val/ the images of train/ are asked for among
    themselves. Sheets and a JSON file go to --out, a folder; of a run, to its own neighbours/.
    """
    if queries and images:
        raise UsageError("--queries draws from the data and --images names files: not both")
    if not (out or Path(judged.weights).is_dir()):
        raise UsageError("neighbours needs --out FOLDER where WEIGHTS is not a run")
    folder = Path(out or Path(judged.weights) / "neighbours")
    _refuse_within(folder, Path(judged.data).expanduser())
    missing = [name for name in images if not Path(name).is_file()]
    if missing:
        raise UsageError(f"there is no image file {missing[0]}")
    judged.there(judged.data)
    import numpy as np

    from xdino.data.loader import epoch_order
    from xdino.data.sources import FileSource, Source
    from xdino_eval.knn import neighbours as rooms
    from xdino_launch.evaluation.subject import open_any_splits

    subject = judged.open(splits=open_any_splits)
    if images:
        files = [os.fsencode(Path(name).absolute()) for name in images]
        asked: Source = FileSource("the given images", Path.cwd(), files, subject.train.channels)
        order = np.arange(len(files))
    else:
        asked = subject.val
        order = np.sort(epoch_order(len(asked), 0, 0)[: queries or 16])  # always the same ones
    bank = subject.features_of("train", subject.train)
    found = rooms.find(
        bank,
        subject.train,
        subject.keeping_features(None).features_of("the queries", asked, order),
        asked,
        k,
    )
    told = {
        "checkpoint": subject.backbone.origin.sha256,
        "features": subject.backbone.origin.name,
        "data": bank.data,
        "transform": bank.transform,
        "train_size": len(bank.features),
        "k": k,
    }
    for path in rooms.write(found, subject.train, asked, folder, told):
        click.echo(str(path))


def _refuse_within(out: Path, data: Path) -> None:
    """Refuse sheets in a folder that is read for images: the next run would find them there."""
    splits = [data / split for split in ("train", "val") if (data / split).is_dir()]
    for read in splits or [data]:
        place, root = os.path.realpath(out), os.path.realpath(read)
        if read.is_dir() and (place == root or place.startswith(os.path.join(root, ""))):
            raise UsageError(f"--out lies in the images of {read}: name a folder outside of them")
