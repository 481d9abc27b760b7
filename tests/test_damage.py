"""Damaged, unreadable and strange files in the store: the rest is served, the file is named, and a push mends it."""

import errno
import hashlib
import itertools
import json
import os
import stat
import subprocess
import tempfile
import time
import unittest
from pathlib import Path
from unittest import mock

import walk
from fake_daemon import FakeDaemon, Image
from program import IN_MEMORY, Program, takes_long
from test_hosted import HostedProgram, module

MANIFEST = "application/vnd.oci.image.manifest.v1+json"


def digest_of(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


def descriptor(data, media_type="application/octet-stream"):
    return {"mediaType": media_type, "digest": digest_of(data), "size": len(data)}


CONFIG, LAYER = b'{"os": "linux"}', b"a layer " * 1000
APP = json.dumps({"schemaVersion": 2, "config": descriptor(CONFIG), "layers": [descriptor(LAYER)]}).encode()
# It says nothing of its own type, so that is kept beside it.
ODD_TYPE, ODD = "application/vnd.example.odd+json", b'{"odd": true}'
REFERRER = json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, "config": descriptor(CONFIG), "layers": [],
                       "subject": descriptor(APP, MANIFEST)}).encode()


def push(program, repository, ask_first=True):
    """Push what this file is about, as a client does: blobs that are here are not sent, if it asks."""
    statuses = []
    for data in (CONFIG, LAYER):
        if ask_first and program.head(f"/v2/{repository}/blobs/{digest_of(data)}").status == 200:
            continue
        location = program.request("POST", f"/v2/{repository}/blobs/uploads/").headers["Location"]
        statuses.append(program.request("PUT", f"{location}?digest={digest_of(data)}", body=data).status)
    for data, target, media_type in ((APP, "1", MANIFEST), (ODD, "odd", ODD_TYPE),
                                     (REFERRER, digest_of(REFERRER), MANIFEST)):
        statuses.append(program.request("PUT", f"/v2/{repository}/manifests/{target}", {"Content-Type": media_type},
                                        data).status)
    return set(statuses)


def state(program, repository):
    """What a client sees: None for what is not there. Anything else that is not right fails."""
    def get(path, data, media_type=""):
        answer = program.get(f"/v2/{repository}/{path}")
        if answer.status == 404:
            return None
        assert answer.status == 200, (path, answer.status, answer.body)
        assert answer.body == data and answer.headers["Content-Type"].endswith(media_type), path
        return True

    referrers = program.get(f"/v2/{repository}/referrers/{digest_of(APP)}").json["manifests"]
    tags = program.get(f"/v2/{repository}/tags/list")
    return {
        "config": get(f"blobs/{digest_of(CONFIG)}", CONFIG), "layer": get(f"blobs/{digest_of(LAYER)}", LAYER),
        "app": get("manifests/1", APP, MANIFEST), "app by digest": get(f"manifests/{digest_of(APP)}", APP, MANIFEST),
        "odd": get("manifests/odd", ODD), "referrers": [each["digest"] for each in referrers] == [digest_of(REFERRER)],
        "tags": tags.status == 200 and tags.json["tags"] == ["1", "odd"]}


WHOLE = dict.fromkeys(("config", "layer", "app", "app by digest", "odd", "referrers", "tags"), True)


def hex_of(data):
    return digest_of(data).partition(":")[2]


# Kind of file -> its path in the store.
FILES = {
    "content": f"blobs/sha256/{hex_of(LAYER)}",
    "blob": f"repositories/a/app/_blobs/sha256/{hex_of(LAYER)}",
    "manifest": f"repositories/a/app/_manifests/sha256/{hex_of(APP)}",
    "media type": f"repositories/a/app/_types/sha256/{hex_of(ODD)}",
    "tag": "repositories/a/app/_tags/1",
    "referrer": f"repositories/a/app/_referrers/sha256/{hex_of(APP)}/{digest_of(REFERRER)}",
    "blobs": "repositories/a/app/_blobs/sha256",
    "manifests": "repositories/a/app/_manifests",
    "tags": "repositories/a/app/_tags",
    "types": "repositories/a/app/_types",
    "pool": "blobs",
}


def remove(path):
    subprocess.run(["rm", "-r", "--", str(path)], check=True)


def replace(make):
    def damage(path):
        remove(path)
        make(path)
    return damage


def overwrite(data):
    """Write into the very file, so that all of its links have other bytes."""
    def damage(path):
        if path.is_dir():
            return
        with open(path, "r+b") as file:
            size = os.fstat(file.fileno()).st_size
            file.truncate(0)
            file.write((data * size)[:size] if data else b"x" * (size // 2))
    return damage


DAMAGES = {
    "missing": remove,
    "cut short": overwrite(b""),
    "other bytes": overwrite(b"\xff"),
    "a file": replace(lambda path: path.write_bytes(b"")),
    "a folder": replace(Path.mkdir),
    "a pipe": replace(os.mkfifo),
    "a socket": replace(lambda path: os.mknod(path, stat.S_IFSOCK | 0o600)),
    "a loop": replace(lambda path: path.symlink_to(path.name)),
}


class DamageCase(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory(dir=IN_MEMORY)
        cls.addClassCleanup(folder.cleanup)
        cls.pristine = Path(folder.name) / "store"
        with HostedProgram(cls.pristine) as program:
            assert push(program, "a/app") == push(program, "b") == {201}
            assert state(program, "a/app") == state(program, "b") == WHOLE

    def copy(self):
        folder = tempfile.TemporaryDirectory(dir=IN_MEMORY)
        self.addCleanup(folder.cleanup)
        subprocess.run(["cp", "-a", str(self.pristine), folder.name], check=True)
        return Path(folder.name) / "store"

    def tidy_up(self, program, age=0.0):
        program.hosted.tidy_up(time.time() + age)
        program.hosted._store.tidy_up(lambda _: False, time.time() + age)


class TestDamage(DamageCase):
    @takes_long
    def test_every_kind_of_file(self):
        for kind, name in FILES.items():
            for what, damage in DAMAGES.items():
                for ask_first in (True, False) if kind in ("content", "blob", "manifest") else (True,):
                    with self.subTest(kind=kind, what=what, ask_first=ask_first):
                        self.check(name, damage, ask_first)

    def check(self, name, damage, ask_first):
        store = self.copy()
        damage(store / name)
        with HostedProgram(store) as program:
            before = state(program, "a/app")
            self.tidy_up(program)
            shared = {"layer", "app", "app by digest", "tags", "referrers"}  # the files of these are those of the other
            other = {key: value for key, value in state(program, "b").items() if key not in shared}
            self.assertEqual({"config", "odd"}, {key for key, value in other.items() if value})
            empty = (self.pristine / name).is_dir() and (store / name).is_dir()  # a folder, as it should be
            if before != WHOLE and (store / name).exists() and not empty:
                self.assertTrue(program.lines("is damaged"), program.log)
            self.assertEqual({201}, push(program, "a/app", ask_first))
            self.assertEqual(WHOLE, state(program, "a/app"))
            self.assertEqual(WHOLE, state(program, "b"))
            self.tidy_up(program, module.UPLOAD_AGE + 1)
            self.assertEqual(WHOLE, state(program, "a/app"))
            self.assertEqual([], program.lines("a bug in this program"))

    def test_wrong_bytes_are_healed_in_every_repository(self):
        """The file has the right size, and whoever pushes the blob again sends it to one repository only."""
        for first_seen in ("by the push", "by a reader"):
            with self.subTest(first_seen), HostedProgram(self.copy()) as program:
                self.assertEqual(WHOLE, state(program, "a/app"))  # it was right when it was last read
                with open(program.store / FILES["content"], "r+b") as file:
                    file.write(b"X")
                if first_seen == "by a reader":
                    self.assertIsNone(state(program, "b")["layer"])
                location = program.request("POST", "/v2/a/app/blobs/uploads/").headers["Location"]
                query = f"?digest={digest_of(LAYER)}"
                self.assertEqual(201, program.request("PUT", location + query, body=LAYER).status)
                self.assertEqual(WHOLE, state(program, "a/app"))
                self.assertEqual(WHOLE, state(program, "b"))
                self.assertEqual(1, len({path.stat().st_ino for path in program.store.rglob(hex_of(LAYER))}))

    def test_wrong_bytes_are_not_mounted(self):
        with HostedProgram(self.copy()) as program:
            with open(program.store / FILES["content"], "r+b") as file:
                file.write(b"X")
            self.assertEqual(202, program.request(
                "POST", f"/v2/c/blobs/uploads/?mount={digest_of(LAYER)}&from=b").status)

    def test_strange_names(self):
        """The program names what does not belong in its folders, or ignores it, and goes on."""
        names = (f"repositories/a/app/_manifests/sha256/{hex_of(APP)[:-1]}g", "repositories/a/app/_manifests/md5/abc",
                 "repositories/a/app/_blobs/sha256/README", "repositories/a/app/_tags/not a tag",
                 f"repositories/a/app/_referrers/sha256/{hex_of(APP)}/x", "repositories/a/app/_uploads/x/y",
                 "repositories/A B/_tags/1", "repositories/file", "blobs/sha256/lost", "blobs/file", "exports/sha256/x",
                 "fetched/x/y", "docker/sha256/z", "strange", "repositories/a/app/_strange/x",
                 "repositories/a/\udcff/_manifests/x", "repositories/a/app/_tags/\udcff")
        store = self.copy()
        for name in names:
            (store / name).parent.mkdir(parents=True, exist_ok=True)
            (store / name).write_text("strange")
        for name, target in (("loop", "loop"), ("above", "."), ("b/above", ".."), ("nowhere", "x"), ("root", "/")):
            (store / "repositories" / name).symlink_to(target)
        with HostedProgram(store) as program:
            for age in (0, module.UPLOAD_AGE + 1, 2 * module.UPLOAD_AGE):
                self.assertEqual(WHOLE, state(program, "a/app"))
                self.assertEqual(["a/app", "b"], program.get("/v2/_catalog").json["repositories"])
                self.tidy_up(program, age)
            # What belongs to that repository is not known, so nothing of it is freed.
            self.assertEqual({"a/app"}, {line.split()[1] for line in program.lines("not tidied up")})

    def test_the_folder_of_damaged_files_is_damaged(self):
        store = self.copy()
        (store / "damaged").write_text("not a folder")
        DAMAGES["a folder"](store / FILES["tag"])
        with HostedProgram(store) as program:
            self.assertIsNone(state(program, "a/app")["app"])
            self.assertEqual({201}, push(program, "a/app"))
            self.assertEqual(WHOLE, state(program, "a/app"))


# What may be wrong with a file that is there.
UNREADABLE = (errno.EIO, errno.EMFILE, errno.EACCES, errno.ENOMEM, errno.ESTALE)


class TestUnreadable(DamageCase):
    """What could not be read is never taken for absent: nothing is deleted, and no client is told to push it again."""

    def fail(self, number, below):
        """Let the system refuse to open what is below a path."""
        error = OSError(number, os.strerror(number))
        real_open, real_scan = os.open, os.scandir

        def refused(real):
            def call(path, *arguments, **more):
                if str(path).startswith(str(below)):
                    raise error
                return real(path, *arguments, **more)
            return call

        stack = mock.patch.multiple(os, open=refused(real_open), scandir=refused(real_scan))
        stack.start()
        self.addCleanup(stack.stop)
        return stack

    def test_requests(self):
        paths = {"content": f"blobs/{digest_of(LAYER)}", "manifest": f"manifests/{digest_of(APP)}",
                 "tag": "manifests/1", "media type": "manifests/odd", "tags": "tags/list",
                 "referrer": f"referrers/{digest_of(APP)}"}
        for number in UNREADABLE[:2]:
            for kind, path in paths.items():
                if kind == "referrer":  # an empty file, whose name is all that counts
                    below = (self.pristine / FILES[kind]).parent.relative_to(self.pristine)
                else:
                    below = FILES[kind] if kind != "content" else FILES["blob"]
                for method in ("GET", "HEAD"):
                    with self.subTest(errno.errorcode[number], kind=kind, method=method), \
                            HostedProgram(self.copy()) as program:
                        stack = self.fail(number, program.store / below)
                        self.assertEqual(500, program.request(method, f"/v2/a/app/{path}").status)
                        stack.stop()
                        self.assertEqual(WHOLE, state(program, "a/app"))
                        self.assertFalse((program.store / "damaged").exists())

    def test_nothing_is_deleted(self):
        store = self.copy()  # which no case changes
        before = self.files(store)
        for below in ("", "blobs", "repositories", "repositories/a", *FILES.values()):
            with self.subTest(below=below), HostedProgram(store) as program:
                for number in UNREADABLE:
                    with self.subTest(errno.errorcode[number]):
                        stack = self.fail(number, store / below)
                        for age in (module.UPLOAD_AGE, 10 * module.FETCHED_AGE):
                            try:
                                self.tidy_up(program, age)
                            except module.RegistryError as e:
                                self.assertEqual("STORE_FAILED", e.code)
                        stack.stop()
                        self.assertEqual(before, self.files(store))
                self.assertEqual(WHOLE, state(program, "a/app"))

    @staticmethod
    def files(store):
        return {path for path in store.rglob("*") if path.is_file()}


class TestCopies(unittest.TestCase):
    """Damage to what was exported from Docker: it is exported again."""

    @takes_long
    def test_damaged_copies(self):
        image = Image("exported")
        with FakeDaemon("classic") as daemon:
            daemon.add("app:1", image)
            folder = tempfile.TemporaryDirectory(dir=IN_MEMORY)
            self.addCleanup(folder.cleanup)
            pristine = Path(folder.name) / "store"
            with Program(daemon.host, store=pristine) as program:
                self.fetch(program)
            for pattern, what in itertools.chain(
                    itertools.product(("exports/sha256/*", "docker/sha256/*", "blobs/sha256/*"), DAMAGES),
                    itertools.product(("exports", "docker", "blobs"), ("missing", "a file", "a loop"))):
                with self.subTest(pattern, what=what), tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
                    subprocess.run(["cp", "-a", str(pristine), folder], check=True)
                    self.check(daemon, Path(folder) / "store", pattern, DAMAGES[what])

    def check(self, daemon, store, pattern, damage):
        for path in list(store.glob(pattern)):
            damage(path)
        with Program(daemon.host, store=store) as program:
            self.fetch(program)
            self.assertEqual([], program.lines("a bug in this program"))

    def fetch(self, program):
        """Pull as a node does, again if content turns out to be damaged."""
        for attempt in (1, 2, 3):
            manifest = program.get("/v2/library/app/manifests/1?ns=docker.io")
            self.assertEqual(200, manifest.status, manifest.body)
            document = manifest.json
            blobs = [program.get(f"/v2/library/app/blobs/{entry['digest']}?ns=docker.io")
                     for entry in (document["config"], *document["layers"])]
            if all(blob.status == 200 for blob in blobs):
                break
            self.assertLess(attempt, 3, [blob.status for blob in blobs])
        for entry, blob in zip((document["config"], *document["layers"]), blobs, strict=True):
            self.assertEqual(entry["digest"], digest_of(blob.body))


class TestArriving(unittest.TestCase):
    def test_content_that_arrives_while_it_is_looked_for(self):
        """It is absent to whoever looked too early. It is not damaged, and stays."""
        with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
            store = module.Store(Path(folder))
            with module.BlobWriter(store) as writer:
                writer.write(b"layer")
                digest = writer.keep(store.docker)
            for owner in (store.blobs, store.docker):
                with mock.patch.object(module.Identity, "of", side_effect=FileNotFoundError), self.assertNoLogs():
                    self.assertIsNone(owner.find(digest))
                self.assertIsNotNone(owner.find(digest))

    def test_good_content_that_replaces_damage_while_that_is_removed(self):
        """It stays: what was damaged is no longer there."""
        with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
            store = module.Store(Path(folder))
            digest = module.keep_content(store, b"layer", store.docker)
            store.docker.path(digest).write_bytes(b"LAYER")
            os.utime(store.docker.path(digest), (1, 1))
            real = store.disk.name_damaged

            def replace(*arguments):
                with mock.patch.object(store.disk, "name_damaged", real):
                    module.keep_content(store, b"layer", store.docker)

            with mock.patch.object(store.disk, "name_damaged", replace), self.assertLogs("k3d-registry-dockerd"):
                self.assertIsNone(store.docker.find(digest))
            self.assertEqual(b"layer", store.docker.path(digest).read_bytes())


class TestWalk(DamageCase):
    def test_walk_after_repair(self):
        """The real program on a mended store, without Docker: everything is there."""
        store = self.copy()
        for name in (FILES["content"], FILES["manifest"]):
            overwrite(b"\xff")(store / name)
        with Program("unix:///nowhere", store=store) as program:
            self.assertEqual({201}, push(program, "a/app"))
            self.assertEqual(([], []), tuple(walk.everything_below(program, "a/app", "1")))


if __name__ == "__main__":
    unittest.main()
