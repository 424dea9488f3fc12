"""Pickles of arrays, read without running what is in them."""

from __future__ import annotations

import _codecs
import pickle
from collections import OrderedDict
from importlib import import_module
from typing import Any, BinaryIO

import numpy as np

# What a pickle of arrays in plain containers refers to, under the names of numpy 1 and 2.
_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _codecs.encode,
}
for _core in ("numpy.core", "numpy._core"):
    for _module, _names in (("multiarray", ("_reconstruct", "scalar")), ("numeric", ("_frombuffer",))):
        for _name in _names:
            _ADMITTED[f"{_core}.{_module}", _name] = getattr(import_module(f"numpy._core.{_module}"), _name)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it refers to {module}.{name}, but only arrays in plain containers are read"
            ) from None


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
        raise pickle.UnpicklingError(f"it is damaged: {error}") from error
