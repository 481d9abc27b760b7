"""Processes of the program that are forked from one that has imported it, which takes a tenth of the time of a start.

Process is for tests. Run as a script, with the descriptor of a socket, this file is the server that forks: it has no
threads, which tests have, and which a process that forks must not have.
"""

import atexit
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

MODULE = Path(__file__).resolve().parent.parent / "k3d_registry_dockerd.py"
REQUEST_LIMIT = 200_000  # bytes of a request: the arguments, the environment and the constants


class Server:
    """The server, which starts with the first process and ends with the tests."""

    def __init__(self):
        self._lock = threading.Lock()
        self._socket = None

    def fork(self, request, *files):
        """Have a process forked, with copies of these files."""
        with self._lock:
            if self._socket is None:
                self._start()
            socket.send_fds(self._socket, [json.dumps(request).encode()], files)

    def _start(self):
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()])
        atexit.register(process.wait)
        atexit.register(self._socket.close)  # before that: the server ends when nobody can ask it


SERVER = Server()


class Process:
    """Like subprocess.Popen, as far as tests use it. stderr is a file to read from, stdout one to write to.

    constants replaces values of the module's constants.
    """

    def __init__(self, arguments, environment, constants, stdout=None):
        ends, stderr = os.pipe()
        self.stderr = open(ends, encoding="utf-8")  # noqa: SIM115
        ends, report = os.pipe()
        self._report = open(ends, encoding="ascii")  # noqa: SIM115
        try:
            SERVER.fork((arguments, environment, constants), (stdout or sys.__stdout__).fileno(), stderr, report)
        finally:
            os.close(stderr)
            os.close(report)
        self.pid, self.returncode = int(self._report.readline()), None

    def poll(self):
        return self._wait(0)

    def wait(self, timeout=None):
        if self._wait(timeout) is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return self.returncode

    def _wait(self, timeout):
        if self.returncode is None and select.select([self._report], [], [], timeout)[0]:
            self.returncode = int(self._report.readline())
            self._report.close()
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


# --- the server --------------------------------------------------------------------------------


def serve(requests, module):
    """Fork a process for each request, until nobody can send any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the tests get it too, and end this process
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a process in `watch`
    while True:
        data, files, _, _ = socket.recv_fds(requests, REQUEST_LIMIT, 3)
        if not data:
            return
        if os.fork() == 0:
            requests.close()
            watch(module, json.loads(data), *files)
        for file in files:
            os.close(file)


def watch(module, request, stdout, stderr, report):
    """Fork the process, and report its number and, when it has ended, its exit status. Only that process returns."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        os.close(report)
        run(module, *request, stdout, stderr)
    os.close(stdout)
    os.close(stderr)
    os.write(report, b"%d\n" % pid)
    os.write(report, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    os._exit(0)


def run(module, arguments, environment, constants, stdout, stderr):
    """Run the program, as far as possible like an interpreter that has just started."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for file, standard in ((stdout, sys.stdout), (stderr, sys.stderr)):
        os.dup2(file, standard.fileno())
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    for name, value in constants.items():
        assert hasattr(module, name), f"there is no constant {name} any more"
        setattr(module, name, value)
    try:
        status = module.main(arguments)
    except SystemExit as e:
        status = e.code
    sys.stdout.flush()
    os._exit(status)  # without the interpreter's own end, which takes longer than the program's


def main():
    sys.path.insert(0, str(MODULE.parent))
    import k3d_registry_dockerd as module
    gc.freeze()  # what is there stays there: no process has to look through it
    serve(socket.socket(fileno=int(sys.argv[1])), module)


if __name__ == "__main__":
    main()
