"""What the bundled resolvers keep to: an adapter lies under its root wherever links lead, and no file is too large."""

from pathlib import Path
from typing import Final

from mmlora.errors import AdapterError
from mmlora.lora.loading.files import CONFIG_FILE, WEIGHTS_FILE
from mmlora.utils.environment import read_number

MAX_BYTES_VARIABLE: Final = "MMLORA_LORA_RESOLVER_MAX_BYTES"
DEFAULT_MAX_BYTES: Final = 4 * 2**30


def check_containment(directory: Path, root: Path) -> None:
    """Follow the links of an adapter's directory and of its two files.

    Raises:
        AdapterError: one of them leads out of `root`, or nowhere.
    """
    real_root = root.resolve()
    for path in (directory, directory / CONFIG_FILE, directory / WEIGHTS_FILE):
        try:
            real_path = path.resolve()
        except (OSError, RuntimeError) as error:  # the latter for links that lead in a circle
            raise AdapterError(f"{path} cannot be followed: {error}") from None
        if not real_path.is_relative_to(real_root):
            raise AdapterError(f"{path} is {real_path}, which lies outside of {real_root}")


def check_size(name: str, num_bytes: int, max_bytes: int) -> None:
    """Compare the size of a file, or of what has come of it, with the limit.

    Raises:
        AdapterError: it is larger.
    """
    if num_bytes > max_bytes:
        raise AdapterError(f"{name} has {num_bytes} bytes or more; {MAX_BYTES_VARIABLE} allows {max_bytes}")


def read_max_bytes() -> int:
    """Read the largest size of a downloaded file from `MMLORA_LORA_RESOLVER_MAX_BYTES`.

    Raises:
        ConfigError: it is no positive number.
    """
    return int(read_number(MAX_BYTES_VARIABLE, DEFAULT_MAX_BYTES))
