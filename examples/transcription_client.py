"""Transcribe a file with `mmlora serve`: python examples/transcription_client.py [http://127.0.0.1:8000/v1]."""

import sys

from openai import OpenAI

from mmlora.assets.audio import AudioAsset

client = OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1", api_key="none")
found = client.audio.transcriptions.create(model="assistant", file=AudioAsset("mary_had_lamb").path)
print(found.text)
print(found.to_dict()["lora"])
