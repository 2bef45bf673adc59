"""Single file at a URL."""

from __future__ import annotations

import urllib.error
from pathlib import Path

from llm_api_server.downloads import transfer
from llm_api_server.downloads.choice import RemoteFile
from llm_api_server.downloads.hub import OnBytes, hub_errors, unreachable
from llm_api_server.downloads.source import Source, file_name
from llm_api_server.errors import DownloadError


class PlainFile:
    """File at a URL, without revisions or checksums."""

    revision: str | None = None

    def __init__(self, source: Source) -> None:
        self._url = source.location
        self._tag = ""

    def files(self) -> list[RemoteFile]:
        with hub_errors(self._url, _explain, self._url):
            headers = transfer.head(self._url)
        length = headers.get("content-length", "")
        if not length.isdigit() or length == "0":
            raise DownloadError(
                f"{self._url} does not give the size of the file; download it into models_dir by other means."
            )
        self._tag = headers.get("etag") or headers.get("last-modified") or ""
        return [RemoteFile(file_name(self._url), int(length))]

    def fetch(self, file: RemoteFile, folder: Path, on_bytes: OnBytes) -> None:
        with hub_errors(self._url, _explain, self._url):
            transfer.fetch(self._url, folder / file.path, file.size, on_bytes, tag=self._tag)


def _explain(error: Exception, url: str) -> str | None:
    if isinstance(error, urllib.error.HTTPError):
        return f"{url} responded {error.code} {error.reason}. Check the address."
    if isinstance(error, urllib.error.URLError):
        return unreachable(url, error.reason)
    return None
