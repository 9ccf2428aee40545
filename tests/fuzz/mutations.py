"""Random changes to valid files: of their bytes, and of their structure (zip entries, JSON values, pickle opcodes, TOML values, safetensors headers).

``mutate`` is a pure function of its arguments, so a failing input can be made again from its seed and number.
"""

from __future__ import annotations

import io
import json
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

DEEP = 50_000  # levels of nesting
MAX_DATA = 1 << 21  # bytes; larger files are cut
INTEGERS = (0, 1, -1, 2, 3, 255, 2**15, 2**31 - 1, 2**31, 2**32, -(2**31), 2**48, 2**62, 2**63, 2**64, -(2**63), 10**7, 10**12)


def mutate(name: str, data: bytes, chance: Random) -> bytes:
    """Change a file once to three times. The name's ending and the first bytes select the kinds of changes."""
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        data = _changed(name, data, chance)[:MAX_DATA]
    return data


def _changed(name: str, data: bytes, chance: Random) -> bytes:
    structured = _structured(name, data)
    if structured is None or chance.random() < 0.2:
        return _bytes(data, chance)
    try:
        return structured(data, chance)
    except (ValueError, LookupError, struct.error, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, TypeError, AttributeError, OSError, OverflowError):
        return _bytes(data, chance)  # an earlier change has destroyed the structure


def _structured(name: str, data: bytes) -> Callable[[bytes, Random], bytes] | None:
    if data.startswith(b"PK"):
        return _zip
    if name.endswith(".json") or data[:1] in (b"{", b"["):
        return _json
    if name.endswith(".toml"):
        return _toml
    if name.endswith(".safetensors"):
        return _safetensors
    if data[:1] == b"\x80":
        return _pickle
    return None


# ----------------------------------------------------------------------------
# Bytes.


def _bytes(data: bytes, chance: Random) -> bytes:
    changed = bytearray(data)
    at, size = chance.randrange(len(data) + 1), chance.choice((1, 1, 2, 4, 8, 64, 1000))
    match chance.randrange(7):
        case 0:
            for _ in range(chance.choice((1, 1, 4, 32))):
                if changed:
                    changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
        case 1:
            del changed[at:]
        case 2:
            del changed[at : at + size]
        case 3:
            changed[at:at] = chance.randbytes(size)
        case 4:
            start = chance.randrange(len(data) + 1)
            changed[at : at + size] = data[start : start + size]
        case 5:
            changed[at:at] = changed[at : at + size] * chance.choice((2, 10, 100))
        case 6:
            changed[at : at + 8] = struct.pack("<q", _signed(chance.choice(INTEGERS)))[: chance.choice((1, 2, 4, 8))]
    return bytes(changed)


def _signed(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63


# ----------------------------------------------------------------------------
# Zip archives. The checksums are right, so that the readers behind them see the change.


def _zip(data: bytes, chance: Random) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(entry.filename, archive.read(entry), entry.compress_type) for entry in archive.infolist()]
    at = chance.randrange(len(entries))
    name, content, method = entries[at]
    match chance.randrange(12):
        case 0:
            entries[at] = (_name(name, chance), content, method)
        case 1:
            entries.insert(chance.randrange(len(entries) + 1), entries[at])
        case 2:
            entries[at] = (name, content, chance.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)))
        case 3:
            del entries[at]
        case 4:
            entries[at] = (name, chance.choice(entries)[1], method)
        case 5:
            entries[at] = (name, content + bytes(chance.choice((1, 1 << 10, 1 << 20))), zipfile.ZIP_DEFLATED)
        case _:
            # Pickles and JSON decide how the rest is read.
            described = [i for i, (name, _, _) in enumerate(entries) if name.endswith((".pkl", ".json"))]
            at = chance.choice(described) if described and chance.random() < 0.8 else at
            name, content, method = entries[at]
            entries[at] = (name, _changed(name, content, chance), method)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content, method in entries:
            info = zipfile.ZipInfo(name or "x")
            info.compress_type = method
            archive.filelist = [one for one in archive.filelist if one.filename != info.filename] if chance.random() < 0.5 else archive.filelist
            archive.NameToInfo.pop(info.filename, None)
            archive.writestr(info, content)
    return _field(file.getvalue(), chance) if chance.random() < 0.1 else file.getvalue()


def _field(data: bytes, chance: Random) -> bytes:
    """Change a field of an entry in the archive's directory, such as a size, a method, a flag or an offset."""
    starts = [found.start() for found in re.finditer(rb"PK\x01\x02", data)]
    offset, form = chance.choice(((8, "<H"), (10, "<H"), (16, "<I"), (20, "<I"), (24, "<I"), (28, "<H"), (30, "<H"), (42, "<I")))
    changed = bytearray(data)
    struct.pack_into(form, changed, chance.choice(starts) + offset, chance.choice(INTEGERS) % 2 ** (8 * struct.calcsize(form)))
    return bytes(changed)


def _name(name: str, chance: Random) -> str:
    return chance.choice((*NAMES, f"../{name}", f"/{name}", name.rpartition("/")[2], name * 50))


NAMES = ("constants.pkl", "archive_format", "data.pkl", "x/data.pkl", "x/version", "\x1b[31m", "é" * 100)

# ----------------------------------------------------------------------------
# JSON, and TOML by its text.


def _json(data: bytes, chance: Random) -> bytes:
    raw = json.loads(data)
    holders = [value for value in _walk(raw) if isinstance(value, dict | list) and value]
    replaced = "\0replaced\0"
    text = chance.choice(VALUES)(chance)
    if not holders or chance.random() < 0.02:
        return text.encode("utf-8", "surrogatepass")
    holder: Any = chance.choice(holders)
    key = chance.choice(list(holder)) if isinstance(holder, dict) else chance.randrange(len(holder))
    match chance.randrange(8):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[chance.choice(("x", "", "\x1b[31m", "_class_name", "__class__", "a\nb", "n" * 5000, f"{key}_"))] = holder.pop(key)
        case 2 if isinstance(holder, list):
            holder.extend(holder[key : key + 1] * chance.choice((1, 10, 1000)))
        case 3:
            holder[key] = chance.choice(holders)
        case _:
            holder[key] = replaced
    try:
        return json.dumps(raw).replace(json.dumps(replaced), text).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):  # a container within itself
        return text.encode("utf-8", "surrogatepass")


def _walk(value: Any) -> list[Any]:
    found, waiting = [], [value]
    while waiting:
        one = waiting.pop()
        found.append(one)
        waiting += one.values() if isinstance(one, dict) else one if isinstance(one, list) else []
    return found


VALUES: tuple[Callable[[Random], str], ...] = (
    lambda chance: str(chance.choice(INTEGERS)),
    lambda chance: str(chance.choice(INTEGERS)),
    lambda chance: chance.choice(("null", "true", "[]", "{}", '""', "[[]]", '{"a": {}}', "[1, 2]", "[null, null]")),
    lambda chance: chance.choice(("0.5", "-0.0", "1e300", "-1e300", "1e-300", "1e400", "NaN", "Infinity", "1" * 400, "1" * 5000, "-" + "9" * 5000)),
    lambda chance: chance.choice(('"x"', '"\\u001b[31m"', '"\\ud800"', '"../../x"', '"/dev/zero"', '"os.system"', '"' + "y" * 5000 + '"', '"__class__"')),
    lambda chance: chance.choice(("[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP, "[" * 100 + "]" * 100, "[" * DEEP)),
    lambda chance: json.dumps([chance.choice(INTEGERS)] * chance.choice((1, 2, 3, 1000, 100_000))),
)


def _toml(data: bytes, chance: Random) -> bytes:
    lines = data.decode().split("\n")
    at = chance.randrange(len(lines))
    key, equals, _ = lines[at].partition("=")
    text = chance.choice(VALUES)(chance).replace("null", "inf").replace("{", "{ ").replace(":", "=")
    match chance.randrange(6):
        case 0:
            lines.insert(chance.randrange(len(lines) + 1), lines[at])
        case 1:
            del lines[at]
        case 2:
            lines.insert(at, ".".join(["a"] * chance.choice((2, 100, DEEP))) + " = 1")
        case 3:
            lines[at] = f'"\\u001b[31m{chance.choice(("", "x", "name"))}" {equals or "="} 1'
        case _:
            lines[at] = f"{key}= {text}" if equals else f"[{text[:100]}]"
    return "\n".join(lines).encode("utf-8", "surrogatepass")


# ----------------------------------------------------------------------------
# safetensors: a length, a JSON header, and the tensors.


def _safetensors(data: bytes, chance: Random) -> bytes:
    (size,) = struct.unpack_from("<Q", data)
    header, tensors = data[8 : 8 + size], data[8 + size :]
    raw = json.loads(header)
    if "scm" in raw.get("__metadata__", {}) and chance.random() < 0.6:
        inner = _json(raw["__metadata__"]["scm"].encode(), chance)
        raw["__metadata__"]["scm"] = inner.decode("utf-8", "replace")
        header = json.dumps(raw).encode()
    else:
        header = _json(header, chance)
    length = len(header) if chance.random() < 0.9 else chance.choice(INTEGERS)
    return struct.pack("<Q", length % 2**64) + header + tensors


# ----------------------------------------------------------------------------
# Pickles.


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _call(module: str, name: str, *arguments: bytes) -> bytes:
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR"


# Objects to put in the place of others: calls of functions, constructors of large objects, and integers out of range.
OBJECTS: tuple[bytes, ...] = (
    _call("os", "mkdir", _text("EXECUTED")),
    _call("builtins", "exec", _text("import os; os.mkdir('EXECUTED')")),
    _call("builtins", "bytearray", b"J\xff\xff\xff\x7f"),
    _call("_codecs", "encode", _text("é" * 1000), _text("punycode")),
    _call("_codecs", "encode", _text("é" * 1000), _text("latin1")),
    _call("collections", "OrderedDict", b"K\x01"),
    _call("collections", "Counter", b"]"),
    _call("torch", "Size", b"J\xff\xff\xff\x7f"),
    _call("torch._utils", "_rebuild_tensor_v2", b"N", b"K\x00", b")", b")", b"\x89", b"N"),
    _call("torch._utils", "_rebuild_parameter", b"N", b"\x89", b"N"),
    b"\x8a\xff" + b"\x7f" * 255,  # an integer of 2 039 bits
    b"J\xff\xff\xff\x7f",
    b"G" + struct.pack(">d", float("nan")),
    b"G" + struct.pack(">d", 1e300),
    b"N",
    b"}",
    b"]",
    b")",
    b"\x8f",
    b"]" * 300,
    b")" + b"\x85" * 200_000,
    _text("\x1b[31m"),
    b"\x82\x01",
    b"cos\nsystem\n",
    b"h\x00",
    b"j\xff\xff\xff\x7f",
    b"(",
    b"R",
    b"b",
    b"}" + _text("items") + b"Nsb",
    b"\x81",
    b"Q",
)


def _pickle(data: bytes, chance: Random) -> bytes:
    places = _places(data)
    pieces = [data[start:end] for start, end in places]
    at, other = chance.randrange(len(pieces)), chance.randrange(len(pieces))
    match chance.randrange(8):
        case 0:
            pieces[at] = b""
        case 1:
            pieces.insert(other, pieces[at] * chance.choice((1, 1, 2, 100)))
        case 2:
            pieces[at], pieces[other] = pieces[other], pieces[at]
        case 3:
            pieces[at] = bytes([chance.randrange(256)]) + pieces[at][1:]
        case 4:
            pieces[at] = pieces[at][:1] + _bytes(pieces[at][1:], chance)
        case 5:
            numbers = [i for i, piece in enumerate(pieces) if piece[:1] in b"KMJI\x8a"] or [at]
            pieces[chance.choice(numbers)] = chance.choice((b"J" + struct.pack("<i", chance.choice((0, 1, -1, 2**31 - 1, -(2**31)))), _long(chance), b"N"))
        case _:
            pieces[at] = chance.choice(OBJECTS) + chance.choice((b"", pieces[at]))
    return b"".join(pieces) + data[places[-1][1] :]


def _long(chance: Random) -> bytes:
    number = chance.choice(INTEGERS)
    return b"\x8a\x09" + number.to_bytes(9, "little", signed=True)


def _places(data: bytes) -> list[tuple[int, int]]:
    """Start and end of each opcode."""
    starts = [position for _, _, position in pickletools.genops(data) if position is not None]
    return list(zip(starts, [*starts[1:], starts[-1] + 1], strict=True))
