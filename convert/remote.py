"""A checkpoint on the Hub, read without downloading it: pieces by HTTP range requests.

With a staging folder each file is fetched into it before its first use, and deleted after its last.
"""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from mlx_mimo.checkpoint.directory import Directory
from mlx_mimo.checkpoint.header import Header, check_length, parse_header
from mlx_mimo.checkpoint.index import INDEX, checked_weight_map
from mlx_mimo.errors import FormatError, MimoError

from .source import Source
from .writer import STAGED

ATTEMPTS = 6
FIRST_PAUSE_SECONDS = 0.5  # doubled from one attempt to the next
TIMEOUT_SECONDS = 60
BLOCK_BYTES = 1 << 20
_LOST = (urllib.error.URLError, http.client.HTTPException, OSError)


class RemoteSource(Source):
    """A repository on the Hub that HF_ENDPOINT names, at the commit that `revision` is when this is made.

    Raises MimoError where the Hub cannot be reached, or refuses.
    """

    local = False
    repo: str
    revision: str

    def __init__(self, repo: str, revision: str | None = None, staging: Path | None = None):
        self.repo = repo
        self.endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        self.staging = staging
        answer = self._get(f"{self.endpoint}/api/models/{repo}/revision/{revision or 'main'}")
        commit = self._json("the Hub's answer", answer).get("sha")
        if not isinstance(commit, str):
            raise MimoError(f"{repo}: the Hub's answer names no commit; is it a model's repository?")
        self.revision = commit
        config = self._json("config.json", self.text("config.json"))
        weight_map = checked_weight_map(self._json(INDEX, self.text(INDEX)))
        Directory.__init__(self, repo, config, weight_map)  # a Source's own looks for a folder
        self._sizes: dict[str, int] = {}
        self._fetches: dict[str, Future] = {}
        self._fetcher = ThreadPoolExecutor(1)
        self._closing = False

    def text(self, file: str) -> bytes | None:
        try:
            return self._get(self._url(file))
        except _Absent:
            return None

    def identity(self, file: str) -> list[str | int]:
        return [self.revision, self.header(file).file_bytes]

    def need(self, files: Iterable[str], soon: Iterable[str] = ()) -> None:
        """Fetches `files`, and begins to fetch `soon`. Returns when `files` are in the staging folder."""
        if self.staging is None:
            return
        for file in (*files, *soon):
            if file not in self._fetches:
                self._fetches[file] = self._fetcher.submit(self._fetch, file)
        for file in files:
            self._fetches[file].result()

    def release(self, file: str) -> None:
        if file in self._fetches:
            self._fetches.pop(file).result()
            self._staged(file).unlink(missing_ok=True)

    def close(self) -> None:
        self._closing = True
        self._fetcher.shutdown(cancel_futures=True)

    def staging_bytes(self, files: Iterable[str]) -> int:
        return sum(self.header(file).file_bytes for file in files) if self.staging is not None else 0

    def _staged(self, file: str) -> Path:
        if self.staging is None:
            raise MimoError(f"{file}: no staging folder to fetch it into; name one")
        return self.staging / (STAGED + file)

    def _read_header(self, file: str) -> Header:
        prefix = self._range(file, 0, 8)
        path = Path(file)
        length = check_length(path, prefix, self._sizes[file])
        return parse_header(path, self._range(file, 8, length), self._sizes[file])

    def _pread(self, file: str, offset: int, nbytes: int) -> bytes:
        fetch = self._fetches.get(file)
        if fetch is None or not fetch.done():
            return self._range(file, offset, nbytes)
        with open(self._staged(file), "rb") as handle:
            data = os.pread(handle.fileno(), nbytes, offset)
        if len(data) != nbytes:
            raise FormatError(f"{file}: its fetched copy was cut short; run the same command again")
        return data

    def _range(self, file: str, offset: int, nbytes: int) -> bytes:
        """Bytes [offset, offset + nbytes) of a file on the Hub. Remembers the file's size."""
        if nbytes == 0:
            return b""
        request = self._request(self._url(file), {"Range": f"bytes={offset}-{offset + nbytes - 1}"})

        def attempt() -> bytes:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
                self._learn_size(file, answer)
                data = answer.read(nbytes)
            if len(data) != nbytes:
                raise http.client.IncompleteRead(data, nbytes - len(data))
            return data

        return self._patiently(file, attempt)

    def _learn_size(self, file: str, answer) -> None:
        size = answer.headers.get("Content-Range", "").rpartition("/")[2]
        if answer.status != 206 or not size.isdigit():
            raise MimoError(f"{file}: the server at {self.endpoint} does not answer range requests")
        if self._sizes.setdefault(file, int(size)) != int(size):
            raise MimoError(f"{file}: changed on the server from {self._sizes[file]:,} to {int(size):,} bytes")

    def _fetch(self, file: str) -> None:
        """Fetches a whole file into the staging folder, from where an earlier attempt stopped."""
        path, size = self._staged(file), self.header(file).file_bytes

        def attempt() -> None:
            with open(path, "ab") as out:
                begin = out.tell()
                if begin == size:
                    return
                if begin > size:  # not this file's bytes
                    out.truncate(0)
                    begin = 0
                request = self._request(self._url(file), {"Range": f"bytes={begin}-"})
                with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
                    self._learn_size(file, answer)
                    while not self._closing and (block := answer.read(BLOCK_BYTES)):
                        out.write(block)
                if self._closing:
                    return
                if out.tell() != size:
                    raise http.client.IncompleteRead(b"", size - out.tell())

        self._patiently(file, attempt)

    def _patiently(self, what: str, attempt):
        """What `attempt` returns; it is called again while the connection, not the answer, is at fault.

        Raises MimoError after the last attempt.
        """
        for number in range(1, ATTEMPTS + 1):
            try:
                return attempt()
            except urllib.error.HTTPError as error:
                if error.code == 404:
                    raise _Absent(f"{what}: not at {self.endpoint} ({error.code})") from None
                if error.code in (401, 403):
                    raise MimoError(
                        f"{what}: the Hub refuses it ({error.code}); does {self.repo} exist? log in with: hf auth login"
                    ) from None
                reason = f"{error.code} {error.reason}"
                if error.code < 500 and error.code not in (408, 429):
                    raise MimoError(f"{what}: the server answered {reason}") from None
            except _LOST as error:
                if isinstance(error, OSError) and error.filename and not isinstance(error, urllib.error.URLError):
                    raise  # the disk's fault, not the network's
                reason = str(error) or type(error).__name__
            if number < ATTEMPTS:
                time.sleep(FIRST_PAUSE_SECONDS * 2 ** (number - 1))
        raise MimoError(
            f"{what}: could not be fetched in {ATTEMPTS} attempts ({reason}); the same command goes on later"
        )

    def _get(self, url: str) -> bytes:
        def attempt() -> bytes:
            with urllib.request.urlopen(self._request(url, {}), timeout=TIMEOUT_SECONDS) as answer:
                return answer.read()

        return self._patiently(url.rpartition("/")[2] if "/resolve/" in url else self.repo, attempt)

    def _url(self, file: str) -> str:
        return f"{self.endpoint}/{self.repo}/resolve/{self.revision}/{file}"

    def _request(self, url: str, headers: dict) -> urllib.request.Request:
        from huggingface_hub import get_token

        request = urllib.request.Request(
            url, headers=headers | {"User-Agent": "mlx_mimo", "Accept-Encoding": "identity"}
        )
        if token := get_token():
            request.add_unredirected_header("Authorization", f"Bearer {token}")  # not for where a redirect leads
        return request

    @staticmethod
    def _json(what: str, data: bytes | None) -> dict:
        try:
            fields = json.loads(data or b"")
        except ValueError:
            fields = None
        if not isinstance(fields, dict):
            raise FormatError(f"{what}: not a JSON object; is it a model's repository?")
        return fields


class _Absent(MimoError):
    """The Hub has no such file."""
