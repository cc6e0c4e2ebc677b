"""How the values of a metric are written, and which way is better."""

from __future__ import annotations

from dataclasses import dataclass

from saccade.reports.formatting import NONE, known, number, percent, points

FINE = 0.0099  # ticks closer than this show a decimal more


@dataclass(frozen=True)
class Scale:
    """A share is written in per cent and its differences in points; anything else in its own unit."""

    share: bool = True
    lower: bool = False  # less is better
    unit: str = ""
    title: str = ""  # of a figure, where the name is none

    @classmethod
    def of(cls, metric: str) -> Scale:
        """The scale of a metric by its name; all but a few are shares."""
        return OTHERS.get(metric, SHARE)

    @property
    def suffix(self) -> str:
        """What stands after a value: " %", " nats", or nothing."""
        return " %" if self.share else f" {self.unit}" if self.unit else ""

    @property
    def step(self) -> str:
        """What a difference is counted in: "points", "nats", or "" for a bare number."""
        return "points" if self.share else self.unit

    def value(self, value: float | None, suffix: bool = True) -> str:
        """``71.2 %``, ``0.9873``, ``0.0521 nats``."""
        if value is None or not known(value):
            return NONE
        if self.share:
            return percent(value, " %" if suffix else "")
        text = number(value) if self.lower else f"{value:.4f}".replace("-", "−")
        return text + (self.suffix if suffix else "")

    def difference(self, value: float | None) -> str:
        """With its sign: ``−0.4`` (points), ``−0.0127``."""
        if value is None or self.share or not known(value):
            return points(value)
        text = f"{value:+.4f}"
        return "0.0" if float(text) == 0 else text.replace("-", "−")

    def amount(self, value: float) -> str:
        """A difference without its sign: ``0.5 points``, ``0.0127``."""
        return f"{100 * value:.1f} points" if self.share else f"{number(value)}{self.suffix}"

    def axis(self, metric: str) -> str:
        """The name of an axis: ``top-1 (%)``, ``kl (nats, less is better)``."""
        said = ", ".join(word for word in ("%" if self.share else self.unit, "less is better" * self.lower) if word)
        return f"{metric} ({said})" if said else metric

    def tick(self, merit: float, step: float) -> str:
        """A tick of an axis on which better is up, so many units below the next."""
        if self.share:
            return percent(merit, "") if step < FINE else f"{100 * merit:.0f}"
        return f"{round(self.merit(merit), 9) + 0.0:g}".replace("-", "−")

    def merit(self, value: float) -> float:
        """The value, or its negative where less is better: more merit is better. Its own inverse."""
        return -value if self.lower else value


SHARE = Scale()
OTHERS = {"kl": Scale(False, True, "nats", "KL"), "cosine": Scale(False), "cells": Scale(False)}
