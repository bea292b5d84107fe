"""The compiled module, where it could be imported, and why not where it could not."""

from __future__ import annotations

from typing import Any

C: Any = None
IMPORT_ERROR: ImportError | None = None
try:
    from . import _C as C
except ImportError as error:
    IMPORT_ERROR = error


def missing_reason() -> str | None:
    """Why nothing compiled can run; None where it can."""
    if C is None:
        return f"vpgtrans.kernels._C is not importable ({IMPORT_ERROR}); install the package again: pip install ."
    return None
