"""Architectures that can be built by name, with random weights. Imports no jax."""

from __future__ import annotations

from flexjax.errors import ModelNotFoundError
from flexjax.model_config import ModelConfig, RopeConfig

_LLAMA31_ROPE = RopeConfig(500_000.0, "llama3", 8.0, 1.0, 4.0, 8192)

BUILTIN_MODELS: dict[str, ModelConfig] = {
    "llama-3.1-8b": ModelConfig(
        family="llama",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position=131072,
        rope=_LLAMA31_ROPE,
        rms_norm_eps=1e-5,
        tie_embeddings=False,
        eos_token_ids=(128001, 128008, 128009),
        bos_token_id=128000,
    ),
    "qwen2.5-14b": ModelConfig(
        family="qwen2",
        vocab_size=152064,
        hidden_size=5120,
        intermediate_size=13824,
        num_layers=48,
        num_heads=40,
        num_kv_heads=8,
        head_dim=128,
        max_position=32768,
        rope=RopeConfig(1_000_000.0),
        rms_norm_eps=1e-6,
        tie_embeddings=False,
        qkv_bias=True,
        eos_token_ids=(151645, 151643),
        bos_token_id=151643,
    ),
    "qwen2.5-32b": ModelConfig(
        family="qwen2",
        vocab_size=152064,
        hidden_size=5120,
        intermediate_size=27648,
        num_layers=64,
        num_heads=40,
        num_kv_heads=8,
        head_dim=128,
        max_position=32768,
        rope=RopeConfig(1_000_000.0),
        rms_norm_eps=1e-6,
        tie_embeddings=False,
        qkv_bias=True,
        eos_token_ids=(151645, 151643),
        bos_token_id=151643,
    ),
    "qwen3-8b": ModelConfig(
        family="qwen3",
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_layers=36,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position=40960,
        rope=RopeConfig(1_000_000.0),
        rms_norm_eps=1e-6,
        tie_embeddings=False,
        qk_norm=True,
        eos_token_ids=(151645, 151643),
        bos_token_id=151643,
    ),
    "tiny": ModelConfig(
        family="llama",
        vocab_size=1536,
        hidden_size=192,
        intermediate_size=512,
        num_layers=4,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
        max_position=1024,
        rope=RopeConfig(10_000.0),
        rms_norm_eps=1e-5,
        tie_embeddings=True,
        dtype="float32",
        eos_token_ids=(1, 0),
    ),
}
"""Architectures that can be built by name, with random weights."""


def builtin_model_config(name: str) -> ModelConfig:
    """Returns the built-in architecture `name`.

    Raises:
      ModelNotFoundError: If there is none of that name.
    """
    if name not in BUILTIN_MODELS:
        raise ModelNotFoundError(
            f"`model` must be a directory or one of {', '.join(sorted(BUILTIN_MODELS))}; "
            f"got {name!r}."
        )
    return BUILTIN_MODELS[name]
