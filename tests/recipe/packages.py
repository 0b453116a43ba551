"""Write npm packages of emoji."""

import io
import json
import tarfile


def write_package(folder, package, version, **files):
    """Write a tarball as `npm pack` does; files: name → value of each JSON file."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{package.strip('@').replace('/', '-')}-{version}.tgz"
    with tarfile.open(folder / name, "w:gz") as tar:
        for stem, value in files.items():
            data = json.dumps(value).encode()
            entry = tarfile.TarInfo(f"package/{stem}.json")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
