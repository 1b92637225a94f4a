"""`model.head_overrides`: other arguments for heads that an earlier config names, so that a method's page can stack.

Lists of a config grow with `+:` and are replaced without it; an item of theirs cannot be changed.
"""

from typing import Any

from jsonargparse import Namespace

from indiclip.names import did_you_mean, shorten

_KEY = "head_overrides"
_Said = dict[tuple[str, str], tuple[str, Any]]  # head and argument -> key of the override that gave it, and the value


def apply_head_overrides(config: Namespace) -> None:
    """Give the heads of a config, in place, the arguments that its `model.head_overrides` have for them.

    What is left is a config as if its heads had been written so. Overrides win over the heads' own arguments, and none
    over another: where two want an argument of one head differently, neither counts. A file that has no heads keeps its
    overrides for those of the other files.

    Args:
        config: Of a file, or all files and flags of a command, merged and not yet checked.

    Raises:
        ValueError: An override that names no head of the config, or nothing to change; two that do not agree.
    """
    for path in ("model", *(f"{command}.model" for command in ("fit", "validate", "test", "predict"))):
        model = config.get(path)
        if not isinstance(model, Namespace) or not model.get(_KEY) or not model.get("heads"):
            continue
        by_name = {_name(head): head for head in model["heads"] if isinstance(head, Namespace)}
        said: _Said = {}
        for number, override in enumerate(model.pop(_KEY)):
            _apply(f"model.{_KEY}[{number}]", override, by_name, said)


def _apply(key: str, override: Any, heads: dict[str, Namespace], said: _Said) -> None:
    changes = dict(override) if isinstance(override, dict) else vars(override).copy()
    name = str(changes.pop("head", ""))
    if name not in heads:
        raise ValueError(
            f"{key}.head: found {name!r}{did_you_mean(name, heads)}; expected the name of a head of model.heads: "
            f"{', '.join(heads)}"
        )
    if not changes:
        raise ValueError(f"{key}: changes nothing; expected arguments of the head beside `head`")
    arguments = heads[name].get("init_args") or Namespace()  # type: ignore[no-untyped-call]
    for argument, value in changes.items():
        first, others = said.setdefault((name, argument), (key, value))
        if value is not others and value != others:  # NaN is not equal to itself
            raise ValueError(
                f"{key}.{argument}: found {shorten(value)}, and {first}.{argument} of the same head {name!r} is "
                f"{shorten(others)}; expected one of them"
            )
        arguments[argument] = value
    heads[name]["init_args"] = arguments


def _name(head: Namespace) -> str:
    """As `Head` names itself: by the file of its class, or by its argument."""
    given = (head.get("init_args") or {}).get("name")
    return given or str(head.get("class_path")).rpartition(".")[0].rpartition(".")[2]
