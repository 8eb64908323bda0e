"""Write the checkpoints of stages 1 and 6 from `assets/assistant/`, so that media stages can run without them.

The exported weights are fp16; the optimizer's state is not kept.
"""

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Phi4MultimodalForCausalLM

from mmlora.assets.training.export import ASSISTANT
from mmlora.assets.training.model import CHECKPOINTS
from mmlora.assets.training.stages import backbone


def main() -> None:
    """Restore tokenizer, language model and `spanish-lora`."""
    CHECKPOINTS.mkdir(exist_ok=True)
    AutoTokenizer.from_pretrained(ASSISTANT).save_pretrained(CHECKPOINTS / "tokenizer")
    model = Phi4MultimodalForCausalLM.from_pretrained(ASSISTANT, dtype=torch.float32)
    torch.save({"backbone": backbone(model).state_dict()}, CHECKPOINTS / "text.pt")
    spanish = {
        name: tensor.float() for name, tensor in load_file(ASSISTANT / "spanish-lora/adapter_model.safetensors").items()
    }
    torch.save({"lora": spanish}, CHECKPOINTS / "spanish.pt")


if __name__ == "__main__":
    main()
