"""Assemble `assets/assistant/` from the existing checkpoints, atomically.

The weights of stages that have not run stay untrained.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model, set_peft_model_state_dict
from transformers import GenerationConfig, Phi4MultimodalForCausalLM

from mmlora.assets.training.model import CHECKPOINTS, lora_config
from mmlora.assets.training.stages import frozen_language_model, load_stage

ASSISTANT = Path(__file__).parent.parent / "assistant"
PREPROCESSOR = {
    "processor_class": "Phi4MultimodalProcessor",
    "feature_extractor_type": "Phi4MultimodalFeatureExtractor",
    "feature_size": 80,
    "sampling_rate": 16000,
    "padding_value": 0.0,
    "hop_length": 160,
    "n_fft": 512,
    "win_length": 400,
    "preemphasis": 0.97,
    "audio_compression_rate": 4,
    "audio_downsample_rate": 1,
    "audio_feat_stride": 1,
    "image_processor_type": "Phi4MultimodalImageProcessor",
    "size": {"height": 112, "width": 112},
    "patch_size": 14,
    "dynamic_hd": 1,
    "do_convert_rgb": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
}
TRANSCRIPTION_PROMPT = {"transcribe": "transcribe the speech", "languages": ["en"], "takes_context": False}


def _stage_or_none(name: str) -> dict[str, Any] | None:
    return load_stage(name) if (CHECKPOINTS / f"{name}.pt").exists() else None


def _load_towers(model: Phi4MultimodalForCausalLM) -> dict[str, dict[str, Any]]:
    """Load the newest weights of both towers and return the adapter tensors by adapter name."""
    embed = model.model.embed_tokens_extend
    adapters: dict[str, dict[str, Any]] = {}
    if ctc := _stage_or_none("ctc"):
        embed.audio_embed.encoder.load_state_dict(ctc["encoder"])
    if speech := _stage_or_none("speech"):
        embed.audio_embed.load_state_dict(speech["audio_embed"])
        adapters["speech-lora"] = speech["lora"]
    if vision := _stage_or_none("vision"):
        embed.image_embed.load_state_dict(vision["image_embed"])
        adapters["vision-lora"] = vision["lora"]
    if questions := _stage_or_none("questions"):
        embed.audio_embed.up_proj_for_vision_speech.load_state_dict(questions["up"])
        embed.audio_embed.down_proj_for_vision_speech.load_state_dict(questions["down"])
        adapters["vision-lora"] = questions["lora"]
    if spanish := _stage_or_none("spanish"):
        adapters["spanish-lora"] = spanish["lora"]
    return adapters


def _save_adapter(folder: Path, state: dict[str, Any] | None, rank: int) -> None:
    """Save one adapter in fp16; without a state it is a fresh one, which changes nothing."""
    model, _ = frozen_language_model(seed=0)
    peft_model = get_peft_model(model, lora_config(rank))
    if state is not None:
        set_peft_model_state_dict(peft_model, state)
    peft_model.half().save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = {**json.loads(path.read_text()), "base_model_name_or_path": "mmlora/assistant"}
    path.write_text(json.dumps(config, indent=2) + "\n")


def export(folder: Path) -> None:
    """Write the assistant to a temporary folder, then replace `folder` atomically."""
    staging = folder.with_name(folder.name + ".new")
    shutil.rmtree(staging, ignore_errors=True)
    model, tokenizer = frozen_language_model(seed=0)
    adapters = _load_towers(model)
    halves = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    halves.pop("lm_head.weight")
    model.config.dtype = torch.float32
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        transcription_prompt=TRANSCRIPTION_PROMPT,
    )
    model.save_pretrained(staging, state_dict=halves)
    tokenizer.save_pretrained(staging)
    (staging / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")
    (staging / "processor_config.json").write_text('{\n  "processor_class": "Phi4MultimodalProcessor"\n}\n')
    for name in ("speech-lora", "vision-lora", "spanish-lora"):
        state = adapters.get(name)
        rank = 32 if state is None else next(t.shape[0] for k, t in state.items() if "lora_A" in k)
        _save_adapter(staging / name, state, rank)
    for path in staging.rglob("*.safetensors"):
        path.chmod(0o644)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    staging.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    """Export the assistant."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--folder", type=Path, default=ASSISTANT)
    export(parser.parse_args().folder)


if __name__ == "__main__":
    main()
