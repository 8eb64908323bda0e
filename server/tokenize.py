"""Tokens: `POST /tokenize` converts a text or chat as the engine does, `POST /detokenize` converts them back.

`GET /tokenizer_info` describes the tokenizer.
"""

import asyncio
from typing import Annotated, Any, Final, TypeVar

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from mmlora.async_llm import AsyncLLM
from mmlora.errors import RequestError
from mmlora.inputs.chat import ChatPrompt
from mmlora.server.bodies import Body, FirstOnly, UTF8JSONResponse, body_schema, parse_body, pool_of
from mmlora.server.http.admission import read_body
from mmlora.server.http.auth import CALLER
from mmlora.server.lora.served_models import ServedModels
from mmlora.server.openai.output import until_disconnect
from mmlora.server.openai.tools.choice import read_tool_choice
from mmlora.utils.text import shorten

# Fields of a chat; the tokens of a text depend on none of them.
CHAT_FIELDS: Final = (
    "add_generation_prompt",
    "continue_final_message",
    "chat_template_kwargs",
    "tools",
    "mm_processor_kwargs",
)


class TokenizeBody(Body):
    """Body of `/tokenize`: a text in `prompt`, or a chat in `messages`, to which `CHAT_FIELDS` belong.

    By default, special tokens are added to a text and not to a chat, whose template writes them.
    """

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    messages: Annotated[FirstOnly[dict[str, Any]] | None, Field(min_length=1)] = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: FirstOnly[dict[str, Any]] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
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


class TokenizerInfo(BaseModel):
    """Response of `/tokenizer_info`: fields of `tokenizer_config.json`, with special tokens such as `bos_token`."""

    model_config = ConfigDict(extra="allow")
    tokenizer_class: str
    chat_template: str | None
    model_max_length: int
    vocab_size: int
    added_tokens_decoder: dict[str, dict[str, Any]]


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

    async def read(request: Request, model: type[B]) -> B:
        content = await read_body(request, max_request_bytes)
        body: B = await llm.run_in_pool(parse_body, model, content, pool=pool_of(content))
        await models.find_adapter(body.model, None)
        return body

    @routes.post("/tokenize", openapi_extra=body_schema(TokenizeBody), response_model=Tokens)
    async def tokenize(request: Request) -> UTF8JSONResponse:
        body = await read(request, TokenizeBody)
        return UTF8JSONResponse(await until_disconnect(request, tokens.tokenize(body, CALLER.get())))

    @routes.post("/detokenize", openapi_extra=body_schema(DetokenizeBody), response_model=Prompt)
    async def detokenize(request: Request) -> UTF8JSONResponse:
        body = await read(request, DetokenizeBody)
        return UTF8JSONResponse(await llm.run_in_pool(tokens.detokenize, body))

    @routes.get("/tokenizer_info", response_model=TokenizerInfo)
    def tokenizer_info() -> UTF8JSONResponse:
        return UTF8JSONResponse(tokens.describe_tokenizer())

    return routes


class TokenService:
    """Converts prompts to tokens as the engine does, and tokens to text.

    Args:
        llm: the engine.
    """

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm
        # The embedding table is padded: ids beyond the tokenizer's vocabulary have no text but may be sampled.
        self._num_ids = max(llm.vocab_size, len(llm.tokenizer))

    async def tokenize(self, body: TokenizeBody, caller: str) -> dict[str, Any]:
        """Return the tokens of a text or a chat; media of a chat are fetched, and count as in a chat completion.

        Args:
            body: the request.
            caller: identifies the client; media uuids are scoped to it.

        Raises:
            RequestError: fields contradict each other, the text is too long, or the messages cannot be rendered.
            MediaError: a media item cannot be used.
        """
        if (body.prompt is None) == (body.messages is None):
            received = "neither" if body.prompt is None else "both"
            raise RequestError(f"one of prompt and messages is needed; received {received}", "prompt")
        run = self._llm.run_in_pool
        if body.prompt is not None:
            ids = await run(self._encode_prompt, body, body.prompt)
        else:
            ids = await self._encode_chat(await run(self._chat_prompt, body, caller))
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

    def describe_tokenizer(self) -> dict[str, Any]:
        """Return the configuration of the tokenizer, without paths."""
        tokenizer = self._llm.tokenizer
        return {
            "tokenizer_class": type(tokenizer).__name__,
            "chat_template": self._llm.input_processor.chat_template.source or None,
            "model_max_length": self._llm.max_model_len,
            "vocab_size": self._num_ids,
            "padding_side": tokenizer.padding_side,
            "truncation_side": tokenizer.truncation_side,
            **{name: getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token")},
            **{name: getattr(tokenizer, name, None) for name in ("bos_token", "eos_token", "unk_token", "pad_token")},
            **tokenizer.special_tokens_map,
            "added_tokens_decoder": {
                str(token_id): {
                    "content": token.content,
                    **{
                        name: getattr(token, name)
                        for name in ("lstrip", "normalized", "rstrip", "single_word", "special")
                    },
                }
                for token_id, token in tokenizer.added_tokens_decoder.items()
            },
        }

    def _encode_prompt(self, body: TokenizeBody, prompt: str) -> list[int]:
        for name in CHAT_FIELDS:
            if getattr(body, name) is not None:
                raise RequestError(f"{name} needs messages; received a prompt", name)
        return self._llm.encode(prompt, add_special_tokens=body.add_special_tokens is not False)

    def _chat_prompt(self, body: TokenizeBody, caller: str) -> ChatPrompt:
        return self._llm.input_processor.chat_prompt(
            body.messages or [],
            chat_template_kwargs=body.chat_template_kwargs,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=bool(body.continue_final_message),
            tools=list(read_tool_choice(body.tools, None, None).tools.values()),
            mm_processor_kwargs=body.mm_processor_kwargs,
            add_special_tokens=bool(body.add_special_tokens),
            caller=caller,
            is_strict=True,
        )

    async def _encode_chat(self, chat: ChatPrompt) -> list[int]:
        tokenize = self._llm.input_processor.tokenize
        if chat.media is None:
            return await self._llm.run_in_pool(tokenize, chat)
        await chat.media.fetch()
        try:
            return await self._llm.run_in_pool(tokenize, chat, pool="media")
        except asyncio.CancelledError:
            chat.media.cancel()
            raise
