"""`CORS`: which pages of other sites may use the server from a browser."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

EXPOSED_HEADERS: Final = ("retry-after", "x-mmlora-adapter", "x-mmlora-reason")


@dataclass(frozen=True)
class CORS:
    """What a browser is told when a page of another site asks; without it, that the page may not.

    Args:
        origins: sites such as `https://chat.example`; `*` is every site.
        methods, headers: of requests; `*` is all.
        allow_credentials: let browsers send cookies, too.
    """

    origins: Sequence[str]
    methods: Sequence[str] = ("*",)
    headers: Sequence[str] = ("*",)
    allow_credentials: bool = False

    def add_to(self, app: FastAPI) -> None:
        """Have an application tell it; preflights need no API key, since browsers send none with them."""
        app.add_middleware(
            CORSMiddleware,
            allow_origins=self.origins,
            allow_methods=self.methods,
            allow_headers=self.headers,
            allow_credentials=self.allow_credentials,
            expose_headers=EXPOSED_HEADERS,
        )
