"""Report how a trained model uses its experts on a text and how well it translates."""

from nmt_moe.inspection.page import render_page
from nmt_moe.inspection.reading import Reading, TextUsage, collect_usage, read_text
from nmt_moe.inspection.report import load_model, make_report
from nmt_moe.inspection.sentences import Part
from nmt_moe.inspection.usage import ExpertUsage

__all__ = [
    "ExpertUsage",
    "Part",
    "Reading",
    "TextUsage",
    "collect_usage",
    "load_model",
    "make_report",
    "read_text",
    "render_page",
]
