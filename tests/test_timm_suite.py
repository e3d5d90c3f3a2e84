"""timm's own per-model suite on a fast subset of the architectures; `python tests/timm_suite.py` runs it on all."""

import pytest

from . import timm_suite


def test_fast_subset():
    names = ["halonet_h0", "halonet_h3", "halonet_h4_conv12", "uhalonet_micro"]
    try:
        results = timm_suite.run(names, quiet=True)
    except timm_suite.NoSourceDistribution as e:
        pytest.skip(str(e))
    print(timm_suite.table(results))
    assert [r for r in results if r["outcome"] == "failed"] == []
    for name in names:
        passed = [r for r in results if r["model"] == name and r["outcome"] == "passed"]
        assert len(passed) >= timm_suite.CHECKS


def test_every_architecture_of_the_package_is_meant():
    assert len(timm_suite.registered()) == 16
    assert "halonet50ts" not in timm_suite.registered()
