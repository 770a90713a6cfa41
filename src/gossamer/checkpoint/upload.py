"""The way back to the Hugging Face hub: files become one commit of a repository, `org/name[@branch]`.

The hub's own library sends them, to HF_ENDPOINT, with the token of HF_TOKEN or of `hf auth login`. Large
files go to the hub's storage first and the commit comes last, so that a repository never holds half a model.
What has arrived is known by its hash: the same command, run again, sends only what is missing.
"""

import re
from collections.abc import Mapping
from json import JSONDecodeError
from pathlib import Path

from gossamer.checkpoint.hub import NAME
from gossamer.errors import ConfigError

WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def check_repository(name: str) -> tuple[str, str]:
    """(repository, branch) of `org/name[@branch]`; ConfigError for what cannot be one."""
    found = NAME.fullmatch(name)
    if found is None:
        raise ConfigError(f"{name!r} is no repository of the hub; expected org/name or org/name@branch")
    return found["repository"], found["revision"] or "main"


def check_access(name: str) -> None:
    """ConfigError where nothing can be sent from here: offline, or without a token."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise ConfigError("HF_HUB_OFFLINE is set, and publishing needs the hub; unset it, or add --dry-run")
    if get_token() is None:
        raise ConfigError(
            f"{name}: publishing needs a token that may write; log in (`hf auth login`) or set HF_TOKEN"
        )


def upload(name: str, files: Mapping[str, Path | bytes], *, private: bool, message: str) -> str:
    """Commit files, by their paths in the repository, and return the commit's address.

    The repository and its branch are made where they are not there; `private` is for a new one, and of one
    that others see raises ConfigError. Weights that an older directory left there (`model.safetensors` or
    shards) are taken out when a directory comes: they would be read with the others. Raises ConfigError
    without the right to write, OSError where the hub cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, errors

    repository, branch = check_repository(name)
    api = HfApi()
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise ConfigError(
                f"{name}: --private is for a new repository; this one is there, and all see it. Make it "
                f"private first ({constants.ENDPOINT}/{repository}/settings), or leave --private out"
            )
        if branch != "main":
            api.create_branch(repository, branch=branch, exist_ok=True)
        there = api.list_repo_files(repository, revision=branch)
        replaced = any(WEIGHTS.fullmatch(file) for file in files)
        stale = [file for file in there if replaced and WEIGHTS.fullmatch(file) and file not in files]
        operations = [
            *(
                CommitOperationAdd(file, str(of) if isinstance(of, Path) else of)
                for file, of in files.items()
            ),
            *(CommitOperationDelete(file) for file in stale),
        ]
        commit = api.create_commit(repository, operations, commit_message=message, revision=branch)
    except (errors.HFValidationError, errors.HTTPError, OSError, RuntimeError, ValueError) as error:  # pyright: ignore[reportPrivateImportUsage]
        raise _explanation(error, name, repository) from error
    return str(commit.commit_url)


def _explanation(error: Exception, name: str, repository: str) -> Exception:
    """What an error of the hub library means to the user; an OSError where trying again may help."""
    from huggingface_hub import constants, errors

    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
    page, line = f"{constants.ENDPOINT}/{repository}", " ".join(str(cause).split())[:300]
    status = cause.response.status_code if isinstance(cause, errors.HfHubHTTPError) else None
    if status in (401, 403):
        return ConfigError(
            f"{name}: the hub refuses the token found here for {page} ({line}); take one that may write "
            "there (`hf auth login`, HF_TOKEN), or another name"
        )
    refused = status is not None and 400 <= status < 500 and status not in (408, 429)
    if refused or isinstance(cause, errors.HFValidationError):
        return ConfigError(f"{name}: the hub does not take it as {page}: {line}")
    if isinstance(cause, ValueError) and not isinstance(cause, JSONDecodeError):
        return ConfigError(f"{name}: the hub does not take these files: {line}")
    return OSError(
        f"{name}: the upload to {page} failed ({line or type(cause).__name__}); run the same command again: "
        "what has arrived is not sent a second time"
    )
