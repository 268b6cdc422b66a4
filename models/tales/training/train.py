"""Trains `tales`, the GPT-2 that ships with gpt2onnx, from plain text files.

    python models/tales/training/train.py --corpus DIR --work /tmp/tales --out models/tales

`DIR` holds stories-train.txt and stories-valid.txt: documents that end in a line `<|endoftext|>`.
The run is seeded, and resumable: started again with the same `--work` it goes on from its last
checkpoint and visits the same batches in the same order. The weights that scored best on the
validation text are written to `--out` in the Hugging Face layout, in float16.

Needs the extra `train` (torch, transformers). Nothing else in gpt2onnx imports this file.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 8192
CONTEXT = 512
# Most steps see half the context, at random in the first or second half of the positions: attention
# over 256 costs a quarter less time, and the last steps are enough to learn the longer distances.
SHORT_CONTEXT, SHORT_SHARE = CONTEXT // 2, 0.7
STEP_TOKENS, MICRO_BATCH_TOKENS = 8192, 2048
WARM_UP = 100  # steps
# Muon moves the matrices inside the blocks, AdamW the embeddings, biases and norms.
MUON_LR, ADAMW_LR = 6e-3, 2e-3
EVALUATE_EVERY, SAVE_EVERY = 200, 100  # steps


def documents(path: Path) -> Iterator[str]:
    """The stories of a corpus file, without their end marks."""
    for document in path.read_text(encoding="utf-8").split(END_OF_TEXT + "\n"):
        if document.strip():
            yield document


def train_tokenizer(corpus: Path) -> Tokenizer:
    """A byte-level BPE of GPT-2's form: 256 bytes, merges, and the end-of-text token last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents(corpus / "stories-train.txt"), trainer)
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return tokenizer


def encode(tokenizer: Tokenizer, path: Path) -> torch.Tensor:
    """One stream of token ids, int64 [tokens], each document closed by the end-of-text token."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(list(documents(path))):
        ids += [*encoding.ids, end]
    return torch.tensor(ids)


def batch_at(step: int, context: int, stream: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One step's windows [batch, context + 1] and first positions [batch]: a function of step and seed alone.

    An epoch cuts the stream into windows at an offset of its own and visits each once.
    """
    batch = STEP_TOKENS // context
    windows = (len(stream) - 1) // context - 1
    rows = []
    for sample in range(step * batch, (step + 1) * batch):
        epoch, index = divmod(sample, windows)
        shuffle = np.random.default_rng([seed, context, epoch])
        start = int(shuffle.integers(context)) + context * int(shuffle.permutation(windows)[index])
        rows.append(stream[start : start + context + 1])
    first = np.random.default_rng([seed, step]).integers(CONTEXT // context, size=batch) * context
    return torch.stack(rows), torch.from_numpy(first)


def loss_of(model: torch.nn.Module, windows: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of the windows' next tokens, under bfloat16 autocast."""
    positions = first[:, None] + torch.arange(windows.shape[1] - 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(windows[:, :-1], position_ids=positions).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: torch.nn.Module, stream: torch.Tensor, windows: int | None = None) -> float:
    """Nats per token over consecutive windows of CONTEXT that do not overlap."""
    model.eval()
    total, count = 0.0, 0
    starts = range(0, len(stream) - 1, CONTEXT)
    chosen = list(starts) if windows is None else list(starts)[:: max(1, len(starts) // windows)]
    for start in chosen:
        window = stream[start : start + CONTEXT + 1][None]
        tokens = window.shape[1] - 1
        total += float(loss_of(model, window, torch.zeros(1, dtype=torch.int64))) * tokens
        count += tokens
    model.train()
    return total / count


def learning_rate(step: int, steps: int) -> float:
    """Share of the peak rate: linear warm-up, then a cosine down to zero."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / max(1, steps - WARM_UP)))


def optimizers(model: GPT2LMHeadModel) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embeddings, biases and norms."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        inside = ".h." in name and parameter.ndim == 2
        (matrices if inside else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=ADAMW_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def save(tokenizer: Tokenizer, weights: dict[str, torch.Tensor], config: GPT2Config, out: Path) -> None:
    """Writes the checkpoint in the Hugging Face layout, float16."""
    config.use_cache = True
    model = GPT2LMHeadModel(config)
    model.load_state_dict(weights)
    model.half().save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save(str(out / "tokenizer.json"))
    tokenizer_config = {
        "add_prefix_space": False,
        "bos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TEXT,
        "model_max_length": CONTEXT,
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": END_OF_TEXT,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")


def main() -> None:
    """Runs the training from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--corpus", type=Path, required=True, help="folder with stories-train.txt, stories-valid.txt")
    parser.add_argument("--work", type=Path, required=True, help="folder for the resumable state and the log")
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished checkpoint")
    parser.add_argument("--steps", type=int, default=2500, help="steps of 8,192 tokens")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)

    tokenizer_file = args.work / "tokenizer.json"
    if not tokenizer_file.exists():
        train_tokenizer(args.corpus).save(str(tokenizer_file))
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    train_stream = encode(tokenizer, args.corpus / "stories-train.txt")
    valid_stream = encode(tokenizer, args.corpus / "stories-valid.txt")
    valid_bytes = (args.corpus / "stories-valid.txt").stat().st_size
    nats_to_bits_per_byte = (len(valid_stream) - 1) / valid_bytes / math.log(2)

    end = tokenizer.token_to_id(END_OF_TEXT)
    config = GPT2Config(
        vocab_size=VOCAB_SIZE, n_positions=CONTEXT, n_embd=256, n_layer=6, n_head=8,
        embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    torch.manual_seed(args.seed)
    model = GPT2LMHeadModel(config)
    model.config.use_cache = False
    optims = optimizers(model)
    peaks = [[group["lr"] for group in optim.param_groups] for optim in optims]
    first, best = 0, math.inf
    state_file = args.work / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for optim, saved in zip(optims, state["optimizers"], strict=True):
            optim.load_state_dict(saved)
        first, best = state["step"], state["best"]
    print(
        f"{model.num_parameters():,} parameters, {len(train_stream):,} training tokens, from step {first}", flush=True
    )

    log = (args.work / "log.jsonl").open("a")
    started, running = time.monotonic(), []
    for step in range(first, args.steps):
        share = learning_rate(step, args.steps)
        for optim, rates in zip(optims, peaks, strict=True):
            for group, rate in zip(optim.param_groups, rates, strict=True):
                group["lr"] = rate * share
        context = SHORT_CONTEXT if step < SHORT_SHARE * args.steps else CONTEXT
        windows, positions = batch_at(step, context, train_stream, args.seed)
        micro = MICRO_BATCH_TOKENS // context
        step_loss = 0.0
        for part, first_position in zip(windows.split(micro), positions.split(micro), strict=True):
            loss = loss_of(model, part, first_position) * len(part) / len(windows)
            loss.backward()
            step_loss += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad()
        running.append(step_loss)

        done = step + 1
        if done % EVALUATE_EVERY == 0 or done == args.steps:
            valid = evaluate(model, valid_stream, None if done == args.steps else 64)
            row = {
                "step": done,
                "tokens": done * STEP_TOKENS,
                "train_loss": round(sum(running) / len(running), 4),
                "valid_loss": round(valid, 4),
                "valid_bits_per_byte": round(valid * nats_to_bits_per_byte, 4),
                "tokens_per_second": round((done - first) * STEP_TOKENS / (time.monotonic() - started)),
            }
            print(json.dumps(row), file=log, flush=True)
            print(row, flush=True)
            running = []
            if valid < best or done == args.steps:
                best = min(best, valid)
                torch.save(model.state_dict(), args.work / "best.pt")
        elif done % 20 == 0:
            rate = (done - first) * STEP_TOKENS / (time.monotonic() - started)
            print(f"step {done}  loss {running[-1]:.3f}  {rate:,.0f} tokens/s", flush=True)
        if done % SAVE_EVERY == 0 or done == args.steps:
            state = {
                "model": model.state_dict(),
                "optimizers": [optim.state_dict() for optim in optims],
                "step": done,
                "best": best,
            }
            torch.save(state, state_file.with_suffix(".new"))
            state_file.with_suffix(".new").replace(state_file)

    save(tokenizer, torch.load(args.work / "best.pt", weights_only=True), config, args.out)


if __name__ == "__main__":
    main()
