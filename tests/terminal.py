"""A terminal that a process runs in, and what it shows after all that was written to it."""

import codecs
import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from processes import forked

_TOKEN = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|([^\x1b])")
_TOKENS = re.compile(rf"(?:{_TOKEN.pattern})*")
CTRL_C = b"\x03"


class Terminal:
    """As much of a VT100 as rich asks for; lines that have scrolled away stay.

    Args:
        master: The terminal's end of the pty.
        columns: Its width.
    """

    def __init__(self, master: int, columns: int) -> None:
        self.master, self.columns = master, columns
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._pending = ""  # the beginning of a control sequence
        self._screen: list[list[str]] = [[]]
        self._row = self._column = 0

    @property
    def lines(self) -> list[str]:
        """What is shown, from the first line on."""
        return ["".join(line).rstrip() for line in self._screen]

    def press(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def wait_for(self, text: str, seconds: float = 60.0) -> list[str]:
        """The lines as soon as one of them has `text`."""
        end = time.monotonic() + seconds
        while not any(text in line for line in self.lines):
            shown = "\n".join([f"{text!r} is not in:", *self.lines])
            assert self._read(end), shown
        return self.lines

    def rest(self, seconds: float = 60.0) -> list[str]:
        """The lines after everything that used the terminal has ended, or after so many seconds."""
        end = time.monotonic() + seconds
        while self._read(end):
            pass
        return self.lines

    def _read(self, end: float) -> bool:
        """Show what comes next. Returns whether anything did before the `end`."""
        if not select.select([self.master], [], [], max(0.0, end - time.monotonic()))[0]:
            return False
        try:
            self._show(self._pending + self._decoder.decode(os.read(self.master, 1 << 16)))
        except OSError:  # nobody is at the other end
            return False
        return True

    def _show(self, text: str) -> None:
        self._pending = text[start:] if (start := len(_TOKENS.match(text)[0])) < len(text) else ""
        for numbers, control, character in _TOKEN.findall(text[:start]):
            if control == "A":
                self._row = max(0, self._row - int(numbers or 1))
            elif control == "K":
                assert numbers == "2", numbers
                self._screen[self._row] = []
            elif character == "\r":
                self._column = 0
            elif character == "\n":
                self._to(self._row + 1)
            elif character:
                self._put(character)

    def _to(self, row: int) -> None:
        self._row = row
        self._screen += [[] for _ in range(row + 1 - len(self._screen))]

    def _put(self, character: str) -> None:
        if self._column == self.columns:  # only now, as terminals do
            self._to(self._row + 1)
            self._column = 0
        line = self._screen[self._row]
        line += " " * (self._column + 1 - len(line))
        line[self._column] = character
        self._column += 1


@contextlib.contextmanager
def on_terminal(work: Callable[[], int], columns: int, folder: Path) -> Iterator[tuple[int, Terminal]]:
    """A process, see `forked`, and the terminal that it has for its standard streams and gets Ctrl-C from."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))

    def inside() -> int:
        os.close(master)
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        for number in (0, 1, 2):
            os.dup2(slave, number)
        os.close(slave)
        os.environ |= {"TERM": "xterm", "COLUMNS": str(columns)}
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
        return work()

    try:
        with forked(inside, folder) as process:
            os.close(slave)
            yield process, Terminal(master, columns)
    finally:
        os.close(master)
