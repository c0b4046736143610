"""What the processes of an evaluation share: their parts of the work, their progress bar, and the signal that stops them."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from halfbyte.errors import StoppedError
from halfbyte.evaluate import Progress
from halfbyte.evaluate.sampling import Share
from halfbyte.runs import StopSignal

Report = Callable[[str, int, int], None]  # (what is being done, units done, units in all)
PATIENCE = timedelta(days=30)  # how long a process may wait for the slowest


class Session:
    """Entered for the time of an evaluation; `accelerate launch` makes it one of several.

    Args:
        report: called by the first process with (what is being done, units done, units in all).
    """

    def __init__(self, report: Report | None = None) -> None:
        from accelerate import Accelerator, InitProcessGroupKwargs

        self.state: Any = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
        self.share = Share(self.state.process_index, self.state.num_processes)
        self.main: bool = self.state.is_main_process
        self.report = report if self.main else None
        self.stop = StopSignal()

    def __enter__(self) -> "Session":
        self.stop.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.__exit__()

    def check(self) -> None:
        """Raises StoppedError once a signal asked to stop."""
        if self.stop.number:
            raise StoppedError("stopped; what is done is kept, run the same command again to go on", self.stop.number)

    def stage(self, name: str) -> Progress | None:
        """The progress of one stage; counted for this process, and drawn by the first."""
        report = self.report
        return None if report is None else lambda done, total: report(name, done, total)

    def wait(self) -> None:
        """Until all processes are here."""
        self.state.wait_for_everyone()

    def place(self, pipe: Any) -> Any:
        """The pipeline on this process's device."""
        return pipe if self.state.device.type == "cpu" else pipe.to(self.state.device)
