"""The whole mixture where every expert is at hand: gather, experts and combine in one pass."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nmt_moe.checks import check_shape
from nmt_moe.kernels import _memory
from nmt_moe.kernels.combine_rows import combine_rows
from nmt_moe.kernels.expert_ffn import expert_ffn
from nmt_moe.kernels.gather_rows import gather_rows


def mixture_ffn(
    x: Tensor,
    gates: Tensor,
    row_token: Tensor,
    token_rows: Tensor,
    expert_offsets: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    recompute: bool = False,
) -> Tensor:
    """Compute y = sum over a token's experts of gate times relu(x @ weight_in) @ weight_out.

    On the CPU each expert gathers its own tokens into one scratch that stays in the cache, and the
    gradient of a gate is the product of its row's hidden activations and their gradient, so that
    nothing of an expert is kept but its hidden activations. Elsewhere it is `gather_rows`,
    `expert_ffn` and `combine_rows`. Sums run in a fixed order: equal inputs give equal bits.

    Args:
        x: (N, D).
        gates: (N, K). Weights of the chosen experts, in the dtype of `x`; 0 in empty slots.
        row_token: (R,) int64. The token each row comes from; rows are sorted by expert.
        token_rows: (N, K) int64. The rows of each token; R in empty slots.
        expert_offsets: (E + 1,) int64. Expert e owns rows [offsets[e], offsets[e + 1]).
        weight_in: (E, D, H).
        weight_out: (E, H, D).
        recompute: Compute the hidden activations again in the backward pass, with the same
            routing, instead of keeping the (R, H) tensor.

    Returns:
        (N, D).

    Raises:
        ValueError: if the shapes of weights and tokens do not fit together.

    Source: Shazeer et al. 2017, eq. 1, Appendix D (recomputation).
    """
    num_experts, model_dim, hidden_dim = weight_in.shape
    check_shape("x", x, (None, model_dim), "(N, D)")
    check_shape("weight_out", weight_out, (num_experts, hidden_dim, model_dim), "(E, H, D)")
    check_shape("expert_offsets", expert_offsets, (num_experts + 1,), "(E + 1,)")
    if x.device.type == "cpu":
        return _MixtureFFN.apply(
            x, gates, row_token, token_rows, expert_offsets, weight_in, weight_out, recompute
        )
    rows = gather_rows(x, row_token, token_rows)
    rows = expert_ffn(rows, weight_in, weight_out, expert_offsets, recompute)
    return combine_rows(rows, gates, row_token, token_rows)


class _MixtureFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gates: Tensor,
        row_token: Tensor,
        token_rows: Tensor,
        expert_offsets: Tensor,
        weight_in: Tensor,
        weight_out: Tensor,
        recompute: bool,
    ) -> Tensor:
        counts = expert_offsets.diff().tolist()
        most, num_rows = max(counts), len(row_token)
        model_dim, hidden_dim = weight_in.shape[1:]
        keep = not recompute and any(ctx.needs_input_grad)
        hidden = _memory.empty((num_rows if keep else most, hidden_dim), x)
        answers = _empty_answers(num_rows, x)
        tokens, answer_runs = row_token.split(counts), answers[:-1].split(counts)
        hidden_runs = hidden.split(counts) if keep else [hidden[:count] for count in counts]
        picked = x.new_empty(most, model_dim)
        for e, count in enumerate(counts):
            if count == 0:
                continue
            rows, run_hidden = picked[:count], hidden_runs[e]
            torch.index_select(x, 0, tokens[e], out=rows)
            torch.mm(rows, weight_in[e], out=run_hidden).relu_()
            torch.mm(run_hidden, weight_out[e], out=answer_runs[e])
        ctx.save_for_backward(
            x, gates, row_token, token_rows, weight_in, weight_out, hidden if keep else None
        )
        ctx.counts = counts
        return F.embedding_bag(token_rows, answers, mode="sum", per_sample_weights=gates)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, gates, row_token, token_rows, weight_in, weight_out, hidden = ctx.saved_tensors
        counts: list[int] = ctx.counts
        most, num_rows = max(counts), len(row_token)
        # Every row belongs to one slot; the place more is written to by empty slots.
        row_gate = gates.new_empty(num_rows + 1, 1)
        row_gate[token_rows.reshape(-1)] = gates.reshape(-1, 1)
        grad_row_gate = torch.zeros_like(row_gate)
        grad_rows = _empty_answers(num_rows, x)
        grad_in = _memory.empty(weight_in.shape, weight_in)
        grad_out = _memory.empty(weight_out.shape, weight_out)
        _zero_unused(counts, grad_in, grad_out)
        scratch = [x.new_empty(most, width) for width in weight_in.shape[1:] for _ in range(2)]
        tokens = row_token.split(counts)
        hidden_runs = None if hidden is None else hidden.split(counts)
        row_gates, grad_row_gates, grad_row_runs = (
            t[:-1].split(counts) for t in (row_gate, grad_row_gate, grad_rows)
        )
        for e, count in enumerate(counts):
            if count == 0:
                continue
            rows, grad_answers, grad_hidden, product = (t[:count] for t in scratch)
            torch.index_select(x, 0, tokens[e], out=rows)
            if hidden_runs is None:
                run_hidden = torch.mm(rows, weight_in[e]).relu_()
            else:
                run_hidden = hidden_runs[e]
            torch.index_select(grad_y, 0, tokens[e], out=grad_answers)
            torch.mm(grad_answers, weight_out[e].t(), out=grad_hidden)
            torch.mul(grad_hidden, run_hidden, out=product)
            torch.sum(product, 1, keepdim=True, out=grad_row_gates[e])
            torch.mm(run_hidden.t(), grad_answers.mul_(row_gates[e]), out=grad_out[e])
            torch.ops.aten.threshold_backward.grad_input(
                grad_hidden.mul_(row_gates[e]), run_hidden, 0, grad_input=grad_hidden
            )
            torch.mm(rows.t(), grad_hidden, out=grad_in[e])
            torch.mm(grad_hidden, weight_in[e].t(), out=grad_row_runs[e])
        grad_x = F.embedding_bag(token_rows, grad_rows, mode="sum")
        grad_gates = grad_row_gate.view(-1)[token_rows]
        return grad_x, grad_gates, None, None, None, grad_in, grad_out, None


def _empty_answers(num_rows: int, x: Tensor) -> Tensor:
    """Make room for (R, D) rows and a row of zeros, which empty slots refer to."""
    answers = _memory.empty((num_rows + 1, x.shape[1]), x)
    answers[-1].zero_()
    return answers


def _zero_unused(counts: list[int], *gradients: Tensor) -> None:
    """Zero the gradients of experts without rows, a whole stretch of them at once."""
    start = 0
    for e, count in enumerate([*counts, 1]):
        if count:
            if e > start:
                for gradient in gradients:
                    gradient[start:e].zero_()
            start = e + 1
