"""Measures what the parts of a step cost: every bucket, the reading of keys, the heads."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from flexjax.engine.batch import build_full_step, build_idle_step
from flexjax.engine.runner import Runner
from flexjax.layout import Bucket, packed_size, sample_fields
from flexjax.lora.bank import zero_lora
from flexjax.optim.adamw import Hyper, init_optimizer
from flexjax.optim.sums import GradSums, zero_sums
from flexjax.scheduler.features import EMPTY_BUCKET, LatencySample, StepFeatures


class Profiler:
    """Runs the programs of an engine on made-up batches, and changes nothing that lasts.

    To be used before the engine has requests, adapters or jobs.
    """

    def __init__(self, runner: Runner, *, repeats: int = 3):
        """Makes a profiler.

        Args:
          runner: The engine's programs and arrays.
          repeats: Times that each program runs; the median counts.
        """
        self._runner = runner
        self._repeats = repeats
        self._calls: list[tuple[StepFeatures, Callable[[], Any]]] = []
        self._sums: GradSums | None = None

    def measure(self, *, contexts: tuple[float, ...] = (1.0,)) -> list[LatencySample]:
        """Measures everything.

        Args:
          contexts: Shares of the longest context that rows read, for the cost of keys and values;
            the largest bucket of each kind is measured at each, all buckets at none.
        """
        runner = self._runner
        for bucket in runner.buckets:
            self._step(bucket, build_idle_step(bucket, runner.sizing.step), StepFeatures(bucket))
        for bucket in self._largest():
            for share in contexts:
                context = max(1, int(share * runner.sizing.max_context_len))
                packed, counts = build_full_step(bucket, runner.sizing, context)
                self._step(bucket, packed, StepFeatures(bucket, **counts))
        for rows in runner.sizing.ladder.decode:
            self._sampling(rows)
        if runner.sizing.can_finetune:
            for rows in runner.sizing.ladder.window:
                self._loss(rows)
            self._optimizer()
        return self._run_all()

    def _run_all(self) -> list[LatencySample]:
        """Runs everything once, and then as often as asked, one after the other.

        So that what disturbs the machine for a while does not hit all runs of one program.
        """
        times: list[list[float]] = [[] for _ in self._calls]
        for _ in range(self._repeats + 1):
            for (_, call), found in zip(self._calls, times, strict=True):
                started = time.perf_counter()
                jax.block_until_ready(call())
                found.append(time.perf_counter() - started)
        # The first run touches memory for the first time.
        medians = [1e3 * float(np.median(found[1:])) for found in times]
        return [
            LatencySample(features, ms, self._repeats)
            for (features, _), ms in zip(self._calls, medians, strict=True)
        ]

    def _largest(self) -> list[Bucket]:
        """The largest bucket of each kind of rows, alone."""
        ladder = self._runner.sizing.ladder
        found = [Bucket(ladder.max_decode, 0, 0, 0), Bucket(0, ladder.max_chunk, 0, 0)]
        if self._runner.sizing.can_finetune:
            found.append(Bucket(0, 0, ladder.max_window, ladder.tile_layers))
        return found

    def _step(self, bucket: Bucket, packed: np.ndarray, features: StepFeatures) -> None:
        runner = self._runner
        if bucket.window and self._sums is None:
            self._sums = zero_sums(runner.model, runner.max_rank)
        if bucket.only_decodes:
            features = dataclasses.replace(features, sample_rows=bucket.decode)

        def call() -> Any:
            result = runner.run_step(bucket, packed.copy(), self._sums if bucket.window else None)
            if bucket.window:
                self._sums = result.sums
            return result.done, runner.state

        self._calls.append((features, call))

    def _sampling(self, rows: int) -> None:
        runner = self._runner
        packed = np.full(packed_size(sample_fields(rows)), -1, np.int32)

        def call() -> Any:
            return runner.run_sampling(packed.copy(), rows)

        self._calls.append((StepFeatures(EMPTY_BUCKET, sample_rows=rows), call))

    def _loss(self, rows: int) -> None:
        runner = self._runner
        packed = np.full((2, rows), -1, np.int32)

        def call() -> Any:
            loss, arena = runner.programs["loss", rows](
                runner.weights, runner.state.arena, np.float32(0), packed
            )
            runner.state = runner.state._replace(arena=arena)
            return loss

        self._calls.append((StepFeatures(EMPTY_BUCKET, num_losses=1, loss_rows=rows), call))

    def _optimizer(self) -> None:
        """Steps from zero weights by zero: slot 0 of the bank stays zero."""
        runner = self._runner
        optimizer = init_optimizer(
            jax.tree.map(jax.numpy.asarray, zero_lora(runner.model, runner.max_rank))
        )
        total = zero_sums(runner.model, runner.max_rank)
        hyper = Hyper(0.0, 0.0, 0.9, 0.999, 1e-8, 1.0, 1)

        def call() -> Any:
            nonlocal optimizer, total
            program = runner.programs["optimizer_step",]
            slot = np.int32(0)
            optimizer, total, runner.bank, stats = program(
                optimizer, total, runner.bank, slot, hyper.packed()
            )
            return stats, runner.bank

        self._calls.append((StepFeatures(EMPTY_BUCKET, num_optimizer_steps=1), call))
