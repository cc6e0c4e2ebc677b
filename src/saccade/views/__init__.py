"""Token maps, plots and the HTML report: what people see."""

from saccade.views.look import token_map, view
from saccade.views.report import Report, Row, Sample, render_report
from saccade.views.tokenmap import draw_blocks, draw_tokens, token_colours
from saccade.views.training import Checked, Share, TrainingReport, render_training
from saccade.views.usage import Usage, draw_usage, usage

__all__ = [
    "Checked",
    "Report",
    "Row",
    "Sample",
    "Share",
    "TrainingReport",
    "Usage",
    "draw_blocks",
    "draw_tokens",
    "draw_usage",
    "render_report",
    "render_training",
    "token_colours",
    "token_map",
    "usage",
    "view",
]
