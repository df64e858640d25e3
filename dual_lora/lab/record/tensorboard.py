"""TensorBoard files as a copy of a run's log, for `tensorboard --logdir runs`.

As with W&B, the local record is written first and the copy is never read back. If it fails, one line says so and the
run continues. A resumed run writes its files again from metrics.jsonl, so that no step is drawn twice.
"""

import sys
from typing import Any

from dual_lora.lab.config.schema import Settings
from dual_lora.lab.errors import get_first_line
from dual_lora.lab.record.record import Record
from dual_lora.lab.system.files import remove_path

FOLDER = "tensorboard"


class Board:
    """The TensorBoard files of one run. Without a writer (`Board()`) every call does nothing. No call raises."""

    def __init__(self, writer: Any = None) -> None:
        self.writer = writer

    def log(self, row: dict[str, Any]) -> None:
        """Write one row of metrics.jsonl; curves are drawn over `row["step"]`."""
        self._call_safely(lambda writer: [writer.add_scalar(n, v, row["step"]) for n, v in row.items() if n != "step"])

    def set_summary(self, values: dict[str, Any]) -> None:
        """Do nothing: the scores of a finished run are rows of its log."""

    def finish(self, exit_code: int = 0) -> None:
        """Write what is left and close the files."""
        self._call_safely(lambda writer: writer.close())
        self.writer = None

    def _call_safely(self, call: Any) -> None:
        if self.writer is None:
            return
        try:
            call(self.writer)
        except Exception as error:
            self.writer = None
            print(f"TensorBoard files of this run end here ({get_first_line(error)})", file=sys.stderr)


def open_board(settings: Settings, record: Record) -> Board:
    """Return the board of a run, with the log so far in it; one that does nothing unless `tensorboard` is set."""
    if not settings.tensorboard:
        return Board()
    try:
        from torch.utils.tensorboard import SummaryWriter

        remove_path(record.folder / FOLDER)
        board = Board(SummaryWriter(str(record.folder / FOLDER)))
    except Exception as error:
        print(f"no TensorBoard files of this run ({get_first_line(error)})", file=sys.stderr)
        return Board()
    for row in record.read_log():
        board.log(row)
    return board
