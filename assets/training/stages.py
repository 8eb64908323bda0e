"""Assemble the model from the checkpoints of earlier stages, attach adapters, and decode greedily."""

from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import AutoTokenizer, DynamicCache, Phi4MultimodalForCausalLM, PreTrainedTokenizerFast

from mmlora.assets.training.model import CHECKPOINTS, build_config, build_model, lora_config


class LoraState:
    """Lets a checkpoint save and load the LoRA tensors of a PEFT model alone."""

    def __init__(self, peft_model: PeftModel) -> None:
        self.peft_model = peft_model

    def state_dict(self) -> dict[str, Any]:
        return dict(get_peft_model_state_dict(self.peft_model))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_peft_model_state_dict(self.peft_model, state)

    @property
    def layers(self) -> nn.ModuleList:
        """The lora_A and lora_B layers."""
        names = (".lora_A.default", ".lora_B.default")
        return nn.ModuleList([m for name, m in self.peft_model.named_modules() if name.endswith(names)])


def load_stage(name: str) -> dict[str, Any]:
    """Load the checkpoint of a stage by its name."""
    state: dict[str, Any] = torch.load(CHECKPOINTS / f"{name}.pt", weights_only=True)
    return state


def backbone(model: Phi4MultimodalForCausalLM) -> nn.ModuleDict:
    """Return the text part of the model, without its output layer (which is tied)."""
    inner = model.model
    return nn.ModuleDict({"embed_tokens": inner.embed_tokens, "layers": inner.layers, "norm": inner.norm})


def frozen_language_model(seed: int) -> tuple[Phi4MultimodalForCausalLM, PreTrainedTokenizerFast]:
    """Build the model with the trained language model, everything frozen, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS / "tokenizer")
    model = build_model(build_config(tokenizer), seed=seed)
    backbone(model).load_state_dict(load_stage("text")["backbone"])
    return model.requires_grad_(False), tokenizer


def attach_adapter(model: Phi4MultimodalForCausalLM, r: int) -> LoraState:
    """Wrap the language model's linear layers with a fresh trainable adapter, in place."""
    return LoraState(get_peft_model(model, lora_config(r)))


@torch.no_grad()
def greedy(model: Phi4MultimodalForCausalLM, embeds: torch.Tensor, end: int, limit: int = 48) -> list[list[int]]:
    """Decode greedily from prompts of one length, `[num_prompts, num_tokens, hidden_size]`, until `end`."""
    cache = DynamicCache(config=model.config)
    out: list[list[int]] = [[] for _ in embeds]
    done = [False] * len(embeds)
    for _ in range(limit):
        hidden = model.model(inputs_embeds=embeds, past_key_values=cache, use_cache=True).last_hidden_state
        chosen = model.lm_head(hidden[:, -1]).argmax(-1)
        for i, token in enumerate(chosen.tolist()):
            done[i] = done[i] or token == end
            if not done[i]:
                out[i].append(token)
        if all(done):
            break
        embeds = model.model.embed_tokens(chosen)[:, None]
    return out


def prompt_embeds(
    model: Phi4MultimodalForCausalLM, ids: list[list[int]], media: dict[int, torch.Tensor]
) -> torch.Tensor:
    """Embed prompts of one length and put the media in their places."""
    batch = torch.tensor(ids)
    embeds: torch.Tensor = model.model.embed_tokens(batch)
    for token_id, values in media.items():
        embeds = embeds.index_put(torch.nonzero(batch == token_id, as_tuple=True), values.flatten(0, 1))
    return embeds
