"""Hugging Face repositories, by its own library: HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE and proxies apply."""

from __future__ import annotations

import urllib.error
from pathlib import Path

from huggingface_hub import HfApi, errors, get_token, hf_hub_url

from llm_api_server.downloads import transfer
from llm_api_server.downloads.choice import RemoteFile
from llm_api_server.downloads.hub import TIMEOUT, OnBytes, first_line, hub_errors, unreachable
from llm_api_server.downloads.source import Source

_NAME = "Hugging Face"


class HuggingFace:
    """Repository of Hugging Face."""

    def __init__(self, source: Source) -> None:
        self._repo = source.location
        self.revision = source.revision

    def files(self) -> list[RemoteFile]:
        with hub_errors(_NAME, _explain, self._repo, self.revision):
            info = HfApi().model_info(self._repo, revision=self.revision, files_metadata=True, timeout=TIMEOUT)
        self.revision = info.sha
        return [
            RemoteFile(
                one.rfilename, one.size or 0, one.lfs.sha256 if one.lfs else None, None if one.lfs else one.blob_id
            )
            for one in info.siblings or ()
        ]

    def fetch(self, file: RemoteFile, folder: Path, on_bytes: OnBytes) -> None:
        # The library cannot resume a download whose process was killed.
        url = hf_hub_url(self._repo, file.path, revision=self.revision)
        with hub_errors(_NAME, _explain, self._repo, self.revision):
            tag = file.sha256 or file.git_sha1 or ""
            transfer.fetch(url, folder / file.path, file.size, on_bytes, tag=tag, token=get_token())


def _explain(error: Exception, repo: str, revision: str | None) -> str | None:
    match error:
        case errors.GatedRepoError():
            account = (
                "with the account of the configured token, or set HF_TOKEN to another one"
                if get_token()
                else "then set HF_TOKEN to a token of your account"
            )
            return f"huggingface.co/{repo} is gated: accept its licence on that page, {account}."
        case errors.RepositoryNotFoundError():
            return f"{repo} does not exist on Hugging Face, or is private: check the name, or set HF_TOKEN."
        case errors.RevisionNotFoundError():
            return f"{repo} has no revision {revision!r}: give a branch, tag or commit that its page lists."
        case errors.OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE is set: unset it to download."
        case errors.HfHubHTTPError():
            return f"Hugging Face responded: {first_line(error)}. Downloaded data is kept; try again later."
        case urllib.error.HTTPError():
            return f"Hugging Face responded {error.code} {error.reason} for a file of {repo}. Try again later."
        case urllib.error.URLError():
            return unreachable(_NAME, error.reason)
    return None
