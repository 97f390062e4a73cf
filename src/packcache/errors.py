"""Errors a user can meet: one line each, with the value, the expectation and the way out."""


class PackCacheError(Exception):
    """Base of everything this package raises on purpose; the program exits with `exit_code`."""

    exit_code = 1


class InvalidSetting(PackCacheError, ValueError):
    """A setting, prompt or argument that cannot be used: wrong use, exit code 2."""

    exit_code = 2


class CacheStateError(PackCacheError, RuntimeError):
    """The cache was called out of order: a frame not open, a stale draft, a branch left out."""


class InputError(PackCacheError):
    """An input that was given does not fit: the model, the codec, or itself."""


class InputFileError(InputError):
    """A file that was given cannot be read as what it should be."""


class OutputError(PackCacheError):
    """A result cannot be written; nothing is left under the final name."""


class GenerationError(PackCacheError, RuntimeError):
    """The model produced something that cannot be used, such as NaN logits."""


def is_out_of_memory(reason: str) -> bool:
    """Does PyTorch say, on a GPU or on a CPU, that there is no more memory?"""
    return "out of memory" in reason or "can't allocate memory" in reason
