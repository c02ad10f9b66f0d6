"""Detect that a checkpoint was trained with a different dictionary."""

import hashlib
from typing import Any, Dict, List

import torch
from fairseq.data import Dictionary
from torch import Tensor, nn


class DictionaryCheck(nn.Module):
    """A digest of a dictionary, stored in the checkpoint and checked when it is loaded.

    fairseq does not store the dictionary in a checkpoint, and pads dictionaries to multiples of 8.
    Another dictionary therefore often has the same size, is loaded silently, and makes every
    translation wrong.

    Attributes:
        digest: Scalar int64, computed from all symbols in order.
    """

    digest: Tensor

    def __init__(self, dictionary: Dictionary, side: str) -> None:
        super().__init__()
        self.side, self.size = side, len(dictionary)
        symbols = "\n".join(dictionary.symbols).encode()
        number = int.from_bytes(hashlib.sha256(symbols).digest()[:8], "little", signed=True)
        self.register_buffer("digest", torch.tensor(number))

    def _load_from_state_dict(
        self,
        state_dict: Dict[str, Any],
        prefix: str,
        local_metadata: Dict[str, Any],
        strict: bool,
        missing_keys: List[str],
        unexpected_keys: List[str],
        error_msgs: List[str],
    ) -> None:
        digest = state_dict.get(f"{prefix}digest", self.digest)  # absent from early checkpoints
        if not self.digest.cpu().equal(digest.cpu()):
            error_msgs.append(
                f"the {self.side} dictionary of {self.size} symbols is not the one that the "
                "checkpoint was trained with"
            )
