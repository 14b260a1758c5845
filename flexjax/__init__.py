"""LLM inference and LoRA finetuning in the same jitted JAX step.

Names are loaded when first used, so that `import flexjax` stays fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flexjax.config import EngineConfig as EngineConfig
from flexjax.config import FinetuneConfig as FinetuneConfig
from flexjax.config import LoraConfig as LoraConfig
from flexjax.config import SamplingParams as SamplingParams
from flexjax.model_config import ModelConfig as ModelConfig
from flexjax.request import GenerationOutput as GenerationOutput
from flexjax.slo import SLO as SLO

if TYPE_CHECKING:
    from flexjax import autodiff as autodiff
    from flexjax.engine.engine import Engine as Engine
    from flexjax.engine.job import Job as Job
    from flexjax.models.decoder import Decoder as Decoder

__version__ = "0.1.0"

_LAZY = {
    "Engine": "flexjax.engine.engine",
    "Job": "flexjax.engine.job",
    "Decoder": "flexjax.models.decoder",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name == "autodiff":
        return importlib.import_module("flexjax.autodiff")
    raise AttributeError(f"module 'flexjax' has no attribute {name!r}")
