"""Run the decoder on the hypotheses that are still alive, and on no other row of the beam."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from fairseq.sequence_generator import EnsembleModelWithAlignment
from torch import Tensor


class LiveRowsEnsemble(EnsembleModelWithAlignment):
    """fairseq's ensemble for a search that prunes.

    fairseq's search has W rows for each sentence, whatever became of them. Here the decoder, its
    state and the encoder's output have only rows that count: one for each sentence at the first
    step, when all its rows are equal, and then those whose hypotheses are alive. What the search
    gets back has all its rows; the others repeat a row of their sentence.

    The search waits for the device once a step to learn how many rows there are. It no longer waits
    for it in the encoder's reordering, which is left out while all rows stay with their sentences.

    Args:
        models: Of the ensemble.
        read_alive: Gives (B, W) bool, the rows that the search chose to go on with.
        beam_size: W.

    Attributes:
        rows: (R,) int64, rows of the search that are evaluated; None = all of them.
        place: (B W,) int64, where each row of the search is among those.
    """

    def __init__(
        self, models: Sequence[Any], read_alive: Callable[[], Tensor], beam_size: int
    ) -> None:
        super().__init__(models)
        self.read_alive = read_alive
        self.rows_of_sentence = beam_size
        self.rows: Tensor | None = None
        self.place: Tensor | None = None
        self.order: Tensor | None = None
        self.keeps_sentences = False
        self.needs_all_rows = False

    def forward_encoder(self, net_input: dict[str, Tensor]) -> Any:
        """Encode a batch, which begins a search."""
        self.rows = self.place = None
        # BART's attention and fairseq's BeamableMM take their rows W by W.
        sizes = [getattr(module, "beam_size", None) for module in self.models.modules()]
        self.needs_all_rows = any(size is not None and size > 1 for size in sizes)
        return super().forward_encoder(net_input)

    def reorder_encoder_out(self, encoder_outs: Any, new_order: Tensor) -> Any:
        """Give each row its sentence: (B W,) int64, the old row of each row of the search.

        fairseq calls it before the first step, where the old rows are sentences, and then at every
        step after `reorder_incremental_state` with the same order.
        """
        if self.needs_all_rows:
            return super().reorder_encoder_out(encoder_outs, new_order)
        if self.place is None:
            self.place = new_order
            self.rows = torch.arange(
                0, len(new_order), self.rows_of_sentence, device=new_order.device
            )
            return super().reorder_encoder_out(encoder_outs, new_order[self.rows])
        if self.keeps_sentences:
            return encoder_outs
        return super().reorder_encoder_out(encoder_outs, self.order)

    def reorder_incremental_state(self, incremental_states: Any, new_order: Tensor) -> None:
        """Move the hypotheses to their new rows, and leave out those that are dead."""
        if not self.needs_all_rows:
            assert self.place is not None
            had_all = self.rows is None and len(self.place) == len(new_order)
            alive = self.read_alive().flatten()
            rows = alive.nonzero().squeeze(1)
            self.rows = None if len(rows) == len(new_order) else rows
            self.keeps_sentences = had_all and self.rows is None
            self.order = new_order = self.place[new_order[rows]]
            self.place = alive.cumsum(0) - 1  # of a dead row: the last one alive before it
        super().reorder_incremental_state(incremental_states, new_order)

    def forward_decoder(
        self, tokens: Tensor, encoder_outs: Any, incremental_states: Any, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        """Decode a step: (B W, T) tokens give (B W, V) log-probabilities, (B W, S) attention."""
        if self.needs_all_rows or self.rows is None:
            return super().forward_decoder(tokens, encoder_outs, incremental_states, temperature)
        log_probs, attention = super().forward_decoder(
            tokens[self.rows], encoder_outs, incremental_states, temperature
        )
        if attention is not None:
            attention = attention[self.place]
        return log_probs[self.place], attention
