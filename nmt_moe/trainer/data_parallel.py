"""Average gradients over ranks, of which each has experts of its own."""

from typing import Any

from fairseq.distributed import LegacyDistributedDataParallel

from nmt_moe.parallel import average_shard_gradients, is_shard


class ExpertParallelDataParallel(LegacyDistributedDataParallel):
    """fairseq's `--ddp-backend legacy_ddp`, which leaves gradients of experts as they are.

    They would be too large by a factor of the number of ranks.
    """

    buffer_size: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The whole buffer is sent, so it must have no room for what does not go through it:
        # experts, and what is larger than it and sent by itself.
        counts = [p.numel() for p in self.module.parameters() if not is_shard(p)]
        used = sum(count for count in counts if count <= self.buffer_size)
        self.buffer_size = max(min(self.buffer_size, used), 1)

    def all_reduce_grads(self) -> None:
        """Average all gradients. All ranks must call, after the last backward of an update."""
        super().all_reduce_grads()
        if not self.accumulate_grads:
            average_shard_gradients(self.module.parameters())
