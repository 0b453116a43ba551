"""Files: atomic writes, JSON, tensors, blocks of Markdown, digests."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from pathlib import Path

from safetensors.torch import save_file


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary path that replaces `path` once the block succeeds.

    Raises OSError that names the file if the disk is full or may not be written to.
    """
    path = Path(path)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with explained(path):
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:  # an interrupt too
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def explained(path):
    """Raise OSError that names the file and what to do, where writing it fails."""
    try:
        yield
    except Exception as error:  # safetensors has errors of its own
        number = getattr(error, "errno", None)
        if "No space left" in str(error) or number == errno.ENOSPC:
            message = f"the disk is full: {path} was not written; free space and run again"
            raise OSError(errno.ENOSPC, message) from error
        if number in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            message = f"{path} may not be written ({error}): choose another folder for results"
            raise OSError(number, message) from error
        raise


@contextlib.contextmanager
def locked(folder):
    """Keep other processes out of a folder in the block; the lock ends with its process.

    Raises RuntimeError if another process holds it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / ".lock"
    with open(file, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_there = os.path.samestat(os.fstat(lock.fileno()), os.stat(file))
        except (BlockingIOError, FileNotFoundError):
            is_there = False  # or another process has removed it just now
        if not is_there:
            raise RuntimeError(
                f"another process is writing to {folder}: wait for it, stop it, or choose another "
                "name"
            )
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def read_json(path, default=None):
    """Return the value in a JSON file, or `default` if there is no file.

    Raises ValueError that names a damaged file.
    """
    if not Path(path).exists():
        return default
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}): restore it, or delete it to make it anew"
        ) from error


def save_json(value, path):
    """Write a value as JSON."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def save_tensors(tensors, path):
    """Write a dict of tensors as safetensors."""
    with atomic(path) as temporary:
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, temporary)


def fill(document, text, block="figures"):
    """Replace the text between `<!-- block -->` and `<!-- /block -->` of a Markdown file.

    Raises ValueError if the file lacks one of the two comments.
    """
    document = Path(document)
    start, end = f"<!-- {block} -->\n", f"<!-- /{block} -->"
    old = document.read_text()
    if not 0 <= old.find(start) < old.find(end):
        raise ValueError(f"{document} has no block to fill: add {start.strip()} and {end}")
    with atomic(document) as temporary:
        temporary.write_text(old[: old.index(start)] + start + text + old[old.index(end) :])


def digest(path):
    """Return a short SHA-256 of a file, or of all files below a folder with their names."""
    sha = hashlib.sha256()
    for file in sorted(p for p in [Path(path), *Path(path).rglob("*")] if p.is_file()):
        sha.update(file.name.encode())
        with open(file, "rb") as f:
            while chunk := f.read(2**22):
                sha.update(chunk)
    return sha.hexdigest()[:12]
