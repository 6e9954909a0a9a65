"""The server as its users see it: over a socket, and in a browser."""

import asyncio
import base64
import contextlib
import gc
import http.client
import io
import json
import random
import re
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Browser
from helpers import ROOT
from PIL import Image
from soak_server import (
    CURL,
    HOST,
    ZERO,
    Report,
    Server,
    Silent,
    attack,
    form,
    judge,
    kinds,
    part,
    photo,
    png_of_any_size,
    stop,
)

from mnist_lit import UserError, __version__
from mnist_lit.storage import runs

try:
    import jsonschema  # type: ignore[import-untyped]
except ImportError:
    jsonschema = None

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("python_multipart", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")


@pytest.fixture(scope="module")
def server(good_run: Path) -> Iterator[Server]:
    with Server(f"ckpt={good_run}") as server:
        yield server
        assert server.process.poll() is None and server.complaints() == ""  # after all that the tests have sent


@pytest.fixture(scope="module")
def port(server: Server) -> int:
    return server.port


def ask(
    port: int, body: bytes = b"", path: str = "/predict", method: str = "POST", **headers: str
) -> tuple[int, Any, dict[str, str]]:
    """Status, JSON body and headers of the response."""
    connection = http.client.HTTPConnection(HOST, port, timeout=30)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        text = response.read()
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'self'" in response.headers["Content-Security-Policy"]
        check_described(method, path.partition("?")[0], response.status, json.loads(text))
        return response.status, json.loads(text), dict(response.headers)
    finally:
        connection.close()


API = json.loads((ROOT / "mnist_lit" / "inference" / "page" / "openapi.json").read_text())


def check_described(method: str, path: str, status: int, body: Any) -> None:
    """Fail if ``openapi.json`` describes the operation but not this answer."""
    operation = API["paths"].get(path, {}).get(method.lower())
    if operation and jsonschema:
        answer = operation["responses"][str(status)]
        if "$ref" in answer:
            answer = API["components"]["responses"][answer["$ref"].rpartition("/")[2]]
        schema = {**answer["content"]["application/json"]["schema"], "components": API["components"]}
        jsonschema.Draft202012Validator(schema).validate(body)


ONE = np.pad(np.full((20, 3), 255, np.uint8), ((4, 4), (12, 13)))  # a digit in MNIST's form


def png(image: np.ndarray, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format)
    return file.getvalue()


def refused(response: tuple[int, Any, dict[str, str]], status: int, sentence: str) -> bool:
    """Whether it is the expected error, as JSON that reveals nothing about the server's files and code."""
    found, body, _ = response
    assert (found, list(body)) == (status, ["error"]) and sentence in body["error"], body
    return not re.search(r"Traceback|File \"|\.py|/home|/root|/usr|site-packages", body["error"])


def test_predictions_are_those_of_the_model(port: int, good_run: Path, digits) -> None:
    import torch

    from mnist_lit.inference.trained import load

    images, _ = digits
    images = images[:20]
    with torch.inference_mode():
        expected = load(good_run)(torch.from_numpy(images).unsqueeze(1) / 255).numpy()
    for image, probabilities in zip(images, expected, strict=True):
        numbers = json.dumps({"pixels": (image / 255).reshape(-1).tolist()}).encode()
        for body in (png(image), numbers):
            status, response, _ = ask(port, body)
            assert status == 200 and list(response) == ["digit", "probabilities"]
            np.testing.assert_allclose(response["probabilities"], probabilities, atol=1e-5)
            assert response["digit"] == probabilities.argmax()
        status, response, _ = ask(port, png(image), path="/predict?pixels=true")
        np.testing.assert_allclose(response["pixels"], image.reshape(-1) / 255, atol=0.001)


def test_a_large_photo_of_a_digit_is_normalized(port: int, digits) -> None:
    images, labels = digits
    seven = images[list(labels).index(7)]
    photo = np.full((900, 700), 230, np.uint8)
    large = np.asarray(Image.fromarray(seven).resize((400, 400)), dtype=np.int64)
    photo[100:500, 150:550] = 230 - large * 200 // 255
    assert ask(port, png(photo, "JPEG"))[1]["digit"] == 7


def test_an_explanation_is_what_the_layers_and_covered_images_say(port: int, good_run: Path, digits) -> None:
    import torch
    from torch.nn import functional as F

    from mnist_lit.inference.trained import load

    model, image = load(good_run), torch.from_numpy(digits[0][3])[None] / 255
    status, response, _ = ask(port, png(digits[0][3]), path="/predict?explain=true")
    assert status == 200 and list(response) == ["digit", "probabilities", "explanation"]
    with torch.inference_mode():
        x, expected = image[None], {}
        for name in ("conv1", "conv2"):
            layer = getattr(model.network, name)
            x = expected[name] = F.conv2d(x, layer.weight, layer.bias).relu()
    assert [each["layer"] for each in response["explanation"]["feature_maps"]] == ["conv1", "conv2"]
    for each in response["explanation"]["feature_maps"]:
        maps = expected[each["layer"]][0]
        values = np.frombuffer(base64.b64decode(each["values"]), np.uint8).reshape(each["shape"])
        np.testing.assert_allclose(values / 255, maps / maps.max(), atol=1.5 / 255)

    found = np.array(response["explanation"]["occlusion"])
    for row, column in ((0, 0), (6, 6), (7, 5), (13, 13)):
        covered, top, left = image.clone(), max(0, 2 * row - 1), max(0, 2 * column - 1)  # 5x5, less at the edges
        covered[:, top : 2 * row + 4, left : 2 * column + 4] = 0
        with torch.inference_mode():
            before, after = model(torch.stack([image, covered]))[:, response["digit"]].tolist()
        assert found[row, column] == pytest.approx(before - after, abs=1e-5)
    assert abs(found).max() > 0.01


def test_health(port: int) -> None:
    assert ask(port, path="/health", method="GET")[:2] == (
        200,
        {"status": "ok", "version": __version__, "classes": list("0123456789")},
    )


def test_32_a_port_in_use_and_a_bad_checkpoint_end_it_before_it_is_ready(
    port: int, good_run: Path, tmp_path: Path
) -> None:
    from mnist_lit.serve import serve

    with pytest.raises(UserError, match=rf"port={port}: cannot listen on it"):
        serve(good_run, port=port)
    bad = tmp_path / "bad.ckpt"
    bad.write_bytes((good_run / "checkpoints" / "last.ckpt").read_bytes()[:5000])
    done = subprocess.run(
        [sys.executable, "-m", "mnist_lit.serve", "port=0", f"ckpt={bad}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "ready" not in done.stdout
    sentence = done.stderr.removeprefix("loading PyTorch ...\n")
    assert sentence.startswith("serve: ") and sentence.count("\n") == 1 and "damaged" in sentence


def test_33_errors_are_json_and_the_next_good_request_is_answered(port: int) -> None:
    def pixels(value: Any, count: int = 784) -> bytes:
        return json.dumps({"pixels": [value] * count}).encode()

    jpeg = bytearray(png(np.eye(28, dtype=np.uint8) * 255, "JPEG"))
    jpeg[(size := jpeg.index(b"\xff\xc0") + 5) : size + 4] = struct.pack(">HH", 7000, 8000)
    good = png(ONE)
    for body, status, sentence in (
        (b"\0" * (2**24 + 1), 413, "the body is larger than 16,777,216 bytes"),
        (b"\0" * 2**24, 415, "send a PNG or JPEG image"),
        (b"[" + b" " * 2**20, 413, "the JSON is larger than 1,048,576 bytes"),
        (b"\0" * 2**20, 415, "send a PNG or JPEG image"),
        (b"", 415, "send a PNG or JPEG image"),
        (b"GIF89a" + b"\0" * 100, 415, "send a PNG or JPEG image, not GIF, which only predict reads"),
        (png(np.eye(28, dtype=np.uint8), "WEBP"), 415, "not WEBP, which"),
        (b"\0\0\0\x18ftypheic" + b"\0" * 100, 415, "not HEIC, which"),
        (good[:45], 422, "damaged"),
        (png_of_any_size(4000, 3200), 422, "the image has 4000x3200 pixels, more than 12,500,000"),
        (bytes(jpeg), 422, "the image has 8000x7000 pixels, more than 50,000,000"),
        (png(np.full((50, 50), 255, np.uint8)), 422, "is blank"),
        (b"{", 400, "not valid JSON"),
        (b"[" * 500_000, 400, "not valid JSON"),
        (b"[1]", 422, '{"pixels": [784 numbers]}'),
        (b'{"pixel": [1]}', 422, '{"pixels": [784 numbers]}'),
        (pixels(0, 783), 422, '{"pixels": [784 numbers]}'),
        (pixels([0]), 422, "from 0 to 1"),
        (pixels(float("nan")), 422, "from 0 to 1"),
        (pixels(float("inf")), 422, "from 0 to 1"),
        (pixels(1.01), 422, "from 0 to 1"),
        (pixels("0"), 422, "from 0 to 1"),
        (pixels(True), 422, "from 0 to 1"),
        (pixels(10**400), 422, "from 0 to 1"),
    ):
        assert refused(ask(port, body), status, sentence), (status, sentence)
        assert ask(port, good)[0] == 200
    assert refused(ask(port, method="GET"), 405, "send the image with POST")
    assert refused(ask(port, path="/", method="POST"), 405, "")
    assert refused(ask(port, path="/nothing", method="GET"), 404, "")


def test_a_form_with_one_file_is_read(port: int, digits) -> None:
    image = png(digits[0][0])
    expected = ask(port, image)[:2]
    for body, kind in (
        (form(part(image)), CURL),
        (form(part(image, b"any name", b"")), CURL),
        (form(part(b"text", b"note", None), part(image), part(b"", b"more", None)), CURL),
        (form(part(image)) + b"an epilogue", CURL),
        (form(part(image)), 'Multipart/Form-Data; charset=utf-8; boundary="boundary"'),
    ):
        assert ask(port, body, **{"Content-Type": kind})[:2] == expected, body[:200]
    assert ask(port, form(part(ZERO)), **{"Content-Type": CURL})[0] == 200
    if curl := shutil.which("curl"):
        command = [curl, "-sS", "-F", "file=@-;filename=x.png", f"http://{HOST}:{port}/predict"]
        assert (
            json.loads(subprocess.run(command, input=image, stdout=subprocess.PIPE, check=True).stdout) == expected[1]
        )


def test_33_large_bodies_leave_nothing_on_disk_and_in_memory(
    good_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from mnist_lit.inference.trained import load
    from mnist_lit.inference.web import application

    app = application(load(good_run))
    content = bytes(15 * 2**20)

    async def status(body: bytes) -> int:
        headers = [(b"content-type", CURL.encode())]
        scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "headers": headers}
        received, sent = iter([{"type": "http.request", "body": body}]), []

        async def receive() -> Any:
            return next(received)

        async def send(message: Any) -> None:
            sent.append(message)

        await app(scope, receive, send)
        return sent[0]["status"]

    async def statuses() -> list[int]:
        found = [
            await status(form(part(content))),
            await status(form(part(content))[:-10]),
            await status(form(part(content), b"wrong")),
            await status(bytes(17 * 2**20)),
            await status(form(part(ZERO))),
        ]
        assert tracemalloc.get_traced_memory()[0] < 10 * 2**20
        return found

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with ThreadPoolExecutor() as pool:  # the browser's tests leave an event loop in this thread
        gc.collect()
        gc.disable()
        tracemalloc.start()
        try:
            assert pool.submit(asyncio.run, statuses()).result() == [415, 400, 400, 413, 200]
        finally:
            tracemalloc.stop()
            gc.enable()


def test_33_forms_that_are_wrong_are_refused_in_a_sentence(port: int) -> None:
    good = png(ONE)
    padded = form(part(good))[:-4] + b" " * (2**24 - 10_000)  # would take 14 seconds
    for body, kind, status, sentence in (
        (form(part(good), part(good)), CURL, 400, "the form has several files: send one"),
        (form(*[part(b"")] * 100_000), CURL, 400, "several files"),
        (form(part(b"text", b"note", None)), CURL, 400, "the form has no file"),
        (form(), CURL, 400, "the form has no file"),
        (form(part(good)), "multipart/form-data", 400, "must name the boundary"),
        (form(part(good)), "multipart/form-data; boundary=", 400, "must name the boundary"),
        (form(part(good)), CURL + "x", 400, "not valid multipart/form-data"),
        (form(part(good)), CURL + "x" * 300, 400, "not valid multipart/form-data"),
        (form(part(good))[:-20], CURL, 400, "cut short"),
        (b"", CURL, 400, "cut short"),
        (good, CURL, 400, "not valid multipart/form-data"),
        (form(b"\r\n" + good), CURL, 400, "not valid multipart/form-data"),
        (form(b"A: " + b"a" * 10_000 + b"\r\n\r\n" + good), CURL, 400, "not valid multipart/form-data"),
        (padded, CURL, 400, "takes too long to read"),
        (form(part(b"GIF89a")), CURL, 415, "not GIF"),
        (form(part(b"")), CURL, 415, "send a PNG or JPEG image"),
        (form(part(good[:45])), CURL, 422, "damaged"),
        (form(part(bytes(2**24))), CURL, 413, "larger than 16,777,216 bytes"),
    ):
        assert refused(ask(port, body, **{"Content-Type": kind}), status, sentence), (status, sentence)
        assert ask(port, good)[0] == 200


@pytest.mark.parametrize(
    ("size", "options", "least"),
    [
        ((4032, 3024), {"format": "JPEG", "quality": 98, "subsampling": 0}, 8),
        pytest.param((8064, 6048), {"format": "JPEG", "quality": 94}, 8, marks=pytest.mark.slow),
        ((3024, 4032), {"format": "JPEG", "quality": 10}, 0),
        ((4032, 3024), {"format": "PNG"}, 1),
    ],
    ids=["12 megapixels", "48 megapixels", "few bytes", "PNG"],
)
def test_a_photo_from_a_phone_is_answered_as_by_predict(
    port: int, good_run: Path, tmp_path: Path, size: tuple[int, int], options: dict[str, Any], least: int
) -> None:
    from mnist_lit.predict import predict

    file = tmp_path / "photo"
    file.write_bytes(photo(size, **options))
    assert least * 2**20 <= file.stat().st_size < 2**24
    (expected,) = predict(file, good_run)
    for body, kind in ((file.read_bytes(), "image/jpeg"), (form(part(file.read_bytes())), CURL)):
        status, response, _ = ask(port, body, **{"Content-Type": kind})
        assert (status, response["digit"]) == (200, 7)
        np.testing.assert_allclose(response["probabilities"], [expected[f"p{i}"] for i in range(10)], atol=1e-5)


def test_33_beside_four_large_images_small_ones_are_answered_and_more_large_ones_are_not(port: int) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2000000\r\n\r\n"
    many_pixels = photo((3024, 4032), format="JPEG", quality=10)
    assert len(many_pixels) < 2**20
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            connection = stack.enter_context(socket.create_connection((HOST, port)))
            connection.sendall(head + bytes(1_500_000))
        time.sleep(0.5)
        for body in (bytes(1_500_000), many_pixels):
            response = ask(port, body)
            assert (
                refused(response, 503, "4 predictions of large images are in progress") and response[2]["retry-after"]
            )
        assert ask(port, ZERO)[0] == 200
    deadline = time.monotonic() + 6
    while (status := ask(port, many_pixels)[0]) == 503 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert status == 200


def test_what_shows_no_digit_is_refused_unless_asked_not_to(port: int) -> None:
    cross = png(255 - (np.eye(100, dtype=np.uint8) | np.eye(100, dtype=np.uint8)[::-1]) * 255)
    assert refused(ask(port, cross), 422, "the image shows something other than a digit")
    status, answer, _ = ask(port, cross, "/predict?refuse=false")
    assert status == 200 and len(answer["probabilities"]) == 10
    pixels = json.dumps({"pixels": (np.eye(28)).ravel().tolist()}).encode()
    assert ask(port, pixels)[0] == 200  # who sends pixels knows what they are


def test_two_shapes_are_refused_unless_asked_not_to(port: int, digits) -> None:
    one, other = (np.kron(255 - digits[0][list(digits[1]).index(digit)], np.ones((5, 5), np.uint8)) for digit in (4, 7))
    both = png(np.hstack([one, other]))
    sentence = "the image shows two shapes side by side instead of one digit"
    for query in ("", "?refuse=true", "?pixels=true"):
        assert refused(ask(port, both, f"/predict{query}"), 422, sentence)
    status, response, _ = ask(port, both, "/predict?refuse=false&pixels=true")
    assert (status, list(response)) == (200, ["digit", "probabilities", "pixels"])
    for name in ("refuse", "pixels", "explain"):
        for value in ("", "1", "False", "no", "%00"):
            assert refused(ask(port, both, f"/predict?{name}={value}"), 422, f"{name} must be true or false")


def test_openapi_describes_the_api(port: int) -> None:
    from mnist_lit.inference import web

    status, served, headers = ask(port, path="/openapi.json", method="GET")
    assert (status, served, headers["content-type"]) == (200, API, "application/json")
    assert API["info"]["version"] == __version__
    predict = API["paths"]["/predict"]["post"]
    assert [each["name"] for each in predict["parameters"]] == ["pixels", "explain", "refuse"]
    limits = [web.MAX_BYTES, web.MAX_PNG_PIXELS, web.MAX_PIXELS, web.SMALL_BYTES]
    for text, named in (
        (json.dumps(predict["requestBody"]), limits[:3]),
        ((ROOT / "conf/serve.yaml").read_text(), limits),
    ):
        assert [f"{limit:,}" for limit in named if f"{limit:,}" not in text] == []
    if jsonschema:
        for schema in API["components"]["schemas"].values():
            jsonschema.Draft202012Validator.check_schema(schema)
        pixels = jsonschema.Draft202012Validator(API["components"]["schemas"]["Pixels"])
        assert pixels.is_valid(json.loads(ZERO)) and not pixels.is_valid({"pixels": [2] * 784})


def test_33_another_host_is_refused(port: int) -> None:
    for host in ("evil.example", "evil.example:80", "localhost.evil.example", f"[::1]:{port}", ""):
        assert refused(ask(port, path="/health", method="GET", Host=host), 400, "host")
    for host in ("localhost", f"localhost:{port}", "LOCALHOST", f"127.0.0.1:{port}"):
        assert ask(port, path="/health", method="GET", Host=host)[0] == 200


def test_33_no_path_leads_out_of_the_page(port: int) -> None:
    for path in (
        "/../web.py",
        "/..%2fweb.py",
        "/%2e%2e/web.py",
        "//etc/passwd",
        "/../../../../etc/passwd",
        "/..\\web.py",
    ):
        assert refused(ask(port, path=path, method="GET"), 404, "")


def test_33_a_slow_upload_ends_after_five_seconds(port: int) -> None:
    with socket.create_connection((HOST, port), timeout=20) as slow:
        slow.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n")
        start = time.monotonic()
        sender = threading.Thread(target=_trickle, args=(slow,), daemon=True)
        sender.start()
        response = _until_closed(slow)
    assert response.startswith(b"HTTP/1.1 408") and b"did not arrive within 5 seconds" in response
    assert 4 < time.monotonic() - start < 9
    assert ask(port, ZERO)[0] == 200


def _until_closed(connection: socket.socket) -> bytes:
    """Everything received; a server that closes while data is still arriving resets the connection after responding."""
    response = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := connection.recv(4096):
            response += chunk
    return response


def _trickle(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            connection.sendall(b"\x89")
            time.sleep(0.5)


def test_33_of_200_concurrent_requests_some_are_told_to_retry(port: int, digits) -> None:
    """Sending half of each body first keeps all of them in progress at the same time."""
    image = png(digits[0][0])
    head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(image)}\r\nConnection: close\r\n\r\n"
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(socket.create_connection((HOST, port), timeout=30)) for _ in range(200)]
        for connection in connections:
            connection.sendall(head.encode() + image[:50])
        deadline = time.monotonic() + 4  # a body may take five seconds
        while len(select.select(connections, [], [], 0)[0]) < 136 and time.monotonic() < deadline:
            time.sleep(0.05)
        for connection in connections:
            with contextlib.suppress(OSError):  # already answered and closed
                connection.sendall(image[50:])
        responses = [_until_closed(connection) for connection in connections]
    statuses = [int(response.split()[1]) for response in responses]
    assert statuses.count(200) == 64 and statuses.count(503) == 136, statuses
    for response in responses:
        json.loads(response.partition(b"\r\n\r\n")[2])
    assert all(b"retry-after: 1" in response for response in responses if b" 503 " in response)
    assert ask(port, image)[0] == 200


def test_33_random_and_mutated_bodies(port: int, digits) -> None:
    """3,000 bodies over eight connections at a time: none may stop the server or cause a 5xx other than 503."""
    draw = random.Random(0)
    photo = np.random.default_rng(0).integers(0, 255, (60, 40, 3), dtype=np.uint8)
    seeds = [png(digits[0][0]), png(digits[0][1], "JPEG"), png(photo), png(photo, "JPEG"), ZERO]
    seeds += [png(np.eye(9, dtype=bool)), png(np.arange(400, dtype=np.uint16).reshape(20, 20) * 160)]

    def mutated() -> bytes:
        body = bytearray(draw.choice(seeds))
        for _ in range(draw.choice((0, 1, 1, 3, 20))):
            place = draw.randrange(len(body))
            how = draw.randrange(4)
            if how == 0:
                body[place] = draw.randrange(256)
            elif how == 1:
                del body[place : place + draw.randrange(1, 30)]
            elif how == 2:
                body[place:place] = draw.randbytes(draw.randrange(1, 30))
            else:
                body[place:place] = body[place : place + draw.randrange(1, 300)]
            body = body or bytearray(b"{")
        return bytes(body)

    bodies = [mutated() if number % 10 else draw.randbytes(draw.randrange(3000)) for number in range(3000)]

    def status(body: bytes) -> int:
        status, response, _ = ask(port, body)
        assert (status == 200) == ("digit" in response)
        return status

    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(status, bodies))
    assert {200, 415, 422} <= set(statuses) <= {200, 400, 413, 415, 422, 503}, set(statuses)
    assert ask(port, seeds[0])[0] == 200


def test_33_a_small_attack(server: Server) -> None:
    """As ``make soak-server``, without the kinds that take their time."""
    seed, report = time.time_ns() % 1000, Report()
    names = [name for name, kind in kinds(random.Random(seed)).items() if not kind.seldom]
    with ThreadPoolExecutor() as pool:  # the browser's tests leave an event loop in this thread
        pool.submit(asyncio.run, attack(server.port, 300, seed, report, names)).result()
    assert not judge(report) and server.complaints() == "", f"seed {seed}"
    assert len(names) >= 40 and report.statuses.total() >= 300


def test_33_beside_600_silent_connections_good_requests_are_answered(port: int) -> None:
    silent = Silent(port)
    try:
        silent.open(600)
        assert [ask(port, ZERO)[0] for _ in range(20)] == [200] * 20
        assert 400 < silent.open_still() < 500
    finally:
        silent.close()


@pytest.mark.slow
def test_33_a_connection_that_sends_no_request_is_closed_after_ten_seconds(port: int) -> None:
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        silent, half, trickling, after_an_answer = (
            stack.enter_context(socket.create_connection((HOST, port), timeout=20)) for _ in range(4)
        )
        half.sendall(b"GET / HTTP/1.1\r\n")
        trickling.sendall(b"GET /")
        after_an_answer.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n")
        for each in (trickling, after_an_answer):
            threading.Thread(target=_trickle, args=(each,), daemon=True).start()
        assert _until_closed(silent) == b""
        assert 9 < time.monotonic() - start < 13
        assert _until_closed(half).startswith(b"HTTP/1.1 408 Request Timeout")
        assert b"did not arrive within 10 seconds" in _until_closed(trickling)
        assert _until_closed(after_an_answer).startswith(b"HTTP/1.1 405")
        assert time.monotonic() - start < 14


@pytest.mark.slow
def test_33_a_client_that_does_not_read_its_answers_is_disconnected(port: int) -> None:
    with socket.create_connection((HOST, port), timeout=20) as client, pytest.raises(ConnectionError):
        while True:
            client.sendall(b"GET /app.js HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)


def test_33_there_are_no_more_connections_than_files_may_be_open() -> None:
    from mnist_lit.inference.connections import max_connections

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        for limit, expected in ((64, 16), (256, 112), (1024, 496)):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limits[1]))
            assert max_connections() == expected
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_answers_on_one_connection_come_at_once(server: Server) -> None:
    connection, seconds = http.client.HTTPConnection(HOST, server.port), []
    for _ in range(60):  # the first are quick in any case
        started = time.perf_counter()
        connection.request("POST", "/predict", ZERO)
        assert connection.getresponse().read()
        seconds.append(time.perf_counter() - started)
    connection.close()
    assert min(seconds[-20:]) < 0.035  # 0.04 if the system holds back the second half of an answer


@pytest.mark.slow
@pytest.mark.parametrize(("others", "lines"), [(0, 0), (50, 1)], ids=["as expected", "others hold most of them"])
def test_33_with_64_file_descriptors_good_requests_are_answered(good_run: Path, others: int, lines: int) -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Server(f"ckpt={good_run}", files=64, held=others))
        silent = Silent(server.port)
        stack.callback(silent.close)
        silent.open(100)
        assert [ask(server.port, ZERO)[0] for _ in range(20)] == [200] * 20
        assert server.complaints().count("\n") == lines, server.complaints()


@pytest.mark.slow
@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]], ids=["SIGTERM", "Ctrl-C twice"])
def test_33_a_signal_in_the_middle_of_an_upload_ends_it_quietly(good_run: Path, signals: list[signal.Signals]) -> None:
    with Server(f"ckpt={good_run}") as server:
        assert not stop(server, *signals)


def test_allow_remote_accepts_other_machines_with_a_warning(good_run: Path) -> None:
    with Server(f"ckpt={good_run}", "allow_remote=true") as server:
        assert "warning: any machine that can reach this one" in server.said()
        assert ask(server.port, path="/health", method="GET", Host="this-machine.example")[0] == 200
        with socket.create_connection(("127.0.0.2", server.port), timeout=5):
            pass


def test_without_allow_remote_only_loopback_is_listened_on(port: int) -> None:
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.2", port), timeout=5):
        pass


def test_it_starts_without_lightning_and_torchvision(good_run: Path) -> None:
    code = "import sys; from mnist_lit.inference.web import application; from mnist_lit.inference.trained import load; "
    code += "application(load(sys.argv[1])); print({'lightning', 'torchvision', 'matplotlib'} & sys.modules.keys())"
    assert subprocess.check_output([sys.executable, "-c", code, good_run], cwd=ROOT, text=True) == "set()\n"


STROKES = {
    1: [[(0.52, 0.15), (0.49, 0.5), (0.47, 0.85)]],
    0: [[(0.5, 0.15), (0.33, 0.3), (0.28, 0.5), (0.34, 0.72), (0.5, 0.85)], [(0.5, 0.85), (0.67, 0.7), (0.73, 0.5)]],
}
STROKES[0][1] += [(0.66, 0.28), (0.5, 0.15)]


@pytest.mark.parametrize(("width", "height", "scheme"), [(1200, 800, "light"), (390, 844, "dark")])
def test_digits_drawn_with_the_mouse_are_recognized(
    port: int, browser: Browser, width: int, height: int, scheme: str
) -> None:
    page = browser(width, height, scheme)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(f"http://{HOST}:{port}/")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    answer = page.locator("#answer")
    assert page.get_by_role("heading").inner_text() == "Draw a digit"
    assert page.locator("#classes b").all_inner_texts() == list("0123456789")
    paper = page.locator("#drawing").bounding_box()
    for digit, strokes in STROKES.items():
        for stroke in strokes:
            places = [(paper["x"] + paper["width"] * x, paper["y"] + paper["height"] * y) for x, y in stroke]
            page.mouse.move(*places[0])
            page.mouse.down()
            for place in places[1:]:
                page.mouse.move(*place, steps=8)
            page.mouse.up()
        page.get_by_text(f"This is {'an' if digit == 8 else 'a'} {digit}").wait_for()
        assert page.locator("progress").nth(digit).evaluate("bar => bar.value") > 0.5
        seen = page.locator("#seen").evaluate("c => [...c.getContext('2d').getImageData(0, 0, 28, 28).data]")
        grey = np.array(seen).reshape(28, 28, 4)[..., 0]
        assert grey.max() > 200 and not grey[0].any()  # light on dark in either colour scheme
        page.get_by_role("button", name="Clear").click()
        page.get_by_text("Nothing drawn yet").wait_for()
        assert page.locator("progress").nth(digit).evaluate("bar => bar.value") == 0
    assert answer.get_attribute("aria-live") == "polite"
    assert all(url.startswith(f"http://{HOST}:{port}/") for url in requests)


@pytest.mark.parametrize("width", [1200, 390])
def test_the_page_shows_how_the_network_comes_to_it_on_request(port: int, browser: Browser, width: int) -> None:
    page = browser(width, 900, "light")
    asked: list[str] = []
    page.on("request", lambda request: asked.extend([request.url] * ("predict" in request.url)))
    page.goto(f"http://{HOST}:{port}/")
    paper = page.locator("#drawing").bounding_box()
    page.mouse.move(paper["x"] + paper["width"] * 0.5, paper["y"] + paper["height"] * 0.2)
    page.mouse.down()
    page.mouse.move(paper["x"] + paper["width"] * 0.5, paper["y"] + paper["height"] * 0.8, steps=8)
    page.mouse.up()
    page.get_by_text("This is a 1").wait_for()
    assert asked and not [url for url in asked if "explain=true" in url]
    page.get_by_text("How the network arrives at its answer").click()
    page.get_by_text("conv2: its 64 feature maps, 24×24 pixels each").wait_for()
    colors = "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
    maps = [np.array(page.locator("#maps canvas").nth(n).evaluate(colors))[::4] for n in (0, 1)]
    columns = 16 if width > 500 else 8
    sizes = [(channels // columns * side - 1) * (columns * side - 1) for channels, side in ((32, 27), (64, 25))]
    assert [len(each) for each in maps] == sizes
    assert all(each.max() == 255 and 0.01 < (each > 30).mean() < 0.99 for each in maps)
    red, _, blue, _ = np.array(page.locator("#occlusion").evaluate(colors)).reshape(-1, 4).T
    assert (red != blue).any()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.get_by_role("button", name="Clear").click()
    page.get_by_text("Nothing drawn yet").wait_for()
    assert page.locator("#maps canvas").count() == 0


def test_the_page_says_why_a_drawing_is_refused(port: int, browser: Browser) -> None:
    page = browser(390, 844, "light")
    page.goto(f"http://{HOST}:{port}/")
    paper = page.locator("#drawing").bounding_box()
    top = page.locator("#classes").bounding_box()["y"]
    for x in (0.15, 0.8):
        page.mouse.move(paper["x"] + paper["width"] * x, paper["y"] + paper["height"] * 0.2)
        page.mouse.down()
        page.mouse.move(paper["x"] + paper["width"] * x, paper["y"] + paper["height"] * 0.8, steps=8)
        page.mouse.up()
        page.get_by_text("This is a 1" if x < 0.5 else "the image shows two shapes side by side").wait_for()
    assert page.locator("progress").evaluate_all("bars => Math.max(...bars.map(bar => bar.value))") == 0
    assert page.locator(".best").count() == 0
    assert page.locator("#classes").bounding_box()["y"] == pytest.approx(top, abs=1)
    page.get_by_role("button", name="Clear").click()
    page.get_by_text("Nothing drawn yet").wait_for()


def test_digits_can_be_drawn_with_the_keyboard(port: int, browser: Browser) -> None:
    page = browser(1200, 800, "light")
    page.goto(f"http://{HOST}:{port}/")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    for _ in range(17):
        page.keyboard.press("ArrowDown")
    page.keyboard.press("Space")
    page.get_by_text("This is a 1").wait_for()
    page.keyboard.press("ArrowRight")  # the pen is up
    page.keyboard.press("Escape")
    page.get_by_text("Nothing drawn yet").wait_for()


def test_classes_that_are_not_digits_have_their_names_on_the_page(
    good_run: Path, browser: Browser, tmp_path: Path
) -> None:
    names = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
    checkpoint = torch.load(good_run / runs.LAST, weights_only=True)
    checkpoint["data"][-1] |= {"name": "FashionMNIST", "classes": names}
    torch.save(checkpoint, tmp_path / "named.ckpt")
    with Server(f"ckpt={tmp_path / 'named.ckpt'}") as server:
        assert ask(server.port, path="/health", method="GET")[1]["classes"] == names
        page = browser(390, 844, "light")
        page.goto(f"http://{HOST}:{server.port}/")
        page.get_by_text("Draw one of these").wait_for()
        assert page.locator("#classes b").all_inner_texts() == names
        assert page.get_by_label("Probability of Ankle boot").count() == 1
        lefts = page.locator("progress").evaluate_all("bars => bars.map(bar => bar.getBoundingClientRect().left)")
        assert len(set(lefts)) == 1 and page.evaluate("document.documentElement.scrollWidth") <= 390
