"""The configuration files of a bundle, for this runtime, transformers.js and onnxruntime-genai."""

from pathlib import Path
from typing import Any

from gpt2onnx.errors import CheckpointError, OptionError

from ..models import bundle, contract
from ..models.config import GPT2Config, read_json, write_json
from ..runtime.options import BY_NAME, GenerationConfig
from .checkpoint.checkpoint import Checkpoint


def write_configuration(checkpoint: Checkpoint, folder: Path, *, half: bool) -> None:
    """Writes config.json, generation_config.json and genai_config.json.

    Args:
        half: whether the graph computes in float16.

    Raises:
        CheckpointError: an option of the checkpoint's generation_config.json, or else its config.json, can't be used.
    """
    config = dict(checkpoint.raw_config) | {
        "model_type": "gpt2",
        "tie_word_embeddings": checkpoint.tied,
        # transformers.js fetches external data only where it is told to.
        "transformers.js_config": {"use_external_data_format": {"model.onnx": 1}, "dtype": "fp32"},
    }
    if half:
        config["transformers.js_config"]["kv_cache_dtype"] = "float16"
    write_json(folder / bundle.CONFIG, config)
    generation = _generation_config(checkpoint)
    write_json(folder / bundle.GENERATION_CONFIG, generation)
    write_json(folder / bundle.GENAI_CONFIG, _genai_config(checkpoint.config, generation))


def _generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint's own, or else the options that transformers derives from config.json."""
    path = checkpoint.folder / bundle.GENERATION_CONFIG
    if path.is_file():
        content = read_json(path)
    else:
        path = checkpoint.folder / bundle.CONFIG
        # GPT2Config's own defaults hold where config.json is silent; older files have more options than these ids.
        names = {"bos_token_id", "pad_token_id", *BY_NAME}
        given = {name: value for name, value in checkpoint.raw_config.items() if name in names}
        content = {"bos_token_id": 50256, "eos_token_id": 50256} | given
    options = {name: value for name, value in content.items() if value is not None}
    try:
        GenerationConfig.from_file_content(options)
    except OptionError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return options


def _genai_config(config: GPT2Config, generation: dict[str, Any]) -> dict[str, Any]:
    """The configuration for onnxruntime-genai: https://onnxruntime.ai/docs/genai/reference/config.html."""
    end = generation.get("eos_token_id")
    if end in (None, []):  # it requires one
        end = config.vocab_size - 1
    first_end = end[0] if isinstance(end, list) else end
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": generation.get("bos_token_id", first_end),
            "eos_token_id": end,
            "pad_token_id": generation.get("pad_token_id", first_end),
            "context_length": config.n_positions,
            "vocab_size": config.vocab_size,
            "decoder": {
                "filename": bundle.GRAPH,
                "head_size": config.head_size,
                "hidden_size": config.n_embd,
                "num_attention_heads": config.n_head,
                "num_key_value_heads": config.n_head,
                "num_hidden_layers": config.n_layer,
                "session_options": {"provider_options": []},
                "inputs": {
                    "input_ids": contract.INPUT_IDS,
                    "attention_mask": contract.ATTENTION_MASK,
                    "position_ids": contract.POSITION_IDS,
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": contract.LOGITS,
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"max_length": config.n_positions, "past_present_share_buffer": True},
    }
