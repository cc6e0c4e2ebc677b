"""Token maps, plots and the HTML report: what people see."""

from saccade.views.look import token_map, view
from saccade.views.report import Report, Row, Sample, render_report
from saccade.views.tokenmap import draw_blocks, draw_tokens, token_colours

__all__ = [
    "Report",
    "Row",
    "Sample",
    "draw_blocks",
    "draw_tokens",
    "render_report",
    "token_colours",
    "token_map",
    "view",
]
