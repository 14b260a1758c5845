"""Steps of a made-up model for tests of what predicts them."""

import dataclasses

import numpy as np

from flexjax.config import EngineConfig
from flexjax.layout import Bucket
from flexjax.scheduler.buckets import BucketLadder
from flexjax.scheduler.features import (
    StepFeatures,
)

LAYERS = 32
CONTEXT = 4096
LADDER = BucketLadder.from_config(
    EngineConfig(
        max_running=256,
        decode_buckets=(4, 16, 64, 256),
        chunk_buckets=(32, 128, 512),
        window_buckets=(128, 256, 512),
        tile_layers=12,
    ),
    LAYERS,
)
BUCKETS = LADDER.all_buckets(finetuning=True)
DECODE = StepFeatures(Bucket(64, 0, 0, 0), decode_rows=64, decode_kv_tokens=64_000)
PREFILL = StepFeatures(Bucket(64, 128, 0, 0), decode_rows=64, prefill_rows=128)
MIXED = StepFeatures(
    Bucket(64, 128, 256, 12), decode_rows=64, forward_rows=128, backward_rows=256,
    decode_kv_tokens=64_000, chunk_kv_pairs=60_000, tile_kv_pairs=1_000_000,
)  # fmt: skip


def with_noise(samples, rng, sigma=0.05):
    """The samples with lognormal noise."""
    factors = np.exp(sigma * rng.standard_normal(len(samples))).tolist()
    return [dataclasses.replace(s, ms=s.ms * f) for s, f in zip(samples, factors, strict=True)]
