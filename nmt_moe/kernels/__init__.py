"""Fast operations that need only torch (and, in `_triton`, Triton).

`reference` defines the same operations in plain torch, under the same names. The tests compare each
operation with its definition.
"""

from nmt_moe.kernels import reference
from nmt_moe.kernels._backend import is_captured, is_on_host, row_groups
from nmt_moe.kernels._cpu import has_compiled_loops
from nmt_moe.kernels._cpu import load as compiled_operators
from nmt_moe.kernels._trial import failed as failed_kernels
from nmt_moe.kernels.activations import log_probabilities, log_softmax, sigmoid_residual, tanh
from nmt_moe.kernels.attend_rows import attend_rows
from nmt_moe.kernels.attentive_lstm import attentive_lstm
from nmt_moe.kernels.combine_rows import combine_rows
from nmt_moe.kernels.cross_entropy import cross_entropy
from nmt_moe.kernels.expert_ffn import expert_ffn
from nmt_moe.kernels.factored_adam import factored_adam
from nmt_moe.kernels.gate_logits import gate_logits
from nmt_moe.kernels.gather_rows import gather_rows
from nmt_moe.kernels.gating import noisy_top_k
from nmt_moe.kernels.grouped_gemm import grouped_gemm
from nmt_moe.kernels.linear import linear
from nmt_moe.kernels.lstm import lstm
from nmt_moe.kernels.mixture_ffn import mixture_ffn
from nmt_moe.kernels.packed_lstm import PackedLSTM
from nmt_moe.kernels.packed_mixture import PackedExperts, choose_experts, packed_mixture_ffn
from nmt_moe.kernels.quantised import PackedLinear, quantise_rows
from nmt_moe.kernels.reference import NOISE_FLOOR, Gating
from nmt_moe.kernels.row_plan import RowPlan, plan_rows

__all__ = [
    "NOISE_FLOOR",
    "Gating",
    "PackedExperts",
    "PackedLSTM",
    "PackedLinear",
    "RowPlan",
    "attend_rows",
    "attentive_lstm",
    "choose_experts",
    "compiled_operators",
    "combine_rows",
    "cross_entropy",
    "expert_ffn",
    "factored_adam",
    "failed_kernels",
    "gate_logits",
    "gather_rows",
    "grouped_gemm",
    "has_compiled_loops",
    "is_captured",
    "is_on_host",
    "linear",
    "log_probabilities",
    "log_softmax",
    "lstm",
    "mixture_ffn",
    "noisy_top_k",
    "packed_mixture_ffn",
    "plan_rows",
    "quantise_rows",
    "reference",
    "row_groups",
    "sigmoid_residual",
    "tanh",
]
