"""Tool calling: choices, prompt formats, and parsers of model output."""
