"""The GNMT-style decoder."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nmt_moe.moe import MoEStats
from nmt_moe.nn.attention import ATTENTIONS, Attention
from nmt_moe.nn.attentive_lstm import AttentiveLSTM
from nmt_moe.nn.config import GNMTConfig
from nmt_moe.nn.encoder import EncoderOutput
from nmt_moe.nn.init import init_weights
from nmt_moe.nn.lstm import LSTMState, ProjectedLSTM, State
from nmt_moe.nn.residual_moe import ResidualMoE
from nmt_moe.parallel import ALONE, ExpertParallelGroup


# A tuple, because module hooks such as fairseq's NanDetector look for tensors in tuples.
class DecoderOutput(NamedTuple):
    """The result of one pass of the decoder.

    Attributes:
        features: (B, T, D), the inputs to the softmax layer.
        attention: (B, T, S), attention weights of the source tokens; each row sums to 1.
        moe_stats: Statistics of the decoder's MoE layer; None if it has no such layer.
        state: State of the LSTMs after the last step.
    """

    features: Tensor
    attention: Tensor
    moe_stats: MoEStats | None
    state: LSTMState


class GNMTDecoder(nn.Module):
    """LSTM 1 with attention, an MoE layer, and further LSTMs, all with residual connections.

    Source: Shazeer et al. 2017, Appendix E.
    """

    def __init__(
        self,
        config: GNMTConfig,
        embedding: nn.Embedding,
        group: ExpertParallelGroup = ALONE,
    ) -> None:
        super().__init__()
        dim, hidden_dim = config.model_dim, config.lstm_hidden_dim
        self.is_recurrent = config.attention_wiring == "recurrent"
        self.attention: Attention | None = None
        if self.is_recurrent:
            self.bottom: nn.Module = AttentiveLSTM(dim, hidden_dim, config.attention)
        else:
            self.bottom = ProjectedLSTM(dim, hidden_dim, dim)
            self.attention = ATTENTIONS[config.attention](dim)
        self.moe: ResidualMoE | None = None
        if config.decoder_moe is not None:
            self.moe = ResidualMoE(
                config.decoder_moe, config.dropout, "decoder's MoE layer", group, config.init_range
            )
        second_input = dim if self.is_recurrent else 2 * dim
        self.layers = nn.ModuleList(
            ProjectedLSTM(second_input if index == 0 else dim, hidden_dim, dim)
            for index in range(config.decoder_layers - 1)
        )
        self.dropout = nn.Dropout(config.dropout)
        init_weights(self, config.init_range)
        self.embedding = embedding  # set after init_weights, because it is already initialised

    def forward(
        self,
        prev_output_tokens: Tensor,
        encoder_out: EncoderOutput,
        state: LSTMState | None = None,
        padding_mask: Tensor | None = None,
    ) -> DecoderOutput:
        """Decode all given steps, starting from `state` if there is one.

        Args:
            prev_output_tokens: (B, T) int64, padded at the end.
            encoder_out: The encoder's output for the same B sentences.
            state: State after the previous step; None at the start.
            padding_mask: (B, T) bool, True for padding, which is not sent to any expert or counted
                in losses and statistics; None for no padding.
        """
        x = self.dropout(self.embedding(prev_output_tokens.t()))  # (T, B, D)
        states: list[State | None] = [None] * (1 + len(self.layers))
        if state is not None:
            states = list(zip(state.hidden.unbind(1), state.cell.unbind(1), strict=True))
        out, attention, context, states[0] = self._attend(x, encoder_out, states[0])
        x = x + self.dropout(out)
        stats = None
        if self.moe is not None:
            x, stats = self.moe(x, None if padding_mask is None else padding_mask.t())
        for index, layer in enumerate(self.layers):
            wide = x if context is None or index > 0 else torch.cat([x, context], dim=2)
            out, states[index + 1] = layer(wide, states[index + 1])
            x = x + self.dropout(out)
        hidden, cell = zip(*states, strict=True)
        new_state = LSTMState(torch.stack(hidden, dim=1), torch.stack(cell, dim=1))
        return DecoderOutput(x.transpose(0, 1), attention, stats, new_state)

    def _attend(
        self, x: Tensor, encoder_out: EncoderOutput, state: State | None
    ) -> tuple[Tensor, Tensor, Tensor | None, State]:
        """Run LSTM 1 and attention in the configured wiring.

        Returns:
            (T, B, D) outputs of LSTM 1, (B, T, S) attention weights, the (T, B, D) contexts if
            LSTM 2 receives them (otherwise None), and the new state of LSTM 1.
        """
        if self.attention is None:
            out, weights, new_state = self.bottom(x, encoder_out, state)
            return out, weights, None, new_state
        out, new_state = self.bottom(x, state)
        context, weights = self.attention(
            out.transpose(0, 1), encoder_out.keys, encoder_out.source, encoder_out.padding_mask
        )
        return out, weights, context.transpose(0, 1), new_state
