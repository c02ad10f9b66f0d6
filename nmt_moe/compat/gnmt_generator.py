"""GNMT's search in the form of fairseq's: a generator and a search strategy."""

from collections.abc import Callable
from typing import Any

import torch
from fairseq.search import BeamSearch
from fairseq.sequence_generator import (
    EnsembleModel,
    SequenceGenerator,
    SequenceGeneratorWithAlignment,
)
from torch import Tensor

from nmt_moe.compat.live_rows import LiveRowsEnsemble
from nmt_moe.search import (
    SearchConfig,
    best_attainable,
    length_penalty,
    log_coverage,
    mask_tokens,
    normalised_score,
    within_margin,
)


class PruningBeamSearch(BeamSearch):
    """A beam search that leaves poor tokens out, and ends when only poor hypotheses can follow.

    Args:
        tgt_dict: The target dictionary.
        margin: GNMT's beamsize, nats.
        penalty: The length penalty of a number of target tokens.

    Attributes:
        best: (B,) best normalised score of the finished hypotheses of each sentence still in the
            batch, or None before the first.
        live: (B,) highest log-probability of the hypotheses that go on after the last step.
        alive: (B, W) bool, which rows of the beam hold a hypothesis after the last step.
        candidates: (B, 2W) log-probabilities of the step's candidates; -inf = pruned.
    """

    def __init__(self, tgt_dict: Any, margin: float, penalty: Callable[[int], float]) -> None:
        super().__init__(tgt_dict)
        self.margin = margin
        self.penalty = penalty
        self.best: Tensor | None = None
        self.live: Tensor | None = None
        self.alive: Tensor | None = None
        self.candidates: Tensor | None = None
        self.max_len = 0

    def init_constraints(self, batch_constraints: Tensor | None, beam_size: int) -> None:
        """Begin a batch: fairseq calls this first."""
        self.best = self.live = self.alive = None

    def prune_sentences(self, batch_idxs: Tensor) -> None:
        """Keep these sentences: fairseq calls this when others leave the batch."""
        assert self.candidates is not None
        self.candidates = self.candidates[batch_idxs]
        if self.best is not None:
            self.best = self.best[batch_idxs]

    def update_constraints(self, active_hypos: Tensor) -> None:
        """Note which (B, W) candidates go on: fairseq calls this at the end of a step."""
        assert self.candidates is not None
        self.alive = self.candidates.gather(1, active_hypos).isfinite()
        # A sentence stays until fairseq has ended it; the best of its rows is the first.
        self.alive[:, 0] = True

    def alive_rows(self) -> Tensor:
        """Give `alive`, once there has been a step."""
        assert self.alive is not None
        return self.alive

    def step(
        self,
        step: int,
        lprobs: Tensor,
        scores: Tensor | None,
        prev_output_tokens: Tensor | None = None,
        original_batch_idxs: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Choose candidates: (B, 2W) log-probabilities, tokens, and rows they continue."""
        num_sentences, beam_size, vocab_size = lprobs.shape
        if step == 0:
            lprobs = lprobs[:, :1]  # all rows are equal
            so_far = lprobs.new_zeros(num_sentences, 1)
        else:
            assert scores is not None
            so_far = scores[:, :, step - 1]
        width = min(2 * beam_size, lprobs.shape[1] * vocab_size - 1)  # as fairseq: never pad
        # No row has more than `width` of the candidates, so the vocabulary is read only once.
        local, tokens = lprobs.topk(min(width, vocab_size), dim=2)
        local = mask_tokens(local, so_far.isfinite(), self.margin)
        values, places = (so_far.unsqueeze(2) + local).flatten(1).topk(width)
        rows = torch.div(places, local.shape[2], rounding_mode="floor")
        tokens = tokens.flatten(1).gather(1, places)
        self.candidates = values
        self.live = values.masked_fill(tokens.eq(self.eos), -torch.inf).amax(dim=1)
        if self.best is not None:
            # fairseq asks whether a sentence is finished only where a hypothesis has just ended, so
            # one is ended. Its score cannot come near the best: it is dropped with the others.
            over = self.is_hopeless(values[:, 0], step)
            tokens[:, 0] = torch.where(over, self.eos, tokens[:, 0])
            self.live = torch.where(over, -torch.inf, self.live)
        return values, tokens, rows

    def is_hopeless(self, log_probability: Tensor, step: int) -> Tensor:
        """Tell for (B,) log-probabilities after `step` that nothing near the best can follow."""
        assert self.best is not None
        shortest, longest = self.penalty(step + 1), self.penalty(self.max_len + 1)
        bound = best_attainable(log_probability, shortest, longest)
        return ~within_margin(bound, self.best, self.margin)

    def note_finished(self, sentences: Tensor, scores: Tensor, max_len: int) -> None:
        """Take in the normalised scores of hypotheses that have ended.

        Args:
            sentences: (N,) int64, their sentences' places in the batch as it is now.
            scores: (N,) normalised.
            max_len: Most target tokens of a hypothesis, the end mark not counted.
        """
        assert self.live is not None
        if self.best is None:
            self.best = torch.full_like(self.live, -torch.inf, dtype=scores.dtype)
        self.best = self.best.scatter_reduce(0, sentences, scores, "amax")
        self.max_len = max_len


class GNMTGenerator(SequenceGenerator):
    """fairseq's generator with GNMT's scores for finished hypotheses, and its pruning.

    Coverage comes from fairseq's own record of attention, whose rows move with the hypotheses. With
    pruning, models evaluate only the hypotheses that are alive.
    """

    def __init__(
        self, models: Any, tgt_dict: Any, search_config: SearchConfig, **kwargs: Any
    ) -> None:
        super().__init__(models, tgt_dict, **kwargs)
        self.search_config = search_config
        self.own_normalisation: bool = kwargs.get("normalize_scores", True)
        # fairseq's is done here, with GNMT's, so that pruning sees it.
        self.normalize_scores = False
        self.source_words: Tensor | None = None
        self.hopeless: list[int] = []  # of the sentences in the batch: 1 = its search can end
        self.prunes = search_config.beam_prune > 0
        if self.prunes:
            self.search = PruningBeamSearch(tgt_dict, search_config.beam_prune, self.penalty)
            singles = list(models.models) if isinstance(models, EnsembleModel) else models
            self.model = LiveRowsEnsemble(singles, self.search.alive_rows, self.beam_size)

    def penalty(self, length: int) -> float:
        """Return what the log-probability of a hypothesis of `length` tokens is divided by."""
        if self.search_config.changes_scores:
            return float(length_penalty(length, self.search_config.length_penalty_alpha))
        return float(length) ** self.len_penalty if self.own_normalisation else 1.0

    def _generate(self, sample: dict[str, Any], *args: Any, **kwargs: Any) -> list[list[dict]]:
        src_tokens = sample["net_input"].get("src_tokens")
        if self.search_config.coverage_penalty_beta:
            if src_tokens is None:
                raise ValueError(
                    "`--coverage-penalty-beta` counts the words of a source text, but this task's "
                    "source is no text. Leave it 0."
                )
            # Of the dictionary: `self.eos` may be another mark, such as a language.
            no_words = src_tokens.eq(self.pad) | src_tokens.eq(self.tgt_dict.eos())
            self.source_words = ~no_words
        all_hypotheses = super()._generate(sample, *args, **kwargs)
        if self.prunes:
            all_hypotheses = [self._drop_poor(hypotheses) for hypotheses in all_hypotheses]
        return all_hypotheses

    def _drop_poor(self, hypotheses: list[dict]) -> list[dict]:
        """Keep the hypotheses near the best, which comes first."""
        scores = torch.stack([hypothesis["score"] for hypothesis in hypotheses])
        near = within_margin(scores, scores[0], self.search_config.beam_prune).tolist()
        return [hypothesis for hypothesis, keep in zip(hypotheses, near, strict=True) if keep]

    def finalize_hypos(
        self,
        step: int,
        bbsz_idx: Tensor,
        eos_scores: Tensor,
        tokens: Tensor,
        scores: Tensor,
        finalized: list[list[dict]],
        finished: list[bool],
        beam_size: int,
        attn: Tensor | None,
        src_lengths: Tensor,
        max_len: int,
    ) -> list[int]:
        """Let fairseq store the hypotheses that end at this step, then set their scores.

        Args as in fairseq: `bbsz_idx` (N,) rows that end, `eos_scores` (N,) their
        log-probabilities, `attn` (B W, S, T) with the attention of step t in column t + 1.
        """
        places = torch.div(bbsz_idx, beam_size, rounding_mode="floor")
        unfinished = [at for at, is_over in enumerate(finished) if not is_over]
        of_batch = torch.tensor(unfinished, device=places.device)[places]
        values = eos_scores / self.penalty(step + 1)
        if self.search_config.coverage_penalty_beta:
            coverage = self._log_coverage(step, bbsz_idx, of_batch, attn)
            values = normalised_score(
                eos_scores.float(),
                step + 1,
                coverage,
                self.search_config.length_penalty_alpha,
                self.search_config.coverage_penalty_beta,
            )
        hopeless = of_batch.new_zeros(0)
        if self.prunes:
            self.search.note_finished(places, values, max_len)
            assert self.search.live is not None
            # Hypotheses that go on have at least one token more than those that end now.
            hopeless = self.search.is_hopeless(self.search.live, step + 1)
        # Everything that Python must know, in one transfer from the device.
        fetched = torch.cat([of_batch, hopeless.to(of_batch)]).tolist()
        sentences, self.hopeless = fetched[: len(values)], fetched[len(values) :]
        stored = {sentence: len(finalized[sentence]) for sentence in sentences}
        newly_finished = super().finalize_hypos(
            step,
            bbsz_idx,
            eos_scores,
            tokens,
            scores,
            finalized,
            finished,
            beam_size,
            attn,
            src_lengths,
            max_len,
        )
        for sentence, value in zip(sentences, values, strict=True):
            if stored[sentence] < beam_size:  # fairseq stores no more than that
                finalized[sentence][stored[sentence]]["score"] = value
                stored[sentence] += 1
        return newly_finished

    def _log_coverage(
        self, step: int, rows: Tensor, sentences: Tensor, attn: Tensor | None
    ) -> Tensor:
        assert self.source_words is not None
        width = self.source_words.shape[1]
        if attn is None or attn.shape[1] != width:
            found = "none" if attn is None else f"over {attn.shape[1]} positions"
            raise ValueError(
                f"`--coverage-penalty-beta` needs attention over the {width} source positions, but "
                f"the model gives {found}. Leave it 0."
            )
        received = attn.index_select(0, rows)[:, :, 1 : step + 2].float().sum(dim=2)
        return log_coverage(received, self.source_words[sentences])

    def is_finished(
        self, step: int, unfin_idx: int, max_len: int, finalized_sent_len: int, beam_size: int
    ) -> bool:
        """Tell whether a sentence is done, also because no hypothesis worth keeping can follow."""
        if super().is_finished(step, unfin_idx, max_len, finalized_sent_len, beam_size):
            return True
        return self.prunes and bool(self.hopeless[unfin_idx])


class _FullListGenerator(GNMTGenerator):
    """The same, with exactly `beam_size` hypotheses a sentence: the last is repeated."""

    def _generate(self, sample: dict[str, Any], *args: Any, **kwargs: Any) -> list[list[dict]]:
        all_hypotheses = super()._generate(sample, *args, **kwargs)
        self.counts = [len(hypotheses) for hypotheses in all_hypotheses]
        return [
            hypotheses + [dict(hypotheses[-1]) for _ in range(self.beam_size - len(hypotheses))]
            for hypotheses in all_hypotheses
        ]


class GNMTGeneratorWithAlignment(SequenceGeneratorWithAlignment, _FullListGenerator):
    """The same with `--print-alignment`, for which fairseq relies on full lists."""

    @torch.no_grad()
    def generate(self, models: Any, sample: dict[str, Any], **kwargs: Any) -> list[list[dict]]:
        """Generate and align; give the hypotheses without the repeated ones."""
        aligned = super().generate(models, sample, **kwargs)
        return [hypotheses[:n] for hypotheses, n in zip(aligned, self.counts, strict=True)]
