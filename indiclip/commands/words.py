"""The words of a command: `commands.yaml` says what they are, and a mistake in them is one line."""

import argparse
import gc
import os
import pkgutil
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import yaml

from indiclip.masking import mask
from indiclip.names import did_you_mean, plain

_TERMINATED = 128 + signal.SIGTERM
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
_ASKING = {"-h", "--help"}


def run_command(words: list[str]) -> int:
    """Runs `indiclip COMMAND ...` or `indiclip GROUP COMMAND ...`. Returns the exit status, as `guarded` does."""
    group, *argv = words
    commands = yaml.safe_load(Path(__file__).with_name("commands.yaml").read_text("utf-8"))[group]
    about = commands.pop("help", "")
    name = argv[0] if argv else "help"
    if about and name in (*_ASKING, "help"):
        print(about)
        return 0
    if "" in commands and (not about or name.startswith("-")):
        name = ""
    elif name in commands:
        del argv[0]
    else:
        near = did_you_mean(name, filter(None, commands))
        print(f"indiclip {group}: no command {name!r}{near} (indiclip {group} --help)", file=sys.stderr)
        return 2
    title = f"indiclip {group} {name}".rstrip()
    return guarded(title, lambda: _run(title, commands[name], argv))


def _run(title: str, command: dict[str, Any], argv: list[str]) -> int:
    parser = _Parser(title, command)
    if _ASKING & {*argv}:  # also behind an option, which argparse would give it as a value
        parser.print_help()
        return 0
    flags = [flag for action in parser._actions for flag in action.option_strings]
    words = [] if command.get("passes_on") else argv[: argv.index("--")] if "--" in argv else argv
    for word in words:  # before argparse misses what the word should have been
        if word.startswith("--") and (flag := word.partition("=")[0]) not in flags:
            parser.error(f"{flag}: no such option{did_you_mean(flag, flags)}")
    options, others = parser.parse_known_args(argv)
    if command.get("passes_on"):
        options.others = others
    elif others:
        if not others[0].startswith("-"):
            named = parser._positionals._group_actions
            expected = " ".join(str(action.metavar) for action in named)
            many = any(action.nargs in ("*", "+") for action in named)
            how = f"every {expected} in one place, not among the options" if many else f"one {expected}"
            parser.error(f"found {others[0]!r} too; expected {how if expected else 'options alone'}")
        parser.error(f"{others[0]}: no such option{did_you_mean(others[0], flags)}")
    with importing():
        function = pkgutil.resolve_name(command["run"])  # imported now, so that nobody waits for a help or a mistake
    return int(function(**vars(options)))


class _Parser(argparse.ArgumentParser):
    """Of a command of `commands.yaml`. One line for a mistake; argparse's own begins with the usage."""

    def __init__(self, title: str, command: dict[str, Any]) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(
            title,
            description=command["about"],
            epilog=command["examples"],
            formatter_class=raw,
            allow_abbrev=False,
        )
        options = command["options"]
        has_exclusive = any("exclusive" in settings for settings in options.values())
        exclusive = self.add_mutually_exclusive_group() if has_exclusive else self
        for flags, settings in options.items():
            place = exclusive if settings.get("exclusive") else self
            arguments = {name: value for name, value in settings.items() if name != "exclusive"}
            if "type" in arguments:
                arguments["type"] = _TYPES[arguments["type"]]
            if isinstance(arguments.get("metavar"), list):
                arguments["metavar"] = tuple(arguments["metavar"])  # of several words, which argparse wants so
            place.add_argument(*flags.split(), **arguments)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} ({self.prog} --help)")


def _count(text: str, least: int = 1) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"found {text!r}; expected a whole number from {least}")
    return int(text)


def _share(text: str) -> float:
    try:
        if 0 <= float(text) <= 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"found {text!r}; expected a share from 0 to 1")


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if not size:
        raise argparse.ArgumentTypeError(f"found {text!r}; expected a size such as 500MB or 2GB")
    return size


_TYPES: dict[str, Callable[[str], Any]] = {
    "count": _count,
    "whole": lambda text: _count(text, 0),
    "share": _share,
    "size": _size,
    "int": int,
    "float": float,
    "path": Path,
}


def guarded(name: str, command: Callable[[], int]) -> int:
    """Runs a command with a line per mistake. Returns the exit status: that of the command, 2 for a mistake in the
    words, 1 for what breaks on the way, 130 after Ctrl-C, 143 after SIGTERM.
    """
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        return command()
    except KeyboardInterrupt:
        return _say_stopped(name)
    except BrokenPipeError:  # `| head` has seen enough, which `indiclip.cli` says
        raise
    except (ValueError, OSError, RuntimeError, ImportError) as error:  # RuntimeError: a worker process was killed
        if (stop := _stop_behind(error)) is not None:
            return _say_stopped(name) if isinstance(stop, KeyboardInterrupt) else _TERMINATED
        if os.environ.get("INDICLIP_TRACEBACK"):
            raise
        text = str(error)
        if isinstance(error, OSError) and error.filename:  # Python's own begins with a number
            text = f"{error.filename}: {error.strerror}"
        print(plain(mask(f"{name}: {' '.join(text.split())}")), file=sys.stderr)
        return 2 if isinstance(error, ValueError | FileNotFoundError | FileExistsError | ImportError) else 1
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminated(number: int, frame: Any) -> NoReturn:
    # A scheduler stops the workers too, at which the DataLoader would raise an error in the midst of the cleaning up.
    # Not SIG_DFL: Python would say of a signal that has just come that it was "ignored due to race condition".
    signal.signal(signal.SIGCHLD, lambda *_: None)
    raise SystemExit(_TERMINATED)  # so that open files are removed and processes ended


def _stop_behind(error: BaseException | None) -> BaseException | None:
    """The Ctrl-C or SIGTERM that this error hides, as of a file that cannot be closed in the midst of a write."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        if isinstance(error, SystemExit) and error.code == _TERMINATED:
            break
        error = error.__context__
    return error


def _say_stopped(name: str) -> int:
    print(f"{name}: stopped", file=sys.stderr)
    return 128 + signal.SIGINT


@contextmanager
def importing() -> Iterator[None]:
    """Around imports, which take seconds: Ctrl-C during one of them would be a page of traceback.

    The garbage collector rests, because it would search again and again what stays until the end: a tenth of the time.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        os.write(2, b"indiclip: stopped\n")
        os._exit(128 + number)

    is_main = threading.current_thread() is threading.main_thread()
    # Not where a caller has a handler of its own, or none, as in a background job.
    leaves = is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if leaves:
        signal.signal(signal.SIGINT, leave)
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
        if leaves:
            signal.signal(signal.SIGINT, signal.default_int_handler)
