"""`GET /health` (liveness), `GET /ready` (readiness) and `GET /version`."""

from fastapi import APIRouter, Response
from pydantic import BaseModel

from mmlora import __version__
from mmlora.async_llm import AsyncLLM
from mmlora.server.http.admission import Admission


class HealthStatus(BaseModel):
    """Response of `/health` and `/ready`."""

    status: str


class Version(BaseModel):
    """Response of `/version`."""

    version: str


def status_routes(llm: AsyncLLM, admission: Admission) -> APIRouter:
    """Build the routes.

    Args:
        llm: the engine; `/health` returns 503 once it is dead.
        admission: of the server; `/ready` returns 503 with the reason while new requests are refused.
    """
    routes = APIRouter()

    @routes.get("/health", responses={503: {"model": HealthStatus}})
    async def health(response: Response) -> HealthStatus:
        response.status_code = 200 if llm.is_alive else 503
        return HealthStatus(status="ok" if llm.is_alive else "dead")

    @routes.get("/ready", responses={503: {"model": HealthStatus}})
    async def ready(response: Response) -> HealthStatus:
        status = "shutting down" if admission.is_closed else llm.status
        response.status_code = 200 if status == "ready" else 503
        return HealthStatus(status=status)

    @routes.get("/version")
    async def get_version() -> Version:
        return Version(version=__version__)

    return routes
