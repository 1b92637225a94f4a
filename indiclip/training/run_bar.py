"""What a run shows on a terminal while it trains: a bar, a second one for a validation, and numbers below them."""

import textwrap
from collections.abc import Iterable
from datetime import timedelta

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

_ECHO = 2  # columns of the ^C that a terminal writes behind the last line, which must not grow into another one


class RunBar(Progress):
    """Rich's Progress, with lines around it that are redrawn with it.

    Args:
        console: What it is shown on; where that is not interactive nothing is shown.
        refresh_seconds: Time between redrawings, by a thread of its own.

    Attributes:
        numbers: Below the bars; lines break at spaces, and not at no-break spaces.
        notice: Above them. A signal handler may set it: it takes no lock, and the next redrawing shows it.
    """

    numbers = ""
    notice = ""

    def __init__(self, console: Console, refresh_seconds: float) -> None:
        super().__init__(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),  # what is left of the line
            MofNCompleteColumn(table_column=Column(no_wrap=True, justify="right")),
            _Times(table_column=Column(no_wrap=True)),
            console=console,
            expand=True,
            refresh_per_second=1 / refresh_seconds,
            disable=not console.is_interactive,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        if self.notice:
            yield Text(self.notice)
        yield self.make_tasks_table(self.tasks)
        yield _Wrapped(self.numbers)


class _Times(ProgressColumn):
    """Time since the start, and what is left."""

    max_refresh = 0.5  # as of rich's own

    def render(self, task: Task) -> Text:
        left = time_left(task)
        return Text(f"{timedelta(seconds=int(task.elapsed or 0))}, {left or '-:--:-- left'}", style="cyan")


def time_left(task: Task) -> str:
    """Such as `0:20:34 left`; empty where it is not known."""
    remaining = task.time_remaining
    return f"{timedelta(seconds=int(remaining))} left" if remaining is not None else ""


class _Wrapped:
    """Text in as many lines as it takes. Rich itself breaks at no-break spaces too."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(1, options.max_width - _ECHO)
        lines = textwrap.wrap(self.text, width, break_long_words=False, break_on_hyphens=False)
        for line in lines or [""]:
            yield Text(line, no_wrap=True, overflow="ellipsis")
