"""The command doctor: prepared faults, and the line that each of them gets; real engines, where all is well."""

import argparse
import contextlib
import datetime
import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import unittest
from pathlib import Path
from unittest import mock

import lab
from fake_daemon import FakeDaemon, http_answer
from program import MODULE, Program
from test_own_names import ID, container, published

sys.path.insert(0, str(MODULE.parent))
import k3d_registry_dockerd as module
from k3d_registry_dockerd import Check, Finding, Settings, Setup, examine, make_registry, run_doctor

DIGEST = "sha256:" + 64 * "a"
HUB = "docker.io/library/hello-world:latest"


def make_setup(socket_path, folder, port=1, root="", environ=None, config="/nowhere", **variables):
    """Return the setup of a registry that serves a Docker socket, with a store in a folder."""
    settings = Settings(argparse.Namespace(), {
        "DOCKER_HOST": f"unix://{socket_path}", "DOCKER_CONFIG": str(config),
        "REGISTRY_HTTP_ADDR": f"127.0.0.1:{port}", "K3D_REGISTRY_DOCKERD_DOCKER_ROOT": str(root),
        "REGISTRY_STORAGE_FILESYSTEM_ROOTDIRECTORY": str(folder / "store"), **variables})
    return Setup(settings, make_registry(settings).mirror, settings.address, environ or {})


def lines(setup):
    """Return {name of the check: its line} and whether nothing is wrong."""
    told = []
    right = run_doctor(setup, told.append)
    return {line[4:].partition(":")[0]: line for line in told}, right


class DoctorCase(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def assert_finding(self, expected, setup):
        """The line of a check begins and goes on as expected: "mark  name: …", and then texts that occur in it."""
        first, *others = expected
        found, right = lines(setup)
        line = found[first[4:].partition(":")[0]]
        self.assertTrue(line.startswith(first), line)
        for text in others:
            self.assertIn(text, line)
        self.assertEqual(not any(line.startswith("!!") for line in found.values()), right)
        self.assertFalse(right and first.startswith("!!"))
        for line in found.values():
            self.assertNotIn("could not be checked", line)
            self.assertNotIn("\n", line)
        return found


class TestFaults(DoctorCase):
    def test_no_socket(self):
        """What asks Docker is left out when it cannot be reached."""
        path = self.folder / "docker.sock"
        expected = ("!!  socket: ", f"{path} does not exist", "-v /var/run/docker.sock:")
        found = self.assert_finding(expected, make_setup(path, self.folder))
        self.assertEqual({"socket", "store", "port", "proxies", "pulls", "credentials"}, found.keys())
        path.mkdir()
        self.assert_finding(("!!  socket: ", "is a folder: Docker makes one"), make_setup(path, self.folder))
        path.rmdir()
        with socket.socket(socket.AF_UNIX) as unused:
            unused.bind(str(path))
        self.assert_finding(("!!  socket: ", "connection refused"), make_setup(path, self.folder))

    @unittest.skipIf(os.geteuid(), "only root can change the user")
    def test_permission(self):
        self.folder.chmod(0o755)
        program = self.folder / MODULE.name
        program.write_bytes(MODULE.read_bytes())
        others = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
        pythons = (sys.executable, "/usr/bin/python3")
        commands = ([*others, python, str(program)] for python in pythons)
        command = next((command for command in commands if not subprocess.run(
            [*command, "-version"], capture_output=True, check=False).returncode), None)
        if command is None:
            self.skipTest("there is no Python that other users may run")
        path = self.folder / "docker.sock"
        with socket.socket(socket.AF_UNIX) as unused:
            unused.bind(str(path))
            os.chown(path, 0, 4711)
            for mode, advice in ((0o660, "--group-add 4711"), (0o600, "docker run --user 0")):
                path.chmod(mode)
                environment = {"DOCKER_HOST": f"unix://{path}", "DOCKER_CONFIG": "/nowhere", "PATH": os.defpath}
                arguments = ["doctor", "-addr", "127.0.0.1:1", "-store", "/proc/store"]
                result = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False,
                                        env=environment)
                with self.subTest(stat.filemode(mode)):
                    self.assertEqual((1, ""), (result.returncode, result.stderr))
                    self.assertIn(f"!!  socket: permission denied on unix://{path}: ", result.stdout)
                    self.assertIn(advice, result.stdout)
                    self.assertIn("!!  store: /proc/store cannot be written to", result.stdout)
        store = self.folder / "store"
        (store / "blobs").mkdir(parents=True)  # by another user
        store.chmod(0o1777)  # as in the image
        result = subprocess.run([*command, "doctor", "-addr", "127.0.0.1:1", "-store", store], capture_output=True,
                                text=True, check=False, env=environment)
        self.assertIn(f"!!  store: {store}/blobs cannot be written to: Permission denied", result.stdout)
        with subprocess.Popen([*command, "-addr", "127.0.0.1:0", "-store", store], stderr=subprocess.PIPE, text=True,
                              env=environment) as process:
            line = next(line for line in process.stderr if "not writable" in line or "listening on" in line)
            process.terminate()
        self.assertIn(f"is not writable: {store}/blobs: pushes and exports will fail", line)

    def test_docker(self):
        """A table: what the daemon is like -> the line."""
        with tempfile.TemporaryDirectory() as other:
            (Path(other) / "containerd/daemon/io.containerd.content.v1.content/blobs/sha256").mkdir(parents=True)
            (Path(other) / "engine-id").write_text("another")
            ago = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(hours=2)
            early = f"{ago:%Y-%m-%dT%H:%M:%S}.229080102Z"
            now = f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%dT%H:%M:%S}+00:00"
            mirrors = {"RegistryConfig": {"Mirrors": ["http://localhost:1/"]}}
            system = {"Containerd": {"Address": "/run/containerd/containerd.sock"}, "DockerRootDir": "/nowhere"}
            refused = {"/images/json": lab.FORBIDDEN, "/images/create": lab.FORBIDDEN}
            for expected, options in (
                    (("ok  engine: Docker 28.5.2, API 1.51, containerd image store",), {}),
                    (("--  engine: Docker 1.9, API 1.21", "older than all"), {
                        "version": {"Version": "1.9", "ApiVersion": "1.21"}}),
                    (("!!  engine: ", "GET /version", "a proxy", "VERSION=1"), {"faults": {"/version": lab.FORBIDDEN}}),
                    (("!!  engine: ", "malformed"), {"faults": {"/info": b"nonsense\r\n\r\n"}}),
                    (("ok  calls: ",), {}),
                    (("!!  calls: GET /images/json was answered with status 403, not by Docker but by a proxy",
                      "; POST /images/create was answered", "IMAGES=1 POST=1"), {"faults": refused}),
                    (("--  image store: containerd image store, content from content service: pulls are faster ",
                      "-v /var/lib/containerd:/var/lib/containerd:ro"), {"info": system}),
                    (("--  image store: ", "-v /nowhere:/nowhere:ro"), {"store": "classic", "info": system}),
                    (("--  image store: ", "-v /var/lib/desktop-containerd/daemon:"), {
                        "info": {"OperatingSystem": "Docker Desktop"}}),
                    (("!!  image store: ", "exported one by one"), {"faults": {"/grpc": lab.FORBIDDEN}}),
                    (("!!  image store: ", "is the data folder of another Docker"), {"root": Path(other)}),
                    (("!!  image store: ", "nothing of Docker's containerd image store can be read in /nowhere"), {
                        "root": Path("/nowhere")}),
                    (("ok  image store: Podman's, content from ",), {
                        "version": {"Components": [{"Name": "Podman Engine"}]}}),
                    (("ok  clock: Docker does not tell",), {"info": {"SystemTime": None}}),
                    (("ok  clock: as",), {"info": {"SystemTime": now}}),
                    (("!!  clock: ", " seconds ahead of Docker's: set both"), {"info": {"SystemTime": early}}),
                    (("ok  mirrors: Docker has none",), {}),
                    (("--  mirrors: Docker's registry mirror http://localhost:1/ is this registry: take it out",), {
                        "info": mirrors}),
                    (("ok  docker.io: it answers",), {"origins": {HUB: DIGEST}}),
                    (("--  docker.io: ", "no such host", "docker pull hello-world"), {
                        "faults": {"/distribution": http_answer(500, {"message": "dial tcp: no such host"})}})):
                with self.subTest(expected), FakeDaemon(options.pop("store", "containerd")) as daemon:
                    root = options.pop("root", "")
                    for name, value in options.items():
                        setattr(daemon, name, value)
                    self.assert_finding(expected, make_setup(daemon.path, self.folder, root=root))

    def test_mirrors(self):
        """Each row: a mirror, the port that is listened on, the container -> is it this registry?"""
        shown = container({"5000/tcp": published(57840, "0.0.0.0"), "5001/tcp": published(80, "10.0.0.1")})
        for mirror, port, identity, expected in (
                ("http://localhost:5001/", 5001, None, True), ("http://127.0.0.1:5001", 5001, None, True),
                ("http://localhost:1/", 5001, None, False), ("http://172.17.0.1:5001", 5001, None, True),
                ("http://localhost:57840/", 5000, ID, True), ("http://localhost:5000/", 5000, ID, False),
                ("http://10.0.0.1/", 5001, ID, True), ("https://10.0.0.1/", 5001, ID, False)):
            with self.subTest(mirror, port=port, identity=identity), FakeDaemon() as daemon, mock.patch.object(
                    module, "own_container", lambda identity=identity: [identity] if identity else []):
                daemon.info = {"RegistryConfig": {"Mirrors": [mirror]}}
                daemon.faults = {"/containers/": http_answer(200, shown)}
                settings = make_setup(daemon.path, self.folder).settings  # of another port
                setup = Setup(settings, make_registry(settings, port).mirror, module.Address("172.17.0.1", port))
                self.assertEqual(expected, "is this registry" in str(module.check_mirrors(setup)))

    def test_settings_forbid_the_origin(self):
        with FakeDaemon() as daemon:
            for policy in ({"K3D_REGISTRY_DOCKERD_PULL": "never"}, {"K3D_REGISTRY_DOCKERD_ALLOW": "quay.io"}):
                self.assertNotIn("docker.io", lines(make_setup(daemon.path, self.folder, **policy))[0])
            self.assertEqual([], [line for line in daemon.requests if "distribution" in line])

    def test_surroundings(self):
        """A table of what is around the program -> the line."""
        config, file = self.folder / "config", self.folder / "file"
        config.mkdir()
        file.touch()
        for expected, options in (
                (("ok  credentials: no config.json",), {}),
                (("!!  credentials: ", "names docker-credential-nope, docker-credential-other, not on PATH here: "), {
                    "document": {"credsStore": "nope", "credHelpers": {"x.example": "other"}}}),
                (("ok  credentials: ",), {"document": {"auths": {"x.example": {"auth": "c2VjcmV0"}}}}),
                (("!!  credentials: ", "malformed"), {"document": []}),
                (("ok  proxies: no variables",), {"environ": {"NO_PROXY": "x"}}),
                (("--  proxies: HTTPS_PROXY set: nodes",), {"environ": {"https_proxy": "http://user:s3cret@proxy"}}),
                (("ok  proxies: HTTP_PROXY, and",), {"environ": {"HTTP_PROXY": "http://p", "no_proxy": "a, *"}}),
                (("--  port: nothing listens at 127.0.0.1:1: start it",), {})):
            with self.subTest(expected):
                if "document" in options:
                    (config / "config.json").write_text(json.dumps(options.pop("document")))
                    options["config"] = config
                found = self.assert_finding(expected, make_setup("/nowhere", self.folder, **options))
                self.assertNotIn("s3cret", "".join(found.values()))
        setup = make_setup("/nowhere", self.folder)
        setup.settings.store.write_text("a file")
        self.assert_finding(("!!  store: ", "cannot be written to: Not a directory"), setup)

    def test_pulls(self):
        for variables, expected in (
                ({}, "ok  pulls: missing, from all registries"),
                ({"PULL": "never"}, "--  pulls: Docker pulls nothing (-pull never, from K3D_REGISTRY_DOCKERD_PULL)"),
                ({"ALLOW": "docker.io,quay.io"}, "--  pulls: only from docker.io, quay.io (-allow, from K3D_")):
            self.assert_finding((expected,), make_setup("/nowhere", self.folder, **{
                f"K3D_REGISTRY_DOCKERD_{name}": value for name, value in variables.items()}))

    def test_port_of_another_program(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            taken.settimeout(30)
            port = taken.getsockname()[1]
            setup = make_setup("/nowhere", self.folder, port)

            def refuse():
                with contextlib.suppress(OSError):  # it is closed at the end
                    while True:
                        taken.accept()[0].close()

            thread = threading.Thread(target=refuse)
            thread.start()
            found = next(str(finding) for name, finding in examine(setup) if name == "port")
            taken.shutdown(socket.SHUT_RDWR)
            thread.join()
        self.assertIn(f"127.0.0.1:{port} is in use by pid {os.getpid()} (", found)

    def test_a_check_that_fails(self):
        def fail(setup):
            raise KeyError("\x1b[1mx")

        (_, finding), (_, other) = examine(None, [Check("a", fail), Check("b", lambda setup: Finding("ok", "y"))])
        self.assertEqual(("!!", r"this could not be checked: KeyError: '\x1b[1mx'"), (finding.mark, str(finding)))
        self.assertEqual("y", str(other))


class TestRunning(DoctorCase):
    def test_start(self):
        """The log has one line about what could be better, and none if nothing can be."""
        with FakeDaemon() as daemon, Program(daemon.host) as program:
            line = program.wait_for_line("could be better: ")
            self.assertIn("image store: containerd image store, content from content service: pulls are faster", line)
            program.wait_for_line("store: tidied up")
            self.assertEqual(1, len(program.lines("could be better")))
            self.assertEqual(1, daemon.requests.count("GET /info HTTP/1.1"))
            self.assert_finding((f"ok  port: this registry answers at {program.address}",),
                                make_setup(daemon.path, self.folder, program.port))
        with Program("unix:///nowhere") as program:
            program.wait_for_line("store: tidied up")
            self.assertEqual([], program.lines("could be better"))


class EngineCase(DoctorCase):
    """One class for each engine, so that none is asked while other tests stop it."""

    @classmethod
    def setUpClass(cls):
        lab.require()

    def check(self):
        root = self.engine.folder / "data" if not isinstance(self.engine, lab.Podman) else ""
        found, right = lines(make_setup(self.engine.socket, self.folder, root=root))
        self.assertTrue(right, found)
        self.assertTrue(found["image store"].startswith("ok  "), found)
        self.assertTrue(found["calls"].startswith("ok  "), found)
        self.assertEqual("ok  clock: as Docker's", found["clock"])


for _engine in lab.ENGINES.values():
    _name = f"TestOn_{_engine.name.replace('-', '_')}"
    globals()[_name] = type(_name, (EngineCase,), {"engine": _engine, "test": EngineCase.check})


class TestProxy(EngineCase):
    engine = lab.ENGINES["containerd"]

    def test_in_front_of_a_real_engine(self):
        with lab.filtered(self.engine, b"POST ", answer=lab.FORBIDDEN) as path:
            self.assert_finding(("!!  calls: ", "POST /images/create was answered with status 403"),
                                make_setup(path, self.folder))


if __name__ == "__main__":
    unittest.main()
