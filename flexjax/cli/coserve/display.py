"""What a co-serving run shows while it runs."""

from __future__ import annotations

import collections
import time

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flexjax.cli.common import shorten
from flexjax.cli.coserve.loop import CoserveLoop

_REFRESH_S = 0.25
_LINE_S = 5.0
_RATE_WINDOW_S = 3.0
_NUM_ANSWERS = 6
_BARS = "▁▂▃▄▅▆▇█"


class Dashboard:
    """Shows a run: live on a terminal, as a line every few seconds elsewhere."""

    def __init__(self, loop: CoserveLoop, console: Console, title: str):
        self._loop = loop
        self._console = console
        self._title = title
        self._num_requests = len(loop.waiting)
        self._shown_s = 0.0
        self._samples: collections.deque[tuple[float, int, int]] = collections.deque()
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> Dashboard:
        """Starts to show."""
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Shows the last state and stops."""
        self.refresh(is_last=exc_info[0] is None)
        if self._live is not None:
            self._live.stop()

    def refresh(self, *, is_last: bool = False) -> None:
        """Shows the present state, if it is time to."""
        now_s = time.perf_counter()
        if not is_last and now_s - self._shown_s < (_REFRESH_S if self._live else _LINE_S):
            return
        self._shown_s = now_s
        stats = self._loop.stats
        done_tokens = stats.finetune_backward_tokens
        self._samples.append((now_s, stats.generated_tokens, done_tokens))
        window_s = _RATE_WINDOW_S if self._live else 2 * _LINE_S
        while len(self._samples) > 2 and now_s - self._samples[0][0] > window_s:
            self._samples.popleft()
        if self._live is not None:
            self._live.update(self._panel(), refresh=True)
        else:
            self._console.print(self._line(), highlight=False, markup=False, soft_wrap=True)

    def _rates(self) -> tuple[float, float]:
        """Generated and finetuned tokens per second, of late."""
        (begin_s, *first), (end_s, *last) = self._samples[0], self._samples[-1]
        if end_s <= begin_s:
            return 0.0, 0.0
        generated, trained = (b - a for a, b in zip(first, last, strict=True))
        return generated / (end_s - begin_s), trained / (end_s - begin_s)

    def _figures(self) -> tuple[str, str]:
        loop, metrics = self._loop, self._loop.job.metrics()
        generated, trained = self._rates()
        serving = (
            f"running {loop.stats.num_running}  waiting {loop.stats.num_waiting}  "
            f"{generated:,.0f} tokens/s"
        )
        finetuning = loop.job.status.value
        if metrics.steps:
            finetuning = f"loss {metrics.losses[-1]:.3f}  {trained:,.0f} tokens/s"
            if metrics.eta_s:
                finetuning += f"  ETA {metrics.eta_s:.0f} s"
        return serving, finetuning

    def _line(self) -> str:
        metrics = self._loop.job.metrics()
        serving, finetuning = self._figures()
        elapsed_s = time.perf_counter() - self._loop.begin_s
        return (
            f"{elapsed_s:6.1f} s  requests {len(self._loop.finished)}/{self._num_requests}  "
            f"{serving} | finetuning {len(metrics.steps)}/{metrics.total_steps}  {finetuning}"
        )

    def _panel(self) -> Panel:
        metrics = self._loop.job.metrics()
        serving, finetuning = self._figures()
        rows = Table.grid(padding=(0, 2), expand=True)
        rows.add_column(width=10, style="bold")
        rows.add_column(width=24)
        rows.add_column(width=9, justify="right")
        rows.add_column(ratio=1)
        done, steps = len(self._loop.finished), len(metrics.steps)
        rows.add_row(
            "requests",
            ProgressBar(self._num_requests, done),
            f"{done}/{self._num_requests}",
            serving,
        )
        rows.add_row(
            "finetuning",
            ProgressBar(max(1, metrics.total_steps), steps),
            f"{steps}/{metrics.total_steps}",
            finetuning,
        )
        rows.add_row("loss", Text(sparkline(metrics.losses, 24), style="magenta"), "", "")
        elapsed_s = time.perf_counter() - self._loop.begin_s
        return Panel(
            Group(rows, Text(""), self._answers()),
            title=self._title,
            subtitle=f"{elapsed_s:.0f} s",
        )

    def _answers(self) -> Table:
        """The latest answers, and the first of those that are being written."""
        table = Table.grid(padding=(0, 2), expand=True)
        table.add_column(ratio=1, style="cyan", no_wrap=True, overflow="ellipsis")
        table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        latest = self._loop.finished[-_NUM_ANSWERS:]
        for request in latest:
            answer = shorten(request.output.result().text, 200)
            table.add_row(
                Text(shorten(request.planned.prompt.text, 200)), Text(answer or "(no text)")
            )
        for _ in range(_NUM_ANSWERS - len(latest)):
            table.add_row("", "")
        return table


def sparkline(values: list[float], width: int) -> str:
    """Draws values as bars, the mean of several where there are more than `width`."""
    if not values:
        return ""
    groups = min(width, len(values))
    edges = [round(index * len(values) / groups) for index in range(groups + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(_BARS[round((mean - low) / span * (len(_BARS) - 1))] for mean in means)
