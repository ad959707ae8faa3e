"""Archives from the network, or placed by hand, checked before anything reads them.

The downloader of TFDS retries for minutes without a network, waits forever on a connection that
stalls, and keeps a wrong file. So archives are downloaded here, to the folder where TFDS looks for
archives placed by hand. pooch would save ten lines, but it waits for a silent server as long as for
a stalled one, leaves a file behind when the process is killed, and makes files that only their
owner can read.
"""

from __future__ import annotations

import hashlib
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

from cnn.errors import UserError
from cnn.runtime.disk import atomic_write
from cnn.runtime.screen import waiting

if TYPE_CHECKING:
    import requests

_CONNECT_S = 4  # to connect to one address of the host
_ANSWER_S = 6  # from the name look-up to the first byte, including all addresses and redirects
_STALL_S = 30  # between two pieces of the body


def ensure_archive(
    url: str, *, size: int, sha256: str, destination: Path, cached: list[Path]
) -> None:
    """Downloads an archive unless a file is there already, and checks it either way.

    Args:
      url: where the archive is downloaded from.
      size: its number of bytes, for messages.
      sha256: its hex digest.
      destination: the file to download to; it may have been placed by hand.
      cached: other files that TFDS would take for this archive.

    Raises:
      UserError: an existing file has another digest (it is kept); the server cannot be reached, or
        it sends an error or a file with another digest (nothing is kept).
    """
    found = next((path for path in (destination, *cached) if path.is_file()), None)
    if found is None:
        _download(url, size, sha256, destination)
        return
    with open(found, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != sha256:
        raise UserError(
            f"{found} is not the archive of {url}: its sha256 is {digest} ({found.stat().st_size:,}"
            f" bytes), not {sha256} ({size:,} bytes); delete it or put the right file there"
        )


def check_reachable(url: str, destination: Path) -> None:
    """Raises the UserError of `ensure_archive` within seconds if no server answers at `url`."""
    _open(url, destination).close()


def _download(url: str, size: int, sha256: str, destination: Path) -> None:
    import requests

    digest, received = hashlib.sha256(), 0
    try:
        with _open(url, destination) as response:
            if response.status_code != 200:
                raise UserError(
                    f"{url} answers HTTP {response.status_code}: {_alternatives(destination)}"
                )
            destination.parent.mkdir(parents=True, exist_ok=True)
            with (
                atomic_write(destination) as stream,
                waiting(f"downloading {destination.name}", sys.stderr) as task,
            ):
                for block in response.iter_content(1 << 18):
                    stream.write(block)
                    digest.update(block)
                    received += len(block)
                    task.detail = f"{received / 1e6:,.0f} of {size / 1e6:,.0f} MB"
                if digest.hexdigest() != sha256:
                    raise UserError(
                        f"{url} sent a wrong file: {received:,} bytes with sha256 "
                        f"{digest.hexdigest()}, not {size:,} bytes with {sha256} (truncated, or an "
                        f"error page?); nothing was kept; try again, {_alternatives(destination)}"
                    )
    except requests.RequestException as error:
        raise UserError(
            f"the download of {url} broke off after {received:,} of {size:,} bytes "
            f"({type(error).__name__}); nothing was kept; try again, {_alternatives(destination)}"
        ) from error


def _open(url: str, destination: Path) -> requests.Response:
    import requests

    answer: Future[requests.Response] = Future()

    def ask() -> None:
        try:
            answer.set_result(requests.get(url, stream=True, timeout=(_CONNECT_S, _STALL_S)))
        except Exception as error:
            answer.set_exception(error)

    # A name look-up has no timeout of its own, so it runs in a thread that can be abandoned.
    threading.Thread(target=ask, daemon=True).start()
    try:
        return answer.result(_ANSWER_S)
    except Exception as error:
        is_late = isinstance(error, TimeoutError)
        reason = f"no answer in {_ANSWER_S} s" if is_late else type(error).__name__
        raise UserError(f"cannot reach {url} ({reason}): {_alternatives(destination)}") from error


def _alternatives(destination: Path) -> str:
    return (
        f"put the archive by hand at {destination}, or set TFDS_DATA_DIR to a directory that holds "
        "the prepared dataset, or train on embedded data with --config configs/digits.py"
    )
