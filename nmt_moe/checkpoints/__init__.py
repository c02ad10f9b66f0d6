"""Read and write checkpoints in fairseq's format, with the expert files beside them."""

from nmt_moe.checkpoints.expert_files import (
    ByIndex,
    ByName,
    remove_unused_files,
    restore_experts,
    rows_of,
    save_experts,
)
from nmt_moe.checkpoints.files import ATTEMPTS, copy_whole, write_whole
from nmt_moe.checkpoints.manifest import EXPERT_NAMES, MANIFEST
from nmt_moe.checkpoints.reader import count_updates, load_checkpoint, read_checkpoint

__all__ = [
    "ATTEMPTS",
    "EXPERT_NAMES",
    "MANIFEST",
    "ByIndex",
    "ByName",
    "copy_whole",
    "count_updates",
    "load_checkpoint",
    "read_checkpoint",
    "remove_unused_files",
    "restore_experts",
    "rows_of",
    "save_experts",
    "write_whole",
]
