"""Values of JSON files that others wrote: of the right type, or refused."""

import json
import reprlib
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def parse_json(data: bytes, where: str) -> Any:
    """The content of a JSON file; a byte order mark does not matter.

    Raises:
        ValueError: it is not JSON; with the file.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{where} is not JSON: {e}") from None


def short(value: Any) -> str:
    """A value for messages, cut where it is long."""
    return _SHORT.repr(value)


def whole(value: Any, low: int = -(2**63), high: int = 2**63 - 1) -> int | None:
    """A whole number from `low` to `high`, 3.0 too; None for any other value."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        return None
    return int(value) if value == int(value) else None


def number(value: Any, low: float, high: float) -> float | None:
    """A number from `low` to `high`; None for any other value."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        return None
    return value
