"""Streams from servers that misbehave, archives that mean harm, and within a memory that is measured."""
import base64
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eq.core.registry import EqError
from eq.data.download import DownloadPlan
from eq.data.kaggle import kaggle_key
from eq.data.stream import StreamPlan, open_stream

PATIENCE = DownloadPlan("http://unset.invalid", wait_s=0.01, retries=3, stall_s=1.0, quiet=True)
PLAN = {"quiet": True, "patience": PATIENCE}
USER, KEY, SIGNATURE = "ada", "0123456789abcdef0123456789abcdef", "X-Goog-Signature=5e4d"
BASIC = "Basic " + base64.b64encode(f"{USER}:{KEY}".encode()).decode()


def encoded(values: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind)
    return buffer.getvalue()


def chest(i: int) -> bytes:
    "A 256 x 256 JPEG of about 17 kB, as those of the chest X-ray sets are; the number is in its first pixels."
    values = np.random.default_rng(i).normal(128, 12, (256, 256)).clip(0, 255).astype(np.uint8)
    values[:16, :16] = i % 200
    return encoded(values, "JPEG")


def packed(files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


FILES = {f"set/{('No_findings', 'Pneumonia')[i % 2]}/{i:04}.jpg": chest(i) for i in range(240)} | {"set/notes.txt": b"read me"}
ARCHIVE, OTHER = packed(FILES), packed(dict(list(FILES.items())[::-1]))


class Sparse(io.RawIOBase):
    "A file in which long pieces are all the same one: an archive of gigabytes without the gigabytes."

    def __init__(self, piece: bytes):
        self.piece, self.at, self.size = piece, 0, 0
        self.starts, self.parts = [], []

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def write(self, data: bytes) -> int:
        if self.at < self.size:  # a header is written again when the check sum is known
            i = self.starts.index(self.at, max(0, len(self.starts) - 4))
            assert len(data) == len(self.parts[i])
            self.parts[i] = bytes(data)
        else:
            self.starts.append(self.at)
            self.parts.append(self.piece if len(data) == len(self.piece) else bytes(data))
        self.at += len(data)
        self.size = max(self.size, self.at)
        return len(data)

    def range(self, begin: int, end: int) -> Iterator[memoryview]:
        i = int(np.searchsorted(self.starts, begin, "right")) - 1
        while begin < end:
            inside = begin - self.starts[i]
            found = memoryview(self.parts[i])[inside : inside + end - begin]
            yield found
            begin, i = begin + len(found), i + 1


class Store(BaseHTTPRequestHandler):
    "Files by ranges. The first folder of the path says how it misbehaves; `server.seen` holds what was asked for."

    def do_GET(self) -> None:
        how = self.path.split("?")[0].strip("/").split("/")[0]
        seen = self.server.seen.setdefault(self.path, [])
        seen.append((self.headers.get("Range"), self.headers.get("Authorization"), time.monotonic()))
        try:
            self.answer(how, len(seen))
        except (BrokenPipeError, ConnectionResetError):
            pass

    def answer(self, how: str, n: int) -> None:
        if self.headers.get("Authorization"):
            return self.say(400)
        if how == "busy" and n in (1, 3):
            return self.say(429, Retry_After="1" if n == 1 else "0")
        if how == "later":
            return self.say(429, Retry_After="3600")
        if how == "login":
            return self.say(401)
        if how == "broken" and n % 3 == 1:
            return self.say(503)
        if how == "page":
            return self.say(200, b"<html>log in", Content_Type="text/html")
        if how == "ignores":
            return self.say(200, ARCHIVE)
        if how == "expires" and n > 3:
            return self.say(403)
        if how == "sparse":
            return self.give(self.server.sparse, '"s"')
        changed = how == "changes" and n > 3
        self.give(OTHER if changed else ARCHIVE, '"two"' if changed else '"one"', 40_000 if how == "cuts" else None)

    def give(self, data: bytes | Sparse, tag: str, send: int | None = None) -> None:
        size = data.size if isinstance(data, Sparse) else len(data)
        begin, end = (int(x) for x in self.headers["Range"].removeprefix("bytes=").split("-"))
        if self.headers.get("If-Range", tag) != tag:
            return self.say(200, data)
        end = min(end, size - 1)
        headers = {"Content-Range": f"bytes {begin}-{end}/{size}", "ETag": tag, "Content-Length": str(end + 1 - begin)}
        self.send_response(206)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if isinstance(data, Sparse):
            for part in data.range(begin, end + 1):
                self.wfile.write(part)
        else:
            self.wfile.write(memoryview(data)[begin : min(end + 1, begin + (send or size))])

    def say(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


class Kaggle(Store):
    "The question for a data set, answered as Kaggle does: a redirect to a signed address of the store."

    def answer(self, how: str, n: int) -> None:
        name = self.path.split("?")[0].removeprefix("/api/v1/datasets/download/")
        if self.headers.get("Authorization") != BASIC:
            return self.say(401, json.dumps({"code": 401, "message": f"Unauthorized {self.headers.get('Authorization')}"}).encode())
        if name == "nobody/nothing":
            return self.say(404)
        if name == "someone/terms":
            return self.say(403)
        if name == "someone/busy" and n < 3:
            return self.say(429, Retry_After="0")
        if name == "someone/later":
            return self.say(429, Retry_After="7200")
        if name == "someone/down":
            return self.say(503)
        kind = {"someone/expires": "expires", "someone/cuts": "cuts", "someone/gone": "login"}.get(name, "good")
        self.say(302, Location=f"{self.server.store}/{kind}/archive.zip?{SIGNATURE}{n}")


@pytest.fixture(scope="module")
def store() -> Iterator[ThreadingHTTPServer]:
    yield from serve(Store)


@pytest.fixture
def base(store: ThreadingHTTPServer) -> str:
    store.seen.clear()
    return f"http://127.0.0.1:{store.server_port}"


@pytest.fixture
def kaggle(base: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    "Kaggle on this machine, and an account."
    for made in serve(Kaggle):
        made.store = base
        monkeypatch.setenv("KAGGLE_API_ENDPOINT", f"http://127.0.0.1:{made.server_port}")
        monkeypatch.setenv("KAGGLE_USERNAME", USER)
        monkeypatch.setenv("KAGGLE_KEY", KEY)
        yield made


def serve(handler: type[BaseHTTPRequestHandler]) -> Iterator[ThreadingHTTPServer]:
    made = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    made.seen, made.daemon_threads = {}, True
    threading.Thread(target=made.serve_forever, args=(0.05,), daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def numbers(address: str, **plan: object) -> list[int]:
    with open_stream(address, StreamPlan(**PLAN | plan)) as stream:
        return [int(item.name[-8:-4]) for item in stream]


def test_a_server_gives_what_the_archive_holds(base: str, store: ThreadingHTTPServer, tmp_path: Path) -> None:
    "In a dozen requests for 240 samples; and the order is that of the same archive on the disk."
    (tmp_path / "set.zip").write_bytes(ARCHIVE)
    with open_stream(f"{base}/good/set.zip?key=secret", StreamPlan(**PLAN)) as stream:
        items = list(stream)
        assert not stream.skipped and "secret" not in stream.summary() and "samples/s" in stream.summary()
        print(stream.summary())
    assert sorted(i.name for i in items) == sorted(FILES)[:-1]
    assert {i.label for i in items} == {"No_findings", "Pneumonia"} and all(i.image.shape == (256, 256) for i in items)
    assert all(abs(float(i.image[4:12, 4:12].mean()) - int(i.name[-8:-4]) % 200) < 3 for i in items)
    assert len(next(iter(store.seen.values()))) < 12
    assert [i.name for i in items] == [i.name for i in open_stream(str(tmp_path / "set.zip"), StreamPlan(**PLAN))]


def test_fifty_samples_a_second_from_a_server_on_this_machine(base: str) -> None:
    "The best of at most three: other programs may have the cores for a moment."
    found = []
    while len(found) < 3 and max(found, default=0) < 50:
        with open_stream(f"{base}/good/a.zip", StreamPlan(limit=120, **PLAN)) as stream:
            list(stream)
            found.append(stream.samples_per_s)
    assert max(found) >= 50, found


def test_the_shares_of_several_processes_are_all_and_nothing_twice(base: str) -> None:
    whole = numbers(f"{base}/good/a.zip", cache_mb=2)
    shares = [numbers(f"{base}/good/a.zip", cache_mb=2, rank=r, size=3) for r in range(3)]
    assert sorted(sum(shares, [])) == sorted(whole) == list(range(240)) and [len(s) for s in shares] == [80, 80, 80]
    assert whole != sorted(whole) and max(abs(np.mean([n % 2 for n in s]) - 0.5) for s in shares) < 0.1


@pytest.mark.parametrize("how", ["cuts", "broken", "busy"])
def test_a_bad_line_changes_nothing(base: str, store: ThreadingHTTPServer, how: str) -> None:
    assert numbers(f"{base}/{how}/a.zip", limit=40, cache_mb=1) == numbers(f"{base}/good/a.zip", limit=40, cache_mb=1)
    asked = store.seen[f"/{how}/a.zip"]
    if how == "busy":
        assert asked[1][2] - asked[0][2] >= 1.0, "Retry-After: 1 was not waited for"
    if how == "cuts":
        tail = [int(a[0][6:].split("-")[0]) for a in asked[1:6]]
        assert list(np.diff(tail)) == [40_000] * 4, "what came before the cut is not asked for again"


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("later", r"too many requests \(429\); it asks to wait 3600 s"),
        ("login", r"needs a login \(HTTP 401\)"),
        ("page", "answers with a web page"),
        ("ignores", "sends whole files only"),
        ("changes", "changed while it was read"),
    ],
)
def test_what_cannot_be_streamed_is_said_in_one_line(base: str, how: str, said: str) -> None:
    with pytest.raises(EqError, match=said) as caught:
        numbers(f"{base}/{how}/a.zip?{SIGNATURE}", cache_mb=1)
    assert "\n" not in str(caught.value) and SIGNATURE not in "".join(traceback.format_exception(caught.value))


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*args: object, **options: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.delenv("KAGGLE_API_ENDPOINT", raising=False)
    for name, value in (("KAGGLE_USERNAME", USER), ("KAGGLE_KEY", KEY)):
        monkeypatch.setenv(name, value)
    for address in ("kaggle:nih-chest-xrays/data", "https://data.test/a.zip"):
        with pytest.raises(EqError, match="cannot find the server (www.kaggle.com|data.test): .*no internet here"):
            open_stream(address, StreamPlan(**PLAN))


def test_a_data_set_of_kaggle(kaggle: ThreadingHTTPServer, store: ThreadingHTTPServer) -> None:
    "Kaggle is asked once, with the key; its store all the rest, without."
    assert sorted(numbers("kaggle:someone/set", cache_mb=1)) == list(range(240))
    assert [[a[1] for a in asked] for asked in kaggle.seen.values()] == [[BASIC]]
    assert {a[1] for asked in store.seen.values() for a in asked} == {None} and len(store.seen) == 1
    assert numbers("kaggle:someone/busy", limit=9, cache_mb=1) == numbers("kaggle:someone/cuts", limit=9, cache_mb=1)
    assert len(kaggle.seen["/api/v1/datasets/download/someone/busy"]) == 3
    numbers("kaggle:someone/pinned/versions/4", limit=1)
    assert "/api/v1/datasets/download/someone/pinned?datasetVersionNumber=4" in kaggle.seen


def test_a_signature_that_runs_out_is_renewed(kaggle: ThreadingHTTPServer) -> None:
    assert sorted(numbers("kaggle:someone/expires", cache_mb=1)) == list(range(240))
    assert len(kaggle.seen["/api/v1/datasets/download/someone/expires"]) > 3


def test_the_key_is_in_no_message(kaggle: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    said = {
        "someone/terms": "accepted in a browser at www.kaggle.com/datasets/someone/terms",
        "nobody/nothing": r"no data set of that name \(HTTP 404\)",
        "someone/later": "asks to wait 7200 s",
        "someone/down": "given up after 4 tries",
        "someone/gone": r"kaggle:someone/gone needs a login \(HTTP 401\)",
    }
    told = []
    for name, expected in said.items():
        with pytest.raises(EqError, match=expected) as caught:
            numbers(f"kaggle:{name}")
        told += traceback.format_exception(caught.value)
    with open_stream("kaggle:someone/set", StreamPlan(patience=PATIENCE, limit=3)) as stream:
        list(stream)
        told += [stream.summary(), repr(kaggle_key()), repr(vars(stream.origin)), *capfd.readouterr()]
    monkeypatch.setenv("KAGGLE_KEY", KEY[::-1])
    with pytest.raises(EqError, match=r"kaggle:someone/set: Kaggle does not take the key \(HTTP 401\)") as caught:
        numbers("kaggle:someone/set")
    told += traceback.format_exception(caught.value)
    text = "\n".join(told)
    for secret in (KEY, KEY[::-1], BASIC.split()[1], SIGNATURE):
        assert secret not in text
    assert "kaggle:someone/set" in text


def test_without_a_key_nothing_is_asked(kaggle: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KAGGLE_USERNAME")
    with pytest.raises(EqError, match="the key for Kaggle has no username"):
        open_stream("kaggle:someone/set", StreamPlan(**PLAN))
    assert not kaggle.seen


def lying(name: str = "a/1.png", **changes: int) -> bytes:
    "An archive of one image in whose list some numbers are others."
    data = bytearray(packed({name: chest(1), "a/2.png": chest(2)}, zipfile.ZIP_DEFLATED))
    at = data.index(b"PK\1\2")
    for field, value in changes.items():
        place, length = {"size": (24, 4), "packed": (20, 4), "method": (10, 2), "flags": (8, 2), "offset": (42, 4), "crc": (16, 4), "mode": (38, 4)}[field]
        data[at + place : at + place + length] = value.to_bytes(length, "little")
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (packed({"../../etc/x.png": b"1"}), "leaves the folder"),
        (packed({"/etc/x.png": b"1"}), "is absolute"),
        (packed({"C:\\x.png": b"1"}), "drive letter or a backslash"),
        (packed({"a.png": b"1", "A.png": b"2"}), "refused"),
        (lying(mode=0o120777 << 16), "is a link or a device"),
        (lying(flags=1), "is encrypted"),
        (lying(method=12), "not streamed"),
        (lying(packed=10**6), "overlaps another member"),
        (lying(offset=10**6), "overlaps another member"),
        (packed({f"{i}.png": b"" for i in range(26_000)}), "more than 25600 members"),
        (lying(size=10**9), "a decompression bomb"),
        (ARCHIVE[:-50], "damaged, or no zip archive"),
        (b"GIF89a" * 100, "damaged, or no zip archive"),
        (b"", "no zip archive"),
    ],
)
def test_hostile_archives_are_refused_whole(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(EqError, match=said):
        open_stream(str(tmp_path / "x.zip"), StreamPlan(memory_mb=100, cache_mb=20, **PLAN))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (lying(size=6 * 10**7), "60.0 MB, more than the .* MB that memory_mb and cache_mb leave"),
        (lying(size=100), "its length of 100 bytes, is wrong"),
        (lying(crc=7), "its check sum"),
        (lying(name="a/3.png").replace(b"a/3.png", b"a/4.png", 1), "own header .* do not agree"),
        (packed({"a/1.png": bytes(6 * 10**7), "a/2.png": chest(2)}, zipfile.ZIP_DEFLATED), "60.0 MB, more than the"),
        (packed({"a/1.png": encoded(np.zeros((9000, 9000), np.uint8)), "a/2.png": chest(2)}), "9000x9000 pixels, more than the"),
        (packed({"a/1.png": b"\x89PNG\r\n", "a/2.png": chest(2)}), "cannot be decoded"),
        (packed({"a/1.png": os.urandom(6 * 10**6), "a/2.png": chest(2)}), "more than a quarter of cache_mb 20"),
    ],
)
def test_one_bad_sample_is_skipped_with_its_reason(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "x.zip").write_bytes(data)
    with open_stream(str(tmp_path / "x.zip"), StreamPlan(memory_mb=150, cache_mb=20, **PLAN)) as stream:
        assert [i.name for i in stream] == ["a/2.png"]
    with pytest.raises(AssertionError, match=said):
        assert not list(stream.skipped.values())


def test_a_stream_left_early_leaves_no_thread(base: str) -> None:
    for i, _ in enumerate(stream := open_stream(f"{base}/good/a.zip", StreamPlan(cache_mb=1, **PLAN))):
        if i == 2:
            break
    stream.close()
    end = time.monotonic() + 5
    while (left := [t.name for t in threading.enumerate() if t.name.startswith("eq-stream")]) and time.monotonic() < end:
        time.sleep(0.02)
    assert not left


def test_a_second_pass_takes_from_the_cache(base: str, store: ThreadingHTTPServer) -> None:
    with open_stream(f"{base}/good/a.zip", StreamPlan(cache_mb=30, **PLAN)) as stream:
        list(stream)
        once = len(store.seen["/good/a.zip"])
        list(stream)
        assert len(store.seen["/good/a.zip"]) == once and stream.shelf.hits and not stream.shelf.evicted
    with open_stream(f"{base}/good/b.zip", StreamPlan(cache_mb=1, **PLAN)) as stream:
        assert len(list(stream)) == 240
        assert stream.shelf.evicted > 5 and stream.shelf.most <= 2**19


READER = """
import sys
from eq.data.stream import StreamPlan, open_stream
def of(field): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) / 1024
plan = StreamPlan(cache_mb=int(sys.argv[2]), memory_mb=int(sys.argv[3]), quiet=True)
before = of("VmRSS")  # the program with everything imported
with open_stream(sys.argv[1], plan) as stream:
    seen = sum(int(item.image[0, 0].max()) for item in stream)
    print(len(stream), seen, of("VmHWM") - before, stream.samples_per_s, len(stream.skipped))
"""


def measured_stream(store: ThreadingHTTPServer, megabytes: int, cache_mb: int, memory_mb: int) -> tuple[float, float]:
    "Megabytes at the peak above the start, and samples a second, of a program that streams so many samples of one megabyte and a large one."
    piece = encoded(np.full((1000, 1048), 1, np.uint8), "BMP")
    store.sparse = Sparse(piece)
    side = int((0.9 * StreamPlan(cache_mb=cache_mb, memory_mb=memory_mb).room / 4) ** 0.5)  # nearly as large as is allowed
    with zipfile.ZipFile(store.sparse, "w", zipfile.ZIP_STORED) as archive:
        for i in range(megabytes):
            archive.writestr(f"set/normal/{i:06}.bmp", piece)
        archive.writestr("set/normal/large.jpg", encoded(np.full((side, side, 3), 1, np.uint8), "JPEG"))
    assert store.sparse.size > megabytes * 2**20
    address = f"http://127.0.0.1:{store.server_port}/sparse/{megabytes}.zip"
    done = subprocess.run([sys.executable, "-c", READER, address, str(cache_mb), str(memory_mb)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    count, total, peak, speed, skipped = done.stdout.split()
    assert (int(count), int(total), int(skipped)) == (megabytes + 1, megabytes + 1, 0)
    return float(peak), float(speed)


DEFAULT = pytest.param(5000, StreamPlan().cache_mb, StreamPlan().memory_mb, marks=pytest.mark.skipif(
    not os.environ.get("EQ_FULL_DOSE"), reason="5 GB through the defaults, a minute or two; EQ_FULL_DOSE=1 runs it"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize(("megabytes", "cache_mb", "memory_mb"), [(600, 12, 60), DEFAULT])
def test_a_set_ten_times_as_large_as_the_memory_stays_within_it(store: ThreadingHTTPServer, megabytes: int, cache_mb: int, memory_mb: int) -> None:
    "The peak of a process of its own, above what it had when everything was imported."
    peak, speed = measured_stream(store, megabytes, cache_mb, memory_mb)
    print(f"{megabytes} samples of 1 MB with a cache of {cache_mb} MB: {peak:.0f} MB above the start, {speed:.0f} samples/s")
    assert cache_mb < peak <= memory_mb
