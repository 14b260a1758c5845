"""Weights in Hugging Face format: safetensors in, safetensors out.

Owns the table from Hugging Face names to ours. Hugging Face keeps linears per layer as [out, in];
ours are stacked, [L, in, out]. Reading `config.json` belongs to `flexjax.model_config`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from flexjax.config import LORA_TARGETS
from flexjax.errors import ModelNotFoundError, UnsupportedModelError, WeightFormatError
from flexjax.model_config import ModelConfig, config_from_hf, load_model_config
from flexjax.models.decoder import Decoder
from flexjax.models.weights import DecoderWeights, weight_specs

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPES = ("float32", "bfloat16", "float16")
"""Dtypes that weights can be loaded as."""

_STORED_DTYPES = {"F64", "F32", "BF16", "F16"}
_MAX_LISTED = 20

_GLOBAL_KEYS = {
    "embed": ("model.embed_tokens.weight", False),
    "final_norm": ("model.norm.weight", False),
    "lm_head": ("lm_head.weight", True),
}
"""Our name -> (Hugging Face key, whether to transpose), for arrays without a layer axis."""

_LAYER_KEYS = {
    "input_norm": ("input_layernorm.weight", False),
    "post_attention_norm": ("post_attention_layernorm.weight", False),
    "q_norm": ("self_attn.q_norm.weight", False),
    "k_norm": ("self_attn.k_norm.weight", False),
}
for _name in LORA_TARGETS:
    _parent = "self_attn" if _name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    _LAYER_KEYS[f"{_name}.kernel"] = (f"{_parent}.{_name}.weight", True)
    _LAYER_KEYS[f"{_name}.bias"] = (f"{_parent}.{_name}.bias", False)
"""Our name -> (Hugging Face key below `model.layers.N.`, whether to transpose)."""

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One stored tensor: where it goes and what it must look like in the file."""

    name: str
    layer: int | None
    shape: tuple[int, ...]
    transpose: bool


def load_weights(model_dir: str | Path, config: ModelConfig, dtype: str) -> DecoderWeights:
    """Reads `model.safetensors`, or the shards of `model.safetensors.index.json`.

    Keys and shapes are checked from the file headers before a tensor is read. Tensors are read one
    by one into stacked buffers of `dtype`, so the peak is the weights and one tensor. An
    `lm_head.weight` beside tied embeddings and stored rotary frequencies are ignored.

    Args:
      model_dir: Directory with the files.
      config: Architecture that they must fit.
      dtype: Dtype of every returned array: "float32", "bfloat16" or "float16".

    Returns:
      The weights, on JAX's default device.

    Raises:
      ModelNotFoundError: If the directory holds no safetensors weights.
      WeightFormatError: If keys are missing or unexpected (the message lists them), a shape or
        stored dtype is wrong, or a file is absent or damaged.
      ValueError: If `dtype` is none of the three.
    """
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}; got {dtype!r}.")
    entries = _entries(config)
    with contextlib.ExitStack() as stack:
        locations = _open_files(Path(model_dir), stack)
        _check_keys(entries, locations, config)
        _check_tensors(entries, locations)
        return _read(entries, locations, config, dtype)


def save_weights(
    model_dir: str | Path, config: ModelConfig, weights: DecoderWeights, dtype: str | None = None
) -> None:
    """Writes `model.safetensors` and `config.json`, as transformers reads them.

    Args:
      model_dir: Directory; made if it does not exist.
      config: Architecture of the weights.
      weights: What to write.
      dtype: Dtype to store; None keeps that of `weights.embed`.

    Raises:
      UnsupportedModelError: If no Hugging Face configuration of the family describes `config`.
      ValueError: If the weights do not have the shapes of `config`, or `dtype` is unknown.
    """
    dtype = dtype or str(weights.embed.dtype)
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}; got {dtype!r}.")
    raw_config = config_to_hf(dataclasses.replace(config, dtype=dtype))
    entries = _entries(config)
    arrays = _flat(weights)
    for name, spec in _flat(weight_specs(config)).items():
        got = None if name not in arrays else tuple(arrays[name].shape)
        if got != spec.shape:
            raise ValueError(f"`weights` must hold {name} of shape {spec.shape}; got {got}.")
    host = {name: np.asarray(array) for name, array in arrays.items()}
    tensors = {}
    for key, entry in entries.items():
        array = host[entry.name] if entry.layer is None else host[entry.name][entry.layer]
        array = array.T if entry.transpose else array
        tensors[key] = np.ascontiguousarray(array.astype(jnp.dtype(dtype), copy=False))
    model_dir = Path(model_dir)
    model_dir.mkdir(parents=True, exist_ok=True)
    with _replacing(model_dir / WEIGHTS_FILE) as path:
        safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    with _replacing(model_dir / "config.json") as path:
        path.write_text(json.dumps(raw_config, indent=2) + "\n", encoding="utf-8")


def load_decoder(model_dir: str | Path, dtype: str | None = None) -> Decoder:
    """Reads configuration and weights of a model directory.

    Args:
      model_dir: Hugging Face directory.
      dtype: Dtype of the weights; None for the one that they are stored in.

    Raises:
      ModelNotFoundError: If the directory or one of its files does not exist.
      UnsupportedModelError: If the architecture is not supported.
      WeightFormatError: If the weights do not fit the configuration or a file is damaged.
      ValueError: If the configuration or `dtype` cannot be used.
    """
    config = load_model_config(model_dir)
    return Decoder(config, load_weights(model_dir, config, dtype or config.dtype))


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields of a `config.json` that describes `config`, new and old key style.

    Raises:
      UnsupportedModelError: If no configuration of the family describes it.
    """
    rope: dict[str, Any] = {"rope_type": config.rope.kind}
    if config.rope.kind != "default":
        rope["factor"] = config.rope.factor
        rope["original_max_position_embeddings"] = config.rope.original_max_position
    if config.rope.kind == "llama3":
        rope["low_freq_factor"] = config.rope.low_freq_factor
        rope["high_freq_factor"] = config.rope.high_freq_factor
    eos = list(config.eos_token_ids)
    raw: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "rope_parameters": {**rope, "rope_theta": config.rope.theta},
        "tie_word_embeddings": config.tie_embeddings,
        "dtype": config.dtype,
        "torch_dtype": config.dtype,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "bos_token_id": config.bos_token_id,
        "use_cache": True,
    }
    if config.rope.kind != "default":
        raw["rope_scaling"] = rope
    if config.family in ("llama", "qwen3"):
        raw["attention_bias"] = config.qkv_bias
    if config.family == "mistral":
        raw["sliding_window"] = config.sliding_window
    if config.family in ("qwen2", "qwen3"):
        raw["use_sliding_window"] = False
    back = config_from_hf(raw)
    differing = [
        field.name
        for field in dataclasses.fields(ModelConfig)
        if getattr(back, field.name) != getattr(config, field.name)
    ]
    if differing:
        raise UnsupportedModelError(
            f"`config` must be one that a Hugging Face {config.family} model can have; it cannot "
            f"have these {', '.join(f'{n}={getattr(config, n)!r}' for n in differing)}."
        )
    return raw


def _flat(weights: DecoderWeights) -> dict[str, Any]:
    """Leaves by our name; an absent head is left out."""
    flat = {name: getattr(weights, name) for name in _GLOBAL_KEYS}
    return {**{k: v for k, v in flat.items() if v is not None}, **weights.layers}


def _entries(config: ModelConfig) -> dict[str, _Entry]:
    """Every Hugging Face key that the architecture has."""
    entries = {}
    for name, spec in _flat(weight_specs(config)).items():
        if name in _GLOBAL_KEYS:
            key, transpose = _GLOBAL_KEYS[name]
            shape = spec.shape[::-1] if transpose else spec.shape
            entries[key] = _Entry(name, None, shape, transpose)
            continue
        key, transpose = _LAYER_KEYS[name]
        shape = spec.shape[:0:-1] if transpose else spec.shape[1:]
        for layer in range(config.num_layers):
            entries[f"model.layers.{layer}.{key}"] = _Entry(name, layer, shape, transpose)
    return entries


def _open_files(model_dir: Path, stack: contextlib.ExitStack) -> dict[str, tuple[Path, Any]]:
    """Opens the weight files; returns key -> (path, open file)."""
    if not model_dir.is_dir():
        raise ModelNotFoundError(f"Model directory {str(model_dir)!r} does not exist.")
    if (model_dir / WEIGHTS_FILE).is_file():
        path = model_dir / WEIGHTS_FILE
        handle = stack.enter_context(_open(path))
        return {key: (path, handle) for key in handle.keys()}
    index_path = model_dir / INDEX_FILE
    if not index_path.is_file():
        hint = ""
        if list(model_dir.glob("pytorch_model*.bin")):
            hint = " It holds pytorch_model.bin; save the model as safetensors."
        raise ModelNotFoundError(
            f"Model directory {str(model_dir)!r} must hold {WEIGHTS_FILE} or {INDEX_FILE}; it "
            f"holds neither.{hint}"
        )
    weight_map = _read_index(index_path)
    handles = {}
    for file in sorted(set(weight_map.values())):
        path = model_dir / file
        if Path(file).name != file or not path.is_file():
            raise WeightFormatError(f"{index_path} names the shard {file!r}, which is absent.")
        handles[file] = stack.enter_context(_open(path))
    stored = {file: set(handle.keys()) for file, handle in handles.items()}
    for key, file in weight_map.items():
        if key not in stored[file]:
            raise WeightFormatError(f"{index_path} places {key} in {file}, which does not hold it.")
    locations = {}
    for file, keys in stored.items():
        locations.update({key: (model_dir / file, handles[file]) for key in keys})
    locations.update({k: (model_dir / file, handles[file]) for k, file in weight_map.items()})
    return locations


def _open(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="np")
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightFormatError(f"{path} is damaged: {error}.") from error


def _read_index(path: Path) -> dict[str, str]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WeightFormatError(f"{path} is damaged: {error}.") from error
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightFormatError(f"{path} is damaged: it must hold a non-empty `weight_map`.")
    if not all(isinstance(file, str) for file in weight_map.values()):
        raise WeightFormatError(f"{path} is damaged: `weight_map` must hold file names.")
    return weight_map


def _check_keys(entries: dict[str, _Entry], stored: Iterable[str], config: ModelConfig) -> None:
    found = {key for key in stored if not key.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings:
        found.discard(_GLOBAL_KEYS["lm_head"][0])
    missing = [key for key in entries if key not in found]
    unexpected = sorted(found - set(entries))
    if missing or unexpected:
        raise WeightFormatError(
            f"Weights do not fit the {config.family} configuration: "
            f"missing keys: {shorten_list(missing)}; unexpected keys: {shorten_list(unexpected)}."
        )


def _check_tensors(entries: dict[str, _Entry], locations: dict[str, tuple[Path, Any]]) -> None:
    wrong = []
    for key, entry in entries.items():
        tensor = locations[key][1].get_slice(key)
        shape, stored_dtype = tuple(tensor.get_shape()), tensor.get_dtype()
        if shape != entry.shape:
            wrong.append(f"{key} must have shape {entry.shape}, got {shape}")
        elif stored_dtype not in _STORED_DTYPES:
            wrong.append(f"{key} must be stored as floating point, got {stored_dtype}")
    if wrong:
        raise WeightFormatError(
            f"Weights do not fit the configuration: {shorten_list(wrong, '; ')}."
        )


def _read(
    entries: dict[str, _Entry],
    locations: dict[str, tuple[Path, Any]],
    config: ModelConfig,
    dtype: str,
) -> DecoderWeights:
    by_name: dict[str, list[tuple[str, _Entry]]] = {}
    for key, entry in entries.items():
        by_name.setdefault(entry.name, []).append((key, entry))
    arrays: dict[str, jax.Array] = {}
    for name, spec in _flat(weight_specs(config)).items():
        buffer = np.empty(spec.shape, jnp.dtype(dtype))
        for key, entry in by_name[name]:
            path, handle = locations[key]
            try:
                tensor = handle.get_tensor(key)
            except (SafetensorError, OSError, ValueError) as error:
                raise WeightFormatError(f"{path} is damaged at {key}: {error}.") from error
            target = buffer if entry.layer is None else buffer[entry.layer]
            _copy(target, tensor.T if entry.transpose else tensor)
        arrays[name] = jnp.asarray(buffer)
    top = {name: arrays.pop(name, None) for name in _GLOBAL_KEYS}
    return DecoderWeights(**top, layers=arrays)  # type: ignore[arg-type]


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source; equal 16-bit dtypes are copied as integers, which is faster."""
    if source.dtype == target.dtype and source.dtype.itemsize == 2:
        target, source = target.view(np.uint16), source.view(np.uint16)
    target[...] = source


def shorten_list(items: Iterable[str], separator: str = ", ") -> str:
    """Joins the items, at most 20 of them; "none" for an empty list."""
    items = list(items)
    if not items:
        return "none"
    text = separator.join(items[:_MAX_LISTED])
    rest = len(items) - _MAX_LISTED
    return text if rest <= 0 else f"{text}{separator}and {rest} more"


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path that becomes `path` on success, and is removed on failure."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    os.chmod(name, 0o644)
    try:
        yield Path(name)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
