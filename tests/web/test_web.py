"""`gpt2onnx web` in a real browser: from a bundle to a story, with the tokens of Python's runtime, also without a network."""

from __future__ import annotations

import functools
import http.server
import json
import os
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.commands import run, wait_until
from support.pages import PHONE, PROMPT, expect
from support.paths import REPOSITORY

import gpt2onnx
from gpt2onnx.models.bundle import WEIGHTS
from gpt2onnx.runtime.decoding.filters import warp, warpers
from gpt2onnx.runtime.options import GenerationConfig

NPM = shutil.which("npm")
pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(NPM is None, reason="there is no npm on this machine"),
]


# Keeps what is reported while the model is loaded, and the messages of its worker.
LOAD = """async (folder) => {
    globalThis.progress = [];
    globalThis.messages = [];
    globalThis.Worker = class extends Worker {
        constructor(...given) {
            super(...given);
            this.addEventListener("message", ({ data }) => messages.push(data));
        }
    };
    const { load } = await import(`${folder}gpt2onnx.js`);
    globalThis.model = await load(undefined, { onProgress: (now) => progress.push(now) });
}"""

# The answers to requests, one after another, by the module that pages import.
ANSWER = """async (requests) => {
    const answers = [];
    for (const request of requests) {
        const answer = { pieces: [], token_ids: [], token_logprobs: [], top_logprobs: [] };
        try {
            for await (const { choice, usage } of model.complete(request)) {
                if (usage) Object.assign(answer, usage);
                else {
                    answer.pieces.push(choice.text);
                    answer.token_ids.push(...choice.token_ids);
                    answer.token_logprobs.push(...(choice.logprobs?.token_logprobs ?? []));
                    answer.top_logprobs.push(...(choice.logprobs?.top_logprobs ?? []));
                    answer.finish_reason = choice.finish_reason;
                }
            }
        } catch (error) {
            answer.error = error.message;
        }
        answers.push(answer);
    }
    return answers;
}"""


class Site:
    """A server of static files, as `python -m http.server` is, that can go off the network."""

    def __init__(self, root: Path) -> None:
        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *_: object) -> None: ...

        self._server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(Handler, directory=str(root))
        )
        self.address = f"http://127.0.0.1:{self._server.server_port}/"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


MakeSite = Callable[[Path], Path]


@pytest.fixture(scope="module")
def make_site(tmp_path_factory: pytest.TempPathFactory) -> MakeSite:
    """Writes a bundle's web folder by the command; npm fetches its packages once."""
    root = tmp_path_factory.mktemp("sites")

    @functools.cache
    def make(bundle: Path) -> Path:
        target = root / bundle.name
        done = run("web", bundle, target, "--json", cwd=root, seconds=600)
        assert done.code == 0, done.err
        written = {path.relative_to(target).as_posix(): path.stat().st_size for path in target.rglob("*.*")}
        assert json.loads(done.out)["files"].items() <= written.items()
        return target

    return make


@contextmanager
def opened(browser: Any, **options: Any) -> Iterator[Any]:
    """A page in which nothing may go wrong unnoticed."""
    problems: list[str] = []
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(20_000)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda line: problems.append(line.text))
    yield page
    context.close()
    assert problems == []


@contextmanager
def embedded(browser: Any, folder: Path) -> Iterator[Any]:
    """A page of someone else's, which loads the model from a web folder beside it."""
    (folder.parent / "other.html").write_text("<!DOCTYPE html><link rel=icon href=data:,>")
    running = Site(folder.parent)
    with opened(browser) as page:
        page.goto(f"{running.address}other.html")
        page.evaluate(LOAD, f"./{folder.name}/")
        yield page
    running.close()


@pytest.fixture(scope="module")
def page(browser: Any, make_site: MakeSite, tales_bundle: Path) -> Iterator[Any]:
    """Such a page with the embedded model in fp32."""
    with embedded(browser, make_site(tales_bundle)) as page:
        yield page


def python(model: gpt2onnx.Model, prompt: str = PROMPT, **options: Any) -> Any:
    """What Python's runtime writes."""
    return model.generate(prompt, **options).sequences[0]


@pytest.fixture
def phone(browser: Any) -> Iterator[Any]:
    with opened(browser, viewport=PHONE) as page:
        yield page


def test_a_story_on_a_phone_also_without_a_network(
    phone: Any, make_site: MakeSite, tales_bundle: Path, tales_model: gpt2onnx.Model
) -> None:
    page, running = phone, Site(make_site(tales_bundle))
    loaded: list[str] = []
    page.on("request", lambda request: loaded.append(request.url))
    page.goto(f"{running.address}#max_tokens=64&a.strategy=greedy")
    expect(page.locator("#model")).to_have_text("tales, fp32 on WebAssembly, 1 thread")
    page.fill("textarea", PROMPT)
    expected = python(tales_model, max_new_tokens=64, do_sample=False).text

    def story() -> str:
        page.click("text=Generate")
        expect(page.get_by_role("status")).to_contain_text("Strategy A: 64 tokens")
        return str(page.locator(".tokens").first.evaluate("box => box.textContent"))

    assert story() == expected
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "wider than the phone"
    expect(page.locator("#count")).to_have_text(f"{len(tales_model.tokenizer.encode(PROMPT))} of 512 tokens")
    expect(page.locator("[data-code=python] pre").first).to_contain_text('gpt2onnx.load("tales")')
    for absent in ("API", "Beam search", "Typical-p", "Length penalty", "Beams", "curl"):
        expect(page.get_by_text(absent, exact=True)).to_have_count(0)
    assert not page.evaluate("crossOriginIsolated"), "the server sends no headers"

    running.close()
    page.reload()
    expect(page.locator("#model")).to_contain_text("WebAssembly")
    page.fill("textarea", PROMPT)
    assert story() == expected
    page.locator("#history summary").click()
    expect(page.locator("#history p")).to_have_text([f"greedy: {expected}"] * 2)
    assert page.evaluate("crossOriginIsolated"), "the service worker adds the headers"
    elsewhere = [url for url in loaded if not url.startswith((running.address, "blob:", "data:"))]
    assert elsewhere == []


def test_greedy_tokens_and_their_probabilities_are_those_of_python(page: Any, tales_model: gpt2onnx.Model) -> None:
    asked: list[dict[str, Any]] = [
        {"prompt": PROMPT, "max_new_tokens": 60, "logprobs": 5},
        {"prompt": PROMPT, "max_new_tokens": 60, "no_repeat_ngram_size": 2},
        {"prompt": PROMPT, "max_new_tokens": 60, "repetition_penalty": 1.3},
        {"prompt": "", "max_new_tokens": 30},
        {"prompt": "“Zwölf Brüder”, naïve 🦊 ", "max_new_tokens": 30},
        {"prompt": PROMPT, "max_new_tokens": 60, "stop": ["people", "."]},
        {"prompt": "One day " * 250, "max_new_tokens": 60},
    ]
    greedy = {"do_sample": False}
    answers = page.evaluate(ANSWER, [each | greedy for each in asked])
    for request, answer in zip(asked, answers, strict=True):
        options = {name: value for name, value in request.items() if name != "prompt"}
        expected = python(tales_model, request["prompt"], **options, **greedy)
        assert answer["token_ids"] == expected.token_ids, request
        assert "".join(answer["pieces"]) == expected.text, request
        assert answer["finish_reason"] == expected.finish_reason, request
        assert len(answer["pieces"]) > 5
    for token, logprob, top in zip(
        python(tales_model, logprobs=5, max_new_tokens=60, **greedy).logprobs,
        answers[0]["token_logprobs"],
        answers[0]["top_logprobs"],
        strict=True,
    ):
        assert logprob == pytest.approx(token.logprob, abs=1e-4)
        expected_top = {
            tales_model.tokenizer.decode([each], skip_special_tokens=False): value for each, value in token.top
        }
        assert top == pytest.approx(expected_top, abs=1e-4)


def test_draws_come_from_what_the_filters_of_python_leave_and_repeat_with_their_seed(
    page: Any, tales_model: gpt2onnx.Model
) -> None:
    options = {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.01}
    seeded = [{"prompt": PROMPT, "max_new_tokens": 12, "seed": seed} | options for seed in (3, 3, 2**40)]
    one, same, other = page.evaluate(ANSWER, seeded)
    assert one == same
    assert one["token_ids"] != other["token_ids"]
    assert one["seed"] == 3
    draws = """async ([logits, options, count]) => {
        const { draw } = await import("./fp32/sampling.js");
        return Array.from({ length: count }, (_, i) => draw(Float32Array.from(logits), options, () => (i + 0.5) / count));
    }"""
    logits = np.random.default_rng(5).normal(0, 3, 300).astype(np.float32)
    count = 4000
    for given in (options, {"top_k": 7}, {"top_p": 0.5}, {"min_p": 0.2, "top_k": 0}, {"temperature": 0.4, "top_k": 0}):
        left = warp(warpers(GenerationConfig(do_sample=True, **given)), logits)
        weights = np.exp(left.scores.astype(np.float64))
        expected = dict(zip(left.indices.tolist(), count * weights / weights.sum(), strict=True))
        drawn = Counter(page.evaluate(draws, [logits.tolist(), {"top_k": 50} | given, count]))
        # Even steps over the whole range hit each token as often as it is likely, give or take one.
        assert drawn.keys() <= expected.keys(), given
        assert all(abs(drawn[token] - times) <= 1 for token, times in expected.items()), given


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_smaller_weights_are_unpacked_in_the_browser(
    dtype: str, browser: Any, make_site: MakeSite, tmp_path_factory: pytest.TempPathFactory, tales_int8_bundle: Path
) -> None:
    bundle = tales_int8_bundle
    if dtype == "fp16":
        bundle = gpt2onnx.export("tales", tmp_path_factory.mktemp("tales") / "fp16", dtype="fp16").folder
    folder = make_site(bundle)
    assert (folder / "model" / WEIGHTS).stat().st_size < {"fp16": 0.51, "int8": 0.3}[dtype] * 28.1e6
    with embedded(browser, folder) as page:
        progress = page.evaluate("progress")
        (answer,) = page.evaluate(ANSWER, [{"prompt": PROMPT, "max_new_tokens": 40, "logprobs": 1}])
    assert [each["loaded"] for each in progress] == sorted(each["loaded"] for each in progress)
    needed = (WEIGHTS, "unpacked.onnx", ".json", "threaded.wasm")
    total = sum(path.stat().st_size for path in folder.glob("*/**/*") if path.as_posix().endswith(needed))
    assert progress[-1] == {"loaded": total, "total": total}
    # The likeliest tokens of the same weights: Python rounds activations as well, so probabilities differ a little.
    model = gpt2onnx.load(bundle, threads=1)
    ids = model.tokenizer.encode(PROMPT)
    assert len(answer["token_ids"]) == 40
    scored = model.score(PROMPT + "".join(answer["pieces"]))
    assert answer["token_logprobs"] == pytest.approx(scored.logprobs[len(ids) - 1 :], abs=0.1)


def test_errors_are_sentences_and_leaving_a_stream_ends_it(page: Any) -> None:
    wrong = [
        ({"top_q": 1}, r"There is no option top_q: there are max_new_tokens, .*\."),
        ({"top_p": 2}, r"Top_p=2 is out of range\."),
        ({"max_new_tokens": 1.5}, r"Max_new_tokens=1\.5 is out of range\."),
        ({"prompt": "One day " * 400}, r"The prompt has \d+ tokens, the context window 512\."),
    ]
    answers = page.evaluate(ANSWER, [{"prompt": PROMPT} | given for given, _ in wrong])
    for (_, message), answer in zip(wrong, answers, strict=True):
        assert re.fullmatch(message, answer["error"])
    left = """async () => {
        let first = "";
        for await (const piece of model.stream("The old", { max_new_tokens: 400, seed: 1 })) {
            first += piece;
            if (first.length > 30) break;
        }
        const { id } = messages.at(-1);
        messages.length = 0;
        for await (const _ of model.stream("The old", { max_new_tokens: 30 }));
        const more = messages.filter((each) => each.id === id && each.choice).length;
        model.close();
        const closed = await model.stream("x").next().catch((error) => error.message);
        return [first, more, model.device, model.threads, closed];
    }"""
    first, more, device, threads, closed = page.evaluate(left)
    assert closed == "The model was closed."
    assert 30 < len(first) < 60
    assert more < 5, "it went on beside the next text"
    assert (device, threads) == ("wasm", 1)


def test_a_new_folder_takes_the_place_of_every_old_file(browser: Any, tmp_path: Path) -> None:
    """Also where the server sends no Cache-Control, so that browsers take month-old files for fresh ones."""
    for name in ("gpt2onnx.js", "service-worker.js"):
        shutil.copy(REPOSITORY / "web" / "static" / name, tmp_path)

    def publish(version: str, days_ago: int) -> None:
        # Some days apart: Last-Modified counts seconds, and within one a server doesn't tell two files apart.
        published = time.time() - days_ago * 86400
        contents = {
            "index.html": "<!DOCTYPE html><link rel=icon href=data:,>",
            "version.js": f'self.VERSION = "{version}"; self.SHELL = ["index.html"];',
            "weights.bin": version,
        }
        for name, content in contents.items():
            (tmp_path / name).write_text(content)
        for path in tmp_path.iterdir():
            os.utime(path, (published, published))

    running, context = Site(tmp_path), browser.new_context()

    def weights() -> str:
        page = context.new_page()
        page.goto(running.address)
        found = page.evaluate(
            """async () => {
                import("./gpt2onnx.js").then(({ load }) => load()).catch(() => {});
                await (await navigator.serviceWorker.ready).update();
                return (await fetch("weights.bin")).text();
            }"""
        )
        page.close()
        return str(found)

    publish("old", 31)
    assert weights() == weights() == "old"
    publish("new", 30)
    wait_until(lambda: weights() == "new")
    context.close()
    running.close()
