"""Run one batch with several adapters: a prompt may name its adapter, `None` selects by media, `BASE` uses none."""

from mmlora import BASE, LLM, LoRARequest, SamplingParams
from mmlora.assets.image import ImageAsset
from mmlora.assets.models import assistant_adapters, assistant_default_mm_loras, assistant_path

spanish = LoRARequest("spanish", 1, assistant_adapters()["spanish-lora"])
question = "<|user|>what is two plus three?<|end|><|assistant|>"
picture = {
    "prompt": "<|user|><|image|>describe the picture<|end|><|assistant|>",
    "multi_modal_data": {"image": ImageAsset("shapes").pil_image},
}

llm = LLM(assistant_path(), enable_lora=True, max_loras=2, default_mm_loras=assistant_default_mm_loras())
outputs = llm.generate(
    [question, question, picture, picture],
    SamplingParams(temperature=0, max_tokens=64),
    lora_request=[None, spanish, None, BASE],
    use_tqdm=False,
)
for output in outputs:
    print(f"{output.lora.adapter or 'base':<8} {output.lora.reason:<14} {output.outputs[0].text}")
