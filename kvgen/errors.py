"""The only errors that a user sees. Each message is one line that names what is wrong and what to do."""


def in_one_line(error: Exception) -> str:
    """What the error of a library says, in its first line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


class KvgenError(Exception):
    """Base of every error that kvgen raises on purpose. `exit_code` is what the command line exits with."""

    exit_code = 1


def of_item(error: Exception) -> KvgenError:
    """The error of one item among many, whatever was raised while it was handled, so that the others can go on."""
    if isinstance(error, KvgenError):
        return error
    found = KvgenError(f"{type(error).__name__}: {in_one_line(error)}")
    found.__cause__ = error
    return found


class UsageError(KvgenError):
    """A value that the caller passed cannot be used: an empty prompt, a setting out of its range."""

    exit_code = 2


class ContextError(UsageError):
    """A prompt is longer than the context of the model."""


class NotFoundError(KvgenError):
    """A reference leads to no files: no such path, name or hub repository, or no network to fetch it."""


class CheckpointError(KvgenError):
    """A file of a checkpoint is damaged, incomplete or contradicts itself."""


class UnsupportedError(KvgenError):
    """A well-formed checkpoint or request needs something that kvgen does not implement."""


class CacheError(KvgenError):
    """A KV cache was asked for something that would make it wrong."""


class ModelError(KvgenError):
    """A model returned what no model should: not-a-number logits, or logits of a wrong shape."""
