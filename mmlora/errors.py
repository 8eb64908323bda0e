"""Exceptions of mmlora. Messages name the problem, the value received and what is allowed.

The server maps `RequestError` and its subclasses to 4xx responses. `ConfigError` aborts startup, `ResolverError` can be
temporary, and after `EngineDeadError` the engine must be restarted.
"""


class MMLoRAError(Exception):
    """Base class of all exceptions of mmlora."""


class ConfigError(MMLoRAError):
    """Options are invalid, or do not fit together or the model.

    Attributes:
        problems: one message per problem.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class RequestError(MMLoRAError, ValueError):
    """A request is invalid or not supported. It is a `ValueError`, too, which callers of vLLM catch.

    Attributes:
        param: name of the invalid field or argument, if known.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthExceeded(RequestError):
    """A prompt does not fit into the model's context.

    Clients recognize it by its code in HTTP error bodies, `context_length_exceeded`, and by the words "prompt is too
    long" and "maximum context length is … tokens".
    """


class MediaError(RequestError):
    """Audio or image content is undecodable, too large, or does not match the prompt."""


class MediaNotFound(MediaError):
    """The cache has no media item with the uuid, or has evicted it; the client must send the item again."""

    code = "media_not_held"  # in HTTP error bodies


class ConstraintError(RequestError):
    """A constraint on the output is malformed, too large or too complex; `param` names it."""


class AdapterError(RequestError):
    """An adapter cannot be loaded or used."""


class AdapterNotFound(AdapterError):
    """No adapter exists at the path, Hub id or name."""


class AdapterMismatch(AdapterError):
    """The adapter does not fit the model: unknown modules, wrong shapes, unsupported options."""


class RegistryError(AdapterError):
    """The file of the adapter registry cannot be read or written; nothing has changed.

    Attributes:
        reason: the message without the path of the file, which clients must not see.
        is_temporary: whether a later attempt may succeed: the file is locked, or its disk is full.
    """

    def __init__(self, message: str, reason: str, *, is_temporary: bool) -> None:
        super().__init__(message)
        self.reason = reason
        self.is_temporary = is_temporary


class ResolverError(MMLoRAError):
    """Resolvers failed to look up an adapter name: unreachable, too slow, or broken."""


class EngineInUseError(MMLoRAError):
    """A call would interfere with another one, comes from inside one, or was made after a fork."""


class EngineDeadError(MMLoRAError):
    """The engine stopped after an internal failure and accepts no further requests."""
