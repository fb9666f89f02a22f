"""gpt2 push: a model with its card to the Hugging Face hub."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from gpt2.commands.common import Json, Outcome, parse, say
from gpt2.errors import RequestError, WorkError


@dataclass(frozen=True)
class Push:
    """A model with its card to the Hugging Face hub: weights, config, tokenizer, and a README.md made from the run."""

    model: tyro.conf.Positional[str]
    """Run, checkpoint, or Hugging Face GPT-2 directory on this machine."""
    repo: tyro.conf.Positional[str]
    """Repository on the hub, NAME or OWNER/NAME; made if it is not there."""
    private: bool = False
    """Make a repository that only you can see (one that is there stays as it is)."""
    license: str | None = None
    """Licence for the card, by its identifier on the hub (mit, apache-2.0, …)."""
    message: str = "Upload a GPT-2 and its card"
    """Message of the commit."""
    dry_run: Path | None = None
    """Send nothing: write the card, the picture and the list of files into this new directory."""
    json: Json = False
    """Print one JSON object as the last line."""


def main(argv: Sequence[str]) -> Outcome:
    """gpt2 push"""
    args = parse(Push, argv, "push")
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    from gpt2.checkpoint.directory import resolve_model
    from gpt2.report.card import publishable

    try:
        validate_repo_id(args.repo)
    except HFValidationError as error:
        raise RequestError(f"{args.repo!r} is no name of a repository: use NAME or OWNER/NAME") from error
    directory = Path(resolve_model(args.model))
    if not directory.is_dir():
        raise RequestError(f"there is no directory {directory}: push takes a run, a checkpoint or a GPT-2 directory")
    files = publishable(directory, args.repo, args.license)
    listed = [{"path": name, **_identity(content)} for name, content in files.items()]
    size = sum(entry["bytes"] for entry in listed)
    result: dict[str, Any] = {"repo": args.repo, "model": str(directory), "bytes": size, "files": listed}
    if args.dry_run is not None:
        _write(args.dry_run, files, listed)
        say(f"{args.dry_run}: the card and the list of {len(files)} files ({size:,} bytes); nothing was sent")
        return Outcome({**result, "url": None, "dry_run": str(args.dry_run)}, args.json)
    url = send(args.repo, files, args.private, args.message)
    say(f"{url}: {len(files)} files, {size:,} bytes")
    return Outcome({**result, "url": url, "dry_run": None}, args.json)


def send(repo: str, files: Mapping[str, Path | bytes], private: bool, message: str) -> str:
    """Uploads the files in one commit: the repository has all of them or none. Gives its address.

    Raises RequestError where the hub does not let this user write there, WorkError where it cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi()
    try:
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        api.create_commit(url.repo_id, operations, commit_message=message)
    except Exception as error:  # the hub's own errors, httpx's and a missing network
        status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
        if isinstance(error, LocalTokenNotFoundError) or status in (401, 403):
            raise RequestError(
                f"the hub does not let you write to {repo}: log in with `hf auth login` or set HF_TOKEN, and see that "
                "the token may write there"
            ) from error
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise WorkError(
            f"the push to {repo} failed ({type(error).__name__}: {reason}); give the same command again"
        ) from error
    return str(url)


def _identity(content: Path | bytes) -> dict[str, Any]:
    from gpt2.files import sha256_file

    if isinstance(content, bytes):
        return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return {"bytes": content.stat().st_size, "sha256": sha256_file(content)}


def _write(directory: Path, files: Mapping[str, Path | bytes], listed: Sequence[Mapping[str, Any]]) -> None:
    from gpt2.files import new_directory, write_json

    with new_directory(directory) as temporary:
        for name, content in files.items():
            if isinstance(content, bytes):
                (temporary / name).write_bytes(content)
        write_json(temporary / "files.json", list(listed))
