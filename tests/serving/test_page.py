"""The server's page in a real Chromium, used with a mouse, with a keyboard and on a phone."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Error, Page, Route, expect

from nmt_moe import Translator
from tests.support.browser import needs_chromium, open_browser
from tests.support.serving import PATIENCE, LiveServer, make_service

TEXT = "the big dog sees a red tree"
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
expect.set_options(timeout=1000 * PATIENCE)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


def open_page(browser: Browser, server: LiveServer, **options) -> Page:
    """Open the page, and record the errors and requests that the tests check."""
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(1000 * PATIENCE)
    page.complaints, page.asked = [], []
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("console", lambda one: page.complaints.append(one.text) if one.type == "error" else 0)
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(f"{server.url}/")
    expect(page.locator("#target option")).not_to_have_count(0)
    return page


@pytest.fixture
def page(browser: Browser, multilingual: LiveServer) -> Iterator[Page]:
    page = open_page(browser, multilingual)
    page.select_option("#source", "en")
    page.select_option("#target", "de")
    yield page
    assert page.complaints == []
    own = (f"{multilingual.url}/", "data:,")
    assert [url for url in page.asked if not url.startswith(own)] == []
    page.context.close()


@pytest.fixture(scope="module")
def expected(many: Path) -> str:
    return Translator.load(many).translate(TEXT, "de", beam_size=4)[0].text


def translations(page: Page) -> list[str]:
    return [url for url in page.asked if url.endswith("/v1/translate")]


@needs_chromium
def test_text_is_translated_when_typing_ends(page: Page, expected: str):
    page.locator("#input").press_sequentially(TEXT, delay=5)
    expect(page.locator("#output")).to_have_text(expected)
    assert len(translations(page)) < len(TEXT) / 4
    assert page.locator("#alternatives li").count() >= 1
    page.fill("#input", " \n")
    expect(page.locator("#output")).to_have_text("")
    expect(page.locator("#results")).to_be_hidden()


@needs_chromium
def test_a_word_shows_its_source_words_and_experts(page: Page, multilingual: LiveServer):
    page.fill("#input", f"{TEXT}\n123\ncat")
    words = page.locator("#output .word")
    expect(words.first).to_be_visible()
    fields = {"texts": [f"{TEXT}\n123\ncat"], "source": "en", "target": "de", "alternatives": 3}
    [answer] = multilingual.post("/v1/translate", fields).json()["translations"]
    sentence = answer["lines"][0]["sentences"][0]
    index = next(number for number, links in enumerate(sentence["links"]) if links)
    words.nth(index).hover()
    shown = page.locator("#word")
    expect(shown.locator("strong")).to_have_text(sentence["words"][index]["text"])
    source, share = sentence["links"][index][0]
    name = sentence["source_words"][source]["text"]
    expect(shown.locator("dd").first).to_contain_text(f"{name} {100 * share:.0f} %")
    expect(page.locator("#read .word").nth(source)).to_have_class("word linked")
    expert = sentence["experts"][sentence["words"][index]["first"]][0][0]
    expect(shown.locator("dt")).to_have_text(["comes from", "read by", "predicted by"])
    expect(shown.locator("dd").nth(2)).to_contain_text(f"expert {expert}: ")
    page.locator("#read .word").first.hover()
    expect(shown.locator("dt").first).to_have_text("goes into")


@needs_chromium
def test_words_are_reached_by_keyboard(page: Page):
    page.fill("#input", TEXT)
    words = page.locator("#output .word")
    expect(words.first).to_be_visible()
    page.focus("#input")
    page.keyboard.press("Tab")
    expect(words.first).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(words.nth(1)).to_be_focused()
    expect(page.locator("#word strong")).to_have_text(words.nth(1).inner_text())
    page.keyboard.press("End")
    expect(words.last).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.locator("#copy")).to_be_focused()


@needs_chromium
def test_markup_is_shown_as_text(page: Page):
    text = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
    page.fill("#input", text)
    expect(page.locator("#output .word").first).to_be_visible()
    page.route("**/v1/translate", lambda route: answer_with(route, text))
    page.fill("#input", "cat")
    expect(page.locator("#output")).to_have_text(text)
    expect(page.locator("#alternatives li")).to_have_text([text])
    assert page.locator("#output img, #output script, #results img, #results script").count() == 0
    assert page.evaluate("window.hacked") is None


def answer_with(route: Route, text: str) -> None:
    one = {"text": text, "alternatives": [text], "source": "en", "target": "de", "lines": [None]}
    route.fulfill(json={"translations": [{**one, "confidence": 100.0, "num_experts": 0}]})


@needs_chromium
def test_an_old_answer_does_not_replace_a_newer_one(page: Page):
    held: list[Route] = []
    page.route("**/v1/translate", lambda route: held.append(route))
    page.fill("#input", "cat")
    while len(held) < 1:
        page.wait_for_timeout(20)
    page.fill("#input", "dog")
    while len(held) < 2:
        page.wait_for_timeout(20)
    answer_with(held[1], "newer")
    expect(page.locator("#output")).to_have_text("newer")
    with suppress(Error):  # the page has cancelled the request
        answer_with(held[0], "older")
    page.wait_for_timeout(100)
    expect(page.locator("#output")).to_have_text("newer")


@needs_chromium
def test_languages_are_swapped(page: Page, expected: str):
    page.fill("#input", TEXT)
    expect(page.locator("#output")).to_have_text(expected)
    page.click("#swap")
    expect(page.locator("#source")).to_have_value("de")
    expect(page.locator("#target")).to_have_value("en")
    expect(page.locator("#input")).to_have_value(expected)
    expect(page.locator("#status")).to_have_text("")


@needs_chromium
def test_errors_are_shown(page: Page):
    page.route("**/v1/translate", lambda r: r.fulfill(status=400, json={"error": "Too many."}))
    page.fill("#input", TEXT)
    expect(page.locator("#status")).to_have_text("Too many.")
    page.unroute("**/v1/translate")
    page.route("**/v1/translate", lambda route: route.abort())
    page.fill("#input", "cat")
    expect(page.locator("#status")).to_have_text("The server cannot be reached.")
    page.complaints.clear()  # Chromium has reported both failures


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_everything_without_scrolling_sideways(
    browser: Browser, multilingual: LiveServer, scheme
):
    page = open_page(browser, multilingual, color_scheme=scheme, **PHONE)
    page.fill("#input", f"{TEXT} " * 3 + "x" * 90)
    words = page.locator("#output .word")
    expect(words.first).to_be_visible()
    words.first.tap()
    expect(page.locator("#word strong")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    is_dark = sum(map(int, color.removeprefix("rgb(").removesuffix(")").split(","))) < 200
    assert is_dark == (scheme == "dark")
    assert page.complaints == []
    page.context.close()


@needs_chromium
def test_a_key_is_requested_if_one_is_needed(browser: Browser, bundle: Path, page: Page):
    assert page.locator("#key").is_hidden()
    with LiveServer(make_service(bundle, keys=("right",))) as server:
        guarded = open_page(browser, server)
        guarded.fill("#input", "cat")
        expect(guarded.locator("#status")).to_contain_text("An API key is ")
        guarded.fill("#key", "right")
        guarded.keyboard.press("Tab")
        expect(guarded.locator("#output .word").first).to_be_visible()
        guarded.context.close()


def test_the_page_refers_to_no_other_server_and_its_policy_allows_none(server: LiveServer):
    answer = httpx.get(f"{server.url}/")
    assert "//" not in answer.text.replace("// ", "")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert policy.count("'sha256-") == 2
