"""`GET /health` and `GET /ready` for those that watch a server and route requests to it, and `GET /version`."""

from fastapi import APIRouter

from mmlora import __version__
from mmlora.async_llm import AsyncLLM
from mmlora.server.errors import UTF8JSONResponse
from mmlora.server.http.admission import Admission


def status_routes(llm: AsyncLLM, admission: Admission) -> APIRouter:
    """Build the routes.

    Args:
        llm: the engine; `/health` is 503 once it is dead.
        admission: of the server; `/ready` is 503, with the reason, while new requests are not served.
    """
    routes = APIRouter()

    @routes.get("/health")
    async def health() -> UTF8JSONResponse:
        status = "ok" if llm.is_alive else "dead"
        return UTF8JSONResponse({"status": status}, status_code=200 if status == "ok" else 503)

    @routes.get("/ready")
    async def ready() -> UTF8JSONResponse:
        status = "shutting down" if admission.is_closed else llm.status
        return UTF8JSONResponse({"status": status}, status_code=200 if status == "ready" else 503)

    @routes.get("/version")
    async def tell_version() -> UTF8JSONResponse:
        return UTF8JSONResponse({"version": __version__})

    return routes
