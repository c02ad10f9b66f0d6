"""Offer LibreTranslate's API (https://docs.libretranslate.com), except files and suggestions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from nmt_moe.serving.bodies import read_fields
from nmt_moe.serving.errors import RequestError, show
from nmt_moe.serving.models import match, name_of
from nmt_moe.serving.openapi import describe_body
from nmt_moe.serving.service import AUTO, Service, Wish

KEY = Field(default=None, description="a string")


class TranslateFields(BaseModel):
    """Fields of `/translate`."""

    q: str | list[str] = Field(description="a text or a list of texts", examples=["A dog runs."])
    source: str = Field(description="a language code, or auto", examples=["en"])
    target: str = Field(description="a language code", examples=["de"])
    format: str = Field(default="text", description="text or html")
    alternatives: int = Field(default=0, description="a whole number")
    api_key: str | None = KEY


class DetectFields(BaseModel):
    """Fields of `/detect`."""

    q: str | list[str] = Field(description="a text or a list of texts", examples=["A dog runs."])
    api_key: str | None = KEY


def make_router(service: Service) -> APIRouter:
    """Return the API's routes."""
    router = APIRouter(tags=["LibreTranslate"])
    max_body = service.settings.max_body

    @router.post("/translate", openapi_extra=describe_body(TranslateFields))
    async def translate(request: Request) -> dict[str, Any]:
        """Translate one or more texts; if `source` is auto, also return the detected language."""
        fields = await read_fields(request, TranslateFields, max_body)
        service.check_key(request, fields.api_key)
        is_one = isinstance(fields.q, str)
        texts = [fields.q] if isinstance(fields.q, str) else fields.q
        service.check_texts("q", texts)
        wish = make_wish(service, fields)
        found = await service.translate(request, texts, wish)
        answer: dict[str, list[Any]] = {"translatedText": [one.answer.text for one in found]}
        if fields.alternatives:
            answer["alternatives"] = [one.answer.alternatives for one in found]
        if wish.source == AUTO:
            answer["detectedLanguage"] = [vars(one.detection) for one in found]
        return {name: values[0] for name, values in answer.items()} if is_one else dict(answer)

    @router.post("/detect", openapi_extra=describe_body(DetectFields))
    async def detect(request: Request) -> list[dict[str, Any]]:
        """Detect which of the server's languages a text is in. The most likely comes first."""
        fields = await read_fields(request, DetectFields, max_body)
        service.check_key(request, fields.api_key)
        texts = [fields.q] if isinstance(fields.q, str) else fields.q
        service.check_texts("q", texts)
        return [vars(one) for one in await service.detect("\n".join(texts))]

    @router.get("/languages")
    async def languages() -> list[dict[str, Any]]:
        """List the source languages, each with its target languages."""
        models = service.models
        return [
            {"code": code, "name": name_of(code), "targets": models.targets_of(code)}
            for code in models.sources
        ]

    @router.get("/frontend/settings")
    async def settings() -> dict[str, Any]:
        """Return the limits and defaults that a web page needs."""
        models = service.models
        source = models.sources[0]
        chosen = {"source": source, "target": models.targets_of(source)[0]}
        return {
            "apiKeys": bool(service.keys),
            "keyRequired": bool(service.keys),
            "suggestions": False,
            "filesTranslation": False,
            "supportedFilesFormat": [],
            "charLimit": service.settings.max_characters,
            "frontendTimeout": 500,
            "language": {
                side: {"code": code, "name": name_of(code)} for side, code in chosen.items()
            },
        }

    return router


def make_wish(service: Service, fields: TranslateFields) -> Wish:
    """Return a request's options, after checking languages and format.

    Raises:
        RequestError: if a field is wrong; the message names it.
    """
    if fields.format not in ("text", "html"):
        raise RequestError(400, f"`format` must be text or html, but is {show(fields.format)}.")
    return Wish(
        service.find_source("source", fields.source),
        match("target", fields.target, service.models.targets),
        "html" if fields.format == "html" else "text",
        fields.alternatives,
    )
