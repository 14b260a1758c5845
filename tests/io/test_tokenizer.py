import json
import subprocess
import sys

import pytest
from tokenizer_cases import train_backend, write_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from flexjax.errors import ModelNotFoundError
from flexjax.io.tokenizer import Tokenizer

TEXTS = [
    "",
    "Hello! How are you today?",
    "naïve café 日本語 🙂👩‍👩‍👧 tail",
    "  leading and trailing  ",
    "line\n\nbreaks\t<|im_end|> inside",
]
CHATS = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße 🙂"}],
    [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": " two "},
        {"role": "user", "content": "three"},
    ],
]


@pytest.mark.parametrize("text", TEXTS)
def test_encode_and_decode_match_tokenizers(tokenizer, backend, text):
    assert tokenizer.encode(text) == backend.encode(text).ids
    plain = tokenizer.encode(text, add_special_tokens=False)
    assert plain == backend.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text) == [tokenizer.bos_token_id] + plain
    assert tokenizer.decode(plain, skip_special_tokens=False) == text
    ids, offsets = tokenizer.encode_with_offsets(text, add_special_tokens=False)
    assert ids == plain and len(offsets) == len(ids)


def test_special_tokens(tokenizer, backend):
    assert tokenizer.vocab_size == backend.get_vocab_size()
    assert tokenizer.eos_token_id == backend.token_to_id("<|im_end|>")
    assert tokenizer.bos_token_id == backend.token_to_id("<|begin|>")
    assert tokenizer.decode(tokenizer.encode("Hello")) == "Hello"
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == ""


def test_special_tokens_map_is_read_and_config_wins(tmp_path, backend):
    backend.save(str(tmp_path / "tokenizer.json"))
    tokens = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(tokens))
    assert Tokenizer.from_pretrained(tmp_path).eos_token_id == backend.token_to_id("<|im_end|>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|begin|>"}))
    assert Tokenizer.from_pretrained(tmp_path).bos_token_id == backend.token_to_id("<|begin|>")


def test_truncation_stored_in_the_file_is_not_applied(tmp_path):
    backend = train_backend()
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    write_tokenizer(tmp_path, backend)
    text = "The quick brown fox jumps over the lazy dog."
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert loaded.decode(loaded.encode(text)) == text


@pytest.mark.parametrize("options", [{}, {"add_bos_token": True}, {"add_bos_token": False}])
@pytest.mark.parametrize("with_bos", [True, False])
def test_bos_matches_transformers(tmp_path, options, with_bos):
    transformers = pytest.importorskip("transformers")
    write_tokenizer(tmp_path, train_backend(with_bos), **options)
    oracle = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert ours.encode(text) == oracle(text)["input_ids"]


@pytest.mark.parametrize("directory", ["tokenizer_dir", "llama_template_dir"])
@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("prompt", [True, False])
def test_chat_matches_transformers(request, directory, messages, prompt):
    transformers = pytest.importorskip("transformers")
    path = request.getfixturevalue(directory)
    oracle = transformers.AutoTokenizer.from_pretrained(path)
    ours = Tokenizer.from_pretrained(path)
    text = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert ours.render_chat(messages, add_generation_prompt=prompt) == text
    ids = oracle.apply_chat_template(
        messages, add_generation_prompt=prompt, tokenize=True, return_dict=False
    )
    assert ours.encode_chat(messages, add_generation_prompt=prompt) == ids
    assert ids.count(ours.bos_token_id) == (directory == "llama_template_dir")


def test_template_helpers_match_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    template = (
        "{% for m in messages %}\n"
        "    {% if m.role == 'system' %}{% continue %}{% endif %}\n"
        "{{ m | tojson }}{{ {'a': '<é>'} | tojson(indent=1) }}\n"
        "{% generation %}{% set x = 1 %}{{ m.content }}{% endgeneration %}\n"
        "{% endfor %}\n"
        "{{ strftime_now('%Y') }} {{ eos_token }} {{ tools is none }}"
    )
    write_tokenizer(tmp_path, train_backend(), template)
    oracle = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "ü < 3"}]
    expected = oracle.apply_chat_template(messages, tokenize=False)
    assert Tokenizer.from_pretrained(tmp_path).render_chat(messages) == expected


def test_template_of_the_configuration_is_used(tmp_path):
    named = [{"name": "tool", "template": "x"}, {"name": "default", "template": "D{{ bos_token }}"}]
    write_tokenizer(tmp_path, train_backend(), None, chat_template=named)
    assert Tokenizer.from_pretrained(tmp_path).render_chat([]) == "D<|begin|>"


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "forbidden"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "forbidden"),
        ("{{ messages.append(1) }}", "forbidden"),
        ("{{ cycler.__init__.__globals__ }}", "forbidden"),
        ("{% for m in messages %}", "broken at line 1"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_bad_templates_are_refused(tmp_path, template, match):
    write_tokenizer(tmp_path, train_backend(), template)
    with pytest.raises(ValueError, match=match):
        Tokenizer.from_pretrained(tmp_path).render_chat(CHATS[0])


def test_objects_do_not_reach_the_template(tokenizer):
    with pytest.raises(ValueError, match=r"messages\[0\]\.content` must be a plain JSON value"):
        tokenizer.render_chat([{"role": "user", "content": object()}])


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        Tokenizer.from_pretrained(tmp_path / "absent")
    with pytest.raises(ModelNotFoundError, match="no tokenizer.json"):
        Tokenizer.from_pretrained(tmp_path)
    write_tokenizer(tmp_path, train_backend(), None)
    with pytest.raises(ValueError, match="need a chat template"):
        Tokenizer.from_pretrained(tmp_path).render_chat(CHATS[0])
    (tmp_path / "tokenizer_config.json").write_text("[1")
    with pytest.raises(ValueError, match="tokenizer_config.json is damaged"):
        Tokenizer.from_pretrained(tmp_path)
    content = (tmp_path / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="tokenizer.json is damaged"):
        Tokenizer.from_pretrained(tmp_path)


def test_text_must_be_unicode(tokenizer):
    with pytest.raises(ValueError, match="valid Unicode"):
        tokenizer.encode("\ud800")


def pieces_of(tokenizer, ids, skip=True):
    stream = tokenizer.stream_decoder(skip_special_tokens=skip)
    return [stream.push(i) for i in ids] + [stream.flush()]


@pytest.mark.parametrize("text", TEXTS + ["🙂🙂", "日" * 20, "\ufffd real", "a\ufffd"])
def test_stream_never_splits_a_character(tokenizer, text):
    ids = tokenizer.encode(text)
    pieces = pieces_of(tokenizer, ids, skip=False)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=False)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
        assert pieces[-1] == ""  # whole text is out before the flush


def test_stream_of_random_tokens_equals_decode(tokenizer, rng):
    for _ in range(200):
        ids = [int(i) for i in rng.integers(0, tokenizer.vocab_size + 3, rng.integers(0, 30))]
        for skip in (True, False):
            pieces = pieces_of(tokenizer, ids, skip)
            assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip), ids


def byte_fallback_tokenizer():
    vocab = {"<unk>": 0, "▁": 1, "▁He": 2, "llo": 3}
    vocab.update({f"<0x{byte:02X}>": 4 + byte for byte in range(256)})
    backend = Backend(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.add_special_tokens(["<s>"])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(parts + [decoders.Strip(" ", 1, 0)])
    return Tokenizer(backend)


def test_stream_with_byte_fallback_equals_decode(rng):
    tokenizer = byte_fallback_tokenizer()
    emoji = [4 + byte for byte in "🙂".encode()]
    assert pieces_of(tokenizer, [2, 3, *emoji, 1, 2]) == [
        "He", "llo", "", "", "", "", "🙂 ", " He", ""
    ]  # fmt: skip
    choices = [1, 2, 3, 260, *emoji, 4 + 0x41]
    for _ in range(300):
        ids = [int(i) for i in rng.choice(choices, rng.integers(0, 14))]
        assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids), ids


def test_transformers_is_not_imported():
    code = (
        "import sys, flexjax.io.tokenizer, flexjax.io.dataset; print('transformers' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
