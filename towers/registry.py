"""The one table of families with towers."""

from collections.abc import Callable
from typing import Any

from mmlora.towers.base import Towers
from mmlora.towers.general import GeneralTowers
from mmlora.towers.phi4_multimodal import Phi4MultimodalTowers

TOWERS: dict[str, Callable[[Any], Towers]] = {
    "phi4_multimodal": Phi4MultimodalTowers,
    "audioflamingo3": GeneralTowers,
    "granite_speech": GeneralTowers,
    "llava": GeneralTowers,
    "llava_next": GeneralTowers,
    "idefics3": GeneralTowers,
}


def get_towers(model: Any) -> Towers | None:
    """The towers of a loaded `transformers` model, None for a text-only one."""
    build = TOWERS.get(model.config.model_type)
    return build(model) if build is not None else None
