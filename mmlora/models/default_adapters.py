"""Default adapters that come with a model: which of them lie in its directory, and whether they are applied."""

import logging
from collections.abc import Mapping
from pathlib import Path

from transformers import PretrainedConfig

from mmlora.config import AUTO, EngineArgs
from mmlora.lora.loading.files import CONFIG_FILE
from mmlora.models.families import find_layout, get_default_adapters
from mmlora.utils.library_errors import LIBRARY_ERRORS

logger = logging.getLogger(__name__)


def find_default_adapters(config: PretrainedConfig, path: Path) -> dict[str, str]:
    """Return the adapters in a model's directory that are meant for modalities, as `default_mm_loras` takes them.

    Args:
        config: the model's.
        path: its directory (for a Hub id, the snapshot folder).
    """
    if getattr(config, "has_lora_adapter", True) is False:  # of Granite Speech
        return {}
    folders = {key: path / folder for key, folder in get_default_adapters(config).items()}
    embedded = _embedded_adapters(path) if folders else set()
    return {
        key: str(folder)
        for key, folder in folders.items()
        if (folder / CONFIG_FILE).is_file() or (folder in embedded and not folder.exists())
    }


def _embedded_adapters(path: Path) -> set[Path]:
    """Return where adapters would lie whose tensors are in the main files."""
    layout = find_layout(path)
    try:
        return set(layout.find_adapters(path).values()) if layout is not None else set()
    except LIBRARY_ERRORS:
        return set()  # whoever loads the weights says what is wrong


def choose_default_adapters(args: EngineArgs, config: PretrainedConfig, path: Path) -> Mapping[str, str] | None:
    """Return what `default_mm_loras` says, for `auto` what is found; the log tells what that is, or would be.

    Args:
        args: options of the engine.
        config, path: of the model, as for `find_default_adapters`.
    """
    given = args.default_mm_loras
    if not args.enable_lora or isinstance(given, Mapping):
        return given if isinstance(given, Mapping) else None
    found = find_default_adapters(config, path)
    if given == AUTO and found:
        logger.warning("default_mm_loras=auto: %s", ", ".join(f"{key} takes {folder}" for key, folder in found.items()))
    elif given == AUTO:
        logger.warning("default_mm_loras=auto: %s has no adapters that are meant for modalities", path)
    elif found:
        keys = ", ".join(found)
        logger.warning("found adapters for %s in the model directory; --default-mm-loras auto applies them", keys)
    return found if given == AUTO else None
