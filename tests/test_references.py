"""Tests of the chapters vocabulary, references and manifests: valid names, and the form of errors."""

import io
import json
import logging
import sys
import unittest

from program import MODULE

sys.path.insert(0, str(MODULE.parent))
import k3d_registry_dockerd as module
from k3d_registry_dockerd import Digest, Reference, RegistryError

HEX = "0123456789abcdef" * 4


class TestVocabulary(unittest.TestCase):
    def test_human_readable_numbers(self):
        for count, expected in ((0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_400, "999.4 kB"),
                                (999_500, "1.0 MB"), (27_100_000, "27.1 MB"), (5e12, "5.0 TB"), (5e15, "5000.0 TB")):
            with self.subTest(count):
                self.assertEqual(expected, module.human_bytes(count))
        for seconds, expected in ((0, "0.0 ms"), (0.0042, "4.2 ms"), (0.25, "250 ms"), (1, "1.0 s"), (90, "90.0 s"),
                                  (150, "2.5 min"), (12_600, "3.5 h"), (180_000, "2.1 days")):
            with self.subTest(seconds):
                self.assertEqual(expected, module.human_seconds(seconds))

    def test_printable(self):
        self.assertEqual(r"a\nb\x1b[0m", module.printable("a\nb\x1b[0m"))
        self.assertEqual(1001, len(module.printable("x" * 5000)))
        self.assertEqual(r"a 'name' and a \ and é", module.printable(module.printable(r"a 'name' and a \ and é")))

    def test_log_has_one_line_for_each_message(self):
        """Whatever text a message holds, and an exception: none of it can be taken for another message."""
        out = io.StringIO()
        handler = logging.StreamHandler(out)
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        module.log.addHandler(handler)
        self.addCleanup(module.log.removeHandler, handler)
        for forged in ("\nERROR forged", "\r\x1b[2KERROR forged", "\u2028ERROR forged", "\x85ERROR forged", "100 %s"):
            with self.subTest(forged):
                out.seek(0)
                out.truncate()
                module.log.error("failed: %s", forged)
                self.assertEqual(1, len(out.getvalue().splitlines()))
                self.assertTrue(out.getvalue()[:-1].isprintable())
                try:
                    raise ValueError(forged)
                except ValueError:
                    module.log.exception("a bug: %s", forged)
                lines = out.getvalue().splitlines()
                self.assertTrue(all(line.isprintable() for line in lines))
                self.assertEqual(2, sum(line.startswith("ERROR") for line in lines))

    def test_errors(self):
        for code, (status, message) in module.ERRORS.items():
            with self.subTest(code):
                error = RegistryError(code, "why")
                self.assertEqual(status, error.status)
                self.assertEqual({"errors": [{"code": code, "message": f"{message}: why", "detail": "why"}]},
                                 json.loads(error.body()))


class TestReferences(unittest.TestCase):
    def test_digests(self):
        for text in (f"sha256:{HEX}", f"sha512:{HEX}{HEX}"):
            with self.subTest(text):
                self.assertEqual(text, str(Digest.parse(text)))
        for text in ("", "sha256", "sha256:", f"sha256:{HEX[1:]}", f"sha256:{HEX}0", f"sha256:{HEX.upper()}",
                     f"sha512:{HEX}", f"md5:{HEX[:32]}", f"sha256:{HEX}\n", f" sha256:{HEX}", "sha256:" + "/" * 64,
                     f"SHA256:{HEX}", f"sha256-{HEX}", f"sha256:{HEX[:-1]}é"):
            with self.subTest(text), self.assertRaises(ValueError):
                Digest.parse(text)
        self.assertEqual("sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", str(Digest.of(b"")))

    def test_good_references(self):
        for repository, target, namespace, expected in (
                ("library/alpine", "3.20", "docker.io", "docker.io/library/alpine:3.20"),
                ("app", "1", None, "app:1"),
                ("a/b/c/d", "A-b_c.d", "registry.example:5000", "registry.example:5000/a/b/c/d:A-b_c.d"),
                ("a__b/c-d/e---f/g.h", "_", "localhost", "localhost/a__b/c-d/e---f/g.h:_"),
                ("app", f"sha256:{HEX}", "[::1]:5000", f"[::1]:5000/app@sha256:{HEX}"),
                ("app", "a" * 128, "k3d-x:5000", "k3d-x:5000/app:" + "a" * 128),
                ("app", "1", "Registry.Example", "Registry.Example/app:1")):
            with self.subTest(expected):
                reference = Reference.parse(repository, target, namespace)
                self.assertEqual(expected, str(reference))
                self.assertEqual(reference, reference.under("x.y").under(namespace))

    def test_bad_references(self):
        for repository, target, namespace, code in (
                *[(name, "1", None, "NAME_INVALID") for name in (
                    "", "/", "a/", "/a", "a//b", "A", "a/B", ".a", "a.", "a..b", "a___b", "-a", "a-", "a b", "a\n", "é",
                    "../a", "a/../b", "a/./b", "a:1", "a@b", "a\0", "a" * 256)],
                *[("app", "1", host, "NAME_INVALID") for host in (
                    "", "docker", "docker.io/x", "a b.c", "-a.b", "a-.b", "a..b", "http://a.b", "a.b:", "a.b:123456",
                    "a.b:x", "u@a.b", "a.b\r\nX: y", "::1", "[::1", "a.b?x", "a.b#x", "é.fr")],
                *[("app", tag, None, "MANIFEST_UNKNOWN") for tag in (
                    "", ".", "..", "-a", ".a", "a/b", "a b", "a\n", "é", "a" * 129)],
                *[("app", digest, None, "DIGEST_INVALID") for digest in (":", "sha256:x", f"sha256:{HEX}\n", "a:b")]):
            with self.subTest(repository=repository, target=target, namespace=namespace):
                with self.assertRaises(RegistryError) as caught:
                    Reference.parse(repository, target, namespace)
                self.assertEqual(code, caught.exception.code)

    def test_media_types(self):
        config = {"config": {"digest": "x"}}
        for document, expected in (
                ({"schemaVersion": 2, "mediaType": "application/x.y+json"}, "application/x.y+json"),
                ({"schemaVersion": 2, "manifests": []}, module.OCI_INDEX),
                ({"schemaVersion": 2, **config}, module.OCI_MANIFEST),
                ({"schemaVersion": 1, "fsLayers": []}, module.DOCKER_SCHEMA1),
                ({"schemaVersion": 2, "mediaType": "a/b\r\nX: y", **config}, module.OCI_MANIFEST),
                ({"schemaVersion": 2, "mediaType": 7}, None), ({"schemaVersion": 2}, None), (config, None),
                ({"architecture": "amd64", "os": "linux"}, None), ([], None), ("x", None), (2, None)):
            with self.subTest(document):
                self.assertEqual(expected, module.manifest_type(json.dumps(document).encode()))
        for data in (b"", b"{", b"\xff\xfe", b"[" * 100_000, b"\x1f\x8b\x08"):
            with self.subTest(data[:10]):
                self.assertIsNone(module.manifest_type(data))

    def test_descriptors(self):
        good = {"digest": f"sha256:{HEX}"}
        pair = (Digest("sha256", HEX), good)
        document = {"config": good, "layers": [good, {"size": 1}, 7, None, {"digest": "sha256:1"}], "manifests": "x",
                    "subject": {"digest": 1}}
        self.assertEqual([pair], list(module.descriptors(document, "config")))
        self.assertEqual([pair, pair], list(module.descriptors(document, "config", "layers")))
        self.assertEqual([], list(module.descriptors(document, "manifests", "subject", "nothing")))


if __name__ == "__main__":
    unittest.main()
