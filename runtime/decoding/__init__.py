"""One sequence's decoding: logits in, next token out, as transformers and PyTorch choose it. Knows no network."""
