"""Whether a wheel and a source archive hold the package, all of it and nothing else:

python tools/check_dist.py dist/*
"""

from __future__ import annotations

import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from zipfile import ZipFile

SOURCE = Path(__file__).parents[1] / "src"
BESIDE = {  # what a source archive holds beside the package
    "LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "MANIFEST.in", "PKG-INFO", "pyproject.toml", "setup.cfg",
}  # fmt: skip


def main(archives: list[str]) -> None:
    """Say what is missing and what is too much in each archive, and exit with 1 where there is any."""
    faults = [f"{archive}: {fault}" for archive in archives for fault in check(Path(archive))]
    print("\n".join(faults) or f"{', '.join(archives)}: complete, and nothing else")
    sys.exit(bool(faults) or not archives)


def check(archive: Path) -> list[str]:
    """What is wrong with the contents of a wheel (.whl) or a source archive (.tar.gz)."""
    wheel = archive.suffix == ".whl"
    if wheel:
        with ZipFile(archive) as file:
            held = set(file.namelist())
    else:
        with tarfile.open(archive) as file:
            held = {member.name.partition("/")[2] for member in file if member.isfile()}
    return compared(held, package(), wheel)


def package() -> set[str]:
    """Files of the package in this checkout, from ``saccade/`` on."""
    files = (path.relative_to(SOURCE) for path in (SOURCE / "saccade").rglob("*") if path.is_file())
    return {path.as_posix() for path in files if "__pycache__" not in path.parts}


def compared(held: Iterable[str], wanted: set[str], wheel: bool) -> list[str]:
    """Files that are missing from what an archive holds, and those that have no place in it."""
    held = set(held)
    wanted = wanted if wheel else {f"src/{name}" for name in wanted} | BESIDE
    missing = [f"{name} is missing" for name in sorted(wanted - held)]
    return missing + [f"{name} has no place in it" for name in sorted(held - wanted) if not made(name, wheel)]


def made(name: str, wheel: bool) -> bool:
    """Whether a file is one that the build writes about the package."""
    folders = PurePosixPath(name).parts[:-1]
    return any(folder.endswith(".dist-info" if wheel else ".egg-info") for folder in folders)


if __name__ == "__main__":
    main(sys.argv[1:])
