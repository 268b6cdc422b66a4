"""The server's page in a real browser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright (extra system) isn't installed")

from playwright.sync_api import expect as expect

PROMPT = "The old king"
WIDE, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
KEY = "open sesame"
OpenPage = Callable[..., Any]


def generate(page: Any, prompt: str | None = None) -> None:
    """Starts, and waits until both texts are done."""
    if prompt is not None:
        page.fill("textarea", prompt)
    page.click("text=Generate")
    finish(page)


def finish(page: Any) -> None:
    """Waits until both texts are done."""
    expect(page.get_by_role("status")).to_contain_text("Strategy")


def text_of(page: Any, side: int) -> str:
    """A side's text without the prompt, as the page holds it: what CSS adds is no part of it."""
    return str(page.locator(".tokens").nth(side).evaluate("box => box.textContent"))
