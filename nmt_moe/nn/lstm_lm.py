"""The paper's language model: an MoE layer between LSTMs."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nmt_moe.checks import check_range
from nmt_moe.moe import MoEConfig, MoEStats
from nmt_moe.nn.decoder import DecoderState
from nmt_moe.nn.lstm import ProjectedLSTM, State
from nmt_moe.nn.residual import ResidualMoE, init_weights
from nmt_moe.parallel import ALONE, ExpertParallelGroup


@dataclass(frozen=True)
class LSTMLMConfig:
    """Describe one language model.

    Attributes:
        model_dim: D, width of the embedding and of every layer's input and output.
        lstm_hidden_dim: Cells of an LSTM; projected to D unless equal to it.
        lstm_layers: LSTMs in all; the MoE layer follows the first.
        expert_layers: Hidden layers of an expert; more than 1 only of a single expert, which every
            token takes, so that it needs no gate (MoE-1-Deep).
        dropout: Chance that an output of a layer is zeroed in training.
        init_range: Weights start uniform within this, gates and biases aside.
        moe: Sizes of the MoE layer; None leaves it out.

    Raises:
        ValueError: naming the field, its rule and its value.

    Source: Shazeer et al. 2017, Appendix C.1.
    """

    model_dim: int = 512
    lstm_hidden_dim: int = 512
    lstm_layers: int = 2
    expert_layers: int = 1
    dropout: float = 0.1
    init_range: float = 0.04
    moe: MoEConfig | None = None

    def __post_init__(self) -> None:
        check_range("model_dim", self.model_dim, 1)
        check_range("lstm_hidden_dim", self.lstm_hidden_dim, self.model_dim)
        check_range("lstm_layers", self.lstm_layers, 1 if self.moe is None else 2)
        check_range("expert_layers", self.expert_layers, 1)
        check_range("dropout", self.dropout, 0.0, 1.0)
        check_range("init_range", self.init_range, 0.0)
        if self.expert_layers > 1 and (self.moe is None or self.moe.num_experts > 1):
            experts = 0 if self.moe is None else self.moe.num_experts
            raise ValueError(
                f"`expert_layers` must be 1 with {experts} experts, but is {self.expert_layers}. "
                "Set `num_experts` to 1: only a single expert can be deeper."
            )


# A tuple, since that is where hooks of modules, such as fairseq's NanDetector, look for tensors.
class LMOutput(NamedTuple):
    """What one pass of the language model gives.

    Attributes:
        features: (B, T, D), input of the softmax layer.
        moe_stats: Statistics of the MoE layer, if there is one with a gate.
        state: Of the LSTMs, after the last step.
    """

    features: Tensor
    moe_stats: MoEStats | None
    state: DecoderState


class ResidualDeepExpert(nn.Module):
    """One expert of several hidden ReLU layers, a sigmoid, dropout, and the residual.

    It stands in the place of an MoE layer; like experts, it has no biases.

    Source: Shazeer et al. 2017, Appendix C.1 (MoE-1-Deep).
    """

    def __init__(self, model_dim: int, hidden_dim: int, num_layers: int, dropout: float) -> None:
        super().__init__()
        widths = [model_dim, *[hidden_dim] * num_layers, model_dim]
        self.products = nn.ModuleList(
            nn.Linear(rows, cols, bias=False)
            for rows, cols in zip(widths, widths[1:], strict=False)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, None]:
        """Apply the expert to (T, B, D). It keeps no statistics, so padding does not matter."""
        *inner, last = self.products
        y = x
        for product in inner:
            y = F.relu(product(y))
        return x + self.dropout(last(y).sigmoid()), None


class LSTMLanguageModel(nn.Module):
    """Embedding, LSTM, MoE layer, further LSTMs; the softmax layer is its user's.

    After every layer: dropout, then the layer's input is added.

    Source: Shazeer et al. 2017, Appendix C.1.
    """

    def __init__(
        self,
        config: LSTMLMConfig,
        embedding: nn.Embedding,
        group: ExpertParallelGroup = ALONE,
    ) -> None:
        super().__init__()
        dim, hidden_dim = config.model_dim, config.lstm_hidden_dim
        self.layers = nn.ModuleList(
            ProjectedLSTM(dim, hidden_dim, dim) for _ in range(config.lstm_layers)
        )
        self.moe: ResidualMoE | ResidualDeepExpert | None = None
        if config.moe is not None and config.expert_layers > 1:
            self.moe = ResidualDeepExpert(
                dim, config.moe.hidden_dim, config.expert_layers, config.dropout
            )
        elif config.moe is not None:
            self.moe = ResidualMoE(config.moe, config.dropout, "language model's MoE layer", group)
        self.dropout = nn.Dropout(config.dropout)
        init_weights(self, config.init_range)
        self.embedding = embedding  # after init_weights: its owner has drawn it

    def forward(
        self,
        prev_output_tokens: Tensor,
        state: DecoderState | None = None,
        padding_mask: Tensor | None = None,
    ) -> LMOutput:
        """Read all given tokens, or go on from `state`.

        Args:
            prev_output_tokens: (B, T) int64, padded at the end.
            state: After the token before; None at the start.
            padding_mask: (B, T) bool, True = padding: kept from experts, losses and statistics.
        """
        x = self.dropout(self.embedding(prev_output_tokens.t()))  # (T, B, D)
        states: list[State | None] = [None] * len(self.layers)
        if state is not None:
            states = list(zip(state.hidden.unbind(1), state.cell.unbind(1), strict=True))
        stats = None
        for at, layer in enumerate(self.layers):
            if at == 1 and self.moe is not None:
                x, stats = self.moe(x, None if padding_mask is None else padding_mask.t())
            out, states[at] = layer(x, states[at])
            x = x + self.dropout(out)
        hidden, cell = zip(*states, strict=True)
        new_state = DecoderState(torch.stack(hidden, dim=1), torch.stack(cell, dim=1))
        return LMOutput(x.transpose(0, 1), stats, new_state)
