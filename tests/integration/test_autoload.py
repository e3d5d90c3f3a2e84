"""timm knows this package's models whatever is imported, in whatever order; each case is a fresh interpreter.

The interpreter is that of a virtual environment with this checkout's wheel installed, so that the entry points are
found as a user's installation has them and nothing depends on how the checkout itself is installed.
"""

import ast
import inspect
import os
import shutil
import subprocess
import sys
import textwrap
import venv
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
NOISE = {"PYTHONPATH", "PYTHONWARNINGS", "TIMM_HALONET_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"}
# every warning fails, except that PyTorch or Python may deprecate what timm uses
WARNINGS = ["-W", "error", "-W", "ignore::DeprecationWarning", "-W", "ignore::FutureWarning"]

CHECK = """
import sys, timm
for name in ("halonet_h0", "halonet_h1"):
    module = timm.model_entrypoint(name).__module__
    assert module == "timm_halonet.models.halonet", f"{name} is from {module}"
models = sys.modules["timm.models"]
assert type(models.__spec__.loader) is type(models.__loader__) is type(timm.__loader__)
left = [finder for finder in sys.meta_path if type(finder).__module__ == "timm_halonet._autoload"]
assert not left, left
print(sys.modules["timm_halonet"].__file__)
"""


ENTRY_POINT = "[torch.backends]\ntimm_halonet = _timm_halonet_autoload:install\n"

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

# as jaxtyping's and typeguard's `install_import_hook("timm")` have it: it finds timm's modules by itself, and asks none
HOOK = """
import sys
from importlib.machinery import PathFinder
class Hook:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "timm":
            return PathFinder.find_spec(name, path, target)
hook = Hook()
sys.meta_path.insert(0, hook)
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
assert timm_halonet.HaloNet.__module__ == "timm_halonet.models.halonet"
assert timm_halonet.HaloAttention.__module__.startswith("timm_halonet.layers")
assert timm_halonet.halo_attention.__module__.startswith("timm_halonet.ops")
""",
    "plugin's public name first": "from timm_halonet import HaloAttention",
    "plugin's model file first": "import timm_halonet.models.halonet",
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
    "an import hook that takes timm for itself, before": HOOK + "import torch, timm",
    "an import hook that takes timm for itself, after": "import torch" + HOOK + "import timm, timm_halonet",
    "an import hook, and the plugin before timm": "import torch" + HOOK + "import timm_halonet, timm",
    "an import hook, and a part of the plugin": "import torch" + HOOK + "import timm, timm_halonet.layers",
    "an import hook, and the plugin's public name": "import torch"
    + HOOK
    + "import timm; from timm_halonet import HaloNet",
    "an import hook while timm is imported": "import torch"
    + HOOK.replace("hook = ", "hook = timm_hook = ")
    + """
import timm
sys.meta_path.remove(timm_hook)
import timm_halonet
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


@pytest.mark.integration
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
    (info / "entry_points.txt").write_text(ENTRY_POINT)
    shutil.copy(ROOT / "_timm_halonet_autoload.py", tmp_path)
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


def broken(name, content):
    """A way to break an installation: a file of the package gets this content."""
    return lambda package: (package / name).write_bytes(content)


def no_files_but(package, kept=()):
    for path in sorted(package.rglob("*"), reverse=True):
        if path.name not in kept:
            path.unlink() if path.is_file() else path.rmdir()


def shadowed(package):
    shutil.rmtree(package)
    package.with_suffix(".py").write_text("print('another module of this name')")


BROKEN = {
    "hook: syntax error": broken("_autoload.py", b"def install(:"),
    "hook: null bytes": broken("_autoload.py", bytes(100)),
    "hook: not UTF-8": broken("_autoload.py", b"# \xff\xfe\n"),
    "hook: empty": broken("_autoload.py", b""),
    "hook: missing dependency": broken("_autoload.py", b"import no_such_module"),
    "hook: error at import": broken("_autoload.py", b"raise OSError('broken')"),
    "hook: error whose text fails": broken(
        "_autoload.py", b"class E(Exception):\n    def __str__(self): raise E\nraise E"
    ),
    "hook: exit at import": broken("_autoload.py", b"raise SystemExit(3)"),
    "hook: error when called": broken("_autoload.py", b"def install(): raise KeyError('x')"),
    "hook: exit when called": broken("_autoload.py", b"def install(): raise SystemExit"),
    "hook: needs an argument": broken("_autoload.py", b"def install(x): pass"),
    "hook: missing": lambda package: (package / "_autoload.py").unlink(),
    "hook: a folder": lambda package: ((package / "_autoload.py").unlink(), (package / "_autoload.py").mkdir()),
    "package: syntax error": broken("__init__.py", b"from timm_halonet import"),
    "package: error at import": broken("__init__.py", b"1 / 0"),
    "package: recursion": broken("__init__.py", b"def f(): f()\nf()"),
    "package: deleted": shutil.rmtree,
    "package: deleted but for the weights": lambda package: (no_files_but(package), (package / "hub_configs").mkdir()),
    "package: an empty file in its place": lambda package: (shutil.rmtree(package), package.touch()),
    "package: another of its name": shadowed,
}


@pytest.fixture
def small_copy(tmp_path):
    """The entry point and what it loads, in a folder of their own."""
    (tmp_path / "timm_halonet-0.1.0.dist-info").mkdir()
    (tmp_path / "timm_halonet-0.1.0.dist-info" / "METADATA").write_text("Name: timm_halonet\nVersion: 0.1.0\n")
    (tmp_path / "timm_halonet-0.1.0.dist-info" / "entry_points.txt").write_text(ENTRY_POINT)
    shutil.copy(ROOT / "_timm_halonet_autoload.py", tmp_path)
    (tmp_path / "timm_halonet").mkdir()
    for name in ("__init__.py", "_autoload.py", "_former.py"):
        shutil.copy(ROOT / "timm_halonet" / name, tmp_path / "timm_halonet")
    return tmp_path / "timm_halonet"


def import_torch(site, cwd, *options):
    """What PyTorch does with its plugins, in an interpreter that has nothing else; returns what it warned of.

    Raises AssertionError where PyTorch's import would have failed.
    """
    code = f"import sys, site\nsite.addsitedir({str(site)!r})\n" + textwrap.dedent(
        inspect.getsource(torch._import_device_backends)
    )
    end = "\n_import_device_backends()\nprint('timm_halonet' in sys.modules, type(sys.meta_path[0]).__module__)"
    env = {name: value for name, value in os.environ.items() if name not in NOISE}
    command = [sys.executable, "-S", *options, "-c", code + end]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-2:], done.stderr


def test_sound_installation_puts_up_the_hook_alone(small_copy):
    assert import_torch(small_copy.parent, "/") == (["False", "timm_halonet._autoload"], "")


@pytest.mark.parametrize("how", BROKEN)
def test_broken_installation_does_not_break_torch(small_copy, tmp_path, how):
    BROKEN[how](small_copy)
    for options in ([], ["-W", "error"], ["-W", "ignore"]):
        (_, hook), said = import_torch(small_copy.parent, tmp_path, *options)
        assert hook != "timm_halonet._autoload"
        if how != "hook: error whose text fails":
            assert ("timm_halonet is broken" in said) == (options != ["-W", "ignore"]), said


@pytest.mark.integration
def test_editable_install_whose_checkout_goes(tmp_path):
    pytest.importorskip("editables", reason="hatchling builds editable wheels with it")
    checkout, site = tmp_path / "checkout", tmp_path / "site"
    (checkout / "hub_configs").mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE", "_timm_halonet_autoload.py"):
        shutil.copy(ROOT / name, checkout)
    shutil.copytree(ROOT / "timm_halonet", checkout / "timm_halonet", ignore=shutil.ignore_patterns("__pycache__"))
    build = f"from hatchling.build import build_editable; print(build_editable({str(tmp_path)!r}))"
    wheel = run([sys.executable, "-c", build], checkout).split()[-1]
    shutil.unpack_archive(tmp_path / wheel, site, "zip")
    assert import_torch(site, tmp_path) == (["False", "timm_halonet._autoload"], "")
    shutil.rmtree(checkout)
    _, said = import_torch(site, tmp_path)
    assert "timm_halonet is broken" in said


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
