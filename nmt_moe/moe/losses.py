"""The losses that balance the use of experts."""

import torch
from torch import Tensor


def squared_cv(values: Tensor) -> Tensor:
    """Compute the squared coefficient of variation, variance over squared mean.

    Args:
        values: (E,) non-negative. The variance is the population's (divided by E).

    Returns:
        A scalar; 0 if all values are zero or there is a single expert; NaN if any value is.

    Source: Shazeer et al. 2017, eqs. 7 and 11.
    """
    mean = values.mean()
    variance = (values - mean).square().mean()
    unused = mean == 0
    return torch.where(unused, 0.0, variance / torch.where(unused, 1.0, mean).square())


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
