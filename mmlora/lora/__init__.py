"""LoRA adapters: requests, PEFT files, host cache, device slots and the layers that apply them."""
