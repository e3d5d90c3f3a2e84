"""timm-halonet convert: from what authors publish to a folder that timm loads; and whatever can be wrong with it."""

import argparse
import gzip
import io
import json
import os
import pickle
import resource
import struct
import sys
import types
import zipfile

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from timm_halonet.checkpoints import convert as converting
from timm_halonet.cli import main
from timm_halonet.families.eamlp import eamlp

from ..families.test_eamlp_weights import official_state_dict


@pytest.fixture(scope="module")
def official():
    """Of eamlp_7, with the names of its authors and ten classes."""
    return official_state_dict("eamlp_7", classes=10)


@pytest.fixture
def source(official, tmp_path):
    path = tmp_path / "eamlp_7.pth.tar"
    torch.save({"epoch": 299, "arch": "EAMLP_7", "state_dict_ema": official, "args": argparse.Namespace(lr=1e-3)}, path)
    return path


@pytest.fixture
def small_images(monkeypatch):
    """The stored logits are of 32 px images: what is tested here is not their size, and 224 px take time."""
    cfg = {**eamlp._cfg(), "input_size": (3, 32, 32)}
    monkeypatch.setattr(eamlp, "_cfg", lambda: cfg)
    assert timm.create_model("eamlp_7", device="meta").pretrained_cfg["input_size"] == (3, 32, 32)


def run(source, folder, *more, model="eamlp_7"):
    return main(["convert", str(source), str(folder), "--model", model, *more])


def everything(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else None


# ---- what comes out ----------------------------------------------------------------------------------------------


@pytest.mark.integration
def test_folder_is_verified_and_loads(source, official, tmp_path, capsys):
    folder = tmp_path / "eamlp_7.authors"
    assert run(source, folder) == 0
    out = capsys.readouterr().out
    assert f"read: {len(official)} tensors of {source}, ['state_dict_ema']\n" in out
    assert out.endswith(f"written: {folder}\n")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir() if path not in (source, folder)] == []
    assert main(["verify", str(folder)]) == 0
    config = json.loads((folder / "config.json").read_text())
    assert (config["architecture"], config["num_classes"], len(config["sha256"])) == ("eamlp_7", 10, 64)
    assert config["check"]["input_size"] == config["pretrained_cfg"]["input_size"] == [3, 224, 224]
    assert len(config["check"]["logits"]) == 10

    x = torch.randn(1, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    overlay = dict(file=str(source), num_classes=10)
    with torch.inference_mode():
        expected = timm.create_model("eamlp_7", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10).eval()(
            x
        )
        local = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        torch.testing.assert_close(local(x), expected, atol=0, rtol=0)
        overlay = dict(file=str(folder / "model.safetensors"), num_classes=10)
        other = timm.create_model("eamlp_7", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10).eval()
        torch.testing.assert_close(other(x), expected, atol=0, rtol=0)
    assert timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=3, in_chans=1).num_classes == 3


@pytest.mark.parametrize("wrapper", ["net", "model", "state_dict", "model.state_dict", ""])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.module."])
def test_wrappers(official, wrapper, prefix):
    checkpoint = {prefix + name: x for name, x in official.items()}
    for key in reversed(wrapper.split(".") if wrapper else []):
        checkpoint = {key: checkpoint, "epoch": 3}
    state_dict, where = converting.unwrap(checkpoint)
    assert where == "".join(f"['{key}']" for key in wrapper.split(".") if key)
    assert state_dict.keys() == official.keys() and all(state_dict[k] is x for k, x in official.items())


def test_wrappers_within_a_model_and_around_some_names():
    one = torch.zeros(1)
    names = ["stages._orig_mod.0.a", "_orig_mod.b", "module.c", "d", "e._fsdp_wrapped_module._orig_mod.f"]
    assert list(converting.unwrap(dict.fromkeys(names, one))[0]) == ["stages.0.a", "b", "c", "d", "e.f"]
    assert list(converting.unwrap({"n_averaged": one, "module.a": one})[0]) == ["a"]  # swa_utils.AveragedModel
    assert list(converting.unwrap({"n_averaged": one, "a_orig_mod.b": one})[0]) == ["n_averaged", "a_orig_mod.b"]
    with pytest.raises(ValueError, match=r"two state dicts in one, in \['model'\]: a, module.a are the same names"):
        converting.unwrap({"model": {"a": one, "module.a": one}})


@pytest.mark.parametrize("path", [("model",), ("model", "state_dict"), ("state_dict", "model", "net")])
def test_a_checkpoint_that_refers_to_itself(tmp_path, path, capsys):
    state = inner = {}
    for key in path[:-1]:
        inner[key] = inner = {}
    inner[path[-1]] = state
    torch.save(state, tmp_path / "a.pth")
    assert run(tmp_path / "a.pth", tmp_path / "out") == 1
    err = capsys.readouterr().err
    assert "refers to itself" in err and f"[{path[0]!r}]" in err and err.count("\n") == 1


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("found", ["list", "names", "sparse", "quantized"])
def test_what_is_not_a_tensor_by_name_is_named(found):
    itself: list = []
    itself.append(itself)
    value = {
        "list": {"a": itself},
        "names": {1: torch.zeros(1), ("b",): torch.zeros(1)},
        "sparse": {"a": torch.eye(2).to_sparse()},
        "quantized": {"a": torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8)},
    }[found]
    expected = {"list": r"a \(list\)", "names": r"1 \(Tensor\)", "sparse": "sparse_coo", "quantized": "quantized"}[
        found
    ]
    with pytest.raises(ValueError, match=f"expected tensors by name.*found .*{expected}"):
        converting.unwrap({"state_dict": value})


def test_moving_average_goes_first():
    one, two = {"a": torch.zeros(1)}, {"a": torch.ones(1)}
    assert converting.unwrap({"model": one, "state_dict": one, "state_dict_ema": two})[0]["a"] == 1
    assert converting.unwrap({"model": two, "model_ema": None, "state_dict_ema": {}})[0]["a"] == 1


@pytest.mark.integration
def test_other_kinds_of_source(official, tmp_path, small_images):
    half = {name: x.half() for name, x in official.items()}
    save_file(half, tmp_path / "half.safetensors")
    assert run(tmp_path / "half.safetensors", tmp_path / "half") == 0
    with safe_open(tmp_path / "half" / "model.safetensors", "pt") as f:
        assert f.get_tensor("head.weight").dtype == torch.float16 and f.metadata() == {"format": "pt"}
    double = {name: x.double() for name, x in official.items()}
    shared = torch.cat([double["norm.weight"], double["norm.bias"]])  # two tensors in one memory
    double["norm.weight"], double["norm.bias"] = shared.view(2, -1)
    double["head.weight"] = double["head.weight"].t().contiguous().t()
    torch.save({"net": double}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert run(tmp_path / "old.pth", tmp_path / "double") == 0
    weights = load_file(tmp_path / "double" / "model.safetensors")
    assert torch.equal(weights["norm.bias"], official["norm.bias"])
    assert torch.equal(weights["head.weight"], official["head.weight"])
    # what it wrote is a source as well
    assert run(tmp_path / "double" / "model.safetensors", tmp_path / "again") == 0
    assert everything(tmp_path / "again") == everything(tmp_path / "double")


def test_architecture_whose_authors_have_no_other_names(tmp_path):
    torch.manual_seed(0)
    # in channels_last, which safetensors does not take
    weights = timm.create_model("halonet_h0", num_classes=4).to(memory_format=torch.channels_last).state_dict()
    assert not weights["stem.conv1.conv.weight"].is_contiguous()
    torch.save(weights, tmp_path / "a.pth")
    assert run(tmp_path / "a.pth", tmp_path / "a", model="halonet_h0") == 0
    written = load_file(tmp_path / "a" / "model.safetensors")
    assert written.keys() == weights.keys() and all(torch.equal(written[k], x) for k, x in weights.items())


@pytest.mark.parametrize("name", ["uhalonet_micro", "lesa_resnet50", "focal_transformer_tiny", "seresnet50_halo8"])
def test_filter_of_every_family_is_found_and_idempotent(name):
    filter_fn = converting._filter_fn(name)
    assert filter_fn is sys.modules[timm.model_entrypoint(name).__module__].checkpoint_filter_fn
    model = timm.create_model(name, device="meta")
    own = model.state_dict()
    assert {k: x.shape for k, x in filter_fn(own, model).items()} == {k: x.shape for k, x in own.items()}


# ---- what a pickle may hold --------------------------------------------------------------------------------------


class CfgNode(dict):
    """As yacs has it, which need not be installed."""

    def __init__(self, *args):
        super().__init__(*args)
        self.__dict__["__immutable__"] = True


@pytest.mark.parametrize("zipped", [True, False])
def test_options_beside_the_weights_are_ignored(tmp_path, monkeypatch, zipped):
    package, module = types.ModuleType("yacs"), types.ModuleType("yacs.config")
    module.CfgNode = CfgNode
    monkeypatch.setitem(sys.modules, "yacs", package)
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    monkeypatch.setattr(CfgNode, "__module__", "yacs.config")
    other = {
        "config": CfgNode({"TRAIN": CfgNode({"sizes": [1, 2]})}),
        "args": argparse.Namespace(lr=1e-3, output=None),
        "max_accuracy": np.float64(79.5),
    }
    weights = {"a": torch.arange(3)}
    torch.save({"model": weights, **other}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, "yacs.config")
    before = set(torch.serialization.get_safe_globals())
    checkpoint = converting.read_checkpoint(tmp_path / "a.pth")
    assert torch.equal(converting.unwrap(checkpoint)[0]["a"], weights["a"])
    assert not isinstance(checkpoint["args"], argparse.Namespace)
    assert set(torch.serialization.get_safe_globals()) == before  # and nothing of this lasts


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_pickle_is_executed(official, tmp_path, capsys, zipped):
    path = tmp_path / "evil.pth"
    state = {"model": official, "args": argparse.Namespace(), "more": Evil(tmp_path / "executed")}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    assert run(path, tmp_path / "out") == 1
    message = capsys.readouterr().err
    assert f"{os.mkdir.__module__}.mkdir" in message and "argparse.Namespace, yacs" in message
    assert "weights_only=False" in message
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()


# ---- what can be wrong -------------------------------------------------------------------------------------------


def test_wrong_tensors_are_named(official, tmp_path, capsys, small_images):
    without = {k: x for k, x in official.items() if not k.startswith("blocks.6.")}
    cases = {
        "16 missing: blocks.6.norm1.weight, blocks.6.norm1.bias, blocks.6.attn.q.weight": without,
        "1 unexpected: blocks.0.attn.gamma": {**official, "blocks.0.attn.gamma": torch.zeros(1)},
        "1 of another shape: norm.bias (255,), expected (256,)": {**official, "norm.bias": torch.zeros(255)},
        "norm.bias (256,): 256 values are NaN": {**official, "norm.bias": torch.full((256,), torch.nan)},
        "foreign state dict": {"layer1.0.conv1.weight": torch.zeros(1)},
        "expected tensors by name": {"epoch": 3, "weights": [1]},
        "found state_dict (dict)": {},
    }
    for message, state in cases.items():
        torch.save({"state_dict": state}, tmp_path / "a.pth")
        assert run(tmp_path / "a.pth", tmp_path / "out") == 1
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_a_filter_that_makes_up_tensors_is_found_out(tmp_path, capsys):
    """Of a plain SE-ResNet's weights, a hybrid keeps random attention; that is no conversion."""
    save_file(timm.create_model("seresnet50").state_dict(), tmp_path / "a.safetensors")
    assert run(tmp_path / "a.safetensors", tmp_path / "out", model="seresnet50_halo8") == 1
    assert "it has nothing for layer4." in capsys.readouterr().err


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 98765432\n"


def zipped(*names: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name in names:
            archive.writestr(name, "content")
    return data.getvalue()


def header(tensors: dict) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.pth", None, "none.pth does not exist"),
        ("text.pth", b"hello" * 100, "not a checkpoint but a text that begins with 'hellohello"),
        ("few.pth", b"hello", "not a checkpoint, or a broken one"),
        ("empty.pth", b"", "empty.pth is empty: 0 bytes"),
        ("empty.safetensors", b"", "empty.safetensors is empty: 0 bytes"),
        ("list.pth", [torch.zeros(1)], "holds a list, expected a dictionary"),
        ("text.safetensors", b"hello" * 100, "not a checkpoint but a text"),
        ("code.pth", pickle.dumps({"a": Evil("x")}), "not a checkpoint, or a broken one|mkdir"),
        ("page.pth", b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "page.pth .* a web page"),
        ("page.safetensors", b"<html>" + b" " * 5000, "page.safetensors .* a web page"),
        ("error.pth", b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a web page"),
        ("json.pth", b'{"error": "not found"}', "a JSON text that begins with"),
        ("lfs.pth", POINTER, "the pointer of Git LFS to a file of 98765432 bytes; run `git lfs pull`"),
        ("lfs.safetensors", POINTER, "the pointer of Git LFS to a file of 98765432 bytes"),
        ("other.pth", zipped("word/document.xml", "a.txt"), "a zip archive of word/document.xml, a.txt"),
        ("other.safetensors", zipped("a.txt"), "a zip archive of a.txt"),
        ("none.pth", zipped(), "a zip archive of nothing"),
        ("npz.pth", zipped("arr_0.npy"), "NumPy arrays"),
        ("jit.pth", zipped("m/data.pkl", "m/code/__torch__.py", "m/constants.pkl"), "a TorchScript program"),
        ("gone.pth", zipped("a/data.pkl")[:-30], "truncated or damaged"),
        ("packed.pth", gzip.compress(b"x" * 100), "a gzip archive; unpack it first"),
        ("tar.pth", b"a.pth".ljust(257, b"\0") + b"ustar\0" + bytes(300), "a tar archive; unpack it first"),
        ("keras.pth", b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file"),
        ("zeros.pth", bytes(5000), "begins with zeros"),
        ("zeros.safetensors", bytes(5000), "begins with zeros"),
        ("array.pth", b"\x93NUMPY\x01\x00v\x00", "a NumPy array"),
        ("photo.pth", b"\x89PNG\r\n\x1a\n" + bytes(100), "a PNG picture"),
        ("safe.pth", save({"a": torch.zeros(3)}), "a safetensors file under another name: give it the suffix .saf"),
        ("saved.safetensors", {"a": torch.zeros(3)}, "but one of torch.save or pickle: give it the suffix .pth"),
        ("pickle.safetensors", pickle.dumps({"a": 1}), "but one of torch.save or pickle"),
        ("deep.safetensors", struct.pack("<Q", 200_000) + b'{"a":' * 40_000, "not a safetensors file"),
        ("odd.safetensors", header({"a": {"dtype": "F32", "shape": [1], "data_offsets": []}}), "not JSON of tensors"),
        ("type.safetensors", header({"a": {"dtype": "X9", "shape": [], "data_offsets": [0, 0]}}), "is damaged"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",  # of bytes, some change with the second
)
def test_wrong_sources(name, content, message, tmp_path, capsys):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / name)
    with pytest.raises(ValueError, match=message):
        list(converting.convert(tmp_path / name, tmp_path / "out", "eamlp_7"))
    assert run(tmp_path / name, tmp_path / "out") == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(tmp_path / name) in err
    assert not (tmp_path / "out").exists()


def test_pipes_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a.pth is not a file"):
        converting.read_checkpoint(tmp_path / "a.pth")


def test_truncated_sources(source, tmp_path, capsys):
    whole = source.read_bytes()
    for size in (10, 1000, len(whole) // 2, len(whole) - 100):
        source.write_bytes(whole[:size])
        assert run(source, tmp_path / "out") == 1
        assert "eamlp_7.pth.tar is truncated or damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_wrong_architectures(source, tmp_path, capsys):
    for name in ("resnet50", "eamlp_8"):
        assert run(source, tmp_path / "out", model=name) == 1
        assert f"'{name}' is not an architecture of this package; it has halonet_h0, " in capsys.readouterr().err
    assert run(source, tmp_path / "out", model="uhalonet_micro") == 1
    assert "foreign state dict" in capsys.readouterr().err


@pytest.mark.integration
def test_never_overwrites(source, official, tmp_path, capsys, small_images):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    assert run(source, folder) == 0  # other files are nobody's business
    before = everything(folder)
    assert run(source, folder) == 1
    assert "model.safetensors and config.json already; --force" in capsys.readouterr().err
    assert everything(folder) == before
    torch.save({"net": {**official, "head.bias": official["head.bias"] + 1}}, source)
    assert run(source, folder, "--force") == 0
    assert main(["verify", str(folder)]) == 0
    after = everything(folder)
    assert after["README.md"] == b"mine" and after["model.safetensors"] != before["model.safetensors"]
    capsys.readouterr()
    for wrong, message in ((source, "is not a folder"), (tmp_path / "no" / "out", "there is no folder")):
        assert run(source, wrong, "--force") == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("there", [True, False])
def test_both_files_or_none(tmp_path, monkeypatch, there):
    """Where the second one cannot be moved the first one is taken back."""
    new, old = tmp_path / "new", tmp_path / "old"
    for folder, content in ((new, "new"), (old, "old")):
        folder.mkdir()
        for name in ("model.safetensors", "config.json") if there or folder is new else ():
            (folder / name).write_text(content)
    before = everything(old)
    replace = os.replace

    def refused(source, destination):
        if destination == old / "config.json":
            raise PermissionError(13, "Permission denied")
        replace(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refused)
        with pytest.raises(OSError, match=f"cannot write {old / 'config.json'}: Permission denied"):
            converting._move(new, old)
        assert everything(old) == before
    (new / "model.safetensors").write_text("new")
    converting._move(new, old)
    assert everything(old) == {"model.safetensors": b"new", "config.json": b"new"}


def test_a_folder_in_a_files_place(source, tmp_path, capsys):
    (tmp_path / "out" / "config.json").mkdir(parents=True)
    assert run(source, tmp_path / "out", "--force") == 1
    assert f"cannot write {tmp_path / 'out' / 'config.json'}: a folder is there" in capsys.readouterr().err


def test_the_folder_is_as_readable_as_others(source, tmp_path, small_images):
    assert run(source, tmp_path / "out") == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "file").write_bytes(b"")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert (tmp_path / "out" / "config.json").stat().st_mode == (tmp_path / "file").stat().st_mode


def test_full_disk_loses_nothing(source, tmp_path, capsys, small_images):
    folder = tmp_path / "out"
    assert run(source, folder) == 0
    before, limits = everything(folder), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # no file may be larger than 1 MiB
    try:
        assert run(source, folder, "--force") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"cannot write model.safetensors to {folder}: " in capsys.readouterr().err
    assert everything(folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eamlp_7.pth.tar", "out"]


def test_interrupted_on_the_way_leaves_what_was_there(source, tmp_path, monkeypatch, small_images):
    def stopped(checkpoint):
        raise KeyboardInterrupt

    monkeypatch.setattr(converting, "write_check", stopped)
    assert run(source, tmp_path / "out") == 130
    assert [path.name for path in tmp_path.iterdir()] == ["eamlp_7.pth.tar"]
