"""`Layout`: how to read the files of a checkpoint as those of another class."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig

from mmlora.errors import ConfigError
from mmlora.lora.loading.files import AdapterFiles


@dataclass(frozen=True)
class Layout:
    """A way of laying out a checkpoint.

    Attributes:
        name: the `model_type` that its config.json names.
        load_config: reads a directory's configuration as that of the class which serves it.
        key_mapping: regular expressions in the names of its tensors and modules, and what replaces them.
        left_out: matches tensors, named as `key_mapping` gives them, that are no part of the base model.
        load_tokenizer: reads a directory's tokenizer.
        find_adapters: names the adapters whose tensors lie in the main files of a directory, with the folder that each
            would have.
        embedded_adapter: reads an adapter that lies in the main files of a directory, by the path that it would have;
            None where there is none.
    """

    name: str
    load_config: Callable[[Path], PretrainedConfig]
    key_mapping: Mapping[str, str]
    left_out: re.Pattern[str]
    load_tokenizer: Callable[[Path], Any] = partial(AutoTokenizer.from_pretrained, trust_remote_code=False)
    find_adapters: Callable[[Path], Mapping[str, Path]] = lambda source: {}
    embedded_adapter: Callable[[Path, str], AdapterFiles | None] = lambda source, path: None

    def check_loaded(self, missing: Collection[str], unexpected: Collection[str]) -> None:
        """Make sure that every tensor landed, except those that are left out.

        Args:
            missing: names of parameters that the files lack.
            unexpected: names of tensors, as `key_mapping` gives them, that the model lacks.

        Raises:
            ConfigError: one did not.
        """
        wrong = {"missing": missing, "unknown": [key for key in unexpected if not self.left_out.fullmatch(key)]}
        for kind, names in wrong.items():
            if names:
                more = f" and {len(names) - 10} more" if len(names) > 10 else ""
                named = ", ".join(sorted(names)[:10])
                raise ConfigError(f"{len(names)} tensor(s) of a {self.name} checkpoint are {kind}: {named}{more}")
