"""Progress of anything that takes more than a moment: on standard error, gone when it is done.

On a terminal bars; elsewhere (a log, a notebook's shell, continuous integration) a plain line every ten seconds.
"""

from __future__ import annotations

import sys
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from saccade.errors import one_line

EVERY = 10.0  # seconds between two plain lines


class Progress:
    """Bars with elapsed and remaining time, on a terminal, else plain lines; ``shown=False`` (the default): silent.

    Args:
        every: seconds between two plain lines.
        stream: what is no terminal and takes plain lines; None: standard error.
    """

    def __init__(self, shown: bool = False, every: float = EVERY, stream: TextIO | None = None) -> None:
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        text = TextColumn("{task.description}", markup=False)
        console = Console(stderr=True) if stream is None else Console(file=stream)
        self._shown, self._every, self._stream = shown, every, stream
        self._bars = Bars(text, *columns, console=console, disable=not (shown and console.is_terminal), transient=True)
        self._plain = shown and not console.is_terminal
        self._stop = threading.Event()
        self._current: Bar | None = None
        self._started = time.monotonic()
        self._done_at: float | None = None

    def __enter__(self) -> Progress:
        self._bars.start()
        self._started = time.monotonic()
        if self._plain:
            threading.Thread(target=self._report, daemon=True, name="progress").start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._bars.stop()

    def start(self, what: str, total: int) -> Bar:
        """A new bar for so many things to do."""
        self._current = Bar(self._bars, self._bars.add_task(what, total=total), what, total)
        return self._current

    def say(self, line: str) -> None:
        """A line that stays."""
        if self._shown:
            self._bars.console.print(line, highlight=False, markup=False, soft_wrap=self._plain)

    def expect(self, seconds: float) -> None:
        """Tell how long all that is left will take, from now on."""
        self._done_at = time.monotonic() + seconds
        self.say(f"about {_minutes(seconds)} to go")

    def line(self) -> str:
        """What is being done, how far it is, and how long it has taken and will take: for a log."""
        now = time.monotonic()
        left = 0.0 if self._done_at is None else max(0.0, self._done_at - now)
        parts = [] if self._current is None else [self._current.line(estimated=not left)]  # one estimate, not two
        parts.append(f"{_minutes(now - self._started)} so far")
        return ", ".join([*parts, f"about {_minutes(left)} to go"] if left else parts)

    def _report(self) -> None:
        with suppress(OSError, ValueError):  # nothing reads what is printed any more
            while not self._stop.wait(self._every):
                if self._current is not None:
                    print(one_line(self.line()), file=self._stream or sys.stderr, flush=True)


class Bar:
    """One bar: call it with how many more are done, and ``what=`` to change its words."""

    def __init__(self, bars: Bars, task: TaskID, what: str, total: int) -> None:
        self._bars, self._task = bars, task
        self._what, self._done, self._total = what, 0, total
        self._started = time.monotonic()

    def __call__(self, count: int = 1, what: str | None = None) -> None:
        self._done += count
        self._what = what or self._what
        self._bars.update(self._task, advance=count, description=what)

    def finish(self) -> None:
        """Take the bar away."""
        self._bars.update(self._task, visible=False)

    def line(self, estimated: bool = True) -> str:
        """``racing tome(r=8) 120/400 (about 0:40 left)``; what takes more than was foreseen has no total."""
        text = f"{self._what} {self._done}" + (f"/{self._total}" if self._done <= self._total else "")
        if not (estimated and 0 < self._done < self._total):
            return text
        left = (time.monotonic() - self._started) * (self._total - self._done) / self._done
        return f"{text} (about {_minutes(left)} left)"


def _minutes(seconds: float) -> str:
    """``2:05``, minutes and seconds."""
    whole = max(0, round(seconds))
    return f"{whole // 60}:{whole % 60:02}"
