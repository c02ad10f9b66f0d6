"""Collect the results for one MoE layer while a model reads texts."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from nmt_moe.inference import LanguageModel, Routing, Translator
from nmt_moe.inspection.contexts import TopContexts
from nmt_moe.inspection.overuse import FeatureCounts, find_overuse
from nmt_moe.inspection.pairs import compare_pairs, expected_pairs, load_overlap
from nmt_moe.inspection.reading import Reading
from nmt_moe.inspection.tokens import classes_of, context_of, frequency_band
from nmt_moe.inspection.usage import ExpertUsage
from nmt_moe.moe import output_similarity, routing_saturation

# Contexts and over-use are in the JSON output for at most this many experts, the busiest ones.
MAX_DETAILED = 2048
# Matrices (pairs, similarity of outputs) contain at most this many experts, the busiest ones.
MAX_MATRIX = 32
NUM_CONTEXTS, NUM_FEATURES, NUM_PAIRS = 10, 10, 12
# Number of tokens used to measure the similarity of outputs.
NUM_SAMPLES = 256


class LayerReport:
    """The use of one MoE layer over several parts of a text.

    Args:
        side: Side of the network, "encoder" or "decoder".
        moe: The layer.
        parts: Names of the parts.
        has_pieces: Whether tokens are sentencepiece pieces.
    """

    def __init__(self, side: str, moe: Any, parts: Sequence[str], has_pieces: bool) -> None:
        self.side, self.moe, self.parts, self.has_pieces = side, moe, parts, has_pieces
        num_experts = moe.config.num_experts
        self.usages = [ExpertUsage(num_experts) for _ in parts]
        self.contexts = TopContexts(num_experts, NUM_CONTEXTS)
        self.pieces, self.classes = FeatureCounts(num_experts), FeatureCounts(num_experts)
        # The decoder's layer reads the piece before the predicted piece.
        self.read = FeatureCounts(num_experts) if side == "decoder" else None
        self._samples: list[Tensor] = []
        self._num_kept = self._num_pairs = self._num_changed = self._num_compared = 0.0

    def add(self, part: int, readings: Sequence[Reading]) -> None:
        """Add sentences of a part, with routing that includes the layer's inputs."""
        if not readings:
            return
        routings = [one.routings[self.side] for one in readings]
        expert_ids = torch.cat([one.expert_ids for one in routings])
        gates = torch.cat([one.gates for one in routings])
        self.usages[part].add(expert_ids, gates)
        sentences = [self._tokens(one) for one in readings]
        ends = list(accumulate(map(len, sentences)))

        def describe(token: int) -> dict[str, Any]:
            number = bisect_right(ends, token)
            index = token - ends[number] + len(sentences[number])
            context = context_of(sentences[number], index, self.has_pieces)
            row = {"context": context, "line": readings[number].line + 1}
            return row if len(self.parts) == 1 else {**row, "part": self.parts[part]}

        self.contexts.add(expert_ids, gates, describe)
        self.pieces.add([[token] for own in sentences for token in own], expert_ids)
        classes = [row for own in sentences for row in classes_of(own, self.has_pieces)]
        self.classes.add(classes, expert_ids)
        if self.read is not None:
            read = [[token] for own in sentences for token in ["</s>", *own[:-1]]]
            self.read.add(read, expert_ids)
        self._sample(routings)

    def _tokens(self, reading: Reading) -> list[str]:
        if self.side == "encoder":
            return reading.source_tokens
        return [*reading.target.pieces, "</s>"]

    def _sample(self, routings: Sequence[Routing]) -> None:
        inputs = [one.inputs for one in routings if one.inputs is not None]
        if inputs:
            self._samples.append(_thin_out(torch.cat(inputs), NUM_SAMPLES).clone())

    def compare(self, before: Sequence[Routing], after: Sequence[Routing]) -> None:
        """Add the routing of the same tokens in another checkpoint (`before`) and in this one."""
        num_experts = self.moe.config.num_experts
        ids = [torch.cat([one.expert_ids for one in own]) for own in (before, after)]
        pairs = float((ids[1] < num_experts).sum())
        self._num_kept += float(routing_saturation(ids[0], ids[1], num_experts)) * pairs
        self._num_pairs += pairs
        if ids[0].shape == ids[1].shape:
            first, second = (one.sort(dim=1).values for one in ids)
            self._num_changed += float((first != second).any(dim=1).sum())
        self._num_compared += len(ids[1])

    def to_dict(self) -> dict[str, Any]:
        """Return all results as plain values."""
        config = self.moe.config
        total = ExpertUsage(config.num_experts)
        for usage in self.usages:
            total += usage
        busiest = total.load.argsort(descending=True, stable=True).tolist()
        used = [expert for expert in busiest if total.load[expert] > 0]
        content: dict[str, Any] = {
            "layer": self.side,
            "num_experts": config.num_experts,
            "top_k": config.top_k,
            "gate": config.gate,
            "num_groups": config.num_groups,
            "usage": total.to_dict(),
            "parts": [
                {"part": name, **usage.to_dict()}
                for name, usage in zip(self.parts, self.usages, strict=True)
            ],
            "overlap": self._overlap(),
            "experts": self._describe_experts(total, used[:MAX_DETAILED]),
            "num_comparisons": self._num_comparisons(total),
            "pairs": compare_pairs(total, NUM_PAIRS),
            "pair_matrix": _pair_matrix(total, sorted(used[:MAX_MATRIX])),
            "similarity": self._similarity(sorted(used[:MAX_MATRIX])),
        }
        if self._num_compared:
            content["saturation"] = {
                "kept": self._num_kept / max(self._num_pairs, 1.0),
                "changed_tokens": self._num_changed / self._num_compared,
                "tokens": int(self._num_compared),
                "chance": config.top_k / config.num_experts,
            }
        return content

    def _features(self) -> dict[str, FeatureCounts]:
        features = {"pieces": self.pieces, "classes": self.classes}
        features["frequency"] = self.pieces.grouped(frequency_band)
        if self.read is not None:
            features["read"] = self.read
        return features

    def _num_comparisons(self, total: ExpertUsage) -> int:
        used = int((total.load >= 1).sum())
        return used * sum(counts.num_features for counts in self._features().values())

    def _describe_experts(self, total: ExpertUsage, experts: Iterable[int]) -> list[dict[str, Any]]:
        load, num_comparisons = total.load.tolist(), self._num_comparisons(total)
        found = {
            name: find_overuse(counts, load, total.num_tokens, num_comparisons, NUM_FEATURES)
            for name, counts in self._features().items()
        }
        return [
            {
                "expert": expert,
                "load": load[expert],
                "importance": float(total.importance[expert]),
                "contexts": self.contexts.of(expert),
                "overuse": {name: rows.get(expert, []) for name, rows in found.items()},
            }
            for expert in experts
        ]

    def _overlap(self) -> list[dict[str, Any]]:
        numbers = range(len(self.parts))
        return [
            {
                "parts": [self.parts[one], self.parts[other]],
                "overlap": load_overlap(self.usages[one], self.usages[other]),
            }
            for one in numbers
            for other in numbers[one + 1 :]
        ]

    @torch.inference_mode()
    def _similarity(self, experts: list[int]) -> dict[str, Any] | None:
        """Return the mean cosine of each pair of experts' outputs for the same tokens.

        `mean` is the mean over all tokens and all pairs of different experts.
        """
        if len(experts) < 2 or not self._samples:
            return None
        x = _thin_out(torch.cat(self._samples), NUM_SAMPLES)
        outputs = self.moe.expert_outputs(x, experts)
        unit = torch.nn.functional.normalize(outputs, dim=2)
        # A vector of zeros has no direction, so tokens for which an output is zero are left out.
        is_used = outputs.any(dim=2).to(unit.dtype)
        cosines = torch.einsum("end,fnd->ef", unit, unit) / (is_used @ is_used.t()).clamp_min(1)
        return {
            "experts": experts,
            "num_tokens": len(x),
            "mean": float(output_similarity(outputs)),
            "cosines": _rounded(cosines),
        }


def make_layers(model: Translator | LanguageModel, parts: Sequence[str]) -> dict[str, LayerReport]:
    """Return an empty report for each MoE layer."""
    has_pieces = model.config.has_pieces
    return {
        side: LayerReport(side, moe, parts, has_pieces) for side, moe in model.moe_layers.items()
    }


def _pair_matrix(usage: ExpertUsage, experts: list[int]) -> dict[str, Any] | None:
    if usage.coactivation is None or not usage.coactivation.any():
        return None
    rows = torch.tensor(experts)
    expected = expected_pairs(usage.coactivation)[rows][:, rows]
    return {
        "experts": experts,
        "counts": usage.coactivation[rows][:, rows].tolist(),
        "expected": _rounded(expected, 1),
    }


def _thin_out(rows: Tensor, most: int) -> Tensor:
    """Return at most `most` rows, evenly spaced."""
    if len(rows) <= most:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, most).long()]


def _rounded(matrix: Tensor, digits: int = 3) -> list[list[float]]:
    return [[round(value, digits) for value in row] for row in matrix.tolist()]
