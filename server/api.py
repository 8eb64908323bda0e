"""Application: the routes with their request and response models, the middleware and the error handlers."""

from collections.abc import Sequence
from typing import Any, Final

from fastapi import APIRouter, FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from mmlora import __version__
from mmlora.async_llm import AsyncLLM
from mmlora.errors import MMLoRAError
from mmlora.server.args import ServerArgs
from mmlora.server.bodies import UTF8JSONResponse
from mmlora.server.errors import Refusal, error_response
from mmlora.server.health import status_routes
from mmlora.server.http.admission import Admission, AdmissionGate
from mmlora.server.http.auth import CORS, Authentication
from mmlora.server.http.listener import RootPath
from mmlora.server.http.origins import AllowedHosts, HostCheck, OriginCheck
from mmlora.server.lora.served_models import ServedModels
from mmlora.server.lora.updates import adapter_routes
from mmlora.server.observability.prometheus import add_metrics
from mmlora.server.observability.request_id import HEADER, RequestId
from mmlora.server.observability.tracing import Tracer
from mmlora.server.openai.chat.protocol import ChatCompletionRequest
from mmlora.server.openai.chat.serving import ChatService
from mmlora.server.openai.completions.protocol import CompletionRequest
from mmlora.server.openai.completions.serving import CompletionService
from mmlora.server.openai.generation import GenerationService
from mmlora.server.openai.model_format import ModelFormat
from mmlora.server.openai.reasoning import find_marks
from mmlora.server.openai.responses.protocol import ResponsesRequest
from mmlora.server.openai.responses.serving import ResponsesService
from mmlora.server.openai.schemas import (
    ERRORS,
    ChatCompletion,
    Completion,
    ModelCard,
    ModelList,
    ResponseObject,
    Transcription,
    described,
)
from mmlora.server.openai.tools.choice import ToolCalling
from mmlora.server.openai.transcriptions.protocol import TranscriptionRequest, TranslationRequest
from mmlora.server.openai.transcriptions.serving import TranscriptionService
from mmlora.server.playground import playground_routes
from mmlora.server.tokenize import token_routes

CLIENT_CLOSED_REQUEST: Final = 499  # for the access log: the client is gone


def build_app(
    llm: AsyncLLM,
    models: ServedModels,
    *,
    api_key: str | Sequence[str] | None = None,
    max_request_bytes: int = ServerArgs.max_request_bytes,
    allow_lora_updates: bool = False,
    log_requests: bool = False,
    admission: Admission | None = None,
    metrics_prefix: str = ServerArgs.metrics_prefix,
    cors: CORS | None = None,
    allowed_hosts: AllowedHosts | None = None,
    root_path: str = "",
    tracer: Tracer | None = None,
    tool_call_parser: str | None = "auto",
    reasoning_parser: str = "auto",
) -> FastAPI:
    """Build the application around a running engine.

    Args:
        llm: the engine; the caller shuts it down.
        models: served model and adapter names.
        api_key: bearer token that clients must send, or several accepted ones; None serves all clients.
        max_request_bytes: size limit of request bodies.
        allow_lora_updates: whether clients may load and unload adapters.
        log_requests: log prompts and hashes of media in the access log.
        admission: limits on open requests and their duration; by default those of `ServerArgs`.
        metrics_prefix: see `ServerArgs`.
        cors: origins whose pages may use the server; by default only its own.
        allowed_hosts: hosts that requests may address; by default all.
        root_path: path prefix under which a reverse proxy serves the application.
        tracer: traces requests; the caller shuts it down.
        tool_call_parser: see `ToolCalling`.
        reasoning_parser: see `find_marks`.
    """
    app = FastAPI(title="mmlora", version=__version__, docs_url=None, redoc_url=None, responses=ERRORS)
    admission = admission or Admission(llm.args.num_seqs)
    app.include_router(generation_routes(llm, models, max_request_bytes, tool_call_parser, reasoning_parser))
    app.include_router(model_routes(models))
    app.include_router(adapter_routes(llm, models, is_allowed=allow_lora_updates))
    app.include_router(token_routes(llm, models, max_request_bytes))
    app.include_router(status_routes(llm, admission))
    app.include_router(playground_routes())
    # The last middleware is the outermost: refusals are logged and get CORS headers.
    app.add_middleware(AdmissionGate, admission=admission)
    app.add_middleware(Authentication, keys=[api_key] if isinstance(api_key, str) else api_key)
    app.add_middleware(OriginCheck, origins=cors.origins if cors is not None else ())
    if allowed_hosts is not None:
        app.add_middleware(HostCheck, hosts=allowed_hosts)
    if cors is not None:
        cors.add_to(app)
    add_metrics(app, llm, admission, prefix=metrics_prefix, log_requests=log_requests, tracer=tracer)
    app.add_middleware(RequestId)
    if root_path:
        app.add_middleware(RootPath, root_path=root_path)
    _add_error_handlers(app)
    return app


def generation_routes(
    llm: AsyncLLM, models: ServedModels, max_request_bytes: int, tool_call_parser: str | None, reasoning_parser: str
) -> APIRouter:
    """Build the routes that generate text.

    Args:
        llm, models, max_request_bytes: see `build_app`.
        tool_call_parser: see `ToolCalling`.
        reasoning_parser: see `find_marks`.
    """
    common = llm, models, max_request_bytes
    template = llm.input_processor.chat_template
    tool_calling = ToolCalling(tool_call_parser, template.source, llm.tokenizer)
    reasoning = find_marks(reasoning_parser, template.source)
    model_format = ModelFormat(tool_calling, reasoning, llm.tokenizer, template.variables)
    chat, response = ChatService(*common, model_format), ResponsesService(*common, model_format)
    completion = CompletionService(*common)
    transcription = TranscriptionService(*common, TranscriptionRequest)
    translation = TranscriptionService(*common, TranslationRequest)
    routes = APIRouter(prefix="/v1")

    def post(path: str, service: GenerationService, description: str, **options: Any) -> None:
        name = path.strip("/").replace("/", "_")
        routes.add_api_route(path, service.respond, methods=["POST"], name=name, description=description, **options)

    post("/chat/completions", chat, "Complete a chat.", **described(ChatCompletionRequest, ChatCompletion))
    post("/completions", completion, "Complete one or several prompts.", **described(CompletionRequest, Completion))
    post("/responses", response, "Create a response.", **described(ResponsesRequest, ResponseObject))
    audio = described(TranscriptionRequest, Transcription, is_form=True)
    post("/audio/transcriptions", transcription, "Transcribe audio.", **audio)
    audio = described(TranslationRequest, Transcription, is_form=True)
    post("/audio/translations", translation, "Translate speech to English.", **audio)
    return routes


def model_routes(models: ServedModels) -> APIRouter:
    """Build the routes that list models and adapters."""
    routes = APIRouter(prefix="/v1")

    @routes.get("/models", response_model=ModelList)
    async def list_models() -> UTF8JSONResponse:
        return UTF8JSONResponse({"object": "list", "data": models.model_cards()})

    @routes.get("/models/{name:path}", response_model=ModelCard)
    async def get_model(name: str) -> UTF8JSONResponse:
        return UTF8JSONResponse(models.model_card(name))

    return routes


def _add_error_handlers(app: FastAPI) -> None:
    """Turn every exception into a response with OpenAI's error body."""

    @app.exception_handler(MMLoRAError)
    async def expected(_: Request, error: MMLoRAError) -> Response:
        return error_response(error)

    @app.exception_handler(ClientDisconnect)
    async def disconnected(_: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return error_response(Refusal(error.status_code, message), error.headers)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:  # runs outside of all middleware
        request_id = request.scope.get("state", {}).get("request_id")
        return error_response(error, {HEADER: request_id} if request_id is not None else None)
