"""Archives from the network, or from where a person put them; checked before anything reads them.

TFDS has a downloader of its own, but without a network it retries for minutes, a connection that
stalls stops it for ever, and a bad file stays behind. So the archives are fetched here, into
the directory in which TFDS looks for archives placed by hand.
"""

from __future__ import annotations

import hashlib
import queue
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from cnn.errors import UserError
from cnn.runtime.disk import atomic_write
from cnn.runtime.screen import waiting

if TYPE_CHECKING:
    import requests

_CONNECT_S = 4  # for one address of the host
_ANSWER_S = 6  # from the name look-up to the first byte, all addresses and redirects together
_STALL_S = 30  # between two pieces of the body


def ensure_archive(url: str, *, size: int, sha256: str, place: Path, cached: list[Path]) -> None:
    """Sees to it that TFDS will find the archive of `url`, whole.

    Args:
      url: where it is in the network.
      size: bytes it must have.
      sha256: hex digest it must have.
      place: the file to download to; a person may have put it there.
      cached: other files that TFDS takes for this archive, if they exist.

    Raises:
      UserError: the file that is there is wrong (it is left alone), the network or the server
        gives no file, or gives a wrong one (nothing is kept).
    """
    found = next((path for path in (place, *cached) if path.is_file()), None)
    if found is None:
        _download(url, size, sha256, place)
        return
    with open(found, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != sha256:
        raise UserError(
            f"{found} is not the archive of {url}: its sha256 is {digest} ({found.stat().st_size:,}"
            f" bytes), not {sha256} ({size:,} bytes); delete it or put the right file there"
        )


def check_reachable(url: str, place: Path) -> None:
    """Raises the UserError of `ensure_archive` within seconds if nobody answers at `url`."""
    _open(url, place).close()


def _download(url: str, size: int, sha256: str, place: Path) -> None:
    import requests

    digest, received = hashlib.sha256(), 0
    try:
        with _open(url, place) as response:
            if response.status_code != 200:
                raise UserError(f"{url} answers HTTP {response.status_code}: {_other_ways(place)}")
            place.parent.mkdir(parents=True, exist_ok=True)
            with (
                atomic_write(place) as stream,
                waiting(f"downloading {place.name}", sys.stderr) as task,
            ):
                for block in response.iter_content(1 << 18):
                    stream.write(block)
                    digest.update(block)
                    received += len(block)
                    task.detail = f"{received / 1e6:,.0f} of {size / 1e6:,.0f} MB"
                if digest.hexdigest() != sha256:
                    raise UserError(
                        f"{url} gave a wrong file: {received:,} bytes with sha256 "
                        f"{digest.hexdigest()}, not {size:,} bytes with {sha256} (cut short, or an "
                        f"error page?); nothing was kept; try again, {_other_ways(place)}"
                    )
    except requests.RequestException as error:
        raise UserError(
            f"the download of {url} broke off after {received:,} of {size:,} bytes "
            f"({type(error).__name__}); nothing was kept; try again, {_other_ways(place)}"
        ) from error


def _open(url: str, place: Path) -> requests.Response:
    import requests

    answers: queue.Queue[requests.Response | Exception] = queue.Queue()

    def ask() -> None:
        try:
            answers.put(requests.get(url, stream=True, timeout=(_CONNECT_S, _STALL_S)))
        except Exception as error:  # handed to the thread that waits
            answers.put(error)

    # A name look-up knows no timeout: only a thread can be left behind.
    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=_ANSWER_S)
    except queue.Empty:
        answer = TimeoutError(f"no answer in {_ANSWER_S} s")
    if isinstance(answer, Exception):
        reason = str(answer) if isinstance(answer, TimeoutError) else type(answer).__name__
        raise UserError(f"cannot reach {url} ({reason}): {_other_ways(place)}") from answer
    return answer


def _other_ways(place: Path) -> str:
    return (
        f"put the archive by hand at {place}, or set TFDS_DATA_DIR to a directory that holds the "
        "prepared dataset, or train on embedded data with --config configs/digits.py"
    )
