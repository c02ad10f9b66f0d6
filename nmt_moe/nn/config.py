"""The configurations of the networks."""

from dataclasses import dataclass, replace

from nmt_moe.checks import check_choice, check_range, check_whole
from nmt_moe.moe import MoEConfig
from nmt_moe.nn.attention import ATTENTIONS

WIRINGS = ("recurrent", "parallel")


def _check_moe_dim(model_dim: int, moe: MoEConfig | None) -> None:
    if moe is not None and moe.model_dim != model_dim:
        raise ValueError(
            f"`moe.model_dim` must equal the network's `model_dim`, {model_dim}, but is "
            f"{moe.model_dim}."
        )


@dataclass(frozen=True)
class GNMTConfig:
    """Configuration of a GNMT-style encoder and decoder.

    Attributes:
        model_dim: Width of the embeddings and of every layer's input and output, D.
        lstm_hidden_dim: Number of cells in each LSTM, H. Outputs are projected to D if H differs.
        encoder_layers: Number of LSTMs in the encoder; the bidirectional pair at the bottom counts
            as two.
        decoder_layers: Number of LSTMs in the decoder.
        attention: Kind of attention, "product" (eq. 22) or "additive" (eq. 21).
        attention_wiring: LSTM that receives the context. With "recurrent", the previous output of
            decoder LSTM 1 is the query, and the context is an input to the same LSTM. With
            "parallel", decoder LSTM 1 first runs over all steps, all of its outputs are used as
            queries together, and the contexts are inputs to LSTM 2.
        dropout: Probability that an output of an embedding, LSTM or MoE layer is set to 0
            during training.
        init_range: All weights except biases and gate weights are drawn uniformly from
            [-init_range, init_range].
        moe: Configuration of the MoE layers in encoder and decoder; None for a network without
            them.
        decoder_num_experts: Number of experts in the decoder's MoE layer if it differs from the
            number in the encoder's layer, as in a pruned model; 0 if it does not.

    Raises:
        ValueError: if a value is not allowed. The message gives the field, the constraint and
            the value.

    Source: Shazeer et al. 2017, Appendix E; Wu et al. 2016 (GNMT).
    """

    model_dim: int = 512
    lstm_hidden_dim: int = 2048
    encoder_layers: int = 3
    decoder_layers: int = 2
    attention: str = "product"
    attention_wiring: str = "recurrent"
    dropout: float = 0.4
    init_range: float = 0.04
    moe: MoEConfig | None = None
    decoder_num_experts: int = 0

    def __post_init__(self) -> None:
        check_whole("model_dim", self.model_dim, 1)
        check_whole("lstm_hidden_dim", self.lstm_hidden_dim, self.model_dim)
        # The MoE layer is between encoder LSTMs 2 and 3. In the decoder, `parallel` needs LSTM 2,
        # which receives the context.
        check_whole("encoder_layers", self.encoder_layers, 2 if self.moe is None else 3)
        check_whole("decoder_layers", self.decoder_layers, 2)
        check_choice("attention", self.attention, tuple(ATTENTIONS))
        check_choice("attention_wiring", self.attention_wiring, WIRINGS)
        check_range("dropout", self.dropout, 0.0, 1.0)
        check_range("init_range", self.init_range, 0.0)
        _check_moe_dim(self.model_dim, self.moe)
        check_whole("decoder_num_experts", self.decoder_num_experts, 0)
        if self.decoder_num_experts and self.moe is None:
            raise ValueError(
                "`decoder_num_experts` must be 0 without MoE layers, but is "
                f"{self.decoder_num_experts}."
            )
        try:
            _ = self.decoder_moe
        except ValueError as error:
            raise ValueError(
                f"`decoder_num_experts` cannot be {self.decoder_num_experts}: {error}"
            ) from None

    @property
    def decoder_moe(self) -> MoEConfig | None:
        """Return the configuration of the decoder's MoE layer, or None if there is none."""
        if self.moe is None or not self.decoder_num_experts:
            return self.moe
        return replace(self.moe, num_experts=self.decoder_num_experts)


@dataclass(frozen=True)
class LSTMLMConfig:
    """Configuration of a language model.

    Attributes:
        model_dim: Width of the embedding and of every layer's input and output, D.
        lstm_hidden_dim: Number of cells in each LSTM, H. Outputs are projected to D if H differs.
        lstm_layers: Number of LSTMs; the MoE layer follows the first.
        expert_layers: Number of hidden layers in an expert. It may exceed 1 only if there is a
            single expert, which all tokens use without a gate (MoE-1-Deep).
        dropout: Probability that an output of a layer is set to 0 during training.
        init_range: All weights except biases and gate weights are drawn uniformly from
            [-init_range, init_range].
        moe: Configuration of the MoE layer; None for a network without one.

    Raises:
        ValueError: if a value is not allowed. The message gives the field, the constraint and
            the value.

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
        check_whole("model_dim", self.model_dim, 1)
        check_whole("lstm_hidden_dim", self.lstm_hidden_dim, self.model_dim)
        check_whole("lstm_layers", self.lstm_layers, 1 if self.moe is None else 2)
        check_whole("expert_layers", self.expert_layers, 1)
        check_range("dropout", self.dropout, 0.0, 1.0)
        check_range("init_range", self.init_range, 0.0)
        if self.expert_layers > 1 and (self.moe is None or self.moe.num_experts > 1):
            experts = 0 if self.moe is None else self.moe.num_experts
            raise ValueError(
                f"`expert_layers` must be 1 with {experts} experts, but is {self.expert_layers}. "
                "Set `num_experts` to 1, because only a single expert can be deeper."
            )
        _check_moe_dim(self.model_dim, self.moe)
