"""The options that GNMT adds to a beam search."""

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class SearchConfig:
    """The three options of GNMT's search. The value 0 turns an option off.

    Attributes:
        length_penalty_alpha: Exponent of the length penalty (0.2 in GNMT).
        coverage_penalty_beta: Weight of the coverage penalty (0.2 in GNMT).
        beam_prune: Margin for pruning, in nats (3.0 in GNMT, which calls it beamsize).

    Raises:
        ValueError: if a value is negative, infinite or NaN.

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
                    "To turn it off, set it to 0."
                )

    @property
    def changes_scores(self) -> bool:
        """Return whether finished hypotheses get GNMT's score."""
        return self.length_penalty_alpha > 0 or self.coverage_penalty_beta > 0

    @property
    def is_on(self) -> bool:
        """Return whether any option is on, so that the search is not a plain beam search."""
        return self.changes_scores or self.beam_prune > 0
