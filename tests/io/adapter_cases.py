"""Adapters for tests, and their comparison."""

import numpy as np

from flexjax.config import LORA_TARGETS, LoraConfig
from flexjax.io.peft_adapter import LoraAdapter, empty_arrays
from flexjax.model_config import ModelConfig, RopeConfig

BASE = ModelConfig(
    family="llama",
    vocab_size=50,
    hidden_size=24,
    intermediate_size=40,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    max_position=64,
    rope=RopeConfig(10_000.0),
    rms_norm_eps=1e-6,
    tie_embeddings=False,
    dtype="float32",
)


def draw_adapter(config, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    arrays = empty_arrays(config, BASE, dtype)
    layers = config.layers_to_transform or range(BASE.num_layers)
    for pair in arrays.values():
        for array in pair.values():
            for layer in layers:
                array[layer] = rng.standard_normal(array.shape[1:]).astype(dtype)
    return LoraAdapter(config, arrays)


def assert_same(ours, theirs):
    assert ours.config == theirs.config
    assert list(ours.arrays) == list(theirs.arrays)
    for name, pair in ours.arrays.items():
        for matrix, array in pair.items():
            other = theirs.arrays[name][matrix]
            assert array.dtype == other.dtype and array.shape == other.shape
            gap = np.abs(array.astype(np.float32) - other.astype(np.float32)).max()
            assert gap == 0.0, (name, matrix, gap)


CONFIGS = {
    "all": LoraConfig(r=4, alpha=8.0, target_modules=LORA_TARGETS),
    "some": LoraConfig(r=3, alpha=5.5, target_modules=("v_proj", "q_proj")),
    "layers": LoraConfig(r=2, alpha=2.0, target_modules=("up_proj",), layers_to_transform=(0, 2)),
    "rslora": LoraConfig(r=4, alpha=8.0, target_modules=("o_proj", "down_proj"), use_rslora=True),
}
