"""Progress of anything that takes more than a moment: on standard error, gone when it is done."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars


class Progress:
    """Bars with elapsed and remaining time, on a terminal; ``shown=False`` (the default): silent."""

    def __init__(self, shown: bool = False) -> None:
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        text = TextColumn("{task.description}", markup=False)
        console = Console(stderr=True)
        self._shown = shown
        self._bars = Bars(text, *columns, console=console, disable=not (shown and console.is_terminal), transient=True)

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.stop()

    def start(self, what: str, total: int) -> Bar:
        """A new bar for so many things to do."""
        return Bar(self._bars, self._bars.add_task(what, total=total))

    def say(self, line: str) -> None:
        """A line that stays."""
        if self._shown:
            self._bars.console.print(line, highlight=False, markup=False)


class Bar:
    """One bar: call it with how many more are done, and ``what=`` to change its words."""

    def __init__(self, bars: Bars, task: TaskID) -> None:
        self._bars, self._task = bars, task

    def __call__(self, count: int = 1, what: str | None = None) -> None:
        self._bars.update(self._task, advance=count, description=what)

    def finish(self) -> None:
        """Take the bar away."""
        self._bars.update(self._task, visible=False)
