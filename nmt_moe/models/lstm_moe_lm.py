"""The language model for fairseq, `--arch lstm_moe_lm` and its variants."""

from dataclasses import dataclass, field
from typing import Any, Dict, Optional, Tuple

from fairseq.data import Dictionary
from fairseq.models import FairseqLanguageModel, register_model
from torch import Tensor, nn

from nmt_moe.models._dictionary import DictionaryCheck
from nmt_moe.models._embedding import build_embedding
from nmt_moe.models._lstm_decoder import LSTMDecoder
from nmt_moe.models._options import (
    MAX_POSITIONS,
    MoEOptions,
    expert_parallel_group,
    moe_config,
    other_default,
    to_core,
)
from nmt_moe.nn import Linear, LSTMLanguageModel, LSTMLMConfig


@dataclass
class LSTMMoELMConfig(MoEOptions):
    """Options of the model. The defaults describe the paper's MoE-32."""

    lstm_hidden_dim: int = field(
        default=LSTMLMConfig.lstm_hidden_dim,
        metadata={
            "help": "number of cells in each LSTM; if it differs from --model-dim, outputs are "
            "projected to --model-dim"
        },
    )
    lstm_layers: int = field(
        default=LSTMLMConfig.lstm_layers,
        metadata={"help": "number of LSTMs; the MoE layer follows the first"},
    )
    expert_layers: int = field(
        default=LSTMLMConfig.expert_layers,
        metadata={
            "help": "number of hidden layers in an expert; more than 1 only with --num-experts 1"
        },
    )
    dropout: float = field(
        default=LSTMLMConfig.dropout, metadata={"help": "dropout on the output of every layer"}
    )
    hidden_dim: int = other_default("hidden_dim", 1024)
    importance_weight: float = other_default("importance_weight", 0.1)
    load_weight: float = other_default("load_weight", 0.1)

    def to_config(self) -> LSTMLMConfig:
        """Convert the options to the core's configuration.

        Raises:
            ValueError: if a value is not allowed. The message gives the option, the constraint
                and the value.
        """
        return to_core(LSTMLMConfig, self, moe=moe_config(self))


@register_model("lstm_moe_lm", dataclass=LSTMMoELMConfig)
class LSTMMoELM(FairseqLanguageModel):
    """A language model with an MoE layer between its LSTMs."""

    @classmethod
    def build_model(cls, cfg: Any, task: Any) -> "LSTMMoELM":
        """Build the model. Its output may omit the last symbols of the task's dictionary.

        Raises:
            ValueError: if a value is not allowed. The message gives the option, the constraint
                and the value.
        """
        config = LSTMMoELMConfig.to_config(cfg)
        group = expert_parallel_group(cfg, config.moe)
        dictionary, num_outputs = task.source_dictionary, len(task.target_dictionary)
        if cfg.share_decoder_input_output_embed and num_outputs != len(dictionary):
            raise ValueError(
                "`--share-decoder-input-output-embed` needs an output for each of the "
                f"{len(dictionary)} symbols of the dictionary, but `--output-dictionary-size` "
                f"leaves only {num_outputs}. Omit one of the two options."
            )
        embedding = build_embedding(dictionary, config.model_dim, config.init_range)
        output = Linear(config.model_dim, num_outputs)
        nn.init.uniform_(output.weight, -config.init_range, config.init_range)
        if cfg.share_decoder_input_output_embed:
            output.weight = embedding.weight
        network = LSTMLanguageModel(config, embedding, group)
        return cls(LSTMMoELMDecoder(network, output, dictionary))


class LSTMMoELMDecoder(LSTMDecoder):
    """The network and the softmax layer, with the interface that fairseq calls.

    The LSTMs start each row of a batch with a zero state. The contents of a row depend on
    --sample-break-mode. With `eos`, a row is one sentence (the benchmark's sentences are shuffled).
    With `none` or `complete`, it is a passage of text, and the state is kept from one sentence to
    the next.
    """

    def __init__(
        self, network: LSTMLanguageModel, output: nn.Linear, dictionary: Dictionary
    ) -> None:
        super().__init__(dictionary)
        self.dictionary_check = DictionaryCheck(dictionary, "text's")
        self.network = network
        self.output = output

    def forward(
        self,
        prev_output_tokens: Tensor,
        encoder_out: None = None,
        incremental_state: Optional[Dict] = None,
        features_only: bool = False,
        **_: Any,
    ) -> Tuple[Tensor, Dict[str, Any]]:
        """Return (B, T, V) logits and a dictionary with `moe_stats`.

        With an incremental state, only the last step is computed. With `features_only`, return the
        inputs to the softmax layer, (B, T, D), instead of the logits.
        """
        if incremental_state is None:
            padding_mask = prev_output_tokens.eq(self.dictionary.pad())
            out = self.network(prev_output_tokens, padding_mask=padding_mask)
        else:
            state = self._get_state(incremental_state)
            out = self.network(prev_output_tokens[:, -1:], state)
            self._set_state(incremental_state, out.state)
        moe_stats = {} if out.moe_stats is None else {"decoder": out.moe_stats}
        x = out.features if features_only else self.output_layer(out.features)
        return x, {"attn": None, "moe_stats": moe_stats}

    def extract_features(
        self, prev_output_tokens: Tensor, **kwargs: Any
    ) -> Tuple[Tensor, Dict[str, Any]]:
        """Return features, (B, T, D), and the same dictionary as `forward`."""
        return self(prev_output_tokens, features_only=True, **kwargs)

    def output_layer(self, features: Tensor, **_: Any) -> Tensor:
        """Compute logits, (..., V), from features, (..., D)."""
        return self.output(features)

    def max_positions(self) -> int:
        """Return the maximum length of a row."""
        return MAX_POSITIONS
