"""mmlora: one base model, many LoRA adapters, and the right one applied by itself when audio or an image comes."""

from mmlora.async_llm import AsyncLLM
from mmlora.config import EngineArgs
from mmlora.engine.llm_engine import LLMEngine
from mmlora.engine.metrics import EngineMetrics
from mmlora.llm import LLM
from mmlora.lora.mix import LoRAMix
from mmlora.lora.request import BASE, LoRARequest
from mmlora.lora.store.manager import LoRAInfo
from mmlora.outputs import CompletionOutput, LoRAChoice, RequestOutput
from mmlora.sampling_params import SamplingParams
from mmlora.structured_outputs import StructuredOutputsParams

__all__ = [
    "BASE",
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "EngineArgs",
    "EngineMetrics",
    "LLMEngine",
    "LoRAChoice",
    "LoRAInfo",
    "LoRAMix",
    "LoRARequest",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
]
