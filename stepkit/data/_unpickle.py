"""Pickles of plain values and numpy arrays, read without Python's machine for pickles.

That machine calls what a file names and rebuilds what a file points at; guards on the names do not
make it safe. Here a file only moves values about, and this module makes arrays of its bytes.
"""

import math
import pickletools
import re

import numpy as np

from stepkit._checks import require

MOST_STEPS = 2**21  # opcodes, each of which makes one object at most: 7 times pyannot.pkl
PLAIN = "containers, numbers, text and numpy arrays of these"
_VALUE = re.compile("(SHORT_)?(BIN)?(INT|LONG|FLOAT|STRING|BYTES|UNICODE)[1248]?")
_CONSTANT = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY = {"EMPTY_LIST": list, "LIST": list, "EMPTY_DICT": dict, "DICT": dict}
# what numpy names for a dtype, the class of an array, an array, a number
_NUMPY = re.compile(r"numpy (dtype|ndarray)|numpy\._?core\.multiarray (_reconstruct|scalar)")


class _Name(str):
    """One of the names of numpy: never the object that it names."""


class _Type:
    """A dtype of fixed size; to state it anew leaves alone the arrays made before."""

    def __init__(self, code, *_):
        fits = re.fullmatch(r"[<>|=]?([ui][1248]|f[248]|b1|U\d{1,4})", code)
        require(bool(fits), "pickle", f"dtype {code[:20]!r}", PLAIN)
        self.value = np.dtype(code)

    def build(self, state):
        plain = state[1] in ("<", ">", "|", "=") and all(part is None for part in state[2:5])
        require(plain, "pickle", "a dtype with fields", PLAIN)
        self.value = self.value.newbyteorder(state[1])
        return self


class _Array:
    """An array whose shape, type and bytes are yet to come."""

    value = None

    def build(self, state):
        _, shape, dtype, fortran, data = state
        self.value = _array(shape, dtype.value, data, "F" if fortran else "C")
        return self.value


def _array(shape, dtype, data, order="C") -> np.ndarray:
    data = data.encode("latin1") if isinstance(data, str) else data  # Python 2 wrote text
    fits = len(shape) <= 4 and all(type(side) is int and 0 <= side < 2**31 for side in shape)
    size = math.prod(shape) * dtype.itemsize if fits else -1
    require(len(data) == size, "pickle", f"an array of {len(data)} bytes", f"{size}, by its shape")
    return np.ndarray(shape, dtype, data, order=order)  # a view that cannot be written to


def unpickle(data: bytes):
    """Return what a pickle holds: containers, numbers, text, and numpy arrays of these.

    Dicts have keys of text; arrays are read-only. What is shared in the file is shared here: who
    goes over all of it needs a bound.

    Raises
    ------
    ValueError
        The file asks for anything else, which is named; it has more than two million steps.
    LookupError, TypeError, AttributeError, OverflowError
        It is damaged.
    """
    stack, marks, memo = [], [], {}
    for at, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        require(at < MOST_STEPS, "pickle", "more steps", f"at most {MOST_STEPS}")
        _step(opcode.name, argument, stack, marks, memo)
    return stack[-1]


def _step(name: str, argument, stack: list, marks: list, memo: dict) -> None:
    """Do what one opcode says with the stack, the places marked on it, and the memo."""

    def take(n: int) -> list:
        return [stack.pop() for _ in range(n)][::-1]

    def marked() -> list:
        return take(len(stack) - marks.pop())

    if _VALUE.fullmatch(name):
        stack.append(argument)
    elif name in _CONSTANT:
        stack.append(_CONSTANT[name])
    elif name in _EMPTY:
        stack.append(_filled(_EMPTY[name](), marked() if name in ("LIST", "DICT") else []))
    elif name == "MARK":
        marks.append(len(stack))
    elif name == "POP":
        stack.pop()
    elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
        stack.append(tuple(take(int(name[5:])) if name[5:] else marked()))
    elif name in ("APPEND", "SETITEM", "APPENDS", "SETITEMS"):
        added = marked() if name[-1] == "S" else take(1 if name == "APPEND" else 2)
        _filled(stack[-1], added)
    elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
        memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
    elif name in ("GET", "BINGET", "LONG_BINGET"):
        found = memo[argument]
        stack.append(found.value if type(found) is _Array else found)
    elif name in ("GLOBAL", "STACK_GLOBAL"):
        asked = argument or " ".join(take(2))
        known = _NUMPY.fullmatch(asked)
        require(bool(known), "pickle", asked.replace(" ", "."), PLAIN)
        stack.append(_Name(known[1] or known[2]))
    elif name == "REDUCE":
        stack.append(_called(*take(2)))
    elif name == "BUILD":
        made, state = take(2)
        stack.append(made.build(state))
    else:
        require(name in ("PROTO", "FRAME", "STOP"), "pickle", f"opcode {name}", PLAIN)


def _filled(container: list | dict, added: list) -> list | dict:
    if type(container) is list:
        container += added
        return container
    keyed = type(container) is dict and all(type(key) is str for key in added[::2])
    require(keyed, "pickle", "what is no dict with keys of text", PLAIN)
    container.update(zip(added[::2], added[1::2], strict=True))
    return container


def _called(name: _Name, given: tuple):
    require(type(name) is _Name, "pickle", f"a call of a {type(name).__name__}", PLAIN)
    if name == "dtype":
        return _Type(*given)
    if name == "scalar":
        return _array((), given[0].value, given[1]).item()
    require(name == "_reconstruct", "pickle", f"a call of {name}", PLAIN)
    return _Array()
