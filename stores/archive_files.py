"""The files of the archive: a folder, or a bucket through fsspec. Blocking: call it in a thread.

A file appears whole or not at all. In a folder it is written under another name, synced, renamed, and its
folder is synced; an object store does that by itself. Other protocols than `file://` need their package
(`s3fs`, `gcsfs`, `adlfs`) beside ours.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import fsspec
from backports import zstd

from carillon.archive import DATA, MANIFEST, Line, Part, manifest, read_manifest, split_lines
from carillon.errors import ArchiveError

_TEMPORARY: Final = ".tmp"


class ArchiveFiles:
    """Parts below a root.

    Args:
        root: a folder, or a URL that fsspec knows (`s3://bucket/prefix`).
        level: of compression, 1 to 19.

    Raises:
        ArchiveError: the root's protocol is not known, or its package is missing.
    """

    def __init__(self, root: str, level: int = 9) -> None:
        self.root = root
        self._level = level
        self.step: Callable[[str], None] = lambda _: None
        """Called between any two steps of `write`; tests stop there."""
        try:
            filesystem, base = fsspec.core.url_to_fs(root)
        except (ValueError, ImportError, OSError) as exc:
            raise ArchiveError(f"the archive's root {root!r} cannot be used: {exc}") from exc
        self._fs: Any = filesystem
        self._base = base.rstrip("/")
        protocols = self._fs.protocol if isinstance(self._fs.protocol, tuple) else (self._fs.protocol,)
        self._local = "file" in protocols

    def write(self, part: Part, lines: list[Line], raw: bytes) -> Part:
        """Write a part's data, read it back, and only then its manifest.

        Args:
            part: without what only the file has: its size and checksum.
            raw: the lines as `join_lines` puts them.

        Returns:
            The part with both.

        Raises:
            ArchiveError: what was read back is not what was written, or the root does not take it.
        """
        data = zstd.compress(raw, self._level)
        whole = part._replace(file_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        self._put(part.path + DATA, data)
        self.step("data written")
        if self.read_raw(whole) != raw or len(lines) != part.rows:
            raise ArchiveError(f"{part.path}{DATA}: what was read back differs from what was written")
        self.step("data read back")
        self._put(part.path + MANIFEST, manifest(whole))
        with self._told(part.path):
            if read_manifest(self._get(part.path + MANIFEST)) != whole:
                raise ArchiveError(f"{part.path}{MANIFEST}: what was read back differs from what was written")
        return whole

    def read(self, part: Part) -> list[Line]:
        """The lines of a part.

        Raises:
            ArchiveError: its file is missing, damaged, or holds another number of lines.
        """
        lines = split_lines(self.read_raw(part))
        if len(lines) != part.rows:
            raise ArchiveError(f"{part.path}{DATA}: expected {part.rows} notifications, got {len(lines)}")
        return lines

    def read_raw(self, part: Part) -> bytes:
        """The text of a part, its checksum compared. Raises ArchiveError."""
        with self._told(part.path):
            data = self._get(part.path + DATA)
        found = hashlib.sha256(data).hexdigest()
        if found != part.sha256:
            raise ArchiveError(
                f"{part.path}{DATA} is damaged: expected sha256 {part.sha256},"
                f" got {found} of {len(data)} bytes"
            )
        try:
            return zstd.decompress(data)
        except zstd.ZstdError as exc:
            raise ArchiveError(f"{part.path}{DATA} is damaged: {exc}") from exc

    def read_manifest(self, path: str) -> Part:
        """The manifest beside a part. Raises ArchiveError."""
        with self._told(path):
            return read_manifest(self._get(path + MANIFEST))

    def remove(self, path: str) -> None:
        """Remove a part, manifest first; what is not there is removed already. Raises ArchiveError."""
        for ending in (MANIFEST, DATA, MANIFEST + _TEMPORARY, DATA + _TEMPORARY):
            with self._told(path), contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(f"{self._base}/{path}{ending}")

    def paths(self) -> list[str]:
        """Every file below the root, as paths below it. Raises ArchiveError."""
        with self._told(self.root):
            self._fs.invalidate_cache()
            try:
                found = self._fs.find(self._base)
            except FileNotFoundError:
                return []
        return sorted(one[len(self._base) :].lstrip("/") for one in found)

    def _get(self, path: str) -> bytes:
        return self._fs.cat_file(f"{self._base}/{path}")

    def _put(self, path: str, data: bytes) -> None:
        try:
            self._put_whole(path, data)
        except Exception as exc:  # object stores raise errors of their own kinds
            why = f"{type(exc).__name__}: {exc}"
            raise ArchiveError(f"{path} cannot be written to {self.root}: {why}") from exc

    def _put_whole(self, path: str, data: bytes) -> None:
        full = f"{self._base}/{path}"
        if not self._local:
            self._fs.makedirs(full.rpartition("/")[0], exist_ok=True)
            self._fs.pipe_file(full, data)
            return
        folder = Path(full).parent
        made = [one for one in (folder, *folder.parents) if not one.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        temporary = full + _TEMPORARY
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self.step("synced")
        os.replace(temporary, full)
        for one in (folder, *(made_one.parent for made_one in made)):
            descriptor = os.open(one, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    @contextlib.contextmanager
    def _told(self, path: str) -> Iterator[None]:
        try:
            yield
        except ArchiveError:
            raise
        except FileNotFoundError as exc:
            raise ArchiveError(
                f"{path} is not in {self.root}: is that the archive's root, and mounted here?"
            ) from exc
        except OSError as exc:
            raise ArchiveError(f"{path} in {self.root}: {type(exc).__name__}: {exc}") from exc
        except Exception as exc:  # object stores raise errors of their own kinds
            raise ArchiveError(f"{path} in {self.root}: {type(exc).__name__}: {exc}") from exc
