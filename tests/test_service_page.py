"""The server's page in a real browser. Needs Playwright, and a Chromium, whose path FASTBERT_CHROMIUM may give."""

import os

import pytest

pytest.importorskip("playwright", reason="needs a browser: pip install playwright; playwright install chromium")
pytest.importorskip("orjson", reason="needs the serve extra")
pytest.importorskip("prometheus_client", reason="needs the serve extra")
pytest.importorskip("starlette", reason="needs the serve extra")
pytest.importorskip("uvicorn", reason="needs the serve extra")
from playwright.sync_api import Error, expect, sync_playwright

from service_models import Process, make_folder

pytest_plugins = ("service_fixtures",)
pytestmark = pytest.mark.once


@pytest.fixture
def browser():
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(
                executable_path=os.environ.get("FASTBERT_CHROMIUM"), args=["--no-sandbox"]
            )
        except Error as error:
            pytest.skip(f"no Chromium starts here: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


def test_the_page_finds_neighbours_and_shows_the_load(server, browser):
    page = browser.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(f"{server.url}/")
    expect(page.locator("#model")).to_contain_text("texts of up to 64 tokens")
    page.fill("#text", "a b c")
    page.fill("#others", "x y z\na b c\n<b>d</b>")
    page.click("button")
    rows = page.locator("#neighbours tr")
    expect(rows).to_have_count(3)
    expect(rows.first).to_contain_text("a b c")
    expect(rows.first).to_contain_text("1.000")
    expect(page.locator("#neighbours")).to_contain_text("<b>d</b>")  # shown as text, not as HTML
    expect(page.locator("#said")).to_contain_text("tokens in")
    page.wait_for_function("Number(document.getElementById('latency').textContent) > 0")
    assert errors == []
    page.fill("#others", "")
    page.click("button")
    expect(page.locator("#said")).to_contain_text("cannot be empty")
    # With --prometheus-port the numbers are elsewhere, and the page showed zeros.
    page.route("**/metrics", lambda route: route.fulfill(status=404, content_type="application/json", body="{}"))
    expect(page.locator("#queue")).to_have_text("no answer")


def test_a_model_can_be_chosen_where_there_are_several(tmp_path, browser):
    """The page named the first model, whichever one answered. A label names each field."""
    models = [f"{kind}={make_folder(tmp_path / kind, kind)}" for kind in ("ranks", "texts", "masks")]
    process = Process(*models)
    try:
        page = browser.new_page()
        page.goto(f"{process.url}/")
        expect(page.locator("#model")).to_contain_text("also texts, masks")
        page.get_by_label("Sentences to compare it with").fill("a b c\nd")
        page.get_by_label("Model").select_option("texts")
        page.click("button")
        expect(page.locator("#neighbours tr")).to_have_count(2)
        page.get_by_label("Model").select_option("ranks")
        page.click("button")
        expect(page.locator("#said")).to_contain_text("'ranks' gives labels and scores of pairs, not vectors")
        expect(page.locator("#neighbours tr")).to_have_count(0)
    finally:
        process.end()
