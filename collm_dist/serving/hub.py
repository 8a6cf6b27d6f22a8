"""Upload of an export to a repository of the Hugging Face Hub, or of a server with its interface (``HF_ENDPOINT``)."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collm_dist.errors import CollmError, ConfigError, HubError
from collm_dist.runs.damage import read_json_file
from collm_dist.serving.export import INDEX

_EVENTS = "data/interactions/"


@dataclass(frozen=True)
class HubTarget:
    """Repository that gets an export.

    Attributes:
        repo: OWNER/NAME.
        public: whether everybody may read it.
        publishes_events: whether a public repository may get users' ids and events.
    """

    repo: str
    public: bool = False
    publishes_events: bool = False


def prepare_repo(target: HubTarget, *, with_events: bool) -> str:
    """Check access, make the repository if it is missing, and return its full name. Nothing is uploaded.

    Args:
        target: the repository.
        with_events: whether the export holds users' ids and events.

    Raises:
        ConfigError: the name is invalid, the repository is public and ``target`` private or the other way round, or
            events would be published.
        HubError: there is no token, no network, or no permission.
    """
    _check_public(target, with_events)
    api = _open_api()
    with _explaining(target.repo):
        name = str(api.create_repo(target.repo, private=not target.public, exist_ok=True).repo_id)
        about = api.repo_info(name)
        if about.private == target.public:
            is_now, remedy = ("private", "leave --public out") if target.public else ("public", "add --public")
            raise ConfigError(
                f"--push-to-hub {name}: the repository exists and is {is_now}; {remedy}, or name another repository"
            )
        if not with_events and any(file.rfilename.startswith(_EVENTS) for file in about.siblings or ()):
            raise ConfigError(
                f"--push-to-hub {name}: the repository holds users' events of an earlier export, and its history would "
                "keep them; name another repository, or delete this one first"
            )
    return name


def push_export(folder: Path, repo: str) -> str:
    """Replace the contents of a repository by an export, and return the address of the commit.

    Raises:
        HubError: token, network or permission is missing; the same command can be run again.
        ArtifactError: the folder is not an export.
    """
    index = read_json_file(folder / INDEX, "stage", "files", remedy="export again to a new folder")
    api = _open_api()
    with _explaining(repo):
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=[INDEX, *map(glob.escape, index["files"])],  # whatever else lies in the folder stays here
            commit_message=f"Export of a CoLLM recommender ({index['stage']})",
            delete_patterns="*",
        )
    return str(commit.commit_url)


def _check_public(target: HubTarget, with_events: bool) -> None:
    if target.public and with_events and not target.publishes_events:
        raise ConfigError(
            "--public: the export holds users' ids and events, which everybody could read; leave them out with "
            "--without-events, or add --publish-events if you may publish them"
        )


def _open_api() -> Any:
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise HubError("--push-to-hub: there is no token; set HF_TOKEN, or log in with: hf auth login")
    return HfApi(library_name="collm-dist")


@contextmanager
def _explaining(repo: str) -> Iterator[None]:
    """Turn the errors of the Hub's client into messages that say what to do."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    place = f"--push-to-hub {repo}"
    try:
        yield
    except HFValidationError as error:
        raise ConfigError(f"{place}: {_first_line(error)}; give OWNER/NAME") from None
    except HfHubHTTPError as error:
        code = error.response.status_code
        if code == 401 and not isinstance(error, RepositoryNotFoundError):
            advice = "the token is not valid; set HF_TOKEN to another, or log in again with: hf auth login"
        elif code in (401, 403, 404):
            advice = (
                "the token may not write there; make one with write access at the Hub, settings, access tokens, and "
                "check the owner's name"
            )
        elif code >= 500 or code == 429:
            advice = "the Hub does not take it now; run the same command again later"
        else:
            advice = "the Hub refuses it; correct what it names"
        raise HubError(f"{place}: HTTP {code}: {advice} ({_first_line(error)})") from None
    except CollmError:
        raise
    except ValueError as error:  # of the model card, or of the storage of large files
        text = " ".join(str(error).split())
        advice = "; correct the licences" if text.startswith("Invalid metadata") else ""
        raise HubError(f"{place}: {text[:500]}{advice}") from None
    except Exception as error:  # of the HTTP library, or of hf_xet; the client changes the first between releases
        raise HubError(
            f"{place}: the Hub cannot be reached, or breaks off ({type(error).__name__}: {_first_line(error)}); check "
            "the network and HF_ENDPOINT, then run the same command again"
        ) from None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
