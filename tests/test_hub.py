"""Checkpoint folders: what is embedded loads offline, and whatever is broken says what and where."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from timm_halonet import hub
from timm_halonet.models.halonet import cfgs

EMBEDDED = [folder.name for folder in sorted(hub.hub_configs_dir().glob("*.*")) if (folder / "config.json").is_file()]


def test_only_what_has_weights_is_listed():
    listed = [name for name in timm.list_pretrained("halonet_h*") if "." in name]
    with_weights = [name for name in EMBEDDED if (hub.hub_configs_dir() / name / "model.safetensors").is_file()]
    assert listed == with_weights
    assert timm.models.is_model_pretrained("halonet_h0")
    assert timm.list_models("halonet_h*", pretrained=True) == listed


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_checkpoint(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = hub.hub_configs_dir() / name
    config = json.loads((folder / "config.json").read_text())
    for file in ("README.md", "recipe.yaml", "summary.csv", "model.safetensors"):
        assert (folder / file).stat().st_size > 0
    # leave num_classes and in_chans out of model_args: transformers fails on them
    assert not set(config.get("model_args", {})) & {"num_classes", "in_chans"}
    assert len(config["label_names"]) == config["num_classes"]
    model = timm.create_model(name, pretrained=True).eval()
    cfg = model.pretrained_cfg
    assert cfg["tag"] == name.partition(".")[2]
    assert (model.num_classes, cfg["num_classes"]) == (config["num_classes"],) * 2
    assert list(cfg["label_names"]) == config["label_names"]
    stored = load_file(folder / "model.safetensors")
    own = model.state_dict()
    assert set(stored) == set(own)
    assert all(torch.equal(own[key], value.to(own[key].dtype)) for key, value in stored.items())
    x = torch.rand(2, *cfg["input_size"])
    with torch.inference_mode():
        out = model(x)
        local = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        torch.testing.assert_close(local(x), out)
    assert local.pretrained_cfg["label_names"] == config["label_names"]


def test_default_tag_and_transfer():
    model = timm.create_model("halonet_h0", pretrained=True)
    assert f"halonet_h0.{model.pretrained_cfg['tag']}" in timm.list_pretrained("halonet_h0.*")
    assert timm.create_model("halonet_h0", pretrained=True, num_classes=7).head.fc.weight.shape[0] == 7
    grey = timm.create_model("halonet_h0", pretrained=True, in_chans=1)
    torch.testing.assert_close(
        grey.stem.conv1.conv.weight,
        model.stem.conv1.conv.weight.sum(1, keepdim=True),
        atol=2e-3,
        rtol=2e-3,  # summed in float16
    )
    features = timm.create_model("halonet_h0", pretrained=True, features_only=True)
    assert [f.shape[1] for f in features(torch.rand(1, 3, 64, 64))] == features.feature_info.channels()
    assert timm.create_model("halonet_h0", pretrained=True, num_classes=0)(torch.rand(1, 3, 64, 64)).shape == (1, 256)


def test_without_weights_a_model_is_the_papers():
    model = timm.create_model("halonet_h0")
    assert (model.num_classes, model.pretrained_cfg["input_size"]) == (1000, (3, 256, 256))
    tagged = timm.create_model("halonet_h0.imagenette_r128")
    assert (tagged.num_classes, tuple(tagged.pretrained_cfg["input_size"])) == (10, (3, 128, 128))


def test_hash_of_embedded_weights():
    for name in EMBEDDED:
        config = hub.read_config(hub.hub_configs_dir() / name)
        weights = (hub.hub_configs_dir() / name / "model.safetensors").read_bytes()
        assert hashlib.sha256(weights).hexdigest() == config["sha256"]


def test_local_dir(checkpoint):
    model = timm.create_model(f"local-dir:{checkpoint}", pretrained=True)
    assert model.num_classes == 3
    assert model.pretrained_cfg["input_size"] == [3, 64, 64]
    weights = load_file(checkpoint / "model.safetensors")
    assert torch.equal(model.state_dict()["head.fc.weight"], weights["head.fc.weight"])


def create(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True)


def test_truncated_weights(checkpoint):
    path = checkpoint / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    with pytest.raises(RuntimeError, match=rf"{path} is truncated: {len(whole) - 1000} bytes.*says {len(whole)}"):
        create(checkpoint)
    path.write_bytes(whole[:5])
    with pytest.raises(RuntimeError, match="5 bytes: truncated"):
        create(checkpoint)
    path.write_bytes(b"<html>not here</html>" * 50)
    with pytest.raises(RuntimeError, match=r"model.safetensors \(1050 bytes\) is truncated or no safetensors file"):
        create(checkpoint)


def test_foreign_and_broken_weights(checkpoint):
    path = checkpoint / "model.safetensors"
    state = load_file(path)
    save_file({"model.embed.weight": torch.zeros(3, 3)}, path)
    with pytest.raises(ValueError, match="foreign state dict: none of its 1 tensors"):
        create(checkpoint)
    save_file({**state, "head.fc.bias": torch.tensor([0.0, float("inf"), float("nan")])}, path)
    with pytest.raises(ValueError, match=r"head.fc.bias \(3,\): 2 values are NaN or infinite"):
        create(checkpoint)


def test_read_config(checkpoint):
    assert hub.read_config(checkpoint)["architecture"] == "halonet_h0"
    path = checkpoint / "config.json"
    for text, message in (
        ("{not json", "is no JSON.*line 1 column 2"),
        ("[]", "no 'architecture'"),
        ('{"architecture": "halonet_h0"}', "no 'pretrained_cfg'"),
        ('{"architecture": 3, "pretrained_cfg": {}}', "no 'architecture'"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as e:
            hub.read_config(checkpoint)
        assert str(path) in str(e.value)
    path.unlink()
    with pytest.raises(ValueError, match="does not exist"):
        hub.read_config(checkpoint)
    path.mkdir()
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        hub.read_config(checkpoint)


def test_pretrained_cfgs(checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "hub_configs_dir", lambda: tmp_path)
    base = {"input_size": (3, 256, 256), "num_classes": 1000}
    assert hub.pretrained_cfgs("halonet_h3", base) == {"halonet_h3": base}
    cfg = hub.pretrained_cfgs("halonet_h0", base)["halonet_h0.test_r64"]
    assert cfg["file"] == str(checkpoint / "model.safetensors")
    assert (cfg["num_classes"], cfg["input_size"], cfg["label_names"][1]) == (3, [3, 64, 64], "dog")

    weights = (checkpoint / "model.safetensors").rename(tmp_path / "elsewhere")
    assert hub.pretrained_cfgs("halonet_h0", base) == {"halonet_h0": base}  # no weights, no tag
    weights.rename(checkpoint / "model.safetensors")

    other = tmp_path / "halonet_h1.test_r64"
    shutil.copytree(checkpoint, other)
    with pytest.raises(ValueError, match="names the architecture 'halonet_h0', its folder 'halonet_h1'"):
        hub.pretrained_cfgs("halonet_h1", base)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "model_args": {"act_layer": "silu"}}))
    with pytest.raises(ValueError, match=r"model_args.*silu"):
        hub.pretrained_cfgs("halonet_h0", base)


@pytest.mark.parametrize("broken", ["empty folder", "no JSON", "no config", "a file"])
def test_a_folder_without_a_config_is_left_out_alone(checkpoint, monkeypatch, tmp_path, broken):
    monkeypatch.setattr(hub, "hub_configs_dir", lambda: tmp_path)
    other = tmp_path / "halonet_h0.half_copied"
    if broken == "a file":
        other.write_text("")
    else:
        other.mkdir()
    if broken in ("no JSON", "no config"):
        (other / "config.json").write_text({"no JSON": '{"architecture": "halo', "no config": "{}"}[broken])
    base = {"input_size": (3, 256, 256), "num_classes": 1000}
    with pytest.warns(RuntimeWarning, match=f"{other} is left out: .*config.json") as warnings:
        cfgs = hub.pretrained_cfgs("halonet_h0", base)
    assert len(warnings) == 1
    assert list(cfgs) == ["halonet_h0.test_r64"] and cfgs["halonet_h0.test_r64"]["num_classes"] == 3


def test_models_register_all_the_same(tmp_path):
    """With such a folder in the package, in a process of its own."""
    package = tmp_path / "timm_halonet"
    source = Path(hub.__file__).parent
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("__pycache__", "hub_configs"))
    (package / "hub_configs" / "halonet_h0.half_copied").mkdir(parents=True)
    script = "import timm_halonet, timm; print(timm_halonet.__file__, len(timm.list_models('halonet_h*')))"
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "TIMM_HALONET_AUTOLOAD": "0"}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.split() == [str(package / "__init__.py"), str(len(cfgs))], done.stderr
    assert "half_copied is left out" in done.stderr


def test_without_weights_timm_says_so():
    assert "halonet_h7" in cfgs
    with pytest.raises(RuntimeError, match="No pretrained weights exist for halonet_h7"):
        timm.create_model("halonet_h7", pretrained=True, device="meta")
