"""Fills a folder with Debian's packages of another architecture, without installing them.

The folder is a sysroot: the cross compiler finds headers and libraries in it, and qemu the dynamic
linker. apt keeps its lists in the folder too, so nothing changes in the system.
"""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path


class Missing(Exception):
    """The packages cannot be had here: a sentence that says why."""


def sysroot(folder: Path, architecture: str, packages: Sequence[str]) -> Path:
    """Return the folder's sysroot, with these packages and everything that they depend on.

    Args:
        folder: Where to keep it. A sysroot of the same packages is used again.
        architecture: Debian's name, such as "arm64".
        packages: Names of packages.

    Raises:
        Missing: If apt cannot fetch them, with apt's reason.
    """
    root, listed = folder / "root", folder / "packages.txt"
    wanted = "\n".join([architecture, *packages])
    if listed.exists() and listed.read_text() == wanted:
        return root
    shutil.rmtree(folder, ignore_errors=True)
    for path in fetch(folder / "apt", architecture, packages):
        unpack(path, root)
    shutil.rmtree(folder / "apt")
    listed.write_text(wanted)
    return root


def fetch(folder: Path, architecture: str, packages: Sequence[str]) -> list[Path]:
    """Have apt fetch packages and what they depend on. Return the paths of the .deb files."""
    archives = folder / "cache" / "archives"
    for name in (folder / "state", archives):
        name.mkdir(parents=True)
    # Nothing is installed, as far as this apt knows.
    (folder / "status").touch()
    settings = {
        "APT::Architecture": architecture,
        "APT::Architectures": architecture,
        "APT::Sandbox::User": "",
        "Dir::Cache": folder / "cache",
        "Dir::State": folder / "state",
        "Dir::State::status": folder / "status",
    }
    options = [f"--option={name}={value}" for name, value in settings.items()]
    apt_get(*options, "update")
    apt_get(*options, "install", "--download-only", "--no-install-recommends", "-y", *packages)
    return sorted(archives.glob("*.deb"))


def apt_get(*arguments: str) -> None:
    """Run apt-get. Raises Missing if it fails or does not exist."""
    try:
        done = subprocess.run(["apt-get", "-qq", *arguments], capture_output=True, text=True)
    except OSError as error:
        raise Missing(f"apt-get cannot be run: {error.strerror}") from error
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().splitlines() or ["no reason"]
        raise Missing(f"apt-get failed: {reason[-1]}")


def unpack(package: Path, root: Path) -> None:
    """Unpack a .deb file into a sysroot."""
    # Debian 12 has all programs and libraries in /usr, and packages that name the old folders.
    for name in ("bin", "lib", "sbin"):
        (root / "usr" / name).mkdir(parents=True, exist_ok=True)
        if not (root / name).exists():
            (root / name).symlink_to(f"usr/{name}")
    subprocess.run(["dpkg-deb", "--extract", package, root], check=True)
