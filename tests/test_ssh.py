"""Tests of the ssh chapter: with a stand-in for ssh, and with OpenSSH's own client and server before real engines."""

import concurrent.futures
import contextlib
import hashlib
import http.client
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import lab
from program import COMMAND, MODULE, Program

sys.path.insert(0, str(MODULE.parent))
from k3d_registry_dockerd import Engine, EngineHost, RegistryError


class FolderCase(unittest.TestCase):
    def setUp(self):
        self.stack = contextlib.ExitStack()
        self.addCleanup(self.stack.close)
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))

    def install(self, script):
        """Make a script the ssh of PATH."""
        program = self.folder / "ssh"
        program.write_text(script)
        program.chmod(0o755)
        self.path = f"{self.folder}:{os.environ['PATH']}"
        self.stack.enter_context(mock.patch.dict(os.environ, {"PATH": self.path}))


# A stand-in for ssh. It notes its arguments. On the server, `cat` works, and the docker command says where Docker is.
# Connections to its socket lead to an engine. It fails for the host "nowhere", and never ends for the hosts "slow" and
# "mute", for which it closes its output.
SSH = """#!/usr/bin/env python3
import json, os, socket, sys, threading
with open({log!r}, "a") as log:
    log.write(json.dumps([os.getpid(), *sys.argv[1:]]) + "\\n")
host, command = sys.argv[sys.argv.index("--") + 1:]
if host == "nowhere":
    sys.exit("Warning: noise\\nssh: Could not resolve hostname nowhere: Name or service not known")
if host == "slow":
    print("still trying", file=sys.stderr, flush=True)
    threading.Event().wait()
if host == "mute":
    os.close(1)
    threading.Event().wait()
if command.startswith("docker "):
    sys.exit(print("unix:///found.sock"))
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[sys.argv.index("-L") + 1].partition(":")[0])
listener.listen()
while data := os.read(0, 100):
    os.write(1, data)
"""


class TestStandIn(FolderCase):
    def setUp(self):
        super().setUp()
        self.log = self.folder / "log"
        self.install(SSH.format(log=str(self.log)))

    def calls(self):
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def assert_ended(self):
        """No process that was started for a connection is left."""
        for pid, *_ in self.calls():
            with self.assertRaises(ProcessLookupError):
                os.kill(pid, 0)

    def test_arguments(self):
        for text, host, target in (
                ("ssh://h", ["--", "h"], "/found.sock"),
                ("ssh://me@h:2222", ["-l", "me", "-p", "2222", "--", "h"], "/found.sock"),
                ("ssh://me@[::1]/", ["-l", "me", "--", "::1"], "/found.sock"),
                ("ssh://h/run/my%20d.sock", ["--", "h"], "/run/my d.sock")):
            with self.subTest(text):
                engine_host = EngineHost.parse(text)
                self.assertEqual(text.rstrip("/"), str(engine_host))
                count = len(self.calls()) if self.log.exists() else 0
                for _ in range(2):
                    engine_host.connect(20).close()
                *asked, (_, *call) = self.calls()[count:]
                self.assertEqual([target == "/found.sock"], [bool(asked)])
                self.assertEqual([*host, "cat"], call[-len(host) - 1:])
                self.assertEqual(target, call[call.index("-L") + 1].partition(":")[2])
                self.assertIn("BatchMode=yes", call)
                del engine_host
        self.assert_ended()

    def test_errors(self):
        with self.assertRaises(RegistryError) as caught:
            Engine(EngineHost.parse("ssh://me@nowhere")).info()
        self.assertEqual("UNAVAILABLE", caught.exception.code)
        self.assertRegex(caught.exception.detail, r"ssh://me@nowhere failed: .*Name or service not known\. To.*"
                                                  "run: ssh .*-l me -- nowhere docker version")
        self.assertEqual(1, caught.exception.detail.count("not known"))
        with mock.patch.dict(os.environ, {"PATH": "/nowhere"}), self.assertRaises(RegistryError) as caught:
            Engine(EngineHost.parse("ssh://h")).info()
        self.assertRegex(caught.exception.detail, "failed: .*No such file or directory: 'ssh'")

    def test_an_ssh_that_hangs_is_ended(self):
        self.assertRaisesRegex(OSError, "timed out still trying", EngineHost.parse("ssh://slow").connect, 1)
        self.assert_ended()

    def test_an_ssh_that_closes_its_output_is_ended(self):
        self.assertRaisesRegex(OSError, "ssh said nothing", EngineHost.parse("ssh://mute").connect, 20)
        self.assert_ended()

    def test_many_descriptors(self):
        """Each client has a descriptor, and so those of ssh may be above the 1023 that select() takes."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        with contextlib.ExitStack() as others:
            while others.enter_context(open(os.devnull)).fileno() < 1024:
                pass
            EngineHost.parse("ssh://h").connect(20).close()

    def test_a_failure_is_shared(self):
        """Those who ask while ssh is started do not start it once more when that has failed."""
        host = EngineHost.parse("ssh://slow")
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            asked = [pool.submit(host.connect, 1) for _ in range(20)]
            self.assertEqual({"timed out still trying"}, {str(each.exception()) for each in asked} - {"timed out"})
        self.assertEqual(1, len(self.calls()))

    def test_last_words(self):
        """Each row: what ssh said, and what is shown of that."""
        tunnel = EngineHost.parse("ssh://h").tunnel
        for text, expected in (
                ("", ""), ("\n  one \n\ntwo.\n", "one; two"), ("a\x1bb", r"a\x1bb"), ("x" * 500, "x" * 20),
                ("forgotten\none more line\nlast line.", "last line"), ("a" * 5000 + "\nb", "b")):
            with self.subTest(text[:20]):
                (tunnel._folder / "errors").write_text(text)
                self.assertEqual(expected, tunnel._last_words(20))


class TestOpenSsh(FolderCase):
    """OpenSSH's own client and server."""

    engine = lab.ENGINES["containerd"]

    @classmethod
    def setUpClass(cls):
        lab.require()
        if not shutil.which("ssh"):
            lab.lacking("no ssh command: install openssh-client")
        if not (lab.CLIENT_ROOT / "usr/sbin/sshd").exists():
            lab.lacking("no OpenSSH server in the lab: run `python tests/lab.py up` again")

    def setUp(self):
        super().setUp()
        self.server = self.stack.enter_context(lab.SshServer())
        # ssh reads the files of the user's home folder, which it does not take from HOME.
        self.install(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {self.server.config} "$@"\n')
        # A temporary folder with a path as long as on macOS: sockets must have short names.
        self.temporary = self.folder / ("x" * (48 - len(str(self.folder))))
        self.temporary.mkdir()

    @contextlib.contextmanager
    def program(self, socket="/lab/containerd/docker.sock", **constants):
        """Run a program whose Docker is behind the server; check that nothing is left of it, and of its ssh."""
        url = f"ssh://lab{socket}"
        with Program(url, env={"PATH": self.path, "TMPDIR": str(self.temporary)}, constants=constants,
                     command=COMMAND) as program:  # the end of its interpreter ends ssh
            yield program
        lab.wait_for("the end of every ssh", lambda: not self.processes(), 20)
        self.assertEqual([], list(self.temporary.iterdir()))

    def processes(self):
        """Return the command lines of the processes of ssh that a program has started."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                found.append(path.read_bytes())
        return [line for line in found if str(self.temporary).encode() in line]

    @staticmethod
    def pull(program, name="base"):
        """Pull an image as a node does, without unpacking: return the first answer that is no success, or the last."""
        answer = program.get(f"/v2/library/{name}/manifests/1?ns=docker.io")
        if answer.status == 200:
            for part in (answer.json["config"], *answer.json["layers"]):
                answer = program.get(f"/v2/library/{name}/blobs/{part['digest']}?ns=docker.io")
                if answer.status != 200:
                    break
                assert part["digest"] == f"sha256:{hashlib.sha256(answer.body).hexdigest()}"
        return answer

    def test_pull(self):
        """Everything that the program asks goes over one connection, gRPC included."""
        for name, sources in (("containerd", "store, content service"), ("classic", "store, export")):
            with self.subTest(name), self.program(f"/lab/{name}/docker.sock") as program:
                program.wait_for_line(f"Docker is at ssh://lab/lab/{name}/docker.sock (from DOCKER_HOST)")
                before = self.server.connections()
                for _ in range(3):
                    self.assertEqual(200, self.pull(program).status, program.log)
                line = program.wait_for_line(f"{name} image store; content from: ")
                self.assertTrue(line.endswith(f"content from: {sources}"), line)
                self.assertIsNone(program.get("/status").json["engine"]["advice"], "its files are not on this machine")
                self.assertTrue(self.processes())
            self.assertEqual(before + 1, self.server.connections())

    def test_docker_pulls(self):
        """Several clients ask for an image that Docker does not have: one pull through the tunnel, for all of them."""
        origin, name = lab.ORIGINS["open"], f"tunnelled-{os.getpid()}"
        lab.push_platforms(origin, name, "1", ["amd64"], [("data", os.urandom(3_000_000))])
        self.stack.callback(self.engine.remove, f"{origin.host}/{name}:1")
        with self.program() as program, concurrent.futures.ThreadPoolExecutor(8) as pool:
            path = f"/v2/{name}/manifests/1?ns={origin.host}"
            answers = list(pool.map(lambda _: program.get(path), range(8)))
            self.assertEqual({200}, {answer.status for answer in answers}, program.log)
            self.assertEqual(1, len(program.jobs("pull")))
            lab.NODE.forget()
            lab.NODE.fetch(f"{origin.host}/{name}:1", program.address)  # a real node takes all of it

    def test_many_clients(self):
        """More at the same time than a server allows on one connection, or lets connect."""
        with self.program() as program, concurrent.futures.ThreadPoolExecutor(30) as pool:
            answers = list(pool.map(lambda _: self.pull(program), range(30)))
        self.assertEqual([200] * 30, [answer.status for answer in answers], program.log)

    def test_many_sessions(self):
        with mock.patch.object(tempfile, "tempdir", str(self.temporary)), contextlib.ExitStack() as stack:
            host = EngineHost.parse(f"ssh://lab{self.engine.inside}/docker.sock")

            def ping(_):
                connection = host.http(60)
                stack.callback(connection.close)
                connection.request("GET", "/_ping")
                return connection.getresponse().read()

            with concurrent.futures.ThreadPoolExecutor(30) as pool:
                self.assertEqual({b"OK"}, set(pool.map(ping, range(30))))
            self.assertEqual(1, self.server.connections())

    def test_docker_is_asked_where_it_is(self):
        """The address names no socket: the docker command on the server has a DOCKER_HOST."""
        self.server.restart(f"SetEnv DOCKER_HOST={self.engine.host}\n")
        with self.program("") as program:
            self.assertEqual(200, self.pull(program).status, program.log)

    def test_nothing_is_left_after_a_kill(self):
        with self.program() as program:
            self.assertEqual(200, self.pull(program).status, program.log)
            self.assertTrue(self.processes())
            program.stop(signal.SIGKILL)
            lab.wait_for("the end of every ssh", lambda: not self.processes(), 20)
            (left,) = self.temporary.iterdir()
            shutil.rmtree(left)

    def test_errors(self):
        """Each row: what is wrong, what ssh or the far side says about that, and how it is mended."""
        server = self.server
        host, user = server.public("host"), server.public("user")
        forced, narrow = f'command="nothing-like-this" {user}', f"restrict {user}"
        for name, spoil, said, mend in (
                ("no server", server.stop, "connect to host 127.0.0.1 port .* Connection refused", server.start),
                ("unknown", lambda: server.know(""), "Host key verification failed", lambda: server.know(host)),
                ("changed", lambda: server.know(user), "Host key for .* has changed", lambda: server.know(host)),
                ("refused", lambda: server.let_in(""), r"Permission denied \(publickey", lambda: server.let_in(user)),
                ("forced", lambda: server.let_in(forced), "nothing-like-this: .*not found",
                 lambda: server.let_in(user)),
                ("narrow", lambda: server.let_in(narrow), "open failed.*forbids forwarding",
                 lambda: server.let_in(user))):
            spoil()
            with self.subTest(name), self.program() as program:
                answer = self.pull(program)
                self.assertEqual((503, "UNAVAILABLE"), (answer.status, answer.code))
                self.assertRegex(answer.detail, f"ssh://lab/.* failed: .*{said}.* run: ssh .*-- lab docker")
                self.assertRegex(program.wait_for_line(" 503 "), said)
                mend()
                if name == "narrow":  # a connection that stands has what it was let in with
                    server.restart()
                self.assertEqual(200, self.pull(program).status, program.log)
        with self.program("/lab/nowhere.sock") as program:
            self.assertRegex(self.pull(program).detail, "failed: .*open failed.*is not there")

    def test_server_is_stopped_and_comes_back(self):
        data = os.urandom(64_000_000)
        self.engine.import_image("tunnelled:1", {"data": data})
        self.stack.callback(self.engine.remove, "tunnelled:1")
        with self.program() as program:
            manifest = program.get("/v2/library/tunnelled/manifests/1?ns=docker.io").json
            (layer,) = manifest["layers"]
            response = program.begin_get(f"/v2/library/tunnelled/blobs/{layer['digest']}?ns=docker.io")
            self.assertEqual(1000, len(response.read(1000)))
            self.server.stop()
            self.assertRaises((http.client.IncompleteRead, ConnectionError), response.read)
            answer = self.pull(program, "tunnelled")
            self.assertEqual(503, answer.status)
            self.assertRegex(answer.detail, "Connection refused")
            self.server.start()
            self.assertEqual(200, self.pull(program, "tunnelled").status, program.log)

    def test_server_hangs(self):
        """It is as with a network that is lost: nothing comes, and nothing is refused."""
        with self.program(ENGINE_TIMEOUT=3) as program:
            self.assertEqual(200, self.pull(program).status)
            self.server.signal(signal.SIGSTOP)
            try:
                answer = self.pull(program)
                self.assertEqual(503, answer.status)
                self.assertRegex(answer.detail, "failed: timed out")
            finally:
                self.server.signal(signal.SIGCONT)
            self.assertEqual(200, self.pull(program).status, program.log)


if __name__ == "__main__":
    unittest.main()
