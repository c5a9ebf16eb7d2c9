"""A browser for the tests of pages."""

import shutil

import pytest


def chromium():
    """Yield a Chromium, playwright's own or this machine's, and close it; where there is none the test is skipped."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    installed = filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    with playwright.sync_playwright() as started:
        for program in (None, *installed):
            try:
                opened = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
            except playwright.Error:
                continue
            yield opened
            opened.close()
            return
    pytest.skip("neither playwright nor this machine has a Chromium; run: playwright install chromium")
