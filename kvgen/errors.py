"""The errors that users see. Each message is one line: what is wrong, and what to do."""


def in_one_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


class KvgenError(Exception):
    """Base of all errors that kvgen raises on purpose. `exit_code` is the exit code of the command line."""

    exit_code = 1


def as_kvgen_error(error: Exception) -> KvgenError:
    """Return any error as a KvgenError, to report it for one item of many and continue with the others."""
    if isinstance(error, KvgenError):
        return error
    wrapped = KvgenError(f"{type(error).__name__}: {in_one_line(error)}")
    wrapped.__cause__ = error
    return wrapped


class UsageError(KvgenError):
    """An argument cannot be used: an empty prompt, a setting out of range. field: the setting, if it is one alone."""

    exit_code = 2

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class ContextError(UsageError):
    """A prompt is longer than the model's context."""


class NotFoundError(KvgenError):
    """No such path, model name or hub repository, or no network to download it."""


class CheckpointError(KvgenError):
    """A checkpoint file is damaged, incomplete or inconsistent."""


class UnsupportedError(KvgenError):
    """A valid checkpoint or request needs something that kvgen does not implement."""


class CacheError(KvgenError):
    """A KV cache does not fit, or was asked for something that would make it wrong."""


class CancelledError(KvgenError):
    """A request was cancelled before it was complete."""


class ServerError(KvgenError):
    """There is no server, or it ended during a request."""


class ModelError(KvgenError):
    """A model returned invalid logits: not a number, or of a wrong shape."""
