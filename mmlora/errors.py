"""Every error this project raises on purpose: what, the value received, what is allowed.

A server maps `RequestError`, `MediaError` and `AdapterError` to 4xx answers; `ConfigError` stops start-up;
`ResolverError` may pass; `EngineDeadError` means that no request can be served any more.
"""


class MMLoRAError(Exception):
    """Base class of all errors raised on purpose."""


class ConfigError(MMLoRAError):
    """The engine cannot start with these options.

    Attributes:
        problems: all that is wrong, one by one.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class RequestError(MMLoRAError):
    """One request asks for something that cannot be done.

    Attributes:
        param: the field or argument at fault, where it is known.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class MediaError(RequestError):
    """Audio or image content cannot be used: undecodable, too large, or not matching the prompt."""


class MediaNotHeld(MediaError):
    """A uuid stands for no media item, or for none any more: it has to be sent again."""


class ConstraintError(RequestError):
    """A constraint on the output is malformed, too large or too complex; `param` names it."""


class AdapterError(RequestError):
    """An adapter cannot be used."""


class AdapterNotFound(AdapterError):
    """There is no adapter at the given path, Hub id or name."""


class AdapterMismatch(AdapterError):
    """The adapter does not fit the model: unknown modules, wrong shapes, unsupported options."""


class ResolverError(MMLoRAError):
    """Resolvers could not tell whether there is an adapter of a name: unreachable, too slow, or broken."""


class EngineDeadError(MMLoRAError):
    """The engine stopped after an internal failure and serves no further request."""
