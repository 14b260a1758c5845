"""`flexjax compile`: compiles every bucket's step for a GPU that need not be there."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flexjax.builtin_models import BUILTIN_MODELS, builtin_model_config
from flexjax.cli.options import CompileOptions
from flexjax.data import tiny_model_dir
from flexjax.engine.compile_gate import BucketReport, compile_ladder, device_config
from flexjax.errors import ModelNotFoundError
from flexjax.layout import Bucket
from flexjax.model_config import ModelConfig, load_model_config
from pallas_kernels import aot


def run(options: CompileOptions) -> None:
    """Compiles and prints; JSON lines with `--json`, one a bucket as it is done, then a summary.

    Raises:
      ValueError: If an option cannot be used, or the compiler's plugin is missing.
    """
    model = _find_model(options.model)
    device = aot.device(options.device)
    if lack := aot.missing():
        raise ValueError(lack)
    fields: dict[str, Any] = {}
    for name in ("max_context_len", "max_running", "saved_activations", "tile_layers", "kernels"):
        if getattr(options, name) is not None:
            fields[name] = getattr(options, name)
    config = device_config(model, options.device, **fields)
    context_len = options.floor_context
    began_s = time.perf_counter()
    console = Console(stderr=options.json)
    status = console.status(f"Compiling for {device.description}")

    def on_report(report: BucketReport) -> None:
        if options.json:
            print(json.dumps(report.as_json()), flush=True)
        else:
            status.update(f"Compiled {bucket_name(report.bucket)} in {report.compile_s:.0f} s")

    with status:
        reports = compile_ladder(
            model, config, device=options.device, context_len=context_len, on_report=on_report
        )
    summary = {
        "model": options.model or "tiny",
        "device": options.device,
        "num_buckets": len(reports),
        "num_pages": config.num_pages,
        "page_size": config.page_size,
        "saved_activations": config.saved_activations,
        "wall_s": time.perf_counter() - began_s,
        "max_temp_bytes": max(report.temp_bytes for report in reports),
        "floor_context": context_len,
    }
    if options.json:
        print(json.dumps(summary))
        return
    _print_buckets(console, reports)
    _print_kernels(console, reports)
    console.print(
        f"{len(reports)} buckets for {device.description} in {summary['wall_s']:.0f} s; "
        f"{config.num_pages} pages of {config.page_size} tokens, "
        f"saved activations: {config.saved_activations}."
    )


def bucket_name(bucket: Bucket) -> str:
    """Rows of a bucket in words."""
    parts = [f"{bucket.decode} decode"] if bucket.decode else []
    parts += [f"{bucket.chunk} chunk"] if bucket.chunk else []
    if bucket.window:
        parts.append(f"{bucket.window} window x {bucket.tile_layers} layers")
    return " + ".join(parts)


def _find_model(source: str | None) -> ModelConfig:
    if source is None:
        return load_model_config(tiny_model_dir())
    if Path(source).is_dir():
        return load_model_config(source)
    if source not in BUILTIN_MODELS:
        names = ", ".join(BUILTIN_MODELS)
        raise ModelNotFoundError(
            f"`--model` must be a directory, or one of {names}; got {source!r}."
        )
    return builtin_model_config(source)


def _print_buckets(console: Console, reports: list[BucketReport]) -> None:
    table = Table(title="Steps")
    table.add_column("bucket")
    for name in ("compile s", "arguments GiB", "temporaries GiB", "floor ms", "bound by"):
        table.add_column(name, justify="right")
    table.add_column("copies > 1 MiB in the layer loop")
    for report in reports:
        copies = ", ".join(f"{copy.count} x {copy.shape}" for copy in report.copies)
        table.add_row(
            bucket_name(report.bucket),
            f"{report.compile_s:.1f}",
            f"{report.argument_bytes / 2**30:.1f}" + ("" if report.fits else " (too large)"),
            f"{report.temp_bytes / 2**30:.2f}",
            f"{1e3 * report.floor_s:.2f}",
            "memory" if report.is_memory_bound else "arithmetic",
            copies or "none",
        )
    console.print(table)


def _print_kernels(console: Console, reports: list[BucketReport]) -> None:
    """One row for each kernel and each way in which it was compiled."""
    table = Table(title="Generated kernels")
    table.add_column("kernel")
    for name in ("language", "buckets", "warps", "registers", "spill bytes", "shared bytes"):
        table.add_column(name, justify="right")
    table.add_column("tensor cores")
    buckets: dict[tuple, set[Bucket]] = {}
    for report in reports:
        for kernel in report.kernels:
            units = "wgmma" if kernel.uses_wgmma else "mma" if kernel.uses_tensor_cores else "none"
            sizes = (kernel.num_warps, kernel.registers, kernel.spill_bytes, kernel.shared_bytes)
            name = kernel.name.partition("__")[0]
            buckets.setdefault((name, kernel.language, *sizes, units), set()).add(report.bucket)
    for (name, language, *sizes, units), where in sorted(buckets.items()):
        table.add_row(name, language, str(len(where)), *map(str, sizes), units)
    console.print(table)
    if not buckets:
        console.print("Every op runs its reference: no kernel was generated.")
