"""Downloads from the Hugging Face hub, with errors that say what to do."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import CheckpointNotFoundError

# Keywords of every `from_pretrained` that say where on the hub, and how, to look for files.
HUB_OPTIONS = (
    "revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder",
)  # fmt: skip


def hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some keywords that are about the hub; `use_auth_token` is an older `token`."""
    found = {name: options[name] for name in HUB_OPTIONS if options.get(name) is not None}
    if options.get("use_auth_token") is not None:
        found.setdefault("token", options["use_auth_token"])
    return found


def download(repository: str, patterns: list[str], **options: Any) -> Path:
    """The local folder of a repository, with the files that fit the patterns downloaded.

    Args:
        repository: "owner/name"; options: as huggingface_hub.snapshot_download.

    Raises:
        CheckpointNotFoundError: no such directory or repository, no network, no access.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    options = {name: value for name, value in options.items() if value is not None}
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns, **options))
    except (HFValidationError, RepositoryNotFoundError) as error:
        advice = "there is no such file or directory, and no such repository on the hub"
        if isinstance(error, GatedRepoError):
            advice = "access to this repository must be asked for on its page, and needs a token"
        raise CheckpointNotFoundError(f"{repository}: {advice} ({_first_line(error)})") from error
    except RevisionNotFoundError as error:
        raise CheckpointNotFoundError(
            f"{repository}: no revision {options.get('revision')!r} on the hub"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError, OSError) as error:
        raise CheckpointNotFoundError(
            f"{repository}: there is no such directory here, it is not in the cache of downloads "
            f"and the hub cannot be reached ({_first_line(error)}). Download it where there is a "
            f"network (`hf download {repository}`), then give its directory or HF_HOME"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
