"""How torch takes our containers apart: for torch.export, tree_map and all that is built on them."""

from __future__ import annotations

import json
from collections.abc import Sequence

from torch.utils import _pytree


def register(cls: type, parts: Sequence[str], static: Sequence[str] = ()) -> None:
    """Make a class a node of pytrees.

    Args:
        cls: the class, whose objects are put together again without calling its __init__.
        parts: attributes that are tensors, None, or nodes themselves.
        static: the others, hashable, and of what JSON can say: a program that was exported takes no other ones.
    """

    def flatten(value):
        return [getattr(value, name) for name in parts], tuple(getattr(value, name) for name in static)

    def flatten_with_keys(value):
        values, context = flatten(value)
        return [(_pytree.GetAttrKey(name), each) for name, each in zip(parts, values, strict=True)], context

    def unflatten(values, context):
        made = object.__new__(cls)
        for name, each in zip((*parts, *static), (*values, *context), strict=True):
            object.__setattr__(made, name, each)  # of a frozen dataclass, too
        return made

    _pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        to_dumpable_context=json.dumps,
        from_dumpable_context=lambda text: _as_tuples(json.loads(text)),
        flatten_with_keys_fn=flatten_with_keys,
    )


def _as_tuples(value):
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value
