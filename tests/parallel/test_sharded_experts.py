"""Training gives the same results on any number of ranks, each with its own experts."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from nmt_moe.moe import MoEConfig, MoELayer
from nmt_moe.parallel import (
    ALONE,
    average_shard_gradients,
    clip_gradients,
    make_exchange,
    make_expert_parallel_group,
    shard_group,
)
from tests.support.ranks import run_ranks

DIM, EXPERTS = 6, 8
FLAT = MoEConfig(DIM, 5, EXPERTS, 3, importance_weight=0.3, load_weight=0.2)
GROUPED = replace(FLAT, num_groups=4, top_k=2)
# In two accumulated batches, four ranks have these numbers of tokens. With only two ranks, each has
# the tokens of two of the four.
TOKENS = ((5, 3, 2, 7), (1, 4, 0, 3))
# In the first batch, this rank has only padding.
ONLY_PADDING = 1
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


@dataclass
class Batch:
    """The tokens of one or more ranks."""

    x: Tensor  # (N, D)
    padding_mask: Tensor  # (N,)
    noise: Tensor  # (N, E)
    group_noise: Tensor  # (N, G)

    @property
    def num_tokens(self) -> int:
        return int((~self.padding_mask).sum())


def make_batches(first: int, last: int, dtype: torch.dtype) -> list[Batch]:
    """Return two batches that join parts [first, last) of the four ranks' batches."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for number, counts in enumerate(TOKENS):
        parts = []
        for part, count in enumerate(counts):
            x, noise, group_noise = (
                torch.randn(count, width, generator=generator, dtype=torch.float64).to(dtype)
                for width in (DIM, EXPERTS, 4)
            )
            mask = torch.zeros(count, dtype=torch.bool)
            mask[count - 1 :] = True
            if (number, part) == (0, ONLY_PADDING):
                mask[:] = True
            parts.append((x, mask, noise, group_noise))
        batches.append(Batch(*map(torch.cat, zip(*parts[first:last], strict=True))))
    return batches


class Network(nn.Module):
    """A flat and a hierarchical MoE layer, each after a dense layer."""

    def __init__(self, size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        groups = [
            make_expert_parallel_group(config.num_experts, config.num_groups, size)
            for config in (FLAT, GROUPED)
        ]
        self.flat = MoELayer(FLAT, "flat", groups[0])
        self.grouped = MoELayer(GROUPED, "grouped", groups[1])
        self.before, self.between = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        for layer in (self.flat, self.grouped):
            for parameter in layer.gate.parameters():
                nn.init.normal_(parameter)

    def forward(self, batch: Batch) -> Tensor:
        """Compute the sum of all tokens' losses, including balance losses."""
        y, flat = self.flat(self.before(batch.x), batch.padding_mask, batch.noise)
        noise = batch.group_noise, batch.noise
        y, grouped = self.grouped(self.between(y).tanh(), batch.padding_mask, noise)
        balance = flat.balance_loss + grouped.balance_loss
        return (y - 1).square().sum() + batch.num_tokens * balance


def train_once(rank: int, world_size: int, size: int, dtype: torch.dtype) -> dict[str, Any]:
    """Perform one update as fairseq's trainer does; return loss, norm, gradients and parameters."""
    share = 4 // world_size
    batches = make_batches(rank * share, (rank + 1) * share, dtype)
    network = Network(size).to(dtype)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1, eps=0.1)
    totals = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        loss = network(batch)
        loss.backward()
        totals += torch.tensor([loss.item(), batch.num_tokens], dtype=torch.float64)
    if world_size > 1:
        distributed.all_reduce(totals)
        for parameter in network.parameters():
            if shard_group(parameter) is None:
                distributed.all_reduce(parameter.grad)
                parameter.grad.div_(world_size)
        average_shard_gradients(network.parameters())
    for parameter in network.parameters():
        parameter.grad.mul_(world_size / totals[1])
    norm = clip_gradients(network.parameters(), 0.5)
    optimizer.step()
    result = {"loss": (totals[0] / totals[1]).numpy(), "norm": norm.numpy()}
    for name, parameter in network.named_parameters():
        for kind, value in (("gradient", parameter.grad), ("value", parameter.detach())):
            group = shard_group(parameter)
            if group is not None:
                shards = [torch.empty_like(value) for _ in range(group.size)]
                distributed.all_gather(shards, value.contiguous(), group=group.members)
                value = torch.cat(shards)
            result[f"{kind} {name}"] = value.numpy()
    return result


def run_strict_evaluation(rank: int, world_size: int, size: int) -> Any:
    """Return the results of a strictly balanced layer for tokens that use few or many experts."""
    torch.manual_seed(0)
    config = MoEConfig(DIM, 5, EXPERTS, 2, gate="strictly_balanced")
    layer = MoELayer(config, group=make_expert_parallel_group(EXPERTS, 0, size)).eval()
    nn.init.normal_(layer.gate.gate_weight)
    x = torch.randn(8, DIM, generator=torch.Generator().manual_seed(2))
    share = 8 // world_size
    x = x[rank * share : (rank + 1) * share]
    y, stats = layer(x)
    slots = int(layer.gate(x).gates.shape[1])
    return y.detach().numpy(), slots, stats.tokens_per_expert.numpy()


def send_half(rank: int, world_size: int) -> dict[str, Any]:
    """Send tokens in bfloat16 with gates in float32, forward and backward."""
    exchange = make_exchange(EXPERTS, make_expert_parallel_group(EXPERTS, 0, world_size))
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(5, DIM, generator=generator).bfloat16().requires_grad_()
    gates = torch.rand(5, 2, generator=generator).requires_grad_()
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(5)])
    arrivals = exchange.route(ids).to_experts(x, gates)
    sums = arrivals.x.float().sum() + (1.1 * arrivals.gates).sum()
    grad_x, grad_gates = torch.autograd.grad(sums, [x, gates])
    ranks = [len(set((row * world_size // EXPERTS).tolist())) for row in ids]
    return {
        "dtypes": (str(arrivals.x.dtype), str(arrivals.gates.dtype)),
        "sum": float(arrivals.gates.double().sum()),
        "own": float(gates.double().sum()),
        "gates": grad_gates.unique().tolist(),
        "tokens": (grad_x[:, 0].tolist(), ranks),
    }


def work(rank: int, world_size: int) -> dict[str, Any]:
    sizes = [size for size in (2, 4) if size <= world_size]
    results: dict[str, Any] = {
        f"{size} {dtype}": train_once(rank, world_size, size, dtype)
        for size in (1, *sizes)
        for dtype in TOLERANCE
    }
    results["strict"] = run_strict_evaluation(rank, world_size, world_size)
    layer = MoELayer(FLAT, group=make_expert_parallel_group(EXPERTS, 0, world_size)).eval()
    results["passes"] = 0
    for _ in range(rank):  # each rank makes a different number of passes
        layer(torch.randn(3, DIM))
        results["passes"] += 1
    layer.serve()
    results["half"] = send_half(rank, world_size)
    results["local"] = layer.experts.weight_in.shape
    try:
        make_expert_parallel_group(EXPERTS, 0, 3)
    except ValueError as error:
        results["refusal"] = str(error)
    return results


@pytest.fixture(scope="module", params=[2, 4], ids=lambda size: f"{size}-ranks")
def answers(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Return each rank's results."""
    return run_ranks(work, request.param, request.param)


@pytest.mark.timeout(590)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_ranks_learn_the_same_as_one_process(answers, dtype):
    expected = train_once(0, 1, 1, dtype)
    assert expected["norm"] > 0.5  # high enough to be clipped
    for size in (size for size in (1, 2, 4) if size <= len(answers)):
        results = [answer[f"{size} {dtype}"] for answer in answers]
        assert results[0].keys() == expected.keys()
        for rank, result in enumerate(results):
            assert_all_close(result, expected, TOLERANCE[dtype], f"rank {rank}, P = {size}")


def test_ranks_may_differ_in_the_experts_of_a_token(answers):
    parts = [answer["strict"] for answer in answers]
    y, _, counts = run_strict_evaluation(0, 1, 1)
    assert len({slots for _, slots, _ in parts}) > 1  # ranks differ in K
    together = torch.cat([torch.as_tensor(part[0]) for part in parts])
    torch.testing.assert_close(together, torch.as_tensor(y))
    assert sum(part[2] for part in parts).tolist() == counts.tolist()


def test_gates_are_sent_in_float32_beside_tokens_of_half_precision(answers):
    found = [answer["half"] for answer in answers]
    assert {one["dtypes"] for one in found} == {("torch.bfloat16", "torch.float32")}
    # The exchange does not round, so the sums of the gates sent and received agree.
    assert sum(one["sum"] for one in found) == pytest.approx(sum(x["own"] for x in found), rel=1e-6)
    for one in found:
        assert one["gates"] == [pytest.approx(1.1, rel=1e-7)]  # bfloat16 would give 1.1016
        assert one["tokens"][0] == one["tokens"][1]  # one gradient from each receiving rank


def test_a_rank_that_serves_waits_for_those_with_more_passes(answers):
    assert [answer["passes"] for answer in answers] == list(range(len(answers)))


def test_each_rank_holds_its_share_of_the_experts(answers):
    for answer in answers:
        assert answer["local"] == (EXPERTS // len(answers), DIM, 5)


def test_a_group_size_that_does_not_divide_the_number_of_ranks_is_refused(answers):
    rule = "`distributed_world_size` must be a multiple of `expert_parallel_size`, 3, but is"
    for answer in answers:
        assert f"{rule} {len(answers)}" in answer["refusal"]


def assert_all_close(result, expected, tolerance, what):
    largest = max(abs(value - expected[name]).max() for name, value in result.items())
    print(f"{what}: differs by at most {largest:.1e} (tolerance {tolerance})")  # noqa: T201 (pytest -rP)
    for name, value in result.items():
        torch.testing.assert_close(
            torch.as_tensor(value),
            torch.as_tensor(expected[name]),
            atol=tolerance,
            rtol=tolerance,
            msg=lambda text, name=name: f"{name}, {what}: {text}",
        )


def test_one_process_holds_all_experts():
    assert make_expert_parallel_group(8) is ALONE
    assert MoELayer(FLAT).experts.weight_in.shape == (EXPERTS, DIM, 5)
    with pytest.raises(ValueError, match="`distributed_world_size` must be a multiple of .*, 2"):
        make_expert_parallel_group(8, 0, 2)
    with pytest.raises(ValueError, match="`expert_parallel_size` must be at least 0, but is -1"):
        make_expert_parallel_group(8, 0, -1)
