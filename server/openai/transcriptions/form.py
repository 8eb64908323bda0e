"""Parse `multipart/form-data` bodies in memory.

Starlette's `Request.form` is not used: it decodes a file part without a filename as text, accepts forms without their
last boundary, and writes large files to disk.
"""

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from mmlora.errors import RequestError
from mmlora.utils.text import shorten

MAX_FORM_FIELDS = 64
MAX_FIELD_NAME_CHARS = 256


class _Parts:
    """Callbacks of the parser, which collect the parts."""

    def __init__(self) -> None:
        self.found: list[tuple[str, bytes]] = []
        self.is_complete = False
        self._header = bytearray()
        self._value = bytearray()
        self._disposition = b""
        self._content: list[bytes] = []

    def on_part_begin(self) -> None:
        if len(self.found) == MAX_FORM_FIELDS:
            raise RequestError(f"the form has more than {MAX_FORM_FIELDS} fields", "body")
        self._disposition, self._content = b"", []

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header, self._value = bytearray(), bytearray()

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._content.append(data[start:end])

    def on_part_end(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"")
        if not 0 < len(name) <= MAX_FIELD_NAME_CHARS:
            shown = shorten(self._disposition.decode("latin-1"))
            raise RequestError(f"a part of the form has no name, or its name is too long: {shown}", "body")
        # Some clients name list fields `include[]`.
        field = name.decode("utf-8", "replace").removesuffix("[]")
        self.found.append((field, self._content[0] if len(self._content) == 1 else b"".join(self._content)))

    def on_end(self) -> None:
        self.is_complete = True


def parse_form(content_type: str | None, body: bytes) -> dict[str, list[bytes]]:
    """Parse a form.

    Args:
        content_type: header of the request with the boundary.
        body: the whole body.

    Returns:
        The contents of all parts by name.

    Raises:
        RequestError: the body is not a multipart form, is malformed, or has more than `MAX_FORM_FIELDS` parts.
    """
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise RequestError(
            f"content-type is {shorten(content_type)}; it must be multipart/form-data; boundary=…", "body"
        )
    parts = _Parts()
    callbacks = {name: getattr(parts, name) for name in dir(parts) if name.startswith("on_")}
    try:
        parser = MultipartParser(boundary, callbacks)  # type: ignore[arg-type]
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise RequestError(f"the body is not valid multipart/form-data: {error}", "body") from None
    if not parts.is_complete:
        raise RequestError(f"the form ends without its last boundary, after {len(body)} bytes", "body")
    fields: dict[str, list[bytes]] = {}
    for name, content in parts.found:
        fields.setdefault(name, []).append(content)
    return fields
