"""Export checkpoints as bundles, open bundles, and translate and score text with them.

This package needs torch, sentencepiece and safetensors, but not fairseq.
"""

from nmt_moe.inference.bundle import DTYPES, BundleConfig, SearchDefaults, TextPipeline
from nmt_moe.inference.export import Description, Pieces, export
from nmt_moe.inference.language_model import LanguageModel
from nmt_moe.inference.opening import Bundle, open_bundle, verify_bundle
from nmt_moe.inference.results import (
    Hypothesis,
    LineScore,
    PairScore,
    Routing,
    Sentence,
    Translation,
    total_score,
)
from nmt_moe.inference.text import find_fault, separator_of
from nmt_moe.inference.translator import Translator

__all__ = [
    "DTYPES",
    "Bundle",
    "BundleConfig",
    "Description",
    "Hypothesis",
    "LanguageModel",
    "LineScore",
    "PairScore",
    "Pieces",
    "Routing",
    "SearchDefaults",
    "Sentence",
    "TextPipeline",
    "Translation",
    "Translator",
    "export",
    "find_fault",
    "open_bundle",
    "separator_of",
    "total_score",
    "verify_bundle",
]
