"""The embedded model: a small GPT-2 trained on public-domain stories (see README.md beside this file)."""

from pathlib import Path

FOLDER = Path(__file__).parent
