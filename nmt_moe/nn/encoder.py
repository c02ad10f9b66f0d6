"""The GNMT-style encoder."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nmt_moe.moe import MoEStats
from nmt_moe.nn.attention import AttentionKeys
from nmt_moe.nn.config import GNMTConfig
from nmt_moe.nn.init import init_weights
from nmt_moe.nn.lstm import BidirectionalLSTM, ProjectedLSTM
from nmt_moe.nn.residual_moe import ResidualMoE
from nmt_moe.parallel import ALONE, ExpertParallelGroup


# A tuple, because module hooks such as fairseq's NanDetector look for tensors in tuples.
class EncoderOutput(NamedTuple):
    """The encoder's results that the decoder needs.

    Attributes:
        source: (B, S, D), the outputs for the source tokens.
        keys: (B, S, D), the part of attention that depends only on the source.
        padding_mask: (B, S) bool, True for padding.
        sentence: (B,) int64, the index of the encoded sentence that each row belongs to.
        moe_stats: Statistics of the encoder's MoE layer; None if it has no such layer.
    """

    source: Tensor
    keys: Tensor
    padding_mask: Tensor
    sentence: Tensor
    moe_stats: MoEStats | None

    def reorder(self, new_order: Tensor) -> "EncoderOutput":
        """Select rows; `new_order`, (B',) int64, contains the old row of each new row.

        A beam search mostly reorders hypotheses within a sentence. In that case, nothing is copied.
        """
        sentence = self.sentence.index_select(0, new_order)
        if torch.equal(sentence, self.sentence):
            return self
        return EncoderOutput(
            self.source.index_select(0, new_order),
            self.keys.index_select(0, new_order),
            self.padding_mask.index_select(0, new_order),
            sentence,
            None,
        )


class GNMTEncoder(nn.Module):
    """A bidirectional pair of LSTMs, an MoE layer, and further LSTMs, with residual connections.

    Source: Shazeer et al. 2017, Appendix E.
    """

    def __init__(
        self,
        config: GNMTConfig,
        embedding: nn.Embedding,
        group: ExpertParallelGroup = ALONE,
    ) -> None:
        super().__init__()
        sizes = config.model_dim, config.lstm_hidden_dim, config.model_dim
        self.bottom = BidirectionalLSTM(*sizes)
        self.moe: ResidualMoE | None = None
        if config.moe is not None:
            self.moe = ResidualMoE(
                config.moe, config.dropout, "encoder's MoE layer", group, config.init_range
            )
        self.layers = nn.ModuleList(ProjectedLSTM(*sizes) for _ in range(config.encoder_layers - 2))
        self.attention_keys = AttentionKeys(config.model_dim, config.attention)
        self.dropout = nn.Dropout(config.dropout)
        init_weights(self, config.init_range)
        self.embedding = embedding  # set after init_weights, because it is already initialised

    def forward(self, src_tokens: Tensor, padding_mask: Tensor) -> EncoderOutput:
        """Encode a batch.

        Args:
            src_tokens: (B, S) int64, padded on either side.
            padding_mask: (B, S) bool, True for padding.

        Returns:
            The encoder's output, in the order of `src_tokens`; 0 at padding.
        """
        # Move padding behind the tokens, whichever side it was on.
        order = padding_mask.byte().argsort(dim=1, stable=True)
        lengths = (~padding_mask).sum(1)
        right_mask = padding_mask.gather(1, order).t()  # (S, B)
        x = self.dropout(self.embedding(src_tokens.gather(1, order).t()))  # (S, B, D)
        x = x + self.dropout(self.bottom(x, lengths))
        stats = None
        if self.moe is not None:
            x, stats = self.moe(x, right_mask)
        for layer in self.layers:
            x = x + self.dropout(layer(x)[0])
        x = x.masked_fill(right_mask.unsqueeze(2), 0.0).transpose(0, 1)
        source = torch.take_along_dim(x, order.argsort(dim=1).unsqueeze(2), dim=1)
        sentence = torch.arange(len(source), device=source.device)
        return EncoderOutput(source, self.attention_keys(source), padding_mask, sentence, stats)
