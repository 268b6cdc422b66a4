"""Published networks with model_type gpt2: their configurations, scaled down and with random weights, give transformers' logits."""

from typing import Any

import pytest
from support.checkpoints import ALL_BYTES_AND_END, MakeCheckpoint
from support.graphs import assert_matches_pytorch
from support.reference import Reference
from support.tokens import assert_same_tokens

import gpt2onnx

SUMMARY = {
    "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
    "summary_use_proj": True,
}  # fmt: skip
BY_LAYER = {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": True}
# What each config.json says beyond GPT-2's defaults.
PUBLISHED: dict[str, dict[str, Any]] = {
    "distilbert/distilgpt2": SUMMARY | {"_num_labels": 1, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 6},
    "cerebras/Cerebras-GPT-111M": {"activation_function": "gelu", "n_embd": 768, "n_head": 12, "n_inner": 3072, "n_layer": 10, "n_positions": 2048},
    "cerebras/Cerebras-GPT-256M": {"activation_function": "gelu", "n_embd": 1088, "n_head": 17, "n_inner": 4352, "n_layer": 14, "n_positions": 2048},
    "microsoft/DialoGPT-small": SUMMARY | {"n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "task_specific_params": {"conversational": {"max_length": 1000}}},
    "microsoft/DialoGPT-medium": SUMMARY | {"n_ctx": 1024, "n_embd": 1024, "n_head": 16, "n_layer": 24, "output_past": True},
    "codeparrot/codeparrot-small": SUMMARY | BY_LAYER | {"bos_token_id": 0, "eos_token_id": 0, "n_embd": 768, "n_head": 12, "n_inner": None, "n_layer": 12, "vocab_size": 32768},
    "rinna/japanese-gpt2-small": SUMMARY | {"bos_token_id": 1, "eos_token_id": 2, "n_embd": 768, "n_head": 12, "n_inner": 3072, "n_layer": 12, "vocab_size": 32000, "gradient_checkpointing": False},
    "rinna/japanese-gpt2-xsmall": SUMMARY | {"bos_token_id": 1, "eos_token_id": 2, "n_embd": 512, "n_head": 8, "n_inner": 2304, "n_layer": 6, "vocab_size": 32000, "gradient_checkpointing": False},
    "ai-forever/rugpt3small_based_on_gpt2": SUMMARY | {"n_ctx": 2048, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 2048, "vocab_size": 50264},
    "aubmindlab/aragpt2-base": SUMMARY | {"bos_token_id": 0, "eos_token_id": 0, "n_embd": 768, "n_head": 12, "n_inner": None, "n_layer": 12, "vocab_size": 64000},
    "AI-Sweden-Models/gpt-sw3-126m": {"activation_function": "gelu", "apply_query_key_layer_scaling": True, "bos_token_id": 2, "eos_token_id": 3, "n_embd": 768, "n_head": 12, "n_inner": 3072, "n_layer": 12, "n_positions": 2048, "normalize_attention_scores": True, "pad_token_id": 0, "vocab_size": 64000},
    "stanford-crfm/alias-gpt2-small-x21": SUMMARY | BY_LAYER | {"n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_inner": None, "n_layer": 12},
    "uer/gpt2-chinese-cluecorpussmall": SUMMARY | {"n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "tokenizer_class": "BertTokenizer", "vocab_size": 21128},
}  # fmt: skip
HEAD_SIZE = 8  # in place of 64


def scaled(config: dict[str, Any]) -> dict[str, Any]:
    """The same proportions: as many heads, two layers, few tokens and positions."""
    small = {"n_embd": config["n_head"] * HEAD_SIZE, "n_layer": 2, "n_positions": 64, "vocab_size": ALL_BYTES_AND_END}
    if config.get("n_inner"):
        small["n_inner"] = config["n_inner"] * small["n_embd"] // config["n_embd"]
    if "n_ctx" in config:
        small["n_ctx"] = 64
    return config | small


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration(
    name: str, make_checkpoint: MakeCheckpoint, reference_of: type[Reference], tmp_path_factory: pytest.TempPathFactory
) -> None:
    checkpoint, target = make_checkpoint(**scaled(PUBLISHED[name])), tmp_path_factory.mktemp("public") / "bundle"
    gpt2onnx.export(checkpoint, target)
    reference = reference_of(checkpoint)
    assert_matches_pytorch(target, reference)
    result = gpt2onnx.load(target, threads=1).generate([5, 6, 7], max_new_tokens=12)
    (expected,) = reference.tokens([5, 6, 7], do_sample=False, max_new_tokens=12)
    assert_same_tokens(result.sequences[0].token_ids, expected, name)
