"""From a checkpoint folder to the Hub: `timm-halonet publish`."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..hub import CONFIG_NAME, WEIGHTS_NAME, explain_hub_error, stored_hash
from .verify import config_bytes, find_checkpoint, verify

FILES = (CONFIG_NAME, "README.md", "recipe.yaml", "summary.csv", WEIGHTS_NAME)  # all that ever goes to the Hub


def publish(
    folder: str | os.PathLike[str],
    repo: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    message: str | None = None,
    say: Callable[[str], Any] = print,
) -> str | None:
    """Verify a checkpoint folder and upload it as one commit; safe to repeat, what is there already is not sent again.

    Only the five files of a checkpoint are uploaded, nothing else in the folder. config.json goes with `repo` as its
    hf_hub_id, without a revision: a commit cannot name itself.

    Args:
        folder: with config.json, model.safetensors and README.md, and recipe.yaml and summary.csv where it has them.
        repo: ORG/NAME on the Hub, made if it does not exist.
        private: make it a private one; an existing public one is refused.
        dry_run: say what would be done, and touch no network.
        message: of the commit.
        say: told what is done, line by line.

    Returns:
        The commit that now has the files, or None for a dry run.

    Raises:
        ValueError: not a checkpoint folder, or no ORG/NAME.
        RuntimeError: the Hub refused, or cannot be reached; then nothing has been committed.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    if len(repo.split("/")) != 2 or not all(repo.split("/")) or set(repo) & set("@: "):
        raise ValueError(f"expected a repository ORG/NAME, got {repo!r}")
    checkpoint = find_checkpoint(f"local-dir:{folder}")
    for step, found in verify(checkpoint):
        say(f"{step}: {found}")
    if not (folder / "README.md").is_file():
        raise ValueError(f"{folder / 'README.md'} does not exist: a checkpoint is published with its model card")
    config = checkpoint.config
    config = {**config, "pretrained_cfg": {**config["pretrained_cfg"], "hf_hub_id": repo}}
    contents: dict[str, bytes | str] = {CONFIG_NAME: config_bytes(config)}
    contents.update({name: str(folder / name) for name in FILES if name not in contents and (folder / name).is_file()})
    additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in contents.items()]
    for addition in additions:
        if addition.path_in_repo == WEIGHTS_NAME and addition.upload_info.sha256.hex() != stored_hash(
            checkpoint.config_path
        ):
            raise RuntimeError(f"{folder / WEIGHTS_NAME} changed while it was being verified")
        say(f"{'would upload' if dry_run else 'file'}: {addition.path_in_repo}, {addition.upload_info.size:,} bytes")
    for name in sorted(path.name for path in folder.iterdir() if path.name not in FILES):
        say(f"left here: {name}")
    if dry_run:
        return None
    api = HfApi(library_name="timm_halonet")
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        before = api.model_info(repo)
        if private and not before.private:
            raise ValueError(f"{repo} exists and is public; nothing was uploaded")
        commit = api.create_commit(repo, additions, commit_message=message or f"timm-halonet publish {folder.name}")
    except ValueError as e:
        if type(e) is ValueError:
            raise
        raise RuntimeError(f"cannot publish to {repo}: {explain_hub_error(e)}") from e
    except Exception as e:  # the HTTP library's own errors among them
        raise RuntimeError(f"cannot publish to {repo}: {explain_hub_error(e)}") from e
    say(f"{'unchanged' if commit.oid == before.sha else 'published'}: {commit.commit_url}")
    say(f'to pin it, in the package\'s own config.json: "hf_hub_id": "{repo}@{commit.oid}"')
    return commit.oid
