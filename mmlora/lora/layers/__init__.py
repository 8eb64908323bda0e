"""LoRA layers that wrap a model's modules, and their device slots."""
