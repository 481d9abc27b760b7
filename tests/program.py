"""Runs the program under test like users do, as a separate process."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import unittest
from pathlib import Path

from forks import MODULE, Process

# Runs the program as an import, which Python compiles once and not at each start, and with other values for some of
# its constants. MODULE alone, as users run it, is what test_command_line.py runs.
RUN = """
import json, os, sys
sys.path.insert(0, os.path.dirname(sys.argv.pop(1)))
import k3d_registry_dockerd as module
for name, value in json.loads(os.environ.pop("CONSTANTS", "{}")).items():
    assert hasattr(module, name), f"there is no constant {name} any more"
    setattr(module, name, value)
sys.exit(module.main(sys.argv[1:]))
"""
COMMAND = (sys.executable, "-c", RUN, str(MODULE))

# Tests that take long, each for its reason, run with all others in tests/run.py.
takes_long = unittest.skipUnless(os.environ.get("TESTS") == "all", "takes long: python tests/run.py runs it")


def folder_in_memory(least=4 << 30):
    """Return the folder of a file system in memory where so many bytes are free, or None."""
    with contextlib.suppress(OSError):
        found = os.statvfs("/dev/shm")
        if found.f_bavail * found.f_frsize >= least and os.access("/dev/shm", os.W_OK):
            return "/dev/shm"
    return None


# Where tests make their stores, if not where temporary files are: all that is pushed is synced, and a disk takes long.
IN_MEMORY = None if "TMPDIR" in os.environ else folder_in_memory()


def environment(**more):
    """Return the environment for a program: this process's, with more, and with compiled modules kept."""
    return {**{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}, **more}


def start(command, arguments, env, constants):
    """Start a command with the program's arguments, and return the Popen."""
    return subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True,
                            env={"PYTHONUNBUFFERED": "1", "CONSTANTS": json.dumps(constants), **env})


def run(*arguments, **env):
    """Run the program to its end, and return the CompletedProcess, with its output."""
    with tempfile.TemporaryFile("w+") as stdout:
        process = Process([*map(str, arguments)], environment(**env), {}, stdout)
        with process.stderr:
            errors = process.stderr.read()
        status = process.wait()
        stdout.seek(0)
        return subprocess.CompletedProcess(arguments, status, stdout.read(), errors)


class Answer:
    """A complete HTTP response."""

    def __init__(self, response):
        self.status, self.headers, self.body = response.status, response.headers, response.read()

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def code(self):
        """Return the error code of an error response in the spec's JSON form."""
        (error,) = self.json["errors"]
        return error["code"]

    @property
    def detail(self):
        (error,) = self.json["errors"]
        return error["detail"]


class Program:
    """A running registry. Use it in a `with`. `log` has the lines that it has written so far.

    address is the address to listen on, by default on a free port. constants replaces values of the module's constants.
    command is what to run, in a process of its own, instead of a fork. folder is where a folder for the store is made.
    """

    def __init__(self, docker_host, *arguments, store=None, command=None, env=None, address="127.0.0.1:0",
                 constants=None, folder=IN_MEMORY):
        self._stack = contextlib.ExitStack()
        self.store = Path(store or self._stack.enter_context(tempfile.TemporaryDirectory(dir=folder)) + "/store")
        self.log = []
        self._changed = threading.Condition()
        arguments = ["-addr", address, "-store", str(self.store), *map(str, arguments)]
        constants = {"STOP_INTERVAL": 0.01, **(constants or {})}
        env = environment(**{"DOCKER_HOST": docker_host, "DOCKER_CONFIG": "/nowhere", **(env or {})})
        self.process = start(command, arguments, env, constants) if command else Process(arguments, env, constants)
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        line = self.wait_for_line("listening on ")
        self.port = int(re.search(r"listening on [^ ]*:(\d+) ", line)[1])
        self.address = f"127.0.0.1:{self.port}"

    def _read_log(self):
        for line in self.process.stderr:
            with self._changed:
                self.log.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self.log.append("(the process ended)")
            self._changed.notify_all()

    def lines(self, text):
        """Return the log lines that contain a text."""
        with self._changed:
            return [line for line in self.log if text in line]

    def jobs(self, kind):
        """Return the log lines about the start of a long job: "pull", "export", "copy" or "fetch"."""
        with self._changed:
            return [line for line in self.log if re.search(rf" {kind}\b.*: started$", line)]

    def wait_for_line(self, text, count=1):
        """Wait until `count` lines contain the text, and return the last of them."""
        with self._changed:
            found = self._changed.wait_for(
                lambda: len(self.lines(text)) >= count or "(the process ended)" in self.log, timeout=60)
            lines = self.lines(text)
            if not found or len(lines) < count:
                raise AssertionError(f"{text!r} was logged {len(lines)} times:\n" + "\n".join(self.log))
            return lines[-1]

    def request(self, method, path, headers=None, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            return Answer(connection.getresponse())

    def begin_get(self, path, **headers):
        """Send a GET and return the response after its headers; its body is still to be read."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        self._stack.callback(connection.close)
        connection.request("GET", path, headers=headers)
        return connection.getresponse()

    def get(self, path, **headers):
        return self.request("GET", path, {k.replace("_", "-"): v for k, v in headers.items()})

    def head(self, path, **headers):
        return self.request("HEAD", path, {k.replace("_", "-"): v for k, v in headers.items()})

    def peak_memory(self):
        """Return the largest resident size so far, in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024

    def stop(self, how=signal.SIGTERM):
        """Stop the program and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        status = self.process.wait(timeout=30)
        self._reader.join(timeout=10)
        self.process.stderr.close()
        return status

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stop()
        self._stack.close()
