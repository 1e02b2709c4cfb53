"""One key for everything that is kept: a hash of all that it was made of.

`key` names each fact by what it *is*, never by where it lies: a tensor by its bytes, a function by
its code and by what that code reaches, a network by its tensors, its layers, their attributes, code
and hooks. Two facts of one name give the same answers; what cannot be named is refused, as it might
change unseen. docs/scale.md says what enters where.
"""

import copyreg
import dis
import functools
import hashlib
import json
import sys
import types
import weakref
from collections.abc import Iterator
from importlib import metadata
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from stepkit import __version__
from stepkit._files import fingerprint

_HERE = Path(__file__).parent
# as they are imported: an edit afterwards is not what runs
_SOURCES = {p.relative_to(_HERE).as_posix(): p.read_bytes() for p in sorted(_HERE.rglob("*.py"))}
_BELOW = ("models/", "networks.py", "prepare.py", "clips.py", "removal.py", "_kernels.py")
MAPS = ("attribution/", *_BELOW)  # what a map depends on
CURVES = (*MAPS, "metrics/curves.py")
TRAINING = ("training.py", "networks.py", "removal.py", "_kernels.py")
_OF_ANY_MODULE = vars(nn.Module()).keys() | {"_compiled_call_impl"}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_FUNCTIONS = types.FunctionType, types.BuiltinFunctionType, types.MethodType


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
    return hashlib.sha256(json.dumps(names, sort_keys=True).encode()).hexdigest()


def model(network: nn.Module, tag: str = "") -> str:
    """Return the key of a network: its tensors and architecture, whatever mode it is in.

    All parameters and buffers enter by name; of every layer its class, attributes and hooks, and
    the code of classes that no installed package brings, as far as ``forward`` reaches. With
    ``tag``, tensors, the classes' names and the tag alone: its giver answers for the rest.
    """
    if not tag:
        return key(model=network)
    layers = {name: type(part).__qualname__ for name, part in network.named_modules()}
    return key(tag=tag, layers=layers, tensors=_tensors(_inside(network), "model"))


@functools.lru_cache
def library(*parts: str) -> str:
    """Return versions, and a hash of the code in files of stepkit whose names begin with ``parts``.

    What comments and docstrings say does not count, nor do line numbers.
    """
    digest = hashlib.sha256()
    for name, source in _SOURCES.items():
        if name.startswith(parts):
            # compiled as with -OO; a hash of the syntax tree would take ten times as long
            code = _code(compile(source, name, "exec", dont_inherit=True, optimize=2), name, {})
            digest.update(json.dumps([name, code]).encode())
    versions = f"stepkit {__version__}, {_package('torch')}, {_package('torchvision')}"
    return f"{versions}, {digest.hexdigest()}"


def data(dataset) -> dict:
    """Return what a dataset is, as facts for a key.

    What its method ``facts`` says, if it has one and is of no class derived from that method's; or
    else a hash of all samples as they are in the first epoch: clip content, labels and ids.
    """
    kinds = type(dataset).__mro__
    owner = next((kind for kind in kinds if "facts" in vars(kind)), None)
    if owner and all(_package(k.__module__) == "stepkit" for k in kinds[: kinds.index(owner)]):
        return dataset.facts()
    digest, epoch = hashlib.sha256(), getattr(dataset, "epoch", None)
    try:
        if epoch:
            dataset.epoch = 0
        for i in range(len(dataset)):
            sample = dataset[i]
            facts = [sample.id, int(sample.target), fingerprint({"clip": sample.clip})]
            digest.update(json.dumps(facts).encode())
    finally:
        if epoch:
            dataset.epoch = epoch
    return {"samples": digest.hexdigest()}


def name_of(value, argument: str, seen: dict | None = None):
    """Return what ``value`` is, in terms that JSON knows; of what was ``seen``, its number."""
    seen = {} if seen is None else seen
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, bytes):
        return {"bytes": hashlib.sha256(value).hexdigest()}
    if isinstance(value, Tensor):
        return {"tensor": _tensors({"": value}, argument)}
    if isinstance(value, list | tuple):
        return [name_of(each, f"{argument}[{i}]", seen) for i, each in enumerate(value)]
    if isinstance(value, set | frozenset):  # its order is none: each as if it came first
        return {"set": sorted(json.dumps(name_of(v, argument, dict(seen))) for v in value)}
    if isinstance(value, dict):
        pairs = sorted(
            ((json.dumps(name_of(k, argument, seen)), k) for k in value), key=itemgetter(0)
        )
        return {"dict": [[k, name_of(value[at], f"{argument}[{at!r}]", seen)] for k, at in pairs]}
    if isinstance(value, types.ModuleType):
        return {"module": [value.__name__, _package(value.__name__)]}
    if isinstance(value, weakref.ref):
        return name_of(value(), argument, seen)
    if id(value) in seen:
        return {"again": seen[id(value)][0]}
    seen[id(value)] = len(seen), value  # kept alive: no other object may get its address
    if isinstance(value, nn.Module):
        return {"model": _model(value, argument, seen)}
    if isinstance(value, type):
        return {"class": _class(value, argument, seen)}
    if isinstance(value, _FUNCTIONS):
        return {"function": _function(value, argument, seen)}
    if callable(value) and hasattr(value, "__wrapped__"):  # of functools.cache, of numba
        return name_of(value.__wrapped__, argument, seen)
    return {"object": _pickled(value, argument, seen)}


def _refuse(value, argument: str, why=""):
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    why = f" ({' '.join(str(why).split())[:100]})" if str(why) else ""
    expected = (
        "plain values, tensors, functions, or what can be pickled; or tag='...', which stands"
    )
    told = f"{argument}: got {kind}, which cannot be named{why}, expected {expected}"
    raise TypeError(f"{told} for what code and attributes of the model are") from None


def _tensors(tensors: dict, argument: str) -> str:
    try:
        return fingerprint(tensors)
    except (RuntimeError, TypeError) as error:  # sparse, quantised, without content
        _refuse(next(iter(tensors.values())), argument, error)


def _pickled(value, argument: str, seen: dict):
    """Name an object by what pickle would keep of it: its class and its state."""
    try:
        known = copyreg.dispatch_table.get(type(value))
        parts = known(value) if known else value.__reduce_ex__(4)
    except Exception as error:  # an object is free to refuse as it likes
        _refuse(value, argument, error)
    if isinstance(parts, str):  # pickle would look it up under its name
        package = _package(getattr(value, "__module__", None) or type(value).__module__)
        return [package, parts] if package else _refuse(value, argument)
    make, given, state, items, pairs = (*parts, None, None, None)[:5]
    parts = make, given, state, list(items or ()), list(pairs or ())
    return [name_of(part, argument, seen) for part in parts]


# ---------------------------------------------------------------------------------------- networks


def _model(network: nn.Module, argument: str, seen: dict):
    parts = dict(network.named_modules(remove_duplicate=False))
    for part in parts.values():
        seen.setdefault(id(part), (len(seen), part))
    layers = {n: _layer(part, f"{argument}.{n}".strip("."), seen) for n, part in parts.items()}
    return [layers, _tensors(_inside(network), argument)]


def _inside(network: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers, under each of their names."""
    found = dict(network.named_parameters(remove_duplicate=False))
    return found | dict(network.named_buffers(remove_duplicate=False))


def _layer(part: nn.Module, argument: str, seen: dict):
    """Name one module without its children: class, attributes, hooks, whether it is compiled."""
    if isinstance(part, torch.jit.ScriptModule):
        _refuse(part, argument)
    package = _package(type(part).__module__)
    plain = {} if isinstance(part, OptimizedModule) else vars(part)
    plain = {
        name: value
        for name, value in sorted(plain.items())
        # what layers of a package keep under such names follows from the rest
        if name not in _OF_ANY_MODULE and not (package and name.startswith("_"))
    }
    hooks = [[*getattr(part, kind).values()] for kind in _HOOKS]
    return [
        _class(type(part), argument, seen, ["forward", "__call__", "__getattr__"]),
        {n: name_of(value, f"{argument}.{n}", seen) for n, value in plain.items()},
        name_of(hooks, f"{argument}, hooks", seen),
        part._compiled_call_impl is not None,
    ]


# -------------------------------------------------------------------------------------------- code


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
    texts = [metadata.distribution(name).read_text("RECORD") or "" for name in names]
    lines = [line for text in texts for line in sorted(text.splitlines()) if ".py," in line]
    return f"{top} {version} {hashlib.sha256(str(lines).encode()).hexdigest()[:16]}"


def _is_own(thing) -> bool:
    """Tell whether a class or function is no installed package's, or was made by one on the way."""
    if isinstance(thing, types.FunctionType) and thing.__module__ in (None, "builtins"):
        return True  # of `exec`
    package = _package(thing.__module__)
    return not package or ("<locals>" in thing.__qualname__ and package.startswith("torch"))


def _function(function, argument: str, seen: dict):
    """Name a function: its code, defaults and closure, and the globals that its code reads."""
    if isinstance(function, types.MethodType):
        own = name_of(function.__self__, argument, seen)
        return [name_of(function.__func__, argument, seen), own]
    if not isinstance(function, types.FunctionType):  # compiled C
        own = None if isinstance(function.__self__, types.ModuleType) else function.__self__
        return [function.__module__, function.__qualname__, name_of(own, argument, seen)]
    code = function.__code__
    values = {"defaults": function.__defaults__, "keywords": function.__kwdefaults__}
    values["attributes"] = {k: v for k, v in vars(function).items() if k != "__wrapped__"}
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    values |= {f"{name}, enclosed": _content(cell) for name, cell in cells}
    if own := _is_own(function):
        values |= _globals(code, function.__globals__)
    found = {n: name_of(value, f"{argument}: {n}", seen) for n, value in values.items()}
    where = [_package(function.__module__), function.__module__, *code.co_names]
    return [function.__qualname__, _code(code, argument, seen) if own else where, found]


def _content(cell):
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _code(code: types.CodeType, argument: str, seen: dict):
    """Name compiled code, whatever its file and its line numbers."""
    constants = [
        _code(c, argument, seen) if isinstance(c, types.CodeType) else name_of(c, argument, seen)
        for c in code.co_consts
    ]
    steps = hashlib.sha256(code.co_code + code.co_exceptiontable).hexdigest()
    takes = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
    return [code.co_name, steps, takes, constants, code.co_names, code.co_varnames]


def _all(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _all(constant)


def _globals(code: types.CodeType, space: dict) -> dict:
    """Return the globals that code reads, and what it may read of modules of one's own."""
    steps = [step for part in _all(code) for step in dis.get_instructions(part)]
    reads = sorted({s.argval for s in steps if s.opname in ("LOAD_GLOBAL", "LOAD_NAME")})
    names = sorted({name for part in _all(code) for name in part.co_names})
    todo, found = [(name, space[name]) for name in reads if name in space], {}
    for path, value in todo:  # which grows
        is_new = not any(value is known for known in found.values())
        found[path] = value
        if isinstance(value, types.ModuleType) and not _package(value.__name__) and is_new:
            todo += [(f"{path}.{n}", vars(value)[n]) for n in names if n in vars(value)]
    return found


def _class(kind: type, argument: str, seen: dict, roots: list[str] | None = None):
    """Name a class, and of code of one's own what is reached from the members ``roots``.

    By default all but what decorators generate.
    """
    own = [base for base in kind.__mro__ if _is_own(base)]
    for base in own:
        seen.setdefault(id(base), (len(seen), base))
    if roots is None:
        members = [(name, member) for base in own for name, member in vars(base).items()]
        roots = [name for name, member in members if _is_asked(name, member)]
    found, todo = {}, list(roots)
    while todo:
        name = todo.pop()
        for depth, base in enumerate(own):
            place = f"{depth} {name}"
            if name in vars(base) and place not in found:
                member = vars(base)[name]
                functions, found[place] = _functions(member), None
                asked = functions or member
                found[place] = name_of(asked, f"{argument}: {base.__qualname__}.{name}", seen)
                todo += [n for f in functions for part in _all(f.__code__) for n in part.co_names]
    line = [
        [base.__qualname__] if base in own else [_package(base.__module__), str(base)]
        for base in kind.__mro__
    ]
    return [line, found]


def _functions(member) -> list:
    """Return the functions that a member of a class stands for: a method, a property, ..."""
    inner = [getattr(member, name, None) for name in ("__func__", "fget", "fset", "func")]
    return [f for f in (member, *inner) if isinstance(f, types.FunctionType)]


def _is_asked(name: str, member) -> bool:
    functions = _functions(member)
    generated = any(function.__code__.co_filename == "<string>" for function in functions)
    return not generated if functions else not name.startswith("_")
