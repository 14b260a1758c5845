"""Figures of a run, each beside the value that a hand gets."""

import dataclasses
import json

import pytest
from metric_cases import request, run, step, train

from flexjax.metrics import (
    RunRecord,
    Tier,
    compare_table,
    interference_ratio,
    markdown_table,
    measured_window,
    meets,
    retention,
    summarize_run,
)

TIER = Tier("tier", ttft_s=1.0, tpot_s=0.25)


def attained(*requests, tier=TIER):
    return [meets(found, tier) for found in requests]


def test_a_request_meets_a_tier_by_all_its_targets():
    assert attained(
        request(token_times_s=(1.0, 1.25)),
        request(token_times_s=(1.001, 1.25)),
        request(token_times_s=(1.0, 1.251)),
        request(token_times_s=(1.0,)),
        request(token_times_s=(1.001,)),
    ) == [True, False, False, True, False]


def test_failed_refused_unfinished_and_cut_requests_miss():
    early = (0.1, 0.2)
    assert attained(
        request(token_times_s=early, output_tokens=3),
        request(token_times_s=early, output_tokens=3, finish_reason="stop"),
        request(token_times_s=early, status="unfinished", output_tokens=3),
        request(token_times_s=early, status="failed", output_tokens=3),
        request(status="refused"),
        request(status="finished"),
    ) == [False, True, False, False, False, False]


def test_a_late_generator_misses_for_the_server():
    # The server answered at once, but the request was due 2 s before it was sent.
    assert attained(request(due_s=1.0, token_times_s=(3.1,))) == [False]


def test_a_stall_shows_in_the_gaps_where_tpot_hides_it():
    gaps = [0.01] * 50 + [1.0] + [0.01] * 49
    times_s = [0.5]
    for gap in gaps:
        times_s.append(times_s[-1] + gap)
    stalled = request(token_times_s=times_s)
    # The 99th of 100 gaps lies a hundredth of the way to the stall.
    assert attained(stalled) == [True]
    assert attained(stalled, tier=Tier("gaps", 1.0, 0.25, itl_p99_s=0.02)) == [True]
    assert attained(stalled, tier=Tier("gaps", 1.0, 0.25, itl_p99_s=0.0198)) == [False]


def test_targets_are_positive():
    with pytest.raises(ValueError, match="`tpot_s` must be > 0; got 0"):
        Tier("tier", 1.0, 0.0)


def test_attainment_and_goodput_count_every_request():
    found = summarize_run(
        run(
            [
                request(0, 0.0, (0.5, 0.75), adapter="a", slo_class="interactive"),
                request(1, 1.0, (2.5, 2.75), adapter="a"),
                request(2, 2.0, (2.5,), slo_class="interactive"),
                request(3, 3.0, status="refused", output_tokens=5),
                request(4, 4.0, (4.5, 9.0), status="unfinished", output_tokens=5),
            ]
        ),
        [TIER, Tier("slow", 2.0, 10.0)],
    )
    requests = found.requests
    assert found.duration_s == 10.0 and found.num_outside == 0
    assert requests.num_requests == 5
    assert requests.statuses == {"finished": 3, "refused": 1, "unfinished": 1}
    assert [(t.name, t.num_met, t.attainment, t.goodput) for t in requests.tiers] == [
        ("tier", 2, 0.4, 0.2),
        ("slow", 3, 0.6, 0.3),
    ]
    assert requests.output_tokens == 7 and found.output_tokens_per_s == 0.7
    assert requests.ttft_s and (requests.ttft_s.count, requests.ttft_s.p50) == (4, 0.5)
    assert requests.tpot_s and requests.tpot_s.max == 4.5
    assert requests.itl_s and requests.itl_s.count == 3
    assert requests.e2e_s and (requests.e2e_s.count, requests.e2e_s.max) == (3, 1.75)
    assert {k: v.num_requests for k, v in found.by_adapter.items()} == {"(base model)": 3, "a": 2}
    assert {k: v.tiers[0].attainment for k, v in found.by_class.items()} == {
        "(no class)": 0.0,
        "interactive": 1.0,
    }
    assert sum(v.tiers[0].goodput for v in found.by_adapter.values()) == pytest.approx(0.2)


def test_own_targets_judge_each_request_by_its_own():
    found = summarize_run(
        run(
            [
                request(0, 0.0, (0.5, 0.75), ttft_target_ms=500.0, tpot_target_ms=250.0),
                request(1, 0.0, (0.5, 0.75), ttft_target_ms=499.0),
                request(2, 0.0, (5.0, 5.1), tpot_target_ms=200.0),
                request(3, 0.0, (9.0, 10.0)),
                request(4, 0.0, status="failed", ttft_target_ms=500.0),
            ]
        ),
        [],
    )
    own = found.requests.own_targets
    assert own and (own.num_requests, own.num_met, own.attainment) == (4, 2, 0.5)
    assert own.goodput == 0.2
    assert summarize_run(run([request(0, 0.0, (0.5, 2.0))])).requests.own_targets is None


def test_the_six_seconds_of_loquetier():
    waits = [request(i, 1.0, (9.0,), admitted_s=1.0 + wait) for i, wait in enumerate((0, 6, 6.5))]
    refused = request(3, 1.0, status="refused")
    found = summarize_run(run([*waits, refused])).requests
    assert found.admission_attainment == 0.5
    assert found.admission_wait_s and found.admission_wait_s.max == 6.5
    # Tokens without an admission: admissions were not written down.
    unknown = summarize_run(run([*waits, request(4, 1.0, (9.0,))])).requests
    assert unknown.admission_attainment is None


def test_the_measured_window():
    done = [request(0, 0.0, (2.0, 8.0)), request(1, 5.0, (6.0,)), request(2, 9.0, status="refused")]
    open_ = request(3, 6.0, (7.0,), status="unfinished", output_tokens=2)
    assert measured_window(run(done)) == (0.0, 8.0)
    assert measured_window(run(done), 3.0) == (3.0, 8.0)
    assert measured_window(run([*done, open_])) == (0.0, 10.0)
    assert measured_window(run(done, until_s=6.5)) == (0.0, 6.5)
    assert measured_window(run()) == (0.0, 10.0)
    for head_s in (8.0, -1.0):
        with pytest.raises(ValueError, match="`drop_head_s` must be >= 0 and below the 8 s"):
            summarize_run(run(done), drop_head_s=head_s)


def test_a_head_that_is_left_out_is_counted_as_such():
    found = summarize_run(
        run([request(0, 0.0, (1.0, 4.0)), request(1, 3.0, (3.5, 6.0)), request(2, 9.0, (9.5,))]),
        [TIER],
        drop_head_s=2.0,
    )
    assert (found.begin_s, found.end_s) == (2.0, 9.5)
    assert found.num_outside == 1 and found.requests.num_requests == 2
    # The later token of the request that was due in the head fell into the window.
    assert found.output_tokens_per_s == pytest.approx(4 / 7.5)


def test_finetuning_counts_loss_bearing_tokens_in_the_window():
    rows = (2, 4, 6, 8)
    found = summarize_run(
        run(
            steps=[
                step(0.0, 1.0, rows, (4, 16, 16), backward_target_tokens=5.0),
                step(3.0, 4.0, rows, (4, 16, 16), backward_target_tokens=3.0),
                step(4.5, 5.5, rows, (4, 16, 16), backward_target_tokens=8.0),
            ],
            training=[train(1.0, 20, tokens=30), train(4.0, 10, tokens=30), train(5.5, 7)],
            until_s=5.0,
        )
    )
    trained = found.finetuning
    assert trained.num_steps == 2
    assert trained.target_tokens_per_s == 6.0
    assert trained.tokens_per_s == 12.0
    assert trained.backward_target_tokens_per_s == 8 / 5
    assert trained.forward_tokens_per_s == 12 / 5
    # Of a step: 8 rows of the tile, and 6 / 10 of the 6 that prefill and finetuning share.
    assert trained.padding_share == pytest.approx(11.6 / (11.6 + 14))
    without = summarize_run(run(training=[train(1.0, 20)])).finetuning
    assert without.backward_target_tokens_per_s is None and without.forward_tokens_per_s is None
    assert without.padding_share is None and without.target_tokens_per_s == 2.0


def test_the_device():
    found = summarize_run(
        run(
            steps=[
                step(0.0, 2.0, (2, 0, 0, 0), (4, 0, 0), measured_ms=10.0, predicted_ms=10.0),
                step(1.0, 3.0, (2, 0, 2, 0), (4, 4, 0), measured_ms=12.0, predicted_ms=10.0),
                step(6.0, 7.0, (0, 0, 0, 8), (0, 0, 8), measured_ms=9.0, predicted_ms=10.0),
                step(9.5, 11.0, (1, 1, 1, 1), (1, 2, 1), measured_ms=9.0),
            ]
        )
    ).device
    assert found and (found.num_steps, found.num_mixed) == (3, 1)
    # Of 10 s, [0, 3], [6, 7] and [9.5, 10] are busy.
    assert found.idle_share == pytest.approx(0.55)
    assert found.padding_share == pytest.approx(6 / 20)
    assert (found.step_ms.p50, found.host_ms.mean) == (10.0, 1.0)
    error = found.model_error
    assert error and error.count == 3
    assert error.median_abs == pytest.approx(0.1)
    assert error.bias == pytest.approx(0.0)
    # Of 0, 0 and 0.2 the 95th percentile lies nine tenths between the last two.
    assert error.p95_under == pytest.approx(0.18)
    unforeseen = summarize_run(run(steps=[step(0.0, 1.0)])).device
    assert unforeseen and unforeseen.model_error is None and unforeseen.padding_share is None
    assert summarize_run(run()).device is None


def test_a_run_without_requests_has_no_attainment():
    found = summarize_run(run(), [TIER])
    assert found.requests.tiers[0].attainment is None and found.requests.ttft_s is None
    assert found.requests.admission_attainment is None and found.output_tokens_per_s == 0


def test_tiers_are_named_apart():
    with pytest.raises(ValueError, match="`tiers` must be named differently"):
        summarize_run(run(), [TIER, TIER])


def test_a_summary_lies_beside_its_run(tmp_path):
    measured = run([request(0, 0.0, (0.5, 0.75))], [step(0.0, 1.0)], [train(1.0, 5)])
    summary = summarize_run(measured).as_dict()
    dataclasses.replace(measured, summary=summary).save(tmp_path / "run.jsonl")
    assert RunRecord.load(tmp_path / "run.jsonl").summary == json.loads(json.dumps(summary))


def summary_of(policy, rate, gap_s=0.1, trained=100, tier=TIER):
    requests = [request(0, 0.0, (0.5, 0.5 + gap_s))] if gap_s is not None else []
    training = [train(1.0, trained)] if trained else []
    return summarize_run(
        run(requests, training=training, until_s=10.0, policy=policy, rate=rate), [tier]
    )


def test_interference_is_the_ratio_of_the_slowest_gaps():
    alone = summary_of("inference_only", 2.0, 0.1)
    assert interference_ratio(summary_of("co_serve", 2.0, 0.15), alone) == pytest.approx(1.5)
    with pytest.raises(ValueError, match="must have the rate of `with_training`, 4.0; got 2.0"):
        interference_ratio(summary_of("co_serve", 4.0), alone)
    for gap_s in (None, 0.0):
        with pytest.raises(ValueError, match="`without` must have gaps between tokens above 0"):
            interference_ratio(summary_of("co_serve", 2.0), summary_of("x", 2.0, gap_s))


def test_retention_compares_the_ends_of_the_rates():
    runs = [
        summary_of("co_serve", rate, trained=trained)
        for rate, trained in ((1.0, 100), (4.0, 60), (2.0, 10), (4.0, 80))
    ]
    assert retention(runs) == pytest.approx(0.7)
    for wrong, reason in (
        ([], "`runs` must be of one policy; got none"),
        ([*runs, summary_of("spatial", 1.0)], "`runs` must be of one policy; got co_serve, spat"),
        (runs[:1], "`runs` must have a rate each, two or more; got [1.0]"),
        ([*runs, summary_of("co_serve", None)], "`runs` must have a rate each"),
        ([runs[1], summary_of("co_serve", 1.0, trained=0)], "must train at the lowest rate, 1;"),
    ):
        with pytest.raises(ValueError) as error:
            retention(wrong)
        assert reason in str(error.value)


def test_the_table_compares_policies_over_rates():
    rows = compare_table(
        [
            summary_of("inference_only", 2.0, 0.1, trained=0),
            summary_of("finetune_only", None, None, trained=400),
            summary_of("co_serve", 4.0, 0.3, trained=100),
            summary_of("co_serve", 2.0, 0.15, trained=200),
        ],
        "tier",
    )
    found = [(r.policy, r.rate, r.attainment, r.peak_share, r.interference) for r in rows]
    assert found == [
        ("co_serve", 2.0, 1.0, 0.5, pytest.approx(1.5)),
        ("co_serve", 4.0, 0.0, 0.25, None),
        ("finetune_only", None, None, 1.0, None),
        ("inference_only", 2.0, 1.0, 0.0, pytest.approx(1.0)),
    ]
    assert rows[0].goodput == 0.1 and rows[0].target_tokens_per_s == 20.0
    lines = markdown_table(rows).splitlines()
    assert len(lines) == 6 and len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| co_serve | 2 | 100.0% | 0.10 | 0.50 / 0.50 | 150.0 |")
    assert lines[4].startswith("| finetune_only | - | - | 0.00 | - / - | - | - / - | - | 0 | 40 |")
    with pytest.raises(ValueError, match="`tier` must be one of tier; got 'other'"):
        compare_table([summary_of("co_serve", 2.0)], "other")
