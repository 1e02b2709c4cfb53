"""One key for everything that is kept: a hash of all that it was made of.

`key` names each fact by what it *is*, never by where it lies: a tensor by its bytes, a function by
its code and by what that code reaches, a network by its tensors, its layers, their attributes, code
and hooks. Two facts of one name give the same answers; what cannot be named is refused, as it might
change unseen. docs/scale.md says what enters where.
"""

import copy
import copyreg
import dis
import functools
import hashlib
import json
import sys
import types
import weakref
from importlib import metadata
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from stepkit import __version__
from stepkit._files import fingerprint

__all__ = ["MAPS", "TRAINING", "data", "key", "library", "model", "name_of"]

_HERE = Path(__file__).parent
# as they are imported: an edit afterwards is not what runs
_SOURCES = {p.relative_to(_HERE).as_posix(): p.read_bytes() for p in sorted(_HERE.rglob("*.py"))}
_BELOW = ("models/", "networks.py", "prepare.py", "clips.py", "removal.py", "_kernels.py")
MAPS = ("attribution/", "_compiling.py", "_convolutions.py", *_BELOW)  # what a map depends on
TRAINING = ("training.py", "networks.py", "removal.py")
_OF_ANY_MODULE = vars(nn.Module()).keys() | {"_compiled_call_impl"}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def key(**facts) -> str:
    """Return the hash of facts, 64 hexadecimal digits; the order in which they come is no fact.

    Raises
    ------
    TypeError
        A fact that cannot be named; says which, and what to do.

    Examples
    --------
    >>> key(steps=20, rule="left") == key(rule="left", steps=20) != key(steps=20, rule="right")
    True
    """
    try:
        names = {name: name_of(value, name) for name, value in facts.items()}
    except RecursionError as error:
        _refuse(facts, ", ".join(facts), error)
    return _hash(names)


def model(network: nn.Module, tag: str = "") -> str:
    """Return the key of a network: its tensors and architecture, whatever mode it is in.

    All parameters and buffers enter by name; of every layer its class, attributes and hooks, and
    the code of classes that no installed package brings. With ``tag``, tensors, the classes' names
    and the tag alone: its giver answers for the rest.
    """
    if not tag:
        return key(model=network)
    layers = {name: type(part).__qualname__ for name, part in network.named_modules()}
    tensors = [dict(network.named_parameters()), dict(network.named_buffers())]
    return key(tag=tag, layers=layers, tensors=tensors)


@functools.lru_cache
def library(*parts: str) -> str:
    """Return versions, and a hash of the code in files of stepkit whose names begin with ``parts``.

    What comments and docstrings say does not count, nor do line numbers.
    """
    # compiled as with -OO; a hash of the syntax tree would take ten times as long
    codes = {
        name: compile(source, name, "exec", dont_inherit=True, optimize=2)
        for name, source in _SOURCES.items()
        if name.startswith(parts)
    }
    versions = f"stepkit {__version__}, {_package('torch')}, {_package('torchvision')}"
    return f"{versions}, {key(codes=codes)}"


def data(dataset) -> dict:
    """Return what a dataset is, as facts for a key.

    What its method ``facts`` says, if it has one and is of no class derived from that method's; or
    else a hash of all samples as they are in the first epoch: clip content, labels and ids.
    """
    kind = type(dataset)
    if "facts" in vars(kind) or (hasattr(kind, "facts") and _package(kind.__module__) == "stepkit"):
        return dataset.facts()
    first = copy.copy(dataset)
    if hasattr(first, "epoch"):
        first.epoch = 0
    samples = (first[i] for i in range(len(first)))
    return {
        "samples": _hash([[s.id, int(s.target), fingerprint({"clip": s.clip})] for s in samples])
    }


def name_of(value, where: str, seen: dict | None = None):
    """Return what ``value`` is, in terms that JSON knows; of what was ``seen``, its number."""
    seen = {} if seen is None else seen
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, bytes):
        return {"bytes": hashlib.sha256(value).hexdigest()}
    if isinstance(value, Tensor):
        return {"tensor": _tensor(value, where)}
    if isinstance(value, types.ModuleType):
        return {"module": [value.__name__, _package(value.__name__)]}
    if isinstance(value, list | tuple):
        return [name_of(part, f"{where}[{i}]", seen) for i, part in enumerate(value)]
    if isinstance(value, set | frozenset):  # its order is none: each as if it came first
        return {"set": sorted(json.dumps(name_of(part, where, dict(seen))) for part in value)}
    if isinstance(value, dict):
        keys = sorted(((json.dumps(name_of(k, where, seen)), k) for k in value), key=itemgetter(0))
        return {"dict": [[n, name_of(value[k], f"{where}[{k!r}]", seen)] for n, k in keys]}
    if id(value) in seen:
        return {"again": seen[id(value)][0]}
    seen[id(value)] = len(seen), value  # kept alive: no other object may get its address
    kind = next(kind for kind in _PARTS if isinstance(value, kind))
    parts = _PARTS[kind](value, where)
    return {kind.__name__: {n: name_of(parts[n], f"{where}.{n}", seen) for n in sorted(parts)}}


def _hash(names) -> str:
    return hashlib.sha256(json.dumps(names, sort_keys=True).encode()).hexdigest()


def _refuse(value, where: str, why=""):
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    why = f" ({' '.join(str(why).split())[:100]})" if str(why) else ""
    expected = (
        "plain values, tensors, functions, or what can be pickled; or tag='...', which stands"
    )
    told = f"{where}: got {kind}, which cannot be named{why}, expected {expected}"
    raise TypeError(f"{told} for what code and attributes of the model are") from None


def _tensor(tensor: Tensor, where: str) -> str:
    try:
        return fingerprint({"": tensor})
    except (RuntimeError, TypeError) as error:  # sparse, quantised, without content
        _refuse(tensor, where, error)


# --- what things consist of ---


def _layer(part: nn.Module, where: str) -> dict:
    """Take a network apart: tensors, layers, class, attributes, hooks, whether it is compiled."""
    if isinstance(part, torch.jit.ScriptModule):
        _refuse(part, where)
    package = _package(type(part).__module__)
    plain = {
        name: value
        for name, value in vars(part).items()
        # what layers of a package keep under such names follows from the rest
        if name not in _OF_ANY_MODULE and not (package and name.startswith("_"))
    }
    plain = {} if isinstance(part, OptimizedModule) else plain
    hooks = {kind: [*getattr(part, kind).values()] for kind in _HOOKS}
    own = {"(class)": type(part), "(hooks)": hooks, "(compiled)": bool(part._compiled_call_impl)}
    return plain | part._parameters | part._buffers | part._modules | own


def _class(kind: type, _) -> dict:
    """Take a class apart: of one's own its code, but for what it does before it has attributes."""
    if not _is_own(kind):
        return {"package": _package(kind.__module__), "name": str(kind)}
    code = types.FunctionType | staticmethod | classmethod | property
    members = {
        name: member
        for name, member in vars(kind).items()
        if isinstance(member, code) or not (name.startswith("__") or name == "_abc_impl")
    }
    if issubclass(kind, nn.Module):
        members.pop("__init__", None)
    return members | {"(name)": kind.__qualname__, "(bases)": kind.__bases__}


def _function(function: types.FunctionType, _) -> dict:
    """Take a function apart: code, defaults, what it encloses, and the globals that it reads."""
    code, own = function.__code__, [function.__defaults__, function.__kwdefaults__, vars(function)]
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    # a cell that is not filled yet equals an empty one
    parts = {n: None if cell == types.CellType() else cell.cell_contents for n, cell in cells}
    parts |= {"(code)": code, "(own)": own}
    if _is_own(function):
        return _globals(code, function.__globals__) | parts
    return parts | {"(package)": [_package(function.__module__), function.__module__]}


def _code(code: types.CodeType, _) -> dict:
    """Take compiled code apart, whatever its file and its line numbers."""
    takes = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
    names = code.co_qualname, code.co_names, code.co_varnames, code.co_freevars
    steps = code.co_code + code.co_exceptiontable
    return {"takes": takes, "names": names, "steps": steps, "constants": code.co_consts}


def _object(value, where: str) -> dict:
    """Take an object apart as pickle would: its class and its state."""
    if hasattr(value, "__wrapped__"):  # of functools.cache, of numba, a static method
        return {"(class)": type(value), "(wrapped)": value.__wrapped__}
    try:
        known = copyreg.dispatch_table.get(type(value))
        parts = known(value) if known else value.__reduce_ex__(4)
    except Exception as error:  # an object is free to refuse as it likes
        _refuse(value, where, error)
    if isinstance(parts, str):  # pickle would look it up under its name
        package = _package(getattr(value, "__module__", None) or type(value).__module__)
        return {"package": package, "name": parts} if package else _refuse(value, where)
    make, given, state, items, pairs = (*parts, None, None, None)[:5]
    return {"(made)": [make, given, list(items or ()), list(pairs or ())], "(state)": state}


_PARTS = {  # the first kind that fits
    nn.Module: _layer,
    type: _class,
    types.FunctionType: _function,
    types.MethodType: lambda method, _: {"self": method.__self__, "function": method.__func__},
    types.CodeType: _code,
    property: lambda member, _: {"get": member.fget, "set": member.fset},
    functools.cached_property: lambda member, _: {"get": member.func},
    weakref.ref: lambda link, _: {"to": link()},
    object: _object,
}


# --- whose code it is ---


def _package(module: str | None) -> str:
    """Return the package with which a module was installed; "" for code of one's own."""
    top = (module or "builtins").partition(".")[0]
    if top == "stepkit":
        return top  # `library` has its code
    if top in ("__main__", "__mp_main__"):  # whoever's file it was started from
        return ""
    return "python" if top in sys.stdlib_module_names else _installed(top)


@functools.lru_cache
def _installed(top: str) -> str:
    """Return a package with its version and a hash of the hashes of its files.

    PyTorch with its version: the same code is built for several devices.
    """
    file = getattr(sys.modules.get(top), "__file__", None) or ""
    if not {"site-packages", "dist-packages"} & set(Path(file).parts):
        return ""
    version = str(getattr(sys.modules[top], "__version__", "")).partition("+")[0]
    if top in ("torch", "torchvision"):
        return f"{top} {version}"
    names = metadata.packages_distributions().get(top, [])
    records = [metadata.distribution(name).read_text("RECORD") or "" for name in names]
    hashes = sorted(line for record in records for line in record.splitlines() if ".py," in line)
    return f"{top} {version} {_hash(hashes)[:16]}"


def _is_own(thing) -> bool:
    """Tell whether a class or function is no installed package's, or was made by one on the way."""
    if isinstance(thing, types.FunctionType) and thing.__module__ in (None, "builtins"):
        return True  # of `exec`
    package = _package(thing.__module__)
    return not package or ("<locals>" in thing.__qualname__ and package.startswith("torch"))


def _globals(code: types.CodeType, space: dict) -> dict:
    """Return the globals that code reads, and what it may read of modules of one's own."""
    parts, modules = [code], []
    for part in parts:  # which grows
        parts += [constant for constant in part.co_consts if isinstance(constant, types.CodeType)]
    steps = [step for part in parts for step in dis.get_instructions(part)]
    reads = {s.argval for s in steps if s.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    names = {name for part in parts for name in part.co_names}
    todo = [(name, space[name]) for name in reads & space.keys()]
    for path, value in todo:  # which grows
        if isinstance(value, types.ModuleType) and not _package(value.__name__):
            if value not in modules:
                todo += [(f"{path}.{n}", vars(value)[n]) for n in names & vars(value).keys()]
            modules.append(value)
    return dict(todo)
