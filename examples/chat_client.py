"""Stream a chat from `mmlora serve` with OpenAI's client: python examples/chat_client.py [http://127.0.0.1:8000/v1]."""

import base64
import sys

from openai import OpenAI

from mmlora.assets.audio import AudioAsset

client = OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1", api_key="none")
data = base64.b64encode(AudioAsset("mary_had_lamb").path.read_bytes()).decode()
stream = client.chat.completions.create(
    model="assistant",
    messages=[
        {
            "role": "user",
            "content": [
                {"type": "audio_url", "audio_url": {"url": f"data:audio/flac;base64,{data}"}},  # type: ignore[list-item]
                {"type": "text", "text": "transcribe the speech"},
            ],
        }
    ],
    temperature=0,
    max_tokens=64,
    stream=True,
)
lora = None
for chunk in stream:
    lora = chunk.to_dict().get("lora") or lora
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print(f"\n{lora}")
