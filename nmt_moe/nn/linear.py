"""A linear layer without a bias."""

from torch import Tensor, nn

from nmt_moe.kernels import linear


class Linear(nn.Linear):
    """A `torch.nn.Linear` without a bias, faster on some processors (see `kernels.linear`).

    Args:
        in_features: Width of the inputs, I.
        out_features: Width of the outputs, O.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (named as in the base class)
        """Map (..., I) to (..., O)."""
        return linear(input, self.weight)
