"""Build the server as an ASGI application."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nmt_moe import __version__
from nmt_moe.serving import deepl, explained, libretranslate, pages
from nmt_moe.serving.errors import BusyError, ClientGoneError, RequestError
from nmt_moe.serving.observing import LOGGER
from nmt_moe.serving.service import Service

logger = logging.getLogger(LOGGER)

# nginx's status for a client that closed its connection.
CLIENT_GONE = 499
# Time limits, in seconds, for discarding the rest of a refused body and for awaiting its next part.
LINGER_SECONDS, LINGER_PAUSE = 30.0, 2.0


def make_app(service: Service) -> FastAPI:
    """Return the application of a service. It starts and stops the service's thread."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.batcher.start()
        yield
        await asyncio.to_thread(service.batcher.close)

    app = FastAPI(
        title="nmt_moe",
        version=__version__,
        description="Translation with mixture-of-experts models.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    for kind, handler in HANDLERS.items():
        app.add_exception_handler(kind, handler)
    for api in (libretranslate, deepl, explained):
        app.include_router(api.make_router(service))

    app.include_router(pages.make_router(app))

    @app.get("/health", tags=["Monitoring"])
    async def health(request: Request) -> dict[str, str]:
        """Check that every model can translate a token."""
        async for _ in request.stream():
            pass
        await service.probe(request)
        return {"status": "ok"}

    @app.get("/metrics", tags=["Monitoring"])
    async def metrics() -> Response:
        """Return counts and times in Prometheus' format."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    app.add_middleware(Front, service=service)
    if service.settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.settings.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return app


def _refused(error: RequestError) -> JSONResponse:
    return JSONResponse(
        {"error": error.message, "message": error.message}, error.status, error.headers
    )


async def _handle_refusal(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return _refused(error)


async def _handle_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {
        404: "Nothing exists at this path. See /docs.",
        405: f"{request.method} is not allowed here. See /docs.",
    }
    message = messages.get(error.status_code, str(error.detail))
    return _refused(RequestError(error.status_code, message, dict(error.headers or {})))


async def _handle_gone(_: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


HANDLERS: dict[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
    RequestError: _handle_refusal,
    HTTPException: _handle_http,
    ClientGoneError: _handle_gone,
}


class Front:
    """The outermost layer, which admits, logs and counts requests, and answers failed requests.

    Args:
        app: The application.
        service: The service with the limits and metrics.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.monotonic()
        scope.setdefault("state", {})["started"] = started
        status, has_more = 0, scope["method"] == "POST"

        async def receive_noted() -> Message:
            nonlocal has_more
            message = await receive()
            has_more = message["type"] == "http.request" and message.get("more_body", False)
            return message

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *SAFE_HEADERS]
            elif has_more and not message.get("more_body", False):
                # Closing now would reset the connection, and the client might lose the response.
                await send({**message, "more_body": True})
                message = {"type": "http.response.body", "body": b""}
                with suppress(TimeoutError):
                    async with asyncio.timeout(LINGER_SECONDS):
                        while has_more:
                            await asyncio.wait_for(receive_noted(), LINGER_PAUSE)
            await send(message)

        waits = scope["method"] == "POST"
        self.service.num_open += waits
        try:
            if waits and self.service.num_open > self.service.settings.max_waiting:
                error = BusyError("Too many requests are waiting. Try again later.")
                await _refused(error)(scope, receive_noted, send_noted)
            else:
                await self.app(scope, receive_noted, send_noted)
        except Exception:
            logger.exception("failed")
            if not status:
                failed = RequestError(500, "The server failed. See its log.")
                await _refused(failed)(scope, receive_noted, send_noted)
        finally:
            self.service.num_open -= waits
            self._note(scope, status, time.monotonic() - started)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        path = getattr(scope.get("route"), "path", "other")
        self.service.metrics.observe_request(path, status, seconds)
        fields = {
            "method": scope["method"] if scope["method"] in ("GET", "POST") else "other",
            "path": path,
            "status": status,
            "ms": round(1000 * seconds, 1),
        }
        logger.info("request", extra={"fields": fields})


SAFE_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]
