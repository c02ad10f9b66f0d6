"""Render a report's values as one HTML page.

The page has no scripts and loads nothing from other addresses; its content security policy allows
neither. The template escapes all text.
"""

from __future__ import annotations

import base64
import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from nmt_moe.inspection.report import FORMAT, VERSION
from nmt_moe.inspection.tokens import MARK

MAX_BYTES = 5_000_000
FOLDER = Path(__file__).parent
# Maximum number of bars in a figure of loads; with more experts, the busiest are shown.
MAX_BARS = 256
# Maximum number of pieces on each side of an attention figure.
MAX_ATTENTION = 60
# Smaller attention weights are left blank.
MIN_WEIGHT = 0.03


@dataclass(frozen=True)
class Caps:
    """Limits on the contents of a page, which are reduced until the page is small enough.

    Attributes:
        experts: Number of experts shown for each layer, busiest first.
        contexts: Number of contexts shown for each expert.
        features: Number of features in each list of an expert's over-use.
        sentences: Number of sentences shown piece by piece.
        characters: Maximum number of characters in a line of text; longer lines are cut off.
    """

    experts: int = 48
    contexts: int = 10
    features: int = 8
    sentences: int = 24
    characters: int = 1000

    def halved(self) -> Caps:
        """Return limits that are about half as large."""
        return replace(
            self,
            experts=max(1, self.experts // 2),
            contexts=max(3, self.contexts * 3 // 4),
            features=max(3, self.features * 3 // 4),
            sentences=max(1, self.sentences // 2),
            characters=max(100, self.characters // 2),
        )


def render_page(report: Mapping[str, Any]) -> str:
    """Return a report as a page smaller than 5 MB.

    Args:
        report: The values that `make_report` returned, possibly written as JSON and read again.

    Raises:
        ValueError: if `report` is not a report, has another version, or has too many parts for a
            page.
    """
    if not isinstance(report, Mapping) or report.get("format") != FORMAT:
        raise ValueError(
            f"the values are not a report: `format` is not '{FORMAT}'. Pass the values that "
            "`nmt-moe report --json` wrote."
        )
    if report.get("format_version") != VERSION:
        raise ValueError(
            f"the report has the format version {report.get('format_version')!r}, but this version "
            f"of nmt_moe shows {VERSION}. Create the report again."
        )
    style = (FOLDER / "page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    template = _environment().get_template("page.html.jinja")
    caps = Caps()
    while True:
        page = template.render(
            report=report,
            layers=[_view_layer(layer, caps) for layer in report["layers"]],
            sentences=report["sentences"][: caps.sentences],
            caps=caps,
            style=Markup(style),
            digest=digest,
        )
        if len(page.encode()) < MAX_BYTES:
            return page
        smaller = caps.halved()
        if smaller == caps:
            raise ValueError(
                f"the page cannot be made smaller than {MAX_BYTES} bytes (parts of the report: "
                f"{len(report['parts'])}). Report on fewer texts."
            )
        caps = smaller


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["direction"] = direction
    environment.filters["cut"] = cut
    environment.globals["attention_cells"] = attention_cells
    return environment


def direction(text: str | Sequence[str]) -> str:
    """Return "rtl" if the first letter belongs to a right-to-left script, else "ltr"."""
    for character in MARK.sub("", text if isinstance(text, str) else " ".join(text)):
        kind = unicodedata.bidirectional(character)
        if kind in ("R", "AL"):
            return "rtl"
        if kind == "L":
            return "ltr"
    return "ltr"


def cut(text: str | None, most: int) -> str:
    """Return a text cut to at most `most` characters."""
    text = text or ""
    return text if len(text) <= most else text[:most] + "…"


def attention_cells(attention: Sequence[Sequence[float]]) -> list[tuple[int, int, float]]:
    """Return the row, column and weight of each cell in an attention figure."""
    return [
        (row, column, weight)
        for row, weights in enumerate(attention[:MAX_ATTENTION])
        for column, weight in enumerate(weights[:MAX_ATTENTION])
        if weight >= MIN_WEIGHT
    ]


def _view_layer(layer: Mapping[str, Any], caps: Caps) -> dict[str, Any]:
    """Return a layer's values in the form that the page shows."""
    usage, num_experts = layer["usage"], layer["num_experts"]
    order = sorted(range(num_experts), key=lambda expert: -usage["load"][expert])
    shown = sorted(order[:MAX_BARS]) if num_experts <= MAX_BARS else order[:MAX_BARS]
    total = max(usage["num_tokens"], 1)
    # Each token has K experts, and its gates sum to 1.
    largest = max(max(usage["load"]) / total, layer["top_k"] / num_experts, 1e-9)
    heaviest = max(max(usage["importance"]) / total, 1 / num_experts, 1e-9)
    bars = [
        {
            "expert": expert,
            "load": usage["load"][expert] / total,
            "load_height": 60 * usage["load"][expert] / total / largest,
            "importance": usage["importance"][expert] / total,
            "importance_height": 60 * usage["importance"][expert] / total / heaviest,
        }
        for expert in shown
    ]
    return {
        **layer,
        "bars": bars,
        "bar_width": max(3, min(28, 720 // max(len(bars), 1))),
        "load_chance": 60 * layer["top_k"] / num_experts / largest,
        "importance_chance": 60 / num_experts / heaviest,
        "shown_experts": layer["experts"][: caps.experts],
        "pair_cells": _pair_cells(layer["pair_matrix"]),
        "similarity_cells": _similarity_cells(layer["similarity"]),
    }


def _pair_cells(matrix: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return the cells of pairs, with lift on a scale from -1 (never) to 1 (4 times chance)."""
    if matrix is None:
        return []
    cells = []
    for row, (counts, expected) in enumerate(
        zip(matrix["counts"], matrix["expected"], strict=True)
    ):
        for column, (count, chance) in enumerate(zip(counts, expected, strict=True)):
            if row != column and chance >= 1:
                lift = count / chance
                value = min((lift - 1) / 3, 1) if lift > 1 else lift - 1
                title = f"together: {count}; by chance: {chance:.0f}"
                cells.append({"row": row, "column": column, "value": value, "title": title})
    return cells


def _similarity_cells(similarity: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    if similarity is None:
        return []
    return [
        {"row": row, "column": column, "value": value, "title": f"cosine {value:.3f}"}
        for row, values in enumerate(similarity["cosines"])
        for column, value in enumerate(values)
        if row != column
    ]
