"""The ladder of shapes that steps are compiled for. Imports no jax."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools

from flexjax.config import EngineConfig
from flexjax.layout import Bucket
from flexjax.scheduler.kv_reads import TiledReads

_bucket = functools.cache(Bucket)
"""Makes a bucket, or takes one that was made: steps have few, and ask for each of them often."""


@dataclasses.dataclass(frozen=True)
class BucketLadder:
    """Sizes of each kind of rows.

    Attributes:
      decode: Decode rows.
      chunk: Prefill and finetuning-forward rows.
      window: Backward rows.
      tile_layers: Layers of a tile.
      last_tile_layers: Layers of the lowest tile, where `tile_layers` does not divide L.
      reads: How rows meet keys; None where each meets just those that it sees.
    """

    decode: tuple[int, ...]
    chunk: tuple[int, ...]
    window: tuple[int, ...]
    tile_layers: int
    last_tile_layers: int
    reads: TiledReads | None = None

    @functools.cached_property
    def _hash(self) -> int:
        sizes = (self.decode, self.chunk, self.window)
        return hash((*sizes, self.tile_layers, self.last_tile_layers))

    def __hash__(self) -> int:
        return self._hash  # a key of what is computed once a ladder, several times a step

    @classmethod
    def from_config(
        cls, config: EngineConfig, num_layers: int, reads: TiledReads | None = None
    ) -> BucketLadder:
        """Derives the ladder from the engine's configuration.

        Raises:
          ValueError: If `decode_buckets` does not reach `max_running`, or `tile_layers` exceeds
            the model's layers.
        """
        decode = config.decode_buckets
        if decode is None:
            sizes = (1, 4, 16, 64, 256, 1024)
            decode = (*(s for s in sizes if s < config.max_running), config.max_running)
        if decode[-1] < config.max_running:
            raise ValueError(
                f"`decode_buckets` must reach `max_running`={config.max_running}; got {decode}."
            )
        tile_layers = config.tile_layers or num_layers
        if tile_layers > num_layers:
            raise ValueError(
                f"`tile_layers` must be at most {num_layers}, the model's layers; "
                f"got {tile_layers}."
            )
        last = num_layers % tile_layers or tile_layers
        chunk, window = tuple(config.chunk_buckets), tuple(config.window_buckets)
        return cls(tuple(decode), chunk, window, tile_layers, last, reads)

    @property
    def max_decode(self) -> int:
        """Most decode rows of a step."""
        return self.decode[-1]

    @property
    def max_chunk(self) -> int:
        """Most chunk rows of a step."""
        return self.chunk[-1]

    @property
    def max_window(self) -> int:
        """Most backward rows of a step."""
        return self.window[-1]

    def bucket(
        self, decode_rows: int, chunk_rows: int, window_rows: int, tile_layers: int | None = None
    ) -> Bucket:
        """Smallest bucket that holds these rows."""
        # Asked for each mix that is weighed: no call more than it takes.
        at = bisect.bisect_left
        decode = self.decode[at(self.decode, decode_rows)] if decode_rows else 0
        chunk = self.chunk[at(self.chunk, chunk_rows)] if chunk_rows else 0
        if not window_rows:
            return _bucket(decode, chunk, 0, 0)
        window = self.window[at(self.window, window_rows)]
        return _bucket(decode, chunk, window, tile_layers or self.tile_layers)

    def padded_decode(self, rows: int) -> int:
        """Rows of the smallest decode bucket, or sampling head, that holds `rows`."""
        return self.decode[bisect.bisect_left(self.decode, rows)] if rows else 0

    def tile_below(self, top: int) -> int:
        """Layers of the tile that begins under layer `top`.

        Tiles have one of two sizes, so that few programs are compiled; the lowest one may reach
        below the lowest trainable layer, where its gradients are zero.
        """
        return self.tile_layers if top >= self.tile_layers else self.last_tile_layers

    def all_buckets(self, *, finetuning: bool) -> list[Bucket]:
        """Every bucket that a step can have."""
        layer_sizes = sorted({self.tile_layers, self.last_tile_layers})
        windows = (0, *self.window) if finetuning else (0,)
        buckets = set()
        sizes = itertools.product((0, *self.decode), (0, *self.chunk), windows)
        for decode, chunk, window in sizes:
            if decode + chunk + window:
                for layers in layer_sizes:
                    buckets.add(Bucket(decode, chunk, window, layers if window else 0))
        return sorted(buckets)
