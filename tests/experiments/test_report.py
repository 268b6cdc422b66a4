"""Files of a sweep: for pandas, for browsers, and for those who have the page read aloud."""

import base64
import hashlib
import json
import re
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.isolated import run
from support.sweeps import PROMPT, SMALL, load_records, make

import gpt2onnx
from gpt2onnx.experiments import charts, report, sweep
from gpt2onnx.experiments.energy.tracker import EnergyTracker

HOSTILE = "The <script>document.title='owned'</script><img src=x onerror=alert(1)> & \"king\""


@pytest.fixture(scope="module")
def finished(tales_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep with energy over two prompts, one of them hostile."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "grid.toml").write_text(SMALL + f"\n[[strategy]]\nname = '''<b>{HOSTILE}</b>'''\ntop_k = [2, 3]\n")
    model = gpt2onnx.load(tales_bundle, threads=1)
    tracker = EnergyTracker(country="FRA", seconds=0.02)
    records = list(sweep.run(make(model, folder / "grid.toml", PROMPT, HOSTILE), folder, tracker))
    sweep.write_files(records, folder)
    return folder


def test_pandas_reads_the_files_as_they_are(finished: Path) -> None:
    records = load_records(finished)
    assert len(records) == 2 * 8
    lines = pandas.read_json(finished / "results.jsonl", lines=True)
    summary = pandas.read_csv(finished / "summary.csv")
    emissions = pandas.read_csv(finished / "emissions.csv")
    assert len(lines) == len(summary) == len(emissions) == len(records)
    for table in (lines, summary, emissions):
        assert table["strategy"].tolist() == [record["strategy"] for record in records]
        assert table["completion_tokens"].tolist() == [record["completion_tokens"] for record in records]
    assert summary["prompt"].tolist() == lines["prompt"].tolist() == [PROMPT] * 8 + [HOSTILE] * 8
    assert summary["text"].tolist() == [record["sequences"][0]["text"] for record in records]
    assert summary["mean_logprob"].tolist() == [record["mean_logprob"] for record in records]
    assert emissions["run_id"].tolist() == [record["energy"]["run_id"] for record in records]
    assert set(emissions["country_iso_code"]) == {"FRA"}
    energy = (emissions["joules_per_token"] * emissions["completion_tokens"] * emissions["runs"]).tolist()
    assert energy == pytest.approx((emissions["energy_consumed"] * 3.6e6).tolist())
    assert summary["joules_per_token"].tolist() == emissions["joules_per_token"].tolist()


class Page(HTMLParser):
    """Elements of a page, and whether they are closed in order."""

    VOID = frozenset({"meta", "br", "img", "input", "link", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} closes another element"

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data


def test_the_report_is_one_whole_page(finished: Path) -> None:
    text = (finished / "report.html").read_text()
    page, records = Page(text), load_records(finished)
    assert text.startswith("<!DOCTYPE html>")
    # A card for each text of a prompt, with the strategies that wrote it.
    texts: dict[str, list[str]] = {}
    for record in records:
        key = repr([record["prompt"], [sequence["text"] for sequence in record["sequences"]]])
        texts.setdefault(key, []).append(record["strategy"])
    assert page.texts["h4"] == ["".join(strategies) for strategies in texts.values()]
    ids = {attributes.get("id") for _, attributes in page.elements}
    links = [str(attributes["href"]) for tag, attributes in page.elements if tag == "a"]
    assert len(links) > len({record["strategy"] for record in records})
    assert all(link.startswith("#") and link[1:] in ids for link in links)
    for record in records:
        for sequence in record["sequences"]:
            assert sequence["text"].lstrip(" ") in page.texts["p"]
    assert [prompt for prompt in page.texts["p"] if prompt in (PROMPT, HOSTILE)] == [PROMPT, HOSTILE]
    # Nothing from elsewhere, and the page's own script alone runs.
    tags = [tag for tag, _ in page.elements]
    assert not {"img", "link", "iframe", "object", "embed", "base"} & set(tags)
    assert tags.count("script") == 1
    for tag, attributes in page.elements:
        assert not attributes.keys() & {"src", "action", "data", "srcset"}, tag
        assert not [name for name in attributes if name.startswith("on")], tag
    assert "url(" not in text
    assert "@import" not in text
    assert not re.findall(r"https?://", text)
    (policy,) = [one["content"] for _, one in page.elements if one.get("http-equiv") == "Content-Security-Policy"]
    (script,) = page.texts["script"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_repeated_words_are_marked() -> None:
    text = " the old king and the young queen; the Old king and\nthe young man "
    parts = report.repeats(text)
    assert "".join(part for part, _ in parts) == text
    assert [part for part, again in parts if again] == [" the Old king and\nthe young"]
    assert report.repeats("") == [("", False)]
    assert report.repeats("a b c d") == [("a b c d", False)]


def test_the_report_can_be_read_aloud(finished: Path) -> None:
    page = Page((finished / "report.html").read_text())
    elements = page.elements
    ids = {attributes["id"] for _, attributes in elements if "id" in attributes}
    assert dict(elements)["html"] == {"lang": "en"}
    drawings = [attributes for tag, attributes in elements if tag == "svg" and "aria-hidden" not in attributes]
    assert len(drawings) == 3
    for drawing in drawings:
        assert drawing["role"] == "img"
        assert set((drawing["aria-labelledby"] or "").split()) <= ids
    assert all(len(text) > 40 for text in page.texts["desc"])
    heads = [attributes.get("scope") for tag, attributes in elements if tag == "th"]
    assert set(heads) == {"col", "row"}
    assert Counter(tag for tag, _ in elements)["caption"] == Counter(tag for tag, _ in elements)["table"] == 1
    levels = [int(tag[1]) for tag, _ in elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))


def test_the_report_tells_of_runs_that_were_disturbed(finished: Path) -> None:
    records = load_records(finished)
    for share, said in ((1.0, False), (0.5, True)):
        for record in records:
            record["emissions"]["cpu_seconds"] = share * record["emissions"]["seconds"]
        assert (f"In {len(records)} of the runs other programs took" in report.render(records)) == said


def test_the_same_results_make_the_same_files(finished: Path, tmp_path: Path) -> None:
    code = (
        "import json\nfrom pathlib import Path\nfrom gpt2onnx.experiments import sweep\n"
        "records = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]\n"
        "sweep.write_files(records, Path(sys.argv[2]))"
    )
    # This process draws another seed, as every one does.
    assert run(code, finished / "results.jsonl", tmp_path, PYTHONHASHSEED="1") == (0, "", "")
    for name in ("report.html", "summary.csv", "emissions.csv"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes(), name


def test_a_report_of_little_is_still_a_page(tales_model: gpt2onnx.Model, tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text("[[strategy]]\nmax_new_tokens = 1\n")
    records = list(sweep.run(make(tales_model, path, PROMPT), tmp_path))
    assert (records[0]["distinct_2"], records[0]["repeated_4gram_share"]) == (None, None)
    sweep.write_files(records, tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert any("Energy was not measured" in text for text in page.texts["p"])
    assert not (tmp_path / "emissions.csv").exists()
    assert pandas.read_csv(tmp_path / "summary.csv")["joules_per_token"].isna().all()


@given(st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=9), st.booleans())
def test_axes_hold_their_values_and_have_round_ticks(values: list[float], zero: bool) -> None:
    for axis in (charts.horizontal("x", values, zero=zero), charts.vertical("y", values, zero=zero)):
        low, high = sorted((axis.begin, axis.end))
        for place in [axis.at(value) for value in values] + [tick.at for tick in axis.ticks]:
            assert low - 0.01 <= place <= high + 0.01
        assert 1 <= len(axis.ticks) <= 7
        assert len({tick.label for tick in axis.ticks}) == len(axis.ticks), axis.ticks


@pytest.mark.system
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_on_a_desk_and_on_a_phone(finished: Path, tmp_path: Path, browser: Any, width: int) -> None:
    records = load_records(finished)
    for record in records:
        if (
            HOSTILE in record["strategy"]
        ):  # the best by all figures, so that its long words are in every part of the page
            record |= {"seconds": 1e-6, "mean_logprob": -0.1, "distinct_2": 1.1}
            record["energy"]["joules"] = 0.0
    (tmp_path / "report.html").write_text(report.render(records), encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto((tmp_path / "report.html").as_uri())
    assert [tile.count(HOSTILE) for tile in page.locator(".tiles li").all_inner_texts()] == [1] * 4
    assert page.title() == "Decoding strategies of tales"
    assert page.locator("img").count() == 0

    def boxes(selector: str) -> list[list[float]]:
        code = "all => all.map(each => each.getBoundingClientRect()).map(box => [box.width, box.height])"
        return page.locator(selector).evaluate_all(code)

    texts = {(record["prompt"], repr(record["sequences"])) for record in records}
    assert sum(wide > 200 and high > 60 for wide, high in boxes(".cards li")) == len(texts)
    assert sum(wide > 250 and high > 180 for wide, high in boxes("figure > svg")) == 3
    marks = sum(wide > 3 for wide, _ in boxes("figure > svg .mark"))
    assert marks > len({record["strategy"] for record in records})
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    cut = "all => all.filter(each => each.scrollWidth > each.clientWidth + 1).length"
    assert page.locator(".text, h1, h2, h4, .tiles b").evaluate_all(cut) == 0
    page.fill("#filter", "beam 4")
    assert page.locator(".all tbody th:visible").all_inner_texts() == ["beam search: beams 4"]
    assert page.locator(".cards li:visible").count() == 2
    page.close()


def test_figures_by_the_token_are_sums_by_sums(finished: Path) -> None:
    """Two short tokens for 1 J and 98 for 9.8 J are 100 tokens for 10.8 J."""
    record = json.loads((finished / "results.jsonl").read_text().splitlines()[0])
    records = [
        record | {"prompt_index": index, "completion_tokens": tokens, "seconds": tokens / 50,
                  "energy": record["energy"] | {"joules": joules, "g_co2eq": joules / 100}}
        for index, (tokens, joules) in enumerate([(2, 1.0), (98, 9.8)])
    ]  # fmt: skip
    (row,) = report._rows(records)
    assert row.joules_per_token == pytest.approx(0.108)
    assert row.g_co2eq_per_1000_tokens == pytest.approx(1.08)
    assert row.tokens_per_second == pytest.approx(50)
