#!/usr/bin/env python3
"""Speed of pulls through this registry, compared with a static registry, docker save, and save plus import.

    python tests/lab.py up
    python tests/benchmark.py [--runs 5] [--size 500] [--json FILE] [containerd] [classic]

All measurements run in turn on the engines of the test lab; the results are medians of the runs. Ratios are
to the static registry (a docker-registry with exactly the same manifest and layers) and to `docker save`. Progress
goes to stderr; the tables, in Markdown, to stdout.

The image has layers of random data and of text. A pull is `ctr content fetch` by a containerd node that has none of
it: everything that a kubelet does, including hashing, except unpacking, which takes the same time wherever
the content is from. Of one image, a Debian system, the node unpacks the layers too, since that is what a person waits
for. "Ten nodes" are processes that each read all blobs of the image at once and discard them.
"""

import argparse
import concurrent.futures
import contextlib
import datetime
import http.client
import json
import multiprocessing
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import time
import uuid
from pathlib import Path

import lab
from program import COMMAND, Program

MIB = 1024 * 1024
NODES = 10
LATENCY_REQUESTS = 2000
WAYS = (("socket only", False), ("data folder mounted", True))  # and whether it is mounted


def say(text):
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


def seconds(call, *arguments):
    """Return the seconds that a call takes."""
    started = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - started


def start(engine, *options):
    """Start this program as users do: in an interpreter of its own, and on a disk, with an empty store."""
    return Program(f"unix://{engine.socket}", *options, command=COMMAND, folder=None)


class Image:
    """An image that both an engine and a static registry have, the latter as this registry serves it."""

    def __init__(self, engine, name, make):
        """make(engine, name) creates the image on the engine."""
        self.engine, self.name, self.reference = engine, f"{name}:1", f"docker.io/library/{name}:1"
        make(engine, self.name)
        with start(engine) as program:
            self.manifest = self.platform(program)
            self.copy(program, name)

    def get(self, program, kind, target):
        name = self.name.split(":")[0]
        answer = program.get(f"/v2/library/{name}/{kind}/{target}?ns=docker.io")
        assert answer.status == 200, answer.body
        return answer

    def platform(self, program):
        """Return the manifest for this machine, parsed."""
        document = self.get(program, "manifests", "1").json
        if "manifests" in document:
            document = self.get(program, "manifests", document["manifests"][0]["digest"]).json
        return document

    def copy(self, program, name):
        """Push everything below the name to the static registry."""
        origin, repository = lab.ORIGINS["open"], f"library/{name}"

        def push(answer, target):
            document = answer.json
            for child in document.get("manifests", []):
                push(self.get(program, "manifests", child["digest"]), child["digest"])
            for blob in [document["config"], *document["layers"]] if "config" in document else []:
                lab.push_blob(origin, repository, self.get(program, "blobs", blob["digest"]).body)
            status, _, body = origin.request("PUT", f"/v2/{repository}/manifests/{target}",
                                             {"Content-Type": answer.headers["Content-Type"]}, answer.body)
            assert status == 201, body

        push(self.get(program, "manifests", "1"), "1")

    @property
    def blobs(self):
        return [self.manifest["config"], *self.manifest["layers"]]

    @property
    def size(self):
        return sum(blob["size"] for blob in self.blobs)


def app(size):
    """Return a function that makes an image of about size bytes: random data, compressible text, small files."""
    text = bytes(ord("a") + i * i % 23 for i in range(100_000))
    parts = {"random": size // 2, "more": size // 4}
    files = {name: os.urandom(count) for name, count in parts.items()}
    files["text"] = (text * (size // 4 // len(text) + 1))[:size // 4]
    return lambda engine, name: engine.build(name, files)


def many_files(engine, name):
    """Make an image of 20,000 small files in one layer."""
    layer = lab.tar_of({f"d{i % 200}/file{i}": os.urandom(1000) for i in range(20_000)})
    engine.build(name, {"files.tar": layer}, "base:1", add=True)


def debian(engine, name):
    """Make an image of a Debian system: the root of an older engine of the lab."""
    root = lab.ENGINES["containerd-26"].root
    files = lab.run("tar", "-C", root, "-c", "etc", "usr", text=False).stdout
    engine.build(name, {"files.tar": files}, "base:1", add=True)


# ---- what is measured


def registry(image, mounted=False):
    """Start this program on an empty store."""
    options = ["-docker-root", str(lab.SHARE / image.engine.name / "data")] if mounted else []
    return start(image.engine, *options)


def pull(image, address, unpack=False):
    """Return the seconds of a cold pull by the node."""
    lab.NODE.forget()
    return seconds(lab.NODE.pull if unpack else lab.NODE.fetch, image.reference, address)


def save(engine, name):
    """Return the seconds of a `docker save` that discards its output."""
    return seconds(lab.chroot, "sh", "-c", f"docker -H {engine.host} save {name} > /dev/null")


def save_and_import(image, unpack=False):
    """Return the seconds of what `k3d image import` does: write a tar to disk, and import it on the node."""
    lab.NODE.forget()
    no_unpack = "" if unpack else "--no-unpack"
    return seconds(lab.chroot, "sh", "-c", f"docker -H {image.engine.host} save {image.name} > /lab/image.tar && "
                                           f"ctr -a /lab/node/containerd.sock -n k8s.io images import {no_unpack} "
                                           "/lab/image.tar > /dev/null && rm /lab/image.tar")


def cost(program):
    """Return the CPU seconds and peak memory (MB) of the program so far, and the size of its store (MB)."""
    fields = Path(f"/proc/{program.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    disk = int(subprocess.run(["du", "-sb", program.store], capture_output=True, text=True).stdout.split()[0]
               ) if program.store.exists() else 0
    return {"cpu": cpu, "memory": program.peak_memory() / 1e6, "disk": disk / 1e6}


def read_all(address, name, digests, barrier):
    """Read all blobs at once, over three connections like a node, and discard them."""
    host, port = address.split(":")

    def read(digest):
        connection = http.client.HTTPConnection(host, int(port), timeout=300)
        connection.request("GET", f"/v2/library/{name}/blobs/{digest}?ns=docker.io")
        response = connection.getresponse()
        buffer, count = bytearray(MIB), 0
        while size := response.readinto(buffer):
            count += size
        connection.close()
        return count

    barrier.wait()
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        list(pool.map(read, digests))


def many_nodes(image, address):
    """Return the seconds until ten readers have all blobs, from when all of them are ready to start."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(NODES + 1)
    digests = [blob["digest"] for blob in image.blobs]
    readers = [context.Process(target=read_all, args=(address, image.name.split(":")[0], digests, barrier))
               for _ in range(NODES)]
    for reader in readers:
        reader.start()
    barrier.wait()
    started = time.perf_counter()
    for reader in readers:
        reader.join()
    assert not any(reader.exitcode for reader in readers)
    return time.perf_counter() - started


def latency(image, address, target):
    """Return the median milliseconds of a HEAD of the manifest, and the requests per second on eight connections."""
    host, port = address.split(":")
    path = f"/v2/library/{image.name.split(':')[0]}/manifests/{target}?ns=docker.io"

    def ask(count):
        connection = http.client.HTTPConnection(host, int(port))
        times = []
        for _ in range(count):
            started = time.perf_counter()
            connection.request("HEAD", path)
            connection.getresponse().read()
            times.append(time.perf_counter() - started)
        connection.close()
        return times

    median = statistics.median(ask(LATENCY_REQUESTS)) * 1000
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        duration = seconds(lambda: list(pool.map(ask, [LATENCY_REQUESTS // 8] * 8)))
    return median, LATENCY_REQUESTS / duration


# ---- the cases


class Series:
    """The times of one engine, by case and way."""

    def __init__(self, engine):
        self.engine, self.times, self.costs = engine, {}, {}

    def add(self, case, way, value, costs=None):
        self.times.setdefault(case, {}).setdefault(way, []).append(value)
        if costs:
            self.costs.setdefault(case, {}).setdefault(way, []).append(costs)
        say(f"{self.engine.name}: {case}, {way}: {value:.2f} s")

    def table(self):
        """Return rows of (case, way, median seconds, ratio to static, ratio to save, CPU, memory, disk)."""
        for case, ways in self.times.items():
            medians = {way: statistics.median(values) for way, values in ways.items()}
            for way, median in medians.items():
                costs = self.costs.get(case, {}).get(way)
                cost = {key: statistics.median(c[key] for c in costs) for key in costs[0]} if costs else {}
                yield {"store": self.engine.name, "case": case, "way": way, "seconds": median,
                       "runs": ways[way],
                       "to static": median / medians["static registry"] if "static registry" in medians else None,
                       "to save": median / medians["docker save"] if "docker save" in medians else None, **cost}


def cold_pulls(series, case, image, runs, unpack=False):
    static = lab.ORIGINS["open"].host
    for _ in range(runs):
        series.add(case, "docker save", save(image.engine, image.name))
        series.add(case, "save + import", save_and_import(image, unpack))
        series.add(case, "static registry", pull(image, static, unpack))
        for way, mounted in WAYS:
            with registry(image, mounted) as program:
                series.add(case, way, pull(image, program.address, unpack), cost(program))


def rebuilt(series, image, runs):
    """A developer's loop: a small layer has changed, and the node has all others."""
    case = "one small layer changed"
    for way, mounted in WAYS:
        with registry(image, mounted) as program:
            pull(image, program.address)
            for _ in range(runs):
                name = f"bench-{uuid.uuid4().hex[:8]}:1"
                image.engine.build(name, {"changed": os.urandom(100_000)}, image.name)
                duration = seconds(lab.NODE.fetch, f"docker.io/library/{name}", program.address)
                series.add(case, way, duration, cost(program))
                if not mounted:
                    series.add(case, "docker save", save(image.engine, name))
                image.engine.remove(name)


def push(engine, name, address):
    """Return the seconds of a `docker push` of an image of the engine."""
    target = f"{address}/{name}"
    engine.docker("tag", name, target)
    duration = seconds(engine.docker, "push", "-q", target)
    engine.remove(target)
    return duration


@contextlib.contextmanager
def empty_registry():
    """Start an empty static registry; yield its HOST:PORT."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    origin = lab.Origin("bench-origin", port, private=False)
    origin.start()
    try:
        yield origin.host
    finally:
        origin.stop()
        shutil.rmtree(origin.folder)


def pushes(series, image, runs):
    """A developer's other loop: push a large image that was rebuilt, when its predecessor has been pushed."""
    case = "push, one small layer changed"
    with contextlib.ExitStack() as stack:
        programs = {way: stack.enter_context(registry(image, mounted)) for way, mounted in WAYS}
        addresses = {"static registry": stack.enter_context(empty_registry()),
                     **{way: program.address for way, program in programs.items()}}
        for way, address in addresses.items():
            series.add("first push", way, push(image.engine, image.name, address))
        for _ in range(runs):
            tag = uuid.uuid4().hex[:8]
            name = f"{image.name.split(':')[0]}:{tag}"
            image.engine.build(name, {"changed": os.urandom(100_000)}, image.name)
            series.add(case, "docker save", save(image.engine, name))
            for way, address in addresses.items():
                series.add(case, way, push(image.engine, name, address),
                           cost(programs[way]) if way in programs else None)
            image.engine.remove(name)


def ten_nodes(series, image, runs):
    case = "ten nodes at once"
    for _ in range(runs):
        series.add(case, "static registry", many_nodes(image, lab.ORIGINS["open"].host))
        for way, mounted in WAYS:
            with registry(image, mounted) as program:
                image.get(program, "manifests", "1")  # on the classic store, after most of the export
                series.add(case, way, many_nodes(image, program.address), cost(program))


def small_requests(image):
    """Measure latency and rate of this program and of the static registry."""
    found = {}
    with registry(image) as program:
        digest = image.get(program, "manifests", "1").headers["Docker-Content-Digest"]
        for way, address in (("static registry", lab.ORIGINS["open"].host), ("this registry", program.address)):
            for what, target in (("by tag", "1"), ("by digest", digest)):
                found[f"{way}, {what}"] = latency(image, address, target)
                say("{}: {}, {}: {:.2f} ms, {:.0f} requests/s".format(
                    image.engine.name, way, what, *found[f"{way}, {what}"]))
    return found


def start_up(runs=5):
    """Return the seconds from the start of the process to its first response."""
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        with start(lab.ENGINES["containerd"]):
            times.append(time.perf_counter() - started)
    return statistics.median(times)


# ---- the report


def markdown(rows, requests, startup, arguments):
    def number(value, form):
        return "" if value is None else form.format(value)

    docker = lab.ENGINES["containerd"].docker("version", "-f", "{{.Server.Version}}")
    node, static = (lab.chroot(*command).stdout.split()[2] for command in (
        ("containerd", "--version"), ("docker-registry", "--version")))
    yield (f"{datetime.date.today()}, {os.cpu_count()} cores, Python {platform.python_version()}, Docker {docker}, "
           f"containerd {node}, docker-registry {static}; medians of {arguments.runs}; start-up {startup:.2f} s")
    yield ""
    yield "| store | what | how | seconds | × static | × docker save | CPU s | peak MB | disk MB |"
    yield "| --- | --- | --- | --: | --: | --: | --: | --: | --: |"
    for row in rows:
        yield (f"| {row['store']} | {row['case']} | {row['way']} | {row['seconds']:.2f} | "
               f"{number(row['to static'], '{:.2f}')} | {number(row['to save'], '{:.2f}')} | "
               f"{number(row.get('cpu'), '{:.2f}')} | {number(row.get('memory'), '{:.0f}')} | "
               f"{number(row.get('disk'), '{:.0f}')} |")
    yield ""
    yield "| store | HEAD of a manifest | ms | requests/s |"
    yield "| --- | --- | --: | --: |"
    for store, found in requests.items():
        for what, (median, rate) in found.items():
            yield f"| {store} | {what} | {median:.2f} | {rate:.0f} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("engines", nargs="*", default=["containerd", "classic"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--size", type=int, default=500, help="megabytes of the image, about")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    lab.require()
    rows, requests, images = [], {}, []
    try:
        for name in arguments.engines:
            engine, size = lab.ENGINES[name], arguments.size * MIB
            say(f"{name}: building images")
            tag = uuid.uuid4().hex[:8]
            large, files, system = (Image(engine, f"bench-{kind}-{tag}", make) for kind, make in (
                ("app", app(size)), ("files", many_files), ("debian", debian)))
            images += [large, files, system]
            series = Series(engine)
            cold_pulls(series, f"cold pull, {large.size / 1e6:.0f} MB", large, arguments.runs)
            cold_pulls(series, "cold pull, 20,000 files", files, arguments.runs)
            cold_pulls(series, f"Debian, {system.size / 1e6:.0f} MB, unpacked", system, arguments.runs, unpack=True)
            rebuilt(series, large, arguments.runs)
            pushes(series, large, arguments.runs)
            ten_nodes(series, large, arguments.runs)
            requests[name] = small_requests(large)
            rows += series.table()
        print("\n".join(markdown(rows, requests, start_up(), arguments)))
        if arguments.json:
            Path(arguments.json).write_text(json.dumps({"rows": rows, "requests": requests}, indent=1))
    finally:
        for image in images:
            image.engine.remove(image.name)
        lab.NODE.forget()


if __name__ == "__main__":
    main()
