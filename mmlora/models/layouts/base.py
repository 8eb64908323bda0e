"""`Layout`: how to load a checkpoint as a class of `transformers` whose configuration and names differ."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig

from mmlora.lora.loading.files import AdapterFiles


@dataclass(frozen=True)
class Layout:
    """A checkpoint format, recognized by its `model_type`.

    Attributes:
        name: the `model_type` in config.json.
        load_config: reads a directory's configuration as that of the class that serves it.
        key_mapping: regular expressions in names of tensors and modules, and their replacements.
        left_out: matches tensors, after `key_mapping`, that are not part of the base model. Others that the model lacks
            are refused.
        load_tokenizer: loads a directory's tokenizer.
        find_adapters: returns the adapters embedded in a directory's weight files, by name, with the folder that each
            would usually have.
        embedded_adapter: reads an embedded adapter by the folder that it would usually have; None if there is none.
    """

    name: str
    load_config: Callable[[Path], PretrainedConfig]
    key_mapping: Mapping[str, str]
    left_out: re.Pattern[str]
    load_tokenizer: Callable[[Path], Any] = partial(AutoTokenizer.from_pretrained, trust_remote_code=False)
    find_adapters: Callable[[Path], Mapping[str, Path]] = lambda source: {}
    embedded_adapter: Callable[[Path, str], AdapterFiles | None] = lambda source, path: None
