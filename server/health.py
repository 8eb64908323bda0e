"""`GET /health` and `GET /ready` for those that watch a server and route requests to it, and `GET /version`."""

from importlib.metadata import version

from fastapi import APIRouter

from mmlora.async_llm import AsyncLLM
from mmlora.server.http.admission import Admission
from mmlora.server.json_answer import JSONAnswer


def status_routes(llm: AsyncLLM, admission: Admission) -> APIRouter:
    """Build the routes.

    Args:
        llm: the engine; `/health` is 503 once it is dead.
        admission: of the server; `/ready` is 503, with the reason, while new requests are not served.
    """
    routes = APIRouter()
    number = version("mmlora")

    @routes.get("/health")
    async def health() -> JSONAnswer:
        return JSONAnswer({"status": "ok"}) if llm.is_alive else JSONAnswer({"status": "dead"}, status_code=503)

    @routes.get("/ready")
    async def ready() -> JSONAnswer:
        status = "shutting down" if admission.is_closed else llm.status
        return JSONAnswer({"status": status}, status_code=200 if status == "ready" else 503)

    @routes.get("/version")
    async def tell_version() -> JSONAnswer:
        return JSONAnswer({"version": number})

    return routes
