"""Texts to lines that are translated, and back.

Lines without a letter (blank ones, numbers, emoji) are answered as they are: there is nothing to
translate, and a model would invent something.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from nmt_moe.inference import Translation


@dataclass(frozen=True)
class Answer:
    """The translation of a text.

    Attributes:
        text: The best.
        alternatives: Others, best first, each once.
        lines: The translation of each line; None of one that was left as it is.
    """

    text: str
    alternatives: list[str]
    lines: list[Translation | None] = field(default_factory=list)


class SplitText:
    """A text's lines.

    Args:
        text: Any.
        is_foreign: Whether it is to be translated at all.

    Attributes:
        lines: All of them.
        wanted: Those that are translated, in their order.
    """

    def __init__(self, text: str, is_foreign: bool = True) -> None:
        self.lines = [line.removesuffix("\r") for line in text.split("\n")]
        self._is_wanted = [is_foreign and any(map(str.isalpha, line)) for line in self.lines]
        self.wanted = [
            line for line, wanted in zip(self.lines, self._is_wanted, strict=True) if wanted
        ]

    def join(self, translated: Sequence[Translation], num_alternatives: int = 0) -> Answer:
        """Return the answer, of which the n-th alternative joins the n-th best of each line."""
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
        best, *others = dict.fromkeys(texts)  # each once, in order
        return Answer(best, others[:num_alternatives], of_lines)
