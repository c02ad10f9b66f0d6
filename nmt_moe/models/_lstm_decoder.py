"""Keep the state of LSTMs between steps in fairseq's incremental state."""

from typing import Dict, Optional

from fairseq.models import FairseqIncrementalDecoder
from torch import Tensor

from nmt_moe.nn import LSTMState


class LSTMDecoder(FairseqIncrementalDecoder):
    """A decoder of LSTMs that keeps a state for each hypothesis of a search."""

    def reorder_incremental_state(self, incremental_state: Dict, new_order: Tensor) -> None:
        """Move the state of each hypothesis to its new row."""
        state = self._get_state(incremental_state)
        if state is not None:
            self._set_state(incremental_state, state.reorder(new_order))

    def _get_state(self, incremental_state: Dict) -> Optional[LSTMState]:
        saved = self.get_incremental_state(incremental_state, "lstm")
        return None if saved is None else LSTMState(saved["hidden"], saved["cell"])

    def _set_state(self, incremental_state: Dict, state: LSTMState) -> None:
        saved = {"hidden": state.hidden, "cell": state.cell}
        self.set_incremental_state(incremental_state, "lstm", saved)
