"""Imports point one way, as CONTRIBUTING.md draws them; no private name crosses a module; no logic in an __init__;
public names have docstrings.
"""

import ast
from pathlib import Path

import pytest

import timm_halonet

PACKAGE = Path(timm_halonet.__file__).parent
# from the bottom up; what is not a folder is a module of the package itself
ORDER = [
    {"environment", "files"},
    {"ops"},
    {"layers"},
    {"weights_file"},
    {"config_file"},
    {"hub"},
    {"models"},
    {"families"},
    {"registry", "acceleration"},
    {"photos"},
    {"report"},
    {"checkpoints"},
    {"detection", "benchmark", "embedding"},
    {"cli"},
    {"__main__"},
]
# standard library only, and names that are loaded when they are used: test_autoload.py and test_former.py have them
FREE = {"_autoload", "_former", "__init__"}
LEVEL = {name: n for n, names in enumerate(ORDER) for name in names}
EXAMPLES = PACKAGE.parent / "docs" / "examples"
# methods that PyTorch, torchvision or timm define and document; subclasses only fill them in
KNOWN_METHODS = {"forward", "forward_features", "forward_head", "get_classifier", "init_weights", "extra_repr"}
KNOWN_METHODS |= {"make_params", "transform", "resize"}


def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name, parsed."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts)] = ast.parse(file.read_text(encoding="utf-8"))
    return found


MODULES = modules()


def imports(name: str) -> list[tuple[str, str]]:
    """(module of this package, imported name or "") of every import in a module, wherever it stands."""
    package = name.split(".")[:-1]
    found = []
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = [*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else [])]
            elif node.module and node.module.split(".")[0] == "timm_halonet":
                base = node.module.split(".")[1:]
            else:
                continue
            for alias in node.names:
                target = ".".join([*base, alias.name])
                is_module = target in MODULES or f"{target}.__init__" in MODULES
                found.append((target, "") if is_module else (".".join(base), alias.name))
        elif isinstance(node, ast.Import):
            found += [(a.name.partition(".")[2], "") for a in node.names if a.name.split(".")[0] == "timm_halonet"]
    return found


def room(name: str) -> str:
    return name.split(".")[0]


def test_every_module_has_its_place():
    assert {room(name) for name in MODULES} == set(LEVEL) | FREE


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) not in FREE])
def test_arrows_point_down(name):
    upward = [
        f"{name} -> {target}"
        for target, _ in imports(name)
        if target and room(target) != room(name) and LEVEL.get(room(target), -1) >= LEVEL[room(name)]
    ]
    assert not upward


@pytest.mark.parametrize("name", MODULES)
def test_no_private_name_crosses_a_module(name):
    crossing = [
        f"{name}: {target}.{imported}"
        for target, imported in imports(name)
        if imported.startswith("_") and not imported.startswith("__")
    ]
    assert not crossing


@pytest.mark.parametrize("name", [name for name in MODULES if name.endswith("__init__") and "." in name])
def test_no_logic_in_an_init(name):
    lazy = {"__getattr__", "__dir__"}  # names that load what they need when first used
    for node in MODULES[name].body:
        if isinstance(node, ast.FunctionDef):
            assert node.name in lazy
        else:
            assert isinstance(node, ast.Import | ast.ImportFrom | ast.Assign | ast.AnnAssign | ast.Expr | ast.If)


def test_no_circles():
    graph = {name: {t for t, _ in imports(name) if t in MODULES and t != name} for name in MODULES}
    graph |= {
        name: graph[name] | {f"{t}.__init__" for t, _ in imports(name) if f"{t}.__init__" in MODULES}
        for name in MODULES
    }
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in sorted(graph[name]):
                walk(target, (*path, name))
            done.add(name)

    for name in MODULES:
        if room(name) not in FREE:
            walk(name, ())


def test_the_environment_is_read_in_one_module():
    for name, tree in MODULES.items():
        if room(name) in {"environment", "_autoload"}:  # the second imports nothing
            continue
        used = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in ("environ", "getenv", "putenv")]
        assert not used, f"{name} line {used[0].lineno}"


def undocumented(trees: dict[str, ast.Module]) -> list[str]:
    """Public modules, functions, classes and methods without a docstring that begins with a sentence of its own.

    An override has the docstring of its base class.
    """

    def says(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> bool:
        return not (ast.get_docstring(node) or "Raises:").startswith(("Args:", "Returns:", "Raises:", "Of "))

    classes = {n.name: n for tree in trees.values() for n in tree.body if isinstance(n, ast.ClassDef)}

    def documented(owner: ast.ClassDef, method: str) -> bool:
        named = [n for n in owner.body if isinstance(n, ast.FunctionDef) and n.name == method]
        bases = [classes[b.id] for b in owner.bases if isinstance(b, ast.Name) and b.id in classes]
        return any(map(says, named)) or any(documented(base, method) for base in bases)

    found = [name for name, tree in trees.items() if not says(tree)]
    for name, tree in trees.items():
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            if not says(node):
                found.append(f"{name}.{node.name}")
            methods = [n.name for n in node.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]
            if isinstance(node, ast.ClassDef):
                own = dict.fromkeys(m for m in methods if m not in KNOWN_METHODS)
                found += [f"{name}.{node.name}.{method}" for method in own if not documented(node, method)]
    return found


def test_public_names_have_docstrings():
    kernels = "ops.triton_kernels"  # their callers in ops.triton are documented
    trees = {name: tree for name, tree in MODULES.items() if name != kernels}
    examples = sorted(EXAMPLES.rglob("*.py"))
    assert examples
    assert not undocumented(trees | {file.stem: ast.parse(file.read_text(encoding="utf-8")) for file in examples})


def test_a_missing_docstring_is_found():
    text = '"""A module."""\nclass A:\n    """Has one."""\n    def f(self): ...\n    def g(self): "g"\n'
    text += "class B(A):\n    def g(self): ...\n    def _h(self): ...\n    def forward(self): ...\n"
    text += "def f(): 'Raises: all'\ndef g(): 'Of f.'"
    assert undocumented({"a": ast.parse(text), "b": ast.parse("")}) == ["b", "a.A.f", "a.B", "a.f", "a.g"]


def test_a_wrong_arrow_is_found(monkeypatch):
    monkeypatch.setitem(MODULES, "ops.reference", ast.parse("def f():\n    from ..models import halonet"))
    with pytest.raises(AssertionError):
        test_arrows_point_down("ops.reference")
    monkeypatch.setitem(MODULES, "ops.blocked", ast.parse("from .options import _hidden"))
    with pytest.raises(AssertionError):
        test_no_private_name_crosses_a_module("ops.blocked")
    monkeypatch.setitem(MODULES, "ops.options", ast.parse("from . import blocked"))
    monkeypatch.setitem(MODULES, "ops.blocked", ast.parse("from . import options"))
    with pytest.raises(AssertionError):
        test_no_circles()
