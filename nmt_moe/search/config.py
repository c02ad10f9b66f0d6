"""GNMT's additions to a beam search."""

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class SearchConfig:
    """The three options of GNMT's search; 0 turns each off.

    Attributes:
        length_penalty_alpha: Strength of the length normalisation (GNMT: 0.2).
        coverage_penalty_beta: Weight of the coverage penalty (GNMT: 0.2).
        beam_prune: GNMT's beamsize, in nats (GNMT: 3.0).

    Raises:
        ValueError: if one is negative, infinite or NaN.

    Source: Wu et al. 2016, section 7.
    """

    length_penalty_alpha: float = 0.0
    coverage_penalty_beta: float = 0.0
    beam_prune: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0.0 <= value < math.inf:
                option = "--" + field.name.replace("_", "-")
                raise ValueError(
                    f"`{option}` must be a finite number of at least 0, but is {value}. "
                    "0 turns it off."
                )

    @property
    def changes_scores(self) -> bool:
        """Return whether finished hypotheses get GNMT's score."""
        return self.length_penalty_alpha > 0 or self.coverage_penalty_beta > 0

    @property
    def is_on(self) -> bool:
        """Return whether anything differs from a plain beam search."""
        return self.changes_scores or self.beam_prune > 0
