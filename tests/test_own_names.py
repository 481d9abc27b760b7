"""Tests of the names of this registry that Docker knows, if it runs in a container."""

import contextlib
import http.client
import json
import os
import shutil
import socket
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import lab
from fake_daemon import FakeDaemon, Image, http_answer
from program import MODULE, Answer

sys.path.insert(0, str(MODULE.parent))
import k3d_registry_dockerd as module
from k3d_registry_dockerd import Engine, EngineHost, Reference, RegistryError

ID = "f74c40384335236787d9322c93f30dd90222ede3103c0a4ae8d8af2e67c03725"
OTHER = "0123456789abcdef" * 4

MOUNTS = (f"612 589 254:0 /var/lib/docker/containers/{ID}/resolv.conf /etc/resolv.conf rw,relatime - ext4 /dev/vda rw\n"
          f"613 589 254:0 /var/lib/docker/containers/{ID}/hostname /etc/hostname rw,relatime - ext4 /dev/vda rw\n"
          f"614 589 0:5 / /mnt/{OTHER}/hostname rw - tmpfs tmpfs rw\n")


def container(ports=None, mode="bridge", **changes):
    """What Docker 28.5 shows of a container that k3d made, shortened."""
    network = {"Aliases": ["registry.example", ID[:12]], "DNSNames": ["k3d-x", "registry.example", ID[:12]],
               "IPAddress": "172.18.0.2"}
    return {"Id": ID, "Name": "/k3d-x", "Config": {"Hostname": ID[:12]}, "HostConfig": {"NetworkMode": mode},
            "NetworkSettings": {"Ports": ports or {}, "Networks": {"k3d-demo": network}}, **changes}


def published(port, *hosts):
    return [{"HostIp": host, "HostPort": str(port)} for host in hosts]


INSIDE = ("k3d-x:5000", "registry.example:5000")


class TestNames(unittest.TestCase):
    def test_container_ids(self):
        """Each row: mountinfo, cgroup -> IDs."""
        for mounts, groups, expected in (
                (MOUNTS, "0::/\n", [ID]),
                ("", f"12:pids:/docker/{ID}\n0::/system.slice/docker-{OTHER}.scope\n", [ID, OTHER]),
                (f"9 8 0:2 /containers/overlay-containers/{ID}/userdata/hostname /etc/hostname rw - tmpfs tmpfs rw\n",
                 f"0::/machine.slice/libpod-{ID}.scope/container\n", [ID]),
                (f"9 8 0:2 /{ID}/hostname /mnt rw - tmpfs tmpfs rw\n", "0::/init.scope\n", []),
                ("", "", [])):
            with self.subTest(mounts=mounts, groups=groups), tempfile.TemporaryDirectory() as name:
                (Path(name) / "mountinfo").write_text(mounts)
                if groups:
                    (Path(name) / "cgroup").write_text(groups)
                with mock.patch.object(module, "in_container", lambda: False):
                    self.assertEqual(expected, module.own_container(Path(name)))

    def test_container_names(self):
        """Each row: what Docker shows -> the names of a registry on port 5000."""
        both = ("localhost:57840", "127.0.0.1:57840")
        for shown, expected in (
                (container(), INSIDE),
                (container({"5000/tcp": published(57840, "0.0.0.0", "::"), "9/tcp": published(9, "")}), both + INSIDE),
                (container({"5000/tcp": published(57840, "127.0.0.1")}), both + INSIDE),
                (container({"5000/tcp": published(57840, "10.0.0.1", "fd00::1")}),
                 ("10.0.0.1:57840", "[fd00::1]:57840") + INSIDE),
                (container({"5000/tcp": None, "5000/udp": published(1, "")}), INSIDE),
                (container(mode="host"), ("localhost:5000", "127.0.0.1:5000")),
                (container(Config={"Hostname": "box"}, Name="/with_underscore", NetworkSettings={}), ("box:5000",)),
                ({"Id": ID}, ())):
            with self.subTest(shown):
                self.assertEqual(expected, module.container_names(shown, 5000))
        many = {"n": {"Aliases": [f"a{number}" for number in range(100)]}}
        self.assertEqual(16, len(module.container_names({"Id": ID, "NetworkSettings": {"Networks": many}}, 5000)))

    def test_names_for_nodes(self):
        shown = container({"5000/tcp": published(57840, "127.0.0.1", "10.0.0.1", "fd00::1")})
        self.assertEqual([*INSIDE, "10.0.0.1:57840", "[fd00::1]:57840"],
                         module.names_for_nodes(module.container_names(shown, 5000)))

    def test_aliases(self):
        """Each row: the namespace and the Host header of a request -> the names that Docker is asked for."""
        names = ("localhost:57840", "127.0.0.1:57840", "k3d-x:5000")
        for namespace, host, expected in (
                (None, "k3d-x:5000", ["k3d-x:5000", "localhost:5000", "127.0.0.1:5000", "localhost:57840",
                                      "127.0.0.1:57840", None]),
                (None, "10.0.0.9:5000", ["10.0.0.9:5000", "localhost:5000", "127.0.0.1:5000", *names, None]),
                ("localhost:57840", "k3d-x:5000", ["localhost:57840", "127.0.0.1:57840", "k3d-x:5000"]),
                ("k3d-x:5000", "other:5000", ["k3d-x:5000", "localhost:5000", "127.0.0.1:5000", "other:5000",
                                              "localhost:57840", "127.0.0.1:57840"]),
                ("localhost:9", "k3d-x:5000", ["localhost:9", "127.0.0.1:9"]),
                ("docker.io", "k3d-x:5000", ["docker.io"])):
            with self.subTest(namespace=namespace, host=host):
                found = Reference("app", "1", namespace).aliases((host, *names))
                self.assertEqual(expected, [reference.namespace for reference in found])

    def test_an_id_is_no_name(self):
        """Docker takes sha256:HEX for the ID of an image, whatever its name is."""
        names = [str(name) for name in Reference("sha256", "a" * 64).aliases(("localhost:5000",))]
        self.assertEqual([f"{host}:5000/sha256:{'a' * 64}" for host in ("localhost", "127.0.0.1")], names)


class TestEngine(unittest.TestCase):
    """The container is found in what Docker says, and nothing else depends on it."""

    def setUp(self):
        self.stack = contextlib.ExitStack()
        self.addCleanup(self.stack.close)
        self.daemon = self.stack.enter_context(FakeDaemon())

    def names(self, *identities):
        with mock.patch.object(module, "own_container", lambda: list(identities)):
            engine = Engine(EngineHost(path=self.daemon.path), 5000)
            found = engine.info().names
        self.assertEqual(found, engine.own_names)
        return found

    def answer(self, status, document):
        self.daemon.faults = {"/containers/": http_answer(status, json.dumps(document).encode())}

    def test_found_and_verified(self):
        self.answer(200, container())
        self.assertEqual(INSIDE, self.names(ID))
        self.assertEqual(INSIDE, self.names(OTHER, ID[:12]), "by the host name")
        self.assertEqual((), self.names(OTHER))
        self.assertEqual((), self.names("k3d-x"), "a name that is not the host name of that container")
        self.assertEqual((), self.names())

    def test_refusals_and_nonsense(self):
        """The engine is described all the same."""
        for status, document in ((404, {"message": "No such container"}), (403, {}), (500, {"message": "x"}),
                                 (200, []), (200, {"Id": ID, "NetworkSettings": {"Ports": {"5000/tcp": [5]}}})):
            self.answer(status, document)
            with self.subTest(status=status, document=document):
                self.assertEqual((), self.names(ID))

    def test_names_stay_while_docker_is_away(self):
        self.answer(200, container())
        with mock.patch.object(module, "own_container", lambda: [ID]):
            engine = Engine(EngineHost(path=self.daemon.path), 5000)
            engine.info()
            self.daemon.stop()
            with self.assertRaises(RegistryError):
                engine.image("app:1")
        self.assertEqual(INSIDE, engine.own_names)

    def test_requests(self):
        """Docker has an image under the published port; a node asks by another name. Pushes land in one repository."""
        self.answer(200, container({"5000/tcp": published(57840, "0.0.0.0")}))
        image = Image()
        self.daemon.add("localhost:57840/app:1", image)
        self.stack.enter_context(mock.patch.object(module, "own_container", lambda: [ID]))
        folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        store = module.Store(folder / "store")
        mirror = module.Mirror(Engine(EngineHost(path=self.daemon.path), 5000), store)
        front = module.Front(module.Hosted(store), mirror, store)
        for namespace, host in ((None, "k3d-x:5000"), ("k3d-x:5000", "k3d-x:5000"), ("registry.example:5000", "m:1"),
                                ("localhost:57840", "m:1"), (None, "172.18.0.2:5000")):
            with self.subTest(namespace=namespace, host=host):
                client = module.Client((host, *front.names))
                found = front.manifest(Reference("app", "1", namespace), client)
                self.assertEqual(image.digest, str(found.digest))
        client = module.Client(("m:1", *front.names))
        for namespace in ("k3d-x:5000", "localhost:57840", "registry.example:5000"):
            module.Policy().check("PUT", namespace, client)
        with self.assertRaises(RegistryError):
            module.Policy().check("PUT", "other.example", client)


class TestContainer(unittest.TestCase):
    """The program in a real container of a real engine, on the host's network, as the lab has no other."""

    engine = lab.ENGINES["containerd"]

    @classmethod
    def setUpClass(cls):
        lab.require()

    def test_found(self):
        engine = self.engine
        name = f"k3d-names-{os.getpid()}"
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        with tempfile.TemporaryDirectory(dir=lab.SHARE) as folder:
            shutil.copy(MODULE, folder)
            inside = f"/lab/{Path(folder).name}"
            mounts = ("/usr:/usr:ro", "/usr/lib:/lib:ro", "/usr/lib64:/lib64:ro", f"{inside}:{inside}",
                      f"/lab/{engine.name}/docker.sock:/var/run/docker.sock")
            try:
                engine.docker("run", "-d", "--name", name, "--network", "host", *(
                    part for mount in mounts for part in ("-v", mount)), "base:1", "/usr/bin/python3",
                    f"{inside}/{MODULE.name}", "-addr", f"127.0.0.1:{port}", "-store", f"{inside}/store")
                lab.wait_for("the program", lambda: self.get(port, "/v2/").status == 200)
                lab.wait_for("Docker's answer", lambda: self.get(port, "/status").json["engine"]["reachable"])
                self.assertEqual([f"localhost:{port}", f"127.0.0.1:{port}"], self.get(port, "/status").json["names"])
            finally:
                engine.docker("rm", "-f", name, check=False)

    @staticmethod
    def get(port, path):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", path)
            return Answer(connection.getresponse())


if __name__ == "__main__":
    unittest.main()
