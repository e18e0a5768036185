"""Tests stand by themselves: what they share is in modules of its own, and they see the package as a user does."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import rdsnet

TESTS = sorted(Path(__file__).parent.rglob("*.py"))
PACKAGE = sorted(Path(rdsnet.__file__).parent.rglob("*.py"))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("_")


def private_names(code: str) -> set[str]:
    """Of functions, classes, variables and attributes that this code makes."""
    made = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            made.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            made.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            made.add(node.attr)
    return {name for name in made if is_private(name)}


def imports(node: ast.AST) -> list[list[str]]:
    """The dotted names that a statement imports, each in its parts."""
    if isinstance(node, ast.Import):
        return [alias.name.split(".") for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [[*(node.module or "").split("."), alias.name] for alias in node.names]
    return []


def offences(code: str, private: set[str]) -> Iterator[str]:
    """Imports of another test, and what takes or patches a private name of the package."""
    for node in ast.walk(ast.parse(code)):
        for parts in imports(node):
            if any(part == "conftest" or part.startswith("test_") for part in parts[:2]):
                yield f"line {node.lineno}: import of another test: {'.'.join(parts)}"  # type: ignore[attr-defined]
            if parts[0] == "rdsnet" and any(map(is_private, parts)):
                yield f"line {node.lineno}: import of a private name: {'.'.join(parts)}"  # type: ignore[attr-defined]
        if isinstance(node, ast.Attribute) and node.attr in private:
            yield f"line {node.lineno}: private name {ast.unparse(node)}"
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("attr"):  # getattr, monkeypatch.setattr
            for text in (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)):
                if text.split(".")[-1] in private:
                    yield f"line {node.lineno}: private name {text!r}"


@pytest.fixture(scope="module")
def private() -> set[str]:
    return set().union(*(private_names(path.read_text()) for path in PACKAGE))


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_no_test_imports_another_or_looks_behind_a_public_name(path: Path, private: set[str]) -> None:
    assert list(offences(path.read_text(), private)) == []


@pytest.mark.parametrize(
    "code",
    [
        "from test_fcos import truth",
        "import conftest",
        "from tests.test_fcos import truth",
        "from rdsnet.model.mbrm import _near",
        "from rdsnet._hidden import near",
        "model._near(3)",
        "monkeypatch.setattr('rdsnet.model.mbrm._near', 3)",
        "getattr(model, '_near')",
    ],
)
def test_what_is_not_allowed_is_found(code: str) -> None:
    private = private_names("class Mine:\n    def _near(self): ...")
    assert private == {"_near"}
    assert len(list(offences(code, private))) == 1
    assert list(offences("import make\nsample._replace(x='near')\nfrom rdsnet.model.mbrm import near", private)) == []
