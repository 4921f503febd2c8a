"""A headless Chromium for tests, through playwright: `from browser import browser`; skipped where either is absent.

Pictures go to runs/screenshots/, or to the folder SCREENSHOTS.
"""

import os
import shutil
from pathlib import Path

import pytest


def picture(page, name):
    """Keep what the page looks like, for people to look at."""
    folder = Path(os.environ.get("SCREENSHOTS", Path(__file__).parent.parent / "runs" / "screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name}.png")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("the browser tests need Chromium (Debian: apt-get install chromium)")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()
