"""A study's files on object storage (s3://, gs://), and retries where storage fails.

A file is written locally first and copied after every change. A node fetches the files that it lacks.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_RETRY_S = 300.0


def retry_on_os_error(write: Callable[[], None], log: Callable[[str], None], wait_s: float = 2.0) -> None:
    """Write to storage, and retry while it fails: a full disk or a lost mount then costs time, not the trial.

    Args:
        write: must leave nothing half written when it fails.
        log: called with the error before each retry.

    Raises:
        OSError: `write` still fails after `MAX_RETRY_S`.
    """
    began = time.monotonic()
    while True:
        try:
            return write()
        except OSError as error:
            if time.monotonic() - began > MAX_RETRY_S:
                raise
            log(f"storage: {error}; tried again")
            time.sleep(wait_s)


@dataclass(frozen=True)
class Storage:
    """A study's folder, and its copy on object storage. Without a `uri` all nodes share the folder, and nothing is
    copied."""

    directory: Path
    uri: str = ""
    """The URI of the copy, such as s3://bucket/results/STUDY."""

    @classmethod
    def under(cls, prefix: str, directory: Path) -> Storage:
        """The storage of a folder whose copy is `prefix`/NAME, such as s3://bucket/results/STUDY; "": no copy."""
        return cls(directory, f"{prefix.rstrip('/')}/{directory.name}" if prefix else "")

    def push(self, path: Path) -> None:
        """Copy a file or folder of the study to object storage. Raises OSError."""
        if self.uri:
            import pyarrow.fs

            remote, there = self._there(path)
            remote.create_dir(there if path.is_dir() else there.rpartition("/")[0], recursive=True)
            pyarrow.fs.copy_files(str(path), there, source_filesystem=pyarrow.fs.LocalFileSystem(),
                                  destination_filesystem=remote)  # fmt: skip

    def pull(self, path: Path) -> None:
        """Fetch a file or folder from object storage, if it is there and missing here. Raises OSError.

        Several processes of a node may do this at once.
        """
        if not self.uri or path.exists():
            return
        import pyarrow.fs

        remote, there = self._there(path)
        kind = remote.get_file_info(there).type
        if kind == pyarrow.fs.FileType.NotFound:
            return
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # an incomplete copy must not have its name
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
        """The content of a file on object storage, whatever the local file holds; None if missing. Raises OSError."""
        import pyarrow.fs

        remote, there = self._there(path)
        if remote.get_file_info(there).type != pyarrow.fs.FileType.File:
            return None
        with remote.open_input_stream(there) as stream:
            return stream.read()

    def write(self, path: Path, content: bytes) -> None:
        """Write a file on object storage only. Raises OSError."""
        remote, there = self._there(path)
        remote.create_dir(there.rpartition("/")[0], recursive=True)
        with remote.open_output_stream(there) as stream:
            stream.write(content)

    def names(self, directory: Path) -> list[str]:
        """Names in a folder of the study: on object storage if the study has a copy there. Raises OSError."""
        if not self.uri:
            return [path.name for path in directory.glob("*")]
        import pyarrow.fs

        remote, there = self._there(directory)
        infos = remote.get_file_info(pyarrow.fs.FileSelector(there, allow_not_found=True))
        return [info.base_name for info in infos]

    def remove(self, path: Path) -> None:
        """Remove a file or folder of the study and its copy. Raises OSError.

        Several processes may do this at once.
        """
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
