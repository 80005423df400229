"""TensorFlow's checkpoint files are read and written, and damage is found."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from fastbert.checkpoint import CheckpointError
from fastbert.formats.crc32c import crc32c, masked
from fastbert.formats.tensorflow_bundle import read_bundle, write_bundle

pytestmark = pytest.mark.once

GOOGLE = Path(__file__).parent / "fixtures" / "formats" / "google_tf1" / "bert_model.ckpt"


def crc_by_bits(data: bytes) -> int:
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


# ---- CRC-32C ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (b"\x00" * 32, 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ],
)
def test_crc_has_the_published_values(data, crc):
    """RFC 3720, B.4."""
    assert crc32c(data) == crc


@pytest.mark.parametrize("size", [1, 7, 63, 64, 65, 4095, 32768, 32769, 70001])
def test_crc_of_any_length_is_that_of_the_definition(size):
    """Lanes of 64 and of 512 bytes, full and partly filled."""
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    assert crc32c(data) == crc_by_bits(data.tobytes())


@pytest.mark.parametrize("size", [2**21, 2**22 + 3])
def test_crc_of_several_blocks_is_that_of_their_joint_bytes(size):
    """A block is 2 MiB. The definition is computed byte by byte, with a table of its own."""
    table = [crc_by_bits(bytes([byte])) ^ crc_by_bits(b"\x00") for byte in range(256)]
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    register = 0xFFFFFFFF
    for byte in data.tobytes():
        register = register >> 8 ^ table[(register ^ byte) & 0xFF]
    assert crc32c(data) == register ^ 0xFFFFFFFF


def test_masked_is_what_tensorflow_stores():
    """tensorflow/core/lib/hash/crc32c.h: Mask(crc) = rotate right by 15, plus a constant."""
    assert masked(0) == 0xA282EAD8
    assert masked(0x00008000) == (0xA282EAD8 + 1) & 0xFFFFFFFF


# ---- what others wrote, and what we write ----------------------------------------------------------------


def test_reads_what_tensorflow_wrote():
    expected = np.load(GOOGLE.parents[1] / "weights_hf_names.npz")
    variables = read_bundle(GOOGLE)
    assert len(variables) == 46
    for variable in variables.values():
        variable.verify()
    words = variables["bert/embeddings/word_embeddings"]
    assert words.shape == (60, 32)
    assert words.kind == "float32"
    assert np.array_equal(words.read().numpy(), expected["bert.embeddings.word_embeddings.weight"])


def many_tensors() -> list[tuple[str, torch.Tensor]]:
    """Every type, a scalar, an empty tensor, a byte that puts the rest at odd addresses, several blocks of index."""
    draw = torch.Generator().manual_seed(0)
    tensors = [
        ("one_byte", torch.tensor([7], dtype=torch.uint8)),
        ("half", torch.randn(5, generator=draw).half()),
        ("bfloat16", torch.randn(7, generator=draw).bfloat16()),
        ("double", torch.randn(2, 3, generator=draw, dtype=torch.float64)),
        ("long/scalar", torch.tensor(2**40, dtype=torch.int64)),
        ("empty", torch.zeros(0, 3)),
        ("flags", torch.tensor([True, False])),
        ("transposed", torch.randn(3, 4, generator=draw).t()),
    ]
    long_name = "scope_that_makes_the_index_longer_than_one_block/" * 8
    return tensors + [(f"{long_name}layer_{i}/kernel", torch.randn(2, 3, generator=draw)) for i in range(1200)]


def test_a_bundle_is_read_as_it_was_written(tmp_path):
    tensors = many_tensors()
    write_bundle(tmp_path / "x.ckpt", tensors)
    variables = read_bundle(tmp_path / "x.ckpt")
    assert list(variables) == sorted(name for name, _ in tensors)
    for name, t in tensors:
        variables[name].verify()
        assert variables[name].dtype == t.dtype
        assert torch.equal(variables[name].read(), t), name


def test_reading_maps_memory_and_never_writes_into_the_file(tmp_path):
    write_bundle(tmp_path / "x", [("a", torch.ones(4096))])
    before = (tmp_path / "x.data-00000-of-00001").read_bytes()
    t = read_bundle(tmp_path / "x")["a"].read()
    t.zero_()
    assert (tmp_path / "x.data-00000-of-00001").read_bytes() == before
    assert torch.equal(read_bundle(tmp_path / "x")["a"].read(), torch.ones(4096))


def test_tensorflow_reads_what_we_write(tmp_path):
    tensorflow = pytest.importorskip("tensorflow", reason="TensorFlow's own reader")
    tensors = many_tensors()
    write_bundle(tmp_path / "x.ckpt", tensors)
    reader = tensorflow.train.load_checkpoint(str(tmp_path / "x.ckpt"))
    assert reader.get_variable_to_shape_map().keys() == {name for name, _ in tensors}
    for name, t in tensors:
        got = torch.from_numpy(np.array(reader.get_tensor(name)).astype(np.float64))
        assert torch.equal(got, t.double()), name


def test_tensors_that_cannot_be_written_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'a' comes twice"):
        write_bundle(tmp_path / "x", [("a", torch.ones(1)), ("a", torch.ones(1))])
    with pytest.raises(ValueError, match="no type for a"):
        write_bundle(tmp_path / "x", [("a", torch.ones(1).to(torch.float8_e5m2))])


# ---- damage ----------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(tmp_path) -> Path:
    write_bundle(tmp_path / "x", [(f"v{i}", torch.full((8,), float(i))) for i in range(40)])
    return tmp_path / "x"


def index_of(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".index")


def data_of(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".data-00000-of-00001")


def test_an_index_cut_anywhere_is_refused(bundle):
    whole = index_of(bundle).read_bytes()
    for size in (0, 10, 47, 48, len(whole) // 2, len(whole) - 1):
        index_of(bundle).write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"x\.index is truncated or damaged") as error:
            read_bundle(bundle)
        assert "\n" not in str(error.value)


def test_every_flipped_byte_of_an_index_is_found(bundle):
    """Checksums protect the blocks; a damaged footer leads to no block. Two parts hold nothing that is read: the bytes
    between the footer's handles and its magic number, and the meta block."""
    whole = index_of(bundle).read_bytes()
    before = {name: v.read() for name, v in read_bundle(bundle).items()}
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 0x10
        index_of(bundle).write_bytes(bytes(damaged))
        try:
            after = {name: v.read() for name, v in read_bundle(bundle).items()}
        except CheckpointError:
            continue
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before), at


def test_a_flipped_byte_of_data_is_found_and_its_variable_named(bundle):
    data = bytearray(data_of(bundle).read_bytes())
    data[17 * 32 + 5] ^= 1
    data_of(bundle).write_bytes(bytes(data))
    variables = read_bundle(bundle)
    bad = []
    for variable in variables.values():
        try:
            variable.verify()
        except CheckpointError as error:
            bad.append(str(error))
    assert len(bad) == 1
    assert "the bytes of v17 do not have their checksum" in bad[0]


def test_a_missing_or_short_shard_is_named(bundle):
    variables = read_bundle(bundle)
    data = data_of(bundle).read_bytes()
    data_of(bundle).write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match="truncated: v39 ends at byte 1280 of 1279"):
        variables["v39"].read()
    data_of(bundle).unlink()
    with pytest.raises(CheckpointError, match=r"lacks the shard x\.data-00000-of-00001 that v0 is in"):
        variables["v0"].read()


def rewritten(prefix: Path, old: bytes, new: bytes) -> None:
    """Changes bytes in the index's first block, and corrects the block's checksum."""
    table = bytearray(index_of(prefix).read_bytes())
    at = table.index(old)
    table[at : at + len(old)] = new
    footer, handle, shift = table[-48:], 0, 0
    for byte in footer[:10]:  # the footer begins with the offset of the meta block, where the data block ends
        handle |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    meta_offset = handle
    content = bytes(table[: meta_offset - 4])
    table[meta_offset - 4 : meta_offset] = struct.pack("<I", masked(crc32c(content)))
    index_of(prefix).write_bytes(bytes(table))


HEADER = b"\x08\x01\x1a\x02\x08\x01"  # one shard, version 1


def test_big_endian_is_refused_by_name(tmp_path):
    write_bundle(tmp_path / "x", [("a", torch.ones(1))])
    rewritten(tmp_path / "x", HEADER, b"\x08\x01\x10\x01\x18\x01")  # endianness 1
    with pytest.raises(CheckpointError, match=r"x\.index is of a big-endian machine, which is not read$"):
        read_bundle(tmp_path / "x")


def test_snappy_is_refused_by_name(tmp_path):
    write_bundle(tmp_path / "x", [("a", torch.ones(1))])
    table = index_of(tmp_path / "x").read_bytes()
    trailer = table.index(b"\x00" + struct.pack("<I", masked(crc32c(block_with_type(table)))))
    rewritten(tmp_path / "x", table[trailer - 4 : trailer + 1], table[trailer - 4 : trailer] + b"\x01")
    with pytest.raises(CheckpointError, match=r"x\.index has compressed blocks \(snappy\), which is not read$"):
        read_bundle(tmp_path / "x")


def block_with_type(table: bytes) -> bytes:
    """The first block and its type byte, which its checksum covers."""
    for end in range(1, len(table) - 4):
        if struct.unpack("<I", table[end : end + 4])[0] == masked(crc32c(table[:end])):
            return table[:end]
    raise AssertionError("no block")


def test_partitioned_variables_are_refused_by_name(tmp_path):
    """A BundleEntryProto with field 7 is the whole of a variable whose parts have keys of their own, which begin with a
    byte 0 and are not text."""
    write_bundle(tmp_path / "x", [("parted", torch.ones(1)), ("\x00parted", torch.ones(1, 1))])
    rewritten(tmp_path / "x", b"\x00parted", b"\x00\xffarted")
    # the field of the offset, which is absent for 0, leaves no room; the shape's one axis becomes a slice
    rewritten(tmp_path / "x", b"\x12\x04\x12\x02\x08\x01", b"\x3a\x04\x0a\x02\x08\x00")
    with pytest.raises(CheckpointError, match=r"x\.index: parted is partitioned into 1 slices, which is not read$"):
        read_bundle(tmp_path / "x")


def test_the_format_of_2016_is_refused_by_name(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"any bytes")
    with pytest.raises(CheckpointError, match="V1 format of 2016"):
        read_bundle(tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match=r"has no nothing\.ckpt\.index"):
        read_bundle(tmp_path / "nothing.ckpt")
