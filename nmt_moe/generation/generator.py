"""Run `nmt_moe.search.beam_search` through fairseq's generator interface."""

from collections.abc import Callable
from typing import Any

import torch
from fairseq import utils
from fairseq.data.data_utils import collate_tokens
from fairseq.sequence_generator import EnsembleModel, SequenceGenerator
from torch import Tensor

from nmt_moe.generation.ensemble import EnsembleState, EnsembleStep, RowEnsemble
from nmt_moe.search import (
    BeamConfig,
    Hypothesis,
    Restrictions,
    SearchConfig,
    beam_search,
    log_coverage,
    normalised_score,
)

ALIGNMENTS = {"hard": utils.extract_hard_alignment, "soft": utils.extract_soft_alignment}


class GNMTGenerator(SequenceGenerator):
    """A generator with fairseq's options and batches that returns hypotheses in fairseq's form.

    Args:
        models: The models of the ensemble.
        tgt_dict: The target dictionary.
        search_config: GNMT's options.
        print_alignment: `hard` or `soft` to add an `alignment` to every hypothesis.
        left_pad_target: Whether models that align whole translations expect padding on the left.
        options: fairseq's options, as for `SequenceGenerator`.
    """

    def __init__(
        self,
        models: Any,
        tgt_dict: Any,
        search_config: SearchConfig,
        print_alignment: str | None = None,
        left_pad_target: bool = False,
        **options: Any,
    ) -> None:
        singles = list(models.models) if isinstance(models, EnsembleModel) else models
        super().__init__(RowEnsemble(singles), tgt_dict, **options)
        self.search_config = search_config
        self.left_pad_target = left_pad_target
        self.extract_alignment = ALIGNMENTS[print_alignment] if print_alignment else None
        self.no_repeat_ngram_size = options.get("no_repeat_ngram_size", 0)
        suppressed = self.token_indices_to_suppress
        self.suppressed = [] if suppressed is None else suppressed.tolist()

    def _generate(
        self,
        sample: dict[str, Any],
        prefix_tokens: Tensor | None = None,
        constraints: Tensor | None = None,
        bos_token: int | None = None,
    ) -> list[list[dict[str, Any]]]:
        if constraints is not None:
            raise NotImplementedError("Use `RescoringGenerator` to search with constraints.")
        net_input = sample["net_input"]
        source = next(net_input[name] for name in SOURCES if name in net_input)
        start = torch.full((len(source),), self.eos, device=source.device)
        if bos_token is not None:
            start[:] = bos_token
        limit = min(int(self.max_len_a * source.shape[1] + self.max_len_b), self.max_len - 1)
        restrictions = Restrictions(
            eos=self.eos,
            pad=self.pad,
            max_lengths=torch.full_like(start, limit),
            min_length=self.min_len,
            prefixes=prefix_tokens,
            suppressed=self.suppressed,
            unk=self.unk,
            unk_penalty=self.unk_penalty,
            no_repeat_ngram_size=self.no_repeat_ngram_size,
        )
        words = None
        if self.search_config.coverage_penalty_beta:
            words = source_words(net_input, self.tgt_dict)
        state = EnsembleState(
            self.model,
            self.model.forward_encoder(net_input),
            [{} for _ in self.model.models],
            torch.arange(len(source), device=source.device),
        )
        found = beam_search(
            EnsembleStep(self.temperature, self.lm_model, self.lm_weight),
            state,
            start,
            BeamConfig(
                self.beam_size,
                self.len_penalty if self.normalize_scores else 0.0,
                self.search_config,
            ),
            restrictions,
            words,
        )
        hypotheses = [[to_fairseq(one) for one in of_sentence] for of_sentence in found]
        if self.extract_alignment is not None:
            self._align(hypotheses, net_input, self.extract_alignment)
        return hypotheses

    def _align(
        self, found: list[list[dict[str, Any]]], net_input: dict[str, Tensor], extract: Callable
    ) -> None:
        """Set the `alignment` of each hypothesis from its attention, or from models that align.

        Source: Garg et al. 2019, for models that align whole translations.
        """
        hypotheses = [one for of_sentence in found for one in of_sentence]
        sentences = [number for number, of_sentence in enumerate(found) for _ in of_sentence]
        all_attention = [one["attention"].t() for one in hypotheses]
        src_tokens = net_input["src_tokens"][sentences]
        if any(getattr(model, "full_context_alignment", False) for model in self.model.models):
            previous = collate_tokens(
                [one["tokens"] for one in hypotheses],
                self.pad,
                self.eos,
                self.left_pad_target,
                move_eos_to_beginning=True,
            )
            lengths = net_input["src_lengths"][sentences]
            all_attention = list(self.model.forward_align(src_tokens, lengths, previous))
        for one, source, attention in zip(hypotheses, src_tokens, all_attention, strict=True):
            one["alignment"] = extract(
                attention.cpu(), source.cpu(), one["tokens"].cpu(), self.pad, self.eos
            )


class RescoringGenerator:
    """A generator that ranks another generator's hypotheses, for searches with constraints.

    The penalties only rank finished hypotheses, so they can be applied after any search.

    Args:
        generator: The generator that fairseq's task builds.
        search_config: The penalties.
    """

    def __init__(self, generator: SequenceGenerator, search_config: SearchConfig) -> None:
        self.generator = generator
        self.search_config = search_config
        self.symbols_to_strip_from_output = generator.symbols_to_strip_from_output

    def generate(
        self, models: Any, sample: dict[str, Any], **kwargs: Any
    ) -> list[list[dict[str, Any]]]:
        """Generate hypotheses, compute their scores with the penalties, and sort them."""
        found = self.generator.generate(models, sample, **kwargs)
        words = None
        if self.search_config.coverage_penalty_beta:
            words = source_words(sample["net_input"], self.generator.tgt_dict)
        for number, hypotheses in enumerate(found):
            for one in hypotheses:
                one["score"] = self._score(
                    one, None if words is None else words[number : number + 1]
                )
            hypotheses.sort(key=lambda one: -float(one["score"]))
        return found

    def _score(self, hypothesis: dict[str, Any], words: Tensor | None) -> Tensor:
        log_prob = hypothesis["positional_scores"].float().sum(dim=0, keepdim=True)
        coverage = torch.zeros_like(log_prob)
        if words is not None:
            attention = hypothesis["attention"]
            received = attention.float().sum(dim=1).unsqueeze(0) if attention.numel() else None
            coverage = log_coverage(received, words)
        alpha = self.search_config.length_penalty_alpha
        beta = self.search_config.coverage_penalty_beta
        return normalised_score(log_prob, len(hypothesis["tokens"]), coverage, alpha, beta)[0]


SOURCES = ("src_tokens", "source", "features")


def source_words(net_input: dict[str, Any], dictionary: Any) -> Tensor:
    """Return (B, S) bool: True where the source is neither padding nor an end mark.

    Raises:
        ValueError: if the source is not text.
    """
    src_tokens = net_input.get("src_tokens")
    if src_tokens is None or src_tokens.is_floating_point():
        raise ValueError(
            "`--coverage-penalty-beta` counts the words of a source text, but the source of this "
            "task is not text. Set it to 0."
        )
    # Use the dictionary's end mark: a generator may end with another token, such as a language's.
    return src_tokens.ne(dictionary.pad()) & src_tokens.ne(dictionary.eos())


def to_fairseq(hypothesis: Hypothesis) -> dict[str, Any]:
    """Return a hypothesis in the form that fairseq's commands and tasks read."""
    attention = hypothesis.attention
    return {
        "tokens": hypothesis.tokens,
        "score": hypothesis.score,
        "attention": torch.empty(0) if attention is None else attention,
        "alignment": torch.empty(0),
        "positional_scores": hypothesis.positional_scores,
    }
