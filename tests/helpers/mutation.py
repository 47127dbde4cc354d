"""Mutations of files: of bytes, of JSON, and of the JSON in the header of a safetensors file."""

import json
from collections.abc import Callable
from random import Random
from typing import Any

Mutate = Callable[[bytes, Random], bytes]

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 10**18, 10**400, -(10**18), 0.5, -0.0, 1e308,
    float("nan"), float("inf"), "", "a", "0", "../../x", "/dev/zero", ".", "\x1b[2J\x1b]0;t\x07",
    "\u202e\u2028\x00\r\n", "é" * 70, "x" * 100_000, "<script>", "| a |\n# b", [], {}, [None], [[]],
    {"": ""}, [0] * 1000, list(range(50)), "bfloat16", "torch.float32", "llama", "auto",
]  # fmt: skip


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """Flip a bit, cut, remove, repeat or insert."""
    at = random.randrange(len(data) + 1)
    end = min(len(data), at + random.choice([1, 2, 8, 64, 1024]))
    kind = random.randrange(6)
    if kind == 0 and at < len(data):
        return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + data[end:]
    if kind == 3:
        return data[:end] + data[at:end] * random.choice([1, 3, 100]) + data[end:]
    if kind == 4:
        return data[:at] + random.randbytes(random.choice([1, 4, 100])) + data[at:]
    return random.choice([b"\xef\xbb\xbf", b"\x00", b"\xff\xfe", b"\n", b"{", b"[" * 5000]) + data


def mutate_value(value: Any, random: Random) -> Any:
    """Return a JSON value in which one value, anywhere, is another, is gone or is doubled."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = random.choice(list(value))
        kind = random.randrange(8)
        if kind == 0:
            return {k: v for k, v in value.items() if k != key}
        if kind == 1:
            return {**value, str(random.choice(VALUES))[:1000]: value[key]}
        return {**value, key: mutate_value(value[key], random)}
    if isinstance(value, list) and value and random.random() < 0.8:
        at = random.randrange(len(value))
        kind = random.randrange(8)
        if kind == 0:
            return value[:at] + value[at + 1 :]
        if kind == 1:
            return value[:at] + value[at : at + 1] * 2 + value[at + 1 :]
        return [*value[:at], mutate_value(value[at], random), *value[at + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and random.random() < 0.4:
        return random.choice([value + 1, value - 1, -value, 2 * value, str(value), float(value)])
    if isinstance(value, str) and random.random() < 0.3:
        return mutate_bytes(value.encode(), random).decode("utf-8", "replace")
    return random.choice(VALUES)


def mutate_json(data: bytes, random: Random) -> bytes:
    """Mutate a JSON file, or one of the lines of a JSON Lines file."""
    if random.random() < 0.15:
        return mutate_bytes(data, random)
    try:
        return json.dumps(mutate_value(json.loads(data), random)).encode()
    except ValueError:
        lines = data.splitlines()
        at = random.randrange(len(lines))
        lines[at] = json.dumps(mutate_value(json.loads(lines[at]), random)).encode()
        return b"\n".join(lines)


def mutate_safetensors(data: bytes, random: Random) -> bytes:
    """Mutate the header, the JSON in its metadata, or any byte."""
    if random.random() < 0.25:
        return mutate_bytes(data, random)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    metadata = header.get("__metadata__", {})
    inner = [key for key, text in metadata.items() if text.startswith("{")]
    if inner and random.random() < 0.7:
        key = random.choice(inner)
        metadata[key] = json.dumps(mutate_value(json.loads(metadata[key]), random))
    else:
        header = mutate_value(header, random)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]
