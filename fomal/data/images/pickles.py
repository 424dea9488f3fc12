"""Pickles of arrays, read without running what is in them."""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

# What a pickle of arrays in plain containers refers to, under the names of Python 2 and 3 and of numpy 1 and 2. Numpy's
# own constructors would trust what they are given: `ndarray((1,), "O", some_bytes)` takes bytes for addresses.
_ADMITTED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "ndarray"): None,  # an argument of _reconstruct
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encoded",
}
for _builtins in ("builtins", "__builtin__"):
    _ADMITTED |= {(_builtins, kind.__name__): kind for kind in (set, frozenset, complex)}
    _ADMITTED[_builtins, "bytes"] = "no_bytes"
for _core in ("numpy.core", "numpy._core"):
    _ADMITTED[f"{_core}.multiarray", "_reconstruct"] = "empty_array"
    _ADMITTED[f"{_core}.multiarray", "scalar"] = "scalar"
    _ADMITTED[f"{_core}.numeric", "_frombuffer"] = "array"

_PLAIN = re.compile(r"[<>|=]?([biufcSU]\d+)", re.ASCII)  # numpy's codes of numbers and text


class _DType:
    """A dtype that a pickle describes: kind and size from its code, the order of bytes from its state."""

    def __init__(self, code: str) -> None:
        self.plain = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        self.plain = self.plain.newbyteorder(state[1])


class _Array(np.ndarray[Any, Any]):
    """An array whose content follows it in the pickle."""

    def __setstate__(self, state: Any) -> None:
        version, shape, dtype, fortran, content = state
        super().__setstate__((version, shape, dtype.plain, fortran, content))


class _Unpickler(pickle._Unpickler):  # in Python: the one in C reserves what memory a damaged file asks for
    def find_class(self, module: str, name: str) -> Any:
        try:
            admitted = _ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it refers to {module}.{name}, but only arrays in plain containers are read"
            ) from None
        # Bound methods, because a pickle can set attributes of a class or function that it refers to.
        return getattr(self, admitted) if isinstance(admitted, str) else admitted

    def dtype(self, code: str, *_: Any) -> _DType:
        plain = _PLAIN.fullmatch(code)
        if plain is None:
            raise pickle.UnpicklingError(f"it has an array of dtype {code!r}, but only numbers and text are read")
        return _DType(plain[1])

    def empty_array(self, *_: Any) -> _Array:
        return _Array(0, np.uint8)

    def array(self, content: Any, dtype: _DType, shape: tuple[int, ...], order: Any) -> NDArray[Any]:
        return np.frombuffer(content, dtype.plain).reshape(shape, order=order)

    def scalar(self, dtype: _DType, content: Any) -> Any:
        content = content.encode("latin1") if isinstance(content, str) else content
        return np.frombuffer(content, dtype.plain, 1)[0]

    def encoded(self, text: str, encoding: str) -> bytes:
        if encoding not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError(f"it encodes as {encoding!r}, but bytes are pickled as latin1")
        return text.encode(encoding)

    def no_bytes(self) -> bytes:
        return b""


def load_pickle(file: BinaryIO) -> Any:
    """Read a pickle of arrays, numbers, text, lists, tuples, sets and dicts; also one of Python 2.

    Raises:
        pickle.UnpicklingError: it is damaged, or refers to anything else; nothing of it has been run.
    """
    try:
        return _Unpickler(file, encoding="latin1").load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # damaged pickles raise almost anything
        raise pickle.UnpicklingError(f"it is damaged: {str(error) or 'it ends too soon'}") from error
