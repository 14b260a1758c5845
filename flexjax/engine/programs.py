"""Every jitted program of an engine, compiled ahead of time.

After `Programs.compile_all` nothing is ever compiled again: a call whose shapes have no program is
an error, not a compilation.
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
import time
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexjax.autodiff.arena import Arena
from flexjax.autodiff.loss import loss_head
from flexjax.layout import Bucket, StepSizes, packed_size, program_fields, sample_fields
from flexjax.lora.bank import AdapterBank, copy_slot, write_slot, zero_lora
from flexjax.model_config import ModelConfig
from flexjax.models.weights import DecoderWeights
from flexjax.optim.adamw import Hyper, OptimizerState, add_sums, init_optimizer, optimizer_step
from flexjax.optim.sums import GradSums, zero_sums
from flexjax.step.co_serve import co_serve_step
from flexjax.step.decode import decode_step
from flexjax.step.sampling import reset_sequence, sample_step
from flexjax.step.state import EngineState

_INT = jax.ShapeDtypeStruct((), jnp.int32)
_FLOAT = jax.ShapeDtypeStruct((), jnp.float32)


def _packed(fields: dict[str, tuple[int, ...]]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((packed_size(fields),), jnp.int32)


def abstract(tree: Any) -> Any:
    """Shapes and dtypes of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def set_compile_cache(directory: str | None) -> None:
    """Keeps compiled programs between runs, unless the caller has set jax's own cache already."""
    if directory == "" or jax.config.values.get("jax_compilation_cache_dir"):
        return
    home = os.environ.get("FLEXJAX_CACHE_DIR") or os.path.expanduser("~/.cache/flexjax")
    jax.config.update("jax_compilation_cache_dir", directory or os.path.join(home, "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def window_loss(
    config: ModelConfig,
    implementation: str | None,
    weights: DecoderWeights,
    arena: Arena,
    loss: jax.Array,
    packed: jax.Array,
) -> tuple[jax.Array, Arena]:
    """Adds a window's summed loss to `loss`; see `autodiff.loss.loss_head`."""
    added, arena = loss_head(
        config, weights, arena, packed[0], packed[1], implementation=implementation
    )
    return loss + added, arena


def discard(arena: Arena, pages: jax.Array) -> Arena:
    """Forgets what was accumulated in the arena pages of a group (-1 padding)."""
    where = jnp.where(pages >= 0, pages, arena.kv_grads.k.shape[1])
    cleared = jax.tree.map(lambda acc: acc.at[:, where].set(0.0, mode="drop"), arena.kv_grads)
    return arena._replace(kv_grads=cleared)


def clear_sums(sums: GradSums) -> GradSums:
    """Forgets partial sums."""
    return jax.tree.map(jnp.zeros_like, sums)


class Programs:
    """The compiled programs, by name and shape.

    Attributes:
      compile_s: Seconds that compilation took, wall clock.
    """

    def __init__(
        self,
        config: ModelConfig,
        sizes: StepSizes,
        weights: DecoderWeights,
        bank: AdapterBank,
        state: EngineState,
        max_context_len: int,
    ):
        self._config = config
        self._sizes = sizes
        self._weights = abstract(weights)
        self._bank = abstract(bank)
        self._state = abstract(state)
        self._max_context_len = max_context_len
        self._rank = next(iter(bank.a.values())).shape[-1]
        self._compiled: dict[tuple, Callable[..., Any]] = {}
        self.compile_s = 0.0

    def __getitem__(self, key: tuple) -> Callable[..., Any]:
        """Returns a compiled program; a missing one is a bug, not a reason to compile."""
        return self._compiled[key]

    def __contains__(self, key: tuple) -> bool:
        return key in self._compiled

    def __len__(self) -> int:
        return len(self._compiled)

    def compile_all(
        self,
        buckets: list[Bucket],
        sample_rows: tuple[int, ...],
        windows: tuple[int, ...],
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Compiles everything that an engine can run.

        Args:
          buckets: Buckets of the step.
          sample_rows: Row counts of the sampling head.
          windows: Row counts of the loss head; empty for an engine that never finetunes.
          progress: Called with (done, total) after each program.
        """
        started = time.perf_counter()
        jobs = self._serving_jobs(buckets, sample_rows)
        if windows:
            jobs |= self._finetuning_jobs(windows)
        workers = min(4, os.cpu_count() or 1)
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            futures = {pool.submit(_compile, *job): key for key, job in jobs.items()}
            for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
                self._compiled[futures[future]] = future.result()
                if progress is not None:
                    progress(done, len(futures))
        self.compile_s = time.perf_counter() - started

    def _serving_jobs(self, buckets: list[Bucket], sample_rows: tuple[int, ...]) -> dict:
        jobs: dict[tuple, tuple] = {}
        sums = jax.eval_shape(lambda: zero_sums(self._config, self._rank))
        for bucket in buckets:
            function = decode_step if bucket.only_decodes else co_serve_step
            step = functools.partial(function, self._config, bucket, self._sizes)
            packed = _packed(program_fields(bucket, self._sizes))
            args: tuple = (self._weights, self._bank, self._state, None, packed)
            if bucket.only_decodes:
                args = (self._weights, self._bank, self._state.pool, self._state.sample, packed)
            elif bucket.window:
                args = (self._weights, self._bank, self._state, sums, packed)
            options = _cpu_options(_DOTS_ONLY if bucket.only_decodes else _NO_LIBRARY)
            jobs["step", bucket] = (step, (2, 3), args, options)
        for rows in sample_rows:
            args = (self._weights, self._state.sample, _packed(sample_fields(rows)))
            implementation = self._sizes.implementation
            sample = functools.partial(sample_step, self._config, implementation=implementation)
            jobs["sample", rows] = (sample, (1,), args)
        tokens = jax.ShapeDtypeStruct((self._max_context_len,), jnp.int32)
        jobs["reset_sequence",] = (reset_sequence, (0,), (self._state.sample, _INT, tokens, tokens))
        tree = jax.eval_shape(lambda: zero_lora(self._config, self._rank))
        jobs["write_slot",] = (write_slot, (0,), (self._bank, _INT, tree, _FLOAT))
        return jobs

    def _finetuning_jobs(self, windows: tuple[int, ...]) -> dict:
        config, rank = self._config, self._rank
        sums = jax.eval_shape(lambda: zero_sums(config, rank))
        optimizer: OptimizerState = jax.eval_shape(lambda: init_optimizer(zero_lora(config, rank)))
        hyper = jax.ShapeDtypeStruct((len(Hyper._fields),), jnp.float32)
        pages = jax.ShapeDtypeStruct((self._sizes.tile_pages,), jnp.int32)
        arena = self._state.arena
        jobs: dict[tuple, tuple] = {
            ("copy_slot",): (copy_slot, (0,), (self._bank, _INT, _INT)),
            ("add_sums",): (add_sums, (0, 1), (sums, sums)),
            ("discard",): (discard, (0,), (arena, pages)),
            ("clear_sums",): (clear_sums, (0,), (sums,)),
            ("optimizer_step",): (
                optimizer_step,
                (0, 1, 2),
                (optimizer, sums, self._bank, _INT, hyper),
            ),
        }
        for rows in windows:
            packed = jax.ShapeDtypeStruct((2, rows), jnp.int32)
            function = functools.partial(window_loss, config, self._sizes.implementation)
            jobs["loss", rows] = (function, (1, 2), (self._weights, arena, _FLOAT, packed))
        return jobs

    def memory(self) -> dict[str, dict[str, int]]:
        """Bytes of arguments, outputs, aliases and temporaries of every program."""
        table = {}
        for key, program in self._compiled.items():
            stats = program.memory_analysis()  # type: ignore[attr-defined]
            table[" ".join(map(str, key))] = {
                "arguments": stats.argument_size_in_bytes,
                "outputs": stats.output_size_in_bytes,
                "aliased": stats.alias_size_in_bytes,
                "temporaries": stats.temp_size_in_bytes,
            }
        return table


def _compile(
    function: Callable[..., Any],
    donated: tuple[int, ...],
    args: tuple,
    options: Mapping[str, str] = types.MappingProxyType({}),
) -> Any:
    lowered = jax.jit(function, donate_argnums=donated).lower(*args)
    return lowered.compile(compiler_options=dict(options) or None)


_NO_LIBRARY, _DOTS_ONLY = "", "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"


@functools.cache
def _cpu_options(library: str) -> dict[str, str]:
    """Compiler options of a step: what XLA's CPU backend gives to its library of operations.

    By default it gives products and sums. For a row's attention the library's sums take longer than
    all of its matrix products, so steps of few rows give it products only. Steps of many rows give
    it nothing: their products are as fast without it, and the many small ones of attention and
    adapters faster. The heads over the vocabulary keep the default.
    """
    if jax.default_backend() != "cpu":
        return {}
    options = {"xla_cpu_experimental_ynn_fusion_type": library}
    try:
        jax.jit(lambda x: x + 1).lower(_FLOAT).compile(compiler_options=dict(options))
    except jax.errors.JaxRuntimeError:  # a version of XLA that does not know the option
        return {}
    return options


def scalar(value: int | float) -> np.generic:
    """An int32 or float32 scalar, as compiled programs take them."""
    return np.int32(value) if isinstance(value, int) else np.float32(value)
