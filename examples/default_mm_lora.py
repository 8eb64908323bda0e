"""Transcribe speech offline: audio in the prompt selects the default adapter for audio."""

from transformers import AutoTokenizer

from mmlora import LLM, SamplingParams
from mmlora.assets.audio import AudioAsset
from mmlora.assets.models import assistant_default_mm_loras, assistant_path

model_id = assistant_path()
tokenizer = AutoTokenizer.from_pretrained(model_id)


def get_prompt(question: str, has_audio: bool) -> str:
    """Build the input prompt."""
    if has_audio:
        question = f"<|audio|>{question}"
    chat = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))


llm = LLM(
    model=model_id,
    enable_lora=True,
    max_lora_rank=64,
    max_model_len=2048,
    limit_mm_per_prompt={"audio": 1},
    default_mm_loras={"audio": assistant_default_mm_loras()["audio"]},
    enforce_eager=True,
)
inputs = {
    "prompt": get_prompt("can you transcribe the speech into a written format?", has_audio=True),
    "multi_modal_data": {"audio": AudioAsset("mary_had_lamb").audio_and_sample_rate},
}
outputs = llm.generate(inputs, sampling_params=SamplingParams(temperature=0.2, max_tokens=64))
print(outputs[0].outputs[0].text)
print(outputs[0].lora.adapter, outputs[0].lora.reason)
