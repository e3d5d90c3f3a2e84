"""timm's own per-model suite on a fast subset of the architectures; `python tests/timm_suite.py` runs it on all."""

import pytest

from ..support import timm_suite


def test_fast_subset():
    names = ["halonet_h0", "halonet_h3", "halonet_h4_conv12", "uhalonet_micro", "seresnet50_halo8", "eamlp_7"]
    try:
        results = timm_suite.run(names, quiet=True)
    except timm_suite.NoSourceDistribution as e:
        pytest.skip(str(e))
    print(timm_suite.table(results))
    assert [r for r in results if r["outcome"] == "failed"] == []
    for name in names:
        passed = [r for r in results if r["model"] == name and r["outcome"] == "passed"]
        pyramid = name != "eamlp_7"  # a token model, for which timm's suite has no check of feature pyramids
        assert len(passed) >= timm_suite.CHECKS - 1 + pyramid


def test_every_architecture_of_the_package_is_meant():
    assert len(timm_suite.registered()) == 30
    assert "halonet50ts" not in timm_suite.registered()
