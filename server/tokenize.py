"""`POST /tokenize` and `POST /detokenize`: convert a text or chat to tokens as the engine does, and back."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from mmlora.async_llm import AsyncLLM
from mmlora.errors import RequestError
from mmlora.inputs.content_parts import type_of
from mmlora.processors.modalities import PART_MODALITIES
from mmlora.server.bodies import Body, FirstOnly, UTF8JSONResponse, body_schema, parse_body
from mmlora.server.http.admission import read_body
from mmlora.server.lora.served_models import ServedModels
from mmlora.utils.text import shorten


class TokenizeBody(Body):
    """Body of `/tokenize`: a text in `prompt`, or a chat in `messages`.

    `add_special_tokens` is for texts, the options of the chat template are for chats.
    """

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    messages: Annotated[FirstOnly[dict[str, Any]] | None, Field(min_length=1)] = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """Body of `/detokenize`."""

    model: str | None = None
    tokens: FirstOnly[int]


class Tokens(BaseModel):
    """Response of `/tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Prompt(BaseModel):
    """Response of `/detokenize`."""

    prompt: str


B = TypeVar("B", TokenizeBody, DetokenizeBody)


def token_routes(llm: AsyncLLM, models: ServedModels, max_request_bytes: int) -> APIRouter:
    """Build the routes.

    Args:
        llm: the engine, whose tokenizer is used.
        models: served model and adapter names.
        max_request_bytes: size limit of request bodies.
    """
    tokens = TokenService(llm)
    routes = APIRouter()

    async def respond(request: Request, model: type[B], convert: Callable[[B], dict[str, Any]]) -> UTF8JSONResponse:
        content = await read_body(request, max_request_bytes)
        body = await llm.run_in_pool(parse_body, model, content)
        await models.find_adapter(body.model, None)
        return UTF8JSONResponse(await llm.run_in_pool(convert, body))

    @routes.post("/tokenize", openapi_extra=body_schema(TokenizeBody), response_model=Tokens)
    async def tokenize(request: Request) -> UTF8JSONResponse:
        return await respond(request, TokenizeBody, tokens.tokenize)

    @routes.post("/detokenize", openapi_extra=body_schema(DetokenizeBody), response_model=Prompt)
    async def detokenize(request: Request) -> UTF8JSONResponse:
        return await respond(request, DetokenizeBody, tokens.detokenize)

    return routes


class TokenService:
    """Converts prompts to tokens as the engine does, but without media, and tokens to text.

    Args:
        llm: the engine.
    """

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm
        # The embedding table is padded: ids beyond the tokenizer's vocabulary have no text but may be sampled.
        self._num_ids = max(llm.vocab_size, len(llm.tokenizer))

    def tokenize(self, body: TokenizeBody) -> dict[str, Any]:
        """Return the tokens of a text or a chat.

        Raises:
            RequestError: fields contradict each other, the text is too long, or the messages cannot be rendered.
        """
        if (body.prompt is None) == (body.messages is None):
            received = "neither" if body.prompt is None else "both"
            raise RequestError(f"one of prompt and messages is needed; received {received}", "prompt")
        ids = self._encode_prompt(body, body.prompt) if body.prompt is not None else self._encode_chat(body)
        return {
            "count": len(ids),
            "max_model_len": self._llm.max_model_len,
            "tokens": ids,
            "token_strs": self._llm.tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None,
        }

    def detokenize(self, body: DetokenizeBody) -> dict[str, Any]:
        """Return the text of tokens, special tokens included.

        Raises:
            RequestError: there are too many tokens, or one is outside the vocabulary.
        """
        limit = self._llm.max_model_len
        if len(body.tokens) > limit:
            raise RequestError(f"tokens has {len(body.tokens)} ids; the limit is max_model_len={limit}", "tokens")
        for index, token in enumerate(body.tokens):
            if not 0 <= token < self._num_ids:
                received = f"tokens[{index}]={shorten(token)} is outside the vocabulary"
                raise RequestError(f"{received}; it must be from 0 to {self._num_ids - 1}", "tokens")
        text = self._llm.tokenizer.decode(body.tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return {"prompt": text}

    def _encode_prompt(self, body: TokenizeBody, prompt: str) -> list[int]:
        for name in ("add_generation_prompt", "continue_final_message", "chat_template_kwargs"):
            if getattr(body, name) is not None:
                raise RequestError(f"{name} needs messages; received a prompt", name)
        return self._llm.encode(prompt, add_special_tokens=body.add_special_tokens is not False)

    def _encode_chat(self, body: TokenizeBody) -> list[int]:
        if body.add_special_tokens:
            text = "add_special_tokens=true needs a prompt; the chat template adds the special tokens of messages"
            raise RequestError(text, "add_special_tokens")
        messages = body.messages or []
        for index, message in enumerate(messages):
            _check_text_only(message, f"messages[{index}]")
        prompt = self._llm.input_processor.chat_prompt(
            messages,
            chat_template_kwargs=body.chat_template_kwargs,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=bool(body.continue_final_message),
            is_strict=True,
        )
        return self._llm.input_processor.render(prompt)[1]


def _check_text_only(message: Mapping[str, Any], name: str) -> None:
    content = message.get("content")
    for part in content if isinstance(content, list) else ():
        kind = type_of(part) if isinstance(part, Mapping) else None
        if isinstance(kind, str) and kind in PART_MODALITIES:
            text = (
                f"{name}.content has a part of type {kind!r}; /tokenize takes text only "
                "(the usage of a chat completion counts the tokens of media)"
            )
            raise RequestError(text, "messages")
