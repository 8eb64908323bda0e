"""Loading the parts of a model's own processor."""

import subprocess
import sys
from pathlib import Path

from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

LOAD = """
import importlib.util, sys
if importlib.util.find_spec("torchvision") is None:
    sys.path.insert(0, sys.argv[1])
    import torchvision_stub
    torchvision_stub.install()
import transformers
from mmlora.processors.pretrained import load_part
assert transformers.utils.is_torchvision_available()
print(type(load_part("image_processor", sys.argv[2])).__name__)
"""


def test_images_use_pillow_even_if_torchvision_is_installed(tmp_path: Path) -> None:
    CLIPImageProcessorPil().save_pretrained(tmp_path)
    command = [sys.executable, "-c", LOAD, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "CLIPImageProcessorPil", done.stderr
