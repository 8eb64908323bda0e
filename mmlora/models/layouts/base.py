"""`Layout`: how to load a checkpoint as a class of `transformers` whose configuration and names differ."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig

from mmlora.errors import ConfigError
from mmlora.lora.loading.files import AdapterFiles
from mmlora.lora.loading.load import listed


@dataclass(frozen=True)
class Layout:
    """A checkpoint format, recognized by its `model_type`.

    Attributes:
        name: the `model_type` in config.json.
        load_config: reads a directory's configuration as that of the class that serves it.
        key_mapping: regular expressions in names of tensors and modules, and their replacements.
        left_out: matches tensors, after `key_mapping`, that are not part of the base model.
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

    def check_loaded(self, missing: Collection[str], unexpected: Collection[str]) -> None:
        """Check that every tensor was loaded, except those in `left_out`.

        Args:
            missing: names of parameters that the files lack.
            unexpected: names of tensors, after `key_mapping`, that the model lacks.

        Raises:
            ConfigError: parameters are missing, or tensors are unknown.
        """
        wrong = {"missing": missing, "unknown": [key for key in unexpected if not self.left_out.fullmatch(key)]}
        for kind, names in wrong.items():
            if names:
                raise ConfigError(f"{len(names)} tensor(s) of a {self.name} checkpoint are {kind}: {listed(names)}")
