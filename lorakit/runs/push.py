"""An export on the hub: a finished folder becomes one commit of a repository."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from lorakit import compat
from lorakit.errors import LorakitError, RunError, UsageError, first_line
from lorakit.export.peft import CONFIG_FILE
from lorakit.files import read_json
from lorakit.sources import hub


@dataclass(frozen=True)
class Destination:
    """A repository on the hub, OWNER/NAME. private: how it is made if it is not there; revision:
    branch, by default main; message: of the commit."""

    name: str
    private: bool = True
    revision: str | None = None
    message: str = "Export of a lorakit run"

    def check(self) -> None:
        """Raise UsageError for a name that no repository can have."""
        if self.name.count("/") != 1 or not hub.could_have(self.name):
            raise UsageError(
                f"`{self.name}` is no name of a repository", "--push-to-hub takes OWNER/NAME."
            )

    def by_hand(self, folder: Path) -> str:
        """The command of huggingface_hub that sends a folder there."""
        privacy = "--private" if self.private else "--no-private"
        revision = ["--revision", self.revision] if self.revision else []
        return shlex.join(["hf", "upload", self.name, str(folder), ".", privacy, *revision])


class ReadByEveryone(RunError):
    """The repository is there already and is public, which was not asked for."""


def push(folder: Path, to: Destination) -> Iterator[str]:
    """Send the files of an export to the hub in one commit, with the token of huggingface_hub;
    yields lines about it.

    A repository that is not there is made. One that is there and public is refused unless
    `to.private` is False, so that nothing becomes public by mistake. Raises RunError, whose remedy
    says where the export is and how to send it by hand.
    """
    try:
        yield from _push(folder, to)
    except ReadByEveryone as error:  # the command would send it there
        raise RunError(error.what, f"{error.remedy} The export is in {folder}.") from error
    except LorakitError as error:
        kept = f"The export is in {folder}; to send it: {to.by_hand(folder)}"
        raise RunError(error.what, f"{error.remedy} {kept}" if error.remedy else kept) from error


def _push(folder: Path, to: Destination) -> Iterator[str]:
    if reason := hub.unreachable():
        raise RunError(f"nothing was sent: {reason}")
    if get_token() is None:
        raise RunError(
            "nothing was sent: there is no token of the hub on this machine",
            "`hf auth login` stores one, or set HF_TOKEN.",
        )
    api = HfApi()
    account = _asked(api.whoami, "the hub does not accept the token")["name"]
    found = _asked(lambda: _repository(api, to.name), f"`{to.name}` can not be looked up")
    if found is None:
        _asked(
            lambda: api.create_repo(to.name, private=to.private),
            f"`{account}` can not make `{to.name}`",
        )
        yield f"{'private' if to.private else 'public'} repository {to.name} made"
    elif to.private and not found.private:
        raise ReadByEveryone(
            f"nothing was sent: `{to.name}` is there already, and everyone can read it",
            "Choose another name, or say --public.",
        )
    if to.revision:
        _asked(
            lambda: api.create_branch(to.name, branch=str(to.revision), exist_ok=True),
            f"`{account}` can not make the branch {to.revision} of `{to.name}`",
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a local base is not named in the card, among others
        commit = _asked(
            lambda: api.upload_folder(
                repo_id=to.name,
                folder_path=folder,
                revision=to.revision,
                commit_message=to.message,
            ),
            f"`{account}` can not send files to `{to.name}`",
        )
    yield f"sent to {commit.commit_url}"
    config = folder / CONFIG_FILE
    base = read_json(config)["base_model_name_or_path"] if config.is_file() else ""
    if Path(base).is_absolute():
        yield (
            f"its adapter_config.json names the base by a folder of this machine, {base}: others"
            " load it over their own copy"
        )


def _repository(api: HfApi, name: str) -> Any:
    """The repository as the hub knows it, or None where there is none that the token may see."""
    try:
        return api.model_info(name)
    except RepositoryNotFoundError:
        return None


def _asked(ask: Any, failed: str) -> Any:
    """The answer of a request. Raises RunError with the words of the hub or of the network."""
    try:
        return ask()
    except HfHubHTTPError as error:
        said = error.server_message or first_line(error)
        raise RunError(f"{failed}: {said} (HTTP status {error.response.status_code})") from error
    except (compat.http_error(), OSError, RuntimeError, ValueError) as error:
        raise RunError(f"{failed}: {first_line(error)}") from error
