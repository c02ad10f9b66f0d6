"""An ensemble of fairseq's models as the `step` of a beam search."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from fairseq.sequence_generator import EnsembleModelWithAlignment
from torch import Tensor


class RowEnsemble(EnsembleModelWithAlignment):
    """fairseq's ensemble for rows that need not come W by W."""

    def set_decoder_beam_size(self, beam_size: int) -> None:
        """Switch off what takes rows W by W, also if another generator has switched it on."""
        for module in self.modules():
            if getattr(module, "beam_size", None) is not None:  # BeamableMM, MultiheadAttention
                module.beam_size = 1
            # BART replaces this by a function that reorders nothing.
            vars(module).pop("reorder_encoder_out", None)


@dataclass
class EnsembleState:
    """What an ensemble keeps of R rows.

    Attributes:
        ensemble: The models.
        encoder_outs: Of each model; None without encoders.
        incremental_states: Of each model's decoder, as fairseq keeps it.
        sentence: (R,) int64, the sentence of each row.
    """

    ensemble: RowEnsemble
    encoder_outs: Any
    incremental_states: list[dict]
    sentence: Tensor

    def reorder(self, rows: Tensor) -> Self:
        """Pick rows: (R',) int64, the old row of each new one. The old state is used up."""
        sentence = self.sentence[rows]
        if not torch.equal(sentence, self.sentence):
            if len(sentence) == len(self.sentence):
                # Attention of fairseq's Transformer takes an equal number of rows for a sign that
                # all stay with their sentences, and keeps its keys: so one row more in between.
                self._reorder_decoders(torch.cat([rows, rows[:1]]))
                self.encoder_outs = self.ensemble.reorder_encoder_out(self.encoder_outs, rows)
                rows = torch.arange(len(rows), device=rows.device)
            else:
                self.encoder_outs = self.ensemble.reorder_encoder_out(self.encoder_outs, rows)
            self.sentence = sentence
        self._reorder_decoders(rows)
        return self

    def _reorder_decoders(self, rows: Tensor) -> None:
        self.ensemble.reorder_incremental_state(self.incremental_states, rows)


@dataclass
class EnsembleStep:
    """Predict the next token of each row by the mean of the models' probabilities.

    Attributes:
        temperature: What logits are divided by.
        lm_model: A language model whose log-probabilities are added, times
        lm_weight: this.
    """

    temperature: float = 1.0
    lm_model: Any = None
    lm_weight: float = 1.0

    def __call__(
        self, tokens: Tensor, state: EnsembleState
    ) -> tuple[Tensor, Tensor | None, EnsembleState]:
        """Decode a step: (R, T) tokens give (R, V) log-probabilities and (R, S) attention."""
        log_probs, attention = state.ensemble.forward_decoder(
            tokens, state.encoder_outs, state.incremental_states, self.temperature
        )
        if self.lm_model is not None:
            output = self.lm_model(tokens)
            of_lm = self.lm_model.get_normalized_probs(output, log_probs=True, sample=None)
            log_probs = log_probs + self.lm_weight * of_lm[:, -1, :]
        return log_probs, attention, state
