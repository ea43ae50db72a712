"""Troubleshooting has an entry for every error class and every warning, and quotes texts that the code still has."""

from __future__ import annotations

import ast
import inspect
import re

from tests.docs.blocks import ROOT
from weightferry import errors

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
NODES = [
    node
    for path in sorted((ROOT / "src" / "weightferry").rglob("*.py"))
    if "testing" not in path.parts  # the test Hub logs for those who write tests
    for node in ast.walk(ast.parse(path.read_text()))
]
# Stands for names and numbers: of an f-string in the code, of "%s" in a log call, of "..." on the page.
GAP = "\0"

_ERROR = re.compile(r"^### (\w+): (`.*`) \{#([\w-]+)\}$", re.MULTILINE)
_WARNING = re.compile(r"^### (`.*`) \{#[\w-]+\}$", re.MULTILINE)
_ITEM = re.compile(r"^- (``.*?``)(?=:\s)", re.MULTILINE | re.DOTALL)


def template(node: ast.AST) -> str:
    """Return the text of an expression, with a gap for everything that is not literal."""
    match node:
        case ast.Constant(value=str(text)):
            return re.sub(r"%(?:\.\d+)?[sdrf]", GAP, text)
        case ast.JoinedStr(values=parts):
            return "".join(template(part) for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return template(left) + template(right)
    return GAP


def logged_warnings() -> set[str]:
    """Return the texts of all calls that warn; `logger.log` is one that may."""
    found = set()
    for node in NODES:
        match node:
            case ast.Call(
                func=ast.Attribute(attr="warning" | "error" | "exception" | "critical", value=ast.Name(id="logger")),
                args=[text, *_],
            ):
                found.add(template(text))
            case ast.Call(func=ast.Attribute(attr="log", value=ast.Name(id="logger")), args=[_, text, *_]):
                found.add(template(text))
            case ast.Call(func=ast.Attribute(attr="warn", value=ast.Name(id="warnings")), args=[text, *_]):
                found.add(template(text))
    return found


def exact(code: str) -> str:
    """Return the text of the code that a code span shows, with its gaps."""
    marks = len(code) - len(code.lstrip("`"))
    return re.sub(r"\s+", " ", code[marks:-marks]).strip().replace("...", GAP)


def shown(code: str) -> re.Pattern[str]:
    """Return what matches the texts of the code that a code span shows; its gaps stand for any text, or none."""
    return re.compile(".*".join(re.escape(part) for part in exact(code).split(GAP)), re.DOTALL)


def test_every_error_class_has_an_entry() -> None:
    classes = {
        name
        for name, item in vars(errors).items()
        if inspect.isclass(item) and issubclass(item, Exception) and item.__module__ == errors.__name__
    }
    entries = {name: anchor for name, _, anchor in _ERROR.findall(PAGE)}
    assert len(classes) >= 16
    assert classes <= entries.keys(), f"no entry for {sorted(classes - entries.keys())}"
    defined = {node.name for node in NODES if isinstance(node, ast.ClassDef)}
    assert entries.keys() <= defined, f"entries for classes that do not exist: {sorted(entries.keys() - defined)}"
    assert all(anchor == name.lower() for name, anchor in entries.items())


def test_every_warning_has_an_entry() -> None:
    entries = {exact(code) for code in _WARNING.findall(PAGE)}
    logged = {re.sub(f"{GAP}+", GAP, text) for text in logged_warnings()}
    assert len(logged) >= 10
    assert entries == logged, f"no entry: {logged - entries}; not logged by the code: {entries - logged}"


def test_the_code_has_every_quoted_text() -> None:
    docstrings = {id(node.value) for node in NODES if isinstance(node, ast.Expr)}
    kinds = (ast.Constant, ast.JoinedStr, ast.BinOp)
    texts = {template(node) for node in NODES if isinstance(node, kinds) and id(node) not in docstrings}
    quoted = [code for _, code, _ in _ERROR.findall(PAGE)] + _ITEM.findall(PAGE)
    assert len(quoted) > 80
    items = sum(line.startswith("- ") for line in PAGE.splitlines())
    assert items == len(_ITEM.findall(PAGE)), "each item of a list begins with a quoted text"
    gone = [code for code in quoted if not any(shown(code).search(text) for text in texts)]
    assert not gone, "the code has no text like these:\n" + "\n".join(gone)
