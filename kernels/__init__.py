"""Operations with a plain reference and faster implementations of the same result, one module each."""

from .row_packing import pack_rows

__all__ = ["pack_rows"]
