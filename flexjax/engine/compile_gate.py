"""Compiles the step of every bucket for a GPU that need not be there, and says what came out.

No array is ever allocated: models of any size are compiled on any machine. What the engine runs is
what is compiled here: the same function, donated arguments and shapes.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax

from flexjax.autodiff.arena import init_arena
from flexjax.cache.pages import init_pool, pool_bytes
from flexjax.config import EngineConfig
from flexjax.engine.programs import Programs
from flexjax.engine.sizing import Sizing
from flexjax.engine.step_cost import program_cost
from flexjax.layout import Bucket
from flexjax.lora.bank import AdapterBank, init_bank
from flexjax.model_config import ModelConfig
from flexjax.models.weights import abstract_weights
from flexjax.step.state import EngineState, init_sample_state
from pallas_kernels import aot, roofline
from pallas_kernels._hlo import Copy, loop_copies

_MEMORY_SHARE = 0.75  # what jax takes of a device by default
_TEMPORARIES = 2 << 30
_MAX_RUNNING = 64
_CONTEXT = 8192


@dataclasses.dataclass(frozen=True)
class BucketReport:
    """What came out of one bucket's step.

    Attributes:
      bucket: Row counts.
      compile_s: Seconds of tracing, lowering and compiling.
      argument_bytes: Weights, bank, batch, and what the program is given of the state.
      temp_bytes: Temporaries.
      fits: Whether arguments, the rest of the state, results that are not in place, and
        temporaries fit the device.
      copies: Arrays over 1 MiB that are copied in every turn of the layer loop.
      kernels: Generated kernels; their names tell what each op's dispatch chose.
      floor_s: Seconds below which no program can run this step; see `program_cost`.
      is_memory_bound: Whether memory sets the floor.
    """

    bucket: Bucket
    compile_s: float
    argument_bytes: int
    temp_bytes: int
    fits: bool
    copies: tuple[Copy, ...]
    kernels: tuple[Any, ...]
    floor_s: float
    is_memory_bound: bool

    def as_json(self) -> dict[str, Any]:
        """The report as plain data, kernels without their code."""
        plain = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "kernels"
        }
        plain["bucket"] = dataclasses.asdict(self.bucket)
        plain["copies"] = [dataclasses.asdict(copy) for copy in self.copies]
        plain["kernels"] = []
        for kernel in self.kernels:
            fields = dataclasses.asdict(kernel) | {"uses_wgmma": kernel.uses_wgmma}
            plain["kernels"].append({k: v for k, v in fields.items() if k != "ptx"})
        return plain


def device_config(model: ModelConfig, device: str, **fields: Any) -> EngineConfig:
    """The engine that the gate compiles for a device: 64 requests, 8,192 tokens of context.

    The pool gets what the device's memory leaves, up to all requests at full length; where that is
    little, the finetuning arena keeps layer inputs alone.

    Args:
      model: Architecture.
      device: One of `pallas_kernels.aot.device_names()`.
      **fields: Fields of `EngineConfig` that are to differ.

    Raises:
      ValueError: If there is no such device, or the model does not fit its memory.
    """
    memory = aot.device(device).memory_bytes
    defaults: dict[str, Any] = {
        "dtype": "bfloat16",
        "max_context_len": min(_CONTEXT, model.max_position),
        "max_running": _MAX_RUNNING,
        # Products of up to 64 rows take a GPU the time that reading the weights takes.
        "decode_buckets": _decode_buckets(fields.get("max_running", _MAX_RUNNING)),
        "chunk_buckets": (128, 512),
        "window_buckets": (512,),
    }
    for policy in ("full", "inputs"):
        defaults["saved_activations"] = policy
        config = EngineConfig(**(defaults | fields))
        if config.num_pages is not None:
            return config
        sizing = Sizing.derive(model, config, "gpu")
        least = dataclasses.replace(config, num_pages=sizing.step.pages_per_seq)
        weights, bank, state = abstract_arguments(model, least)
        page = pool_bytes(model, 1, config.page_size, sizing.dtype)
        room = _MEMORY_SHARE * memory - _TEMPORARIES - tree_bytes((weights, bank, state))
        num_pages = sizing.step.pages_per_seq + math.floor(room / page)
        if num_pages >= min(16 * sizing.step.pages_per_seq, sizing.num_pages):
            break
    if num_pages < sizing.step.pages_per_seq:
        raise ValueError(
            f"`model` must fit {device}'s {memory >> 30} GiB; with one request of "
            f"{sizing.max_context_len} tokens it lacks {-room / 2**30:.1f} GiB."
        )
    return dataclasses.replace(config, num_pages=min(num_pages, sizing.num_pages))


def _decode_buckets(max_running: int) -> tuple[int, ...]:
    sizes = (8, 64, 256)
    return (*(size for size in sizes if size < max_running), max_running)


def abstract_arguments(
    model: ModelConfig, config: EngineConfig
) -> tuple[Any, AdapterBank, EngineState]:
    """Shapes and dtypes of an engine's weights, bank and state."""
    sizing = Sizing.derive(model, config, "gpu")

    def state() -> EngineState:
        return EngineState(
            init_pool(model, sizing.num_pages, config.page_size, sizing.dtype),
            init_arena(
                model,
                num_pages=sizing.arena_pages,
                page_size=config.page_size,
                dtype=sizing.dtype,
                policy=config.saved_activations,
                acc_layers=sizing.acc_layers,
            ),
            init_sample_state(model, config.max_running, sizing.dtype),
        )

    def bank() -> AdapterBank:
        return init_bank(model, config.max_adapters, config.max_lora_rank, sizing.dtype)

    return abstract_weights(model, sizing.dtype), jax.eval_shape(bank), jax.eval_shape(state)


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, abstract ones too."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def compile_step(
    model: ModelConfig,
    config: EngineConfig,
    bucket: Bucket,
    *,
    device: str,
    context_len: int | None = None,
) -> BucketReport:
    """Compiles one bucket's step.

    Args:
      model: Architecture.
      config: Engine configuration, as `device_config` gives it.
      bucket: Row counts.
      device: One of `pallas_kernels.aot.device_names()`.
      context_len: Keys that each row sees, for the floor; None for a quarter of the engine's
        context.

    Raises:
      ValueError: If there is no such device.
      ImportError: If the compiler's plugin is missing; says what to install.
    """
    sizing = Sizing.derive(model, config, "gpu")
    weights, bank, state = abstract_arguments(model, config)
    programs = Programs(model, sizing.step, weights, bank, state, sizing.max_context_len)
    step, donated, args, *_ = programs._serving_jobs([bucket], ())["step", bucket]
    compiled = aot.compile_for(step, args, device=device, donate_argnums=donated)
    cost = program_cost(
        model,
        bucket,
        context_len=context_len or sizing.max_context_len // 4,
        saved_activations=config.saved_activations,
        lora_rank=config.max_lora_rank,
    )
    fresh = compiled.output_bytes - compiled.alias_bytes
    needed = compiled.argument_bytes + fresh + compiled.temp_bytes
    if bucket.only_decodes:  # its program is not given the arena, which is there all the same
        needed += tree_bytes(state.arena)
    return BucketReport(
        bucket=bucket,
        compile_s=compiled.compile_s,
        argument_bytes=compiled.argument_bytes,
        temp_bytes=compiled.temp_bytes,
        fits=needed <= aot.device(device).memory_bytes,
        copies=loop_copies(compiled.hlo),
        kernels=compiled.kernels,
        floor_s=roofline.floor_s(cost, device),
        is_memory_bound=roofline.is_memory_bound(cost, device),
    )


def compile_ladder(
    model: ModelConfig,
    config: EngineConfig,
    *,
    device: str,
    buckets: Sequence[Bucket] | None = None,
    context_len: int | None = None,
    on_report: Callable[[BucketReport], None] | None = None,
) -> list[BucketReport]:
    """Compiles the steps of many buckets, several at a time.

    Args:
      model: Architecture.
      config: Engine configuration, as `device_config` gives it.
      device: One of `pallas_kernels.aot.device_names()`.
      buckets: Which; None for every bucket that the engine can run.
      context_len: As for `compile_step`.
      on_report: Called with each bucket's report as it is done.

    Returns:
      The reports, in the order of `buckets`.
    """
    if buckets is None:
        sizing = Sizing.derive(model, config, "gpu")
        buckets = sizing.ladder.all_buckets(finetuning=sizing.can_finetune)

    def run(bucket: Bucket) -> BucketReport:
        return compile_step(model, config, bucket, device=device, context_len=context_len)

    reports = {}
    with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        futures = {pool.submit(run, bucket): bucket for bucket in buckets}
        try:
            for future in concurrent.futures.as_completed(futures):
                report = reports[futures[future]] = future.result()
                if on_report is not None:
                    on_report(report)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [reports[bucket] for bucket in buckets]
