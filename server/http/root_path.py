"""The prefix under which a reverse proxy serves the server, and the path of a request below it."""

from starlette.types import ASGIApp, Receive, Scope, Send


class RootPath:
    """Takes requests with and without the prefix: some proxies strip it, some do not.

    Args:
        app: the application.
        root_path: the prefix; begins with a slash, and does not end with one.
    """

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "http":
            root, path = self._root_path, scope["path"]
            scope = {**scope, "root_path": root, "path": path if path.startswith(f"{root}/") else root + path}
        await self._app(scope, receive, send)


def route_path(scope: Scope) -> str:
    """The path of a request without the prefix of a reverse proxy."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(root) if path.startswith(f"{root}/") else path
