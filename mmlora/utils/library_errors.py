"""Exceptions that libraries raise on malformed model files or impossible sizes."""

from typing import Final

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

# A RecursionError is a RuntimeError, a KeyError a LookupError.
LIBRARY_ERRORS: Final = (
    *(ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError),
    *(SafetensorError, StrictDataclassError),
)
