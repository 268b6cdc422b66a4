"""`gpt2onnx next` and `gpt2onnx tokens`: stages and draws are those of PyTorch, transformers and `generate`."""

import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from support.checkpoints import MakeCheckpoint
from support.commands import CommandLine
from support.golden import Golden, assert_close
from support.logits import FILTERS, assert_same, coded, decoded, options_of, reference_steps, softmax_of_torch
from support.reference import Reference
from support.versions import skip_with_transformers_4

import gpt2onnx
from gpt2onnx.errors import OptionError
from gpt2onnx.experiments.next_token import choose, next_token, stages, token_of
from gpt2onnx.models.tales import FOLDER
from gpt2onnx.runtime.options import GenerationConfig
from gpt2onnx.runtime.text.tokenizer import Tokenizer

PROMPT = "Once upon a time there was a"
TEMPERATURES = (0.1, 1.0, 5.0)
# As steep as those of a model.
LOGITS = (-1.2 * np.log(np.arange(300) + 2) + np.random.default_rng(3).normal(0, 1, 300))[::-1].astype(np.float32)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_every_stage_is_that_of_transformers(temperature: float, filters: dict[str, Any], golden: Golden) -> None:
    """From the same logits on all machines: a difference comes from the step."""
    if "top_h" in filters:
        skip_with_transformers_4("it has no top_h")
    ids = [3, 1, 4, 1, 5]
    values = {"temperature": temperature} | filters

    def transformers() -> list[np.ndarray]:
        return [scores for _, scores in reference_steps(values, ids, LOGITS)]

    names = golden.answer([values, "names"], lambda: [name for name, _ in reference_steps(values, ids, LOGITS)])
    steps = golden.array([values, "scores"], lambda: np.stack([coded(*pair) for pair in pairwise(transformers())]))
    softmaxes = golden.array([values, "probabilities"], lambda: np.stack([softmax_of_torch(s) for s in transformers()]))
    way = stages(LOGITS, options_of(values), np.array(ids))
    assert [stage.name for stage in way] == names
    expected = LOGITS
    for stage, step, probabilities in zip(way, [coded(LOGITS, LOGITS), *steps], softmaxes, strict=True):
        expected = decoded(expected, step)
        assert_same(stage.scores, expected, stage.name)
        assert_close(stage.probabilities, probabilities, 1e-6, stage.name)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_logits_are_those_of_transformers(
    temperature: float, tales_model: gpt2onnx.Model, tales_reference: Reference, golden: Golden
) -> None:
    """And a model's stages are those of its logits alone, which the test above compares with transformers."""
    ids = tales_model.tokenizer.encode(PROMPT)
    filters = {"top_k": 30, "top_p": 0.9}
    (choice,) = next_token(tales_model, PROMPT, temperatures=[temperature], **filters).choices
    logits = golden.array(["last logits", ids], lambda: tales_reference.live_logits(np.array(ids))[-1])
    assert_close(choice.stages[0].scores, logits, 1e-4)
    assert [stage.name for stage in choice.stages] == ["logits", "temperature", "top_k", "top_p"]
    options = GenerationConfig(do_sample=True, temperature=temperature, **filters)
    for stage, alone in zip(choice.stages, stages(choice.stages[0].scores, options, np.array(ids)), strict=True):
        assert stage.name == alone.name
        assert_same(stage.scores, alone.scores, stage.name)
        assert_same(stage.probabilities, alone.probabilities, stage.name)


def test_options_of_the_model_that_do_not_suit_it_are_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint()
    (checkpoint / "generation_config.json").write_text('{"sequence_bias": [[[9999], 1.0]]}')
    model = gpt2onnx.load(gpt2onnx.export(checkpoint, tmp_path / "bundle").folder)
    with pytest.raises(OptionError, match="sequence_bias holds 9999"):
        next_token(model, [1])


# "Build a Large Language Model (From Scratch)", section 5.3: nine words, their logits, and how often each comes in 1,000
# draws after torch.manual_seed(123), as the book prints them; for temperature 5 the solution to exercise 5.1.
WORDS = ("closer", "every", "effort", "forward", "inches", "moves", "pizza", "toward", "you")
WORD_LOGITS = (4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79)
PRINTED = {
    0.1: {"forward": 985, "toward": 15},
    1.0: {"closer": 73, "forward": 582, "inches": 2, "toward": 343},
    5.0: {
        "closer": 165, "every": 75, "effort": 42, "forward": 239, "inches": 71, "moves": 46, "pizza": 32,
        "toward": 227, "you": 103,
    },
}  # fmt: skip


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_book_s_pizza(temperature: float) -> None:
    options = GenerationConfig(do_sample=True, temperature=temperature, top_k=0, seed=123)
    choice = choose(np.array(WORD_LOGITS, np.float32), options, draws=1000)
    assert {word: count for word, count in zip(WORDS, choice.counts.tolist(), strict=True) if count} == PRINTED[
        temperature
    ]


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_draws_are_those_of_torch_multinomial(
    temperature: float, tales_model: gpt2onnx.Model, tales_reference: Reference, golden: Golden
) -> None:
    (choice,) = next_token(tales_model, PROMPT, temperatures=[temperature], top_k=0, draws=200, seed=7).choices
    ids = tales_model.tokenizer.encode(PROMPT)

    def torchs() -> dict[str, int]:
        import torch

        probabilities = torch.softmax(
            torch.from_numpy(tales_reference.live_logits(np.array(ids))[-1]) / temperature, -1
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            drawn = [int(torch.multinomial(probabilities, 1)) for _ in range(200)]
        return {str(token): count for token, count in sorted(Counter(drawn).items())}

    drawn = {str(token): int(choice.counts[token]) for token in np.flatnonzero(choice.counts)}
    assert drawn == golden.answer(["draws", ids, temperature], torchs)


def test_the_first_draw_is_the_token_that_generate_takes(tales_model: gpt2onnx.Model) -> None:
    for seed in range(20):
        options = {"top_p": 0.9, "top_k": 40}
        (choice,) = next_token(tales_model, PROMPT, temperatures=[1.5], draws=1, seed=seed, **options).choices
        token = tales_model.generate(PROMPT, max_new_tokens=1, temperature=1.5, seed=seed, **options)
        assert token.sequences[0].token_ids == np.flatnonzero(choice.counts).tolist(), seed


def test_min_new_tokens_replaces_min_length_as_in_generate() -> None:
    end = {"eos_token_id": 2, "do_sample": True, "top_k": 0, "min_length": 20}
    names = [
        [stage.name for stage in stages(LOGITS, GenerationConfig(**end, **more), np.array([3, 1]))]
        for more in ({}, {"min_new_tokens": 0}, {"min_new_tokens": 1})
    ]
    assert names == [
        ["logits", "penalties", "temperature"],
        ["logits", "temperature"],
        ["logits", "penalties", "temperature"],
    ]


def test_without_a_seed_one_is_chosen_for_all_temperatures(tales_model: gpt2onnx.Model) -> None:
    one, other = next_token(tales_model, PROMPT, temperatures=[1.0, 1.0], draws=200).choices
    assert np.array_equal(one.counts, other.counts)
    assert one.options.seed == other.options.seed is not None
    again = next_token(tales_model, PROMPT, temperatures=[1.0], draws=200, seed=one.options.seed).choices[0]
    assert np.array_equal(one.counts, again.counts)
    assert not np.array_equal(
        one.counts, next_token(tales_model, PROMPT, temperatures=[1.0], draws=200).choices[0].counts
    )


def test_none_of_the_likeliest(command_line: CommandLine, tales_bundle: Path, tales_model: gpt2onnx.Model) -> None:
    done = command_line("next", PROMPT, "-m", tales_bundle, "--top", 0, "--draws", 5, "--token", " king", "--json")
    (record,) = json.loads(done.out)["temperatures"]
    assert (done.code, record["candidates"]) == (0, [])
    assert command_line("next", PROMPT, "-m", tales_bundle, "--top", 0).code == 0
    found = next_token(tales_model, PROMPT)
    assert found.rows(top=0) == []
    with pytest.raises(OptionError, match="top must be a whole number, at least 0, not -1"):
        found.rows(top=-1)


def test_n_draws_are_n_sequences_of_one_request(tales_model: gpt2onnx.Model) -> None:
    (choice,) = next_token(tales_model, PROMPT, draws=50, seed=3).choices
    result = tales_model.generate(PROMPT, max_new_tokens=1, do_sample=True, seed=3, num_return_sequences=50)
    drawn = np.bincount([sequence.token_ids[0] for sequence in result.sequences], minlength=len(choice.counts))
    assert np.array_equal(choice.counts, drawn)


def test_json(command_line: CommandLine, tales_bundle: Path, tales_reference: Reference, golden: Golden) -> None:
    done = command_line(
        "next", PROMPT, "-m", tales_bundle, "--temperature", 0.1, 1, 5, "--top-k", 0, "--top-p", 0.9, "--top", 4,
        "--token", " king", "--draws", 300, "--seed", 5, "--json",
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    record = json.loads(done.out)
    assert [each["temperature"] for each in record["temperatures"]] == list(TEMPERATURES)
    ids, king_id = record["prompt_ids"], record["temperatures"][0]["tokens"][" king"]["token_id"]

    def torchs() -> dict[str, list[float]]:
        import torch

        logits = torch.from_numpy(tales_reference.live_logits(np.array(ids))[-1])
        logprobs = [float((logits / each).log_softmax(-1)[king_id]) for each in TEMPERATURES]
        return {"top": logits.topk(4).indices.tolist(), "king": logprobs}

    expected = golden.answer(["king", ids, king_id], torchs)
    for each, logprob in zip(record["temperatures"], expected["king"], strict=True):
        assert [one["token_id"] for one in each["candidates"]] == expected["top"]
        assert [one["rank"] for one in each["candidates"]] == [1, 2, 3, 4]
        king = each["tokens"][" king"]
        assert king["stages"]["temperature"]["probability"] == pytest.approx(math.exp(logprob), rel=1e-3)
        kept = king["stages"]["top_p"]["score"] is not None
        assert kept == (king["stages"]["top_p"]["probability"] > 0)
        assert king["expected"] == pytest.approx(300 * king["stages"]["top_p"]["probability"])
        # Five standard deviations of a binomial count.
        spread = math.sqrt(king["expected"] * (1 - king["expected"] / 300))
        assert abs(king["drawn"] - king["expected"]) <= 5 * spread + 1e-9
        assert each["candidates_left"]["temperature"] == 8192 > each["candidates_left"]["top_p"] > 0


def test_temperatures_in_a_row_before_or_after_the_prompt(command_line: CommandLine, tales_bundle: Path) -> None:
    model = ["-m", tales_bundle, "--json", "--top", 3]
    expected = command_line("next", PROMPT, *model, "--temperature", 0.1, "--temperature", 1, "--temperature", 5.0)
    assert expected.code == 0
    assert len(json.loads(expected.out)["temperatures"]) == 3
    for arguments in (
        [PROMPT, "--temperature", 0.1, 1, 5, *model],
        ["--temperature", 0.1, 1, 5, PROMPT, *model],
        [*model, "--temperature", "1e-1", "1", "+5", "--", PROMPT],
        ["--temperature=0.1", 1, PROMPT, "--temperature", 5, *model],
        ["--temperature", 0.1, "--temperature", 1, 5, *model, PROMPT],
    ):
        assert command_line("next", *arguments) == expected, arguments
    done = command_line("next", *model, "--temperature", 0.1, 1, 5, stdin=PROMPT + "\n")
    assert done == expected
    # A prompt that is a number.
    one = command_line("next", "5", *model)
    assert one.code == 0
    assert command_line("next", "5", "--temperature", 1, *model) == one
    assert command_line("next", *model, "--temperature", 1, "--", "5") == one
    # Values of other options are their own.
    assert command_line("next", PROMPT, *model, "--top-k", 5, "--temperature", 1, "--top", 2, "--top-p", 1).code == 0


def test_the_table(command_line: CommandLine, tales_bundle: Path) -> None:
    command = ["next", PROMPT, "-m", tales_bundle, "--temperature", 1, 2, "--top-p", 0.5, "--token", " king"]
    command += ["--draws", 100, "--seed", 1]
    record = json.loads(command_line(*command, "--json").out)
    done = command_line(*command)
    assert (done.code, done.err) == (0, "")
    blocks = done.out.strip().split("\n\n")
    assert len(blocks) == 3
    for block, each in zip(blocks, record["temperatures"], strict=False):
        for one in each["candidates"]:
            (line,) = [line for line in block.splitlines() if line.startswith(repr(one["piece"]) + " ")]
            assert line.split()[-2] == str(one["drawn"])
            assert f"{one['stages']['logits']['score']:.3f}" in line
            out = one["stages"]["top_p"]["score"] is None
            assert (line.split()[-3] == "-") == out
        left = block.splitlines()[-1]
        assert left.startswith("candidates left")
        assert str(each["candidates_left"]["top_p"]) in left.split()


def test_a_bundle_s_own_options_hold(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = make_checkpoint()
    settings = {"do_sample": True, "top_k": 3, "temperature": 0.5, "num_beams": 2, "repetition_penalty": 2.0}
    (folder / "generation_config.json").write_text(json.dumps(settings), "utf-8")
    model = gpt2onnx.load(gpt2onnx.export(folder, tmp_path / "bundle").folder, threads=1)
    (choice,) = next_token(model, "abc").choices
    assert [stage.name for stage in choice.stages] == ["logits", "penalties", "temperature", "top_k"]
    assert choice.options.temperature == 0.5
    assert np.count_nonzero(choice.probabilities) == 3


def test_a_token_is_named_without_what_stands_around_a_text(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = make_checkpoint()
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    start = tokenizer.id_to_token(256)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, 256)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    model = gpt2onnx.load(gpt2onnx.export(folder, tmp_path / "bundle").folder, threads=1)
    assert len(model.prompt_ids("a")) == 2
    assert [token_of(model, "a")] == tokenizer.encode("a", add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("arguments", "code", "hint"),
    [
        ([PROMPT, "--token", " pizza"], 1, "not one token of this model, but 4: ' p' 'iz' 'z' 'a'"),
        ([PROMPT, "--token", "ë"], 1, "b'\\xc3' b'\\xab'"),
        ([PROMPT, "--token", ""], 1, "none"),
        ([PROMPT, "--temperature", 0], 1, "temperature"),
        ([PROMPT, "--seed", 1], 2, "--draws"),
        ([PROMPT, "--temperature"], 2, "--temperature"),
        ([PROMPT, "--temperature", "hot"], 2, "hot"),
        ([PROMPT, "another", "--temperature", 1], 2, "another"),
        ([PROMPT, "--draws", -1], 2, "--draws"),
        ([PROMPT, "--prompt-ids", "1"], 2, "--prompt-ids"),
    ],
)
def test_what_cannot_be_done(
    arguments: list[object], code: int, hint: str, command_line: CommandLine, tales_bundle: Path
) -> None:
    done = command_line("next", "-m", tales_bundle, *arguments)
    assert (done.code, done.out) == (code, ""), done
    assert done.err.startswith("gpt2onnx: ")
    assert done.err.count("\n") == 1
    assert hint in done.err


TEXTS = ("Once upon a time", "Zoë 😀, 狐狸\n\ttab  two spaces", "<|endoftext|>Once<|endoftext|>", " ", "")


@pytest.mark.parametrize("text", TEXTS)
def test_tokens(text: str, command_line: CommandLine, tales_bundle: Path, golden: Golden) -> None:
    def transformers() -> dict[str, list[Any]]:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(FOLDER)
        ids = tokenizer.encode(text)
        return {"ids": ids, "entries": tokenizer.convert_ids_to_tokens(ids)}

    done = command_line("tokens", text, "-m", tales_bundle, "--json")
    assert (done.code, done.err) == (0, "")
    record = json.loads(done.out)
    assert record["text"] == text
    expected = golden.answer(["tokens", text], transformers)
    assert record["ids"] == expected["ids"]
    assert [each["id"] for each in record["tokens"]] == record["ids"]
    assert [each["entry"] for each in record["tokens"]] == expected["entries"]
    # The tokens are the text's bytes, cut into pieces; one that is whole characters says which.
    assert bytes.fromhex("".join(each["bytes"] for each in record["tokens"])).decode() == text
    for each in record["tokens"]:
        if each["piece"] is not None:
            assert each["piece"].encode().hex() == each["bytes"]
            assert text[each["start"] : each["end"]] == each["piece"]
        else:
            assert bytes.fromhex(each["bytes"]) in text[each["start"] : each["end"]].encode()


def test_tokens_from_standard_input_and_as_a_table(command_line: CommandLine, tales_bundle: Path) -> None:
    text = "Zoë 😀 said"
    done = command_line("tokens", "-m", tales_bundle, stdin=text + "\n")
    assert (done.code, done.err) == (0, "")
    assert done == command_line("tokens", text, "-m", tales_bundle)
    header, *rows, summary = done.out.splitlines()
    record = json.loads(command_line("tokens", text, "-m", tales_bundle, "--json").out)
    assert header.split() == ["piece", "entry", "id", "start", "end"]
    assert [int(row.split()[-3]) for row in rows] == record["ids"]
    assert any(row.startswith(r"b'\xc3'") for row in rows)
    assert summary.startswith(f"{len(rows)} tokens, {len(text)} characters, {len(text.encode())} bytes")


def test_bytes_of_the_whole_vocabulary(tales_model: gpt2onnx.Model) -> None:
    """Each entry's bytes are those of the tokenizers library, if they are whole characters."""
    whole = 0
    for token in range(tales_model.config.vocab_size):
        piece = tales_model.tokenizer.piece(token)
        decoded = tales_model.tokenizer._tokenizer.decode([token], skip_special_tokens=False)
        if isinstance(piece, str):
            whole += 1
            assert piece == decoded, token
        else:
            assert "\N{REPLACEMENT CHARACTER}" in decoded, token
    assert whole > 8000


def test_bytes_of_vocabularies_that_fall_back_to_bytes(tmp_path: Path) -> None:
    vocab = {"<0xC3>": 0, "<0xAB>": 1, "a": 2}
    original = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    original.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    original.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    ids = tokenizer.encode("aë")
    assert ids == [2, 0, 1]
    assert b"".join(tokenizer.token_bytes(token) for token in ids) == "aë".encode()
    assert [tokenizer.piece(token) for token in ids] == ["a", b"\xc3", b"\xab"]
    assert tokenizer.piece(99) == ""
