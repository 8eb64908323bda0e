"""mmlora: one base model with many LoRA adapters, and the adapter for audio or images applied automatically.

Names are imported on first use (PEP 562), so that `import mmlora` and `mmlora --help` do not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmlora.async_llm import AsyncLLM
    from mmlora.config import EngineArgs
    from mmlora.engine.llm_engine import LLMEngine
    from mmlora.engine.metrics import EngineMetrics
    from mmlora.inputs.prompts import TextPrompt, TokensPrompt
    from mmlora.llm import LLM
    from mmlora.lora.mix import LoRAMix
    from mmlora.lora.request import BASE, LoRARequest
    from mmlora.lora.store.manager import LoRAInfo
    from mmlora.outputs import CompletionOutput, LoRAChoice, RequestOutput
    from mmlora.sampling_params import RequestOutputKind, SamplingParams
    from mmlora.structured_outputs import StructuredOutputsParams

__version__ = "0.2.0"
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
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
]

_MODULES = {
    "mmlora.async_llm": "AsyncLLM",
    "mmlora.config": "EngineArgs",
    "mmlora.engine.llm_engine": "LLMEngine",
    "mmlora.engine.metrics": "EngineMetrics",
    "mmlora.inputs.prompts": "TextPrompt TokensPrompt",
    "mmlora.llm": "LLM",
    "mmlora.lora.mix": "LoRAMix",
    "mmlora.lora.request": "BASE LoRARequest",
    "mmlora.lora.store.manager": "LoRAInfo",
    "mmlora.outputs": "CompletionOutput LoRAChoice RequestOutput",
    "mmlora.sampling_params": "RequestOutputKind SamplingParams",
    "mmlora.structured_outputs": "StructuredOutputsParams",
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}

if not TYPE_CHECKING:  # a type checker takes a module's __getattr__ to have every attribute

    def __getattr__(name: str) -> object:
        """Import an exported name when it is first used."""
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_MODULE_OF[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
