"""What a trained model's experts do on a text. Needs no fairseq."""

from nmt_moe.inspection.reading import Reading, TextUsage, collect_usage, read_text
from nmt_moe.inspection.usage import ExpertUsage

__all__ = ["ExpertUsage", "Reading", "TextUsage", "collect_usage", "read_text"]
