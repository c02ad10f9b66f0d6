"""Translate raw text, or score its reference translations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Self

import torch

from nmt_moe.checks import check_whole
from nmt_moe.inference.bundle import SearchDefaults
from nmt_moe.inference.describing import add_experts, describe, join_sentences
from nmt_moe.inference.forcing import force_in_batches
from nmt_moe.inference.layers import MoE
from nmt_moe.inference.networks import TranslationNetwork
from nmt_moe.inference.opening import Bundle, check_same, language_mark, open_bundle
from nmt_moe.inference.options import TranslationOptions
from nmt_moe.inference.results import (
    PairScore,
    Sentence,
    Translation,
    score_line,
)
from nmt_moe.inference.searching import Ensemble, run_batches, search, share_batches
from nmt_moe.inference.text import SourceText, TargetText, check_line, check_texts, separator_of
from nmt_moe.text.lines import BadLine, in_chunks
from nmt_moe.text.vocabulary import EOS, MARKS

# Number of source pieces in a batch, including padding; larger batches are faster, but need more
# memory.
BATCH_TOKENS = 2048
# Number of lines to read before they are sorted into batches.
READ_AHEAD = 2048


class Translator:
    """A translator with one bundle or an ensemble of several, opened by `Translator.load`.

    Results do not depend on how texts are batched, except in the last bits of scores.

    Attributes:
        languages: Target languages of a multilingual model; otherwise the only target language, if
            known.
        defaults: Search defaults of the first bundle.
        config: Configuration of the first bundle.
        vocabularies: Vocabularies of "source" and "target".
    """

    def __init__(self, bundles: Sequence[Bundle]) -> None:
        first = bundles[0]
        for bundle in bundles[1:]:
            check_same(first, bundle)
        self.config = first.config
        self.vocabularies, self._processors = first.vocabularies, first.processors
        self._networks = [
            bundle.network for bundle in bundles if isinstance(bundle.network, TranslationNetwork)
        ]
        self._ensemble = Ensemble(self._networks)
        self.defaults: SearchDefaults = first.config.search
        names = first.config.languages
        self.languages = names if first.config.is_multilingual else names[1:]
        source = None if first.config.is_multilingual or not names else names[0]
        self._source_text = SourceText(first.config.text, first.processors["source"], source)

    @classmethod
    def load(cls, folder: Path | str | Sequence[Path | str]) -> Self:
        """Open a bundle, or several bundles as an ensemble.

        Args:
            folder: A folder that `nmt-moe export` wrote, or a list of folders for an ensemble.

        Raises:
            ValueError: if a file is missing, changed or of a newer format, or two bundles of an
                ensemble differ; the message names the file or the difference.
        """
        folders = [folder] if isinstance(folder, str | Path) else list(folder)
        if not folders:
            raise ValueError("`folder` must name at least one bundle, but is empty.")
        return cls([open_bundle(one, "translation") for one in folders])

    @torch.inference_mode()
    def translate(
        self,
        texts: str | Sequence[str],
        target_lang: str | None = None,
        *,
        beam_size: int | None = None,
        num_hypotheses: int = 1,
        length_penalty_alpha: float | None = None,
        coverage_penalty_beta: float | None = None,
        beam_prune: float | None = None,
        batch_tokens: int = BATCH_TOKENS,
        with_experts: bool = False,
    ) -> list[Translation]:
        """Translate texts.

        The lines of a text are kept, and blank lines stay blank. A line with more pieces than the
        bundle's `max_source_pieces` is split into sentences. Language tokens and other special
        symbols typed in a text are read as plain text.

        Args:
            texts: Any number of texts; a string means a list of one.
            target_lang: Target language of a multilingual model, one of `languages`.
            beam_size: Number of hypotheses to keep for each sentence; here and below, None means
                the bundle's default.
            num_hypotheses: Number of hypotheses to return for each sentence, at most `beam_size`.
            length_penalty_alpha: GNMT's length penalty; 0 = off.
            coverage_penalty_beta: GNMT's coverage penalty; 0 = off.
            beam_prune: GNMT's pruning, in nats; 0 = off.
            batch_tokens: Maximum number of source pieces in a batch, including padding. Each of
                torch's threads translates one batch at a time.
            with_experts: Whether to also return the experts of each piece in the first bundle.

        Returns:
            The translation of each text, in order.

        Raises:
            ValueError: if a text contains a control character or half a surrogate pair, the model
                does not know the language, or an option is out of range; the message says which.
        """
        return self._translate(
            check_texts(texts, "text"),
            TranslationOptions.read(
                self.defaults,
                num_hypotheses,
                batch_tokens,
                self._check_language(target_lang),
                with_experts,
                beam_size=beam_size,
                length_penalty_alpha=length_penalty_alpha,
                coverage_penalty_beta=coverage_penalty_beta,
                beam_prune=beam_prune,
            ),
        )

    def translate_lines(
        self,
        lines: Iterable[str | BadLine],
        target_lang: str | None = None,
        *,
        read_ahead: int = READ_AHEAD,
        **options: int | float | bool | None,
    ) -> Iterator[Translation | BadLine]:
        """Translate lines as they arrive, and pass bad lines through.

        Args:
            lines: Lines, for example from `nmt_moe.text.lines.scan_lines`.
            target_lang: Target language of a multilingual model, one of `languages`.
            read_ahead: Number of lines to read before the first one is translated.
            options: Further options of `translate`.

        Yields:
            The translation of each line, or the line that cannot be translated.
        """
        if isinstance(lines, str):
            raise ValueError("`lines` must be a series of lines, but is one string. Use a list.")
        check_whole("read_ahead", read_ahead, 1)
        self.translate([], target_lang, **options)  # type: ignore[arg-type]  # rejects options early
        source = map(check_line, lines, count(1))
        for chunk in in_chunks(source, read_ahead):
            good = [line for line in chunk if isinstance(line, str)]
            translated = iter(self.translate(good, target_lang, **options))  # type: ignore[arg-type]
            for line in chunk:
                yield next(translated) if isinstance(line, str) else line

    def translate_file(
        self,
        source: Path | str,
        output: Path | str,
        target_lang: str | None = None,
        *,
        progress: bool = True,
        **options: int | float | bool | None,
    ) -> int:
        """Translate a file with one text per line; see `nmt_moe.inference.files.translate_file`."""
        from nmt_moe.inference.files import translate_file

        return translate_file(self, source, output, target_lang, progress=progress, **options)

    @torch.inference_mode()
    def score(
        self,
        texts: str | Sequence[str],
        references: str | Sequence[str],
        target_lang: str | None = None,
        *,
        batch_tokens: int = BATCH_TOKENS,
        with_experts: bool = False,
        with_inputs: bool = False,
    ) -> list[PairScore]:
        """Compute the log-probability of a reference translation of each text, by teacher forcing.

        Texts are not split: each text and each reference counts as one sentence of any length.

        Args:
            texts: Any number of texts; a string means a list of one.
            references: A reference for each text.
            target_lang: Target language of a multilingual model, one of `languages`.
            batch_tokens: Maximum number of pieces in a batch on either side, including padding.
            with_experts: Whether to also return the experts of each piece in the first bundle.
            with_inputs: Whether to also return the inputs to the MoE layers.

        Raises:
            ValueError: as in `translate`, or if the numbers of texts and references differ.
        """
        texts = check_texts(texts, "text")
        references = check_texts(references, "reference")
        target = TargetText(self._processors["target"])
        return self.score_pieces(
            [self._source_text.pieces(text) for text in texts],
            [target.pieces(text) for text in references],
            target_lang,
            batch_tokens=batch_tokens,
            with_experts=with_experts,
            with_inputs=with_inputs,
        )

    @torch.inference_mode()
    def score_pieces(
        self,
        sources: Sequence[list[str]],
        targets: Sequence[list[str]],
        target_lang: str | None = None,
        *,
        batch_tokens: int = BATCH_TOKENS,
        with_experts: bool = False,
        with_inputs: bool = False,
    ) -> list[PairScore]:
        """Score texts that are already split into pieces, as `score` does.

        Args:
            sources: Pieces of each text, such as `Sentence.pieces`.
            targets: Pieces of each reference, such as `Hypothesis.pieces`.
            target_lang: Target language of a multilingual model, one of `languages`.
            batch_tokens: Maximum number of pieces in a batch on either side, including padding.
            with_experts: Whether to also return the experts of each piece in the first bundle.
            with_inputs: Whether to also return the inputs to the MoE layers.
        """
        if len(sources) != len(targets):
            raise ValueError(
                f"there must be a reference for each text, but the number of texts is "
                f"{len(sources)}, and the number of references is {len(targets)}."
            )
        check_whole("batch_tokens", batch_tokens, 1)
        mark = self._mark_of(self._check_language(target_lang))
        vocabulary = self.vocabularies["source"]
        read = [[*mark, *vocabulary.numbers(pieces), EOS] for pieces in sources]
        written = [self.vocabularies["target"].numbers(pieces) for pieces in targets]
        forced = force_in_batches(self._ensemble, read, written, batch_tokens, with_inputs)
        target = TargetText(self._processors["target"])
        marks = [vocabulary.symbols[number] for number in mark]
        results = []
        for source, pieces, numbers, one in zip(sources, targets, written, forced, strict=True):
            line = score_line(target.join(pieces), pieces, numbers, one.log_probs)
            line = replace(line, routing=one.target if with_experts else None)
            routing = one.source if with_experts else None
            results.append(PairScore([*marks, *source, MARKS[EOS]], line, one.attention, routing))
        return results

    @property
    def moe_layers(self) -> dict[str, MoE]:
        """Return the first bundle's layers, as "encoder" and "decoder", or {} for a dense model."""
        network = self._networks[0]
        layers = {"encoder": network.encoder_moe, "decoder": network.decoder_moe}
        return {side: layer for side, layer in layers.items() if layer is not None}

    def _mark_of(self, target_lang: str | None) -> list[int]:
        """Return the tokens to put before a source."""
        if not self.config.is_multilingual:
            return []
        assert target_lang is not None
        return [self.vocabularies["source"].mark(language_mark(target_lang))]

    def _check_language(self, target_lang: str | None) -> str | None:
        config = self.config
        if config.is_multilingual and target_lang is None:
            raise ValueError(
                f"`target_lang` must be one of {', '.join(self.languages)}, but is missing."
            )
        if target_lang is not None and target_lang not in self.languages:
            known = (
                ", ".join(self.languages) or "the bundle's languages (none are named: leave it out)"
            )
            raise ValueError(f"`target_lang` must be one of {known}, but is '{target_lang}'.")
        return target_lang

    def _translate(self, texts: list[str], options: TranslationOptions) -> list[Translation]:
        lines = [text.split("\n") for text in texts]
        cut = [[self._source_text.split(line.removesuffix("\r")) for line in of] for of in lines]
        flat = [pieces for of_text in cut for of_line in of_text for pieces in of_line]
        sentences = iter(self._translate_pieces(flat, options))
        target = TargetText(self._processors["target"], separator_of(self._target_of(options)))
        results = []
        for of_text in cut:
            by_line = [[next(sentences) for _ in of_line] for of_line in of_text]
            results.append(join_sentences(by_line, target.separator, options.num_hypotheses))
        return results

    def _target_of(self, options: TranslationOptions) -> str | None:
        return options.target_lang or (self.languages[0] if self.languages else None)

    def _translate_pieces(
        self, cut: list[list[str]], options: TranslationOptions
    ) -> list[Sentence]:
        vocabulary = self.vocabularies["source"]
        mark = self._mark_of(options.target_lang)
        sources = [[*mark, *vocabulary.numbers(pieces), EOS] for pieces in cut]
        target = TargetText(self._processors["target"])

        def translate_batch(batch: list[int]) -> list[Sentence]:
            own = [sources[number] for number in batch]
            words = [len(source) - 1 for source in own]
            found = search(self._ensemble, own, options.config, options.limits, words)
            pieces = [cut[number] for number in batch]
            made = describe(pieces, found, len(mark), self.vocabularies["target"].symbols, target)
            if options.with_experts:
                made = add_experts(self._networks[0], made, own, found, len(mark))
            return made

        batches = share_batches(sources, options.batch_tokens, torch.get_num_threads())
        results: dict[int, Sentence] = {}
        for batch, made in zip(batches, run_batches(translate_batch, batches), strict=True):
            results.update(zip(batch, made, strict=True))
        return [results[number] for number in range(len(cut))]
