"""The environment variables: what each means, set and unset."""

from pathlib import Path

import pytest

from timm_halonet import environment


@pytest.mark.parametrize(
    ("function", "variable", "unset", "values"),
    [
        (environment.backend, "TIMM_HALONET_BACKEND", None, {"blocked": "blocked", "": None}),
        (environment.native_allowed, "TIMM_HALONET_NATIVE", True, {"0": False, "1": True, "": True}),
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
