"""Detect a text's language offline, with py3langid."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from nmt_moe.serving.errors import RequestError


@dataclass(frozen=True)
class Detection:
    """A language that a text may be in, with its probability.

    Attributes:
        language: A source language of the server.
        confidence: Probability in percent among all languages that the detector knows, not only
            those of the server; 0 for text without letters and for languages unknown to the
            detector.
    """

    language: str
    confidence: float


class Detector:
    """A detector that distinguishes the languages of a server.

    Args:
        languages: The server's source languages.
    """

    def __init__(self, languages: Sequence[str]) -> None:
        self.languages = list(languages)
        self._lock = threading.Lock()

    @cached_property
    def _identifier(self) -> LanguageIdentifier:
        return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

    def detect(self, text: str) -> list[Detection]:
        """Return the server's languages, most likely first.

        The first call takes a second or two, because it loads the detector's table.

        Raises:
            RequestError: if there are several languages and the detector does not know them all.
        """
        with self._lock:  # the first call loads the table
            identifier = self._identifier
        known = set(identifier.labels)
        codes = {name: name.replace("_", "-").lower().split("-")[0] for name in self.languages}
        unknown = [name for name, code in codes.items() if code not in known]
        if unknown and len(self.languages) > 1:
            raise RequestError(
                400,
                f"`source` cannot be detected here: the detector does not know {unknown[0]}. Name "
                f"one of {', '.join(self.languages)}.",
            )
        shares = dict(identifier.rank(text)) if any(map(str.isalpha, text)) else {}
        found = [
            Detection(name, round(100 * float(shares.get(code, 0.0)), 1))
            for name, code in codes.items()
        ]
        return sorted(found, key=lambda one: -one.confidence)
