"""Restrict the tokens of a search by length, prefix, special symbols and repetitions."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Restrictions:
    """The restrictions on the tokens that a search may choose.

    Attributes:
        eos: The end mark.
        pad: The padding symbol, which is never chosen.
        max_lengths: (B,) int64, the largest number of tokens before the end mark, for the
            hypotheses of each sentence.
        min_length: Smallest number of tokens before the end mark. A prefix may contain an earlier
            end mark.
        prefixes: (B, P) int64, the tokens that the hypotheses of each sentence must begin with;
            `pad` where any token may follow. Prefixes override the other restrictions, except
            the maximum length.
        suppressed: Tokens that are never chosen, such as other special symbols.
        unk: The symbol for unknown words.
        unk_penalty: Number of nats to subtract from the log-probability of `unk`; infinity means
            that it is never chosen.
        no_repeat_ngram_size: Length of the n-grams that no hypothesis may contain twice; 0 for no
            such restriction.

    Raises:
        ValueError: if `min_length` is above a maximum length.
    """

    eos: int
    pad: int
    max_lengths: Tensor
    min_length: int = 1
    prefixes: Tensor | None = None
    suppressed: Sequence[int] = ()
    unk: int = 0
    unk_penalty: float = 0.0
    no_repeat_ngram_size: int = 0

    def __post_init__(self) -> None:
        if self.min_length > self._shortest_limit:
            raise ValueError(
                "`min_length` (--min-len) must be at most the maximum length (--max-len-a, "
                f"--max-len-b) of {self._shortest_limit} tokens, but is {self.min_length}."
            )

    @cached_property
    def _shortest_limit(self) -> int:
        return int(self.max_lengths.min())

    def apply(self, log_probs: Tensor, tokens: Tensor, sentence: Tensor) -> Tensor:
        """Set the log-probabilities of ruled-out tokens to -inf, in place.

        Args:
            log_probs: (R, V), log-probabilities of the next token.
            tokens: (R, T) int64, the tokens so far, including the start token.
            sentence: (R,) int64, the sentence of each row.

        Returns:
            `log_probs`.
        """
        length = tokens.shape[1] - 1
        log_probs.select(1, self.pad).fill_(-torch.inf)  # faster than assigning to a column
        if self.unk_penalty:
            log_probs[:, self.unk] -= self.unk_penalty
        forced = self._forced_tokens(length, sentence)
        if forced is not None:
            token = forced.clamp(min=0).unsqueeze(1)
            its_log_prob = log_probs.gather(1, token)
        if length < self.min_length:
            log_probs.select(1, self.eos).fill_(-torch.inf)
        if len(self.suppressed):
            log_probs[:, list(self.suppressed)] = -torch.inf
        if self.no_repeat_ngram_size:
            _rule_out_repeats(log_probs, tokens[:, 1:], self.no_repeat_ngram_size)
        if forced is not None:
            is_forced = forced.ge(0).unsqueeze(1)
            its_log_prob = torch.where(is_forced, its_log_prob, log_probs.gather(1, token))
            log_probs.masked_fill_(is_forced, -torch.inf).scatter_(1, token, its_log_prob)
        return log_probs

    def _forced_tokens(self, length: int, sentence: Tensor) -> Tensor | None:
        """Return the only token that each row may choose, (R,), or -1 if it may choose any.

        Return None if all rows may choose any token.
        """
        forced = None
        if self.prefixes is not None and length < self.prefixes.shape[1]:
            forced = self.prefixes[sentence, length]
            forced = forced.masked_fill(forced.eq(self.pad), -1)
        if length >= self._shortest_limit:
            forced = torch.full_like(sentence, -1) if forced is None else forced
            forced = forced.masked_fill(self.max_lengths[sentence] <= length, self.eos)
        return forced


def _rule_out_repeats(log_probs: Tensor, tokens: Tensor, size: int) -> None:
    """Rule out tokens that would complete an n-gram already contained in `tokens`, (R, T)."""
    if tokens.shape[1] < size:
        return
    ngrams = tokens.unfold(1, size, 1)  # (R, T - size + 1, size)
    last_words = tokens[:, tokens.shape[1] - size + 1 :]
    row, start = (ngrams[:, :, :-1] == last_words.unsqueeze(1)).all(dim=2).nonzero(as_tuple=True)
    log_probs[row, ngrams[row, start, -1]] = -torch.inf
