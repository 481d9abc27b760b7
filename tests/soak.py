#!/usr/bin/env python3
"""A soak test: real clients and a fast one of our own work on, while everything around them fails.

    python tests/lab.py up
    python tests/soak.py [--minutes 1] [--seed 1] [--engine containerd]

Clients push, retag, delete and pull through the program on a real engine. Meanwhile one fault after another is caused
and ended: see Faults. The ledger knows what was acknowledged. In the end the program is started without Docker, and
everything that was acknowledged has to be there, whole and right. With `--engine none`, which needs no lab, there are
only the fast client, and the faults that do not concern Docker.

All choices come from the seed, though not the order in which the threads run. Findings are printed as they occur, the
end of the log of a program with a finding goes to stderr, and the exit status is 1.
"""

import argparse
import collections
import contextlib
import hashlib
import http.client
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import lab
from program import MODULE, Answer, Program
from walk import walk_without_docker

INDEX, MANIFEST = "application/vnd.oci.image.index.v1+json", "application/vnd.oci.image.manifest.v1+json"
ODD = "application/vnd.example.odd+json"    # of manifests that do not say their own type
BLOB_TYPE = "application/octet-stream"
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
WORKERS = 3             # threads of the fast client
BLOBS = 40              # blobs that they share
TAGS = 6                # tags of each of their repositories
MANIFESTS = 30          # manifests of a repository; then some are deleted
TIMEOUT = 90            # seconds that a client waits for an answer
RECOVERY = 30           # seconds until everything works again after a fault
SETTLED = 15            # seconds until threads and descriptors are back to their numbers at the start
DAY = 24 * 3600
ESTABLISHED = "01"      # in /proc/net/tcp

# It imports the module, so that is compiled only once.
COMMAND = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(MODULE.parent)!r}); "
                                 "import k3d_registry_dockerd as module; sys.exit(module.main())"]


def sha256(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


def descriptor(data, media_type=BLOB_TYPE):
    return {"mediaType": media_type, "digest": sha256(data), "size": len(data)}


class Document(NamedTuple):
    """A manifest, with the digests that it refers to."""

    data: bytes
    media_type: str
    blobs: list
    children: list

    @classmethod
    def parse(cls, data, media_type):
        document = json.loads(data)
        blobs = [document.get("config"), *document.get("layers", ()), *document.get("blobs", ())]
        return cls(data, media_type, [blob["digest"] for blob in blobs if blob],
                   [child["digest"] for child in document.get("manifests", ())])


class Ledger:
    """What a repository may contain. One thread writes to it.

    tags       tag -> the digests that it may have; None: it may be absent. One of them if that was acknowledged.
    manifests  digest -> {True}, {False} or {True, False}: whether it is there
    """

    def __init__(self, name):
        self.name = name
        self.tags = collections.defaultdict(lambda: {None})
        self.manifests = collections.defaultdict(lambda: {False})

    def pushed(self, digest, tags, certain):
        self.manifests[digest] = {True} if certain else self.manifests[digest] | {True}
        for tag in tags:
            self.tags[tag] = {digest} if certain else self.tags[tag] | {digest}

    def deleted_tag(self, tag, certain):
        self.tags[tag] = {None} if certain else self.tags[tag] | {None}

    def deleted(self, digest, certain):
        """A manifest was deleted, with all its tags."""
        self.manifests[digest] = {False} if certain else self.manifests[digest] | {False}
        for tag, digests in self.tags.items():
            if digest in digests:
                self.tags[tag] = digests - {digest} | {None} if certain else digests | {None}

    def certain_tags(self):
        return {tag: next(iter(digests)) for tag, digests in self.tags.items()
                if len(digests) == 1 and None not in digests}

    def present(self):
        """The manifests that are certainly there."""
        return [digest for digest, states in self.manifests.items() if states == {True}]


class Disturbances:
    """Which kinds of things are disturbed by faults now: "hosted" (anything may fail), "docker" or "origin"."""

    def __init__(self, always):
        self._lock = threading.Lock()  # guards both
        self._active, self._count = collections.Counter(always), collections.Counter()

    @contextlib.contextmanager
    def of(self, *kinds):
        with self._lock:
            self._active.update(kinds)
            self._count.update(kinds)
        try:
            yield
        finally:
            with self._lock:
                self._active.subtract(kinds)

    def stamp(self, kinds):
        """Return what is equal before and after a request that no fault has disturbed, or None during a fault."""
        with self._lock:
            return None if any(self._active[kind] for kind in kinds) else [self._count[kind] for kind in kinds]


class Soak:
    """The program, the clients' common knowledge, and the result."""

    def __init__(self, seed, engine):
        self.seed, self.engine = seed, engine
        self.random = random.Random(seed)
        self.name = f"soak{seed}"
        self.folder = Path(tempfile.mkdtemp(prefix="soak"))
        self.store = self.folder / "store"
        self.operations, self.faults = collections.Counter(), collections.Counter()
        self.findings = []
        self.disturbed = Disturbances(() if engine else ("docker", "origin"))
        self.contents, self.documents = {}, {}  # digest -> bytes, Document; entries are never changed
        self.ledgers = {}
        self.ended = threading.Event()
        self._gate = threading.Condition()  # guards the two that follow
        self._closed, self._inside = False, 0
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self.programs = []
        self.program = None

    def finding(self, text):
        self.findings.append(text)
        print(f"FINDING after {time.monotonic() - self.started:.1f} s: {text}", flush=True)

    def count(self, operation):
        self.operations[operation] += 1

    # ---- the program

    def start(self, *arguments):
        host = f"unix://{self.engine.socket}" if self.engine else "unix:///nowhere"
        self.program = Program(host, *arguments, store=self.store, address=self.address, command=COMMAND)
        self.programs.append(self.program)

    def stop(self, how=signal.SIGTERM):
        status = self.program.stop(how)
        if status != (0 if how == signal.SIGTERM else -how):
            self.finding(f"the program ended with status {status} on signal {how}")

    def wait_until_it_works(self):
        """Wait until the program answers, and Docker by way of it. Returns False if they do not."""
        deadline = time.monotonic() + RECOVERY
        while time.monotonic() < deadline:
            answer = request(self.port, "GET", "/v2/_catalog" if self.engine else "/v2/")
            if answer and answer.status == 200:
                return True
            time.sleep(0.1)
        self.finding(f"no list of repositories {RECOVERY} seconds after the fault: {answer and answer.body}")
        return False

    def figures(self):
        """Return the numbers of the program's threads and descriptors, without the connections that are open.

        dockerd keeps its connections for some time. Each has a thread and a descriptor.
        """
        process, local = Path(f"/proc/{self.program.process.pid}"), f"0100007F:{self.port:04X}"
        rows = [line.split() for line in (process / "net/tcp").read_text().splitlines()[1:]]
        connected = sum(row[1] == local and row[3] == ESTABLISHED for row in rows)
        return tuple(len(list((process / kind).iterdir())) - connected for kind in ("task", "fd"))

    # ---- pauses

    @contextlib.contextmanager
    def operation(self):
        """Hold this during each operation of a client: it waits while the clients pause."""
        with self._gate:
            self._gate.wait_for(lambda: not self._closed)
            self._inside += 1
        try:
            yield
        finally:
            with self._gate:
                self._inside -= 1
                self._gate.notify_all()

    @contextlib.contextmanager
    def pause(self):
        """Wait for all operations to end, and let none begin."""
        with self._gate:
            self._closed = True
            if not self._gate.wait_for(lambda: not self._inside, 4 * TIMEOUT):
                self.finding(f"{self._inside} operations do not end")
        try:
            yield
        finally:
            with self._gate:
                self._closed = False
                self._gate.notify_all()

    # ---- what is known

    def keep(self, data):
        """Remember content; return its digest."""
        digest = sha256(data)
        self.contents[digest] = data
        return digest

    def keep_document(self, data, media_type):
        digest = self.keep(data)
        self.documents[digest] = Document.parse(data, media_type)
        return digest


# ---- requests


def request(port, method, path, body=None, headers=None):
    """Return the Answer, or None if there is no complete one."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request(method, path, body, headers or {})
        return Answer(connection.getresponse())
    return None


class Client:
    """Requests of one thread, and what it expects of them."""

    def __init__(self, soak, name):
        self.soak, self.random = soak, random.Random(f"{soak.seed}/{name}")

    def ask(self, method, path, body=None, headers=None, allowed=(), needs=("hosted",), since=()):
        """Send a request. Unless what it needs was disturbed, any status that is not allowed is a finding.

        since is the stamp of an earlier moment from which on nothing may have been disturbed.
        """
        before = since or self.soak.disturbed.stamp(needs)
        answer = request(self.soak.port, method, path, body, headers)
        undisturbed = before is not None and before == self.soak.disturbed.stamp(needs)
        if undisturbed and allowed and (answer is None or answer.status not in allowed):
            self.soak.finding(f"{method} {path}: {answer and (answer.status, answer.body[:300])}, expected {allowed}")
        return answer

    def status(self, *arguments, **options):
        answer = self.ask(*arguments, **options)
        return answer.status if answer else None

    def get(self, repository, kind, target, ns=None, allowed=(200,), needs=("hosted",)):
        """Return the answer to a GET if it is 200. Its content is compared with the digest, whatever is disturbed."""
        path = f"/v2/{repository}/{kind}/{target}" + (f"?ns={ns}" if ns else "")
        answer = self.ask("GET", path, allowed=allowed, needs=needs)
        if answer is None or answer.status != 200:
            return None
        digest = target if ":" in target else answer.headers["Docker-Content-Digest"]
        if not digest == sha256(answer.body) == answer.headers["Docker-Content-Digest"]:
            self.soak.finding(f"GET {path}: {len(answer.body)} bytes of {sha256(answer.body)}, "
                              f"{answer.headers.items()}")
        return answer

    # ---- blobs

    def upload(self, repository, data, digest=None):
        """Upload a blob in one of the ways that there are. Returns True if it was acknowledged."""
        digest = digest or sha256(data)
        base = f"/v2/{repository}/blobs/uploads/"
        if self.random.random() < 0.3:
            return self.status("POST", f"{base}?digest={digest}", data, allowed=(201,)) == 201
        if self.random.random() < 0.3 and self.soak.ledgers:
            source = self.random.choice(sorted(self.soak.ledgers))
            answer = self.ask("POST", f"{base}?mount={digest}&from={source}", allowed=(201, 202))
        else:
            answer = self.ask("POST", base, allowed=(202,))
        if answer is None or answer.status != 202:
            return answer is not None and answer.status == 201
        location, sent = answer.headers["Location"], 0
        for _ in range(self.random.choice((0, 1, 3))):
            count = self.random.randint(0, len(data) - sent)
            if self.status("PATCH", location, data[sent:sent + count], allowed=(202,)) != 202:
                return False
            sent += count
        return self.status("PUT", f"{location}?digest={digest}", data[sent:], allowed=(201,)) == 201

    def need(self, repository, digest):
        """Have a blob in a repository, as clients do: it is uploaded unless it is there. True if it is there then."""
        head = self.status("HEAD", f"/v2/{repository}/blobs/{digest}", allowed=(200, 404))
        return head == 200 or (head == 404 and self.upload(repository, self.soak.contents[digest]))

    # ---- manifests

    def put(self, ledger, digest, tags, needs=("hosted",), by_digest=False, since=()):
        """Push a manifest that is known. Returns True if it was acknowledged."""
        document = self.soak.documents[digest]
        target = f"{digest}?{'&'.join(f'tag={tag}' for tag in tags)}"
        if not by_digest:
            target, *_ = tags = tags[:1]
        ledger.pushed(digest, tags, certain=False)
        answer = self.ask("PUT", f"/v2/{ledger.name}/manifests/{target}", document.data,
                          {"Content-Type": document.media_type}, allowed=(201,), needs=needs, since=since)
        if answer is None or answer.status != 201:
            return False
        ledger.pushed(digest, tags, certain=True)
        return True

    def push(self, ledger, digest, tags, by_digest=False):
        """Push a manifest with its blobs. Returns True if it was acknowledged."""
        since = self.soak.disturbed.stamp(("hosted",)) or ("disturbed already",)  # blobs may be damaged meanwhile
        return (all(self.need(ledger.name, blob) for blob in self.soak.documents[digest].blobs)
                and self.put(ledger, digest, tags, by_digest=by_digest, since=since))

    def settle(self, ledger):
        """Find out what became of requests without a good answer."""
        for tag, digests in list(ledger.tags.items()):
            if len(digests) > 1:
                found = self.head(ledger.name, tag)
                if found not in digests:
                    self.soak.finding(f"{ledger.name}:{tag} is {found}, and may only be one of {digests}")
                ledger.tags[tag] = {found}
        for digest, states in list(ledger.manifests.items()):
            if len(states) > 1:
                ledger.manifests[digest] = {self.head(ledger.name, digest) is not None}

    def head(self, repository, target):
        """Return the digest of a manifest that is hosted, or None. A finding if that cannot be told."""
        answer = self.ask("HEAD", f"/v2/{repository}/manifests/{target}", allowed=(200, 404))
        return answer.headers["Docker-Content-Digest"] if answer and answer.status == 200 else None

    def check(self, ledger):
        """Compare what is hosted with the ledger, which has to be settled, and with some of what was deleted."""
        deleted = [digest for digest, states in ledger.manifests.items() if states == {False}]
        wanted = {**{tag: digest for tag, (digest,) in ledger.tags.items()},
                  **{digest: digest for digest in ledger.present()},
                  **dict.fromkeys(self.random.sample(deleted, min(20, len(deleted))))}
        for target, digest in wanted.items():
            if (found := self.head(ledger.name, target)) != digest:
                self.soak.finding(f"{ledger.name} {target} is {found}, and was acknowledged as {digest}")


class Worker(Client):
    """The fast client: a thread with repositories of its own. Their blobs are shared with others."""

    def __init__(self, soak, number):
        super().__init__(soak, number)
        self.own = [soak.ledgers.setdefault(name, Ledger(name)) for name in (
            f"{soak.name}/{number}", f"{soak.name}/{number}/nested")]
        self.number = number
        self.operations = [(self.push_image, 6), (self.retag, 3), (self.push_index, 2), (self.push_referrer, 2),
                           (self.delete_tag, 2), (self.delete_manifest, 2), (self.delete_blob, 2), (self.pull, 6),
                           (self.list, 1), (self.hang_up, 1)]
        if soak.engine:
            self.operations += [(self.pull_from_docker, 2), (self.pull_from_origin, 1), (self.adopt, 1)]

    def run(self):
        operations, weights = zip(*self.operations, strict=True)
        while not self.soak.ended.is_set():
            with self.soak.operation():
                (operation,) = self.random.choices(operations, weights)
                try:
                    operation(self.random.choice(self.own))
                except Exception:
                    self.soak.finding(f"{operation.__name__}: {traceback.format_exc()}")
                self.soak.count(operation.__name__)

    def tag(self):
        return f"t{self.random.randrange(TAGS)}"

    def some_tags(self):
        return self.random.sample([f"t{i}" for i in range(TAGS)], self.random.choice((1, 1, 1, 2, 3)))

    def new_document(self, **more):
        data = json.dumps({"schemaVersion": 2, **more, "annotations": {"n": str(self.random.getrandbits(64))}}).encode()
        return self.soak.keep_document(data, more.get("mediaType", ODD))

    def new_image(self, **more):
        blobs = self.random.sample(sorted(self.soak.blobs), self.random.randint(1, 4))
        config, *layers = (descriptor(self.soak.contents[digest]) for digest in blobs)
        return self.new_document(mediaType=MANIFEST, config=config, layers=layers, **more)

    def push_image(self, ledger):
        if self.random.random() < 0.1:
            self.push(ledger, self.new_document(odd=True), [self.tag()])
        elif len(ledger.present()) > MANIFESTS:
            self.delete_manifest(ledger)
        else:
            self.push(ledger, self.new_image(), self.some_tags(), self.random.random() < 0.5)

    def retag(self, ledger):
        if present := ledger.present():
            self.put(ledger, self.random.choice(present), [self.tag()])

    def push_index(self, ledger):
        images = [digest for digest in ledger.present() if self.soak.documents[digest].media_type == MANIFEST]
        if images:
            chosen = self.random.sample(images, min(2, len(images)))
            manifests = [descriptor(self.soak.documents[digest].data, MANIFEST) for digest in chosen]
            self.put(ledger, self.new_document(mediaType=INDEX, manifests=manifests), [self.tag()])

    def push_referrer(self, ledger):
        if present := ledger.present():
            subject = self.random.choice(present)
            digest = self.new_image(subject=descriptor(self.soak.contents[subject], MANIFEST))
            if self.push(ledger, digest, [], by_digest=True):
                answer = self.ask("GET", f"/v2/{ledger.name}/referrers/{subject}", allowed=(200,))
                if answer and answer.status == 200 and digest not in [each["digest"] for each in answer.json[
                        "manifests"]] and self.soak.disturbed.stamp(("hosted",)):
                    self.soak.finding(f"{ledger.name}@{digest} is not listed as a referrer of {subject}")

    def delete_tag(self, ledger):
        if tags := ledger.certain_tags():
            tag = self.random.choice(sorted(tags))
            ledger.deleted_tag(tag, certain=False)
            if self.status("DELETE", f"/v2/{ledger.name}/manifests/{tag}", allowed=(202,)) == 202:
                ledger.deleted_tag(tag, certain=True)

    def delete_manifest(self, ledger):
        listed = {child for digest, states in ledger.manifests.items() if True in states
                  for child in self.soak.documents[digest].children}
        if free := [digest for digest in ledger.present() if digest not in listed]:
            digest = self.random.choice(free)
            ledger.deleted(digest, certain=False)
            if self.status("DELETE", f"/v2/{ledger.name}/manifests/{digest}", allowed=(202,)) == 202:
                ledger.deleted(digest, certain=True)

    def delete_blob(self, ledger):
        """Of a blob that no manifest needs."""
        data = self.random.randbytes(self.random.randint(0, 5000))
        path = f"/v2/{ledger.name}/blobs/{self.soak.keep(data)}"
        if self.upload(ledger.name, data) and self.status("DELETE", path, allowed=(202,)) == 202:
            self.status("HEAD", path, allowed=(404,))

    def pull(self, ledger):
        if tags := ledger.certain_tags():
            tag = self.random.choice(sorted(tags))
            answer = self.get(ledger.name, "manifests", tag, ns=self.random.choice((None, self.soak.address)))
            if answer:
                if sha256(answer.body) != tags[tag]:
                    self.soak.finding(f"{ledger.name}:{tag} is {sha256(answer.body)}, not {tags[tag]}")
                for blob in self.soak.documents[tags[tag]].blobs:
                    self.get(ledger.name, "blobs", blob)

    def list(self, ledger):
        before = self.soak.disturbed.stamp(("hosted", "docker"))
        answer = self.ask("GET", f"/v2/{ledger.name}/tags/list", needs=("hosted", "docker"),
                          allowed=(200,) if ledger.present() else (200, 404))
        if answer and answer.status == 200 and before and before == self.soak.disturbed.stamp(("hosted", "docker")):
            listed, allowed = set(answer.json["tags"]), {tag for tag, digests in ledger.tags.items()
                                                         if digests != {None}}
            if not set(ledger.certain_tags()) <= listed <= allowed:
                self.soak.finding(f"{ledger.name} lists {listed}, and has {dict(ledger.tags)}")

    def pull_from_docker(self, ledger):
        """Of an image that only Docker has."""
        needs = ("hosted", "docker")
        name = f"library/{self.soak.name}-local"
        answer = self.get(name, "manifests", "1", "docker.io", needs=needs)
        for child in answer.json.get("manifests", [])[:1] if answer else ():
            answer = self.get(name, "manifests", child["digest"], "docker.io", needs=needs)
        for layer in answer.json["layers"] if answer else ():
            self.get(name, "blobs", layer["digest"], "docker.io", needs=needs)

    def pull_from_origin(self, ledger):
        """Of an image that Docker has to pull."""
        needs = ("hosted", "docker", "origin")
        origin, number = self.soak.gate.host, self.number
        self.get(f"{self.soak.name}/{number}", "manifests", "1", origin, needs=needs)
        answer = self.get(f"{self.soak.name}/{number}", "manifests", self.soak.pulled[number], origin, needs=needs)
        for layer in answer.json["layers"] if answer else ():
            self.get(f"{self.soak.name}/{number}", "blobs", layer["digest"], origin, needs=needs)
        if self.random.random() < 0.5:
            self.soak.forget_pulled(number)

    def adopt(self, ledger):
        """Push the manifest of an image that only Docker has, as it was read here."""
        answer = self.get(f"{self.soak.name}-local", "manifests", "1", needs=("hosted", "docker"))
        if answer and sha256(answer.body) in self.soak.documents:
            self.put(ledger, sha256(answer.body), [self.tag()], needs=("hosted", "docker"))

    def hang_up(self, ledger):
        """Send half of a request, or read half of a response."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.soak.port), 5) as client:
            if self.random.random() < 0.5:
                digest = sha256(b"never")
                client.sendall(f"POST /v2/{ledger.name}/blobs/uploads/?digest={digest} HTTP/1.1\r\nHost: x\r\n"
                               f"Content-Length: {10**6}\r\n\r\n".encode() + bytes(self.random.randrange(10**5)))
            else:
                tag = next(iter(ledger.certain_tags()), "t0")
                client.sendall(f"GET /v2/{ledger.name}/manifests/{tag} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                client.recv(10)


class RealClients(Client):
    """docker, crane, oras and skopeo. A command that fails during a fault is repeated afterwards, and must succeed."""

    def __init__(self, soak):
        super().__init__(soak, "real")
        self.own = [soak.ledgers.setdefault(name, Ledger(name)) for name in (
            f"{soak.name}/real", f"{soak.name}/real-copies")]
        self.first, self.second = self.own
        self.work = lab.SHARE / soak.name
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        self.steps = 0
        self.known = []  # what docker has pushed: tag, image of the engine

    def run(self):
        while not self.soak.ended.is_set():
            operation = self.random.choice((self.docker, self.docker, self.crane, self.oras, self.skopeo, self.delete,
                                            self.docker_pull))
            if operation in (self.docker, self.oras) or self.first.certain_tags():
                try:
                    operation()
                except Exception:
                    self.soak.finding(f"{operation.__name__}: {traceback.format_exc()}")
                self.soak.count(operation.__name__)

    def persist(self, *command, needs=("hosted",), done=lambda: False):
        """Run a command until it succeeds, or done() is true. Returns False if it fails and nothing was disturbed."""
        while True:
            with self.soak.operation():
                before = self.soak.disturbed.stamp(needs)
                result = lab.chroot(*command, check=False)
                if result.returncode == 0 or done():
                    return True
                if before and before == self.soak.disturbed.stamp(needs):
                    self.soak.finding(f"{' '.join(command)}: {result.stdout[-300:]} {result.stderr[-600:]}")
                    return False
            time.sleep(0.5)

    def push_with(self, ledger, tag, *command, **options):
        """Run a command that pushes, and learn what it has pushed."""
        ledger.tags[tag].add("?")
        if self.persist(*command, **options):
            with self.soak.operation():
                self.learn(ledger, tag)

    def learn(self, ledger, tag):
        """Fetch what was just pushed, with everything below it. The program has to have it, whatever the fault was."""
        digest = None
        while digest is None:
            digest = self.head(ledger.name, tag)
            if digest is None and self.soak.disturbed.stamp(("hosted",)):
                self.soak.finding(f"{ledger.name}:{tag} was pushed, and is not there")
                break
            if digest and not self.learn_below(ledger.name, digest):
                digest = None
        ledger.tags[tag] = {digest}
        self.learned(ledger, digest)

    def learned(self, ledger, digest):
        if digest:
            ledger.manifests[digest] = {True}
            for child in self.soak.documents[digest].children:
                self.learned(ledger, child)

    def learn_below(self, repository, digest):
        if digest in self.soak.documents:
            return True
        answer = self.get(repository, "manifests", digest)
        if answer is None:
            return False
        document = Document.parse(answer.body, answer.headers["Content-Type"])
        for blob in document.blobs:
            if blob not in self.soak.contents:
                found = self.get(repository, "blobs", blob)
                if found is None:
                    return False
                self.soak.keep(found.body)
        if not all(self.learn_below(repository, child) for child in document.children):
            return False
        self.soak.keep_document(answer.body, answer.headers["Content-Type"])
        return True

    def new_tag(self):
        self.steps += 1
        return f"r{self.steps}"

    def name_of(self, ledger, tag):
        return f"{self.soak.address}/{ledger.name}:{tag}"

    def a_tag(self):
        return self.random.choice(sorted(self.first.certain_tags()))

    def docker(self):
        tag = self.new_tag()
        name = self.name_of(self.first, tag)
        layer = lab.tar_of({"data": self.random.randbytes(self.random.randint(0, 500_000)), "tag": tag.encode()})
        while True:
            with self.soak.operation():
                before = self.soak.disturbed.stamp(("docker",))
                result = lab.chroot("docker", "-H", self.soak.engine.host, "import", "-", name, input=layer, text=False,
                                    check=False)
                if result.returncode == 0 or (before and before == self.soak.disturbed.stamp(("docker",))):
                    break
            time.sleep(0.5)
        self.push_with(self.first, tag, "docker", "-H", self.soak.engine.host, "push", name, needs=("hosted", "docker"))
        self.persist("docker", "-H", self.soak.engine.host, "rmi", "-f", name, needs=("docker",))

    def docker_pull(self):
        name = self.name_of(self.first, self.a_tag())
        docker = ("docker", "-H", self.soak.engine.host)
        self.persist(*docker, "pull", "-q", name, needs=("hosted", "docker"))
        self.persist(*docker, "rmi", "-f", name, needs=("docker",))

    def crane(self):
        tag, new = self.a_tag(), self.new_tag()
        name = self.name_of(self.first, tag)
        if self.random.random() < 0.5:
            self.push_with(self.first, new, "crane", "tag", "--insecure", name, new)
        else:
            self.push_with(self.second, new, "crane", "copy", "--insecure", name, self.name_of(self.second, new))
        self.persist("crane", "validate", "--insecure", "--remote", name)

    def oras(self):
        tag = self.new_tag()
        (self.work / "data.bin").write_bytes(self.random.randbytes(self.random.randint(1, 300_000)))
        self.push_with(self.second, tag, "sh", "-c", f"cd /lab/{self.soak.name} && oras push --plain-http "
                       f"{self.name_of(self.second, tag)} --artifact-type application/vnd.lab.thing data.bin")
        self.persist("sh", "-c", f"cd /lab/{self.soak.name} && oras pull --plain-http -o back "
                     f"{self.name_of(self.second, tag)}")

    def skopeo(self):
        new = self.new_tag()
        names = self.name_of(self.first, self.a_tag()), self.name_of(self.second, new)
        self.push_with(self.second, new, "skopeo", "copy", "--all", "--src-tls-verify=false", "--dest-tls-verify=false",
                       *[f"docker://{name}" for name in names])

    def delete(self):
        """Delete an image, with all its tags, if there are enough."""
        ledger = self.random.choice(self.own)
        tags = ledger.certain_tags()
        if len(tags) < 4:
            return
        tag = self.random.choice(sorted(tags))
        ledger.deleted(tags[tag], certain=False)
        name = f"{self.soak.address}/{ledger.name}@{tags[tag]}"
        if self.persist(*self.random.choice((
                ("crane", "delete", "--insecure", name),
                ("oras", "manifest", "delete", "--plain-http", "--force", name),
                ("skopeo", "delete", "--tls-verify=false", f"docker://{self.name_of(ledger, tag)}"))),
                done=lambda: self.head(ledger.name, tags[tag]) is None and self.soak.disturbed.stamp(("hosted",))):
            ledger.deleted(tags[tag], certain=True)


# ---- faults


class Faults:
    """One method for each fault. It returns when the fault has ended; clients work on meanwhile."""

    def __init__(self, soak):
        self.soak, self.random, self.client = soak, soak.random, Client(soak, "faults")
        self.damaged_beside = False  # whether anything but repositories was damaged
        self.all = [self.killed, self.killed_often, self.terminated, self.stopped, self.aged, self.no_descriptors,
                    self.file_size, self.store_limit, self.damaged, self.damaged]
        if soak.engine:
            self.all += [self.engine_stopped, self.engine_restarted, self.origin_stopped, self.origin_unreachable]

    def run(self, deadline):
        """Cause one fault after another, in an order that has all of them, and check after each."""
        order = []
        while time.monotonic() < deadline:
            if not order:
                order = self.random.sample(self.all, len(self.all))
            fault = order.pop()
            self.wait(0.2, 1)
            self.soak.faults[fault.__name__] += 1
            fault()
            self.recover()

    def wait(self, least, most):
        time.sleep(self.random.uniform(least, most))

    def recover(self):
        """Check that nothing is lost, when no fault is left."""
        with self.soak.pause():
            self.soak.wait_until_it_works()
            for ledger in self.soak.ledgers.values():
                if not any("?" in digests for digests in ledger.tags.values()):  # a command is going to be repeated
                    self.client.settle(ledger)
                    self.client.check(ledger)

    # ---- the program

    def killed(self, how=signal.SIGKILL):
        with self.soak.disturbed.of("hosted"):
            self.soak.stop(how)
            self.wait(0, 1)
            self.soak.start()
            self.soak.wait_until_it_works()

    def killed_often(self):
        with self.soak.disturbed.of("hosted"):
            for _ in range(4):
                self.soak.stop(signal.SIGKILL)
                self.soak.start()
                self.wait(0, 0.5)
            self.soak.wait_until_it_works()

    def terminated(self):
        self.killed(signal.SIGTERM)

    def stopped(self):
        """The process gets no time for some seconds."""
        with self.soak.disturbed.of("hosted"):
            with stopped(self.soak.program.process.pid):
                self.wait(1, 3)
            self.soak.wait_until_it_works()

    def aged(self):
        """Two days pass: after a restart, everything that nothing refers to is removed, while clients push."""
        with self.soak.disturbed.of("hosted"):
            with self.soak.pause():
                self.soak.stop()
                age(self.soak.store)
                self.soak.start()
            self.soak.wait_until_it_works()

    # ---- what it depends on

    def engine_stopped(self):
        with self.soak.disturbed.of("docker"):
            with stopped(self.soak.engine.pid()):
                self.wait(2, 6)
            self.soak.wait_until_it_works()

    def engine_restarted(self):
        with self.soak.disturbed.of("docker"):
            self.soak.engine.stop()
            try:
                self.wait(0, 2)
            finally:
                self.soak.engine.start()
            self.soak.wait_until_it_works()

    def origin_stopped(self):
        """The origin accepts connections, and says nothing for some seconds."""
        with self.soak.disturbed.of("origin"):
            self.soak.gate.cut()
            self.soak.gate = HangingGate(lab.ORIGINS["open"], self.soak.gate.address)
            self.wait(2, 5)
            self.soak.gate.open()

    def origin_unreachable(self):
        with self.soak.disturbed.of("origin"):
            self.soak.gate.cut()
            self.wait(1, 3)
            self.soak.gate = HangingGate(lab.ORIGINS["open"], self.soak.gate.address)
            self.soak.gate.open()

    # ---- limits

    def no_descriptors(self):
        with self.soak.disturbed.of("hosted"):
            pid = self.soak.program.process.pid
            used = len(list(Path(f"/proc/{pid}/fd").iterdir()))
            with limited(pid, resource.RLIMIT_NOFILE, used + self.random.choice((0, 2, 5))):
                self.wait(1, 3)
            self.soak.wait_until_it_works()

    def file_size(self):
        """Larger files cannot be written, as if the disk were full."""
        with self.soak.disturbed.of("hosted"), limited(
                self.soak.program.process.pid, resource.RLIMIT_FSIZE, self.random.choice((0, 100, 50_000))):
            self.wait(1, 3)

    def store_limit(self):
        with self.soak.disturbed.of("hosted"):
            self.soak.stop()
            used = sum(path.stat().st_size for path in (self.soak.store / "blobs").rglob("*") if path.is_file())
            self.soak.start("-store-limit", str(used + self.random.choice((0, 10_000, 1_000_000))))
            self.wait(1, 3)
            self.soak.stop()
            self.soak.start()
            self.soak.wait_until_it_works()

    # ---- damage

    def damaged(self):
        """Files of the store are damaged. Then everything that they concern is pushed again."""
        with self.soak.disturbed.of("hosted"):
            with self.soak.pause():
                self.recover_ledgers()
                restart = self.random.random() < 0.3
                if restart:
                    self.soak.stop()
                files = [path for path in self.soak.store.rglob("*") if path.is_file() and self.is_known(path)]
                for path in self.random.sample(sorted(files), min(len(files), self.random.choice((1, 5, 30)))):
                    self.damage(path)
                if restart:
                    self.soak.start()
            self.wait(0, 2)
            with self.soak.pause():
                self.heal()

    def recover_ledgers(self):
        for ledger in self.soak.ledgers.values():
            if not any("?" in digests for digests in ledger.tags.values()):
                self.client.settle(ledger)

    def is_known(self, path):
        """True if a file can be pushed again: its content is known, or it belongs to a manifest."""
        parts = path.relative_to(self.soak.store).parts
        if path.name[0] == "." or parts[0] not in ("repositories", "blobs"):
            return False
        return f"sha256:{path.name}" in self.soak.contents or "_tags" in parts or "_referrers" in parts

    def damage(self, path):
        kind = self.random.choice(("other bytes", "cut short", "removed", "folder", "empty"))
        self.soak.faults[f"damage: {kind}"] += 1
        self.damaged_beside = self.damaged_beside or "repositories" not in path.parts
        if kind in ("removed", "folder"):
            path.unlink()
            if kind == "folder":
                path.mkdir()
            return
        data = path.read_bytes()
        half = self.random.randint(0, max(len(data) - 1, 0))
        with open(path, "r+b") as file:  # in the very file: all of its links are concerned
            if kind == "other bytes":
                file.seek(half)
                file.write(bytes(byte ^ 0xFF for byte in data[half:half + 100]))
            else:
                file.truncate(half if kind == "cut short" else 0)

    def heal(self):
        """Push everything again that may be there, as clients do: what the program says it has is not sent."""
        for ledger in self.soak.ledgers.values():
            blobs = self.soak.store / "repositories" / ledger.name / "_blobs/sha256"
            for digest in [f"sha256:{path.name}" for path in blobs.glob("*")]:
                if digest in self.soak.contents and not self.client.need(ledger.name, digest):
                    self.soak.finding(f"{ledger.name}/blobs/{digest} cannot be pushed again")
            tags = collections.defaultdict(list)
            for tag, digests in ledger.tags.items():
                for digest in digests - {None, "?"}:
                    tags[digest].append(tag)
            wanted = [digest for digest, states in ledger.manifests.items() if True in states]
            for digest in sorted(wanted, key=lambda digest: len(self.soak.documents[digest].children)):
                ledger.manifests[digest] = {True}
                if not self.client.push(ledger, digest, [], by_digest=True):
                    self.soak.finding(f"{ledger.name}@{digest} cannot be pushed again")
                for tag in tags[digest]:
                    if not self.client.put(ledger, digest, [tag]):
                        self.soak.finding(f"{ledger.name}:{tag} cannot be pushed again")


class HangingGate(lab.Gate):
    """The way to the origin. Until it is opened, no response comes through."""

    BYTES = 0

    def __init__(self, origin, address=("127.0.0.1", 0)):
        super().__init__(origin, address)
        self.address = self._listener.getsockname()


@contextlib.contextmanager
def stopped(pid):
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def limited(pid, kind, soft):
    before, hard = resource.prlimit(pid, kind)
    resource.prlimit(pid, kind, (soft, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, kind, (before, hard))


def age(store, seconds=2 * DAY):
    """Let all files of a store be older."""
    then = time.time() - seconds
    for path in store.rglob("*"):
        if path.is_file():
            os.utime(path, (then, then))


# ---- from the start to the end


def in_docker(engine):
    """Return what an engine has: images with their names, and containers."""
    images = {(image["Id"], *sorted([*(image["RepoTags"] or ()), *(image["RepoDigests"] or ())]))
              for image in json.loads(engine.api("GET", "/images/json?all=1"))}
    return images | {container["Id"] for container in json.loads(engine.api("GET", "/containers/json?all=1"))}


class Run(Soak):
    """One run, from the start to the end."""

    def prepare(self):
        sizes = [0, 1, *(self.random.choice((200, 5000, 100_000)) for _ in range(BLOBS - 4)), 1_000_000, 3_000_000]
        self.blobs = [self.keep(self.random.randbytes(size)) for size in sizes]
        if not self.engine:
            return
        self.before, self.pulled = in_docker(self.engine), {}
        self.gate = HangingGate(lab.ORIGINS["open"])
        self.gate.open()
        for number in range(WORKERS):
            _, (self.pulled[number],) = lab.push_platforms(
                lab.ORIGINS["open"], f"{self.name}/{number}", "1", ["amd64"], [("a", self.random.randbytes(200_000))])
        layer = self.random.randbytes(400_000)
        self.engine.import_image(f"{self.name}-local:1", {"data": layer})

    def learn_local(self):
        """Learn the image that only Docker has, as it is served."""
        client = RealClients(self)
        answer = client.get(f"library/{self.name}-local", "manifests", "1", "docker.io")
        digest = sha256(answer.body)
        for blob in [answer.json["config"], *answer.json["layers"]] if "config" in answer.json else []:
            self.keep(client.get(f"library/{self.name}-local", "blobs", blob["digest"], "docker.io").body)
            self.keep_document(answer.body, answer.headers["Content-Type"])
        if digest not in self.documents:
            self.finding("the image that only Docker has is an index")
        return client

    def forget_pulled(self, number):
        """Let Docker remove what it has pulled for the program."""
        name = f"{self.gate.host}/{self.name}/{number}"
        self.engine.remove(f"{name}:1", f"{name}@{self.pulled[number]}")

    def work(self, seconds):
        self.started = time.monotonic()
        self.start()
        self.wait_until_it_works()
        clients = [self.learn_local()] if self.engine else []
        self.baseline = self.figures()
        clients += [Worker(self, number) for number in range(WORKERS)]
        threads = [threading.Thread(target=client.run) for client in clients]
        for thread in threads:
            thread.start()
        self.faulty = Faults(self)
        try:
            self.faulty.run(time.monotonic() + seconds)
        finally:
            self.ended.set()
            for thread in threads:
                thread.join()
        self.faulty.recover()

    # ---- the end

    def check(self):
        self.check_figures()
        self.stop()
        self.check_tidy()
        self.check_without_docker()
        self.check_verify()
        self.check_logs()

    def check_figures(self):
        """The numbers of threads and descriptors are back, soon after the last request."""
        deadline = time.monotonic() + SETTLED
        while time.monotonic() < deadline:
            figures = self.figures()
            if figures[0] <= self.baseline[0] and figures[1] <= self.baseline[1]:
                break
            time.sleep(0.2)
        else:
            self.finding(f"threads, descriptors: {figures}, and {self.baseline} at the start")
        self.final = figures

    def check_tidy(self):
        """Two days later, nothing half-written is left."""
        age(self.store)
        self.start()
        self.program.wait_for_line("store: tidied up")
        self.wait_until_it_works()
        self.stop()
        for path in self.store.rglob("*"):
            if path.is_file() and (path.name[0] == "." or path.parent.name == "_uploads"):
                self.finding(f"half-written: {path.relative_to(self.store)}, {path.stat().st_size} bytes")

    def check_without_docker(self):
        expected = {f"{ledger.name}:{tag}": digest for ledger in self.ledgers.values()
                    for tag, digest in ledger.certain_tags().items()}
        sparse = {digest for ledger in self.ledgers.values() for digest, states in ledger.manifests.items()
                  if states == {False}}
        try:
            walked = walk_without_docker(self.store, expected, sparse)
        except AssertionError as e:
            self.finding(f"without Docker: {str(e)[:3000]}")
            return
        for ledger in self.ledgers.values():
            for digest, states in ledger.manifests.items():
                if (f"{ledger.name}@{digest}" in walked) not in states:
                    self.finding(f"without Docker: {ledger.name}@{digest} was acknowledged as {states}")
            for tag, digests in ledger.tags.items():
                if "?" not in digests and walked.get(f"{ledger.name}:{tag}") not in digests:
                    self.finding(f"without Docker: {ledger.name}:{tag} was acknowledged as {digests}")
        self.walked = len(walked)

    def check_verify(self):
        command = [sys.executable, str(MODULE), "verify", "-store", str(self.store)]
        environment = {**os.environ, "DOCKER_HOST": "unix:///nowhere"}
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        if result.returncode and self.faulty.damaged_beside:
            print(f"verify found:\n{result.stdout}")
            subprocess.run([*command, "-repair"], capture_output=True, text=True, env=environment)
            result = subprocess.run(command, capture_output=True, text=True, env=environment)
        if result.returncode:
            self.finding(f"verify: status {result.returncode}\n{result.stdout[-2000:]}{result.stderr[-1000:]}")

    def check_logs(self):
        for program in self.programs:
            for text in ("a bug in this program", "Traceback"):
                for line in program.lines(text)[:3]:
                    self.finding(f"in the log: {line}")
                    at = program.log.index(line)
                    print("\n".join(program.log[at:at + 40]), file=sys.stderr)

    def clean(self):
        """Remove what this run has made in Docker; anything else that is new was left behind by the program."""
        if self.program:
            self.program.stop()
        if self.engine:
            self.clean_docker()
        shutil.rmtree(lab.SHARE / self.name, ignore_errors=True)
        if self.findings:
            print(f"the store is kept: {self.store}", file=sys.stderr)
        else:
            shutil.rmtree(self.folder)

    def clean_docker(self):
        self.gate.cut()
        ours = (f"{self.name}-local", self.address, self.gate.host)
        for entry in in_docker(self.engine) - self.before:
            if not isinstance(entry, str):
                self.engine.remove(*[name for name in entry[1:] if name.startswith(ours)])
        if left := in_docker(self.engine) - self.before:
            self.finding(f"left in Docker: {left}")
            self.engine.remove(*[entry[0] for entry in left if not isinstance(entry, str)])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", choices=[*lab.ENGINES, "none"], default="containerd")
    arguments = parser.parse_args()
    engine = lab.ENGINES.get(arguments.engine)
    if engine and not lab.is_up():
        parser.error("the lab is not up: run `python tests/lab.py up` as root")
    run = Run(arguments.seed, engine)
    try:
        run.prepare()
        run.work(arguments.minutes * 60)
        run.check()
    finally:
        run.clean()
    print(f"operations: {sum(run.operations.values())} {dict(sorted(run.operations.items()))}")
    print(f"faults: {sum(run.faults.values())} {dict(sorted(run.faults.items()))}")
    print(f"threads, descriptors: {run.baseline} at the start, {run.final} at the end")
    print(f"seed {arguments.seed}, {len(run.programs)} starts of the program, losses: {len(run.findings) or 'none'}")
    return 1 if run.findings else 0


if __name__ == "__main__":
    sys.exit(main())
