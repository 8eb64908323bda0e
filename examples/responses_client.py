"""Stream from OpenAI's Responses API: python examples/responses_client.py [http://127.0.0.1:8000/v1]."""

import base64
import sys

from openai import OpenAI

from mmlora.assets.image import ImageAsset

address = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
data = base64.b64encode(ImageAsset("triangle").path.read_bytes()).decode()
content = [
    {"type": "input_image", "image_url": f"data:image/png;base64,{data}", "detail": "auto"},
    {"type": "input_text", "text": "describe the picture"},
]
with (
    OpenAI(base_url=address, api_key="none") as client,
    client.responses.stream(model="assistant", input=[{"role": "user", "content": content}], temperature=0) as stream,
):
    for event in stream:
        if event.type == "response.output_text.delta":
            print(event.delta, end="", flush=True)
    print(f"\n{stream.get_final_response().to_dict()['lora']}")
