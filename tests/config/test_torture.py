"""A small part of the random configurations and command lines of tests/torture."""

import command_lines
import configurations
import pytest


@pytest.mark.slow
def test_random_configurations_end_in_a_plan_or_a_sentence():
    counts = configurations.run(0, 60, 6)
    assert sum(counts.values()) == 60
    assert counts["tracebacks"] == 0
    assert counts["refused"]
    assert counts["started"] >= 5


@pytest.mark.slow
def test_random_command_lines_end_in_a_result_or_a_sentence(monkeypatch):
    monkeypatch.setattr(command_lines, "SECONDS", 4)  # the long ones are `make torture`'s
    counts = command_lines.run(0, 60)
    assert sum(counts.values()) == 60
    assert counts["tracebacks"] == 0
    assert counts["exit 0"]
    assert counts["exit 2"]
