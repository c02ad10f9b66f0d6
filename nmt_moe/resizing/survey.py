"""Measure how much each expert is used on a text, as a basis for pruning and merging."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nmt_moe.checks import check_choice
from nmt_moe.inference import LanguageModel, LineScore, Routing, Translator, total_score
from nmt_moe.inference.layers import MoE
from nmt_moe.inspection import ExpertUsage, Part, read_text

CRITERIA = ("contribution", "importance", "load")


class ExpertSurvey:
    """The use of one layer's experts on a text.

    Attributes:
        usage: The number of tokens and the sum of gates of each expert.
        contribution: (E,) float64, how much each expert contributed to the layer's output: the sum
            over its tokens of the gate times the norm of the expert's output.
    """

    def __init__(self, layer: MoE) -> None:
        self._layer = layer
        self.usage = ExpertUsage(layer.config.num_experts)
        self.contribution = torch.zeros(layer.config.num_experts, dtype=torch.float64)

    def add(self, routing: Routing) -> None:
        """Add tokens. Their `inputs` must not be None."""
        self.usage.add(routing.expert_ids, routing.gates)
        assert routing.inputs is not None
        for expert in routing.expert_ids.unique().tolist():
            if expert == self.usage.num_experts:  # an empty slot
                continue
            is_chosen = routing.expert_ids == expert
            tokens = is_chosen.any(dim=1)
            gates = (routing.gates * is_chosen).sum(dim=1)[tokens]
            norms = self._layer.expert_outputs(routing.inputs[tokens], [expert])[0].norm(dim=1)
            self.contribution[expert] += (gates * norms).double().sum()

    def values(self, criterion: str) -> Tensor:
        """Return the values that experts are ranked by, (E,) float64."""
        if criterion == "contribution":
            return self.contribution
        return getattr(self.usage, criterion).double()


@dataclass
class Survey:
    """The result of running a model over one text.

    Attributes:
        layers: The use of experts in each MoE layer, by side, "encoder" or "decoder".
        score: Score of the references or, for a language model, of the text; None if there are no
            references.
    """

    layers: dict[str, ExpertSurvey]
    score: LineScore | None = None


@torch.inference_mode()
def survey(model: Translator | LanguageModel, part: Part, *, progress: bool = False) -> Survey:
    """Run a model over a text, and record the use of its experts.

    Args:
        model: The model that reads the text.
        part: The text to read, with or without references.
        progress: Whether to show a progress bar on standard error.

    Raises:
        ValueError: if the model has no experts, or the text cannot be read or has no words.
    """
    if not model.moe_layers:
        raise ValueError("the model has no experts. Name a mixture-of-experts model.")
    found = Survey({side: ExpertSurvey(layer) for side, layer in model.moe_layers.items()})
    scores = []
    for chunk in read_text(
        model, part.text, part.references, part.target_lang, progress=progress, with_inputs=True
    ):
        scores += [one.target for one in chunk]
        for side, layer in found.layers.items():
            layer.add(_join([one.routings[side] for one in chunk]))
    if not scores:
        raise ValueError("the text has no line with words. Name a text in the model's language.")
    if part.references is not None or isinstance(model, LanguageModel):
        found.score = total_score(scores)
    return found


def _join(routings: list[Routing]) -> Routing:
    inputs = [one.inputs for one in routings if one.inputs is not None]
    return Routing(
        torch.cat([one.expert_ids for one in routings]),
        torch.cat([one.gates for one in routings]),
        torch.cat(inputs),
    )


def shares(surveys: Sequence[Survey], criterion: str, is_equal: bool = False) -> dict[str, Tensor]:
    """Return each expert's share of its layer's use on several texts.

    Args:
        surveys: One survey for each text.
        criterion: Measure of use, "contribution", "importance" or "load".
        is_equal: Whether all texts count equally, regardless of their length.

    Returns:
        By side, (E,) float64, the shares, which sum to 1.
    """
    check_choice("criterion", criterion, CRITERIA)
    found = {}
    for side in surveys[0].layers:
        values = torch.stack([one.layers[side].values(criterion) for one in surveys])
        if is_equal:
            values = values / values.sum(dim=1, keepdim=True).clamp_min(1e-30)
        total = values.sum(dim=0)
        found[side] = total / total.sum().clamp_min(1e-30)
    return found
