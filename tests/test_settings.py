"""Settings: flags, variables and the settings file; what is logged of them, and what SIGHUP changes."""

import contextlib
import hashlib
import json
import re
import signal
import sys
import tempfile
import unittest
from pathlib import Path

from program import MODULE, Program

sys.path.insert(0, str(MODULE.parent))
import k3d_registry_dockerd as module
from k3d_registry_dockerd import COMMANDS, SETTINGS, Settings

README = (MODULE.parent / "README.md").read_text()
GOOD = {"-addr": "127.0.0.1:7", "-pull": "never", "-docker-root": "/x", "-allow": "docker.io", "-read-only": "true",
        "REGISTRY_STORAGE_DELETE_ENABLED": "false", "-store": "/tmp/there/is/no/store", "-store-limit": "2GB",
        "-untagged-age": "7d", "-no-sync": "1", "-max-connections": "7", "-allow-origin": "http://x:1",
        "-log-level": "warn", "-log-format": "json", "-warm": "alpine"}


class SettingsCase(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.file = self.folder / "settings.env"

    def read(self, *arguments, **environ):
        """Return the settings that serving would use."""
        parsed = COMMANDS["serve"].parser("serve").parse_args(arguments)
        return Settings(parsed, {"DOCKER_HOST": "unix:///nowhere", **environ})

    def from_file(self, *lines, **environ):
        self.file.write_text("\n".join(lines))
        return self.read("-env-file", str(self.file), **environ)


class TestSources(SettingsCase):
    def test_every_setting_in_every_way(self):
        for setting in SETTINGS:
            if setting.flag in ("env-file", "warm-file") or setting.name.startswith("-tls"):
                continue
            text = GOOD[setting.name]
            expected = self.from_file(f"{setting.variable}={text}").values[setting.name]
            with self.subTest(setting.name):
                self.assertNotEqual(setting.unset, expected.value)
                self.assertEqual(expected.value, self.read(**{setting.variable: text}).values[setting.name].value)
                self.assertEqual(f"from {setting.variable} (line 1 of {self.file})", expected.origin)
                for dashes in ("-", "--") if setting.flag else ():
                    found = self.read(f"{dashes}{setting.flag}={text}").values[setting.name]
                    self.assertEqual((expected.value, f"from {setting.name}"), (found.value, found.origin))

    def test_flag_over_variable_over_file_over_default(self):
        name, place = "K3D_REGISTRY_DOCKERD_PULL", f" (line 3 of {self.file})"
        self.file.write_text(f"# a comment\n\n{name}=always\n")
        file = ("-env-file", str(self.file))
        for arguments, environ, policy, origin in (
                ((), {}, "missing", "from the default"),
                (file, {}, "always", f"from {name}{place}"),
                ((), {"K3D_REGISTRY_DOCKERD_ENV_FILE": str(self.file)}, "always", f"from {name}{place}"),
                (file, {name: ""}, "always", f"from {name}{place}"),
                (file, {name: "never"}, "never", f"from {name}, {name}=always{place} is ignored"),
                ((*file, "-pull", "missing"), {name: "never"}, "missing",
                 f"from -pull, {name}=never is ignored, {name}=always{place} is ignored")):
            with self.subTest(arguments=arguments, environ=environ):
                settings = self.read(*arguments, **environ)
                self.assertEqual((policy, origin), (settings.pulls.policy, settings.values["-pull"].origin))

    def test_file(self):
        settings = self.from_file(
            "export REGISTRY_HTTP_ADDR=':7'", 'K3D_REGISTRY_DOCKERD_ALLOW="docker.io, *.corp.example"',
            "  REGISTRY_LOG_LEVEL=debug \r", "DOCKER_HOST=tcp://h:7", "REGISTRY_PROXY_REMOTEURL=*", "#X", "TYPO=1",
            "REGISTRY_STORAGE_DELETE_ENABLED=false", K3D_REGISTRY_DOCKERD_TYPO="1", DOCKER_HOST="")
        self.assertEqual((7, ("docker.io", "*.corp.example"), "debug", "tcp://h:7", False), (
            settings.address.port, settings.pulls.allowed, settings.log_level, str(settings.engine),
            settings.policy.deletes))
        self.assertEqual([f"TYPO (line 7 of {self.file}) is not a setting of this program",
                          "K3D_REGISTRY_DOCKERD_TYPO is not a setting of this program"], list(settings.notes)[-2:])

    def test_words_in_capitals(self):
        settings = self.read("-pull", "Always", REGISTRY_LOG_LEVEL="DEBUG", REGISTRY_LOG_FORMATTER="JSON")
        self.assertEqual(("always", "debug", "json"), (settings.pulls.policy, settings.log_level, settings.log_format))

    def test_lines(self):
        """They end as in all files, and there may be a mark of the encoding, as Windows' Notepad writes it."""
        for content in (b"\xef\xbb\xbfREGISTRY_LOG_LEVEL=debug\r\n", b"#a\x0bb\x0cc\nREGISTRY_LOG_LEVEL=debug",
                        "# a\u2028b\x85c\rREGISTRY_LOG_LEVEL=debug".encode()):
            with self.subTest(content):
                self.file.write_bytes(content)
                self.assertEqual("debug", self.read("-env-file", str(self.file)).log_level)

    def test_invalid_files(self):
        for content, expected in (
                (b"A=1\nnonsense", "line 2, is not NAME=value"), (b"A=/a\0b", "line 1, is not NAME=value"),
                (b"DOCKER_CONFIG='\0'", "line 1, is not NAME=value"), (b"\xff", "cannot be read"),
                (b"K3D_REGISTRY_DOCKERD_UNTAGGED_AGE=old",
                 f"'old' (line 1 of {self.file}) is not an age: use for example 12h or 7d"),
                (b"#" * 2**21, "is larger than"), (None, "is a folder: Docker makes one")):
            with self.subTest(expected):
                if content is None:
                    self.file.unlink()
                    self.file.mkdir()
                else:
                    self.file.write_bytes(content)
                with self.assertRaisesRegex(ValueError, re.escape(expected)) as raised:
                    self.read("-env-file", str(self.file))
                self.assertIn(str(self.file), str(raised.exception))

    def test_readme_lists_every_setting(self):
        table = README.partition("## Settings")[2].partition("\n\n| command")[0]
        rows = [line.split(" | ")[:2] for line in table.splitlines() if line.startswith("| ")]
        pairs = [(re.findall(r"`(-[a-z-]+)", row[0]), re.findall(r"`([A-Z0-9_]+)`", row[1])) for row in rows]
        self.assertEqual({(setting.flag and setting.name, setting.variable) for setting in SETTINGS}, {
            pair for flags, variables in pairs
            for pair in (zip(flags, variables, strict=True) if flags else [(None, name) for name in variables])
            if not pair[1].startswith(("DOCKER_", module.HEADERS_VARIABLE))})

    def test_headers(self):
        def headers(**variables):
            return module.extra_headers({f"REGISTRY_HTTP_HEADERS_{name}": text for name, text in variables.items()})

        for text, values in (("['a']", ["a"]), ('["a", b]', ["a", "b"]), ("a", ["a"]), ("[]", []),
                             ("['it''s']", ["it's"]), ('["a,b"]', ["a,b"]), ("[max-age=1; x]", ["max-age=1; x"])):
            with self.subTest(text):
                self.assertEqual(([("X-A", value) for value in values], [], []), headers(**{"X-A": text}))
        for name, text in (("X-Content-Type-Options", "[nosniff]"), ("X-Content-Type-Options", "[sniff]"),
                           ("Content-Security-Policy", "['*']"), ("CONTENT_LENGTH", "[1]"),
                           ("Access-Control-Allow-Origin", "['*']"), ("Access-Control-Allow-Methods", "[GET]")):
            with self.subTest(name, text=text):
                found, origins, notes = headers(**{name: text})
                self.assertEqual(([], [], text != "[nosniff]"), (found, origins, len(notes) == 1))
        self.assertEqual(([], ["http://x:1"], []), headers(**{"Access-Control-Allow-Origin": "['http://x:1']"}))
        for name in ("X A", "X:A", "X-\N{EURO SIGN}", ""):
            with self.subTest(name), self.assertRaisesRegex(ValueError, "is not a header"):
                headers(**{name: "[a]"})


class TestRunning(SettingsCase):
    def program(self, *arguments, **environ):
        program = Program("unix:///nowhere", "-env-file", str(self.file), *arguments, env=environ)
        self.addCleanup(program.__exit__)
        return program

    def test_start_and_sighup(self):
        self.file.write_text("K3D_REGISTRY_DOCKERD_PULL=always\nREGISTRY_HTTP_HEADERS_X-Frame-Options=['DENY']\n"
                             "REGISTRY_HTTP_HEADERS_Content-Security-Policy=['x']\n")
        program = self.program("-pull=never", "-read-only")
        self.assertEqual(1, len(program.lines("never (from -pull, K3D_REGISTRY_DOCKERD_PULL=always (line 1 of")))
        self.assertEqual(1, len(program.lines("-read-only: true (from -read-only)")))
        self.assertEqual(1, len(program.lines("REGISTRY_HTTP_HEADERS_Content-Security-Policy is ignored")))
        self.assertEqual(1, len(program.lines("headers: X-Frame-Options (from REGISTRY_HTTP_HEADERS_…)")))
        headers = program.get("/v2/").headers
        self.assertEqual(("DENY", ["sandbox; default-src 'none'"]),
                         (headers["X-Frame-Options"], headers.get_all("Content-Security-Policy")))
        push = ("POST", "/v2/app/blobs/uploads/")
        self.assertEqual(405, program.request(*push).status)
        program.process.send_signal(signal.SIGHUP)
        program.wait_for_line("SIGHUP: nothing has changed")
        self.file.write_text("nonsense")
        program.process.send_signal(signal.SIGHUP)
        program.wait_for_line("SIGHUP: the settings stay as they are")
        self.assertEqual("DENY", program.get("/v2/").headers["X-Frame-Options"])

    def test_sighup_applies_what_can_be(self):
        self.file.write_text("")
        program = self.program()
        push = ("POST", "/v2/app/blobs/uploads/")
        self.assertEqual(202, program.request(*push).status)
        self.file.write_text(
            "REGISTRY_STORAGE_MAINTENANCE_READONLY_ENABLED=true\nK3D_REGISTRY_DOCKERD_ALLOW=quay.io\n"
            "K3D_REGISTRY_DOCKERD_NO_SYNC=true\nK3D_REGISTRY_DOCKERD_ALLOW_ORIGIN=http://x:1\n"
            "REGISTRY_LOG_FORMATTER=json\nREGISTRY_HTTP_HEADERS_X-A=a\nK3D_REGISTRY_DOCKERD_PUL=always")
        program.process.send_signal(signal.SIGHUP)
        line = json.loads(program.wait_for_line("SIGHUP: headers"))
        self.assertEqual({"time", "level", "message"}, set(line))
        for expected in ("-read-only: false is now true (from REGISTRY_STORAGE_MAINTENANCE_READONLY_ENABLED",
                         "-allow: pull from all is now quay.io (from", "-no-sync: false is now true"):
            self.assertEqual(1, len(program.lines(f"SIGHUP: {expected}")), expected)
        self.assertEqual([True], [line.endswith(', after a restart"}') for line in program.lines("-no-sync: ")])
        program.wait_for_line("SIGHUP: K3D_REGISTRY_DOCKERD_PUL (line 7 of ")
        program.process.send_signal(signal.SIGHUP)
        program.wait_for_line("SIGHUP: -no-sync: false is now true", 2)  # a restart is still needed
        self.file.write_text(self.file.read_text().replace("K3D_REGISTRY_DOCKERD_NO_SYNC=true", ""))
        program.process.send_signal(signal.SIGHUP)
        program.wait_for_line("SIGHUP: nothing has changed")
        self.assertEqual(405, program.request(*push).status)
        answer = program.get("/v2/", Origin="http://x:1")
        self.assertEqual(("http://x:1", "a"), (answer.headers["Access-Control-Allow-Origin"], answer.headers["X-A"]))

    def test_sighup_changes_limits(self):
        self.file.write_text("")
        program = Program("unix:///nowhere", "-env-file", str(self.file), constants={"TIDY_INTERVAL": 0.1})
        self.addCleanup(program.__exit__)
        data = json.dumps({"schemaVersion": 2, "mediaType": module.OCI_MANIFEST, "layers": []}).encode()
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        push = ("PUT", f"/v2/app/manifests/{digest}", {"Content-Type": module.OCI_MANIFEST}, data)
        self.assertEqual(201, program.request(*push).status)
        self.file.write_text("K3D_REGISTRY_DOCKERD_UNTAGGED_AGE=1s\nK3D_REGISTRY_DOCKERD_STORE_LIMIT=1B\n"
                             "K3D_REGISTRY_DOCKERD_MAX_CONNECTIONS=1\nK3D_REGISTRY_DOCKERD_NO_SYNC=true\n")
        program.process.send_signal(signal.SIGHUP)
        for name, restart in (("-untagged-age", ""), ("-store-limit", ""), ("-max-connections", ""),
                              ("-no-sync", ", after a restart")):
            line = program.wait_for_line(f"SIGHUP: {name}: ")
            self.assertEqual(restart, line.rpartition(")")[2])
        program.wait_for_line(f"store: removed the manifest {digest} of app")
        self.assertEqual("STORE_FULL", program.request(*push).code)
        with contextlib.closing(program.begin_get("/v2/")) as idle:
            idle.read()
            self.assertEqual(200, program.get("/v2/").status)
        program.wait_for_line("new connections have to wait: 1 are open (-max-connections)")

    def test_the_line_that_k3d_waits_for(self):
        for level in ("debug", "error"):
            for form in ("text", "json"):
                with self.subTest(level, form=form):
                    self.file.write_text(f"REGISTRY_LOG_LEVEL={level}\nREGISTRY_LOG_FORMATTER={form}\n")
                    program = self.program()
                    program.get("/v2/a/b")
                    program.stop()
                    lines = [line for line in program.log if line != "(the process ended)"]
                    if form == "json":
                        lines = [" ".join(json.loads(line)[key] for key in ("time", "level", "message"))
                                 for line in lines]
                    others = [line for line in lines if "listening on" not in line]
                    self.assertEqual(1, len(lines) - len(others))
                    self.assertEqual(level == "debug", any(re.search("(?i) info ", line) for line in others), lines)
                    self.assertEqual([level == "debug"], [any("GET /v2/a/b 404" in line for line in others)], lines)
                    self.assertTrue([line for line in others if re.search("(?i) error .*does not exist", line)], lines)



if __name__ == "__main__":
    unittest.main()
