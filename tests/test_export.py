"""Tests of the export chapter: which content of an export is kept."""

import contextlib
import io
import json
import sys
import tarfile
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from fake_daemon import OCI_INDEX, OCI_MANIFEST, Image, sha256, tar_of
from program import IN_MEMORY, MODULE

sys.path.insert(0, str(MODULE.parent))
from k3d_registry_dockerd import Digest, ExportStream, Store, Unpacking


def index(*manifests, note=""):
    """Return an index that lists some manifests by digest."""
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "annotations": {"note": note}, "manifests": [
        {"mediaType": OCI_MANIFEST, "digest": digest, "size": 1} for digest in manifests]}).encode()


class TestClosure(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(dir=IN_MEMORY)
        self.addCleanup(folder.cleanup)
        self.store = Store(Path(folder.name) / "store")
        self.image = Image()

    def unpack(self, *contents):
        """Unpack an export of these blobs. The last one is its target."""
        unpacking = Unpacking(self.store, Digest.of(contents[-1]))
        self.addCleanup(unpacking.discard)
        blobs = {f"blobs/{sha256(data).replace(':', '/')}": data for data in contents}
        unpacking.unpack(ExportStream(io.BytesIO(tar_of(blobs)), lambda count: None))
        return unpacking

    def closure(self, *contents):
        return {str(digest) for digest in self.unpack(*contents).closure(Digest.of(contents[-1]))}

    def test_platforms(self):
        other, whole = Image("other"), list(self.image.blobs.values())
        top = index(self.image.digest, other.digest)
        for what, contents, extra in (
                ("all", [*whole, *other.blobs.values()], other.blobs),
                ("one is missing", whole, ()),
                ("one is a manifest only", [*whole, other.manifest], ()),
                ("one lacks its layer", [*whole, other.manifest, other.config], ())):
            with self.subTest(what):
                self.assertEqual({sha256(top), *self.image.blobs, *extra}, self.closure(*contents, top))
        for what, contents, text in (
                ("none", [], "lacks the manifest"), ("manifests only", [self.image.manifest], "lacks 2 of 2 blobs"),
                ("the target itself", None, "lacks the manifest")):
            with self.subTest(what), self.assertRaisesRegex(LookupError, text):
                if contents is None:
                    self.unpack(top).closure(Digest.of(b"?"))
                self.closure(*contents or (), top)

    def test_nested_indexes_are_read_once(self):
        """Two indexes on each level, which list both of the level below: a million ways lead to the bottom."""
        contents, level = list(self.image.blobs.values()), [self.image.digest] * 2
        for number in range(20):
            pair = [index(*level, note=f"{number} {which}") for which in "ab"]
            contents += pair
            level = [sha256(data) for data in pair]
        unpacking = self.unpack(*contents)
        with mock.patch.object(unpacking, "_document", wraps=unpacking._document) as read:
            self.assertIn(Digest.parse(self.image.digest), unpacking.closure(Digest.of(contents[-1])))
        self.assertEqual(1 + 20 * 2 - 1, read.call_count)

    def test_errors_are_short(self):
        for what, contents in (
                ("manifests", [index(*(sha256(b"%d" % number) for number in range(5000)))]),
                ("blobs", [json.dumps({"layers": [{"digest": sha256(b"%d" % number)} for number in range(5000)]}
                                      ).encode()])):
            with self.subTest(what), self.assertRaises(LookupError) as caught:
                self.closure(*contents)
            self.assertLess(len(str(caught.exception)), 1000)

    def test_header_of_any_size_takes_little_memory(self):
        """A header that says it has 8 GB. The stream gives less than what is asked for."""
        class Endless:
            largest = 0

            def readinto(self, buffer):
                self.largest = max(self.largest, len(buffer))
                buffer[:] = header if len(buffer) == len(header) else bytes(len(buffer))
                return len(buffer)

        header = bytearray(tar_of({"x": b""})[:512])
        header[124:136], header[156:157], header[148:156] = b"77777777777\0", b"x", b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        endless = Endless()
        with contextlib.suppress(Exception):
            Unpacking(self.store, Digest.of(b"")).unpack(ExportStream(endless, self.stop))
        self.assertTrue(0 < endless.largest <= 1024 * 1024)

    def test_size_of_headers(self):
        """Python's tarfile takes hours for one with many digits, if it is not among the newest, and no thread runs."""
        for size, error in ((4096, None), (20_000, "a header is too large"), (5_000_000, "a header is too large")):
            with self.subTest(size):
                out = io.BytesIO()
                with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
                    member = tarfile.TarInfo("x")
                    member.pax_headers = {"comment": "9" * size}
                    archive.addfile(member)
                out.seek(0)
                stream = ExportStream(out, self.stop)
                unpacked = Unpacking(self.store, Digest.of(b""))
                if error is None:
                    unpacked.unpack(stream)
                else:
                    self.assertRaisesRegex(tarfile.ReadError, error, unpacked.unpack, stream)
                    self.assertIsNone(stream.complaint())

    @staticmethod
    def stop(count):
        if count > 50_000_000:
            raise ValueError("enough")


if __name__ == "__main__":
    unittest.main()
