"""Reading and writing YAML, as plain values: the only home of yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from glp_lens.errors import InputError, one_line
from glp_lens.limits import NESTING, YAML_BYTES, YAML_EXPANDED


class _PlainLoader(yaml.SafeLoader):
    """A tag is ignored, and its mapping, list or text kept.

    The released training script writes its output folder with the tag of a Python object.
    """


def _untagged(loader: yaml.SafeLoader, tag: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return loader.construct_scalar(node)  # type: ignore[arg-type]


_PlainLoader.add_multi_constructor("", _untagged)


def read_yaml(path: Path, what: str, *, tags: bool = False) -> Any:
    """The value of a YAML file, bounded in size, nesting, and what its aliases expand to.

    Args:
        path: the file.
        what: names it in messages.
        tags: whether tags are allowed and passed over, whatever they name: nothing is imported or made of them.

    Raises:
        InputError: it cannot be read, is no YAML, or beyond a bound.
    """
    try:
        with path.open("rb") as file:
            data = file.read(YAML_BYTES + 1)
        if len(data) > YAML_BYTES:
            raise InputError(f"{what} {path} is over {YAML_BYTES:,} bytes long: expected a file of settings")
        loader = (_PlainLoader if tags else yaml.SafeLoader)(data.decode("utf-8"))
        try:
            if (node := loader.get_single_node()) is None:
                return None
            if (size := _expanded(node, {}, 0)) > YAML_EXPANDED:
                raise InputError(
                    f"{what} {path} expands to {size:.3g} characters by its aliases (*name), the most is "
                    f"{YAML_EXPANDED:,}: write out what is meant"
                )
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{what} {path} does not exist") from None
    except RecursionError:
        raise InputError(f"{what} {path} is not readable YAML: it is nested over {NESTING} levels deep") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as error:
        # Values of a tag that do not fit it fail in yaml's own code.
        raise InputError(f"{what} {path} is not readable YAML: {one_line(error, 300)}") from None


def _expanded(node: yaml.Node, known: dict[int, float], depth: int) -> float:
    """Characters of a node with every alias written out; each node is counted once, since aliases share nodes."""
    if depth > NESTING:
        raise RecursionError
    if id(node) not in known:
        known[id(node)] = float("inf")  # of an alias to what it is in
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        else:
            children = node.value if isinstance(node, yaml.SequenceNode) else []
        own = len(node.value) if isinstance(node, yaml.ScalarNode) else 0
        known[id(node)] = 1 + own + sum(_expanded(child, known, depth + 1) for child in children)
    return known[id(node)]


def to_yaml(value: Any) -> str:
    """Plain values as YAML text, in their order."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=float("inf"))
