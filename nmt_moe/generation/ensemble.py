"""An ensemble of fairseq's models as the `step` of a beam search."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from fairseq.sequence_generator import EnsembleModelWithAlignment
from torch import Tensor


class RowEnsemble(EnsembleModelWithAlignment):
    """fairseq's ensemble, with any number of rows per sentence instead of always W."""

    def set_decoder_beam_size(self, beam_size: int) -> None:
        """Switch off all optimisations that assume W rows per sentence."""
        for module in self.modules():
            if getattr(module, "beam_size", None) is not None:  # BeamableMM, MultiheadAttention
                module.beam_size = 1
            # BART replaces this with a function that reorders nothing.
            vars(module).pop("reorder_encoder_out", None)


@dataclass
class EnsembleState:
    """The state of an ensemble for R rows.

    Attributes:
        ensemble: The models.
        encoder_outs: Encoder output of each model; None without encoders.
        incremental_states: State of each model's decoder, in fairseq's form.
        sentence: (R,) int64, the sentence of each row.
    """

    ensemble: RowEnsemble
    encoder_outs: Any
    incremental_states: list[dict]
    sentence: Tensor

    def reorder(self, rows: Tensor) -> Self:
        """Select rows; `rows`, (R',) int64, contains the old row of each new row.

        The old state becomes invalid.
        """
        sentence = self.sentence[rows]
        if not torch.equal(sentence, self.sentence):
            if len(sentence) == len(self.sentence):
                # If the number of rows is unchanged, the attention of fairseq's Transformer assumes
                # that each row still belongs to the same sentence, and keeps its keys. Reordering
                # to one additional row first avoids this.
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
    """A prediction of each row's next token from the mean of the models' probabilities.

    Attributes:
        temperature: Divisor of the logits.
        lm_model: A language model; its log-probabilities are added.
        lm_weight: Factor of the language model's log-probabilities.
    """

    temperature: float = 1.0
    lm_model: Any = None
    lm_weight: float = 1.0

    def __call__(
        self, tokens: Tensor, state: EnsembleState
    ) -> tuple[Tensor, Tensor | None, EnsembleState]:
        """Decode a step: map (R, T) tokens to (R, V) log-probabilities and (R, S) attention."""
        log_probs, attention = state.ensemble.forward_decoder(
            tokens, state.encoder_outs, state.incremental_states, self.temperature
        )
        if self.lm_model is not None:
            output = self.lm_model(tokens)
            of_lm = self.lm_model.get_normalized_probs(output, log_probs=True, sample=None)
            log_probs = log_probs + self.lm_weight * of_lm[:, -1, :]
        return log_probs, attention, state
