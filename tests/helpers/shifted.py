"""Safetensors files whose data begin anywhere, as the format allows."""

from pathlib import Path

LINE_BYTES = 64


def begin_data_at(file: Path, in_line: int) -> None:
    """Pad a file's header, so that its data begin so many bytes past a multiple of 64."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    padding = (in_line - 8 - length) % LINE_BYTES
    header = content[8 : 8 + length] + b" " * padding
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
