"""The web application around a trained model: the page to draw on, and the API that it uses. Every error is JSON.

A request is one picture. It is read under a limit of bytes and of seconds, brought to MNIST's form and predicted in a
thread; when ``MAX_AT_ONCE`` are under way, further ones are told to come back.
"""

import asyncio
import contextlib
import io
import json
import os
from collections.abc import Iterator
from importlib.resources import files
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
from mnist_lit.inference.images import SIDE, PictureError, read_grey, to_mnist
from mnist_lit.inference.trained import TrainedModel

MAX_BYTES = 2**20  # of a request's body
READ_AND_DROPPED = 16 * MAX_BYTES  # of a larger one, so that its sender gets to reading the answer
MAX_SECONDS = 5.0  # for a body to arrive
MAX_PIXELS = 1024 * 1024  # of a picture, by what its file says before it is unpacked
MAX_AT_ONCE = 64  # predictions that are read, waiting or computed; 64 MiB of bodies, and a tenth of a second to wait
PAGE = files("mnist_lit.inference") / "page"

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def application(model: TrainedModel, hosts: tuple[str, ...] = ()) -> ASGIApp:
    """An ASGI application with the page at ``/``, ``POST /predict`` and ``GET /health``.

    Args:
        hosts: The host names that a request may be addressed to; none: all. Without it a page from elsewhere could
            reach a server on this machine under a name of its own.
    """
    predictions = _Predictions(model)
    routes = [
        Route("/predict", predictions.answer, methods=["POST"]),
        Route("/predict", _only_post, methods=["GET", "PUT", "PATCH", "DELETE"]),
        Route("/health", _health),
        Mount("/", StaticFiles(directory=str(PAGE), html=True)),
    ]
    errors: dict[Any, Any] = {HTTPException: _as_json, Exception: _as_json}
    return _Guard(Starlette(routes=routes, exception_handlers=errors), hosts)


class _Predictions:
    def __init__(self, model: TrainedModel) -> None:
        self.model, self.under_way = model, 0
        self.threads = anyio.CapacityLimiter(os.cpu_count() or 1)
        for form in ("PNG", "JPEG"):  # the first ones take longer
            picture = io.BytesIO()
            Image.fromarray(np.eye(2 * SIDE, dtype=np.uint8) * 255).save(picture, form)
            self._predict(picture.getvalue())

    async def answer(self, request: Request) -> Response:
        """``{"digit": 7, "probabilities": [ten numbers]}`` for the picture, or the 784 pixels, in the body.

        With ``?pixels=true`` also ``pixels``, the 784 numbers from 0 to 1 that the network was given.
        """
        try:
            with self._place():
                body = await _body(request)
                digit = await run_sync(self._predict, body, limiter=self.threads)
        except ClientDisconnect:
            return Response(status_code=400)  # to nobody
        if request.query_params.get("pixels") != "true":
            del digit["pixels"]
        return JSONResponse(digit)

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        if self.under_way >= MAX_AT_ONCE:
            raise HTTPException(503, f"{MAX_AT_ONCE} predictions are under way: try again", {"Retry-After": "1"})
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1

    def _predict(self, body: bytes) -> dict[str, Any]:
        image = _pixels(body) if body.lstrip()[:1] in (b"{", b"[") else _picture(body)
        with torch.inference_mode():
            probabilities = self.model(torch.from_numpy(image)[None, None])[0].tolist()
        digit = max(range(10), key=probabilities.__getitem__)
        return {"digit": digit, "probabilities": probabilities, "pixels": image.round(3).reshape(-1).tolist()}


async def _body(request: Request) -> bytes:
    """
    Raises:
        HTTPException: It is too large, or takes too long to arrive.
    """
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(MAX_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= MAX_BYTES:
                    body += chunk
                elif size > READ_AND_DROPPED:
                    break
    except TimeoutError as error:
        raise HTTPException(
            408, f"the body did not arrive in {MAX_SECONDS:g} seconds", {"Connection": "close"}
        ) from error
    if size > MAX_BYTES:
        raise HTTPException(413, f"the body is larger than {MAX_BYTES:,} bytes", {"Connection": "close"})
    return bytes(body)


def _picture(body: bytes) -> np.ndarray:
    """
    Raises:
        HTTPException: It is no picture, damaged, too large or blank.
    """
    if not body.startswith((b"\x89PNG", b"\xff\xd8")):
        raise HTTPException(415, f'send a PNG or JPEG picture, or JSON: {{"pixels": [{SIDE * SIDE} numbers]}}')
    try:
        grey = read_grey(io.BytesIO(body), formats=("PNG", "JPEG"), most_pixels=MAX_PIXELS)
        return to_mnist(grey).astype(np.float32) / 255
    except PictureError as error:
        raise HTTPException(422, f"the picture {error}") from error


def _pixels(body: bytes) -> np.ndarray:
    """
    Raises:
        HTTPException: It is no JSON, or says something other than 784 numbers from 0 to 1.
    """
    try:
        said = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "the body is no JSON") from error
    pixels = said.get("pixels") if isinstance(said, dict) else None
    if not isinstance(pixels, list) or len(pixels) != SIDE * SIDE:
        raise HTTPException(422, f'JSON must be {{"pixels": [{SIDE * SIDE} numbers]}}, row by row, light on dark')
    if not all(type(value) in (int, float) and 0 <= value <= 1 for value in pixels):  # not a number is neither
        raise HTTPException(422, "pixels: each must be a number from 0 to 1")
    return np.array(pixels, dtype=np.float32).reshape(SIDE, SIDE)


async def _only_post(request: Request) -> Response:
    raise HTTPException(405, "send the picture with POST", {"Allow": "POST"})


async def _health(request: Request) -> Response:
    return JSONResponse({"status": "ok", "version": __version__})


async def _as_json(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)
    return JSONResponse({"error": "something went wrong; the server's terminal says what"}, 500)


class _Guard:
    """Around the application: only requests to one of ``hosts``, and ``HEADERS`` in every answer."""

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
        await app(scope, receive, send_with_headers)
