"""What cannot be used is refused with status 2 and one line that says why."""

import json
import shutil
import statistics
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from cli_cases import ROWS, write_model, write_rows

from flexjax.cli.main import expand_lists
from flexjax.config import LoraConfig
from flexjax.io.peft_adapter import LoraAdapter, save_peft_adapter
from flexjax.lora.bank import init_lora
from flexjax.model_config import load_model_config


def assert_refused(result, *parts):
    status, out, err = result
    assert status == 2, err
    assert out == ""
    assert err.count("\n") == 1 and "Traceback" not in err
    for part in parts:
        assert part in err, err


def test_help_is_fast():
    times = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "flexjax.cli", "--help"],
            capture_output=True,
            text=True,
            check=True,
        )
        times.append(time.perf_counter() - began)
        for name in ("generate", "finetune", "coserve"):
            assert name in done.stdout
    assert statistics.median(times) < 1.5, times


@pytest.mark.parametrize("command", ["generate", "finetune", "coserve"])
def test_help_imports_no_jax(command):
    code = (
        "import sys; from flexjax.cli.main import main; status = main(sys.argv[1:]); "
        "heavy = {'jax', 'numpy', 'matplotlib'} & set(sys.modules); assert not heavy, heavy; "
        "sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, command, "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--model" in done.stdout and "--json" in done.stdout


def test_lists_after_one_option():
    arguments = ["generate", "--prompt", "a", "b", "--json", "--prompt", "-c", "--stop=x", "y"]
    assert expand_lists(arguments) == [
        *("generate", "--prompt", "a", "--prompt", "b", "--json"),
        *("--prompt", "-c", "--stop=x", "--stop", "y"),
    ]
    assert expand_lists(["finetune", "--max-steps", "3", "x"]) == [
        *("finetune", "--max-steps", "3", "x"),
    ]


def test_usage_errors(flexjax):
    assert_refused(flexjax("generate", "--nope"), "--nope")
    assert_refused(flexjax("finetune", "--output", "x"), "--data")
    assert_refused(flexjax("generate", "--max-tokens", "many"), "--max-tokens")
    assert_refused(flexjax("bake"), "bake")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a", "--max-tokens", "0"], "`max_tokens` must be an integer >= 1; got 0"),
        (["--prompt", "a", "--temperature", "nan"], "`temperature` must be a number in"),
        (["--prompt", "a", "--top-p", "0"], "`top_p` must be in (0, 1]"),
        (["--prompt", "a", "--logprobs", "99"], "`logprobs` must be at most 20"),
        (["--prompt", ""], "`--prompt` must not be empty"),
        ([], "`--prompt` or `--prompt-file` must give a prompt"),
        (["--prompt-file", "nope.txt"], "`--prompt-file` must be a file; got 'nope.txt'"),
        (["--prompt", "a", "--model", "nope"], "`--model` must be a directory, or one of"),
        (["--prompt", "a", "--model", "llama-3.1-8b"], "random weights and no tokenizer"),
        (["--prompt", "a", "--adapter", "nope"], "Adapter directory 'nope' does not exist"),
        (["--prompt", "a", "--dtype", "int4"], "`dtype` must be one of"),
        (["--prompt", "a", "--max-context-len", "999"], "`max_context_len` must be at most 128"),
    ],
)
def test_generate_refuses(flexjax, model_dir, arguments, message):
    model = [] if "--model" in arguments else ["--model", model_dir]
    assert_refused(flexjax("generate", *model, *arguments), message)


def test_prompt_too_long(flexjax, model_dir):
    result = flexjax("generate", "--model", model_dir, "--prompt", "x" * 500)
    assert_refused(result, "`prompt` must be shorter than the context, 128 tokens; got 500")


def test_damaged_model(flexjax, model_dir, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(model_dir, damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    result = flexjax("generate", "--model", damaged, "--prompt", "a")
    assert_refused(result, "model.safetensors")
    weights.unlink()
    assert_refused(flexjax("generate", "--model", damaged, "--prompt", "a"), "safetensors")
    (damaged / "config.json").write_text("{", "utf-8")
    assert_refused(flexjax("generate", "--model", damaged, "--prompt", "a"), "config.json")


def test_adapter_of_another_base(flexjax, model_dir, data, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    write_model(other, num_layers=1, hidden_size=48)
    out = tmp_path / "adapter"
    config = load_model_config(other)
    lora = LoraConfig(r=2)
    arrays = jax.tree.map(np.asarray, init_lora(config, lora, 0))
    save_peft_adapter(out, LoraAdapter(lora, arrays), config)
    result = flexjax("generate", "--model", model_dir, "--adapter", out, "--prompt", "a")
    assert_refused(result, "shape")
    result = flexjax(
        *("finetune", "--model", model_dir, "--data", data, "--output", "x"),
        *("--init-adapter", out),
    )
    assert_refused(result, "shape")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "rows.jsonl:3: the line is not valid JSON"),
        ('{"quest": "a"}', "rows.jsonl:3: the keys of a row must be"),
        (json.dumps({"text": "x" * 600}), "rows.jsonl:3: the row has 600 tokens"),
    ],
)
def test_broken_rows_name_the_line(flexjax, model_dir, tmp_path, line, message):
    file = write_rows(tmp_path / "rows.jsonl", ROWS[:2])
    with file.open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")
    for command in ("finetune", "coserve"):
        result = flexjax(command, "--model", model_dir, "--data", file, "--output", "new", "--json")
        assert_refused(result, message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning-rate", "nan"], "`learning_rate` must be a number"),
        (["--r", "0"], "`r` must be an integer >= 1"),
        (["--target-modules", "q_proj", "lm_head"], "`target_modules` must be out of"),
        (["--schedule", "step"], "`schedule` must be one of"),
        (["--tile-layers", "9"], "`tile_layers` must be at most 2"),
        (["--max-seq-len", "999"], "`max_context_len` must be at most 128"),
        (["--data", "nope.jsonl"], "'nope.jsonl' does not exist"),
        (["--eval-data", "nope.jsonl"], "'nope.jsonl' does not exist"),
    ],
)
def test_finetune_refuses(flexjax, model_dir, data, arguments, message):
    options = ("--model", model_dir, "--data", data, "--output", "out")
    assert_refused(flexjax("finetune", *options, *arguments), message)


def test_output_that_must_stay(flexjax, model_dir, data, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    options = ("--model", model_dir, "--data", data, "--output", out)
    (out / "thesis.tex").write_text("", "utf-8")
    for command in ("finetune", "coserve"):
        assert_refused(flexjax(command, *options, "--overwrite"), "holds other files")
    (out / "thesis.tex").unlink()
    (out / "adapter_config.json").write_text("{}", "utf-8")
    assert_refused(flexjax("finetune", *options), "is not empty; give another directory")
    (out / "requests.jsonl").write_text("", "utf-8")
    assert_refused(flexjax("coserve", *options), "is not empty; give another directory")
    file = tmp_path / "file"
    file.write_text("", "utf-8")
    options = ("--model", model_dir, "--data", data, "--output", file)
    assert_refused(flexjax("finetune", *options), "is a file")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-requests", "0"], "`--num-requests` must be at least 1; got 0"),
        (["--rate", "0"], "`rate` must be a number > 0"),
        (["--max-tokens", "0"], "`max_tokens` must be an integer >= 1"),
        (["--trace", "nope.csv"], "Trace 'nope.csv' is not a file"),
        (["--prompt", "x" * 500], "`--prompt` must be shorter than the context, 128 tokens"),
    ],
)
def test_coserve_refuses(flexjax, model_dir, data, arguments, message):
    options = ("--model", model_dir, "--data", data)
    assert_refused(flexjax("coserve", *options, *arguments), message)


def test_internal_errors_are_status_1(flexjax, model_dir, monkeypatch):
    from flexjax.engine.engine import Engine

    def step(self):
        raise ValueError("shapes do not fit")

    monkeypatch.setattr(Engine, "step", step)
    status, out, err = flexjax("generate", "--model", model_dir, "--prompt", "a", "--json")
    assert (status, out) == (1, "")
    assert "Traceback" in err and err.endswith("flexjax: internal error: ValueError\n")
