"""`flexjax finetune`: trains an adapter."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from flexjax.cli.common import (
    bucket_fields,
    check_data,
    check_output,
    context_len,
    engine_fields,
    find_base,
    finetune_config,
    lora_config,
    make_console,
    plural,
    print_json,
    running,
    start_engine,
)
from flexjax.cli.options import FinetuneOptions
from flexjax.config import EngineConfig
from flexjax.engine.job import ENDED, Job, StepRecord
from flexjax.io.peft_adapter import CONFIG_FILE

_PRINT_EVERY_S = 5.0


def run(options: FinetuneOptions) -> None:
    """Runs the command."""
    began_s = time.perf_counter()
    check_output(options.output, CONFIG_FILE, can_replace=options.overwrite)
    base = find_base(options)
    lora = lora_config(options, base)
    job_config = finetune_config(
        options,
        lora,
        data=options.data,
        epochs=options.epochs,
        seed=options.seed,
    )
    config = EngineConfig(
        dtype=options.dtype,
        max_context_len=options.max_context_len or options.max_seq_len,
        max_adapters=1,
        max_lora_rank=lora.r,
        **bucket_fields(max_running=1, chunk=128),
        **engine_fields(options),
    )
    check_data(job_config, base, context_len(base, config))
    console = make_console(is_json=options.json)
    engine = start_engine(base, config, console)
    job = engine.finetune(job_config)
    for event in job.events:
        if event.level != "info":
            print(f"flexjax: {event.message}", file=sys.stderr)
    with running():
        train_began_s = time.perf_counter()
        _follow(job, console, is_json=options.json)
        engine.save_adapter(options.adapter_name, options.output)
    _report(options, job, console, train_began_s, time.perf_counter() - began_s)


def _follow(job: Job, console: Console, *, is_json: bool) -> None:
    """Drives the job to its end and shows every step."""
    columns = (
        TextColumn("finetuning"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    shown, printed_s = 0, time.perf_counter()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, figures="")
        while True:
            status = job.wait(timeout=0.1)
            metrics = job.metrics()
            for record in metrics.steps[shown:]:
                if is_json:
                    print_json(step_as_json(record))
            shown = len(metrics.steps)
            if shown:
                figures = f"loss {metrics.losses[-1]:.3f}  {metrics.tokens_per_s:,.0f} tokens/s"
                bar.update(task, completed=shown, total=metrics.total_steps, figures=figures)
                now_s = time.perf_counter()
                is_due = now_s - printed_s >= _PRINT_EVERY_S
                if not console.is_terminal and (is_due or status in ENDED):
                    printed_s = now_s
                    console.print(f"step {shown}/{metrics.total_steps}  {figures}", highlight=False)
            if status in ENDED:
                return


def step_as_json(record: StepRecord) -> dict[str, Any]:
    """One optimizer step, for JSON."""
    return {
        "step": record.step,
        "loss": record.loss,
        "tokens": record.tokens,
        "target_tokens": record.target_tokens,
        "learning_rate": record.learning_rate,
        "grad_norm": record.grad_norm,
    }


def _report(
    options: FinetuneOptions, job: Job, console: Console, train_began_s: float, wall_s: float
) -> None:
    metrics = job.metrics()
    evals = [{"step": record.step, "loss": record.loss} for record in metrics.evals]
    if options.json:
        print_json(
            {
                "adapter": options.adapter_name,
                "output": str(options.output),
                "steps": len(metrics.steps),
                "wall_s": wall_s,
                "train_s": metrics.steps[-1].time_s - train_began_s,
                "tokens": metrics.tokens,
                "target_tokens": metrics.target_tokens,
                "tokens_per_s": metrics.tokens_per_s,
                "evals": evals,
            }
        )
        return
    for record in evals:
        console.print(f"eval loss after step {record['step']}: {record['loss']:.4f}")
    console.print(
        f"{plural(len(metrics.steps), 'step')}, {plural(metrics.tokens, 'token')}: loss "
        f"{metrics.losses[0]:.3f} -> {metrics.losses[-1]:.3f} in {wall_s:.1f} s. "
        f"Adapter in {options.output}.",
        highlight=False,
        markup=False,
    )
