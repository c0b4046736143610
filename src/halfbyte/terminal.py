"""The progress bar that commands show."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar with the time left; yields a function that takes (what is being done, units done, units in all).

    Of several processes of `accelerate launch` only the first shows it.
    """
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    bar: Progress
    with Progress(*columns, disable=os.environ.get("RANK", "0") != "0") as bar:
        task, shown = bar.add_task("loading", total=None), "loading"

        def report(stage: str, done: int, total: int) -> None:
            nonlocal task, shown
            if stage != shown:  # a new stage has a speed of its own, by which the time left is told
                bar.remove_task(task)
                task, shown = bar.add_task(stage, total=total, completed=done), stage
            bar.update(task, completed=done, total=total)

        yield report
