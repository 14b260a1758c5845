"""LoRA adapters in PEFT's format.

Reads and writes `adapter_config.json` and `adapter_model.safetensors` as PEFT does. Whatever would
change the result and is not implemented is refused by the name of its field.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from flexjax.config import LORA_TARGETS, LoraConfig
from flexjax.errors import AdapterFormatError
from flexjax.io.hf_weights import shorten_list
from flexjax.model_config import ModelConfig

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_KEY = re.compile(
    r"base_model\.model\.(?P<module>model\.layers\.(?P<layer>\d+)\.(?:self_attn|mlp)\."
    rf"(?P<name>{'|'.join(LORA_TARGETS)}))\.lora_(?P<matrix>[AB])\.weight"
)
_DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))

_HARMLESS_INITS = (True, False, None, "gaussian", "orthogonal")
"""Values of `init_lora_weights` that leave the base weights as they are."""

_MUST_BE_UNSET = {
    "use_dora": "DoRA is not supported",
    "modules_to_save": "only LoRA matrices can be loaded",
    "lora_bias": "biases of LoRA matrices are not supported",
    "rank_pattern": "ranks must be equal in all modules",
    "alpha_pattern": "scales must be equal in all modules",
    "megatron_config": "Megatron layers are not supported",
    "layer_replication": "replicated layers are not supported",
    "trainable_token_indices": "trained embeddings are not supported",
    "target_parameters": "only linear modules can be adapted",
    "fan_in_fan_out": "the linears of the supported models are [out, in]",
    "use_qalora": "QALoRA is not supported",
    "use_bdlora": "block-diagonal LoRA is not supported",
    "alora_invocation_tokens": "activated LoRA is not supported",
    "arrow_config": "Arrow routing is not supported",
    "velora_config": "VeLoRA is not supported",
    "kasa_config": "KaSA changes the base weights",
    "monteclora_config": "MonteCLoRA is not supported",
    "lora_ga_config": "LoRA-GA changes the base weights",
}
"""Fields of PEFT's configuration that must be absent, null, false or empty, and why."""


@dataclasses.dataclass(frozen=True)
class LoraAdapter:
    """One adapter on the host.

    Attributes:
      config: Shape and scale.
      arrays: {"q_proj": {"A": [L, in, r], "B": [L, r, out]}, ...}; float32, bfloat16 or float16.
        L counts all layers of the base; those without an adapter are zero.
    """

    config: LoraConfig
    arrays: dict[str, dict[str, np.ndarray]]


def load_peft_adapter(path: str | Path, model_config: ModelConfig) -> LoraAdapter:
    """Reads a PEFT directory; checks everything before it returns.

    Args:
      path: Directory with `adapter_config.json` and `adapter_model.safetensors`.
      model_config: Base model that the adapter must fit.

    Returns:
      The adapter, its values and dtype exactly as stored.

    Raises:
      AdapterFormatError: If a file is missing or damaged, a field asks for what is not supported
        (the message names it), or the tensors do not fit the base or the configuration.
    """
    path = Path(path)
    if not path.is_dir():
        raise AdapterFormatError(f"Adapter directory {str(path)!r} does not exist.")
    raw = _read_config(path / CONFIG_FILE)
    _refuse_unsupported(raw)
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise AdapterFormatError(f"`r` must be a positive integer; got {rank!r}.")
    is_number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    if not is_number or not math.isfinite(alpha) or alpha < 0:  # type: ignore[arg-type,operator]
        raise AdapterFormatError(f"`lora_alpha` must be a number >= 0; got {alpha!r}.")
    tensors = _read_tensors(path)
    found = _place(tensors, rank, model_config)
    _check_targets(raw, found, model_config)
    layers = tuple(sorted({layer for _, layer in found}))
    names = tuple(name for name in LORA_TARGETS if name in {name for name, _ in found})
    config = LoraConfig(
        r=rank,
        alpha=float(alpha),  # type: ignore[arg-type]
        target_modules=names,
        use_rslora=bool(raw.get("use_rslora", False)),
        layers_to_transform=None if len(layers) == model_config.num_layers else layers,
    )
    arrays = empty_arrays(config, model_config, next(iter(tensors.values())).dtype)
    for (name, layer), keys in found.items():
        for matrix, key in keys.items():
            arrays[name][matrix][layer] = tensors[key].T
    return LoraAdapter(config, arrays)


def save_peft_adapter(
    path: str | Path,
    adapter: LoraAdapter,
    model_config: ModelConfig,
    base_model_name: str | None = None,
) -> None:
    """Writes a directory that PEFT loads unchanged.

    Written beside `path` first and then renamed, so that a crash leaves no half adapter. An adapter
    that stands at `path` is replaced as a whole.

    Args:
      path: Directory to write; its parents are made.
      adapter: What to write, stored in the dtype that it has.
      model_config: Its base.
      base_model_name: Name or path of the base model to note down.

    Raises:
      AdapterFormatError: If arrays do not have the shapes of the configuration, or hold values
        that are not finite.
      ValueError: If something that is not an adapter stands at `path`.
    """
    path = Path(path)
    _check_replaceable(path)
    tensors = _to_tensors(adapter, model_config)
    text = json.dumps(_peft_config(adapter.config, base_model_name), indent=2) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        new, old = work / "new", work / "old"
        new.mkdir()
        safetensors.numpy.save_file(tensors, new / WEIGHTS_FILE, metadata={"format": "pt"})
        (new / CONFIG_FILE).write_text(text, encoding="utf-8")
        if path.is_dir():
            os.replace(path, old)
        try:
            os.replace(new, path)
        except OSError:
            if old.is_dir():
                os.replace(old, path)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def empty_arrays(
    config: LoraConfig, model_config: ModelConfig, dtype: Any
) -> dict[str, dict[str, np.ndarray]]:
    """Returns zero arrays of an adapter, {name: {"A": [L, in, r], "B": [L, r, out]}}."""
    dims, num_layers = model_config.projection_dims(), model_config.num_layers
    return {
        name: {
            "A": np.zeros((num_layers, dims[name][0], config.r), dtype),
            "B": np.zeros((num_layers, config.r, dims[name][1]), dtype),
        }
        for name in config.targets
    }


def _module_path(name: str, layer: int) -> str:
    """Path of a linear inside the base model."""
    parent = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    return f"model.layers.{layer}.{parent}.{name}"


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise AdapterFormatError(f"Adapter directory {str(path.parent)!r} has no {path.name}.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterFormatError(f"{path} is damaged: {error}.") from error
    if not isinstance(raw, dict):
        raise AdapterFormatError(f"{path} must hold a JSON object; got {type(raw).__name__}.")
    return raw


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    if raw.get("peft_type") != "LORA":
        raise AdapterFormatError(f"`peft_type` must be 'LORA'; got {raw.get('peft_type')!r}.")
    if raw.get("bias", "none") != "none":
        raise AdapterFormatError(f"`bias` must be 'none'; got {raw['bias']!r}.")
    for field, reason in _MUST_BE_UNSET.items():
        if raw.get(field):
            raise AdapterFormatError(f"`{field}` must be unset: {reason}; got {raw[field]!r}.")
    init = raw.get("init_lora_weights", True)
    if init not in _HARMLESS_INITS:
        raise AdapterFormatError(
            f"`init_lora_weights` must be true, false, 'gaussian' or 'orthogonal'; {init!r} can "
            "change the base weights. Convert the adapter to plain LoRA with PEFT's "
            "`path_initial_model_for_weight_conversion`."
        )
    if raw.get("layers_pattern") not in (None, "", [], "layers", ["layers"]):
        raise AdapterFormatError(
            f"`layers_pattern` must be unset or 'layers'; got {raw['layers_pattern']!r}."
        )


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    file = path / WEIGHTS_FILE
    if not file.is_file():
        hint = ""
        if (path / "adapter_model.bin").is_file():
            hint = " It holds adapter_model.bin; save the adapter as safetensors."
        raise AdapterFormatError(f"Adapter directory {str(path)!r} has no {WEIGHTS_FILE}.{hint}")
    try:
        return safetensors.numpy.load_file(file)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise AdapterFormatError(f"{file} is damaged: {error}.") from error


def _place(
    tensors: Mapping[str, np.ndarray], rank: int, model_config: ModelConfig
) -> dict[tuple[str, int], dict[str, str]]:
    """Checks every tensor; returns (linear, layer) -> {"A": key, "B": key}."""
    if not tensors:
        raise AdapterFormatError(f"{WEIGHTS_FILE} holds no tensors.")
    dims = model_config.projection_dims()
    found: dict[tuple[str, int], dict[str, str]] = {}
    unknown = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or _module_path(match["name"], int(match["layer"])) != match["module"]:
            unknown.append(key)
            continue
        name, layer, matrix = match["name"], int(match["layer"]), match["matrix"]
        if layer >= model_config.num_layers:
            raise AdapterFormatError(
                f"{key} is for layer {layer}; the base model has {model_config.num_layers} layers."
            )
        num_in, num_out = dims[name]
        expected = (rank, num_in) if matrix == "A" else (num_out, rank)
        if tensor.shape != expected:
            raise AdapterFormatError(
                f"{key} must have shape {expected} for this base model and `r`={rank}; "
                f"got {tensor.shape}."
            )
        _check_values(key, tensor, next(iter(tensors.values())).dtype)
        found.setdefault((name, layer), {})[matrix] = key
    if unknown:
        raise AdapterFormatError(
            f"Only {', '.join(LORA_TARGETS)} can be adapted; unexpected keys: "
            f"{shorten_list(sorted(unknown))}."
        )
    for (name, layer), keys in found.items():
        if len(keys) < 2:
            (have,) = keys
            module = _PREFIX + _module_path(name, layer)
            raise AdapterFormatError(
                f"{module} has lora_{have} without lora_{'B' if have == 'A' else 'A'}."
            )
    return found


def _check_values(key: str, array: np.ndarray, dtype: Any) -> None:
    if array.dtype not in _DTYPES:
        raise AdapterFormatError(f"{key} must be float32, bfloat16 or float16; got {array.dtype}.")
    if array.dtype != dtype:
        raise AdapterFormatError(f"{key} must be {dtype} as the others; got {array.dtype}.")
    if not np.isfinite(array.astype(np.float32)).all():
        raise AdapterFormatError(f"{key} holds values that are not finite.")


def _check_targets(
    raw: Mapping[str, Any], found: Iterable[tuple[str, int]], model_config: ModelConfig
) -> None:
    """Checks that the tensors are those of the modules that the configuration selects."""
    targets, excluded = raw.get("target_modules"), raw.get("exclude_modules")
    if isinstance(targets, list):
        for target in targets:
            if str(target).rsplit(".", 1)[-1] not in LORA_TARGETS:
                raise AdapterFormatError(
                    f"`target_modules` must be out of {', '.join(LORA_TARGETS)}; got {target!r}."
                )
    layers = raw.get("layers_to_transform")
    if layers is not None:
        layers = layers if isinstance(layers, list) else [layers]
        for layer in layers:
            if not isinstance(layer, int) or not 0 <= layer < model_config.num_layers:
                raise AdapterFormatError(
                    f"`layers_to_transform` must be below {model_config.num_layers}, the layers "
                    f"of the base model; got {layer!r}."
                )
    selected = set()
    for name in LORA_TARGETS:
        for layer in range(model_config.num_layers):
            module = _module_path(name, layer)
            is_layer = not layers or layer in layers
            if is_layer and _selects("target_modules", targets, module):
                if not excluded or not _selects("exclude_modules", excluded, module):
                    selected.add((name, layer))
    present = set(found)
    missing = [_module_path(*pair) for pair in sorted(selected - present)]
    surplus = [_module_path(*pair) for pair in sorted(present - selected)]
    if missing or surplus:
        raise AdapterFormatError(
            f"`target_modules` of {CONFIG_FILE} do not fit {WEIGHTS_FILE}: selected but without "
            f"tensors: {shorten_list(missing)}; with tensors but not selected: "
            f"{shorten_list(surplus)}."
        )


def _selects(field: str, pattern: Any, module: str) -> bool:
    """Whether PEFT's pattern (names, a regular expression, "all-linear") selects a module."""
    if isinstance(pattern, str):
        if pattern.lower() == "all-linear":
            return True
        try:
            return re.fullmatch(pattern, module) is not None
        except re.error as error:
            raise AdapterFormatError(
                f"`{field}` must be a valid regular expression; got {pattern!r} ({error})."
            ) from error
    if isinstance(pattern, list):
        return any(module == name or module.endswith(f".{name}") for name in pattern)
    raise AdapterFormatError(f"`{field}` must be a list or text; got {pattern!r}.")


def _to_tensors(adapter: LoraAdapter, model_config: ModelConfig) -> dict[str, np.ndarray]:
    config = adapter.config
    if set(adapter.arrays) != set(config.targets):
        raise AdapterFormatError(
            f"`arrays` must be of {', '.join(config.targets)}; got {', '.join(adapter.arrays)}."
        )
    layers = config.layers_to_transform or range(model_config.num_layers)
    if max(layers) >= model_config.num_layers:
        raise AdapterFormatError(
            f"`layers_to_transform` must be below {model_config.num_layers}; got {max(layers)}."
        )
    dtype = next(iter(adapter.arrays.values()))["A"].dtype
    tensors = {}
    for name, (num_in, num_out) in model_config.projection_dims().items():
        if name not in adapter.arrays:
            continue
        pair, num_layers = adapter.arrays[name], model_config.num_layers
        shapes = {"A": (num_layers, num_in, config.r), "B": (num_layers, config.r, num_out)}
        for matrix, shape in shapes.items():
            array = pair[matrix]
            if array.shape != shape:
                raise AdapterFormatError(
                    f"`arrays` must hold {name} {matrix} of shape {shape}; got {array.shape}."
                )
            _check_values(f"{name} {matrix}", array, dtype)
            for layer in layers:
                key = f"{_PREFIX}{_module_path(name, layer)}.lora_{matrix}.weight"
                tensors[key] = np.ascontiguousarray(array[layer].T)
    return tensors


def _peft_config(config: LoraConfig, base_model_name: str | None) -> dict[str, Any]:
    layers, alpha = config.layers_to_transform, config.alpha
    return {
        "base_model_name_or_path": base_model_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_to_transform": None if layers is None else list(layers),
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": config.r,
        "target_modules": list(config.targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": config.use_rslora,
    }


def _check_replaceable(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise ValueError(f"`path` must be a directory or not exist; got the file {str(path)!r}.")
    if path.is_dir() and any(path.iterdir()) and not (path / CONFIG_FILE).is_file():
        raise ValueError(
            f"`path` must be empty, an adapter, or not exist; {str(path)!r} holds other files."
        )
