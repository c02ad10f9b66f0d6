"""MoE layers of other libraries, each used as its documentation describes."""

import importlib.util
import logging

import torch
from torch import Tensor, nn

from benchmarks.moe_layers import OWN, PLAIN, Answer, Layer
from benchmarks.moe_peers_hf import HFMixtral, HFMixtralGrouped, HFReLU, HFSwitch
from benchmarks.moe_peers_vllm import VLLMCPU
from benchmarks.moe_points import Point

# Number of tokens dispatched at once; the cost of one-hot products grows with its square.
GROUP = 512


def feed_forward(point: Point) -> nn.Sequential:
    """Make one expert of the requested size, for libraries that take modules."""
    up = nn.Linear(point.model_dim, point.hidden_dim, bias=False)
    return nn.Sequential(up, nn.ReLU(), nn.Linear(point.hidden_dim, point.model_dim, bias=False))


def in_groups(x: Tensor) -> Tensor:
    """View tokens (N, D) as (groups, tokens per group, D)."""
    size = min(GROUP, len(x))
    if len(x) % size:
        raise ValueError(f"T must be a multiple of {size} for this library, but is {len(x)}.")
    return x.view(-1, size, x.shape[1])


class Lucidrains(Layer):
    package = "mixture_of_experts", "mixture-of-experts"
    notes = "top 2 only; capacity 1.25 k T / n; one-hot dispatch in groups of 512 tokens"
    most_k = 2

    def __init__(self, point: Point, capacity: float) -> None:
        super().__init__(point, capacity)
        from mixture_of_experts import MoE

        self.moe = MoE(
            dim=point.model_dim,
            num_experts=point.num_experts,
            hidden_dim=point.hidden_dim,
            activation=nn.ReLU,
            second_policy_train="all",
            second_policy_eval="all",
            capacity_factor_train=capacity * self.top_k,
            capacity_factor_eval=capacity * self.top_k,
        )

    def gate_weights(self) -> list[Tensor]:
        return [self.moe.gate.w_gating]

    def expert(self, e: int, x: Tensor) -> Tensor:
        return torch.relu(x @ self.moe.experts.w1[e]) @ self.moe.experts.w2[e]

    def expert_modules(self) -> list[nn.Module]:
        return [self.moe.experts]

    def forward(self, x: Tensor) -> Answer:
        y, loss = self.moe(in_groups(x))
        return y.reshape(x.shape), loss


class STMoE(Layer):
    package = "st_moe_pytorch", "st-moe-pytorch"
    notes = (
        "ReLU experts instead of GEGLU; no choice dropped at random; no straight-through "
        "gradient of dispatch; "
        "capacity 1.25 k T / n; one-hot dispatch in groups of 512 tokens"
    )

    def __init__(self, point: Point, capacity: float) -> None:
        super().__init__(point, capacity)
        from st_moe_pytorch import MoE

        self.top_k = max(2, self.top_k)
        self.moe = MoE(
            dim=point.model_dim,
            num_experts=point.num_experts,
            gating_top_n=self.top_k,
            threshold_train=0.0,
            threshold_eval=0.0,
            capacity_factor_train=capacity * self.top_k,
            capacity_factor_eval=capacity * self.top_k,
            straight_through_dispatch_tensor=False,
            experts=nn.ModuleList([feed_forward(point) for _ in range(point.num_experts)]),
        )

    def gate_weights(self) -> list[Tensor]:
        return [self.moe.gate.to_gates.weight.t()]

    def expert(self, e: int, x: Tensor) -> Tensor:
        return self.moe.experts.experts[e](x)

    def expert_modules(self) -> list[nn.Module]:
        return list(self.moe.experts.experts)

    def forward(self, x: Tensor) -> Answer:
        found = self.moe(in_groups(x))
        return found.outputs.reshape(x.shape), found.total_aux_loss


class FairScale(Layer):
    package = "fairscale", "fairscale"
    notes = (
        "top 2 only, the second chosen with random noise; capacity 2 T / n; one-hot dispatch of "
        "all tokens"
    )
    most_k = 2

    def __init__(self, point: Point, capacity: float) -> None:
        super().__init__(point, capacity)
        from fairscale.nn.moe import MOELayer, Top2Gate

        if point.tokens % point.num_experts:
            raise ValueError(
                f"T must be a multiple of n = {point.num_experts} for fairscale, "
                f"but is {point.tokens}."
            )
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group(
                "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
            )
        experts = nn.ModuleList([feed_forward(point) for _ in range(point.num_experts)])
        self.moe = MOELayer(Top2Gate(point.model_dim, point.num_experts), experts)

    def gate_weights(self) -> list[Tensor]:
        return [self.moe.gate.wg.weight.t()]

    def gates(self, x: Tensor) -> Tensor:
        # fairscale's gates are random. The dense definition uses the same gates, so the check
        # covers only dispatch, experts and combination.
        return self.moe.gate(x)[1].sum(-1)

    def expert(self, e: int, x: Tensor) -> Tensor:
        return self.moe.experts[e](x)

    def expert_modules(self) -> list[nn.Module]:
        return list(self.moe.experts)

    def forward(self, x: Tensor) -> Answer:
        y = self.moe(x.view(self.point.num_experts, -1, x.shape[1]))
        return y.reshape(x.shape), self.moe.l_aux


class DeepSpeed(Layer):
    package = "deepspeed", "deepspeed"
    notes = "capacity 1.25 k T / n, at least 4"
    drops = True

    def __init__(self, point: Point, capacity: float) -> None:
        super().__init__(point, capacity)
        import deepspeed.utils
        from deepspeed.moe.layer import MoE

        deepspeed.utils.logger.setLevel(logging.ERROR)
        self.moe = MoE(
            point.model_dim,
            feed_forward(point),
            num_experts=point.num_experts,
            k=self.top_k,
            capacity_factor=capacity,
            eval_capacity_factor=capacity,
            min_capacity=4,
            drop_tokens=self.drops,
        )
        self.router = self.moe.deepspeed_moe.gate
        self.experts = self.moe.deepspeed_moe.experts.deepspeed_experts

    def gate_weights(self) -> list[Tensor]:
        return [self.router.wg.weight.t()]

    def expert(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x)

    def expert_modules(self) -> list[nn.Module]:
        return list(self.experts)

    def forward(self, x: Tensor) -> Answer:
        y, loss, _ = self.moe(x)
        return y, loss


class DeepSpeedDropless(DeepSpeed):
    notes = "drop_tokens=False: every expert is padded to the largest load"
    drops = False


PEERS: dict[str, type[Layer]] = {
    "lucidrains": Lucidrains,
    "st_moe": STMoE,
    "fairscale": FairScale,
    "deepspeed": DeepSpeed,
    "deepspeed_dropless": DeepSpeedDropless,
    "hf_mixtral": HFMixtral,
    "hf_mixtral_grouped": HFMixtralGrouped,
    "hf_relu_grouped": HFReLU,
    "hf_switch": HFSwitch,
    "vllm_cpu": VLLMCPU,
}
LAYERS = {**OWN, **PLAIN, **PEERS}


def missing_packages(names: list[str]) -> dict[str, str]:
    """Return the peers that cannot be imported, each with the package that pip must install."""
    packages = {name: PEERS[name].package for name in names if name in PEERS}
    return {
        name: package[1]
        for name, package in packages.items()
        if package and importlib.util.find_spec(package[0]) is None
    }
