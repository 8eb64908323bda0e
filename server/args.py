"""`ServerArgs`: the options of the HTTP server, validated before anything is loaded."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Final

from mmlora.config import Groups
from mmlora.errors import ConfigError
from mmlora.server.openai.reasoning import PARSER_NAMES as REASONING_PARSERS
from mmlora.server.openai.tools.formats import PARSER_NAMES
from mmlora.utils.text import shorten

METRICS_PREFIX: Final = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
LOG_FORMATS: Final = ("text", "json")
_ORIGIN: Final = re.compile(r"[a-z][a-z0-9+.-]*://[^A-Z\s/?#@*]+")  # as browsers send it: lower case, without a path
_HOST_PATTERN: Final = re.compile(r"\*|(\*\.)?[^\s/?#@:*\[\]]+|\[?[0-9a-fA-F:.]*:[0-9a-fA-F:.]*\]?")
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
            ConfigError: it has neither form, or its JSON object lacks a field or has an unknown one.
        """
        shown = shorten(text, max_chars=400)
        if not text.lstrip().startswith("{"):
            name, equals, path = text.partition("=")
            if not (equals and name and path):
                raise ConfigError(f"{shown}: must be name=path or a JSON object")
            return cls(name, path)
        try:
            entry = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{shown}: not JSON: {error}") from None
        entry = {name: value for name, value in entry.items() if value is not None or name != "base_model_name"}
        allowed = [field.name for field in fields(cls)]
        if set(entry) - set(allowed) or not all(isinstance(value, str) and value for value in entry.values()):
            raise ConfigError(f"{shown}: allowed fields are {', '.join(allowed)}, each a non-empty string")
        if "name" not in entry or "path" not in entry:
            raise ConfigError(f"{shown}: a name and a path are required")
        return cls(**entry)


@dataclass(frozen=True)
class ServerArgs:
    """Options of the HTTP server.

    Args:
        host: address to listen on.
        port: port to listen on; 0 picks a free one.
        uds: path of a Unix domain socket to listen on instead of host and port.
        root_path: path prefix under which a reverse proxy serves this server.
        ssl_certfile: PEM file with the server's certificate chain; enables TLS.
        ssl_keyfile: PEM file with the private key, if it is not in ssl_certfile.
        ssl_ca_certs: CA bundle (PEM) used to verify client certificates.
        ssl_cert_reqs: client certificates: 0 not requested, 1 verified if sent, 2 required.
        api_key: one or more keys; clients must send one of them as bearer token. Without a key, no authentication.
        allowed_origins: web origins that may use the server from a browser (CORS), such as `https://chat.example`; `*`
            allows every origin; by default none.
        allowed_methods: methods that allowed origins may use; `*` allows all.
        allowed_headers: headers that allowed origins may send; `*` allows all.
        allow_credentials: allow cookies in requests from allowed origins.
        allowed_hosts: host names by which clients may address the server, against DNS rebinding: `llm.example`,
            `*.llm.example` for all subdomains, or `*` for all names. By default all, or only localhost on a loopback
            address without an API key.
        lora_modules: adapters to load at startup, each `name=path` or a JSON object with `name`, `path` and
            `base_model_name`.
        enable_auto_tool_choice: let the model decide whether to call a tool.
        tool_call_parser: format of the model's tool calls: auto (detected from its chat template), mistral,
            phi4_mini_json, granite, qwen3_coder, hermes or llama3_json.
        reasoning_parser: format of the model's reasoning: auto (detected from its chat template), none (reasoning is
            content), qwen3, deepseek_v3, glm45, olmo3, deepseek_r1, mistral, seed_oss or granite.
        max_request_bytes: maximum size of a request body in bytes.
        max_queued_requests: maximum number of open requests beyond the `max_num_seqs` that run; further requests get
            status 429.
        max_connections: maximum number of open connections; beyond it, the one that has been idle longest is closed.
        header_timeout: time limit for receiving the head of a request, in seconds.
        body_timeout: time limit for receiving the body of a request after its head, in seconds.
        request_timeout: time limit for a complete response, in seconds; by default none.
        write_timeout: seconds after which a client that does not read its response is disconnected.
        keep_alive_timeout: seconds after which an idle connection is closed.
        drain_timeout: seconds that open requests may take to finish during a graceful shutdown.
        uvicorn_log_level: minimum level of uvicorn's log and of the access log: critical, error, warning, info, debug
            or trace.
        log_format: text, or json (one object per line).
        log_requests: include prompts, and hashes and sizes of media, in the access log.
        metrics_prefix: part of the names in /metrics before the colon; `vllm` for dashboards and routers made for vLLM.
        otlp_traces_endpoint: URL of an OpenTelemetry collector that accepts OTLP over HTTP, such as
            http://localhost:4318/v1/traces; needs the extra `tracing`.

    Raises:
        ConfigError: with every invalid option.
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
    allowed_hosts: Sequence[str] = ()
    lora_modules: Sequence[LoRAModule] = ()
    enable_auto_tool_choice: bool = True
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
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
    metrics_prefix: str = "mmlora"
    otlp_traces_endpoint: str | None = None

    GROUPS: ClassVar[Groups] = {
        "network": "host port uds root_path ssl_certfile ssl_keyfile ssl_ca_certs ssl_cert_reqs",
        "security": "api_key allowed_origins allowed_methods allowed_headers allow_credentials allowed_hosts",
        "server limits": "max_request_bytes max_queued_requests max_connections header_timeout body_timeout "
        "request_timeout write_timeout keep_alive_timeout drain_timeout",
        "logging": "uvicorn_log_level log_format log_requests metrics_prefix otlp_traces_endpoint",
        "LoRA": "lora_modules",
        "tools": "enable_auto_tool_choice tool_call_parser reasoning_parser",
    }

    def __post_init__(self) -> None:
        problems = [*self._check_numbers(), *self._check_network(), *self._check_security()]
        if not METRICS_PREFIX.fullmatch(self.metrics_prefix):
            problems.append(
                f"metrics_prefix={self.metrics_prefix!r}: must consist of letters, digits and _, no digit first"
            )
        parsers = ("auto", *PARSER_NAMES)
        reasoning = ("auto", "none", *REASONING_PARSERS)
        choices = {
            "uvicorn_log_level": LOG_LEVELS,
            "log_format": LOG_FORMATS,
            "tool_call_parser": parsers,
            "reasoning_parser": reasoning,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                problems.append(f"{name}={getattr(self, name)!r}: must be one of {', '.join(allowed)}")
        if problems:
            raise ConfigError(*problems)

    @property
    def api_keys(self) -> tuple[str, ...]:
        """The API keys as a tuple."""
        return (self.api_key,) if isinstance(self.api_key, str) else tuple(self.api_key or ())

    def _check_numbers(self) -> Iterator[str]:
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

    def _check_network(self) -> Iterator[str]:
        if self.uds is not None and (self.host, self.port) != (ServerArgs.host, ServerArgs.port):
            yield f"uds={self.uds!r}: replaces host and port; leave them out"
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            yield f"root_path={self.root_path!r}: must begin with a slash and not end with one"
        if self.ssl_cert_reqs not in (0, 1, 2):
            yield f"ssl_cert_reqs={self.ssl_cert_reqs}: must be 0, 1 or 2"
        elif self.ssl_cert_reqs and self.ssl_ca_certs is None:
            yield f"ssl_cert_reqs={self.ssl_cert_reqs}: needs ssl_ca_certs"
        for name in ("ssl_keyfile", "ssl_ca_certs"):
            if getattr(self, name) is not None and self.ssl_certfile is None:
                yield f"{name}={getattr(self, name)!r}: needs ssl_certfile"

    def _check_security(self) -> Iterator[str]:
        if self.api_key is not None and not (self.api_keys and all(key.strip() for key in self.api_keys)):
            yield "api_key is empty; give a key, or leave it out to disable authentication"
        for name in ("allowed_methods", "allowed_headers", "allow_credentials"):
            if getattr(self, name) != getattr(ServerArgs, name) and not self.allowed_origins:
                yield f"{name}={getattr(self, name)!r}: needs allowed_origins"
        if self.allow_credentials and "*" in self.allowed_origins:
            yield "allow_credentials=True: needs explicit origins; '*' would expose cookies to every website"
        for origin in self.allowed_origins:
            if origin not in ("*", "null") and not _ORIGIN.fullmatch(origin):
                yield f"allowed_origins: {shorten(origin)} must be scheme://host or scheme://host:port, or '*' for all"
        for host in self.allowed_hosts:
            if not _HOST_PATTERN.fullmatch(host):
                yield f"allowed_hosts: {shorten(host)} must be a host name without scheme and port, or '*' for all"
