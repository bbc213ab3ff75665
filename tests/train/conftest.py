"""A run small enough to be made many times (tests/torture makes it too)."""

from functools import partial

import pytest
from tiny_run import configuration, write_images


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("run") / "images")


@pytest.fixture
def tiny(images):
    """tiny(**overrides) -> a configuration; keys with "__" for the dot."""
    return partial(configuration, images, runtime__workers=2)
