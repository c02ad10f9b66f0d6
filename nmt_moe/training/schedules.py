"""Compute learning rates from the number of updates."""


def warmup_hold_inverse_sqrt(
    update: int, peak: float, warmup_updates: int, hold_updates: int, start: float = 0.0
) -> float:
    """Return a learning rate that rises linearly, stays constant, and falls as 1 / sqrt(update).

    Args:
        update: Number of updates done so far.
        peak: Learning rate after the warm-up.
        warmup_updates: Number of updates from `start` to `peak`.
        hold_updates: Number of updates at `peak` after the warm-up.
        start: Learning rate at update 0, if there is a warm-up.

    Returns:
        The learning rate of the next update.

    Source: Shazeer et al. 2017, Appendix E (2000 updates of warm-up, then 8000 at the peak).
    """
    if update < warmup_updates:
        return start + (peak - start) * update / warmup_updates
    turn = max(warmup_updates + hold_updates, 1)
    return peak * (turn / max(update, turn)) ** 0.5
