"""Export checkpoints as bundles, open bundles, and translate and score text with them.

This package needs torch, sentencepiece and safetensors, but not fairseq.
"""

from typing import TYPE_CHECKING

from nmt_moe.inference.bundle import DTYPES, BundleConfig, SearchDefaults, TextPipeline
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

if TYPE_CHECKING:
    from nmt_moe.inference.exporting import Description, Pieces, export

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


def __getattr__(name: str) -> object:
    """Import the names of an export only on first use, because opening a bundle should be fast."""
    if name in ("Description", "Pieces", "export"):
        from nmt_moe.inference import exporting

        return getattr(exporting, name)
    raise AttributeError(f"module `nmt_moe.inference` has no attribute `{name}`")
