"""All local experts over rows sorted by expert: relu(rows @ weight_in) @ weight_out."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nmt_moe.checks import check_shape
from nmt_moe.kernels._products import LoopProducts, Products, choose_products, relu_gradient
from nmt_moe.kernels.grouped_gemm import check_dtypes


def expert_ffn(
    rows: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    expert_offsets: Tensor,
    recompute: bool = False,
) -> Tensor:
    """Send each run of rows through its own expert.

    On the CPU one pass per expert that has rows, two matrix products each; on CUDA grouped products
    over all experts (`grouped_gemm`) with the ReLU and its gradient inside. The backward pass is
    written by hand so that every expert's weight gradient is one product straight into its place.

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
        ValueError: if the shapes or the dtypes do not fit together.

    Source: Shazeer et al. 2017, sections 2 and 3.2, Appendix D (recomputation).
    """
    num_experts, model_dim, hidden_dim = weight_in.shape
    check_shape("rows", rows, (None, model_dim), "(R, D)")
    check_shape("weight_out", weight_out, (num_experts, hidden_dim, model_dim), "(L, H, D)")
    check_shape("expert_offsets", expert_offsets, (num_experts + 1,), "(L + 1,)")
    check_dtypes(rows, expert_offsets, weight_in=weight_in, weight_out=weight_out)
    rows = rows.contiguous()
    products = choose_products(rows, weight_in, expert_offsets)
    function = _LoopFFN if isinstance(products, LoopProducts) else _GroupedFFN
    return function.apply(rows, weight_in, weight_out, products, recompute)


class _LoopFFN(torch.autograd.Function):
    """One expert after the other, both products, so that its hidden activations stay in cache."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight_in: Tensor,
        weight_out: Tensor,
        products: LoopProducts,
        recompute: bool,
    ) -> Tensor:
        keep = not recompute and any(ctx.needs_input_grad)
        hidden = rows.new_empty(len(rows), weight_in.shape[2]) if keep else None
        answers = torch.empty_like(rows)
        for expert, run in products.runs:
            out = None if hidden is None else hidden[run]
            run_hidden = torch.mm(rows[run], weight_in[expert], out=out).relu_()
            torch.mm(run_hidden, weight_out[expert], out=answers[run])
        ctx.save_for_backward(rows, weight_in, weight_out, hidden)
        ctx.products = products
        return answers

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_answers: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight_in, weight_out, hidden = ctx.saved_tensors
        grad_answers = grad_answers.contiguous()
        grad_rows = torch.empty_like(rows)
        grad_in = ctx.products.empty_gradient(rows, *weight_in.shape[1:])
        grad_out = ctx.products.empty_gradient(rows, *weight_out.shape[1:])
        for expert, run in ctx.products.runs:
            if hidden is None:
                run_hidden = torch.mm(rows[run], weight_in[expert]).relu_()
            else:
                run_hidden = hidden[run]
            torch.mm(run_hidden.t(), grad_answers[run], out=grad_out[expert])
            grad_hidden = torch.mm(grad_answers[run], weight_out[expert].t())
            grad_hidden = relu_gradient(grad_hidden, run_hidden)
            torch.mm(rows[run].t(), grad_hidden, out=grad_in[expert])
            torch.mm(grad_hidden, weight_in[expert].t(), out=grad_rows[run])
        return grad_rows, grad_in, grad_out, None, None


class _GroupedFFN(torch.autograd.Function):
    """All experts at once, one product after the other, so that the host never waits.

    The gates are not applied here: `combine_rows` reads every answer anyway and multiplies for
    nothing, and the gradient of the gates needs the answers without them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight_in: Tensor,
        weight_out: Tensor,
        products: Products,
        recompute: bool,
    ) -> Tensor:
        hidden = products.multiply(rows, weight_in, relu=True)
        keep = not recompute and any(ctx.needs_input_grad)
        ctx.save_for_backward(rows, weight_in, weight_out, hidden if keep else None)
        ctx.products = products
        return products.multiply(hidden, weight_out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_answers: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight_in, weight_out, hidden = ctx.saved_tensors
        products, grad_answers = ctx.products, grad_answers.contiguous()
        if hidden is None:
            hidden = products.multiply(rows, weight_in, relu=True)
        grad_out = products.weight_gradient(hidden, grad_answers)
        grad_hidden = products.multiply_back(grad_answers, weight_out, mask=hidden)
        grad_in = products.weight_gradient(rows, grad_hidden)
        return products.multiply_back(grad_hidden, weight_in), grad_in, grad_out, None, None
