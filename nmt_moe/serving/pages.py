"""Serve the pages for browsers: the web page and the description of the APIs."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import APIRouter, FastAPI
from fastapi.responses import HTMLResponse

from nmt_moe.serving.openapi import render_page


def make_router(app: FastAPI) -> APIRouter:
    """Return the routes of the pages."""
    router = APIRouter(include_in_schema=False)
    page = files("nmt_moe.serving").joinpath("page.html").read_text("utf-8")

    @router.get("/")
    async def index() -> HTMLResponse:
        return _answer(page)

    @router.get("/docs")
    async def docs() -> HTMLResponse:
        return _answer(render_page(app.openapi()))

    return router


def _answer(page: str) -> HTMLResponse:
    return HTMLResponse(page, headers={"Content-Security-Policy": make_policy(page)})


def make_policy(page: str) -> str:
    """Return a content security policy that allows only the page's own script and style.

    The script and the style are identified by their digests. The page loads nothing else, and sends
    requests only to this server.
    """
    parts = {"default-src": "'none'", "connect-src": "'self'", "base-uri": "'none'"}
    parts["img-src"] = "data:"  # the empty icon
    parts |= {"form-action": "'none'", "frame-ancestors": "'none'"}
    for kind in ("script", "style"):
        found = re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        digests = [
            base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in found
        ]
        parts[f"{kind}-src"] = " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    return "; ".join(f"{name} {value}" for name, value in parts.items())
