"""The table of the commands' words fits the functions that it names."""

import inspect
import pkgutil
from pathlib import Path

import pytest
import yaml

from indiclip.commands import words
from indiclip.commands.words import _Parser as Parser

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
