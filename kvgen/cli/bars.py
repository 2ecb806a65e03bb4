"""Progress bars. Apart, because Rich takes time to import that commands in pipes would spend in vain."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from rich import progress
from rich.console import Console
from rich.table import Table


class Bar(progress.Progress):
    """A progress bar without the parts that do not fit into the terminal. The count stays."""

    def __init__(
        self,
        label: progress.ProgressColumn,
        count: progress.ProgressColumn,
        *rates: progress.ProgressColumn,
        console: Console,
        **options: Any,
    ) -> None:
        bar, left = progress.BarColumn(bar_width=20), progress.TimeRemainingColumn()
        numbers = count, *rates
        self._choices = (
            (label, bar, *numbers, left),
            (label, *numbers, left),
            (label, *numbers),
            (label, count),
            (count,),
        )
        self._terminal = console
        super().__init__(*self._choices[0], console=console, **options)

    def make_tasks_table(self, tasks: Iterable[progress.Task]) -> Table:
        tasks, unlimited = list(tasks), self._terminal.options.update(max_width=sys.maxsize)
        for columns in self._choices:
            self.columns = columns
            table = super().make_tasks_table(tasks)
            if self._terminal.measure(table, options=unlimited).maximum <= self._terminal.width:
                break
        return table
