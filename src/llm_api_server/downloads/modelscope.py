"""ModelScope repositories, by its own SDK: MODELSCOPE_API_TOKEN, MODELSCOPE_ENDPOINT and proxies apply."""

from __future__ import annotations

import logging
import os
import urllib.error
from pathlib import Path

from modelscope_hub import HubApi, HubConfig, errors

from llm_api_server.downloads import transfer
from llm_api_server.downloads.choice import RemoteFile
from llm_api_server.downloads.hub import OnBytes, hub_errors, unreachable
from llm_api_server.downloads.source import Source

_NAME = "ModelScope"
_DEFAULT_REVISION = "master"


class ModelScope:
    """Repository of ModelScope."""

    def __init__(self, source: Source) -> None:
        self._repo = source.location
        self.revision = source.revision

    def files(self) -> list[RemoteFile]:
        with hub_errors(_NAME, _explain, self._repo):
            found = _api().list_repo_files(self._repo, "model", revision=self.revision)
        return [RemoteFile(one.path, one.size, one.sha256 or None) for one in found if not one.is_dir]

    def fetch(self, file: RemoteFile, folder: Path, on_bytes: OnBytes) -> None:
        # The SDK's own download logs, and draws progress bars.
        api = _api()
        url = api.legacy.get_download_url(self._repo, "model", file.path, self.revision or _DEFAULT_REVISION)
        with hub_errors(_NAME, _explain, self._repo):
            tag, token = file.sha256 or "", HubConfig().token
            transfer.fetch(url, folder / file.path, file.size, on_bytes, tag=tag, token=token)


def _api() -> HubApi:
    # The SDK logs each failed try, and the error is reported at the end.
    logging.getLogger("modelscope_hub").setLevel(logging.CRITICAL)
    return HubApi(endpoint=os.environ.get("MODELSCOPE_ENDPOINT"))


def _explain(error: Exception, repo: str) -> str | None:
    match error:
        case errors.NotExistError():
            return (
                f"{repo} or its revision does not exist on ModelScope, or is private: check both, or set "
                "MODELSCOPE_API_TOKEN."
            )
        case errors.AuthenticationError() | errors.PermissionDeniedError():
            return f"{repo} on ModelScope needs an account with access: set MODELSCOPE_API_TOKEN."
        case urllib.error.HTTPError():
            return f"ModelScope responded {error.code} {error.reason} for a file of {repo}. Try again later."
        case urllib.error.URLError():
            return unreachable(_NAME, error.reason)
        case errors.NetworkError():
            return unreachable(_NAME, error)
    return None
