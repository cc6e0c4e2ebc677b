"""What ``tune`` hands back: the model to deploy, the answer in words, and the table of what was measured."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from saccade.evaluation.candidates import RIVAL
from saccade.model import AdaptiveViT
from saccade.reports.frontier_picture import Point, frontier_picture
from saccade.reports.rows import Row
from saccade.reports.scale import Scale
from saccade.terminal.results import Result, counted
from saccade.terminal.text_table import Table


@dataclass(frozen=True, repr=False)
class TuneResult(Result):
    """What ``tune`` hands back."""

    model: AdaptiveViT  #    the chosen one, run the recommended way; also saved in ``folder / "model"``
    setting: str
    runner: str  #           the way to run it: "fp32", "bf16", "bf16 compiled", …
    recommendation: list[str]  # the answer first
    met: bool  #             whether the target was met
    rows: list[Row]  #       the frontier table
    folder: Path
    left_out: dict[str, str] = field(default_factory=dict)  # settings that failed, and their errors

    @property
    def verdict(self) -> list[str]:
        """The old name of ``recommendation``."""
        warnings.warn("TuneResult.verdict is recommendation now", DeprecationWarning, stacklevel=2)
        return self.recommendation

    def table(self) -> Table:
        """Dense, the best of each family, the frontier and the choice, by speed; the answer below."""
        rows = sorted(shown(self.rows), key=lambda row: row.speedup or 0.0)
        metric = self.rows[0].metric
        scale = Scale.of(metric)
        cells = [
            [
                ("→ " if row.chosen else "  ") + row.setting,
                "" if row.speedup is None else f"{row.speedup:.2f}×",
                "" if row.value is None else scale.value(row.value),
                interval(row.delta, row.delta_low, row.delta_high),
                f"{row.gmacs:.2f}",
                "" if row.images_per_s is None else f"{row.images_per_s:.0f}",
                f"{row.mac_ratio:.2f}×",
                "" if row.conversion is None else f"{row.conversion:.2f}",
            ]
            for row in rows
        ]
        names = (
            "setting",
            "speed-up",
            metric or "accuracy",
            "points vs dense",
            "GMACs",
            "images/s",
            "MAC ratio",
            "conversion",
        )
        hidden = len(self.rows) - len(rows)
        more = (
            [f"{counted(hidden, 'more row')}, random baselines among them: report.html, frontier.csv."]
            if hidden
            else []
        )
        said = "\n".join([*more, "", *self.recommendation]).replace("`", "")
        return Table("Best of each kind, the frontier (95 % intervals), and the choice (→)", names, cells, said)

    def frontier(self) -> Image.Image:
        """A picture of the metric against measured speed-up. Raises UserError where none was measured."""
        metric = self.rows[0].metric
        return frontier_picture(
            [
                Point(row.setting, row.family, row.speedup, row.value, row.value_low, row.value_high, row.chosen)
                for row in self.rows
                if row.speedup is not None and row.value is not None
            ],
            metric if metric not in ("", "top-1") else "accuracy",
        )


def shown(rows: Sequence[Row]) -> list[Row]:
    """Rows that everybody should see: the dense model, the best of each family, the frontier, the choice, rivals."""

    def best(family: str) -> Row | None:
        found = [row for row in rows[1:] if row.family == family]
        return max(found, key=lambda row: (row.merit, row.speedup or 0.0), default=None)

    always = [rows[0], best("dense"), best("reduction")]
    return [r for r in rows if any(r is a for a in always) or r.chosen or (r.on_frontier and r.family != "random")
            or r.value is None or r.family == RIVAL]  # fmt: skip


def interval(mean: float | None, low: float | None, high: float | None) -> str:
    """``-0.7 [-2.7, +1.3]``, in points; empty where it was not measured."""
    if mean is None or low is None or high is None:
        return ""
    return f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
