"""The HTML report of ``analyze``: a section for each analysis, its answer first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from saccade.reports.formatting import escape, prose
from saccade.reports.page import how_it_was, render_page, section
from saccade.reports.svg import tag

Section = tuple[str, str, Sequence[str], str]  # name, what it asks, lines of the answer, markup


@dataclass(frozen=True)
class AnalysisReport:
    """All that the page shows; `` `code` `` in lines and notes is set as code."""

    title: str
    command: str
    sections: Sequence[Section]
    facts: dict[str, str]
    notes: Sequence[str]


def render_analysis(report: AnalysisReport) -> str:
    """The page as one string: styles, script, figures (SVG) and pictures (data URIs) are inside."""
    answers = [lines[0] for _, _, lines, _ in report.sections if lines] or [report.title]
    bodies = [
        section(escape(name), escape(name.capitalize() if len(name) > 3 else name.upper()), _body(asked, lines, markup))
        for name, asked, lines, markup in report.sections
    ]
    bodies.append(section("how", "How it was measured", how_it_was(report.command, report.facts, report.notes)))
    bodies.append('<dialog id="zoom"><img alt=""><p></p></dialog>')
    return render_page(report.title, "plain", answers[0], answers[1:], "", bodies, style="training.css")


def _body(asked: str, lines: Sequence[str], markup: str) -> str:
    said = "".join(tag("p", prose(line), kind="said") for line in lines)
    return tag("p", escape(asked), kind="hint") + said + f'<div style="margin-top: 16px">{markup}</div>'
