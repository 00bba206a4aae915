"""Numbers, names and times of a search as a person reads them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def number(value: float, digits: int = 4) -> str:
    """At most so many significant digits, without padding: 0.25, 3e-4, 1.5e+6."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"
    return _scientific(value, digits)


def _scientific(value: float, digits: int) -> str:
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{'+' if int(exponent) > 0 else ''}{int(exponent)}"


def numbers(values: Sequence[float], digits: int = 4) -> list[str]:
    """Each as `number`, with as many digits as tell different values apart."""
    # One notation for all: 5e-4, 1e-3, 2e-3.
    small = any(0 < abs(value) < 1e-3 for value in values)
    texts: list[str] = []
    for more in range(digits, 18):
        texts = [
            _scientific(value, more) if small and 0 < abs(value) < 0.1 else number(value, more) for value in values
        ]
        if len(set(texts)) == len(set(values)):
            break
    return texts


def value(item: Any, longest: int | None = None) -> str:
    """A value of a config field, as YAML would have it; cut if longer than `longest`."""
    if isinstance(item, bool) or item is None:
        shown = {True: "true", False: "false", None: "null"}[item]
    elif isinstance(item, int | float):
        shown = str(item) if isinstance(item, int) else number(item)
    elif isinstance(item, list | tuple):
        shown = ", ".join(value(part) for part in item)
    else:
        shown = " ".join(str(item).split())
    return shown if longest is None or len(shown) <= longest else shown[: longest - 1] + "…"


def steps(done: int, total: int) -> str:
    """Steps of a trial: 14, or 7 of 14 where it was cut."""
    return f"{done} of {total}" if done < total else str(done)


def params(values: Mapping[str, Any]) -> str:
    """All parameters in one line; numbers are shortened."""
    return " ".join(f"{name}={value(item)}" for name, item in values.items())


def short(fields: Sequence[str]) -> dict[str, str]:
    """Field -> its last part, or the whole where two fields share that."""
    last = [name.rsplit(".", 1)[-1] for name in fields]
    return {name: end if last.count(end) == 1 else name for name, end in zip(fields, last, strict=True)}
