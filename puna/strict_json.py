"""JSON that is read strictly: exact keys, exact types, one spelling for one value.

Knows dataclasses and their annotations, not what any of them means.
"""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints


def check_json(value: Any, hint: Any, where: str) -> None:
    """Raise ValueError unless `value`, read from JSON, is what the annotation `hint` stands for.

    A dataclass is an object (its keys are checked by `exact_keys`) and a tuple a list.
    """
    origin, args = get_origin(hint), get_args(hint)
    if is_dataclass(hint) and isinstance(value, dict):
        for name, field_hint in get_type_hints(hint).items():
            if name in value:
                check_json(value[name], field_hint, f"{where}.{name}")
    elif origin is tuple and isinstance(value, list):
        hints = args[:1] * len(value) if ... in args else args
        if len(hints) != len(value):
            raise ValueError(f"{where} has {len(value)} items, needed {len(hints)}")
        for i, (item, item_hint) in enumerate(zip(value, hints, strict=True)):
            check_json(item, item_hint, f"{where}[{i}]")
    elif origin is dict and isinstance(value, dict):
        for name, item in value.items():
            check_json(item, args[1], f"{where}.{name}")
    elif origin is UnionType:
        if value is not None or NoneType not in args:
            check_json(value, args[0], where)
    elif origin is Literal:
        if value not in args:
            raise ValueError(f"{where} is {value!r}; it must be one of {', '.join(args)}")
    elif hint is not Any:
        kinds = {float: (int, float), int: (int,), str: (str,), bool: (bool,)}.get(hint, ())
        if not isinstance(value, kinds) or (isinstance(value, bool) and hint is not bool):
            name = getattr(hint, "__name__", hint)
            raise ValueError(f"{where} is {value!r}; it must be {name}")


def canonical_json(data: Any) -> bytes:
    """One spelling for one value: sorted keys, two spaces, a newline at the end."""
    return (json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def exact_keys(cls: type, data: dict[str, Any]) -> dict[str, Any]:
    """Return `data` if its keys are exactly the fields of the dataclass `cls`, else ValueError."""
    expected = {f.name for f in fields(cls)}
    if not isinstance(data, dict):
        raise ValueError(f"{cls.__name__}: found {type(data).__name__}, needed an object")
    if unknown := sorted(set(data) - expected):
        raise ValueError(f"{cls.__name__}: unknown keys {', '.join(unknown)}")
    if missing := sorted(expected - set(data)):
        raise ValueError(f"{cls.__name__}: missing keys {', '.join(missing)}")
    return data
