"""Each hostile request gets an error status and a message, and has no lasting effect."""

import json
import random
import re
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from nmt_moe.serving import bodies
from tests.support.serving import PATIENCE, LiveServer, make_service, raw, receive, served, wait_for

GOOD = {"q": "the cat", "source": "aa", "target": "bb"}
VALUES = [None, 3, 1.5, True, {}, [], [[]], {"a": []}, "", "x" * 1000, -1, 1e300, "\ud800", "\0"]
MEBIBYTE = 2**20
NUM_REQUESTS = 300


def head(path: str = "/translate", kind: str = "application/json", extra: str = "") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Connection: close", f"Content-Type: {kind}"]
    return ("".join(f"{line}\r\n" for line in lines) + f"{extra}\r\n").encode()


def whole(body: bytes, kind: str = "application/json", path: str = "/translate") -> bytes:
    return head(path, kind, f"Content-Length: {len(body)}\r\n") + body


def as_json(**fields: object) -> bytes:
    return whole(json.dumps({**GOOD, **fields}).encode())


def wrong_type(chance: random.Random) -> bytes:
    return as_json(**{chance.choice(["source", "target", "format"]): chance.choice(VALUES[:10])})


def wrong_text(chance: random.Random) -> bytes:
    return as_json(
        q=chance.choice([None, 3, 1.5, True, {}, [[]], "\ud800", "\0", ["a", 1], "a\x1b"])
    )


def bad_json(chance: random.Random) -> bytes:
    content = json.dumps(GOOD).encode()
    cut = chance.randrange(1, len(content))
    kinds = [
        content[:cut],
        content[cut:],
        b"\xff\xfe{",
        b'{"q": "\0"}',
        b"[" * 1000,
        b"nul",
        b"NaN",
    ]
    return whole(chance.choice([*kinds, b'{"q": 1' + b"0" * 5000 + b"}", b'{"q": Infinity}']))


def deep(chance: random.Random) -> bytes:
    depth = chance.randrange(5000, 20000)
    return whole(chance.choice([b"[" * depth, b'{"q":' * depth, b'{"q":' + b"[" * depth]))


def large(chance: random.Random) -> bytes:
    body = b"x" * (10 * MEBIBYTE)
    return chance.choice(
        [whole(body), head(extra="Transfer-Encoding: chunked\r\n") + chunked(body)]
    )


def chunked(body: bytes) -> bytes:
    size = 1 << 16
    parts = [body[first : first + size] for first in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def long_text(chance: random.Random) -> bytes:
    return as_json(q=chance.choice(["a" * 20001, ["a"] * 129, ["a" * 10001] * 2]))


def unknown_language(chance: random.Random) -> bytes:
    return as_json(
        **{chance.choice(["source", "target"]): chance.choice(["xx", "", "🙂", "a" * 999])}
    )


def wrong_kind(chance: random.Random) -> bytes:
    return whole(
        b"<xml/>", chance.choice(["text/xml", "text/plain", "", "🙂", "application/jsonx"])
    )


def bad_form(chance: random.Random) -> bytes:
    form, multipart = "application/x-www-form-urlencoded", "multipart/form-data"
    kinds = [
        whole(b"q=%ff&source=aa&target=bb", form),
        whole(b"&".join([b"q=a"] * 2000), form),
        whole(b"q=a", multipart),
        whole(b"q=a", f"{multipart}; boundary=x"),
        whole(
            b"--x\r\nContent-Disposition: form-data; name=q; filename=a\r\n\r\na\r\n--x--",
            multipart + "; boundary=x",
        ),
    ]
    return chance.choice(kinds)


def bad_http(chance: random.Random) -> bytes:
    lines = [
        b"GET\r\n\r\n",
        b"\0\0\0\r\n\r\n",
        b"POST /translate HTTP/1.1\r\n\r\n",
    ]
    return chance.choice([*lines, b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n"])


def wrong_path(chance: random.Random) -> bytes:
    path = chance.choice(["/nothing", "/../../etc/passwd", "/%00", "/translate/", "/" + "a" * 3000])
    return f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()


def wrong_method(chance: random.Random) -> bytes:
    method = chance.choice(["GET", "PUT", "DELETE", "PATCH", "BREW"])
    return f"{method} /translate HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()


def bad_number(chance: random.Random) -> bytes:
    value = chance.choice([b"1e999", b"-1", b"1" * 300, b'"1"', b"true", b"[]", b"0.5.5"])
    name = chance.choice([b"alternatives", b"beam"])
    path = "/v1/translate" if name == b"beam" else "/translate"
    body = b'{"q":"a","texts":"a","source":"aa","target":"bb","%s":%s}' % (name, value)
    return whole(body, path=path)


KINDS: dict[Callable[[random.Random], bytes], int] = {
    wrong_type: 400,
    wrong_text: 400,
    bad_json: 400,
    deep: 400,
    large: 413,
    long_text: 400,
    unknown_language: 400,
    wrong_kind: 415,
    bad_form: 400,
    bad_http: 400,
    wrong_path: 404,
    wrong_method: 405,
    bad_number: 400,
}


def check(answer: bytes, status: int, request: bytes) -> None:
    """Check that an answer has the given status and a message."""
    assert answer.startswith(b"HTTP/1.1 %d " % status), (request[:300], answer[:500])
    body = answer.partition(b"\r\n\r\n")[2]
    if body != b"Invalid HTTP request received.":  # uvicorn's own answer
        message = json.loads(body)["error"]
        assert len(message) > 10
        assert len(message) < 300
        message.encode()


def test_three_hundred_hostile_requests_leave_no_trace(bundle: Path):
    chance = random.Random(1)
    makers = [*KINDS] * (NUM_REQUESTS // len(KINDS) + 1)
    chance.shuffle(makers)
    with served(bundle, "--threads", 1) as (process, url, log):
        port = int(url.rpartition(":")[2])

        def attack(maker: Callable[[random.Random], bytes], seed: int) -> None:
            request = maker(random.Random(seed))
            check(raw(port, request), KINDS[maker], request)
            if seed % 4 == 0:  # one client disconnects midway, and one before the answer
                for content in (as_json()[:-5], as_json()):
                    with socket.create_connection(("127.0.0.1", port)) as connection:
                        connection.sendall(content)

        def memory() -> float:
            shown = httpx.get(f"{url}/metrics", timeout=PATIENCE).text
            return float(re.search(r"^process_resident_memory_bytes (\S+)", shown, re.M)[1])

        slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
        for connection in slow:
            connection.sendall(as_json()[:-5])
        sizes = []
        with ThreadPoolExecutor(4) as pool:
            for half in (makers[: NUM_REQUESTS // 2], makers[NUM_REQUESTS // 2 : NUM_REQUESTS]):
                list(pool.map(attack, half, range(len(half))))
                sizes.append(memory())
        for connection in slow:
            check(receive(connection), 408, b"slow")
            connection.close()
        assert httpx.get(f"{url}/health", timeout=PATIENCE).json() == {"status": "ok"}
        assert sizes[1] - sizes[0] < 20 * MEBIBYTE
        process.terminate()
        assert process.wait(PATIENCE) == 0
    statuses = {line["status"] for line in log if line["event"] == "request"}
    assert max(status for status in statuses if status != 499) < 500, statuses


@pytest.fixture
def held(bundle: Path) -> Iterator[tuple[LiveServer, threading.Event]]:
    """Serve with a queue of two requests that wait until the event is set."""
    service = make_service(bundle, max_waiting=2)
    translator = service.models.opened[0].translator
    translate, go = translator.translate, threading.Event()
    service.entered = threading.Event()

    def wait(*arguments, **options):
        service.entered.set()
        assert go.wait(PATIENCE)
        return translate(*arguments, **options)

    translator.translate = wait
    with LiveServer(service) as server:
        try:
            yield server, go
        finally:
            go.set()


def test_requests_beyond_the_limit_are_told_to_retry(held):
    server, go = held
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(server.translate, "the cat") for _ in range(2)]
        wait_for(lambda: server.service.num_open, 2)
        refused = server.post("/translate", GOOD)
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) >= 1
        assert "again later" in refused.json()["error"]
        assert httpx.get(f"{server.url}/metrics").status_code == 200  # metrics are still served
        go.set()
        assert len({future.result()["translatedText"] for future in waiting}) == 1
    assert server.post("/translate", GOOD).status_code == 200


def test_an_aborted_request_is_dropped_from_the_queue(held):
    server, go = held

    def counts() -> tuple[int, int]:
        return server.service.num_open, server.service.batcher.num_waiting

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.translate, "the cat")
        assert server.service.entered.wait(PATIENCE)
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(as_json())
            wait_for(counts, (2, 1))
        wait_for(counts, (1, 0))
        go.set()
        assert first.result()["translatedText"]


def test_a_request_that_runs_out_of_time_gets_a_message(bundle: Path):
    service, go = make_service(bundle, time_limit=0.1), threading.Event()
    translator = service.models.opened[0].translator
    translate = translator.translate

    def wait(*arguments, **options):
        assert go.wait(PATIENCE)
        return translate(*arguments, **options)

    translator.translate = wait
    with LiveServer(service) as server:
        try:
            answer = server.post("/translate", GOOD)
        finally:
            go.set()
        assert answer.status_code == 503
        assert "no answer after 0.1 seconds" in answer.json()["error"]
        assert answer.headers["Retry-After"] == "1"


def test_a_slow_body_is_refused(server: LiveServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.1)
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as connection:
        connection.sendall(as_json()[:-1])
        check(receive(connection), 408, b"slow")


def test_a_failure_of_the_model_gives_one_message_and_no_text(held, caplog):
    server, go = held
    go.set()
    translator = server.service.models.opened[0].translator

    def fail(*_, **__):
        raise RuntimeError("the secret text")

    translate, translator.translate = translator.translate, fail
    answer = server.post("/translate", GOOD)
    assert answer.status_code == 500
    assert answer.json()["error"].startswith("The server failed.")
    translator.translate = translate
    assert server.post("/translate", GOOD).status_code == 200
