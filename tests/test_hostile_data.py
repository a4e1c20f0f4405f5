"""Damaged or hostile CIFAR-10: refused before anything is unpickled, and nothing is written outside the folder."""

import gzip
import hashlib
import http.server
import io
import multiprocessing
import os
import pickle
import random
import signal
import stat
import tarfile
import time
import tracemalloc

import numpy as np
import pytest
from conftest import serving, tally
from torchvision.datasets import CIFAR10

from degrade.data import official
from degrade.errors import Failure

pytestmark = pytest.mark.promise

cifar10 = official.CIFAR10
FOLDER = cifar10.folder
BATCHES = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
NAMES = [*BATCHES, CIFAR10.meta["filename"]]
VICTIM = "data_batch_3"
LIMIT = 4 << 20  # for these small files, in place of official.LIMIT


def batch(i):
    pixels = np.random.default_rng(i).integers(0, 256, (20, 3072), dtype=np.uint8)
    return pickle.dumps({"data": pixels, "labels": [i % 10 for i in range(20)]})


GOOD = {name: batch(i) for i, name in enumerate(BATCHES)} | {"batches.meta": pickle.dumps({"label_names": []})}


class Evil:
    """Makes a folder where it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


class Server:
    """Serves one archive, whatever the path, and counts how often."""

    def __init__(self):
        self.body, self.garbage, self.downloads, self.seconds = b"", b"", 0, 0.0
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                if server.garbage:
                    self.wfile.write(server.garbage)
                    return
                server.downloads += 1
                self.send_response(200)
                self.send_header("Content-Length", str(len(server.body)))
                self.end_headers()
                time.sleep(server.seconds)
                self.wfile.write(server.body)

            def log_message(self, *_):
                pass

        self.httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)


@pytest.fixture(scope="module")
def httpd():
    server = Server()
    with serving(server.httpd):
        yield server


@pytest.fixture
def server(httpd, monkeypatch):
    httpd.garbage, httpd.downloads, httpd.seconds = b"", 0, 0.0
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{httpd.httpd.server_port}/{CIFAR10.filename}")
    return httpd


@pytest.fixture(autouse=True)
def genuine(monkeypatch):
    """The small files and their archive are the official ones."""

    def md5s(entries):
        return [[name, hashlib.md5(GOOD[name]).hexdigest()] for name, _ in entries]

    monkeypatch.setattr(CIFAR10, "train_list", md5s(CIFAR10.train_list))
    monkeypatch.setattr(CIFAR10, "test_list", md5s(CIFAR10.test_list))
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": hashlib.md5(GOOD["batches.meta"]).hexdigest()})
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(ARCHIVE).hexdigest())
    monkeypatch.setattr(official, "LIMIT", LIMIT)


@pytest.fixture(autouse=True)
def no_waiting():
    """A test that hangs fails."""

    def late(*_):
        pytest.fail("it takes for ever")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def unpickled(monkeypatch):
    """What has been unpickled."""
    calls = []
    for name in ("load", "loads"):
        real = getattr(pickle, name)
        monkeypatch.setattr(pickle, name, lambda *a, real=real, **k: (calls.append(a), real(*a, **k))[1])
    load = official._Arrays.load
    monkeypatch.setattr(official._Arrays, "load", lambda self: (calls.append(self), load(self))[1])
    return calls


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A folder beside the data folder, with a file that must stay as it is; and the working directory is seen too."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "canary").write_bytes(b"alive")
    (folder / "canary").chmod(0o600)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return folder


def add(tar, name, data=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data) if data else None)


def add_good(tar, *, but=(), **fields):
    for name, data in GOOD.items():
        if name not in but:
            add(tar, f"{FOLDER}/{name}", data, **fields)


def packed(hostile, *, but=(), then=add_good):
    """An archive: `hostile(tar)`, then the genuine files."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as tar:
        add(tar, FOLDER, type=tarfile.DIRTYPE, mode=0o755)
        add(tar, f"{FOLDER}/readme.html", b"<html>")
        hostile(tar)
        then(tar, but=but)
    return file.getvalue()


ARCHIVE = packed(lambda tar: None)


def put(folder, files=GOOD):
    (folder / FOLDER).mkdir(parents=True)
    for name, data in files.items():
        (folder / FOLDER / name).write_bytes(data)
    return folder


def listing(root):
    """All there is under `root`: files with their bytes and times, links, pipes, folders. Links are not followed."""
    found = {}
    for path in root.rglob("*"):
        status = path.lstat()
        content = ()
        if stat.S_ISREG(status.st_mode):
            content = (path.read_bytes(), status.st_mtime_ns, status.st_nlink)
        elif stat.S_ISLNK(status.st_mode):
            content = (os.readlink(path),)
        found[str(path.relative_to(root))] = (status.st_mode, *content)
    return found


def assert_nothing_else(root, before):
    """What is new under `root` is the data folder, the archive, the lock and genuine files."""
    after = listing(root)
    allowed = {"data": None, f"data/{FOLDER}": None, "data/.lock": None, f"data/{CIFAR10.filename}": None}
    allowed |= {f"data/{FOLDER}/{name}": data for name, data in GOOD.items()}
    assert set(before) <= set(after)
    for name in after:
        if after[name] != before.get(name):
            assert name in allowed
            if allowed[name] is not None:
                assert after[name][0] == stat.S_IFREG | 0o644
                assert after[name][1] == allowed[name]


def refused(call, folder):
    """The message, of one line, with which `call(folder)` fails."""
    with pytest.raises(Failure) as error:
        call(folder)
    message = str(error.value)
    assert message.isprintable()  # so no newline
    for part in ("CIFAR-10 is", str(folder), "--data-dir", "--dataset shapes"):
        assert part in message
    return message


def contents(folder):
    return {path.name: path.read_bytes() for path in (folder / FOLDER).iterdir()}


def flip(data):
    bad = bytearray(data)
    bad[len(bad) // 2] ^= 1
    return bytes(bad)


class TestDamage:
    @pytest.mark.parametrize("name", NAMES)
    def test_one_byte_flipped(self, name, tmp_path, server, unpickled):
        tally(12, "files with one byte flipped: refused before anything is unpickled, then mended")
        server.body = ARCHIVE
        folder = put(tmp_path, GOOD | {name: flip(GOOD[name])})
        inodes = {path.name: path.stat().st_ino for path in (folder / FOLDER).iterdir()}
        assert f"damaged in {folder} ({name}: missing or damaged" in refused(cifar10.load, folder)
        assert unpickled == []
        cifar10.fetch(folder)
        assert unpickled == []
        assert contents(folder) == GOOD
        assert [n for n in NAMES if (folder / FOLDER / n).stat().st_ino != inodes[n]] == [name]
        (train, _), (test, _) = cifar10.load(folder)
        assert (len(train), len(test), len(unpickled)) == (100, 20, 6)
        assert pickle.loads(GOOD["test_batch"])["data"].tobytes() == test.numpy().tobytes()

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("damage", ["truncated", "longer", "empty", "missing", "evil"])
    def test_other_damage(self, name, damage, tmp_path, server, unpickled):
        tally(12, "files damaged otherwise: likewise")
        server.body = ARCHIVE
        folder, path = put(tmp_path), tmp_path / FOLDER / name
        evil = pickle.dumps(Evil(tmp_path / "canary"))
        path.unlink()
        if damage != "missing":
            data = {"truncated": GOOD[name][:-1], "longer": GOOD[name] + b"\0", "empty": b"", "evil": evil}[damage]
            path.write_bytes(data)
        assert "no download was tried" in refused(cifar10.load, folder)
        cifar10.fetch(folder)
        assert contents(folder) == GOOD
        assert unpickled == []
        assert not (tmp_path / "canary").exists()

    def test_an_evil_pickle_is_not_executed_even_with_the_official_checksum(self, tmp_path, monkeypatch):
        evil = pickle.dumps({"data": Evil(tmp_path / "canary"), "labels": []})
        folder = put(tmp_path, GOOD | {VICTIM: evil})
        md5s = [[name, hashlib.md5(evil).hexdigest() if name == VICTIM else md5] for name, md5 in CIFAR10.train_list]
        monkeypatch.setattr(CIFAR10, "train_list", md5s)
        with pytest.raises(Failure, match=r"an official file holds no posix\.mkdir"):
            cifar10.load(folder)
        assert not (tmp_path / "canary").exists()

    def test_the_evil_pickle_is_one(self, tmp_path):
        pickle.loads(pickle.dumps(Evil(tmp_path / "canary")))
        assert (tmp_path / "canary").exists()

    def test_mending_takes_no_network_where_the_archive_is(self, tmp_path, server):
        server.body = ARCHIVE
        cifar10.fetch(tmp_path)
        (tmp_path / FOLDER / VICTIM).write_bytes(b"")
        cifar10.fetch(tmp_path)
        assert contents(tmp_path) == GOOD
        assert server.downloads == 1

    def test_a_damaged_archive_is_downloaded_anew(self, tmp_path, server):
        server.body = ARCHIVE
        (tmp_path / CIFAR10.filename).write_bytes(flip(ARCHIVE))
        cifar10.fetch(tmp_path)
        assert contents(tmp_path) == GOOD
        assert (tmp_path / CIFAR10.filename).read_bytes() == ARCHIVE

    @pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="Linux has a file that cannot be read")
    def test_a_file_that_the_disk_cannot_read(self, tmp_path, server):
        server.body = ARCHIVE
        folder, path = put(tmp_path), tmp_path / FOLDER / VICTIM
        path.unlink()
        path.symlink_to("/proc/self/mem")  # EIO at its start
        assert f"{VICTIM}: Input/output error" in refused(cifar10.load, folder)
        cifar10.fetch(folder)
        assert contents(folder) == GOOD

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    @pytest.mark.parametrize("what", [".", FOLDER, f"{FOLDER}/{VICTIM}"])
    def test_no_permission(self, what, tmp_path):
        folder = put(tmp_path / "data")
        (folder / what).chmod(0)
        try:
            assert "Permission denied" in refused(cifar10.load, folder)
            if what != f"{FOLDER}/{VICTIM}":
                refused(cifar10.fetch, folder)
        finally:
            (folder / what).chmod(0o700)

    def test_a_pipe_does_not_make_it_wait(self, tmp_path, server):
        server.body = ARCHIVE
        folder = put(tmp_path, {name: data for name, data in GOOD.items() if name != VICTIM})
        os.mkfifo(folder / FOLDER / VICTIM)
        os.mkfifo(folder / CIFAR10.filename)
        refused(cifar10.load, folder)
        cifar10.fetch(folder)
        assert contents(folder) == GOOD

    @pytest.mark.parametrize("what", [".", FOLDER, f"{FOLDER}/{VICTIM}", CIFAR10.filename])
    def test_a_file_in_place_of_a_folder_and_the_reverse(self, what, tmp_path, server):
        server.body = ARCHIVE
        folder = tmp_path / "data"
        path = folder / what
        if path.name in (VICTIM, CIFAR10.filename):
            path.mkdir(parents=True)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"")
        refused(cifar10.fetch, folder)
        refused(cifar10.load, folder)


class TestLinks:
    """Links that are in the data folder already."""

    def test_the_folder_may_be_on_another_disk(self, tmp_path, outside, server):
        server.body = ARCHIVE
        (tmp_path / FOLDER).symlink_to(outside)
        cifar10.fetch(tmp_path)
        assert (tmp_path / FOLDER).is_symlink()
        assert contents(tmp_path) == GOOD | {"canary": b"alive"}

    def test_a_folder_linked_to_nowhere(self, tmp_path, server):
        server.body = ARCHIVE
        (tmp_path / FOLDER).symlink_to(tmp_path / "gone")
        refused(cifar10.fetch, tmp_path)
        assert not (tmp_path / "gone").exists()

    @pytest.mark.parametrize("what", [f"{FOLDER}/{VICTIM}", CIFAR10.filename])
    @pytest.mark.parametrize("target", ["canary", "gone"])
    def test_a_link_in_place_of_a_file_is_replaced(self, what, target, tmp_path, outside, server):
        server.body = ARCHIVE
        (tmp_path / "data" / FOLDER).mkdir(parents=True)
        path = tmp_path / "data" / what
        path.symlink_to(outside / target)
        before = listing(outside)
        cifar10.fetch(tmp_path / "data")
        assert listing(outside) == before
        assert not path.is_symlink()
        assert contents(tmp_path / "data") == GOOD

    def test_a_linked_archive_with_the_right_checksum_is_used(self, tmp_path, outside, server):
        (outside / "archive").write_bytes(ARCHIVE)
        (tmp_path / CIFAR10.filename).symlink_to(outside / "archive")
        cifar10.fetch(tmp_path)
        assert contents(tmp_path) == GOOD
        assert server.downloads == 0


def in_its_place(make):
    """A hostile archive in which something else has the name of a genuine file."""
    return lambda outside: packed(lambda tar: make(tar, f"{FOLDER}/{VICTIM}", outside), but=[VICTIM])


def beside(make):
    """A hostile archive with all the genuine files."""
    return lambda outside: packed(lambda tar: make(tar, f"{FOLDER}/{VICTIM}", outside))


def evil(outside):
    return pickle.dumps(Evil(outside / "unpickled"))


def through_a_link(tar, name, outside):
    add(tar, f"{FOLDER}/link", type=tarfile.SYMTYPE, linkname=str(outside))
    add(tar, f"{FOLDER}/link/escaped", b"bad")
    add(tar, f"{FOLDER}/link/canary", b"bad")


def folder_is_a_link(tar, name, outside):
    add(tar, FOLDER, type=tarfile.SYMTYPE, linkname="../outside")


def linked_then_written(tar, name, outside):
    add(tar, name, type=tarfile.SYMTYPE, linkname=str(outside / "canary"))
    add(tar, name, evil(outside))


def hard_linked_then_written(tar, name, outside):
    add(tar, name, type=tarfile.LNKTYPE, linkname=str(outside / "canary"))
    add(tar, name, evil(outside))


def good_then_bad(tar, name, outside):
    add(tar, name, GOOD[VICTIM])
    add(tar, name, evil(outside))


def bad_then_good(tar, name, outside):
    add(tar, name, evil(outside))
    add(tar, name, GOOD[VICTIM])


def renamed(tar, name, outside):
    tar.format = tarfile.PAX_FORMAT
    add(tar, "harmless", b"bad", pax_headers={"path": "../../escaped"})
    add(tar, "harmless", type=tarfile.SYMTYPE, pax_headers={"path": name, "linkpath": str(outside / "canary")})


def strange_names(tar, name, outside):
    around = [f"{name}\n", f"\n{name}", f"{name}\u202e", f"{name}\x1b[2J", f"./{name}", f"/{name}", f"{name}/x"]
    others = [f"{FOLDER}//x", f"{FOLDER}/../{name}", name.upper(), "x" * 300, "\udcff", "..", ".", "~", "C:\\x"]
    for other in around + others:
        add(tar, other, evil(outside))


def elsewhere(tar, name, outside):
    for other in (VICTIM, f"x/{VICTIM}", f"x/{name}", f"{FOLDER}/x/{VICTIM}", f"./{name}", f"/{name}"):
        add(tar, other, GOOD[VICTIM])


def sparse(tar, name, outside):
    tar.format = tarfile.PAX_FORMAT
    for i in range(4):
        add(tar, name, b"x" * 512, pax_headers={"GNU.sparse.map": "0,512", "GNU.sparse.size": str((1 << 30) + i)})


def bomb(tar, name, outside):
    add(tar, name, bytes(64 << 20))


def huge_header(tar, name, outside):
    add(tar, "long", bytes(64 << 20), type=tarfile.GNUTYPE_LONGNAME)


def in_circles(tar, name, outside):
    tar.format = tarfile.GNU_FORMAT
    add(tar, "round", size=-512)  # so the next header is this one


def crowd(tar, name, outside):
    for _ in range(2_000):
        add(tar, f"{FOLDER}/readme.html")


HOSTILE = {  # name: the archive, and whether the genuine files are in it
    "parent": (beside(lambda tar, name, outside: add(tar, "../escaped", b"bad")), True),
    "parent of the folder": (beside(lambda tar, name, outside: add(tar, f"{FOLDER}/../../escaped", b"bad")), True),
    "absolute": (beside(lambda tar, name, outside: add(tar, str(outside / "canary"), b"bad")), True),
    "in the data folder": (beside(lambda tar, name, outside: add(tar, "shapes.npy", b"bad")), True),
    "through a link": (beside(through_a_link), True),
    "the folder is a link": (beside(folder_is_a_link), True),
    "a link, then written": (in_its_place(linked_then_written), False),
    "a hard link, then written": (in_its_place(hard_linked_then_written), False),
    "good, then bad": (in_its_place(good_then_bad), True),
    "bad, then good": (in_its_place(bad_then_good), True),
    "setuid": (lambda outside: packed(lambda tar: add_good(tar, mode=0o6777, uid=1), but=NAMES), True),
    "the pax header renames": (beside(renamed), True),
    "strange names": (beside(strange_names), True),
    "only strange names": (in_its_place(strange_names), False),
    "only elsewhere": (in_its_place(elsewhere), False),
    "evil": (in_its_place(lambda tar, name, outside: add(tar, name, evil(outside))), False),
    "a folder": (in_its_place(lambda tar, name, outside: add(tar, name, type=tarfile.DIRTYPE, mode=0o777)), False),
    "a pipe": (in_its_place(lambda tar, name, outside: add(tar, name, type=tarfile.FIFOTYPE)), False),
    "a device": (
        in_its_place(lambda tar, name, outside: add(tar, name, type=tarfile.CHRTYPE, devmajor=1, devminor=5)),
        False,
    ),
    "a soft link to itself": (
        in_its_place(lambda tar, name, outside: add(tar, name, type=tarfile.SYMTYPE, linkname=VICTIM)),
        False,
    ),
    "sparse": (in_its_place(sparse), False),
    "a bomb": (in_its_place(bomb), False),
    "a bomb in a header": (beside(huge_header), False),
    "too long for itself": (in_its_place(lambda tar, name, outside: add(tar, name, size=1 << 40)), False),
    "a negative size": (beside(in_circles), False),
    "a crowd": (beside(crowd), False),
    "empty": (lambda outside: packed(lambda tar: None, but=NAMES), False),
    "breaks off": (lambda outside: ARCHIVE[: len(ARCHIVE) // 2], False),
    "breaks off at the end": (lambda outside: ARCHIVE[:-1], False),
    "not a tar": (lambda outside: gzip.compress(b"<html>" * 1000), False),
    "not a gzip": (lambda outside: b"<html>\n404" * 1000, False),
    "nothing": (lambda outside: b"", False),
}


class TestHostileArchives:
    @pytest.mark.parametrize("case", HOSTILE)
    def test_another_checksum_is_not_opened(self, case, tmp_path, outside, server, monkeypatch, unpickled):
        tally(12, "hostile archives: not opened")

        def opened(*_, **__):
            pytest.fail("opened")

        server.body = HOSTILE[case][0](outside)
        before = listing(tmp_path)
        monkeypatch.setattr(gzip, "open", opened)
        monkeypatch.setattr(tarfile, "open", opened)
        refused(cifar10.fetch, tmp_path / "data")
        assert server.downloads == 1
        assert not (tmp_path / "data" / FOLDER).exists()
        assert_nothing_else(tmp_path, before)
        assert unpickled == []

    @pytest.mark.parametrize("case", HOSTILE)
    def test_with_the_checksum_forged(self, case, tmp_path, outside, server, monkeypatch, unpickled):
        """As if the official archive had been replaced, and only the checksums of the files could be trusted."""
        tally(12, "hostile archives with the checksum forged: nothing written outside the folder, nothing unpickled")
        archive, complete = HOSTILE[case]
        server.body = archive(outside)
        monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(server.body).hexdigest())
        before = listing(tmp_path)
        tracemalloc.start()
        try:
            if complete:
                cifar10.fetch(tmp_path / "data")
                assert contents(tmp_path / "data") == GOOD
            else:
                assert "the archive" in refused(cifar10.fetch, tmp_path / "data")
                assert not (tmp_path / "data" / FOLDER).exists()
            assert tracemalloc.get_traced_memory()[1] < 4 * LIMIT
        finally:
            tracemalloc.stop()
        assert_nothing_else(tmp_path, before)
        assert unpickled == []

    def test_what_is_there_stays_where_the_archive_cannot_mend(self, tmp_path, server, monkeypatch):
        damaged = GOOD | {VICTIM: flip(GOOD[VICTIM]), "test_batch": b""}
        folder = put(tmp_path, damaged)
        server.body = packed(lambda tar: None, but=[VICTIM])
        monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(server.body).hexdigest())
        assert f"the archive does not hold the genuine {VICTIM})" in refused(cifar10.fetch, folder)
        assert contents(folder) == damaged

    def test_malformed_headers(self, tmp_path):
        """tarfile raises many kinds of exceptions; one comes out, and what is taken is genuine."""
        plain = io.BytesIO()
        with tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as tar:
            sparse(tar, f"{FOLDER}/{VICTIM}", tmp_path)
            renamed(tar, f"{FOLDER}/{VICTIM}", tmp_path)
            add(tar, "x" * 300)
            add(tar, f"{FOLDER}/batches.meta", GOOD["batches.meta"])
        rng, outcomes = random.Random(0), set()
        for _ in range(400):
            bad = bytearray(plain.getvalue())
            for _ in range(rng.randrange(1, 4)):
                bad[rng.randrange(len(bad) // 512) * 512 + rng.choice([*range(160), 345, 386, 482])] = rng.choice(
                    b"\xff\x800 9\0x"
                )
            for start in range(0, len(bad), 512):  # the checksums of headers, so that damage gets past them
                block = bad[start : start + 512]
                if block[257:262] == b"ustar":
                    block[148:156] = b" " * 8
                    bad[start + 148 : start + 156] = b"%06o\0 " % sum(block)
            path = tmp_path / "x.tar.gz"
            path.write_bytes(gzip.compress(bytes(bad), 0))
            try:
                files = cifar10.unpack(path, ["batches.meta"])
                assert files == {"batches.meta": GOOD["batches.meta"]}
                outcomes.add("taken")
            except Failure as error:
                outcomes.add(str(error))
        assert len(outcomes) > 5

    def test_a_server_that_talks_nonsense(self, tmp_path, server):
        server.garbage = b"SSH-2.0-OpenSSH_9.6\r\n"
        refused(cifar10.fetch, tmp_path)


def fetch_and_count(folder, barrier, written):
    real = official.write_file
    official.write_file = lambda path, data: (written.put(path.name), real(path, data))
    barrier.wait()
    cifar10.fetch(folder)


def test_two_processes_at_once_download_once(tmp_path, server):
    server.body, server.seconds = ARCHIVE, 0.2
    fork = multiprocessing.get_context("fork")
    barrier, written = fork.Barrier(2), fork.Queue()
    processes = [fork.Process(target=fetch_and_count, args=(tmp_path, barrier, written)) for _ in range(2)]
    for process in processes:
        process.start()
    names = [written.get(timeout=30) for _ in NAMES]
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(names) == sorted(NAMES)
    assert written.empty()
    assert server.downloads == 1
    assert contents(tmp_path) == GOOD


def test_an_archive_of_the_genuine_files(cifar10_dir, tmp_path, monkeypatch):
    """In the official one's form: a folder, the files, a readme."""
    monkeypatch.undo()
    (tmp_path / "readme.html").write_bytes(b"<html>")
    archive = tmp_path / CIFAR10.filename
    with tarfile.open(archive, "w:gz", compresslevel=0) as tar:
        tar.add(cifar10_dir / FOLDER, FOLDER)
        tar.add(tmp_path / "readme.html", f"{FOLDER}/readme.html")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    cifar10.fetch(tmp_path)
    assert contents(tmp_path) == {name: (cifar10_dir / FOLDER / name).read_bytes() for name in NAMES}
