"""Tests of the configuration chapter: the credentials that `docker login` stored on this machine."""

import base64
import json
import os
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from program import MODULE

sys.path.insert(0, str(MODULE.parent))
from k3d_registry_dockerd import Credentials, DockerConfig


def auth(text):
    return {"auth": base64.b64encode(text.encode()).decode()}


class TestDockerConfig(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.config = DockerConfig(self.folder)

    def write(self, document):
        (self.folder / "config.json").write_text(document if isinstance(document, str) else json.dumps(document))

    def helper(self, name, script):
        path = self.folder / f"docker-credential-{name}"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return mock.patch.dict(os.environ, {"PATH": f"{self.folder}:{os.environ['PATH']}"})

    def test_auths(self):
        """Each row: key, entry and requested registry -> credentials."""
        me = Credentials("me", "pass:word")
        for key, entry, registry, expected in (
                ("https://index.docker.io/v1/", auth("me:pass:word"), "docker.io", me),
                ("registry.example:5000", auth("me:pass:word"), "registry.example:5000", me),
                ("https://registry.example", auth("me:pass:word"), "registry.example", me),
                ("http://registry.example/v2/", auth("me:pass:word"), "registry.example", me),
                ("registry.example", {"username": "me", "password": "pass:word"}, "registry.example", me),
                ("registry.example", {"identitytoken": "t0ken", **auth("00000000:")}, "registry.example",
                 Credentials("<token>", "t0ken")),
                ("registry.example", auth("me:x"), "other.example", None),
                ("registry.example", auth("me:x"), "registry.example:5000", None),
                ("registry.example", auth("me:x"), "docker.io", None),
                ("registry.example", {}, "registry.example", None)):
            with self.subTest(key=key, registry=registry):
                self.write({"auths": {key: entry}})
                self.assertEqual(expected, self.config.credentials(registry))

    def test_identity_token_for_docker(self):
        header = json.loads(base64.urlsafe_b64decode(Credentials("<token>", "t0ken").for_docker("r.example")))
        self.assertEqual({"identitytoken": "t0ken", "serveraddress": "r.example"}, header)

    def test_helpers(self):
        found = 'printf "{\\"ServerURL\\":\\"%s\\",\\"Username\\":\\"me\\",\\"Secret\\":\\"%s\\"}" x "$(cat)"'
        self.write({"credHelpers": {"r.example": "lab"}, "credsStore": "all", "auths": {"q.example": auth("a:b")}})
        with self.helper("lab", found), self.helper("all", "exit 1"):
            self.assertEqual(Credentials("me", "r.example"), self.config.credentials("r.example"))
            self.assertEqual(Credentials("a", "b"), self.config.credentials("q.example"), "the helper all has none")
        self.assertIsNone(self.config.credentials("r.example"), "no helper is installed")
        with self.helper("all", found):
            self.assertEqual(Credentials("me", "https://index.docker.io/v1/"), self.config.credentials("docker.io"))

    def test_malformed_config(self):
        """There are no credentials, and the warning has no secret in it."""
        self.assertIsNone(self.config.credentials("r.example"), "there is no file")
        for document in ("", "{", "[]", {"auths": []}, {"auths": {"r.example": 1}},
                         {"auths": {"r.example": {"auth": "*secret*"}}}, {"credHelpers": {"r.example": 5}},
                         *({"auths": {"r.example": entry}} for entry in (
                             {"identitytoken": ["secret"]}, {"identitytoken": {"secret": 1}}, {"auth": 5},
                             {"username": "me", "password": ["secret"]}, {"username": ["me"], "password": "secret"},
                             {"username": "me", "password": 5}, {"username": "me", "password": "\ud800"},
                             {"username": "me"}))):
            with self.subTest(document):
                self.write(document)
                if document == {"auths": []}:
                    self.assertIsNone(self.config.credentials("r.example"))
                    continue
                with self.assertLogs("k3d-registry-dockerd", "WARNING") as logged:
                    self.assertIsNone(self.config.credentials("r.example"))
                self.assertNotIn("secret", "".join(logged.output))
        self.write({"credsStore": "../../bin/sh"})
        self.assertIsNone(self.config.credentials("r.example"))
        self.write({"credsStore": "bad"})
        with self.helper("bad", "echo no JSON, but a secret"), self.assertLogs("k3d-registry-dockerd") as logged:
            self.assertIsNone(self.config.credentials("r.example"))
        self.assertNotIn("a secret", "".join(logged.output))


if __name__ == "__main__":
    unittest.main()
