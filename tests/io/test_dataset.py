import json

import numpy as np
import pytest
from tokenizer_cases import train_backend, write_tokenizer

from flexjax.errors import DatasetError
from flexjax.io.dataset import load_dataset
from flexjax.io.tokenizer import Tokenizer


def load(rows, tokenizer, **options):
    return load_dataset(rows, tokenizer, **{"max_seq_len": 512, **options})


def loss_text(row, tokenizer):
    """Text of the tokens that bear loss."""
    ids = [int(t) for t in row.targets if t >= 0]
    return tokenizer.decode(ids, skip_special_tokens=False)


def assert_shifted(row):
    assert row.tokens.dtype == row.targets.dtype == np.int32
    assert row.tokens.shape == row.targets.shape and row.targets[-1] == -1
    kept = row.targets[:-1] >= 0
    np.testing.assert_array_equal(row.targets[:-1][kept], row.tokens[1:][kept])
    assert row.num_targets == kept.sum() > 0


def test_text(tokenizer):
    (row,) = load([{"text": "Hello café"}], tokenizer).rows
    assert_shifted(row)
    assert row.tokens.tolist() == tokenizer.encode("Hello café")
    assert row.targets.tolist() == row.tokens.tolist()[1:] + [-1]
    assert row.source == "row 1"


def test_prompt_and_completion_are_tokenized_apart(tokenizer):
    (row,) = load([{"prompt": "The quick br", "completion": "own fox"}], tokenizer).rows
    assert_shifted(row)
    first = tokenizer.encode("The quick br")
    second = tokenizer.encode("own fox", add_special_tokens=False) + [tokenizer.eos_token_id]
    assert row.tokens.tolist() == first + second
    expected = [-1] * (len(first) - 1) + second + [-1]
    assert row.targets.tolist() == expected


def test_conveniences_are_prompt_and_completion(tokenizer):
    rows = [
        {"question": "Why?", "answer": "So."},
        {"instruction": "Add.", "output": "3"},
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Add.", "input": "", "output": "3"},
    ]
    same = [
        {"prompt": "Question: Why?\nAnswer:", "completion": " So."},
        {"prompt": "### Instruction:\nAdd.\n\n### Response:\n", "completion": "3"},
        {
            "prompt": "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n",
            "completion": "3",
        },
        {"prompt": "### Instruction:\nAdd.\n\n### Response:\n", "completion": "3"},
    ]
    for a, b in zip(load(rows, tokenizer).rows, load(same, tokenizer).rows, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.targets, b.targets)


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Grüße 🙂"},
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "I am fine, thank you."},
]


@pytest.mark.parametrize("directory", ["tokenizer_dir", "llama_template_dir"])
@pytest.mark.parametrize("messages", [CHAT, CHAT[1:], CHAT[:3], CHAT[:4]])
def test_chat_loss_is_on_assistant_turns(request, directory, messages):
    tokenizer = Tokenizer.from_pretrained(request.getfixturevalue(directory))
    (row,) = load([{"messages": messages}], tokenizer).rows
    assert_shifted(row)
    assert row.tokens.tolist() == tokenizer.encode_chat(messages, add_generation_prompt=False)
    turns = [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]
    assert loss_text(row, tokenizer) == "".join(turns)


MARKED = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{%- else %}{{- m.content + '<|im_end|>\\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def test_chat_mask_matches_the_generation_tag_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    path = write_tokenizer(tmp_path, train_backend(), MARKED)
    oracle = transformers.AutoTokenizer.from_pretrained(path)
    theirs = oracle.apply_chat_template(
        CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    (row,) = load([{"messages": CHAT}], Tokenizer.from_pretrained(path)).rows
    assert row.tokens.tolist() == theirs["input_ids"]
    mask = np.asarray(theirs["assistant_masks"], bool)
    assert mask.any()
    np.testing.assert_array_equal(row.targets[:-1] >= 0, mask[1:])


THINKING = (
    "{%- for m in messages %}"
    "{{- '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.role == 'assistant' and loop.last %}{{- '[think]\\n\\n' }}{%- endif %}"
    "{{- m.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def test_templates_that_write_the_last_turn_differently(tmp_path):
    path = write_tokenizer(tmp_path, train_backend(), THINKING)
    tokenizer = Tokenizer.from_pretrained(path)
    (row,) = load([{"messages": CHAT}], tokenizer).rows
    expected = "Grüße 🙂<|im_end|>[think]\n\nI am fine, thank you.<|im_end|>"
    assert loss_text(row, tokenizer) == expected


def test_templates_without_prefix_property_are_refused(tmp_path):
    template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    path = write_tokenizer(tmp_path, train_backend(), template)
    with pytest.raises(DatasetError, match=r"row 1: .*messages\[2\]` as a continuation"):
        load([{"messages": CHAT}], Tokenizer.from_pretrained(path))


def test_trimmed_offsets_mask_the_same(tmp_path):
    path = write_tokenizer(tmp_path, train_backend(with_bos=False), THINKING)
    tokenizer = Tokenizer.from_pretrained(path)
    messages = [
        {"role": "user", "content": "a "},
        {"role": "assistant", "content": " the answer and  spaces "},
    ]
    (row,) = load([{"messages": messages}], tokenizer).rows
    assert loss_text(row, tokenizer) == "[think]\n\n the answer and  spaces <|im_end|>"


def test_files(tmp_path, tokenizer):
    path = tmp_path / "data.jsonl"
    rows = [{"text": "one\u2028line"}, {"text": "two 日本"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_bytes(("\ufeff" + lines[0] + "\r\n\n" + lines[1]).encode())
    dataset = load(path, tokenizer)
    assert [row.source for row in dataset.rows] == [f"{path}:1", f"{path}:3"]
    assert dataset.notes == ()
    assert load(str(path), tokenizer).num_tokens == dataset.num_tokens
    assert dataset.num_targets == dataset.num_tokens - 2
    for row, raw in zip(dataset.rows, rows, strict=True):
        assert row.tokens.tolist() == tokenizer.encode(raw["text"])


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (b'{"text": ', "not valid JSON"),
        (b"[1]", "must be a JSON object; got list"),
        (b'"text"', "must be a JSON object; got str"),
        (b'{"text": "caf\xe9"}', "not UTF-8"),
        (b"{}", "keys of a row must be .*; got none"),
        (b'{"text": "a", "id": 3}', "keys of a row must be .*; got 'text', 'id'"),
        (b'{"prompt": "a"}', "keys of a row must be .*; got 'prompt'"),
        (b'{"text": 3}', "`text` must be text; got int"),
        (b'{"prompt": null, "completion": "b"}', "`prompt` must be text; got NoneType"),
        (b'{"prompt": "a", "completion": ""}', "`completion` must not be empty"),
        (b'{"question": "a", "answer": ""}', "`answer` must not be empty"),
        (b'{"instruction": "a", "output": ""}', "`output` must not be empty"),
        (b'{"text": ""}', "no target token"),
        (b'{"text": "\\ud800"}', "valid Unicode"),
        (b'{"messages": []}', "non-empty list"),
        (b'{"messages": "hi"}', "non-empty list"),
        (b'{"messages": [{"role": "user"}]}', r"messages\[0\]` must have `role` and `content`"),
        (
            b'{"messages": [{"role": "user", "content": 1}]}',
            r"\[0\].content` must be text; got int",
        ),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "no target token"),
        (
            b'{"messages": [{"role": "user", "content": "a"}, '
            b'{"role": "assistant", "content": ""}]}',
            r"messages\[1\].content` of the assistant must not be empty",
        ),
    ],
)
def test_bad_lines_are_named(tmp_path, tokenizer, line, match):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(DatasetError, match=rf"data\.jsonl:2: .*{match}"):
        load(path, tokenizer)


def test_bad_files(tmp_path, tokenizer):
    with pytest.raises(DatasetError, match="does not exist"):
        load(tmp_path / "absent.jsonl", tokenizer)
    with pytest.raises(DatasetError, match="is not a file"):
        load(tmp_path, tokenizer)
    (tmp_path / "empty.jsonl").write_bytes(b"\n \n")
    with pytest.raises(DatasetError, match=r"empty\.jsonl has no row .* holds no rows"):
        load(tmp_path / "empty.jsonl", tokenizer)
    with pytest.raises(DatasetError, match="holds no rows"):
        load([], tokenizer)


def test_token_beyond_the_vocabulary(tokenizer):
    with pytest.raises(DatasetError, match="row 1: token id .* is beyond the vocabulary of 4"):
        load([{"text": "Hello"}], tokenizer, vocab_size=4)


def test_overlong_rows(tokenizer):
    long = "the quick brown fox " * 8
    rows = [
        {"text": "short"},
        {"text": long},
        {"prompt": long, "completion": "b"},
        {"prompt": "a", "completion": long},
    ]
    num = len(tokenizer.encode(long))
    with pytest.raises(DatasetError, match=f"row 2: the row has {num} tokens, .*max_seq_len`=16"):
        load(rows, tokenizer, max_seq_len=16)
    assert len(load(rows[:2], tokenizer, max_seq_len=num).rows) == 2
    dropped = load(rows, tokenizer, max_seq_len=16, overlong="drop")
    assert [row.source for row in dropped.rows] == ["row 1"]
    assert dropped.notes == (
        "the dataset: 3 rows dropped because of more than 16 tokens (lines 2, 3, 4).",
    )
    cut = load(rows, tokenizer, max_seq_len=16, overlong="truncate")
    assert [row.source for row in cut.rows] == ["row 1", "row 2", "row 4"]
    assert cut.rows[1].tokens.tolist() == tokenizer.encode(long)[:16]
    for row in cut.rows:
        assert_shifted(row)
    assert cut.notes == (
        "the dataset: 2 rows truncated to 16 tokens (lines 2, 4).",
        "the dataset: 1 row dropped because truncation to 16 tokens left no target token (line 3).",
    )
    with pytest.raises(DatasetError, match="no row to train on: .*1 row dropped"):
        load(rows[1:2], tokenizer, max_seq_len=16, overlong="drop")


def test_options_are_checked(tokenizer):
    with pytest.raises(ValueError, match="`overlong` must be one of .* got 'wrap'"):
        load([{"text": "a b"}], tokenizer, overlong="wrap")
    with pytest.raises(ValueError, match="`max_seq_len` must be at least 2; got 1"):
        load([{"text": "a b"}], tokenizer, max_seq_len=1)


def test_completions_need_an_end_token(backend):
    with pytest.raises(DatasetError, match="names no `eos_token`"):
        load([{"prompt": "a", "completion": "b"}], Tokenizer(backend))


def test_chat_needs_a_template(backend):
    with pytest.raises(DatasetError, match="row 1: .*need a chat template"):
        load([{"messages": CHAT}], Tokenizer(backend))
