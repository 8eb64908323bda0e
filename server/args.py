"""`ServerArgs`: every option of the server that is not the engine's, checked before anything is loaded."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Final

from mmlora.config import Groups
from mmlora.errors import ConfigError
from mmlora.server.openai.tools.formats import PARSER_NAMES
from mmlora.utils.text import shorten

LOG_FORMATS: Final = ("text", "json")
LOG_LEVELS: Final = ("critical", "error", "warning", "info", "debug", "trace")


@dataclass(frozen=True)
class LoRAModule:
    """One `--lora-modules` entry: `name=path`, or a JSON object with these fields."""

    name: str
    path: str
    base_model_name: str | None = None

    @classmethod
    def parse(cls, text: str) -> "LoRAModule":
        """Parse an entry of the command line.

        Raises:
            ConfigError: it has neither form.
        """
        if not text.lstrip().startswith("{"):
            name, equals, path = text.partition("=")
            if not (equals and name and path):
                raise ConfigError(f"{text!r}: an entry is name=path or a JSON object")
            return cls(name, path)
        try:
            entry = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{shorten(text, max_chars=400)}: not JSON: {error}") from None
        allowed = [field.name for field in fields(cls)]
        if not isinstance(entry, dict):
            raise ConfigError(f"{text!r}: an entry is name=path or a JSON object")
        entry = {name: value for name, value in entry.items() if value is not None or name != "base_model_name"}
        unknown = sorted(set(entry) - set(allowed))
        if unknown or not all(isinstance(value, str) and value for value in entry.values()):
            raise ConfigError(f"{text!r}: an entry holds {', '.join(allowed)}, each a non-empty string")
        if "name" not in entry or "path" not in entry:
            raise ConfigError(f"{text!r}: an entry needs a name and a path")
        return cls(**entry)


@dataclass(frozen=True)
class ServerArgs:
    """Options of the server that are not the engine's.

    Args:
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        uds: path of a Unix socket to listen on, in place of host and port.
        root_path: the prefix under which a reverse proxy serves this server.
        ssl_certfile: PEM chain of certificates; turns TLS on.
        ssl_keyfile: PEM key of the certificate, where it is not in the same file.
        ssl_ca_certs: PEM certificates of who may vouch for clients.
        ssl_cert_reqs: whether clients need a certificate: 0 no, 1 only a good one if they send any, 2 yes.
        api_key: keys, one of which clients must send as bearer token; without one everyone is let in.
        allowed_origins: sites whose pages may use the server from a browser, such as `https://chat.example`; `*` is
            every site, unset none.
        allowed_methods: methods that such pages may use; `*` is all.
        allowed_headers: headers that such pages may send; `*` is all.
        allow_credentials: let browsers send cookies of such pages, too.
        lora_modules: adapters to load at the start, each `name=path` or a JSON object with `name`, `path` and
            `base_model_name`.
        enable_auto_tool_choice: let the model choose whether it calls a tool.
        tool_call_parser: the format in which the model writes tool calls: auto (as its chat template says), mistral,
            phi4_mini_json, granite, qwen3_coder, hermes or llama3_json.
        max_request_bytes: largest body of a request, in bytes.
        max_queued_requests: requests that may be open beyond the `max_num_seqs` that run; further ones get 429.
        max_connections: connections that may be open; beyond them, the one that was idle longest is closed.
        header_timeout: seconds in which the head of a request must have come.
        body_timeout: seconds in which the body of a request must have come, from its head on.
        request_timeout: seconds in which an answer must be complete; by default it takes as long as it takes.
        write_timeout: seconds after which a client that reads nothing of its answer is disconnected.
        keep_alive_timeout: seconds that a connection without a request is kept.
        drain_timeout: seconds that open requests have to end when the server is told to stop.
        uvicorn_log_level: least level of the lines of uvicorn and of requests that are logged: critical, error,
            warning, info, debug or trace.
        log_format: of the log: text, or json, one object a line.
        log_requests: have the lines of requests hold prompts, and the hashes and sizes of media.
        otlp_traces_endpoint: URL of a collector that takes OpenTelemetry traces by OTLP over HTTP, such as
            http://localhost:4318/v1/traces; needs the extra `tracing`.

    Raises:
        ConfigError: every wrong option is named.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    root_path: str = ""
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_ca_certs: str | None = None
    ssl_cert_reqs: int = 0
    api_key: str | Sequence[str] | None = None
    allowed_origins: Sequence[str] = ()
    allowed_methods: Sequence[str] = ("*",)
    allowed_headers: Sequence[str] = ("*",)
    allow_credentials: bool = False
    lora_modules: Sequence[LoRAModule] = ()
    enable_auto_tool_choice: bool = True
    tool_call_parser: str = "auto"
    max_request_bytes: int = 128 * 2**20
    max_queued_requests: int = 1024
    max_connections: int = 4096
    header_timeout: float = 10.0
    body_timeout: float = 60.0
    request_timeout: float | None = None
    write_timeout: float = 60.0
    keep_alive_timeout: float = 65.0
    drain_timeout: float = 30.0
    uvicorn_log_level: str = "info"
    log_format: str = "text"
    log_requests: bool = False
    otlp_traces_endpoint: str | None = None

    GROUPS: ClassVar[Groups] = {
        "network": "host port uds root_path ssl_certfile ssl_keyfile ssl_ca_certs ssl_cert_reqs",
        "security": "api_key allowed_origins allowed_methods allowed_headers allow_credentials",
        "limits of the server": "max_request_bytes max_queued_requests max_connections header_timeout body_timeout "
        "request_timeout write_timeout keep_alive_timeout drain_timeout",
        "logging": "uvicorn_log_level log_format log_requests otlp_traces_endpoint",
        "LoRA": "lora_modules",
        "tools": "enable_auto_tool_choice tool_call_parser",
    }

    def __post_init__(self) -> None:
        problems = [*self._problems_of_numbers(), *self._problems_of_network(), *self._problems_of_security()]
        if self.uvicorn_log_level not in LOG_LEVELS:
            allowed = ", ".join(LOG_LEVELS)
            problems.append(f"uvicorn_log_level={self.uvicorn_log_level!r}: must be one of {allowed}")
        if self.log_format not in LOG_FORMATS:
            problems.append(f"log_format={self.log_format!r}: must be one of {', '.join(LOG_FORMATS)}")
        if self.tool_call_parser not in ("auto", *PARSER_NAMES):
            allowed = ", ".join(("auto", *PARSER_NAMES))
            problems.append(f"tool_call_parser={self.tool_call_parser!r}: must be one of {allowed}")
        if problems:
            raise ConfigError(*problems)

    @property
    def api_keys(self) -> tuple[str, ...]:
        """The keys, none of which is empty."""
        return (self.api_key,) if isinstance(self.api_key, str) else tuple(self.api_key or ())

    def _problems_of_numbers(self) -> Iterator[str]:
        if not 0 <= self.port <= 65535:
            yield f"port={self.port}: must be from 0 to 65535"
        for name in ("max_request_bytes", "max_connections"):
            if getattr(self, name) < 1:
                yield f"{name}={getattr(self, name)}: must be a positive integer"
        if self.max_queued_requests < 0:
            yield f"max_queued_requests={self.max_queued_requests}: must be 0 or more"
        for name in ("header", "body", "request", "write", "keep_alive", "drain"):
            value = getattr(self, f"{name}_timeout")
            if value is not None and not 0 < value < math.inf and not (name == "drain" and value == 0):
                yield f"{name}_timeout={value:g}: must be a positive number of seconds"

    def _problems_of_network(self) -> Iterator[str]:
        if self.uds is not None and (self.host, self.port) != (ServerArgs.host, ServerArgs.port):
            yield f"uds={self.uds!r}: takes the place of host and port; leave these out"
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            yield f"root_path={self.root_path!r}: must begin with a slash, and not end with one"
        if self.ssl_cert_reqs not in (0, 1, 2):
            yield f"ssl_cert_reqs={self.ssl_cert_reqs}: must be 0, 1 or 2"
        elif self.ssl_cert_reqs and self.ssl_ca_certs is None:
            yield f"ssl_cert_reqs={self.ssl_cert_reqs}: needs ssl_ca_certs"
        for name in ("ssl_keyfile", "ssl_ca_certs"):
            if getattr(self, name) is not None and self.ssl_certfile is None:
                yield f"{name}={getattr(self, name)!r}: needs ssl_certfile"

    def _problems_of_security(self) -> Iterator[str]:
        if self.api_key is not None and not (self.api_keys and all(key.strip() for key in self.api_keys)):
            yield "api_key is empty; give a key, or leave it out to let everyone in"
        for name in ("allowed_methods", "allowed_headers", "allow_credentials"):
            if getattr(self, name) != getattr(ServerArgs, name) and not self.allowed_origins:
                yield f"{name}={getattr(self, name)!r}: needs allowed_origins"
        if self.allow_credentials and "*" in self.allowed_origins:
            yield "allow_credentials=True: needs origins by name; '*' would let every site act for its visitors"
