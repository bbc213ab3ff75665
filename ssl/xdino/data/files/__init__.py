"""Image files on disk: those of folders, and those that a text names one by one."""

from xdino.data.files.folders import (
    check_both_splits,
    open_folder,
    split_folder,
    splits_of_folder,
)
from xdino.data.files.lists import open_list
from xdino.data.files.source import FileSource

__all__ = [
    "FileSource",
    "check_both_splits",
    "open_folder",
    "open_list",
    "split_folder",
    "splits_of_folder",
]
