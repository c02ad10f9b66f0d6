"""Offer our own API, which returns translations with word alignment, attention and experts."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from nmt_moe.serving.bodies import read_fields
from nmt_moe.serving.explanation import explain_line
from nmt_moe.serving.models import match
from nmt_moe.serving.openapi import describe_body
from nmt_moe.serving.service import Answered, Service, Wish


class ExplainedFields(BaseModel):
    """Fields of `/v1/translate`."""

    texts: str | list[str] = Field(
        description="a text or a list of texts", examples=[["A dog runs."]]
    )
    target: str = Field(description="a language code", examples=["de"])
    source: str = Field(default="auto", description="a language code, or auto")
    alternatives: int = Field(default=0, description="a whole number")
    beam: int | None = Field(default=None, description="a whole number")
    length_penalty_alpha: float | None = Field(default=None, description="a number")
    coverage_penalty_beta: float | None = Field(default=None, description="a number")
    experts: bool = Field(default=True, description="true or false")
    api_key: str | None = Field(default=None, description="a string")


def make_router(service: Service) -> APIRouter:
    """Return the API's route."""
    router = APIRouter(tags=["nmt_moe"])
    max_body = service.settings.max_body

    @router.post("/v1/translate", openapi_extra=describe_body(ExplainedFields))
    async def translate(request: Request) -> dict[str, Any]:
        """Translate texts, and explain each translation.

        Each text has `text`, `alternatives`, `source` with `confidence`, `target`, `num_experts` (0
        for a dense model), and `lines`. A line without letters is returned unchanged, and its entry
        in `lines` is null; any other entry has `text`, `score` and `sentences`. Each sentence has
        `pieces` and `source_pieces`; `log_probs` of each piece and of the end mark; `alignment`,
        the index of the source piece that each piece attends to most; `words` and `source_words`,
        each with the index of its `first` piece and the index after its `last`; and `links`, the
        indices of source words and their shares of each word's attention. It also has `experts`
        for each piece and `source_experts` for each source piece, as pairs of expert and gate,
        largest gate first.
        """
        fields = await read_fields(request, ExplainedFields, max_body)
        service.check_key(request, fields.api_key)
        texts = [fields.texts] if isinstance(fields.texts, str) else fields.texts
        service.check_texts("texts", texts)
        wish = Wish(
            service.find_source("source", fields.source),
            match("target", fields.target, service.models.targets),
            alternatives=fields.alternatives,
            beam=fields.beam,
            with_experts=fields.experts,
            length_penalty_alpha=fields.length_penalty_alpha,
            coverage_penalty_beta=fields.coverage_penalty_beta,
        )
        found = await service.translate(request, texts, wish)
        return {"translations": [_describe(one, wish.target) for one in found]}

    return router


def _describe(answered: Answered, target: str) -> dict[str, Any]:
    source, model = answered.detection.language, answered.model
    moe = None if model is None else model.config.network.moe
    lines = [
        None if line is None or model is None else explain_line(line, model, source, target)
        for line in answered.answer.lines
    ]
    return {
        "text": answered.answer.text,
        "alternatives": answered.answer.alternatives,
        "source": source,
        "confidence": answered.detection.confidence,
        "target": target,
        "num_experts": 0 if moe is None else moe.num_experts,
        "lines": lines,
    }
