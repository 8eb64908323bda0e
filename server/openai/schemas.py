"""The OpenAPI document: FastAPI knows the routes and their bodies, this file what they answer."""

from collections.abc import Mapping
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from mmlora import __version__

Schema = dict[str, Any]

TEXT: Final[Schema] = {"type": "string"}
INTEGER: Final[Schema] = {"type": "integer"}
NUMBER: Final[Schema] = {"type": "number"}


def obj(**fields: Schema) -> Schema:
    """An object that always has these fields, and may have others."""
    return {"type": "object", "properties": fields, "required": list(fields)}


def array(items: Schema) -> Schema:
    """A list."""
    return {"type": "array", "items": items}


def nullable(schema: Schema) -> Schema:
    """A value or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def one_of(*values: str) -> Schema:
    """One of some texts."""
    return {"enum": list(values)}


EVENT: Final = obj(data=TEXT)  # one of a stream; what the data holds is JSON, and at last `[DONE]`


def answer(
    schema: Schema, *, streams: bool = False, is_text: bool = False, media_type: str = "application/json"
) -> Schema:
    """What a route answers when all went well; with `is_text`, text alone where the request asks for it."""
    content = {media_type: {"schema": schema}}
    if is_text:
        content["text/plain"] = {"schema": TEXT}
    if streams:
        content["text/event-stream"] = {"schema": EVENT}
    return {"description": "Success", "content": content}


ERROR: Final = obj(error=obj(message=TEXT, type=TEXT, param=nullable(TEXT), code=nullable(TEXT)))
LORA: Final = obj(adapter=nullable(TEXT), digest=nullable(TEXT), reason=TEXT, warning=nullable(TEXT))
USAGE: Final = obj(
    prompt_tokens=INTEGER,
    completion_tokens=INTEGER,
    total_tokens=INTEGER,
    prompt_tokens_details=obj(cached_tokens=INTEGER),
)
FINISH_REASON: Final = one_of("stop", "length", "tool_calls")
STOP_REASON: Final = {"anyOf": [TEXT, INTEGER, {"type": "null"}]}


def choices(kind: str, **content: Schema) -> Schema:
    """An answer of numbered choices."""
    choice = obj(index=INTEGER, finish_reason=FINISH_REASON, stop_reason=STOP_REASON, **content)
    return obj(id=TEXT, object=one_of(kind), created=INTEGER, model=TEXT, lora=LORA, usage=USAGE, choices=array(choice))


CHAT: Final = choices(
    "chat.completion",
    message=obj(role=one_of("assistant"), content=nullable(TEXT), refusal={"type": "null"}),
    logprobs=nullable(obj(content=array(obj(token=TEXT, logprob=NUMBER)))),
)
COMPLETION: Final = choices(
    "text_completion",
    text=TEXT,
    logprobs=nullable(obj(tokens=array(TEXT), token_logprobs=array(nullable(NUMBER)))),
)
RESPONSE: Final = obj(
    id=TEXT,
    object=one_of("response"),
    created_at=INTEGER,
    model=TEXT,
    status=one_of("completed", "incomplete"),
    error={"type": "null"},
    incomplete_details=nullable(obj(reason=one_of("max_output_tokens"))),
    output=array(obj(id=TEXT, type=TEXT, status=TEXT)),
    usage=obj(
        input_tokens=INTEGER,
        input_tokens_details=obj(cached_tokens=INTEGER),
        output_tokens=INTEGER,
        output_tokens_details=obj(reasoning_tokens=INTEGER),
        total_tokens=INTEGER,
    ),
    metadata={"type": "object", "additionalProperties": TEXT},
    lora=LORA,
)
ADAPTER: Final = obj(
    name=TEXT,
    lora_int_id=INTEGER,
    digest=nullable(TEXT),
    default_for=nullable(TEXT),
    matched=INTEGER,
    parts={"type": "object", "additionalProperties": INTEGER},
    unmatched=array(TEXT),
    problem=nullable(TEXT),
)
MODEL: Final = obj(
    id=TEXT,
    object=one_of("model"),
    created=INTEGER,
    owned_by=TEXT,
    root=TEXT,
    parent=nullable(TEXT),
    max_model_len=INTEGER,
    permission=array({"type": "object"}),
    adapter=nullable(ADAPTER),
)
TRANSCRIPTION: Final = obj(
    text=TEXT,
    finish_reason=FINISH_REASON,
    usage={
        "anyOf": [
            obj(type=one_of("tokens"), input_tokens=INTEGER, output_tokens=INTEGER, total_tokens=INTEGER),
            obj(type=one_of("duration"), seconds=NUMBER),
        ]
    },
    lora=LORA,
)
ANSWERS: Final[Mapping[str, Schema]] = {
    "/v1/chat/completions": answer(CHAT, streams=True),
    "/v1/completions": answer(COMPLETION, streams=True),
    "/v1/responses": answer(RESPONSE, streams=True),
    "/v1/audio/transcriptions": answer(TRANSCRIPTION, streams=True, is_text=True),
    "/v1/audio/translations": answer(TRANSCRIPTION, streams=True, is_text=True),
    "/v1/models": answer(obj(object=one_of("list"), data=array(MODEL))),
    "/v1/models/{name}": answer(MODEL),
    "/v1/load_lora_adapter": answer(TEXT, media_type="text/plain"),
    "/v1/unload_lora_adapter": answer(TEXT, media_type="text/plain"),
    "/tokenize": answer(
        obj(count=INTEGER, max_model_len=INTEGER, tokens=array(INTEGER), token_strs=nullable(array(TEXT)))
    ),
    "/detokenize": answer(obj(prompt=TEXT)),
    "/health": answer(obj(status=one_of("ok"))),
    "/ready": answer(obj(status=one_of("ready"))),
    "/version": answer(obj(version=TEXT)),
    "/metrics": answer(TEXT, media_type="text/plain"),
}


def add_openapi(app: FastAPI) -> None:
    """Have an application describe itself at `/openapi.json`, answers and errors included."""

    def describe() -> Schema:
        if app.openapi_schema is None:
            app.openapi_schema = _describe(app)
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign]  # FastAPI's own way to extend the document


def _describe(app: FastAPI) -> Schema:
    document = get_openapi(title=app.title, version=__version__, routes=app.routes)
    document["components"] = {"schemas": {"Error": ERROR}}
    error = answer({"$ref": "#/components/schemas/Error"}) | {"description": "An error, in OpenAI's form"}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"] = {"200": ANSWERS[path], "4XX": error, "5XX": error}
    status = answer(obj(status=TEXT)) | {"description": "Not now; the status says why"}
    for path in ("/health", "/ready"):
        document["paths"][path]["get"]["responses"]["503"] = status
    return document
