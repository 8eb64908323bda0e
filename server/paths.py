"""The path of a request below `root_path`, as the routes have it."""

from starlette.types import Scope


def route_path(scope: Scope) -> str:
    """The path of a request without the prefix of a reverse proxy."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(root) if path.startswith(f"{root}/") else path
