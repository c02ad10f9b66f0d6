"""The paper's language model, with an MoE layer between LSTMs."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nmt_moe.moe import MoEStats
from nmt_moe.nn.config import LSTMLMConfig
from nmt_moe.nn.init import init_weights
from nmt_moe.nn.linear import Linear
from nmt_moe.nn.lstm import LSTMState, ProjectedLSTM, State
from nmt_moe.nn.residual_moe import ResidualMoE
from nmt_moe.parallel import ALONE, ExpertParallelGroup


# A tuple, because module hooks such as fairseq's NanDetector look for tensors in tuples.
class LMOutput(NamedTuple):
    """The result of one pass of the language model.

    Attributes:
        features: (B, T, D), the inputs to the softmax layer.
        moe_stats: Statistics of the MoE layer; None if there is no MoE layer with a gate.
        state: State of the LSTMs after the last step.
    """

    features: Tensor
    moe_stats: MoEStats | None
    state: LSTMState


class ResidualDeepExpert(nn.Module):
    """A single expert with several hidden ReLU layers, used in place of an MoE layer.

    It is followed by a sigmoid, dropout and a residual connection. Like other experts, it has no
    biases.

    Source: Shazeer et al. 2017, Appendix C.1 (MoE-1-Deep).
    """

    def __init__(self, model_dim: int, hidden_dim: int, num_layers: int, dropout: float) -> None:
        super().__init__()
        widths = [model_dim, *[hidden_dim] * num_layers, model_dim]
        self.products = nn.ModuleList(
            Linear(rows, cols) for rows, cols in zip(widths, widths[1:], strict=False)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, None]:
        """Apply the expert to x, (T, B, D). There are no statistics, so the mask is not needed."""
        *inner, last = self.products
        y = x
        for product in inner:
            y = F.relu(product(y))
        return x + self.dropout(last(y).sigmoid()), None


class LSTMLanguageModel(nn.Module):
    """An embedding, an LSTM, an MoE layer and further LSTMs. The caller adds the softmax layer.

    Each layer is followed by dropout, and then its input is added (a residual connection).

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
            self.moe = ResidualMoE(
                config.moe, config.dropout, "language model's MoE layer", group, config.init_range
            )
        self.dropout = nn.Dropout(config.dropout)
        init_weights(self, config.init_range)
        self.embedding = embedding  # set after init_weights, because it is already initialised

    def forward(
        self,
        prev_output_tokens: Tensor,
        state: LSTMState | None = None,
        padding_mask: Tensor | None = None,
    ) -> LMOutput:
        """Read all given tokens, starting from `state` if there is one.

        Args:
            prev_output_tokens: (B, T) int64, padded at the end.
            state: State after the previous token; None at the start.
            padding_mask: (B, T) bool, True for padding, which is not sent to any expert or counted
                in losses and statistics; None for no padding.
        """
        x = self.dropout(self.embedding(prev_output_tokens.t()))  # (T, B, D)
        states: list[State | None] = [None] * len(self.layers)
        if state is not None:
            states = list(zip(state.hidden.unbind(1), state.cell.unbind(1), strict=True))
        stats = None
        for index, layer in enumerate(self.layers):
            if index == 1 and self.moe is not None:
                x, stats = self.moe(x, None if padding_mask is None else padding_mask.t())
            out, states[index] = layer(x, states[index])
            x = x + self.dropout(out)
        hidden, cell = zip(*states, strict=True)
        new_state = LSTMState(torch.stack(hidden, dim=1), torch.stack(cell, dim=1))
        return LMOutput(x.transpose(0, 1), stats, new_state)
