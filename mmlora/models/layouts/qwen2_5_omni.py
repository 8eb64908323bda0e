"""A complete Qwen2.5-Omni (`model_type: "qwen2_5_omni"`): the thinker is served, the speech output is left out.

Source: https://huggingface.co/Qwen/Qwen2.5-Omni-7B
"""

import re
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from mmlora.models.layouts.base import Layout


def load_config(path: Path) -> PretrainedConfig:
    """Read a directory's configuration as that of `Qwen2_5OmniThinkerForConditionalGeneration`."""
    config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False).thinker_config
    config.architectures = ["Qwen2_5OmniThinkerForConditionalGeneration"]
    return config


QWEN2_5_OMNI_LAYOUT = Layout(
    "qwen2_5_omni",
    load_config,
    key_mapping={r"^thinker\.": ""},
    left_out=re.compile(r"(talker|token2wav)\..+"),
)
