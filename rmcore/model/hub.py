"""Models on the Hugging Face hub: which names are folders, downloads, uploads, and their failures as one error.

huggingface_hub is imported on first use, since it brings an HTTP client. That is also why :class:`RewardModel` has the
methods of its ``ModelHubMixin`` without deriving from it; besides, the mixin writes into a folder file by file, where a
model here takes its place at once or not at all.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmcore._base.errors import CheckpointError, reject
from rmcore._base.version import __version__
from rmcore.model.folder_files import DECIDING

if TYPE_CHECKING:
    from rmcore.head.frozen import FrozenHead
    from rmcore.model.backbone_config import BackboneConfig

__all__ = ["Upload", "commit_of", "download", "file_of", "folder_of", "hub_failure", "model_card", "upload"]

MODEL_FILES = ("rmcore.json", "head.safetensors", "error_prior.safetensors")
ESTIMATOR_FILES = ("estimators/*/*.json", "estimators/*/*.safetensors")
BACKBONE_FILES = tuple(f"backbone/{pattern}" for pattern in DECIDING)
CARD = "README.md"
_UNREACHED = {"TransportError", "ConnectionError", "Timeout"}  # of httpx, requests, and Python


def folder_of(name: str | os.PathLike[str], revision: str | None = None, *, expected: str = "a folder") -> Path | None:
    """The absolute path of a folder, or None for a name to be looked for on the hub.

    A name is a folder where there is one; a path that can be no hub name (absolute, with ``.`` or ``~`` in front or
    more than one slash, or a ``Path``) must be one; ``expected`` is what the error says then.

    Raises:
        CheckpointError: a path without a folder. It is never looked for on the hub.
        InputError: a revision beside a folder, which has none.
    """
    text = os.fspath(name)
    if not text:
        reject("name", "an empty one", "a hub name or a folder")
    path = Path(os.path.expanduser(text))  # which leaves ~nobody as it is
    if path.is_dir():
        if revision is not None:
            reject("revision", f"{revision!r} beside the folder {text!r}", "None for a folder; only the hub has them")
        return path.resolve()
    if not isinstance(name, str) or text.startswith((".", "~", "/")) or "\\" in text or text.count("/") > 1:
        missing = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), text)
        raise CheckpointError(f"path: got {text!r}, expected {expected}: there is no such folder") from missing
    return None


# -- what goes wrong -------------------------------------------------------------------------------------------------


def hub_failure(error: BaseException, name: str, revision: str | None) -> CheckpointError | None:
    """The hub's part in an exception as an error that names repository and revision; None where it had none."""
    from huggingface_hub import constants, errors

    chain = list(_chain(error))

    def seen(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    access = "Ask for access on its page, and set HF_TOKEN or run `hf auth login`"
    refused = [link for link in chain if isinstance(link, errors.HfHubHTTPError)]
    status = next((e.response.status_code for e in refused if not isinstance(e, errors.EntryNotFoundError)), None)
    if seen(errors.GatedRepoError):
        why = f"it is gated, and this account has no access to it. {access}"
    elif seen(errors.RevisionNotFoundError):
        why = "the repository has no such revision"
    elif seen(errors.DisabledRepoError):
        why = "the hub has disabled it"
    elif seen(errors.RepositoryNotFoundError):
        why = "there is no such repository, or it is private. Check the name; for a private one set HF_TOKEN"
    elif seen(errors.HFValidationError):
        why = "that is neither a folder nor a name the hub can have (name or owner/name)"
    elif seen(errors.OfflineModeIsEnabled) or (constants.HF_HUB_OFFLINE and seen(errors.LocalEntryNotFoundError)):
        why = "it is not (wholly) in the cache, and HF_HUB_OFFLINE forbids to ask the hub"
    elif status in (401, 403):
        why = f"the hub refused ({status}). Set HF_TOKEN to a token with the rights for it"
    elif status is not None:
        why = f"{constants.ENDPOINT} answered {status}"
    elif seen(errors.LocalEntryNotFoundError):
        why = f"it is not (wholly) in the cache, and {constants.ENDPOINT} was not asked or cannot be reached"
    elif any(base.__name__ in _UNREACHED for link in chain for base in type(link).__mro__):
        why = f"{constants.ENDPOINT} cannot be reached ({_first_line(error)})"
    else:
        return None
    return CheckpointError(f"name: got {name!r} (revision {revision or 'main'!r}) on the hub: {why}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:200]


# -- down ------------------------------------------------------------------------------------------------------------


def commit_of(name: str, revision: str | None, *, cache_dir: str | Path | None, local_files_only: bool) -> str:
    """The commit that a revision of a transformers model is now, or was when it came into the cache.

    Raises whatever huggingface_hub does; see :func:`hub_failure`.
    """
    from huggingface_hub import hf_hub_download

    file = hf_hub_download(
        name, "config.json", revision=revision, cache_dir=cache_dir, local_files_only=local_files_only
    )
    return Path(file).parent.name  # the cache's layout: snapshots/<commit>/<file>


def file_of(
    name: str, file: str, *, revision: str | None, cache_dir: str | Path | None, local_files_only: bool
) -> Path | None:
    """A file of a repository, downloaded if need be; None where the repository has no such file.

    Raises CheckpointError, naming repository and revision.
    """
    from huggingface_hub import constants, errors, hf_hub_download

    try:
        return Path(
            hf_hub_download(name, file, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)
        )
    except Exception as error:
        if isinstance(error, errors.LocalEntryNotFoundError):  # also what the cache says of a file that is not there
            if local_files_only or constants.HF_HUB_OFFLINE:
                return None
        elif isinstance(error, errors.EntryNotFoundError):
            return None
        told = hub_failure(error, name, revision)
        if told is None:
            raise
        raise told from error


def files_of(
    name: str, revision: str | None, options: Mapping[str, Any], *, expected: str = "a folder"
) -> Callable[[str], Path | None]:
    """Where the files of a folder or a repository are, by name: downloaded if need be, None where there is none.

    ``options`` are cache_dir and local_files_only of the hub, ``expected`` as for :func:`folder_of`.
    """
    folder = folder_of(name, revision, expected=expected)

    def file(wanted: str) -> Path | None:
        if folder is None:
            return file_of(name, wanted, revision=revision, **options)
        return path if (path := folder / wanted).is_file() else None

    return file


def download(
    repo_id: str,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """A model's folder in the local cache, of one commit: JSON, tokenizer and safetensors files only, never code.

    Raises CheckpointError, naming repository and revision: not found, gated, no such revision, offline and not in the
    cache, or not a model that rmcore wrote.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                repo_id,
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                allow_patterns=[*MODEL_FILES, *ESTIMATOR_FILES, *BACKBONE_FILES, "config.json"],
                library_name="rmcore",
                library_version=__version__,
            )
        )
    except Exception as error:
        told = hub_failure(error, repo_id, revision)
        if told is None:
            raise
        raise told from error
    if not any((folder / name).is_file() for name in (MODEL_FILES[0], "config.json")):
        raise CheckpointError(
            f"name: got {repo_id!r} (revision {revision or 'main'!r}), a repository without {MODEL_FILES[0]}, expected "
            "a model that rmcore wrote. Another library's reward model becomes one with `rmcore upgrade`"
        )
    return folder


# -- up --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Upload:
    """Where to push to and how, by the names that ``ModelHubMixin.push_to_hub`` has for them."""

    repo_id: str
    commit_message: str
    branch: str | None = None
    private: bool | None = None
    create_pr: bool = False


def upload(folder: Path, card: str, to: Upload) -> str:
    """Push a model's folder in one commit; returns the commit's URL.

    The card is written where the repository has none: somebody may have edited it. Files of an earlier embedded
    backbone that this model lacks are deleted in the same commit.

    Raises CheckpointError, naming repository and revision.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi(library_name="rmcore", library_version=__version__)
        repo_id = api.create_repo(to.repo_id, private=to.private, exist_ok=True).repo_id
        if not api.file_exists(repo_id, CARD, revision=to.branch):
            (folder / CARD).write_text(card, encoding="utf-8")
        commit: Any = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=to.commit_message,
            revision=to.branch,
            create_pr=to.create_pr,
            delete_patterns=["backbone/*"],
        )
    except Exception as error:
        told = hub_failure(error, to.repo_id, to.branch)
        if told is None:
            raise
        raise told from error
    return str(commit.commit_url)


def model_card(repo_id: str, head: FrozenHead, backbone: BackboneConfig, *, embedded: bool) -> str:
    """A model card: the hub's metadata, what the model is, how to load it. Nothing about quality, which nobody told."""
    from huggingface_hub import ModelCardData

    on_hub = backbone.name if backbone.revision is not None else None
    data = ModelCardData(
        base_model=on_hub,
        library_name="rmcore",
        pipeline_tag="text-classification",
        tags=["reward-model", "uncertainty", "sngp"],
    )
    config = head.config
    name = f"`{on_hub}` at commit `{backbone.revision}`" if on_hub else "a backbone of its own"
    seen = "not kept" if head.posterior is None else f"kept, {head.posterior.count} rows seen"
    return f"""---
{data.to_yaml()}
---

# {repo_id.rpartition("/")[2]}

A reward model that says how sure it is: a preference and an epistemic uncertainty for every pair of responses,
made with rmcore {__version__}.

```python
from rmcore import RewardModel

model = RewardModel.from_pretrained("{repo_id}")
(group,) = model.score(["a prompt"], [["one response", "another"]])
print(group.rewards, group.uncertainty)
```

| | |
|---|---|
| backbone | {name}{", embedded" if embedded else ""}; {backbone.pooling} pooling |
| pairs | {config.mode} mode |
| features | {config.num_features} {config.features}, served in {str(head.dtype).removeprefix("torch.")} |
| posterior | {config.likelihood} likelihood, ridge {config.ridge:g}; {seen} |

Training data, quality and intended use are for the model's author to add here.
"""
