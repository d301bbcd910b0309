"""The nano base: Hulu-Med's architecture (VideoLlama3 vision tower, Qwen3 text) small enough to ship with the package.

benchmarks/nano.py trained it on phantoms and documents how; `CHECKPOINT` is the directory that it wrote.
"""

from pathlib import Path

CHECKPOINT: Path = Path(__file__).parent / "checkpoint"
