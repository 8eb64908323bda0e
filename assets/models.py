"""Paths of the bundled assistant and its adapters."""

from pathlib import Path

_ASSISTANT = Path(__file__).parent / "assistant"


def assistant_path() -> str:
    """Return the folder of the bundled assistant, a `Phi4MultimodalForCausalLM` in Hugging Face format."""
    return str(_ASSISTANT)


def assistant_adapters() -> dict[str, str]:
    """Return the folders of the bundled adapters by name."""
    return {name: str(_ASSISTANT / name) for name in ("speech-lora", "vision-lora", "spanish-lora")}


def assistant_default_mm_loras() -> dict[str, str]:
    """Return the default adapters of the bundled assistant, in the form of `default_mm_loras`.

    As in Phi-4-multimodal, prompts with both audio and images use the vision adapter.
    """
    adapters = assistant_adapters()
    vision = adapters["vision-lora"]
    return {"audio": adapters["speech-lora"], "image": vision, "audio+image": vision}
