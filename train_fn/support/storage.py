"""A study's files on object storage (s3://, gs://): written locally first, copied there after every change, and fetched
where a node has not got them."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE_S = 300.0  # how long storage may fail before what waits for it fails too


def retry_on_os_error(write: Callable[[], None], tell: Callable[[str], None], wait_s: float = 2.0) -> None:
    """Write to storage, again and again while it fails: a full disk or a lost mount then costs time, not the trial.

    `write` must do its work aside and put it in place at the end. Raises the OSError that still comes after PATIENCE_S.
    """
    began = time.monotonic()
    while True:
        try:
            return write()
        except OSError as error:
            if time.monotonic() - began > PATIENCE_S:
                raise
            tell(f"storage: {error}; tried again")
            time.sleep(wait_s)


@dataclass(frozen=True)
class Storage:
    """Where a study's folder is kept. Without a `uri` it is a folder that all nodes share, and nothing is copied."""

    directory: Path
    uri: str = ""
    """The study's own place, such as s3://bucket/results/STUDY."""

    @classmethod
    def under(cls, place: str, directory: Path) -> Storage:
        """That of a folder whose copy lies under `place` (s3://bucket/prefix) by its own name; "": nowhere."""
        return cls(directory, f"{place.rstrip('/')}/{directory.name}" if place else "")

    def push(self, path: Path) -> None:
        """Copy a file or folder of the study there. Raises OSError."""
        if self.uri:
            import pyarrow.fs

            remote, there = self._there(path)
            remote.create_dir(there if path.is_dir() else there.rpartition("/")[0], recursive=True)
            pyarrow.fs.copy_files(str(path), there, source_filesystem=pyarrow.fs.LocalFileSystem(),
                                  destination_filesystem=remote)  # fmt: skip

    def pull(self, path: Path) -> None:
        """Fetch a file or folder that is missing here, if it is there; several processes of a node may want it at once.
        Raises OSError."""
        if not self.uri or path.exists():
            return
        import pyarrow.fs

        remote, there = self._there(path)
        kind = remote.get_file_info(there).type
        if kind == pyarrow.fs.FileType.NotFound:
            return
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # a half-fetched one must not look like one
        (partial if kind == pyarrow.fs.FileType.Directory else partial.parent).mkdir(parents=True, exist_ok=True)
        pyarrow.fs.copy_files(there, str(partial), source_filesystem=remote,
                              destination_filesystem=pyarrow.fs.LocalFileSystem())  # fmt: skip
        try:
            partial.rename(path)
        except OSError:
            if not path.is_dir():  # else another process was faster
                raise
            shutil.rmtree(partial)

    def read(self, path: Path) -> bytes | None:
        """A file's content there, whatever lies here; None when it is not there. Raises OSError."""
        import pyarrow.fs

        remote, there = self._there(path)
        if remote.get_file_info(there).type != pyarrow.fs.FileType.File:
            return None
        with remote.open_input_stream(there) as stream:
            return stream.read()

    def write(self, path: Path, content: bytes) -> None:
        """Write a file there alone. Raises OSError."""
        remote, there = self._there(path)
        remote.create_dir(there.rpartition("/")[0], recursive=True)
        with remote.open_output_stream(there) as stream:
            stream.write(content)

    def names(self, directory: Path) -> list[str]:
        """What lies in a folder of the study, there if it is kept there. Raises OSError."""
        if not self.uri:
            return [path.name for path in directory.glob("*")]
        import pyarrow.fs

        remote, there = self._there(directory)
        found = remote.get_file_info(pyarrow.fs.FileSelector(there, allow_not_found=True))
        return [one.base_name for one in found]

    def remove(self, path: Path) -> None:
        """Remove a file or folder of the study, here and there; another process may be at it, too. Raises OSError."""
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        if self.uri:
            import pyarrow.fs

            remote, there = self._there(path)
            kind = remote.get_file_info(there).type
            try:
                if kind == pyarrow.fs.FileType.Directory:
                    remote.delete_dir(there)
                elif kind == pyarrow.fs.FileType.File:
                    remote.delete_file(there)
            except OSError:
                if remote.get_file_info(there).type != pyarrow.fs.FileType.NotFound:
                    raise

    def _there(self, path: Path) -> tuple[Any, str]:
        import pyarrow.fs

        remote, root = pyarrow.fs.FileSystem.from_uri(self.uri)
        return remote, f"{root}/{path.relative_to(self.directory).as_posix()}"
