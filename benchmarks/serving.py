"""Measure `nmt-moe serve`: batching across requests, overhead and behaviour under heavy load.

    python -m benchmarks.serving en-de --text test.en --source en --target de --threads 2
    python -m benchmarks.serving en-de --text test.en --source en --target de --soak 300

Each server runs in its own process; clients are threads of this process, each with one connection.
Servers with and without batching across requests are measured in turn, with several clients and
with one. The overhead is the time that a client waits, minus the time that the server spends in
the translator according to the server's metrics. The machine's load is printed below the table,
because other programs on a shared machine increase the measured times.

`--soak` sends as many requests as an hour has seconds, within the given number of seconds.
The requests contain single texts, lists or texts of several lines; some ask for alternatives, and
some use a different API. They come from several clients, and some clients disconnect early. Every
answer is compared with the translator's own.
"""

import argparse
import http.client
import json
import os
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from benchmarks import timing
from nmt_moe.inference import Translator

COLUMNS = ["clients", "batching", "sentences/s", "p50, ms", "p95, ms", "requests / batch", "spread"]
HOUR = 3600
COUNTED = [
    "nmt_moe_batch_seconds_sum",
    "nmt_moe_batch_requests_count",
    "nmt_moe_batch_requests_sum",
]
WORKER = """
import sys
from nmt_moe.serving import Models, ServerSettings, Service, serve
folder, threads, is_batching = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
service = Service(Models.open([folder]), ServerSettings(), threads, is_batching)
serve(service, "127.0.0.1", 0)
"""


@contextmanager
def served(folder: str, threads: int, is_batching: bool) -> Iterator[str]:
    """Run a server, and yield its host and port."""
    command = [sys.executable, "-c", WORKER, folder, str(threads), str(is_batching)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=timing.REPOSITORY)
    assert process.stderr is not None
    try:
        address = json.loads(process.stderr.readline())["address"]
        drain = threading.Thread(target=process.stderr.read, daemon=True)
        drain.start()
        yield address.removeprefix("http://").removesuffix("/")
        process.terminate()
        assert process.wait(120) == 0
    finally:
        process.kill()
        process.wait()


class Client:
    """One connection to a server."""

    def __init__(self, host: str, source: str, target: str) -> None:
        self._connection = http.client.HTTPConnection(host, timeout=600)
        self._languages = {"source": source, "target": target}

    def post(self, path: str, **fields: Any) -> Any:
        """Send JSON, check that the status is 200, and return the answer."""
        headers = {"Content-Type": "application/json"}
        self._connection.request("POST", path, json.dumps(fields), headers)
        answer = self._connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise AssertionError(f"status {answer.status}: {content[:200]!r}")
        return json.loads(content)

    def translate(self, q: str | Sequence[str], **fields: Any) -> Any:
        """Translate with LibreTranslate's API, and return the texts and alternatives."""
        return self.post("/translate", q=q, **self._languages, **fields)

    def explain(self, text: str) -> str:
        """Translate with the project's own API, and return the translation."""
        return self.post("/v1/translate", texts=text, **self._languages)["translations"][0]["text"]

    def leave(self, text: str) -> None:
        """Send a request and disconnect without waiting for the answer."""
        body = json.dumps({"q": text, **self._languages})
        self._connection.request("POST", "/translate", body, {"Content-Type": "application/json"})
        self._connection.close()


def read_metric(host: str, name: str) -> float:
    """Return the value of a server's metric."""
    connection = http.client.HTTPConnection(host, timeout=600)
    connection.request("GET", "/metrics")
    shown = connection.getresponse().read().decode()
    connection.close()
    found = re.search(rf"^{name} (\S+)", shown, re.MULTILINE)
    assert found is not None, name
    return float(found[1])


def ask_at_once(
    host: str, args: argparse.Namespace, texts: Sequence[str], num_clients: int
) -> tuple[float, list[float]]:
    """Send requests from all clients in parallel; each client sends one after another.

    Returns:
        How many sentences were translated per second, and how many seconds each request took.
    """

    def ask(own: Sequence[str]) -> list[float]:
        client = Client(host, args.source, args.target)
        waited = []
        for text in own:
            begin = time.perf_counter()
            client.translate(text)
            waited.append(time.perf_counter() - begin)
        return waited

    shares = [texts[number::num_clients] for number in range(num_clients)]
    begin = time.perf_counter()
    with ThreadPoolExecutor(num_clients) as pool:
        waited = [seconds for own in pool.map(ask, shares) for seconds in own]
    return len(texts) / (time.perf_counter() - begin), waited


def measure(args: argparse.Namespace, texts: Sequence[str]) -> None:
    """Measure both servers in turn, and print the table."""
    rates: dict[tuple[int, bool], list[float]] = {}
    waits: dict[tuple[int, bool], list[float]] = {}
    batches: dict[tuple[int, bool], list[float]] = {}
    added, loads = [], []
    with (
        served(args.folder, args.threads, True) as batching,
        served(args.folder, args.threads, False) as single,
    ):
        for number in range(-1, args.rounds):
            for num_clients in (args.clients, 1):
                own = texts[: args.requests * num_clients]
                for is_batching, host in ((True, batching), (False, single)):
                    before = [read_metric(host, name) for name in COUNTED]
                    rate, waited = ask_at_once(host, args, own, num_clients)
                    after = [read_metric(host, name) for name in COUNTED]
                    inside, num_batches, num_requests = map(float.__sub__, after, before)
                    if number < 0:
                        continue  # the first round loads the experts from disk
                    key = num_clients, is_batching
                    rates.setdefault(key, []).append(rate)
                    waits.setdefault(key, []).extend(waited)
                    batches.setdefault(key, []).append(num_requests / num_batches)
                    if num_clients == 1 and is_batching:
                        added.append(1000 * (sum(waited) - inside) / len(waited))
            loads.append(os.getloadavg()[0])
            timing.say(f"{number + 2} of {args.rounds + 1} rounds done")
    print(timing.markdown_table(COLUMNS, [_row(key, rates, waits, batches) for key in rates]))
    many = {key[1]: statistics.median(own) for key, own in rates.items() if key[0] != 1}
    print(f"\nBatching gives {many[True] / many[False]:.2f} times as many sentences per second.")
    print(f"With one client, the server adds {statistics.median(added):.1f} ms to the translator's")
    print(f"time (rounds: {', '.join(f'{value:.1f}' for value in added)}).")
    print(f"\n{timing.describe_hardware('cpu', args.threads)}; load {min(loads):.1f} to")
    print(f"{max(loads):.1f}, {args.requests} requests per client, {args.rounds} rounds.")
    everything = {str(key): {"rates": rates[key], "waits": waits[key]} for key in rates}
    timing.write_json(args.json, args, cpu_load(loads), {**everything, "added": added})


def cpu_load(loads: Sequence[float]) -> str:
    """Describe the machine and its load."""
    return f"{timing.cpu_model()}, load {min(loads):.1f} to {max(loads):.1f}"


def _row(key: tuple[int, bool], rates: dict, waits: dict, batches: dict) -> list[str]:
    own, waited = rates[key], sorted(waits[key])
    percentile = [1000 * waited[int(share * (len(waited) - 1))] for share in (0.5, 0.95)]
    spread = (max(own) - min(own)) / statistics.median(own)
    return [
        str(key[0]),
        "yes" if key[1] else "no",
        f"{statistics.median(own):.1f}",
        *(f"{value:.0f}" for value in percentile),
        f"{statistics.median(batches[key]):.1f}",
        f"{100 * spread:.0f} %",
    ]


@dataclass
class Soak:
    """An hour's worth of requests.

    Attributes:
        texts: The sentences to translate.
        expected: The translator's own answer for each sentence.
        alternatives: The translator's alternatives for each sentence when two are requested.
    """

    texts: list[str]
    expected: dict[str, str]
    alternatives: dict[str, list[str]]

    @classmethod
    def prepare(cls, folder: str, texts: Sequence[str]) -> "Soak":
        """Compute the expected answers with the translator itself."""
        timing.say(f"translating {len(texts)} sentences without a server")
        found = Translator.load(folder).translate(list(texts), num_hypotheses=3)
        expected = {text: one.text for text, one in zip(texts, found, strict=True)}
        others = {
            text: list(dict.fromkeys(one.hypotheses))[1:]
            for text, one in zip(texts, found, strict=True)
        }
        return cls(list(texts), expected, others)

    def ask(self, client: Client, chance: random.Random) -> bool:
        """Send one request, and return whether its answer equals the translator's own."""
        text, other = chance.sample(self.texts, 2)
        want, want_other = self.expected[text], self.expected[other]
        kind = chance.randrange(10)
        if kind == 0:
            client.leave(text)
            return True
        if kind == 1:
            found = client.translate([text, " ", other])["translatedText"]
            return found == [want, " ", want_other]
        if kind == 2:
            found = client.translate(f"{text}\n\n{other}\n7")["translatedText"]
            return found == f"{want}\n\n{want_other}\n7"
        if kind == 3:
            answer = client.translate(text, alternatives=2)
            return (answer["translatedText"], answer["alternatives"]) == (
                want,
                self.alternatives[text],
            )
        if kind == 4:
            return client.explain(text) == want
        return client.translate(text)["translatedText"] == want

    def run(
        self, host: str, languages: tuple[str, str], num_requests: int, num_clients: int
    ) -> tuple[int, int, float]:
        """Send requests from several clients at once.

        Returns:
            How many requests got no answer, how many got a wrong answer or another request's
            answer, and how many seconds all of them took.
        """
        numbers = iter(range(num_requests))
        lock = threading.Lock()
        counts = {"lost": 0, "wrong": 0}
        begin = time.perf_counter()

        def work() -> None:
            client = Client(host, *languages)
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                try:
                    result = "right" if self.ask(client, random.Random(number)) else "wrong"
                except (OSError, AssertionError, http.client.HTTPException) as error:
                    timing.say(f"request {number}: {type(error).__name__}: {error}")
                    client, result = Client(host, *languages), "lost"
                with lock:
                    if result in counts:
                        counts[result] += 1
                    if number % 300 == 0:
                        timing.say(f"{number} requests, {time.perf_counter() - begin:.0f} s")

        workers = [threading.Thread(target=work) for _ in range(num_clients)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return counts["lost"], counts["wrong"], time.perf_counter() - begin


def soak(args: argparse.Namespace, texts: Sequence[str]) -> bool:
    """Send an hour's worth of requests, and return whether all of them succeeded in time."""
    plan = Soak.prepare(args.folder, texts[:400])
    with served(args.folder, args.threads, True) as host:
        before = read_metric(host, "process_resident_memory_bytes")
        lost, wrong, seconds = plan.run(
            host, (args.source, args.target), args.soak_requests, args.clients
        )
        grown = read_metric(host, "process_resident_memory_bytes") - before
        num_batches = read_metric(host, "nmt_moe_batch_requests_count")
        mean = read_metric(host, "nmt_moe_batch_requests_sum") / num_batches
    print(f"{args.soak_requests} requests from {args.clients} clients in {seconds:.0f} s:")
    print(f"{lost} lost, {wrong} mixed up; {mean:.1f} requests per batch;")
    print(f"memory grew by {grown / 1e6:.0f} MB;")
    print(f"{timing.describe_hardware('cpu', args.threads)}, load {os.getloadavg()[0]:.1f}.")
    return lost == wrong == 0 and seconds <= args.soak


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="bundle for one language pair")
    parser.add_argument("--text", required=True, help="file of short sentences, one per line")
    parser.add_argument("--source", default="en", help="language of the text (en)")
    parser.add_argument("--target", default="de", help="language of the translations (de)")
    parser.add_argument("--clients", type=int, default=16, help="simultaneous clients (16)")
    parser.add_argument("--requests", type=int, default=6, help="requests per client and round (6)")
    parser.add_argument("--max-words", type=int, default=12, help="maximum words per sentence (12)")
    parser.add_argument(
        "--soak",
        type=float,
        metavar="SECONDS",
        help="send an hour's worth of requests within this many seconds",
    )
    parser.add_argument("--soak-requests", type=int, default=HOUR, help="requests in total (3600)")
    timing.add_common_flags(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program, and return its exit status."""
    args = parse(argv)
    timing.prepare(args)
    with open(args.text, encoding="utf-8") as file:
        lines = (line.strip() for line in file)
        short = (line for line in lines if 3 <= len(line.split()) <= args.max_words)
        texts = list(islice(dict.fromkeys(short), max(400, args.requests * args.clients)))
    if args.soak is not None:
        return 0 if soak(args, texts) else 1
    measure(args, texts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
