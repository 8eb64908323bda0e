"""`GET /version`, and `GET /ready` for those that route requests."""

from importlib.metadata import version

from fastapi import APIRouter, FastAPI

from mmlora.async_llm import AsyncLLM
from mmlora.server.admission import Admission
from mmlora.server.json_answer import JSONAnswer


def add_ready_route(app: FastAPI, llm: AsyncLLM, admission: Admission) -> None:
    """Tell anybody whether new requests are served: 200, or 503 with the reason."""

    @app.get("/ready")
    async def ready() -> JSONAnswer:
        status = "shutting down" if admission.is_closed else llm.status
        return JSONAnswer({"status": status}, status_code=200 if status == "ready" else 503)


def version_routes() -> APIRouter:
    """Build the route that tells the version of this package."""
    routes = APIRouter()
    number = version("mmlora")

    @routes.get("/version")
    async def tell_version() -> JSONAnswer:
        return JSONAnswer({"version": number})

    return routes
