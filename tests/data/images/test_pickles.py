"""Pickles: arrays in plain containers come back, and nothing else is built, let alone run."""

from __future__ import annotations

import builtins
import codecs
import ctypes
import functools
import io
import operator
import os
import pickle
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fomal.data.images.pickles import load_pickle

ARRAYS = {
    "images": np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3),
    "column-major": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "strided": np.arange(24, dtype=np.int16).reshape(4, 6)[::2, ::-3],
    "other byte order": np.arange(5, dtype=">i4"),
    "text": np.array(["a", "bcé"]),
    "bytes": np.array([b"a", b"\xff\x00b"]),
    "bools": np.array([True, False]),
    "complex": np.array([1 + 2j], np.complex64),
    "halves": np.linspace(0, 1, 5, dtype=np.float16),
    "none": np.empty((0, 84, 84, 3), np.uint8),
    "no axes": np.array(2.5),
}


def load(content: bytes) -> Any:
    return load_pickle(io.BytesIO(content))


# -- what is read


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
def test_arrays_come_back_as_pickle_itself_gives_them(array: np.ndarray, protocol: int) -> None:
    content = pickle.dumps({"image_data": [array, array]}, protocol)
    expected, found = (reader(content)["image_data"][1] for reader in (pickle.loads, load))
    assert isinstance(found, np.ndarray)
    assert (found.dtype, found.shape) == (expected.dtype, array.shape)
    np.testing.assert_array_equal(found, array)
    assert found.flags.f_contiguous == expected.flags.f_contiguous


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_containers_come_back(protocol: int) -> None:
    content = {
        "class_dict": OrderedDict(n02=[3, 1], n01=(2,)),
        "sets": [{1, 2}, frozenset("ab"), set()],
        "numbers": (None, True, -1, 10**30, 1.5, 2j, np.float32(0.5), np.int64(-7), np.bool_(True)),
        "text": ["é\n", "", b"", b"\x00\xff", np.str_("é")],
    }
    assert load(pickle.dumps(content, protocol)) == content


# As Python 2 and numpy 1.16 write {'image_data': an array, 'class_dict': {'n01': [0, 1]}}.
_STATE = rb"I00" + b"\nS'" + rb"\x00\xff\n\x80\\A" + b"'\ntb"
PYTHON_2 = {
    0: b"(dp0\nS'image_data'\np1\ncnumpy.core.multiarray\n_reconstruct\np2\n(cnumpy\nndarray\np3\n(I0\ntp4\nS'b'\np5\n"
    b"tp6\nRp7\n(I1\n(I2\nI3\ntp8\ncnumpy\ndtype\np9\n(S'u1'\np10\nI0\nI1\ntp11\nRp12\n(I3\nS'|'\np13\nNNNI-1\nI-1\nI0\n"
    b"tp14\nb" + _STATE + b"sS'class_dict'\np16\n(dp17\nS'n01'\np18\n(lp19\nI0\naI1\nass.",
    2: b"\x80\x02}q\x00(U\nimage_dataq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85"
    b"q\x04U\x01bq\x05\x87q\x06Rq\x07(K\x01K\x02K\x03\x86q\x08cnumpy\ndtype\nq\tU\x02u1q\nK\x00K\x01\x87q\x0bRq\x0c(K\x03"
    b"U\x01|q\rNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x0eb\x89U\x06\x00\xff\n\x80\\Aq\x0ftq\x10bU\nclass_dictq\x11"
    b"}q\x12U\x03n01q\x13]q\x14(K\x00K\x01esu.",
}


@pytest.mark.parametrize("content", PYTHON_2.values(), ids=PYTHON_2)
def test_a_pickle_of_python_2_is_read(content: bytes) -> None:
    found = load(content)
    np.testing.assert_array_equal(found.pop("image_data"), np.frombuffer(b"\x00\xff\n\x80\\A", np.uint8).reshape(2, 3))
    assert found == {"class_dict": {"n01": [0, 1]}}


# -- what is refused


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Callable, tuple[Any, ...]]:
        return self.call


def hostile(folder: Path) -> dict[str, tuple[Any, str]]:
    """Objects that would do harm, and what they are refused for."""
    target, code = str(folder / "done"), f"open({str(folder / 'done')!r}, 'w')"
    return {
        "os.system": (Call(os.system, f"touch {target}"), "system"),
        "eval": (Call(eval, code), "eval"),
        "exec": (Call(exec, code), "exec"),
        "open": (Call(open, target, "w"), "open"),
        "getattr": (Call(getattr, 1, "real"), "getattr"),
        "import": (Call(builtins.__import__, "antigravity"), "__import__"),
        "subprocess": (Call(subprocess.Popen, ["touch", target]), "Popen"),
        "numpy.load": (Call(np.load, target), "load"),
        "numpy.memmap": (Call(np.memmap, target, "u1", "w+", 0, (1,)), "memmap"),
        "partial": (functools.partial(os.system, f"touch {target}"), "partial"),
        "operator": (Call(operator.attrgetter, "system"), "attrgetter"),
        "codecs": (Call(codecs.open, target, "w"), "codecs.open"),
        "bytearray": (Call(bytearray, 10), "bytearray"),
        "Path": (folder, "PosixPath"),
        "defaultdict": (defaultdict(list), "defaultdict"),
        "Counter": (Counter("a"), "Counter"),
        "a class": (Call, "Call"),
        "a function": (load_pickle, "load_pickle"),
        "an array of objects": (np.array([1, None, Call(os.system, f"touch {target}")]), "dtype 'O8|system"),
        "a record array": (np.zeros(2, [("a", "u1"), ("b", "f8")]), "dtype 'V9"),
        "times": (np.zeros(2, "M8[s]"), "dtype 'M8"),
    }


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("case", hostile(Path()))
def test_nothing_else_is_built_or_run(case: str, protocol: int, tmp_path: Path) -> None:
    payload, refused = hostile(tmp_path)[case]
    content = pickle.dumps({"image_data": ARRAYS["images"], "class_dict": payload}, protocol)
    with pytest.raises(pickle.UnpicklingError, match=f"^it (refers to|has an array of) .*({refused})'?, but only"):
        load(content)
    assert not list(tmp_path.iterdir())
    assert "antigravity" not in sys.modules


def global_(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    return b"V" + value.encode("raw-unicode-escape") + b"\n"


ARRAY = global_("numpy.core.multiarray", "_reconstruct") + b"(" + global_("numpy", "ndarray") + b"(I0\nt" + text("b")
ARRAY += b"tR"
DTYPE = global_("numpy", "dtype") + b"(" + text("u1") + b"I0\nI1\ntR"
SIX = text("abcdef") + text("latin1")
PLAIN = b"(I3\n" + text("|") + b"NNNI-1\nI-1\nI0\ntb"  # the state of a dtype
FIELDS = b"(I3\n" + text("|") + b"N(" + text("a") + b"t(" + text("a") + b"(" + DTYPE + b"I800000000\ntdI-1\nI-1\nI0\ntb"
SIX_BYTES = global_("_codecs", "encode") + b"(" + SIX + b"tR"
CRAFTED = {
    # numpy.ndarray((1,), "O", bytes): numpy itself takes the bytes for the address of an object.
    "numpy's constructor": global_("numpy", "ndarray") + b"((I1\nt" + text("u1") + SIX_BYTES + b"tR.",
    "addresses": global_("numpy", "ndarray") + b"((I1\nt" + text("O") + SIX_BYTES + b"tR.",
    "a dtype as text": ARRAY + b"(I1\n(I1\nt" + text("O") + b"I00\n" + SIX_BYTES + b"tb.",
    "a dtype of objects": global_("numpy", "dtype") + b"(" + text("O8") + b"I0\nI1\ntR.",
    "fields of a dtype": global_("numpy", "dtype") + b"(" + text("u1,O") + b"I0\nI1\ntR.",
    "too few bytes": ARRAY + b"(I1\n(I7\nt" + DTYPE + PLAIN + b"I00\n" + SIX_BYTES + b"tb.",
    "a huge array": ARRAY + b"(I1\n(I999999999999\nt" + DTYPE + PLAIN + b"I00\n" + SIX_BYTES + b"tb.",
    "a huge text": global_("numpy", "dtype") + b"(" + text("U99999999999") + b"I0\nI1\ntR.",
    "an order of bytes": DTYPE + b"(I3\n" + text("O") + b"NNNI-1\nI-1\nI0\ntb.",
    "a buffer as objects": global_("numpy.core.numeric", "_frombuffer") + b"(" + SIX_BYTES + text("O") + b"(I1\nttR.",
    "a codec": global_("_codecs", "encode") + b"(" + text("a") + text("zlib") + b"tR.",
    "another encoding": global_("_codecs", "encode") + b"(" + text("a") + text("idna") + b"tR.",
    "zeros": global_("builtins", "bytes") + b"(I9999999999\ntR.",
    "a call of an array": ARRAY + b"(tR.",
    "an attribute of a class": global_("collections", "OrderedDict") + b"(N}" + text("get") + b"Nstb.",
    "an attribute of a function": global_("numpy", "dtype") + b"(N(" + text("__defaults__") + b"(tdtb.",
    "a persistent object": b"Pabc\n.",
    "an extension": b"\x82\x01.",
    "nothing on the stack": b"tR.",
}


@pytest.mark.parametrize("content", CRAFTED.values(), ids=CRAFTED)
def test_crafted_pickles_are_refused(content: bytes) -> None:
    with pytest.raises(pickle.UnpicklingError, match="^it |persistent"):
        load(content)
    np.testing.assert_array_equal(load(pickle.dumps(ARRAYS["images"])), ARRAYS["images"])  # the next one is well


def test_the_memory_of_arrays_is_their_own() -> None:
    """A dtype's fields, which may lie anywhere, are not taken over."""
    content = ARRAY + b"(I1\n(I6\nt" + DTYPE + FIELDS + b"I00\n" + SIX_BYTES + b"tb."
    found = load(content)
    assert found.dtype == np.uint8
    assert found.dtype.fields is None
    assert found.tobytes() == b"abcdef"
    assert ctypes.string_at(found.ctypes.data, 6) == b"abcdef"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_truncated_pickle_is_refused_wherever_it_ends(protocol: int) -> None:
    content = pickle.dumps({"image_data": ARRAYS["images"], "class_dict": {"n01": [0, 1]}}, protocol)
    for length in range(len(content)):
        with pytest.raises(pickle.UnpicklingError, match="."):
            load(content[:length])


def test_random_damage_raises_nothing_else() -> None:
    content = pickle.dumps({"image_data": ARRAYS["images"], "class_dict": {"n01": [0, 1]}, "x": {2.5}}, 2)
    rng, refused = np.random.default_rng(0), 0
    for _ in range(2000):
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] = rng.integers(256)
        try:
            load(bytes(damaged))
        except pickle.UnpicklingError:
            refused += 1
    assert refused > 200
