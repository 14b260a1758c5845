"""`flexjax coserve`: answers arriving requests and finetunes an adapter in the same steps."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from flexjax.cli.common import (
    Base,
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
from flexjax.cli.coserve.display import Dashboard
from flexjax.cli.coserve.loop import CoserveLoop
from flexjax.cli.coserve.plot import draw
from flexjax.cli.coserve.report import (
    PICTURE_FILE,
    REQUESTS_FILE,
    print_tables,
    summary_of,
    write_files,
)
from flexjax.cli.coserve.workload import Workload, plan_workload
from flexjax.cli.options import (
    COSERVE_OUTPUT,
    DEMO_EPOCHS,
    CoserveOptions,
)
from flexjax.config import EngineConfig, FinetuneConfig, SamplingParams
from flexjax.data import demo_dataset
from flexjax.engine.engine import Engine
from flexjax.engine.heap import settled_heap

_MAX_ANSWER_TOKENS = 64


def run(options: CoserveOptions) -> None:
    """Runs the command."""
    output = Path(COSERVE_OUTPUT) if options.output is None else options.output
    can_replace = options.overwrite or options.output is None
    check_output(output, REQUESTS_FILE, can_replace=can_replace)
    if options.policy == "inference_only":
        raise ValueError("`--policy` must let the job end; got 'inference_only'.")
    base = find_base(options)
    job_config = _job_config(options, base)
    config = EngineConfig(
        dtype=options.dtype,
        max_context_len=options.max_context_len,
        max_adapters=1,
        max_lora_rank=job_config.lora.r,
        finetune_token_budget=options.finetune_token_budget,
        step_time_budget_ms=options.step_time_budget_ms,
        slo_class=options.slo,
        policy=options.policy,
        **bucket_fields(max_running=options.max_running, chunk=64),
        **engine_fields(options),
    )
    context = context_len(base, config)
    dataset = check_data(job_config, base, context)
    is_demo = base.is_embedded and options.data is None
    workload = plan_workload(options, base, dataset, context, is_demo=is_demo)
    console = make_console(is_json=options.json)
    for note in (*workload.notes, *dataset.notes):
        console.print(note, highlight=False, markup=False)
    began_s = time.perf_counter()
    engine = start_engine(base, config, console)
    start_s = time.perf_counter() - began_s
    with running():
        before = _answers(engine, workload, None)
        with settled_heap():
            loop = _serve_and_train(engine, job_config, workload, base, console)
        after = _answers(engine, workload, job_config.adapter)
        answers = [
            {"prompt": prompt.text, "before": old, "after": new}
            for prompt, old, new in zip(workload.compared, before, after, strict=True)
        ]
        summary = summary_of(loop, workload, base, answers, output=output, start_s=start_s)
        write_files(loop, summary, output)
        draw(loop, summary, output / PICTURE_FILE)
    if options.json:
        print_json(summary)
    else:
        print_tables(summary, console)


def _job_config(options: CoserveOptions, base: Base) -> FinetuneConfig:
    epochs = DEMO_EPOCHS if options.data is None else FinetuneConfig.epochs
    return finetune_config(
        options,
        lora_config(options, base),
        data=demo_dataset() if options.data is None else options.data,
        epochs=epochs if options.epochs is None else options.epochs,
        seed=options.seed,
    )


def _serve_and_train(
    engine: Engine, config: FinetuneConfig, workload: Workload, base: Base, console: Console
) -> CoserveLoop:
    job = engine.finetune(config)
    loop = CoserveLoop(engine, job, workload.requests)
    console.print(
        f"{plural(len(workload.requests), 'request')} and {job.metrics().total_steps} finetuning "
        f"steps on {Path(base.source).name}.",
        highlight=False,
        markup=False,
    )
    with Dashboard(loop, console, "FlexJAX: serving and finetuning") as dashboard:
        while not loop.is_done:
            loop.advance()
            dashboard.refresh()
    unanswered = len(workload.requests) - len(loop.finished)
    if unanswered:
        raise RuntimeError(f"{unanswered} requests were not answered")
    return loop


def _answers(engine: Engine, workload: Workload, adapter: str | None) -> list[str]:
    """Greedy answers to the compared prompts."""
    prompts = [list(prompt.token_ids) for prompt in workload.compared]
    params = SamplingParams(max_tokens=_MAX_ANSWER_TOKENS)
    return [output.text for output in engine.generate(prompts, params, adapter=adapter)]
