"""Checks kernels and step on this machine's GPU, and times them; JSON lines into a folder.

    scripts/gpu_check.sh [--output FOLDER] [--parts numerics,kernels,steps,engine] [--dry-run]

Needs no network and installs nothing. Parts:

  numerics  Every kernel case against its reference.
  kernels   Device time of the hot cases, beside their floor and the reference compiled by XLA.
  steps     Time of the step in each bucket of llama-3.1-8b with random bfloat16 weights: every
            choice of `EngineConfig.kernels`, beside the floor.
  engine    Tokens per second of the engine: serving alone, finetuning alone.

`--dry-run` runs all of it on a CPU, with tiny shapes and interpreted kernels: it shows that the
script works and measures nothing. The folder is $FLEXJAX_GPU_CHECK_OUT, or `gpu_check`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import json
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import jax.numpy as jnp
import numpy as np

from flexjax.bench.busy_step import busy_batch
from flexjax.bench.device_time import FastDraws, chained_times, device_times, median
from flexjax.bench.harness import header
from flexjax.bench.model import MODELS, text_rows, write_tokenizer
from flexjax.builtin_models import builtin_model_config
from flexjax.config import KERNELS, EngineConfig, FinetuneConfig, SamplingParams
from flexjax.engine.engine import Engine
from flexjax.engine.runner import Runner, StepResult
from flexjax.engine.sizing import Sizing
from flexjax.engine.step_cost import program_cost
from flexjax.io.tokenizer import Tokenizer
from flexjax.layout import Bucket
from flexjax.model_config import ModelConfig
from flexjax.models.weights import random_weights
from flexjax.optim.sums import zero_sums
from pallas_kernels import _platform
from pallas_kernels._cases import OPS, Case
from pallas_kernels.roofline import Cost, floor_s

PARTS = ("numerics", "kernels", "steps", "engine")
SHARES = {"numerics": 0.2, "kernels": 0.3, "steps": 0.3, "engine": 0.2}
"""Of the time that the whole check may take; a part that is early leaves the rest to the others."""


_CASE_BYTES = 2 << 30


class Check:
    """Settings, the clock, and the records as they are written.

    Attributes:
      is_dry: Whether this is a dry run.
      failures: What did not hold.
    """

    def __init__(self, path: Path, *, is_dry: bool, limit_s: float):
        self.is_dry = is_dry
        self.failures: list[str] = []
        self._file = path.open("w", encoding="utf-8")
        self._began_s = time.perf_counter()
        self._limit_s = limit_s
        self._deadline_s = limit_s

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._began_s

    @property
    def is_late(self) -> bool:
        """Whether the part's time is used up."""
        return self.elapsed_s > self._deadline_s

    def begin(self, part: str, later: Sequence[str]) -> None:
        """Gives a part its share of what is left."""
        left = max(0.0, self._limit_s - self.elapsed_s)
        share = SHARES[part] / sum(SHARES[name] for name in (part, *later))
        self._deadline_s = self.elapsed_s + share * left

    def record(self, kind: str, **fields: Any) -> None:
        """Writes a record at once, so that a run that is cut short leaves what it has."""
        record = {"kind": kind, **fields, "elapsed_s": round(self.elapsed_s, 1)}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        shown = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in fields.items()}
        print(kind, *(f"{k}={v}" for k, v in shown.items() if k != "times_s"), flush=True)

    def fail(self, name: str, error: BaseException | str) -> None:
        """Records something that did not hold, and goes on."""
        if isinstance(error, BaseException):
            traceback.print_exception(error)
        self.failures.append(name)
        self.record("failure", name=name, error=str(error)[:2000])


def kernels_run(check: Check) -> contextlib.AbstractContextManager[None]:
    """Where GPU kernels run: on the GPU, or in the interpreter."""
    return _platform.interpreted() if check.is_dry else contextlib.nullcontext()


def cases(tag: str | None) -> Iterator[Case]:
    """All cases, or those with a tag."""
    for op in OPS:
        for case in importlib.import_module(f"pallas_kernels.{op}.cases").CASES:
            if tag is None or tag in case.tags:
                yield case


def device_case(case: Case) -> Case:
    """A case that fits host and device several times over: fewer layers where it is large.

    Only one layer is read, so that neither result nor time depends on how many there are.
    """
    sizes = (math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(case.avals()))
    if sum(sizes) <= _CASE_BYTES:
        return case
    names = {field.name for field in dataclasses.fields(case)} & {"layers", "num_layers"}
    return dataclasses.replace(case, **{name: 2 for name in names})


def without_poison(case: Case, args: Sequence[Any]) -> list[Any]:
    """Arguments with zeros for NaN: a backend must not see the difference, a reference may.

    Donated arguments keep theirs, for it has to stay where it is.
    """

    def cleaned(x: jax.Array) -> jax.Array:
        return jnp.where(jnp.isnan(x), 0, x) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return [x if i in case.donate_argnums else jax.tree.map(cleaned, x) for i, x in enumerate(args)]


def largest_difference(got: Any, wanted: Any) -> float:
    """Largest difference of any result, relative to that result's largest value."""
    worst = 0.0
    for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        one, two = jnp.asarray(one, jnp.float32), jnp.asarray(two, jnp.float32)
        # Poison that nothing may touch stays where it was on both sides.
        same = (one == two) | (jnp.isnan(one) & jnp.isnan(two))
        scale = jnp.max(jnp.where(jnp.isfinite(two), jnp.abs(two), 0.0), initial=1e-30)
        worst = max(
            worst, float(jnp.max(jnp.where(same, 0.0, jnp.abs(one - two)), initial=0) / scale)
        )
        if bool(jnp.any(~same & ~jnp.isfinite(one - two))):
            return float("inf")
    return worst


def check_numerics(check: Check) -> None:
    """Every case, every backend, against the reference on the same device."""
    chosen = list(cases("interpret"))
    if check.is_dry:
        chosen = [next(case for case in chosen if case.op == op) for op in OPS]
    else:
        chosen += [case for case in cases(None) if "interpret" not in case.tags]
    for case in chosen:
        if check.is_late:
            check.record("skipped", name=str(case), reason="no time left")
            continue
        try:
            check_case(check, case)
        except Exception as error:
            check.fail(str(case), error)


def check_case(check: Check, case: Case) -> None:
    """One case."""
    case = device_case(case)
    args = jax.tree.map(jnp.asarray, case.arrays(FastDraws(0)))
    wanted = jax.jit(case.function("reference"))(*without_poison(case, args))
    for implementation in case.implementations:
        if check.is_dry and implementation == "triton":
            continue
        name = f"{case} {implementation}"
        try:
            with kernels_run(check):
                got = jax.jit(case.function(implementation))(*args)
        except NotImplementedError as error:
            if implementation not in case.unsupported:
                check.record("skipped", name=name, reason=str(error))
            continue
        difference = largest_difference(got, wanted)
        check.record(
            "numerics", name=name, difference=difference, tolerance=case.tolerance, dtype=case.dtype
        )
        if not difference <= case.tolerance:
            check.fail(name, f"differs by {difference:.3g}, more than {case.tolerance:.3g}")


def time_kernels(check: Check) -> None:
    """Hot cases: each backend, and the reference as XLA compiles it."""
    options: dict[str, Any] = {"num_calls": 2, "repeats": 1} if check.is_dry else {}
    chosen = list(cases("interpret" if check.is_dry else "hot"))
    if check.is_dry:
        chosen = [next(case for case in chosen if case.op == op) for op in OPS[:1]]
    for case in chosen:
        if check.is_late:
            check.record("skipped", name=str(case), reason="no time left")
            continue
        case = device_case(case)
        args = jax.tree.map(jnp.asarray, case.arrays(FastDraws(0)))
        floor = floor_s(Cost(case.flops(), case.bytes()), "h200")
        for implementation in (*case.implementations, "reference"):
            if check.is_dry and implementation == "triton":
                continue
            name = f"{case} {implementation}"
            try:
                with kernels_run(check):
                    function = case.function(implementation)
                    times = device_times(
                        function, args, donate_argnums=case.donate_argnums, **options
                    )
            except NotImplementedError as error:
                check.record("skipped", name=name, reason=str(error))
                continue
            except Exception as error:
                check.fail(name, error)
                continue
            time_s = median(times)
            check.record(
                "kernel",
                name=name,
                median_s=time_s,
                floor_s=floor,
                over_floor=time_s / floor,
                times_s=times,
            )
        del args
    time_cudnn(check)


def time_cudnn(check: Check) -> None:
    """What cuDNN takes for the attention of a chunk, were its keys dense: no pages, no lse."""
    rows, keys, heads, kv_heads, dim = (
        (16, 32, 4, 2, 16) if check.is_dry else (512, 8192, 32, 8, 128)
    )
    dtype = jnp.float32 if check.is_dry else jnp.bfloat16
    draws = FastDraws(0)
    shapes = {
        "q": (1, rows, heads, dim),
        "k": (1, keys, kv_heads, dim),
        "v": (1, keys, kv_heads, dim),
    }
    args = [jnp.asarray(draws.standard_normal(shape), dtype) for shape in shapes.values()]
    positions = keys - rows + jnp.arange(rows)
    mask = (jnp.arange(keys)[None, :] <= positions[:, None])[None, None]
    attend = functools.partial(
        jax.nn.dot_product_attention,
        mask=mask,
        implementation="xla" if check.is_dry else "cudnn",
    )
    options: dict[str, Any] = {"num_calls": 2, "repeats": 1} if check.is_dry else {}
    name = f"dense attention of {rows} rows over {keys} keys, cuDNN"
    try:
        times = device_times(attend, args, **options)
    except Exception as error:  # an alternative, not a part of what is checked
        check.record("skipped", name=name, reason=str(error)[:500])
        return
    cost = Cost(
        4.0 * rows * keys * heads * dim, float(sum(x.size * x.dtype.itemsize for x in args))
    )
    floor = floor_s(cost, "h200")
    check.record("alternative", name=name, median_s=median(times), floor_s=floor, times_s=times)


def model_and_config(check: Check) -> tuple[ModelConfig, EngineConfig]:
    """What steps and engine run."""
    if check.is_dry:
        model = MODELS["quick"]
        return model, EngineConfig(
            dtype="float32",
            max_context_len=64,
            max_running=2,
            decode_buckets=(2,),
            chunk_buckets=(32,),
            window_buckets=(32,),
            max_jobs=1,
            compile_cache_dir="",
        )
    return builtin_model_config("llama-3.1-8b"), EngineConfig(
        dtype="bfloat16",
        max_context_len=8192,
        max_running=64,
        num_pages=16384,
        decode_buckets=(1, 16, 64),
        chunk_buckets=(512,),
        window_buckets=(512,),
        max_jobs=1,
        saved_activations="full",
        compile_cache_dir="",
    )


def time_steps(check: Check) -> None:
    """The step in each bucket, for each choice of kernels."""
    model, config = model_and_config(check)
    sizing = Sizing.derive(model, config, jax.default_backend())
    weights = random_weights(model, sizing.dtype, 0)
    for kernels in ("reference",) if check.is_dry else (*reversed(KERNELS),):
        if check.is_late:
            check.record("skipped", name=f"steps {kernels}", reason="no time left")
            continue
        try:
            chosen = dataclasses.replace(config, kernels=kernels)
            began_s = time.perf_counter()
            runner = Runner(model, weights, chosen, Sizing.derive(model, chosen, "gpu"))
            compile_s = time.perf_counter() - began_s
            check.record("compile", name=f"steps {kernels}", compile_s=compile_s)
            for bucket in runner.buckets:
                time_bucket(check, model, chosen, runner, bucket)
        except Exception as error:
            check.fail(f"steps {kernels}", error)
        runner = None  # frees the pool before the next one is made


def time_bucket(
    check: Check, model: ModelConfig, config: EngineConfig, runner: Runner, bucket: Bucket
) -> None:
    """One bucket, every row in use, a quarter of the context."""
    if check.is_late:
        return
    sizing = runner.sizing
    context_len = max(sizing.max_context_len // 4, bucket.chunk, bucket.window)
    packed = busy_batch(
        bucket,
        sizing.step,
        page_size=config.page_size,
        num_pages=sizing.num_pages,
        context_len=context_len,
    )
    sums = zero_sums(model, config.max_lora_rank) if bucket.window else None

    def run(last: StepResult) -> StepResult:
        return runner.run_step(bucket, packed.copy(), last.sums)

    num_calls, repeats = (2, 1) if check.is_dry else (10, 3)
    first = StepResult(jnp.zeros(()), sums)
    times, _ = chained_times(run, first, num_calls=num_calls, repeats=repeats)
    cost = program_cost(
        model,
        bucket,
        context_len=context_len,
        saved_activations=config.saved_activations,
        lora_rank=config.max_lora_rank,
    )
    floor = floor_s(cost, "h200")
    check.record(
        "step",
        kernels=config.kernels,
        **dataclasses.asdict(bucket),
        context_len=context_len,
        median_s=median(times),
        floor_s=floor,
        over_floor=median(times) / floor,
        times_s=times,
    )


def run_engine(check: Check) -> None:
    """Serving alone, then finetuning alone, through the public engine."""
    model, config = model_and_config(check)
    prompt_len, output_len, num_requests = (8, 4, 3) if check.is_dry else (512, 128, 128)
    sample_len, batch_size, steps = (16, 2, 1) if check.is_dry else (2048, 4, 3)
    words = min(model.vocab_size, 4096)
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(folder, words)
        (Path(folder) / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
        tokenizer = Tokenizer.from_pretrained(folder)
    weights = random_weights(model, Sizing.derive(model, config, "gpu").dtype, 0)
    engine = Engine(model, weights, tokenizer, config)
    check.record("compile", name="engine", compile_s=engine.compile_s)
    draws = np.random.default_rng(0)
    prompts = draws.integers(1, words, (num_requests, prompt_len)).tolist()
    params = SamplingParams(max_tokens=output_len, ignore_eos=True)
    with engine:
        began_s = time.perf_counter()
        outputs = engine.generate(prompts, params)
        wall_s = time.perf_counter() - began_s
        count = sum(len(output.token_ids) for output in outputs)
        check.record(
            "engine",
            name="serving alone",
            output_tokens_per_s=count / wall_s,
            total_tokens_per_s=(count + num_requests * prompt_len) / wall_s,
            wall_s=wall_s,
        )
        rows = draws.integers(1, words, (batch_size * steps, sample_len - 8), dtype=np.int32)
        job = engine.finetune(
            FinetuneConfig(
                adapter="check",
                dataset=text_rows(rows),
                batch_size=batch_size,
                max_steps=steps,
                overlong="truncate",
            )
        )
        began_s = time.perf_counter()
        job.wait()
        wall_s = time.perf_counter() - began_s
        check.record(
            "engine",
            name="finetuning alone",
            finetuning_tokens_per_s=rows.size / wall_s,
            status=str(job.status),
            losses=job.metrics().losses,
            wall_s=wall_s,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts; 1 if anything did not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    folder = os.environ.get("FLEXJAX_GPU_CHECK_OUT", "gpu_check")
    parser.add_argument("--output", default=folder, help="folder for the JSON lines")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--limit-s", type=float, default=540.0, help="seconds for everything")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(argv)
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"`--parts` must be of {', '.join(PARTS)}; got {', '.join(sorted(unknown))}.")
    if not options.dry_run and jax.default_backend() != "gpu":
        parser.error("no GPU; `--dry-run` shows on a CPU that the script works.")
    Path(options.output).mkdir(parents=True, exist_ok=True)
    path = Path(options.output) / "gpu_check.jsonl"
    check = Check(path, is_dry=options.dry_run, limit_s=options.limit_s)
    check.record(**header({"parts": parts, "dry_run": options.dry_run}, seed=0))
    runs = {
        "numerics": check_numerics,
        "kernels": time_kernels,
        "steps": time_steps,
        "engine": run_engine,
    }
    for index, part in enumerate(parts):
        check.begin(part, parts[index + 1 :])
        try:
            runs[part](check)
        except Exception as error:
            check.fail(part, error)
    check.record("end", failures=check.failures)
    print(f"wrote {path}; {len(check.failures)} failures")
    return 1 if check.failures else 0


if __name__ == "__main__":
    sys.exit(main())
