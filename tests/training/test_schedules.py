"""Learning rates, worked out by hand."""

import pytest

from nmt_moe.training import warmup_hold_inverse_sqrt


@pytest.mark.parametrize(
    ("update", "rate"),
    [(0, 0.1), (5, 0.55), (10, 1.0), (30, 1.0), (50, 1.0), (200, 0.5), (5000, 0.1)],
)
def test_rate_climbs_holds_and_falls(update, rate):
    # The rate rises from 0.1 to 1 in 10 updates, is constant for 40, and is then sqrt(50 / update).
    assert warmup_hold_inverse_sqrt(update, 1.0, 10, 40, start=0.1) == pytest.approx(rate)


def test_without_warmup_or_hold_the_rate_falls_from_the_first_update():
    rates = [warmup_hold_inverse_sqrt(update, 2.0, 0, 0) for update in (0, 1, 4)]
    assert rates == [2.0, 2.0, 1.0]
