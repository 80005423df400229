"""TensorFlow's checkpoint files ("tensor bundle", V2) read and written without TensorFlow.

    PREFIX.index                  a sorted table: name -> dtype, shape, shard, offset, size, checksum
    PREFIX.data-00000-of-00001    the arrays' bytes, one after another

The table is LevelDB's. It ends in a footer of 48 bytes with the handles of two blocks and a magic number; the index
block there leads to the data blocks. A block is a list of entries, the restart offsets, one byte of compression type
and a masked CRC-32C. An entry shares a prefix with the key before it. Values are protocol buffers: a BundleHeaderProto
under the empty key, a BundleEntryProto under each other one.
See tensorflow/core/util/tensor_bundle and tensorflow/core/lib/io/table_format.txt.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..storage import CheckpointError
from .crc32c import crc32c, masked
from .protobuf import Malformed, encode_field, encode_message, encode_varint, parse_message, parse_varint
from .variable import Variable, as_tensor, bytes_of, map_bytes, write_bytes

_MAGIC = 0xDB4775248B80FB57
_FOOTER_BYTES = 48
_TRAILER_BYTES = 5  # of a block: its compression type and its checksum
_CRC_BYTES = 4
_RESTART_INTERVAL = 16
_BLOCK_BYTES = 256 * 1024  # a table's block is closed once it is this long

# TensorFlow's number of a type -> its name, and torch's where torch has it
_DTYPES: dict[int, tuple[str, torch.dtype | None]] = {
    1: ("float32", torch.float32),
    2: ("float64", torch.float64),
    3: ("int32", torch.int32),
    4: ("uint8", torch.uint8),
    5: ("int16", torch.int16),
    6: ("int8", torch.int8),
    7: ("string", None),
    9: ("int64", torch.int64),
    10: ("bool", torch.bool),
    14: ("bfloat16", torch.bfloat16),
    19: ("float16", torch.float16),
}
_NUMBER_OF = {dtype: number for number, (_, dtype) in _DTYPES.items() if dtype is not None}


class _NotRead(Exception):
    """A table of a known kind that is not supported. The message continues the file's name."""


# ---- reading ---------------------------------------------------------------------------------------------


def read_bundle(prefix: str | os.PathLike) -> dict[str, Variable]:
    """The variables of a checkpoint, by name, sorted. The index is read and its checksums are verified; no data is.

    Args:
        prefix: the path without ".index".

    Raises: CheckpointError naming the file that is missing, truncated or damaged, and where the checkpoint is
        big-endian, of the format of 2016 (V1), compressed, or has partitioned variables.
    """
    prefix = Path(prefix)
    index = prefix.with_name(prefix.name + ".index")
    if not index.is_file():
        if prefix.is_file():
            raise CheckpointError(f"{prefix} is a TensorFlow checkpoint of the V1 format of 2016, which is not read")
        raise CheckpointError(f"{prefix.parent} has no {index.name}")
    try:
        table = dict(_entries_of_table(index.read_bytes()))
        shards = _read_header(table.pop("", None))
        entries = {name: _parse_entry(value) for name, value in table.items()}
    except Malformed as error:
        raise CheckpointError(f"{index} is truncated or damaged: {error}") from None
    except _NotRead as error:
        raise CheckpointError(f"{index} {error}, which is not read") from None
    return {name: _variable(prefix, name, entry, shards) for name, entry in entries.items()}


def _read_header(header: bytes | None) -> int:
    """The number of data shards."""
    if header is None:
        raise Malformed("it has no header entry")
    fields = parse_message(header)
    if fields.get(2, [0])[-1] != 0:
        raise _NotRead("is of a big-endian machine")
    return fields.get(1, [0])[-1]


@dataclass(frozen=True)
class _Entry:
    """A BundleEntryProto: where an array's bytes are."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int
    slices: int


def _parse_entry(value: bytes) -> _Entry:
    fields = parse_message(value)

    def last(field: int) -> int:
        number = fields.get(field, [0])[-1]
        if not isinstance(number, int):
            raise Malformed(f"field {field} of an entry is not a number")
        return number

    shape = []
    for part in fields.get(2, []):
        for dim in parse_message(part).get(2, []):
            shape.append(parse_message(dim).get(1, [0])[-1])
    return _Entry(last(1), tuple(shape), last(3), last(4), last(5), last(6), len(fields.get(7, [])))


def _variable(prefix: Path, name: str, entry: _Entry, shards: int) -> Variable:
    path = prefix.with_name(f"{prefix.name}.data-{entry.shard:05d}-of-{shards:05d}")
    kind, dtype = _DTYPES.get(entry.dtype, (f"type {entry.dtype}", None))
    if entry.slices:
        raise CheckpointError(f"{prefix}.index: {name} is partitioned into {entry.slices} slices, which is not read")
    size = entry.size
    if dtype is not None:
        size = dtype.itemsize
        for length in entry.shape:
            size *= length
        if size != entry.size:
            raise CheckpointError(
                f"{prefix}.index: {name} has {entry.size} bytes, but {kind} {list(entry.shape)} needs {size}"
            )

    def data():
        try:
            available = path.stat().st_size
        except OSError:
            raise CheckpointError(f"{path.parent} lacks the shard {path.name} that {name} is in") from None
        if entry.offset + size > available:
            raise CheckpointError(f"{path} is truncated: {name} ends at byte {entry.offset + size} of {available}")
        return map_bytes(path, entry.offset, size)

    def read() -> Tensor:
        if dtype is None:
            return as_tensor(data(), torch.uint8, (size,))
        return as_tensor(data(), dtype, entry.shape)

    one_string = kind == "string" and entry.shape == ()

    def verify() -> None:
        content = _summed(data().tobytes()) if one_string else data()
        if masked(crc32c(content)) != entry.crc:
            raise CheckpointError(f"{path} is damaged: the bytes of {name} do not have their checksum")

    return Variable(name, entry.shape, kind, dtype, read, None if dtype is None and not one_string else verify)


def _entries_of_table(table: bytes) -> Iterator[tuple[str, bytes]]:
    if len(table) < _FOOTER_BYTES:
        raise Malformed(f"it has {len(table)} bytes, and a table has at least {_FOOTER_BYTES}")
    footer = table[-_FOOTER_BYTES:]
    if struct.unpack("<Q", footer[-8:])[0] != _MAGIC:
        raise Malformed("it does not end as a table does")
    _, at = _parse_handle(footer, 0)
    index, _ = _parse_handle(footer, at)
    for _, handle in _entries_of_block(_block(table, index)):
        for key, value in _entries_of_block(_block(table, _parse_handle(handle, 0)[0])):
            if key.startswith(b"\x00"):  # a slice of a partitioned variable, which has an entry under its name too
                continue
            try:
                yield key.decode("utf-8"), value
            except UnicodeDecodeError:
                raise Malformed("a variable has a name that is no text") from None


def _parse_handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    offset, at = parse_varint(data, at)
    size, at = parse_varint(data, at)
    return (offset, size), at


def _block(table: bytes, handle: tuple[int, int]) -> bytes:
    """A block's content, its checksum verified."""
    offset, size = handle
    end = offset + size + _TRAILER_BYTES
    if end > len(table):
        raise Malformed(f"a block ends at byte {end} of {len(table)}")
    compression, crc = table[offset + size], struct.unpack("<I", table[end - 4 : end])[0]
    if masked(crc32c(table[offset : end - 4])) != crc:
        raise Malformed(f"the block at byte {offset} does not have its checksum")
    if compression:
        name = "snappy" if compression == 1 else f"of type {compression}"
        raise _NotRead(f"has compressed blocks ({name})")
    return table[offset : offset + size]


def _entries_of_block(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    if len(block) < 4:
        raise Malformed("a block is too short")
    end = len(block) - 4 - 4 * struct.unpack("<I", block[-4:])[0]  # the restart offsets and their number
    key, at = b"", 0
    while at < end:
        shared, at = parse_varint(block, at)
        unshared, at = parse_varint(block, at)
        length, at = parse_varint(block, at)
        if shared > len(key) or at + unshared + length > end:
            raise Malformed("an entry reaches past its block")
        key = key[:shared] + block[at : at + unshared]
        at += unshared
        yield key, block[at : at + length]
        at += length


def _summed(data: bytes) -> bytes:
    """The bytes over which a string variable's checksum is computed: its own, with the length in 32 bits."""
    try:
        length, at = parse_varint(data, 0)
    except Malformed:  # then the unchanged bytes are checked, which will not have the checksum either
        return data
    return (length & 0xFFFFFFFF).to_bytes(4, "little") + data[at:]


def read_string(variable: Variable) -> bytes:
    """The only string of a variable of TensorFlow's type "string". Raises CheckpointError if it is damaged.

    Such a variable consists of the length of each string, the checksum of these lengths, and the strings. Its bytes are
    compared with their checksum, as those of the index are.
    """
    if variable.verify is not None:
        variable.verify()
    data = variable.read().numpy().tobytes()
    try:
        length, at = parse_varint(data, 0)
    except Malformed:
        length, at = -1, 0
    if at + _CRC_BYTES + length != len(data):
        raise CheckpointError(f"{variable.name} is damaged: it is not one string")
    return data[at + _CRC_BYTES :]


# ---- writing ---------------------------------------------------------------------------------------------


def write_bundle(prefix: str | os.PathLike, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes PREFIX.index and PREFIX.data-00000-of-00001, which TensorFlow reads; one tensor in memory at a time.

    Args:
        tensors: pairs of name and tensor, in any order, of a dtype that TensorFlow has.

    Raises: ValueError on a duplicate name or a dtype that TensorFlow lacks; OSError.
    """
    prefix = Path(prefix)
    entries: dict[str, bytes] = {"": encode_message((1, 1), (3, encode_message((1, 1))))}
    with open(prefix.with_name(prefix.name + ".data-00000-of-00001"), "wb") as file:
        for name, t in tensors:
            if name in entries:
                raise ValueError(f"the variable {name!r} comes twice")
            if t.dtype not in _NUMBER_OF:
                raise ValueError(f"TensorFlow has no type for {name}, which is {t.dtype}")
            data = bytes_of(t)
            shape = b"".join(encode_field(2, encode_message((1, length))) for length in t.shape)
            entries[name] = (
                encode_message((1, _NUMBER_OF[t.dtype]), (2, shape), (4, file.tell()), (5, data.nbytes))
                + b"\x35"
                + struct.pack("<I", masked(crc32c(data)))
            )  # field 6, of 32 bits
            write_bytes(file, data)
        _sync(file)
    with open(prefix.with_name(prefix.name + ".index"), "wb") as file:
        file.write(_table(sorted((name.encode("utf-8"), value) for name, value in entries.items())))
        _sync(file)


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def _table(items: list[tuple[bytes, bytes]]) -> bytes:
    table, handles = bytearray(), []

    def add(block: bytes) -> bytes:
        """Appends a block with its trailer; returns its handle."""
        offset = len(table)
        content = block + b"\x00"  # not compressed
        table.extend(content + struct.pack("<I", masked(crc32c(content))))
        return encode_varint(offset) + encode_varint(len(block))

    start = size = 0
    for i, (key, value) in enumerate(items):
        size += len(key) + len(value)
        if size >= _BLOCK_BYTES or i == len(items) - 1:
            handles.append((key, add(_encode_block(items[start : i + 1]))))
            start, size = i + 1, 0
    meta = add(_encode_block([]))
    index = add(_encode_block(handles))
    return bytes(table) + (meta + index).ljust(_FOOTER_BYTES - 8, b"\x00") + struct.pack("<Q", _MAGIC)


def _encode_block(items: list[tuple[bytes, bytes]]) -> bytes:
    block, restarts, previous = bytearray(), [0], b""
    for i, (key, value) in enumerate(items):
        shared = 0
        if i and i % _RESTART_INTERVAL == 0:
            restarts.append(len(block))
        else:
            while shared < min(len(previous), len(key)) and previous[shared] == key[shared]:
                shared += 1
        block += (
            encode_varint(shared) + encode_varint(len(key) - shared) + encode_varint(len(value)) + key[shared:] + value
        )
        previous = key
    return bytes(block) + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))
