"""A process with the real huggingface_hub client, which reads its settings when it is imported.

`Client` starts one and asks it; run as a script, this file answers: one JSON object a line, in and out.
"""

import contextlib
import io
import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

TIMEOUT = 120  # seconds for an answer, importing torch and timm on a busy machine included


class Client:
    """A process whose Hub is `endpoint`; `registry` takes the place of the package's hub_configs."""

    def __init__(self, endpoint: str, home: Path, registry: Path, **env: str) -> None:
        self._env = {key: value for key, value in os.environ.items() if not key.upper().endswith("_PROXY")}
        for key in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "TIMM_HALONET_HUB_ORG"):
            self._env.pop(key, None)
        self._env.update(
            HF_ENDPOINT=endpoint,
            HF_HOME=str(home),
            HF_HUB_DISABLE_XET="1",
            HF_HUB_DISABLE_TELEMETRY="1",
            HF_HUB_DISABLE_PROGRESS_BARS="1",
            HF_HUB_DOWNLOAD_TIMEOUT="2",
            HF_HUB_ETAG_TIMEOUT="2",
            OMP_NUM_THREADS="1",
            PYTHONPATH=os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]),
            TEST_HUB_REGISTRY=str(registry),
            **env,
        )
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=self._env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def ask(self, **request: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        line = self._answers.get(timeout=TIMEOUT)
        assert line, f"the client process ended with {self._process.wait()}"
        return json.loads(line)

    def create(self, name: str, env: dict[str, str] | None = None, **kwargs: Any) -> dict[str, Any]:
        """`timm.create_model(name, pretrained=True, **kwargs)`: {"bias": ...}, or {"error", "message"}."""
        self.ask(do="create", name=name, kwargs=kwargs, env=env or {})
        return self.answer()

    def command(self, *argv: str, env: dict[str, str] | None = None) -> dict[str, Any]:
        """`timm-halonet ARGV`: {"code": ..., "out": ..., "err": ...}."""
        self.ask(do="command", argv=argv, env=env or {})
        return self.answer()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def _create(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    import timm

    try:
        model = timm.create_model(name, pretrained=True, **kwargs)
    except Exception as e:
        return {"error": type(e).__name__, "message": str(e)}
    return {"bias": model.head.fc.bias.tolist(), "hf_hub_id": model.pretrained_cfg.get("hf_hub_id")}


def _command(argv: list[str]) -> dict[str, Any]:
    from timm_halonet import cli

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(argv)
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def main() -> None:
    import time

    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 0.05))  # the client's waits between its tries, up to 8 s each
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing else may write where the answers go
    from timm_halonet import hub

    hub.hub_configs_dir = lambda: Path(os.environ["TEST_HUB_REGISTRY"])
    import timm_halonet.registry  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        os.environ.update(request["env"])
        if request["do"] == "create":
            answer = _create(request["name"], request["kwargs"])
        else:
            answer = _command(request["argv"])
        for key in request["env"]:
            del os.environ[key]
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
