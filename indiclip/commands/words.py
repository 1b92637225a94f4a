"""What groups of commands such as `indiclip shards` share: the words of a command, and a line per mistake."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from indiclip.names import did_you_mean


class Parser(argparse.ArgumentParser):
    """One line for a mistake, with the nearest flag; argparse's own begins with the usage."""

    def __init__(self, command: str, about: str, examples: str) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(
            f"indiclip {command}", description=about, epilog=examples, formatter_class=raw, allow_abbrev=False
        )

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            self.error(f"{unknown[0]}: no such option{did_you_mean(unknown[0], flags)}")
        return found

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} ({self.prog} --help)")


def count(text: str, least: int = 1) -> int:
    """The type of an option that is a whole number."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"found {text!r}; expected a whole number from {least}")
    return int(text)


def whole(text: str) -> int:
    """The type of an option that is a whole number and may be 0."""
    return count(text, 0)


def run_command(group: str, about: str, commands: dict[str, Callable[[list[str]], int]], argv: list[str]) -> int:
    """Runs `indiclip GROUP COMMAND ...`. Returns the exit status, as `guarded` does.

    Args:
        group: The first word.
        about: Its help.
        commands: The second word -> what runs with those after it; where one is called "", it is what flags alone mean.
        argv: The words after the first.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(about)
        return 0
    if "" in commands and argv[0].startswith("-"):
        argv = ["", *argv]
    if argv[0] not in commands:
        near = did_you_mean(argv[0], filter(None, commands))
        print(f"indiclip {group}: no command {argv[0]!r}{near} (indiclip {group} --help)", file=sys.stderr)
        return 2
    return guarded(f"indiclip {group} {argv[0]}".rstrip(), commands[argv[0]], argv[1:])


def guarded(name: str, command: Callable[[list[str]], int], argv: list[str]) -> int:
    """Runs a command with a line per mistake. Returns the exit status: that of the command, 2 for a mistake in the
    words, 1 for what breaks on the way, 130 after Ctrl-C, 143 after SIGTERM.
    """
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        return command(argv)
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has seen enough, which `indiclip.cli` says
        raise
    except (ValueError, OSError, RuntimeError, ImportError) as error:  # RuntimeError: a worker process was killed
        if os.environ.get("INDICLIP_TRACEBACK"):
            raise
        text = str(error)
        if isinstance(error, OSError) and error.filename:  # Python's own begins with a number
            text = f"{error.filename}: {error.strerror}"
        print(f"{name}: {' '.join(text.split())}", file=sys.stderr)
        return 2 if isinstance(error, ValueError | FileNotFoundError | FileExistsError | ImportError) else 1
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminated(number: int, frame: Any) -> NoReturn:
    # A scheduler stops the workers too, at which the DataLoader would raise an error in the midst of the cleaning up.
    # Not SIG_DFL: Python would say of a signal that has just come that it was "ignored due to race condition".
    signal.signal(signal.SIGCHLD, lambda *_: None)
    raise SystemExit(128 + number)  # so that open files are removed and processes ended
