"""`flexjax compile`."""

import json

import pytest

from pallas_kernels import aot

needs_plugin = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))


@needs_plugin
@pytest.mark.slow
def test_compiles_every_bucket_of_the_tiny_model(flexjax):
    arguments = ("--max-context-len", 64, "--max-running", 1, "--saved-activations", "full")
    status, out, _ = flexjax("compile", *arguments, "--device", "a100", "--json")
    assert status == 0
    *buckets, summary = [json.loads(line) for line in out.splitlines()]
    assert summary["num_buckets"] == len(buckets) > 0
    assert summary["device"] == "a100"
    assert summary["max_temp_bytes"] == max(bucket["temp_bytes"] for bucket in buckets)
    for bucket in buckets:
        assert bucket["compile_s"] > 0
        assert bucket["floor_s"] > 0
        assert bucket["fits"]
        assert all(kernel["registers"] > 0 for kernel in bucket["kernels"])


def test_unknown_devices_and_models_are_refused(flexjax):
    status, _, error = flexjax("compile", "--device", "v100")
    assert status == 2
    assert "`device` must be one of a100, h100, h200; got 'v100'" in error
    status, _, error = flexjax("compile", "--model", "gpt-9")
    assert status == 2
    assert "`--model` must be a directory, or one of" in error


def test_missing_plugin_is_named(flexjax, monkeypatch):
    monkeypatch.setattr(aot, "missing", lambda: "the plugin is missing")
    status, _, error = flexjax("compile")
    assert status == 2
    assert "the plugin is missing" in error
