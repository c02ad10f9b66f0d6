"""Average gradients over ranks that hold different experts."""

from typing import Any

from fairseq.distributed import LegacyDistributedDataParallel

from nmt_moe.parallel import average_shard_gradients, is_shard


class ExpertParallelDataParallel(LegacyDistributedDataParallel):
    """fairseq's `--ddp-backend legacy_ddp`, with correct gradients for experts.

    fairseq does not average gradients of experts, which makes them too large by a factor equal to
    the number of ranks.
    """

    buffer_size: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The whole buffer is sent, so it must not include space for gradients that are sent
        # separately: gradients of experts, and gradients larger than the buffer.
        counts = [p.numel() for p in self.module.parameters() if not is_shard(p)]
        used = sum(count for count in counts if count <= self.buffer_size)
        self.buffer_size = max(min(self.buffer_size, used), 1)

    def all_reduce_grads(self) -> None:
        """Average all gradients. All ranks must call this after an update's last backward pass."""
        super().all_reduce_grads()
        if not self.accumulate_grads:
            average_shard_gradients(self.module.parameters())
