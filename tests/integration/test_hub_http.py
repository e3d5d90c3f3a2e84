"""From and to the Hub with the real huggingface_hub client over HTTP; the server, on loopback, is hub_server.py."""

import hashlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save

from ..support.hub_client import Client
from ..support.hub_server import Fault, HubServer, Repo

pytestmark = pytest.mark.integration  # processes of their own

NAME = "halonet_h0.test_r64"
TINY = {"depths": [1, 1, 1, 1], "base_width": 16, "num_heads": [2, 2, 2, 2]}
LARGE = "model.safetensors"


def weights(seed: int, **kwargs) -> bytes:
    torch.manual_seed(seed)
    state = timm.create_model("halonet_h0", num_classes=3, **kwargs).state_dict()
    state["head.fc.bias"] = torch.arange(3) + float(seed)
    return save({k: v.half() if v.ndim > 1 else v for k, v in state.items()})


def config_for(content: bytes, hub_id: str | None = None, **fields) -> dict:
    cfg = {"input_size": [3, 64, 64], "first_conv": "stem.conv1.conv", "classifier": "head.fc"}
    if hub_id:
        cfg["hf_hub_id"] = hub_id
    digest = hashlib.sha256(content).hexdigest()
    return {"architecture": "halonet_h0", "num_classes": 3, "sha256": digest, **fields, "pretrained_cfg": cfg}


def files(content: bytes, **fields) -> dict[str, bytes]:
    return {LARGE: content, "config.json": json.dumps(config_for(content, **fields)).encode()}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The server, with the folder that stands for the package's hub_configs."""
    server = HubServer()
    server.registry = tmp_path_factory.mktemp("registry")
    server.home = tmp_path_factory.mktemp("home")
    big, tiny = weights(1), weights(3, **TINY)
    server.repos["acme/" + NAME] = pinned = Repo()
    first = pinned.commit(files(big))
    pinned.commit(files(weights(2)))  # main goes on; who pins does not see it
    server.repos["mirror/" + NAME] = Repo()
    server.repos["mirror/" + NAME].commit(files(big))
    server.repos["me/tiny"] = Repo()
    server.repos["me/tiny"].commit(files(tiny, model_args=TINY))
    server.repos["me/tiny"].commit(files(weights(4, **TINY), model_args=TINY))
    server.repos["me/private"] = Repo(token="hf_reader", private=True)
    server.repos["me/private"].commit(files(tiny, model_args=TINY))
    server.repos["me/wrong"] = Repo()
    server.repos["me/wrong"].commit(files(tiny, model_args=TINY, sha256="0" * 64))
    server.repos["me/other_tool"] = Repo()  # as timm itself writes it: no hash
    server.repos["me/other_tool"].commit(files(tiny, model_args=TINY, sha256=None))
    for name, hub_id in (
        (NAME, f"acme/{NAME}@{first}"),
        ("halonet_h0.no_repository", "acme/nothing_here@" + first),
        ("halonet_h0.no_revision", f"acme/{NAME}@" + "1" * 40),
        ("halonet_h0.private", "me/private"),
    ):
        (server.registry / name).mkdir()
        (server.registry / name / "config.json").write_text(json.dumps(config_for(big, hub_id)))
    yield server
    server.close()


@pytest.fixture(scope="module")
def shared(hub):
    client = Client(hub.url, hub.home, hub.registry)
    yield client
    client.kill()


@pytest.fixture(scope="module")
def mirror(hub):
    client = Client(hub.url, hub.home, hub.registry, TIMM_HALONET_HUB_ORG="mirror")
    yield client
    client.kill()


@pytest.fixture
def client(hub, shared):
    hub.faults.clear()
    hub.log.clear()
    return shared


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def blobs(cache: Path) -> list[int]:
    """Sizes of the whole files in the cache; older clients keep half ones too, under another name, to resume them."""
    return sorted(path.stat().st_size for path in cache.glob("*/blobs/*") if path.suffix != ".incomplete")


def try_again(client: Client, name: str, cache: Path, times: int = 5) -> list[float]:
    """What the user gets in the end: not every version of huggingface_hub tries again by itself."""
    for _ in range(times):
        answer = client.create(name, cache_dir=str(cache))
        if "bias" in answer:
            break
        fails(answer, "cannot get model.safetensors of ")
        assert blobs(cache) == []
    return answer["bias"]


def fails(answer: dict, *parts: str, kind: str = "RuntimeError") -> str:
    assert answer.get("error") == kind, answer
    for part in parts:
        assert part in answer["message"], answer["message"]
    return answer["message"]


def test_first_download_second_from_cache_pinned(hub, client, cache):
    answer = client.create(NAME, cache_dir=str(cache))
    assert answer["bias"] == [1, 2, 3], answer  # the pinned commit, not main
    pin = next(iter(hub.repos["acme/" + NAME].commits))
    assert answer["hf_hub_id"] == f"acme/{NAME}@{pin}"
    assert len(hub.requests("GET", "acme-" + NAME)) == 1 and not hub.leaked
    hub.log.clear()
    assert client.create(NAME, cache_dir=str(cache))["bias"] == [1, 2, 3]
    assert hub.log == []
    with hub.gone():
        assert client.create(NAME, cache_dir=str(cache))["bias"] == [1, 2, 3]
        features = client.create(NAME, cache_dir=str(cache), num_classes=5)
        assert len(features["bias"]) == 5


def test_hf_hub_names_and_revisions(hub, client, cache):
    old, new = hub.repos["me/tiny"].commits
    assert client.create("hf-hub:me/tiny", cache_dir=str(cache))["bias"] == [4, 5, 6]
    answer = client.create(f"hf-hub:me/tiny@{old}", cache_dir=str(cache))
    assert answer["bias"] == [3, 4, 5] and answer["hf_hub_id"] == f"me/tiny@{old}"
    with hub.gone():
        answer = client.create("hf-hub:me/tiny", cache_dir=str(cache))
        assert answer["bias"] == [4, 5, 6] and answer["hf_hub_id"] == f"me/tiny@{new}"
    fails(client.create("hf-hub:me/tiny@v9", cache_dir=str(cache)), "v9", "404", kind="RevisionNotFoundError")
    assert client.create("hf-hub:me/other_tool", cache_dir=str(cache))["bias"] == [3, 4, 5]


def test_home(hub, client):
    assert client.create("hf-hub:me/tiny")["bias"] == [4, 5, 6]
    assert list((hub.home / "hub" / "models--me--tiny" / "snapshots").iterdir())


def test_broken_transfer_is_resumed(hub, client, cache):
    hub.faults.append(Fault("acme-" + NAME, cut=10_500_000))  # the client writes its first 10 MiB before that
    assert try_again(client, NAME, cache) == [1, 2, 3]
    (_, _, whole, status), (_, _, rest, resumed) = hub.requests("GET", "acme-" + NAME)
    assert (whole, status, rest, resumed) == ("", 200, "bytes=10485760-", 206)


def test_truncated_body(hub, client, cache):
    size = len(hub.repos["acme/" + NAME].commits[hub.repos["acme/" + NAME].head][LARGE])
    hub.faults.append(Fault("acme-" + NAME, length=1000))
    fails(client.create(NAME, cache_dir=str(cache)), f"{LARGE} of acme/{NAME}", str(size), "1000")
    assert LARGE not in [path.name for path in cache.glob("*/snapshots/*/*")]
    assert client.create(NAME, cache_dir=str(cache))["bias"] == [1, 2, 3]


def test_damaged_on_the_way(hub, client, cache):
    config = json.loads((hub.registry / NAME / "config.json").read_text())
    hub.faults.append(Fault("acme-" + NAME, flip=True))
    message = fails(
        client.create(NAME, cache_dir=str(cache)),
        f"expected sha256 {config['sha256']}, found ",
        "nothing of it was loaded",
        "deleted from the cache, try again",
        str(hub.registry / NAME / "config.json"),
    )
    assert message.startswith(str(cache)) and LARGE in message and config["sha256"] not in message.split("found ")[1]
    assert blobs(cache) == []
    assert client.create(NAME, cache_dir=str(cache))["bias"] == [1, 2, 3]


def test_an_organisation_that_is_set_later_takes_no_check_away(hub, client, cache):
    late = {"TIMM_HALONET_HUB_ORG": "mirror"}
    hub.faults.append(Fault("acme-" + NAME, flip=True))
    fails(client.create(NAME, late, cache_dir=str(cache)), "expected sha256 ", "deleted from the cache, try again")
    answer = client.create(NAME, late, cache_dir=str(cache))
    assert answer["bias"] == [1, 2, 3] and answer["hf_hub_id"].startswith(f"acme/{NAME}@")


def test_weights_of_another_config(hub, client, cache):
    found = hashlib.sha256(weights(3, **TINY)).hexdigest()
    for _ in range(2):
        message = fails(
            client.create("hf-hub:me/wrong", cache_dir=str(cache)), f"expected sha256 {'0' * 64}, found {found}"
        )
        assert str(cache) in message and "deleted" not in message  # the Hub would only send the same again


def test_private_repository(hub, client, cache):
    fails(client.create("hf-hub:me/private", cache_dir=str(cache)), "401", kind="RepositoryNotFoundError")
    fails(client.create("halonet_h0.private", cache_dir=str(cache)), "me/private", "says 401", "HF_TOKEN")
    wrong = {"HF_TOKEN": "hf_wrong"}
    fails(client.create("halonet_h0.private", wrong, cache_dir=str(cache)), "me/private", "says 404", "HF_TOKEN")
    assert blobs(cache) == []
    right = {"HF_TOKEN": "hf_reader"}
    assert client.create("hf-hub:me/private", right, cache_dir=str(cache))["bias"] == [3, 4, 5]
    assert not hub.leaked  # the token stays with the Hub, its CDN never sees it


def test_not_found(hub, client, cache):
    answer = client.create("halonet_h0.no_repository", {"HF_TOKEN": "hf_reader"}, cache_dir=str(cache))
    fails(answer, "model.safetensors of acme/nothing_here", hub.url, "says 404", "the repository does not exist")
    answer = client.create("halonet_h0.no_revision", cache_dir=str(cache))
    fails(answer, f"acme/{NAME} at revision {'1' * 40}", "has no such revision")
    assert blobs(cache) == []


@pytest.mark.parametrize("status", [429, 503])
def test_busy_server(hub, client, cache, status):
    head, get = f"{NAME}/resolve/" + next(iter(hub.repos["acme/" + NAME].commits)) + "/" + LARGE, "acme-" + NAME
    hub.faults += [Fault(head, "HEAD", times=3, status=status, headers={"Retry-After": "1"})]
    hub.faults += [Fault(get, status=429, times=2)]
    assert try_again(client, NAME, cache) == [1, 2, 3]
    assert [entry[3] for entry in hub.requests("HEAD", head)] == [status, status, status, 302]
    assert [entry[3] for entry in hub.requests("GET", get)] == [429, 429, 200]

    other = cache.with_name("other")
    hub.faults.append(Fault(head, "HEAD", times=100, status=status))
    fails(client.create(NAME, cache_dir=str(other)), hub.url, str(status), f"the cache {other} has no copy")
    hub.faults[:] = [Fault(get, times=100, status=503)]
    fails(client.create(NAME, cache_dir=str(other)), hub.cdn, "503")
    assert blobs(other) == []


def test_slow_server(hub, client, cache):
    hub.faults += [Fault(LARGE, "HEAD", delay=2.5), Fault("acme-" + NAME, stall=2.5)]  # both over the client's 2 s
    assert try_again(client, NAME, cache) == [1, 2, 3]
    assert len(hub.requests("GET", "acme-" + NAME)) == 2


def test_server_gone_without_a_copy(hub, client, cache):
    with hub.gone():
        answer = client.create(NAME, cache_dir=str(cache))
        fails(answer, f"{LARGE} of acme/{NAME}", hub.url, "refused", f"the cache {cache} has no copy")
        answer = client.create("hf-hub:me/tiny", cache_dir=str(cache))
        fails(answer, "check your connection", kind="LocalEntryNotFoundError")
    assert client.create(NAME, cache_dir=str(cache))["bias"] == [1, 2, 3]


def test_offline(hub, client, cache):
    client.create(NAME, cache_dir=str(cache))
    client.create("hf-hub:me/tiny", cache_dir=str(cache))
    offline = Client(hub.url, hub.home, hub.registry, HF_HUB_OFFLINE="1")
    try:
        hub.log.clear()
        assert offline.create(NAME, cache_dir=str(cache))["bias"] == [1, 2, 3]
        assert offline.create("hf-hub:me/tiny", cache_dir=str(cache))["bias"] == [4, 5, 6]
        empty = cache.with_name("empty")
        fails(offline.create(NAME, cache_dir=str(empty)), "HF_HUB_OFFLINE is set", f"the cache {empty} has no copy")
        assert hub.log == []
    finally:
        offline.kill()


@pytest.fixture
def small_disk(tmp_path, request):
    """Mounts a file system of a size or with options on a folder, where that is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        if not shutil.which("mount"):
            pytest.skip("no mount command here")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
        request.addfinalizer(lambda: subprocess.run(["umount", "-l", folder], check=True))
        return folder

    return mount


def test_full_disk(hub, client, small_disk):
    disk = small_disk("size=4m")
    answer = client.create(NAME, cache_dir=str(disk))
    fails(answer, f"the cache {disk} could not be written (No space left on device)", "cache_dir= or HF_HOME")
    assert blobs(disk) == []
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
    assert client.create(NAME, cache_dir=str(disk))["bias"] == [1, 2, 3]


def test_read_only_cache(hub, client, tmp_path, request):
    root = os.geteuid() == 0  # who may write whatever the permissions say
    folder = request.getfixturevalue("small_disk")("size=64m") if root else tmp_path / "read_only"
    assert client.create("hf-hub:me/tiny", cache_dir=str(folder))["bias"] == [4, 5, 6]
    folders = [path for path in [folder, *folder.rglob("*")] if path.is_dir()]
    if root:
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    else:
        for path in folders:
            path.chmod(0o500)
    try:
        assert client.create("hf-hub:me/tiny", cache_dir=str(folder))["bias"] == [4, 5, 6]
        fails(client.create(NAME, cache_dir=str(folder)), f"the cache {folder} could not be written", "cache_dir=")
    finally:
        for path in [] if root else folders:
            path.chmod(0o700)


def test_mirror_two_at_once_and_killed(hub, client, mirror, cache):
    """Another organisation's repository for the same name; then two processes at once, one of them killed."""
    answer = mirror.create(NAME, cache_dir=str(cache))
    assert answer["bias"] == [1, 2, 3] and answer["hf_hub_id"].startswith(f"mirror/{NAME}@")
    assert not hub.requests("GET", "acme-" + NAME)

    both = cache.with_name("both")
    request = dict(do="create", name=f"hf-hub:mirror/{NAME}", kwargs={"cache_dir": str(both)}, env={})
    hub.faults.append(Fault("mirror-" + NAME, stall=1.0))
    client.ask(**request)
    mirror.ask(**request)
    assert client.answer()["bias"] == mirror.answer()["bias"] == [1, 2, 3]
    size = len(hub.repos["mirror/" + NAME].commits[hub.repos["mirror/" + NAME].head][LARGE])
    assert blobs(both)[-1] == size and len(blobs(both)) == 2  # with config.json

    killed = cache.with_name("killed")
    hub.log.clear()
    hub.faults.append(Fault("mirror-" + NAME, stall=1.5))
    mirror.ask(**{**request, "kwargs": {"cache_dir": str(killed)}})
    deadline = time.monotonic() + 60
    while not hub.requests("GET", "mirror-" + NAME) and time.monotonic() < deadline:
        time.sleep(0.05)
    mirror.kill()
    assert LARGE not in [path.name for path in killed.glob("*/snapshots/*/*")]
    assert client.create(f"hf-hub:mirror/{NAME}", cache_dir=str(killed))["bias"] == [1, 2, 3]


@pytest.fixture
def folder(client, hub, tmp_path):
    """A complete checkpoint folder, with things beside it that are nobody's business."""
    path = tmp_path / "halonet_h0.mine"
    path.mkdir()
    (path / LARGE).write_bytes(weights(5, **TINY))
    config = config_for(b"", model_args=TINY, label_names=["cat", "dog", "bee"])
    (path / "config.json").write_text(json.dumps(config))
    for name in ("README.md", "recipe.yaml", "summary.csv", "last.pth.tar", "token.txt"):
        (path / name).write_text(f"{name}\n")
    answer = client.command("verify", str(path), "--write-check")
    assert answer["code"] == 0, answer
    return path


FIVE = ["README.md", "config.json", "model.safetensors", "recipe.yaml", "summary.csv"]


def test_publish_and_load(hub, client, cache, folder):
    writer = {"HF_TOKEN": hub.write_token}
    hub.log.clear()
    answer = client.command("publish", str(folder), "--repo", "me/new", "--dry-run")
    assert answer["code"] == 0 and hub.log == [], answer
    assert [line.split(",")[0] for line in answer["out"].splitlines() if line.startswith("would upload: ")] == [
        f"would upload: {name}" for name in ("config.json", "README.md", "recipe.yaml", "summary.csv", LARGE)
    ]
    assert "left here: last.pth.tar\nleft here: token.txt" in answer["out"]

    hub.faults.append(Fault(LARGE, "PUT", times=1, status=400))
    answer = client.command("publish", str(folder), "--repo", "me/new", env=writer)
    assert answer["code"] == 1 and "cannot publish to me/new" in answer["err"], answer
    assert hub.repos["me/new"].commits == {}  # nothing, or everything

    answer = client.command("publish", str(folder), "--repo", "me/new", env=writer)
    assert answer["code"] == 0, answer
    (sha,) = hub.repos["me/new"].commits
    assert f"published: {hub.url}/me/new/commit/{sha}" in answer["out"] and f"me/new@{sha}" in answer["out"]
    assert sorted(hub.repos["me/new"].commits[sha]) == FIVE
    uploaded = json.loads(hub.repos["me/new"].commits[sha]["config.json"])
    assert uploaded["pretrained_cfg"].pop("hf_hub_id") == "me/new"
    assert uploaded == json.loads((folder / "config.json").read_text())

    # again, from a folder that by now has the pin: nothing to do
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["hf_hub_id"] = f"me/new@{sha}"
    (folder / "config.json").write_text(json.dumps(config))
    hub.log.clear()
    answer = client.command("publish", str(folder), "--repo", "me/new", env=writer)
    assert answer["code"] == 0 and f"unchanged: {hub.url}/me/new/commit/{sha}" in answer["out"], answer
    assert list(hub.repos["me/new"].commits) == [sha] and not hub.requests("PUT", "")

    assert client.create("hf-hub:me/new", cache_dir=str(cache))["bias"] == [5, 6, 7]
    answer = client.command("verify", "hf-hub:me/new@" + sha)
    assert answer["code"] == 0 and "logits: 3, within" in answer["out"], answer


def test_publish_is_refused(hub, client, cache, folder):
    writer = {"HF_TOKEN": hub.write_token}
    answer = client.command("publish", str(folder), "--repo", "me/never", env={"HF_TOKEN": "hf_reader"})
    assert answer["code"] == 1 and "says 401" in answer["err"] and "hf auth login" in answer["err"], answer
    answer = client.command("publish", str(folder), "--repo", "me/tiny", "--private", env=writer)
    assert answer["code"] == 1 and "me/tiny exists and is public; nothing was uploaded" in answer["err"], answer
    assert len(hub.repos["me/tiny"].commits) == 2
    with hub.gone():
        answer = client.command("publish", str(folder), "--repo", "me/never", env=writer)
        assert answer["code"] == 1 and "cannot publish to me/never" in answer["err"], answer
    answer = client.command("publish", str(folder), "--repo", "never", env=writer)
    assert answer["code"] == 1 and "expected a repository ORG/NAME, got 'never'" in answer["err"], answer
    (folder / "README.md").unlink()
    answer = client.command("publish", str(folder), "--repo", "me/never", env=writer)
    assert answer["code"] == 1 and "README.md does not exist" in answer["err"], answer
    (folder / LARGE).write_bytes(weights(6, **TINY))
    answer = client.command("publish", str(folder), "--repo", "me/never", env=writer)
    assert answer["code"] == 1 and "expected sha256" in answer["err"], answer
    assert "me/never" not in hub.repos


def test_publish_private(hub, client, cache, folder):
    answer = client.command(
        "publish", str(folder), "--repo", "me/secret", "--private", env={"HF_TOKEN": hub.write_token}
    )
    assert answer["code"] == 0 and hub.repos["me/secret"].private, answer
    fails(client.create("hf-hub:me/secret", cache_dir=str(cache)), "401", kind="RepositoryNotFoundError")
