"""Files from the internet: they go on where they broke off, and count for nothing until their checksum is right."""

import contextlib
import errno
import hashlib
import os
import re
import time
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from tqdm import tqdm

from degrade.errors import Failure

CHUNK = 1 << 18
TIMEOUT = 30.0  # seconds without a byte
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EISDIR, errno.ENOTDIR)
PATIENCE = 5  # connections in a row that bring nothing new


def download(urls: Sequence[str], path: Path, md5: str, limit: int) -> None:
    """Download a file to `path`, from the first of the `urls` that has it.

    What has arrived is kept in `path`.part, whichever way the download ends, and is not asked for again. Whoever
    calls it holds a lock.

    Args:
        urls: tried in this order; http, https or file.
        path: of the file; what is there is replaced.
        md5: of the whole file, without which it is deleted.
        limit: bytes that it has at most.

    Raises:
        Failure: none of them gives the file.
        OSError: it cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    if part.is_symlink():
        part.unlink()  # it would be written to where that points
    reasons = []
    for url in urls:
        try:
            _fetch_whole(url, part, md5, limit)
        except (OSError, HTTPException, Failure, ValueError) as error:
            if _of_the_disk(error):
                raise
            reason = " ".join(str(getattr(error, "reason", error)).split())  # a server can put newlines in it
            reasons.append(f"{urlsplit(url).netloc or url}: {reason or type(error).__name__}")
        else:
            part.replace(path)
            return
    raise Failure("; ".join(reasons))


def _fetch_whole(url: str, part: Path, md5: str, limit: int) -> None:
    """
    Raises:
        Failure: it is another file, or too large.
        OSError, HTTPException: no connection brings more of it.
    """
    if urlsplit(url).scheme not in ("http", "https", "file"):
        raise Failure("an address must begin with http://, https:// or file://")
    left, furthest = PATIENCE, _size(part)
    while True:
        start = _size(part)
        try:
            _append(url, part, limit)
        except HTTPError as error:
            if error.code == 416 and start:  # there is no more than that
                error.close()
            else:
                raise
        except (OSError, HTTPException) as error:
            if _of_the_disk(error):
                raise
            left = PATIENCE if _size(part) > furthest else left - 1
            furthest = max(furthest, _size(part))
            if not left or not _size(part):  # or nothing has ever come
                raise
            time.sleep(0.2)
            continue
        if _md5(part) == md5:
            return
        part.unlink(missing_ok=True)
        if not start:
            raise Failure("it gives another file, by its checksum")


def _append(url: str, part: Path, limit: int) -> None:
    """One connection: what `part` lacks, or all of it where the server cannot go on in the middle."""
    start = _size(part)
    request = Request(url, headers={"Range": f"bytes={start}-"} if start else {})  # noqa: S310  the caller has looked
    with urlopen(request, timeout=TIMEOUT) as response:  # noqa: S310
        goes_on = bool(re.match(rf"bytes {start}-", response.headers.get("Content-Range", "")))
        start = start if goes_on else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        if (total or 0) > limit:
            raise Failure(f"it is too large, {total:,} bytes")
        with (
            part.open("ab" if goes_on else "wb") as file,
            tqdm(desc=part.stem, initial=start, total=total, unit="B", unit_scale=True, leave=True) as bar,
        ):
            while chunk := response.read1(CHUNK) if hasattr(response, "read1") else response.read(CHUNK):
                if file.tell() + len(chunk) > limit:
                    raise Failure(f"it is too large, above {limit:,} bytes")
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    if total is not None and _size(part) < total:
        raise HTTPException("the connection broke off")


def _of_the_disk(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in DISK


def _size(part: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return part.stat().st_size
    return 0


def _md5(part: Path) -> str:
    with part.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
