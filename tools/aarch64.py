"""The build for AArch64 on a machine of another kind, and how its programs run there.

A cross compiler compiles. The headers of Debian's Python and what the server links are Debian's
packages for AArch64, in a sysroot (`debian_sysroot.py`). qemu runs programs.
"""

import os
import shutil
import subprocess
from pathlib import Path

import debian_sysroot

ROOT = Path(os.path.abspath(__file__)).parent.parent
MACHINE = "aarch64"
COMPILER = "aarch64-linux-gnu-g++"
QEMU = "qemu-aarch64"
# What setup.py builds for AArch64 is beside the sysroot.
SYSROOT = ROOT / "build" / MACHINE / "debian"


class Missing(Exception):
    """Something that is needed is not installed: a sentence, with how to install it."""


def compiler() -> str:
    """Return the cross compiler's path. Raises Missing."""
    path = shutil.which(COMPILER)
    if path is None:
        raise Missing(f"there is no {COMPILER}. On Debian: apt install g++-aarch64-linux-gnu")
    return path


def qemu() -> str:
    """Return the path of the program that runs AArch64's programs. Raises Missing."""
    path = shutil.which(QEMU)
    if path is None:
        raise Missing(f"there is no {QEMU}. On Debian: apt install qemu-user")
    return path


def sysroot() -> Path:
    """Return a folder with Debian's Python and what the server links. Raises Missing.

    The first call fetches 100 MB of packages.
    """
    # The others are programs that run on this machine.
    listed = (ROOT / "tools" / "server_packages.txt").read_text().split()
    libraries = [name for name in listed if name.endswith("-dev")]
    try:
        return debian_sysroot.sysroot(SYSROOT, "arm64", ["python3-dev", *libraries])
    except debian_sysroot.Missing as why:
        raise Missing(f"Debian's packages for AArch64 cannot be fetched: {why}") from why


def binutils() -> Path:
    """Return the folder of the cross compiler's `strip` and `objdump`, under these names."""
    command = [compiler(), "-print-prog-name=strip"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # Not resolved: they are links to programs with longer names.
    return Path(done.stdout.strip()).parent


def build_variables(python: str) -> dict[str, str]:
    """Return the environment variables with which pip builds a wheel for AArch64. Raises Missing.

    Args:
        python: The version of the CPython that runs pip, such as "3.11". The wheel is for the same.
    """
    # First, because the sysroot is fetched.
    cxx = compiler()
    root = sysroot()
    libraries = root / "usr" / "lib" / "aarch64-linux-gnu"
    return {
        "CXX": f"{cxx} --sysroot={root}",
        "PATH": f"{binutils()}:{os.environ['PATH']}",
        "PKG_CONFIG_LIBDIR": f"{libraries / 'pkgconfig'}:{root / 'usr' / 'share' / 'pkgconfig'}",
        "PKG_CONFIG_SYSROOT_DIR": str(root),
        # CPython's and setuptools' own variables for a cross build. By the first, pip and setup.py
        # know the machine.
        "_PYTHON_HOST_PLATFORM": f"linux-{MACHINE}",
        "SETUPTOOLS_EXT_SUFFIX": f".cpython-{python.replace('.', '')}-{MACHINE}-linux-gnu.so",
    }
