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
# what numpy names for a dtype, the class of an array, an array, a number
_NUMPY = re.compile(r"numpy (dtype|ndarray)|numpy\._?core\.multiarray (_reconstruct|scalar)")


class _Name(str):
    """One of the names of numpy: never the object that it names."""


class _Made:
    """What a call made: a dtype, which may be stated anew, or an array that is yet to come."""

    def __init__(self, value=None):
        self.value = value


def _name(asked: str, *more: str) -> _Name:
    asked = " ".join((asked, *more))
    known = _NUMPY.fullmatch(asked)
    require(bool(known), "pickle", asked.replace(" ", "."), PLAIN)
    return _Name(known[1] or known[2])


def _call(name, given: tuple):
    require(type(name) is _Name, "pickle", f"a call of a {type(name).__name__}", PLAIN)
    if name == "dtype":
        fits = re.fullmatch(r"[<>|=]?([ui][1248]|f[248]|b1|U\d{1,4})", given[0])
        require(bool(fits), "pickle", f"dtype {given[0][:20]!r}", PLAIN)
        return _Made(np.dtype(given[0]))
    if name == "scalar":
        return _array((), given[0].value, given[1]).item()
    require(name == "_reconstruct", "pickle", f"a call of {name}", PLAIN)
    return _Made()


def _build(made: _Made, state: tuple):
    """State a dtype anew, which leaves alone the arrays made before, or make an array."""
    if made.value is None:
        _, shape, dtype, fortran, data = state
        made.value = _array(shape, dtype.value, data, "F" if fortran else "C")
        return made.value
    plain = state[1] in ("<", ">", "|", "=") and all(part is None for part in state[2:5])
    require(plain, "pickle", "a dtype with fields", PLAIN)
    made.value = made.value.newbyteorder(state[1])
    return made


def _array(shape, dtype, data, order="C") -> np.ndarray:
    data = data.encode("latin1") if isinstance(data, str) else data  # Python 2 wrote text
    fits = len(shape) <= 4 and all(type(side) is int and 0 <= side < 2**31 for side in shape)
    size = math.prod(shape) * dtype.itemsize if fits else -1
    require(len(data) == size, "pickle", f"an array of {len(data)} bytes", f"{size}, by its shape")
    return np.ndarray(shape, dtype, data, order=order)  # a view that cannot be written to


def _fill(container: list | dict, *added) -> list | dict:
    if type(container) is list:
        container += added
        return container
    keyed = type(container) is dict and all(type(key) is str for key in added[::2])
    require(keyed, "pickle", "what is no dict with keys of text", PLAIN)
    container.update(zip(added[::2], added[1::2], strict=True))
    return container


# How many values an opcode takes (-1: those from the last mark on; -2: and the one before it), and
# what it makes of them.
_MAKES = {
    "NONE": (0, lambda: None),
    "NEWTRUE": (0, lambda: True),
    "NEWFALSE": (0, lambda: False),
    "EMPTY_TUPLE": (0, tuple),
    "EMPTY_LIST": (0, list),
    "EMPTY_DICT": (0, dict),
    "TUPLE": (-1, lambda *values: values),
    "TUPLE1": (1, lambda *values: values),
    "TUPLE2": (2, lambda *values: values),
    "TUPLE3": (3, lambda *values: values),
    "LIST": (-1, lambda *values: list(values)),
    "DICT": (-1, lambda *values: _fill({}, *values)),
    "APPEND": (2, _fill),
    "SETITEM": (3, _fill),
    "APPENDS": (-2, _fill),
    "SETITEMS": (-2, _fill),
    "STACK_GLOBAL": (2, _name),
    "REDUCE": (2, _call),
    "BUILD": (2, _build),
}


def unpickle(data: bytes):
    """Return what a pickle holds: containers, numbers, text, and numpy arrays of these.

    Dicts have keys of text; arrays are read-only. What is shared in the file is shared here: who
    goes over all of it needs a bound.

    Raises
    ------
    ValueError
        The file asks for anything else, which is named; it is damaged; it has more than two
        million steps.
    """
    stack, marks, memo = [], [], {}
    try:
        for at, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            require(at < MOST_STEPS, "pickle", "more steps", f"at most {MOST_STEPS}")
            _step(opcode.name, argument, stack, marks, memo)
        return stack[-1]
    except (LookupError, TypeError, AttributeError, OverflowError) as error:
        told = f"{type(error).__name__}: {error}"
        raise ValueError(f"pickle: got a damaged one ({told}), expected an intact one") from error


def _step(name: str, argument, stack: list, marks: list, memo: dict) -> None:
    """Do what one opcode says with the stack, the places marked on it, and the memo."""
    if name in _MAKES:
        n, make = _MAKES[name]
        first = len(stack) - n if n >= 0 else marks.pop() + 1 + n
        taken = [stack.pop() for _ in range(len(stack) - first)][::-1]  # too many: IndexError
        stack.append(make(*taken))
    elif _VALUE.fullmatch(name):
        stack.append(argument)
    elif name == "GLOBAL":
        stack.append(_name(argument))
    elif name == "MARK":
        marks.append(len(stack))
    elif name == "POP":
        stack.pop()
    elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
        memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
    elif name in ("GET", "BINGET", "LONG_BINGET"):
        found = memo[argument]
        built = isinstance(found, _Made) and isinstance(found.value, np.ndarray)
        stack.append(found.value if built else found)
    else:
        require(name in ("PROTO", "FRAME", "STOP"), "pickle", f"opcode {name}", PLAIN)
