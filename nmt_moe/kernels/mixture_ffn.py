"""Compute the mixture of this rank's experts: gather rows, run experts and combine outputs."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nmt_moe.checks import check_shape
from nmt_moe.kernels import _memory
from nmt_moe.kernels._backend import is_on_host, needs_gradient
from nmt_moe.kernels._batches import Batch, plan_padding
from nmt_moe.kernels._matmul import multiply_into
from nmt_moe.kernels._products import choose_evaluation_products
from nmt_moe.kernels.combine_rows import combine_rows
from nmt_moe.kernels.expert_ffn import expert_ffn
from nmt_moe.kernels.gather_rows import gather_rows, sum_rows
from nmt_moe.kernels.row_plan import RowPlan

# For at most this many rows without gradients, as in a decoding step, reading the weights takes
# most of the time. Planning and computing padding would cost more than batched products save.
FEW_ROWS = 1024


def mixture_ffn(
    x: Tensor,
    gates: Tensor,
    plan: RowPlan,
    weight_in: Tensor,
    weight_out: Tensor,
    recompute: bool = False,
) -> Tensor:
    """Compute y = sum over a token's experts of gate times relu(x @ weight_in) @ weight_out.

    On the CPU, the tokens of a few experts at a time are gathered into one scratch buffer that
    stays in the cache. Only the hidden activations are kept for the backward pass, because the
    gradient of a gate is the dot product of its row's hidden activations and their gradient. A few
    rows without gradients, as in a decoding step, are computed one expert after another. On other
    devices, this function runs `gather_rows`, `expert_ffn` and `combine_rows`. Sums run in a fixed
    order, so equal inputs give bit-identical results.

    Args:
        x: (N, D), the tokens' vectors.
        gates: (N, K), weights of the chosen experts, in the dtype of `x` or wider; 0 in empty
            slots.
        plan: Row plan that assigns rows to experts.
        weight_in: (E, D, H), the experts' first matrices.
        weight_out: (E, H, D), the experts' second matrices.
        recompute: Whether to recompute the hidden activations in the backward pass, with the same
            routing, instead of keeping the (R, H) tensor.

    Returns:
        (N, D), the outputs y.

    Raises:
        ValueError: if the shapes of weights and tokens do not match.

    Source: Shazeer et al. 2017, eq. 1, Appendix D (recomputation).
    """
    num_experts, model_dim, hidden_dim = weight_in.shape
    check_shape("x", x, (None, model_dim), "(N, D)")
    check_shape("weight_out", weight_out, (num_experts, hidden_dim, model_dim), "(E, H, D)")
    check_shape("plan.offsets", plan.offsets, (num_experts + 1,), "(E + 1,)")
    if is_on_host(x):
        is_training = needs_gradient(x, gates, weight_in, weight_out)
        if len(plan.row_token) <= FEW_ROWS and not is_training:
            return _mix_few(x, gates, plan, weight_in, weight_out)
        keep = is_training and not recompute
        return _MixtureFFN.apply(x, gates, plan, weight_in, weight_out, keep)
    rows = expert_ffn(gather_rows(x, plan), weight_in, weight_out, plan.offsets, recompute)
    return combine_rows(rows, gates, plan)


def _mix_few(
    x: Tensor, gates: Tensor, plan: RowPlan, weight_in: Tensor, weight_out: Tensor
) -> Tensor:
    """Compute the same as `_MixtureFFN`, without padding and without a backward pass."""
    rows = x.index_select(0, plan.row_token)
    products = choose_evaluation_products(rows, weight_in, weight_out, plan.offsets)
    hidden = products.multiply(rows, weight_in, relu=True)
    return sum_rows(products.multiply(hidden, weight_out), plan.token_rows, gates)


class _MixtureFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gates: Tensor,
        plan: RowPlan,
        weight_in: Tensor,
        weight_out: Tensor,
        keep: bool,
    ) -> Tensor:
        padded = plan_padding(plan)
        num_rows, most = len(padded.row_token), padded.most_rows
        model_dim, hidden_dim = weight_in.shape[1:]
        hidden = _memory.empty((num_rows if keep else most, hidden_dim), x)
        outputs = _empty_rows(num_rows, x)
        scratch = x.new_empty(most, model_dim)
        for batch in padded.batches:
            tokens = padded.row_token[batch.rows]
            rows = batch.view(torch.index_select(x, 0, tokens, out=scratch[: len(tokens)]))
            batch_hidden = batch.cut(hidden) if keep else batch.view(hidden[: len(tokens)])
            multiply_into(batch_hidden, rows, weight_in[batch.experts], relu=True)
            multiply_into(batch.cut(outputs), batch_hidden, weight_out[batch.experts])
        ctx.save_for_backward(
            x,
            gates,
            padded.row_token,
            padded.token_rows,
            weight_in,
            weight_out,
            hidden if keep else None,
        )
        ctx.batches, ctx.most = padded.batches, most
        weights = gates.to(x.dtype)
        return F.embedding_bag(padded.token_rows, outputs, mode="sum", per_sample_weights=weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, gates, row_token, token_rows, weight_in, weight_out, hidden = ctx.saved_tensors
        num_rows = len(row_token)
        # The gates of padding stay 0. Empty slots write to the last element.
        row_gate = x.new_zeros(num_rows + 1, 1)
        row_gate[token_rows.reshape(-1)] = gates.reshape(-1, 1).to(x.dtype)
        grad_row_gate = gates.new_zeros(num_rows + 1, 1)
        grad_rows = _empty_rows(num_rows, x)
        grad_in, grad_out = (
            _memory.empty(weight.shape, weight) if is_needed else None
            for weight, is_needed in zip(
                (weight_in, weight_out), ctx.needs_input_grad[3:5], strict=True
            )
        )
        _zero_unused(ctx.batches, grad_in, grad_out)
        scratch = [x.new_empty(ctx.most, width) for width in weight_in.shape[1:] for _ in range(2)]
        for batch in ctx.batches:
            own, tokens = batch.experts, row_token[batch.rows]
            flat = [t[: len(tokens)] for t in scratch]
            rows, grad_outputs, grad_hidden, product = map(batch.view, flat)
            torch.index_select(x, 0, tokens, out=flat[0])
            if hidden is None:
                batch_hidden = rows.new_empty(*rows.shape[:2], weight_in.shape[2])
                multiply_into(batch_hidden, rows, weight_in[own], relu=True)
            else:
                batch_hidden = batch.cut(hidden)
            torch.index_select(grad_y, 0, tokens, out=flat[1])
            multiply_into(grad_hidden, grad_outputs, weight_out[own].mT)
            torch.mul(grad_hidden, batch_hidden, out=product)
            own_gradient = batch.cut(grad_row_gate)
            torch.sum(product, 2, keepdim=True, dtype=gates.dtype, out=own_gradient)
            gate = batch.cut(row_gate)
            grad_outputs.mul_(gate)
            if grad_out is not None:
                multiply_into(grad_out[own], batch_hidden.mT, grad_outputs)
            torch.ops.aten.threshold_backward.grad_input(
                grad_hidden.mul_(gate), batch_hidden, 0, grad_input=grad_hidden
            )
            if grad_in is not None:
                multiply_into(grad_in[own], rows.mT, grad_hidden)
            multiply_into(batch.cut(grad_rows), grad_hidden, weight_in[own].mT)
        grad_x = F.embedding_bag(token_rows, grad_rows, mode="sum")
        grad_gates = grad_row_gate.view(-1)[token_rows]
        return grad_x, grad_gates, None, grad_in, grad_out, None


def _empty_rows(num_rows: int, x: Tensor) -> Tensor:
    """Return (R + 1, D) rows: R uninitialised rows, and a row of zeros for empty slots."""
    rows = _memory.empty((num_rows + 1, x.shape[1]), x)
    rows[-1].zero_()
    return rows


def _zero_unused(batches: list[Batch], *gradients: Tensor | None) -> None:
    """Set the gradients of experts without rows to 0, with one call for each run of neighbours."""
    for gradient in gradients:
        if gradient is None:
            continue
        start = 0
        for experts in [*(batch.experts for batch in batches), slice(len(gradient), None)]:
            if experts.start > start:
                gradient[start : experts.start].zero_()
            start = experts.stop
