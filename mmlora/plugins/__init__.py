"""Plugins: functions in the entry-point group `mmlora.general_plugins`, called once at startup."""

import logging
import os
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Final

from mmlora.errors import ConfigError, MMLoRAError

logger = logging.getLogger(__name__)

GROUP: Final = "mmlora.general_plugins"
PLUGINS_VARIABLE: Final = "MMLORA_PLUGINS"


def load_general_plugins(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Load the plugins listed in `MMLORA_PLUGINS`, separated by commas, in that order; no others are loaded.

    Returns:
        Their names.

    Raises:
        ConfigError: a plugin is not installed or fails.
    """
    chosen = [name.strip() for name in environment.get(PLUGINS_VARIABLE, "").split(",") if name.strip()]
    installed = {entry.name: entry for entry in entry_points(group=GROUP)} if chosen else {}
    for name in chosen:
        if name not in installed:
            known = ", ".join(sorted(installed)) or "none"
            raise ConfigError(f"{PLUGINS_VARIABLE}: the plugin {name!r} is not installed; installed: {known}")
        try:
            installed[name].load()()
        except MMLoRAError:
            raise
        except Exception as error:
            logger.exception("the plugin %r failed", name)
            raise ConfigError(f"{PLUGINS_VARIABLE}: the plugin {name!r} failed: {error}") from error
    return chosen
