"""`JSONAnswer`: JSON that can always be sent."""

import json

from starlette.responses import JSONResponse


class JSONAnswer(JSONResponse):
    """A JSON answer in which `?` stands for what UTF-8 has no form of.

    Paths hold such characters where the name of a directory is not UTF-8; one of them does not spoil a whole list.
    """

    def render(self, content: object) -> bytes:
        """Encode an answer."""
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "replace")
