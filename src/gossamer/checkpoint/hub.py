"""Models by their name on the Hugging Face hub: `org/name[@revision]` becomes a directory.

The hub's own library downloads into its own cache, with its own settings (HF_HOME, HF_ENDPOINT, HF_TOKEN or
what `hf auth login` keeps, HF_HUB_OFFLINE). Only files that are read here are fetched, in two steps: the
small ones first, so that a model that is not supported is refused before its weights are downloaded, and so
that a copy whose weights are whole has all the others. Whole files stay when a download fails. Nothing falls
back to an old copy in silence: `offline` has to be asked for. What the library tells the hub about the
program that asks is its own affair; HF_HUB_DISABLE_TELEMETRY=1 keeps it short.
"""

import contextlib
import glob
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gossamer.architecture.config import read_json
from gossamer.architecture.families import read_anatomy
from gossamer.checkpoint.directory import COMPANIONS, MANIFEST
from gossamer.errors import CheckpointError, ConfigError, UnsupportedError

NAME = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/\w[\w.-]*)(@(?P<revision>[^\s@]+))?", re.ASCII)
FILES = (".goss", ".gguf", ".safetensors", ".json")  # endings of files, which no name of a model has
COMMIT = re.compile(r"[0-9a-f]{40}")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# What is read besides weights. An adapter's configuration is fetched so that it is not overlooked.
SMALL = [*dict.fromkeys(("config.json", INDEX, MANIFEST, "README.md", "adapter_config.json", *COMPANIONS))]


class Snapshot(NamedTuple):
    """A model of the hub on disk; `origin` has its repository, revision and commit, for the record."""

    path: Path
    origin: dict[str, str]


def snapshot(name: str, *, offline: bool = False) -> Snapshot:
    """The directory of `org/name[@revision]`, downloaded where the cache lacks it and `offline` is not set.

    Raises CheckpointError for what is no such name either, and for a copy that is incomplete; ConfigError for
    what the hub does not have or give; UnsupportedError for a model that cannot be read; OSError where the
    hub cannot be reached.
    """
    from huggingface_hub import constants

    repository, revision = _parsed(name)
    if offline or constants.HF_HUB_OFFLINE:
        path = _cached(name, repository, revision)
    else:
        with _explained(name, repository, revision):
            path = _downloaded(name, repository, revision)
    if missing := [file for file in _shards(path) or [WEIGHTS] if not (path / file).exists()]:
        raise CheckpointError(
            f"{name}: the copy in {path} lacks {missing[0]} ({len(missing)} files missing): its download did "
            "not come to an end; run the same command once with a network and it goes on"
        )
    return Snapshot(path, {"repository": repository, "revision": revision, "commit": path.name})


def _parsed(name: str) -> tuple[str, str]:
    """(repository, revision) of a name; CheckpointError for what cannot be one."""
    found = NAME.fullmatch(name)
    if found is None or name.endswith(FILES):
        raise CheckpointError(
            f"{name}: found nothing there; expected a Hugging Face directory (config.json and *.safetensors) "
            "or a .goss file here, or the name of a model of the hub, org/name[@revision]"
        )
    return found["repository"], found["revision"] or "main"


def _cached(name: str, repository: str, revision: str) -> Path:
    """Where the cache has the model; ConfigError where it does not."""
    from huggingface_hub import try_to_load_from_cache

    with _explained(name, repository, revision):
        config = try_to_load_from_cache(repository, "config.json", revision=revision)
    if not isinstance(config, str):
        raise ConfigError(
            f"{name}: no such directory or file here, nor a model in the hub's cache, and offline there is "
            "nothing else; run it once without --offline and HF_HUB_OFFLINE"
        )
    return Path(config).parent


def _downloaded(name: str, repository: str, revision: str) -> Path:
    """Bring what is missing into the cache; raises the hub library's errors and UnsupportedError."""
    from huggingface_hub import HfApi, constants, snapshot_download

    if not COMMIT.fullmatch(revision):  # snapshot_download alone would take an old copy without a network
        HfApi().model_info(repository, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    path = Path(snapshot_download(repository, revision=revision, allow_patterns=SMALL))
    if not (path / "config.json").is_file():
        raise _unreadable(name, repository, path.name, "config.json")
    read_anatomy(read_json(path / "config.json"), f"{name}: config.json")
    weights = [glob.escape(file) for file in (WEIGHTS, *_shards(path))]
    snapshot_download(repository, revision=path.name, allow_patterns=weights)
    if not (path / INDEX).exists() and not (path / WEIGHTS).exists():
        raise _unreadable(name, repository, path.name, WEIGHTS)
    return path


def _shards(path: Path) -> list[str]:
    """The files of weights that an index names, none where there is no index."""
    weight_map = read_json(path / INDEX).get("weight_map") if (path / INDEX).is_file() else None
    names = weight_map.values() if isinstance(weight_map, dict) else ()
    return sorted({name for name in names if isinstance(name, str)})


def _unreadable(name: str, repository: str, commit: str, lacks: str) -> UnsupportedError:
    """What a repository has instead of the file that it lacks."""
    from huggingface_hub import HfApi

    files = HfApi().list_repo_files(repository, revision=commit)
    others = [
        file for file in files if file.endswith((".safetensors", ".gguf", ".bin", ".pt", ".pth", ".h5"))
    ]
    advice = "convert pickles with transformers' save_pretrained"
    if any(file.endswith(".gguf") for file in others):
        advice = "download the .gguf file and read it with `gossamer import`"
    return UnsupportedError(
        f"{name}: the repository has no {lacks}; found {', '.join(others[:3]) or 'no weights'}; supported: "
        f"config.json with {WEIGHTS} or its shards ({advice})"
    )


@contextlib.contextmanager
def _explained(name: str, repository: str, revision: str) -> Iterator[None]:
    """Turn the hub library's errors into ours, which say what to do."""
    from huggingface_hub import errors

    failures = errors.HFValidationError, errors.HTTPError, OSError  # pyright: ignore[reportPrivateImportUsage]
    try:
        yield
    except failures as error:
        raise _explanation(error, name, repository, revision) from error


def _explanation(error: Exception, name: str, repository: str, revision: str) -> Exception:
    """What an error of the hub library means to the user; an OSError where trying again may help."""
    from huggingface_hub import constants, errors, get_token

    page, with_token = f"{constants.ENDPOINT}/{repository}", get_token() is not None
    log_in = "log in (`hf auth login`) or set HF_TOKEN"
    if isinstance(error, errors.HFValidationError):
        return CheckpointError(f"{name}: found nothing there, and it is no name of the hub ({_line(error)})")
    if isinstance(error, errors.GatedRepoError):
        access = "the token found here has no access yet" if with_token else f"then {log_in}"
        return ConfigError(f"{name}: {page} is gated; ask for access on that page; {access}")
    if isinstance(error, errors.RevisionNotFoundError):
        return ConfigError(f"{name}: {page} has no revision {revision}; give a branch, a tag or a commit")
    if isinstance(error, errors.RepositoryNotFoundError):
        private = "the token found here cannot see it" if with_token else f"if it is private, {log_in}"
        return ConfigError(
            f"{name}: no such directory or file here, and the hub shows no {page}; check the name; {private}"
        )
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        refused = "refuses the token found here" if with_token else "asks for a token"
        return ConfigError(f"{name}: the hub {refused} ({_line(error)}); {log_in}")
    return OSError(
        f"{name}: no such directory or file here, and its download from {constants.ENDPOINT} failed "
        f"({_line(error)}); run it again, which goes on with what is missing, or with --offline to use a "
        "copy in the cache"
    )


def _line(error: BaseException) -> str:
    """A library's error on one line, in the words of its cause where it has one."""
    return " ".join(str(error.__cause__ or error).split())[:200]
