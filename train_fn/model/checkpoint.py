"""A model's files on disk: where they are, whether they are complete, and their hash. Needs neither torch nor
transformers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError, safe_open

from train_fn.model.hub import local_directory
from train_fn.model.hub_ids import is_hub_model, read_name
from train_fn.nano import CHECKPOINT as NANO
from train_fn.support.cache import cache_folder, read_cache, write_cache
from train_fn.support.files import DamagedFile, file_hash, read_json

JSON_FILES = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
              "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
              "vocab.json", "chat_template.json", "model.safetensors.index.json")  # fmt: skip
INDEX = "model.safetensors.index.json"
POINTERS = {b"version https://git-lfs": "Git LFS", b"/annex/objects": "git-annex", b"../": "git-annex"}
# Files without influence on weights and prompts: documents, pictures, code (never run) and formats that are never read.
UNREAD = (".md", ".pdf", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".py", ".bin", ".pt", ".pth", ".ckpt", ".gguf",
          ".onnx", ".h5", ".msgpack", ".lock", ".metadata")  # fmt: skip


def resolve_model(model: str | Path) -> Path:
    """The folder of the model that `--model` names. One of the hub must have been fetched (`train_fn.model.hub`)."""
    if model == "nano":
        return NANO
    return local_directory(str(model)) if is_hub_model(model) else Path(model)


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a safetensors file, from its header.

    Raises:
        DamagedFile: the file is missing, a pointer to its content, cut off, or no safetensors file.
    """
    if not path.is_file():  # reading a pipe or a device could block for ever
        what = "is no file" if path.exists() else "is a link to nowhere" if path.is_symlink() else "is missing"
        raise DamagedFile(f"{path} must hold weights, but {what}: fetch it (from git-annex: git annex get)")
    try:
        with safe_open(path, "np") as opened:  # compares the header with the file's length
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except OSError as error:
        raise DamagedFile(f"{path} must be readable, but is not: {error.strerror or error}") from error
    except SafetensorError as error:
        with open(path, "rb") as file:
            begin = file.read(64)
        tool = next((tool for mark, tool in POINTERS.items() if begin.startswith(mark)), "")
        if tool:
            raise DamagedFile(
                f"{path} must hold weights, but is {tool}'s pointer to them: fetch the content "
                f"(git lfs pull, git annex get, or download the file)"
            ) from error
        raise DamagedFile(
            f"{path} must be a whole safetensors file, but is not ({error}; {path.stat().st_size:,} bytes): fetch it "
            f"again"
        ) from error


def file_problems(directory: Path) -> list[str]:
    """Every reason why the files of a model directory cannot be loaded: damaged JSON, and weights that are missing, cut
    off, or only pointers to their content."""
    problems = []
    for path in (directory / name for name in JSON_FILES if os.path.lexists(directory / name)):
        try:
            read_json(path, dict, "fetch the model again")
        except DamagedFile as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"{path} must be readable, but is not: {error.strerror}")
    if problems:
        return problems
    shards = sorted(directory.glob("*.safetensors"))
    wanted: dict[str, str] = {}
    if (directory / INDEX).is_file() and not (directory / "model.safetensors").exists():
        wanted = read_json(directory / INDEX, dict).get("weight_map", {})
        if not isinstance(wanted, dict) or not wanted:
            return [f"{directory / INDEX} must map tensors to files under `weight_map`: fetch the model again"]
        shards = [directory / str(name) for name in sorted(set(wanted.values()), key=str)]
    tensors: dict[str, set[str]] = {}
    for path in shards:
        try:
            tensors[path.name] = set(tensor_shapes(path))
        except DamagedFile as error:
            problems.append(str(error))
    lacking = [name for name, file in wanted.items() if file in tensors and name not in tensors[file]]
    if lacking:
        problems.append(
            f"{directory / INDEX} must agree with the weights, but {len(lacking)} tensors are not where it says, "
            f"{lacking[0]} among them: fetch the model again"
        )
    return problems


def hashed_files(model: str | Path) -> Iterator[Path]:
    """The files of a model that can change weights or prompts, subfolders included, in order.

    Of a model of the hub only the files that are fetched: another program may have put more into the cache.
    """
    directory = resolve_model(model)
    if is_hub_model(model):
        repository = read_name(str(model))
        yield from (path for path in sorted(directory.glob("*")) if repository.wants(path.name) and path.is_file())
        return
    for folder, folders, names in os.walk(directory):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and path.suffix.lower() not in UNREAD and path.is_file():
                yield path


def base_files(model: str | Path) -> dict[str, str]:
    """sha256 of each of the `hashed_files` of a model, by name.

    Hashes of weights are cached by path, size, inode and times of change, because 8 GB take some seconds. A program can
    forge all of these but ctime. Small files are read each time.
    """
    cache, directory = cache_folder() / "hashes.json", resolve_model(model)
    cached = read_cache(cache)

    def one(path: Path) -> tuple[str, str, str]:
        name = path.relative_to(directory).as_posix()
        if path.suffix != ".safetensors":
            return name, "", file_hash(path)
        state = path.stat()
        key = f"{path.resolve()} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns} {state.st_ino}"
        return name, key, cached.get(key) or file_hash(path)

    with ThreadPoolExecutor(4) as pool:
        files = list(pool.map(one, hashed_files(model)))
    if fresh := {key: value for _, key, value in files if key and key not in cached}:
        write_cache(cache, cached | fresh)
    return {name: value for name, _, value in files}


def base_hash(model: str | Path, version: int = 2) -> str:
    """sha256 over `base_files`. Version 1, in plans of the first release, covers the weights and *.json only."""
    files = base_files(model)
    if version == 1:
        files = {
            name: files[name]
            for name in sorted(files)
            if "/" not in name and Path(name).suffix in (".json", ".safetensors")
        }
    return hash_of(files)


def hash_of(files: dict[str, str]) -> str:
    """sha256 over the names and hashes of files."""
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()
