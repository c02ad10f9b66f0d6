"""The operation of a server: keys, origins, metrics, logs, documentation and shutdown."""

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from nmt_moe import Translator
from nmt_moe.cli import main
from nmt_moe.serving import ServerSettings, read_keys
from nmt_moe.serving.keys import Keys
from tests.support.serving import PATIENCE, LiveServer, make_service, served, wait_for

FIELDS = {"q": "the cat", "source": "aa", "target": "bb"}


def call(*arguments: object):
    return CliRunner().invoke(main, ["serve", *map(str, arguments)])


def test_keys_are_required_if_there_are_any(bundle: Path, tmp_path: Path):
    path = tmp_path / "keys"
    path.write_text("# for tests\nfirst\n\n second \n")
    keys = read_keys(path)
    assert keys == ("first", "second")
    with LiveServer(make_service(bundle, keys=keys)) as server:
        for headers, key, status in (
            ({}, None, 403),
            ({}, "third", 403),
            ({}, "first", 200),
            ({"Authorization": "Bearer second"}, None, 200),
            ({"Authorization": "Basic second"}, None, 403),
        ):
            answer = server.post("/translate", {**FIELDS, "api_key": key}, **headers)
            assert answer.status_code == status, answer.text
            if status == 403:
                assert "API key" in answer.json()["error"]
        for path_of in ("/detect", "/v1/translate", "/v2/translate"):
            content = {"q": "a", "texts": "a", "text": "a", "target": "bb", "target_lang": "bb"}
            assert server.post(path_of, content).status_code == 403
        assert httpx.get(f"{server.url}/v2/languages").status_code == 403
        assert httpx.get(f"{server.url}/v2/usage").status_code == 403
        settings = httpx.get(f"{server.url}/frontend/settings").json()
        assert settings["keyRequired"] is True


def test_key_files_are_checked(tmp_path: Path):
    path = tmp_path / "keys"
    for content, message in ((b"\n# a\n", "no keys"), (b"a b", "line 1"), (b"\xff", "UTF-8")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_keys(path)
    assert Keys(["é"]).know("é")
    assert not Keys(["a", "b"]).know("ab")


def test_only_named_origins_may_send_requests(bundle: Path, server: LiveServer):
    other = {"Origin": "https://other.org"}
    assert "access-control-allow-origin" not in server.post("/translate", FIELDS, **other).headers
    with LiveServer(make_service(bundle, origins=("https://good.org",))) as open_server:
        good = open_server.post("/translate", FIELDS, Origin="https://good.org")
        assert good.headers["access-control-allow-origin"] == "https://good.org"
        bad = open_server.post("/translate", FIELDS, **other)
        assert "access-control-allow-origin" not in bad.headers
    with pytest.raises(ValueError, match="must be addresses such as"):
        ServerSettings(origins=("good.org",))


def test_metrics_count_requests_characters_and_batches(bundle: Path):
    with LiveServer(make_service(bundle)) as server:
        server.translate(["the cat", "a dog"])
        server.post("/translate", {})
        shown = httpx.get(f"{server.url}/metrics")
    assert shown.headers["content-type"].startswith("text/plain")
    for line in (
        'nmt_moe_requests_total{path="/translate",status="200"} 1.0',
        'nmt_moe_requests_total{path="/translate",status="400"} 1.0',
        "nmt_moe_characters_total 12.0",
        "nmt_moe_batch_requests_count 1.0",
        "nmt_moe_batch_lines_sum 2.0",
        "nmt_moe_open_requests 0.0",
    ):
        assert line in shown.text.splitlines()


def test_the_documentation_describes_every_path_and_loads_nothing(server: LiveServer):
    document = httpx.get(f"{server.url}/openapi.json").json()
    paths = set(document["paths"])
    assert {"/translate", "/detect", "/languages", "/v1/translate", "/v2/translate"} <= paths
    schema = document["paths"]["/translate"]["post"]["requestBody"]["content"]["application/json"]
    assert schema["schema"]["required"] == ["q", "source", "target"]
    page = httpx.get(f"{server.url}/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for path in paths:
        assert path in page.text
    assert set(re.findall(r"https?://[^\s'\"<]+", page.text)) == {
        f"http://127.0.0.1:5000{path}" for path in re.findall(r"5000(/[\w/]+)", page.text)
    }


def is_closed(url: str) -> bool:
    """Return whether the server takes no more connections."""
    try:
        httpx.get(f"{url}/metrics", timeout=PATIENCE)
    except (httpx.NetworkError, httpx.RemoteProtocolError):
        return True
    return False


def test_sigterm_finishes_what_is_in_flight(bundle: Path, translator: Translator):
    texts = ["the cat sees a dog", "a big red house"]
    expected = [one.text for one in translator.translate(texts)]
    body = json.dumps({**FIELDS, "q": texts}).encode()
    stopping = threading.Event()

    def in_two_parts() -> Iterator[bytes]:
        yield body[:20]
        assert stopping.wait(PATIENCE)
        yield body[20:]

    with served(bundle, "--threads", 1) as (process, url, log), ThreadPoolExecutor(1) as pool:

        def ask() -> httpx.Response:
            headers = {"Content-Type": "application/json"}
            return httpx.post(
                f"{url}/translate", content=in_two_parts(), headers=headers, timeout=PATIENCE
            )

        answer = pool.submit(ask)
        wait_for(lambda: "nmt_moe_open_requests 1.0" in httpx.get(f"{url}/metrics").text, True)
        process.terminate()
        wait_for(lambda: is_closed(url), True)
        stopping.set()
        assert answer.result().json()["translatedText"] == expected
        assert process.wait(PATIENCE) == 0
    assert log[0]["event"] == "serving"
    assert log[-1]["event"] == "ended"
    [line] = [one for one in log if one.get("path") == "/translate"]
    assert line["status"] == 200
    assert line["ms"] > 0
    assert not any(word in json.dumps(log) for word in ("house", expected[0]))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_server_as_soon_as_it_is_ready(bundle: Path, number: int):
    with served(bundle, "--threads", 1) as (process, _, log):
        process.send_signal(number)
        assert process.wait(PATIENCE) == 0
    assert [one["event"] for one in log] == ["serving", "ended"]


def test_mistakes_end_with_one_message(bundle: Path, tmp_path: Path, server: LiveServer):
    for arguments, words in (
        ((tmp_path,), "config.json"),
        ((bundle, bundle), "both translate from aa into bb"),
        ((bundle, "--max-items", 0), "`--max-items` must be from 1 to 100000, but is 0"),
        ((bundle, "--keys", tmp_path / "no"), "no"),
        ((bundle, "--port", 70000), "`--port` must be from 0 to 65535"),
        ((bundle, "--port", server.port), f"cannot listen on 127.0.0.1, port {server.port}"),
        ((bundle, "--threads", 0), "`--threads` must be"),
        ((bundle, "--allow-origin", "x"), "addresses such as"),
    ):
        result = call(*arguments)
        assert result.exit_code == 1, result.output
        assert "nmt-moe serve: error: " in result.stderr
        assert words in result.stderr


def test_without_the_extra_the_command_says_what_to_install(bundle: Path):
    code = (
        "import sys; sys.modules['fastapi'] = None\n"
        "from nmt_moe.cli import main\n"
        f"main(['serve', {str(bundle)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    first, second = done.stderr.splitlines()
    assert first == f"loading {bundle} ..."
    assert " serve: error: the server needs packages" in second
    assert "`fastapi`: pip install 'nmt-moe[serve]'" in done.stderr
