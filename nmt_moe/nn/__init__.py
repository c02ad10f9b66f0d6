"""Networks around the MoE layer; torch alone."""

from nmt_moe.nn.attention import ATTENTIONS, Attention, AttentionKeys
from nmt_moe.nn.config import WIRINGS, GNMTConfig
from nmt_moe.nn.decoder import DecoderOutput, DecoderState, GNMTDecoder
from nmt_moe.nn.encoder import EncoderOutput, GNMTEncoder
from nmt_moe.nn.lstm import BidirectionalLSTM, ProjectedLSTM
from nmt_moe.nn.lstm_lm import LMOutput, LSTMLanguageModel, LSTMLMConfig

__all__ = [
    "ATTENTIONS",
    "WIRINGS",
    "Attention",
    "AttentionKeys",
    "BidirectionalLSTM",
    "DecoderOutput",
    "DecoderState",
    "EncoderOutput",
    "GNMTConfig",
    "GNMTDecoder",
    "GNMTEncoder",
    "LMOutput",
    "LSTMLMConfig",
    "LSTMLanguageModel",
    "ProjectedLSTM",
]
