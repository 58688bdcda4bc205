"""Downloads from a server that misbehaves in every way we have met: the file is whole, or it is not there and one line says why."""
import hashlib
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import tifffile
from typer.testing import CliRunner

from eq.core.registry import EqError
from eq.data.download import DownloadPlan, Receipt, download
from eq.workflows.data import app

CONTENT = np.random.default_rng(0).bytes(400_000)
OTHER = np.random.default_rng(1).bytes(400_000)
HASH = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    "Every path is a behaviour; `server.seen` counts the requests."

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/")
        seen = self.server.seen.setdefault(path, [])
        seen.append(dict(self.headers))
        try:
            BEHAVIOURS[path.split("/")[0]](self, len(seen))
        except (BrokenPipeError, ConnectionResetError):
            pass
        self.close_connection = True

    def start(self) -> int:
        asked = self.headers.get("Range")
        return int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def serve(self, data: bytes = CONTENT, send: int | None = None, tag: str = '"a"', declared: int | None = None) -> None:
        "Ranges as a good server does them; `send` bytes at most before the line is cut."
        start = self.start() if self.headers.get("If-Range", tag) == tag else 0
        rest = data[start:]
        headers = {"Content_Length": str((declared or len(data)) - start), "ETag": tag}
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{declared or len(data)}"
        self.answer(206 if start else 200, rest if send is None else rest[:send], **headers)

    def log_message(self, *args: object) -> None:
        pass


def stall(h: Handler, n: int) -> None:
    h.serve(send=100_000)
    h.wfile.flush()
    time.sleep(0 if n > 1 else 3)


def ignores_range(h: Handler, n: int) -> None:
    h.answer(200, CONTENT if n > 1 else CONTENT[:150_000], Content_Length=str(len(CONTENT)), ETag='"a"')


def changed(h: Handler, n: int) -> None:
    h.serve(*((CONTENT, 150_000, '"a"') if n == 1 else (OTHER, None, '"b"')))


def changed_sloppy(h: Handler, n: int) -> None:
    "Goes on in the middle of another file without a look at If-Range."
    if n == 1:
        h.serve(send=150_000)
    elif h.start():
        body = OTHER[h.start() :]
        h.answer(206, body, ETag='"b"', Content_Range=f"bytes {h.start()}-{len(OTHER) - 1}/{len(OTHER)}")
    else:
        h.serve(OTHER, tag='"b"')


def changed_length(h: Handler, n: int) -> None:
    "The same, and without an ETag."
    if n == 1:
        h.answer(200, CONTENT[:150_000], Content_Length=str(len(CONTENT)), Last_Modified="Mon, 01 Jan 2024 00:00:00 GMT")
    else:
        h.answer(206, OTHER[h.start() :], Content_Range=f"bytes {h.start()}-{len(OTHER)}/{len(OTHER) + 1}") if h.start() else h.serve(OTHER)


def chunked(h: Handler, n: int) -> None:
    h.send_response(200)
    h.send_header("Transfer-Encoding", "chunked")
    h.end_headers()
    for i in range(0, len(CONTENT) if n > 1 else 150_000, 50_000):
        h.wfile.write(b"%x\r\n%s\r\n" % (len(CONTENT[i : i + 50_000]), CONTENT[i : i + 50_000]))
    h.wfile.write(b"0\r\n\r\n" if n > 1 else b"")


def endless(h: Handler, n: int) -> None:
    h.send_response(200)
    h.end_headers()
    for _ in range(1000):
        h.wfile.write(CONTENT)


def drip(h: Handler, n: int) -> None:
    h.send_response(200)
    h.send_header("Content-Length", "1000")
    h.end_headers()
    for _ in range(12):
        h.wfile.write(b"x")
        h.wfile.flush()
        time.sleep(0.1)


def redirect(to: str) -> Callable[[Handler, int], None]:
    return lambda h, n: h.answer(302, Location=to)


BEHAVIOURS: dict[str, Callable[[Handler, int], None]] = {
    "good": lambda h, n: h.serve(),
    "cuts": lambda h, n: h.serve(send=90_000),
    "stalls": stall,
    "ignores": ignores_range,
    "changed": changed,
    "sloppy": changed_sloppy,
    "length": changed_length,
    "chunked": chunked,
    "endless": endless,
    "drip": drip,
    "short": lambda h, n: h.serve(declared=500_000),
    "long": lambda h, n: h.answer(200, CONTENT, Content_Length="300000"),
    "huge": lambda h, n: h.answer(200, b"", Content_Length=str(10**15)),
    "range": lambda h, n: h.answer(416, Content_Range="bytes */10") if h.start() else h.serve(send=150_000 if n == 1 else None),
    "busy": lambda h, n: h.answer(429, Retry_After="0") if n < 3 else h.serve(),
    "later": lambda h, n: h.answer(503, Retry_After="3600"),
    "broken": lambda h, n: h.answer(500) if n < 3 else h.serve(),
    "always": lambda h, n: h.answer(500),
    "forbidden": lambda h, n: h.answer(403),
    "login": lambda h, n: h.answer(401),
    "none": lambda h, n: h.answer(404),
    "page": lambda h, n: h.answer(200, b"<html>log in", Content_Type="text/html; charset=utf-8"),
    "to": redirect("/good"),
    "loop": redirect("/loop"),
    "file": redirect("file:///etc/passwd"),
    "gopher": redirect("gopher://127.0.0.1/"),
    "nowhere": redirect(""),
    "slow": lambda h, n: (h.serve(send=250_000), h.wfile.flush(), time.sleep(30 if n == 1 else 0))[0],
    "weak": lambda h, n: h.answer(200, CONTENT[: 150_000 if n == 1 else None], Content_Length=str(len(CONTENT)), ETag='W/"a"'),
}


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadingHTTPServer]:
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.seen = {}
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def get(server: ThreadingHTTPServer, tmp_path: Path) -> Callable[..., Receipt]:
    server.seen.clear()

    def fetch(path: str, **plan: object) -> Receipt:
        values = {"quiet": True, "wait_s": 0.01, "stall_s": 1.0, "retries": 3, **plan}
        return download(DownloadPlan(f"http://127.0.0.1:{server.server_port}/{path}", **values), tmp_path / "file.bin")

    return fetch


def here(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("how", ["good", "cuts", "stalls", "ignores", "chunked", "range", "busy", "broken", "to", "weak"])
def test_the_file_arrives_whole(get: Callable[..., Receipt], server: ThreadingHTTPServer, tmp_path: Path, how: str) -> None:
    receipt = get(how)
    assert (receipt.sha256, receipt.bytes, receipt.path.read_bytes()) == (HASH, len(CONTENT), CONTENT)
    assert here(tmp_path) == ["file.bin"]
    tries = {"good": 1, "cuts": 5, "stalls": 4, "to": 1, "busy": 3, "broken": 3, "range": 3}
    assert len(server.seen[how]) == tries.get(how, 2)


@pytest.mark.parametrize("how", ["changed", "sloppy", "length"])
def test_two_versions_are_never_mixed(get: Callable[..., Receipt], tmp_path: Path, how: str) -> None:
    assert get(how).path.read_bytes() == OTHER and here(tmp_path) == ["file.bin"]


def test_only_what_is_missing_is_asked_for_and_only_of_the_same_version(get: Callable[..., Receipt], server: ThreadingHTTPServer) -> None:
    get("cuts")
    assert [r.get("Range") for r in server.seen["cuts"]] == [None, *[f"bytes={n}-" for n in (90_000, 180_000, 270_000, 360_000)]]
    assert {r.get("If-Range") for r in server.seen["cuts"][1:]} == {'"a"'}


@pytest.mark.parametrize(
    ("how", "said", "kept"),
    [
        ("short", "declares 500000 bytes and ends after 400000; given up after 4 tries; 400000 bytes are kept", True),
        ("long", "declares 300000 bytes and sends more; nothing of it is kept", False),
        ("huge", "more than the 0.001 GB allowed; --max-gb", False),
        ("endless", "more than the 0.001 GB allowed; --max-gb", False),
        ("drip", "only 10 bytes came in 1 s|only 1[01] bytes|given up", True),
        ("later", r"busy or broken \(503\); it asks to wait 3600 s", False),
        ("always", r"busy or broken \(500\); given up after 4 tries", False),
        ("forbidden", r"may need a login.*\(HTTP 403\)", False),
        ("login", r"needs a login \(HTTP 401\)", False),
        ("none", r"is not there; it may have moved: give --url \(HTTP 404\)", False),
        ("page", "answers with a web page, not with a file", False),
        ("loop", "more than 8 redirects", False),
        ("file", "redirects to where eq does not go: 'file:///etc/passwd'", False),
        ("gopher", "redirects to where eq does not go", False),
        ("nowhere", "more than 8 redirects", False),
    ],
)
def test_what_cannot_be_had_is_said_in_one_line(get: Callable[..., Receipt], tmp_path: Path, how: str, said: str, kept: bool) -> None:
    before = time.monotonic()
    with pytest.raises(EqError, match=said) as caught:
        get(how, max_bytes=1_000_000)
    assert "\n" not in str(caught.value) and time.monotonic() - before < 20
    assert here(tmp_path) == (["file.bin.part", "file.bin.part.json"] if kept else [])


def test_a_public_server_cannot_send_us_into_our_own_network(get: Callable[..., Receipt], server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    "127.0.0.1 plays the internet, 127.0.0.2 and a name for it play the inside."
    monkeypatch.setattr("eq.data.http.is_inside", lambda address: str(ipaddress.ip_address(address)) == "127.0.0.2")
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: real("127.0.0.2" if host == "inside.test" else host, *a, **k))
    for target in ("127.0.0.2", "inside.test", "localhost"):
        BEHAVIOURS["inside"] = redirect(f"http://{target}:{server.server_port}/good")
        with pytest.raises(EqError, match=f"refused: .*{target}"):
            get("inside")
    assert "good" not in server.seen


def test_no_internet_and_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {"quiet": True, "wait_s": 0.0, "retries": 1}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(EqError, match="no connection to 127.0.0.1: Connection refused; given up after 2 tries"):
            download(DownloadPlan(f"http://127.0.0.1:{free.getsockname()[1]}/x", **quick), tmp_path / "x")

    def unknown(*args: object, **options: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(EqError, match="cannot find the server data.test: .*no internet here"):
        download(DownloadPlan("http://data.test/x", **quick), tmp_path / "x")
    assert here(tmp_path) == []


def test_a_full_disk_keeps_what_came_and_goes_on(get: Callable[..., Receipt], server: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import eq.data.download as module

    real, calls = module._write, []

    def fills(file: object, block: bytes, part: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise module.write_error(OSError(28, "No space left on device"), tmp_path / "file.bin.part")
        real(file, block, part)

    monkeypatch.setattr(module, "_CHUNK", 100_000)
    monkeypatch.setattr(module, "_write", fills)
    with pytest.raises(EqError, match="disk full"):
        get("good")
    monkeypatch.setattr(module, "_write", real)
    assert get("good").sha256 == HASH and "Range" in server.seen["good"][1]
    with pytest.raises(EqError, match="disk full: .* needs 0.00 GB more"):
        monkeypatch.setattr("shutil.disk_usage", lambda p: type("Usage", (), {"free": 10})())
        get("good")


def test_the_hash_decides(get: Callable[..., Receipt], tmp_path: Path) -> None:
    assert get("good", sha256=HASH.upper()).sha256 == HASH
    with pytest.raises(EqError, match=f"has the SHA-256 {HASH}, expected {'0' * 64}"):
        get("good", sha256="0" * 64)
    assert here(tmp_path) == ["file.bin"] and (tmp_path / "file.bin").read_bytes() == CONTENT  # the version before


def test_a_killed_download_goes_on(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{server.server_port}/slow"
    server.seen.clear()
    code = f"from eq.data.download import *; download(DownloadPlan({url!r}, quiet=True), {str(tmp_path / 'file.bin')!r})"
    with subprocess.Popen([sys.executable, "-c", code], env={**os.environ}) as child:
        part = tmp_path / "file.bin.part"
        for _ in range(600):
            if part.is_file() and part.stat().st_size >= 200_000:
                break
            time.sleep(0.1)
        with pytest.raises(EqError, match="another process is fetching"):
            download(DownloadPlan(url, quiet=True), tmp_path / "file.bin")
        child.send_signal(signal.SIGKILL)
        child.wait()
    kept = part.stat().st_size
    assert 0 < kept < len(CONTENT)
    assert download(DownloadPlan(url, quiet=True), tmp_path / "file.bin").sha256 == HASH
    assert server.seen["slow"][1]["Range"] == f"bytes={kept}-"
    assert here(tmp_path) == ["file.bin"]


def lucchi_zip(path: Path, sections: int = 24) -> Path:
    "A small set of the same make as the EPFL volumes."
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, count in (("training", sections), ("testing", 4)):
            truth = np.zeros((count, 48, 64), np.uint8)
            truth[:, 10:30, 20:40] = 255
            for end, volume in (("", rng.integers(0, 90, truth.shape, dtype=np.uint8) + truth // 2), ("_groundtruth", truth)):
                tifffile.imwrite(path.with_suffix(".tif"), volume.astype(np.uint8), photometric="minisblack")
                archive.write(path.with_suffix(".tif"), f"Lucchi/{name}{end}.tif")
    path.with_suffix(".tif").unlink()
    return path


def run(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_eq_data_fetch_from_a_url_to_a_cohort(server: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQ__DATA__ROOT", str(tmp_path / "data"))
    body = lucchi_zip(tmp_path / "set.zip").read_bytes()
    BEHAVIOURS["set.zip"] = lambda h, n: h.serve(body, send=20_000 if n < 3 else None)
    url = f"http://127.0.0.1:{server.server_port}/set.zip?key=secret"
    code, said = run("fetch", "lucchi", "--url", url)
    assert code == 0 and "28 images, 3 blocks" in said and said.startswith("terms: EPFL")
    assert f"fetching {url.split('?')[0]}" in said and "secret" not in said
    assert "declared: train 4 images of 1 blocks, validate 20 images of 1 blocks, test 4" in run("show", "lucchi")[1]
    notes = json.loads((tmp_path / "data" / "downloads" / "lucchi" / "fetched.json").read_text())
    assert notes["set.zip"]["sha256"] == hashlib.sha256(body).hexdigest() and "secret" not in json.dumps(notes)
    with pytest.raises(EqError, match="exists already"):
        run("fetch", "lucchi", "--url", url)

    (tmp_path / "data" / "lucchi").rename(tmp_path / "before")
    (tmp_path / "data" / "downloads" / "lucchi" / "set.zip").unlink()
    changed = lucchi_zip(tmp_path / "new.zip", sections=25).read_bytes()
    BEHAVIOURS["set.zip"] = lambda h, n: h.serve(changed)
    with pytest.raises(EqError, match="it changed or was tampered with"):
        run("fetch", "lucchi", "--url", url)
    assert run("fetch", "lucchi", "--url", url, "--sha256", hashlib.sha256(changed).hexdigest())[0] == 0
    assert here(tmp_path / "data") == ["downloads", "lucchi"]


def test_a_hostile_or_useless_archive_makes_no_source(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    for name, members, said in (("evil.zip", {"../x": b"1"}, "leaves the folder"), ("empty.zip", {"readme.txt": b"1"}, "found 0; it holds readme.txt")):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for member, data in members.items():
                archive.writestr(member, data)
        body = (tmp_path / name).read_bytes()
        BEHAVIOURS[name] = lambda h, n, body=body: h.serve(body)
        with pytest.raises(EqError, match=said):
            run("fetch", "lucchi", "--root", tmp_path / "data", "--url", f"http://127.0.0.1:{server.server_port}/{name}")
        assert here(tmp_path / "data") == ["downloads"]
    assert not (tmp_path / "x").exists()


def test_quota_of_the_command(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    with pytest.raises(EqError, match="--max-gb allows more"):
        run("fetch", "lucchi", "--root", tmp_path, "--url", f"http://127.0.0.1:{server.server_port}/good/x.zip", "--max-gb", "0.0001")
