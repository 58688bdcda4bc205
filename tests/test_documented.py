"""Every public function is fully typed and documented: a docstring line, and a comment (docments) on each parameter and return."""
import ast
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = [p for p in sorted((ROOT / "eq").rglob("*.py")) if p.name not in ("__init__.py", "_modidx.py")]


def comments(text: str) -> dict[int, str]:
    "Line -> comment on it."
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {t.start[0]: t.string for t in tokens if t.type == tokenize.COMMENT}


def public(tree: ast.Module):
    "Public functions, and public methods of public classes, with their class."
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield None, node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for part in node.body:
                if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef) and (not part.name.startswith("_") or part.name == "__init__"):
                    yield node, part


def is_property(function: ast.FunctionDef) -> bool:
    "Its docstring says what it returns."
    return any("property" in ast.unparse(d) for d in function.decorator_list)


def noted(nodes: list, notes: dict[int, str]) -> set[str]:
    "Parameters of these functions that have a comment, or a help text."
    everything = [a for f in nodes for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs, f.args.vararg, f.args.kwarg) if a]
    helped = {a.arg for a in everything if a.annotation is not None and "help=" in ast.unparse(a.annotation)}  # an option of the command line
    return helped | {a.arg for a in everything if any(line in notes for line in range(a.lineno, (a.end_lineno or a.lineno) + 1))}


def faults(owner: ast.ClassDef | None, function: ast.FunctionDef, notes: dict[int, str]) -> list[str]:
    """What is missing.

    A method that a library's base class calls is documented there. A method may leave out what a sibling of its class says of a parameter
    with the same name, and what the protocol says that the class follows (the contract of its method's name).
    """
    found, args = [], function.args
    everything = [*args.posonlyargs, *args.args, *args.kwonlyargs, *[a for a in (args.vararg, args.kwarg) if a]]
    own = everything[1:] if owner is not None and everything and everything[0].arg in ("self", "cls") else everything
    inherited = owner is not None and bool(owner.bases) and function.name != "__init__"
    said = noted([function], notes) | (noted([p for p in owner.body if isinstance(p, ast.FunctionDef)], notes) if owner else set())
    if function.name != "__init__" and not inherited and not ast.get_docstring(function):
        found.append("no docstring")
    for arg in own:
        if arg.annotation is None and not inherited:
            found.append(f"{arg.arg} has no type")
        if not inherited and arg.arg not in said:
            found.append(f"{arg.arg} has no comment")
    nothing = isinstance(function.returns, ast.Constant) and function.returns.value is None
    if function.name == "__init__" or inherited or nothing or is_property(function):
        return found
    if function.returns is None:
        return [*found, "no return type"]
    yields_nothing = ast.unparse(function.returns) == "Iterator[None]"
    return found if yields_nothing or function.returns.end_lineno in notes else [*found, "the return has no comment"]


def protocol_methods() -> set[str]:
    "Methods that a Protocol of the package documents: whoever implements them need not repeat it."
    found = set()
    for module in MODULES:
        for node in ast.parse(module.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and any("Protocol" in ast.unparse(b) for b in node.bases):
                found |= {p.name for p in node.body if isinstance(p, ast.FunctionDef)}
    return found


PROTOCOL = protocol_methods()


@pytest.mark.parametrize("module", MODULES, ids=lambda p: str(p.relative_to(ROOT / "eq")))
def test_public_functions_are_typed_and_documented(module):
    text = module.read_text(encoding="utf-8")
    notes = comments(text)
    missing = []
    for owner, function in public(ast.parse(text)):
        name = f"{owner.name}.{function.name}" if owner else function.name
        if owner is None or function.name not in PROTOCOL:
            missing += [f"{name}: {fault}" for fault in faults(owner, function, notes)]
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("module", MODULES, ids=lambda p: str(p.relative_to(ROOT / "eq")))
def test_public_classes_and_modules_say_what_they_are(module):
    tree = ast.parse(module.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{module.name} has no docstring (the sentence under the notebook's title)"
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_the_check_sees_what_is_missing():
    text = 'def good(\n    a: int,  # a number\n) -> int:  # twice it\n    "Doubles."\n    return 2 * a\n\n\n'
    text += "def bad(a, b: int) -> int:\n    return a\n"
    (_, good), (_, bad) = public(ast.parse(text))
    assert faults(None, good, comments(text)) == []
    assert faults(None, bad, comments(text)) == ["no docstring", "a has no type", "a has no comment", "b has no comment", "the return has no comment"]
