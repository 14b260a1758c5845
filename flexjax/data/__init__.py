"""Data that comes with the package: a tiny pretrained model and what to try on it.

Made by `scripts/pretrain_tiny.py` and `scripts/tiny_world.py`; see `tiny/README.md`.
"""

from __future__ import annotations

from pathlib import Path

_DATA_DIR = Path(__file__).parent


def tiny_model_dir() -> Path:
    """Directory of the shipped model, in Hugging Face layout."""
    return _DATA_DIR / "tiny"


def demo_dataset() -> Path:
    """A finetuning set (JSON lines of `messages`): the model's own facts in a pirate's voice."""
    return _DATA_DIR / "finetune_demo.jsonl"


def demo_prompts() -> list[str]:
    """Questions that the shipped model can answer."""
    return (_DATA_DIR / "demo_prompts.txt").read_text(encoding="utf-8").splitlines()
