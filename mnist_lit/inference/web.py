"""Web application: a page to draw digits on and the JSON API behind it.

Each prediction request carries one image. Its body is read under a size and a time limit, and the prediction runs in a
thread. While ``MAX_CONCURRENT`` predictions are in progress, further requests get 503. Every error is JSON.
"""

import asyncio
import io
import json
import os
from typing import Any

import anyio
import numpy as np
import torch
from anyio.to_thread import run_sync
from PIL import Image
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mnist_lit import __version__
from mnist_lit.inference.digit import to_mnist
from mnist_lit.inference.images import read_grey
from mnist_lit.inference.ink import SIDE, ImageError
from mnist_lit.inference.trained import TrainedModel

MAX_BYTES = 2**20  # of a request body
MAX_DISCARDED = 16 * MAX_BYTES  # a larger body is read up to here, so that the client gets to read the error
MAX_SECONDS = 5.0  # for a body to arrive
MAX_PIXELS = 1024 * 1024  # of an image, checked before it is decoded
MAX_CONCURRENT = 64  # predictions in progress: at most 64 MiB of bodies and a wait of a tenth of a second

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
    "Accept-Ranges": "none",
}


def application(model: TrainedModel, hosts: tuple[str, ...] = ()) -> ASGIApp:
    """An ASGI application that serves the page at ``/``, ``/predict`` (POST) and ``/health``.

    Args:
        hosts: Accepted values of the Host header; empty accepts any. Restrict it for a local server: otherwise a
            malicious web page could reach the server through DNS rebinding.
    """
    errors: dict[Any, Any] = {HTTPException: _error, Exception: _error}
    routes = [
        Route("/predict", _Predictor(model).predict, methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
        Route("/health", _health),
        Mount("/", StaticFiles(packages=[("mnist_lit.inference", "page")], html=True)),
    ]
    return _Guard(Starlette(routes=routes, exception_handlers=errors), hosts)


class _Predictor:
    def __init__(self, model: TrainedModel) -> None:
        self.model, self.names, self.in_progress = model, model.names, 0
        self.threads = anyio.CapacityLimiter(os.cpu_count() or 1)
        for format in ("PNG", "JPEG"):  # warm up: the first predictions are slower
            file = io.BytesIO()
            Image.fromarray(np.eye(2 * SIDE, dtype=np.uint8) * 255).save(file, format)
            self._predict(file.getvalue())

    async def predict(self, request: Request) -> Response:
        """Respond with ``{"digit": 7, "probabilities": [10 numbers]}`` to the image, or the 784 pixels, in the body.

        If the model's classes are no digits, ``name`` is that of the class.
        With ``?pixels=true`` the response also has ``pixels``, the 784 numbers from 0 to 1 that the network received.
        """
        if request.method != "POST":
            raise HTTPException(405, "send the image with POST", {"Allow": "POST"})
        if self.in_progress >= MAX_CONCURRENT:
            raise HTTPException(503, f"{MAX_CONCURRENT} predictions are in progress: try again", {"Retry-After": "1"})
        self.in_progress += 1
        try:
            result = await run_sync(self._predict, await _body(request), limiter=self.threads)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody is listening any more
        finally:
            self.in_progress -= 1
        if request.query_params.get("pixels") != "true":
            del result["pixels"]
        return JSONResponse(result)

    def _predict(self, body: bytes) -> dict[str, Any]:
        image = _from_json(body) if body.lstrip()[:1] in (b"{", b"[") else _from_file(body)
        with torch.inference_mode():
            probabilities = self.model(torch.from_numpy(image)[None, None])[0]
        digit = int(probabilities.argmax())
        return {
            "digit": digit,
            **({"name": self.names[digit]} if self.names else {}),
            "probabilities": probabilities.tolist(),
            "pixels": image.round(3).reshape(-1).tolist(),
        }


async def _body(request: Request) -> bytes:
    """Read the request body; raise an HTTPException if it is too large or arrives too slowly."""
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(MAX_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= MAX_BYTES:
                    body += chunk
                elif size > MAX_DISCARDED:
                    break
    except TimeoutError as error:
        reason = f"the body did not arrive within {MAX_SECONDS:g} seconds"
        raise HTTPException(408, reason, {"Connection": "close"}) from error
    if size > MAX_BYTES:
        raise HTTPException(413, f"the body is larger than {MAX_BYTES:,} bytes", {"Connection": "close"})
    return bytes(body)


def _from_file(body: bytes) -> np.ndarray:
    """The network's input, float32 [28, 28], from an image file; raise an HTTPException if that is impossible."""
    if not body.startswith((b"\x89PNG", b"\xff\xd8")):
        raise HTTPException(415, f'send a PNG or JPEG image, or JSON: {{"pixels": [{SIDE * SIDE} numbers]}}')
    try:
        grey = read_grey(io.BytesIO(body), formats=("PNG", "JPEG"), max_pixels=MAX_PIXELS)
        return to_mnist(grey).astype(np.float32) / 255
    except ImageError as error:
        raise HTTPException(422, f"the image {error}") from error


def _from_json(body: bytes) -> np.ndarray:
    """The network's input, float32 [28, 28], from JSON; raise an HTTPException unless it has 784 numbers from 0 to 1."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "the body is not valid JSON") from error
    pixels = content.get("pixels") if isinstance(content, dict) else None
    if not isinstance(pixels, list) or len(pixels) != SIDE * SIDE:
        raise HTTPException(422, f'JSON must be {{"pixels": [{SIDE * SIDE} numbers]}}, row by row, light on dark')
    if not all(type(value) in (int, float) and 0 <= value <= 1 for value in pixels):  # excludes bool and NaN
        raise HTTPException(422, "pixels: each must be a number from 0 to 1")
    return np.array(pixels, dtype=np.float32).reshape(SIDE, SIDE)


async def _health(request: Request) -> Response:
    return JSONResponse({"status": "ok", "version": __version__})


async def _error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)
    return JSONResponse({"error": "internal error; see the server's terminal for details"}, 500)


class _Guard:
    """Middleware that rejects requests for other ``hosts`` with a JSON error and adds ``HEADERS`` to every response."""

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...]) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        host, _, port = Headers(scope=scope).get("host", "").rpartition(":")
        app = self.app
        if self.hosts and (host if port.isdecimal() and host else f"{host}{port}").lower() not in self.hosts:
            app = JSONResponse({"error": f"the host must be one of {', '.join(self.hosts)}"}, 400)
        # The page's files are small and always sent whole: Starlette would refuse a bad Range in plain text.
        headers = [pair for pair in scope["headers"] if pair[0] != b"range"]
        await app({**scope, "headers": headers}, receive, send_with_headers)
