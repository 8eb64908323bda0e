"""JSON schemas of messages, for the OpenAPI document; `protocol.py` and `mmlora.inputs.chat` check."""

from typing import Any, Final

Schema = dict[str, Any]


def _part(kind: str, content: Schema, field: str | None = None) -> Schema:
    field = field or kind
    properties = {"type": {"const": kind}, field: content}
    return {"type": "object", "properties": properties, "required": list(properties)}


_URL: Final = {
    "type": "object",
    "properties": {"url": {"type": "string", "description": "data:, http:, https: or file:"}},
    "required": ["url"],
}
_AUDIO: Final = {
    "type": "object",
    "properties": {"data": {"type": "string", "description": "base64"}, "format": {"type": "string"}},
    "required": ["data"],
}
_TEXT: Final = {"type": "string"}
MESSAGES: Final = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role"],
        "properties": {
            "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
            "content": {
                "anyOf": [
                    _TEXT,
                    {
                        "type": "array",
                        "items": {
                            "anyOf": [
                                _part("text", _TEXT),
                                _part("image_url", _URL),
                                _part("audio_url", _URL),
                                _part("input_audio", _AUDIO),
                            ]
                        },
                    },
                    {"type": "null"},
                ]
            },
        },
    },
}
INPUT: Final = {
    "anyOf": [
        _TEXT,
        {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "properties": {
                    "role": {"enum": ["system", "developer", "user", "assistant"]},
                    "content": {
                        "anyOf": [
                            _TEXT,
                            {
                                "type": "array",
                                "minItems": 1,
                                "items": {
                                    "anyOf": [
                                        _part("input_text", _TEXT, "text"),
                                        _part("input_image", _TEXT, "image_url"),
                                        _part("input_audio", _AUDIO),
                                        _part("output_text", _TEXT, "text"),
                                    ]
                                },
                            },
                        ]
                    },
                },
            },
        },
    ]
}
