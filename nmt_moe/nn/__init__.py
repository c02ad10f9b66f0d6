"""The networks that contain MoE layers. They need only torch."""

from nmt_moe.nn.attention import (
    ATTENTIONS,
    AdditiveAttention,
    Attention,
    AttentionKeys,
    ProductAttention,
)
from nmt_moe.nn.config import WIRINGS, GNMTConfig, LSTMLMConfig
from nmt_moe.nn.decoder import DecoderOutput, GNMTDecoder
from nmt_moe.nn.encoder import EncoderOutput, GNMTEncoder
from nmt_moe.nn.linear import Linear
from nmt_moe.nn.lstm import BidirectionalLSTM, LSTMState, ProjectedLSTM
from nmt_moe.nn.lstm_lm import LMOutput, LSTMLanguageModel

__all__ = [
    "ATTENTIONS",
    "WIRINGS",
    "AdditiveAttention",
    "Attention",
    "AttentionKeys",
    "BidirectionalLSTM",
    "DecoderOutput",
    "EncoderOutput",
    "GNMTConfig",
    "GNMTDecoder",
    "GNMTEncoder",
    "LMOutput",
    "LSTMLMConfig",
    "LSTMLanguageModel",
    "LSTMState",
    "Linear",
    "ProductAttention",
    "ProjectedLSTM",
]
