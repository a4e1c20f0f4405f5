"""Downloads that break off go on where they did, from any mirror, and nothing counts until its checksum is right."""

import hashlib
import http.server
import re

import pytest
from conftest import serving

from degrade.data import download as room
from degrade.data.download import download
from degrade.errors import Failure

FILE = bytes(range(256)) * 4096  # 1 MiB
MD5 = hashlib.md5(FILE).hexdigest()
LIMIT = 8 << 20


class Server:
    """Serves `body`; breaks off after `most` bytes of each answer; `asked` are the bytes that each request began at."""

    def __init__(self):
        self.body, self.most, self.resumes, self.status, self.asked = FILE, None, True, 200, []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
                start = int(found[1]) if found else 0
                server.asked.append(start)
                if server.status != 200:
                    self.send_error(server.status)
                    return
                if found and server.resumes:
                    if start >= len(server.body):
                        self.send_error(416)
                        return
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {start}-{len(server.body) - 1}/{len(server.body)}")
                else:
                    start = 0
                    self.send_response(200)
                rest = server.body[start:]
                self.send_header("Content-Length", str(len(rest)))
                self.end_headers()
                self.wfile.write(rest[: server.most])

            def log_message(self, *_):
                pass

        self.httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.httpd.server_port}/file.bin"


@pytest.fixture(scope="module")
def started():
    server = Server()
    with serving(server.httpd):
        yield server


@pytest.fixture
def server(started):
    started.body, started.most, started.resumes, started.status, started.asked = FILE, None, True, 200, []
    return started


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.bin"


def part(path):
    return path.with_name("file.bin.part")


def test_a_connection_that_breaks_off_goes_on(server, path):
    server.most = 400_000
    download([server.url], path, MD5, LIMIT)
    assert path.read_bytes() == FILE
    assert server.asked == [0, 400_000, 800_000]
    assert not part(path).exists()


def test_a_process_that_was_killed_goes_on(server, path):
    part(path).write_bytes(FILE[:1_000_000])
    download([server.url], path, MD5, LIMIT)
    assert path.read_bytes() == FILE
    assert server.asked == [1_000_000]


def test_a_server_that_cannot_go_on_begins_anew(server, path):
    server.resumes = False
    part(path).write_bytes(FILE[:1_000_000])
    download([server.url], path, MD5, LIMIT)
    assert path.read_bytes() == FILE


@pytest.mark.parametrize("stale", [b"of another file", b"x" * len(FILE), b"x" * (len(FILE) + 9), FILE])
def test_a_part_of_another_file_is_thrown_away(stale, server, path):
    part(path).write_bytes(stale)
    download([server.url], path, MD5, LIMIT)
    assert path.read_bytes() == FILE


def test_another_file_is_refused_and_leaves_nothing(server, path):
    server.body = FILE[:-1] + b"!"
    path.write_bytes(b"old")
    with pytest.raises(Failure, match=r"127\.0\.0\.1:\d+: it gives another file, by its checksum"):
        download([server.url], path, MD5, LIMIT)
    assert path.read_bytes() == b"old"
    assert not part(path).exists()
    assert server.asked == [0]


def test_the_next_address_is_tried_and_every_reason_told(server, path):
    server.status = 503
    missing = path.with_name("gone").as_uri()
    with pytest.raises(Failure) as error:
        download([missing, server.url, "ftp://example.org/x"], path, MD5, LIMIT)
    for reason in ("No such file", "Service Unavailable", "must begin with http://"):
        assert reason in str(error.value)
    server.status = 200
    download([missing, server.url], path, MD5, LIMIT)
    assert path.read_bytes() == FILE


def test_a_mirror_on_this_machine(path):
    copy = path.with_name("copy.bin")
    copy.write_bytes(FILE)
    download([copy.as_uri()], path, MD5, LIMIT)
    assert path.read_bytes() == FILE


def test_what_has_arrived_is_kept_where_no_connection_brings_more(server, path, monkeypatch):
    monkeypatch.setattr(room.time, "sleep", lambda _: None)
    server.most = 0
    part(path).write_bytes(FILE[:5])
    with pytest.raises(Failure, match="the connection broke off"):
        download([server.url], path, MD5, LIMIT)
    assert server.asked == [5] * room.PATIENCE
    assert part(path).read_bytes() == FILE[:5]


def test_a_server_that_brings_nothing_new_is_given_up(server, path, monkeypatch):
    """It cannot go on in the middle, and breaks off now here, now there."""
    monkeypatch.setattr(room.time, "sleep", lambda _: None)
    server.resumes = False
    lengths = iter([500_000, 600_000] * 500)
    real = room._append

    def append(*arguments):
        server.most = next(lengths)
        real(*arguments)

    monkeypatch.setattr(room, "_append", append)
    with pytest.raises(Failure, match="the connection broke off"):
        download([server.url], path, MD5, LIMIT)
    assert len(server.asked) <= 3 * room.PATIENCE


def test_a_file_that_is_too_large_is_not_taken(server, path):
    with pytest.raises(Failure, match="too large, 1,048,576 bytes"):
        download([server.url], path, MD5, 1_000_000)
    assert not part(path).exists()


def test_a_link_in_place_of_the_part_is_not_followed(server, path, tmp_path):
    (tmp_path / "canary").write_bytes(b"alive")
    part(path).symlink_to(tmp_path / "canary")
    download([server.url], path, MD5, LIMIT)
    assert path.read_bytes() == FILE
    assert (tmp_path / "canary").read_bytes() == b"alive"


def test_a_full_disk_is_not_taken_for_the_network(server, path):
    part(path).mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        download([server.url, server.url], path, MD5, LIMIT)
    assert len(server.asked) == 1
