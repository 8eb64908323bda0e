"""Serve adapters that a resolver finds when a request first names them: python examples/lora_resolver.py [PORT].

    curl localhost:8000/v1/chat/completions -d '{"model": "spanish-lora", "messages": [{"role": "user", "content":
    "what is two plus three?"}]}' -H "Content-Type: application/json"

After this request, `/v1/models` lists `spanish-lora`.
"""

import os
import sys

from mmlora import EngineArgs
from mmlora.assets.models import assistant_adapters, assistant_path
from mmlora.lora.request import LoRARequest
from mmlora.lora.resolver import LoRAResolver, LoRAResolverRegistry, derive_lora_id
from mmlora.server.args import ServerArgs
from mmlora.server.launch import serve


class AssistantResolver(LoRAResolver):
    """Finds the adapters of the bundled assistant."""

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        path = assistant_adapters().get(lora_name)
        return LoRARequest(lora_name, derive_lora_id(lora_name), path) if path else None


if __name__ == "__main__":
    os.environ["MMLORA_ALLOW_RUNTIME_LORA_UPDATING"] = "true"
    LoRAResolverRegistry.register_resolver("assistant_resolver", AssistantResolver())
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    serve(EngineArgs(assistant_path(), served_model_name="assistant", enable_lora=True), ServerArgs(port=port))
