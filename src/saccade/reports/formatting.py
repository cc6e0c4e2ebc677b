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
    """Text as HTML shows it, quotes too."""
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


def whole(value: float | None) -> str:
    """A count, every digit of it: ``4 000``."""
    return NONE if value is None or not math.isfinite(value) else f"{value:,.0f}".replace(",", "\u202f")


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


def compact(value: float) -> str:
    """A tick: as short as it can be, thousands parted, tiny and huge ones with an exponent: ``0.5``, ``3e−5``."""
    if value and not 1e-3 <= abs(value) < 1e7:
        digits, exponent = f"{value:.3g}".split("e") if "e" in f"{value:.3g}" else (f"{value:.3g}", "")
        text = digits + (f"e{int(exponent)}" if exponent else "")
    else:
        text = f"{value:,.6g}" if abs(value) < 1e5 else f"{value:,.0f}"
    return text.replace(",", "\u202f").replace("-", "−")


def amount(value: float | None) -> str:
    """A count of any size: ``1 240``, ``3.21 million``, ``1.05 billion``."""
    for unit, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value is not None and math.isfinite(value) and abs(value) >= unit:
            return f"{number(value / unit)} {name}"
    return number(value)
