"""timm knows this package's models whatever is imported, in whatever order; each case is a fresh interpreter.

The interpreter is that of a virtual environment with this checkout's wheel installed, so that the entry points are
found as a user's installation has them and nothing depends on how the checkout itself is installed.
"""

import ast
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOISE = {"PYTHONPATH", "PYTHONWARNINGS", "TIMM_HALONET_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"}
# every warning fails, except that PyTorch or Python may deprecate what timm uses
WARNINGS = ["-W", "error", "-W", "ignore::DeprecationWarning", "-W", "ignore::FutureWarning"]

CHECK = """
import sys, timm
for name in ("halonet_h0", "halonet_h1"):
    module = timm.model_entrypoint(name).__module__
    assert module == "timm_halonet.registry.halonet", f"{name} is from {module}"
models = sys.modules["timm.models"]
assert type(models.__spec__.loader) is type(models.__loader__) is type(timm.__loader__)
left = [finder for finder in sys.meta_path if type(finder).__module__ == "timm_halonet._autoload"]
assert not left, left
print(sys.modules["timm_halonet"].__file__)
"""


WEIGHTS = """
import timm
model = timm.create_model("halonet_h0", pretrained=True)
print(model.pretrained_cfg["file"])
"""


def run(command, cwd, **env):
    """Run it away from the checkout, which must not be importable by accident; return what it printed."""
    clean = {name: value for name, value in os.environ.items() if name not in NOISE}
    done = subprocess.run(command, cwd=cwd, env={**clean, **env}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def make_venv(folder):
    """A virtual environment that sees this one's packages but processes none of its .pth files."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    site = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip()
    packages = [entry for entry in sys.path if entry.endswith("-packages")]
    Path(site, "test_environment.pth").write_text("\n".join(packages))
    return python


def pip_install(python, *arguments):
    options = ["--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-build-isolation"]
    run([sys.executable, "-m", "pip", "--python", python, "install", *options, *arguments], python.parent)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from the source distribution, so that this is whole too."""
    out = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT], out)
    assert list(out.glob("*.tar.gz"))
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    return make_venv(tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="module")
def python(tmp_path_factory, wheel):
    python = make_venv(tmp_path_factory.mktemp("installed"))
    pip_install(python, wheel)
    return python


WRAPT = """
import wrapt
seen = []
wrapt.register_post_import_hook(seen.append, "timm.models")
"""

ORDERS = {
    "unmodified script": """
import timm
assert type(timm.create_model("halonet_h0")).__name__ == "HaloNet"
import timm_halonet, timm_halonet.registry  # changes nothing
""",
    "from timm.models import": "from timm.models import is_model; assert is_model('halonet_h0')",
    # torch alone loads neither timm nor the models; an import already walking along sys.meta_path skips no finder
    "torch first": """
import sys, torch
assert not {"timm", "timm_halonet.registry", "timm_halonet.ops"} & set(sys.modules)
walk = iter(sys.meta_path)
ours, *others = sys.meta_path
assert next(walk) is ours and type(ours).__module__ == "timm_halonet._autoload"
import timm
assert list(walk) == others
""",
    "plugin first": """
import sys, timm_halonet
assert not {"torch", "timm", "timm_halonet.registry"} & set(sys.modules)
assert {"halo_attention", "HaloAttention", "HaloNet"} <= set(dir(timm_halonet))
assert not hasattr(timm_halonet, "no_such_name")
assert timm_halonet.HaloNet.__module__ == "timm_halonet.registry.halonet"
assert timm_halonet.HaloAttention.__module__.startswith("timm_halonet.layers")
assert timm_halonet.halo_attention.__module__.startswith("timm_halonet.ops")
""",
    "plugin's public name first": "from timm_halonet import HaloAttention",
    "plugin's model file first": "import timm_halonet.registry.halonet",
    "plugin's models as timm may load them one day": """
from importlib.metadata import entry_points
[point] = entry_points(group="timm.models", name="timm_halonet")
assert point.load().__name__ == "timm_halonet.registry"
""",
    "spec looked up beforehand": """
import importlib.util, timm.layers
assert importlib.util.find_spec("timm.models").loader.is_package("timm.models")
""",
    "failed, then retried": """
import sys
class Fail:
    def find_spec(self, name, path=None, target=None):
        if name == "timm.models.byobnet":
            raise ImportError("not the first time")
fail = Fail()
sys.meta_path.insert(0, fail)
try:
    import timm
except ImportError as error:
    assert "not the first time" in str(error)
else:
    raise AssertionError("the first import was to fail")
sys.meta_path.remove(fail)
""",
    "wrapt's hook before": WRAPT + "import timm; assert seen == [timm.models]",
    "wrapt's hook after": "import torch" + WRAPT + "import timm; assert seen == [timm.models]",
    "wrapt's hook behind": f"""
import sys, torch
{WRAPT}
sys.meta_path.insert(1, sys.meta_path.pop(0))
assert type(sys.meta_path[0]).__module__ == "timm_halonet._autoload"
import timm; assert seen == [timm.models]
""",
    "no triton": "import sys; sys.modules['triton'] = None",
    "threads": """
import sys, threading
sys.setswitchinterval(1e-5)
statements = ["import timm; timm.model_entrypoint('halonet_h0')", "import torch", "import timm_halonet"] * 4
barrier = threading.Barrier(len(statements))
failures = []
def work(statement):
    barrier.wait()
    try:
        exec(statement, {})
    except BaseException as error:
        failures.append((statement, error))
threads = [threading.Thread(target=work, args=(statement,)) for statement in statements]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert not failures, failures
""",
}


@pytest.mark.parametrize("order", ORDERS)
def test_models_are_registered_in_every_import_order(python, tmp_path, order):
    where = run([python, *WARNINGS, "-c", ORDERS[order] + CHECK], tmp_path)
    assert where.startswith(str(python.parents[1]))


def test_wheel_carries_weights(python, tmp_path):
    file = run([python, "-c", WEIGHTS], tmp_path, HF_HUB_OFFLINE="1").strip()
    assert file.startswith(str(python.parents[1]))
    assert (Path(file).parents[2] / "py.typed").is_file()


def test_isolated_interpreter(python, tmp_path):
    run([python, "-I", *WARNINGS, "-c", CHECK], tmp_path)


def test_spawn_and_fork_workers(python, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
import multiprocessing
def work(entrypoint=None):
    exec({CHECK!r}, {{}})
    return True
if __name__ == "__main__":
    import torch
    with multiprocessing.get_context("fork").Pool(1) as pool:  # with the hook still waiting
        assert pool.apply(work)
    import timm
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            assert pool.apply(work, [timm.model_entrypoint("halonet_h0")])  # unpickling imports the model file
            assert pool.apply(work)
""")
    run([python, *WARNINGS, script], tmp_path)


@pytest.mark.parametrize("switch", ["TIMM_HALONET_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"])
def test_opting_out_leaves_timm_alone_until_an_explicit_import(python, tmp_path, switch):
    script = """
import sys, timm
assert not [name for name in sys.modules if name.startswith("timm_halonet")]
assert not timm.is_model("halonet_h0")
assert timm.model_entrypoint("halonet_h1").__module__ == "timm.models.byoanet"
import timm_halonet
"""
    run([python, *WARNINGS, "-c", script + CHECK], tmp_path, **{switch: "0"})
    run([python, *WARNINGS, "-c", "import timm_halonet" + CHECK], tmp_path, **{switch: "0"})


@pytest.fixture
def copy(tmp_path):
    """A copy of the package, to be changed, with its entry point; found with PYTHONPATH."""
    info = tmp_path / "timm_halonet-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: timm_halonet\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ntimm_halonet = timm_halonet._autoload:install\n")
    return Path(shutil.copytree(ROOT / "timm_halonet", tmp_path / "timm_halonet"))


def test_room_that_imports_timm_may_come_first(bare_python, copy):
    """It is half-imported when timm.models has executed, and the models need it."""
    layers = copy / "layers" / "__init__.py"
    layers.write_text("import timm.layers\n" + layers.read_text())
    script = "import timm_halonet.layers" + CHECK
    run([bare_python, *WARNINGS, "-c", script], copy.parent, PYTHONPATH=str(copy.parent))


def test_broken_model_file_only_warns(bare_python, copy):
    (copy / "models" / "halonet.py").write_text("raise OSError('broken on purpose')")
    script = """
import sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import timm
[warning] = [warning for warning in caught if "timm_halonet" in str(warning.message)]
assert warning.category is RuntimeWarning and "OSError: broken on purpose" in str(warning.message)
assert not [finder for finder in sys.meta_path if type(finder).__module__ == "timm_halonet._autoload"]
timm.create_model("resnet18", device="meta")
try:
    import timm_halonet.registry
except OSError:
    print("and says why when asked")
"""
    assert "says why" in run([bare_python, "-c", script], copy.parent, PYTHONPATH=str(copy.parent))


def test_editable_install(tmp_path):
    pytest.importorskip("editables", reason="hatchling builds editable wheels with it")
    python = make_venv(tmp_path / "venv")
    pip_install(python, "--editable", ROOT)
    where = run([python, *WARNINGS, "-c", CHECK], tmp_path)
    assert where.strip() == str(ROOT / "timm_halonet" / "__init__.py")
    assert run([python, "-c", WEIGHTS], tmp_path, HF_HUB_OFFLINE="1").startswith(str(ROOT / "hub_configs"))


def test_target_directory(bare_python, wheel, tmp_path):
    target = tmp_path / "target"
    pip_install(bare_python, "--target", target, wheel)
    where = run([bare_python, *WARNINGS, "-c", CHECK], tmp_path, PYTHONPATH=str(target))
    assert where.startswith(str(target))
    file = run([bare_python, "-c", WEIGHTS], tmp_path, PYTHONPATH=str(target), HF_HUB_OFFLINE="1")
    assert file.startswith(str(target))


def test_type_checkers_see_every_public_name():
    import timm_halonet

    tree = ast.parse(Path(timm_halonet.__file__).read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: line.module for line in block.body for alias in line.names}
    assert seen == timm_halonet._PUBLIC
