"""Split texts into lines to translate, and join the translations.

Lines without letters (blank lines, numbers, emoji) are returned unchanged. They contain nothing to
translate, and a model would invent a translation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from nmt_moe.inference import Translation


@dataclass(frozen=True)
class Answer:
    """The translation of a text.

    Attributes:
        text: The best translation.
        alternatives: Other translations, best first, without duplicates.
        lines: The translation of each line; None for a line that was left unchanged.
    """

    text: str
    alternatives: list[str]
    lines: list[Translation | None] = field(default_factory=list)


class SplitText:
    """A text split into lines.

    Args:
        text: Any text.
        is_foreign: Whether the text needs translation at all.

    Attributes:
        lines: All lines.
        wanted: The lines to translate, in order.
    """

    def __init__(self, text: str, is_foreign: bool = True) -> None:
        self.lines = [line.removesuffix("\r") for line in text.split("\n")]
        self._is_wanted = [is_foreign and any(map(str.isalpha, line)) for line in self.lines]
        self.wanted = [
            line for line, wanted in zip(self.lines, self._is_wanted, strict=True) if wanted
        ]

    def join(self, translated: Sequence[Translation], num_alternatives: int = 0) -> Answer:
        """Return the answer. Its n-th alternative joins the n-th best translation of each line."""
        left = iter(translated)
        of_lines = [next(left) if wanted else None for wanted in self._is_wanted]
        num_ranks = min([len(one.hypotheses) for one in translated], default=1)
        texts = [
            "\n".join(
                line if one is None else one.hypotheses[rank]
                for line, one in zip(self.lines, of_lines, strict=True)
            )
            for rank in range(num_ranks)
        ]
        best, *others = dict.fromkeys(texts)  # without duplicates, in order
        return Answer(best, others[:num_alternatives], of_lines)
