"""YAML in which no key stands twice: PyYAML's loaders keep the last and drop the others without a word."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml


class UniqueKeys(yaml.SafeLoader):
    """Safe YAML in which a duplicated key of a mapping is an error with its line."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        found: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in found:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value!r} is duplicated", problem_mark=key.start_mark
                )
            found.add(str(key.value))
        return super().construct_mapping(node, deep)
