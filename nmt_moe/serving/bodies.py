"""Read request bodies (JSON and forms) within limits, and check their fields."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any, NoReturn, TypeVar
from urllib.parse import parse_qs

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.formparsers import MultiPartException, MultiPartParser

from nmt_moe.serving.errors import ClientGoneError, RequestError, show
from nmt_moe.serving.settings import BODY_SECONDS

MAX_FIELDS = 1000
JSON, FORM, MULTIPART = (
    "application/json",
    "application/x-www-form-urlencoded",
    "multipart/form-data",
)

Fields = TypeVar("Fields", bound=BaseModel)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Read a body.

    Raises:
        RequestError: if the body arrives too slowly or has more than `max_bytes` bytes.
        ClientGoneError: if it was not sent completely.
    """
    too_large = RequestError(
        413, f"The body must have at most {max_bytes} bytes. Send less at a time."
    )
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                body += message.get("body", b"")
                if len(body) > max_bytes:
                    raise too_large
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise RequestError(
            408, f"The body was incomplete after {BODY_SECONDS:g} seconds. Send it again."
        ) from None


async def read_fields(request: Request, model: type[Fields], max_bytes: int) -> Fields:
    """Read and check the fields of a body.

    Args:
        request: The request; its body is JSON, a form, or empty, which means no fields.
        model: Class of the fields; each has a description that completes "it must be".
        max_bytes: Limit for the body.

    Raises:
        RequestError: if the body is malformed, or a field is missing or wrong; the message names
            the first such field.
        ClientGoneError: if it was not sent completely.
    """
    body = await read_body(request, max_bytes)
    kind = request.headers.get("content-type", JSON).partition(";")[0].strip().lower()
    if kind == JSON:
        content = _parse_json(body) if body else {}
    elif kind == FORM:
        content = _parse_form(body)
    elif kind == MULTIPART:
        content = await _parse_multipart(request, body)
    else:
        raise RequestError(
            415, f"The content type must be {JSON}, {FORM} or {MULTIPART}, but is {show(kind)}."
        )
    return check_fields(content, model, strict=kind == JSON)


def check_fields(content: dict[str, Any], model: type[Fields], strict: bool) -> Fields:
    """Check the values of fields.

    Raises:
        RequestError: if a field is missing or wrong; the message names the first such field.
    """
    try:
        return model.model_validate(content, strict=strict)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        what = model.model_fields[name].description
        found = f"but is {show(content[name])}" if name in content else "but is missing"
        raise RequestError(400, f"`{name}` must be {what}, {found}.") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _parse_json(body: bytes) -> dict[str, Any]:
    try:
        content = json.loads(body, parse_constant=_refuse_constant)
    except RecursionError:
        raise RequestError(400, "The body is nested too deeply.") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise RequestError(400, f"The body is not JSON: {error.msg}, {where}.") from None
    except UnicodeDecodeError:
        raise RequestError(400, "The body is not JSON: it is not UTF-8.") from None
    except ValueError:  # a constant such as NaN, or a number of thousands of digits
        raise RequestError(400, "The body is not JSON: it has an invalid number.") from None
    if not isinstance(content, dict):
        raise RequestError(400, f"The body must be a JSON object, but is {show(content)}.")
    return content


def _parse_form(body: bytes) -> dict[str, Any]:
    try:
        found = parse_qs(
            body.decode("utf-8"), keep_blank_values=True, max_num_fields=MAX_FIELDS, errors="strict"
        )
    except UnicodeDecodeError:
        raise RequestError(400, "The form is not UTF-8.") from None
    except ValueError:
        raise RequestError(400, f"The form has more than {MAX_FIELDS} fields.") from None
    return {name: values if len(values) > 1 else values[0] for name, values in found.items()}


async def _parse_multipart(request: Request, body: bytes) -> dict[str, Any]:
    async def chunks() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        parser = MultiPartParser(
            request.headers, chunks(), max_files=0, max_fields=MAX_FIELDS, max_part_size=len(body)
        )
        form = await parser.parse()
    except MultiPartException as error:
        raise RequestError(400, f"The form is malformed: {error.message}") from None
    except (KeyError, UnicodeDecodeError, LookupError):
        raise RequestError(400, "The form is malformed.") from None
    names = dict.fromkeys(form.keys())
    values = {name: [str(one) for one in form.getlist(name)] for name in names}
    return {name: own if len(own) > 1 else own[0] for name, own in values.items()}
