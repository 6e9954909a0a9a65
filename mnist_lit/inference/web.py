"""Web application: a page to draw digits on and the JSON API behind it.

Each prediction request carries one image. Its body is read under a size and a time limit, and the prediction runs in a
thread. While ``MAX_CONCURRENT`` predictions are in progress, further requests get 503. Large images and explanations have
few of these places and a single thread, so that others need not wait for them. Every error is JSON. ``page/openapi.json``
describes the API.
"""

import asyncio
import io
import json
import logging
import os
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import File, FormParser, parse_options_header
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mnist_lit import __version__
from mnist_lit.inference.detector import NO_DIGIT, load_detector
from mnist_lit.inference.digit import to_mnist
from mnist_lit.inference.explain import explanation
from mnist_lit.inference.images import FORMATS, HEIC, read_grey
from mnist_lit.inference.ink import SIDE, ImageError
from mnist_lit.inference.trained import TrainedModel

MAX_BYTES = 2**24  # of a request body: a phone's photo of 48 megapixels
MAX_DISCARDED = 4 * MAX_BYTES  # of a refused body are read nevertheless, so that the client gets to read the error
MAX_PIXELS = 50_000_000  # of a JPEG, which is decoded at down to an eighth of its size
MAX_PNG_PIXELS = 12_500_000  # of a PNG, which is decoded whole
MAX_SECONDS = 5.0  # for a body to arrive
FORM_SECONDS = 1 / 16  # of a thread's time to take apart a MiB of a form, which takes a tenth of it
PIECE = 2**16  # bytes of a form that are taken apart together

# What is larger is a large image, and takes one of their places.
SMALL_BYTES = 2**20
SMALL_PIXELS = 1024 * 1024

MAX_CONCURRENT = 64  # predictions in progress
MAX_LARGE = 4  # of them with a large image or an explanation: all bodies take at most 60 x 1 + 4 x 16 = 124 MiB

# A client's mistakes would fill the terminal.
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", module="PIL")

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
    "Accept-Ranges": "none",
}


def application(model: TrainedModel, hosts: tuple[str, ...] = ()) -> ASGIApp:
    """An ASGI application that serves the page at ``/``, ``/predict`` (POST), ``/health`` and ``/openapi.json``.

    Args:
        hosts: Accepted values of the Host header; empty accepts any. Restrict it for a local server: otherwise a
            malicious web page could reach the server through DNS rebinding.
    """
    errors: dict[Any, Any] = {HTTPException: _error, Exception: _error}
    routes = [
        Route("/predict", _Predictor(model).predict, methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
        Route("/health", partial(_health, model.names or [str(digit) for digit in range(10)])),
        Mount("/", StaticFiles(packages=[("mnist_lit.inference", "page")], html=True)),
    ]
    return _Guard(Starlette(routes=routes, exception_handlers=errors), hosts)


class _Predictor:
    def __init__(self, model: TrainedModel) -> None:
        self.model, self.names = model, model.names
        self.detector = load_detector() if model.reads_digits else None
        self.in_progress, self.large = set[Request](), set[Request]()
        self.threads = ThreadPoolExecutor(os.cpu_count() or 1)
        self.thread_of_large = ThreadPoolExecutor(1)
        for format in ("PNG", "JPEG"):  # warm up: the first predictions are slower
            file = io.BytesIO()
            Image.fromarray(np.eye(2 * SIDE, dtype=np.uint8) * 255).save(file, format)
            self._predict(file.getvalue(), refuse=False)

    async def predict(self, request: Request) -> Response:
        """Respond with ``{"digit": 7, "probabilities": [10 numbers]}`` to the image, or the 784 pixels, in the body.

        If the model's classes are not digits, ``name`` is that of the class.
        With ``?pixels=true`` the response also has ``pixels``, the 784 numbers from 0 to 1 that the network received.
        With ``?explain=true`` it has an ``explanation``: the first two convolutions' feature maps, and what covering a part
        of the image does to the answer.
        With ``?refuse=false`` an image that shows no digit, or two shapes, is answered nevertheless.
        """
        if request.method != "POST":
            raise HTTPException(405, "send the image with POST", {"Allow": "POST"})
        wants_pixels, refuse = _flag(request, "pixels", "false"), _flag(request, "refuse", "true")
        explain = _flag(request, "explain", "false")
        try:
            _admit(request, self.in_progress, MAX_CONCURRENT, "predictions")
            if explain:
                _admit(request, self.large, MAX_LARGE, "explanations or large images")
            body = await self._body(request)
            work = partial(self._predict, body, request.headers.get("Content-Type", ""), refuse, explain, wants_pixels)
            while True:
                large = request in self.large
                threads = self.thread_of_large if large else self.threads
                if result := await asyncio.get_running_loop().run_in_executor(threads, work, large):
                    break
                _admit(request, self.large, MAX_LARGE, "predictions of large images")
        except ClientDisconnect:
            return Response(status_code=400)  # nobody is listening any more
        finally:
            self.in_progress.discard(request)
            self.large.discard(request)
        return JSONResponse(result)

    async def _body(self, request: Request) -> bytes:
        """Read the request body; raise an HTTPException if it is too large or arrives too slowly."""
        body, chunks = bytearray(), request.stream()
        try:
            async with asyncio.timeout(MAX_SECONDS):
                async for chunk in chunks:
                    try:
                        self._check(request, len(body) + len(chunk))
                    except HTTPException:
                        left = MAX_DISCARDED
                        while left > 0 and (chunk := await anext(chunks, b"")):
                            left -= len(chunk)
                        raise
                    body += chunk
        except TimeoutError as error:
            reason = f"the body did not arrive within {MAX_SECONDS:g} seconds"
            raise HTTPException(408, reason, {"Connection": "close"}) from error
        return bytes(body)

    def _check(self, request: Request, size: int) -> None:
        if size > MAX_BYTES:
            raise HTTPException(413, f"the body is larger than {MAX_BYTES:,} bytes", {"Connection": "close"})
        if size > SMALL_BYTES:
            _admit(request, self.large, MAX_LARGE, "predictions of large images")

    def _predict(
        self,
        body: bytes,
        content_type: str = "",
        refuse: bool = True,
        explain: bool = False,
        pixels: bool = False,
        large: bool = False,
    ) -> dict[str, Any]:
        """What is to be responded; empty if the body has a large image and ``large`` is False."""
        kind, options = parse_options_header(content_type)
        file = _from_form(body, options.get(b"boundary", b"")) if kind == b"multipart/form-data" else body
        if is_json := file.lstrip()[:1] in (b"{", b"["):
            image = _from_json(file)
        elif large or _pixels(file) <= SMALL_PIXELS:
            image = _from_file(file, refuse)
        else:
            return {}
        inputs = torch.from_numpy(image)[None, None]
        with torch.inference_mode():
            if self.detector and refuse and not is_json and not self.detector.shows_digit(inputs):
                raise HTTPException(422, f"the image {NO_DIGIT}")
            probabilities = self.model(inputs)[0]
        digit = int(probabilities.argmax())
        return {
            "digit": digit,
            **({"name": self.names[digit]} if self.names else {}),
            "probabilities": probabilities.tolist(),
            **({"pixels": image.round(3).reshape(-1).tolist()} if pixels else {}),
            **({"explanation": explanation(self.model, inputs[0])} if explain else {}),
        }


def _flag(request: Request, name: str, default: str) -> bool:
    value = request.query_params.get(name, default)
    if value not in ("true", "false"):
        raise HTTPException(422, f"{name} must be true or false")
    return value == "true"


def _admit(request: Request, admitted: set[Request], most: int, what: str) -> None:
    if request not in admitted and len(admitted) >= most:
        raise HTTPException(503, f"{most} {what} are in progress: try again", {"Retry-After": "1"})
    admitted.add(request)


def _from_form(body: bytes, boundary: bytes) -> bytes:
    """The content of the one file in a multipart/form-data body; raise an HTTPException if that is impossible."""
    if not boundary:
        raise HTTPException(400, "the Content-Type multipart/form-data must name the boundary: boundary=...")
    files: list[File] = []
    ends: list[bool] = []
    deadline = time.thread_time() + FORM_SECONDS * (1 + len(body) / 2**20)
    try:
        form = FormParser(
            "multipart/form-data",
            on_field=None,
            on_file=files.append,
            on_end=lambda: ends.append(True),
            boundary=boundary,
            config={"MAX_MEMORY_FILE_SIZE": MAX_BYTES},  # none is written to disk
        )
        try:
            for start in range(0, len(body), PIECE):
                form.write(body[start : start + PIECE])
                if len(files) > 1:
                    raise HTTPException(400, "the form has several files: send one")
                if time.thread_time() > deadline:
                    raise HTTPException(400, "the form takes too long to read: send the image as the body")
        finally:
            form.parser = None  # it refers to the form: the file would stay in memory until the garbage collector comes
    except FormParserError as error:
        raise HTTPException(400, "the form is not valid multipart/form-data") from error
    if not ends:
        raise HTTPException(400, "the form is cut short: its last boundary is missing")
    if not files:
        raise HTTPException(400, "the form has no file: send one, as curl -F file=@FILE does")
    file = files[0].file_object
    file.seek(0)
    return file.read()


def _pixels(file: bytes) -> int:
    """How many pixels the head of a PNG or JPEG file promises; 0 if it is none."""
    try:
        with Image.open(io.BytesIO(file), formats=("PNG", "JPEG")) as image:
            return image.width * image.height
    except Exception:  # noqa: BLE001  # read_grey says what is wrong with it
        return 0


def _from_file(file: bytes, refuse: bool) -> np.ndarray:
    """The network's input, float32 [28, 28], from an image file; raise an HTTPException if that is impossible."""
    if not file.startswith((b"\x89PNG", b"\xff\xd8")):
        other = _other_format(file)
        found = f", not {other}, which only predict reads" if other else ""
        raise HTTPException(415, f'send a PNG or JPEG image{found}, or JSON: {{"pixels": [{SIDE * SIDE} numbers]}}')
    try:
        max_pixels = MAX_PNG_PIXELS if file.startswith(b"\x89PNG") else MAX_PIXELS
        grey = read_grey(io.BytesIO(file), formats=("PNG", "JPEG"), max_pixels=max_pixels)
        return to_mnist(grey, refuse).astype(np.float32) / 255
    except ImageError as error:
        raise HTTPException(422, f"the image {error}") from error


def _other_format(file: bytes) -> str:
    """The format that ``predict`` would read the file in, going by how it begins; empty if none."""
    Image.init()  # Pillow loads the rarer formats only then
    accepts = ((name, Image.OPEN[name][1]) for name in FORMATS if name in Image.OPEN)
    found = "HEIC" if file[4:12] in HEIC else ""
    return found or next((name for name, accept in accepts if accept and accept(file[:16])), "")


def _from_json(body: bytes) -> np.ndarray:
    """The network's input, float32 [28, 28], from JSON; raise an HTTPException unless it has 784 numbers from 0 to 1."""
    if len(body) > SMALL_BYTES:  # while json.loads is at work, no other thread is
        raise HTTPException(413, f"the JSON is larger than {SMALL_BYTES:,} bytes")
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


async def _health(classes: list[str], request: Request) -> Response:
    return JSONResponse({"status": "ok", "version": __version__, "classes": classes})


async def _error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)
    return JSONResponse({"error": "internal error; see the server's terminal for details"}, 500)


class _Guard:
    """Middleware that rejects requests for other ``hosts`` with a JSON error and adds ``HEADERS`` to every response."""

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...]) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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
