"""Default adapters that a model comes with: find them in its directory, and choose whether they are applied."""

import logging
from collections.abc import Mapping
from pathlib import Path

from transformers import PretrainedConfig

from mmlora.config import AUTO, EngineArgs
from mmlora.lora.loading.files import CONFIG_FILE
from mmlora.models.families import find_family, find_layout
from mmlora.utils.library_errors import LIBRARY_ERRORS

logger = logging.getLogger(__name__)


def find_default_adapters(config: PretrainedConfig, path: Path) -> dict[str, str]:
    """Return the adapters for modalities in a model's directory, in the form of `default_mm_loras`.

    Args:
        config: of the model.
        path: its directory (for a Hub id, the snapshot folder).
    """
    if getattr(config, "has_lora_adapter", True) is False:  # in configurations of Granite Speech
        return {}
    family = find_family(config)
    folders = {key: path / folder for key, folder in family.default_adapters.items()} if family is not None else {}
    embedded = _embedded_adapters(path) if folders else set()
    return {
        key: str(folder)
        for key, folder in folders.items()
        if (folder / CONFIG_FILE).is_file() or (folder in embedded and not folder.exists())
    }


def _embedded_adapters(path: Path) -> set[Path]:
    """Return the usual folders of adapters whose tensors are in the model's own weight files."""
    layout = find_layout(path)
    try:
        return set(layout.find_adapters(path).values()) if layout is not None else set()
    except LIBRARY_ERRORS:
        return set()  # loading the weights reports the problem


def choose_default_adapters(args: EngineArgs, config: PretrainedConfig, path: Path) -> Mapping[str, str] | None:
    """Return the default adapters to apply, and log which ones `auto` applies or would apply.

    Args:
        args: options of the engine.
        config, path: see `find_default_adapters`.

    Returns:
        The mapping of `default_mm_loras`; for `auto`, the adapters in the model's directory.
    """
    given = args.default_mm_loras
    if not args.uses_lora or isinstance(given, Mapping):
        return given if isinstance(given, Mapping) else None
    found = find_default_adapters(config, path)
    if given == AUTO and found:
        logger.warning("default_mm_loras=auto: %s", ", ".join(f"{key} uses {folder}" for key, folder in found.items()))
    elif given == AUTO:
        logger.warning("default_mm_loras=auto: %s has no adapters for modalities", path)
    elif found:
        keys = ", ".join(found)
        logger.warning("found adapters for %s in the model directory; --default-mm-loras auto applies them", keys)
    return found if given == AUTO else None
