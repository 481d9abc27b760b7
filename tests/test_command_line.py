"""The program as a process: arguments, environment, signals, and Docker not running."""

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import unittest
import zipapp
from pathlib import Path

from fake_daemon import FakeDaemon, Image, http_answer
from program import COMMAND, MODULE, Program
from program import environment as inherited
from program import run as run_import
from test_behaviour import wait_until

sys.path.insert(0, str(MODULE.parent))
from k3d_registry_dockerd import COMMANDS, Address

OURS = ("REGISTRY_", "DOCKER_")


def run(*arguments, command=(sys.executable, str(MODULE)), **environment):
    """Run the program to its end with only these environment variables."""
    clean = {name: value for name, value in inherited().items() if not name.startswith(OURS)}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60,
                          env={**clean, **environment})


# Runs the program to its end for each of many arguments and variables, in one process, as far as that gets.
RUN_ALL = """
import contextlib, io, json, os, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import k3d_registry_dockerd as module
clean, results = dict(os.environ), []
for arguments, environment in json.load(sys.stdin):
    os.environ.clear()
    os.environ.update(clean | environment)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            status = module.main(arguments)
        except SystemExit as e:
            status = e.code
    results.append((status, out.getvalue(), err.getvalue()))
json.dump(results, sys.stdout)
"""


def run_all(cases):
    """Return (exit status, standard output, standard error) for each (arguments, variables)."""
    clean = {name: value for name, value in inherited().items() if not name.startswith(OURS)}
    result = subprocess.run([sys.executable, "-c", RUN_ALL, str(MODULE)], input=json.dumps(cases), check=True,
                            capture_output=True, text=True, timeout=120, env=clean)
    return json.loads(result.stdout)


class CommandCase(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def program(self, docker_host, *arguments, **options):
        program = Program(docker_host, *arguments, **options)
        self.addCleanup(program.__exit__)
        return program


class TestInvalidSettings(CommandCase):
    def test_one_line_and_status_2(self):
        file = self.folder / "file"
        file.touch()
        cases = (
            (["-addr", "nonsense"], {}, "'nonsense' is not an address"),
            (["-addr", "host:99999"], {}, "'host:99999' is not an address"),
            (["-addr", "[::zz]:1"], {}, "[::zz]:1"),
            ([], {"REGISTRY_HTTP_ADDR": "5000"}, "REGISTRY_HTTP_ADDR='5000' is not an address"),
            ([], {"DOCKER_HOST": "npipe:////./pipe/x"}, "DOCKER_HOST is not supported"),
            ([], {"DOCKER_HOST": "tcp://host:port"}, "DOCKER_HOST"),
            ([], {"DOCKER_HOST": "tcp://h:1", "DOCKER_TLS_VERIFY": "1", "DOCKER_CERT_PATH": str(self.folder)},
             "DOCKER_CERT_PATH"),
            (["-store", str(file)], {}, "is not a folder"),
            (["-store", str(file / "below")], {}, "is not a folder"),
            ([], {"REGISTRY_STORAGE_FILESYSTEM_ROOTDIRECTORY": str(file)}, "is not a folder"),
            (["-max-connections", "0"], {}, "'0' is not a whole number above 0"),
            (["-max-connections", "1e3"], {}, "'1e3' is not a whole number above 0"),
            (["-allow-origin", "*"], {}, "'*' is not an origin"),
            (["-allow-origin", "localhost:8080"], {}, "'localhost:8080' is not an origin"),
            (["-allow-origin", "http://x/y"], {}, "'http://x/y' is not an origin"),
            (["-tls-key", str(file)], {}, "-tls-certificate"),
            (["-tls-key", str(file), "-tls-certificate", str(file)], {}, "cannot be used"),
            ([], {"REGISTRY_HTTP_TLS_CERTIFICATE": str(file)}, "REGISTRY_HTTP_TLS_KEY"),
            ([], {"REGISTRY_STORAGE_MAINTENANCE_READONLY_ENABLED": "maybe"}, "neither true nor false"),
            (["-pull", "often"], {}, "-pull 'often' is not known: use missing, always or never"),
            ([], {"K3D_REGISTRY_DOCKERD_STORE_LIMIT": "big"}, "_STORE_LIMIT='big' is not a size"),
            ([], {"REGISTRY_LOG_LEVEL": "loud"}, "use debug, info, warn or error"),
            (["-env-file", "/nowhere"], {}, "the settings file /nowhere does not exist"),
            ([], {"REGISTRY_HTTP_HEADERS_X-A": "[a"}, "REGISTRY_HTTP_HEADERS_X-A='[a' is not a list"),
            ([], {"REGISTRY_HTTP_HEADERS_X-A": r'["\r"]'}, "is not a header"),
            ([], {"REGISTRY_HTTP_HEADERS_Access-Control-Allow-Origin": "[x]"}, "is not an origin"),
            (["-allow", "corp"], {}, "-allow 'corp'"), (["-allow", ""], {}, "-allow is empty"),
            (["-allow", "a/b.c"], {}, "-allow 'a/b.c'"),
            (["-frobnicate"], {}, "unrecognized arguments: -frobnicate"),
            (["extra"], {}, "'extra' is not a command: use serve, check, "), (["\x1b[1m"], {}, r"'\\x1b[1m'"),
            (["extra"], {}, "(see k3d-registry-dockerd -h)"), ([""], {}, "unrecognized arguments"),
            (["check", "-repair"], {}, "unrecognized arguments: -repair (see k3d-registry-dockerd check -h)"),
            (["check", "-addr", "x"], {}, "'x' is not an address"),
            (["-addr"], {}, "expected one argument"), (["-addr", ""], {}, "-addr is empty"),
            (["-docker-root="], {}, "-docker-root is empty"),
            ([], {"REGISTRY_PROXY_REMOTEURL": "not a url"}, "REGISTRY_PROXY_REMOTEURL"),
            ([], {"REGISTRY_STORAGE_DELETE_ENABLED": "perhaps"}, "REGISTRY_STORAGE_DELETE_ENABLED='perhaps'"))
        results = run_all([case[:2] for case in cases])
        for (arguments, environment, expected), (status, out, err) in zip(cases, results, strict=True):
            with self.subTest(arguments=arguments, environment=environment):
                self.assertEqual((2, ""), (status, out), err)
                self.assertIn(expected, err)
                self.assertEqual(1, err.count("\n"), err)

    def as_other(self, user):
        """Return the command of the program as another user, with a copy of it in a folder that all may read."""
        if os.geteuid():
            self.skipTest("only root can change the user")
        self.folder.chmod(0o755)
        program = self.folder / MODULE.name
        program.write_bytes(MODULE.read_bytes())
        other = ("setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups")
        commands = ((*other, python, str(program)) for python in (sys.executable, "/usr/bin/python3"))
        command = next((command for command in commands if not run("-version", command=command).returncode), None)
        if command is None:
            self.skipTest("there is no Python that other users may run")
        return command

    def test_home(self):
        """There may be none, as of a user whom the system does not know; and it may belong to another user."""
        (self.folder / "closed").mkdir(mode=0o700)
        (self.folder / "open").mkdir()
        (self.folder / "open").chmod(0o777)
        for user, home in ((65534, str(self.folder / "closed")), (64999, None)):
            with self.subTest(user):
                # What Program or the environment sets is not passed on.
                command = ("env", "-u", "DOCKER_CONFIG", *(("-u", "HOME") if home is None else (f"HOME={home}",)),
                           *self.as_other(user))
                program = self.program("unix:///nowhere", command=command, store=self.folder / "open/store")
                self.assertEqual(202, program.request("POST", "/v2/app/blobs/uploads/").status)
                self.assertEqual(0, program.stop())
                self.assertEqual([], program.lines("Traceback"))
                subprocess.run(["rm", "-r", str(self.folder / "open/store")], check=True)
                result = run("check", "-addr", "127.0.0.1:1", command=command)
                self.assertEqual((1, ""), (result.returncode, result.stderr))

    def test_unusable_store(self):
        """A store that cannot be read is an error of one line. One that cannot be written to is a warning."""
        command = self.as_other(65534)
        (self.folder / "closed").mkdir(mode=0o700)
        (self.folder / "readable").mkdir(mode=0o755)
        result = run("-store", str(self.folder / "closed/store"), command=command, HOME="/nowhere")
        self.assertEqual(2, result.returncode, result.stderr)
        self.assertIn("cannot be used: Permission denied", result.stderr)
        self.assertEqual(1, result.stderr.count("\n"), result.stderr)
        running = self.program("unix:///nowhere", command=command, store=self.folder / "readable/store",
                               env={"HOME": "/nowhere"})
        running.wait_for_line(f"the store {running.store} (from -store) is not writable")

    def test_address_in_use(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            address = "127.0.0.1:{}".format(taken.getsockname()[1])  # noqa: UP032
            result = run("-addr", address, "-store", str(self.folder / "store"))
        self.assertEqual(1, result.returncode)
        self.assertIn(f"cannot listen on {address} (from -addr): Address already in use", result.stderr)
        self.assertEqual(1, result.stderr.count("\n"), result.stderr)

    def test_version_and_help(self):
        cases = (("-version", "k3d-registry-dockerd "), ("--version", "k3d-registry-dockerd "),
                 ("-h", "REGISTRY_HTTP_ADDR"), ("--help", "DOCKER_HOST"))
        results = run_all([([flag], {}) for flag, _ in cases])
        for (flag, expected), (status, out, err) in zip(cases, results, strict=True):
            with self.subTest(flag):
                self.assertEqual((0, ""), (status, err))
                self.assertIn(expected, " ".join(out.split()))

    def test_help_of_commands(self):
        overview = run("-h").stdout
        commands = [*COMMANDS.keys() - {"serve"}]
        results = run_all([([name, "-h"], {}) for name in commands])
        for command, (status, out, err) in zip(commands, results, strict=True):
            with self.subTest(command):
                self.assertIn(f"\n  {command} ", overview)
                self.assertEqual((0, ""), (status, err))
                self.assertIn(f"example: k3d-registry-dockerd {command}", out)
                self.assertLess(out.count("\n"), 30)

    def test_output_that_nobody_reads(self):
        result = subprocess.run(["sh", "-c", '"$0" "$@" | true', sys.executable, str(MODULE), "doctor"],
                                capture_output=True, text=True, check=False, env=inherited(DOCKER_HOST="unix:///no"))
        self.assertEqual("", result.stderr)

    def test_characters_that_the_locale_lacks(self):
        """They are escaped. The texts of doctor have some, and so may have the name of a folder."""
        store = self.folder / os.fsdecode(b"\xff")
        (store / "blobs/sha256").mkdir(parents=True)
        (store / "blobs/sha256" / ("0" * 64)).write_text("damaged")
        for locale in ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"LC_ALL": "C.UTF-8"}):
            for arguments, expected in ((("doctor",), "!!  socket: "), (("verify", "-store", str(store)), r"\udcff")):
                with self.subTest(arguments, **locale):
                    result = run(*arguments, command=COMMAND, DOCKER_HOST="unix:///nowhere", **locale)
                    self.assertEqual(1, result.returncode)
                    self.assertIn(expected, result.stdout)
                    self.assertNotIn("Traceback", result.stderr)

    def test_closed_streams(self):
        """What the caller has closed is opened again, and not with a connection or a file of the store."""
        for closed in ((0, 1, 2), (1,), (2,)):
            with self.subTest(closed):
                script = " ".join(f"{number}>&-" if number else "<&-" for number in closed)
                nobody = ("-addr", "127.0.0.1:1")
                for arguments, status in ((("check", *nobody), 1), (("status", "-watch", *nobody), 1),
                                          (("config", "k3s", *nobody), 0)):
                    result = run("-c", f'"$0" "$@" {script}', *COMMAND, *arguments, command=("sh",),
                                 DOCKER_HOST="unix:///nowhere")
                    self.assertEqual((status, ""), (result.returncode, result.stderr), arguments)
                with socket.create_server(("127.0.0.1", 0)) as free:
                    port = free.getsockname()[1]
                process = subprocess.Popen(
                    ["sh", "-c", f'exec "$0" "$@" {script}', *COMMAND, "-addr", f"127.0.0.1:{port}", "-store",
                     str(self.folder / "store")], env=inherited(DOCKER_HOST="unix:///nowhere"),
                    stderr=subprocess.DEVNULL)
                self.addCleanup(process.wait)
                self.addCleanup(process.kill)
                checked = ("check", "-addr", f"127.0.0.1:{port}")
                wait_until(lambda: not run(*checked, command=COMMAND).returncode)  # noqa: B023
                links = [str(Path(f"/proc/{process.pid}/fd/{number}").readlink()) for number in closed]
                self.assertEqual([os.devnull] * len(closed), links)
                process.send_signal(signal.SIGTERM)
                self.assertEqual(0, process.wait(timeout=60))

    def test_zipapp(self):
        (self.folder / "app").mkdir()
        (self.folder / "app" / "__main__.py").write_bytes(MODULE.read_bytes())
        archive = self.folder / "app.pyz"
        zipapp.create_archive(self.folder / "app", archive)
        self.assertEqual(2, run("-addr", "x", command=(sys.executable, str(archive))).returncode)
        program = self.program("unix:///nowhere", command=[sys.executable, str(archive)])
        self.assertEqual(200, program.get("/v2/").status)
        self.assertEqual(0, program.stop())


class TestRunning(CommandCase):
    def test_precedence(self):
        program = self.program("unix:///nowhere", env={"REGISTRY_HTTP_ADDR": "127.0.0.1:1",
                                                       "REGISTRY_STORAGE_FILESYSTEM_ROOTDIRECTORY": "/nowhere"})
        self.assertIn("(from -addr, REGISTRY_HTTP_ADDR=127.0.0.1:1 is ignored)", program.lines("listening on")[0])
        self.assertIn("(from -store, REGISTRY_STORAGE_FILESYSTEM_ROOTDIRECTORY=/nowhere is ignored)",
                      program.lines("store: ")[0])

    def test_variables_of_k3d(self):
        program = self.program("unix:///nowhere", env={
            "REGISTRY_PROXY_REMOTEURL": "https://registry.example", "REGISTRY_PROXY_USERNAME": "joe",
            "REGISTRY_PROXY_PASSWORD": "hunter2", "REGISTRY_STORAGE_DELETE_ENABLED": "true"})
        program.wait_for_line("REGISTRY_PROXY_REMOTEURL is not used")
        program.wait_for_line("REGISTRY_PROXY_USERNAME and _PASSWORD are not used")
        self.assertEqual([], program.lines("hunter2"))
        program = self.program("unix:///nowhere", env={"REGISTRY_PROXY_REMOTEURL": "*"})
        self.assertEqual([], program.lines("REMOTEURL"))

    def test_signals_end_the_program(self):
        for how in (signal.SIGTERM, signal.SIGINT):
            with self.subTest(how.name):
                program = self.program("unix:///nowhere")
                self.assertEqual(0, program.stop(how))
                program.wait_for_line(f"ending on {how.name}")

    def test_addresses(self):
        for address, client in (("127.0.0.1:0", "127.0.0.1"), (":0", "127.0.0.1"), ("localhost:0", "127.0.0.1"),
                                ("[::1]:0", "::1"), (":0", "::1")):
            with self.subTest(address):
                if ":" in client and not socket.has_ipv6:
                    self.skipTest("no IPv6 here")
                program = self.program("unix:///nowhere", "--addr", address)
                with socket.create_connection((client, program.port)) as connection:
                    connection.sendall(b"GET /v2/ HTTP/1.0\r\n\r\n")
                    self.assertTrue(connection.makefile("rb").readline().startswith(b"HTTP/1.1 200"))

    def test_check(self):
        program = self.program("unix:///nowhere")
        for address, status, output in ((program.address, 0, "healthy\n"),
                                        ("127.0.0.1:1", 1, "no answer from 127.0.0.1:1")):
            with self.subTest(address):
                for command in ("-check", "check"):
                    result = run_import(command, "-addr", address)
                    self.assertEqual(status, result.returncode)
                    self.assertTrue(result.stdout.startswith(output), result.stdout)

    def test_check_finds_the_server(self):
        """It runs under a name of its own here, as the only one in a container would: other tests start servers too."""
        script = self.folder / f"{self.folder.name}.py"
        script.write_text(f"import sys\nsys.path.insert(0, {str(MODULE.parent)!r})\n"
                          "import k3d_registry_dockerd as module\nsys.exit(module.main())\n")
        command = (sys.executable, str(script))
        nobody = {"REGISTRY_HTTP_ADDR": "127.0.0.1:1"}
        self.assertEqual(1, run("check", command=command, **nobody).returncode)
        for address in ("[::1]:0", "0.0.0.0:0", ":0"):
            with self.subTest(address):
                program = self.program("unix:///nowhere", "-addr", address, command=command)
                self.assertEqual("healthy\n", run("check", command=command, **nobody).stdout)
                if address != ":0":
                    program.stop()
        self.program("unix:///nowhere", command=command)
        result = run("check", command=command, **nobody)  # there are two, and this one is not told which
        self.assertIn("no answer from 127.0.0.1:1", result.stdout)
        self.assertEqual("healthy\n", run("check", "-addr", program.address, command=command).stdout)

    def test_log_of_probes_and_addresses(self):
        for level, count in (("info", 0), ("debug", 4)):
            program = self.program("unix:///nowhere", "-addr", ":0", "-log-level", level)
            self.assertEqual("healthy\n", run_import("check", "-addr", f"127.0.0.1:{program.port}").stdout)
            for path in ("/livez", "/readyz?verbose", "/healthz"):
                program.get(path)
            program.get("/v2/")  # not a probe
            program.wait_for_line(" INFO    GET /v2/ 200")
            self.assertEqual(count, sum(" DEBUG " in line and "GET /" in line for line in program.log), program.log)
            self.assertEqual(count + 1, len([*filter(lambda line: re.search(r" GET /.* 127\.0\.0\.1\b", line),
                                                     program.log)]), program.log)
            self.assertEqual([], program.lines("::ffff:"))

    def test_podman_is_called_podman(self):
        with FakeDaemon() as daemon:
            daemon.faults["/version "] = http_answer(200, {
                "Version": "5.8", "ApiVersion": "1.41", "Components": [{"Name": "Podman Engine"}]})
            program = self.program(daemon.host)
            program.wait_for_line("Podman 5.8, API 1.41")
            answer = program.get("/v2/docker/manifests/Docker")
            self.assertIn("Podman has no image docker:Docker, and", answer.detail)
            program.wait_for_line("MANIFEST_UNKNOWN: Podman has no image docker:Docker")
            known = program.log.index(program.lines("Podman 5.8")[0])
            self.assertEqual([], [line for line in program.log[known:] if " Docker " in line])

    def test_check_with_tls(self):
        """A certificate that was renewed is used after SIGHUP; one that cannot be used leaves the old one."""
        try:
            import trustme
            from cryptography.hazmat.primitives import serialization
        except ImportError:
            self.skipTest("no trustme")
        files = [str(self.folder / name) for name in ("certificate", "key")]

        def renew():
            certificate = trustme.CA().issue_cert("registry.example")
            certificate.cert_chain_pems[0].write_to_path(files[0])
            certificate.private_key_pem.write_to_path(files[1])
            return certificate.cert_chain_pems[0].bytes().decode()

        def encrypt():
            key = serialization.load_pem_private_key(Path(files[1]).read_bytes(), None)
            Path(files[1]).write_bytes(key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(b"secret")))

        first = renew()
        program = self.program("unix:///nowhere", "-tls-certificate", files[0], "-tls-key", files[1])
        self.assertEqual("healthy\n", run("check", "-addr", program.address).stdout)
        self.assertEqual([], program.lines("WARNING"))
        for command in (("config", "k3s"), ("status",)):  # which do not know the flags of the server
            found = run(*command, "-addr", program.address, DOCKER_HOST="unix:///nowhere").stdout
            self.assertRegex(found, rf"- https://[\w.]+:{program.port}\n")
        Path(files[0]).write_text("nonsense")
        program.process.send_signal(signal.SIGHUP)
        program.wait_for_line("SIGHUP: the settings stay as they are: the TLS certificate")
        renew()
        encrypt()
        program.process.send_signal(signal.SIGHUP)
        program.wait_for_line("cannot be used: the key has a passphrase")
        address = ("127.0.0.1", program.port)
        self.assertEqual(first, ssl.get_server_certificate(address))
        second = renew()
        program.process.send_signal(signal.SIGHUP)
        program.wait_for_line("SIGHUP: the TLS certificate and key were read again")
        self.assertEqual(second, ssl.get_server_certificate(address))

    def test_control_c_ends_a_command_quietly(self):
        with socket.create_server(("127.0.0.1", 0)) as silent:
            process = subprocess.Popen(
                [sys.executable, str(MODULE), "check", "-addr", "127.0.0.1:{}".format(silent.getsockname()[1])],  # noqa: UP032
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # it may be ignored here
            connection, _ = silent.accept()
            with connection:
                process.send_signal(signal.SIGINT)
                self.assertEqual(("", ""), process.communicate(timeout=60))
        self.assertEqual(130, process.returncode)

    def test_without_docker(self):
        """The program runs, gives the reason, and serves images as soon as Docker responds."""
        path = self.folder / "docker.sock"
        program = self.program(f"unix://{path}")
        pull = "/v2/library/app/manifests/1?ns=docker.io"
        self.assert_unavailable(program, pull, f"{path} does not exist", "mount it with -v")
        self.assertEqual(200, program.get("/v2/").status)
        with socket.socket(socket.AF_UNIX) as unused:
            unused.bind(str(path))
        self.assert_unavailable(program, pull, "connection refused", "Docker was started again since: restart this")
        path.unlink()
        with FakeDaemon() as daemon:
            image = daemon.add("app:1", Image())
            path.symlink_to(daemon.path)
            answer = program.get(pull)
            self.assertEqual((200, image.manifest), (answer.status, answer.body))
        self.assert_unavailable(program, pull, "Docker cannot be reached")

    @unittest.skipUnless(os.geteuid(), "root ignores file permissions")
    def test_permission_denied(self):
        with FakeDaemon() as daemon:
            Path(daemon.path).chmod(0)
            self.assert_unavailable(self.program(daemon.host), "/v2/a/manifests/1", "permission denied")

    def assert_unavailable(self, program, path, *reasons):
        answer = program.get(path)
        self.assertEqual((503, "UNAVAILABLE"), (answer.status, answer.code))
        for reason in reasons:
            self.assertIn(reason, answer.detail)
            program.wait_for_line(reason)


class TestParsing(unittest.TestCase):
    def test_addresses(self):
        for text, host, port in ((":5000", "", 5000), ("127.0.0.1:0", "127.0.0.1", 0), ("[::1]:80", "::1", 80),
                                 ("host.example:65535", "host.example", 65535)):
            with self.subTest(text):
                self.assertEqual(Address(host, port), Address.parse(text))
                self.assertEqual(text, str(Address.parse(text)))
        for text in ("", ":", "5000", "host", "host:", "host:65536", "::1:5000", "[::1]", "a b:1", "http://x:1", ":-1"):
            with self.subTest(text), self.assertRaises(ValueError):
                Address.parse(text)


if __name__ == "__main__":
    unittest.main()
