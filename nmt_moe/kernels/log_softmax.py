"""Turn logits into log-probabilities in inference."""

import torch
from torch import Tensor

from nmt_moe.kernels._cpu import has_compiled_loops, load


def log_softmax(logits: Tensor) -> Tensor:
    """Return the log-probabilities (R, V) of logits (R, V), which may be overwritten."""
    if logits.dtype == torch.float32 and has_compiled_loops(logits) and logits.is_contiguous():
        load().log_softmax(logits)
        return logits
    return logits.log_softmax(dim=1)
