#!/usr/bin/env python3
"""Load: many clients with mixed requests at the same time, and what the program needs for that.

    python tests/load.py [--clients 500] [--seconds 120] [--engine containerd]

Each client sends one request after another, as fast as it gets the responses; every other client opens a new connection
for each. The engine is one of the test lab, or a fake one, with `--engine fake`.

Prints requests per second, and the time that each kind of request takes until its last byte. The exit status is 1 if a
response is wrong, if the program needs more memory than LIMIT, or if it keeps threads or descriptors.
"""

import argparse
import asyncio
import collections
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import re
import statistics
import sys
import threading
import time
from pathlib import Path

import lab
from fake_daemon import FakeDaemon, Image
from program import Program

LIMIT = 150 * 10**6     # bytes of memory of the program
TIMEOUT = 60            # seconds for one request
SETTLED = 20            # seconds until threads and descriptors are back to their numbers at the start
PROCESSES = 2           # that the clients are spread over
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
NAME = "load"
MIB = 1024 * 1024


def sha256(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


# ---- what is asked for


class Pushed:
    """An image that is pushed to the program: a small and a large layer."""

    def __init__(self, program):
        self.small, self.large = os.urandom(2000), os.urandom(4 * MIB)
        blobs = [{"mediaType": "application/octet-stream", "digest": sha256(blob), "size": len(blob)}
                 for blob in (b"{}", self.small, self.large)]
        self.manifest = json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, "config": blobs[0],
                                    "layers": blobs[1:]}).encode()
        for blob in (b"{}", self.small, self.large):
            answer = program.request("POST", f"/v2/{NAME}/pushed/blobs/uploads/?digest={sha256(blob)}", body=blob)
            assert answer.status == 201, answer.body
        for i in range(20):
            answer = program.request("PUT", f"/v2/{NAME}/pushed/manifests/{i}", {"Content-Type": MANIFEST},
                                     self.manifest)
            assert answer.status == 201, answer.body

    def requests(self):
        """Yield (weight, kind, method, path, expected status, digest of the body or None)."""
        path, small, large = f"/v2/{NAME}/pushed", sha256(self.small), sha256(self.large)
        yield 10, "HEAD manifest", "HEAD", f"{path}/manifests/7", 200, None
        yield 10, "GET manifest", "GET", f"{path}/manifests/7", 200, sha256(self.manifest)
        yield 10, "HEAD blob", "HEAD", f"{path}/blobs/{small}", 200, None
        yield 10, "GET blob", "GET", f"{path}/blobs/{small}", 200, small
        yield 3, "GET large blob", "GET", f"{path}/blobs/{large}", 200, large
        yield 5, "tags/list", "GET", f"{path}/tags/list", 200, None
        yield 5, "_catalog", "GET", "/v2/_catalog", 200, None
        yield 5, "unknown blob", "HEAD", f"{path}/blobs/{sha256(b'unknown')}", 404, None
        yield 5, "unknown manifest", "GET", f"{path}/manifests/unknown", 404, None
        yield 5, "upload", "POST", f"/v2/{NAME}/uploads/blobs/uploads/?digest=", 201, None
        yield 1, "hang up", "GET", f"{path}/blobs/{large}", 200, None
        yield 1, "hang up in an upload", "POST", f"/v2/{NAME}/uploads/blobs/uploads/?digest=", 201, None


def requests_of_docker(program):
    """Yield requests for an image that only Docker has, like those of Pushed."""
    path, ns = f"/v2/library/{NAME}-local", "?ns=docker.io"
    manifest = program.get(f"{path}/manifests/1{ns}")
    yield 10, "GET manifest, ns", "GET", f"{path}/manifests/1{ns}", 200, sha256(manifest.body)
    yield 5, "HEAD manifest, ns", "HEAD", f"{path}/manifests/1{ns}", 200, None
    for descriptor in (manifest.json["config"], manifest.json["layers"][-1]):
        digest = descriptor["digest"]
        kind = "GET blob, ns" if descriptor["size"] < MIB else "GET large blob, ns"
        yield 5 if descriptor["size"] < MIB else 1, kind, "GET", f"{path}/blobs/{digest}{ns}", 200, digest


# ---- clients


class WrongAnswerError(Exception):
    """A response that is not the expected one."""


class Client:
    """One client. Results are (kind, status or name of an error, seconds)."""

    def __init__(self, port, requests, seed, results):
        self.port, self.requests, self.results = port, requests, results
        self.weights = [request[0] for request in requests]
        self.random = random.Random(seed)
        self.keeps, self.streams = seed // PROCESSES % 2 == 0, None

    async def run(self, end):
        while time.monotonic() < end:
            (request,) = self.random.choices(self.requests, self.weights)
            started = time.perf_counter()
            try:
                outcome = await asyncio.wait_for(self.send(*request[1:]), TIMEOUT)
            except (OSError, asyncio.TimeoutError, asyncio.IncompleteReadError, WrongAnswerError) as e:
                outcome = f"{type(e).__name__} {e}"
                self.close()
            self.results.append((request[1], outcome, time.perf_counter() - started))
            if not self.keeps:
                self.close()
        self.close()

    def close(self):
        if self.streams:
            self.streams[1].close()
        self.streams = None

    async def send(self, kind, method, path, expected, digest):
        """Send one request. Returns the status. WrongAnswerError if it is not the expected one."""
        if self.streams is None:
            self.streams = await asyncio.open_connection("127.0.0.1", self.port)
        body = self.random.randbytes(10_000) if method == "POST" else b""
        path += sha256(body) if method == "POST" else ""
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nContent-Length: {len(body)}\r\n\r\n"
        reader, writer = self.streams
        if kind.startswith("hang up"):
            writer.write(head.encode() + body[:5000])
            if not body:
                await reader.readexactly(10_000)
            self.close()
            return expected
        writer.write(head.encode() + body)
        status = await self.receive(reader, method, digest)
        if status != expected:
            raise WrongAnswerError(status)
        if method == "POST":  # or the store would grow
            writer.write(f"DELETE /v2/{NAME}/uploads/blobs/{sha256(body)} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            if await self.receive(reader, "DELETE", None) != 202:
                raise WrongAnswerError("DELETE")
        return status

    async def receive(self, reader, method, digest):
        """Read one response, compare its body with a digest if there is one, and return its status."""
        head = await reader.readuntil(b"\r\n\r\n")
        length = 0 if method == "HEAD" else int(re.search(rb"(?i)\r\ncontent-length: (\d+)", head)[1])
        content = hashlib.sha256()
        while length:
            data = await reader.read(min(length, 256 * 1024))
            if not data:
                raise WrongAnswerError("cut short")
            content.update(data)
            length -= len(data)
        if digest and f"sha256:{content.hexdigest()}" != digest:
            raise WrongAnswerError("wrong bytes")
        if b"\r\nConnection: close\r\n" in head:
            self.close()
        return int(head.split(b" ", 2)[1])


def clients(port, requests, seeds, seconds, pipe):
    """The clients of one process: send all results to a pipe."""
    async def run():
        results = []
        end = time.monotonic() + seconds
        await asyncio.gather(*[Client(port, requests, seed, results).run(end) for seed in seeds])
        return results

    pipe.send(asyncio.run(run()))


# ---- the program meanwhile


class Watch:
    """Looks at the program's process twice a second: its memory in bytes, threads and descriptors."""

    def __init__(self, program):
        self.program, self.process = program, Path(f"/proc/{program.process.pid}")
        self.samples, self._ended = [], threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def figures(self):
        memory = int(re.search(r"VmRSS:\s+(\d+) kB", (self.process / "status").read_text())[1]) * 1024
        return memory, len(list((self.process / "task").iterdir())), len(list((self.process / "fd").iterdir()))

    def _watch(self):
        while not self._ended.wait(0.5):
            with contextlib.suppress(FileNotFoundError):  # a thread or descriptor has just gone
                self.samples.append(self.figures())

    def __enter__(self):
        self.before = self.figures()
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._ended.set()
        self._thread.join()

    def settled(self):
        """Return the figures when threads and descriptors are back, or after SETTLED seconds."""
        deadline = time.monotonic() + SETTLED
        while True:
            figures = self.figures()
            back = all(now <= before for now, before in zip(figures[1:], self.before[1:], strict=True))
            if back or time.monotonic() > deadline:
                return figures, back
            time.sleep(0.2)


# ---- all of it


def load(program, count, seconds):
    """Let the clients work. Returns their results, and what was watched."""
    requests = [*Pushed(program).requests(), *requests_of_docker(program)]
    with Watch(program) as watch:
        parts = []
        for number in range(PROCESSES):
            receiver, sender = multiprocessing.Pipe(duplex=False)
            process = multiprocessing.Process(target=clients, args=(
                program.port, requests, range(number, count, PROCESSES), seconds, sender))
            process.start()
            sender.close()
            parts.append((receiver, process))
        results = []
        for receiver, process in parts:
            results += receiver.recv()
            process.join()
    return results, watch


def report(results, seconds):
    """Print a table, and return the responses that were wrong."""
    times, wrong = collections.defaultdict(list), collections.Counter()
    for kind, outcome, took in results:
        times[kind].append(took)
        if isinstance(outcome, str):
            wrong[kind, outcome] += 1
    print(f"{len(results) / seconds:.0f} requests per second\n")
    print("| request | count | p50 ms | p99 ms | slowest ms |\n| --- | --- | --- | --- | --- |")
    for kind, took in times.items():
        percentiles = statistics.quantiles(took, n=100) if len(took) > 1 else took * 99
        print(f"| {kind} | {len(took)} | {percentiles[49] * 1000:.0f} | {percentiles[98] * 1000:.0f} | "
              f"{max(took) * 1000:.0f} |")
    print()
    return wrong


def judge(program, watch, wrong):
    """Print what the program needed, and yield what is wrong with that."""
    (memory, threads, descriptors), back = watch.settled()
    peak = program.peak_memory()
    print(f"memory: {watch.before[0] / 1e6:.0f} MB before, {peak / 1e6:.0f} MB at most, {memory / 1e6:.0f} MB after")
    for name, index, after in (("threads", 1, threads), ("descriptors", 2, descriptors)):
        print(f"{name}: {watch.before[index]} before, {max(sample[index] for sample in watch.samples)} at most, "
              f"{after} after")
    if peak > LIMIT:
        yield f"{peak / 1e6:.0f} MB of memory"
    if not back:
        yield "threads or descriptors are kept"
    for (kind, outcome), count in wrong.items():
        yield f"{kind}: {count} times {outcome}"
    yield from program.lines("a bug in this program")[:3]


@contextlib.contextmanager
def docker(engine):
    """Make an image that only Docker has; yield how to reach that Docker."""
    if engine == "fake":
        with FakeDaemon() as daemon:
            daemon.add(f"{NAME}-local:1", Image("text" * MIB))
            yield daemon.host
        return
    lab.ENGINES[engine].import_image(f"{NAME}-local:1", {"data": os.urandom(3 * MIB)})
    try:
        yield f"unix://{lab.ENGINES[engine].socket}"
    finally:
        lab.ENGINES[engine].remove(f"{NAME}-local:1")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--engine", choices=[*lab.ENGINES, "fake"], default="containerd" if lab.is_up() else "fake")
    arguments = parser.parse_args()
    with docker(arguments.engine) as host, Program(host) as program:
        results, watch = load(program, arguments.clients, arguments.seconds)
        wrong = report(results, arguments.seconds)
        problems = [*judge(program, watch, wrong)]
    print("\n".join(f"PROBLEM: {problem}" for problem in problems) or "all is well")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
