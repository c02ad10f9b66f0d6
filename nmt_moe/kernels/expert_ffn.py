"""All local experts over rows sorted by expert: relu(rows @ weight_in) @ weight_out."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nmt_moe.checks import check_shape


def expert_ffn(
    rows: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    expert_offsets: Tensor,
    recompute: bool = False,
) -> Tensor:
    """Send each run of rows through its own expert.

    One pass per expert that has rows, two matrix products each; the backward pass is written by
    hand so that every expert's weight gradient is one product straight into its place.

    Args:
        rows: (R, D). Rows sorted by expert.
        weight_in: (L, D, H).
        weight_out: (L, H, D).
        expert_offsets: (L + 1,) int64. Expert e owns rows [offsets[e], offsets[e + 1]).
        recompute: Compute the hidden activations again in the backward pass instead of keeping
            the (R, H) tensor.

    Returns:
        (R, D).

    Raises:
        ValueError: if the shapes do not fit together.

    Source: Shazeer et al. 2017, sections 2 and 3.2, Appendix D (recomputation).
    """
    num_experts, model_dim, hidden_dim = weight_in.shape
    check_shape("rows", rows, (None, model_dim), "(R, D)")
    check_shape("weight_out", weight_out, (num_experts, hidden_dim, model_dim), "(L, H, D)")
    check_shape("expert_offsets", expert_offsets, (num_experts + 1,), "(L + 1,)")
    return _ExpertFFN.apply(rows, weight_in, weight_out, expert_offsets, recompute)


def _runs(expert_offsets: Tensor) -> list[tuple[int, slice]]:
    """List the experts that have rows, each with its slice."""
    bounds = expert_offsets.tolist()
    return [
        (expert, slice(start, end))
        for expert, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False))
        if end > start
    ]


class _ExpertFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight_in: Tensor,
        weight_out: Tensor,
        expert_offsets: Tensor,
        recompute: bool,
    ) -> Tensor:
        runs = _runs(expert_offsets)
        keep = not recompute and any(ctx.needs_input_grad)
        hidden = rows.new_empty(len(rows), weight_in.shape[2]) if keep else None
        answers = torch.empty_like(rows)
        for expert, run in runs:
            out = None if hidden is None else hidden[run]
            run_hidden = torch.mm(rows[run], weight_in[expert], out=out).relu_()
            torch.mm(run_hidden, weight_out[expert], out=answers[run])
        ctx.save_for_backward(rows, weight_in, weight_out, hidden)
        ctx.runs = runs
        return answers

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_answers: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight_in, weight_out, hidden = ctx.saved_tensors
        grad_answers = grad_answers.contiguous()
        grad_rows = torch.empty_like(rows)
        # Experts without rows keep a gradient of zero.
        grad_in, grad_out = torch.zeros_like(weight_in), torch.zeros_like(weight_out)
        for expert, run in ctx.runs:
            if hidden is None:
                run_hidden = torch.mm(rows[run], weight_in[expert]).relu_()
            else:
                run_hidden = hidden[run]
            torch.mm(run_hidden.t(), grad_answers[run], out=grad_out[expert])
            grad_hidden = torch.mm(grad_answers[run], weight_out[expert].t())
            grad_hidden = torch.ops.aten.threshold_backward(grad_hidden, run_hidden, 0)
            torch.mm(rows[run].t(), grad_hidden, out=grad_in[expert])
            torch.mm(grad_hidden, weight_in[expert].t(), out=grad_rows[run])
        return grad_rows, grad_in, grad_out, None, None
