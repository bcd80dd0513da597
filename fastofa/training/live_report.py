"""Draw a run's curves and write its report while it trains."""

import time
from pathlib import Path

from fastofa.reports.curves import draw_curves, import_plotting
from fastofa.reports.page import write_report
from fastofa.system.progress import notice
from fastofa.training.background_writer import Writer

EVERY_S = 60  # minimum number of seconds between two reports during a run


class LiveReport:
    """The curves and the report of one run. If they cannot be written, the run continues without them."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.written = time.monotonic()
        self.failed = False

    def is_due(self) -> bool:
        return time.monotonic() - self.written > EVERY_S

    def write(self, writer: Writer) -> None:
        """Let the writer draw the curves and write the report."""
        import_plotting()
        writer(self._draw)
        self.written = time.monotonic()

    def _draw(self) -> None:
        try:
            draw_curves(self.run)
            write_report(self.run)
        except Exception as error:  # from files, matplotlib or jinja
            if not self.failed:
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                notice(f"{self.run}: could not write the report and curves ({reason}); the run continues")
            self.failed = True
