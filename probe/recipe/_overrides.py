"""Overrides: values by dotted key, `pairs.0.before`, put into the plain data of a recipe.

>>> table = {"selection": {"samples": 100}}
>>> override(table, "selection.samples", "50", "mine.toml")
>>> table
{'selection': {'samples': 50}}
"""

import tomllib

from probe.errors import ProbeError


def override(table: dict[str, object], key: str, value: str | int | float, where: str) -> None:
    """Set one value in place.

    Args:
        table: The data.
        key: Names of keys and numbers of entries, joined by dots.
        value: The value; a text is read as TOML where it is TOML, and as plain text otherwise.
        where: What complaints name.

    Raises:
        ProbeError: The key leads nowhere.
    """
    read = _read_value(value) if isinstance(value, str) else value
    *parents, last = key.split(".")
    inner: object = table
    for number, part in enumerate(parents):
        if isinstance(inner, list):
            inner = _item(inner, part, key, where)
        elif isinstance(inner, dict):
            inner = inner.setdefault(part, {})
        else:
            raise ProbeError(f"{where}: --set {key}: {'.'.join(parents[:number])} has no keys")
    if isinstance(inner, list):
        _item(inner, last, key, where)
        inner[int(last)] = read
    elif isinstance(inner, dict):
        inner[last] = read
    else:
        raise ProbeError(f"{where}: --set {key}: {'.'.join(parents)} has no keys")


def _item(items: list[object], index: str, key: str, where: str) -> object:
    if index not in map(str, range(len(items))):
        raise ProbeError(
            f"{where}: --set {key}: {index!r} is not one of its {len(items)} entries, from 0 on"
        )
    return items[int(index)]


def _read_value(text: str) -> object:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # no TOML, or what Python cannot hold
        return text
