"""Figures that the notebooks draw: tile orders, training curves, throughput.

Takes plain data (metrics, counters) and returns matplotlib figures; knows neither engine nor jax.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

_FINETUNE_COLOR = "#2a6f97"
_REQUEST_COLOR = "#e07a1f"
_TILE_COLORS = "Blues"
_FINETUNE_COUNTERS = ("finetune_forward_tokens", "finetune_backward_tokens")


class Loss(Protocol):
    """A measured loss: what `StepRecord` and `EvalRecord` have in common."""

    @property
    def step(self) -> int:
        """Optimizer steps."""
        ...

    @property
    def loss(self) -> float:
        """Mean loss per target token, nats."""
        ...


class Counters(Protocol):
    """The counters of `EngineStats` that the throughput figure reads."""

    @property
    def generated_tokens(self) -> int:
        """Tokens sampled and kept."""
        ...

    @property
    def finetune_forward_tokens(self) -> int:
        """Finetuning rows taken through the forward pass."""
        ...

    @property
    def finetune_backward_tokens(self) -> int:
        """Finetuning rows taken through the backward pass."""
        ...


def tile_order(num_windows: int, num_layers: int, order: str) -> list[tuple[int, int]]:
    """Lists backward tiles as (window, layer), both from 0, in the order in which they run.

    Args:
      num_windows: Windows that the sequence is cut into.
      num_layers: Layers, one tile each per window.
      order: "window_major" or "layer_major".

    Raises:
      ValueError: If `order` is neither.
    """
    windows, layers = range(num_windows)[::-1], range(num_layers)[::-1]
    if order == "window_major":
        return [(window, layer) for window in windows for layer in layers]
    if order == "layer_major":
        return [(window, layer) for layer in layers for window in windows]
    raise ValueError(f"`order` must be 'window_major' or 'layer_major'; got {order!r}.")


def plot_tile_orders(num_windows: int = 4, num_layers: int = 3) -> Figure:
    """Draws the grid of backward tiles, numbered in both orders."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 2.9), layout="constrained")
    for axes, order in zip(panels, ("window_major", "layer_major"), strict=True):
        tiles = tile_order(num_windows, num_layers, order)
        grid = [[0] * num_windows for _ in range(num_layers)]
        for number, (window, layer) in enumerate(tiles, start=1):
            grid[layer][window] = number
            color = "white" if number > 0.6 * len(tiles) else "black"
            axes.text(window, layer, str(number), ha="center", va="center", color=color)
        axes.imshow(grid, cmap=_TILE_COLORS, origin="lower", aspect="auto", alpha=0.85)
        axes.set_xticks(range(num_windows), [f"window {i + 1}" for i in range(num_windows)])
        axes.set_yticks(range(num_layers), [f"layer {i + 1}" for i in range(num_layers)])
        axes.set_xticks([i - 0.5 for i in range(1, num_windows)], minor=True)
        axes.set_yticks([i - 0.5 for i in range(1, num_layers)], minor=True)
        axes.grid(which="minor", color="white", linewidth=2)
        axes.tick_params(which="both", length=0)
        axes.set_title(order.replace("_", "-"))
    return figure


def plot_training(
    steps: Sequence[Loss],
    evals: Sequence[Loss],
    samples: Sequence[tuple[float, Counters]],
) -> Figure:
    """Draws a job's loss beside the engine's throughput.

    Args:
      steps: Losses of the optimizer steps.
      evals: Losses on held-out rows; may be empty.
      samples: (seconds, counters), in order of time.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
    _draw_loss(left, steps, evals)
    _draw_throughput(right, samples)
    return figure


def _draw_loss(axes: Axes, steps: Sequence[Loss], evals: Sequence[Loss]) -> None:
    color = _FINETUNE_COLOR
    axes.plot([r.step for r in steps], [r.loss for r in steps], color=color, label="training")
    if evals:
        points = [r.step for r in evals], [r.loss for r in evals]
        axes.plot(*points, "o", color=_REQUEST_COLOR, label="held-out rows")
        axes.legend(frameon=False)
    axes.set(xlabel="optimizer step", ylabel="loss per target token (nats)", title="Loss")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_throughput(axes: Axes, samples: Sequence[tuple[float, Counters]]) -> None:
    start = samples[0][0]
    edges = [time_s - start for time_s, _ in samples]
    for names, label, color in (
        (_FINETUNE_COUNTERS, "finetuning, forward and backward", _FINETUNE_COLOR),
        (("generated_tokens",), "generated tokens", _REQUEST_COLOR),
    ):
        totals = [sum(getattr(counters, name) for name in names) for _, counters in samples]
        rates = np.diff(totals) / np.diff(edges)
        axes.stairs(rates, edges, color=color, label=label, linewidth=1.5)
    axes.set(xlabel="seconds", ylabel="rows per second", title="Throughput")
    axes.set_ylim(bottom=0, top=1.3 * axes.get_ylim()[1])
    axes.legend(frameon=False, loc="upper left", ncols=2)
    axes.spines[["top", "right"]].set_visible(False)


def plot_curves(
    x: Sequence[float], curves: Mapping[str, Sequence[float]], *, x_label: str, y_label: str
) -> Figure:
    """Draws curves over a quantity that doubles, both axes logarithmic.

    Args:
      x: Positions, rising.
      curves: Values by label.
      x_label: What `x` is.
      y_label: What the values are.
    """
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for label, values in curves.items():
        axes.plot(x, values, marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(x, [f"{value:,}" for value in x])
    axes.minorticks_off()
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.legend(frameon=False)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
