"""The choice of the experts that share a batched product, and the positions of their rows."""

import pytest
import torch

from nmt_moe.kernels import RowPlan
from nmt_moe.kernels._batches import MOST_ROWS, SPARE_ROWS, plan_batches, plan_padding


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([], []),
        ([0, 0], []),
        ([3, 5, 4], [(0, 3, 5)]),
        ([3, 5, 4, 4, 9], [(0, 4, 5), (4, 5, 9)]),  # at most four experts
        ([3, 0, 4], [(0, 1, 3), (2, 3, 4)]),  # an expert without rows gets no batch
        ([2, 40, 40, 3], [(0, 1, 2), (1, 3, 40), (3, 4, 3)]),
        ([300, 300], [(0, 1, 300), (1, 2, 300)]),  # too many rows for the cache
    ],
)
def test_batches(counts, expected):
    batches = plan_batches(counts, 4)
    assert [(b.experts.start, b.experts.stop, b.height) for b in batches] == expected
    # The last two cases depend on these limits.
    assert MOST_ROWS < 600
    assert 2 * SPARE_ROWS < 38


def test_every_row_keeps_its_token_and_padding_repeats_its_expert():
    counts = [2, 5, 0, 1, 3, 30]
    offsets = torch.tensor([0, *counts]).cumsum(0)
    row_token = torch.arange(sum(counts)) + 100  # a different token in each row
    token_rows = torch.cat([torch.arange(sum(counts)), torch.tensor([sum(counts)])]).view(-1, 1)
    plan = plan_padding(RowPlan(row_token, token_rows, offsets))
    assert plan.most_rows == 30
    # The experts with 2 and 5 rows get five rows each, and those with 1 and 3 get three each.
    expected = [100, 101, 101, 101, 101, 102, 103, 104, 105, 106]
    expected += [107, 107, 107, 108, 109, 110, *range(111, 141)]
    assert plan.row_token.tolist() == expected
    assert torch.equal(plan.row_token[plan.token_rows[:-1, 0]], row_token)
    assert plan.token_rows[-1, 0] == len(plan.row_token)  # an empty slot stays empty
