"""The page of `gpt2onnx serve` in a real browser: what it shows is what the interface gives, for hands, eyes and ears alike."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support.pages import KEY, PHONE, PROMPT, WIDE, OpenPage, expect, finish, generate, text_of
from support.serving import Running, serving

import gpt2onnx

axe_playwright = pytest.importorskip("axe_playwright_python.sync_playwright")
pytestmark = pytest.mark.system

LEAST_OF_CLASS = {"p5": 0.8, "p4": 0.5, "p3": 0.2, "p2": 0.05, "p1": 0.0}
# Long enough to be stopped.
LONG = "max_tokens=500&a.strategy=greedy&compare=on&b.strategy=sampling&b.temperature=1&seed=3&prompt="


def test_two_strategies_show_what_the_interface_gives(open_page: OpenPage, server: Running) -> None:
    page = open_page("compare=on&max_tokens=40&seed=7&a.strategy=greedy&b.strategy=sampling&b.top_p=0.9&b.top_k=0")
    page.fill("textarea", PROMPT)
    order: list[str] = []
    for event in ("request", "response"):
        page.on(event, lambda which, event=event: order.append(event) if "completions" in which.url else None)
    generate(page)
    common = {"prompt": PROMPT, "max_tokens": 40, "logprobs": 5}
    greedy = server.choice(do_sample=False, **common)
    sampled = server.choice(do_sample=True, top_p=0.9, top_k=0, seed=7, **common)
    assert text_of(page, 0) == greedy["text"]
    assert text_of(page, 1) == sampled["text"]
    assert greedy["text"] != sampled["text"]
    assert order == ["request", "request", "response", "response"], "both start before either is answered"
    boxes = [section.bounding_box() for section in page.locator(".side").all()]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    facts = page.locator(".facts").nth(1).inner_text()
    assert re.fullmatch(r"tokens\n40\ntokens/s\n[\d,.]+\ns to first\n[\d.]+\nseed\n7\nended by\nlength", facts), facts


def test_tokens_have_their_probability_and_alternatives(open_page: OpenPage, server: Running) -> None:
    page = open_page("max_tokens=30&a.strategy=greedy")
    generate(page, PROMPT)
    logprobs = server.choice(prompt=PROMPT, max_tokens=30, logprobs=5, do_sample=False)["logprobs"]
    tokens = page.locator(".tokens .token")
    expect(tokens).to_have_count(30)
    assert tokens.evaluate_all("spans => spans.map((span) => span.textContent)") == logprobs["tokens"]
    for index, name in enumerate(tokens.evaluate_all("spans => spans.map((span) => span.className)")):
        probability = math.exp(logprobs["token_logprobs"][index])
        expected = next(name for name, least in LEAST_OF_CLASS.items() if probability >= least)
        assert expected in name.split(), f"token {index} of probability {probability} is {name}"
    alternatives = page.locator(".alternatives").first
    expect(alternatives).to_be_hidden()
    tokens.nth(3).hover()
    rows = alternatives.locator("li")
    likeliest = sorted(logprobs["top_logprobs"][3].items(), key=lambda entry: -entry[1])
    assert rows.locator(".piece").all_inner_texts() == [token.replace(" ", "␣") for token, _ in likeliest] + [
        "all others"
    ]
    for (_, logprob), shown in zip(likeliest, rows.locator(".share").all_inner_texts(), strict=False):
        assert float(shown.strip("<>%")) == pytest.approx(100 * math.exp(logprob), rel=0.05)
    assert alternatives.locator(".chosen .piece").inner_text() == logprobs["tokens"][3].replace(" ", "␣")
    alternatives.hover()  # it stays while it is pointed at itself
    expect(alternatives).to_be_visible()
    page.hover("h1")
    expect(alternatives).to_be_hidden()


def test_beams_get_their_probabilities_afterwards(open_page: OpenPage, server: Running) -> None:
    page = open_page("max_tokens=20&a.strategy=beam&a.num_beams=3&a.no_repeat_ngram_size=2")
    generate(page, PROMPT)
    text = server.choice(prompt=PROMPT, max_tokens=20, num_beams=3, no_repeat_ngram_size=2)["text"]
    scored = server.choice(prompt=PROMPT + text, max_tokens=0, echo=True, logprobs=1)["logprobs"]
    new = [token for token, start in zip(scored["tokens"], scored["text_offset"], strict=True) if start >= len(PROMPT)]
    assert text_of(page, 0) == text
    assert page.locator(".tokens .token").evaluate_all("spans => spans.map((span) => span.textContent)") == new


def test_bytes_that_make_no_character_are_shown_as_bytes(open_page: OpenPage, bytes_server: Running) -> None:
    """Also where a key is needed, which is asked for, and is no part of the address."""
    page = open_page("max_tokens=40&seed=1&a.strategy=sampling&a.top_k=0&prompt=caf%C3%A9", bytes_server)
    page.get_by_label("API key").wait_for()
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert").first).to_have_text("The server asks for its API key: enter it above.")
    page.get_by_label("API key").fill(KEY)
    page.keyboard.press("Enter")
    finish(page)
    expect(page.locator(".error").first).to_be_empty()
    assert "sesame" not in page.url
    options = {"prompt": "café", "max_tokens": 40, "seed": 1, "do_sample": True, "top_k": 0, "logprobs": 5}
    expected = bytes_server.choice(**options)
    assert text_of(page, 0) == expected["text"]
    spans = page.locator(".tokens .token").evaluate_all(
        "spans => spans.map((span) => [span.textContent, span.dataset.piece])"
    )
    assert len(spans) == len(expected["logprobs"]["tokens"])
    parts = 0
    for (_, shown), token in zip(spans, expected["logprobs"]["tokens"], strict=True):
        if token.startswith("bytes:"):
            parts += 1
            assert shown == token.removeprefix("bytes:").replace("\\x", " ").strip().upper()
    assert parts > 4, "the model was to write parts of characters"


def test_stop_ends_both_texts_and_frees_the_server(open_page: OpenPage, server: Running) -> None:
    for times, way in enumerate(("click", "key"), 1):
        page = open_page(LONG)
        # As soon as there is something, in the page itself: the model is quick.
        page.evaluate(
            """way => new MutationObserver(() => {
                if (document.querySelectorAll(".tokens .token").length < 10) return;
                if (way === "click") document.getElementById("stop").click();
                else document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", bubbles: true }));
            }).observe(document.getElementById("sides"), { childList: true, subtree: true })""",
            way,
        )
        page.click("text=Generate")
        finish(page)
        expect(page.locator(".facts").first).to_contain_text("you")
        expect(page.locator(".facts").nth(1)).to_contain_text("you")
        assert 10 <= page.locator(".tokens .token").count() < 900
        expect(page.locator(".error").first).to_be_empty()
        expect(page.locator("#stop")).to_have_attribute("aria-disabled", "true")
        server.wait_for_idle()
        assert server.metric("abandoned_total") == 2 * times, "the server has gone on with what was stopped"


def test_generating_again_replaces_what_runs(open_page: OpenPage, server: Running) -> None:
    page = open_page(LONG)
    page.click("text=Generate")
    page.fill("textarea", PROMPT)
    page.locator("[name=max_tokens]").fill("12")
    page.keyboard.press("Control+Enter")
    finish(page)
    assert text_of(page, 0) == server.choice(prompt=PROMPT, max_tokens=12, do_sample=False)["text"]


def test_everything_works_by_keyboard(open_page: OpenPage) -> None:
    page = open_page("max_tokens=24&a.strategy=greedy")

    def tab_to(selector: str) -> None:
        for _ in range(20):
            page.keyboard.press("Tab")
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
        pytest.fail(f"20 times Tab don't lead to {selector}")

    tab_to("textarea")
    page.keyboard.press("Control+A")
    page.keyboard.type(PROMPT)
    tab_to("[name=max_tokens]")
    page.keyboard.press("ArrowRight")
    tab_to("[name=compare]")
    page.keyboard.press("Space")
    expect(page.locator(".side").nth(1)).to_be_visible()
    tab_to("#stop")
    tab_to("[name='a.strategy']")
    page.keyboard.press("ArrowDown")
    expect(page.locator("[name='a.strategy']")).to_have_value("sampling")
    tab_to("summary")
    page.keyboard.press("Enter")
    tab_to("[name='a.temperature']")
    page.keyboard.press("Home")
    expect(page.locator("[name='a.temperature']")).to_have_value("0.1")
    page.keyboard.press("Control+Enter")
    finish(page)
    tab_to(".token")
    alternatives = page.locator(".alternatives").first
    expect(alternatives).to_contain_text("Token 1:")
    for key, place in (("ArrowRight", 2), ("ArrowRight", 3), ("ArrowLeft", 2), ("End", 25), ("Home", 1)):
        page.keyboard.press(key)
        expect(alternatives).to_contain_text(f"Token {place}:")
        assert page.evaluate(
            "document.activeElement === document.querySelectorAll('.token[tabindex]')[arguments]".replace(
                "arguments", str(place - 1)
            )
        )
    page.keyboard.press("ArrowDown")
    top = "span => document.activeElement.offsetTop - span.offsetTop"
    assert page.locator(".tokens .token").first.evaluate(top) > 0, "a line further down"
    page.keyboard.press("ArrowUp")
    assert page.locator(".tokens .token").first.evaluate(top) == 0
    described = page.evaluate(
        "document.getElementById(document.activeElement.getAttribute('aria-describedby')).textContent"
    )
    assert described.startswith("Token ")
    page.keyboard.press("Escape")
    expect(alternatives).to_be_hidden()


def test_a_link_brings_all_settings_back(open_page: OpenPage) -> None:
    page = open_page()
    page.fill("textarea", "Zwei Zeilen\nund “Zeichen” & = # +")
    page.select_option("[name='a.strategy']", "beam-sampling")
    page.locator("summary").first.click()
    for name, value in {"a.num_beams": "6", "a.min_p": "0.05", "a.typical_p": "0.9", "max_tokens": "8"}.items():
        page.locator(f"[name='{name}']").fill(value)
    page.get_by_label("Seed").fill("12")
    page.locator("[name=compare]").uncheck()
    link = page.get_by_role("link", name="Link to these settings").get_attribute("href")
    generate(page)
    assert page.url.endswith(link)
    again = open_page(link[1:])
    data = "() => [...new FormData(document.getElementById('form'))]"
    assert again.evaluate(data) == page.evaluate(data)
    assert again.locator(".tokens").first.evaluate("box => box.textContent") == "", "a link starts nothing by itself"
    generate(again)
    assert text_of(again, 0) == text_of(page, 0)
    nonsense = open_page("a.strategy=magic&max_tokens=1e9&a.temperature=x&length=3&key=1&%%%&b.strategy=")
    nonsense.locator("[name=max_tokens]").fill("5")
    generate(nonsense)
    expect(nonsense.locator(".error").first).to_be_empty()


def test_errors_are_told_in_a_sentence(open_page: OpenPage) -> None:
    page = open_page("a.strategy=greedy")
    error = page.locator(".error").first

    def answer(**response: Any) -> None:
        page.unroute_all()
        page.route("**/v1/completions", lambda route: route.fulfill(**response))
        page.click("text=Generate")

    busy = {"error": {"message": "the queue is full", "type": "rate_limit_error", "param": None, "code": "queue_full"}}
    answer(status=429, headers={"Retry-After": "3"}, json=busy)
    expect(error).to_have_text("The server has as many requests as it takes: try again in 3 seconds.")
    assert error.get_attribute("role") == "alert"
    answer(status=500, body="<html>")
    expect(error).to_have_text("The server answered with status 500.")
    begun = 'data: {"choices": [{"text": " and", "index": 0, "logprobs": null, "finish_reason": null}]}\n\n'
    failed = 'data: {"error": {"message": "the request took longer than 600 s", "type": "timeout"}}\n\n'
    answer(status=200, content_type="text/event-stream", body=begun + failed)
    expect(error).to_have_text("The request took longer than 600 s.")
    answer(status=200, content_type="text/event-stream", body=": keep-alive\n\n" + begun)
    expect(error).to_have_text("The connection broke off before the end.")
    assert text_of(page, 0) == " and"
    page.unroute_all()
    page.route("**/v1/completions", lambda route: route.abort())
    page.click("text=Generate")
    expect(error).to_have_text("The server can't be reached: is it still running?")
    page.unroute_all()
    page.fill("textarea", "king " * 600)
    page.click("text=Generate")
    expect(error).to_have_text(re.compile(r"^The prompt has \d+ tokens, .*\.$"))
    generate(page, PROMPT)
    expect(error).to_be_empty()


def test_a_screen_reader_hears_the_end_and_not_each_token(open_page: OpenPage) -> None:
    page = open_page("max_tokens=40&a.strategy=greedy")
    page.evaluate(
        """() => {
            window.heard = [];
            const status = document.querySelector("[role=status]");
            new MutationObserver(() => window.heard.push(status.textContent)).observe(status, { childList: true });
        }"""
    )
    generate(page)
    first, last = page.evaluate("window.heard")
    assert first == "Generating."
    assert last.startswith("Strategy A: 40 tokens, ")
    assert last.endswith(text_of(page, 0))
    assert page.locator(".side [aria-live], .side [role=status], .side output").count() == 0
    assert page.evaluate("document.getAnimations().length") == 0, "nothing moves, so nothing needs to be stilled"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessible_at_every_width(open_page: OpenPage, scheme: str) -> None:
    """axe finds no violation of its rules, WCAG 2.1 A and AA among them; and nothing is wider than the screen."""
    settings = "compare=on&max_tokens=16&seed=1&a.strategy=beam-sampling&b.strategy=sampling"
    page = open_page(settings, color_scheme=scheme)
    if scheme == "light":
        check_access(page, "at first")
    generate(page)
    for summary in page.locator("summary").all():
        summary.click()
    for viewport in (WIDE, PHONE):
        page.set_viewport_size(viewport)
        page.locator(".tokens").nth(1).locator(".token").nth(9).focus()
        expect(page.locator(".alternatives").nth(1)).to_be_visible()
        check_access(page, f"{viewport}")
        page.keyboard.press("Tab")
    page.fill("textarea", "king " * 600)
    page.keyboard.press("Control+Enter")
    expect(page.locator(".error").first).not_to_be_empty()
    check_access(page, "with an error")
    page.set_viewport_size({"width": 320, "height": 640})
    assert too_wide(page) <= 0


def check_access(page: Any, state: str) -> None:
    # label-content-name-mismatch is the one rule for WCAG 2.1 A that axe doesn't apply by itself.
    options = {"rules": {"label-content-name-mismatch": {"enabled": True}}}
    report = axe_playwright.Axe().run(page, options=options)
    assert report.violations_count == 0, f"{state}: {report.generate_report()}"
    passed, idle = report.response["passes"], report.response["inapplicable"]
    assert {"wcag2a", "wcag2aa", "wcag21a", "wcag21aa"} <= {tag for rule in passed + idle for tag in rule["tags"]}
    assert {"color-contrast", "label", "listitem"} <= {rule["id"] for rule in passed}
    assert too_wide(page) <= 0, state


def test_a_model_with_a_long_name_fits_on_a_phone(open_page: OpenPage, model: gpt2onnx.Model) -> None:
    name = "a" * 120
    with serving(model, names=[name]) as server:
        page = open_page(at=server, viewport=PHONE)
        expect(page.locator("header p").first).to_contain_text(name)
        assert too_wide(page) <= 0


def too_wide(page: Any) -> int:
    """By how many pixels one would have to scroll to the side."""
    return int(page.evaluate("document.documentElement.scrollWidth - innerWidth"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_classes_differ_without_colour(open_page: OpenPage, scheme: str) -> None:
    """By lightness, in one direction, and by the line below."""
    page = open_page(color_scheme=scheme)
    look = "spans => spans.map((span) => [getComputedStyle(span).backgroundColor, getComputedStyle(span).borderBottomStyle])"
    classes = page.locator(".legend .token").evaluate_all(look)
    assert len({line for _, line in classes}) == len(classes) == 5
    lightness = [luminance(colour) for colour, _ in classes if colour != "rgba(0, 0, 0, 0)"]
    steps = [later / earlier for earlier, later in pairwise(lightness)]
    assert len(steps) == 3
    assert all(step < 0.9 for step in steps) or all(step > 1.1 for step in steps), steps


def luminance(colour: str) -> float:
    """https://www.w3.org/TR/WCAG21/#dfn-relative-luminance"""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_small_and_needs_nothing_from_elsewhere(open_page: OpenPage, server: Running) -> None:
    folder = Path(gpt2onnx.__file__).parent.parent / "serving" / "page"
    page = open_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    expect(page.locator("#model")).to_contain_text("on cpu")
    assert all(url.startswith((server.address, "data:")) for url in asked)
    names = {
        url.removeprefix(f"{server.address}/").partition("#")[0] for url in asked if url.startswith(server.address)
    }
    loaded = {
        name: page.request.get(f"{server.address}/{name}").body()
        for name in names
        if not name.startswith(("v1/", "tokenize"))
    }
    assert {"", "page.js", "client.js", "tokens.js", "style.css"} <= loaded.keys()
    assert sum(map(len, loaded.values())) < 48 * 1024
    if folder.is_dir():
        assert {path.name for path in folder.iterdir()} == loaded.keys() - {""} | {"index.html"}
    policy = page.request.get(server.address).headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
