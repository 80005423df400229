"""Checkpoints in archives: opened like their folder, unpacked once; nothing is written outside the temporary folder."""

import io
import json
import re
import shutil
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from fastbert.checkpoint import CheckpointError
from fastbert.cli.main import main
from fastbert.convert import convert
from fastbert.encoding.encoder import Encoder
from fastbert.formats import archive, opened
from fastbert.models.bert import BertModel
from formats_models import GOOGLE_FILES, as_transformers_writes, flip, google_without_a_name, names_in

pytestmark = pytest.mark.once


@pytest.fixture
def google(tmp_path) -> Path:
    return google_without_a_name(tmp_path)


@pytest.fixture
def ours(google) -> Path:
    return as_transformers_writes(google)


def zip_of(path: Path, folder: Path, inside: str) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for member in folder.iterdir():
            file.write(member, f"{inside}{member.name}")
    return path


@pytest.mark.parametrize("inside", ["", "uncased_L-2_H-32_A-2/"])
def test_a_zip_opens_like_its_folder(google, inside):
    """The name that tells how to tokenise is that of the archive, or of the folder in it."""
    path = zip_of(google.parent / ("bert.zip" if inside else "uncased_L-2_H-32_A-2.zip"), google, inside)
    convert(path, google.parent / "out", say=lambda line: None)
    convert(google, google.parent / "expected", lower_case=True, say=lambda line: None)
    for name in names_in(google.parent / "expected"):
        assert (google.parent / "out" / name).read_bytes() == (google.parent / "expected" / name).read_bytes()
    direct = BertModel.from_pretrained(path).state_dict()
    assert all(torch.equal(t, direct[name]) for name, t in BertModel.from_pretrained(google).state_dict().items())


def test_the_temporary_folder_is_gone_afterwards(google):
    with opened(zip_of(google.parent / "x.zip", google, "")) as folder:
        assert (folder / "vocab.txt").is_file()
    assert not folder.exists()


@pytest.mark.parametrize("name", ["/etc/evil", "../evil", "a/../../evil", "..\\evil", "C:\\evil"])
@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_members_outside_the_archive_are_refused(name, kind, tmp_path):
    path = tmp_path / f"x.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr(name, b"x")
    else:
        with tarfile.open(path, "w:gz") as file:
            info = tarfile.TarInfo(name)
            info.size = 1
            file.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(CheckpointError, match="outside the archive"):
        convert(path, tmp_path / "out", say=lambda line: None)
    assert names_in(tmp_path) == {path.name}


def test_links_are_refused(tmp_path):
    link = zipfile.ZipInfo("vocab.txt")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr(link, "/etc/passwd")
    for type_ in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
        with tarfile.open(tmp_path / f"{type_.decode()}.tgz", "w:gz") as file:
            info = tarfile.TarInfo("vocab.txt")
            info.type, info.linkname = type_, "/etc/passwd"
            file.addfile(info)
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(CheckpointError, match="is a link or no file"), opened(path):
            pass


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz"])
def test_a_damaged_archive_is_one_line(name, google):
    path = google.parent / name
    if name.endswith("zip"):
        zip_of(path, google, "")
    else:
        with tarfile.open(path, "w:gz") as file:
            file.add(google, "bert")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="truncated or not an archive") as error, opened(path):
        pass
    assert "\n" not in str(error.value)


def test_a_truncated_archive_is_not_mistaken_for_an_archive_in_it(google):
    """pytorch_model.bin and .npz are zip files too, and Python would find their end instead."""
    whole = google.parent / "x.zip"
    with zipfile.ZipFile(google.parent / "inner.zip", "w") as inner:
        inner.write(google / "bert_config.json", "config.json")
    with zipfile.ZipFile(whole, "w") as archive:
        archive.write(google / "vocab.txt", "vocab.txt")
        archive.write(google.parent / "inner.zip", "inner.zip")
    whole.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"x\.zip is truncated or not an archive"):
        convert(whole, google.parent / "out", say=lambda line: None)


def test_errors_inside_an_archive_name_the_archive(google, capsys):
    """They do not name the temporary folder."""
    with zipfile.ZipFile(google.parent / "x.zip", "w") as archive:
        for path in google.iterdir():
            if path.name != "bert_config.json":
                archive.write(path, path.name)
    assert main(["convert", str(google.parent / "x.zip"), "-o", str(google.parent / "out")]) == 1
    error = capsys.readouterr().err
    assert f"{google.parent / 'x.zip' / 'bert_model.ckpt'}: there is no bert_config.json" in error


def test_errors_of_unsupported_modules_name_the_archive(ours):
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in
               (("Transformer", ""), ("CNN", "1_CNN"))]  # fmt: skip
    (ours / "modules.json").write_text(json.dumps(modules))
    path = zip_of(ours.parent / "x.zip", ours, "")
    with pytest.raises(ValueError, match=re.escape(f"{path / 'modules.json'}: module 'CNN' is not supported")):
        Encoder.from_pretrained(path, device="cpu")


def test_errors_of_a_vocabulary_name_the_archive(google):
    (google / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(
        CheckpointError, match=r"bert_model\.ckpt: the vocabulary is not a BERT vocabulary: it lacks \[UNK\]"
    ):
        convert(google, google.parent / "out", lower_case=True, say=lambda line: None)
    assert not (google.parent / "out").exists()


def test_a_flipped_byte_in_an_archive_is_found(google):
    """Gzip's checksum comes after all members, where a reader of the members need not look."""
    paths = google.parent / "x.tar.gz", google.parent / "x.zip"
    with tarfile.open(paths[0], "w:gz", compresslevel=0) as file:
        file.add(google, "bert")
    with zipfile.ZipFile(paths[1], "w", zipfile.ZIP_STORED) as file:
        file.write(google / GOOGLE_FILES[1], GOOGLE_FILES[1])
    for path in paths:
        flip(path, len(path.read_bytes()) // 2)
        with pytest.raises(CheckpointError, match="truncated or not an archive"), opened(path):
            pass


def test_an_archive_too_large_for_the_disk_is_refused(google, monkeypatch):
    path = zip_of(google.parent / "x.zip", google, "")
    usage = shutil.disk_usage(google)
    monkeypatch.setattr(archive.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="has 1,000 free"), opened(path):
        pass
