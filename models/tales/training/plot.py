"""Draws the loss curves of a training log.

python models/tales/training/plot.py LOG.jsonl LOSS.svg
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

log, picture = map(Path, sys.argv[1:])
rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
for name, label in (
    ("train_loss", "training (mean since the last evaluation)"),
    ("valid_loss", "validation, 512 tokens"),
):
    axes.plot([row["step"] for row in rows], [row[name] for row in rows], marker=".", label=label)
axes.set(xlabel="step of 8,192 tokens", ylabel="nats per token")
axes.grid(alpha=0.3)
axes.legend(frameon=False)
figure.savefig(picture)
