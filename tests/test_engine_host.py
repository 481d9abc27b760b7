"""Tests of the configuration chapter: where Docker is, by DOCKER_HOST and by contexts."""

import contextlib
import hashlib
import json
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import lab
from program import MODULE

try:
    import trustme
except ImportError:
    trustme = None

sys.path.insert(0, str(MODULE.parent))
import k3d_registry_dockerd as module
from k3d_registry_dockerd import Engine, EngineHost

DEFAULT = "/var/run/docker.sock"


class Folder:
    """A folder of the docker command: config.json and contexts."""

    def __init__(self, path):
        self.path = Path(path)

    def use(self, name):
        (self.path / "config.json").write_text(json.dumps({"currentContext": name}))

    def context(self, name, host, skip_verification=False):
        """Write a context as the docker command does; return the folder for its TLS files."""
        identifier = hashlib.sha256(name.encode()).hexdigest()
        meta = self.path / "contexts/meta" / identifier / "meta.json"
        meta.parent.mkdir(parents=True, exist_ok=True)
        endpoint = {"Host": host, "SkipTLSVerify": skip_verification}
        meta.write_text(json.dumps({"Name": name, "Metadata": {}, "Endpoints": {"docker": endpoint}}))
        return self.path / "contexts/tls" / identifier / "docker"


class FolderCase(unittest.TestCase):
    def setUp(self):
        self.stack = contextlib.ExitStack()
        self.addCleanup(self.stack.close)
        self.folder = Folder(self.stack.enter_context(tempfile.TemporaryDirectory()))

    def find(self, in_container=False, **environ):
        """Return the EngineHost for some variables."""
        with mock.patch.object(module, "in_container", lambda: in_container):
            return EngineHost.from_environment({"DOCKER_CONFIG": str(self.folder.path), **environ})


class TestAddresses(FolderCase):
    def test_good(self):
        """Each row: DOCKER_HOST, the address, its text."""
        for text, expected, shown in (
                ("", EngineHost(path=DEFAULT), f"unix://{DEFAULT}"),
                (" ", EngineHost(path=DEFAULT), f"unix://{DEFAULT}"),
                ("unix://", EngineHost(path=DEFAULT), f"unix://{DEFAULT}"),
                ("unix:///x/y.sock", EngineHost(path="/x/y.sock"), "unix:///x/y.sock"),
                ("/x/y.sock", EngineHost(path="/x/y.sock"), "unix:///x/y.sock"),
                ("tcp://h:1", EngineHost(host="h", port=1), "tcp://h:1"),
                ("tcp://h", EngineHost(host="h", port=2375), "tcp://h:2375"),
                ("127.0.0.1:2375", EngineHost(host="127.0.0.1", port=2375), "tcp://127.0.0.1:2375"),
                ("h", EngineHost(host="h", port=2375), "tcp://h:2375"),
                (":1", EngineHost(host="localhost", port=1), "tcp://localhost:1"),
                ("tcp://", EngineHost(host="localhost", port=2375), "tcp://localhost:2375"),
                ("tcp://[::1]:1/", EngineHost(host="::1", port=1), "tcp://[::1]:1"),
                ("[::1]", EngineHost(host="::1", port=2375), "tcp://[::1]:2375")):
            with self.subTest(text):
                found = self.find(DOCKER_HOST=text)
                self.assertEqual((expected, shown), (found, str(found)))

    def test_bad(self):
        for text, expected in (
                ("npipe:////./pipe/docker_engine", "named pipes .* Windows"), ("fd://", "fd:// is none of"),
                ("http://h:1", "http:// is none of"), ("tcp://h:1/path", "without user, path"),
                ("tcp://u:s3cret@h:1", "without user"), ("tcp://h:x", "DOCKER_HOST"), ("tcp://h:70000", "DOCKER_HOST"),
                ("ssh://", "ssh://"), ("ssh://me:s3cret@h", "without a password"), ("ssh://h?a=b", "ssh://")):
            with self.subTest(text), self.assertRaisesRegex(ValueError, expected) as caught:
                self.find(DOCKER_HOST=text)
            self.assertNotIn("s3cret", str(caught.exception))

    def test_precedence(self):
        """Each row: DOCKER_HOST, DOCKER_CONTEXT, the current context of config.json -> the path, and what said so."""
        for name in ("a", "b"):
            (self.folder.path / name).touch()
            self.folder.context(name, f"unix://{self.folder.path}/{name}")
        for host, context, current, expected, origin in (
                (None, None, None, DEFAULT, "are not set, .*config.json names no context"),
                (None, None, "default", DEFAULT, "config.json names the context default"),
                (None, None, "a", "a", r"context a \(.*config.json"),
                (None, "b", "a", "b", r"context b \(DOCKER_CONTEXT"),
                (None, "default", "a", DEFAULT, "DOCKER_CONTEXT names the context default"),
                ("unix:///h", "b", "a", "/h", "from DOCKER_HOST"),
                ("unix:///h", "missing", "missing", "/h", "from DOCKER_HOST"),
                ("", "b", "a", "b", "context b")):
            with self.subTest(host=host, context=context, current=current):
                self.folder.use(current)
                variables = {"DOCKER_HOST": host, "DOCKER_CONTEXT": context}
                found = self.find(**{name: value for name, value in variables.items() if value is not None})
                self.assertEqual(str(self.folder.path / expected), found.path)
                self.assertRegex(found.origin, origin)

    def test_where_was_looked(self):
        error = FileNotFoundError()
        self.assertRegex(self.find().advice(error), "DOCKER_HOST and DOCKER_CONTEXT are not set, .* does not exist")
        (self.folder.path / "config.json").write_text("{")
        self.assertRegex(self.find().advice(error), "config.json cannot be read")

    def test_missing_and_malformed_contexts(self):
        self.folder.use("missing")
        for variables in ({}, {"DOCKER_CONTEXT": "missing"}):
            with self.subTest(variables), self.assertRaisesRegex(ValueError, "context missing .* does not exist"):
                self.find(**variables)
        self.folder.context("bad", "")
        file = next(self.folder.path.glob("contexts/meta/*/meta.json"))
        for document in ("{", "[]", "{}", '{"Endpoints":{"docker":5}}', '{"Endpoints":{"docker":{"Host":"npipe://x"}}}'):
            file.write_text(document)
            with self.subTest(document), self.assertRaisesRegex(ValueError, "context bad .* cannot be used"):
                self.find(DOCKER_CONTEXT="bad")

    def test_config_of_outside_in_a_container(self):
        """A config.json that was mounted for its credentials may name a context that is not in this container."""
        self.folder.context("colima", "unix:///home/me/.colima/docker.sock")
        for name in ("colima", "missing"):
            self.folder.use(name)
            with self.subTest(name):
                found = self.find(in_container=True)
                self.assertEqual(DEFAULT, found.path)
                self.assertRegex(found.origin, f"context {name} .*is not here")
        with self.assertRaisesRegex(ValueError, "does not exist"):
            self.find(in_container=True, DOCKER_CONTEXT="missing")
        self.assertEqual("/home/me/.colima/docker.sock", self.find(in_container=True, DOCKER_CONTEXT="colima").path)

    @unittest.skipUnless(trustme, "needs the package trustme")
    def test_tls_of_contexts(self):
        self.assertIsNone(self.tls("plain", lambda folder: None))
        authority = trustme.CA()
        found = self.tls("authority", lambda folder: authority.cert_pem.write_to_path(str(folder / "ca.pem")))
        self.assertTrue(found.check_hostname)
        self.assertEqual(1, len(found.get_ca_certs()))
        self.assertFalse(self.tls("any", lambda folder: None, skip_verification=True).check_hostname)
        with self.assertRaisesRegex(ValueError, "cannot be read"):
            self.tls("broken", lambda folder: (folder / "cert.pem").write_text("hello"))

    def tls(self, name, write, **options):
        """Return the TLS of a new context, for which write(folder) writes files."""
        folder = self.folder.context(name, "tcp://h:1", **options)
        if name not in ("plain", "any"):
            folder.mkdir(parents=True)
            write(folder)
        return self.find(DOCKER_CONTEXT=name).tls


class TestEngines(FolderCase):
    """Real engines, and the real docker command as an oracle."""

    engine = lab.ENGINES["classic"]

    @classmethod
    def setUpClass(cls):
        lab.require()

    def test_as_the_docker_command(self):
        """Each row: variables and the current context. The docker command shows the same address."""
        share = Folder(self.stack.enter_context(tempfile.TemporaryDirectory(dir=lab.SHARE)))
        inside = f"/lab/{share.path.name}"
        self.folder = share
        for name, host in (("aa", "unix:///lab/classic/docker.sock"), ("bb", "tcp://127.0.0.1:2375"),
                           ("ss", "ssh://me@h:22/x")):
            lab.chroot("docker", "--config", inside, "context", "create", name, "--docker", f"host={host}")
        for current, variables in ((None, {}), ("aa", {}), ("bb", {}), ("ss", {}), ("default", {}),
                                   ("bb", {"DOCKER_CONTEXT": "ss"}), ("bb", {"DOCKER_CONTEXT": "default"}),
                                   ("bb", {"DOCKER_CONTEXT": "ss", "DOCKER_HOST": "127.0.0.1:1"}),
                                   ("bb", {"DOCKER_HOST": "tcp://"}), ("bb", {"DOCKER_HOST": "tcp://h"}),
                                   ("bb", {"DOCKER_HOST": "[::1]:5"}), ("bb", {"DOCKER_HOST": ":1"}),
                                   ("bb", {"DOCKER_HOST": ""})):
            with self.subTest(current=current, **variables):
                lab.chroot("docker", "--config", inside, "context", "use", current or "default", env=self.CLEAN)
                shown = lab.chroot("docker", "--config", inside, "context", "inspect", "--format",
                                   "{{.Endpoints.docker.Host}}", env={**self.CLEAN, **variables})
                self.assertEqual(shown.stdout.strip(), str(self.find(**variables)))

    CLEAN = {"DOCKER_HOST": "", "DOCKER_CONTEXT": ""}

    def test_context_of_a_real_engine(self):
        self.folder.context("lab", f"unix://{lab.ENGINES['classic'].socket}")
        self.folder.use("lab")
        self.assertEqual("classic", Engine(self.find()).info().store)


if __name__ == "__main__":
    unittest.main()
