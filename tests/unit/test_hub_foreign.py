"""A config.json of anybody: nothing that it names is read or fetched, and every value that does not fit is named."""

import json
import re
import shutil
import socket
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from timm_halonet import config_file, hub, photos
from timm_halonet.checkpoints import verify as publishing
from timm_halonet.cli import main

TINY = {"depths": [1, 1, 1, 1], "base_width": 16, "num_heads": [2, 2, 2, 2]}
opened: set[str] = set()
sys.addaudithook(lambda event, args: opened.add(str(args[0])) if event == "open" else None)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    save_file(timm.create_model("halonet_h0", num_classes=3, **TINY).state_dict(), folder / "model.safetensors")
    config = {"architecture": "halonet_h0", "num_classes": 3, "model_args": TINY, "pretrained_cfg": {}}
    config["pretrained_cfg"]["input_size"] = [3, 32, 32]
    (folder / "config.json").write_text(json.dumps(config))
    publishing.write_check(publishing.find_checkpoint(str(folder)))
    return folder


@pytest.fixture
def folder(small, tmp_path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "checkpoint"))


@pytest.fixture
def refusals(folder, tmp_path, capsys):
    """What verify and classify say of the folder: a line each."""

    def ask() -> list[str]:
        (tmp_path / "photo.jpg").write_bytes(b"")
        assert main(["verify", str(folder)]) == 1
        assert main(["classify", str(tmp_path / "photo.jpg"), "--model", f"local-dir:{folder}"]) == 1
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert len(lines) == 2 and all(line.startswith("timm-halonet: error: ") for line in lines)
        return lines

    return ask


def change(folder: Path, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.fixture
def server():
    """The address of a port that must not be asked."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/weights.pth"
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.fixture
def canary(tmp_path):
    """A file that must not be opened."""
    path = tmp_path / "canary.pth"
    torch.save({"state_dict": {}}, path)
    opened.discard(str(path))
    yield str(path)
    assert str(path) not in opened


def loading(server: str, canary: str) -> dict[str, dict]:
    """Arguments of timm.create_model that are not the model's, by the name that the error has."""
    return {
        "checkpoint_path": {"checkpoint_path": canary},
        "pretrained": {"pretrained": True, "pretrained_cfg_overlay": {"url": server}},
        "pretrained_cfg": {"pretrained_cfg": {"file": canary}},
        "pretrained_cfg_overlay": {"depths": [1, 1, 1, 1], "pretrained_cfg_overlay": {"file": canary}},
        "cache_dir": {"cache_dir": canary},
        "scriptable": {"scriptable": True},
        "features_only": {"features_only": True},
        "pruned": {"pruned": True},
        "model_cfg": {"model_cfg": {}},
        "pretrained_strict": {"pretrained_strict": False},
        "pretrained_filter_fn": {"pretrained_filter_fn": "print"},
        "base_cfg": {"base_cfg": {"file": canary}},
        "device": {"device": "meta"},
        "url": {"url": server},
        "file": {"file": canary},
    }


NAMES = sorted(loading("", ""))


@pytest.mark.parametrize("name", NAMES)
def test_only_arguments_of_the_model_are_taken(folder, server, canary, name, refusals):
    change(folder, lambda c: c.update(model_args=loading(server, canary)[name]))
    message = rf"{folder / 'config.json'}: model_args has .*'{name}'.*: not an argument of the model halonet_h0"
    with pytest.raises(ValueError, match=message):
        photos.load_model(f"local-dir:{folder}")
    assert all(re.search(message, line) for line in refusals())


@pytest.mark.parametrize("name", NAMES)
def test_only_arguments_of_a_detectors_backbone_are_taken(tmp_path, server, canary, name):
    detection = pytest.importorskip("timm_halonet.detection")
    config = {"detector": "retinanet", "backbone": "resnet10t", "num_classes": 2, "options": {"norm": "batch"}}
    config["options"]["backbone_kwargs"] = loading(server, canary)[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"config.json: options.backbone_kwargs has .*'{name}'.*resnet10t"):
        detection.load_detector(tmp_path)


@pytest.mark.parametrize(
    "name", ["hf-hub:acme/x", "local-dir:/tmp", "acme/x", "../x", "resnet10t.hf-hub:acme/x", 3, ""]
)
def test_a_detectors_backbone_has_a_plain_name(tmp_path, name):
    detection = pytest.importorskip("timm_halonet.detection")
    config = {"detector": "retinanet", "backbone": name, "num_classes": 2, "options": {"norm": "batch"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"backbone is .*expected a name in timm"):
        detection.load_detector(tmp_path)


def test_a_detector_over_a_folders_backbone_needs_no_folder_any_more(folder, tmp_path):
    detection = pytest.importorskip("timm_halonet.detection")
    options = {"min_size": 64, "max_size": 64, "fpn_channels": 8}
    overlay = {"hf_hub_id": None, "file": None}
    for kwargs in ({"mask_border": True}, {"pretrained_cfg_overlay": overlay}):
        model = detection.retinanet(f"local-dir:{folder}", 2, backbone_kwargs=kwargs, **options)
        detection.save_detector(tmp_path / "detector", model, [{"id": 1, "name": "cell"}])
    shutil.rmtree(folder)
    again, config = detection.load_detector(tmp_path / "detector")
    assert config["backbone"] == "halonet_h0" and config["options"]["backbone_kwargs"] == TINY
    weights = model.state_dict()
    assert all(torch.equal(x, weights[key]) for key, x in again.state_dict().items())


@pytest.mark.parametrize("name", ["hf-hub:acme/x", "local-dir:/tmp", "halonet_h0.imagenette_r128", "a/b", "", "h\n"])
def test_an_architecture_has_a_plain_name(folder, name):
    change(folder, lambda c: c.update(architecture=name))
    with pytest.raises(ValueError, match=r"config.json: architecture is .*, expected a plain name in timm"):
        hub.read_config(folder)


def test_arguments_of_models_are_let_through(folder):
    """Those of this package and of timm, however the model's class comes by them."""
    for architecture, args in (
        ("halonet_h0", {**TINY, "mask_border": True, "drop_path_rate": 0.1, "global_pool": "avg"}),
        ("resnet50", {"output_stride": 8, "act_layer": "silu", "block_args": {"attn_layer": "se"}}),
        ("vit_tiny_patch16_224", {"img_size": [64, 64], "dynamic_img_size": True}),
        ("swinv2_cr_tiny_224", {"window_size": 8, "img_size": 256}),
        ("efficientnet_b0", {"bn_eps": 1e-3, "drop_path_rate": None}),
        ("uhalonet_micro", {"depths": [1, 1, 1, 1]}),
    ):
        config_file.check_model_args(architecture, args, "here")
    with pytest.raises(ValueError, match=r"here: depths is .*numbers up to 1000"):
        config_file.check_model_args("halonet_h0", {"depths": [1, 1, 1, 10**6]}, "here")
    for value in (10**9, float("nan"), "x" * 1000, [[[[[[1]]]]]], list(range(1000))):
        with pytest.raises(ValueError, match=r"here: base_width is .*expected plain values"):
            config_file.check_model_args("halonet_h0", {"base_width": value}, "here")


@pytest.mark.parametrize("args", [{"depths": "many"}, {"num_heads": {}}, {"global_pool": "nothing"}, {"qk_ratio": []}])
def test_arguments_of_a_wrong_kind_are_an_error_of_one_line(folder, args, refusals):
    change(folder, lambda c: c.update(model_args=args))
    assert all(f"{folder}" in line and next(iter(args)) in line for line in refusals())


TOP = [
    ("num_classes", "3"),
    ("num_classes", 3.0),
    ("num_classes", -1),
    ("num_classes", True),
    ("num_classes", 10**9),
    ("num_features", "256"),
    ("label_names", "cat"),
    ("label_names", {"0": "cat"}),
    ("label_names", ["cat", 1, ["dog"]]),
    ("label_descriptions", ["cat"]),
    ("label_descriptions", {"cat": 3}),
    ("model_args", [1]),
    ("model_args", None),
    ("sha256", 3),
    ("sha256", "abc"),
    ("default", "yes"),
    ("check", []),
]
PRETRAINED = [
    ("input_size", [3, 100_000, 100_000]),
    ("input_size", [3, "32", 32]),
    ("input_size", [3, 32]),
    ("input_size", [3, 0, 32]),
    ("input_size", 32),
    ("test_input_size", [3, 32.5, 32]),
    ("min_input_size", [10**6, 32, 32]),
    ("mean", [0.5, "0.5", 0.5]),
    ("mean", [0.5, 0.5]),
    ("std", [0, 0, 0]),
    ("crop_pct", "0.9"),
    ("crop_pct", 0),
    ("crop_pct", 1e-9),
    ("crop_mode", "middle"),
    ("interpolation", "magic"),
    ("interpolation", ["bicubic"]),
    ("num_classes", "3"),
    ("label_offset", "1"),
    ("label_names", [["cat"]]),
    ("fixed_input_size", "no"),
    ("pool_size", [7, "7"]),
    ("first_conv", 3),
    ("classifier", {"head": 1}),
    ("hf_hub_id", ["a/b"]),
    ("state_dict", {}),
    ("something_new", 1),
]
CHECK = [
    ("tolerance", -1e-3),
    ("tolerance", "0.001"),
    ("tolerance", 1e30),
    ("tolerance", None),
    ("tolerance", True),
    ("seed", "0"),
    ("seed", 1.5),
    ("seed", [0]),
    ("input_size", [3, 100_000, 100_000]),
    ("input_size", [3, 4096, 4096]),
    ("input_size", [3, 32, "32"]),
    ("logits", []),
    ("logits", ["0.1"]),
    ("logits", 0.1),
    ("logits", {"0": 1}),
]


@pytest.mark.parametrize(
    ("where", "key", "value"),
    [
        (where, *pair)
        for where, pairs in (("", TOP), ("pretrained_cfg", PRETRAINED), ("check", CHECK))
        for pair in pairs
    ],
)
def test_values_that_do_not_fit_are_named(folder, where, key, value, refusals):
    change(folder, lambda c: (c[where] if where else c).update({key: value}))
    verified, classified = refusals()
    assert verified == classified and f"{folder / 'config.json'}: {where}{'.' if where else ''}{key} " in verified


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("key", ["check.tolerance", "check.logits", "pretrained_cfg.crop_pct", "model_args.drop_rate"])
def test_numbers_that_json_does_not_have(folder, key, number):
    outer, inner = key.split(".")
    change(folder, lambda c: c[outer].update({inner: ["@"] if inner == "logits" else "@"}))
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"@"', number))
    with pytest.raises(ValueError, match=rf"{path}: {key} has the value -?(nan|inf), expected finite numbers"):
        hub.read_config(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "deep": ' + "[" * 100_000 + "]" * 100_000 + "}", "deep is nested more than 32 levels deep"),
        ('{"a": 1, "deep": ' + '{"b": ' * 100_000 + "1" + "}" * 100_001, "deep is nested more than 32 levels deep"),
        ('{"a": "[[{", "deep": ' + "[" * 40 + "]" * 40 + "}", "deep is nested more than 32 levels deep"),
        ("[" * 100_000, "the content is nested more than 32"),
        ('{"a": 1, "b": {"tolerance": 1, "x": 2, "tolerance": 2}}', "has the key 'tolerance' twice"),
        ('{"a": ' + "9" * 10_000 + "}", "is not JSON"),
        ('{"a": 1', "is not JSON.*line 1"),
        ("", "is not JSON"),
        ("<html></html>", "is not JSON"),
        ("\udcff", "is not JSON.*utf-8"),
    ],
)
def test_texts_that_cannot_be_read(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    for read in (lambda: hub.read_config(tmp_path), lambda: hub.stored_hash(path)):
        with pytest.raises(ValueError, match=message) as e:
            read()
        assert str(e.value).startswith(str(path)) and len(str(e.value)) < 400 + len(str(path))


def test_huge_files_are_not_read(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as f:
        f.truncate(8 << 30)  # eight gigabytes of nothing
    with pytest.raises(ValueError, match=f"{path} has {8 << 30} bytes, expected at most"):
        hub.read_config(tmp_path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"config.json cannot be read: it is not a file"):
        hub.read_config(tmp_path)


def test_what_timm_writes_is_read(tmp_path):
    """The config.json of timm's own export of models of several families, keys without a value included."""
    from timm.models._hub import save_config_for_hf

    for name in ("halonet_h0", "resnet50.a1_in1k", "vit_tiny_patch16_224", "inception_v3", "vgg11"):
        model = timm.create_model(name, device="meta")
        save_config_for_hf(model, str(tmp_path / "config.json"), model_config={"num_classes": model.num_classes})
        assert hub.read_config(tmp_path)["architecture"] == name.partition(".")[0]


def test_every_pretrained_config_of_timm_fits(tmp_path):
    config = {"architecture": "resnet50", "pretrained_cfg": {}}
    for name in [
        *timm.list_pretrained("*a*")[::10],
        *timm.list_pretrained("halonet*"),
        *timm.list_pretrained("*halo*"),
    ]:
        config["pretrained_cfg"] = timm.get_pretrained_cfg(name).to_dict(remove_source=True)
        (tmp_path / "config.json").write_text(json.dumps(config))
        hub.read_config(tmp_path)
