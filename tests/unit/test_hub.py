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
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

from timm_halonet import hub, photos
from timm_halonet.checkpoints import verify as publishing
from timm_halonet.cli import main
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
    assert (tagged.num_classes, tagged.pretrained_cfg["input_size"]) == (10, (3, 128, 128))
    sizes = [value for value in tagged.pretrained_cfg.values() if isinstance(value, list)]
    assert sizes == [tagged.pretrained_cfg["label_names"]]  # timm adds tuples to sizes


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_weights_are_verified(name):
    weights = (hub.hub_configs_dir() / name / "model.safetensors").read_bytes()
    found = dict(publishing.verify(publishing.find_checkpoint(name)))
    assert list(found) == ["config", "hash", "tensors", "values", "logits"]
    assert found["hash"] == hashlib.sha256(weights).hexdigest()


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
    with pytest.raises(RuntimeError, match=r"model.safetensors \(1050 bytes\) is not a checkpoint but a web page"):
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
        ("{not json", "is not JSON.*line 1 column 2"),
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
    assert (cfg["num_classes"], cfg["input_size"], cfg["label_names"][1]) == (3, (3, 64, 64), "dog")

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


def test_the_default_tag_is_the_one_that_says_so(checkpoint, monkeypatch, tmp_path):
    from timm.models._registry import generate_default_cfgs

    monkeypatch.setattr(hub, "hub_configs_dir", lambda: tmp_path)
    config = json.loads((checkpoint / "config.json").read_text())

    def default_tag():
        return generate_default_cfgs(hub.pretrained_cfgs("halonet_h0", {}))["halonet_h0"].tags[0]

    for tag in ("a_r32", "z_r96"):
        shutil.copytree(checkpoint, tmp_path / f"halonet_h0.{tag}")
    assert default_tag() == "a_r32"
    (tmp_path / "halonet_h0.z_r96" / "config.json").write_text(json.dumps({**config, "default": True}))
    assert default_tag() == "z_r96"
    assert [*hub.pretrained_cfgs("halonet_h0", {})] == [f"halonet_h0.{t}" for t in ("z_r96", "a_r32", "test_r64")]
    (checkpoint / "config.json").write_text(json.dumps({**config, "default": True}))
    with pytest.raises(ValueError, match=r"both halonet_h0\.test_r64 and halonet_h0\.z_r96"):
        hub.pretrained_cfgs("halonet_h0", {})


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


def test_the_recipes_are_no_checkpoint(checkpoint, monkeypatch, tmp_path, recwarn):
    monkeypatch.setattr(hub, "hub_configs_dir", lambda: tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "halonet_h0.yaml").write_text("model: halonet_h0\n")
    assert list(hub.pretrained_cfgs("halonet_h0", {"num_classes": 1000})) == ["halonet_h0.test_r64"]
    assert [str(w.message) for w in recwarn] == []


@pytest.mark.integration
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


@pytest.mark.parametrize("name", ["halonet_h7", "halonet_h7.a1_in1k"])
def test_without_weights_timm_says_so_and_what_has_some(name):
    assert "halonet_h7" in cfgs
    message = "No pretrained weights exist for halonet_h7" if name == "halonet_h7" else "Invalid pretrained tag"
    with pytest.raises(RuntimeError, match=message) as e:
        timm.create_model(name, pretrained=True, device="meta")
    listed = str(e.value).partition("of timm_halonet: ")[2].split(", ")
    assert set(EMBEDDED) <= set(listed) <= set(timm.list_pretrained())
    assert "halonet26t.a1h_in1k" not in listed  # timm's own


def test_hash_is_checked_where_the_config_has_one(checkpoint):
    path, config_path = checkpoint / "model.safetensors", checkpoint / "config.json"
    publishing.write_check(publishing.find_checkpoint(str(checkpoint)))
    create(checkpoint)
    expected = hub.read_config(checkpoint)["sha256"]
    whole = path.read_bytes()
    for content, more in ((whole[:-4] + b"\0\0\0\1", ""), (whole[:-1000], "is truncated")):
        path.write_bytes(content)
        found = hashlib.sha256(content).hexdigest()
        message = rf"{path} is not .* {config_path} describes: expected sha256 {expected}, found {found}.*{more}"
        for name, kwargs in (
            (f"local-dir:{checkpoint}", {}),
            ("halonet_h0", {"pretrained_cfg_overlay": {"file": str(path)}, "num_classes": 3}),
        ):
            with pytest.raises(RuntimeError, match=message):
                timm.create_model(name, pretrained=True, **kwargs)
    assert path.is_file()  # only what a download left in the Hub's cache is deleted
    path.unlink()
    with pytest.raises(RuntimeError, match=f"{path} does not exist"):
        create(checkpoint)
    config_path.write_text(config_path.read_text().replace(expected, "a hash"))
    with pytest.raises(ValueError, match="sha256 is 'a hash', expected 64"):
        create(checkpoint)


def test_another_file_of_the_user_is_not_held_to_our_hash(checkpoint, tmp_path):
    path = (checkpoint / "model.safetensors").rename(tmp_path / "mine.safetensors")
    overlay = {"file": str(path), "num_classes": 3}
    model = timm.create_model("halonet_h0", pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.state_dict()["head.fc.weight"], load_file(path)["head.fc.weight"])


def test_organisation_of_a_mirror(checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "hub_configs_dir", lambda: tmp_path)
    (checkpoint / "model.safetensors").unlink()
    monkeypatch.setenv("TIMM_HALONET_HUB_ORG", "acme")
    assert hub.pretrained_cfgs("halonet_h0", {})["halonet_h0.test_r64"]["hf_hub_id"] == "acme/halonet_h0.test_r64"
    edit(checkpoint, lambda c: c["pretrained_cfg"].update(hf_hub_id="us/name@0123"))
    assert hub.pretrained_cfgs("halonet_h0", {})["halonet_h0.test_r64"]["hf_hub_id"] == "acme/halonet_h0.test_r64"
    monkeypatch.delenv("TIMM_HALONET_HUB_ORG")
    assert hub.pretrained_cfgs("halonet_h0", {})["halonet_h0.test_r64"]["hf_hub_id"] == "us/name@0123"


def edit(folder: Path, change, **tensors) -> None:
    """Change a checkpoint's config, and tensors (None takes one out), the hash with them."""
    path = folder / "model.safetensors"
    config = json.loads((folder / "config.json").read_text())
    if tensors:
        state = {**load_file(path), **{key.replace("__", "."): value for key, value in tensors.items()}}
        save_file({key: value for key, value in state.items() if value is not None}, path)
        config["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_verify_command(checkpoint, capsys):
    assert main(["verify", str(checkpoint)]) == 1
    assert "lacks sha256 or check; `timm-halonet verify FOLDER --write-check`" in capsys.readouterr().err
    before = json.loads((checkpoint / "config.json").read_text())
    assert main(["verify", str(checkpoint), "--write-check"]) == 0
    steps = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert steps == ["config", "hash", "tensors", "values", "logits"]
    after = json.loads((checkpoint / "config.json").read_text())
    assert {key: after[key] for key in before} == before and set(after) - set(before) == {"sha256", "check"}
    assert len(after["check"]["logits"]) == 3
    assert sorted(p.name for p in checkpoint.iterdir()) == ["config.json", "model.safetensors"]
    assert main(["verify", f"local-dir:{checkpoint}"]) == 0
    assert main(["verify", "halonet_h0", "--write-check"]) == 1
    assert "--write-check needs a folder, got 'halonet_h0'" in capsys.readouterr().err
    for name in ("halonet_h0.nothing", "no_such_model", "halonet_h7"):
        assert main(["verify", name]) == 1
        assert name in capsys.readouterr().err


@pytest.fixture(scope="module")
def verified(tmp_path_factory) -> Path:
    """A folder that verify accepts, of a model small enough to be verified often."""
    args = {"depths": [1, 1, 1, 1], "base_width": 16, "num_heads": [2, 2, 2, 2]}
    folder = tmp_path_factory.mktemp("verified")
    torch.manual_seed(0)
    save_file(timm.create_model("halonet_h0", num_classes=3, **args).state_dict(), folder / "model.safetensors")
    config = {"architecture": "halonet_h0", "num_classes": 3, "model_args": args, "label_names": ["cat", "dog", "bee"]}
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": {"input_size": [3, 64, 64]}}))
    checkpoint = publishing.write_check(publishing.find_checkpoint(str(folder)))
    assert len(list(publishing.verify(checkpoint))) == 5
    return folder


@pytest.mark.parametrize(
    ("change", "tensors", "message"),
    [
        (lambda c: c.update(sha256="0" * 64), {}, f"expected sha256 {'0' * 64}, found "),
        (lambda c: c.update(architecture="no_such"), {}, "architecture 'no_such', which timm does not know"),
        (lambda c: c.update(model_args={"in_chans": 3}), {}, "in_chans in model_args"),
        (lambda c: c.update(num_classes=4), {}, "3 label_names for 4 classes"),
        (lambda c: c["pretrained_cfg"].update(num_classes=9), {}, "num_classes is 3 at the top, 9 in pretrained_cfg"),
        (lambda c: c["pretrained_cfg"].pop("input_size"), {}, "needs input_size"),
        (lambda c: c.update(check={"seed": 0}), {}, "check needs seed, input_size, logits and tolerance"),
        (lambda c: c["check"].update(seed=1), {}, "they differ by up to"),
        (lambda c: c["check"]["logits"].append(0.0), {}, "they differ by up to inf"),
        (lambda c: None, {"head__fc__bias": None}, r"1 tensors are missing \(head.fc.bias\), 0 have no place"),
        (lambda c: None, {"extra": torch.ones(1)}, r"0 tensors are missing \(\), 1 have no place in it \(extra\)"),
        (lambda c: None, {"head__fc__bias": torch.ones(4)}, r"head.fc.bias has shape \(4,\), expected \(3,\)"),
        (lambda c: None, {"head__fc__bias": torch.ones(3, dtype=torch.float64)}, "head.fc.bias is torch.float64"),
        (lambda c: None, {"head__fc__bias": torch.tensor([1, torch.nan, 1])}, "1 values are NaN"),
        (lambda c: None, {"head__fc__bias": torch.tensor([0.1, 0.2, 0.3])}, "they differ by up to"),
        (lambda c: None, {"head__fc__bias": torch.full((3,), 3e38)}, "they differ by up to"),
    ],
)
def test_verify_finds(verified, tmp_path, change, tensors, message):
    folder = tmp_path / "changed"
    shutil.copytree(verified, folder)
    edit(folder, change, **tensors)
    with pytest.raises((ValueError, RuntimeError), match=message) as e:
        list(publishing.verify(publishing.find_checkpoint(str(folder))))
    assert str(folder) in str(e.value) or "NaN" in message


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.LocalEntryNotFoundError("no copy"), "could not be asked"),
        (errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
        (type("UnsupportedProtocol", (Exception,), {"__module__": "httpx"})("no https://"), "UnsupportedProtocol"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_weights_of_timms_own_models(monkeypatch, error, message):
    """What the Hub's client raises while timm loads them is one line with the model's name."""

    def create_model(*args, **kwargs):
        raise error

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(RuntimeError, match=f"cannot get the weights of resnet18 from the Hub: .*{message}"):
        photos.load_model("resnet18")


def test_errors_that_are_not_the_hubs_pass():
    with pytest.raises(ZeroDivisionError), hub.explain_downloads("resnet18"):
        raise ZeroDivisionError
