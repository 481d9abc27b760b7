"""The log on a terminal: bars of what is under way below its lines, and one clean line at the end."""

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import tempfile
import termios
import threading
import unittest
import urllib.request

from fake_daemon import FakeDaemon, chunked
from program import COMMAND, environment
from test_behaviour import BehaviourCase, wait_until

NAME = "registry.example/app:1"
CONSTANTS = {"WATCH_INTERVAL": 0.05, "PROGRESS_INTERVAL": 0, "STOP_GRACE": 0.1}


class Screen:
    """What is left on a terminal that is wide enough for every line. Knows as much as the program sends."""

    def __init__(self):
        self.lines, self.row, self.column, self._rest = [""], 0, 0, ""

    def feed(self, data):
        data, escape, rest = (self._rest + data).rpartition("\x1b")
        self._rest = ""
        if escape and not re.match(r"\[\d*[A-Z]", rest):
            self._rest = escape + rest
        else:
            data += escape + rest
        for text in re.findall(r"\x1b\[\d*[A-Z]|[\r\n]|[^\x1b\r\n]+", data):
            line = self.lines[self.row]
            if text == "\r":
                self.column = 0
            elif text == "\n":
                self.row += 1
                self.lines += [""] * (self.row == len(self.lines))
            elif text in ("\x1b[J", "\x1b[K"):
                self.lines[self.row] = line[:self.column]
                if text == "\x1b[J":
                    del self.lines[self.row + 1:]
            elif text.startswith("\x1b"):
                assert text[-1] == "F", text
                self.row, self.column = self.row - int(text[2:-1]), 0
            else:
                self.lines[self.row] = line[:self.column].ljust(self.column) + text + line[self.column + len(text):]
                self.column += len(text)


class Terminal:
    """A program that runs in the foreground of a terminal."""

    def __init__(self, docker_host, store, columns, *arguments):
        self.screen, self._lock = Screen(), threading.Lock()
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.process = subprocess.Popen(
            [*COMMAND, "-addr", "127.0.0.1:0", "-store", store, *arguments],
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env=environment(DOCKER_HOST=docker_host, DOCKER_CONFIG="/nowhere", TERM="xterm",
                            CONSTANTS=json.dumps(CONSTANTS)))
        os.close(slave)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        while True:
            try:
                data = os.read(self.master, 65536)
            except OSError:  # the last process has closed it
                return
            with self._lock:
                self.screen.feed(data.decode())

    def lines(self):
        with self._lock:
            return [line.rstrip() for line in self.screen.lines if line.strip()]

    def wait_for(self, text):
        wait_until(lambda: text in "\n".join(self.lines()))

    def port(self):
        self.wait_for("listening on ")
        return int(re.search(r"listening on \S+:(\d+) ", "\n".join(self.lines()))[1])

    def press_control_c(self):
        """Return the exit status."""
        os.write(self.master, b"\x03")
        status = self.process.wait(60)
        self._reader.join(60)
        return status

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        self._reader.join(60)
        os.close(self.master)


def message(done):
    """Return a chunk of the answer to a pull: how much of a layer is here, in MB."""
    line = json.dumps({"status": "Downloading", "id": "a1b2", "progressDetail": {"current": done * 10**6,
                                                                                "total": 10**7}}).encode() + b"\n"
    return b"%x\r\n%s\r\n" % (len(line), line)


class TestTerminal(BehaviourCase):
    def setUp(self):
        self.daemon = self.enter(FakeDaemon())
        self.go_on, self.end = self.event(), self.event()

        def pull(sock):
            sock.sendall(chunked(b"").partition(b"\r\n\r\n")[0] + b"\r\n\r\n" + message(5))
            self.go_on.wait(60)
            sock.sendall(message(7))
            self.end.wait(60)
            return b"0\r\n\r\n"

        self.daemon.pulls[NAME] = lambda: pull

    def tearDown(self):
        """There is no log of a Program to look at."""

    def terminal(self, *arguments, columns=100):
        store = self.enter(tempfile.TemporaryDirectory())
        return self.enter(Terminal(self.daemon.host, f"{store}/store", columns, *arguments))

    def ask_for_the_image(self, port):
        def ask():
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/app/manifests/1?ns=registry.example", timeout=60)

        thread = threading.Thread(target=ask)
        thread.start()
        self.addCleanup(thread.join)
        self.addCleanup(self.end.set)
        self.addCleanup(self.go_on.set)

    def test_bars_below_the_lines(self):
        for columns in (100, 45):
            with self.subTest(columns=columns):
                self.go_on.clear()
                self.end.clear()
                terminal = self.terminal(columns=columns)
                port = terminal.port()
                self.ask_for_the_image(port)
                terminal.wait_for("] 5.0 MB")
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/")
                terminal.wait_for("GET /v2/ 200")
                self.assertEqual([f"pull {NAME}", f"  [{'=' * 15}{' ' * 15}] 5.0 MB"],
                                 [line[:41] for line in terminal.lines()[-3:-1]])
                self.assertEqual("  waiting: 127.0.0.1", terminal.lines()[-1])
                self.assertLess(max(map(len, terminal.lines()[-3:])), columns)
                self.go_on.set()
                terminal.wait_for("] 7.0 MB")
                self.assertEqual([], [line for line in terminal.lines() if "70%" in line])
                self.end.set()
                terminal.wait_for(f"pull {NAME}: ")
                wait_until(lambda terminal=terminal: "] 7.0 MB" not in "\n".join(terminal.lines()))
                self.assertTrue(all(re.match(r"\d{4}-", line) for line in terminal.lines()), terminal.lines())
                self.assertEqual(0, terminal.press_control_c())
                self.assertRegex(terminal.lines()[-1], r"^\d{4}-\S+ \S+ INFO +ending on SIGINT$")

    def test_control_c_during_a_pull(self):
        terminal = self.terminal()
        self.ask_for_the_image(terminal.port())
        terminal.wait_for("] 5.0 MB")
        self.assertEqual(0, terminal.press_control_c())
        lines = terminal.lines()
        self.assertTrue(all(re.match(r"\d{4}-", line) for line in lines), lines)
        self.assertEqual(1, sum("ending on SIGINT" in line for line in lines))

    def test_json_has_no_bars(self):
        terminal = self.terminal("-log-format", "json")
        self.ask_for_the_image(terminal.port())
        terminal.wait_for("50%")
        self.assertEqual(0, terminal.press_control_c())
        self.assertLess(0, len([json.loads(line) for line in terminal.lines()]))

    def test_lines_elsewhere(self):
        """Where the log is no terminal, it has lines about the progress, and nothing that moves a cursor."""
        program = self.start(constants=CONSTANTS)
        self.ask_for_the_image(program.port)
        program.wait_for_line(f"pull {NAME}: 50%, 5.0 MB of 10.0 MB")
        self.assertEqual([], program.lines("\x1b"))


if __name__ == "__main__":
    unittest.main()
