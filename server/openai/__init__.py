"""The OpenAI-compatible endpoints and what they share."""
