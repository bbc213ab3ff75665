"""What names many tars at once: addresses, and patterns of them or of files.

`s3://bucket/train-{000..127}.tar`, `https://host/imagenet/{train,val}-*.tar`, `/data/shard-*.tar`,
or an address that ends in / for all tars there. Which of them are train is what their names say, as in
a folder.
"""

from collections.abc import Sequence
from pathlib import Path

from xdino.data import splits
from xdino.data.listing import first, status_of
from xdino.data.remote.store import RemoteTars
from xdino.data.remote.transport import Transport
from xdino.data.tars import Store, TarSource, open_tars
from xdino.errors import UsageError
from xdino.runtime import places


def open_named_tars(
    data: str, split: str | None, channels: int | None, labelled: bool
) -> TarSource:
    """The tars that `data` stands for, or those of its `split`.

    Raises:
        UsageError: there is none, or one is missing. RunFailed: a store does not answer.
    """
    names, transport = _named(data)
    tars = [Path(name) for name in names]  # for their names alone, where these are addresses
    remarks: list[str] = []
    within = split
    if split == "val" and (said := splits.val_tars(tars))[0]:
        (tars, remarks), within = said, None
    elif split == "train":
        tars, remarks = splits.train_tars(tars)
        if not tars:
            raise UsageError(f"{data} has nothing to train on but {first([*names])}")
    chosen = {str(tar) for tar in tars}
    store = _store([name for name in names if str(Path(name)) in chosen], transport)
    source = open_tars(data, store, within, channels, labelled)
    source.remarks += remarks
    return source


def splits_of_named_tars(data: str) -> list[str]:
    """The splits that the tars' names divide them into."""
    return splits.splits_said([Path(name) for name in _named(data)[0]])


def _store(names: Sequence[str], transport: Transport | None) -> Sequence[Path] | Store:
    return [Path(name) for name in names] if transport is None else RemoteTars(names, transport)


def _named(data: str) -> tuple[list[str], Transport | None]:
    """Addresses or paths, in the order of the pattern, and how they are reached."""
    if not places.is_address(data):
        names = places.matching(data)
        missing = [name for name in names if status_of(name) is None]
        if missing:
            raise UsageError(f"{len(missing):,} of {data} do not exist: {first(missing)}")
        if not names:
            raise UsageError(f"{data} matches no file")
        return names, None
    transport, found = Transport(data), list[str]()
    for pattern in places.without_braces(data):
        if pattern.endswith("/"):
            pattern += "*.tar"
        if "*" in pattern.partition("://")[2] or "?" in pattern.partition("://")[2]:
            matches = transport.matching(pattern)
            if not matches:
                raise UsageError(f"{pattern} matches nothing")
            found += matches
        else:
            found.append(pattern)
    if strange := [name for name in found if not name.lower().partition("?")[0].endswith(".tar")]:
        raise UsageError(
            f"{first(strange)}: at an address data are tars; name them, as in "
            "s3://bucket/train-{000..127}.tar, or end a folder in /"
        )
    return list(dict.fromkeys(found)), transport
