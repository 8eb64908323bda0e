"""Keys that are not those of a PEFT file, but have one obvious cause, such as a wrapper of the training program.

PEFT does not read them either, or reads them as an adapter that changes nothing, so they are refused with the cause and
the remedy. Nothing is renamed here.
"""

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class _Cause:
    """A recognised difference from PEFT's keys.

    Attributes:
        pattern: matches the difference.
        replacement: what PEFT writes instead; None if the tensors differ as well.
        remedy: where the difference comes from and what to do.
    """

    pattern: re.Pattern[str]
    replacement: str | None
    remedy: str


def _wrapper(name: str, remedy: str) -> _Cause:
    return _Cause(re.compile(rf"(?:^|(?<=\.)){name}\."), "", f"{remedy}, or remove '{name}.' from the keys")


# In this order, each applied to the result of those before it.
_CAUSES: Final = (
    _wrapper("_orig_mod", "'_orig_mod.' is torch.compile's; save with model._orig_mod.save_pretrained(…)"),
    _wrapper(
        "_fsdp_wrapped_module", "'_fsdp_wrapped_module.' is FSDP's; save the full state dict of the unwrapped model"
    ),
    _wrapper(
        "_checkpoint_wrapped_module",
        "'_checkpoint_wrapped_module.' is that of activation checkpointing; save the unwrapped model",
    ),
    _wrapper(
        "module",
        "'module.' is that of DataParallel, DDP or DeepSpeed; save with model.module.save_pretrained(…)",
    ),
    _Cause(
        re.compile(r"^.+\.(?=base_model\.model\.)"),
        "",
        "there is a prefix before 'base_model.model.', which a class around the PEFT model adds; save that PEFT model "
        "itself with save_pretrained, or remove the prefix from the keys",
    ),
    _Cause(
        re.compile(
            r"(?<=\.)(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|modules_to_save|"
            r"trainable_tokens_delta)\.(?!weight$|bias$)[^.]+(?=\.|$)"
        ),
        r"\1",
        "the keys contain the name of the adapter, as those of state_dict() do ('lora_A.NAME.weight'); save with "
        "save_pretrained, or remove the name from the keys ('lora_A.weight')",
    ),
    _Cause(
        re.compile(r"(?<=\.)lora[._]down(?=\.weight$|$)"),
        "lora_A",
        "lora_down and lora_up are Kohya's names; convert the file to PEFT's format",
    ),
    _Cause(
        re.compile(r"(?<=\.)lora[._]up(?=\.weight$|$)"),
        "lora_B",
        "lora_down and lora_up are Kohya's names; convert the file to PEFT's format",
    ),
    _Cause(
        re.compile(r"(?<=\.)lora_([ab])$"),
        None,
        "lora_a and lora_b are MLX's names, of transposed matrices; convert the file to PEFT's format",
    ),
    _Cause(
        re.compile(r"(?:^|\.)_?flat_param(?:$|_)"),
        None,
        "the keys are those of FSDP's flattened shards; save a full state dict (FULL_STATE_DICT)",
    ),
    _Cause(
        re.compile(r"^(base_model\.model\.|)(?!base_model\.|model\.)"),
        r"\1model.",
        "the keys lack 'model.', so the adapter was trained on the model without its head (AutoModel); train it on the "
        "whole model, or add 'model.' to the keys ('base_model.model.model.…')",
    ),
)


def explain(keys: Collection[str], matching: Callable[[Iterable[str]], Collection[str]]) -> str | None:
    """Return why keys match no module and what to do; None when the cause is not obvious.

    Args:
        keys: the keys that match no module.
        matching: returns those of the given keys that match a module.
    """
    causes: dict[str, list[_Cause]] = {}  # by the key that PEFT would write
    for key in keys:
        found = []
        for cause in _CAUSES:
            if cause.pattern.search(key):
                found.append(cause)
                key = cause.pattern.sub(cause.replacement, key) if cause.replacement is not None else key
        causes[key] = found
    matched = matching(causes)
    remedies = dict.fromkeys(
        cause.remedy
        for key, found in causes.items()
        for cause in found
        if key in matched or any(cause.replacement is None for cause in found)
    )
    return "; ".join(remedies) or None
