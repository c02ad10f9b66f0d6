"""Check texts, detect languages and translate within a time limit, for all APIs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import Request

from nmt_moe.inference import Translation, find_fault
from nmt_moe.serving.batching import Batcher, Job, Search
from nmt_moe.serving.detection import Detection, Detector
from nmt_moe.serving.errors import BusyError, ClientGoneError, RequestError, show
from nmt_moe.serving.keys import Keys
from nmt_moe.serving.markup import SplitMarkup
from nmt_moe.serving.models import Model, Models, match
from nmt_moe.serving.observing import Metrics
from nmt_moe.serving.settings import MAX_ALTERNATIVES, MAX_BEAM, ServerSettings
from nmt_moe.serving.texts import Answer, SplitText

AUTO = "auto"
KEY_KINDS = ("bearer", "deepl-auth-key")
# Text that every model translates for `/health`.
PROBE = "a"


@dataclass(frozen=True)
class Wish:
    """Options of a translation request.

    Attributes:
        source: Source language, one of the server's; "auto" to detect the language of each text.
        target: Target language, one of the server's.
        format: Format of the texts, "text" or "html".
        alternatives: Number of further translations of each text.
        beam: Beam size; None for the bundle's default.
        with_experts: Whether to return the experts of each piece.
        length_penalty_alpha: Length penalty; None for the bundle's default.
        coverage_penalty_beta: Coverage penalty; None for the bundle's default.
    """

    source: str
    target: str
    format: Literal["text", "html"] = "text"
    alternatives: int = 0
    beam: int | None = None
    with_experts: bool = False
    length_penalty_alpha: float | None = None
    coverage_penalty_beta: float | None = None

    def search(self, model: Model) -> Search:
        """Return the search to run with a model."""
        beam = model.translator.defaults.beam_size if self.beam is None else self.beam
        return Search(
            model.translator,
            model.target_option(self.target),
            max(beam, self.alternatives + 1),
            self.alternatives + 1,
            self.with_experts,
            self.length_penalty_alpha,
            self.coverage_penalty_beta,
        )


@dataclass(frozen=True)
class Answered:
    """A text's translation.

    Attributes:
        detection: Detected or given language of the text.
        model: The model that translated the text; None for a text already in the target language.
        answer: Translation of the text.
    """

    detection: Detection
    model: Model | None
    answer: Answer


class Service:
    """The models of a server, and the queue of requests for them.

    Attributes:
        models: The bundles, by language pair.
        settings: Limits of the server.
        keys: The API keys that are accepted.
        metrics: Counts and times.
        num_open: Number of requests being read, waiting or being translated.
        num_characters: Number of characters in all texts sent for translation.
    """

    def __init__(
        self,
        models: Models,
        settings: ServerSettings,
        num_threads: int | None = None,
        is_batching: bool = True,
    ) -> None:
        self.models, self.settings, self.keys = models, settings, Keys(settings.keys)
        self.num_open = self.num_characters = 0
        self.metrics = Metrics(lambda: self.batcher.num_waiting, lambda: self.num_open)
        self.batcher = Batcher(num_threads, is_batching, self.metrics.observe_batch)
        self._detector = Detector(models.sources)

    def check_key(self, request: Request, key: str | None) -> None:
        """Refuse a request without a valid key.

        Args:
            request: The request; its header Authorization may be `Bearer KEY` or `DeepL-Auth-Key
                KEY`.
            key: API key from a field of the request; None if it has none.

        Raises:
            RequestError: if the key is missing or wrong; the status is 403.
        """
        if not self.keys:
            return
        kind, _, value = request.headers.get("authorization", "").partition(" ")
        key = key or (value.strip() if kind.lower() in KEY_KINDS else None)
        if not key:
            raise RequestError(
                403,
                "An API key is required. Send it as `api_key` or as `Authorization: Bearer KEY`.",
            )
        if not self.keys.know(key):
            raise RequestError(403, "The API key is not valid.")

    def find_source(self, field: str, code: str) -> str:
        """Return the language that a client's code stands for, or `AUTO`.

        Raises:
            RequestError: if there is no such language.
        """
        return AUTO if code.lower() == AUTO else match(field, code, self.models.sources)

    def check_texts(self, field: str, texts: Sequence[str]) -> None:
        """Refuse too many texts, and texts that are too long or not valid.

        Raises:
            RequestError: if a text is refused; the message names it or the limit.
        """
        limits = self.settings
        if len(texts) > limits.max_items:
            raise RequestError(
                400, f"`{field}` must have at most {limits.max_items} texts, but has {len(texts)}."
            )
        num_characters = sum(map(len, texts))
        if num_characters > limits.max_characters:
            raise RequestError(
                400,
                f"`{field}` must have at most {limits.max_characters} characters, but has "
                f"{num_characters}.",
            )
        for number, text in enumerate(texts, start=1):
            _check_text(field, f"text {number}", text)

    async def detect(self, text: str) -> list[Detection]:
        """Return the server's languages, most likely first."""
        return await asyncio.to_thread(self._detector.detect, text)

    async def translate(self, request: Request, texts: Sequence[str], wish: Wish) -> list[Answered]:
        """Translate texts that have been checked.

        Raises:
            RequestError: if the language pair is not served, an option is out of range, or the time
                limit is exceeded.
            ClientGoneError: if the client has closed its connection.
        """
        _check_options(wish)
        detections = [await self._source_of(text, wish.source) for text in texts]
        models = [
            None if one.language == wish.target else self.models.find(one.language, wish.target)
            for one in detections
        ]
        num_characters = sum(map(len, texts))
        self.num_characters += num_characters
        self.metrics.characters.inc(num_characters)
        translate = self._run_markup if wish.format == "html" else self._run
        answers = await translate(request, texts, models, wish)
        parts = zip(detections, models, answers, strict=True)
        return [Answered(*part) for part in parts]

    async def probe(self, request: Request) -> None:
        """Let every model translate a token.

        Raises:
            RequestError: if a model does not answer in time.
        """
        jobs = []
        for model in self.models.opened:
            target = model.targets[0] if model.config.is_multilingual else None
            jobs.append(Job(Search(model.translator, target, 1), [PROBE]))
        await self._wait(request, jobs)

    async def _source_of(self, text: str, source: str) -> Detection:
        if source != AUTO:
            return Detection(source, 100.0)
        return (await self.detect(text))[0]

    async def _run_markup(
        self,
        request: Request,
        texts: Sequence[str],
        models: Sequence[Model | None],
        wish: Wish,
    ) -> list[Answer]:
        """Translate the texts within HTML."""
        marked = [await asyncio.to_thread(SplitMarkup, text) for text in texts]
        inner = [text for one in marked for text in one.texts]
        for text in inner:
            # Check again, because references such as &#13; have been resolved.
            _check_text("q", "a text in the HTML", text)
        owners = [model for model, one in zip(models, marked, strict=True) for _ in one.texts]
        found = iter(await self._run(request, inner, owners, wish))
        return [
            _join_markup(one, [next(found) for _ in one.texts], wish.alternatives) for one in marked
        ]

    async def _run(
        self,
        request: Request,
        texts: Sequence[str],
        models: Sequence[Model | None],
        wish: Wish,
    ) -> list[Answer]:
        """Translate texts in one job for each model. Texts without a model stay unchanged."""
        split = [
            SplitText(text, model is not None) for text, model in zip(texts, models, strict=True)
        ]
        searches = [None if model is None else wish.search(model) for model in models]
        jobs: dict[Search | None, Job] = {}
        for search, text in zip(searches, split, strict=True):
            if search is not None and text.wanted:
                jobs.setdefault(search, Job(search, [])).lines.extend(text.wanted)
        results = await self._wait(request, list(jobs.values()))
        lines = {search: iter(own) for search, own in zip(jobs, results, strict=True)}
        return [
            text.join([next(lines[search]) for _ in text.wanted], wish.alternatives)
            for search, text in zip(searches, split, strict=True)
        ]

    async def _wait(self, request: Request, jobs: list[Job]) -> list[list[Translation]]:
        """Queue jobs and return their results, but drop the jobs if the client is gone."""
        if not jobs:
            return []
        for job in jobs:
            self.batcher.submit(job)
        left = self.settings.time_limit - (time.monotonic() - request.state.started)
        results: asyncio.Future[Any] = asyncio.gather(
            *[asyncio.wrap_future(job.done) for job in jobs]
        )
        gone: asyncio.Future[Any] = asyncio.create_task(_wait_until_gone(request))
        try:
            done, _ = await asyncio.wait(
                {results, gone}, timeout=max(left, 0.0), return_when=asyncio.FIRST_COMPLETED
            )
            if results in done:
                return results.result()
            if gone in done:
                raise ClientGoneError
            raise BusyError(
                f"There was no answer after {self.settings.time_limit:g} seconds. Send less at a "
                "time, or try again later."
            )
        finally:
            gone.cancel()
            results.cancel()
            for job in jobs:
                self.batcher.cancel(job)


async def _wait_until_gone(request: Request) -> None:
    """Return once the client has closed its connection; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _check_text(field: str, what: str, text: str) -> None:
    fault = find_fault(text)
    if fault is not None:
        raise RequestError(400, f"`{field}`: {what} {fault}. Remove it.")


def _check_options(wish: Wish) -> None:
    for name, value, low, high in (
        ("alternatives", wish.alternatives, 0, MAX_ALTERNATIVES),
        ("beam", wish.beam, 1, MAX_BEAM),
        ("length_penalty_alpha", wish.length_penalty_alpha, 0.0, 10.0),
        ("coverage_penalty_beta", wish.coverage_penalty_beta, 0.0, 10.0),
    ):
        if value is not None and not low <= value <= high:
            raise RequestError(
                400, f"`{name}` must be from {low:g} to {high:g}, but is {show(value)}."
            )


def _join_markup(split: SplitMarkup, answers: Sequence[Answer], num_alternatives: int) -> Answer:
    """Return HTML. Its n-th alternative uses each text's n-th alternative, or else the best one."""
    results = [split.join([one.text for one in answers])]
    for rank in range(
        min(num_alternatives, max([len(a.alternatives) for a in answers], default=0))
    ):
        results.append(
            split.join([([*a.alternatives[rank : rank + 1], a.text])[0] for a in answers])
        )
    best, *others = dict.fromkeys(results)
    return Answer(best, others)
