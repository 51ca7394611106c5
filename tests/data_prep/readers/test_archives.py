"""Members of archives: read, or counted; archives after archives; headers that lie."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile

import pytest

from data_prep.readers.documents import ReadOptions
from dualroute.errors import UserError
from tests.data_prep.samples import COMPRESS, TEXTS, jsonl, read, tar, texts_of, written, zipped

HALVES = (
    tar({f"{n}.txt": text.encode() for n, text in enumerate(TEXTS[:5])}),
    tar({f"{n}.txt": text.encode() for n, text in enumerate(TEXTS[5:])}, tarfile.GNU_FORMAT),
)


def test_webdataset_members_whose_text_is_in_json(tmp_path):
    members = {}
    for n, text in enumerate(TEXTS):
        members[f"{n:03d}.json"] = json.dumps({"text": text, "url": "x"}).encode()
        members[f"{n:03d}.png"] = b"\x89PNG"
        members[f"{n:03d}.cls"] = b"1"
    options = ReadOptions()
    documents = read(written(tmp_path, "a.tar", tar(members)), options)
    assert [document.text for document in documents] == TEXTS
    assert documents[3].name == "a.tar!003.json"
    assert options.files.to_json() == {
        "read": {".json": 12, ".tar": 1},
        "skipped": {
            reason: {"count": 12, "examples": [f"a.tar!{n:03d}{ending}" for n in range(5)]}
            for reason, ending in (("unknown kind .cls", ".cls"), ("unknown kind .png", ".png"))
        },
    }


@pytest.mark.parametrize("padding", [0, 512, 20 * 512, 3 << 20])
@pytest.mark.parametrize("around", ["", ".gz", ".xz"])
def test_tars_one_after_another(tmp_path, padding, around):
    """As ``cat a.tar b.tar`` makes them; only GNU tar's --ignore-zeros reads more than the first."""
    data = HALVES[0] + b"\0" * padding + HALVES[1] + b"\0" * padding
    if around:
        data = COMPRESS[around](data)
    assert texts_of(written(tmp_path, f"a.tar{around}", data)) == TEXTS


def test_compressed_tars_one_after_another(tmp_path):
    for ending, compress in COMPRESS.items():
        data = compress(HALVES[0]) + compress(HALVES[1])
        assert texts_of(written(tmp_path, f"a.tar{ending}", data)) == TEXTS


def test_damage_behind_the_first_of_two_tars_is_an_error(tmp_path):
    first, second = HALVES
    for data in (
        first + second[:700],
        first + b"\0" * 512 + b"garbage".ljust(512),
        first + second[:300] + b"\xff" * 8 + second[308:],
        first + second.rstrip(b"\0"),
    ):
        with pytest.raises(UserError, match=r"a\.tar: the file is damaged or cut off"):
            read(written(tmp_path, "a.tar", data))


def test_links_devices_and_sparse_members_are_counted(tmp_path):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, kind in {
            "hard.txt": tarfile.LNKTYPE,
            "soft.txt": tarfile.SYMTYPE,
            "pipe.txt": tarfile.FIFOTYPE,
            "device.txt": tarfile.CHRTYPE,
            "folder": tarfile.DIRTYPE,
        }.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        info = tarfile.TarInfo("good.txt")
        info.size = 4
        archive.addfile(info, io.BytesIO(b"good"))
    options = ReadOptions()
    assert [d.text for d in read(written(tmp_path, "a.tar", stream.getvalue()), options)] == ["good"]
    assert {reason: entry.count for reason, entry in options.files.skipped.items()} == {
        "link in an archive": 2,
        "device or pipe in an archive": 2,
    }


@pytest.mark.parametrize("name", ["/abs/olute.txt", "../../up.txt", "a/../../../b.txt", "c:\\x.txt"])
def test_a_members_name_is_a_label_and_no_place(tmp_path, name):
    outside = sorted(tmp_path.parent.iterdir())
    for kind, pack in (("tar", tar), ("zip", zipped)):
        documents = read(written(tmp_path, f"a.{kind}", pack({name: b"text"})))
        assert [document.text for document in documents] == ["text"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "a.zip"]
    assert sorted(tmp_path.parent.iterdir()) == outside


def test_member_names_that_are_not_utf8_or_not_printable(tmp_path):
    header = bytearray(tar({"cafX\nY.txt": b"text"}, tarfile.USTAR_FORMAT))
    header[3:4] = b"\xe9"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    (document,) = read(written(tmp_path, "a.tar", bytes(header)))
    assert document.name == "a.tar!caf\\xe9\\x0aY.txt"
    document.name.encode()


def test_excluded_and_hidden_members(tmp_path):
    members = {"a.txt": b"a", "docs/b.md": b"b", ".git/c.txt": b"c", "d.log.gz": gzip.compress(b"d")}
    for kind, pack in (("tar", tar), ("zip", zipped)):
        options = ReadOptions(exclude=("*.md",), text_endings=(".log",))
        documents = read(written(tmp_path, f"a.{kind}", pack(members)), options)
        assert [document.text for document in documents] == ["a", "d"]
        assert {reason: entry.count for reason, entry in options.files.skipped.items()} == {
            "hidden": 1,
            "excluded": 1,
        }


def test_a_header_that_claims_gigabytes_is_refused(tmp_path):
    """pax and GNU headers are read into memory whole by the library."""
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
        info = tarfile.TarInfo("x")
        info.type, info.size = kind, 4 << 30
        start = info.tobuf(tarfile.GNU_FORMAT)
        path = written(tmp_path, "a.tar.gz", gzip.compress(start + b"a" * (8 << 20)))
        with pytest.raises(UserError, match=r"a\.tar\.gz: a header of more than 1 MiB"):
            read(path)


def test_many_members_do_not_pile_up(tmp_path):
    import tracemalloc

    from data_prep.readers.formats import read_documents

    path = written(tmp_path, "a.tar", tar({f"{n}.txt": b"x" for n in range(1000)}))
    tracemalloc.start()
    try:
        held = []
        for number, _ in enumerate(read_documents(path, "a.tar", ReadOptions())):
            if number in (300, 900):
                held.append(tracemalloc.get_traced_memory()[0])
        assert held[1] - held[0] < 200_000  # a TarInfo takes about a kilobyte
    finally:
        tracemalloc.stop()


def test_encrypted_zips_say_so(tmp_path):
    data = bytearray(zipped({"a.txt": b"text"}))
    for mark, flags in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        data[data.find(mark) + flags] |= 1
    with pytest.raises(UserError, match=r"a\.zip!a\.txt: is encrypted; unpack the archive with its password"):
        read(written(tmp_path, "a.zip", bytes(data)))
    assert read(written(tmp_path, "a.zip", bytes(data)), exclude=("a.txt",)) == []


def test_a_zip_whose_method_is_unknown(tmp_path):
    data = bytearray(zipped({"a.txt": b"text" * 50}))
    for mark, method in ((b"PK\x01\x02", 10), (b"PK\x03\x04", 8)):
        data[data.find(mark) + method] = 9  # deflate64
    with pytest.raises(UserError, match=r"a\.zip!a\.txt: .*; pack the archive anew"):
        read(written(tmp_path, "a.zip", bytes(data)))


def test_a_zip_directory_that_lost_a_member_is_damage(tmp_path):
    """The lengths in an entry have no checksum: a comment that swallows the next entry hides a member."""
    data = bytearray(zipped({f"{n}.txt": b"text %d" % n for n in range(3)}, zipfile.ZIP_STORED))
    entry = data.find(b"PK\x01\x02")
    length = data.find(b"PK\x01\x02", entry + 1) - entry
    data[entry + 32] = length  # of the comment
    with pytest.raises(UserError, match="its directory lists 2 members and should list 3"):
        read(written(tmp_path, "a.zip", bytes(data)))


def test_a_zip_member_shorter_than_it_should_be_is_damage(tmp_path):
    data = bytearray(zipped({"a.txt": b""}, zipfile.ZIP_STORED))
    data[data.find(b"PK\x01\x02") + 24] = 9  # the length, unpacked; the checksum of nothing is right
    with pytest.raises(UserError, match=r"a\.zip: the file is damaged"):
        read(written(tmp_path, "a.zip", bytes(data)))


def test_archives_in_archives_have_an_end(tmp_path):
    data, name = jsonl(), "a.jsonl"
    for _ in range(3):
        data, name = zipped({name: data}), "a.zip"
    assert texts_of(written(tmp_path, "a.zip", data)) == TEXTS
    for _ in range(3):
        data = tar({"a.zip": data})
        data = zipped({"a.tar": data})
    with pytest.raises(UserError, match="archives in archives, more than 4 deep"):
        read(written(tmp_path, "a.zip", data))


def test_an_archive_of_nothing_is_counted(tmp_path):
    options = ReadOptions()
    assert read(written(tmp_path, "a.tar", tar({})), options) == []
    assert read(written(tmp_path, "a.zip", zipped({})), options) == []
    assert options.files.skipped["without a document"].count == 2
