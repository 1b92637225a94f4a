"""YAML in which no key stands twice: PyYAML's loaders keep the last and drop the others without a word."""

import itertools
from collections.abc import Hashable
from typing import Any

import yaml


class UniqueKeys(yaml.SafeLoader):
    """Safe YAML in which a duplicated key of a mapping is an error with its line."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key for key, _ in node.value]
        for first, key in itertools.combinations(keys, 2):
            if first.value == key.value:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is duplicated", key.start_mark
                )
        return super().construct_mapping(node, deep)
