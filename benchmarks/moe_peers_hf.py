"""MoE layers of Hugging Face's transformers library, each used as in its models."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.moe_layers import Answer, Layer
from benchmarks.moe_points import Point


def mixtral_config(point: Point, width: int, implementation: str) -> Any:
    """Describe a Mixtral layer with experts of hidden width `width`."""
    from transformers import MixtralConfig

    config = MixtralConfig(
        hidden_size=point.model_dim,
        intermediate_size=width,
        num_local_experts=point.num_experts,
        num_experts_per_tok=point.top_k,
        hidden_act="relu",
    )
    config._experts_implementation = implementation
    return config


class HFMixtral(Layer):
    package = "transformers", "transformers"
    notes = "gated experts, three products of width 2 h / 3 (as many operations); no balance loss"
    implementation = "eager"

    def __init__(self, point: Point, capacity: float) -> None:
        super().__init__(point, capacity)
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        width = max(16, round(2 * point.hidden_dim / 3 / 16) * 16)
        self.moe = MixtralSparseMoeBlock(mixtral_config(point, width, self.implementation))

    def gate_weights(self) -> list[Tensor]:
        return [self.moe.gate.weight.t()]

    def expert(self, e: int, x: Tensor) -> Tensor:
        up, gate = (x @ self.moe.experts.gate_up_proj[e].t()).chunk(2, -1)
        return (torch.relu(up) * gate) @ self.moe.experts.down_proj[e].t()

    def forward(self, x: Tensor) -> Answer:
        return self.moe(x.unsqueeze(0)).squeeze(0), None


class HFMixtralGrouped(HFMixtral):
    notes = f"{HFMixtral.notes}; experts_implementation grouped_mm"
    implementation = "grouped_mm"


class HFReLU(Layer):
    package = "transformers", "transformers"
    notes = (
        "Mixtral's router with ReLU experts in transformers' experts interface (has_gate=False), "
        "grouped_mm"
    )

    def __init__(self, point: Point, capacity: float) -> None:
        super().__init__(point, capacity)
        from transformers.integrations.moe import use_experts_implementation
        from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

        config = mixtral_config(point, point.hidden_dim, "grouped_mm")

        class ReLUExperts(nn.Module):
            def __init__(self, config: Any) -> None:
                super().__init__()
                num_experts, wide, hidden = point.num_experts, point.model_dim, point.hidden_dim
                self.num_experts = num_experts
                self.up_proj = nn.Parameter(torch.empty(num_experts, wide, hidden))
                self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, wide))
                self.act_fn = nn.ReLU()

            def forward(self, *_: Any) -> Tensor:
                raise NotImplementedError("the decorator replaces this method")

        decorate = use_experts_implementation(has_gate=False, is_transposed=True)
        self.router, self.experts = MixtralTopKRouter(config), decorate(ReLUExperts)(config)

    def gate_weights(self) -> list[Tensor]:
        return [self.router.weight.t()]

    def expert(self, e: int, x: Tensor) -> Tensor:
        return torch.relu(x @ self.experts.up_proj[e]) @ self.experts.down_proj[e]

    def forward(self, x: Tensor) -> Answer:
        _, gates, ids = self.router(x)
        return self.experts(x, ids, gates.to(x.dtype)), None


class HFSwitch(Layer):
    package = "transformers", "transformers"
    notes = "top 1 only; capacity 1.25 T / n; no balance loss in the layer"
    most_k = 1

    def __init__(self, point: Point, capacity: float) -> None:
        super().__init__(point, capacity)
        from transformers import SwitchTransformersConfig
        from transformers.models.switch_transformers import modeling_switch_transformers as switch

        self.moe = switch.SwitchTransformersSparseMLP(
            SwitchTransformersConfig(
                d_model=point.model_dim,
                d_ff=point.hidden_dim,
                num_experts=point.num_experts,
                expert_capacity=math.ceil(capacity * point.tokens / point.num_experts),
                dropout_rate=0.0,
                router_jitter_noise=0.0,
                dense_act_fn="relu",
            )
        )

    def gate_weights(self) -> list[Tensor]:
        return [self.moe.router.classifier.weight.t()]

    def gates(self, x: Tensor) -> Tensor:
        # A gate is the chosen expert's probability, which is not renormalised.
        (weight,) = self.gate_weights()
        top, ids = (x @ weight).softmax(-1).max(-1, keepdim=True)
        return x.new_zeros(len(x), weight.shape[1]).scatter(1, ids, top)

    def expert(self, e: int, x: Tensor) -> Tensor:
        return self.moe.experts[f"expert_{e}"](x)

    def expert_modules(self) -> list[nn.Module]:
        return list(self.moe.experts.values())

    def forward(self, x: Tensor) -> Answer:
        return self.moe(x.unsqueeze(0)).squeeze(0), None
