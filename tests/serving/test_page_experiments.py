"""Experiments on the page of `gpt2onnx serve` in a real browser: going on, repeating, keeping and copying results."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.pages import KEY, PROMPT, OpenPage, expect, finish, generate, text_of
from support.serving import Running

pytestmark = pytest.mark.system


def test_stop_strings_end_both_texts(open_page: OpenPage, server: Running) -> None:
    whole = [server.text(PROMPT, max_tokens=60, do_sample=False), server.text(PROMPT, max_tokens=60, seed=3, top_k=0)]
    word = whole[0].split()[6]
    page = open_page("max_tokens=60&seed=3&compare=on&a.strategy=greedy&b.strategy=sampling&b.top_k=0")
    page.get_by_label("Stop strings").fill(f"{word}\n,\\n\\n")  # the second one is typed as the escape \n
    generate(page, PROMPT)
    for side, text in enumerate(whole):
        ends = [text.index(stop) for stop in (word, ",\n\n") if stop in text]
        assert text_of(page, side) == text[: min(ends, default=None)]
    assert text_of(page, 0) == whole[0].partition(word)[0]
    expect(page.locator(".facts").first).to_contain_text(re.compile(r"stop\s*ended by|ended by\s*stop"))


def test_going_on_from_the_end_and_from_an_alternative(open_page: OpenPage, server: Running) -> None:
    """The text so far becomes the prompt; of an alternative, the text before it and the alternative itself."""
    page = open_page("max_tokens=12&a.strategy=greedy")
    generate(page, PROMPT)
    first = text_of(page, 0)
    page.get_by_role("button", name="Go on from here").first.click()
    expect(page.locator("#prompt")).to_have_value(PROMPT + first)
    finish(page)
    assert text_of(page, 0) == server.text(PROMPT + first, max_tokens=12, do_sample=False)

    generate(page, PROMPT)
    logprobs = server.choice(PROMPT, max_tokens=12, do_sample=False, logprobs=5)["logprobs"]
    likeliest = sorted(logprobs["top_logprobs"][4].items(), key=lambda entry: -entry[1])
    for place, picked in ((2, "mouse"), (1, "keyboard")):
        generate(page, PROMPT)
        token = page.locator(".tokens .token").nth(4)
        token.click()  # it has the focus, and keeps it while the mouse goes to the alternatives
        if picked == "mouse":
            page.locator(".alternatives button").nth(place).click()
        else:
            for _ in range(place + 1):
                page.keyboard.press("Tab")
            expect(page.locator(".alternatives button").nth(place)).to_be_focused()
            page.keyboard.press("Escape")
            expect(token).to_be_focused()
            page.keyboard.press("ArrowLeft")
            page.keyboard.press("ArrowRight")
            for _ in range(place + 1):
                page.keyboard.press("Tab")
            page.keyboard.press("Enter")
        begun = PROMPT + "".join(logprobs["tokens"][:4]) + likeliest[place][0]
        expect(page.locator("#prompt")).to_have_value(begun)
        expect(page.locator("#stop")).to_be_focused()
        finish(page)
        assert text_of(page, 0) == server.text(begun, max_tokens=12, do_sample=False)


def test_no_going_on_from_parts_of_a_character(open_page: OpenPage, bytes_server: Running) -> None:
    page = open_page("max_tokens=40&seed=1&a.strategy=sampling&a.top_k=0&prompt=caf%C3%A9", bytes_server)
    page.get_by_label("API key").fill(KEY)
    page.keyboard.press("Enter")
    finish(page)
    spans = page.locator(".tokens .token")
    buttons = 0
    for index in range(spans.count()):
        spans.nth(index).focus()
        picks = page.locator(".alternatives button").evaluate_all("buttons => buttons.map((button) => button.value)")
        assert not any(pick.startswith("bytes:") for pick in picks)
        if index and not spans.nth(index - 1).text_content():
            assert picks == [], f"token {index} is within a character"
        buttons += len(picks)
    assert buttons > 0


def test_the_seed_of_a_result_is_a_link_that_repeats_it(open_page: OpenPage) -> None:
    page = open_page("compare=on&max_tokens=30&a.strategy=greedy&b.strategy=sampling")
    generate(page, PROMPT)
    text, link = text_of(page, 1), page.locator(".facts a").first
    seed, href = link.inner_text(), link.get_attribute("href")
    assert f"seed={seed}" in href
    page.fill("textarea", "Something else")
    generate(page)
    assert text_of(page, 1) != text
    link = page.locator(f".repeat[href='{href}']").first
    page.locator("#history summary").click()
    link.click()
    expect(page.get_by_label("Seed")).to_have_value(seed)
    finish(page)
    assert text_of(page, 1) == text
    again = open_page(href[1:])
    assert text_of(again, 1) == "", "opened elsewhere it starts nothing by itself"
    generate(again)
    assert text_of(again, 1) == text


def test_history_is_kept_exported_and_cleared(open_page: OpenPage, server: Running) -> None:
    page = open_page("compare=on&max_tokens=10&a.strategy=greedy&b.strategy=sampling")
    expect(page.locator("#history")).to_be_hidden()
    written = []
    for prompt in (PROMPT, "<b>&'\"\nTwo lines"):
        generate(page, prompt)
        written.insert(0, {"prompt": prompt, "texts": [text_of(page, 0), text_of(page, 1)]})
    page.reload()
    page.locator("#history summary").click()
    expect(page.locator("#history li")).to_have_count(2)
    for item, result in zip(page.locator("#history li").all(), written, strict=True):
        assert item.locator("a").text_content() == result["prompt"]
        assert item.locator("p").evaluate_all("all => all.map((each) => each.textContent)") == [
            f"{strategy}: {text}" for strategy, text in zip(("greedy", "sampling"), result["texts"], strict=True)
        ]
    with page.expect_download() as download:
        page.get_by_role("button", name="Export as JSON").click()
    exported = json.loads(Path(download.value.path()).read_text("utf-8"))
    assert [
        {"prompt": each["prompt"], "texts": [text["text"] for text in each["texts"]]} for each in exported
    ] == written
    settings = exported[0]["settings"]
    options = {"max_tokens": 10, "seed": int(settings["seed"]), "top_k": int(settings["b.top_k"])}
    assert exported[0]["texts"][1] == {"strategy": "sampling", "text": server.text(exported[0]["prompt"], **options)}
    assert exported[0]["model"] == "tales"
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("#history")).to_be_hidden()
    page.reload()
    expect(page.locator("#history")).to_be_hidden()
    generate(page)
    page.evaluate("localStorage.setItem('gpt2onnx.history', 'no JSON')")
    page.reload()
    generate(page)
    expect(page.locator("#history li")).to_have_count(1)


def test_history_makes_room_where_the_browser_has_none(open_page: OpenPage) -> None:
    page = open_page("max_tokens=3&a.strategy=greedy")
    generate(page, PROMPT)
    # The browser's limit is 5 million characters or so: all that is left is taken, then a result doesn't fit beside.
    page.evaluate(
        """() => {
            for (let size = 1 << 22; size; size >>= 1)
                try { localStorage.setItem(`other ${size}`, "x".repeat(size)) } catch { continue }
        }"""
    )
    generate(page, "One day")
    expect(page.locator("#history li")).to_have_count(1)
    expect(page.locator("#history a")).to_have_text("One day")


def test_code_for_the_settings_gives_the_text_of_the_page(
    open_page: OpenPage, tales_bundle: Path, tmp_path: Path
) -> None:
    """As curl, Python and a command; the model's name stands for a folder."""
    (tmp_path / "tales").symlink_to(tales_bundle)
    for settings, side in (
        ("b.strategy=sampling&compare=on&seed=11&b.temperature=0.8&b.top_k=0&b.min_p=0.05&stop=zzz%0A%5Cn%5Cn'", 1),
        ("a.strategy=beam&a.num_beams=3&a.no_repeat_ngram_size=2", 0),
    ):
        page = open_page(f"max_tokens=16&{settings}")
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        prompt = 'It\'s "1" \\ day,\nand é'
        generate(page, prompt)
        expected = text_of(page, side)
        section = page.locator(".side").nth(side)
        section.locator("summary", has_text="Code").click()
        codes = {}
        for block in section.locator("[data-code]").all():
            block.get_by_role("button", name="Copy").click()
            expect(block.get_by_role("button")).to_have_text("Copied")
            codes[block.get_attribute("data-code")] = page.evaluate("navigator.clipboard.readText()")
            assert codes[block.get_attribute("data-code")] == block.locator("pre").text_content()

        def output(*command: str) -> str:
            environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True)
            return done.stdout.decode()

        assert json.loads(output("sh", "-c", codes["curl"]))["choices"][0]["text"] == expected
        assert output(sys.executable, "-c", codes["python"]) == f"{prompt}{expected}\n"
        assert output("sh", "-c", codes["command"]).rstrip("\n") == expected.rstrip("\n")


def test_code_names_no_key(open_page: OpenPage, bytes_server: Running) -> None:
    page = open_page("max_tokens=4&a.strategy=greedy", bytes_server)
    page.get_by_label("API key").fill(KEY)
    page.keyboard.press("Enter")
    finish(page)
    code = page.locator("[data-code=curl] pre").first.text_content()
    assert "sesame" not in page.evaluate("document.body.innerHTML + JSON.stringify(localStorage)")
    text = subprocess.run(["sh", "-c", code], env=os.environ | {"API_KEY": KEY}, capture_output=True, check=True).stdout
    assert json.loads(text)["choices"][0]["text"] == text_of(page, 0)


def test_text_is_copied_also_where_the_browser_gives_no_clipboard(open_page: OpenPage) -> None:
    page = open_page("max_tokens=8&a.strategy=greedy")
    generate(page, PROMPT)
    copy = page.locator(".after").get_by_role("button", name="Copy text").first
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    for way in ("clipboard", "selection"):
        page.evaluate("navigator.clipboard.writeText('before')")
        if way == "selection":  # as on pages that came by plain HTTP from another machine
            page.evaluate("navigator.clipboard.writeText = undefined")
        copy.click()
        expect(page.get_by_role("button", name="Copied")).to_be_focused()
        assert page.evaluate("navigator.clipboard.readText()") == PROMPT + text_of(page, 0), way
        expect(copy).to_be_visible()


def test_each_option_says_what_it_does(open_page: OpenPage) -> None:
    """To eyes beside it once it has the focus, to ears as its description."""
    page = open_page("compare=on&a.strategy=beam-sampling&b.strategy=sampling")
    for summary in page.locator(".side summary").all():
        summary.click()
    options = page.locator("#form .option:visible, .side .option:visible")
    said = []
    for option in options.all():
        control = option.locator("input, textarea")
        control.focus()
        said.append(option.evaluate("option => option.closest('.options').querySelector('.help').innerText"))
        expect(control).to_have_accessible_description(said[-1])
        place = "option => [option.offsetLeft, option.offsetTop]"
        before = option.evaluate(place)
        page.keyboard.press("Tab")
        assert option.evaluate(place) == before, "what is read moves nothing"
    assert len(set(said)) == 12, "of 12 different options"
    assert all(20 < len(text) <= 110 for text in said)


def test_presets_set_an_option_and_the_rest_to_its_default(open_page: OpenPage) -> None:
    page = open_page("a.strategy=sampling&a.typical_p=0.4&compare=on&b.strategy=beam&prompt=Kept")
    for summary in page.locator("summary", has_text="Settings").all():
        summary.click()
    data = "() => Object.fromEntries(new FormData(document.getElementById('form')))"
    before = page.evaluate(data)
    page.locator(".side").first.get_by_role("button", name="Lively").click()
    after = page.evaluate(data)
    assert after == before | {"a.min_p": "0.05", "a.top_k": "0", "a.typical_p": "1"}
    page.locator(".side").nth(1).get_by_role("button", name="Beams").click()
    assert page.evaluate(data) == after | {"b.num_beams": "4", "b.no_repeat_ngram_size": "3"}


def test_the_prompts_tokens_are_counted(open_page: OpenPage, server: Running) -> None:
    page = open_page()
    for prompt in (PROMPT, "naïve 🙂 words\n", ""):
        page.fill("#prompt", prompt)
        count = server.client.post("/tokenize", json={"prompt": prompt}).json()["count"]
        expect(page.locator("#count")).to_have_text(f"{count} of 512 tokens")
    page.route("**/tokenize", lambda route: route.abort())
    page.fill("#prompt", "One day")
    expect(page.locator("#count")).to_be_empty()


@pytest.mark.parametrize("width", [320, 390, 920, 1280])
def test_no_figure_of_a_result_is_alone_on_a_line(open_page: OpenPage, width: int) -> None:
    page = open_page(
        "compare=on&max_tokens=20&seed=4294967295&a.strategy=greedy&b.strategy=sampling",
        viewport={"width": width, "height": 800},
    )
    generate(page)
    for facts in page.locator(".facts").all():
        tops = [fact.bounding_box()["y"] for fact in facts.locator("div").all()]
        assert min(tops.count(top) for top in tops) > 1
        assert "J" not in facts.inner_text(), "energy isn't measured"
