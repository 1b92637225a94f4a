"""The table of the commands' words fits the functions that it names."""

import inspect
import os
import pkgutil
import signal
import zipfile
from pathlib import Path

import pytest
import yaml

from indiclip.commands import words
from indiclip.commands.words import _Parser as Parser
from indiclip.commands.words import guarded

TABLE = yaml.safe_load(Path(words.__file__).with_name("commands.yaml").read_text("utf-8"))
COMMANDS = {
    f"{group} {name}": command
    for group, commands in TABLE.items()
    for name, command in commands.items()
    if name != "help"
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_function_takes_what_its_options_say(name):
    command = COMMANDS[name]
    parameters = inspect.signature(pkgutil.resolve_name(command["run"])).parameters.values()
    options = {action.dest for action in Parser(name, command)._actions} - {"help"}
    if command.get("passes_on"):
        options.add("others")
    if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters):
        assert options == {parameter.name for parameter in parameters}


@pytest.mark.parametrize("group", TABLE)
def test_a_groups_help_names_its_commands(group):
    for name in TABLE[group].keys() - {"help", ""}:
        assert f"  {name} " in TABLE[group]["help"]


@pytest.mark.parametrize(
    ("number", "status", "said"), [(signal.SIGINT, 130, "pack: stopped\n"), (signal.SIGTERM, 143, "")]
)
def test_a_signal_in_the_midst_of_a_write_is_no_mistake(number, status, said, tmp_path, capsys):
    """A ZIP file, as of NumPy's, raises an error of its own where it is left while one of its entries is written."""

    entries = []

    def write():
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
            entries.append(file.open("a.npy", "w"))
            os.kill(os.getpid(), number)
            entries[0].write(b"")
        return 0

    assert guarded("pack", write) == status
    entries[0].close()
    assert capsys.readouterr().err == said


def test_an_error_after_a_stop_that_was_dealt_with_is_one(capsys):
    def work():
        try:
            raise SystemExit(2)
        except SystemExit:
            raise ValueError("found 3; expected 2") from None

    assert guarded("pack", work) == 2
    assert capsys.readouterr().err == "pack: found 3; expected 2\n"
