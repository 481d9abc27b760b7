"""Layers of the classic store, read from Docker's data folder: from folders made by the test, and on real engines."""

import base64
import contextlib
import errno
import gzip
import http.client
import io
import json
import os
import resource
import shutil
import sys
import tarfile
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import lab
from program import IN_MEMORY, MODULE, Program
from test_engines import MIB, EngineCase, sha256

sys.path.insert(0, str(MODULE.parent))
import k3d_registry_dockerd as module
from k3d_registry_dockerd import (
    ContentFolder,
    Deadline,
    Digest,
    EngineImage,
    Layer,
    LayerDirectory,
    RegistryError,
    make_manifest,
    read_blob,
)


def tar_with(*members, **options):
    """Return a tar (bytes) of members (name, content, attributes of TarInfo)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", **options) as archive:
        for name, content, attributes in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for key, value in attributes.items():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def strange_layers():
    """Return layers with everything that a layer may contain."""
    data = os.urandom(300_000)
    first = tar_with(
        ("dir", b"", {"type": tarfile.DIRTYPE, "mode": 0o755}),
        ("dir/small", b"small", {}), ("dir/empty", b"", {}), ("dir/large", data, {}), ("dir/block", b"x" * 512, {}),
        ("dir/hard", b"", {"type": tarfile.LNKTYPE, "linkname": "dir/large"}),
        ("dir/soft", b"", {"type": tarfile.SYMTYPE, "linkname": "../../etc/passwd"}),
        ("dir/pipe", b"", {"type": tarfile.FIFOTYPE}),
        ("dir/null", b"", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3}),
        ("dir/" + "n" * 200, b"a name that needs a header of its own", {}),
        ("dir/" + "deep/" * 60 + "file", b"deep", {}),
        ("dir/\u00fcml\u00e4ut \u6f22", b"unicode", {}), ("dir/with\nnewline", b"newline", {}),
        ("dir/capable", b"xattr", {"pax_headers": {"SCHILY.xattr.user.note": "hello"}}),
        ("./dir/dotted", b"dotted", {}), ("dir//double", b"double", {}), format=tarfile.PAX_FORMAT)
    second = tar_with(
        ("dir/.wh.small", b"", {}), ("dir/deep/.wh..wh..opq", b"", {}), ("dir/large", data[::-1], {"mtime": 5}),
        ("dir/bytes\udcff\udcfe", b"no UTF-8", {}), ("long/" + "g" * 250, b"GNU long name", {}),
        format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape")
    return first, second, tar_with() + bytes(100_000)  # the last one has no members, only padding


def sparse_tar():
    """Return a tar with a sparse file, in GNU tar's format."""
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        with open(f"{folder}/sparse", "wb") as file:
            file.write(b"start")
            file.seek(2_000_000)
            file.write(b"end")
        return lab.run("tar", "-C", folder, "--sparse", "--format=pax", "-c", "sparse", text=False).stdout


class FolderCase(unittest.TestCase):
    """A data folder of Docker, made by the test."""

    CACHE = "0123456789abcdef"

    def setUp(self):
        folder = tempfile.TemporaryDirectory(dir=IN_MEMORY)
        self.addCleanup(folder.cleanup)
        self.root = Path(folder.name) / "docker"
        self.diff = self.root / "overlay2" / self.CACHE / "diff"
        self.diff.mkdir(parents=True)
        self.layers = LayerDirectory(self.root)
        self.tar = b""

    def file(self, path, content):
        (self.diff / path).parent.mkdir(parents=True, exist_ok=True)
        (self.diff / path).write_bytes(content)

    def note(self, *entries, cache=CACHE):
        """Write a layer's metadata. Each entry is either bytes of the tar, or (name, content)."""
        lines, self.tar = [], b""
        for entry in entries:
            if isinstance(entry, bytes):
                lines.append({"type": 2, "payload": base64.b64encode(entry).decode()})
                self.tar += entry
            else:
                name, content = entry
                named = {"name": name} if isinstance(name, str) else {"name_raw": base64.b64encode(name).decode()}
                lines.append({"type": 1, **named, "size": len(content), "payload": "AAAAAAAAAAA="})
                self.tar += content
        self.write("\n".join(map(json.dumps, lines)).encode(), cache)

    def write(self, split, cache=CACHE):
        digest = Digest.of(self.tar)
        folder = self.root / "image/overlay2/layerdb/sha256" / digest.hex
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (("diff", str(digest)), ("cache-id", cache)):
            (folder / name).write_text(text)
        (folder / "tar-split.json.gz").write_bytes(split if split[:2] == b"\x1f\x8b" else gzip.compress(split))

    def blob(self):
        return self.layers.find(Digest.of(self.tar))

    def read(self, start=0, length=None):
        blob = self.blob()
        with contextlib.closing(blob.open(start, blob.size - start if length is None else length, Deadline())) as body:
            return b"".join(body)


class TestFolder(FolderCase):
    def test_ranges_of_a_layer(self):
        small, large = b"small", os.urandom(Layer.SENDFILE + 1000)
        self.file("a/small", small)
        self.file("a/b/large", large)
        self.file("last", b"")
        self.note(b"header 1", ("a/small", small), b"padding", b"", (b"a/b/large", large), b"end" * 1000)
        self.assertEqual(self.tar, self.read())
        for start in (0, 1, 8, 10, 13, 19, 20, 25, 100_000, len(self.tar) - 3001, len(self.tar) - 1):
            for length in (0, 1, 5, 1000, len(large)):
                length = min(length, len(self.tar) - start)
                self.assertEqual(self.tar[start:start + length], self.read(start, length), (start, length))

    def test_unknown_layer(self):
        self.assertIsNone(self.layers.find(Digest.of(b"nothing")))
        self.note(b"tar")
        self.assertIsNone(self.layers.find(Digest.of(b"nothing")))
        self.assertEqual(b"tar", self.read(), "a layer that is added later must be found")

    def assert_unreadable(self, reason):
        with self.assertLogs("k3d-registry-dockerd") as logs:
            self.assertIsNone(self.blob())
        self.assertIn(reason, logs.output[0])
        self.assertIsNone(self.blob(), "it must not be tried again")
        image = EngineImage(Digest.of(b"config"), 0, (str(Digest.of(self.tar)),))
        with self.assertRaises(RegistryError):
            self.layers.manifest(image)

    def test_missing_and_changed_files(self):
        def link(path, target):
            path.symlink_to(target)

        def change(path):
            (path.parent.parent / "outside").write_bytes(b"secret")

        for what, name, spoil in (
                ("gone", "file", lambda path: None),
                ("shorter", "file", lambda path: path.write_bytes(b"secre")),
                ("longer", "file", lambda path: path.write_bytes(b"secrets")),
                ("a folder", "file", Path.mkdir),
                ("a pipe", "file", os.mkfifo),
                ("a link to a file outside", "file", lambda path: link(path, self.root / "outside")),
                ("a link to a folder outside", "link/outside", lambda path: link(self.diff / "link", self.root)),
                ("outside", "../../../outside", lambda path: None),
                ("outside, absolute", str(self.root / "outside"), lambda path: None),
                ("no name", ".", lambda path: None),
                ("nul", "a\0b", lambda path: None)):
            with self.subTest(what):
                FolderCase.setUp(self)
                (self.root / "outside").write_bytes(b"secret")
                spoil(self.diff / "file")
                self.note(b"header", (name, b"secret"))
                self.assert_unreadable("cannot be read")

    def test_file_changes_during_a_read(self):
        self.file("one", b"1" * 300_000)
        self.file("two", b"2" * 300_000)
        self.note(b"header", ("one", b"1" * 300_000), ("two", b"2" * 300_000))
        parts = self.blob().open(0, len(self.tar), Deadline()).parts
        next(parts)
        self.file("two", b"2" * 299_999)
        with self.assertLogs("k3d-registry-dockerd"), self.assertRaisesRegex(RegistryError, "has changed"):
            list(parts)
        self.assertIsNone(self.blob())

    def test_file_changed_after_the_layer_was_made(self):
        """The file has the same size, but a later time of change."""
        self.file("file", b"one")
        self.note(("file", b"one"))
        slack, Layer.SLACK = Layer.SLACK, -1
        self.addCleanup(setattr, Layer, "SLACK", slack)
        self.assert_unreadable("has changed")

    def test_malformed_metadata(self):
        good = gzip.compress(b'{"type": 2, "payload": "AAAA"}\n')
        for split in (b"no gzip", good[:20], good[:-4] + b"abcd", b"\x1f\x8b\x08\x00garbage", b"{", b"[]", b"1", b'"x"',
                      b"{}", b'{"type": 2}', b'{"type": 2, "payload": 5}', b'{"type": 1, "size": 5}',
                      b'{"type": 1, "size": "5", "name": "x"}', b'{"type": 1, "size": 5, "name": 7}', b"\xff\xfe",
                      b'{"type": 1, "size": 5, "name": "\\ud800"}', b'{"type": 1, "size": -5, "name": "x"}',
                      b'{"type": 1, "size": 5, "name_raw": "AAA"}', b'{"type":2,"payload":' + b"[" * 100_000,
                      b'{"type": 2, "payload": "' + b"A" * (17 * MIB) + b'"}', b'{"type": 2, "payload": "A"}',
                      b"", b"empty", b'{"type": 2, "payload": ""}'):
            with self.subTest(split[:40]):
                FolderCase.setUp(self)
                self.tar = b"whatever"
                if split in (b"no gzip", b"empty"):
                    self.write(b"")
                    (path,) = self.root.glob("image/overlay2/layerdb/sha256/*/tar-split.json.gz")
                    path.write_bytes(split if split != b"empty" else b"")
                else:
                    self.write(split)
                self.assert_unreadable("cannot be read")

    def test_size_is_that_of_the_decoded_pieces(self):
        for text, size in (("aGVsbG8=", 5), ("", 0), ("====", 0), ("aGVsbG8=8=8=8=", 5), ("aGVs bG8=", 5),
                           ("aGVsbG8" + "=" * 9, 5), ("aGVsaGVs", 6)):
            with self.subTest(text):
                FolderCase.setUp(self)
                self.tar = text.encode()
                self.write(b"".join(json.dumps({"type": 2, "payload": piece}).encode() + b"\n"
                                    for piece in (text, "aGVsbG8=")))
                self.assertEqual((size + 5,) * 2, (self.blob().size, len(self.read())))

    def test_malformed_cache_id(self):
        for cache in ("..", "../../x", "", "a/b", "a\0b"):
            self.note(b"tar", cache=cache)
            self.assertIsNone(self.blob())

    def test_damaged_folder(self):
        """What cannot be read is an error. What is damaged or has just been removed is absent, and hides no others."""
        def replace(name, make):
            def damage(folder):
                (folder / name).unlink()
                make(folder / name)

            return damage

        for what, damage, code in (
                ("a name that is not text", replace("diff", lambda path: path.write_bytes(b"\xff")), None),
                ("no name", replace("diff", lambda path: None), None),
                ("a name that vanishes", replace("diff", lambda path: path.symlink_to("nowhere")), None),
                ("no metadata", replace("tar-split.json.gz", lambda path: None), None),
                ("no cache", replace("cache-id", lambda path: None), None),
                ("a cache that is not text", replace("cache-id", lambda path: path.write_bytes(b"\xff")), None),
                *((f"{what} for {name}", replace(name, make), None)
                  for name in ("diff", "cache-id", "tar-split.json.gz") for what, make in (
                      ("a folder", Path.mkdir), ("a pipe", os.mkfifo),
                      ("a loop", lambda path: path.symlink_to(path.name)),
                      ("no end", lambda path: path.symlink_to("/dev/zero")))),
                ("a cache that cannot be read", lambda folder: self.fail_to_open(folder / "cache-id"), "STORE_FAILED"),
                ("a name that cannot be read", lambda folder: self.fail_to_open(folder / "diff"), "STORE_FAILED")):
            with self.subTest(what):
                FolderCase.setUp(self)
                self.note(b"other")
                other = Digest.of(self.tar)
                self.note(b"tar")
                (self.root / "image/overlay2/imagedb").mkdir()
                damage(self.root / "image/overlay2/layerdb/sha256" / Digest.of(self.tar).hex)
                if code:
                    with self.assertRaises(RegistryError) as caught:
                        self.blob()
                    self.assertEqual(code, caught.exception.code)
                else:
                    self.assertIsNone(self.blob())
                    self.assertEqual(5, self.layers.find(other).size)

    def fail_to_open(self, path):
        real = os.open

        def fail(name, *arguments, **more):
            if str(name) == str(path):
                raise OSError(errno.EIO, "an error of the disk")
            return real(name, *arguments, **more)

        patch = mock.patch.object(os, "open", fail)
        patch.start()
        self.addCleanup(patch.stop)

    def test_damaged_configs(self):
        """They are absent, so that an image is exported."""
        config = b'{"a": 1}'
        path = self.root / "image/overlay2/imagedb/content/sha256" / Digest.of(config).hex
        path.parent.mkdir(parents=True)
        for what, make in (("right", lambda: path.write_bytes(config)), ("empty", lambda: path.write_bytes(b"")),
                           ("other bytes", lambda: path.write_bytes(b"xxxxxxxx")), ("a folder", path.mkdir),
                           ("a pipe", lambda: os.mkfifo(path)), ("no end", lambda: path.symlink_to("/dev/zero"))):
            with self.subTest(what):
                make()
                found = self.layers.find(Digest.of(config))
                self.assertEqual(config if what == "right" else None, found and read_blob(found, 100))
                path.rmdir() if path.is_dir() else path.unlink()

    def test_content_of_containerd(self):
        """What is in the place of content counts as absent, as the content service has that too."""
        digest, path = Digest.of(b"content"), self.root / "sha256" / Digest.of(b"content").hex
        path.parent.mkdir()
        for what, make in (("right", lambda: path.write_bytes(b"content")), ("a folder", path.mkdir),
                           ("a pipe", lambda: os.mkfifo(path)), ("no end", lambda: path.symlink_to("/dev/zero"))):
            with self.subTest(what):
                make()
                found = ContentFolder(self.root).find(digest)
                self.assertEqual(b"content" if what == "right" else None, found and read_blob(found, 100))
                path.rmdir() if path.is_dir() else path.unlink()

    def test_manifest(self):
        config = b'{"a": 1}'
        path = self.root / "image/overlay2/imagedb/content/sha256" / Digest.of(config).hex
        path.parent.mkdir(parents=True)
        self.note(b"tar")
        image = EngineImage(Digest.of(config), 0, (str(Digest.of(b"tar")),) * 2)
        with self.assertRaises(RegistryError):
            self.layers.manifest(image)
        path.write_bytes(config)
        digest = self.layers.manifest(image)
        blob = self.layers.find(digest)
        with contextlib.closing(blob.open(0, blob.size, Deadline())) as body:
            self.assertEqual(make_manifest((Digest.of(config), 8), *[(Digest.of(b"tar"), 3)] * 2), b"".join(body))

    def test_open_files(self):
        """No file stays open after a layer was read completely, closed early, or found broken."""
        self.file("a/one", b"1" * 300_000)
        self.file("b/two", b"2")
        before = len(list(Path("/proc/self/fd").iterdir()))
        self.note(("a/one", b"1" * 300_000), ("b/two", b"2"), ("a/one", b"1" * 300_000))
        self.read()
        body = self.blob().open(0, len(self.tar), Deadline())
        next(iter(body))
        body.close()
        self.note(("a/one", b"1" * 300_000), ("nowhere/two", b"2"))
        with self.assertLogs("k3d-registry-dockerd"):
            self.assertIsNone(self.blob())
        self.assertEqual(before, len(list(Path("/proc/self/fd").iterdir())))

    def test_what_docker_has_removed_is_forgotten(self):
        self.note(b"header")
        digest, removed = Digest.of(self.tar), self.blob()
        self.note(b"another header")
        self.assertIsNot(removed, self.blob())
        self.assertIs(removed, self.layers.find(digest), "measured again")
        folder = self.root / "image/overlay2/layerdb/sha256"
        shutil.rmtree(folder / digest.hex)
        os.utime(folder, (1, 1))
        self.assertIsNone(self.layers.find(digest))
        self.assertEqual(1, len(self.layers._measured))

    def test_layer_is_measured_while_others_are_forgotten(self):
        """It is used, though it is not remembered, and not taken for one that cannot be read."""
        layers = self.layers

        class Replaced(dict):
            def __setitem__(self, key, value):
                layers._measured = {}  # by another thread, which has copied this one before
                super().__setitem__(key, value)

        self.note(b"header")
        layers._folders()
        layers._measured = Replaced()
        self.assertIsNotNone(self.blob())

    def test_manifests_that_were_made(self):
        """Those that were asked for last can be read by digest: there is one for each image that was ever built."""
        configs = self.root / "image/overlay2/imagedb/content/sha256"
        configs.mkdir(parents=True)
        images = []
        for number in range(4):
            image_id = Digest.of(b"%d" % number)
            (configs / image_id.hex).write_bytes(b"%d" % number)
            images.append(EngineImage(image_id, 0, ()))
        with mock.patch.object(module, "MEMORY_LIMIT", 3):
            layers = LayerDirectory(self.root)
        made = [layers.manifest(image) for image in (*images[:3], images[0], images[3])]
        self.assertEqual([True, False, True, True, True], [layers.find(digest) is not None for digest in made])

    def test_no_descriptor_left(self):
        """That is an error for now: nothing is absent or damaged because of it."""
        self.file("file", b"content")
        self.note(b"header", ("file", b"content"))
        digest, limits = Digest.of(self.tar), resource.getrlimit(resource.RLIMIT_NOFILE)
        fresh, indexed, measured = LayerDirectory(self.root), LayerDirectory(self.root), self.blob()
        indexed._folders()
        for what, act in (("not read yet", lambda: fresh.find(digest)),
                          ("not measured yet", lambda: indexed.find(digest)),
                          ("measured", lambda: b"".join(measured.open(0, measured.size, Deadline())))):
            with self.subTest(what):
                free = os.dup(0)
                os.close(free)
                resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
                try:
                    with self.assertRaises(RegistryError) as caught:
                        act()
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
                self.assertEqual("STORE_FAILED", caught.exception.code)
        with mock.patch.object(gzip, "open", side_effect=OSError(errno.EMFILE, "no descriptor left")), \
                self.assertRaises(RegistryError) as caught:
            indexed.find(digest)
        self.assertEqual("STORE_FAILED", caught.exception.code)
        for layers in (fresh, indexed, self.layers):
            self.assertEqual(len(self.tar), layers.find(digest).size)
        self.assertEqual(self.tar, self.read())


# ---- real engines

# With this, files count as changed from the second on in which their layer was made.
STRICT = """
import os, sys
sys.path.insert(0, os.path.dirname(sys.argv.pop(1)))
import k3d_registry_dockerd as module
module.Layer.SLACK = 0
sys.exit(module.main(sys.argv[1:]))
"""


class MountedCase(EngineCase):
    def setUp(self):
        lab.require()
        super().setUp()

    def root(self, engine=None):
        return lab.SHARE / (engine or self.engine).name / "data"

    def mounted(self, **options):
        return self.program("-docker-root", str(self.root()), **options)

    def blob_path(self, digest):
        return f"/v2/library/{self.name}/blobs/{digest}?ns=docker.io"

    def layers_of(self, program, tag="1"):
        """Return the digests of an image's layers, by its manifest."""
        answer = program.get(self.manifest_path(tag))
        self.assertEqual(200, answer.status, answer.body)
        return [layer["digest"] for layer in answer.json["layers"]]


class Folder:
    """Tests for the data folders of all engines."""

    def assert_not_used(self, root, reason):
        program = self.program("-docker-root", str(root))
        self.assertIn(reason, program.wait_for_line("WARNING"))
        self.assertFalse(program.lines("directory"))
        self.build()
        self.assertEqual(200, program.get(self.manifest_path("1")).status)

    def test_folder_of_another_engine(self):
        others = {"containerd": "containerd-26", "containerd-26": "containerd", "classic": "classic-20",
                  "classic-20": "classic"}
        self.assert_not_used(self.root(lab.ENGINES[others[self.engine.name]]), "it is not used")
        with tempfile.TemporaryDirectory(dir=IN_MEMORY) as empty:
            self.assert_not_used(empty, "can be read in")
        self.assert_not_used("/no/such/folder", "can be read in")


class ClassicFolder(Folder):
    def test_same_manifest_as_from_export(self):
        self.build("1", {"one": os.urandom(500_000), "two": b"2"})
        mounted, plain = self.mounted(), self.program()
        path = self.manifest_path("1")
        self.assertEqual(plain.get(path).body, mounted.get(path).body)
        reference = f"docker.io/library/{self.name}:1"
        self.pull(mounted, reference)
        self.assertEqual(sha256(plain.get(path).body), lab.NODE.digest(reference))
        self.assertEqual([], mounted.jobs("export"))
        self.assertFalse(mounted.store.exists())

    def test_strange_layers(self):
        layers = strange_layers()
        origin = lab.ORIGINS["open"]
        lab.push_platforms(origin, f"lab/{self.name}", "1", ["amd64"], layers)
        reference = f"{origin.host}/lab/{self.name}:1"
        self.images.append(reference)
        self.engine.docker("pull", "-q", reference)
        program = self.mounted()
        self.pull(program, reference)
        for layer in layers:
            path = self.blob_path(sha256(layer))
            self.assertEqual(str(len(layer)), program.head(path).headers["Content-Length"])
            self.assertEqual(sha256(layer), sha256(program.get(path).body))
            for start, end in ((0, 0), (511, 512), (513, 5000), (len(layer) - 700, len(layer) - 1)):
                part = program.get(path, Range=f"bytes={start}-{end}")
                self.assertEqual((206, layer[start:end + 1]), (part.status, part.body))
        self.assertEqual([], program.jobs("export"))

    def test_sparse_files(self):
        """Docker itself cannot export such a layer any more. The result is an error, not other bytes."""
        origin = lab.ORIGINS["open"]
        lab.push_platforms(origin, f"lab/{self.name}", "1", ["amd64"], [sparse_tar()])
        reference = f"{origin.host}/lab/{self.name}:1"
        self.images.append(reference)
        self.engine.docker("pull", "-q", reference)
        program = self.mounted()
        answer = program.get(f"/v2/lab/{self.name}/manifests/1?ns={origin.host}")
        self.assertEqual((502, "ENGINE_FAILED"), (answer.status, answer.code))
        program.wait_for_line("sparse files are not supported; its images will be exported")

    def test_twenty_thousand_files(self):
        layer = lab.tar_of({f"d{i % 100}/file{i}": b"%d" % i for i in range(20_000)})
        self.engine.docker("import", "-", f"{self.name}:1", input=layer, text=False)
        self.images.append(f"{self.name}:1")
        program = self.mounted()
        (layer,) = self.layers_of(program)
        self.assertEqual(layer, sha256(program.get(self.blob_path(layer)).body))
        self.assertEqual([], program.jobs("export"))
        self.assertLess(program.peak_memory(), 64 * MIB)

    def test_large_layer(self):
        self.build("1", {"data": os.urandom(MIB) * 150})
        program = self.mounted()
        *_, layer = self.layers_of(program)
        self.assertEqual(layer, sha256(program.get(self.blob_path(layer)).body))
        self.assertLess(program.peak_memory(), 64 * MIB)

    def test_content_after_restart(self):
        self.build("1", {"data": os.urandom(10_000)})
        before = self.mounted()
        *_, layer = self.layers_of(before)
        manifest = before.get(self.manifest_path("1")).body
        program = self.mounted()
        self.assertEqual(layer, sha256(program.get(self.blob_path(layer)).body))
        self.assertEqual(manifest, program.get(self.manifest_path(sha256(manifest))).body)

    def touch(self, content):
        """Touch the file with this content, in every layer of Docker that has it."""
        for path in self.root().glob("overlay2/*/diff/touched"):
            if path.read_bytes() == content:
                os.utime(path)

    def test_changed_file_leads_to_export(self):
        """A touched file may have changed: the connection is closed, and the next request gets the exported layer."""
        content = os.urandom(3_000_000)
        self.build("1", {"touched": content, "after": b"after"})
        program = self.mounted(command=[sys.executable, "-c", STRICT, str(MODULE)])
        *_, layer, _ = self.layers_of(program)
        manifest = program.get(self.manifest_path("1"))
        self.assertEqual(layer, sha256(program.get(self.blob_path(layer)).body))
        self.touch(content)
        with self.assertRaises((http.client.IncompleteRead, ConnectionError)):
            program.get(self.blob_path(layer))
        self.assertIn("has changed", program.wait_for_line("closed early"))
        self.assertEqual(layer, sha256(program.get(self.blob_path(layer)).body))
        self.assertEqual(1, len(program.jobs("export")))
        self.assertEqual(manifest.body, program.get(self.manifest_path("1")).body)

    def test_removed_image(self):
        self.build("1", {"data": os.urandom(10_000)})
        program = self.mounted()
        *_, layer = self.layers_of(program)
        self.engine.remove(f"{self.name}:1")
        self.engine.docker("builder", "prune", "-af")
        self.assertEqual(404, program.get(self.manifest_path("1", ns=program.address)).status)
        self.assertEqual(404, program.get(self.blob_path(layer)).status)


class TestClassicFolder(ClassicFolder, MountedCase):
    engine = lab.ENGINES["classic"]


class TestClassic20Folder(ClassicFolder, MountedCase):
    engine = lab.ENGINES["classic-20"]


class ContainerdFolder(Folder):
    def test_content_directory(self):
        self.build("1", {"one": os.urandom(500_000), "two": b"2"})
        program = self.mounted()
        program.wait_for_line("content directory")
        reference = f"docker.io/library/{self.name}:1"
        self.pull(program, reference)
        self.assertEqual(self.engine.inspect(f"{self.name}:1")["Id"], lab.NODE.digest(reference))

    def test_folder_without_content_service(self):
        """Requests to the content service are refused, and the folder is enough."""
        self.build("1", {"one": os.urandom(500_000)})
        with lab.filtered(self.engine, b"/grpc HTTP/1.1") as socket, \
                Program(f"unix://{socket}", "-docker-root", str(self.root())) as program:
            self.pull(program, f"docker.io/library/{self.name}:1")
            self.assertEqual([], program.jobs("export"))


class TestContainerdFolder(ContainerdFolder, MountedCase):
    engine = lab.ENGINES["containerd"]


class TestContainerd26Folder(ContainerdFolder, MountedCase):
    engine = lab.ENGINES["containerd-26"]


if __name__ == "__main__":
    unittest.main()
