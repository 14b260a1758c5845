"""What a decoder looks like: one frozen description for every supported family.

Owns the reading of Hugging Face `config.json` (old and new key styles). Holds no arrays and imports
no jax. There is no default for a hyper-parameter below this file: layers read every number here.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexjax.errors import ModelNotFoundError, UnsupportedModelError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
      theta: Base of the geometric frequencies.
      kind: "default", "linear" (positions divided by `factor`) or "llama3" (low frequencies
        divided by `factor`, high ones kept, smooth in between).
      factor: Scaling factor of "linear" and "llama3".
      low_freq_factor: Llama 3 only.
      high_freq_factor: Llama 3 only.
      original_max_position: Context length before scaling, tokens; Llama 3 only.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position: int = 0

    def inv_freq(self, head_dim: int) -> list[float]:
        """Returns the `head_dim // 2` inverse frequencies, in radians per position."""
        freqs = [self.theta ** (-2.0 * i / head_dim) for i in range(head_dim // 2)]
        if self.kind == "linear":
            return [f / self.factor for f in freqs]
        if self.kind == "llama3":
            return [self._llama3(f) for f in freqs]
        return freqs

    def _llama3(self, freq: float) -> float:
        wavelength = 2.0 * math.pi / freq
        if wavelength < self.original_max_position / self.high_freq_factor:
            return freq
        if wavelength > self.original_max_position / self.low_freq_factor:
            return freq / self.factor
        smooth = (self.original_max_position / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        return (1.0 - smooth) * freq / self.factor + smooth * freq


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of one decoder; hashable, so it can be a static argument of jit.

    Attributes:
      family: One of `FAMILIES`.
      vocab_size: V.
      hidden_size: D.
      intermediate_size: F.
      num_layers: L.
      num_heads: N, query heads.
      num_kv_heads: K; divides N.
      head_dim: H; need not be D / N.
      max_position: Longest context that the model was made for, tokens.
      rope: Rotary embedding.
      rms_norm_eps: Added to the mean square before the root.
      tie_embeddings: Whether lm_head is the embedding.
      qkv_bias: Whether q, k and v projections have a bias.
      o_bias: Whether the output projection has a bias.
      qk_norm: Whether q and k heads are normalized (RMS) before the rotary embedding.
      sliding_window: Keys that a query sees, itself included; None for all.
      dtype: Dtype that the weights are stored in: "float32", "bfloat16" or "float16".
      eos_token_ids: Tokens that end a generation.
      bos_token_id: Token that starts a text, if the model has one.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rope: RopeConfig
    rms_norm_eps: float
    tie_embeddings: bool
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    dtype: str = "bfloat16"
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise UnsupportedModelError(
                f"`family` must be one of {', '.join(FAMILIES)}; got {self.family!r}."
            )
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a positive integer; got {value!r}.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"`num_kv_heads` must divide `num_heads`={self.num_heads}; got {self.num_kv_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"`head_dim` must be even; got {self.head_dim}.")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"`sliding_window` must be positive; got {self.sliding_window}.")

    @property
    def num_params(self) -> int:
        """Number of parameters, embeddings included (a tied lm_head counts once)."""
        q = self.num_heads * self.head_dim
        kv = self.num_kv_heads * self.head_dim
        d, f = self.hidden_size, self.intermediate_size
        layer = d * q + 2 * d * kv + q * d + 3 * d * f + 2 * d
        layer += (q + 2 * kv) * self.qkv_bias + d * self.o_bias
        layer += 2 * self.head_dim * self.qk_norm
        heads = 1 if self.tie_embeddings else 2
        return self.num_layers * layer + heads * self.vocab_size * d + d

    def projection_dims(self) -> dict[str, tuple[int, int]]:
        """Returns (in, out) features of the seven linears of a layer, by Hugging Face name."""
        q = self.num_heads * self.head_dim
        kv = self.num_kv_heads * self.head_dim
        d, f = self.hidden_size, self.intermediate_size
        return {
            "q_proj": (d, q),
            "k_proj": (d, kv),
            "v_proj": (d, kv),
            "o_proj": (q, d),
            "gate_proj": (d, f),
            "up_proj": (d, f),
            "down_proj": (f, d),
        }

    def has_bias(self, projection: str) -> bool:
        """Whether the named linear has a bias."""
        if projection in ("q_proj", "k_proj", "v_proj"):
            return self.qkv_bias
        return projection == "o_proj" and self.o_bias


def load_model_config(model_dir: str | Path) -> ModelConfig:
    """Reads `config.json` (and `generation_config.json`, for end tokens) of a model directory.

    Raises:
      ModelNotFoundError: If the directory or its `config.json` does not exist.
      UnsupportedModelError: If the architecture or one of its options is not supported.
      ValueError: If a field is missing or out of range, or the file is not JSON.
    """
    model_dir = Path(model_dir)
    if not model_dir.is_dir():
        raise ModelNotFoundError(f"Model directory {str(model_dir)!r} does not exist.")
    path = model_dir / "config.json"
    if not path.is_file():
        raise ModelNotFoundError(f"Model directory {str(model_dir)!r} has no config.json.")
    raw = _read_json(path)
    generation_path = model_dir / "generation_config.json"
    if generation_path.is_file():
        eos = _read_json(generation_path).get("eos_token_id")
        if eos is not None:
            raw = {**raw, "eos_token_id": eos}
    return config_from_hf(raw)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(raw).__name__}.")
    return raw


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """Makes a `ModelConfig` of a Hugging Face configuration, old or new key style.

    Raises:
      UnsupportedModelError: If the architecture or one of its options is not supported.
      ValueError: If a field is missing or out of range.
    """
    family = _family(raw)
    _refuse_unsupported(raw, family)

    def need(name: str) -> Any:
        if raw.get(name) is None:
            raise ValueError(f"config.json must have `{name}`; it is missing.")
        return raw[name]

    def need_int(name: str) -> int:
        value = need(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`{name}` must be a positive integer; got {value!r}.")
        return value

    hidden, heads = need_int("hidden_size"), need_int("num_attention_heads")
    head_dim = raw.get("head_dim")
    if head_dim is None:
        if family == "qwen3":
            head_dim = 128
        elif hidden % heads:
            raise ValueError(
                f"`hidden_size` must be a multiple of `num_attention_heads`={heads} when "
                f"`head_dim` is absent; got {hidden}."
            )
        else:
            head_dim = hidden // heads
    max_position = need_int("max_position_embeddings")
    # Null means one KV head per query head; only for Llama does an absent key mean the same.
    has_kv_heads = raw.get("num_key_value_heads") is not None
    if family != "llama" and "num_key_value_heads" not in raw:
        need("num_key_value_heads")
    bias = bool(raw.get("attention_bias", False))
    return ModelConfig(
        family=family,
        vocab_size=need("vocab_size"),
        hidden_size=hidden,
        intermediate_size=need("intermediate_size"),
        num_layers=need("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=need_int("num_key_value_heads") if has_kv_heads else heads,
        head_dim=head_dim,
        max_position=max_position,
        rope=_rope(raw, max_position),
        rms_norm_eps=float(need("rms_norm_eps")),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or bias,
        o_bias=family != "qwen2" and bias,
        qk_norm=family == "qwen3",
        sliding_window=_sliding_window(raw, family),
        dtype=_dtype(raw),
        eos_token_ids=_token_ids(raw.get("eos_token_id")),
        bos_token_id=raw.get("bos_token_id"),
    )


def _family(raw: Mapping[str, Any]) -> str:
    names = list(raw.get("architectures") or [])
    for name in names:
        if name in _ARCHITECTURES:
            return _ARCHITECTURES[name]
    if not names and raw.get("model_type") in FAMILIES:
        return raw["model_type"]
    got = names or raw.get("model_type")
    raise UnsupportedModelError(
        f"`architectures` must name one of {', '.join(_ARCHITECTURES)}; got {got!r}."
    )


def _refuse_unsupported(raw: Mapping[str, Any], family: str) -> None:
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UnsupportedModelError(f"`hidden_act` must be 'silu'; got {raw['hidden_act']!r}.")
    if raw.get("mlp_bias"):
        raise UnsupportedModelError("`mlp_bias` must be false; biased MLPs are not supported.")
    if raw.get("quantization_config"):
        raise UnsupportedModelError(
            "`quantization_config` must be absent; quantized weights are not supported."
        )
    if family == "mistral" and raw.get("attention_bias"):
        raise UnsupportedModelError("`attention_bias` must be false for Mistral models.")


def _sliding_window(raw: Mapping[str, Any], family: str) -> int | None:
    if family == "mistral":
        return raw.get("sliding_window", 4096)  # an absent key: transformers' own default
    layer_types = set(raw.get("layer_types") or ())
    if raw.get("use_sliding_window") or "sliding_attention" in layer_types:
        raise UnsupportedModelError(
            "`use_sliding_window` must be false for Qwen models; windows that differ between "
            "layers are not supported."
        )
    return None


def _rope(raw: Mapping[str, Any], max_position: int) -> RopeConfig:
    scaling = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = scaling.get("rope_theta", raw.get("rope_theta"))
    if theta is None:
        raise ValueError("config.json must have `rope_theta` (or `rope_parameters.rope_theta`).")
    if raw.get("partial_rotary_factor", scaling.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedModelError("`partial_rotary_factor` must be 1.0.")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta=float(theta))
    if kind not in ("linear", "llama3"):
        raise UnsupportedModelError(
            f"`rope_type` must be one of default, linear, llama3; got {kind!r}."
        )
    names = ["factor"]
    if kind == "llama3":
        names += ["low_freq_factor", "high_freq_factor"]
    missing = [name for name in names if scaling.get(name) is None]
    if missing:
        raise ValueError(f"`rope_scaling` of type {kind} must have {', '.join(missing)}.")
    return RopeConfig(
        theta=float(theta),
        kind=kind,
        factor=float(scaling["factor"]),
        low_freq_factor=float(scaling.get("low_freq_factor", 1.0)),
        high_freq_factor=float(scaling.get("high_freq_factor", 1.0)),
        original_max_position=int(scaling.get("original_max_position_embeddings") or max_position),
    )


def _dtype(raw: Mapping[str, Any]) -> str:
    name = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16"):
        raise UnsupportedModelError(
            f"`dtype` must be one of float32, bfloat16, float16; got {name!r}."
        )
    return name


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
