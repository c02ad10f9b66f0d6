"""What every gate returns."""

from typing import NamedTuple

from torch import Tensor


# A tuple, since that is where hooks of modules, such as fairseq's NanDetector, look for tensors.
class GateOutput(NamedTuple):
    """Which experts each token goes to, with what weight, and how balanced that is.

    A token may take fewer than K experts: an empty slot has the id E and the gate 0.

    Attributes:
        gates: (N, K) float32 or wider.
        expert_ids: (N, K) int64.
        num_rows: R, the (token, expert) pairs, empty slots left out.
        importance: (E,). Sum of each expert's gates.
        load: (E,). Expected number of tokens of each expert, or their count.
        can_balance_load: Whether another load was possible, so that there is a load loss.
        threshold_loss: Scalar that trains the thresholds of strict balance; None without any.
    """

    gates: Tensor
    expert_ids: Tensor
    num_rows: int
    importance: Tensor
    load: Tensor
    can_balance_load: bool
    threshold_loss: Tensor | None = None
