"""From what a caller passes (prompts, chats, media, adapters) to what the engine runs."""

from mmlora.inputs.prompts import TextPrompt, TokensPrompt

__all__ = ["TextPrompt", "TokensPrompt"]
