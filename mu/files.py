"""Read and write files whole: JSON, tensors, digests."""

import contextlib
import hashlib
import json
import os
from pathlib import Path

from safetensors.torch import save_file


@contextlib.contextmanager
def atomic(path):
    """Yields a temporary path beside `path`, which takes its place only when the block succeeds. A full disk is said so."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as error:  # an interrupt too
        temporary.unlink(missing_ok=True)
        if "No space left" in str(error) or getattr(error, "errno", None) == 28:
            raise OSError(
                28,
                f"the disk is full: {path} was not written, what was there before is whole; free space and run again",
            ) from error
        raise


def read_json(path, default=None):
    """The value in a JSON file, or `default` where there is no file."""
    path = Path(path)
    return json.loads(path.read_text()) if path.exists() else default


def save_json(value, path):
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def fill(document, text, mark="figures"):
    """Put text between `<!-- mark -->` and `<!-- /mark -->` of a Markdown file: measured figures are written, never typed.

    Raises ValueError for a file without the two marks."""
    document, (start, end) = Path(document), (f"<!-- {mark} -->\n", f"<!-- /{mark} -->")
    old = document.read_text()
    if not 0 <= old.find(start) < old.find(end):
        raise ValueError(
            f"{document} has no place for figures: it needs the lines {start.strip()} and {end}"
        )
    with atomic(document) as temporary:
        temporary.write_text(old[: old.index(start)] + start + text + old[old.index(end) :])


def save_tensors(tensors, path):
    with atomic(path) as temporary:
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, temporary)


def digest(path):
    """Short sha256 of a file, or of all files below a folder."""
    sha = hashlib.sha256()
    for file in sorted(p for p in [Path(path), *Path(path).rglob("*")] if p.is_file()):
        sha.update(file.name.encode())
        with open(file, "rb") as f:  # in pieces: weights may be larger than the memory
            while piece := f.read(2**22):
                sha.update(piece)
    return sha.hexdigest()[:12]
