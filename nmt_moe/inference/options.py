"""Combine the options that a caller passes with the bundle's defaults."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from nmt_moe.checks import check_whole
from nmt_moe.inference.bundle import SearchDefaults
from nmt_moe.inference.searching import Limits
from nmt_moe.search import BeamConfig, SearchConfig


@dataclass(frozen=True)
class TranslationOptions:
    """The options of `Translator.translate`, after they have been checked."""

    config: BeamConfig
    limits: Limits
    num_hypotheses: int
    batch_tokens: int
    target_lang: str | None
    with_experts: bool

    @classmethod
    def read(
        cls,
        defaults: SearchDefaults,
        num_hypotheses: int,
        batch_tokens: int,
        target_lang: str | None,
        with_experts: bool,
        **search: float | None,
    ) -> Self:
        """Override the defaults with the given options, and check the result.

        Args:
            defaults: Search defaults of the bundle.
            num_hypotheses: Number of hypotheses to return for each sentence, at most the beam size.
            batch_tokens: Maximum number of source pieces in a batch, including padding.
            target_lang: Target language of a multilingual model, already checked.
            with_experts: Whether to also return the experts of each piece.
            search: Values for fields of `defaults`; None leaves a field as it is.

        Raises:
            ValueError: if an option is out of range.
        """
        given = {name: value for name, value in search.items() if value is not None}
        defaults = replace(defaults, **given)  # type: ignore[arg-type]
        check_whole("num_hypotheses", num_hypotheses, 1)
        if num_hypotheses > defaults.beam_size:
            raise ValueError(
                f"`num_hypotheses` must be at most the beam size, {defaults.beam_size}, but is "
                f"{num_hypotheses}. Use a larger beam."
            )
        check_whole("batch_tokens", batch_tokens, 1)
        penalties = SearchConfig(
            float(defaults.length_penalty_alpha),
            float(defaults.coverage_penalty_beta),
            float(defaults.beam_prune),
        )
        return cls(
            BeamConfig(defaults.beam_size, defaults.length_exponent, penalties, num_hypotheses),
            Limits(defaults.max_len_a, defaults.max_len_b),
            num_hypotheses,
            batch_tokens,
            target_lang,
            with_experts,
        )
