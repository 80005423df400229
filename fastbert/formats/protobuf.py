"""The parts of protocol buffers that TensorFlow's files need: varints, fields, nested messages."""

from __future__ import annotations


class Malformed(Exception):
    """Bytes that are no valid table, block or protocol buffer. Callers add the name of the file."""


def parse_varint(data: bytes, at: int) -> tuple[int, int]:
    """(the number at `at`, the position after it)."""
    number = 0
    for shift in range(0, 64, 7):
        if at >= len(data):
            raise Malformed("a number reaches past its end")
        number |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return number, at
    raise Malformed("a number has more than 64 bits")


def parse_message(data: bytes) -> dict[int, list]:
    """A protocol buffer as a dict: field number -> its values in order, each an int or bytes."""
    fields: dict[int, list] = {}
    at = 0
    while at < len(data):
        tag, at = parse_varint(data, at)
        wire_type = tag & 7
        if wire_type == 0:
            value, at = parse_varint(data, at)
        elif wire_type == 2:
            length, at = parse_varint(data, at)
            value, at = data[at : at + length], at + length
        elif wire_type in (1, 5):
            length = 8 if wire_type == 1 else 4
            value, at = int.from_bytes(data[at : at + length], "little"), at + length
        else:
            raise Malformed(f"a protocol buffer has a field of wire type {wire_type}")
        if at > len(data):
            raise Malformed("a field reaches past its protocol buffer")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def encode_varint(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes(out + bytes([number]))


def encode_field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return encode_varint(number << 3) + encode_varint(value)
    return encode_varint(number << 3 | 2) + encode_varint(len(value)) + value


def encode_message(*fields: tuple[int, int | bytes]) -> bytes:
    """A protocol buffer of (number, value) pairs; as usual, zeros are left out."""
    return b"".join(encode_field(number, value) for number, value in fields if value != 0)
