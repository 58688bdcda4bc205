"""Hostile archives: each is refused whole, by name, and nothing of it is written anywhere."""
import gzip
import io
import stat
import struct
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from eq.core.registry import EqError
from eq.data.archive import extract
from eq.data.members import Limits

GOOD = ("images/good.txt", b"good")
QUOTA = Limits(members=50, bytes=50_000_000)


def zipped(path: Path, *members: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in (GOOD, *members):
            archive.writestr(name, data, compress_type=zipfile.ZIP_DEFLATED)
    return path


def tar_info(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def tarred(path: Path, *members: tuple[str | tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, data in (GOOD, *members):
            info = tar_info(name) if isinstance(name, str) else name
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def unix(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, mode << 16
    return info


def patched(path: Path, old: bytes, new: bytes, last: bool = False) -> Path:
    data = path.read_bytes()
    assert old in data and len(old) == len(new)
    at = data.rindex(old) if last else data.index(old)
    path.write_bytes(data[:at] + new + data[at + len(old) :])
    return path


def nul_name(path: Path) -> Path:
    zipped(path, ("evilXtxt", b"1"))
    return patched(patched(path, b"evilXtxt", b"evil\0txt"), b"evilXtxt", b"evil\0txt")


def other_local_name(path: Path) -> Path:
    return patched(zipped(path, ("safe.txt", b"1")), b"safe.txt", b"../x.txt")


def lying_zip(path: Path) -> Path:
    "The list says 10 bytes, the data hold 100,000."
    zipped(path, ("lie.bin", b"\0" * 100_000))
    return patched(path, struct.pack("<L", 100_000), struct.pack("<L", 10), last=True)


def overlapping(path: Path) -> Path:
    "Two entries of the list point to the same data (Fifield's bomb)."
    zipped(path, ("kernel1", b"\0" * 1000), ("kernel2", b"\0" * 1000))
    data = bytearray(path.read_bytes())
    central = data.rindex(b"PK\x01\x02")
    first = data.index(b"kernel1") - 30
    data[central + 42 : central + 46] = struct.pack("<L", first)
    path.write_bytes(data)
    return path


def encrypted(path: Path) -> Path:
    zipped(path)
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    return path


def flipped(path: Path) -> Path:
    zipped(path, ("data.bin", bytes(range(256)) * 40))
    data = bytearray(path.read_bytes())
    data[data.index(b"data.bin") + 60] ^= 1
    path.write_bytes(data)
    return path


def bad_header(path: Path) -> Path:
    tarred(path, ("second.txt", b"2"), ("third.txt", b"3"))
    return patched(path, b"second.txt", b"second.txT")


def cut(path: Path) -> Path:
    tarred(path, ("big.bin", bytes(range(256)) * 400))
    path.write_bytes(path.read_bytes()[:-20_000])
    return path


def cut_gz(path: Path) -> Path:
    tarred(path)
    path.write_bytes(path.read_bytes()[:-6])
    return path


def long_header(path: Path) -> Path:
    "A pax header that declares 4 GB."
    info = tar_info("x", tarfile.XHDTYPE)
    info.size = 4 * 10**9
    path.write_bytes(info.tobuf() + b"\0" * 10_240)
    return path


def negative(path: Path) -> Path:
    info = tar_info("minus")
    raw = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    raw[124:136] = b"\xff" * 10 + b"\xf0\x00"  # base 256, negative
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    path.write_bytes(bytes(raw) + b"\0" * 10_240)
    return path


def bomb(path: Path) -> Path:
    with gzip.open(path, "wb") as file:
        for _ in range(200):
            file.write(b"\0" * 2**20)
    return path


def tar_bomb(path: Path) -> Path:
    "150 MB of zeros in a tar.gz of 150 KB."
    info = tar_info("zeros.bin")
    info.size = 150 * 2**20
    with gzip.open(path, "wb") as file:
        file.write(info.tobuf())
        for _ in range(150):
            file.write(b"\0" * 2**20)
        file.write(b"\0" * 10_240)
    return path


HOSTILE = {
    "zip: dots": (lambda p: zipped(p / "a.zip", ("../evil.txt", b"1")), "leaves the folder"),
    "zip: dots inside": (lambda p: zipped(p / "a.zip", ("a/b/../../../evil.txt", b"1")), "leaves the folder"),
    "zip: absolute": (lambda p: zipped(p / "a.zip", ("/tmp/evil.txt", b"1")), "is absolute"),
    "zip: drive": (lambda p: zipped(p / "a.zip", ("C:/evil.txt", b"1")), "drive letter"),
    "zip: backslash": (lambda p: zipped(p / "a.zip", ("..\\evil.txt", b"1")), "backslash"),
    "zip: share": (lambda p: zipped(p / "a.zip", ("//server/share/evil.txt", b"1")), "is absolute"),
    "zip: stream name": (lambda p: zipped(p / "a.zip", ("good.txt:evil", b"1")), "drive letter"),
    "zip: device name": (lambda p: zipped(p / "a.zip", ("images/CON.txt", b"1")), "no file name everywhere"),
    "zip: trailing dot": (lambda p: zipped(p / "a.zip", ("images./evil.txt", b"1")), "no file name everywhere"),
    "zip: new line": (lambda p: zipped(p / "a.zip", ("a\nb.txt", b"1")), "control characters"),
    "zip: reversed text": (lambda p: zipped(p / "a.zip", ("x\u202egpj.exe", b"1")), "control characters"),
    "zip: NUL": (lambda p: nul_name(p / "a.zip"), "control characters"),
    "zip: link": (lambda p: zipped(p / "a.zip", (unix("l", stat.S_IFLNK | 0o777), b"/etc")), "is a link"),
    "zip: link, then through it": (lambda p: zipped(p / "a.zip", (unix("l", stat.S_IFLNK | 0o777), b"/tmp"), ("l/evil.txt", b"1")), "is a link"),
    "zip: device": (lambda p: zipped(p / "a.zip", (unix("d", stat.S_IFCHR | 0o666), b"")), "is a link or a device"),
    "zip: twice": (lambda p: zipped(p / "a.zip", ("images/good.txt", b"evil")), "occurs twice"),
    "zip: case": (lambda p: zipped(p / "a.zip", ("Images/GOOD.txt", b"evil")), "where case does not count"),
    "zip: same letters, other code": (lambda p: zipped(p / "a.zip", ("caf\u00e9", b"1"), ("cafe\u0301", b"2")), "where case does not count"),
    "zip: file on a folder": (lambda p: zipped(p / "a.zip", ("images", b"1")), "is a file and a folder"),
    "zip: folder on a file": (lambda p: zipped(p / "a.zip", ("images/good.txt/evil", b"1")), "is a file and a folder"),
    "zip: too many": (lambda p: zipped(p / "a.zip", *[(f"{i}", b"") for i in range(60)]), "more than 50 members"),
    "zip: too large": (lambda p: zipped(p / "a.zip", ("big", b"\0" * 60_000_000)), "more than the 0.1 GB"),
    "zip: lies about its size": (lambda p: lying_zip(p / "a.zip"), "damaged|does not have"),
    "zip: overlap": (lambda p: overlapping(p / "a.zip"), "overlap|damaged"),
    "zip: other name before the data": (lambda p: other_local_name(p / "a.zip"), "damaged"),
    "zip: encrypted": (lambda p: encrypted(p / "a.zip"), "encrypted"),
    "zip: flipped bit": (lambda p: flipped(p / "a.zip"), "damaged"),
    "tar: dots": (lambda p: tarred(p / "a.tar", ("../evil.txt", b"1")), "leaves the folder"),
    "tar: absolute": (lambda p: tarred(p / "a.tar", ("/tmp/evil.txt", b"1")), "is absolute"),
    "tar: link": (lambda p: tarred(p / "a.tar", (tar_info("l", tarfile.SYMTYPE, "../.."), b"")), "is a link"),
    "tar: hard link": (lambda p: tarred(p / "a.tar", (tar_info("l", tarfile.LNKTYPE, "/etc/passwd"), b"")), "is a link"),
    "tar: device": (lambda p: tarred(p / "a.tar", (tar_info("d", tarfile.CHRTYPE), b"")), "device"),
    "tar: pipe": (lambda p: tarred(p / "a.tar", (tar_info("f", tarfile.FIFOTYPE), b"")), "device"),
    "tar: twice": (lambda p: tarred(p / "a.tar.gz", ("images/good.txt", b"evil")), "occurs twice"),
    "tar: damaged header": (lambda p: bad_header(p / "a.tar"), "header in the middle is damaged"),
    "tar: cut": (lambda p: cut(p / "a.tar"), "damaged"),
    "tar.gz: cut": (lambda p: cut_gz(p / "a.tar.gz"), "damaged"),
    "tar: header of gigabytes": (lambda p: long_header(p / "a.tar"), "refused|damaged"),
    "tar: negative size": (lambda p: negative(p / "a.tar"), "refused|damaged"),
    "tar.gz: bomb": (lambda p: tar_bomb(p / "a.tar.gz"), "more than the 0.1 GB"),
    "gz: bomb": (lambda p: bomb(p / "a.gz"), "more than the 0.1 GB"),
    "gz: bomb within the quota": (lambda p: bomb(p / "a.gz"), "decompression bomb"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused_whole(tmp_path: Path, name: str) -> None:
    make, said = HOSTILE[name]
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    archive = make(tmp_path / "in")
    before = archive.read_bytes()
    limits = Limits(members=50, bytes=10**9) if "within" in name else QUOTA
    with pytest.raises(EqError, match=said) as caught:
        extract(archive, tmp_path / "out" / "new", limits, quiet=True)
    assert str(archive) in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == [] and archive.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.name not in ("in", "out")] == [] and not (Path("/tmp") / "evil.txt").exists()


def test_there_are_enough_of_them() -> None:
    assert len(HOSTILE) >= 30


@pytest.mark.parametrize("name", ["tar: header of gigabytes", "gz: bomb", "zip: too large"])
def test_a_bomb_takes_little_memory(tmp_path: Path, name: str) -> None:
    archive = HOSTILE[name][0](tmp_path)
    tracemalloc.start()
    with pytest.raises(EqError):
        extract(archive, tmp_path / "new", QUOTA, quiet=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 2**20


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = zipped(tmp_path / "a.zip", ("b", b"x" * 1000))
    (tmp_path / "out").mkdir()

    def full(*args: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched_module:
        patched_module.setattr("eq.data.archive._put", full)
        with pytest.raises(EqError, match="disk full"):
            extract(archive, tmp_path / "out" / "new", quiet=True)
    assert list((tmp_path / "out").iterdir()) == []
    assert (extract(archive, tmp_path / "out" / "new", quiet=True) / "b").read_bytes() == b"x" * 1000


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_many_honest_members_come_out_as_they_went_in(tmp_path: Path, kind: str) -> None:
    members = [(f"folder {i % 7}/Größe {i}.txt", bytes([i % 256]) * i) for i in range(300)]
    make = zipped if kind == "zip" else tarred
    out = extract(make(tmp_path / f"a.{kind}", *members), tmp_path / "new", quiet=True)
    found = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert found == dict([GOOD, *members])
