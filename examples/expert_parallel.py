"""Train an MoE layer with its experts spread over processes, without fairseq.

torchrun --nproc-per-node 2 examples/expert_parallel.py
"""

import torch
from torch import distributed, nn

from nmt_moe.moe import MoEConfig, MoELayer
from nmt_moe.parallel import (
    average_shard_gradients,
    clip_gradients,
    is_shard,
    make_expert_parallel_group,
)

DIM, EXPERTS, UPDATES = 32, 8, 30


def main() -> None:
    distributed.init_process_group("gloo")  # "nccl" on GPUs
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(1)  # the same on all ranks, so that dense parameters start equal
    group = make_expert_parallel_group(EXPERTS)
    layer = MoELayer(MoEConfig(DIM, hidden_dim=64, num_experts=EXPERTS, top_k=2), group=group)
    output = nn.Linear(DIM, DIM)
    parameters = [*layer.parameters(), *output.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    target = torch.randn(DIM, DIM) / DIM**0.5
    torch.manual_seed(100 + rank)  # each rank has its own tokens
    for update in range(UPDATES):
        x = torch.randn(128, DIM)
        y, stats = layer(x)
        loss = (output(x + y) - (x @ target).relu()).square().mean()
        optimizer.zero_grad()
        (loss + stats.balance_loss).backward()
        for parameter in parameters:
            if not is_shard(parameter):  # experts have already received the tokens of all ranks
                parameter.grad.div_(world_size)
                distributed.all_reduce(parameter.grad)
        average_shard_gradients(parameters)
        clip_gradients(parameters, max_norm=1.0)
        optimizer.step()
        distributed.all_reduce(loss.detach().div_(world_size))
        if rank == 0 and update % 10 == 9:
            print(f"update {update + 1}: loss {loss.item():.3f}")
    print(f"rank {rank} holds experts {group.owned(EXPERTS)}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
