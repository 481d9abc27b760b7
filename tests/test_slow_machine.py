"""Pushes to a program that gets little time: clients of today give up on an answer whose headers take 30 seconds."""

import contextlib
import http.client
import json
import os
import signal
import threading
import unittest

import lab
import walk
from test_engines import EngineCase, sha256, together
from test_push_engines import PushCase

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
HEADER_TIMEOUT = 30     # seconds; the limit of containerd 2.3 and of Docker 29
PERIOD, SHARE = 0.1, 0.06  # seconds, and the part of them in which the process runs
MIB = 1024 * 1024


def setUpModule():
    lab.require()


@contextlib.contextmanager
def slowed_down(pid):
    """Let a process run for six percent of the time only."""
    ended = threading.Event()

    def alternate():
        while not ended.is_set():
            os.kill(pid, signal.SIGSTOP)
            ended.wait(PERIOD * (1 - SHARE))
            os.kill(pid, signal.SIGCONT)
            ended.wait(PERIOD * SHARE)

    thread = threading.Thread(target=alternate)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class TestSlowMachine(PushCase):
    """Docker has the image, with a large layer, and the program is slow."""

    engine = lab.ENGINES["containerd"]

    def request(self, method, path, body=None, **headers):
        """One request by a client that waits 30 seconds at most once it has sent its body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.program.port, timeout=HEADER_TIMEOUT)
        with contextlib.closing(connection):
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            answer.read()
        self.assertLess(answer.status, 300)
        return answer

    def test_push_by_a_client_with_a_header_timeout(self):
        data, config = os.urandom(MIB) * 64, b"{}"
        self.engine.import_image(f"{self.target}:1", {"data": data})
        self.images.append(f"{self.target}:1")
        layer = lab.tar_of({"data": data})
        manifest = (b'{"schemaVersion": 2, "mediaType": "%s", "config": {"mediaType": "application/json", '
                    b'"digest": "%s", "size": %d}, "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", '
                    b'"digest": "%s", "size": %d}]}') % (MANIFEST.encode(), sha256(config).encode(), len(config),
                                                         sha256(layer).encode(), len(layer))
        with slowed_down(self.program.process.pid):
            for blob in (config, layer):
                location = self.request("POST", f"/v2/{self.name}/blobs/uploads/").headers["Location"]
                self.request("PUT", f"{location}?digest={sha256(blob)}", blob)
            self.request("PUT", f"/v2/{self.name}/manifests/1", manifest, Content_Type=MANIFEST)
        self.assertEqual(walk.Missing([], []), walk.everything_below(self.program, self.name, "1"))

    def test_push_by_docker(self):
        image = f"{self.target}:1"
        self.images.append(image)
        self.engine.build(image, {"data": os.urandom(MIB) * 32})
        with slowed_down(self.program.process.pid):
            self.engine.docker("push", image)
        self.assertEqual(walk.Missing([], []), walk.everything_below(self.program, self.name, "1"))


class TestStoppedEngine(EngineCase):
    """An engine that accepts connections and does not answer: its process is stopped."""

    engine = lab.ENGINES["containerd"]

    def test_every_answer_is_503(self):
        self.build("1", {"data": os.urandom(5 * MIB)})  # more than a manifest may have
        program = self.program()
        index = program.get(self.manifest_path("1")).json
        manifest = program.get(self.manifest_path(index["manifests"][0]["digest"])).json
        layer = manifest["layers"][-1]["digest"]
        unknown = {**manifest, "layers": [{**manifest["layers"][0], "digest": sha256(b"%d" % i)} for i in range(5)]}
        requests = [("GET", f"/v2/library/{self.name}/blobs/{layer}?ns=docker.io", None),
                    ("GET", self.manifest_path("1"), None), ("GET", f"/v2/{self.name}/tags/list", None),
                    ("GET", "/v2/_catalog", None),
                    ("PUT", f"/v2/{self.name}-pushed/manifests/1", json.dumps(unknown).encode())]
        os.kill(self.engine.pid(), signal.SIGSTOP)
        try:
            answers = together(len(requests), lambda i: program.request(
                requests[i][0], requests[i][1], {"Content-Type": MANIFEST}, requests[i][2]))
        finally:
            os.kill(self.engine.pid(), signal.SIGCONT)
        self.assertEqual([(503, "UNAVAILABLE")] * len(requests), [(answer.status, answer.code) for answer in answers])
        self.assertEqual(200, program.get(requests[0][1]).status)


if __name__ == "__main__":
    unittest.main()
