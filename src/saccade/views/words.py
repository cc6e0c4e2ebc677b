"""Numbers and text as the report writes them: fixed digits, real minus signs, everything escaped."""

from __future__ import annotations

import html
import math
import re

NONE = "–"


def known(*values: float | None) -> bool:
    """Whether every value is a finite number."""
    return all(v is not None and math.isfinite(v) for v in values)


def escape(text: object) -> str:
    return html.escape(str(text), quote=True)


def prose(text: str) -> str:
    """Escaped text in which `` `code` `` is set as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def number(value: float | None, digits: int = 3) -> str:
    """``value`` to ``digits`` significant digits, whole thousands with a thin space: ``0.314``, ``17.6``, ``1 240``."""
    if value is None or not math.isfinite(value):
        return NONE
    if value and abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}".replace(",", "\u202f").replace("-", "−")
    places = digits - 1 - (math.floor(math.log10(abs(value))) if value else 0)
    text = f"{value:.{max(0, min(places, 6))}f}"
    return text.replace("-", "−")


def times(value: float | None) -> str:
    """``1.52×``"""
    return NONE if value is None or not math.isfinite(value) else f"{value:.2f}×"


def percent(value: float | None, unit: str = " %") -> str:
    """A fraction as ``71.2 %``."""
    return NONE if value is None or not math.isfinite(value) else f"{100 * value:.1f}{unit}".replace("-", "−")


def points(value: float | None) -> str:
    """A difference of fractions in percentage points with its sign: ``−0.4``, ``+1.0``, ``0.0``."""
    if value is None or not math.isfinite(value):
        return NONE
    text = f"{100 * value:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")
