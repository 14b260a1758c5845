"""What the figures show: their lines hold the figures of the runs."""

import numpy as np
import pytest
from metric_cases import request, run, step, train

from flexjax.metrics import Tier, summarize_run
from flexjax.metrics.figures import plot_latency, plot_load, plot_timeline, policy_styles

TIER = Tier("tier", ttft_s=1.0, tpot_s=0.25, itl_p99_s=0.5)


def line_of(axes, label):
    (found,) = [line for line in axes.get_lines() if line.get_label() == label]
    return [np.asarray(values).tolist() for values in found.get_data()]


def loaded(policy, rate, num_met, trained):
    requests = [request(i, 0.0, (0.5 if i < num_met else 5.0,)) for i in range(4)]
    training = [train(1.0, trained)] if trained else []
    measured = run(requests, training=training, until_s=10.0, policy=policy, rate=rate)
    return summarize_run(measured, [TIER])


def test_load_shows_means_over_runs_and_a_level_without_a_rate():
    runs = [
        loaded("co_serve", 4.0, 2, 100),
        loaded("co_serve", 1.0, 4, 300),
        loaded("co_serve", 4.0, 4, 200),
        loaded("inference_only", 1.0, 3, 0),
        loaded("finetune_only", None, 4, 500),
    ]
    figure = plot_load(runs, [TIER], title="title")
    attainment, finetuning, output = figure.axes
    assert line_of(attainment, "co-serve") == [[1.0, 4.0], [100.0, 75.0]]
    assert line_of(attainment, "inference-only") == [[1.0], [75.0]]
    assert line_of(finetuning, "co-serve") == [[1.0, 4.0], [30.0, 15.0]]
    assert line_of(finetuning, "finetune-only")[1] == [50.0, 50.0]
    assert "inference-only" not in finetuning.get_legend_handles_labels()[1]
    assert line_of(output, "co-serve")[1] == [0.4, 0.4]
    assert "finetune-only" not in output.get_legend_handles_labels()[1]
    assert "requests/s" in output.get_xlabel() and "tokens/s" in output.get_ylabel()
    assert attainment.get_title() == "TTFT ≤ 1 s, TPOT ≤ 250 ms, ITL p99 ≤ 500 ms"
    assert "finetune-only" not in attainment.get_legend_handles_labels()[1]
    with pytest.raises(ValueError, match="`runs` must hold a run with a rate; got none"):
        plot_load(runs[-1:], [TIER], title="title")


def stairs_of(axes):
    return np.asarray(axes.patches[0].get_data().values).tolist()


def test_timeline_shows_rates_and_where_finetuning_is_from():
    requests = [request(0, 100.0, (101.0, 101.5)), request(1, 103.5, (103.8,))]
    steps = [
        step(100.0, 102.0, (0, 0, 0, 9), (0, 0, 9), backward_target_tokens=8.0),
        step(103.0, 103.5, (0, 0, 0, 9), (0, 0, 9), backward_target_tokens=1.0),
    ]
    more = {"begin_s": 100.0, "end_s": 104.0}
    training = [train(102.0, 12), train(104.0, 2, number=2)]
    figure = plot_timeline(run(requests, steps, training, **more), title="t", bin_s=1.0)
    arrivals, output, finetuning = figure.axes
    assert stairs_of(arrivals) == [1.0, 0.0, 0.0, 1.0]
    assert stairs_of(output) == [0.0, 2.0, 0.0, 1.0]
    assert stairs_of(finetuning) == [4.0, 4.0, 0.0, 1.0]
    assert "backward work" in finetuning.get_title("left")
    without = plot_timeline(run(requests, (), training, **more), title="t", bin_s=1.0).axes[2]
    assert stairs_of(without) == [6.0, 6.0, 1.0, 1.0]
    assert "optimizer steps" in without.get_title("left")


def test_latency_counts_requests_that_never_got_so_far():
    measured = run(
        [
            request(0, 0.0, (0.5, 0.6, 0.9)),
            request(1, 0.0, (0.25,)),
            request(2, 0.0, status="refused", output_tokens=3),
            request(3, 0.0, (2.0,), status="unfinished", output_tokens=3),
        ]
    )
    ttft, tpot, itl = plot_latency([measured], [TIER], title="title").axes
    assert line_of(ttft, "co-serve") == [[0.25, 0.5, 2.0], [25.0, 50.0, 75.0]]
    # One has a TPOT; the single token owes none; two others never came to theirs.
    assert line_of(tpot, "co-serve") == [[pytest.approx(200.0)], [pytest.approx(100 / 3)]]
    assert line_of(itl, "co-serve")[1] == [50.0, 100.0]
    targets = [line.get_xdata()[0] for line in itl.get_lines() if line.get_linestyle() == ":"]
    assert targets == [500.0]
    with pytest.raises(ValueError, match="`runs` must hold a generated token; got none"):
        plot_latency([run()], [TIER], title="title")


def test_long_distributions_keep_their_tail():
    times_s = np.cumsum(np.full(20_000, 0.01))
    times_s[-1] += 5.0
    measured = run([request(0, 0.0, tuple(times_s.tolist()))], end_s=300.0)
    x, y = line_of(plot_latency([measured], [], title="title").axes[2], "co-serve")
    assert len(x) < 3000
    assert x[-1] == pytest.approx(5010.0) and y[-1] == 100.0
    assert x[-2] == pytest.approx(10.0) and y[-2] == pytest.approx(100 - 100 / 19_999)


def test_policies_look_different_and_the_same_in_every_figure():
    names = ["co_serve", "temporal(64)", "temporal(128)", "dynamic_temporal", "mine", "other"]
    styles = policy_styles(names)
    looks = {(s.color, s.linestyle) for s in styles.values()}
    assert len(looks) == len(names)
    assert styles["temporal(64)"].color == styles["temporal(128)"].color
    assert styles["temporal(64)"].linestyle == "-"
    assert policy_styles(["co_serve"])["co_serve"] == styles["co_serve"]
