"""Compare results with those of reference definitions, and list the comparisons in a table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks import timing

# The largest difference, relative to the largest value, that one or two final roundings can cause.
ROUNDING = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 1.6e-2}


class WrongResultError(RuntimeError):
    """A difference between the results of a kernel and its definition."""


@dataclass
class Report:
    """The comparisons made so far; the first failure ends the check.

    Attributes:
        rows: Rows of the table, each with a description, a figure, its limit and a verdict.
    """

    rows: list[list[str]] = field(default_factory=list)

    def compare(self, what: str, found: Tensor, expected: Tensor, limit: float) -> None:
        """Check that the largest difference, relative to the largest value, is within a limit."""
        found, expected = found.detach().double(), expected.detach().double()
        error = 0.0
        if expected.numel():
            largest = expected.abs().max().clamp_min(1e-30)
            error = ((found - expected).abs().max() / largest).item()
        self.claim(what, error <= limit, f"{error:.1e}", f"{limit:.0e}")

    def claim(self, what: str, holds: bool, figure: str = "", limit: str = "") -> None:
        """Record whether a claim holds, and raise an error if it does not."""
        self.rows.append([what, figure, limit, "right" if holds else "WRONG"])
        if not holds:
            figures = f": {figure}, but the limit is {limit}" if limit else ""
            raise WrongResultError(f"{what}: wrong{figures}")

    def table(self) -> str:
        """Lay out all rows."""
        return timing.markdown_table(["checked", "difference", "limit", "verdict"], self.rows)


def differentiate(
    report: Report,
    name: str,
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    leaves: Sequence[Tensor],
) -> None:
    """Compare a kernel's results and gradients with its definition's, computed in float64."""
    wide = [tensor.detach().double().requires_grad_() for tensor in leaves]
    found, expected = ours(*leaves), theirs(*wide)
    limit = ROUNDING[leaves[0].dtype]
    report.compare(name, found, expected, limit)
    grad = torch.randn_like(found)
    mine = torch.autograd.grad(found, leaves, grad)
    wanted = torch.autograd.grad(expected, wide, grad.double())
    for index, (one, other) in enumerate(zip(mine, wanted, strict=True)):
        report.compare(f"{name}, gradient {index + 1}", one, other, limit)
