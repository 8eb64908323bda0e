"""`LoRARequest`, which names an adapter and its files, and `BASE`, which selects the base model explicitly."""

import os
from dataclasses import KW_ONLY, dataclass
from typing import Final

from mmlora.errors import AdapterError

MAX_INT_ID = 2**63 - 1
MEMORY: Final = "memory:"
"""Prefix of the `lora_path` of an adapter from memory, which has no files."""


@dataclass(frozen=True)
class LoRARequest:
    """Names an adapter and its files.

    Args:
        lora_name: any name; it is never used as a path.
        lora_int_id: any positive 63-bit integer, one per adapter.
        lora_path: a PEFT directory (`~` and relative paths are resolved), or on the Hub `org/repo` or
            `org/repo/subfolder`, either with `@revision`.
        base_model_name: the base model that the adapter was trained on, shown to clients.
        load_inplace: reload the adapter once for this request object, replacing the loaded one of the same name.
        only_known: use the loaded adapter of this name, from any path; if it was removed, it is not loaded again.

    Raises:
        AdapterError: a field has the wrong type or range.
    """

    lora_name: str
    lora_int_id: int
    lora_path: str
    base_model_name: str | None = None
    _: KW_ONLY
    load_inplace: bool = False
    only_known: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.lora_name, str) or not self.lora_name:
            raise AdapterError(f"lora_name is {self.lora_name!r}; it must be a non-empty string")
        is_int = isinstance(self.lora_int_id, int) and not isinstance(self.lora_int_id, bool)
        if not is_int or not 1 <= self.lora_int_id <= MAX_INT_ID:
            raise AdapterError(f"lora_int_id is {self.lora_int_id!r}; it must be an integer from 1 to {MAX_INT_ID}")
        if isinstance(self.lora_path, os.PathLike):
            object.__setattr__(self, "lora_path", os.fspath(self.lora_path))
        if not isinstance(self.lora_path, str) or not self.lora_path:
            raise AdapterError(f"lora_path is {self.lora_path!r}; it must be a directory or a Hub id")
        if self.base_model_name is not None and not isinstance(self.base_model_name, str):
            raise AdapterError(f"base_model_name is {self.base_model_name!r}; it must be a string or None")
        if not isinstance(self.load_inplace, bool):
            raise AdapterError(f"load_inplace is {self.load_inplace!r}; it must be True or False")
        if not isinstance(self.only_known, bool):
            raise AdapterError(f"only_known is {self.only_known!r}; it must be True or False")

    @property
    def name(self) -> str:
        return self.lora_name

    @property
    def adapter_id(self) -> int:
        return self.lora_int_id

    @property
    def path(self) -> str:
        return self.lora_path

    @property
    def is_from_memory(self) -> bool:
        """Whether the adapter was given as tensors."""
        return self.lora_path.startswith(MEMORY)


class _Base:
    """Type of the singleton `BASE`."""

    _instance: "_Base | None" = None

    def __new__(cls) -> "_Base":
        if cls._instance is None:
            cls._instance = super().__new__(cls)
        return cls._instance

    def __reduce__(self) -> str:
        return "BASE"

    def __repr__(self) -> str:
        return "mmlora.BASE"


BASE: Final = _Base()
"""Pass as `lora_request` to use the base model explicitly, regardless of the media in the prompt."""
