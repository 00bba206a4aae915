"""Errors of libraries that read what others made."""

import contextlib
from collections.abc import Iterator

from olora_ray.common.errors import UserError, first_line


@contextlib.contextmanager
def foreign(what: str) -> Iterator[None]:
    """Raise whatever a library says of a model's files as the UserError `what: why`.

    These files decide which of the library's lines meets what it did not expect: no list of exceptions is complete.
    """
    try:
        yield
    except (UserError, ModuleNotFoundError):
        raise
    except Exception as error:
        raise UserError(f"{what}: {why(error)}") from None
    except BaseException as error:
        # A panic of the Rust code of tokenizers or safetensors is no Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what}: {why(error)}") from None


def why(error: BaseException) -> str:
    """Why a model does not load, in one line; of code that is not trusted, what to do."""
    if "trust_remote_code" in str(error):
        return (
            "it brings Python code of its own, which is not run; read that code, and if you trust it set"
            " model.trust_remote_code: true"
        )
    known = isinstance(error, OSError | ValueError | RuntimeError | ImportError)
    return first_line(error) if known else f"{type(error).__name__}: {first_line(error)}"
