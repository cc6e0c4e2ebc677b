"""Lines of progress in a log: how far, how long it took, and one estimate of what is left."""

from __future__ import annotations

import io

import pytest

from saccade.terminal import progress as module
from saccade.terminal.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_a_line_has_one_estimate_that_of_the_whole_where_it_is_known(clock):
    progress = Progress(stream=io.StringIO())
    bar = progress.start("racing", 40)
    clock[0] = 10.0
    bar(10, what="racing tome(r=8)")
    assert progress.line() == "racing tome(r=8) 10/40 (about 0:30 left), 0:10 so far"
    progress.expect(95.0)
    assert progress.line() == "racing tome(r=8) 10/40, 0:10 so far, about 1:35 to go"
    clock[0] = 200.0  # it took longer: its own estimate again
    assert progress.line() == "racing tome(r=8) 10/40 (about 10:00 left), 3:20 so far"


def test_more_than_was_foreseen_has_no_total(clock):
    progress = Progress(stream=io.StringIO())
    progress.start("measuring", 25)(30)
    assert progress.line() == "measuring 30, 0:00 so far"
