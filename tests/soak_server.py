"""Attack the server with bad, slow and silent clients: are good ones always answered, and is every error JSON?

python tests/soak_server.py [REQUESTS [SEED]]
"""

import asyncio
import contextlib
import gzip
import io
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[1]
HOST = "127.0.0.1"
AT_ONCE = 32
PATIENCE = 15.0  # seconds; the server's own limits are shorter


class Server:
    """A server process under way; ``with Server("ckpt=...") as server:`` waits until it is ready."""

    def __init__(self, *overrides: str, files: int | None = None, held: int = 0) -> None:
        """
        Args:
            files: The limit of open files.
            held: How many of them are open for something else.
        """
        self.output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        hold = f"import os, sys; [os.dup2(2, 3 + n) for n in range({held})]; os.execv(sys.argv[1], sys.argv[1:])"
        limit = ["sh", "-c", f'ulimit -n {files}; exec "$@"', "sh"] if files else []
        limit += [sys.executable, "-c", hold] if held else []
        self.process = subprocess.Popen(
            [*limit, sys.executable, "-m", "mnist_lit.serve", "port=0", *overrides],
            cwd=ROOT,
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )

    def __enter__(self) -> Self:
        while not (ready := re.search(r"ready: http://127\.0\.0\.1:(\d+) .*\n", self.said())):
            assert self.process.poll() is None, self.said()
            time.sleep(0.05)
        self.port, self.before = int(ready[1]), ready.end()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(60)

    def said(self) -> str:
        return os.pread(self.output.fileno(), 2**24, 0).decode()

    def complaints(self) -> str:
        """What it has printed since it was ready."""
        return self.said()[self.before :]

    def memory(self) -> int:
        """MiB; 0 where the system does not say."""
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
            return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmRSS"))
        return 0

    def descriptors(self) -> int:
        """0 where the system does not say."""
        with contextlib.suppress(OSError):
            return len(os.listdir(f"/proc/{self.process.pid}/fd"))
        return 0


def request(method: str, path: str, body: bytes | None = None, *headers: str, version: str = "1.1") -> bytes:
    lines = [f"{method} {path} HTTP/{version}", *headers]
    if not any(line.lower().startswith("host:") for line in headers):
        lines.insert(1, "Host: localhost")
    if body is not None and not any("content-length" in line.lower() or "chunked" in line for line in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


def picture(size: tuple[int, int], format: str = "PNG") -> bytes:
    """A 1, dark on white."""
    pixels = np.full(size, 255, np.uint8)
    pixels[size[0] // 5 : 4 * size[0] // 5, 9 * size[1] // 20 : 11 * size[1] // 20] = 0
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def two_shapes() -> bytes:
    image = Image.new("L", (200, 100), 255)
    for left in (40, 140):
        ImageDraw.Draw(image).line([(left, 20), (left, 80)], fill=0, width=8)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def png_of_any_size(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG file whose head promises so many pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(data)), (b"IEND", b""))
    packed = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def pixels(value: Any, count: int = 784) -> bytes:
    return json.dumps({"pixels": [value] * count}).encode()


def chunked(body: bytes, size: int = 100) -> bytes:
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


PNG, JPEG, ZERO = picture((28, 28)), picture((60, 50), "JPEG"), pixels(0.0)
PHOTO = picture((900, 700), "JPEG")
TWO = two_shapes()
CURL = "multipart/form-data; boundary=boundary"


def part(content: bytes, name: bytes = b"file", filename: bytes | None = b"x.png") -> bytes:
    file = b"" if filename is None else b'; filename="%s"' % filename
    return b'Content-Disposition: form-data; name="%s"%s\r\n\r\n%s' % (name, file, content)


def form(*parts: bytes) -> bytes:
    """A body of the Content-Type ``CURL``."""
    return b"".join(b"--boundary\r\n%s\r\n" % each for each in parts) + b"--boundary--\r\n"


def photo(size: tuple[int, int], **options: Any) -> bytes:
    """A 7 on paper as a camera sees it, with noise; ``options`` are for Pillow's ``save``."""
    small = Image.new("L", (800, 600), 200)
    ImageDraw.Draw(small).line([(300, 150), (500, 150), (380, 450)], fill=40, width=40, joint="curve")
    grey = np.asarray(small.resize(size), dtype=np.int16)
    noise = np.random.default_rng(0).integers(-6, 7, (512, 512, 3), dtype=np.int16)
    noise = np.tile(noise, (size[1] // 512 + 1, size[0] // 512 + 1, 1))[: size[1], : size[0]]
    file = io.BytesIO()
    Image.fromarray((grey[..., None] + noise).clip(0, 255).astype(np.uint8)).save(file, **options)
    return file.getvalue()


BOMB = png_of_any_size(20_000, 20_000, bytes(4_000_000))


def trickled(count: int, pause: float) -> list[bytes | float]:
    return [pause, b"T"] * count


@dataclass
class Kind:
    """What a client sends, bytes and pauses in seconds, and the statuses that may answer it."""

    pieces: list[bytes | float]
    statuses: list[set[int]]  # of each answer
    reset: bool = False  # whether the client leaves before it is answered, or sends on so that the answer may be lost
    seldom: bool = False  # it takes seconds


def one(data: bytes, *statuses: int, **more: Any) -> Kind:
    return Kind([data], [set(statuses)], **more)


def predict(body: bytes, *statuses: int, **more: Any) -> Kind:
    return one(request("POST", "/predict", body), *statuses, **more)


def multipart(body: bytes, type: str = CURL) -> bytes:
    return request("POST", "/predict", body, f"Content-Type: {type}")


# Made once: they take long.
SEVEN = photo((4032, 3024), format="JPEG", quality=95)
PHONE, PHONE_IN_FORM = request("POST", "/predict", SEVEN), multipart(form(part(SEVEN)))
LARGE = {mib: request("POST", "/predict", bytes(mib * 2**20)) for mib in (2, 20, 70)}
LARGE_FORMS = {mib: multipart(form(part(bytes(mib * 2**20)))) for mib in (12, 17)}
MANY_FILES = multipart(form(*[part(b"")] * 20_000))


def kinds(draw: random.Random) -> dict[str, Kind]:
    """All kinds of requests, with what is random in them drawn anew."""
    place = draw.randrange(1, len(PNG))
    mutated = PNG[:place] + draw.randbytes(draw.randrange(1, 30)) + PNG[place:]
    whole = form(part(PNG))
    mutated_form = whole[:place] + draw.randbytes(draw.randrange(1, 9)) + whole[place + 3 :]
    good = request("POST", "/predict", PNG)
    cut = draw.randrange(1, len(good))
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\n"
    return {
        # Good ones
        "PNG": predict(PNG, 200),
        "JPEG": predict(JPEG, 200),
        "photo": predict(PHOTO, 200),
        "JSON": predict(ZERO, 200),
        "pixels wanted": one(request("POST", "/predict?pixels=true", PNG), 200),
        "two shapes": one(request("POST", "/predict?refuse=false", TWO), 200),
        "explained": one(request("POST", "/predict?explain=true", PNG), 200, 503),
        "form": one(multipart(form(part(b"1", b"n", None), part(PNG))), 200),
        "phone's photo": one(PHONE, 200, 503),
        "phone's photo in a form": one(PHONE_IN_FORM, 200, 503),
        "description": one(request("GET", "/openapi.json"), 200),
        "chunked": one(request("POST", "/predict", chunked(PNG), "Transfer-Encoding: chunked"), 200),
        "expects 100": one(request("POST", "/predict", PNG, "Expect: 100-continue"), 200),
        "in pieces": Kind([good[:cut], 0.05, good[cut:]], [{200}]),
        "pipelined": Kind([good * 5], [{200}] * 5),
        "kept alive": Kind([good, 0.05, request("GET", "/health")], [{200}, {200}]),
        "closed": one(request("POST", "/predict", PNG, "Connection: close"), 200),
        "HTTP/1.0": one(request("POST", "/predict", PNG, version="1.0"), 200),
        "health": one(request("GET", "/health"), 200),
        "page": one(request("GET", "/"), 200),
        "script": one(request("GET", "/app.js"), 200),
        "not modified": one(request("GET", "/app.js", None, "If-None-Match: *"), 304),
        "odd type": one(request("POST", "/predict", PNG, "Content-Type: " + draw.choice(TYPES)), 200),
        # Heads that are no HTTP
        "random bytes": one(draw.randbytes(draw.randrange(20, 2000)) + b"\r\n\r\n", 400),
        "HTTP/0.9": one(b"GET /\r\n\r\n", 400),
        "HTTP/2": one(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        "HTTP/9.9": one(b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n", 200, 400),
        "TLS": one(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + draw.randbytes(500), 400),
        "no method": one(b" / HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        "no version": one(b"GET /\r\nHost: localhost\r\n\r\n", 400),
        "space in path": one(b"GET /a b HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        "not ASCII in path": one(b"GET /\xc3\xa9 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        "header without colon": one(b"GET / HTTP/1.1\r\nHost: localhost\r\nnothing\r\n\r\n", 400),
        "null in header": one(b"GET / HTTP/1.1\r\nHost: localhost\r\nA: \0\r\n\r\n", 400),
        "folded header": one(b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: 1\r\n  2\r\n\r\n", 200, 400),
        "large head": one(request("GET", "/", None, "A: " + "a" * 100_000), 200, 400, reset=True),
        "many headers": one(b"GET / HTTP/1.1\r\n" + b"A: 1\r\n" * 9_000, 200, 400, reset=True),
        "no host": one(b"GET / HTTP/1.1\r\n\r\n", 400),
        "two hosts": one(b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400),
        "length not a number": one(head + b"Content-Length: ten\r\n\r\n", 400),
        "negative length": one(head + b"Content-Length: -1\r\n\r\n", 400),
        "two lengths": one(head + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        "huge length": one(head + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n", 400),
        "gzip transfer": one(head + b"Transfer-Encoding: gzip\r\n\r\n", 400),
        "bad chunk": one(head + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n", 400),
        "bad chunk later": Kind([head + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n", 0.05, b"xyz\r\n"], [{400}]),
        "bad chunk after the answer": Kind(
            [request("POST", "/", b"", "Transfer-Encoding: chunked"), 0.05, b"xyz\r\n"], [{400, 405}]
        ),
        "bad chunk with HEAD": one(
            request("HEAD", "/", b"xyz\r\n", "Transfer-Encoding: chunked"), 200, 400, reset=True
        ),
        "pipelined rubbish": Kind([good + b"rubbish\r\n\r\n"], [{200}, {400}]),
        # Requests that are HTTP, but wrong
        "wrong host": one(request("GET", "/", None, f"Host: {draw.choice(HOSTS)}"), 400),
        "wrong method": one(request(draw.choice(("GET", "PUT", "PATCH", "DELETE")), "/predict"), 405),
        "odd method": one(request(draw.choice(("OPTIONS", "TRACE", "X", "predict")), "/predict"), 405),
        "CONNECT": one(request("CONNECT", "localhost:80"), 404, 405),
        "post to page": one(request("POST", "/", PNG), 405),
        "body for no one": Kind([request("POST", "/nothing", None, "Content-Length: 1000") + bytes(500)], [{405}]),
        "no such path": one(request("GET", "/" + draw.choice(PATHS)), 404),
        "no such host and path": one(request("GET", "http://example.com/nothing"), 404),
        "asterisk": one(request("OPTIONS", "*"), 404, 405),
        "long path": one(request("GET", "/" + "a" * 5_000), 404),
        "traversal": one(request("GET", draw.choice(TRAVERSALS)), 404),
        "range": one(request("GET", "/", None, f"Range: {draw.choice(RANGES)}"), 200, 206),
        "WebSocket": one(request("GET", "/", None, "Connection: Upgrade", "Upgrade: websocket"), 200),
        "h2c": one(request("GET", "/", None, "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c"), 200),
        # Bodies
        "empty": predict(b"", 415),
        "no length": one(request("POST", "/predict"), 415),
        "GIF": predict(b"GIF89a" + bytes(100), 415),
        "zipped": one(request("POST", "/predict", gzip.compress(PNG), "Content-Encoding: gzip"), 415),
        "two shapes refused": predict(TWO, 422),
        "strange query": one(request("POST", f"/predict?{draw.choice(QUERIES)}", PNG), 422),
        "form without boundary": one(multipart(form(part(PNG)), type="multipart/form-data; boundary="), 400),
        "form with two files": one(multipart(form(part(PNG), part(JPEG))), 400),
        "form with many files": one(MANY_FILES, 400, 503),
        "form without files": one(multipart(form(part(PNG, b"file", None))), 400),
        "form cut short": one(multipart(whole[: draw.randrange(len(whole) - 12)]), 400),
        "mutated form": one(multipart(mutated_form), 200, 400, 415, 422),
        "padded form": one(multipart(whole[:-4] + b" " * draw.choice((1_000_000, 3_000_000))), 400, 503),
        "form of 12 MiB": one(LARGE_FORMS[12], 408, 415, 503),
        "form of 17 MiB": one(LARGE_FORMS[17], 408, 413, 503, seldom=True),
        "mutated PNG": predict(mutated, 200, 415, 422),
        "PNG cut short": predict(PNG[:place], 200, 415, 422),
        "random body": predict(b"\0" + draw.randbytes(draw.randrange(3000)), 415),
        "bomb": predict(BOMB, 422),
        "suspected bomb": predict(png_of_any_size(10_000, draw.randrange(9_000, 17_000)), 422, 503),  # Pillow warns
        "few bytes for many pixels": predict(png_of_any_size(1000, 1000), 422),
        "no pixels": predict(png_of_any_size(0, 0), 422),
        "blank": predict(png_of_any_size(28, 28, bytes(28 * 29)), 422),
        "bad JSON": predict(b"{" + draw.randbytes(20), 400),
        "deep JSON": predict(b"[" * 100_000, 400),
        "NaN": predict(pixels(float("nan")), 422),
        "infinite": predict(pixels(float("-inf")), 422),
        "huge number": predict(pixels(10**400), 422),
        "too few": predict(pixels(0.5, draw.randrange(784)), 422),
        "nested": predict(pixels([0]), 422),
        "2 MiB": one(LARGE[2], 415, 503),
        "2 MiB of JSON": predict(b"[" * 2 * 2**20, 413, 503),
        # Clients that leave, or take their time
        "leaves in head": Kind([good[: draw.randrange(1, 30)]], [set()], reset=True),
        "leaves in body": Kind([good[:-10]], [set()], reset=True),
        "leaves after request": Kind([good], [set()], reset=True),
        "never reads": Kind([request("GET", "/app.js") * 500, 0.5], [set()], reset=True, seldom=True),
        "20 MiB": one(LARGE[20], 408, 413, 503, seldom=True),
        "70 MiB": one(LARGE[70], 408, 413, 503, reset=True, seldom=True),
        "slow body": Kind([good[:-20], *trickled(12, 0.5)], [{408}], reset=True, seldom=True),
        "slow head": Kind([b"GET /health HT", *trickled(12, 1.0)], [{408}], reset=True, seldom=True),
        "silent": Kind([11.5], [set()], reset=True, seldom=True),
    }


TYPES = (
    "text/html",
    "application/json",
    "multipart/mixed; boundary=a",
    "x",
    "image/png; charset=\xff",
    ";;;",
    "*/*",
)
HOSTS = ("evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "[::1]", "localhost:80:80", "0x7f.1", "'")
PATHS = ("nothing", "%00", "%ff%fe", "predict/", "health/x", "favicon.ico", ".git/config", "a" * 255, "con", "%25")
TRAVERSALS = ("/../web.py", "/..%2fweb.py", "/%2e%2e/web.py", "//etc/passwd", "/..\\web.py", "/a/../../web.py")
QUERIES = (
    "refuse=maybe",
    "refuse",
    "refuse=",
    "pixels=%00&&=;pixels=no",
    "pixels=TRUE",
    "refuse=%ff",
    "pixels=true&pixels=2",
)
RANGES = ("bytes=0-9", "bytes=9999999-", "bytes=x-y", "pages=1", "bytes=0-1,3-4,6-7", "bytes=-0", "bytes=5-1", "=")


@dataclass
class Report:
    """What has happened; ``broken`` lists the promises that were not kept."""

    statuses: Counter[str] = field(default_factory=Counter)
    not_json: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    memory: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def promise(self, kept: bool, sentence: str) -> None:
        if not kept:
            self.broken.append(sentence)


async def attack(port: int, requests: int, seed: int, report: Report, kind_names: Sequence[str] = ()) -> None:
    """Send ``requests`` requests, ``AT_ONCE`` at a time, of all kinds in turn; those that take long only seldom."""
    draw = random.Random(seed)
    names = list(kind_names) or list(kinds(draw))

    def schedule() -> Iterator[tuple[str, Kind]]:
        sent, turn = 0, 0
        while sent < requests:
            drawn = kinds(draw)
            draw.shuffle(names)
            for name in names:
                if (turn % 20 == 0 or not drawn[name].seldom) and sent < requests:
                    sent += 1
                    yield name, drawn[name]
            turn += 1

    due = schedule()

    async def client() -> None:
        for name, kind in due:
            await _send(port, name, kind, report)

    await asyncio.gather(*(client() for _ in range(AT_ONCE)))


async def _send(port: int, name: str, kind: Kind, report: Report) -> None:
    found: list[int] = []
    writer = None
    try:
        async with asyncio.timeout(PATIENCE):
            reader, writer = await asyncio.open_connection(HOST, port)
            sending = asyncio.ensure_future(_write(writer, kind.pieces))
            if kind.statuses == [set()]:
                await sending
            else:
                async for status, error in _answers(reader, len(kind.statuses), no_body=kind.pieces[0]):
                    found.append(status)
                    report.statuses[str(status)] += 1
                    if error:
                        report.not_json[f"{name}: {status}, {error}"] += 1
            sending.cancel()
    except TimeoutError:
        report.statuses["none in time"] += 1
        report.wrong[f"{name}: nothing more within {PATIENCE:g} seconds after {found}"] += 1
        return
    except (OSError, EOFError):
        if not kind.reset:
            report.wrong[f"{name}: connection reset after {found}"] += 1
        return
    finally:
        if writer:
            if kind.reset:
                writer.transport.abort()
            writer.close()
    if kind.statuses == [set()]:
        report.statuses["client left"] += 1
    elif not kind.reset or found:
        right = len(found) == len(kind.statuses) and all(map(set.__contains__, kind.statuses, found))
        if not right:
            report.wrong[f"{name}: {found}, expected {kind.statuses}"] += 1


async def _write(writer: asyncio.StreamWriter, pieces: list[bytes | float]) -> None:
    with contextlib.suppress(OSError):  # answered and closed
        for piece in pieces:
            if isinstance(piece, bytes):
                writer.write(piece)
                await writer.drain()
            else:
                await asyncio.sleep(piece)


async def _answers(
    reader: asyncio.StreamReader, count: int, no_body: bytes | float
) -> AsyncIterator[tuple[int, str | None]]:
    """Status of each answer, and what is wrong with it if it is an error."""
    for _ in range(count):
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                if (status := int(head.split()[1])) >= 200:
                    break
        except asyncio.IncompleteReadError:
            return  # closed
        headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
        body = b""
        if status != 304 and not (isinstance(no_body, bytes) and no_body.startswith(b"HEAD")):
            length = headers.get("content-length")
            body = await (reader.readexactly(int(length)) if length else reader.read())
            if "content-length" not in headers and headers.get("transfer-encoding") == "chunked":
                body = body.partition(b"\r\n")[2].partition(b"\r\n")[0]
        yield status, _wrong(status, headers, body) if status >= 400 and body else None


def _wrong(status: int, headers: dict[str, str], body: bytes) -> str | None:
    try:
        right = list(json.loads(body)) == ["error"]
    except ValueError:
        return f"{headers.get('content-type')}: {body[:60]!r}"
    if not right or "x-content-type-options" not in headers:
        return f"{body[:60]!r}"
    if re.search(r"Traceback|File \"|\.py|/home|/root|/usr|site-packages", body.decode()):
        return f"reveals too much: {body[:60]!r}"
    return None if status < 500 or status == 503 else f"status {status}"


async def probe(port: int, report: Report, when: str, until: Callable[[], bool], every: float = 0.02) -> str:
    """Send good requests, one after the other; each has to be answered. Returns their latency."""
    seconds, refused = [], Counter[str]()
    while not until():
        start = time.perf_counter()
        try:
            async with asyncio.timeout(PATIENCE):
                reader, writer = await asyncio.open_connection(HOST, port)
                writer.write(request("POST", "/predict", PNG, "Connection: close"))
                answer = await reader.read()
                writer.close()
            if answer.startswith(b"HTTP/1.1 200 "):
                seconds.append(time.perf_counter() - start)
            else:
                refused[answer[:12].decode("latin-1") or "closed without an answer"] += 1
        except (OSError, TimeoutError) as error:
            refused[type(error).__name__] += 1
        await asyncio.sleep(every)
    report.promise(not refused, f"{when}, good requests were not answered with 200: {dict(refused)}")
    middle, tail = np.percentile(seconds, (50, 99)) * 1000 if seconds else (float("nan"),) * 2
    return f"{when}: {len(seconds)} good requests answered, p50 {middle:.1f} ms, p99 {tail:.1f} ms"


def times(count: int) -> Callable[[], bool]:
    """False so many times."""
    left = iter(range(count))
    return lambda: next(left, None) is None


class Silent:
    """Connections that send nothing, or, every other one, half of a request's head."""

    def __init__(self, port: int) -> None:
        self.port, self.sockets = port, list[socket.socket]()

    def open(self, count: int) -> None:
        while len(self.sockets) < count:
            self.sockets.append(socket.create_connection((HOST, self.port), timeout=5))
            with contextlib.suppress(OSError):
                self.sockets[-1].sendall(b"GET / HTTP/1.1\r\nHost:" if len(self.sockets) % 2 else b"")

    def open_still(self) -> int:
        return sum(not _closed(each) for each in self.sockets)

    def close(self) -> None:
        for each in self.sockets:
            each.close()


def _closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        while connection.recv(4096):
            pass
        return True
    except BlockingIOError:
        return False
    except OSError:
        return True


async def soak(server: Server, requests: int, seed: int) -> Report:
    report = Report()

    async def watch() -> None:
        while True:
            report.memory.append(server.memory())
            report.descriptors.append(server.descriptors())
            await asyncio.sleep(0.1)

    await attack(server.port, 2 * AT_ONCE, seed, report, ["PNG", "JPEG", "JSON", "page"])  # its threads have started
    print(await probe(server.port, report, "before", times(200)))
    watching = asyncio.create_task(watch())
    await asyncio.sleep(0.2)
    begin = time.perf_counter()
    attacking = asyncio.create_task(attack(server.port, requests, seed, report))
    print(await probe(server.port, report, "during the attack", attacking.done))
    await attacking
    print(f"{requests:,} requests of {len(kinds(random.Random(seed)))} kinds in {time.perf_counter() - begin:.0f} s")
    silent = Silent(server.port)
    try:
        for count in (200, 600):
            await asyncio.to_thread(silent.open, count)
            print(await probe(server.port, report, f"beside {count} silent connections", times(200)))
        await asyncio.sleep(12)
        left = silent.open_still()
        print(f"of them {left} are still open after 12 s")
        report.promise(left == 0, f"{left} silent connections were not closed")
    finally:
        silent.close()
    await asyncio.sleep(6)
    print(await probe(server.port, report, "after", times(200)))
    await asyncio.sleep(1)
    watching.cancel()
    # Of what large images took, malloc keeps up to 220 MiB, however many there have been.
    for name, values, slack in (("memory, MiB", report.memory, 250), ("descriptors", report.descriptors, 5)):
        before, after = values[0], values[-1]
        print(f"{name}: {before} before, {max(values)} at most, {after} after")
        report.promise(after <= before + slack, f"{name}: {before} before and {after} after")
    return report


def judge(report: Report) -> list[str]:
    """The promises that were broken."""
    for what, found in (("errors that are not JSON", report.not_json), ("not the answer expected", report.wrong)):
        report.promise(not found, f"{what}: {found.total()}, such as {dict(found.most_common(5))}")
    return report.broken


def few_descriptors(run: str) -> list[str]:
    """What is wrong with a server that may open 64 files, beside 100 silent connections."""
    report = Report()
    with Server(f"ckpt={run}", files=64) as server:
        silent = Silent(server.port)
        silent.open(100)
        print(asyncio.run(probe(server.port, report, "64 descriptors, 100 silent connections", times(100), 0.05)))
        silent.close()
        lines = server.complaints().count("\n")
    print(f"lines it printed meanwhile: {lines}")
    report.promise(lines <= 1, f"with few descriptors it printed {lines} lines")
    return report.broken


def stop(server: Server, *signals: signal.Signals) -> list[str]:
    """What is wrong with how it ends on these signals while half a body has arrived."""
    report, before = Report(), len(server.complaints())
    with socket.create_connection((HOST, server.port)) as half:
        half.sendall(request("POST", "/predict", PNG)[:-10])
        time.sleep(0.5)
        start = time.perf_counter()
        for number in signals:
            server.process.send_signal(number)
            time.sleep(0.2)
        server.process.wait(60)
    names = " and ".join(number.name for number in signals)
    complaints = server.complaints()[before:].removeprefix("serve: stopped\n")
    lines = complaints.count("\n")
    print(f"{names} with half a body: it ended after {time.perf_counter() - start:.1f} s and printed {lines} lines")
    report.promise(lines == 0, f"ending on {names}, it printed {lines} lines: {complaints[-500:]}")
    return report.broken


def main(requests: int = 10_000, seed: int = 0) -> None:
    sys.path.insert(0, str(ROOT))
    from helpers import small

    from mnist_lit.train import train

    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder), **small("trainer.enable_progress_bar=false"))
        with Server(f"ckpt={folder}") as server:
            report = asyncio.run(soak(server, requests, seed))
            print("answers:", dict(report.statuses.most_common()))
            lines = server.complaints().count("\n")
            print(f"lines the server printed meanwhile: {lines}")
            report.promise(lines == 0, f"it printed {lines} lines: {server.complaints()[-500:]}")
            broken = judge(report) + stop(server, signal.SIGTERM)
        broken += few_descriptors(folder)
    print("\n".join(f"BROKEN: {each}" for each in broken) or "all promises kept")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
