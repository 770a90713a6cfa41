"""Datasets of the Hugging Face hub, streamed by the `datasets` library; its failures in the user's words.

The library has its own settings (HF_HOME, HF_ENDPOINT, HF_TOKEN or what `hf auth login` keeps,
HF_HUB_OFFLINE), and takes a copy that an earlier download left in its cache where the hub does not answer.
It does not go on after a row that it cannot read: only rows that it gives can be left out as bad ones.
"""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from gossamer.data.presets import instead_of
from gossamer.errors import ConfigError

FORM = "hf:repo[@revision][:config[:split]]"


class _Source(NamedTuple):
    """The parts of a source; those that it does not name are empty."""

    repo: str
    revision: str
    config: str
    split: str


def hub_rows(source: str, *, offline: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of `hf:repo[@revision][:config[:split]]`, each with its place for messages.

    They are those of the commit that `revision` names. A config with a slash in it is a folder of the
    repository, as The Stack has one for each language.

    Raises ConfigError for what the hub does not have or give, or what cannot be read; OSError where the hub
    cannot be reached.
    """
    repo, given, config, split = _parts(source)
    if offline:
        raise ConfigError(
            f"dataset {source!r} has to be streamed; drop --offline or give a local file{instead_of(repo)}"
        )
    from datasets import load_dataset

    folder = config if "/" in config else None
    name = None if folder else config or None
    commit = _commit(repo, given) or given or None
    try:
        rows = iter(
            load_dataset(repo, name, data_dir=folder, split=split or "train", revision=commit, streaming=True)
        )
    except Exception as error:  # of any kind: what the library raises is in no tree
        raise _explanation(error, source, repo) from error
    number = 0
    while True:
        number += 1
        try:
            row = dict(next(rows))
        except StopIteration:
            return
        except Exception as error:  # likewise: rows come from the network
            raise _explanation(error, f"{source}:{number}", repo) from error
        yield f"{source}:{number}", row


def revision(source: str) -> str | None:
    """The commit of the dataset's repository that is read; None where the hub does not say.

    What is wrong will be said by whoever streams it.
    """
    repo, given, *_ = _parts(source)
    return _commit(repo, given)


@cache
def _commit(repo: str, revision: str) -> str | None:
    """The commit of a branch, tag or commit ("": the main branch), asked for once: a program reads one."""
    from huggingface_hub import HfApi, errors

    if re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    try:
        return HfApi().dataset_info(repo, revision=revision or None).sha
    except (OSError, ValueError, errors.HTTPError):  # pyright: ignore[reportPrivateImportUsage]
        return None


def _parts(source: str) -> _Source:
    name, config, split, *rest = (*source.removeprefix("hf:").split(":"), "", "")
    repo, at, revision = name.partition("@")
    if not repo or any(rest) or (at and not revision):
        raise ConfigError(f"dataset {source!r}: expected {FORM}")
    return _Source(repo, revision, config, split)


def _explanation(error: Exception, source: str, repo: str) -> Exception:
    """What an error of the library means to the user; an OSError where trying again may help."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import constants, errors, get_token

    what, page, instead = f"dataset {source!r}", f"{constants.ENDPOINT}/datasets/{repo}", instead_of(repo)
    words = " ".join(str(error).split())[:200] or type(error).__name__
    with_token = get_token() is not None
    log_in = "log in (`hf auth login`) or set HF_TOKEN"
    if isinstance(error, DatasetNotFoundError) and "gated" in words:
        access = "the token found here has no access yet" if with_token else f"then {log_in}"
        return ConfigError(f"{what}: {page} is gated; ask for access on that page; {access}{instead}")
    if isinstance(error, DatasetNotFoundError) and words.startswith("Revision"):
        return ConfigError(f"{what}: {page} has no such revision; give a branch, a tag or a commit of it")
    if isinstance(error, DatasetNotFoundError):
        private = "the token found here cannot see it" if with_token else f"if it is private, {log_in}"
        return ConfigError(f"{what}: the hub shows no {page}; check the name; {private}{instead}")
    answered = isinstance(error, errors.HfHubHTTPError)
    cut_off = errors.HTTPError, ConnectionError, TimeoutError  # pyright: ignore[reportPrivateImportUsage]
    down = answered and error.response.status_code >= 500
    if (isinstance(error, cut_off) and not answered) or down or "LocalEntryNotFoundError" in words:
        offline = "; HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
        return OSError(
            f"{what}: {constants.ENDPOINT} cannot be reached ({words}){offline}; run it again with a "
            f"network, or give a local file{instead}"
        )
    return ConfigError(
        f"{what}: {page} cannot be streamed ({words}), and --skip-bad-rows cannot go on after that; check "
        f"config and split ({FORM}), or download its files and give one of them{instead}"
    )
