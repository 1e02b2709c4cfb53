"""How large stepkit is: lines of code, the longest files and functions, the public names.

``python tools/size.py`` prints a table; blank lines, comments and docstrings are no code.
"""

import argparse
import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1] / "stepkit"
BUDGET, FILE, FUNCTION, NAMES = 6000, 350, 50, 30
QUIET = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def code(text: str) -> int:
    """Count the lines that hold code."""
    documented = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | FUNCTIONS) and ast.get_docstring(node):
            documented.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (*QUIET, tokenize.ENDMARKER):
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - documented)


def body(node: ast.AST) -> int:
    """Count a function's lines without its docstring."""
    length = node.end_lineno - node.lineno + 1
    if ast.get_docstring(node):
        length -= node.body[0].end_lineno - node.body[0].lineno + 1
    return length


def functions(text: str) -> dict[str, int]:
    """Return the length of each function, by its name and line."""
    found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, FUNCTIONS)]
    return {f"{node.name}:{node.lineno}": body(node) for node in found}


def public(text: str) -> list[str]:
    """Return the names of ``__all__``."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


def main() -> None:
    """Print the sizes, the largest first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", type=Path, help="files or folders; default: stepkit")
    wanted = parser.parse_args().paths or [ROOT]
    files = [f for p in wanted for f in ([p] if p.is_file() else sorted(p.rglob("*.py")))]
    texts = {file.resolve(): file.read_text("utf-8") for file in files}
    sizes = {file: (code(text), text.count("\n")) for file, text in texts.items()}
    for file, (of_code, of_all) in sorted(sizes.items(), key=lambda item: -item[1][0]):
        longest = max(functions(texts[file]).items(), key=lambda f: f[1], default=("", 0))
        mark = "  <- too long" if of_all > FILE or longest[1] > FUNCTION else ""
        where = file.relative_to(ROOT.parent) if file.is_relative_to(ROOT.parent) else file
        print(f"{of_code:5} {of_all:5}  {where}  ({longest[0]} {longest[1]}){mark}")
    print(f"{sum(s[0] for s in sizes.values()):5} lines of code, {BUDGET} at most in stepkit")
    print(f"{len(public((ROOT / '__init__.py').read_text('utf-8'))):5} names, {NAMES} at most")


if __name__ == "__main__":
    main()
