"""The environment variables: what each means, set and unset."""

import ast
import re
from pathlib import Path

import pytest

from timm_halonet import environment

ROOT = Path(environment.__file__).parents[1]


@pytest.mark.parametrize(
    ("function", "variable", "unset", "values"),
    [
        (environment.backend, "TIMM_HALONET_BACKEND", None, {"blocked": "blocked", "": None}),
        (environment.native_allowed, "TIMM_HALONET_NATIVE", True, {"0": False, "1": True, "": True}),
        (environment.onnx_scan_allowed, "TIMM_HALONET_ONNX_SCAN", True, {"0": False, "1": True, "": True}),
        (environment.compiler, "CXX", None, {"clang++ -v": "clang++ -v", "": None}),
        (environment.compiler_flags, "TIMM_HALONET_CXXFLAGS", "", {"-O1": "-O1"}),
        (environment.cache_home, "XDG_CACHE_HOME", Path.home() / ".cache", {"/x": Path("/x")}),
        (environment.hub_organisation, "TIMM_HALONET_HUB_ORG", None, {"mirror": "mirror", "": None}),
        (environment.triton_interpreted, "TRITON_INTERPRET", False, {"1": True, "0": False}),
        (environment.local_rank, "LOCAL_RANK", 0, {"3": 3}),
    ],
)
def test_variables(function, variable, unset, values, monkeypatch):
    monkeypatch.delenv(variable, raising=False)
    assert function() == unset
    for value, expected in values.items():
        monkeypatch.setenv(variable, value)
        assert function() == expected


def test_world_size_counts_only_under_torchrun(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")  # as some schedulers leave it lying about
    assert environment.world_size() == 1
    monkeypatch.setenv("RANK", "0")
    assert environment.world_size() == 4


def variables_read(source: str) -> set[str]:
    """The names that are looked up in os.environ: by get(name), [name] or `name in`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "os.environ.get":
            found.add(ast.literal_eval(node.args[0]))
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            found.add(ast.literal_eval(node.slice))
        elif isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]) == "os.environ":
            found.add(ast.literal_eval(node.left))
    return found


def test_the_page_lists_every_variable():
    page = (ROOT / "docs" / "reference" / "environment.md").read_text(encoding="utf-8")
    _, own = page.split("## Read by this package")
    rows = [line.split("|")[1] for line in own.partition("## ")[0].splitlines() if line.startswith("| `")]
    listed = [name for cell in rows for name in re.findall("`([A-Z_]+)`", cell)]
    files = [Path(environment.__file__), ROOT / "_timm_halonet_autoload.py"]
    assert sorted(listed) == sorted(set().union(*(variables_read(file.read_text(encoding="utf-8")) for file in files)))
    assert "(docs/reference/environment.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_variable_that_is_read_is_found():
    text = "os.environ.get('A')\nif 'B' in os.environ: os.environ['C']\nother.get('D')"
    assert variables_read(text) == {"A", "B", "C"}
