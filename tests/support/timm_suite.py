"""timm's own per-model test suite, run on this package's models.

    python tests/timm_suite.py [NAME ...]

The suite is in timm's source distribution only. This module gets the one of the installed version (with pip, or from
the path in the environment variable TIMM_SDIST), puts its `tests/` and `pyproject.toml` into a temporary folder, so
that the installed timm is what they test, and runs them in a second Python with itself as a pytest plugin. The models
must be installed (`pip install -e .`): nothing here imports this package, the suite has to find them by their names.
"""

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

CHECKS = 11  # per architecture in timm 1.0.31, without those that need pretrained weights
PACKAGE = "timm_halonet"
TOKENS = ["eamlp_*"]  # their features are tokens, not maps: models that timm's suite lists by name as non-standard


class NoSourceDistribution(Exception):
    """timm's source distribution could not be had; the message has pip's reason."""


def registered() -> list[str]:
    """The names under which timm knows this package's architectures."""
    import timm

    return [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith(PACKAGE + ".")]


def source_distribution(folder: Path) -> Path:
    """The path of the installed timm's source distribution: TIMM_SDIST, or downloaded into `folder`."""
    from importlib.metadata import version

    given = os.environ.get("TIMM_SDIST")
    if given:
        if not Path(given).is_file():
            raise NoSourceDistribution(f"TIMM_SDIST={given} is no file")
        return Path(given)
    name = f"timm=={version('timm')}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "timm", name]
    pip = subprocess.run([*command, "-d", str(folder)], capture_output=True, text=True, check=False)
    archives = sorted(folder.glob("timm-*.tar.gz"))
    if pip.returncode or not archives:
        reason = (pip.stderr.strip() or "pip left no archive").splitlines()[-1]
        raise NoSourceDistribution(f"no source distribution of {name}: {reason}")
    return archives[0]


def prepare(folder: Path) -> None:
    """Put timm's tests/ and pyproject.toml, and nothing else of it, into `folder`."""
    with tempfile.TemporaryDirectory() as download, tarfile.open(source_distribution(Path(download))) as archive:
        for member in archive.getmembers():
            path = Path(*Path(member.name).parts[1:])  # without timm-<version>/
            if member.isfile() and (path.parts[:1] == ("tests",) or path == Path("pyproject.toml")):
                source = archive.extractfile(member)
                assert source is not None
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(source.read())
    if not (folder / "tests" / "test_models.py").is_file():
        raise NoSourceDistribution("the source distribution of timm has no tests/test_models.py")


def run(names: Sequence[str], quiet: bool = False) -> list[dict]:
    """Run the suite on these architectures.

    Returns:
        one {"model", "check", "outcome" (passed, skipped or failed), "reason", "seconds"} a check.

    Raises:
        NoSourceDistribution: see there.
        RuntimeError: pytest did not get as far as running the checks, with its output.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        report = folder / "report.json"
        env = {
            **os.environ,
            "TIMM_SUITE_NAMES": " ".join(names),
            "TIMM_SUITE_REPORT": str(report),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])),
        }
        for variable in ("PYTEST_ADDOPTS", "GITHUB_ACTIONS"):  # the second makes timm leave out checks
            env.pop(variable, None)
        # without timeouts: timm's are for its own machines, and some for models a tenth of the size of H7
        command = [sys.executable, "-m", "pytest", "-p", "timm_suite", "-p", "no:timeout", "-p", "no:cacheprovider"]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if quiet else {}
        command += ["-v", "--tb=short", "-W", "ignore", "tests/test_models.py"]
        done = subprocess.run(command, cwd=folder, env=env, text=True, check=False, **output)
        results = json.loads(report.read_text()) if report.is_file() else []
        if not results:
            raise RuntimeError(f"timm's suite did not run (pytest's exit code {done.returncode})\n{done.stdout or ''}")
        return results


def table(results: Sequence[dict]) -> str:
    """Passes, skips and failures of each architecture, and the reasons for what did not pass."""
    lines = [f"{'architecture':20} {'passed':>6} {'skipped':>7} {'failed':>6} {'seconds':>7}"]
    reasons = defaultdict(list)
    for model in dict.fromkeys(r["model"] for r in results):
        own = [r for r in results if r["model"] == model]
        count = Counter(r["outcome"] for r in own)
        seconds = sum(r["seconds"] for r in own)
        lines.append(f"{model:20} {count['passed']:6} {count['skipped']:7} {count['failed']:6} {seconds:7.0f}")
        for r in own:
            if r["outcome"] != "passed":
                reasons[r["outcome"], r["check"], r["reason"]].append(model)
    for (outcome, check, reason), models in reasons.items():
        lines.append(f"{outcome}: {check}: {reason} ({', '.join(models)})")
    return "\n".join(lines)


# ---- the pytest plugin, in the second Python ----

_results: list[dict] = []


def _names() -> list[str]:
    return os.environ.get("TIMM_SUITE_NAMES", "").split()


def _list_models(original, filter="", module="", *args, **kwargs):
    """timm.list_models for these architectures only, and for those in whatever file (module=) they are."""
    if "vit_*" in filter:  # the list of non-standard models
        filter = [*filter, *TOKENS]
    if "vit_*" in kwargs.get("exclude_filters", ()):
        kwargs["exclude_filters"] = [*kwargs["exclude_filters"], *TOKENS]
    found = original(filter, "", *args, **kwargs)
    return [name for name in found if name.partition(".")[0] in _names()]


def pytest_configure(config):
    if not _names():
        return  # not started by run()
    import timm

    unknown = set(_names()) - set(timm.list_models())
    assert not unknown, f"timm {timm.__version__} does not know {sorted(unknown)}"
    timm.list_models = partial(_list_models, timm.list_models)


def _model(item) -> str:
    """The architecture a check is about, or nothing."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    name = params.get("model_name", "")
    return name.partition(".")[0] if isinstance(name, str) else ""  # a check with no model left has a placeholder


def pytest_collection_modifyitems(config, items):
    if not _names():
        return
    kept = [item for item in items if _model(item) in _names()]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = sorted(kept, key=lambda item: _names().index(_model(item)))


def pytest_runtest_makereport(item, call):
    if not _names() or (call.when != "call" and call.excinfo is None):
        return
    outcome, reason = "passed", ""
    if call.excinfo is not None:
        # no network says nothing about the model; weights that are gone (HTTPError) do
        cause = call.excinfo.value.__cause__ or call.excinfo.value.__context__ or call.excinfo.value
        offline = "URLError" in (call.excinfo.typename, type(cause).__name__)
        outcome = "skipped" if offline or call.excinfo.typename == "Skipped" else "failed"
        text = str(call.excinfo.value).strip()
        reason = text.splitlines()[0] if text else call.excinfo.typename
    check = item.originalname.removeprefix("test_model_")
    _results.append(
        {"model": _model(item), "check": check, "outcome": outcome, "reason": reason, "seconds": call.duration}
    )


def pytest_sessionfinish(session):
    if _names():
        Path(os.environ["TIMM_SUITE_REPORT"]).write_text(json.dumps(_results))


def main(names: Sequence[str]) -> int:
    results = run(names or registered())
    print(table(results))
    return 1 if not results or any(r["outcome"] == "failed" for r in results) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
