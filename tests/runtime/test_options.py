"""Generation options: defaults, merging, generation_config.json, and what is refused."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
from support.checkpoints import MakeCheckpoint
from support.golden import Golden
from support.paths import README
from support.reference import Reference
from support.tokens import assert_same_tokens
from support.versions import skip_with_transformers_4

import gpt2onnx
from gpt2onnx.errors import CheckpointError, OptionError
from gpt2onnx.runtime.option_table import NOT_SUPPORTED
from gpt2onnx.runtime.options import BY_NAME, OPTIONS, SAMPLING_OPTIONS, GenerationConfig
from gpt2onnx.runtime.requests import GenerationOptions

PROMPT = [40, 41, 42]


def test_defaults_are_those_of_transformers(golden: Golden) -> None:
    def transformers() -> dict[str, Any]:
        from transformers import GenerationConfig as Theirs

        # From transformers 5 on None stands for a default in a configuration.
        if hasattr(Theirs, "_get_default_generation_params"):
            return Theirs._get_default_generation_params()
        return vars(Theirs())

    ours = GenerationConfig()
    theirs = golden.answer(
        "defaults",
        lambda: {name: value for name, value in transformers().items() if name in BY_NAME},
    )
    shared = [name for name in BY_NAME if name in theirs and name != "max_length"]
    assert len(shared) >= 12
    assert {name: getattr(ours, name) for name in shared} == {name: theirs[name] for name in shared}


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 2.0},
        {"max_new_tokens": True},
        {"max_length": -1},
        {"max_time": -1.0},
        {"max_time": float("inf")},
        {"min_length": -1},
        {"num_beams": 0},
        {"num_beams": 10**9},
        {"num_return_sequences": 10**9, "do_sample": True},
        {"temperature": -1.0},
        {"temperature": 1e-320},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e300},
        {"top_k": -1},
        {"top_k": 5.5},
        {"top_p": 1.1},
        {"top_p": -0.1},
        {"min_p": 2},
        {"typical_p": 0.0},
        {"length_penalty": float("inf")},
        {"length_penalty": float("nan")},
        {"early_stopping": "always"},
        {"early_stopping": 1.5},
        {"do_sample": "yes"},
        {"do_sample": 1},
        {"seed": -1},
        {"seed": 1.5},
        {"eos_token_id": "x"},
        {"eos_token_id": 1.5},
        {"eos_token_id": [1, None]},
        {"eos_token_id": 10**30},
        {"suppress_tokens": 5},
        {"suppress_tokens": [-2]},
        {"suppress_tokens": {"a": 1}},
        {"bad_words_ids": []},
        {"bad_words_ids": [[]]},
        {"bad_words_ids": [5]},
        {"bad_words_ids": [[10**30]]},
        {"stop": 5},
        {"stop": ""},
        {"stop": [""]},
        {"stop": [5]},
        {"top_h": 0.0},
        {"top_h": 1.5},
        {"epsilon_cutoff": -0.1},
        {"eta_cutoff": 2},
        {"renormalize_logits": 1},
        {"encoder_repetition_penalty": 0},
        {"encoder_no_repeat_ngram_size": -1},
        {"sequence_bias": []},
        {"sequence_bias": {"5": 1.0}},
        {"sequence_bias": [[5, 1.0]]},
        {"sequence_bias": [[[], 1.0]]},
        {"sequence_bias": [[[5], "much"]]},
        {"sequence_bias": [[[5], float("nan")]]},
        {"sequence_bias": [[[-1], 1.0]]},
        {"sequence_bias": "[[5], 1.0]"},
        {"begin_suppress_tokens": 5},
        {"forced_bos_token_id": -1},
        {"forced_bos_token_id": 10**30},
        {"forced_eos_token_id": [10**30]},
        {"forced_eos_token_id": [-1]},
        {"forced_eos_token_id": "x"},
        {"exponential_decay_length_penalty": 1.5},
        {"exponential_decay_length_penalty": [5]},
        {"exponential_decay_length_penalty": [-1, 1.5]},
        {"exponential_decay_length_penalty": [5, 0.0]},
        {"exponential_decay_length_penalty": [5, float("inf")]},
        {"logprobs": -1},
        {"num_return_sequences": 2},
        {"num_return_sequences": 3, "num_beams": 2},
        {"prompt_lookup": 3, "num_beams": 2},
        {"forced_bos_token_id": 5, "suppress_tokens": [4, 5]},
        {"forced_eos_token_id": [4, 5], "suppress_tokens": [5, 4, 6]},
        {"top_k": -(10**5000)},
        {"bad_words_ids": [[5]] * 10_001},
        {"sequence_bias": [[[5], 1.0]] * 10_001},
        {"stop": ["x"] * 10_001},
        {"suppress_tokens": [5] * 1_000_001},
        {"eos_token_id": [5] * 1_000_001},
    ],
)
def test_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError) as failure:
        GenerationConfig(**options)
    message = str(failure.value)
    assert "\n" not in message
    assert any(name in message for name in options)


def test_unknown_name() -> None:
    with pytest.raises(OptionError, match="top_q"):
        GenerationConfig().merged({"top_q": 1})


def test_merged_lengths() -> None:
    base = GenerationConfig(max_new_tokens=5)
    assert base.merged({"max_length": 9}).new_tokens(4) == 5
    assert base.merged({"max_length": 20}).new_tokens(4) == 16
    assert base.merged({"max_length": 20, "max_new_tokens": 3}).new_tokens(4) == 3
    assert base.merged({"max_new_tokens": None}).new_tokens(4) == 64
    assert GenerationConfig().new_tokens(1000) == 64


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"do_sample": True},
        {"do_sample": True, "temperature": None, "top_k": None, "top_p": None, "typical_p": None},
        {"do_sample": True, "top_k": 3, "temperature": 1.5},
        {"do_sample": True, "top_k": 0, "top_p": 0.5, "min_p": 0.02},
        {"do_sample": False, "temperature": 0.3, "top_k": 2},
        {"do_sample": False, "temperature": 0.0, "top_k": -1, "top_p": 0.5},
        {"temperature": 0, "suppress_tokens": [-1, 70]},
        {"bos_token_id": None, "eos_token_id": None},
        {"eos_token_id": [50, 60, 70, 80, 90], "repetition_penalty": 1.4},
        {"eos_token_id": -1},
        {"eos_token_id": []},
        {"num_beams": 3, "length_penalty": 0.1, "early_stopping": True, "eos_token_id": list(range(0, 250, 5))},
        {"num_beams": None, "num_return_sequences": None, "min_length": None, "repetition_penalty": None},
        {"max_length": 14},
        {"max_length": 30, "max_new_tokens": 4},
        {"suppress_tokens": list(range(50)), "bad_words_ids": [[60], [70, 71]], "no_repeat_ngram_size": 2},
        {"transformers_version": "4.30.0", "_from_model_config": True, "renormalize_logits": False, "unheard_of": 1},
        {"forced_eos_token_id": 7, "begin_suppress_tokens": list(range(40)), "encoder_no_repeat_ngram_size": 1},
        {"sequence_bias": [[[60], 9.5], [[60, 61], -3.5]], "exponential_decay_length_penalty": [3, 2.0]},
        {"do_sample": True, "epsilon_cutoff": 0.01, "eta_cutoff": 0.01, "top_h": 0.5, "renormalize_logits": True},
        {"do_sample": False, "top_h": 0, "epsilon_cutoff": 5.0, "encoder_repetition_penalty": 0.6},
        {"do_sample": True, "epsilon_cutoff": 5.0, "eta_cutoff": -1.0, "forced_bos_token_id": 9999},
    ],
)  # fmt: skip
def test_generation_config_file_counts_as_in_transformers(
    content: dict[str, Any], make_checkpoint: MakeCheckpoint, reference_of: type[Reference], tmp_path: Path
) -> None:
    if content.get("top_h") or {"top_k", "num_beams"} & {name for name, value in content.items() if value is None}:
        skip_with_transformers_4("it has no top_h, and None turns an option off")
    folder = make_checkpoint(weights_seed=3)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 256, "pad_token_id": 256} | content))
    model = gpt2onnx.load(gpt2onnx.export(folder, tmp_path / "bundle").folder, threads=1)
    reference = reference_of(folder, f"{folder.name} with {json.dumps(content)}")
    length = {} if "max_length" in content or "max_new_tokens" in content else {"max_new_tokens": 12}
    for seed in range(2):
        do_sample = bool(content.get("do_sample"))
        result = model.generate(PROMPT, seed=seed, do_sample=do_sample, **length)
        (expected,) = reference.tokens(PROMPT, seed, **length)
        assert_same_tokens(result.sequences[0].token_ids, expected, content)


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        ({"eos_token_id": "<|endoftext|>"}, "eos_token_id must be a token id or a list of at most 1,000,000 token ids"),
        ({"do_sample": True, "temperature": -1.0}, "temperature must be a number from 0"),
        ({"min_length": -1}, "min_length must be a whole number from 0"),
        ({"repetition_penalty": -1}, "repetition_penalty must be"),
        ({"num_beams": 0}, "num_beams must be"),
        ({"max_length": 0}, "max_length must be"),
    ],
)
def test_an_export_refuses_options_that_no_bundle_can_have(
    content: dict[str, Any], hint: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    folder = make_checkpoint()
    (folder / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"/generation_config.json: {hint}"):
        gpt2onnx.export(folder, tmp_path / "bundle")
    (folder / "generation_config.json").unlink()
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | content))
    with pytest.raises(CheckpointError, match=f"/config.json: {hint}"):
        gpt2onnx.export(folder, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_no_null_reaches_other_runtimes(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """onnxruntime-genai reads numbers only, and needs an end token."""
    folder = make_checkpoint()
    for ends in (None, []):
        content = {"bos_token_id": None, "eos_token_id": ends, "pad_token_id": None}
        (folder / "generation_config.json").write_text(json.dumps(content))
        bundle = gpt2onnx.export(folder, tmp_path / "bundle", force=True).folder
        written = json.loads((bundle / "genai_config.json").read_text())["model"]
        assert [written[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [256] * 3


@pytest.mark.parametrize("name", SAMPLING_OPTIONS)
def test_a_sampling_option_turns_sampling_on(name: str) -> None:
    given = {name: 1}
    assert GenerationConfig().merged(given).do_sample
    assert not GenerationConfig().merged(given | {"do_sample": False}).do_sample
    assert not GenerationConfig().merged({name: None}).do_sample


def test_other_options_dont() -> None:
    assert not GenerationConfig().merged({"repetition_penalty": 1.1, "num_beams": 2}).do_sample


def test_temperature_0_is_greedy_search() -> None:
    for given in (
        {"temperature": 0},
        {"temperature": 0.0, "do_sample": True},
        {"temperature": 0, "seed": 3, "top_k": 5},
    ):
        assert GenerationConfig().merged(given).strategy == "greedy"
        assert GenerationConfig(do_sample=True).merged(given).strategy == "greedy"
    assert GenerationConfig.from_file_content({"do_sample": True, "temperature": 0}).strategy == "greedy"


@pytest.mark.parametrize(
    "value",
    [
        {"bad_words_ids": [[5]]}, {"suppress_tokens": [5]}, {"begin_suppress_tokens": [5]}, {"top_h": 0.5}, {"min_p": 0.2},
        {"sequence_bias": [[[5], 1.0]]}, {"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}, {"forced_eos_token_id": 7},
        {"exponential_decay_length_penalty": [3, 1.1]}, {"eos_token_id": 9}, {"stop": ["x"]}, {"max_new_tokens": 5}, {"typical_p": 0.5},
        {"num_beams": 3}, {"top_p": 0.5}, {"min_length": 4},
    ],
    ids=lambda value: next(iter(value)),
)  # fmt: skip
def test_none_switches_off_what_a_bundle_sets(value: dict[str, Any]) -> None:
    (name,) = value
    base = GenerationConfig(do_sample=True, **value)
    assert getattr(base.merged({}), name) == getattr(base, name)
    assert base.merged({name: None}) == GenerationConfig(do_sample=True)


def test_none_as_top_k_takes_all_tokens() -> None:
    """As in transformers, whose default of 50 holds only where nothing is said."""
    assert GenerationConfig().merged({"top_k": None}).top_k == 0


def test_names_and_types_for_type_checkers_are_those_of_the_table() -> None:
    for (name, hint), option in zip(get_type_hints(GenerationOptions).items(), OPTIONS, strict=True):
        assert name == option.name
        # Without the ranges, and with None, which switches any option off.
        # `Model.generate` takes a seed for each prompt.
        lists = Sequence[int] if name == "seed" else None
        assert hint == get_type_hints(GenerationConfig)[name] | lists | None, name
        assert option.help.endswith("."), name


def test_every_option_of_transformers_is_here_or_among_the_differences(golden: Golden) -> None:
    def transformers() -> list[str]:
        from transformers import GenerationConfig as Theirs

        return sorted(vars(Theirs()).keys() - {"_from_model_config", "transformers_version"})

    page = (README.parent / "docs" / "differences.md").read_text("utf-8")
    rows = re.findall(r"^\| (`[^|]*) \|", page.partition("## Options that mean")[0], re.MULTILINE)
    left_out = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert not left_out & BY_NAME.keys()
    assert set(golden.answer("names of options", transformers)) <= BY_NAME.keys() | left_out
    # The page and the warnings about checkpoints know of the same ones.
    assert NOT_SUPPORTED.keys() <= left_out


def test_what_a_checkpoint_asks_for_and_cannot_have_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Options that transformers would apply are never passed over in silence; neutral values of them are no news."""
    GenerationConfig.from_file_content({"watermarking_config": None, "penalty_alpha": 0.0, "use_cache": True})
    assert not caplog.records
    GenerationConfig.from_file_content({"watermarking_config": {"seeding_scheme": "lefthash"}, "dola_layers": "low"})
    asked = [record.message.split()[3] for record in caplog.records]
    assert asked == ["dola_layers,", "watermarking_config,"]


def test_stop_strings_of_a_checkpoint_hold() -> None:
    assert GenerationConfig.from_file_content({"stop_strings": ["END"]}).stop_strings == ("END",)


def test_top_k_beside_the_bundles_penalty_alpha_is_contrastive_search() -> None:
    assert GenerationConfig(penalty_alpha=0.6).merged({"top_k": 4}).strategy == "contrastive search"
    assert GenerationConfig(penalty_alpha=0.6).merged({"top_k": 4, "penalty_alpha": None}).strategy == "sampling"


def test_numbers_of_numpy_are_numbers() -> None:
    given = {
        "suppress_tokens": np.array([1, 2]),
        "seed": np.int64(3),
        "temperature": np.float32(0.5),
        "do_sample": np.bool_(True),
    }
    plain = {"suppress_tokens": [1, 2], "seed": 3, "temperature": 0.5, "do_sample": True}
    nested = {"eos_token_id": [np.int32(5)], "sequence_bias": [(np.array([1]), np.float64(2))]}
    assert GenerationConfig(**given, **nested) == GenerationConfig(
        **plain, eos_token_id=[5], sequence_bias=[([1], 2.0)]
    )
    assert GenerationConfig(**given) == GenerationConfig().merged(given)
    assert hash(GenerationConfig()) == hash(GenerationConfig(max_new_tokens=None))


def test_half_a_surrogate_pair_is_a_text_like_any_other(tales_model: gpt2onnx.Model) -> None:
    options = {"stop": "\ud83d", "negative_prompt": "\udc00 a", "guidance_scale": 1.5, "max_new_tokens": 2}
    result = tales_model.generate("Once", **options)
    assert result.request_hash
    assert GenerationConfig(**options).to_dict()["stop"] == "\ud83d"


@pytest.mark.parametrize("name", [option.name for option in OPTIONS])
def test_an_error_shows_a_value_that_json_takes(name: str) -> None:
    option = BY_NAME[name]
    with pytest.raises(OptionError) as refused:
        option.checked({1: object()})
    assert "such texts" not in str(refused.value) or "a text" in str(refused.value)
    if example := re.search(r"a list such as (\[.*?\])(?: with| or|, not)", str(refused.value)):
        assert option.takes(json.loads(example[1]))
