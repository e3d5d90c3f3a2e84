"""Weights from elsewhere: what is downloaded is checked or refused, and errors on the way say what would help."""

import dataclasses
import hashlib
import socket
from pathlib import Path
from urllib.error import HTTPError, URLError

import pytest
import timm
import torch

from timm_halonet import hub
from timm_halonet.cli import main

from .test_hub import edit


@pytest.fixture
def registered(checkpoint, monkeypatch, tmp_path):
    """Registers the checkpoint as halonet_h0.test_r64 of acme's organisation, its weights in a cache of the Hub."""
    from timm.models import _registry

    from timm_halonet.models._base import default_cfgs_of

    cache = tmp_path / "models--acme--halonet_h0.test_r64" / "snapshots" / ("0" * 40)
    cache.mkdir(parents=True)
    downloads = []

    def download(repo_id, filename, **kwargs):
        downloads.append(repo_id)
        return str(cache / filename)

    def register(sha256: str | None) -> tuple[Path, list[str]]:
        edit(checkpoint, lambda c: c.update(sha256=sha256))
        (checkpoint / "model.safetensors").rename(cache / "model.safetensors")
        with monkeypatch.context() as patch:
            patch.setattr(hub, "hub_configs_dir", lambda: tmp_path)
            patch.setenv("TIMM_HALONET_HUB_ORG", "acme")
            cfg = default_cfgs_of({"halonet_h0": {}})["halonet_h0"].cfgs["test_r64"]
        cfg = dataclasses.replace(cfg, architecture="halonet_h0", tag="test_r64")
        monkeypatch.setitem(_registry._model_pretrained_cfgs, "halonet_h0.test_r64", cfg)
        monkeypatch.setitem(_registry._model_with_tags, "halonet_h0", ["halonet_h0.test_r64"])
        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
        return cache / "model.safetensors", downloads

    return register


@pytest.mark.parametrize("organisation", [None, "acme", "other"])
def test_an_id_and_its_hash_are_settled_once(checkpoint, registered, monkeypatch, organisation):
    """Whatever the environment says later: a file that is not the described one is never loaded."""
    right = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
    path, downloads = registered(right.upper())
    whole = path.read_bytes()
    monkeypatch.delenv("TIMM_HALONET_HUB_ORG", raising=False)
    if organisation:
        monkeypatch.setenv("TIMM_HALONET_HUB_ORG", organisation)
    for kwargs in ({"pretrained_cfg": "test_r64"}, {"pretrained_cfg": timm.get_pretrained_cfg("halonet_h0.test_r64")}):
        path.write_bytes(whole)
        loaded = hub.checked_weights("halonet_h0", kwargs)
        assert loaded["pretrained_cfg_overlay"]["hf_hub_id"] == "acme/halonet_h0.test_r64@" + "0" * 40
        path.write_bytes(whole[:-4] + b"\0\0\0\1")
        with pytest.raises(RuntimeError, match=f"expected sha256 {right}, found .*deleted from the cache, try again"):
            hub.checked_weights("halonet_h0", kwargs)
        assert not path.exists()
    assert set(downloads) == {"acme/halonet_h0.test_r64"}


def test_a_registered_name_without_a_hash_is_not_downloaded(registered):
    _, downloads = registered(None)
    for overlay in ({}, {"notes": ("pretrained weights: sha256 " + "0" * 64,)}):
        with pytest.raises(
            RuntimeError, match=r"halonet_h0.test_r64/config.json has no sha256, and weights .* not down"
        ):
            hub.checked_weights("halonet_h0", {"pretrained_cfg": "test_r64", "pretrained_cfg_overlay": overlay})
    assert downloads == []


@pytest.mark.parametrize("key", ["url", "file", "hf_hub_filename"])
def test_a_checkpoint_folder_names_no_other_file(checkpoint, monkeypatch, tmp_path, key):
    monkeypatch.setattr(hub, "hub_configs_dir", lambda: tmp_path)
    edit(checkpoint, lambda c: c["pretrained_cfg"].update({key: "http://127.0.0.1:9/other.pth", "custom_load": True}))
    cfg = hub.pretrained_cfgs("halonet_h0", {})["halonet_h0.test_r64"]
    assert cfg.get(key) == (str(checkpoint / "model.safetensors") if key == "file" else None)
    assert "custom_load" not in cfg


def test_only_files_of_a_hub_cache_are_deleted(tmp_path):
    expected = hashlib.sha256(b"whole").hexdigest()
    commit, right = "0123456789" * 4, ("models--a--b", "snapshots")
    for *place, gone in (
        (*right, commit, True),
        (*right, "main", False),
        ("datasets--a--b", "snapshots", commit, False),
        ("models--a--b", "blobs", commit, False),
        ("mine", False),
    ):
        folder = tmp_path.joinpath(*place)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.safetensors").write_bytes(b"damaged")
        with pytest.raises(RuntimeError, match="deleted from the cache" if gone else "get the file again"):
            hub.check_hash(folder / "model.safetensors", expected, folder / "config.json")
        assert (folder / "model.safetensors").exists() != gone


@pytest.mark.parametrize(
    ("endpoint", "part"),
    [
        ("hub.example.org", "HF_ENDPOINT is 'hub.example.org', expected an address with https://"),
        ("", "HF_ENDPOINT is ''"),
        ("https://", "HF_ENDPOINT is 'https://'"),
        ("ftp://hub.example.org", "HF_ENDPOINT is 'ftp://hub.example.org'"),
    ],
)
def test_endpoints_that_are_no_address(monkeypatch, endpoint, part):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    assert part in hub.explain_hub_error(ValueError("unknown url type"))


def test_offline_says_so(monkeypatch, tmp_path):
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for error in (LocalEntryNotFoundError("none"), OfflineModeIsEnabled("offline")):
        assert hub.explain_hub_error(error, tmp_path) == f"HF_HUB_OFFLINE is set, and the cache {tmp_path} has no copy"


URL = "https://github.com/OpenGVLab/STM-Evaluation/releases/download/cls-ckpt/unified_halonet_micro.pth"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (URLError(socket.gaierror(-2, "Name or service not known")), "Name or service not known"),
        (HTTPError(URL, 404, "Not Found", {}, None), "HTTP Error 404: Not Found"),
        (TimeoutError("timed out"), "timed out"),
        (ConnectionResetError(104, "Connection reset by peer"), "Connection reset by peer"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_weights_by_url_that_cannot_be_had(monkeypatch, tmp_path, capsys, error, reason):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr("torch.hub.urlopen", fails)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(RuntimeError) as e:
        timm.create_model("uhalonet_micro", pretrained=True)
    path = tmp_path / "hub" / "checkpoints" / "unified_halonet_micro.pth"
    assert str(e.value) == (
        f"cannot download unified_halonet_micro.pth, the weights of uhalonet_micro.stm_in1k, from {URL}: {reason}; get "
        f"the file where there is a connection, and put it at {path} or name it with "
        "pretrained_cfg_overlay=dict(file='unified_halonet_micro.pth')"
    )
    (tmp_path / "a.jpg").write_bytes(b"")
    assert main(["classify", str(tmp_path / "a.jpg"), "--model", "uhalonet_micro"]) == 1
    assert capsys.readouterr().err == f"timm-halonet: error: {e.value}\n"


def test_a_page_in_place_of_weights_by_url_is_deleted(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.hub.urlopen", lambda *args, **kwargs: pytest.fail("asked the network"))
    path = tmp_path / "unified_halonet_micro.pth"
    for content, what in ((b"<!doctype html><title>Sign in</title>", "a web page"), (b"", "is empty")):
        path.write_bytes(content)
        with pytest.raises(
            RuntimeError, match=f"from {URL}: {path} .*{what}.*; it was deleted from the cache, try again"
        ):
            timm.create_model("uhalonet_micro", pretrained=True, cache_dir=tmp_path)
        assert not path.exists()


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.pth", b"<html></html>", "a web page"),
        ("a.pth", b"version https://git-lfs.github.com/spec/v1\nsize 5\n", "Git LFS to a file of 5 bytes"),
        ("a.safetensors", b"", "is empty"),
        ("a.pth", None, "does not exist"),
    ],
)
def test_files_of_the_user_that_are_no_weights(tmp_path, name, content, what):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    overlay = {"file": str(tmp_path / name)}
    with pytest.raises(RuntimeError, match=f"cannot read the weights of halonet_h0: {tmp_path / name} .*{what}"):
        timm.create_model("halonet_h0", pretrained=True, pretrained_cfg_overlay=overlay)
    assert (tmp_path / name).exists() == (content is not None)


class Packed(torch.Tensor):
    """As torchao's quantised weights: no arithmetic but what a linear layer takes."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("isfinite", "bitwise_not", "float", "sum"):
            raise NotImplementedError(f"{func} of a packed tensor")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_values_of_tensors_that_cannot_be_asked_are_left_alone():
    own = {"a": torch.zeros(2), "b": torch.zeros(2)}
    bad = torch.tensor([0.0, torch.nan])
    hub.check_state_dict({"a": bad.as_subclass(Packed), "b": torch.zeros(2)}, own, "a model")
    hub.check_state_dict({"a": bad.to_sparse()}, own, "a model")
    hub.check_state_dict({"a": torch.zeros(2, dtype=torch.float8_e4m3fn)}, own, "a model")
    for found in (bad, torch.nn.Parameter(bad), bad.half(), bad.to(torch.float8_e4m3fn), bad.to(torch.float8_e5m2)):
        with pytest.raises(ValueError, match=r"checkpoint tensor a \(2,\): 1 values are NaN"):
            hub.check_state_dict({"a": found, "b": torch.zeros(2).as_subclass(Packed)}, own, "a model")
