"""The playground: one static page that uses the API as any client does.

The page and its files need no API key; the page asks the user for it when the API does. All files come from this
server, and the Content-Security-Policy lets the page load nothing else.
"""

from pathlib import Path
from typing import Final

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse

from mmlora.assets.audio import AudioAsset
from mmlora.assets.image import ImageAsset

_FOLDER: Final = Path(__file__).parent / "static"
# `mimetypes` depends on the system's tables, and with `nosniff` a wrong type is an error.
_MEDIA_TYPES: Final = {
    ".css": "text/css",
    ".flac": "audio/flac",
    ".html": "text/html",
    ".js": "text/javascript",
    ".png": "image/png",
    ".svg": "image/svg+xml",
}
_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' blob:",
        "media-src blob:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # no text, in particular of the model, is parsed as HTML
    )
)
_HEADERS: Final = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": _POLICY,
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def playground_routes() -> APIRouter:
    """Build the routes of the page, its files and its samples."""
    routes = APIRouter(include_in_schema=False)
    samples = AudioAsset("two_plus_three").path, ImageAsset("shapes").path
    files = {path.name: path for path in (*_FOLDER.iterdir(), *samples) if path.suffix in _MEDIA_TYPES}

    @routes.api_route("/", methods=["GET", "HEAD"])
    async def page() -> FileResponse:
        return _file_response(files["index.html"])

    @routes.api_route("/playground/{name}", methods=["GET", "HEAD"])
    async def file(name: str) -> FileResponse:
        if name not in files:  # the name is a key and never becomes a path
            raise HTTPException(404, "the playground does not have this file")
        return _file_response(files[name])

    return routes


def _file_response(path: Path) -> FileResponse:
    return FileResponse(path, headers=_HEADERS, media_type=_MEDIA_TYPES[path.suffix])
