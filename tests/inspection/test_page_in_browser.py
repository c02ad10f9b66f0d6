"""In a real browser, a report's page has no errors, sends no requests, and fits the window."""

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from nmt_moe.inspection import Part, make_report, render_page
from tests.inspection.test_report import HOSTILE, REFERENCES, SHORT, TEXT
from tests.support.browser import needs_chromium, open_browser
from tests.support.bundles import make_bundle

pytestmark = needs_chromium
PATIENCE = 60_000  # milliseconds


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("browser")
    bundle = make_bundle(folder, description=SHORT)[0]
    path = folder / "report.html"
    path.write_text(render_page(make_report(bundle, [Part("text", TEXT, REFERENCES)])), "utf-8")
    return path.as_uri()


def open_page(browser: Browser, address: str, **options: Any) -> tuple[Page, list[str]]:
    """Open the page; return it and a list of its errors and its requests for other addresses."""
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(PATIENCE)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text))
    page.on("dialog", lambda dialog: faults.append(dialog.message))
    page.on("request", lambda one: faults.append(one.url) if one.url != address else None)
    page.goto(address)
    return page, faults


@pytest.mark.parametrize("width", [320, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_and_causes_no_errors(
    browser: Browser, address: str, width: int, scheme: str
):
    page, faults = open_page(
        browser, address, viewport={"width": width, "height": 700}, color_scheme=scheme
    )
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    # Wide tables have scroll bars of their own.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # The content security policy allows the page's own styles.
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colour == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(21, 24, 28)")
    assert page.locator("script, img, link, iframe").count() == 0
    for line in HOSTILE:
        assert page.get_by_text(line, exact=False).count() > 0
    assert faults == []


def test_the_policy_blocks_styles_that_are_not_the_pages_own(browser: Browser, address: str):
    page, _ = open_page(browser, address)
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<p id=evil style=color:red>x')")
    assert page.evaluate("getComputedStyle(evil).color") != "rgb(255, 0, 0)"


def test_details_can_be_opened_with_the_keyboard(browser: Browser, address: str):
    page, faults = open_page(browser, address)
    closed = page.locator("details:not([open])").first
    before = page.locator("details[open]").count()
    closed.locator("summary").focus()
    page.keyboard.press("Enter")
    assert page.locator("details[open]").count() == before + 1
    page.locator("nav a").first.focus()
    page.keyboard.press("Enter")
    assert page.url == f"{address}#load"
    assert faults == []
