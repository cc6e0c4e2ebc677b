"""Token maps, plots and the HTML report: what people see."""

from saccade.reports.frontier_report import Report, render_report
from saccade.reports.render_tokens import token_map, view
from saccade.reports.rows import Row, Sample
from saccade.reports.token_map import draw_blocks, draw_tokens, token_colours
from saccade.reports.training_report import TrainingReport, render_training
from saccade.reports.training_rows import Checked, Share

__all__ = [
    "Checked",
    "Report",
    "Row",
    "Sample",
    "Share",
    "TrainingReport",
    "draw_blocks",
    "draw_tokens",
    "render_report",
    "render_training",
    "token_colours",
    "token_map",
    "view",
]
