"""Offer DeepL's API for translating text (https://developers.deepl.com) to its clients."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from nmt_moe.serving.bodies import check_fields, read_fields
from nmt_moe.serving.errors import RequestError, show
from nmt_moe.serving.models import match, name_of
from nmt_moe.serving.openapi import describe_body
from nmt_moe.serving.service import AUTO, Service, Wish

# DeepL's value for no limit.
UNLIMITED = 1_000_000_000_000
# Fields that no bundle can honour; others, such as `context`, are hints and are ignored.
NOT_OFFERED = ("glossary_id", "glossary_ids", "style_id", "custom_instructions")


class DeepLFields(BaseModel):
    """Fields of `/v2/translate`."""

    text: str | list[str] = Field(
        description="a text or a list of texts", examples=[["A dog runs."]]
    )
    target_lang: str = Field(description="a language code", examples=["DE"])
    source_lang: str | None = Field(default=None, description="a language code")
    tag_handling: str | None = Field(default=None, description="html")
    formality: str = Field(default="default", description="default, prefer_more or prefer_less")
    auth_key: str | None = Field(default=None, description="a string")
    glossary_id: Any = Field(default=None, description="left out")
    glossary_ids: Any = Field(default=None, description="left out")
    style_id: Any = Field(default=None, description="left out")
    custom_instructions: Any = Field(default=None, description="left out")


class LanguagesFields(BaseModel):
    """Fields of `/v2/languages`."""

    type: str = Field(default="source", description="source or target")
    auth_key: str | None = Field(default=None, description="a string")


def make_router(service: Service) -> APIRouter:
    """Return the API's routes."""
    router = APIRouter(tags=["DeepL"])
    max_body = service.settings.max_body

    @router.post("/v2/translate", openapi_extra=describe_body(DeepLFields))
    async def translate(request: Request) -> dict[str, Any]:
        """Translate texts. If a key is required, send `Authorization: DeepL-Auth-Key KEY`."""
        fields = await read_fields(request, DeepLFields, max_body)
        service.check_key(request, fields.auth_key)
        texts = [fields.text] if isinstance(fields.text, str) else fields.text
        service.check_texts("text", texts)
        found = await service.translate(request, texts, _make_wish(service, fields))
        translations = [
            {
                "detected_source_language": one.detection.language.upper(),
                "text": one.answer.text,
                "billed_characters": len(text),
            }
            for text, one in zip(texts, found, strict=True)
        ]
        return {"translations": translations}

    @router.get("/v2/languages")
    async def languages(request: Request) -> list[dict[str, Any]]:
        """List the source languages or, if `type` is target, the target languages."""
        fields = await read_fields(request, LanguagesFields, max_body)
        if request.query_params:
            fields = check_fields(dict(request.query_params), LanguagesFields, strict=False)
        service.check_key(request, fields.auth_key)
        if fields.type not in ("source", "target"):
            raise RequestError(400, f"`type` must be source or target, but is {show(fields.type)}.")
        models = service.models
        is_target = fields.type == "target"
        codes = models.targets if is_target else models.sources
        extra = {"supports_formality": False} if is_target else {}
        return [{"language": code.upper(), "name": name_of(code), **extra} for code in codes]

    @router.get("/v2/usage")
    async def usage(request: Request) -> dict[str, int]:
        """Return how many characters clients have sent for translation since the server started."""
        service.check_key(request, request.query_params.get("auth_key"))
        return {"character_count": service.num_characters, "character_limit": UNLIMITED}

    return router


def _make_wish(service: Service, fields: DeepLFields) -> Wish:
    for name in NOT_OFFERED:
        if getattr(fields, name) is not None:
            raise RequestError(400, f"`{name}` must be left out: this server does not support it.")
    if fields.formality not in ("default", "prefer_more", "prefer_less"):
        raise RequestError(
            400,
            "`formality` must be default, prefer_more or prefer_less, but is "
            f"{show(fields.formality)}: no model here offers a choice.",
        )
    if fields.tag_handling not in (None, "", "html"):
        raise RequestError(
            400, f"`tag_handling` must be html or left out, but is {show(fields.tag_handling)}."
        )
    source = AUTO
    if fields.source_lang:
        source = match("source_lang", fields.source_lang, service.models.sources)
    target = match("target_lang", fields.target_lang, service.models.targets)
    return Wish(source, target, "html" if fields.tag_handling == "html" else "text")
