"""Each operation in plain torch: its definition, and the oracle of its tests."""

import torch
from torch import Tensor


def gather_rows(x: Tensor, row_token: Tensor, token_rows: Tensor) -> Tensor:
    """Define `kernels.gather_rows`."""
    del token_rows  # only the backward pass of the fast form reads it
    return x[row_token]


def combine_rows(rows: Tensor, gates: Tensor, row_token: Tensor, token_rows: Tensor) -> Tensor:
    """Define `kernels.combine_rows`."""
    del row_token  # only the backward pass of the fast form reads it
    padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])  # row R is no row
    return (padded[token_rows] * gates.unsqueeze(2)).sum(1)


def mixture_ffn(
    x: Tensor,
    gates: Tensor,
    row_token: Tensor,
    token_rows: Tensor,
    expert_offsets: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
) -> Tensor:
    """Define `kernels.mixture_ffn`."""
    rows = expert_ffn(x[row_token], weight_in, weight_out, expert_offsets)
    return combine_rows(rows, gates, row_token, token_rows)


def grouped_gemm(rows: Tensor, weight: Tensor, expert_offsets: Tensor) -> Tensor:
    """Define `kernels.grouped_gemm`."""
    bounds = expert_offsets.tolist()
    return torch.cat(
        [
            rows[start:end] @ weight[e]
            for e, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False))
        ]
    )


def expert_ffn(
    rows: Tensor, weight_in: Tensor, weight_out: Tensor, expert_offsets: Tensor
) -> Tensor:
    """Define `kernels.expert_ffn`."""
    hidden = torch.relu(grouped_gemm(rows, weight_in, expert_offsets))
    return grouped_gemm(hidden, weight_out, expert_offsets)


def factored_adam(
    weight: Tensor,
    grad: Tensor,
    row_mean: Tensor,
    column_mean: Tensor,
    *,
    step: int,
    lr: float,
    beta2: float,
    eps: float,
    weight_decay: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Define `kernels.factored_adam`; the new weight, row and column means are returned."""
    row_mean = beta2 * row_mean + (1 - beta2) * grad.square().mean(2)  # (E, D)
    column_mean = beta2 * column_mean + (1 - beta2) * grad.square().mean(1)  # (E, H)
    total = row_mean.mean(1)[:, None, None]
    outer = row_mean[:, :, None] * column_mean[:, None, :]
    moment = torch.where(total > 0, outer / total, 0.0)
    step_size = lr * (1 - beta2**step) ** 0.5
    decayed = weight - lr * weight_decay * weight
    return decayed - step_size * grad / (moment.sqrt() + eps), row_mean, column_mean
