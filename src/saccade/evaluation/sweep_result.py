"""What a sweep found."""

from __future__ import annotations

from dataclasses import dataclass

from saccade.evaluation.accuracy import Evaluated, Score
from saccade.evaluation.speed import Speed
from saccade.reports.scale import Scale
from saccade.terminal.results import counted
from saccade.terminal.text_table import Table


@dataclass(frozen=True)
class SweepRow(Score):
    """One row of ``eval``: the score, and what else is known of the setting."""

    speed: Speed | None  #   None: not timed
    trained: bool | None  #  whether the weights were trained for it; None: not recorded
    untrained: tuple[str, ...] = ()  # methods in it whose own parameters are as they were initialised


class Evaluation(Evaluated):
    """What ``eval`` gives: a row for each setting, the dense model first; and what could not be read or scored."""

    rows: list[SweepRow]

    def table(self) -> Table:
        """Columns that have anything to say, by importance; of a timed evaluation without losses and top-5."""
        rows = self.rows
        timed = any(r.speed for r in rows)
        few = {"NLL", "KL", "top-5"} if timed else set()
        scale = Scale.of(rows[0].metric)
        columns = {
            rows[0].metric: [_value(r, scale) for r in rows],
            "points vs dense": [_delta(r) for r in rows],
            "GMACs": [f"{r.gmacs:.3f}" for r in rows],
            "speed-up": [f"{r.speed.speedup:.2f}×" if r.speed else "" for r in rows],
            "agree": [f"{r.agreement.mean:.1%}" for r in rows],
            "note": ["untrained" if r.untrained else "" for r in rows],
            "trained": [{True: "yes", False: "no", None: ""}[r.trained] for r in rows],
            "MAC ratio": [f"{r.mac_ratio:.2f}×" for r in rows],
            "images/s": [f"{r.speed.images_per_s:.1f}" if r.speed else "" for r in rows],
            "top-5": [f"{r.top5.mean:.1%}" for r in rows],
            "tokens": [f"{r.tokens:.0f}" for r in rows],
            "NLL": [f"{r.nll.mean:.3f}" for r in rows],
            "KL": [f"{r.kl.mean:.3f}" for r in rows],
        }
        shown = {name: cells for name, cells in columns.items() if name not in few}
        caption = "Intervals are at 95 %; agree and KL are with the dense model's answers."
        if speed := rows[0].speed:
            caption += f" Speed: medians of {speed.runs} interleaved runs at batch {speed.batch}, {speed.runner}."
        cells = [[r.setting, *found] for r, *found in zip(rows, *shown.values(), strict=True)]
        return Table(counted(rows[0].images, "image"), ["setting", *shown], cells, caption)


def _value(row: Score, scale: Scale) -> str:
    """The metric with its interval."""
    if scale.share:
        return f"{row.value.mean:.2%} [{row.value.low:.1%}, {row.value.high:.1%}]"
    mean, low, high = (scale.value(v, False) for v in row.value.three())
    return f"{mean} [{low}, {high}]"


def _delta(row: Score) -> str:
    """The difference from dense in points, with its interval."""
    return "" if row.delta is None else "{:+.2f} [{:+.1f}, {:+.1f}]".format(*(100 * v for v in row.delta.three()))


def untrained_note(row: SweepRow) -> str:
    """What to say of a row whose methods have learned nothing yet."""
    return f"untrained: {', '.join(row.untrained)} (parameters as initialised)"
