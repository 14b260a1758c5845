"""A random model on disk that FlexJAX, transformers and PEFT can all load."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from flexjax.io.hf_weights import save_weights
from flexjax.model_config import ModelConfig, RopeConfig
from flexjax.models.weights import random_weights

MODELS = {
    "60m": ModelConfig(
        family="llama",
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=1408,
        num_layers=8,
        num_heads=8,
        num_kv_heads=8,
        head_dim=64,
        max_position=2048,
        rope=RopeConfig(theta=10_000.0),
        rms_norm_eps=1e-5,
        tie_embeddings=False,
        dtype="float32",
    ),
    "quick": ModelConfig(
        family="llama",
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_position=512,
        rope=RopeConfig(theta=10_000.0),
        rms_norm_eps=1e-5,
        tie_embeddings=False,
        dtype="float32",
    ),
}
"""Architectures of the benchmark by name; no end token, so that lengths are what is asked for."""


def write_model(model_dir: str | Path, name: str, seed: int) -> ModelConfig:
    """Writes a model with random float32 weights and a tokenizer with one word per token.

    Args:
      model_dir: Directory to write to.
      name: One of `MODELS`.
      seed: Seed of the weights.

    Returns:
      The architecture.
    """
    config = MODELS[name]
    save_weights(model_dir, config, random_weights(config, "float32", seed))
    write_tokenizer(model_dir, config.vocab_size)
    return config


def write_tokenizer(model_dir: str | Path, vocab_size: int) -> None:
    """Writes a tokenizer with one word per token; see `word`."""
    vocab = {word(token): token for token in range(vocab_size)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=word(0)))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    backend.save(str(Path(model_dir) / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": word(0)}
    (Path(model_dir) / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def word(token: int) -> str:
    """The word that stands for a token."""
    return f"t{token}"


def random_tokens(config: ModelConfig, count: int, length: int, seed: int) -> np.ndarray:
    """Draws `count` sequences of `length` tokens, int32 [count, length]."""
    generator = np.random.default_rng(seed)
    return generator.integers(1, config.vocab_size, (count, length), dtype=np.int32)


def text_rows(tokens: np.ndarray) -> list[dict[str, str]]:
    """Dataset rows whose tokens are these, every token bearing loss."""
    return [{"text": " ".join(word(int(token)) for token in row)} for row in tokens]
