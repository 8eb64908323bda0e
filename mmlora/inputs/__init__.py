"""From what a caller passes (prompts, chats, media, adapters) to what the engine runs."""
