"""The server's page in a real browser. Needs Playwright, and a Chromium, whose path FASTBERT_CHROMIUM may give."""

import os

import pytest

pytest.importorskip("playwright", reason="needs a browser: pip install playwright; playwright install chromium")
pytest.importorskip("orjson", reason="needs the serve extra")
pytest.importorskip("prometheus_client", reason="needs the serve extra")
pytest.importorskip("starlette", reason="needs the serve extra")
pytest.importorskip("uvicorn", reason="needs the serve extra")
from playwright.sync_api import Error, expect, sync_playwright

pytest_plugins = ("service_fixtures",)
pytestmark = pytest.mark.once


def test_the_page_finds_neighbours_and_shows_the_load(server):
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(
                executable_path=os.environ.get("FASTBERT_CHROMIUM"), args=["--no-sandbox"]
            )
        except Error as error:
            pytest.skip(f"no Chromium starts here: {str(error).splitlines()[0]}")
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
        browser.close()
