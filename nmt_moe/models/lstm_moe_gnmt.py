"""The translation model for fairseq, `--arch lstm_moe_gnmt` and its variants."""

from dataclasses import dataclass, field
from typing import Any, Dict, Optional, Tuple

from fairseq.data import Dictionary
from fairseq.dataclass import ChoiceEnum
from fairseq.models import (
    FairseqEncoder,
    FairseqEncoderDecoderModel,
    register_model,
)
from torch import Tensor, nn

from nmt_moe.models._dictionary import DictionaryCheck
from nmt_moe.models._embedding import build_embedding
from nmt_moe.models._lstm_decoder import LSTMDecoder
from nmt_moe.models._options import (
    MAX_POSITIONS,
    MoEOptions,
    expert_parallel_group,
    moe_config,
    to_core,
)
from nmt_moe.nn import (
    ATTENTIONS,
    WIRINGS,
    EncoderOutput,
    GNMTConfig,
    GNMTDecoder,
    GNMTEncoder,
    Linear,
)
from nmt_moe.parallel import ExpertParallelGroup

AttentionChoice: Any = ChoiceEnum(tuple(ATTENTIONS))
WiringChoice: Any = ChoiceEnum(WIRINGS)


@dataclass
class LSTMMoEGNMTConfig(MoEOptions):
    """Options of the model.

    The defaults describe the paper's model for a single language pair, with 32 experts and a flat
    gate.
    """

    lstm_hidden_dim: int = field(
        default=GNMTConfig.lstm_hidden_dim,
        metadata={"help": "number of cells in each LSTM; outputs are projected to --model-dim"},
    )
    encoder_layers: int = field(
        default=GNMTConfig.encoder_layers,
        metadata={"help": "number of LSTMs in the encoder; the bidirectional pair counts as two"},
    )
    decoder_layers: int = field(
        default=GNMTConfig.decoder_layers, metadata={"help": "number of LSTMs in the decoder"}
    )
    attention: AttentionChoice = field(
        default=GNMTConfig.attention,
        metadata={"help": "kind of attention; product: eq. 22 of the paper; additive: eq. 21"},
    )
    attention_wiring: WiringChoice = field(
        default=GNMTConfig.attention_wiring,
        metadata={
            "help": "decoder LSTM that receives the attention's context; recurrent: LSTM 1, at "
            "each step; parallel: LSTM 2, after LSTM 1 has run over all steps"
        },
    )
    dropout: float = field(
        default=GNMTConfig.dropout,
        metadata={"help": "dropout on the output of every embedding, LSTM and MoE layer"},
    )
    decoder_num_experts: int = field(
        default=GNMTConfig.decoder_num_experts,
        metadata={
            "help": "number of experts in the decoder's MoE layer if it differs from the "
            "encoder's, as it may in a pruned model; 0: the same as --num-experts"
        },
    )

    def to_config(self) -> GNMTConfig:
        """Convert the options to the core's configuration.

        Raises:
            ValueError: if a value is not allowed. The message gives the option, the constraint and
                the value.
        """
        return to_core(GNMTConfig, self, moe=moe_config(self))


@register_model("lstm_moe_gnmt", dataclass=LSTMMoEGNMTConfig)
class LSTMMoEGNMT(FairseqEncoderDecoderModel):
    """A GNMT-style encoder and decoder with MoE layers between the LSTMs."""

    @classmethod
    def build_model(cls, cfg: Any, task: Any) -> "LSTMMoEGNMT":
        """Build the model for a task that has a source and a target dictionary."""
        config = LSTMMoEGNMTConfig.to_config(cfg)
        group = expert_parallel_group(cfg, config.moe, config.decoder_moe)
        source, target = task.source_dictionary, task.target_dictionary
        sizes = config.model_dim, config.init_range
        embedding = build_embedding(source, *sizes)
        shares_dictionary = source == target
        target_embedding = embedding if shares_dictionary else build_embedding(target, *sizes)
        encoder = LSTMMoEGNMTEncoder(config, source, embedding, group)
        decoder = LSTMMoEGNMTDecoder(
            config, target, target_embedding, cfg.share_decoder_input_output_embed, group
        )
        return cls(encoder, decoder)


class LSTMMoEGNMTEncoder(FairseqEncoder):
    """The encoder with the interface that fairseq calls."""

    def __init__(
        self,
        config: GNMTConfig,
        dictionary: Dictionary,
        embedding: nn.Embedding,
        group: ExpertParallelGroup,
    ) -> None:
        super().__init__(dictionary)
        self.dictionary_check = DictionaryCheck(dictionary, "source")
        self.network = GNMTEncoder(config, embedding, group)

    def forward(
        self, src_tokens: Tensor, src_lengths: Optional[Tensor] = None, **_: Any
    ) -> EncoderOutput:
        """Encode source tokens, (B, S), padded on either side."""
        return self.network(src_tokens, src_tokens.eq(self.dictionary.pad()))

    def reorder_encoder_out(self, encoder_out: EncoderOutput, new_order: Tensor) -> EncoderOutput:
        """Select rows; `new_order`, (B',) int64, contains the old row of each new row."""
        return encoder_out.reorder(new_order)

    def max_positions(self) -> int:
        """Return the maximum source length."""
        return MAX_POSITIONS


class LSTMMoEGNMTDecoder(LSTMDecoder):
    """The decoder and the softmax layer, with the interface that fairseq calls."""

    def __init__(
        self,
        config: GNMTConfig,
        dictionary: Dictionary,
        embedding: nn.Embedding,
        tie_output: bool,
        group: ExpertParallelGroup,
    ) -> None:
        super().__init__(dictionary)
        self.dictionary_check = DictionaryCheck(dictionary, "target")
        self.network = GNMTDecoder(config, embedding, group)
        self.output = Linear(config.model_dim, len(dictionary))
        nn.init.uniform_(self.output.weight, -config.init_range, config.init_range)
        if tie_output:
            self.output.weight = embedding.weight

    def forward(
        self,
        prev_output_tokens: Tensor,
        encoder_out: EncoderOutput,
        incremental_state: Optional[Dict] = None,
        features_only: bool = False,
        **_: Any,
    ) -> Tuple[Tensor, Dict[str, Any]]:
        """Return (B, T, V) logits and a dictionary with `attn` and `moe_stats`.

        With an incremental state, only the last step is computed. With `features_only`, return the
        inputs to the softmax layer, (B, T, D), instead of the logits.
        """
        if incremental_state is None:
            padding_mask = prev_output_tokens.eq(self.dictionary.pad())
            out = self.network(prev_output_tokens, encoder_out, padding_mask=padding_mask)
        else:
            state = self._get_state(incremental_state)
            out = self.network(prev_output_tokens[:, -1:], encoder_out, state)
            self._set_state(incremental_state, out.state)
        all_stats = {"encoder": encoder_out.moe_stats, "decoder": out.moe_stats}
        return out.features if features_only else self.output(out.features), {
            "attn": [out.attention],
            "moe_stats": {name: stats for name, stats in all_stats.items() if stats is not None},
        }

    def max_positions(self) -> int:
        """Return the maximum target length."""
        return MAX_POSITIONS
