"""Downloads: once per machine, resumed where they broke off, and checked before they count."""
import hashlib
import http.client
import os
import platform
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from kit.cli import UserError
from kit.processes import write_text

TIMEOUT = 60  # seconds without a byte, after which a connection counts as lost


def local_first(work):
    """work() on local rank 0 and, when that has ended well, on the other ranks.

    For downloads: the others find the files that local rank 0 has fetched. Returns what work()
    returns. An error on one rank is raised on all ranks.
    """
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    result = None
    error = None
    if is_first:
        timeout = socket.getdefaulttimeout()
        try:
            socket.setdefaulttimeout(TIMEOUT)  # torchvision sets none
            result = work()
        except Exception as e:
            error = e
        socket.setdefaulttimeout(timeout)
    if dist.is_initialized():
        messages = [None] * dist.get_world_size()
        dist.all_gather_object(messages, str(error) if error else None)
        others = [UserError(message) for message in messages if message]
        if others and not error:
            error = others[0]
    if error:
        raise error
    return result if is_first else work()


def file_hash(path):
    """sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while True:
            block = f.read(1 << 22)
            if not block:
                return digest.hexdigest()
            digest.update(block)


def fetch(url, folder, check, sha256="", flag="--ckpt", tries=3):
    """Download url below folder once; returns the path.

    Local rank 0 downloads, the other ranks wait. The file grows under a temporary name. A download
    that breaks off is continued, by the next of `tries` and by the next run. The file takes its
    name only when

        it has its full length,
        its sha256 begins with the published `sha256`, where there is one,
        check(path) raises no UserError.

    The hash is recorded beside the file. `flag` takes a path instead of the download; messages
    name the flag. Raises UserError; then there is no file of that name.
    """
    address = hashlib.sha256(url.encode()).hexdigest()[:8]  # many URLs end in the same name
    path = Path(folder) / address / url.split("?")[0].rsplit("/", 1)[-1]

    def work():
        if path.exists():
            return path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = _download(url, path, flag, tries)
            digest = _check_file(part, url, check, sha256)
            write_text(path.with_name(path.name + ".sha256"), f"{digest}  {path.name}\n")
            os.replace(part, path)
        except OSError as e:
            raise UserError(f"cannot fetch {url} into {path.parent}: {e.strerror or e}; free some "
                            f"space, or download it yourself and give {flag} PATH")
        return path

    return local_first(work)


def _check_file(part, url, check, sha256):
    """The hash of a downloaded file. A wrong file is deleted and is a UserError."""
    digest = file_hash(part)
    try:
        if not digest.startswith(sha256):
            raise UserError(f"sha256 is {digest}, published is {sha256}")
        check(part)
    except UserError as e:
        part.unlink()
        raise UserError(f"{url} does not hold what it should and was deleted ({e})")
    return digest


def _download(url, path, flag, tries):
    """Download url beside path, in up to `tries` tries; returns the temporary file."""
    for attempt in range(tries):
        try:
            return _download_once(url, path)
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError,
                TimeoutError) as e:
            reason = getattr(e, "reason", e)
            if isinstance(e, urllib.error.HTTPError) and e.code < 500:
                break  # the server refuses: to ask again does not help
            time.sleep(attempt)
    part = next(iter(path.parent.glob(path.name + ".*.part")), None)
    kept = "nothing was kept"
    if part:
        kept = f"{part.stat().st_size:,} bytes are kept in {part}, the same command continues"
    raise UserError(f"cannot fetch {url}: {reason} ({kept}); check the connection, "
                    f"or download it yourself and give {flag} PATH")


def _download_once(url, path):
    """Download what is still missing of url; returns the temporary file, which is complete.

    Raises ConnectionError when the file is shorter than the server said.
    """
    length, version = _ask(url)
    # The name differs for another version of the file and for another machine.
    part = path.with_name(f"{path.name}.{version}.{platform.node()}.part")
    for old in path.parent.glob(f"{path.name}.*.{platform.node()}.part"):
        if old != part or old.stat().st_size > length > 0:
            old.unlink()
    have = part.stat().st_size if part.exists() else 0
    if not length or have < length:
        _append(url, part, have, length, path.name)
    size = part.stat().st_size
    if length and size != length:
        raise ConnectionError(f"connection closed after {size:,} of {length:,} bytes")
    return part


def _ask(url):
    """A HEAD request -> (length in bytes, 0 where the server does not tell; hash that stands for
    this version of the file)."""
    request = urllib.request.Request(url, method="HEAD")
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        headers = response.headers
    length = int(headers.get("Content-Length") or 0)
    version = f"{length} {headers.get('ETag')} {headers.get('Last-Modified')}"
    return length, hashlib.sha256(version.encode()).hexdigest()[:8]


def _append(url, part, have, length, desc):
    """Download url from byte `have` to the end of file `part`, with a progress bar."""
    headers = {"Range": f"bytes={have}-"} if have else {}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        if have and getattr(response, "status", None) != 206:  # this server cannot continue
            have = 0
        progress = tqdm(total=length or None, initial=have, unit="B", unit_scale=True, desc=desc)
        with open(part, "ab" if have else "wb") as f, progress:
            while True:
                # read1 gives what has come, so that nothing is lost when no more comes.
                block = response.read1(1 << 20)
                if not block:
                    break
                f.write(block)
                progress.update(len(block))
