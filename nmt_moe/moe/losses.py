"""The balance losses, which penalise unequal use of the experts."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def squared_cv(values: Tensor) -> Tensor:
    """Compute the squared coefficient of variation, the variance divided by the squared mean.

    The variance is the population variance (divided by E).

    Args:
        values: (..., E), non-negative.

    Returns:
        (...), the squared coefficients: 0 where all values are zero or there is only one value, and
        NaN where any value is NaN.

    Source: Shazeer et al. 2017, eqs. 7 and 11.
    """
    return _SquaredCV.apply(values)


class _SquaredCV(torch.autograd.Function):
    """An implementation of `squared_cv` in few operations.

    On a GPU, starting a kernel takes longer than adding E numbers.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        variance, mean = torch.var_mean(values, dim=-1, correction=0)
        # If no expert is used, the variance is also 0, so any divisor except 0 gives 0.
        squared_mean = mean.masked_fill(mean == 0, 1.0).square_()
        squared_cv = variance / squared_mean
        ctx.save_for_backward(values, mean, squared_mean, squared_cv)
        return squared_cv

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # d (v / m^2) / d x_i = 2 / (E m^2) (x_i - m - v / m)
        values, mean, squared_mean, squared_cv = ctx.saved_tensors
        centre = torch.addcmul(mean, mean, squared_cv).unsqueeze(-1)
        scale = (grad / squared_mean).mul_(2 / values.shape[-1]).unsqueeze(-1)
        return (values - centre).mul_(scale)


def importance_loss(importance: Tensor, weight: float) -> Tensor:
    """Penalise unequal importance.

    Args:
        importance: (E,) float32 or wider, the sum of each expert's gates over the batch.
        weight: Weight of the loss, w_importance.

    Returns:
        A scalar, `weight * CV(importance)^2`.

    Source: Shazeer et al. 2017, eqs. 6-7.
    """
    return weight * squared_cv(importance)


def load_loss(load: Tensor, weight: float) -> Tensor:
    """Penalise unequal load.

    Args:
        load: (E,) float32 or wider, the smooth estimate of each expert's number of tokens.
        weight: Weight of the loss, w_load.

    Returns:
        A scalar, `weight * CV(load)^2`.

    Source: Shazeer et al. 2017, eq. 11.
    """
    return weight * squared_cv(load)
