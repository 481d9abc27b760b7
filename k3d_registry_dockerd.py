#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = []
# ///
"""k3d-registry-dockerd: an OCI registry that answers out of the local Docker daemon.

Kubernetes in Docker (k3d) pulls its images from here, and gets what Docker already has: no download,
no import, no second copy. It is also a complete registry to push to.

The program is two registries behind one address:

    Handler -- Front --+-- Hosted    what was pushed here: repositories on our own disk. Knows nothing of Docker.
                       |      ^
                       |      |      Adoption, the only bridge: a manifest that is pushed brings what it refers to
                       |      |
                       +-- Mirror    what Docker has, or gets now. Knows nothing of pushes.
                              |
                              +-- ImageStore          content directory | content service | pulls under way
                              +-- ClassicImages       layer directory | export | an image's own registry

Everything that a pull needs is two questions, which Mirror answers:

    resolve(reference) -> digest      which content does this name mean, right now?
    content(digest)    -> bytes       who has these bytes?

The first is asked of Docker at every request by tag, so a node gets an image that was rebuilt a moment ago. The
second is asked of a short list of providers; content is addressed by digest, so it does not matter which of them
answers.

The life of one pull by a node, of an image that Docker has:

    HEAD /v2/library/app/manifests/1?ns=docker.io    Docker inspects docker.io/library/app:1
    GET  /v2/library/app/manifests/sha256:...        the manifest is read, by digest
    GET  /v2/library/app/blobs/sha256:...            config and layers are streamed, by digest

The life of one push: a client asks with HEAD what is here, and without `ns` that is only what was pushed. Blobs arrive
in uploads, are hashed on the way, and then belong to their repository. The manifest comes last. Whatever it refers
to that its repository lacks is brought from Docker first; then the image is there, whole.

    POST /v2/app/blobs/uploads/                      a session begins
    PATCH, PUT /v2/app/blobs/uploads/<session>       the bytes, and the digest that they must have
    PUT  /v2/app/manifests/1                         the image

Docker's containerd image store has manifests and layers as they were pulled, and their bytes come straight out of
it. Its classic store has neither. Where its folder can be read, layers are put together from that; otherwise the image
is exported once, into our own store.

Glossary, as in the OCI Distribution Specification:

    repository   a name for a family of images: library/alpine
    tag          a name for one image of a repository: 3.20
    digest       the hash of some content, which is its address: sha256:...
    reference    repository, tag or digest, and namespace: what a request asks for
    namespace    the registry an image comes from (the `ns` parameter that mirrors get): docker.io
    manifest     the JSON that lists an image's config and layers
    index        the JSON that lists manifests, one for each platform
    blob         any other content: a config, a layer
    upload       a blob that is arriving, known by its session
    referrer     a manifest about another one, its subject: a signature, for example

Chapters, in the order of what uses what; each says at its head which others it uses. All may use the first three.

     1 vocabulary        media types, limits and timeouts; the table of errors
     2 references        digests, repository names, and the names that mean the same
     3 manifests         what a manifest refers to
     4 ssh               a connection to Docker on another machine
     5 configuration     where Docker is (DOCKER_HOST), the credentials of docker login
     6 waiting           the deadline of a request; jobs that many wait for
     7 activity          what the program does, for people to see
     8 engine            the Docker Engine API
     9 transfers         what a provider gives; content on its way
    10 disk              our own folder, whose files are whole or not there
    11 store             content by digest, and its owners
    12 writers           content that is being written
    13 hosted            repositories, uploads, tags, referrers
    14 content service   Docker's content by way of its socket: HTTP/2, gRPC, protobuf
    15 layers            the files of Docker's classic store
    16 export            the tar of docker save
    17 origin            an image's own registry
    18 images            how Docker's image stores differ
    19 pulls             images that Docker pulls, and content that is fetched because Docker lacks it
    20 mirror            names to content: look up, pull, recover
    21 front             who answers; adoption
    22 verification      what is damaged in the store, and how to get it again
    23 status            what people and monitoring ask this program about itself
    24 page              the status for people, as HTML and as plain text
    25 requests          parsed requests, responses as values
    26 end-points        one method for each end-point of the specification
    27 admission         which writes, web pages and connections are let in
    28 server            HTTP on a socket, the log's lines
    29 configurations    how others are told to use this registry
    30 settings          flags, variables, the settings file
    31 doctor            the usual causes of trouble, one by one
    32 command line      subcommands, signals
"""

from __future__ import annotations

import argparse
import base64
import binascii
import codecs
import collections
import contextlib
import dataclasses
import datetime
import errno
import fnmatch
import functools
import gzip
import hashlib
import heapq
import html
import http.client
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import re
import resource
import secrets
import select
import shutil
import signal
import socket
import socketserver
import ssl
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import weakref
import zlib
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Concatenate, Generic, NamedTuple, ParamSpec, Protocol, TypeVar

__version__ = "1.0.0"
__all__ = ["Digest", "Engine", "EngineHost", "Front", "Hosted", "Mirror", "Reference", "RegistryError", "Server",
           "Store", "main"]

K = TypeVar("K")
T = TypeVar("T")


# =====================================================================================================================
# 1. Vocabulary: media types, limits, timeouts, and errors
# =====================================================================================================================

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER_TAR = "application/vnd.oci.image.layer.v1.tar"
DOCKER_SCHEMA1 = "application/vnd.docker.distribution.manifest.v1+prettyjws"
# The Accept header of a request for a manifest or an index.
MANIFEST_TYPES = ", ".join((OCI_INDEX, OCI_MANIFEST, "application/vnd.docker.distribution.manifest.list.v2+json",
                            "application/vnd.docker.distribution.manifest.v2+json", "*/*"))

KIB, MIB = 1024, 1024 * 1024

MANIFEST_LIMIT = 4 * MIB    # bytes of a manifest; the distribution spec asks for at least 4 MiB
MANIFEST_ENTRIES = 4000     # descriptors in a manifest; an image has at most 127 layers, a large index some hundreds
ARTIFACT_TYPE_LIMIT = 255   # characters of an artifact type, which is a media type (RFC 6838, 4.2)
PAGE_LIMIT = MANIFEST_LIMIT - KIB  # bytes of the entries on a page of referrers, which clients read like a manifest
TAG_LIMIT = 100             # tags that one push of a manifest may set; the spec's development version asks for 10
SIZE_LIMIT = 2**63          # bytes of content: sizes have to be smaller
LAYERS_LIMIT = 127          # layers of an image of Docker's, and unknown manifests of an index that it is asked for
BLOBS_LIMIT = 1000          # blobs fetched at once, or for one manifest
LINE_LIMIT = KIB            # bytes of files that hold a name or a digest
JSON_LIMIT = 64 * MIB       # bytes of an answer of the engine (lists of images can be long)
PIECE = 256 * KIB           # bytes per read or write of a stream
SENDFILE_STEP = 16 * MIB    # bytes per system call when a file is sent
HEAD_LIMIT = 64 * KIB       # bytes of a request's first line and headers
HEADERS_LIMIT = 100         # headers of a request, and trailer lines after a chunked body
BODY_LIMIT = 16 * MIB       # bytes of an unused request body that are read, so that the client gets the answer
CHUNK_LINE = 4 * KIB        # bytes of a line of the chunked coding: a chunk size with extensions, or a trailer

ENGINE_TIMEOUT = 15         # seconds Docker may take to begin an answer; nodes give up after 30
PULL_TIMEOUT = 300          # seconds without data from a pull or an export
EARLY_ANSWER = 5            # seconds that a request waits for the result of a pull; most failures occur within
LAST_ANSWER = 18            # seconds after which a request gets an answer in any case, from what is known then
ARRIVAL_INTERVAL = 0.2      # seconds between two checks for content of a running pull
IDLE_TIMEOUT = 120          # seconds after which an idle client connection is closed
HEAD_TIMEOUT = 30           # seconds that a request's first line and headers may take, all of them
BODY_RATE = KIB             # bytes per second that the body of a request has to bring on average
BODY_PATIENCE = 120         # seconds that a client may be behind that
STALL_TIMEOUT = 300         # seconds for which a client may read nothing of a body; the kubelet has a similar limit
ORIGIN_TIMEOUT = 30         # seconds without data from an image's own registry
LIST_ATTEMPTS = 5           # Docker cannot list its images when one of them is removed at the same time
ENGINE_FRESH = 10           # seconds for which the engine's description is cached
PRESENCE_FRESH = 5          # seconds for which content that was found is assumed to exist
WARMING_PULLS = 2           # pulls at once of the images that Docker is to have from the start
WARMING_PAUSES = (5, 10, 20, 40, 80, 160, 300)  # seconds before each next try of those that failed
WATCH_INTERVAL = 1          # seconds between two redrawings of a terminal
PROGRESS_INTERVAL = 5       # seconds between two progress lines
STOP_INTERVAL = 0.1         # seconds between two looks whether the server is to end
STOP_GRACE = 5              # seconds that running requests get to finish on shutdown
EVICTION_AGE = 3600         # seconds that unreferenced content is kept after its last use
FETCHED_AGE = 7 * 24 * 3600  # seconds that copies are kept after their last use, except exports
SERVED_AGE = 300            # seconds that content which can be had again is kept after its last use when room is needed
UPLOAD_AGE = 24 * 3600      # seconds that an upload is kept after its last byte, and a blob without a manifest
TIDY_INTERVAL = 3600        # seconds between two cleanups of the store

MINIMUM_FREE = 10**9        # bytes of the disk that pushes and copies leave free
VERIFIED_LIMIT = 50_000     # files whose content is known

FETCHES = 10                # fetches of blobs of one manifest that are started at once
PULLS_LIMIT = 100           # pulls by Docker, exports, fetches of manifests at once; each has a thread
MEMORY_LIMIT = 1000         # entries of what is remembered for a while
MANIFEST_REMEMBERED = 32 * KIB  # bytes of the largest manifest that is cached
LISTEN_BACKLOG = 512        # connections waiting to be accepted: many nodes start at the same time
CONNECTIONS_LIMIT = 4096    # connections of clients unless -max-connections says otherwise: each has a thread
DESCRIPTORS_LIMIT = 65536   # descriptors that this process asks for, if the system allows more
DESCRIPTORS_EACH = 3        # descriptors that a request needs: its connection, a file, a connection to Docker

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")  # of HTTP that are known here
API_VERSION = (1, 51)       # newest version of the Engine API that this program was written against

# The exceptions that reading malformed JSON from outside may raise.
MALFORMED_ERRORS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)

log = logging.getLogger("k3d-registry-dockerd")


def human_bytes(count: float) -> str:
    """Format a number of bytes: 999 B, 1.2 kB, 3.4 MB (powers of 1000, like docker)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_seconds(seconds: float) -> str:
    """Format a number of seconds: 0.4 ms, 23 ms, 1.3 s, 2.5 min, 3.5 h, 2.0 days."""
    for limit, unit, size, digits in ((0.01, "ms", 0.001, 1), (1, "ms", 0.001, 0), (100, "s", 1, 1),
                                      (6000, "min", 60, 1), (48 * 3600, "h", 3600, 1)):
        if seconds < limit:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds / 86400:.1f} days"


def some_of(names: Iterable[object]) -> str:
    """Name the first few of many, and say how many more there are: "a, b, and 3 more"."""
    texts = [str(name) for name in names]
    return ", ".join(texts[:5]) + (f", and {len(texts) - 5} more" if len(texts) > 5 else "")


def printable(text: str, limit: int = 1000) -> str:
    """Escape control characters in text from outside, and shorten it to limit characters. Good text stays as it is."""
    text = text if len(text) <= limit else f"{text[:limit]}…"
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


@contextlib.contextmanager
def on_failure(action: Callable[[], Any]) -> Iterator[None]:
    """Call an action if the body of the `with` raises."""
    try:
        yield
    except BaseException:
        action()
        raise


class Memory(dict[K, T]):
    """Remembers things for a while: when there are too many, all are forgotten. Needs no lock."""

    def __setitem__(self, key: K, value: T) -> None:
        if len(self) >= MEMORY_LIMIT:
            self.clear()
        super().__setitem__(key, value)


class Recent(dict[K, T]):
    """The values that were set last, each under its key, the newest last."""

    def __init__(self, limit: int):
        super().__init__()
        self._limit = limit

    def __setitem__(self, key: K, value: T) -> None:
        self.pop(key, None)
        super().__setitem__(key, value)
        if len(self) > self._limit:
            del self[next(iter(self))]


def call_engine(name: str, text: str) -> str:
    """Put the engine's name, Docker or Podman, into a text that says Docker. Names of images that have it stay."""
    return re.sub(r"(?<![^\s(])Docker(?=[\s,;:)']|\.?(?:\s|$))", name, text)


class OneLineEach(logging.Filter):
    """Makes each message of the log one line of printable text.

    Messages may hold text of clients, of registries and of Docker: it must not forge lines, nor control a terminal.
    """

    LIMIT = 4000  # characters

    def filter(self, record: logging.LogRecord) -> bool:
        """See logging.Filter. A traceback has more lines, but each is indented."""
        record.msg, record.args = printable(record.getMessage(), self.LIMIT), ()
        if record.exc_info and not record.exc_text:
            lines = logging.Formatter().formatException(record.exc_info).splitlines()
            record.exc_text = "\n".join(f"  {printable(line)}" for line in lines)
        return True


log.addFilter(OneLineEach())


# Code -> HTTP status and message. The first group is the table of OCI Distribution Spec v1.1, "Error
# Codes"; the second group is specific to this registry.
ERRORS: Mapping[str, tuple[int, str]] = {
    "BLOB_UNKNOWN":          (404, "blob unknown to registry"),
    "BLOB_UPLOAD_INVALID":   (400, "blob upload invalid"),
    "BLOB_UPLOAD_UNKNOWN":   (404, "blob upload unknown to registry"),
    "DENIED":                (403, "requested access to the resource is denied"),
    "DIGEST_INVALID":        (400, "provided digest did not match uploaded content"),
    "MANIFEST_BLOB_UNKNOWN": (404, "manifest references a manifest or blob unknown to registry"),
    "MANIFEST_INVALID":      (400, "manifest invalid"),
    "MANIFEST_UNKNOWN":      (404, "manifest unknown to registry"),
    "NAME_INVALID":          (400, "invalid repository name"),
    "NAME_UNKNOWN":          (404, "repository name not known to registry"),
    "SIZE_INVALID":          (400, "provided length did not match content length"),
    "TOOMANYREQUESTS":       (429, "too many requests"),
    "UNAUTHORIZED":          (401, "authentication required"),
    "UNSUPPORTED":           (405, "the operation is unsupported"),

    "REQUEST_INVALID":       (400, "the request is malformed"),
    "NOT_FOUND":             (404, "no such endpoint"),
    "STILL_PULLING":         (408, "Docker is still pulling the image"),
    "REQUEST_TIMEOUT":       (408, "the request took too long to arrive"),
    "RANGE_INVALID":         (416, "the requested range cannot be satisfied"),
    "UPLOAD_BUSY":           (409, "another request writes to this upload"),
    "MANIFEST_TOO_LARGE":    (413, "the manifest is too large"),
    "TOO_MANY_TAGS":         (414, "too many tags at once"),
    "TARGET_TOO_LONG":       (414, "the request target is too long"),
    "HEAD_TOO_LARGE":        (431, "the headers are too large"),
    "METHOD_UNKNOWN":        (501, "the method is not known"),
    "VERSION_UNKNOWN":       (505, "the version of HTTP is not supported"),
    "UNKNOWN":               (500, "internal error"),
    "STORE_FAILED":          (500, "this registry's own store failed"),
    "STORE_FULL":            (507, "this registry's store is full"),
    "ENGINE_FAILED":         (502, "Docker failed"),
    "ORIGIN_UNAVAILABLE":    (502, "Docker could not get the image from its registry"),
    "UNAVAILABLE":           (503, "the service is unavailable"),
}


class RegistryError(Exception):
    """An error with a code of ERRORS, which Handler converts to a response. headers are additional HTTP headers.

    detail tells the user what went wrong and, if known, what to do about it. It must never contain a credential.
    """

    def __init__(self, code: str, detail: str, headers: Mapping[str, str] | None = None):
        super().__init__(f"{code}: {detail}")
        self.code, self.detail, self.headers = code, detail, dict(headers or {})
        self.status, self.message = ERRORS[code]

    def body(self, named: Callable[[str], str] = str) -> bytes:
        """Return the error as JSON (OCI Distribution Spec v1.1, "Error Codes"). named puts the engine's name in."""
        # Most clients only show the message, so it includes the detail.
        error = {"code": self.code, "message": named(f"{self.message}: {self.detail}"), "detail": named(self.detail)}
        return json.dumps({"errors": [error]}).encode()


# =====================================================================================================================
# 2. References: what a request names
# =====================================================================================================================

# OCI Distribution Spec v1.1, "Pulling manifests": <name> and <reference>. A name without its registry's host has at
# most 255 characters (github.com/distribution/reference).
REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")
NAME_LENGTH = 255

# OCI Image Spec v1.1, "Digests": the registered algorithms.
DIGEST = re.compile(r"(sha256):([0-9a-f]{64})|(sha512):([0-9a-f]{128})")
MEDIA_TYPE = re.compile(r"[\w.+-]{1,127}/[\w.+-]{1,127}", re.ASCII)

# Layers that a registry need not hold (OCI Image Spec v1.1, "Non-Distributable Layers"; Docker's foreign ones).
NON_DISTRIBUTABLE = re.compile(r"\.nondistributable\.|\.foreign\.")

# The host of an image name in Docker's grammar (github.com/distribution/reference).
HOST = re.compile(r"(?:(?!-)[a-zA-Z0-9-]+(?<!-)(?:\.(?!-)[a-zA-Z0-9-]+(?<!-))*|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?")


@dataclass(frozen=True)
class Digest:
    """The address of content: a hash algorithm and the hash in lower-case hexadecimal."""

    algorithm: str
    hex: str

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Parse "sha256:..." or "sha512:...". Raises ValueError."""
        match = DIGEST.fullmatch(text)
        if not match:
            raise ValueError(f"{text!r} is not a digest (sha256 or sha512)")
        return cls(*filter(None, match.groups()))

    @classmethod
    def of(cls, data: bytes, algorithm: str = "sha256") -> Digest:
        """Compute the digest of bytes."""
        return cls(algorithm, hashlib.new(algorithm, data).hexdigest())

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"


def requested_digest(text: str | None) -> Digest:
    """Parse the digest that a request must have. Raises DIGEST_INVALID."""
    try:
        return Digest.parse(text or "")
    except ValueError as e:
        raise RegistryError("DIGEST_INVALID", str(e)) from None


def is_host(text: str) -> bool:
    """Return True if Docker treats text before the first slash of a name as a registry's host.

    A word other than localhost is not a host (`foo/app` is `docker.io/foo/app`), unless it has a dot, a port or a
    capital letter (github.com/distribution/reference, splitDockerDomain).
    """
    return bool(HOST.fullmatch(text)) and (text == "localhost" or bool(set(text) & set(".:")) or text != text.lower())


LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
NAMES_LIMIT = 16  # names of this registry under which Docker is asked for an image


def names_us(namespace: str, names: Iterable[str]) -> bool:
    """Return True if a namespace probably is this registry, whose known names are given.

    k3d maps its port, so that nodes reach k3d-x:12345 as k3d-x:5000. And pods may use the name localhost:12345, to
    which a developer has pushed.
    """
    name, *own = (re.sub(r":\d+$", "", text) for text in (namespace, *names))
    return name in own or is_loopback(name)


def container_names(container: Mapping[str, Any], port: int) -> tuple[str, ...]:
    """Return the names of a registry that listens on a port of a container: HOST:PORT, each at most once.

    container is what Docker shows of it. Names by which this machine reaches a published port come first, then those
    of the container on its networks. On the network of the machine itself it has none. Raises one of MALFORMED_ERRORS.
    """
    settings, config = container.get("NetworkSettings") or {}, container.get("Config") or {}
    is_on_host = (container.get("HostConfig") or {}).get("NetworkMode") == "host"
    published = [(str(binding["HostIp"]), int(binding["HostPort"]))
                 for binding in (settings.get("Ports") or {}).get(f"{port}/tcp") or ()]
    if is_on_host:
        published.append(("", port))
    anywhere = ("", "0.0.0.0", "::", "127.0.0.1", "::1")  # noqa: S104
    outside = [f"{name}:{number}" for host, number in published
               for name in (LOOPBACK[:2] if host in anywhere else (f"[{host}]" if ":" in host else host,))]
    found = [str(container.get("Name") or "").lstrip("/"), str(config.get("Hostname") or "")]
    for network in (settings.get("Networks") or {}).values():
        found += [str(name) for key in ("DNSNames", "Aliases") for name in network.get(key) or ()]
    inside = [f"{name}:{port}" for name in found if not is_on_host and name != str(container.get("Id"))[:12]]
    return tuple(dict.fromkeys(name for name in (*outside, *inside) if is_host(name)))[:NAMES_LIMIT]


def is_loopback(name: str) -> bool:
    """Return True if the name of a registry, with or without a port, means it on its own machine only."""
    return re.sub(r":\d+$", "", name) in LOOPBACK


def is_address(name: str) -> bool:
    """Return True if the name of a registry, with a port, is an IP address, or localhost."""
    host = name.rpartition(":")[0]
    try:
        return host == "localhost" or bool(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        return False


def names_for_nodes(names: Iterable[str]) -> list[str]:
    """Return those names of a registry, HOST:PORT, that mean it on other machines and in containers, too.

    Those of its own container come first: an address of this machine may be closed to containers.
    """
    return sorted((name for name in names if not is_loopback(name)), key=is_address)


def docker_name(name: str) -> tuple[str, str]:
    """Split an image name as Docker does into registry and repository: alpine is docker.io, library/alpine.

    So are docker.io/alpine and index.docker.io/alpine.
    """
    host, slash, rest = name.partition("/")
    if not slash or not is_host(host):
        host, rest = "docker.io", name
    if host not in ("docker.io", "index.docker.io"):
        return host, rest
    return "docker.io", rest if "/" in rest else f"library/{rest}"


def repository_of(name: str) -> str:
    """Return an image name without its tag or digest: alpine for alpine:3 and for alpine@sha256:..."""
    name = name.partition("@")[0]
    repository, _, tag = name.rpartition(":")
    return repository if repository and "/" not in tag else name


@dataclass(frozen=True)
class Reference:
    """The name of a manifest or blob: a repository, a tag or digest (target), and a namespace or None."""

    repository: str
    target: str | Digest
    namespace: str | None = None
    written: str | None = None  # the repository as the request has it, if it began with the namespace

    @classmethod
    def parse(cls, repository: str, target: str, namespace: str | None = None,
              bad_tag: str = "MANIFEST_UNKNOWN") -> Reference:
        """Validate the parts of a request for a manifest.

        Raises NAME_INVALID for an invalid repository or namespace, DIGEST_INVALID for an invalid digest, and bad_tag
        for an invalid tag: no manifest can have it.
        """
        if ":" in target:
            return cls.parse_digest(repository, target, namespace)
        cls.check_repository(repository, namespace)
        if not TAG.fullmatch(target):
            raise RegistryError(bad_tag, f"{target!r} is not a tag")
        return cls(repository, target, namespace)

    @classmethod
    def parse_digest(cls, repository: str, digest: str, namespace: str | None = None) -> Reference:
        """Validate the parts of a request that must have a digest. Raises the same errors as parse()."""
        cls.check_repository(repository, namespace)
        return cls(repository, requested_digest(digest), namespace)

    @classmethod
    def check_repository(cls, repository: str, namespace: str | None) -> None:
        """Raise NAME_INVALID if the repository or the namespace is invalid."""
        if not REPOSITORY.fullmatch(repository) or len(repository) > NAME_LENGTH:
            raise RegistryError("NAME_INVALID", f"{repository!r} is not a repository name")
        cls.check_namespace(namespace)

    @staticmethod
    def check_namespace(namespace: str | None) -> None:
        """Raise NAME_INVALID if there is a namespace that is not the host of a registry."""
        if namespace is not None and not is_host(namespace):
            raise RegistryError("NAME_INVALID", f"the ns parameter {namespace!r} is not a registry's host: "
                                                "a domain with a dot, a port or a capital letter, or localhost")

    @property
    def digest(self) -> Digest:
        """The target of a reference that is known to have a digest."""
        assert isinstance(self.target, Digest)
        return self.target

    def of_path(self) -> Reference | None:
        """Return what this means if its repository begins with a registry's host: quay.io/a is a, of quay.io; or None.

        CRI-O, Podman and skopeo ask a mirror that way, and containerd with `override_path`, which also sends a
        namespace.
        """
        host, slash, rest = self.repository.partition("/")
        if slash and is_host(host) and self.namespace in (None, host):
            return Reference(rest, self.target, host, None if self.namespace else self.repository)
        return None

    def docker_repository(self) -> str:
        """Return the repository with its namespace: docker.io/library/alpine."""
        return f"{self.namespace}/{self.repository}" if self.namespace else self.repository

    def aliases(self, names: tuple[str, ...]) -> Iterator[Reference]:
        """Yield the references by which Docker may know this image, the most likely first.

        Without a namespace, the image is one of this registry, or one that Docker shows by the same name. names are
        those of this registry, the one that the client uses first.
        """
        if self.written:
            yield from Reference(self.written, self.target).aliases(names)
            return
        for name in (self.namespace,) if self.namespace else names[:1]:
            hosts = [name]
            if names_us(name, names):
                port = re.search(r":\d+$", name)
                hosts += [f"{loopback}{port[0] if port else ''}" for loopback in LOOPBACK[:2]]
            if name in names:
                hosts += names
            yield from map(self.under, dict.fromkeys(hosts))
        if self.namespace is None and self.repository != "sha256":  # which Docker takes for the ID of an image
            yield self

    def under(self, namespace: str | None) -> Reference:
        """Return the same repository and target in another namespace."""
        return Reference(self.repository, self.target, namespace)

    def __str__(self) -> str:
        separator = "@" if isinstance(self.target, Digest) else ":"
        return f"{self.docker_repository()}{separator}{self.target}"


def docker_reference(text: str) -> Reference:
    """Parse the name of an image as `docker pull` takes it: alpine, quay.io/a/b:1, x@sha256:... Raises ValueError."""
    name, at, digest = text.partition("@")
    bare = repository_of(name)
    host, repository = docker_name(bare)
    tag = name[len(bare) + 1:] if name != bare else "latest"
    try:
        found = Reference.parse(repository, tag, host)
        return Reference.parse_digest(repository, digest, host) if at else found
    except RegistryError as e:
        raise ValueError(f"{text!r} is not the name of an image: {e.detail}") from None


# =====================================================================================================================
# 3. Manifests: what an image consists of
# =====================================================================================================================


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object as RFC 8259 has it: UTF-8 without a byte order mark, no NaN. Raises ValueError."""
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        document = json.loads(data.decode(), parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(document, dict):
        raise ValueError("it is a value of another type")
    return document


def manifest_type(data: bytes) -> str | None:
    """Return the media type of a manifest or an index, or None if data is neither.

    Without a `mediaType`, it is derived from the other properties (OCI Image Spec v1.1).
    """
    try:
        document = parse_object(data)
    except ValueError:
        return None
    if document.get("schemaVersion") == 1:
        return DOCKER_SCHEMA1
    if document.get("schemaVersion") != 2:
        return None
    declared = document.get("mediaType")
    if isinstance(declared, str) and MEDIA_TYPE.fullmatch(declared):
        return declared
    if isinstance(document.get("manifests"), list):
        return OCI_INDEX
    return OCI_MANIFEST if isinstance(document.get("config"), dict) else None


def descriptors(document: Mapping[str, Any], *names: str) -> Iterator[tuple[Digest, Mapping[str, Any]]]:
    """Yield the descriptors in the named properties of a parsed manifest or index, with their digests.

    Malformed ones are ignored: unlike pushed manifests, those of Docker are not validated.
    """
    for name in names:
        value: Any = document.get(name)
        for descriptor in value if isinstance(value, list) else [value]:
            with contextlib.suppress(*MALFORMED_ERRORS):
                yield Digest.parse(descriptor["digest"]), descriptor


def platform_of(platform: Any) -> str:
    """Return an object with os, architecture and variant as Docker writes it: linux/arm64/v8. Empty if it has none."""
    parts = [platform.get(key) for key in ("os", "architecture", "variant")] if isinstance(platform, dict) else []
    return "/".join(str(part) for part in parts if part)


def same_platform(one: str, other: str) -> bool:
    """Return True if two platforms have the same operating system and architecture, whatever the variant."""
    return one.split("/")[:2] == other.split("/")[:2]


def is_size(value: Any) -> bool:
    """Return True if a value of a parsed document is the size of content in bytes."""
    return type(value) is int and 0 <= value < SIZE_LIMIT


@dataclass(frozen=True)
class Manifest:
    """A manifest or index with its exact bytes."""

    digest: Digest
    media_type: str
    data: bytes

    @classmethod
    def accept(cls, data: bytes, content_type: str | None, algorithm: str) -> Manifest:
        """Validate a pushed manifest. It may have any media type, but its descriptors must be valid.

        The media type is that of the Content-Type header, which must not contradict the `mediaType` in the JSON
        (OCI Image Spec v1.1, "mediaType"). Raises MANIFEST_INVALID.
        """
        if sum(data.count(mark) for mark in b"{[,") > 60 * MANIFEST_ENTRIES:  # parsed, that would take much memory
            raise RegistryError("MANIFEST_INVALID", "the manifest has too many elements")
        declared = (content_type or "").partition(";")[0].strip()
        own = manifest_type(data)
        media_type = declared or own
        # Other types than application/... may be shown by a browser, which the bytes of a manifest are not meant for.
        if media_type is None or not MEDIA_TYPE.fullmatch(media_type) or not media_type.lower().startswith(
                "application/"):
            raise RegistryError("MANIFEST_INVALID", f"Content-Type: {declared!r} is not a manifest's media type")
        if own and own.lower() == media_type.lower():
            media_type = own  # clients compare them exactly
        manifest = cls(Digest.of(data, algorithm), media_type, data)
        if own == DOCKER_SCHEMA1:
            raise RegistryError("MANIFEST_INVALID", "manifests of schema version 1 are not supported")
        stated = manifest.document.get("mediaType")
        if stated is not None and str(stated).lower() != media_type.lower():
            raise RegistryError("MANIFEST_INVALID", f"the Content-Type is {media_type}, but the manifest's own "
                                                    f"mediaType is {stated!r}")
        manifest.check()
        return manifest

    @functools.cached_property
    def document(self) -> Mapping[str, Any]:
        """The parsed manifest. Raises MANIFEST_INVALID if it is not a JSON object."""
        try:
            return parse_object(self.data)
        except ValueError as e:
            raise RegistryError("MANIFEST_INVALID", f"the manifest is not a JSON object: {e}") from None

    def check(self) -> None:
        """Raise MANIFEST_INVALID if a property that holds descriptors is malformed, or holds too many."""
        lists, single = ("layers", "blobs", "manifests"), ("config", "subject")
        found = {name: self.document[name] for name in (*single, *lists) if self.document.get(name) is not None}
        for name, value in found.items():
            if isinstance(value, list) != (name in lists):
                raise RegistryError("MANIFEST_INVALID", f"{name} is not a {'list' if name in lists else 'descriptor'}")
        count = sum(len(found.get(name, ())) for name in lists)
        if count > MANIFEST_ENTRIES:
            raise RegistryError("MANIFEST_INVALID", f"the manifest lists {count} descriptors; the limit is "
                                                    f"{MANIFEST_ENTRIES}")
        for name, value in found.items():
            for descriptor in value if name in lists else [value]:
                self._check_descriptor(name, descriptor)
        self._check_referrer()

    def _check_referrer(self) -> None:
        """Raise MANIFEST_INVALID if a property that lists of referrers show has the wrong type."""
        kinds = (self.document.get("artifactType"), (self.document.get("config") or {}).get("mediaType"))
        annotations = self.document.get("annotations")
        if not all(kind is None or (isinstance(kind, str) and len(kind) <= ARTIFACT_TYPE_LIMIT) for kind in kinds):
            raise RegistryError("MANIFEST_INVALID", "artifactType or the config's mediaType is not a short string")
        if annotations is not None and not (isinstance(annotations, dict) and all(
                isinstance(value, str) for value in annotations.values())):
            raise RegistryError("MANIFEST_INVALID", "annotations are not an object of strings")

    @staticmethod
    def _check_descriptor(name: str, descriptor: Any) -> None:
        """Raise MANIFEST_INVALID if a descriptor is malformed (OCI Image Spec v1.1, "Properties")."""
        try:
            Digest.parse(descriptor["digest"])
            size = descriptor.get("size")
        except MALFORMED_ERRORS as e:
            raise RegistryError("MANIFEST_INVALID", f"{name} has a descriptor without a valid digest: {e}") from None
        if not is_size(size):
            raise RegistryError("MANIFEST_INVALID", f"{name} has a descriptor without a valid size: {size!r}")

    def sizes(self, *names: str, foreign: bool = False) -> dict[Digest, int]:
        """Return the digests in the named properties with their sizes in bytes.

        foreign selects the layers that a registry need not have, because they have other sources, instead of the rest.
        """
        return {digest: descriptor["size"] for digest, descriptor in descriptors(self.document, *names)
                if is_size(descriptor.get("size")) and foreign == bool(
                    descriptor.get("urls") or NON_DISTRIBUTABLE.search(str(descriptor.get("mediaType"))))}

    def platforms(self) -> dict[Digest, Mapping[str, Any]]:
        """Return the manifests of an index that are images, with their descriptors.

        Attestations have an unknown platform (docs.docker.com/build/metadata/attestations/attestation-storage).
        """
        return {digest: descriptor for digest, descriptor in descriptors(self.document, "manifests")
                if platform_of(descriptor.get("platform")).split("/")[0] != "unknown"}

    def listed(self, *names: str) -> list[Digest]:
        """Return the digests in the named properties, each once."""
        return list(dict(descriptors(self.document, *names)))

    @property
    def subject(self) -> Digest | None:
        """The digest of the `subject`, or None."""
        return next(iter(self.listed("subject")), None)

    def referrer(self) -> dict[str, Any]:
        """Return the descriptor for a list of referrers (OCI Distribution Spec v1.1, "Listing Referrers")."""
        config, annotations = self.document.get("config"), self.document.get("annotations")
        fallback = config.get("mediaType") if isinstance(config, dict) else None
        artifact_type = self.document.get("artifactType") or fallback
        return {"mediaType": self.media_type, "digest": str(self.digest), "size": len(self.data),
                **({"artifactType": artifact_type} if artifact_type else {}),
                **({"annotations": annotations} if isinstance(annotations, dict) else {})}


def make_manifest(config: tuple[Digest, int], *layers: tuple[Digest, int]) -> bytes:
    """Make a manifest from the digests and sizes (bytes) of a config and its layers.

    It is identical to the manifest in an export of Docker 25 and newer (github.com/moby/moby,
    image/tarexport/save.go), so that the digest of an image does not depend on how it is served.
    """
    (config_part, *layer_parts) = (
        {"mediaType": OCI_CONFIG if digest == config[0] else OCI_LAYER_TAR, "digest": str(digest), "size": size}
        for digest, size in (config, *layers))
    document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config_part, "layers": layer_parts}
    return json.dumps(document, separators=(",", ":")).encode()


# =====================================================================================================================
# 4. Ssh: a connection to Docker on another machine
# =====================================================================================================================


def unix_connection(path: str, timeout: float) -> socket.socket:
    """Connect to a unix socket. timeout, in seconds, applies to each operation. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX)
    with on_failure(sock.close):
        sock.settimeout(timeout)
        sock.connect(path)
    return sock


def end_process(process: subprocess.Popen[bytes]) -> None:
    """End a process that was started with pipes."""
    with process:
        process.kill()  # SIGTERM may be blocked in it, as it is in this program


class Tunnel:
    """The way to a Docker daemon through ssh, as the docker command has it: ssh://[user@]host[:port][/socket].

    One process of OpenSSH forwards a socket of ours to Docker's on the server. It is started when it is needed, and
    ends with this program, however that ends: what it runs on the server is `cat`, which ends with its input.
    """

    # It must not ask anything: nobody is there to answer. And it gives up before ENGINE_TIMEOUT, and says why.
    COMMAND = ("ssh", "-T", "-S", "none", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10",
               "-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=2")
    # What the docker command on the server goes by: it has an environment and contexts of its own.
    FIND_SOCKET = "docker context inspect --format '{{.Endpoints.docker.Host}}'"

    def __init__(self, text: str, host: tuple[str, ...], target: str):
        """text is for people, host is what follows ssh's options, and target is the socket there, if it is known."""
        self._text, self._host = text, host
        self._lock = threading.Lock()  # held while ssh is started; guards what follows
        self._target = target
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], Any] = lambda: None  # ends the process
        self._failed_at, self._failure = 0.0, ""

    @classmethod
    def parse(cls, text: str) -> Tunnel:
        """Parse what follows ssh://. Raises ValueError, whose message has no password."""
        parts = urllib.parse.urlsplit(f"//{text}")
        if parts.password is not None or parts.query or parts.fragment or not parts.hostname:
            raise ValueError("use ssh://[user@]host[:port][/socket], without a password")
        user = ("-l", urllib.parse.unquote(parts.username)) if parts.username else ()
        port = ("-p", str(parts.port)) if parts.port else ()
        return cls(f"ssh://{text.rstrip('/')}", (*user, *port, "--", urllib.parse.unquote(parts.hostname)),
                   urllib.parse.unquote(parts.path).rstrip("/"))

    @functools.cached_property
    def _folder(self) -> Path:
        """The folder, removed at the end, of our socket and of what ssh says."""
        folder = Path(tempfile.mkdtemp(prefix="k3d-ssh-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return folder

    def connect(self, timeout: float) -> socket.socket:
        """Open a connection, which is not known to lead to Docker before the first read. Raises OSError.

        timeout is in seconds, for the way there, and then for each operation.
        """
        asked_at = time.monotonic()
        if not self._lock.acquire(timeout=timeout):
            raise TimeoutError("timed out")
        try:
            if self._process is None or self._process.poll() is not None:
                if self._failed_at > asked_at:  # while this call waited for the lock
                    raise ConnectionError(self._failure)
                self._open(asked_at + timeout)
        except OSError as e:
            self._failed_at, self._failure = time.monotonic(), str(e)
            raise
        finally:
            self._lock.release()
        return unix_connection(f"{self._folder}/socket", timeout)

    def _open(self, end: float) -> None:
        """Start ssh, and wait until it forwards: until a moment of the monotonic clock. Raises OSError."""
        if not self._target:
            self._target = self._ask(self.FIND_SOCKET, b"", end).removeprefix("unix://").removeprefix("tcp://")
        (self._folder / "socket").unlink(missing_ok=True)
        self._ask("cat", b"\n", end, "-L", f"{self._folder}/socket:{self._target}")

    def _ask(self, command: str, text: bytes, end: float, *options: str) -> str:
        """Run a command on the server, which gets a text, and return what it answers. It goes on. Raises OSError."""
        self._end()
        with open(self._folder / "errors", "wb") as errors:
            # A session of its own: no terminal to ask on, and no Ctrl-C that is meant for this program.
            process = subprocess.Popen([*self.COMMAND, *options, *self._host, command], bufsize=0,  # noqa: S603
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                                       start_new_session=True)
        self._process, self._end = process, weakref.finalize(self, end_process, process)
        assert process.stdin
        assert process.stdout
        with on_failure(self._end):
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(text)
            poll = select.poll()  # select() takes no descriptor above 1023
            poll.register(process.stdout, select.POLLIN)
            if not poll.poll(max(end - time.monotonic(), 0) * 1000):
                raise TimeoutError(f"timed out {self._last_words()}".strip())
            answer = os.read(process.stdout.fileno(), KIB).decode(errors="replace")
            if not answer:
                with contextlib.suppress(subprocess.TimeoutExpired):  # it has closed its output, and goes on
                    process.wait(1)
                raise ConnectionError(self._last_words() or f"ssh said nothing (status {process.returncode})")
        return answer.strip()

    def _last_words(self, limit: int = 300) -> str:
        """Return the last lines that ssh has written, at most limit characters, as one line."""
        try:
            text = (self._folder / "errors").read_bytes()[-2000:].decode(errors="replace")
        except OSError:
            return ""
        words = "; ".join(line for line in map(str.strip, text.splitlines()) if line).rstrip(".")
        if len(words) > limit:
            words = words[-limit:].partition("; ")[2] or words[-limit:]
        return printable(words)

    def advice(self, error: Exception) -> str:
        """Explain an error to the user, with what ssh said, and name the command that shows it."""
        said = self._last_words()
        if "open failed" in said:
            said += ": Docker is not there, or the ssh server forbids forwarding"
        command = " ".join(["ssh", "-o", "BatchMode=yes", *self._host, "docker", "version"])
        return (f"{self} failed: {error}{f' ({said})' if said and said not in str(error) else ''}. "
                f"To see why, run: {command}")

    def __str__(self) -> str:
        return self._text


# =====================================================================================================================
# 5. Configuration: where Docker is, and the credentials of docker login
# Uses: ssh.
# =====================================================================================================================

DEFAULT_SOCKET = "/var/run/docker.sock"


def home_folder() -> Path:
    """Return the home of this user; / for one that has none, as in a container."""
    try:
        return Path.home()
    except RuntimeError:  # HOME is not set, and the system does not know the user
        return Path("/")


def docker_folder(environ: Mapping[str, str]) -> Path:
    """Return the folder of the docker command's config.json and contexts."""
    return Path(environ.get("DOCKER_CONFIG") or home_folder() / ".docker")


def in_container() -> bool:
    """Return True if this process runs in a container of Docker or Podman."""
    return Path("/.dockerenv").exists() or Path("/run/.containerenv").exists()


OWN_IDS = (  # what has the IDs of a process's own container, the surest first
    # Docker and Podman mount these files from a folder that is named after the container.
    ("mountinfo", re.compile(r"/([0-9a-f]{64})/\S+ /etc/(?:hostname|hosts|resolv\.conf) ")),
    ("cgroup", re.compile(r"(?m)[/-]([0-9a-f]{64})(?:\.scope)?(?:/.*)?$")))


def own_container(process: Path = Path("/proc/self")) -> list[str]:
    """Return what may name the container of this process to Docker, the surest first: IDs, and its host name."""
    found = []
    for name, pattern in OWN_IDS:
        with contextlib.suppress(OSError):  # not Linux, or hidden: the host name may do
            found += pattern.findall((process / name).read_text(errors="replace"))
    return [*dict.fromkeys(found), *([socket.gethostname()] if in_container() else [])]


def refuse_passphrase() -> str:
    """Raise ValueError for a key that has a passphrase: OpenSSL would ask for it on the terminal, and wait."""
    raise ValueError("the key has a passphrase")


@contextlib.contextmanager
def certificate_errors(problem: str) -> Iterator[None]:
    """Turn errors of reading certificates and keys into ValueError, with a problem and the reason."""
    try:
        yield
    except (OSError, ValueError) as e:  # includes ssl.SSLError
        raise ValueError(f"{problem}: {getattr(e, 'strerror', None) or e}") from None


def client_tls(folder: Path, verified: bool = True, needs_authority: bool = True) -> ssl.SSLContext:
    """Return the TLS that ca.pem, cert.pem and key.pem of a folder configure. Raises ValueError.

    The last two can be missing, and also the first one unless needs_authority: then the system's authorities count.
    """
    authority, certificate, key = (folder / name for name in ("ca.pem", "cert.pem", "key.pem"))
    with certificate_errors(f"ca.pem, cert.pem and key.pem cannot be read from {folder}"):
        trusts_folder = needs_authority or authority.exists()
        context = ssl.create_default_context(cafile=str(authority) if trusts_folder else None)
        if certificate.exists() or key.exists():
            context.load_cert_chain(certificate, key, refuse_passphrase)
    if not verified:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


class LimitedResponse(http.client.HTTPResponse):
    """A response of Docker's or of a registry's. http.client reads any number of interim responses and of trailers."""

    _heads = 0

    def _read_status(self) -> tuple[str, int, str]:
        self._heads += 1
        if self._heads > HEADERS_LIMIT:
            raise http.client.HTTPException("too many interim responses")
        status: tuple[str, int, str] = super()._read_status()  # type: ignore[misc]
        return status

    def _read_and_discard_trailer(self) -> None:
        for _ in range(HEADERS_LIMIT):
            if not self.fp.readline(CHUNK_LINE).strip(b"\r\n"):
                return
        raise http.client.HTTPException("too many trailers")


@dataclass(frozen=True)
class EngineHost:
    """The address of the Docker daemon: a unix socket, or a host and a port, with or without TLS, or a tunnel.

    It is found by the docker command's own rules: DOCKER_HOST, with DOCKER_TLS, DOCKER_TLS_VERIFY and DOCKER_CERT_PATH;
    else the context of DOCKER_CONTEXT; else the current context of config.json; else the default socket
    (docs.docker.com/reference/cli/docker/#environment-variables, github.com/docker/cli, resolveContextName).
    """

    path: str = ""
    host: str = ""
    port: int = 0
    tls: ssl.SSLContext | None = None
    tunnel: Tunnel | None = None
    origin: str = field(default="", compare=False)  # which setting named it: "from DOCKER_HOST"

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> EngineHost:
        """Read the DOCKER_ variables and the docker command's contexts. Raises ValueError if one is invalid."""
        contexts = DockerContexts(docker_folder(environ))
        name, source = contexts.current(environ)
        if name is None:
            return cls._default(environ, source)
        try:
            found = contexts.host(name, source)
        except FileNotFoundError:
            found = None
        if found and (not found.path or os.access(found.path, os.F_OK)):
            return found
        if source != "DOCKER_CONTEXT" and in_container():  # the file came from outside, perhaps for its credentials
            return cls(path=DEFAULT_SOCKET, origin=f"the default: the context {printable(name)} ({source}) is not here")
        if found is None:
            raise ValueError(f"the context {printable(name)} ({source}) does not exist: {contexts.file(name)}")
        return found

    @classmethod
    def _default(cls, environ: Mapping[str, str], origin: str) -> EngineHost:
        """Return the address without a context: DOCKER_HOST or the default, with TLS if a variable says so."""
        verified = bool(environ.get("DOCKER_TLS_VERIFY"))
        wants_tls = verified or bool(environ.get("DOCKER_TLS"))
        text = environ.get("DOCKER_HOST", "").strip() or ("tcp://localhost:2376" if wants_tls else "unix://")
        try:
            found = dataclasses.replace(cls.parse(text), origin=origin)
        except ValueError as e:
            raise ValueError(f"DOCKER_HOST is not supported: {e}") from None
        if not found.host or not wants_tls:
            return found
        folder = Path(environ.get("DOCKER_CERT_PATH") or docker_folder(environ))
        try:
            return dataclasses.replace(found, tls=client_tls(folder, verified))
        except ValueError as e:
            raise ValueError(f"{'DOCKER_TLS_VERIFY' if verified else 'DOCKER_TLS'} is set, but {e} "
                             "(DOCKER_CERT_PATH)") from None

    @classmethod
    def parse(cls, text: str) -> EngineHost:
        """Parse an address as DOCKER_HOST has it. Without a scheme, it is a path or HOST:PORT. Raises ValueError."""
        scheme, separator, rest = text.partition("://")
        if not separator:
            scheme, rest = "unix" if text.startswith(("/", "./")) else "tcp", text
        if scheme == "unix":
            return cls(path=rest or DEFAULT_SOCKET)
        if scheme == "ssh":
            return cls(tunnel=Tunnel.parse(rest))
        if scheme == "npipe":
            raise ValueError("named pipes (npipe://) are for Windows: have Docker Desktop listen on "
                             "tcp://localhost:2375, or run this program in WSL or in a container")
        if scheme != "tcp":
            raise ValueError(f"{printable(scheme, 20)}:// is none of unix:///path, tcp://host:port, ssh://user@host")
        parts = urllib.parse.urlsplit(f"//{rest}")
        if parts.path.strip("/") or parts.query or parts.fragment or parts.username is not None:
            raise ValueError("use tcp://host:port, without user, path or query")
        return cls(host=urllib.parse.unquote(parts.hostname or "localhost"), port=parts.port or 2375)

    def connect(self, timeout: float) -> socket.socket:
        """Open a connection. timeout, in seconds, applies to each socket operation. Raises OSError."""
        if self.tunnel:
            return self.tunnel.connect(timeout)
        if self.path:
            return unix_connection(self.path, timeout)
        sock = socket.create_connection((self.host, self.port), timeout)
        return self.tls.wrap_socket(sock, server_hostname=self.host) if self.tls else sock

    def http(self, timeout: float) -> http.client.HTTPConnection:
        """Open a connection for HTTP; otherwise like connect()."""
        connection = http.client.HTTPConnection("docker", timeout=timeout)
        connection.response_class = LimitedResponse
        connection.sock = self.connect(timeout)
        return connection

    def advice(self, error: Exception) -> str:
        """Explain to the user why Docker cannot be reached, and what to do about it."""
        if self.tunnel:
            return self.tunnel.advice(error)
        if self.path and Path(self.path).is_dir():  # the error is that of a Docker that does not run
            return (f"{self.path} is a folder: Docker makes one where a container mounts a socket that is not there. "
                    "Remove it on the host, and mount the socket of a Docker that runs")
        if isinstance(error, FileNotFoundError):
            looked = f" (address {self.origin})" if self.origin else ""
            return (f"{self.path} does not exist{looked}: is Docker running? In a container, mount it with "
                    f"-v {DEFAULT_SOCKET}:{self.path}")
        if isinstance(error, PermissionError):
            return f"permission denied on {self.path}: run as root or as a member of the group that owns it"
        if isinstance(error, ConnectionRefusedError):
            again = (", or Docker was started again since: restart this container, or mount the socket's folder"
                     if self.path else "")
            return f"connection refused at {self}: Docker is not running, or listens on another address{again}"
        if isinstance(error, TimeoutError):
            return f"no answer from {self} in time"
        if isinstance(error, http.client.IncompleteRead | ConnectionError | ssl.SSLEOFError):
            refused = ", or does not accept this client's certificate" if self.tls else ""
            return f"the connection to {self} was lost: Docker is restarting or was stopped{refused}"
        return f"{self}: {error}"

    def __str__(self) -> str:
        if self.tunnel:
            return str(self.tunnel)
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"unix://{self.path}" if self.path else f"tcp://{host}:{self.port}"


class DockerContexts:
    """The contexts of the docker command (docs.docker.com/engine/manage-resources/contexts), in its folder.

    Rootless Docker, Docker Desktop, Colima and others say in a context where their Docker is.
    """

    def __init__(self, folder: Path):
        self.config, self._folder = folder / "config.json", folder / "contexts"

    def current(self, environ: Mapping[str, str]) -> tuple[str | None, str]:
        """Return the context to use, None for none, and what says so: for people, and DOCKER_CONTEXT."""
        if environ.get("DOCKER_HOST"):
            return None, "from DOCKER_HOST"
        name, source = environ.get("DOCKER_CONTEXT"), "DOCKER_CONTEXT"
        if not name:
            name, source = self._configured()
        if name == "default":  # which means: none
            return None, f"the default: {source} names the context default"
        return name or None, source if name else (
            f"the default: DOCKER_HOST and DOCKER_CONTEXT are not set, {source}")

    def _configured(self) -> tuple[str, str]:
        """Return the current context of config.json and the file; or no name, and the reason."""
        try:
            name = json.loads(self.config.read_bytes()).get("currentContext") or ""
        except FileNotFoundError:
            return "", f"{self.config} does not exist"
        except (OSError, *MALFORMED_ERRORS) as e:  # the docker command warns, and goes on
            return "", f"{self.config} cannot be read ({type(e).__name__})"
        return (str(name), str(self.config)) if name else ("", f"{self.config} names no context")

    def _folder_of(self, name: str, kind: str) -> Path:
        return self._folder / kind / hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()

    def file(self, name: str) -> Path:
        """Return the file that describes a context."""
        return self._folder_of(name, "meta") / "meta.json"

    def host(self, name: str, source: str) -> EngineHost:
        """Return the address that a context has. source is what names it. Raises ValueError and FileNotFoundError."""
        try:
            endpoint = json.loads(self.file(name).read_bytes())["Endpoints"]["docker"]
            host = EngineHost.parse(str(endpoint.get("Host") or "unix://"))
            folder, verified = self._folder_of(name, "tls") / "docker", not endpoint.get("SkipTLSVerify")
            needs_tls = host.host and (folder.exists() or not verified)
            tls = client_tls(folder, verified, needs_authority=False) if needs_tls else None
        except FileNotFoundError:
            raise
        except (OSError, *MALFORMED_ERRORS) as e:
            reason = e.strerror if isinstance(e, OSError) else e
            raise ValueError(f"the context {printable(name)} ({source}) cannot be used: {reason}") from None
        return dataclasses.replace(host, tls=tls, origin=f"from the context {printable(name)} ({source})")


# The user name that credential helpers return if the secret is an identity token.
IDENTITY_TOKEN = "<token>"  # noqa: S105 - not a secret


@dataclass(frozen=True)
class Credentials:
    """A user name and password for one registry. Hashable, so that they can be part of a key."""

    username: str
    password: str = field(repr=False)

    def for_docker(self, registry: str) -> str:
        """Return the X-Registry-Auth value (docs.docker.com/reference/api/engine, "Authentication")."""
        document = {"username": self.username, "password": self.password, "serveraddress": registry}
        if self.username == IDENTITY_TOKEN:
            document = {"identitytoken": self.password, "serveraddress": registry}
        return base64.urlsafe_b64encode(json.dumps(document).encode()).decode()

    def for_http(self) -> str:
        """Return the Authorization value (RFC 7617)."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()


class DockerConfig:
    """The credentials stored by `docker login` (docs.docker.com/reference/cli/docker/login).

    They are read again for each pull, so that a new login takes effect immediately.
    """

    DOCKER_HUB = "https://index.docker.io/v1/"
    HELPER_TIMEOUT = 10  # seconds

    def __init__(self, folder: Path):
        self.path = folder / "config.json"

    def credentials(self, registry: str) -> Credentials | None:
        """Return the credentials for a registry (docker.io or host:port), or None if there are none."""
        try:
            document = json.loads(self.path.read_bytes())
            name = self.DOCKER_HUB if registry == "docker.io" else registry
            helper = (document.get("credHelpers") or {}).get(name) or document.get("credsStore")
            entries = {self._host(key): entry for key, entry in (document.get("auths") or {}).items()}
            found = (self._from_helper(helper, name) if helper else None) or self._from_entry(
                entries.get(self._host(name)) or {})
            if found:  # fail here rather than later if they are no texts, or cannot be encoded
                (found.username + found.password).encode()
            return found
        except FileNotFoundError:
            return None
        except (OSError, subprocess.SubprocessError, *MALFORMED_ERRORS) as e:
            log.warning("ignoring the credentials in %s, which cannot be used: %s", self.path, type(e).__name__)
            return None

    @staticmethod
    def _host(key: str) -> str:
        """Return the host of a key of `auths`, which may be a URL."""
        return key.rpartition("://")[2].partition("/")[0]

    @staticmethod
    def _from_entry(entry: Mapping[str, str]) -> Credentials | None:
        if entry.get("identitytoken"):
            return Credentials(IDENTITY_TOKEN, entry["identitytoken"])
        if entry.get("auth"):
            username, _, password = base64.b64decode(entry["auth"]).decode().partition(":")
            return Credentials(username, password.rstrip("\0"))
        return Credentials(entry["username"], entry["password"]) if entry.get("username") else None

    def _from_helper(self, helper: str, name: str) -> Credentials | None:
        """Ask a credential helper (github.com/docker/docker-credential-helpers) if it is installed."""
        program = shutil.which(f"docker-credential-{helper}") if re.fullmatch(r"[\w.-]+", helper) else None
        if program is None:
            return None
        answer = subprocess.run([program, "get"], input=name.encode(), capture_output=True, check=False,  # noqa: S603
                                timeout=self.HELPER_TIMEOUT)
        if answer.returncode:
            return None  # it has no credentials for this registry
        document = json.loads(answer.stdout)
        return Credentials(str(document["Username"]), str(document["Secret"]))


# =====================================================================================================================
# 6. Waiting: deadlines, and work that many wait for
# Uses: configuration.
# =====================================================================================================================


class ClientGone(Exception):
    """The client that sent a request has closed its connection: nobody wants the answer any more."""


# What poll() reports when the other side has closed its connection; macOS knows no POLLRDHUP.
HANG_UP = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR


class Deadline:
    """How long a request may wait: until a moment, and for as long as its client is connected.

    Each request has one, which is passed down to everything that waits on its behalf, so no sum of delays is
    longer than the one.
    """

    CHECK_INTERVAL = 0.5  # seconds between two checks that the client is still there

    def __init__(self, seconds: float = math.inf, connection: socket.socket | None = None,
                 origin: Deadline | None = None):
        """seconds are from now on; connection is the client's, if one waits. origin is what this is derived from."""
        self._moment, self._connection = time.monotonic() + seconds, connection
        self._origin = origin or self
        self._cancelled = False
        self.is_waiting = False  # True during wait(), also that of derived deadlines

    def left(self) -> float:
        """The seconds that are left; 0 when the moment has passed."""
        return max(self._moment - time.monotonic(), 0)

    def within(self, seconds: float) -> Deadline:
        """A deadline for the same client, at most this many seconds from now."""
        return Deadline(min(seconds, self.left()), self._connection, self._origin)

    def unlimited(self) -> Deadline:
        """A deadline for the same client that never passes: for a body, which may take its time."""
        return Deadline(math.inf, self._connection, self._origin)

    def separate(self) -> Deadline:
        """A deadline for the same client that never passes, and is not cancelled together with this one."""
        return Deadline(math.inf, self._connection)

    def cancel(self) -> None:
        """End every wait, also of derived deadlines, as if the client had gone: it has its answer."""
        self._cancelled = True

    def wait(self, wait_for: Callable[[float], T]) -> T:
        """Wait for something: the one function that waits on behalf of a client.

        wait_for waits for some seconds, as threading.Event.wait does, and returns a true value if it happened. That
        value is returned, or the last false one when the deadline has passed. Raises ClientGone.
        """
        was_waiting, self._origin.is_waiting = self._origin.is_waiting, True
        try:
            while True:
                left = self.left()
                value = wait_for(min(left, self.CHECK_INTERVAL))
                if value or not left:
                    return value
                self._check_client()
        finally:
            self._origin.is_waiting = was_waiting

    def _check_client(self) -> None:
        if self._origin._cancelled:
            raise ClientGone
        if self._connection is None:
            return
        poll = select.poll()
        try:
            poll.register(self._connection, HANG_UP)
        except ValueError:  # closed on our side
            raise ClientGone from None
        if poll.poll(0):
            raise ClientGone


@dataclass(frozen=True)
class Client:
    """The client that sent a request, as far as the answer depends on it.

    names are those of this registry: the one in its Host header, if that is valid, then those that Docker has told.
    may_pull says that what Docker lacks may be pulled for it: not for a browser.
    """

    names: tuple[str, ...] = ()
    credentials: Credentials | None = None
    deadline: Deadline = field(default_factory=Deadline)
    user_agent: str = ""
    accept: str = ""
    may_pull: bool = True

    # Nodes, Docker and BuildKit use containerd's library. (Docker's classic store sends no such HEAD before a push.)
    CONTAINERD: ClassVar[re.Pattern[str]] = re.compile(r"(?:^|[ /-])(?:containerd|docker|buildkit|nerdctl)/")

    def is_about_to_pull(self) -> bool:
        """True if a HEAD of a manifest by this client comes before a pull, and not before a push.

        Most clients that push ask first whether the manifest is here, whatever they accept. containerd's library
        accepts one type before a push, and all types that it knows before a pull.
        """
        types = {part.partition(";")[0].strip() for part in self.accept.split(",")} - {"", "*/*"}
        return len(types) >= 2 and bool(self.CONTAINERD.search(self.user_agent))


def start_thread(job: Callable[..., None], *arguments: Any) -> None:
    """Run a job in a thread that does not keep the process alive; UNAVAILABLE when no thread can be started."""
    try:
        threading.Thread(target=job, args=arguments, daemon=True).start()
    except RuntimeError as e:
        raise RegistryError("UNAVAILABLE", f"no thread can be started: {e}") from e


def without_frames(error: Exception) -> Exception:
    """The same error without tracebacks, which would keep the objects of its job alive, such as open files."""
    link: BaseException | None = error
    while link:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error


class Job:
    """Work in a thread of its own, and its result, which all waiting threads share."""

    def __init__(self, what: str):
        """what names the work in an error: "pulling alpine:3"."""
        self.what, self.done = what, threading.Event()
        self.result: Any = None  # if there is one
        self.error: Exception | None = None

    def run(self, work: Callable[[], Any]) -> None:
        """Do the work, and end with its result or its error."""
        try:
            self.result = work()
        except Exception as e:  # a boundary: the waiting threads raise it
            self.end(without_frames(e))
        else:
            self.end()

    def end(self, error: Exception | None = None) -> None:
        """Tell all waiting threads that the work has ended, and why if it failed."""
        self.error = error
        self.done.set()

    def outcome(self, deadline: Deadline) -> Any:
        """Wait for the end, and return the result or raise the error. STILL_PULLING when the deadline passes before."""
        if not deadline.wait(self.done.wait):
            raise RegistryError("STILL_PULLING", f"Docker is still {self.what}: ask again")
        if self.error:
            raise self.error.with_traceback(None)
        return self.result


def ask(deadline: Deadline, question: Callable[[Deadline], T], late: Callable[[Job], T | None] = lambda _: None,
        discard: Callable[[T], None] | None = None) -> T:
    """The answer to a question that is asked in a thread of its own, so no sum of delays outlasts a deadline.

    The question gets a deadline that never passes, and that ends its waits when nobody waits here any more. When time
    is up, a question that waits for Docker is answered with UNAVAILABLE. One that waits for work of this program is
    answered with late(the job), or STILL_PULLING if that is None. discard is called with an answer that comes too late.
    """
    inner, job = deadline.separate(), Job("at work for this request")
    first = threading.Lock()  # held once this thread has given up, or the other has ended; the second one discards

    def leave() -> None:
        if not first.acquire(blocking=False) and discard and job.error is None:
            with contextlib.suppress(Exception):
                discard(job.result)

    def answer_question() -> None:
        job.run(lambda: question(inner))
        leave()

    def give_up() -> None:
        inner.cancel()
        leave()

    start_thread(answer_question)
    with on_failure(give_up):
        if not deadline.wait(job.done.wait):
            if not inner.is_waiting:
                raise RegistryError("UNAVAILABLE", "Docker has not answered in time")
            answer = late(job)
            if answer is None:
                raise RegistryError("STILL_PULLING", "Docker is still at work for this request: ask again")
            return answer
    outcome: T = job.outcome(deadline)
    return outcome


class Work(Protocol):
    """What is done in a thread of its own, while others wait for it."""

    def end(self, error: Exception | None = None) -> None:
        """Tell those who wait that the work has ended, and why if it failed."""


W = TypeVar("W", bound=Work)


class UnderWay(Generic[W]):
    """Work that is under way: at most one for a key, and whoever asks meanwhile gets the same.

    The key has to hold everything that changes the outcome. Work goes on when the client that started it has gone, and
    a retry joins it or finds it done.
    """

    def __init__(self, limit: float = math.inf) -> None:
        """limit is for how many keys there may be work at once; more is refused with TOOMANYREQUESTS."""
        self._lock, self._limit = threading.Lock(), limit  # the lock guards _work
        self._work: dict[Hashable, W] = {}

    def get(self, key: Hashable) -> W | None:
        """The work under way for a key, or None."""
        with self._lock:
            return self._work.get(key)

    def join(self, key: Hashable, new: Callable[[], W], run: Callable[[W], None]) -> W:
        """The work under way for a key, or else new work, which run() does in a thread of its own."""
        with self._lock:
            work = self._work.get(key)
            if work is None:
                if len(self._work) >= self._limit:
                    raise RegistryError("TOOMANYREQUESTS", f"{self._limit} jobs like this are under way: try again")
                work = self._work[key] = new()
                with on_failure(lambda: self._work.pop(key)):
                    start_thread(self._run, key, work, run)
        return work

    def _run(self, key: Hashable, work: W, run: Callable[[W], None]) -> None:
        error = None
        try:
            run(work)
        except Exception as e:  # a boundary: those who wait raise it
            error = without_frames(e)
        with self._lock:
            del self._work[key]  # before the end: whoever asks again after that gets new work
        work.end(error)


class Jobs(UnderWay[Job]):
    """The jobs that are under way."""

    def start(self, key: Hashable, work: Callable[[], Any], what: str) -> Job:
        """The job under way for a key, or a new one that does this work."""

        def run(job: Job) -> None:
            job.result = work()

        return self.join(key, lambda: Job(what), run)


class NextReads:
    """Shares reads of the same thing among all who ask at the same time. No answer is older than its question.

    Whoever asks while a read is under way waits for the next one, which begins when that one has ended. So nobody
    waits for more than two reads, however many ask. Errors are shared as well.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _next and _turns
        self._next: dict[Hashable, Job] = {}  # reads that have not begun
        self._turns: weakref.WeakValueDictionary[Hashable, threading.Lock] = weakref.WeakValueDictionary()

    def read(self, key: Hashable, read: Callable[[], T]) -> T:
        """The result of a read that begins after this call, by this thread or by another with the same key."""
        with self._lock:
            turn = self._turns.setdefault(key, threading.Lock())  # held by the read under way
            leads = key not in self._next
            job = self._next.setdefault(key, Job("reading"))
        if leads:
            with turn:
                with self._lock:
                    del self._next[key]
                job.run(read)
        result: T = job.outcome(Deadline())
        return result


# =====================================================================================================================
# 7. Activity: what the program does, for people to see
# =====================================================================================================================


class Task:
    """Some long work: a pull, a fetch, an export. It logs its beginning, its end, and its progress in between.

    subject is what it is about; repository, if it is known, is where clients ask for that. parts are the bytes that are
    done and the bytes in all, 0 if unknown, for each part of the work, such as the layers of an image. They are
    replaced whole, so no lock is needed.
    """

    def __init__(self, kind: str, subject: str, detail: str = "", repository: str | None = None):
        self.kind, self.subject, self.repository = kind, subject, repository
        self._what = f"{kind} {subject}{detail}"
        self.parts: Mapping[str, tuple[int, int]] = {}
        self.status = ""                        # what it is doing now
        self.error: str | None = None           # why it failed
        self.started = time.monotonic()
        self.seconds: float | None = None       # how long it took, once it has ended
        self._next_line = self.started + PROGRESS_INTERVAL
        log.info("%s: started", self._what)

    def __enter__(self) -> Task:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error and self.seconds is None:
            self.error, self.seconds = printable(str(error)), time.monotonic() - self.started
            log.warning("%s: failed after %s: %s", self._what, human_seconds(self.seconds), error)

    def report(self, parts: Mapping[str, tuple[int, int]], status: str = "") -> None:
        """Note the progress, and log it from time to time."""
        self.parts, self.status = parts, status
        now = time.monotonic()
        if now >= self._next_line:
            self._next_line = now + PROGRESS_INTERVAL
            log.info("%s: %s", self._what, self.line(now), extra={"is_progress": True})  # for Console

    def report_bytes(self, done: int, total: int = 0) -> None:
        """The same, for work that has one part."""
        self.report({"": (done, total)})

    def done(self, how: str = "") -> None:
        """Log the last line of work that succeeded. how is the result; without it, that is the progress at the end."""
        now = time.monotonic()
        self.seconds = now - self.started
        log.info("%s: done in %s, %s", self._what, human_seconds(self.seconds), how or self.line(now))

    def progress(self) -> tuple[int, int]:
        """The bytes that are done, and the bytes in all as far as they are known, or 0."""
        parts = self.parts.values()
        return sum(done for done, _ in parts), sum(total for _, total in parts)

    def rate(self, now: float) -> float:
        """Bytes per second, from the start until now, in seconds of the monotonic clock."""
        return self.progress()[0] / max(now - self.started, 0.001)

    def line(self, now: float) -> str:
        """The progress as "45%, 12.3 MB of 27.1 MB, 4.1 MB/s, downloading". now is as in rate()."""
        done, total = self.progress()
        if not done and not total:
            return self.status
        share = f"{100 * done // total}%, {human_bytes(done)} of {human_bytes(total)}" if total else human_bytes(done)
        return f"{share}, {human_bytes(self.rate(now))}/s" + (f", {self.status}" if self.status else "")


@dataclass
class Visit:
    """A request of a client, as people see it. time is in seconds since the epoch; status is 0 while it goes on."""

    time: float
    client: str
    method: str
    target: str = ""            # manifests/1
    repository: str = ""        # with its namespace: docker.io/library/alpine
    user_agent: str = ""
    is_node: bool = False       # True if it was sent to this registry as a mirror, or by a node that is about to pull
    digest: str = ""            # of the manifest that it got
    status: int = 0
    size: int = 0               # bytes of the response's body
    seconds: float = 0
    note: str = ""              # what went wrong


class Histogram:
    """How often something took how long, in seconds."""

    BOUNDS = (0.005, 0.025, 0.1, 0.5, 2.5, 10, 30, 120, 600, math.inf)  # the upper ones of the buckets

    def __init__(self) -> None:
        self.counts, self.total = dict.fromkeys(self.BOUNDS, 0), 0.0

    def add(self, seconds: float) -> None:
        """Count one more."""
        self.counts[next(bound for bound in self.BOUNDS if seconds <= bound)] += 1
        self.total += seconds


class Activity:
    """What the program does and has done lately. The other chapters send it events; nothing depends on it.

    The numbers are for metrics, and never go down.
    """

    REPOSITORIES = 50           # repositories whose requests are remembered
    VISITS = 5                  # requests of each
    ENDED = 20                  # tasks that have ended, errors
    CLIENTS = 100               # nodes
    SERVED = 1000               # manifests that were served: those of all images that are shown, and of their platforms

    def __init__(self) -> None:
        self.started = time.time()
        self.lock = threading.Lock()  # guards everything that follows
        self._tasks: list[Task] = []
        self._ended: Recent[tuple[str, str], tuple[float, Task]] = Recent(self.ENDED)  # by kind and subject
        self._visits: dict[int, Visit] = {}
        self._past: Recent[str, collections.deque[Visit]] = Recent(self.REPOSITORIES)
        self._errors: Recent[str, tuple[int, Visit]] = Recent(self.ENDED)
        self._served: Recent[str, Visit] = Recent(self.SERVED)
        self._nodes: Recent[str, Visit] = Recent(self.CLIENTS)
        self.requests: collections.Counter[tuple[str, int]] = collections.Counter()     # (method, status)
        self.request_seconds, self.pull_seconds = Histogram(), Histogram()
        self.pulls: collections.Counter[tuple[str, str]] = collections.Counter()        # (registry, result)
        self.response_bytes = 0

    # ---- tasks

    @contextlib.contextmanager
    def task(self, *arguments: Any) -> Iterator[Task]:
        """Begin a task, which ends with the `with`. The arguments are those of Task."""
        task = Task(*arguments)
        with self.lock:
            self._tasks.append(task)
        try:
            with task:
                yield task
        finally:
            with self.lock:
                self._tasks.remove(task)
                self._ended[task.kind, task.subject] = time.time(), task

    def tasks(self) -> list[Task]:
        """The tasks under way, the oldest first."""
        with self.lock:
            return list(self._tasks)

    def ended_tasks(self) -> list[tuple[float, Task]]:
        """The last tasks that have ended, with the time of that in seconds since the epoch, the newest first.

        Of a task that was repeated, it is the last time: what fails again and again does not push out all others.
        """
        with self.lock:
            return list(reversed(self._ended.values()))

    def count_pull(self, registry: str, result: str, seconds: float) -> None:
        """Count a pull by Docker: result is "ok", or a code of ERRORS."""
        with self.lock:
            self.pulls[registry if len(self.pulls) < MEMORY_LIMIT else "other", result] += 1
            self.pull_seconds.add(seconds)

    # ---- requests

    def begin(self, visit: Visit) -> None:
        """A request has begun."""
        with self.lock:
            self._visits[id(visit)] = visit
            if visit.is_node:
                self._nodes[visit.client] = visit

    def end(self, visit: Visit) -> None:
        """A request has got its answer, with which the visit is completed."""
        with self.lock:
            self._visits.pop(id(visit), None)
            self.requests[visit.method if visit.method in METHODS else "other", visit.status] += 1
            self.request_seconds.add(visit.seconds)
            self.response_bytes += visit.size
            if not visit.repository:
                return
            past = self._past.get(visit.repository) or collections.deque(maxlen=self.VISITS)
            past.appendleft(visit)
            self._past[visit.repository] = past
            if visit.digest and visit.status == 200:
                self._served[visit.digest] = visit
            elif visit.note and visit.status >= 400 and (visit.method, visit.status) != ("HEAD", 404):
                count, _ = self._errors.get(visit.note, (0, visit))
                self._errors[visit.note] = count + 1, visit

    def waiting_for(self, repository: str | None) -> list[str]:
        """The clients that wait for an answer about a repository."""
        with self.lock:
            return sorted({visit.client for visit in self._visits.values() if visit.repository == repository})

    def past(self) -> dict[str, list[Visit]]:
        """The last requests, by repository, the newest first."""
        with self.lock:
            return {name: list(visits) for name, visits in reversed(self._past.items())}

    def errors(self) -> list[tuple[int, Visit]]:
        """The last errors: how often each occurred, and for whom last, the newest first."""
        with self.lock:
            return list(reversed(self._errors.values()))

    def nodes(self) -> list[Visit]:
        """The last request of each node, the newest first."""
        with self.lock:
            return list(reversed(self._nodes.values()))

    def served(self, digest: str) -> Visit | None:
        """The last request that got a manifest, or None."""
        with self.lock:
            return self._served.get(digest)


# =====================================================================================================================
# 8. Engine: the Docker Engine API
# Uses: configuration, waiting.
# =====================================================================================================================


class UnbufferedResponse(LimitedResponse):
    """A response of which only the head is read: what follows belongs to another protocol."""

    def __init__(self, sock: socket.socket, *arguments: Any, **options: Any):
        super().__init__(sock, *arguments, **options)
        self.fp = sock.makefile("rb", 1)


@dataclass(frozen=True)
class EngineInfo:
    """A description of an engine: its versions, its image store ("containerd" or "classic"), its data folder."""

    version: str
    api: tuple[int, int]
    store: str
    root: Path
    identity: str
    platform: str = ""          # linux/amd64
    is_podman: bool = False
    is_remote: bool = False     # on another machine: its files cannot be read here
    user_agent: str = ""        # how it begins, when the engine asks registries for anything
    names: tuple[str, ...] = field(default=(), compare=False)  # of this registry, if it runs in a container: HOST:PORT
    details: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)  # all that /info shows
    read_at: float = field(default=0.0, compare=False)  # seconds since the epoch by this machine's clock

    def __str__(self) -> str:
        name = "Podman" if self.is_podman else "Docker"
        return f"{name} {self.version}, API {self.api[0]}.{self.api[1]}, {self.store} image store"


@dataclass(frozen=True)
class EngineImage:
    """An image as `docker inspect` shows it. size is the unpacked size in bytes.

    id is the digest of the manifest or index on the containerd store, and of the config on the classic store.
    layers are the diff IDs of the root file system. origins are the image's RepoDigests, name@digest, and tags its
    RepoTags, name:tag.
    """

    id: Digest
    size: int
    layers: tuple[str, ...]
    origins: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    platform: str = ""      # linux/arm64/v8
    details: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)  # all that inspect shows

    # What a container runtime takes from a config (OCI Image Spec v1.1, "Image Configuration", and Docker's additions).
    CONFIG: ClassVar[tuple[str, ...]] = (
        "User", "ExposedPorts", "Env", "Entrypoint", "Cmd", "Volumes", "WorkingDir", "Labels", "StopSignal",
        "ArgsEscaped", "Healthcheck", "OnBuild", "Shell")

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> EngineImage:
        """Parse an answer of inspect. Raises one of MALFORMED_ERRORS."""
        root, size = document.get("RootFS") or {}, document.get("Size") or 0
        platform = {"os": document.get("Os"), "architecture": document.get("Architecture"),
                    "variant": document.get("Variant")}
        if not is_size(size) or not isinstance(document.get("Config") or {}, dict):
            raise ValueError("Size is not a size, or Config is not an object")
        layers, origins, tags = (tuple(map(str, names or ())) for names in (
            root.get("Layers"), document.get("RepoDigests"), document.get("RepoTags")))
        return cls(Digest.parse(document["Id"]), size, layers, origins, tags, platform_of(platform), document)

    @property
    def name(self) -> str | None:
        """One of the names of the image, as Docker shows it, or None if it has none."""
        return next(iter(self.tags), None)

    @property
    def is_bare(self) -> bool:
        """True if the image is known to have no layers."""
        return not self.layers and (self.details.get("RootFS") or {}).get("Type") == "layers"

    def bare_config(self) -> bytes:
        """Return a config that means the same as that of an image without layers: Docker does not show its bytes."""
        shown = self.details.get("Config") or {}
        config = {key: shown[key] for key in self.CONFIG if shown.get(key)}
        more = {key: self.details[name] for key, name in (
            ("created", "Created"), ("author", "Author"), ("variant", "Variant")) if self.details.get(name)}
        document = {"architecture": self.details.get("Architecture") or "", "os": self.details.get("Os") or "",
                    "config": config, "rootfs": {"type": "layers", "diff_ids": []}, **more}
        return json.dumps(document, sort_keys=True).encode()


@dataclass(frozen=True)
class ListedImage:
    """An image in Docker's list of images, with its tags (name:tag) and its origins (name@digest)."""

    id: Digest
    tags: tuple[str, ...]
    origins: tuple[str, ...]


# Phrases in messages about a name that an engine does not accept, and so has no image of. Docker 20.10 and Podman
# refuse hosts that are IPv6 addresses or words in capitals, and count the host as part of a name's length.
NAME_REFUSALS = ("invalid reference format", "repository name must not be more than")

# Phrases in Docker's messages about failed pulls, on both image stores. The first row with a phrase that
# occurs in the message wins. Taken from Docker 26.1 and 28.5 and from the sources of moby and containerd.
PULL_FAILURES = (
    ("TOOMANYREQUESTS", ("toomanyrequests", "too many requests", "rate limit")),
    ("DENIED", ("pull access denied", "unauthorized", "authentication required", "authorization failed",
                "no basic auth credentials", "access denied", "access to the resource is denied",
                "insufficient_scope", "403 forbidden", "access forbidden", ": denied")),
    ("ORIGIN_UNAVAILABLE", ("dial tcp", "connection refused", "connection reset", "no such host", "timeout",
                            "deadline exceeded", "x509:", "tls:", "server gave http response", "eof",
                            "failed to do request", "could not fetch content", "network is unreachable",
                            "500 internal server error", "502 bad gateway", "503 service unavailable",
                            "504 gateway")),
    ("MANIFEST_UNKNOWN", ("manifest unknown", "not found", "name unknown", "no matching manifest",
                          "no match for platform", "name not known", "does not exist")),
    ("NAME_INVALID", NAME_REFUSALS),
    ("ENGINE_FAILED", ("",)),
)


def pull_failure(message: str, status: int, name: str) -> str:
    """Map Docker's message about a failed pull of the repository `name` to a code of ERRORS.

    status is the HTTP status of the response, 200 if the message was part of the progress. The name and the
    tag are removed from the message first, in all forms in which Docker prints them, because a repository
    may be called "unauthorized".
    """
    if status == 429:
        return "TOOMANYREQUESTS"
    host, _, path = name.lower().partition("/")
    names = "|".join(re.escape(form) for form in (name.lower(), path, path.removeprefix("library/")) if form)
    text = re.sub(rf"""(?<![\w.-])(?:{names})(?:[:@][\w.:+-]+|/manifests/[^\s"]+|(?=[,"'/]))""", "", message.lower())
    text = text.replace(host, "") if path else text
    return next(code for code, phrases in PULL_FAILURES if any(phrase in text for phrase in phrases))


class PullFailed(Exception):
    """A pull failed. `code` is one of ERRORS; the message is Docker's or the registry's."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


class Engine:
    """A client for the part of the Docker Engine API that a registry needs.

    Each call opens its own connection (tens of microseconds on a unix socket), so the only shared state is
    the engine's description, and a restart of the daemon is noticed immediately. All methods raise
    RegistryError: UNAVAILABLE if Docker cannot be reached, ENGINE_FAILED if its answer is an error or malformed.
    """

    def __init__(self, host: EngineHost, port: int = 0):
        """port is the one that this registry listens on."""
        self.host, self._port = host, port
        self.own_names: tuple[str, ...] = ()  # of this registry, as far as Docker has told them: replaced whole
        # Docker repeats the User-Agent of its caller to registries, and so perhaps to us. Nobody can guess this one.
        self.token = secrets.token_hex(16)
        self.user_agent = f"k3d-registry-dockerd/{__version__} {self.token}"
        self._described: tuple[float, EngineInfo] | None = None  # replaced atomically: needs no lock
        self._reads = NextReads()
        self.name = "Podman" if "podman" in host.path else "Docker"  # until it has described itself

    @contextlib.contextmanager
    def connection_errors(self) -> Iterator[None]:
        """Convert errors on a connection to Docker to RegistryError."""
        try:
            yield
        except (OSError, http.client.IncompleteRead) as e:
            self._described = None
            raise RegistryError("UNAVAILABLE", f"Docker cannot be reached: {self.host.advice(e)}") from e
        except (http.client.HTTPException, ValueError) as e:
            raise RegistryError("ENGINE_FAILED", f"Docker's answer is malformed: {e!r}") from e

    @contextlib.contextmanager
    def request(self, method: str, path: str, headers: Mapping[str, str] | None = None,
                timeout: float = ENGINE_TIMEOUT) -> Iterator[http.client.HTTPResponse]:
        """Send a request. The response must be read within the `with`. timeout is in seconds, per read."""
        with self.connection_errors(), contextlib.closing(self.host.http(timeout)) as connection:
            connection.request(method, path, None, {"User-Agent": self.user_agent, **(headers or {})})
            with connection.getresponse() as response:
                self._check_refusal(method, path, response)
                yield response

    @staticmethod
    def _check_refusal(method: str, path: str, response: http.client.HTTPResponse) -> None:
        """Raise ENGINE_FAILED if something in front of Docker refuses a call, like docker-socket-proxy.

        Docker's own errors are JSON, and none is 403.
        """
        status, media_type = response.status, response.headers.get("Content-Type", "").split(";")[0]
        if status < 300 or status == 500 or (status != 403 and media_type in ("", "application/json")):
            return
        call = re.sub(r"^/v[\d.]+|\?.*$", "", path)
        section = call.split("/")[1].upper()
        raise RegistryError("ENGINE_FAILED", (
            f"{method} {call} was answered with status {status}, not by Docker but by a proxy in front of its socket: "
            f"allow that call (docker-socket-proxy: {section}=1{' POST=1' if method == 'POST' else ''})"))

    def _get(self, path: str, headers: Mapping[str, str] | None = None) -> tuple[int, Any]:
        """Return the status and the parsed JSON of a GET: Docker takes 5 to 20 ms for most of them."""
        data, deadline = bytearray(), Deadline(ENGINE_TIMEOUT)
        with self.request("GET", path, headers, ENGINE_TIMEOUT) as response:
            while len(data) < JSON_LIMIT and (piece := response.read1(PIECE)):
                data += piece
                if not deadline.left():  # it comes byte by byte
                    raise TimeoutError
            if response.length:  # read1() does not detect a body that is too short
                raise http.client.IncompleteRead(bytes(data), response.length)
        try:
            return response.status, json.loads(data)
        except (ValueError, RecursionError):
            raise RegistryError("ENGINE_FAILED", f"Docker answered {path} with status {response.status} and "
                                                 f"a body that is not JSON: {bytes(data[:200])!r}") from None

    @staticmethod
    def _message(status: int, document: Any) -> str:
        message = document.get("message") if isinstance(document, dict) else None
        return message if isinstance(message, str) else f"status {status}"

    @staticmethod
    @contextlib.contextmanager
    def _malformed_answers(path: str) -> Iterator[None]:
        """Convert the exceptions that a malformed answer raises to ENGINE_FAILED."""
        try:
            yield
        except MALFORMED_ERRORS as e:
            raise RegistryError("ENGINE_FAILED", f"Docker's answer to {path} is malformed: {e!r}") from e

    def _get_object(self, path: str, *required: str) -> dict[str, Any] | None:
        """Return the JSON object at a path, or None if there is none, or can be none of that name."""
        status, document = self._reads.read(path, lambda: self._get(path))
        if status == 404 or (status != 200 and any(
                phrase in self._message(status, document) for phrase in NAME_REFUSALS)):
            return None
        if status != 200:
            raise RegistryError("ENGINE_FAILED", f"Docker answered {path}: {self._message(status, document)}")
        if not isinstance(document, dict) or any(not document.get(key) for key in required):
            raise RegistryError("ENGINE_FAILED", f"Docker's answer to {path} lacks {' or '.join(required)}")
        return document

    # ---- the description of the engine

    def info(self) -> EngineInfo:
        """Return the engine's description, at most ENGINE_FRESH seconds old: a restart can change all of it."""
        described = self._described
        if described is None or time.monotonic() - described[0] > ENGINE_FRESH:
            described = (time.monotonic(), self._describe())
            self._described, self.own_names = described, described[1].names
            self.name = "Podman" if described[1].is_podman else "Docker"
        return described[1]

    def _describe(self) -> EngineInfo:
        version = self._get_object("/version", "Version", "ApiVersion") or {}
        info, read_at = self._get_object("/info", "ID") or {}, time.time()
        with self._malformed_answers("/version and /info"):
            api = tuple(int(part) for part in version["ApiVersion"].split("."))
            major, minor = min(api, API_VERSION)
            snapshotter = ["driver-type", "io.containerd.snapshotter.v1"] in (info.get("DriverStatus") or [])
            components = [component.get("Name") for component in version.get("Components") or ()]
            names = ("Version", "GoVersion", "GitCommit", "KernelVersion", "Os", "Arch")
            root = Path(info.get("DockerRootDir") or "/var/lib/docker")
            os.access(root, os.F_OK)  # raises ValueError if no path can be like that
            return EngineInfo(str(version["Version"]), (major, minor), "containerd" if snapshotter else "classic",
                              root, str(info["ID"]),
                              platform_of({"os": version.get("Os"), "architecture": version.get("Arch")}),
                              "Podman Engine" in components, self.host.tunnel is not None,
                              "docker/{} go/{} git-commit/{} kernel/{} os/{} arch/{}".format(*map(version.get, names)),
                              self._own_names(), info, read_at)

    def _own_names(self) -> tuple[str, ...]:
        """Return the names of this registry that Docker knows, if it runs in a container of this Docker."""
        try:
            for identity in own_container():
                path = f"/containers/{urllib.parse.quote(identity, safe='')}/json"
                container = self._get_object(path, "Id") or {}
                with self._malformed_answers(path):
                    if identity in (container.get("Id"), (container.get("Config") or {}).get("Hostname")):
                        return container_names(container, self._port)
        except RegistryError as e:  # perhaps refused by a proxy: it is only for some names
            if e.code == "UNAVAILABLE":
                raise
            log.debug("the container of this registry is not known: %s", e.detail)
        return ()

    def is_insecure(self, registry: str) -> bool:
        """Return True if Docker accepts plain HTTP and any certificate from a registry.

        Docker's own rule (docs.docker.com/reference/cli/dockerd/#insecure-registries): the configured value
        for this host; otherwise True if one of its addresses is in an insecure network.
        """
        configured = self.info().details.get("RegistryConfig") or {}
        try:
            index = (configured.get("IndexConfigs") or {}).get(registry)
            if index:
                return not index.get("Secure")
            networks = [ipaddress.ip_network(network) for network in configured.get("InsecureRegistryCIDRs") or ()]
            host = urllib.parse.urlsplit(f"//{registry}").hostname or ""
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            addresses = [ipaddress.ip_address(str(address[4][0]).partition("%")[0]) for address in found]
            return any(address in network for address in addresses for network in networks)
        except (OSError, *MALFORMED_ERRORS):  # the name does not resolve, for example
            return False

    def _path(self, path: str) -> str:
        """Prefix a path with the newest API version that both sides support."""
        api = self.info().api
        return f"/v{api[0]}.{api[1]}{path}"

    # ---- images

    def image(self, name: str) -> EngineImage | None:
        """Inspect an image by name or ID. Returns None if Docker does not have it."""
        path = self._path(f"/images/{name}/json")
        document = self._get_object(path, "Id")
        if document is None:
            return None
        with self._malformed_answers(path):
            return EngineImage.parse(document)

    def images_of(self, repositories: Iterable[str]) -> list[Digest]:
        """Return the IDs of all images that Docker has in some repositories."""
        # The classic store only matches the short form of a name: alpine, not docker.io/library/alpine.
        full = ["/".join(docker_name(name)) for name in repositories]
        names = [name.removeprefix(prefix) for name in full for prefix in ("", "docker.io/", "docker.io/library/")]
        return self.image_ids({"reference": [name.replace("[", r"\[") for name in names]})  # they are patterns

    def image_ids(self, filters: Mapping[str, list[str]]) -> list[Digest]:
        """Return the IDs of the images that match Docker's filters."""
        path = self._path("/images/json?filters=" + urllib.parse.quote(json.dumps(filters)))
        with self._malformed_answers(path):
            return [Digest.parse(image["Id"]) for image in self._list_images(path)]

    def _list_images(self, path: str) -> list[Any]:
        for _ in range(LIST_ATTEMPTS):
            status, document = self._reads.read(path, lambda: self._get(path))
            if status == 200 and isinstance(document, list):
                return document
            if "not found" not in self._message(status, document):
                break
        raise RegistryError("ENGINE_FAILED", f"Docker cannot list images: {self._message(status, document)}")

    def listed(self) -> list[ListedImage]:
        """Return all images that Docker lists."""
        path = self._path("/images/json")
        with self._malformed_answers(path):
            return [ListedImage(Digest.parse(image["Id"]), *(tuple(str(name) for name in image.get(key) or ())
                                                             for key in ("RepoTags", "RepoDigests")))
                    for image in self._list_images(path)]

    def names(self) -> list[tuple[Digest, str, str]]:
        """Return the ID, the name and the tag of every tagged image, as Docker shows them."""
        named = ((image.id, *tag.rpartition(":")[::2]) for image in self.listed() for tag in image.tags)
        return [(image_id, name, tag) for image_id, name, tag in named if TAG.fullmatch(tag)]

    def origin_digest(self, reference: Reference, credentials: Credentials | None) -> Digest:
        """Return the current digest of an image in its own registry, whose rate limit counts that. PullFailed."""
        path = self._path(f"/distribution/{reference}/json")
        status, document = self._get(path, self._authorization(reference, credentials))
        if status != 200:
            message = self._message(status, document)
            raise PullFailed(pull_failure(message, status, reference.docker_repository()), message)
        with self._malformed_answers(path):
            return Digest.parse(document["Descriptor"]["digest"])

    @staticmethod
    def _authorization(reference: Reference, credentials: Credentials | None) -> dict[str, str]:
        registry = reference.namespace or "docker.io"
        return {"X-Registry-Auth": credentials.for_docker(registry)} if credentials else {}

    def pull(self, reference: Reference, credentials: Credentials | None,
             tell: Callable[[Mapping[str, Any]], None]) -> None:
        """Have Docker pull an image, and wait for the end. Raises PullFailed if Docker reports a failure.

        tell is called with each progress message. A failure before the first byte has an HTTP error status;
        a later one is a message in a response with status 200.
        """
        repository = reference.docker_repository()
        query = urllib.parse.urlencode({"fromImage": repository, "tag": str(reference.target)})
        headers = {"Content-Length": "0", **self._authorization(reference, credentials)}
        with self.request("POST", self._path(f"/images/create?{query}"), headers, PULL_TIMEOUT) as response:
            for message in self._messages(response, repository):
                tell(message)

    def _messages(self, response: http.client.HTTPResponse, repository: str) -> Iterator[dict[str, Any]]:
        """Yield the messages of a pull, JSON objects on a line each. Raises PullFailed if one reports a failure."""
        for line in filter(bytes.strip, self._lines(response)):
            try:
                message = parse_object(line)
            except ValueError:
                raise RegistryError("ENGINE_FAILED", f"Docker sent a line that is not JSON: {line[:200]!r}") from None
            detail = message.get("errorDetail")
            error = message.get("error") or (isinstance(detail, dict) and detail.get("message")) or (
                response.status >= 300 and self._message(response.status, message))
            if error:
                raise PullFailed(pull_failure(str(error), response.status, repository), str(error))
            yield message
        if response.status >= 300:
            raise PullFailed(pull_failure("", response.status, repository), f"status {response.status}")

    @staticmethod
    def _lines(response: http.client.HTTPResponse) -> Iterator[bytes]:
        """Yield the lines of a body. (Its own readline() takes the loss of a connection for the end.)"""
        pending = b""
        while len(pending) <= MANIFEST_LIMIT and (data := response.read1(PIECE)):
            *lines, pending = (pending + data).split(b"\n")
            yield from lines
        yield pending

    @contextlib.contextmanager
    def export(self, image_id: Digest) -> Iterator[http.client.HTTPResponse]:
        """Stream the tar of `docker save`. It must be read within the `with`."""
        with self.request("GET", self._path(f"/images/{image_id}/get"), None, PULL_TIMEOUT) as response:
            if response.status != 200:
                reason = response.read(500).decode(errors="replace")
                raise RegistryError("ENGINE_FAILED", f"Docker cannot export {image_id}: {reason}")
            yield response

    # ---- the connection to Docker's gRPC services

    def open_grpc(self) -> socket.socket:
        """Open a connection on which the engine's gRPC services accept HTTP/2.

        `POST /grpc` upgrades an HTTP/1.1 connection (Docker Engine API, "Initialize a gRPC session"). It is
        deprecated since API 1.53. If Docker refuses it, this returns a new connection, because newer engines
        accept HTTP/2 with prior knowledge on the same socket.
        """
        path = self._path("/grpc")
        with self.connection_errors():
            connection = self.host.http(ENGINE_TIMEOUT)
            connection.response_class, sock = UnbufferedResponse, connection.sock
            with on_failure(connection.close):
                connection.request("POST", path, headers={"User-Agent": self.user_agent, "Connection": "Upgrade",
                                                          "Upgrade": "h2c"})
                with connection.getresponse() as response:
                    if response.status == 101:
                        return sock
                    self._check_refusal("POST", path, response)
            connection.close()
            return self.host.connect(ENGINE_TIMEOUT)


# =====================================================================================================================
# 9. Transfers: what a provider gives, and content on its way
# Uses: waiting.
# =====================================================================================================================


# ---- what a provider gives


Data = bytes | memoryview


@dataclass(frozen=True)
class FileSlice:
    """A slice of an open file, length bytes from start: the server sends it with sendfile."""

    file: BinaryIO
    start: int
    length: int

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[bytes]:
        position, end = self.start, self.start + self.length
        while position < end and (data := os.pread(self.file.fileno(), min(end - position, PIECE), position)):
            position += len(data)
            yield data


Part = Data | FileSlice


class Body:
    """length bytes as an iterator of parts. It has to be closed.

    A slice of a file is valid until the next part is taken. length is None if it is not known yet.
    """

    def __init__(self, parts: Iterator[Part], length: int | None, *closing: Callable[[], Any]):
        """closing are called in order when the body is closed, even if one of them raises."""
        self.parts, self.length = parts, length
        self._closing = contextlib.ExitStack()
        for action in reversed(closing):
            self._closing.callback(action)

    def __iter__(self) -> Iterator[Data]:
        for part in self.parts:
            if isinstance(part, FileSlice):
                yield from part
            else:
                yield part

    def close(self) -> None:
        """Close what the parts come from. Later calls have no effect."""
        self._closing.close()


class Blob(Protocol):
    """Content that a provider has. size is in bytes."""

    size: int

    def open(self, start: int, length: int, deadline: Deadline) -> Body:
        """length bytes from start on, for the client of a deadline. Errors are raised here rather than by the body."""


class Provider(Protocol):
    """A place where content is looked up by digest."""

    name: str

    def find(self, digest: Digest) -> Blob | None:
        """The content, or None if it is not here. That has to be cheap to tell."""


def read_blob(blob: Blob, limit: int) -> bytes:
    """The first bytes of a blob, at most limit of them."""
    with contextlib.closing(blob.open(0, min(blob.size, limit), Deadline())) as body:
        return b"".join(body)


class FileBlob:
    """Content that is a file of its own."""

    def __init__(self, path: Path):
        """Raises OSError if there is no such file; IsADirectoryError for anything else of that name."""
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, "not a regular file")
        self.path, self.size = path, status.st_size

    def open(self, start: int, length: int, deadline: Deadline) -> Body:
        """See Blob."""
        try:
            file = open(self.path, "rb")  # noqa: SIM115 - closed with the body
        except FileNotFoundError as e:
            raise RegistryError("BLOB_UNKNOWN", f"{self.path.name} was removed a moment ago") from e
        except OSError as e:
            raise RegistryError("STORE_FAILED", f"cannot read {self.path}: {e.strerror or e}") from e
        return Body(iter([FileSlice(file, start, length)]), length, file.close)


class BytesBlob:
    """Content that is in memory."""

    def __init__(self, data: bytes):
        self._data, self.size = data, len(data)

    def open(self, start: int, length: int, deadline: Deadline) -> Body:
        """See Blob."""
        return Body(iter([self._data[start:start + length]]), length)


class ContentFolder:
    """The content folder of Docker's containerd: files named by digest.

    containerd's local content store puts a file under its final name only when it is complete and
    verified (github.com/containerd/containerd, plugins/content/local).
    """

    def __init__(self, folder: Path):
        self.name, self._folder = f"content directory {folder}", folder

    def find(self, digest: Digest) -> Blob | None:
        """See Provider. A file that this process may not read counts as absent: Docker's content service has it too."""
        path = self._folder / digest.algorithm / digest.hex
        try:
            blob = FileBlob(path)
        except (FileNotFoundError, IsADirectoryError):
            return None
        except OSError as e:
            raise RegistryError("ENGINE_FAILED", f"cannot read {path} of Docker: {e.strerror or e}") from e
        return blob if os.access(path, os.R_OK) else None


# ---- content on its way


@contextlib.contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn errors of the system about our own disk into STORE_FAILED or STORE_FULL; what continues "cannot"."""
    try:
        yield
    except OSError as e:
        code = "STORE_FULL" if e.errno in (errno.ENOSPC, errno.EDQUOT) else "STORE_FAILED"
        raise RegistryError(code, f"cannot {what}: {e.strerror or e}") from e


class Transfer:
    """Content on its way: one source fills it, many readers follow it, each at its own pace.

    It has a size in bytes, and a file that grows; or the source says in which blob the content has turned up. The
    last byte is held back until the source has verified the digest, so no reader accepts unverified content. The file
    may lose its name meanwhile: it stays open until no reader needs it.

    The source calls begin() or found(), then advance(), and end() in any case.
    """

    def __init__(self, size: int):
        self.size = size
        self.count = 0  # bytes that have arrived
        self._change = threading.Condition()  # guards count, and all that follows
        self._file: BinaryIO | None = None
        self._blob: Blob | None = None
        self._ended = False
        self._error: RegistryError | None = None

    # ---- for the source

    def begin(self, file: BinaryIO) -> None:
        """The content has begun to arrive, and will grow in this file, which is closed when nobody needs it."""
        weakref.finalize(self, file.close)
        with self._change:
            self._file = file
            self._change.notify_all()

    def advance(self, count: int) -> None:
        """The file has grown by this many bytes."""
        with self._change:
            self.count += count
            self._change.notify_all()

    def found(self, blob: Blob) -> None:
        """All of the content is in this blob; readers go on there."""
        with self._change:
            self._blob, self._ended = blob, True
            self._change.notify_all()

    def end(self, error: Exception | None = None) -> None:
        """End the transfer: all content is verified, or error says why no more comes. Later calls have no effect.

        Errors other than RegistryError are UNKNOWN to readers.
        """
        if error is None and self.count != self.size:
            error = RegistryError("ENGINE_FAILED", f"the content ended {self.size - self.count} bytes early")
        if error is not None and not isinstance(error, RegistryError):
            error = RegistryError("UNKNOWN", type(error).__name__)
        with self._change:
            if not self._ended:
                self._ended, self._error = True, error
                self._change.notify_all()

    # ---- for readers

    @property
    def failed(self) -> bool:
        """True if it has ended with an error."""
        return self._error is not None

    @property
    def started(self) -> bool:
        """True if the content has begun to arrive, and nothing has gone wrong so far."""
        return self._file is not None and not self.failed

    def wait_for_start(self, deadline: Deadline) -> None:
        """Wait until the content has begun to arrive. Raises the source's error, or STILL_PULLING."""
        with self._change:
            if not self._wait(deadline, lambda: self._file is not None or self._ended):
                raise RegistryError("STILL_PULLING", "the image's registry has not answered yet: ask again")
            self._raise()

    def open(self, start: int, length: int, deadline: Deadline) -> Body:
        """See Blob; but errors that are not known yet are raised while the body is read."""
        with self._change:
            self._raise()
        parts = self.follow(start, length, deadline)
        return Body(parts, length, parts.close)

    def follow(self, start: int, length: int, deadline: Deadline) -> Generator[Part, None, None]:
        """length bytes from start on, as they arrive, for as long as the client of a deadline is there."""
        position, end = start, start + length
        while position < end:
            part = self._await(position, deadline.unlimited())
            if not isinstance(part, FileSlice):
                with contextlib.closing(part.open(position, end - position, deadline)) as body:
                    yield from body.parts
                return
            count = min(part.length, end - position)
            yield FileSlice(part.file, position, count)
            position += count

    def _await(self, position: int, deadline: Deadline) -> FileSlice | Blob:
        """What has arrived from a position on, as soon as there is something; or the blob that has all of it."""
        with self._change:
            self._wait(deadline, lambda: self._readable() > position or self._ended)
            self._raise()
            if self._blob:
                return self._blob
            assert self._file is not None
            return FileSlice(self._file, position, self._readable() - position)

    def _wait(self, deadline: Deadline, condition: Callable[[], bool]) -> bool:
        return deadline.wait(lambda seconds: self._change.wait_for(condition, seconds))

    def _raise(self) -> None:
        # Not the exception itself: its traceback would keep this transfer, and so the file, alive.
        if self._error:
            raise RegistryError(self._error.code, self._error.detail, self._error.headers)

    def _readable(self) -> int:
        return self.count if self._ended else min(self.count, self.size - 1)


@dataclass(eq=False)
class SharedRead:
    """Content that is being read; see SharedReads.open()."""

    size: int
    read: Callable[[int, int], Body]
    readers: int = 0
    transfer: Transfer | None = None


class SharedReads:
    """Shares reads of a source among simultaneous readers of the same content.

    The first reader has the source to itself: most content has one reader at a time, and needs no file. When a
    second one comes, the source is read once more, into a file without a name, and the first follows that file too,
    from where it is. If the file fails, each reader continues from the source at its own position. Of Docker's content
    service, three readers get 200 MB in half of the time that way, five in a third.
    """

    WORTHWHILE = MIB    # bytes of content from which on it is shared
    STEP = MIB          # bytes after which readers are told that the file has grown: that wakes up all of them

    def __init__(self, folder: Path):
        """folder is where the files are. It is made when it is needed."""
        self._folder = folder
        self._lock = threading.Lock()  # guards _reads, and the readers and the transfer of each
        self._reads: dict[Digest, SharedRead] = {}
        self._transfers = UnderWay[Transfer]()

    def open(self, digest: Digest, size: int, read: Callable[[int, int], Body], deadline: Deadline) -> Body:
        """All of some content, whose size is in bytes. read(start, length) reads it from its source."""
        if size < self.WORTHWHILE:
            return read(0, size)
        with self._lock:
            shared = self._reads.setdefault(digest, SharedRead(size, read))
            shared.readers += 1
            first = shared.readers == 1
        leave = functools.partial(self._leave, digest, shared)
        if first:
            with on_failure(leave):
                source = read(0, size)
            parts = self._first(shared, source, deadline)
            return Body(parts, size, parts.close, source.close, leave)
        parts = self._follow(shared, 0, deadline)
        return Body(parts, size, parts.close, leave)

    def _leave(self, digest: Digest, shared: SharedRead) -> None:
        with self._lock:
            shared.readers -= 1
            if not shared.readers:
                del self._reads[digest]

    def _first(self, shared: SharedRead, source: Body, deadline: Deadline) -> Generator[Part, None, None]:
        """The content for the first reader: out of the source, until there is something to follow."""
        position = 0
        for piece in source:
            yield piece
            position += len(piece)
            if shared.transfer:
                source.close()
                yield from self._follow(shared, position, deadline)
                return

    def _follow(self, shared: SharedRead, position: int, deadline: Deadline) -> Generator[Part, None, None]:
        """The content from a position on, out of a file; or from the source if that fails."""
        try:
            with self._lock:  # or one that another reader has just started could have ended before it is noticed here
                if shared.transfer is None or shared.transfer.failed:
                    shared.transfer = self._transfers.join(
                        shared, lambda: Transfer(shared.size), functools.partial(self._fill, shared))
            for part in shared.transfer.follow(position, shared.size - position, deadline):
                yield part
                position += len(part)
        except RegistryError as e:
            log.warning("the readers of some content do not share it: %s", e.detail)
            with contextlib.closing(shared.read(position, shared.size - position)) as body:
                yield from body.parts

    def _fill(self, shared: SharedRead, transfer: Transfer) -> None:
        """Read all of the content into a file, for as long as there are readers."""
        with contextlib.closing(shared.read(0, shared.size)) as source, disk_errors(f"write to {self._folder}"):
            self._folder.mkdir(parents=True, exist_ok=True)
            file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115 - the transfer closes it
            transfer.begin(file)
            position = 0
            for piece in source:
                rest = memoryview(piece)
                while rest:  # not with write(): sendfile moves the file's own position about
                    count = os.pwrite(file.fileno(), rest, position)
                    position, rest = position + count, rest[count:]
                if position - transfer.count >= self.STEP or position == shared.size:
                    transfer.advance(position - transfer.count)
                if not shared.readers:
                    raise RegistryError("UNAVAILABLE", "nobody reads the content any more")


# =====================================================================================================================
# 10. Disk: our own folder, whose files are whole or not there
# Uses: transfers.
# =====================================================================================================================


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading, unbuffered. IsADirectoryError for anything that is not a file, such as a pipe."""
    file = open(path, "rb", buffering=0,  # noqa: SIM115 - the caller closes it
                opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise IsADirectoryError(errno.EISDIR, "not a regular file")
    return file


ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # the errors of a name under which there is nothing
# The errors of something that is in the place of a file or of a folder. The last one is that of a socket.
MISPLACED = (errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENXIO)


def read_small(path: Path, limit: int) -> bytes | None:
    """The first bytes of a file, at most limit of them. None if there is none, or something in its place. OSError."""
    try:
        with open_file(path) as file:
            return file.read(limit)
    except OSError as e:
        if e.errno not in (errno.ENOENT, *MISPLACED):
            raise
        return None


def read_line(path: Path) -> str:
    """The text of a file that has one short line; empty if there is no such file. OSError."""
    return (read_small(path, LINE_LIMIT) or b"").decode(errors="replace").strip()


def is_folder(path: Path) -> bool:
    """True if there is a folder of that name. OSError if that cannot be told: Path.is_dir() hides such errors."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except OSError as e:
        if e.errno not in ABSENT:
            raise
        return False


def nearest_existing(path: Path) -> Path:
    """Return a path, or the nearest of its parents that exists. OSError if that cannot be told, as of is_folder()."""
    for existing in (path.absolute(), *path.absolute().parents):
        try:
            existing.stat()
        except OSError as e:
            if e.errno not in ABSENT:
                raise
        else:
            return existing
    raise AssertionError("the root folder exists")


class Identity(NamedTuple):
    """What changes whenever a file does. changed is the time of its last change or use, in nanoseconds."""

    inode: int
    size: int
    changed: int

    @classmethod
    def of(cls, path: Path) -> Identity:
        """The identity of a file. OSError."""
        status = path.stat()
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)


def hash_file(path: Path, algorithm: str) -> Any:
    """Return the hashlib object of a file's content. OSError."""
    content = hashlib.new(algorithm)
    with open_file(path) as file:
        while data := file.read(MIB):
            content.update(data)
    return content


class Disk:
    """The files of one folder. Each is there whole, or not at all, even if the machine loses power.

    A file is written and synced under a temporary name in the same folder, `.<random>`, then renamed; then its folder
    is synced.

    Two things are kept apart. A file that is malformed is damaged: it is logged once and treated as absent, so a client
    pushes it again. A folder in place of a file, or a file in place of a folder, is moved to `damaged` when a write
    needs its name. A file that could not be read (no permission, no descriptor left, an error of the disk) is never
    treated as absent: STORE_FAILED.
    """

    SMALL = 8 * MIB     # bytes of the largest file that read() takes for one of ours

    def __init__(self, root: Path, durable: bool = True):
        """durable says whether to wait until files are on the disk."""
        self.root, self.damaged, self._durable = root, root / "damaged", durable
        self._moving = threading.Lock()  # held while something is moved out of the way
        self._named: Memory[Path, bool] = Memory()    # what the log has named as damaged
        self._settled: Memory[Path, bool] = Memory()  # folders whose names are on the disk
        self._unfinished: set[Path] = set()   # one operation each: no lock
        self._change = threading.Condition()  # guards _reserved
        self._reserved: set[Path] = set()

    # ---- reading

    def attempt(self, verb: str, path: Path, action: Callable[[], T], absent: T) -> T:
        """The result of an action on a file, or absent if the file is not there or damaged. STORE_FAILED."""
        with disk_errors(f"{verb} {path}"):
            try:
                return action()
            except FileNotFoundError:
                return absent
            except OSError as e:
                if e.errno not in MISPLACED:
                    raise
                self.name_damaged(path, e.strerror or str(e))
                return absent

    def read(self, path: Path) -> bytes | None:
        """The bytes of a small file, or None if there is none."""

        def action() -> bytes:
            with open_file(path) as file:
                return file.read(self.SMALL + 1)

        data = self.attempt("read", path, action, None)
        if data is not None and len(data) > self.SMALL:
            self.name_damaged(path, "it is too large")
            return None
        return data

    def status(self, path: Path) -> os.stat_result | None:
        """What the system knows of a file, or None if there is none."""
        return self.attempt("read", path, path.stat, None)

    def entries(self, folder: Path) -> list[os.DirEntry[str]]:
        """What is in a folder, sorted by name; nothing if there is no such folder."""
        return self.attempt("read", folder, lambda: sorted(os.scandir(folder), key=lambda entry: entry.name), [])

    def names(self, folder: Path) -> list[str]:
        """The names in a folder, sorted, without those of temporary files."""
        return [entry.name for entry in self.entries(folder) if entry.name[0] != "."]

    def files(self, *folders: Path) -> Iterator[Path]:
        """All files below some folders, temporary ones too."""
        for entry in itertools.chain.from_iterable(map(self.entries, folders)):
            if entry.is_dir(follow_symlinks=False):
                yield from self.files(Path(entry.path))
            else:
                yield Path(entry.path)

    # ---- writing

    def make_folder(self, folder: Path) -> None:
        """Make a folder, and those above it. Their names are on the disk when this returns. OSError."""
        is_ours = self.root in (folder, *folder.parents) and folder != folder.parent  # "." and "/" are their own
        if is_folder(folder) and (folder in self._settled or not is_ours):
            return
        self.make_folder(folder.parent)
        try:
            folder.mkdir(exist_ok=True)
        except FileExistsError:
            if self.root not in folder.parents:  # not ours to move
                raise
            self.move_away(folder, lambda: not is_folder(folder))
            folder.mkdir(exist_ok=True)
        self.sync(folder.parent)
        self._settled[folder] = True

    def begin(self, folder: Path) -> Path:
        """Make a folder and return a temporary name in it. The caller must call end(). OSError."""
        self.make_folder(folder)
        path = folder / f".{secrets.token_hex(8)}"
        self._unfinished.add(path)
        return path

    def end(self, path: Path) -> None:
        """Remove what is left under a temporary name."""
        self._unfinished.discard(path)
        with contextlib.suppress(OSError):  # tidying up removes it later
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _replacing(self, path: Path) -> Iterator[Path]:
        """A temporary name, which becomes this one in the end. OSError."""
        temporary = self.begin(path.parent)
        try:
            yield temporary
            try:
                temporary.rename(path)
            except IsADirectoryError:
                self.move_away(path, lambda: is_folder(path))
                temporary.rename(path)
        finally:
            self.end(temporary)

    def write(self, path: Path, data: bytes) -> None:
        """Write a small file."""
        with disk_errors(f"write {path}"):
            with self._replacing(path) as temporary:
                temporary.write_bytes(data)
                self.sync(temporary)
            self.sync(path.parent)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name, replacing any file of that name. OSError."""
        with self._replacing(target) as temporary:
            os.link(source, temporary)

    def flush(self, file: BinaryIO, start: int, count: int) -> None:
        """Have the system begin to write some bytes of a file to the disk, so that sync() takes a tenth of the time."""
        if self._durable and hasattr(os, "posix_fadvise"):  # macOS has none
            with contextlib.suppress(OSError):
                os.posix_fadvise(file.fileno(), start, count, os.POSIX_FADV_DONTNEED)

    def sync(self, path: Path) -> None:
        """Wait until a file, or the names in a folder, are on the disk. OSError."""
        if not self._durable:
            return
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except PermissionError:  # a folder above ours, which this process may enter, and not read
            return
        try:
            os.fsync(descriptor)
        except OSError as e:
            if e.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems do not sync folders
                raise
        finally:
            os.close(descriptor)

    def remove(self, path: Path, durable: bool = False) -> bool:
        """Remove a file. True if there was one. durable: wait until the removal is on the disk."""

        def action() -> bool:
            path.unlink()
            if durable:
                self.sync(path.parent)
            return True

        return self.attempt("remove", path, action, False)

    # ---- damage

    def name_damaged(self, path: Path, why: str) -> None:
        """Say once in the log that something is damaged."""
        if path not in self._named:
            self._named[path] = True
            log.warning("store: %s is damaged (%s): it counts as absent", path, why)

    def move_away(self, path: Path, is_in_the_way: Callable[[], bool]) -> None:
        """Move what is in the place of something else to the folder of damaged files. OSError."""
        target = (self.root if path == self.damaged else self.damaged) / f"{path.name}.{secrets.token_hex(4)}"
        self.make_folder(target.parent)
        with self._moving:
            if is_in_the_way():
                path.rename(target)
                log.warning("store: %s was damaged, and in the way: it is now %s", path, target)

    # ---- one at a time

    @contextlib.contextmanager
    def reserved(self, path: Path, wait: bool) -> Iterator[None]:
        """Reserve a path for one thread. If another thread has it, wait, or raise UPLOAD_BUSY."""
        with self._change:
            if path in self._reserved and not wait:
                raise RegistryError("UPLOAD_BUSY", "another request is writing to this upload: ask for its state, and "
                                                   "continue from there")
            self._change.wait_for(lambda: path not in self._reserved)
            self._reserved.add(path)
        try:
            yield
        finally:
            with self._change:
                self._reserved.discard(path)
                self._change.notify_all()

    def is_old(self, path: Path, now: float, age: float) -> bool:
        """True if a file was last used more than `age` seconds before now, and nobody is writing to it."""
        status = self.status(path) if path not in self._unfinished and path not in self._reserved else None
        return status is not None and status.st_mtime < now - age

    def close(self) -> None:
        """Remove everything half-written, at the end of the process."""
        for path in list(self._unfinished):
            self.end(path)


class Space:
    """How much of the disk the store takes, and may take, in bytes."""

    def __init__(self, root: Path, limit: int | None = None):
        self._root, self.limit = root, limit
        self._lock = threading.Lock()  # guards the numbers
        self.measured = False
        self.used = 0       # on the disk
        self._reserved = 0  # about to be written
        self.freed = 0      # ever

    def available(self) -> int:
        """The free bytes of the disk. STORE_FAILED."""
        with disk_errors(f"write to {self._root}"):
            return shutil.disk_usage(nearest_existing(self._root)).free

    def _lacking(self, count: int, free: int) -> int:
        wanted = count + self._reserved
        return max(wanted + MINIMUM_FREE - free, 0 if self.limit is None else self.used + wanted - self.limit, 0)

    def lacking(self, count: int) -> int:
        """How many bytes have to be freed before this many more can be reserved."""
        return self._lacking(count, self.available())

    def reserve(self, count: int) -> bool:
        """Count bytes that are about to be written, if there is room for them. True if so."""
        free = self.available()
        with self._lock:
            fits = not self._lacking(count, free)
            self._reserved += count if fits else 0
        return fits

    def count(self, used: int = 0, reserved: int = 0) -> None:
        """Change the numbers of used and of reserved bytes."""
        with self._lock:
            self.used, self._reserved = self.used + used, self._reserved + reserved

    def free(self, count: int) -> None:
        """Count used bytes as freed."""
        with self._lock:
            self.used, self.freed = self.used - count, self.freed + count

    def __str__(self) -> str:
        limit = "" if self.limit is None else f" of the limit of {human_bytes(self.limit)}"
        return f"{human_bytes(self.used)}{limit} used"


# =====================================================================================================================
# 11. Store: content by digest, and its owners
# Uses: waiting, transfers, disk.
# =====================================================================================================================


class Record(NamedTuple):
    """What is kept about one image: its manifest's digest, and the size in bytes of everything that it needs."""

    target: Digest
    content: Mapping[Digest, int]


class Links:
    """The content that belongs to one owner, by digest: a folder of hard links to the store's content.

    The bytes are stored once, however many owners they have. The file system counts the owners: content with no
    link but the store's own belongs to nobody.
    """

    def __init__(self, store: Store, folder: Path, durable: bool = True):
        """durable: what belongs here is synced before it is acknowledged."""
        self._store, self.folder, self._durable = store, folder, durable

    def path(self, digest: Digest) -> Path:
        """Where the content is, if it belongs here."""
        return self.folder / digest.algorithm / digest.hex

    def size(self, digest: Digest) -> int | None:
        """The size of the content in bytes, or None if it does not belong here. Its bytes are not looked at."""
        status = self._store.disk.status(self.path(digest))
        return status.st_size if status else None

    def touch(self, digest: Digest) -> None:
        """Mark content as used now: it stays for a while."""
        self._store.touch(self.path(digest))

    def find(self, digest: Digest, deadline: Deadline | None = None) -> FileBlob | None:
        """The content, or None if it does not belong here or is damaged. See Store.has_content for the deadline."""
        path = self.path(digest)
        is_intact = self._store.is_intact(path, digest, deadline)
        return self._store.disk.attempt("read", path, lambda: FileBlob(path), None) if is_intact else None

    def digests(self, strict: bool = False) -> Iterator[Digest]:
        """The digests of everything that belongs here; STORE_FAILED if not all of it can be listed.

        If strict is set, damage counts as such a failure: something that belongs here may not be listed then.
        """
        is_damaged = os.path.lexists(self.folder) and not is_folder(self.folder)
        for algorithm in self._store.disk.names(self.folder):
            is_damaged = is_damaged or not is_folder(self.folder / algorithm)
            for name in self._store.disk.names(self.folder / algorithm):
                digest = self._store.parse_digest(f"{algorithm}:{name}", self.folder / algorithm / name)
                is_damaged = is_damaged or digest is None
                if digest:
                    yield digest
        if strict and is_damaged:
            raise RegistryError("STORE_FAILED", f"{self.folder} is damaged: what belongs there is not known")

    def adopt(self, digest: Digest, size: int | None = None, deadline: Deadline | None = None) -> bool:
        """Make content of the store belong here too, as used now. True if the store has it, in this size in bytes."""
        source = self._store.blobs.path(digest)
        with disk_errors(f"link {source}"), contextlib.suppress(FileNotFoundError):
            self._store.touch(source)
            if self._store.is_intact(source, digest, deadline) and size in (None, source.stat().st_size):
                with self._store.disk.reserved(source, wait=True):  # it is not freed meanwhile
                    self._link(source, digest)
                return True
        return False

    def take(self, file: Path, digest: Digest) -> None:
        """Make a finished file, whose digest was verified, belong here. The file stays."""
        with disk_errors(f"write to {self.folder}"):
            os.utime(file)
            self._store.remember(Identity.of(file), digest)
            if self.adopt(digest):
                return
            source = self._store.blobs.path(digest)
            with self._store.disk.reserved(source, wait=True):
                if not self._store.is_intact(source, digest):  # or another request has just added it
                    self._store.add(file, digest)
                self._link(source, digest)

    def _link(self, source: Path, digest: Digest) -> None:
        target = self.path(digest)
        if self._durable:
            self._store.disk.sync(source)
        status = self._store.disk.status(target)
        if status is None or status.st_ino != source.stat().st_ino:
            self._store.disk.link(source, target)
        if self._durable:  # also if another request has linked it: it may not have synced yet
            self._store.disk.sync(target.parent)

    def drop(self, digest: Digest) -> bool:
        """Make content no longer belong here, and free it if it belongs to nobody else. True if it did belong here."""
        gone = self._store.disk.remove(self.path(digest), self._durable)
        if gone:
            self._store.release(digest)
        return gone

    def drop_unless_used(self, digest: Digest, now: float, age: float) -> None:
        """Drop content that was last used more than `age` seconds before now."""
        path = self.path(digest)
        with self._store.using:
            gone = self._store.disk.is_old(path, now, age) and self._store.disk.remove(path)
        if gone:
            self._store.release(digest)


class Store:
    """Content by digest, and its owners.

        blobs/sha256/<hex>          content, whole and verified
        docker/sha256/<hex>         links to what came from Docker, or was fetched because Docker lacks it
        exports/sha256/<hex>        the record of one exported image, named by the image's ID
        repositories/<name>/...     what was pushed: see Repository
        damaged/...                 what was in the place of something else: see Disk

    The folder is made at the first write: a program that only reads Docker's containerd image store needs none.
    Content is read and compared with its digest before this process uses it for the first time, and again if its
    file has changed. If it is damaged, it stays where it is, and nobody gets it: its owners get the good content as
    soon as anybody brings it.
    """

    FOLDERS = ("blobs", "docker", "exports", "repositories", "damaged")

    def __init__(self, root: Path, durable: bool = True, limit: int | None = None):
        """durable says whether what is pushed is on the disk before that is acknowledged; limit is in bytes."""
        self.root, self.repositories = root, root / "repositories"
        self.disk, self.space = Disk(root, durable), Space(root, limit)
        self.blobs, self.docker, self._exports = (
            Links(self, root / name, durable=False) for name in ("blobs", "docker", "exports"))
        # The size and the hash of uploads between two requests. Only whoever has reserved the path touches its entry.
        self.hashes: dict[Path, tuple[int, Any]] = {}
        self.jobs = Jobs()
        self.using = threading.Lock()  # held while content is marked as used or identified, or removed as unused
        self._lock = threading.Lock()  # guards _verified
        self._verified: dict[Identity, Digest] = {}  # what is in a file; what was used last comes last
        self._unread: Memory[Identity, Identity] = Memory()  # what it was before it was used, while it is not verified

    def close(self) -> None:
        """See Disk."""
        self.disk.close()

    @classmethod
    def folders(cls, root: Path) -> list[Path]:
        """The folders of a store that are written to, as far as they exist, or the one that it is made in. OSError."""
        return [nearest_existing(root), *filter(os.path.isdir, map(root.joinpath, cls.FOLDERS))]

    def parse_digest(self, text: str, path: Path) -> Digest | None:
        """The digest that is the name of a file, or in it. None if it is malformed: then the log names the file."""
        try:
            return Digest.parse(text)
        except ValueError:
            self.disk.name_damaged(path, "not a digest")
            return None

    # ---- content

    def remember(self, identity: Identity, digest: Digest) -> None:
        """Remember what was found to be in a file."""
        with self._lock:
            if len(self._verified) >= VERIFIED_LIMIT:
                del self._verified[next(iter(self._verified))]
            self._verified[identity] = digest

    def touch(self, path: Path) -> None:
        """Mark a file as used now, if that is possible: it is not removed for a while."""
        with self.using, contextlib.suppress(OSError):  # it is not there, or the file system is read-only
            before = Identity.of(path)
            os.utime(path)
            after = Identity.of(path)
            with self._lock:
                known = self._verified.pop(before, None)
            if after[:2] == before[:2]:
                if known:
                    self.remember(after, known)
                else:  # it may be under way to be read
                    self._unread[after] = self._unread.pop(before, before)

    def is_intact(self, path: Path, digest: Digest, deadline: Deadline | None = None) -> bool:
        """True if a file is there and has the content of a digest. If it has other content, the log names it."""
        for _ in range(2):  # it may have been replaced while it was read; the second answer is remembered
            found = self._found(path, digest, deadline)
            if found is None or found == digest:  # absent, and then it may arrive at any moment: that is no damage
                return found is not None
        self.disk.name_damaged(path, f"its content is not that of {digest}")
        if path == self.docker.path(digest):  # it can be had again
            with self.disk.reserved(self.blobs.path(digest), wait=True), contextlib.suppress(OSError):
                if not self.has_content(path, digest, deadline):  # unless it was replaced a moment ago
                    path.unlink()
        return False

    def has_content(self, path: Path, digest: Digest, deadline: Deadline | None = None) -> bool:
        """True if a file is there and has the content of a digest. STORE_FAILED if it could not be read.

        If a large file has to be read first, that may last longer than a deadline: then UNAVAILABLE, and it goes on.
        """
        return self._found(path, digest, deadline) == digest

    def _found(self, path: Path, expected: Digest, deadline: Deadline | None) -> Digest | None:
        """The digest of a file's content, or None if there is no file. STORE_FAILED, UNAVAILABLE."""
        return self.disk.attempt("read", path, lambda: self._digest(path, expected, deadline), None)

    def _digest(self, path: Path, expected: Digest, deadline: Deadline | None) -> Digest:
        """The digest of a file's content, by the same algorithm as the expected one. OSError, UNAVAILABLE."""
        with self.using:  # or a use at this moment would make it another file
            identity = Identity.of(path)
            found, unread = self._verified.get(identity), self._unread.get(identity, identity)
        if found and found.algorithm == expected.algorithm:
            return found
        read = functools.partial(self._read, path, unread, expected.algorithm)
        if identity.size <= MANIFEST_LIMIT:
            return read()
        try:
            job = self.jobs.start((unread, expected.algorithm), read, f"reading {expected}")
            result: Digest = job.outcome(deadline or Deadline())
            return result
        except RegistryError as e:
            raise RegistryError("UNAVAILABLE", f"the store is still reading {expected}: ask again") from e

    def _read(self, path: Path, unread: Identity, algorithm: str) -> Digest:
        """Read a file, and return the digest of its content, which is remembered unless it has changed. OSError."""
        found = Digest(algorithm, hash_file(path, algorithm).hexdigest())
        with self.using:
            identity = Identity.of(path)
            if unread == self._unread.pop(identity, identity):  # it has only been used meanwhile
                self.remember(identity, found)
        return found

    def add(self, file: Path, digest: Digest) -> None:
        """Add a verified file. If there is damaged content in its place, all owners get the good one. OSError."""
        if os.path.lexists(self.blobs.path(digest)):
            self.disk.sync(file)
            inode = file.stat().st_ino
            for owner in self.owners():
                status = self.disk.status(owner.path(digest))
                if status and status.st_ino != inode and owner is not self.blobs:
                    self.disk.link(file, owner.path(digest))
                    self.disk.sync(owner.path(digest).parent)
                    log.info("store: %s is whole again", owner.path(digest))
        self.disk.link(file, self.blobs.path(digest))  # the last one: after a kill, the others are repeated

    def owners(self) -> Iterator[Links]:
        """All that content may belong to: the store itself, what came from Docker, and each repository."""
        yield from (self.blobs, self.docker)
        for name in self.repository_names():
            yield from (Links(self, self.repositories / name / kind) for kind in ("_blobs", "_manifests"))

    def repository_names(self, above: str = "") -> Iterator[str]:
        """The names of the repositories that anything was ever pushed to."""
        entries = [entry for entry in self.disk.entries(self.repositories / above) if entry.name[0] != "."]
        if any(entry.name in ("_manifests", "_blobs", "_uploads") for entry in entries):
            yield above
        for entry in entries:
            name = f"{above}/{entry.name}" if above else entry.name
            if REPOSITORY.fullmatch(name) and len(name) <= NAME_LENGTH and entry.is_dir(follow_symlinks=False):
                yield from self.repository_names(name)

    def release(self, digest: Digest) -> None:
        """Free content that belongs to nobody."""
        path = self.blobs.path(digest)
        with self.disk.reserved(path, wait=True):
            status = self.disk.status(path)
            if status and status.st_nlink == 1 and self.disk.remove(path):
                self.space.free(status.st_size)

    # ---- records of what was exported

    def _read_record(self, path: Path) -> Record | None:
        data = self.disk.read(path)
        if data is None:
            return None
        try:
            document = json.loads(data)
            content = {Digest.parse(digest): int(size) for digest, size in document["content"].items()}
            return Record(Digest.parse(document["target"]), content)
        except MALFORMED_ERRORS as e:
            self.disk.name_damaged(path, f"not a record of an image: {e}")
            return None

    def record_export(self, image_id: Digest, target: Digest, content: Iterable[Digest]) -> None:
        """Note an exported image: the digest of its manifest, and the content that it needs, which is here."""
        with disk_errors(f"read {self.docker.folder}"):
            sizes = {str(digest): self.docker.path(digest).stat().st_size for digest in content}
        self.disk.write(self._exports.path(image_id), json.dumps({"target": str(target), "content": sizes}).encode())

    def noted_target(self, image_id: Digest) -> Digest | None:
        """The digest of the manifest that an image had when it was exported, or None if it never was."""
        record = self._read_record(self._exports.path(image_id))
        return record.target if record else None

    def exported(self, image_id: Digest) -> Digest | None:
        """The digest of an exported image's manifest, or None unless everything it needs is here."""
        path = self._exports.path(image_id)
        record = self._read_record(path)
        if record is None or not self.docker.find(record.target) or any(
                self.docker.size(digest) != size for digest, size in record.content.items()):
            return None
        for used in (path, *map(self.docker.path, record.content)):
            self.touch(used)  # what is freed depends on the last use
        return record.target

    # ---- room

    def reserve(self, count: int) -> None:
        """Count bytes that are about to be written, and make room for them if need be. STORE_FULL if there is none."""
        if self.space.limit is not None and not self.space.measured:
            self.measure(again=False)
        if self.space.lacking(count):
            self._evict(count)
        if not self.space.reserve(count):
            raise RegistryError("STORE_FULL", (
                f"no room for {human_bytes(count)}: {self.space}, and {human_bytes(MINIMUM_FREE)} of the disk have to "
                "stay free. Delete images that are not needed any more"))

    def check_room(self, count: int) -> None:
        """Make room for some bytes if need be, before anything is written. STORE_FULL if there is none."""
        if count:
            self.reserve(count)
            self.space.count(reserved=-count)

    def measure(self, again: bool = True) -> None:
        """Count what the store has on the disk. What is written meanwhile may be miscounted until the next time.

        With a limit, nothing is written before the first time has ended: again is False for whoever waits for that.
        """
        with self.disk.reserved(self.root, wait=True):
            if self.space.measured and not again:
                return
            uploads, used = (self.repositories / name / "_uploads" for name in self.repository_names()), 0
            for path in self.disk.files(self.root / "blobs", *uploads):
                with contextlib.suppress(OSError):
                    used += path.stat().st_size
            self.space.used, self.space.measured = used, True

    def _evict(self, count: int) -> None:
        """Free what can be had again, the least recently used first, until there is room for this many bytes.

        What was used within the last SERVED_AGE seconds stays: a node may be in the middle of a pull. Nothing is freed
        if all of that would not be enough.
        """
        now = time.time()
        found = {digest: self.disk.status(self.docker.path(digest)) for digest in self.docker.digests()}
        old = {digest: status for digest, status in found.items()
               if status and status.st_mtime < now - SERVED_AGE and status.st_nlink == 2}  # the store's own, and this
        if sum(status.st_size for status in old.values()) < self.space.lacking(count):
            return
        with self.log_freed("of copies, to make room"):
            for digest in sorted(old, key=lambda digest: old[digest].st_mtime):
                if self.space.lacking(count):
                    self.docker.drop_unless_used(digest, now, SERVED_AGE)

    # ---- tidying up

    def tidy_up(self, in_docker: Callable[[Digest], bool], now: float) -> None:
        """Remove what nothing refers to any more. now is in seconds since the epoch.

        That is: exports of images that Docker no longer has, other copies that were not used for FETCHED_AGE seconds,
        content without an owner, and what a killed process left half-written. What was used within the last
        EVICTION_AGE seconds stays: a pull, an export or a push may be under way.
        """
        needed: set[Digest] = set()
        gone: set[Digest] = set()
        for image_id in self._exports.digests():
            path = self._exports.path(image_id)
            record, is_gone = self._read_record(path), False
            if self.disk.is_old(path, now, EVICTION_AGE) and not in_docker(image_id):
                is_gone = self.disk.remove(path)
            (gone if is_gone else needed).update(record.content if record else ())
        for digest in set(self.docker.digests()) - needed:
            status = self.disk.status(self.docker.path(digest))
            is_pushed = status and status.st_nlink > 2  # and so it stays without this copy
            self.docker.drop_unless_used(digest, now, EVICTION_AGE if digest in gone or is_pushed else FETCHED_AGE)
        for path in self.disk.files(*(self.root / name for name in self.FOLDERS)):
            status = self.disk.status(path) if path.name[0] == "." else None
            if status and self.disk.is_old(path, now, EVICTION_AGE) and self.disk.remove(path) and (
                    self.blobs.folder in path.parents):  # these were measured
                self.space.free(status.st_size)
        for digest in self.blobs.digests():
            if self.disk.is_old(self.blobs.path(digest), now, EVICTION_AGE):
                self.release(digest)

    @contextlib.contextmanager
    def log_freed(self, what: str = "that nothing refers to any more") -> Iterator[None]:
        """Log how many bytes were freed during the `with`."""
        before = self.space.freed
        yield
        if self.space.freed > before:
            log.info("store: freed %s %s", human_bytes(self.space.freed - before), what)


# =====================================================================================================================
# 12. Writers: content that is being written
# Uses: transfers, disk, store.
# =====================================================================================================================


class Writer:
    """A file of the store that grows, and is hashed meanwhile. It has to be kept or discarded in the end."""

    STEP = 16 * MIB     # bytes after which the system begins to bring them to the disk

    def __init__(self, store: Store, path: Path, content: Any):
        """content is the hashlib object of the bytes so far."""
        self._store, self.path, self._hash = store, path, content
        with disk_errors(f"write {path}"):
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
            self.size = self._file.tell()
        self._reserved = 0
        self._ended = False

    def expect(self, count: int) -> None:
        """Reserve room for so many more bytes. STORE_FULL if there is none."""
        self._store.reserve(count)
        self._reserved += count

    def write(self, data: Data) -> None:
        """Append bytes. Readers of the file see them immediately. STORE_FAILED; STORE_FULL, and all is discarded."""
        step = self.size // self.STEP * self.STEP
        try:
            if len(data) > self._reserved:
                self.expect(len(data))
            with disk_errors(f"write {self.path}"):
                rest = memoryview(data)
                while rest:
                    count = self._file.write(rest)
                    self._hash.update(rest[:count])
                    rest = rest[count:]
                    self.size += count
                    self._reserved -= count
                    self._store.space.count(used=count, reserved=-count)
        except RegistryError as e:
            if e.code == "STORE_FULL":
                self.discard()
            raise
        if self.size - step >= self.STEP:
            self._store.disk.flush(self._file, step, self.size - step)

    def close(self) -> None:
        """Close the file. STORE_FAILED, STORE_FULL."""
        self._store.space.count(reserved=-self._reserved)
        self._reserved = 0
        with disk_errors(f"write {self.path}"):
            self._file.close()

    def finish(self, algorithm: str | None = None) -> Digest:
        """Close the file, and return the digest of everything that was written."""
        self.close()
        content = self._hash
        if algorithm not in (None, content.name):
            with disk_errors(f"read {self.path}"):
                content = hash_file(self.path, algorithm)
        return Digest(content.name, content.hexdigest())

    def keep(self, owner: Links, expected: Digest | None = None) -> Digest:
        """Finish, and make the content belong to an owner under its digest, which is returned.

        DIGEST_INVALID if it is not the expected one. After an error nothing is kept.
        """
        try:
            digest = self.finish(expected.algorithm if expected else None)
            if expected not in (None, digest):
                raise RegistryError("DIGEST_INVALID", f"the {self.size} bytes that arrived have the digest {digest}, "
                                                      f"not {expected}")
            owner.take(self.path, digest)
        finally:
            self._end()
        return digest

    def discard(self) -> None:
        """Forget the content, unless it was kept."""
        with contextlib.suppress(RegistryError):  # a full disk says so again
            Writer.close(self)
        self._end()

    def _end(self) -> None:
        if not self._ended:  # the first end counts
            self._ended, is_new = True, False
            with contextlib.suppress(OSError):
                is_new = self.path.stat().st_nlink > 1  # the store has it, perhaps for the next one who brings it
            self._store.space.count(used=0 if is_new else -self.size)
            self._store.disk.end(self.path)


class BlobWriter(Writer):
    """New content. Unless it is kept, nothing of it remains."""

    def __init__(self, store: Store, algorithm: str = "sha256"):
        folder = store.root / "blobs" / algorithm
        with disk_errors(f"write to {folder}"):
            path = store.disk.begin(folder)
        with on_failure(lambda: store.disk.end(path)):
            super().__init__(store, path, hashlib.new(algorithm))

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.discard()


def keep_content(store: Store, data: bytes, owner: Links, algorithm: str = "sha256") -> Digest:
    """Write some content that is in memory, and make it belong to an owner under its digest, which is returned."""
    with BlobWriter(store, algorithm) as writer:
        writer.write(data)
        return writer.keep(owner)


class Upload(Writer):
    """An upload during one request. It has to be closed.

    Its hash stays in memory from one request to the next. After a restart it is computed again from the file.
    """

    def __init__(self, store: Store, path: Path):
        size, content = store.hashes.pop(path, (0, None))
        super().__init__(store, path, content)
        if content is None or size != self.size:
            with disk_errors(f"read {path}"):
                self._hash = hash_file(path, "sha256")

    def close(self) -> None:
        """Close the file, at the end of each request. If that fails, the upload is discarded."""
        with on_failure(self.discard):
            super().close()
        if not self._ended:
            self._store.hashes[self.path] = (self.size, self._hash)

    def _end(self) -> None:
        super()._end()
        self._store.hashes.pop(self.path, None)


# =====================================================================================================================
# 13. Hosted: the registry of what was pushed
# Uses: waiting, transfers, store, writers.
# =====================================================================================================================


class Repository:
    """What was pushed under one name: blobs, manifests and tags.

        <name>/_blobs/sha256/<hex>                  a link to a blob
        <name>/_manifests/sha256/<hex>              a link to a manifest: from then on the manifest exists
        <name>/_types/sha256/<hex>                  its media type, if the manifest itself does not say it
        <name>/_tags/<tag>                          the digest of a manifest
        <name>/_referrers/sha256/<hex>/<digest>     an empty file: this manifest has that subject
        <name>/_deleted/sha256/<hex>                an empty file: there may be tags of this deleted manifest
        <name>/_uploads/<session>                   what has arrived of an upload

    Path components of a repository's name never begin with an underscore, so nested names do not clash.
    A tag or a referrer counts only while its manifest exists. So a push is there whole or not at all, whenever the
    process is killed. And a manifest is deleted without a look at each tag: they go when the repository is tidied up,
    or before the same manifest is pushed again.
    """

    def __init__(self, store: Store, name: str):
        self._store, self._disk, self.name = store, store.disk, name
        self.folder = store.repositories / name
        self.blobs, self.manifests = Links(store, self.folder / "_blobs"), Links(store, self.folder / "_manifests")
        self._tags, self._uploads = self.folder / "_tags", self.folder / "_uploads"

    def _changing(self) -> contextlib.AbstractContextManager[None]:
        """Hold this while a manifest is pushed or deleted: it is several files, and two such changes must not mix."""
        return self._disk.reserved(self.folder, wait=True)

    # ---- manifests

    def _path(self, kind: str, digest: Digest) -> Path:
        return self.folder / kind / digest.algorithm / digest.hex

    def manifest(self, target: str | Digest) -> Manifest | None:
        """The manifest that a tag or a digest names here, or None."""
        digest = target if isinstance(target, Digest) else self._tagged(target)
        data = self._disk.read(self.manifests.path(digest)) if digest and self.manifests.find(digest) else None
        return Manifest(digest, self._media_type(digest, data), data) if digest and data is not None else None

    def _media_type(self, digest: Digest, data: bytes) -> str:
        """The media type of a manifest: the one that it was pushed with, if it does not say that itself."""
        path = self._path("_types", digest)
        noted = self._disk.read(path)
        if noted is not None:
            media_type = noted.decode(errors="replace")
            if MEDIA_TYPE.fullmatch(media_type):
                return media_type
            self._disk.name_damaged(path, "not a media type")
        return manifest_type(data) or OCI_MANIFEST

    def put_manifest(self, manifest: Manifest, tags: Iterable[str]) -> None:
        """Keep a manifest, and then its tags. STORE_FAILED, STORE_FULL."""
        digest, types = manifest.digest, self._path("_types", manifest.digest)
        self._store.check_room(len(manifest.data))
        with self._changing():
            self._forget_tags(digest)
            if manifest.media_type != manifest_type(manifest.data):
                self._disk.write(types, manifest.media_type.encode())
            else:
                self._disk.remove(types)  # of an earlier push of the same bytes
            if manifest.subject:
                self._disk.write(self._path("_referrers", manifest.subject) / str(digest), b"")
            keep_content(self._store, manifest.data, self.manifests, digest.algorithm)
            for tag in tags:
                self._touch_tagged(tag)
                self._disk.write(self._tags / tag, str(digest).encode())

    def _touch_tagged(self, tag: str) -> None:
        """Mark the manifest that a tag names until now as used: its time without a tag begins."""
        if digest := self._tagged(tag):
            self.manifests.touch(digest)

    def delete_manifest(self, digest: Digest) -> bool:
        """Remove a manifest with all its tags. True if it was here."""
        with self._changing():
            return self._delete_manifest(digest)

    def _delete_manifest(self, digest: Digest) -> bool:
        manifest = self.manifest(digest)
        if self.manifests.size(digest) is None:
            return False
        self._disk.write(self._path("_deleted", digest), b"")
        gone = self.manifests.drop(digest)
        self._disk.remove(self._path("_types", digest))
        if manifest and manifest.subject:
            self._disk.remove(self._path("_referrers", manifest.subject) / str(digest))
        return gone

    def _forget_tags(self, digest: Digest) -> None:
        """Remove the tags of a manifest that was deleted, or they would be back when it is pushed again."""
        deleted = self._path("_deleted", digest)
        if self._disk.status(deleted):
            is_deleted = self.manifests.size(digest) is None  # or the process was killed before that
            for tag in self._disk.names(self._tags) if is_deleted else ():
                if self._tagged(tag) == digest:
                    self._disk.remove(self._tags / tag)
            self._disk.remove(deleted)

    def referrers(self, subject: Digest, after: str = "") -> Iterator[Manifest]:
        """The manifests here that have this subject, in the order of their own digests, behind one of these."""
        folder = self._path("_referrers", subject)
        for name in self._disk.names(folder):
            digest = self._store.parse_digest(name, folder / name) if name > after else None
            manifest = self.manifest(digest) if digest else None
            if manifest:
                yield manifest

    def has_blob(self, digest: Digest, size: int, deadline: Deadline | None = None) -> bool:
        """True if a blob is here in its size, in bytes. It counts as used now. See Store.has_content."""
        self.blobs.touch(digest)
        blob = self.blobs.find(digest, deadline)
        return blob is not None and blob.size == size

    # ---- tags

    def _tagged(self, tag: str) -> Digest | None:
        """The digest that a tag's file has, or None."""
        path = self._tags / tag
        data = self._disk.read(path)
        return self._store.parse_digest(data.decode(errors="replace"), path) if data is not None else None

    def tag(self, tag: str) -> Digest | None:
        """The digest of the manifest that a tag names, or None if there is no such tag or manifest."""
        digest = self._tagged(tag)
        return digest if digest and self.manifests.find(digest) else None

    def dangling_tags(self) -> Iterator[tuple[str, Digest]]:
        """The tags whose manifest is not there, though it was not deleted, with its digest."""
        for tag in filter(TAG.fullmatch, self._disk.names(self._tags)):
            digest = self._tagged(tag)
            if digest and self.manifests.size(digest) is None and not self._disk.status(self._path("_deleted", digest)):
                yield tag, digest

    def tags(self, after: str = "") -> Iterator[str]:
        """The tags behind a name, sorted. Each is read when it is taken, so a page costs as much as its own tags."""
        return (tag for tag in self._disk.names(self._tags) if tag > after and TAG.fullmatch(tag) and self.tag(tag))

    def delete_tag(self, tag: str) -> bool:
        """Remove a tag. True if there was one. Its manifest stays."""
        with self._changing():
            self._touch_tagged(tag)
            return self.tag(tag) is not None and self._disk.remove(self._tags / tag, durable=True)

    # ---- uploads

    def begin_upload(self) -> str:
        """Begin an upload, and return its session: a name that nobody can guess."""
        session = secrets.token_hex(16)
        with disk_errors(f"write to {self._uploads}"):
            self._disk.make_folder(self._uploads)
            (self._uploads / session).touch()
        return session

    def upload_size(self, session: str) -> int:
        """The bytes of an upload that have arrived, even while a request writes to it. BLOB_UPLOAD_UNKNOWN."""
        is_valid = re.fullmatch(r"[0-9a-f]{32}", session)
        status = self._disk.status(self._uploads / session) if is_valid else None
        if status is None or status.st_nlink > 1:  # a blob already: the process was killed before it removed this name
            raise RegistryError("BLOB_UPLOAD_UNKNOWN", f"{self.name} has no upload {session!r}")
        return status.st_size

    @contextlib.contextmanager
    def upload(self, session: str) -> Iterator[Upload]:
        """An upload to write to, for one request at a time. BLOB_UPLOAD_UNKNOWN, UPLOAD_BUSY."""
        path = self._uploads / session
        with self._disk.reserved(path, wait=False):
            self.upload_size(session)
            with contextlib.closing(Upload(self._store, path)) as upload:
                yield upload

    # ---- tidying up

    def tidy_up(self, now: float, untagged_age: float | None) -> None:
        """Remove abandoned uploads, unused blobs, and, if an age in seconds is given, manifests without a tag."""
        for path in map(self._uploads.joinpath, self._disk.names(self._uploads)):
            status = self._disk.status(path)
            if status and self._disk.is_old(path, now, UPLOAD_AGE) and self._disk.remove(path):
                self._store.space.free(status.st_size)
                self._store.hashes.pop(path, None)
        for digest in Links(self._store, self.folder / "_deleted").digests():
            with self._changing():
                self._forget_tags(digest)
        self._tidy_content(now, untagged_age)

    def _tidy_content(self, now: float, untagged_age: float | None) -> None:
        unused = set(self.blobs.digests())
        related: dict[Digest, set[Digest]] = {}  # manifest -> those that it lists, and those that have it as subject
        for digest in self.manifests.digests(strict=True):
            manifest = self.manifest(digest)
            if manifest is None:
                return  # it is damaged: its blobs are not known
            # BuildKit lists the layers of a cache as the manifests of an index.
            unused.difference_update(manifest.listed("config", "layers", "blobs", "manifests"))
            related.setdefault(digest, set()).update(manifest.listed("manifests"))
            if manifest.subject:
                related.setdefault(manifest.subject, set()).add(digest)
        for digest in unused:
            self.blobs.drop_unless_used(digest, now, UPLOAD_AGE)
        if untagged_age is not None:
            for digest in set(self.manifests.digests()) - self._tagged_with(related):
                with self._changing():  # a push of it that was under way marks it as used
                    if self._disk.is_old(self.manifests.path(digest), now, untagged_age):
                        log.info("store: removed the manifest %s of %s, which has no tag", digest, self.name)
                        self._delete_manifest(digest)

    def _tagged_with(self, related: Mapping[Digest, Iterable[Digest]]) -> set[Digest]:
        """All manifests that have a tag, and those related to them."""
        rest = [digest for tag in self._disk.names(self._tags) if (digest := self._tagged(tag))]
        found: set[Digest] = set()
        while rest:
            digest = rest.pop()
            if digest not in found:
                found.add(digest)
                rest += related.get(digest, ())
        return found


class Hosted:
    """The registry of what was pushed here: a complete one. References name it as their namespace, or none."""

    def __init__(self, store: Store, untagged_age: float | None = None):
        """untagged_age is how long a manifest without a tag is kept after its last use, in seconds; None: forever."""
        self._store, self.untagged_age = store, untagged_age

    def repository(self, name: str) -> Repository:
        """The repository of that name, whether or not anything is in it. The name has to be valid."""
        return Repository(self._store, name)

    def names(self) -> list[str]:
        """The names of the repositories that anything was ever pushed to, sorted."""
        return sorted(self._store.repository_names())

    # ---- reading

    def manifest(self, reference: Reference) -> Manifest:
        """The manifest that a reference names; MANIFEST_UNKNOWN."""
        repository = self.repository(reference.repository)
        manifest = repository.manifest(reference.target)
        if manifest is None:
            raise RegistryError("MANIFEST_UNKNOWN", f"{reference} was not pushed here")
        repository.manifests.touch(manifest.digest)
        return manifest

    def blob(self, reference: Reference, deadline: Deadline | None = None) -> Blob:
        """The blob whose digest a reference names; BLOB_UNKNOWN. See Store.has_content for the deadline.

        It counts as used now: a client that was told that it is here may rely on that for UPLOAD_AGE seconds.
        """
        blobs = self.repository(reference.repository).blobs
        blobs.touch(reference.digest)
        blob = blobs.find(reference.digest, deadline)
        if blob is None:
            raise RegistryError("BLOB_UNKNOWN", f"{reference.digest} was not pushed to {reference.repository}")
        return blob

    def tags(self, reference: Reference, after: str = "") -> Iterator[str]:
        """The tags of a repository behind a name, sorted; NAME_UNKNOWN. The reference's target is not used."""
        repository = self.repository(reference.repository)
        if not self._store.disk.names(repository.manifests.folder):
            raise RegistryError("NAME_UNKNOWN", f"nothing was pushed to {reference.repository}")
        return repository.tags(after)

    def referrers(self, reference: Reference, after: str = "") -> Iterator[dict[str, Any]]:
        """The descriptors of manifests that have a reference's digest as subject. See Repository.referrers."""
        return map(Manifest.referrer, self.repository(reference.repository).referrers(reference.digest, after))

    def catalog(self) -> list[str]:
        """The names of the repositories that have tags, sorted."""
        return [name for name in self.names() if any(self.repository(name).tags())]

    # ---- writing

    def push_blob(self, reference: Reference, size: int | None, pieces: Iterable[bytes]) -> None:
        """Take the whole content of a blob in one go. size is in bytes, or None if unknown.

        DIGEST_INVALID, and then nothing of it is kept.
        """
        repository = self.repository(reference.repository)
        with BlobWriter(self._store, reference.digest.algorithm) as writer:
            writer.expect(size or 0)
            for piece in pieces:
                writer.write(piece)
            writer.keep(repository.blobs, reference.digest)

    def mount(self, reference: Reference, source: str | None, deadline: Deadline | None = None) -> bool:
        """Make a blob of another repository belong to this one too. True if that repository has it.

        Without a source, any will do (OCI Distribution Spec v1.1, "Mounting a blob from another repository"). See
        Store.has_content for the deadline.
        """
        digest, sources = reference.digest, self.names() if source is None else [source]
        owned = any(self.repository(name).blobs.size(digest) is not None for name in sources)
        return owned and self.repository(reference.repository).blobs.adopt(digest, deadline=deadline)

    @staticmethod
    def accept_manifest(reference: Reference, data: bytes, content_type: str | None) -> Manifest:
        """Check the bytes of a manifest that is pushed. MANIFEST_INVALID; DIGEST_INVALID if another one is named."""
        expected = reference.target if isinstance(reference.target, Digest) else None
        manifest = Manifest.accept(data, content_type, expected.algorithm if expected else "sha256")
        if expected not in (None, manifest.digest):
            raise RegistryError("DIGEST_INVALID", f"the manifest that arrived has the digest {manifest.digest}")
        return manifest

    def put_manifest(self, reference: Reference, manifest: Manifest, tags: Iterable[str]) -> None:
        """Keep a manifest with its tags. Nothing is kept after an error.

        MANIFEST_BLOB_UNKNOWN if its repository lacks a blob, MANIFEST_INVALID if a manifest there has another size.
        """
        repository = self.repository(reference.repository)
        for digest, descriptor in descriptors(manifest.document, "manifests"):
            if repository.manifests.size(digest) not in (None, descriptor["size"]):
                raise RegistryError("MANIFEST_INVALID", f"the manifest {digest} has not {descriptor['size']} bytes")
        sizes = manifest.sizes("config", "layers", "blobs")
        missing = [digest for digest, size in sizes.items() if not repository.has_blob(digest, size)]
        if missing:
            raise RegistryError("MANIFEST_BLOB_UNKNOWN", f"{reference.repository} lacks {some_of(missing)}: push "
                                                         "blobs before the manifest that refers to them")
        repository.put_manifest(manifest, tags)

    def delete_manifest(self, reference: Reference) -> None:
        """Remove a tag, or a manifest with all its tags; MANIFEST_UNKNOWN."""
        repository, target = self.repository(reference.repository), reference.target
        if not (repository.delete_manifest(target) if isinstance(target, Digest) else repository.delete_tag(target)):
            raise RegistryError("MANIFEST_UNKNOWN", f"{reference} was not pushed here")

    def delete_blob(self, reference: Reference) -> None:
        """Remove a blob from a repository; BLOB_UNKNOWN."""
        if not self.repository(reference.repository).blobs.drop(reference.digest):
            raise RegistryError("BLOB_UNKNOWN", f"{reference.digest} was not pushed to {reference.repository}")

    def tidy_up(self, now: float) -> None:
        """Remove what was pushed and is not needed any more. now is in seconds since the epoch."""
        for name in self.names():
            try:
                self.repository(name).tidy_up(now, self.untagged_age)
            except (OSError, RegistryError) as e:
                log.warning("store: %s is not tidied up: %s", name, e)


# =====================================================================================================================
# 14. Content service: Docker's content by way of its socket
# Uses: waiting, engine, transfers.
# =====================================================================================================================


# ---- HTTP/2, the part that a single gRPC call needs (RFC 9113)


FRAME_DATA, FRAME_HEADERS, FRAME_RESET, FRAME_SETTINGS = 0x0, 0x1, 0x3, 0x4
FRAME_PING, FRAME_GOAWAY, FRAME_WINDOW_UPDATE, FRAME_CONTINUATION = 0x6, 0x7, 0x8, 0x9
END_STREAM, ACK, END_HEADERS, PADDED = 0x1, 0x1, 0x4, 0x8
SETTING_HEADER_TABLE_SIZE, SETTING_ENABLE_PUSH, SETTING_INITIAL_WINDOW, SETTING_MAX_FRAME = 0x1, 0x2, 0x4, 0x5
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
WINDOW = 2**31 - 1              # bytes: the maximum; the socket itself slows down a fast sender
WINDOW_STEP = 16 * MIB          # bytes consumed before the window is enlarged again

# What a server may send. Docker stays far below all of these.
FRAME_LIMIT = 64 * KIB          # bytes of a frame: larger ones need more memory and are no faster
HEADER_LIMIT = 64 * KIB         # bytes of a header block
IDLE_FRAMES = 100               # frames in a row that bring no data
MESSAGE_LIMIT = 16 * MIB        # bytes of a gRPC message; containerd sends 1 MiB at a time
FIELDS_LIMIT = 10_000           # fields of a protobuf message; a blob has one for each label

# `grpc-status` in HPACK's Huffman coding (RFC 7541, 5.2). We announce a header table of size 0, so the server
# cannot replace the name with a reference, and no HPACK decoder is needed to find it.
GRPC_STATUS = bytes.fromhex("9acac8b21234da8f")
GRPC_OK, GRPC_NOT_FOUND = 0, 5


class Http2Error(Exception):
    """The server closed the connection, or violated HTTP/2, gRPC, protobuf or one of the limits above."""


class GrpcError(Exception):
    """A call ended with a status other than OK (github.com/grpc/grpc, doc/statuscodes.md)."""

    def __init__(self, status: int):
        super().__init__(f"gRPC status {status}")
        self.status = status


class Payload:
    """A reader for bytes that arrive in pieces of any size. Http2Error if they end too early."""

    def __init__(self, pieces: Iterator[Data], what: str):
        """what names the bytes in errors."""
        self._pieces, self._what = pieces, what
        self._rest = memoryview(b"")

    def at_end(self) -> bool:
        """Return True at the end of the bytes. Blocks until that is known."""
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return True
            self._rest = memoryview(piece)
        return False

    def pieces(self, count: int) -> Iterator[memoryview]:
        """Yield the next count bytes as they arrive."""
        while count:
            if self.at_end():
                raise Http2Error(f"{self._what} ended too early")
            piece, self._rest = self._rest[:count], self._rest[count:]
            count -= len(piece)
            yield piece

    def take(self, count: int) -> bytes:
        """Return the next count bytes, copied."""
        return b"".join(self.pieces(count))

    def varint(self) -> int:
        """Read a protobuf varint: seven bits per byte, the lowest first."""
        number = 0
        for shift in range(0, 70, 7):
            byte = self.take(1)[0]
            number |= (byte & 0x7F) << shift
            if byte < 0x80 and number < 2**64:
                return number
        raise Http2Error(f"{self._what} has a varint of more than 64 bits")


@dataclass(frozen=True)
class Frame:
    """An HTTP/2 frame."""

    kind: int
    flags: int
    stream: int
    payload: bytes

    def encode(self) -> bytes:
        """Return the frame as it is sent."""
        head = len(self.payload).to_bytes(3, "big") + struct.pack(">BBI", self.kind, self.flags, self.stream)
        return head + self.payload

    def content(self) -> bytes:
        """Return the payload of DATA or HEADERS without its padding (RFC 9113, 6.1 and 6.2).

        The five bytes of a priority before some headers stay: they cannot be taken for the status that is looked for.
        """
        content = self.payload
        if self.flags & PADDED:
            if not content or content[0] >= len(content):
                raise Http2Error("a frame is shorter than its padding")
            content = content[1:len(content) - content[0]]
        return content


class GrpcCall:
    """A call of a gRPC method. It raises Http2Error, GrpcError and OSError.

    Each has a connection of its own, which costs a millisecond on a unix socket: a slow reader blocks the server
    through the socket, and no other call has to wait behind it.
    """

    STREAM = 1

    def __init__(self, sock: socket.socket):
        self._sock = sock
        self._input = Payload(iter(functools.partial(sock.recv, FRAME_LIMIT), b""), "the connection")
        self._idle = 0      # frames since the last one that brought data
        self._consumed = 0  # bytes of data since the windows were enlarged

    def close(self) -> None:
        """Close the connection."""
        self._sock.close()

    def answers(self, path: str, message: bytes) -> Iterator[Payload]:
        """Send one message to a method and yield each message of the answer as soon as it starts to arrive.

        The unread rest of a message is skipped before the next one.
        """
        settings = struct.pack(">HIHIHIHI", SETTING_HEADER_TABLE_SIZE, 0, SETTING_ENABLE_PUSH, 0,
                               SETTING_INITIAL_WINDOW, WINDOW, SETTING_MAX_FRAME, FRAME_LIMIT)
        headers = b"".join(self._literal(name, value) for name, value in (
            (b":method", b"POST"), (b":scheme", b"http"), (b":path", path.encode()), (b":authority", b"docker"),
            (b"content-type", b"application/grpc"), (b"te", b"trailers")))
        self._sock.sendall(HTTP2_PREFACE + b"".join(frame.encode() for frame in (
            Frame(FRAME_SETTINGS, 0, 0, settings),
            Frame(FRAME_WINDOW_UPDATE, 0, 0, struct.pack(">I", WINDOW - 65535)),
            Frame(FRAME_HEADERS, END_HEADERS, self.STREAM, headers),
            Frame(FRAME_DATA, END_STREAM, self.STREAM, struct.pack(">BI", 0, len(message)) + message))))
        answer = Payload(self._data(), "the answer to a gRPC call")
        while not answer.at_end():
            compressed, length = struct.unpack(">BI", answer.take(5))
            if compressed or length > MESSAGE_LIMIT:
                raise Http2Error(f"unsupported gRPC message: {length} bytes, compressed={compressed}")
            pieces = answer.pieces(length)
            yield Payload(pieces, "a protobuf message")
            for _ in pieces:
                pass

    @staticmethod
    def _literal(name: bytes, value: bytes) -> bytes:
        """Encode a header without indexing and Huffman coding (RFC 7541, 6.2.2)."""
        return bytes((0, len(name))) + name + bytes((len(value),)) + value

    def _read_frame(self) -> Frame:
        head = self._input.take(9)
        length = int.from_bytes(head[:3], "big")
        if length > FRAME_LIMIT:
            raise Http2Error("the frame is too large, or the server does not speak HTTP/2")
        self._idle += 1
        if self._idle > IDLE_FRAMES:
            raise Http2Error(f"the server sent {IDLE_FRAMES} frames without data")
        kind, flags, stream = struct.unpack(">BBI", head[3:])
        return Frame(kind, flags, stream & WINDOW, self._input.take(length))

    def _data(self) -> Iterator[bytes]:
        """Yield the data of the call as it arrives, then check the status in its trailers."""
        frame = self._read_frame()
        if frame.kind != FRAME_SETTINGS:
            raise Http2Error("the server did not send its settings first")
        while True:
            if frame.stream != self.STREAM:
                self._serve_connection(frame)
            elif frame.kind == FRAME_RESET:
                raise Http2Error(f"Docker reset the stream, code {int.from_bytes(frame.payload[:4], 'big')}")
            elif frame.kind == FRAME_DATA:
                yield self._accept(frame)
            elif frame.kind == FRAME_HEADERS:
                headers = self._header_block(frame)
                if frame.flags & END_STREAM:
                    return self._check_status(headers)
            frame = self._read_frame()

    def _serve_connection(self, frame: Frame) -> None:
        """Handle a frame that belongs to the connection rather than to the call."""
        if frame.kind == FRAME_SETTINGS and not frame.flags & ACK:
            self._sock.sendall(Frame(FRAME_SETTINGS, ACK, 0, b"").encode())
        elif frame.kind == FRAME_PING and not frame.flags & ACK:
            self._sock.sendall(Frame(FRAME_PING, ACK, 0, frame.payload).encode())
        elif frame.kind == FRAME_GOAWAY:
            raise Http2Error("Docker is closing the connection")

    def _accept(self, frame: Frame) -> bytes:
        """Return the content of a DATA frame, and let the server send as much again when that is worth a frame."""
        if frame.flags & END_STREAM:
            raise Http2Error("the stream ended without a status")
        content = frame.content()
        if content:
            self._idle = 0
        self._consumed += len(frame.payload)
        if self._consumed >= WINDOW_STEP:
            update = struct.pack(">I", self._consumed)
            self._sock.sendall(b"".join(Frame(FRAME_WINDOW_UPDATE, 0, stream, update).encode()
                                        for stream in (0, self.STREAM)))
            self._consumed = 0
        return content

    def _header_block(self, frame: Frame) -> bytes:
        """Return the header block that begins with a frame. Only its CONTINUATION frames may follow."""
        block = frame.content()
        while not frame.flags & END_HEADERS:
            frame = self._read_frame()
            if (frame.kind, frame.stream) != (FRAME_CONTINUATION, self.STREAM):
                raise Http2Error("another frame interrupts a header block")
            block += frame.payload
            if len(block) > HEADER_LIMIT:
                raise Http2Error(f"a header block has more than {HEADER_LIMIT} bytes")
        return block

    @staticmethod
    def _check_status(trailers: bytes) -> None:
        rest = trailers.partition(GRPC_STATUS)[2]
        value = rest[1:1 + rest[0]] if rest else b""
        if not value.isdigit():
            raise Http2Error("the trailers have no readable grpc-status")
        if int(value) != GRPC_OK:
            raise GrpcError(int(value))


# ---- protobuf, the part that the content service needs (protobuf.dev/programming-guides/encoding)


def encode_varint(number: int) -> bytes:
    """Encode a number with seven bits per byte, the lowest first."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*out, number))


def encode_fields(*fields: tuple[int, int | str]) -> bytes:
    """Encode a message from (number, value) pairs. Values are integers and strings."""
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += encode_varint(number << 3) + encode_varint(value)
        else:
            data = value.encode()
            out += encode_varint(number << 3 | 2) + encode_varint(len(data)) + data
    return out


def read_fields(message: Payload) -> Iterator[tuple[int, int | Iterator[memoryview]]]:
    """Yield (number, value) per field. The value is an integer, or pieces of bytes to be read before the next field."""
    for _ in range(FIELDS_LIMIT):
        if message.at_end():
            return
        key = message.varint()
        if key & 7 == 0:
            yield key >> 3, message.varint()
        elif key & 7 == 2:
            pieces = message.pieces(message.varint())
            yield key >> 3, pieces
            for _ in pieces:
                pass
        else:
            raise Http2Error(f"a protobuf message has a field of type {key & 7}")
    raise Http2Error(f"a protobuf message has more than {FIELDS_LIMIT} fields")


def decode_fields(message: Payload) -> tuple[dict[int, int], dict[int, list[bytes]]]:
    """Decode a small message by field number: the last integer of each field, and all its strings of bytes."""
    numbers: dict[int, int] = {}
    strings: dict[int, list[bytes]] = {}
    for number, value in read_fields(message):
        if isinstance(value, int):
            numbers[number] = value
        else:
            strings.setdefault(number, []).append(b"".join(value))
    return numbers, strings


# ---- the content service


class ContentService:
    """Docker's containerd image store, read through Docker's own socket: nothing has to be mounted or copied.

    The engine serves containerd's Content API (github.com/containerd/containerd,
    api/services/content/v1/content.proto) next to BuildKit's API.
    """

    name = "content service"
    PREFIX = "/containerd.services.content.v1.Content/"
    LABEL_LIMIT = 4096  # bytes of a label and its value: containerd's own limit
    ORIGINS_LIMIT = 100
    UNCONNECTED = (errno.ENOENT, errno.ECONNREFUSED, errno.EMFILE, errno.ENFILE)  # errors of opening a connection

    def __init__(self, engine: Engine, folder: Path):
        """folder holds temporary files for content that several readers share."""
        self._engine, self._reads = engine, SharedReads(folder)

    def problem(self) -> str | None:
        """Return the reason why this engine's service cannot be used, or None if it can.

        UNAVAILABLE if no connection to Docker can be opened now: that says nothing about the service.
        """
        try:
            self.find(Digest.of(b""))
        except RegistryError as e:
            cause = e.__cause__
            if isinstance(cause, OSError) and cause.errno in self.UNCONNECTED:
                raise
            return e.detail
        return None

    def find(self, digest: Digest) -> Blob | None:
        """See Provider."""
        info = self._info(digest)
        return ServiceBlob(digest, info[0], functools.partial(self.read, digest), self._reads) if info else None

    def origins(self, digest: Digest) -> list[str]:
        """Return the names of repositories that a blob was pulled from, at most ORIGINS_LIMIT of them.

        containerd notes them in the blob's labels, containerd.io/distribution.source.<host> (pkg/labels).
        """
        _, labels = self._info(digest) or (0, [])
        return list(itertools.islice(self._repositories(labels), self.ORIGINS_LIMIT))

    def _repositories(self, labels: Iterable[bytes]) -> Iterator[str]:
        for entry in labels:
            if len(entry) > self.LABEL_LIMIT:
                continue
            with self._errors("reading a label"):
                _, strings = decode_fields(Payload(iter([entry]), "a label"))
            label, value = (b"".join(strings.get(number, [])[-1:]).decode(errors="replace") for number in (1, 2))
            host = label.removeprefix("containerd.io/distribution.source.")
            if host != label:
                yield from (f"{host}/{name}" for name in value.split(","))

    def _info(self, digest: Digest) -> tuple[int, list[bytes]] | None:
        """Return the size of a blob in bytes and its labels, or None if the service does not have it."""
        call = self._call("Info", encode_fields((1, str(digest))))
        try:
            with self._errors(f"reading {digest}"), contextlib.closing(call):
                answers = [decode_fields(message)[1] for message in itertools.islice(call, 2)]
                if len(answers) != 1:
                    raise Http2Error("the answer is not one message")
                numbers, strings = decode_fields(Payload(iter(answers[0].get(1, [])), "a description"))
        except GrpcError as e:
            if e.status == GRPC_NOT_FOUND:
                return None
            raise RegistryError("ENGINE_FAILED", f"Docker's content service cannot find {digest}: {e}") from e
        size = numbers.get(2, 0)  # protobuf leaves out a zero
        if strings.get(1) != [str(digest).encode()] or size >= SIZE_LIMIT:
            raise RegistryError("ENGINE_FAILED", f"Docker's content service did not describe {digest}")
        return size, strings.get(5, [])

    def read(self, digest: Digest, start: int, length: int) -> Body:
        """Return length bytes from start on. Errors before the first byte, like BLOB_UNKNOWN, are raised here."""
        if not length:
            return Body(iter(()), 0)
        pieces = self._read(digest, start, length)
        first = next(pieces, b"")
        return Body(itertools.chain([first], pieces), length, pieces.close)

    def _read(self, digest: Digest, start: int, length: int) -> Generator[Data, None, None]:
        call = self._call("Read", encode_fields((1, str(digest)), (2, start), (3, length)))
        left = length
        try:
            with self._errors(f"reading {digest}"), contextlib.closing(call):
                for message in call:
                    before = left
                    for number, value in read_fields(message):
                        for piece in value if number == 2 and not isinstance(value, int) else ():
                            left -= len(piece)
                            if left < 0:
                                raise Http2Error("it sent more than was asked for")
                            yield piece
                    if left == before:
                        raise Http2Error("it sent a message without content")
        except GrpcError as e:
            code = "BLOB_UNKNOWN" if e.status == GRPC_NOT_FOUND else "ENGINE_FAILED"
            raise RegistryError(code, f"Docker's content service cannot read {digest}: {e}") from e
        if left:
            raise RegistryError("ENGINE_FAILED", f"Docker's content service sent {left} bytes too few of {digest}")

    def _call(self, method: str, message: bytes) -> Generator[Payload, None, None]:
        """Make a call, and yield the messages of the answer. Closing the generator aborts the call."""
        with contextlib.closing(GrpcCall(self._engine.open_grpc())) as call:
            yield from call.answers(self.PREFIX + method, message)

    @contextlib.contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        try:
            with self._engine.connection_errors():
                yield
        except Http2Error as e:
            raise RegistryError("ENGINE_FAILED", f"Docker's content service failed while {doing}: {e}") from e


class ServiceBlob:
    """A blob in Docker's content store. read(start, length) reads from it."""

    def __init__(self, digest: Digest, size: int, read: Callable[[int, int], Body], shared: SharedReads):
        self._digest, self.size, self._read, self._shared = digest, size, read, shared

    def open(self, start: int, length: int, deadline: Deadline) -> Body:
        """See Blob. Only reads of the whole blob are shared."""
        if length == self.size:
            return self._shared.open(self._digest, length, self._read, deadline)
        return self._read(start, length)


# =====================================================================================================================
# 15. Layers: Docker's classic image store, read from its own folder
# Uses: waiting, engine, transfers, disk.
# =====================================================================================================================


class Layer:
    """A layer of the classic store as its original tar, which is reassembled while it is read.

    Docker unpacks the tar and keeps the rest of it, all but the content of files, in `tar-split.json.gz`
    (github.com/vbatts/tar-split). Each line of JSON holds either a base64 piece of the tar, or the name of a
    file whose content comes next. The files are in the folder that the layer is mounted from.
    """

    SENDFILE = 128 * KIB    # bytes from which on a file is sent with sendfile
    # Marks the headers of sparse files, for which the metadata is incomplete. Docker cannot export such layers
    # either, and refuses the older format of sparse files altogether.
    SPARSE = b"GNU.sparse."
    EXTENDED = 1024         # minimum bytes of a header with extended records: two blocks
    LINE_LIMIT = 16 * MIB   # bytes of a line of the metadata: pieces of the tar have at most a megabyte
    SLACK = 60              # seconds for which Docker may change files of a layer after writing its metadata

    def __init__(self, diff_id: str, metadata: Path, files: Path):
        """metadata and files are folders. A layer with a failure cannot be used; the log has said why. STORE_FAILED."""
        self._diff_id, self._split = diff_id, metadata / "tar-split.json.gz"
        self._root = os.fsencode(os.path.realpath(files))
        self._safe = b""  # a folder that no symbolic link leads to: a tar lists files by folder
        self.size, self.failure = 0, ""
        try:
            with self._errors():
                self._newest = self._split.stat().st_ctime + self.SLACK
                self.size = self._measure()
        except RegistryError:
            if not self.failure:
                raise

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, zlib.error, *MALFORMED_ERRORS, OSError) as e:
            reason = (f"the layer {self._diff_id} cannot be read from {self._split.parent}: "
                      f"{printable(str(e) or type(e).__name__)}")
            if isinstance(e, OSError) and e.errno in (errno.EMFILE, errno.ENFILE):  # no descriptor is left, for now
                raise RegistryError("STORE_FAILED", reason) from e
            self.failure = reason
            log.warning("%s; its images will be exported", self.failure)
            raise RegistryError("ENGINE_FAILED", self.failure) from e

    def _segments(self) -> Iterator[tuple[bytes | None, int, bytes]]:
        """Yield (name, size, b"") for each file in the tar, and (None, size, piece) for each piece between them."""
        for entry in self._entries():
            if entry["type"] == 2:
                piece = binascii.a2b_base64(entry["payload"])
                yield None, len(piece), piece
            elif entry.get("size"):
                raw = entry.get("name_raw")
                yield binascii.a2b_base64(raw) if raw else entry["name"].encode(), entry["size"], b""

    def _entries(self) -> Iterator[dict[str, Any]]:
        """Yield the parsed lines of the metadata. Parsing many at once is three times as fast."""
        rest = b""
        with open_file(self._split) as compressed, gzip.open(compressed) as file:
            while data := file.read(PIECE):
                lines, _, rest = (rest + data).rpartition(b"\n")
                yield from json.loads(b"[%s]" % lines.replace(b"\n", b","))
                if len(rest) > self.LINE_LIMIT:
                    raise ValueError("the metadata has a line that is too long")
        yield from json.loads(b"[%s]" % rest)

    def _path(self, name: bytes, size: int) -> bytes:
        """Return the path of a file. Raises ValueError or OSError if it has changed since the layer was made.

        A layer is untrusted: a symbolic link may point anywhere. So none is followed, and none leads out of the folder.
        """
        path = self._root + os.path.normpath(b"/" + name.lstrip(b"/"))
        folder = os.path.dirname(path)
        if folder != self._safe:
            if os.path.realpath(folder) != folder:
                raise ValueError(f"{name!r} is behind a symbolic link")
            self._safe = folder
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size != size or status.st_ctime > self._newest:
            raise ValueError(f"{name!r} has changed")
        return path

    def _measure(self) -> int:
        """Return the size of the tar in bytes. Raises ValueError or OSError if a file has changed."""
        total = 0
        for name, size, piece in self._segments():
            if name is not None:
                self._path(name, size)
            elif size >= self.EXTENDED and self.SPARSE in piece:
                raise ValueError("sparse files are not supported")
            total += size
        if not total:  # of an empty file, left by a crash: even a tar of nothing has a kilobyte
            raise ValueError("the metadata is empty")
        return total

    def open(self, start: int, length: int, deadline: Deadline) -> Body:
        """See Blob."""
        parts = self._parts(start, start + length)
        return Body(parts, length, parts.close)

    def _parts(self, start: int, end: int) -> Generator[Part, None, None]:
        """Yield the tar from position start up to end. Small parts are joined."""
        position, pending = 0, bytearray()
        with self._errors():
            for name, size, piece in self._segments():
                first, last = max(start - position, 0), min(end - position, size)
                if name is None:
                    pending += piece[first:last]
                elif first < last:
                    with open(self._path(name, size), "rb", buffering=0) as file:
                        if last - first < self.SENDFILE:
                            pending += os.pread(file.fileno(), last - first, first)
                        else:
                            yield bytes(pending)
                            pending.clear()
                            yield FileSlice(file, first, last - first)
                if len(pending) >= PIECE:
                    yield bytes(pending)
                    pending.clear()
                position += size
                if position >= end:
                    break
            yield bytes(pending)


class LayerDirectory:
    """Docker's classic image store, read from Docker's data folder: configs, layers, and manifests made for them.

    Layers are found by the digest of their uncompressed tar (`diff`). A layer that could not be read exactly is
    treated as missing, so that its images are exported.
    """

    def __init__(self, root: Path):
        self.name = f"layer directory {root}"
        self._configs = root / "image/overlay2/imagedb/content"
        self._layers = root / "image/overlay2/layerdb/sha256"
        self._overlay = root / "overlay2"
        # What has been read. One operation changes or replaces each of them: no lock. What is lost is read again.
        self._index: tuple[float, dict[str, Path]] = (0, {})
        self._measured: dict[tuple[Path, float], Layer] = {}
        self._lock = threading.Lock()  # guards the next one
        self._manifests: Recent[Digest, bytes] = Recent(MEMORY_LIMIT)  # that were made: clients ask for them by digest

    def manifest(self, image: EngineImage) -> Digest:
        """Make the manifest of an image and return its digest. Raises ENGINE_FAILED if a part is not available here.

        Raises STORE_FAILED like find().
        """
        config = self._config(image.id)
        layers = [(Digest.parse(diff_id), layer.size) for diff_id in image.layers if (layer := self._layer(diff_id))]
        if config is None or len(layers) < len(image.layers):
            raise RegistryError("ENGINE_FAILED", f"{self.name} does not have all of {image.id}")
        data = make_manifest((image.id, config.size), *layers)
        digest = Digest.of(data)
        with self._lock:
            self._manifests[digest] = data
        return digest

    def find(self, digest: Digest) -> Blob | None:
        """See Provider. Raises STORE_FAILED if Docker's folder cannot be read."""
        with self._lock:
            made = self._manifests.get(digest)
        return BytesBlob(made) if made else self._config(digest) or self._layer(str(digest))

    def _config(self, digest: Digest) -> BytesBlob | None:
        path = self._configs / digest.algorithm / digest.hex
        with disk_errors(f"read {path}"):
            data = read_small(path, MANIFEST_LIMIT)
        return BytesBlob(data) if data is not None and Digest.of(data, digest.algorithm) == digest else None

    def _layer(self, diff_id: str) -> Layer | None:
        """Return the layer with a digest, measured only once, or None if there is none that can be used."""
        folder = self._folders().get(diff_id)
        if folder is None:
            return None
        with disk_errors(f"read {folder}"), contextlib.suppress(FileNotFoundError):  # Docker has just removed it
            key = folder, (folder / "tar-split.json.gz").lstat().st_mtime
            cache = read_line(folder / "cache-id")
            layer = self._measured.get(key)
            if layer is None and re.fullmatch(r"[\w-]+", cache):
                layer = self._measured[key] = Layer(diff_id, folder, self._overlay / cache / "diff")
            return layer if layer and not layer.failure else None
        return None

    def _folders(self) -> dict[str, Path]:
        """Return the folders of layers by digest. Reads them again after Docker has added or removed a layer."""
        made, folders = self._index
        with disk_errors(f"read {self._layers}"), contextlib.suppress(FileNotFoundError):
            changed = self._layers.stat().st_mtime
            if changed != made:
                folders = {}
                for folder in self._layers.iterdir():  # glob() hides errors
                    if diff_id := read_line(folder / "diff"):  # or else Docker has just removed it
                        folders[diff_id] = folder
                self._index, existing = (changed, folders), set(folders.values())
                self._measured = {key: layer for key, layer in self._measured.copy().items() if key[0] in existing}
            return folders
        return {}


# =====================================================================================================================
# 16. Export: images copied out of Docker
# Uses: waiting, activity, engine, transfers, store, writers.
# =====================================================================================================================


class ExportStream:
    """The tar of an export as a forward-only file. It counts the bytes and keeps the last ones.

    tarfile uses it as an ordinary file: its stream mode would read a header of any size into memory, and copies all
    content three times. Content is read past tarfile, which asks with tell() and seek() for the next header.
    """

    TAIL = 64 * KIB
    HEADER = 16 * KIB  # bytes of a header in the tar; of larger ones tarfile may read for hours, and stop all threads

    def __init__(self, source: http.client.HTTPResponse, progress: Callable[[int], None]):
        self._source, self._progress = source, progress
        self._buffer = memoryview(bytearray(MIB))
        self._tail = b""
        self.count = 0

    def read(self, size: int) -> bytes:
        """Return up to size bytes of a header; none at the end. Raises tarfile.ReadError if it is too large."""
        if size > self.HEADER:
            raise tarfile.ReadError("a header is too large")
        return bytes(self._read(size))

    def _read(self, size: int) -> memoryview:
        """Return up to size bytes in the buffer, valid until the next call. (HTTPResponse.read() is much slower.)"""
        piece = self._buffer[:self._source.readinto(self._buffer[:size])]
        self.count += len(piece)
        self._tail = (self._tail + piece[-self.TAIL:])[-self.TAIL:]
        self._progress(self.count)
        return piece

    def content(self, size: int) -> Iterator[memoryview]:
        """Yield the next size bytes. Each piece is valid until the next one. Raises tarfile.ReadError at the end."""
        while size:
            piece = self._read(size)
            if not piece:
                raise tarfile.ReadError("unexpected end of data")
            size -= len(piece)
            yield piece

    def tell(self) -> int:
        """Return the position, in bytes from the beginning."""
        return self.count

    def seek(self, position: int) -> None:
        """Skip forward to a position, or to the end."""
        while self.count < position and self._read(position - self.count):
            pass

    def complaint(self) -> str | None:
        """Read to the end, and return Docker's error message there, or None.

        If an export fails halfway, Docker appends a JSON object to the incomplete tar and ends the HTTP
        response normally.
        """
        while self._read(PIECE):  # tarfile stopped at the first invalid header
            pass
        found = re.search(rb'\{"(?:message|error|errorDetail)":[^\0]*\}\s*\Z', self._tail)
        try:
            document = json.loads(found.group()) if found else {}
        except ValueError:
            return None
        message = document.get("message") or document.get("error")
        return message if isinstance(message, str) else None


class Unpacking:
    """The members of one export as they arrive in the store, until the good ones are kept.

    It knows the two forms: an OCI layout, and the docker-archive that Podman and Docker before 25 send, for which a
    manifest has to be made.
    """

    OCI_BLOB = re.compile(r"(?:\./)?blobs/(\w+)/(\w+)")

    def __init__(self, store: Store, image_id: Digest):
        self._store, self._image_id = store, image_id
        self._new: dict[Digest, BlobWriter] = {}
        self._names: dict[str, Digest] = {}     # members of a docker-archive
        self._links: dict[str, str] = {}
        self._documents: dict[str, bytes] = {}  # index.json, manifest.json
        self._closures: dict[Digest, set[Digest]] = {}  # of manifests that closure() has looked at
        self._problems: list[str] = []          # of those that are not whole

    def unpack(self, stream: ExportStream) -> None:
        """Read a whole export. Raises tarfile.TarError if it is cut off in the middle of a file."""
        with tarfile.open(fileobj=stream, mode="r:") as archive:  # type: ignore[call-overload]
            for member in archive:
                self._take(stream, member)
                archive.members.clear()  # tarfile would remember every member

    def _take(self, stream: ExportStream, member: tarfile.TarInfo) -> None:
        name = member.name
        if member.issym():
            self._links[name] = os.path.normpath(os.path.join(os.path.dirname(name), member.linkname))
        if not member.isreg():
            return
        blob = self.OCI_BLOB.fullmatch(name)
        if name in ("index.json", "manifest.json"):
            self._documents[name] = b"".join(map(bytes, stream.content(min(member.size, MANIFEST_LIMIT))))
        elif blob:
            self._take_blob(stream, Digest.parse(":".join(blob.groups())), member.size)
        elif name.endswith((".json", ".tar")):
            self._names[name] = self._take_blob(stream, None, member.size)

    def _take_blob(self, stream: ExportStream, expected: Digest | None, size: int) -> Digest:
        if expected and (expected in self._new or self._store.docker.adopt(expected, size)):
            return expected
        return self._write(expected, stream.content(size))

    def _write(self, expected: Digest | None, pieces: Iterable[Data]) -> Digest:
        writer = BlobWriter(self._store, expected.algorithm if expected else "sha256")
        with on_failure(writer.discard):
            for piece in pieces:
                writer.write(piece)
            digest = writer.finish()
            if expected not in (None, digest):
                raise RegistryError("ENGINE_FAILED", f"Docker exported {expected} with the bytes of {digest}")
        if self._new.setdefault(digest, writer) is not writer:
            writer.discard()
        return digest

    # ---- which manifest is the image's

    def target(self) -> Digest:
        """Return the digest of the image's manifest or index. Raises LookupError if the export has none."""
        if "index.json" in self._documents:
            return self._find_target(json.loads(self._documents["index.json"]))
        if "manifest.json" in self._documents:
            return self._make_manifest(json.loads(self._documents["manifest.json"])[0])
        raise LookupError("the export ended before its index")

    def _find_target(self, index: Mapping[str, Any]) -> Digest:
        """The image's ID is the manifest's own digest on the containerd store, its config's on the classic one."""
        listed = dict(descriptors(index, "manifests"))
        for digest in listed:
            if digest == self._image_id or (
                    self._has(digest) and self._image_id in dict(descriptors(self._document(digest), "config"))):
                return digest
        raise LookupError("the export has no manifest for this image" if listed else "the export lists nothing")

    def _make_manifest(self, entry: Mapping[str, Any]) -> Digest:
        """Make the manifest of a docker-archive: what `manifest.json` lists, checked against the config's diff_ids."""
        config, *layers = (self._names[self._links.get(name, name)] for name in (entry["Config"], *entry["Layers"]))
        if config != self._image_id:
            raise LookupError(f"the export holds the config {config}, not that of the image")
        if [str(layer) for layer in layers] != self._document(config)["rootfs"]["diff_ids"]:
            raise LookupError("the layers of the export are not those that the config names")
        data = make_manifest(*((digest, self._path(digest).stat().st_size) for digest in (config, *layers)))
        return self._write(None, [data])

    def _has(self, digest: Digest) -> bool:
        return digest in self._new or self._store.docker.size(digest) is not None

    def _path(self, digest: Digest) -> Path:
        return self._new[digest].path if digest in self._new else self._store.docker.path(digest)

    def _document(self, digest: Digest) -> dict[str, Any]:
        """Return a manifest, index or config that has arrived, parsed."""
        with open(self._path(digest), "rb") as file:
            document = json.loads(file.read(MANIFEST_LIMIT))
        if not isinstance(document, dict):
            raise LookupError(f"{digest} is not a JSON object")
        return document

    # ---- whether all of it has arrived

    def closure(self, target: Digest) -> set[Digest]:
        """Return all content that is needed to serve target, itself included. LookupError names what is missing.

        Of an index, the platforms that Docker does not have may be missing, but not all of them.
        """
        if not self._closure(target):
            raise LookupError(some_of(self._problems))
        return self._closure(target)

    def _closure(self, digest: Digest) -> set[Digest]:
        """The same; nothing if something is missing. Each manifest is read once, however often it is listed."""
        if digest not in self._closures:
            self._closures[digest] = self._collect(digest)
        return self._closures[digest]

    def _collect(self, digest: Digest) -> set[Digest]:
        if not self._has(digest):
            self._problems.append(f"the export lacks the manifest {digest}")
            return set()
        document = self._document(digest)
        needed = [blob for blob, shown in descriptors(document, "config", "layers") if not shown.get("urls")]
        missing = [blob for blob in needed if not self._has(blob)]
        if missing:
            self._problems.append(f"the export lacks {len(missing)} of {len(needed)} blobs: {some_of(missing)}")
            return set()
        platforms = [self._closure(child) for child, _ in descriptors(document, "manifests")]
        return {digest, *needed}.union(*platforms) if any(platforms) or not platforms else set()

    def keep(self, content: Iterable[Digest]) -> None:
        """Give these their final names in the store."""
        for digest in content:
            if digest in self._new:
                self._new.pop(digest).keep(self._store.docker)

    def discard(self) -> None:
        """Remove everything that was not kept."""
        for writer in self._new.values():
            writer.discard()


class Exports:
    """Copies images out of Docker into the store: slow, but always possible.

    Each image is exported once, however many requests want it.
    """

    def __init__(self, engine: Engine, store: Store, activity: Activity, done: Callable[[], None]):
        """done is called after each export."""
        self._engine, self._store, self._activity, self._done = engine, store, activity, done
        self._jobs = Jobs(PULLS_LIMIT)

    def manifest(self, image: EngineImage, deadline: Deadline) -> Digest:
        """Return the digest of an image's manifest. It is in the store with all it needs, exported if need be."""
        target = self._store.exported(image.id)
        if target is None:
            job = self._jobs.start(("export", image.id), lambda: self._run(image), f"exporting {image.id}")
            target = job.outcome(deadline)
        return target

    def _run(self, image: EngineImage) -> Digest:
        done = self._store.exported(image.id)
        if done:  # by a job that ended after the caller had looked
            return done
        if image.is_bare:
            return self._make_bare(image)
        about, name = f", {image.id}, about {human_bytes(image.size)}", image.name
        repository = "/".join(docker_name(repository_of(name))) if name else None
        with self._activity.task("export", name or "an image", about, repository) as task:
            target = self._export(image.id, task.report_bytes)
            task.done(f"manifest {target}")
        self._done()
        return target

    def _make_bare(self, image: EngineImage) -> Digest:
        """Make the config and the manifest of an image without layers (FROM scratch), which Docker cannot export.

        Docker gives the config of an image only as part of an export, so a config with the same meaning is made.
        """
        config = image.bare_config()
        kept = [keep_content(self._store, data, self._store.docker)
                for data in (config, make_manifest((Digest.of(config), len(config))))]
        self._store.record_export(image.id, kept[-1], kept)
        return kept[-1]

    def _export(self, image_id: Digest, progress: Callable[[int], None]) -> Digest:
        """Export an image and return the digest of its manifest. progress gets the number of bytes read so far.

        Success means that every blob of the manifest arrived with the right digest: that Docker's answer ended well
        means nothing. After any failure nothing of it is kept, and RegistryError has the reason.
        """
        unpacking = Unpacking(self._store, image_id)
        with contextlib.ExitStack() as stack:
            stack.callback(unpacking.discard)
            stream = ExportStream(stack.enter_context(self._engine.export(image_id)), progress)
            try:
                unpacking.unpack(stream)
                with disk_errors(f"read the export of {image_id}"):  # or the error would be one of Docker's
                    target = unpacking.target()
                    content = unpacking.closure(target)
            except (tarfile.TarError, *MALFORMED_ERRORS) as e:
                reason = stream.complaint() or str(e)
                raise RegistryError("ENGINE_FAILED", f"Docker's export of {image_id} is not complete after "
                                                     f"{human_bytes(stream.count)}: {reason}") from e
            unpacking.keep(content)
            self._store.record_export(image_id, target, content)
            return target


# =====================================================================================================================
# 17. Origin: an image's own registry
# Uses: configuration, engine.
# =====================================================================================================================


# Addresses at which clouds tell their virtual machines secrets, besides the link-local 169.254.169.254: Alibaba,
# Azure, Oracle; and with IPv6 AWS, Google, Oracle, Scaleway.
METADATA_SERVICES = ("100.100.100.200", "168.63.129.16", "192.0.0.192",
                     "fd00:ec2::254", "fd20:ce::254", "fd00:c1::a9fe:a9fe", "fd00:42::42")


def is_internal(address: str) -> bool:
    """Return True if an IP address is of this machine or its link, or of a cloud's metadata service."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return ip.is_loopback or ip.is_link_local or ip.is_unspecified or ip.is_multicast or str(ip) in METADATA_SERVICES


class OriginConnections(urllib.request.HTTPSHandler):
    """Opens the connections of an Origin.

    A registry may send us anywhere, with a redirect or for a token. It must not reach services of this machine in that
    way, so internal addresses are refused, except the one at which the registry itself has answered. What is checked is
    the address that is connected to: a name may have another one at the next moment. A proxy has rules of its own.
    """

    def __init__(self, context: ssl.SSLContext):
        super().__init__(context=context)
        self._https = functools.partial(http.client.HTTPSConnection, context=context)
        self._home = ""  # the registry's address

    http_request = urllib.request.AbstractHTTPHandler.do_request_

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        """See urllib.request."""
        return self.do_open(functools.partial(self._make, http.client.HTTPConnection, req), req)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        """See urllib.request."""
        return self.do_open(functools.partial(self._make, self._https, req), req)

    def _make(self, kind: Callable[..., Any], req: urllib.request.Request, host: str, **options: Any) -> Any:
        connection = kind(host, **options)
        connection.response_class = LimitedResponse
        if host == urllib.parse.urlsplit(req.full_url).netloc:  # no proxy
            connection._create_connection = self._connect_elsewhere if req.unverifiable else self._connect_home
        return connection

    def _connect_home(self, address: tuple[str, int], timeout: float, *_: Any) -> socket.socket:
        sock = socket.create_connection(address, timeout)
        self._home = sock.getpeername()[0]
        return sock

    def _connect_elsewhere(self, address: tuple[str, int], timeout: float, *_: Any) -> socket.socket:
        error = OSError(f"it refers to {printable(address[0])}, an internal address")
        for entry in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
            ip = str(entry[4][0])
            if ip == self._home or not is_internal(ip):
                try:
                    return socket.create_connection((ip, address[1]), timeout)
                except OSError as e:
                    error = e
        raise error


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, with credentials only to the same server. Adds 308, which Python 3.10 does not support."""

    def http_error_302(self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any) -> Any:
        """See urllib.request, which would read the whole body, whatever its length."""
        fp.read = lambda *_: b""
        try:
            return super().http_error_302(req, fp, code, msg, headers)
        except ValueError:  # the Location is not a valid URL
            fp.close()
            raise

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def redirect_request(self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any,
                         newurl: str) -> urllib.request.Request | None:
        """See urllib.request."""
        following = super().redirect_request(req, fp, 307 if code == 308 else code, msg, headers, newurl)
        if following is None:
            return None
        following.remove_header("Proxy-authorization")  # it is added again if the new URL needs a proxy
        authorization = req.unredirected_hdrs.get("Authorization")
        if authorization and urllib.parse.urlsplit(newurl)[:2] == urllib.parse.urlsplit(req.full_url)[:2]:
            following.add_unredirected_header("Authorization", authorization)
        return following


class Origin:
    """A client for the registry that an image comes from, for content that Docker has lost or does not keep.

    It supports Bearer tokens (distribution.github.io/distribution/spec/auth/token), Basic authentication,
    redirects, and the proxies in HTTP_PROXY, HTTPS_PROXY and NO_PROXY. Like Docker, it tries an insecure
    registry with TLS first and then without.
    """

    DOCKER_HUB = "registry-1.docker.io"

    def __init__(self, reference: Reference, credentials: Credentials | None, trusted: ssl.SSLContext | None,
                 user_agent: str = f"k3d-registry-dockerd/{__version__}"):
        """trusted holds the trusted certificate authorities. None means that the registry may be insecure."""
        assert reference.namespace
        self._user_agent = user_agent
        self._host = self.DOCKER_HUB if reference.namespace == "docker.io" else reference.namespace
        self._repository, self._credentials = reference.repository, credentials
        self._schemes = ["https"] if trusted else ["https", "http"]
        self._authorization: str | None = None
        self._opener = self._make_opener(trusted or ssl._create_unverified_context())  # noqa: S323

    def _make_opener(self, context: ssl.SSLContext) -> urllib.request.OpenerDirector:
        """Build urllib.request's opener without the file and FTP handlers, which a redirect could reach."""
        local = is_loopback(self._host)  # needs no proxy
        opener = urllib.request.OpenerDirector()
        for handler in (urllib.request.ProxyHandler({} if local else None), OriginConnections(context), Redirects(),
                        urllib.request.UnknownHandler(), urllib.request.HTTPErrorProcessor(),
                        urllib.request.HTTPDefaultErrorHandler()):
            opener.add_handler(handler)
        return opener

    @contextlib.contextmanager
    def open(self, kind: str, digest: Digest) -> Iterator[http.client.HTTPResponse]:
        """Request content; kind is "manifests" or "blobs". Read the response within the `with`. Raises PullFailed."""
        try:
            with self._get(f"/v2/{self._repository}/{kind}/{digest}") as response:
                yield response
        except urllib.error.HTTPError as e:
            codes = {401: "DENIED", 403: "DENIED", 404: f"{kind[:-1].upper()}_UNKNOWN", 429: "TOOMANYREQUESTS"}
            text = b""
            with e, contextlib.suppress(OSError, http.client.HTTPException):
                if self._is_own(e.url):  # what another host says, to which a redirect led, is not for the client
                    text = e.read(300)
            reason = f"{self._host} answered {e.code}: {printable(text.decode(errors='replace'))}"
            raise PullFailed(codes.get(e.code, "ORIGIN_UNAVAILABLE"), reason) from None
        except OSError as e:
            raise PullFailed("ORIGIN_UNAVAILABLE", f"{self._host}: {getattr(e, 'reason', None) or e!r}") from None
        except (http.client.HTTPException, ValueError) as e:  # the text may be another host's, or have a URL's password
            raise PullFailed("ORIGIN_UNAVAILABLE", f"{self._host}: malformed HTTP ({type(e).__name__})") from None

    def _is_own(self, url: str) -> bool:
        """Return True if a URL is one of the registry itself."""
        return urllib.parse.urlsplit(url)[:2] == (self._schemes[0], self._host)

    def _get(self, path: str) -> http.client.HTTPResponse:
        """Send a GET, and repeat it with authentication if the registry itself demands that."""
        try:
            return self._try(path)
        except urllib.error.HTTPError as e:
            with on_failure(e.close):
                self._authorization = self._answer(e.headers) if e.code == 401 and self._is_own(e.url) else None
            if self._authorization is None:
                raise
            e.close()
        return self._try(path)

    def _try(self, path: str) -> http.client.HTTPResponse:
        """Send a GET with the first scheme that the registry supports, and credentials only with that one."""
        request = urllib.request.Request(f"{self._schemes[0]}://{self._host}{path}", headers={"Accept": MANIFEST_TYPES})
        if self._authorization:
            request.add_unredirected_header("Authorization", self._authorization)
        try:
            return self._send(request)
        except OSError as e:
            if isinstance(e, urllib.error.HTTPError) or self._authorization or len(self._schemes) == 1:
                raise
        self._schemes = self._schemes[1:]
        return self._try(path)

    def _send(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        request.add_header("User-Agent", self._user_agent)
        try:
            response: http.client.HTTPResponse = self._opener.open(request, timeout=ORIGIN_TIMEOUT)
        except ValueError as e:
            raise urllib.error.URLError(str(e)) from None
        return response

    def _answer(self, headers: Message) -> str | None:
        """Return the Authorization value for the challenges of a 401, or None if none can be answered."""
        for challenge in headers.get_all("WWW-Authenticate", []):
            scheme, _, parameters = challenge.strip().partition(" ")
            if scheme.lower() == "bearer":
                return f"Bearer {self._token(parameters)}"
            if scheme.lower() == "basic" and self._credentials:
                return self._credentials.for_http()
        return None

    def _token(self, challenge: str) -> str:
        """Get a token from the realm of a Bearer challenge."""
        try:
            fields = urllib.request.parse_keqv_list(urllib.request.parse_http_list(challenge))
            query = {"service": fields.get("service", ""),
                     "scope": fields.get("scope") or f"repository:{self._repository}:pull"}
            with self._send(self._token_request(fields["realm"], query)) as response:
                answer = json.loads(response.read(MANIFEST_LIMIT))
            token = answer.get("token") or answer["access_token"]
            if re.fullmatch(r"[\x21-\x7e]+", token):
                return str(token)
            raise ValueError("not a token")
        except MALFORMED_ERRORS as e:
            raise PullFailed("ORIGIN_UNAVAILABLE", f"{self._host} did not return a token: {type(e).__name__}") from None

    def _token_request(self, realm: str, query: dict[str, str]) -> urllib.request.Request:
        """Return the request for a token, which has a body only with OAuth 2.0 (for an identity token).

        Credentials are sent with TLS only, or to the registry's own host if Docker would send them there without.
        """
        parts, own = urllib.parse.urlsplit(realm), urllib.parse.urlsplit(f"{self._schemes[0]}://{self._host}")
        if parts.scheme != "https" and (parts.scheme, parts.hostname) != (own.scheme, own.hostname):
            where = printable(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}")  # without credentials
            raise PullFailed("ORIGIN_UNAVAILABLE", f"{self._host} demands a token from {where}, without TLS")
        if self._credentials and self._credentials.username == IDENTITY_TOKEN:
            form = {"grant_type": "refresh_token", "client_id": "k3d-registry-dockerd",
                    "refresh_token": self._credentials.password, **query}
            return urllib.request.Request(realm, urllib.parse.urlencode(form).encode(), unverifiable=True)
        separator = "&" if parts.query else "?"
        request = urllib.request.Request(realm + separator + urllib.parse.urlencode(query), unverifiable=True)
        if self._credentials:
            request.add_unredirected_header("Authorization", self._credentials.for_http())
        return request


# =====================================================================================================================
# 18. Images: the image stores of Docker
# Uses: configuration, waiting, engine, transfers, disk, store, content service, layers, export.
# =====================================================================================================================


# Where containerd keeps its content if that is not in Docker's data folder: the system's own, and Docker Desktop's.
SYSTEM_CONTAINERD = Path("/var/lib/containerd")
DESKTOP_CONTAINERD = Path("/var/lib/desktop-containerd/daemon")


def content_folder(root: Path) -> Path | None:
    """containerd's content folder, or None where it cannot be read from here. root is Docker's data folder."""
    folders = (root / "containerd/daemon", root, root / "daemon", SYSTEM_CONTAINERD, DESKTOP_CONTAINERD)
    found = (folder / "io.containerd.content.v1.content/blobs" for folder in folders)
    return next((folder for folder in found if os.access(folder / "sha256", os.R_OK | os.X_OK)), None)


def content_root(info: EngineInfo) -> Path:
    """The folder to mount so that the files of an engine's image store can be read: see content_folder."""
    if info.store == "containerd":
        containerd = info.details.get("Containerd")
        address = containerd.get("Address") if isinstance(containerd, dict) else None
        if info.details.get("OperatingSystem") == "Docker Desktop":
            return DESKTOP_CONTAINERD
        if address in ("/run/containerd/containerd.sock", "/var/run/containerd/containerd.sock"):
            return SYSTEM_CONTAINERD
    return info.root


class Content:
    """The question content(digest) -> bytes, asked of our own store and of the providers that the engine has now."""

    def __init__(self, store: Store, providers: Callable[[], Iterable[Provider]]):
        self._store, self._providers = store.docker, providers
        self._seen: Memory[tuple[Digest, int], float] = Memory()  # content that was here in a size: until when it holds
        self._manifests: Memory[Digest, Manifest] = Memory()

    def find(self, digest: Digest, size: int | None = None) -> Blob | None:
        """The content, from the first provider that has it in this size, in bytes: a crash may have cut a file short.

        The store answers even without Docker.
        """
        kept = self._store.find(digest)
        if kept and size in (None, kept.size):
            return kept
        for provider in self._providers():
            blob = provider.find(digest)
            if blob and size in (None, blob.size):
                return blob
        return None

    def has(self, digest: Digest, size: int) -> bool:
        """True if content of this size is here. That holds for a few seconds: each pull asks for it repeatedly."""
        now = time.monotonic()
        if now < self._seen.get((digest, size), 0):
            return True
        found = self.find(digest, size) is not None
        if found:
            self._seen[digest, size] = now + PRESENCE_FRESH
        return found

    def manifest(self, digest: Digest, remembered: bool = True) -> Manifest | None:
        """The manifest or index with a digest; None if there is none, or if the content is something else.

        What was here a few seconds ago is taken to be here if remembered is set: where Docker still has the image.
        """
        known = self._manifests.get(digest)
        if known and (self.has if remembered else self.find)(digest, len(known.data)):
            return known
        blob = self.find(digest)
        data = read_blob(blob, MANIFEST_LIMIT) if blob and blob.size <= MANIFEST_LIMIT else b""
        media_type = manifest_type(data)
        if media_type is None:
            return None
        if Digest.of(data, digest.algorithm) != digest:
            raise RegistryError("ENGINE_FAILED", f"the bytes of the manifest {digest} do not match its digest")
        manifest = Manifest(digest, media_type, data)
        if len(data) <= MANIFEST_REMEMBERED:
            self._manifests[digest] = manifest
        return manifest


@contextlib.contextmanager
def engine_failures_logged() -> Iterator[None]:
    """Log ENGINE_FAILED instead of raising it: there are others to try."""
    try:
        yield
    except RegistryError as e:
        if e.code != "ENGINE_FAILED":
            raise
        log.warning("%s", e.detail)


class ImageStore:
    """Docker's containerd image store when its content can be read. Its subclasses answer some questions differently.

    An image's ID is the digest of its manifest or index.
    """

    flows = True                    # content can be read while a pull brings it
    can_restore = False             # restore() may bring something
    made_type: str | None = None    # the media type of every manifest, if they are made here

    def __init__(self, info: EngineInfo, content: Content, providers: Iterable[Provider | None], problem: str | None):
        """providers are asked for content after our own store, unless None. problem says what could be better."""
        self.info, self.problem, self._content = info, problem, content
        self.providers = tuple(provider for provider in providers if provider)
        self.sources = tuple(provider.name for provider in self.providers)

    def advice(self) -> str | None:
        """How to make pulls faster by having the files of Docker's image store read, or None if they are."""
        has_files = any(isinstance(provider, ContentFolder | LayerDirectory) for provider in self.providers)
        if has_files or self.info.is_podman or self.info.is_remote:
            return None
        folder = content_root(self.info)
        if os.access(folder, os.F_OK) and not os.access(folder, os.R_OK | os.X_OK):
            return f"pulls are faster as a user that can read {folder}, like root"
        mount = f"with -v {folder}:{folder}:ro"
        if self.info.store == "containerd" and "Containerd" not in self.info.details:  # before API 1.46
            mount += f" (if Docker uses the system's containerd: -v {SYSTEM_CONTAINERD}:{SYSTEM_CONTAINERD}:ro)"
        where = "" if in_container() else f"where {folder} is readable; in a container "
        return f"pulls are faster {where}{mount}"

    def target(self, image: EngineImage, deadline: Deadline) -> Digest:
        """The digest of an image's manifest, made or exported if need be."""
        return image.id

    def last_target(self, image_id: Digest) -> Digest:
        """What target() said last of the image with an ID, or that ID."""
        return image_id

    def includes(self, image: EngineImage, digest: Digest, deadline: Deadline, explore: bool) -> bool:
        """True if a digest is that of an image's manifest or in its index. explore allows an export to find out."""
        if image.id == digest:
            return True
        index = self._content.manifest(self.target(image, deadline) if explore else image.id)
        return index is not None and digest in index.listed("manifests")

    def restore(self, images: Iterable[EngineImage], blobs: Iterable[Digest], deadline: Deadline) -> None:
        """Bring blobs here again that belong to one of these images, if this store can."""

    def origins(self, digest: Digest) -> list[str]:
        """The names of the repositories that Docker got some content from: containerd notes them with the content."""
        return [name for provider in self.providers if isinstance(provider, ContentService)
                for name in provider.origins(digest)]


class ExportedImages(ImageStore):
    """Docker's containerd image store when its content cannot be read: each image is exported once."""

    flows = False
    can_restore = True

    def __init__(self, info: EngineInfo, content: Content, exports: Exports, problem: str | None):
        super().__init__(info, content, (), problem)
        self._exports, self.sources = exports, ("export",)

    def target(self, image: EngineImage, deadline: Deadline) -> Digest:
        """See ImageStore. An export of an image of which Docker has lost content holds none of its blobs."""
        with engine_failures_logged():
            return self._exports.manifest(image, deadline)
        return image.id  # its registry may have what it lacks

    def restore(self, images: Iterable[EngineImage], blobs: Iterable[Digest], deadline: Deadline) -> None:
        """See ImageStore. Which blobs an image has is not known before it is exported."""
        for image in images:
            self.target(image, deadline)


class ClassicImages(ImageStore):
    """Docker's classic image store: an image's ID is its config's digest.

    It has no manifests and no compressed layers. Manifests are made, from Docker's own files where they can be read,
    otherwise from an export.
    """

    flows = False
    can_restore = True
    made_type = OCI_MANIFEST

    def __init__(self, info: EngineInfo, content: Content, store: Store, exports: Exports,
                 layers: LayerDirectory | None, problem: str | None):
        super().__init__(info, content, (layers,), problem)
        self._store, self._exports, self._layers = store, exports, layers
        self.sources = (*self.sources, "export")
        self._targets: Memory[Digest, Digest] = Memory()  # for last_target()

    def target(self, image: EngineImage, deadline: Deadline) -> Digest:
        """See ImageStore."""
        found = self._targets[image.id] = self._made(image) or self._exports.manifest(image, deadline)
        return found

    def last_target(self, image_id: Digest) -> Digest:
        """See ImageStore."""
        return self._targets.get(image_id, image_id)

    def _made(self, image: EngineImage) -> Digest | None:
        """The digest of a manifest made from Docker's own files, or None if it takes an export."""
        if self._layers:
            with contextlib.suppress(RegistryError):  # the log has said it
                return self._layers.manifest(image)
        return None

    def includes(self, image: EngineImage, digest: Digest, deadline: Deadline, explore: bool) -> bool:
        """See ImageStore."""
        known = self._made(image) or self._store.noted_target(image.id)
        if known == digest or (known is None and explore):
            return self.target(image, deadline) == digest
        return False

    def restore(self, images: Iterable[EngineImage], blobs: Iterable[Digest], deadline: Deadline) -> None:
        """See ImageStore."""
        for image in images:
            if image.is_bare or all(digest == image.id or str(digest) in image.layers for digest in blobs):
                with engine_failures_logged():
                    self.target(image, deadline)


class ImageStores:
    """Docker's image store as it is now: this is the one place that asks which store that is."""

    def __init__(self, engine: Engine, store: Store, exports: Exports, root: Path | None):
        """root is where Docker's data folder is mounted, if that is not the place that Docker names."""
        self._engine, self._store, self._exports, self._root = engine, store, exports, root
        self._service = ContentService(engine, store.root)
        self.content = Content(store, lambda: self.current().providers)
        self._lock = threading.Lock()  # held while _chosen is compared, and replaced or confirmed
        self._chosen: ImageStore | None = None

    @property
    def made_type(self) -> str | None:
        """That of the image store that was current when it was asked for last: see ImageStore."""
        return self._chosen.made_type if self._chosen else None

    def last_target(self, image_id: Digest) -> Digest:
        """See ImageStore. Does not wait for the engine."""
        return self._chosen.last_target(image_id) if self._chosen else image_id

    def current(self) -> ImageStore:
        """The image store of the engine as it is now, logged whenever that changes."""
        info, known = self._engine.info(), self._chosen
        if known and (info is known.info or (info == known.info and not known.problem)):
            return known
        chosen = self._choose(info)
        with self._lock:
            known = self._chosen  # perhaps of a request at the same time
            if known and (known.info, known.sources, known.problem) == (info, chosen.sources, chosen.problem):
                known.info = info
                return known  # it may have made manifests already
            self._chosen = chosen
        log.info("%s; content from: %s", info, ", ".join(("store", *chosen.sources)))
        if chosen.problem:
            log.warning("%s", chosen.problem)
        return chosen

    def _choose(self, info: EngineInfo) -> ImageStore:
        root = self._root or info.root
        if info.store == "classic":
            layers = LayerDirectory(root) if os.access(root / "image/overlay2/layerdb/sha256", os.R_OK) else None
            problem = self._folder_problem(layers, root, info)
            return ClassicImages(info, self.content, self._store, self._exports, None if problem else layers, problem)
        folder = content_folder(root)
        files = ContentFolder(folder) if folder else None
        problem = self._folder_problem(files, root, info)
        files, unserved = None if problem else files, self._service.problem()
        if unserved and not files:
            return ExportedImages(info, self.content, self._exports, (
                f"images are exported one by one: Docker's content cannot be read: {unserved}"))
        return ImageStore(info, self.content, (files, None if unserved else self._service), problem)

    def _folder_problem(self, files: Provider | None, root: Path, info: EngineInfo) -> str | None:
        """Why files that may be this engine's are not used, or None if they are (or if there are none by default).

        Another engine's folder would do no harm, for content is found by its digest; but a person wants to know.
        """
        if files is None:
            return f"nothing of Docker's {info.store} image store can be read in {root}" if self._root else None
        try:
            identity = read_line(root / "engine-id")
        except OSError:
            identity = ""  # engines before 23 have no such file; the folder of the system's containerd has none either
        if identity and identity != info.identity:
            return f"{root} is the data folder of another Docker: it is not used"
        images = self._engine.image_ids({"dangling": ["false"]})
        found = sum(files.find(image) is not None for image in images)
        enough = (found > 0 or not images) if identity else (found == len(images) > 0)
        return None if enough else f"{root} does not hold the images of this Docker: it is not used"


# =====================================================================================================================
# 19. Pulls: what comes from registries, by way of Docker or without it
# Uses: configuration, waiting, activity, engine, transfers, store, writers, origin, images.
# =====================================================================================================================


class PullProgress:
    """The progress of a pull, computed from Docker's JSON messages."""

    def __init__(self) -> None:
        self.layers: dict[str, tuple[int, int]] = {}  # layer -> bytes that are here, and bytes in all
        self.status = "waiting for Docker"

    def update(self, message: Mapping[str, Any]) -> None:
        """Process one message of `POST /images/create`."""
        layer, status, detail = message.get("id"), message.get("status"), message.get("progressDetail")
        if not isinstance(status, str):
            return
        self.status = printable(status.lower(), 100)
        if not isinstance(layer, str) or len(layer) > NAME_LENGTH or not isinstance(detail, dict):
            return
        sizes = [detail.get(name, -1) for name in ("current", "total")]
        known = all(isinstance(size, int) and 0 <= size < SIZE_LIMIT for size in sizes)
        if status == "Downloading" and known and sizes[1] and (
                layer in self.layers or len(self.layers) < BLOBS_LIMIT):
            self.layers[layer] = (min(sizes), sizes[1])
        elif status in ("Download complete", "Pull complete", "Already exists", "Extracting") and layer in self.layers:
            self.layers[layer] = (self.layers[layer][1],) * 2

    def expect(self, layers: Mapping[Digest, int]) -> None:
        """Count layers, with their sizes in bytes, that Docker has not begun to report: it names them by 12 digits."""
        for digest, size in layers.items():
            self.layers.setdefault(digest.hex[:12], (0, size))


@dataclass
class PullPolicy:
    """Which registries images may come from, when, and with whose credentials.

    allowed are patterns, like *.corp.example; none allows all. policy is missing, always or never, with the
    docker command's meaning (docs.docker.com/reference/cli/docker/container/run/#pull). config has the
    credentials for requests that bring none.
    """

    POLICIES = ("missing", "always", "never")

    allowed: tuple[str, ...] = ()
    policy: str = "missing"
    config: DockerConfig | None = None

    def change(self, new: PullPolicy) -> None:
        """Do as a new policy says from the next request on, except for credentials."""
        self.allowed, self.policy = new.allowed, new.policy

    def check(self, reference: Reference) -> None:
        """MANIFEST_UNKNOWN or DENIED unless the registry of a reference may be asked."""
        if reference.namespace is None:
            raise RegistryError("MANIFEST_UNKNOWN", f"Docker has no image {reference}, and the request names no "
                                                    "registry (ns) to pull it from")
        if self.policy == "never":
            raise RegistryError("MANIFEST_UNKNOWN", f"Docker does not have {reference}, or not all of it, and no "
                                                    "registry is asked for it (-pull never): docker pull it, or use "
                                                    "-pull missing")
        if self.allowed and not any(fnmatch.fnmatchcase(reference.namespace, pattern) for pattern in self.allowed):
            raise RegistryError("DENIED", f"{reference.namespace} is not among the registries to pull from: "
                                          f"{', '.join(self.allowed)} (-allow)")

    def credentials(self, reference: Reference, own: Credentials | None) -> Credentials | None:
        """A request's own credentials, or else those of this machine for the registry of a reference."""
        if own is None and self.config and reference.namespace:
            return self.config.credentials(reference.namespace)
        return own


@contextlib.contextmanager
def pull_errors(reference: Reference, credentials: Credentials | None) -> Iterator[None]:
    """Turn PullFailed into the answer to a request with these credentials.

    Registries hide private images from anonymous clients, so without credentials "not found" can mean "log in": a
    401 with a challenge makes the node come again with the pod's secret. Wrong credentials get a 401 without the
    challenge, or the node would try them again.
    """
    try:
        yield
    except PullFailed as e:
        code, detail, challenge = e.code, f"Docker could not pull {reference}: {e}", {}
        if code == "TOOMANYREQUESTS":
            detail += ". The registry limits the rate: log in (imagePullSecrets), or wait and try again"
        if code == "MANIFEST_UNKNOWN" and not credentials:
            detail += ". The image may be private: a request without credentials gets 401 (imagePullSecrets)"
            code = "DENIED"
        if code == "DENIED":
            code = "UNAUTHORIZED"
            challenge = {} if credentials else {"WWW-Authenticate": f'Basic realm="{reference.namespace}"'}
        raise RegistryError(code, detail, challenge) from None


@dataclass(frozen=True)
class Fetch:
    """A blob to fetch: its size in bytes, where it comes from with whose credentials, and those of who asked."""

    key: Hashable       # see Fetches._key
    digest: Digest
    size: int
    source: Reference
    credentials: Credentials | None
    asked_with: Credentials | None


class Fetches:
    """Gets content that Docker does not give from an image's own registry into the store.

    Requests for the same content with the same credentials share one transfer, and read it while it arrives. What
    is fetched with one client's credentials is not shown to other clients until it is in the store.
    """

    def __init__(self, engine: Engine, store: Store, policy: PullPolicy, activity: Activity):
        self._engine, self._store, self._policy, self._activity = engine, store, policy, activity
        self._manifests, self._transfers = Jobs(PULLS_LIMIT), UnderWay[Transfer](BLOBS_LIMIT)
        self._broken: Memory[Hashable, Fetch] = Memory()  # those that broke off, and may be begun again

    @staticmethod
    def _key(reference: Reference, digest: Digest, credentials: Credentials | None) -> Hashable:
        """A blob of a repository, for a client."""
        return reference.docker_repository(), digest, credentials

    @functools.cached_property
    def _trusted(self) -> ssl.SSLContext:
        """The authorities that this machine trusts. Reading them takes longer than a small blob."""
        return ssl.create_default_context()

    def _origin(self, reference: Reference, credentials: Credentials | None) -> Origin:
        self._policy.check(reference)
        assert reference.namespace
        insecure = self._engine.is_insecure(reference.namespace)
        return Origin(reference, credentials, None if insecure else self._trusted, self._engine.user_agent)

    def manifest(self, reference: Reference, digest: Digest, credentials: Credentials | None,
                 deadline: Deadline) -> Manifest:
        """Fetch a manifest, verify and keep it. Raises what PullPolicy.check(), pull_errors() and Job.outcome() do."""
        job = self._manifests.start(self._key(reference, digest, credentials), lambda: self._fetch_manifest(
            reference, digest, credentials), f"fetching {digest} of {reference.docker_repository()}")
        manifest: Manifest = job.outcome(deadline)
        return manifest

    def _fetch_manifest(self, reference: Reference, digest: Digest, credentials: Credentials | None) -> Manifest:
        used = self._policy.credentials(reference, credentials)
        with pull_errors(reference, credentials):
            with self._origin(reference, used).open("manifests", digest) as response:
                data = response.read(MANIFEST_LIMIT + 1)
            media_type = manifest_type(data)
            if Digest.of(data, digest.algorithm) != digest or media_type is None:
                raise PullFailed("ORIGIN_UNAVAILABLE", f"{reference.namespace} answered with something else")
        keep_content(self._store, data, self._store.docker, digest.algorithm)
        return Manifest(digest, media_type, data)

    def begin(self, reference: Reference, blobs: Mapping[Digest, int], client: Client,
              source: Reference | None = None) -> None:
        """Begin to fetch blobs of a reference, given with their sizes in bytes.

        Each of them is arriving, or there, when this returns. They come from the registry of the reference, or from
        another source, with that registry's credentials on this machine and never with the client's.
        """
        source, own = source or reference, None if source else client.credentials
        self._policy.check(source)
        if len(blobs) > BLOBS_LIMIT:
            raise RegistryError("MANIFEST_INVALID", f"{reference} has {len(blobs)} blobs: more than are fetched")
        used = self._policy.credentials(source, own)
        fetches = [Fetch(self._key(reference, digest, client.credentials), digest, size, source, used,
                         client.credentials) for digest, size in blobs.items()]
        for start in range(0, len(fetches), FETCHES):
            errors = []
            # All of them are waited for, so that none is taken for one that will bring its blob.
            for transfer in [self._start(fetch) for fetch in fetches[start:start + FETCHES]]:
                try:
                    transfer.wait_for_start(client.deadline)
                except RegistryError as e:
                    errors.append(e)
            if errors:
                raise errors[0]

    def is_fetching(self, reference: Reference, digest: Digest, client: Client) -> bool:
        """True if a blob has begun to arrive for clients with these credentials."""
        transfer = self._transfers.get(self._key(reference, digest, client.credentials))
        return transfer is not None and transfer.started

    def blob(self, reference: Reference, digest: Digest, client: Client) -> Transfer | None:
        """A blob that is fetched for clients with these credentials, once it has begun to arrive, or None.

        What broke off is begun again. Raises what PullPolicy.check() and pull_errors() do, and STILL_PULLING.
        """
        key = self._key(reference, digest, client.credentials)
        transfer, broken = self._transfers.get(key), self._broken.get(key)
        if transfer is None and broken:
            transfer = self._start(broken)
        if transfer:
            transfer.wait_for_start(client.deadline)
        return transfer

    def _start(self, fetch: Fetch) -> Transfer:
        return self._transfers.join(fetch.key, lambda: Transfer(fetch.size), functools.partial(self._fill, fetch))

    def _fill(self, fetch: Fetch, transfer: Transfer) -> None:
        """Fetch a blob into the store, once; errors are those of pull_errors()."""
        self._broken.pop(fetch.key, None)
        kept = self._store.docker.find(fetch.digest)
        if kept and kept.size == fetch.size:  # by a job that ended after the caller had looked
            return transfer.found(kept)
        about = f" of {fetch.source}, {human_bytes(fetch.size)}"
        try:
            with pull_errors(fetch.source, fetch.asked_with), \
                    self._activity.task("fetch", str(fetch.digest), about, fetch.source.docker_repository()) as task, \
                    BlobWriter(self._store, fetch.digest.algorithm) as writer, \
                    self._origin(fetch.source, fetch.credentials).open("blobs", fetch.digest) as response:
                if response.length not in (None, fetch.size):  # then another name of the image may be tried
                    raise PullFailed("ORIGIN_UNAVAILABLE", f"{fetch.source.namespace} gives {response.length} bytes "
                                                           f"for {fetch.digest}, and not {fetch.size}")
                with disk_errors(f"read {writer.path}"):
                    transfer.begin(open(writer.path, "rb"))  # noqa: SIM115 - closed when nobody needs it
                while transfer.count <= transfer.size and (data := response.read1(PIECE)):
                    writer.write(data)
                    transfer.advance(len(data))
                    task.report_bytes(transfer.count, transfer.size)
                found = writer.finish()
                if (found, transfer.count) != (fetch.digest, transfer.size):
                    raise PullFailed("ORIGIN_UNAVAILABLE",
                                     f"{fetch.source.namespace} gave {transfer.count} bytes of {found}")
                writer.keep(self._store.docker)
                task.done("verified")
        except RegistryError:
            if transfer.count:
                self._broken[fetch.key] = fetch
            raise


class Pull(Job):
    """A pull by Docker, with these credentials. old is the image that it is to replace."""

    def __init__(self, reference: Reference, credentials: Credentials | None, old: EngineImage | None = None):
        super().__init__(f"pulling {reference}")
        self.reference, self.credentials, self.old, self.progress = reference, credentials, old, PullProgress()
        self.sizes: dict[Digest, int] = {}  # what it will bring, as far as is known, in bytes


class Pulls:
    """Has Docker pull images: one pull for all requests for the same image. Knows what the pulls under way will bring.

    What a pull will bring is known on Docker's containerd store, where content can be read as it arrives.
    """

    def __init__(self, engine: Engine, images: ImageStores, policy: PullPolicy, activity: Activity):
        self._engine, self._images, self._policy, self._activity = engine, images, policy, activity
        self._content = images.content
        self._pulls, self._look_ups = UnderWay[Pull](PULLS_LIMIT), Jobs()
        self._transfers = UnderWay[Transfer]()
        self._lock = threading.Lock()  # held while _expected is replaced
        self._expected: Mapping[Digest, Pull] = {}  # content that a pull will bring

    def pull(self, reference: Reference, client: Client, old: EngineImage | None = None) -> Manifest | None:
        """Have Docker pull an image; requests for the same image with the same credentials share one pull.

        If it takes long, and content can be read while it arrives, the manifest is returned as soon as it is here,
        and the rest is on its way. Otherwise the result is None at the end of the pull. old is what Docker has under
        that name, to be replaced. Raises what PullPolicy.check() and pull_errors() do.
        """
        if not client.may_pull:
            raise RegistryError("MANIFEST_UNKNOWN", f"Docker has no image {reference}")
        pull = self._start(reference, client.credentials, old)
        ended = client.deadline.within(EARLY_ANSWER).wait(pull.done.wait)
        if not ended and self._images.current().flows:
            look_up = None if isinstance(reference.target, Digest) else self._look_up(reference, pull.credentials)
            manifest = self._await_manifest(
                pull, lambda: look_up.result if look_up else reference.digest, client.deadline)
            if manifest:
                log.info("pull %s: answered with the manifest %s while the rest arrives", reference, manifest.digest)
                return manifest
        with pull_errors(reference, client.credentials):
            pull.outcome(client.deadline)
        return None

    def complete(self, reference: Reference) -> None:
        """See that Docker has an image: wait for the end of its pull, if it lacks it. Raises what pull() does."""
        if not self._engine.image(str(reference)):
            pull = self._start(reference, None)
            with pull_errors(reference, pull.credentials):
                pull.outcome(Deadline())

    def _start(self, reference: Reference, own: Credentials | None, old: EngineImage | None = None) -> Pull:
        """The pull of an image that is under way, or a new one."""
        self._policy.check(reference)
        used = self._policy.credentials(reference, own)
        return self._pulls.join((reference, used), lambda: Pull(reference, used, old), self._run)

    def _run(self, pull: Pull) -> None:
        reference, credentials, progress = pull.reference, pull.credentials, pull.progress
        image = self._engine.image(str(reference))
        if image and (pull.old is None or image.id != pull.old.id):
            return  # pulled by a job that ended after the caller had looked
        detail = f" as {credentials.username!r}" if credentials else ""
        started, result = time.monotonic(), "ok"
        try:
            with self._activity.task("pull", str(reference), detail, reference.docker_repository()) as task:

                def report(message: Mapping[str, Any]) -> None:
                    progress.update(message)
                    task.report(dict(progress.layers), progress.status)

                report({})
                self._engine.pull(reference, credentials, report)
                task.done()
        except (PullFailed, RegistryError) as e:
            result = e.code
            raise
        finally:
            self._activity.count_pull(reference.namespace or "", result, time.monotonic() - started)

    def _look_up(self, reference: Reference, credentials: Credentials | None) -> Job:
        """The question to an image's registry which digest a tag has there now."""
        return self._look_ups.start((reference, credentials), lambda: self._engine.origin_digest(
            reference, credentials), f"looking up {reference}")

    def is_outdated(self, reference: Reference, image: EngineImage, client: Client) -> bool:
        """True if Docker is to pull an image again because its tag has moved, as far as that can be found out."""
        if self._policy.policy != "always" or not client.may_pull or reference.namespace is None or isinstance(
                reference.target, Digest):
            return False
        try:
            self._policy.check(reference)
            look_up = self._look_up(reference, self._policy.credentials(reference, client.credentials))
            digest = look_up.outcome(client.deadline.within(EARLY_ANSWER))
        except (PullFailed, RegistryError) as e:
            log.warning("%s: Docker's own image is served, whether or not the tag has moved: %s", reference,
                        e.detail if isinstance(e, RegistryError) else e)
            return False
        return digest != image.id and not any(name.endswith(f"@{digest}") for name in image.origins)

    # ---- what a pull is bringing

    def _await_manifest(self, pull: Pull, digest: Callable[[], Digest | None], deadline: Deadline) -> Manifest | None:
        """A manifest as soon as a pull has brought it, or None if the pull has ended without it.

        digest() returns its digest once that is known. What the manifest refers to is expected from then on.
        """

        def arrived(seconds: float) -> Manifest | bool:
            ended, target = pull.done.wait(min(seconds, ARRIVAL_INTERVAL)), digest()
            return (self._content.manifest(target) if target else None) or ended

        found = deadline.wait(arrived)
        if not isinstance(found, Manifest):
            return None
        sizes = found.sizes("config", "layers", "manifests")
        pull.progress.expect({layer: size for layer, size in found.sizes("layers").items()
                              if layer not in pull.sizes and not self._content.has(layer, size)})
        pull.sizes.update(sizes)
        with self._lock:
            running = {known: other for known, other in self._expected.items() if not other.done.is_set()}
            self._expected = {**running, **dict.fromkeys(sizes, pull)}
        return found

    def manifest(self, digest: Digest, deadline: Deadline) -> Manifest | None:
        """A manifest that a pull under way will bring, as soon as it is here; None if no pull brings it."""
        pull = self.bringing(digest)
        return self._await_manifest(pull, lambda: digest, deadline) if pull else None

    def bringing(self, digest: Digest) -> Pull | None:
        """The pull under way that will bring some content, or None."""
        pull = self._expected.get(digest)
        return pull if pull and not pull.done.is_set() else None

    def blob(self, digest: Digest) -> Transfer | None:
        """Content that a pull under way will bring, or None."""
        pull = self.bringing(digest)
        if pull is None:
            return None
        size = pull.sizes[digest]
        return self._transfers.join(digest, lambda: Transfer(size), functools.partial(self._await_blob, digest, pull))

    def _await_blob(self, digest: Digest, pull: Pull, transfer: Transfer) -> None:
        """Lead the readers of a transfer to content as soon as Docker has it."""
        while True:
            ended = pull.done.wait(ARRIVAL_INTERVAL)
            blob = self._content.find(digest)
            if blob:
                return transfer.found(blob)
            if ended:
                other = self.bringing(digest)
                if other is None:
                    raise RegistryError("ORIGIN_UNAVAILABLE", f"the pull ended without {digest}: {pull.error}")
                pull = other


class Warming:
    """Has Docker pull what it lacks of a list of images, a few at a time, and tries again what failed."""

    def __init__(self, pulls: Pulls, wanted: Iterable[Reference] = ()):
        self._pulls = pulls
        self._missing = dict.fromkeys(wanted, "it was not looked for yet")  # each operation needs no lock

    def missing(self) -> dict[Reference, str]:
        """Return the images that Docker may lack, each with the reason, in the order of the list."""
        return dict(self._missing)

    def run(self) -> None:
        """Work until the list is done. Failures are logged."""
        count = len(self._missing)
        for pause in itertools.chain(WARMING_PAUSES, itertools.repeat(WARMING_PAUSES[-1])):
            waiting, helpers = iter(self.missing()), []
            with contextlib.suppress(RuntimeError):  # no thread can be started: this one does all of it
                for _ in range(WARMING_PULLS - 1):
                    helper = threading.Thread(target=self._work, args=(waiting,), daemon=True)
                    helper.start()
                    helpers.append(helper)
            self._work(waiting)
            for helper in helpers:
                helper.join()
            missing = self.missing()
            if not missing:
                break
            log.warning("warm: Docker lacks %d of %d images, which are tried again in %d s: %s", len(missing), count,
                        pause, some_of(f"{reference} ({reason})" for reference, reason in missing.items()))
            time.sleep(pause)
        if count:
            log.info("warm: Docker has all images of the list, %d", count)

    def _work(self, waiting: Iterator[Reference]) -> None:
        for reference in waiting:  # which the threads share
            self._missing[reference] = "it is being looked for, or pulled"
            try:
                self._pulls.complete(reference)
            except Exception as e:  # a boundary: it is tried again
                self._missing[reference] = e.detail if isinstance(e, RegistryError) else repr(e)
            else:
                del self._missing[reference]


# =====================================================================================================================
# 20. Mirror: the registry of what Docker has, or gets
# Uses: waiting, activity, engine, transfers, store, export, images, pulls.
# =====================================================================================================================


@dataclass(frozen=True)
class ArrivingManifest:
    """A manifest of which only the media type is known until it is here; wait() returns it, or raises."""

    media_type: str
    wait: Callable[[], Manifest]

    def body(self) -> Body:
        """Its bytes, as soon as they are here."""
        pieces = (self.wait().data for _ in range(1))
        return Body(pieces, None, pieces.close)


class TimelyBlob:
    """A blob that is opened within the deadline of its reader: that may take a call to Docker."""

    def __init__(self, blob: Blob):
        self._blob, self.size = blob, blob.size

    def open(self, start: int, length: int, deadline: Deadline) -> Body:
        """See Blob."""
        return ask(deadline, lambda inner: self._blob.open(start, length, inner), discard=lambda body: body.close())


Parameters = ParamSpec("Parameters")


def in_time(method: Callable[Concatenate[Mirror, Client, Parameters], T]
            ) -> Callable[Concatenate[Mirror, Client, Parameters], T]:
    """Let a method of Mirror answer within the deadline of its client: see ask()."""

    @functools.wraps(method)
    def asked(mirror: Mirror, client: Client, /, *arguments: Parameters.args, **options: Parameters.kwargs) -> T:
        return ask(client.deadline, lambda inner: method(
            mirror, dataclasses.replace(client, deadline=inner), *arguments, **options))

    return asked


class Mirror:
    """The registry of what Docker has, or gets now: which content does a name mean, and who has these bytes?"""

    def __init__(self, engine: Engine, store: Store, policy: PullPolicy | None = None,
                 docker_root: Path | None = None, activity: Activity | None = None):
        """docker_root is where Docker's data folder is mounted, if that is not the place that Docker names."""
        self.engine, self._store = engine, store
        policy, self.activity = policy or PullPolicy(), activity or Activity()
        self._exports = Exports(engine, store, self.activity, self._tidy_up_soon)
        self.images = ImageStores(engine, store, self._exports, docker_root)
        self._content = self.images.content
        self.pulls = Pulls(engine, self.images, policy, self.activity)
        self._fetches = Fetches(engine, store, policy, self.activity)
        self._jobs = Jobs(PULLS_LIMIT)  # recoveries
        self._warned: Memory[Digest, bool] = Memory()  # images for another platform that the log has named

    def introduce(self) -> None:
        """Log which Docker this is, and where content comes from."""
        try:
            self.images.current()
        except RegistryError as e:
            log.error("%s; this is tried again on each request", e.detail)

    def _is_docker(self, client: Client) -> bool:
        """True if the client is the engine itself: its User-Agent names its version, its commit and its kernel."""
        return client.user_agent.startswith("docker/") and client.user_agent.startswith(self.engine.info().user_agent)

    def _refuse_ourselves(self, reference: Reference, client: Client, code: str) -> None:
        """Raise an error if this program asks itself, or the engine asks for an image of another registry.

        This program does when it fetches what Docker lacks by a name that leads here: that fetch would wait for itself.
        The engine does when somebody runs `docker pull`, with this as a mirror. Told what it has already, it would
        never see that a tag has moved; and a pull that this program has it do may wait for that one.
        """
        if client.user_agent == self.engine.user_agent:
            raise RegistryError(code, f"{reference}: this program itself asks for it, because Docker lacks it")
        if reference.namespace and self._is_docker(client):
            raise RegistryError(code, f"{reference}: Docker has it itself, or pulls it")

    # ---- which content does a name mean?

    def manifest(self, client: Client, reference: Reference) -> Manifest | ArrivingManifest:
        """The manifest or index that a reference means right now, all of whose content is here or on its way.

        An image that Docker lacks is pulled by Docker, if the reference says from where and the client may pull; its
        credentials are used with that registry, and for nothing else. If that takes longer than the client's
        deadline, the answer is what is known by then. Raises MANIFEST_UNKNOWN, UNAUTHORIZED, DENIED,
        TOOMANYREQUESTS, ORIGIN_UNAVAILABLE, STILL_PULLING, and what Engine raises.
        """

        def late(job: Job) -> ArrivingManifest | None:
            made_type = self.images.made_type
            if made_type is None or isinstance(reference.target, Digest):
                return None
            log.info("%s: answered while Docker is still getting it", reference)
            return ArrivingManifest(made_type, lambda: job.outcome(client.deadline.unlimited()))

        return ask(client.deadline, lambda inner: self._find_manifest(
            dataclasses.replace(client, deadline=inner), reference), late)

    def _find_manifest(self, client: Client, reference: Reference) -> Manifest | ArrivingManifest:
        """The same; takes as long as it takes."""
        self._refuse_ourselves(reference, client, "MANIFEST_UNKNOWN")
        if isinstance(reference.target, Digest):
            manifest = self._manifest_by_digest(reference, reference.target, client)
        else:
            manifest = self._manifest_of_image(reference, client)
        if self._missing(reference, manifest, client):
            job = self._jobs.start(("recover", reference, manifest.digest, client.credentials, client.names),
                                   lambda: self._recover(reference, manifest, dataclasses.replace(
                                       client, deadline=Deadline())), f"getting what it lacks of {reference}")
            job.outcome(client.deadline)
        for digest in (manifest.digest, *manifest.sizes("config", "layers")):
            self._store.docker.touch(digest)  # if it was fetched, it stays for a while
        return manifest

    def _manifest_of_image(self, reference: Reference, client: Client) -> Manifest:
        """The manifest of an image, or the one with a reference's digest, from Docker, which pulls what it lacks."""
        image = self._local_image(reference, client)
        if image is None or self.pulls.is_outdated(reference, image, client):
            try:
                arriving = self.pulls.pull(reference, client, image)
            except RegistryError as e:
                if image is None:
                    raise
                log.warning("%s: Docker's own image is served, though the tag has moved: %s", reference, e.detail)
            else:
                if arriving:
                    return arriving
                image = self._local_image(reference, client)
        if image is None:
            raise RegistryError("MANIFEST_UNKNOWN", f"Docker pulled {reference}, but does not have it now")
        self._check_platform(image)
        target = self.images.current().target(image, client.deadline)
        digest = reference.target if isinstance(reference.target, Digest) else target
        return self._content.manifest(digest) or self._lost_manifest(reference, digest, client)

    def _check_platform(self, image: EngineImage) -> None:
        """Warn once of an image for another platform than Docker's own: its containers may not run on the nodes."""
        ours = self.engine.info().platform
        if image.platform and ours and not same_platform(image.platform, ours) and image.id not in self._warned:
            self._warned[image.id] = True
            log.warning("the image %s is for %s, and this Docker is %s: on a node like that its containers end with "
                        "\"exec format error\"; get the other with docker pull --platform %s", image.id,
                        image.platform, ours, ours)

    def _names(self, reference: Reference, client: Client) -> list[Reference]:
        """The names under which Docker may have what a reference means, the likeliest first."""
        info = self.engine.info()
        found = list(reference.aliases(tuple(dict.fromkeys((*client.names, *info.names)))))
        if reference.namespace in (None, "docker.io") and info.is_podman:
            found.append(dataclasses.replace(reference, repository=reference.repository.removeprefix("library/"),
                                             namespace="localhost"))  # where Podman keeps what it builds
        return found

    def _inspected_image(self, reference: Reference, client: Client) -> EngineImage | None:
        """The image that Docker finds under a name now, or under another name for the same, or None."""
        images = (self.engine.image(str(name)) for name in self._names(reference, client))
        return next((image for image in images if image), None)

    def _local_image(self, reference: Reference, client: Client) -> EngineImage | None:
        """The same; or an image that Docker lists under a name that is not fully qualified, and does not find by it."""
        image = self._inspected_image(reference, client)
        if image is None:
            wanted = {(docker_name(name.docker_repository()), name.target) for name in self._names(reference, client)}
            found = (image_id for image_id, name, tag in self.engine.names() if (docker_name(name), tag) in wanted)
            image = next((self.engine.image(str(image_id)) for image_id in found), None)
        return image

    def _manifest_by_digest(self, reference: Reference, digest: Digest, client: Client) -> Manifest:
        if reference.namespace is None:
            return self._manifest_here(reference, digest, client)
        manifest = self.pulls.manifest(digest, client.deadline) or self._content.manifest(
            digest, remembered=False)
        if manifest:
            return manifest
        if self.images.current().made_type:
            return self._manifest_here(reference, digest, client)
        self._refuse_missing_platform(reference, digest, client)
        return self._manifest_of_image(reference, client)

    def _images_of(self, reference: Reference, client: Client) -> Iterator[EngineImage]:
        """All images that Docker has in a repository."""
        repositories = [name.docker_repository() for name in self._names(reference, client)]
        for image_id in self.engine.images_of(repositories):
            image = self.engine.image(str(image_id))
            if image:
                yield image

    def _included(self, reference: Reference, digest: Digest, client: Client, explore: bool) -> Manifest | None:
        """The manifest with a digest, if Docker has an image in this repository that is it or lists it, or None."""
        images = self.images.current()
        for image in self._images_of(reference, client):
            with engine_failures_logged():
                if images.includes(image, digest, client.deadline, explore):
                    return self._content.manifest(digest)
        return None

    def _manifest_here(self, reference: Reference, digest: Digest, client: Client) -> Manifest:
        """A manifest by digest, of what Docker has in this very repository.

        If the client names the image's registry, that is asked before images are exported to see their manifests.
        """
        error = RegistryError("MANIFEST_UNKNOWN", f"Docker has no image {digest} in {reference.docker_repository()}")
        found = self._included(reference, digest, client, explore=False)
        if found is None and reference.namespace and client.may_pull:
            try:
                found = self._fetches.manifest(reference, digest, client.credentials, client.deadline)
            except RegistryError as e:
                error = e if e.code not in ("MANIFEST_UNKNOWN", "ORIGIN_UNAVAILABLE") else RegistryError(
                    "MANIFEST_UNKNOWN", f"{reference}: Docker's classic image store does not keep these bytes, and its "
                                        f"registry does not give them: {e.detail}")
        may_export = client.may_pull or reference.namespace is None
        if found is None and may_export and not self._is_docker(client):  # nothing is exported for a `docker pull`
            found = self._included(reference, digest, client, explore=True)
        if found is None:
            raise error
        return found

    def _refuse_missing_platform(self, reference: Reference, digest: Digest, client: Client) -> None:
        """MANIFEST_UNKNOWN for a platform of an index that Docker has without that platform.

        Docker was told which platforms to get, so the node has to look for others elsewhere. Attestations are not
        platforms, and Docker's own platform is one that it has lost.
        """
        for image in self._images_of(reference, client):
            index = self._content.manifest(image.id)
            child = index.platforms().get(digest) if index else None
            platform = platform_of(child.get("platform")) if child else ""
            if child and not (platform and same_platform(platform, self.engine.info().platform)):
                raise RegistryError("MANIFEST_UNKNOWN", f"Docker has the index {image.id} in its repository "
                                    f"{reference.docker_repository()}, but not the platform {platform or digest} of "
                                    "it: get it with docker pull --platform")

    # ---- what a manifest refers to

    def _missing(self, reference: Reference, manifest: Manifest, client: Client) -> dict[Digest, int]:
        """The blobs of a manifest that are neither here nor on their way, with their sizes in bytes.

        Only what Docker itself fetches counts: config and layers. Of an index one whole platform will do: what it
        needs of others is seen when they are asked for.
        """
        # In this order: what is no longer on its way when it is asked for has arrived by then.
        missing = {digest: size for digest, size in manifest.sizes("config", "layers").items()
                   if not (self.pulls.bringing(digest) or self._fetches.is_fetching(reference, digest, client)
                           or self._content.has(digest, size))}
        for digest in manifest.platforms():
            if self.pulls.bringing(digest):
                return {}
            child = self._content.manifest(digest)
            if child and not child.platforms():  # an index in an index is seen to when it is asked for
                lacking = self._missing(reference, child, client)
                if not lacking:
                    return {}
                missing = missing or lacking
        return missing

    def _recover(self, reference: Reference, manifest: Manifest, client: Client) -> None:
        """Get what Docker has lost of an image into our store. Docker is never asked to build or run anything.

        Each name that leads to the content is tried, the one that was asked for first.
        """
        self._restore(reference, self._missing(reference, manifest, client), client)
        missing = self._missing(reference, manifest, client)

        def fetch(source: Reference | None) -> None:
            left = self._missing(reference, manifest, client)
            if left:
                self._fetches.begin(reference, left, client, source)

        if missing:
            self._try_names(itertools.chain([None], self._other_names(manifest.digest, missing, manifest)), fetch,
                            f"Docker has {reference}, but lacks {len(missing)} of its blobs: {some_of(missing)}")

    @staticmethod
    def _try_names(names: Iterable[K], get: Callable[[K], T], problem: str) -> T:
        """What get() returns for the first name with which it succeeds.

        If it never does, the error is the first name's, if that was refused; otherwise MANIFEST_UNKNOWN.
        """
        errors = []
        for name in names:
            try:
                return get(name)
            except RegistryError as e:
                errors.append(e)
        if errors and errors[0].code in ("UNAUTHORIZED", "TOOMANYREQUESTS", "DENIED"):
            raise errors[0]
        reasons = "; ".join(dict.fromkeys(error.detail for error in errors))
        raise RegistryError("MANIFEST_UNKNOWN", f"{problem}. Remove the image from Docker, and pull or build it again. "
                                                f"It could not be fetched: {reasons}")

    def _restore(self, reference: Reference, blobs: Mapping[Digest, int], client: Client) -> None:
        """Have Docker give content of an image again: a node may know its manifest from before our store was lost."""
        if blobs:
            self.images.current().restore(self._images_of(reference, client), blobs, client.deadline)

    @in_time
    def fetch_lost(self, client: Client, reference: Reference, manifest: Manifest, blobs: Mapping[Digest, int]) -> None:
        """Begin to fetch blobs of a manifest, if Docker lacks them, and knows a name that leads to them."""
        lost = {digest: size for digest, size in blobs.items() if not self._content.find(digest, size)}
        for source in self._other_names(manifest.digest, lost, manifest) if lost else ():
            try:
                self._fetches.begin(reference, lost, client, source)
                break
            except RegistryError as e:
                log.warning("%s: %s", source, e.detail)

    def _lost_manifest(self, reference: Reference, digest: Digest, client: Client) -> Manifest:
        """A manifest that Docker lists and has lost, by any name that leads to it."""
        return self._try_names(
            itertools.chain([reference], self._other_names(digest, {})),
            lambda source: self._fetches.manifest(
                source, digest, client.credentials if source is reference else None, client.deadline),
            f"Docker lists {reference} as {digest}, but that content is missing from its store")

    def _other_names(self, target: Digest, missing: Mapping[Digest, int],
                     manifest: Manifest | None = None) -> Iterator[Reference]:
        """Other names under which Docker got a manifest, or some missing blobs of it, from registries."""
        names: list[str] = []
        for image in self.engine.listed():
            with engine_failures_logged():
                if self._leads_to(image.id, target, missing):
                    names += (*image.origins, *image.tags)
        for digest in manifest.listed("config", "layers") if manifest else ():
            names += self.images.current().origins(digest)
        for host, repository in dict.fromkeys(docker_name(repository_of(name)) for name in names):
            if REPOSITORY.fullmatch(repository):
                yield Reference(repository, target, host)

    def _leads_to(self, image_id: Digest, target: Digest, blobs: Mapping[Digest, int]) -> bool:
        """True if an image is a manifest, or lists it, or has some of these blobs, as far as its manifests are here."""
        found = self._content.manifest(image_id)
        children = map(self._content.manifest, found.platforms()) if found else ()
        return image_id == target or (found is not None and target in found.listed("manifests")) or any(
            not blobs.keys().isdisjoint(one.sizes("config", "layers")) for one in (found, *children) if one)

    # ---- who has these bytes?

    @in_time
    def blob(self, client: Client, reference: Reference) -> Blob:
        """The blob with the digest that a reference names.

        Docker does not keep its content apart by repository, so the repository does not matter. BLOB_UNKNOWN if
        nobody has it, and for manifests too: to a node, 200 means that the digest is not one.
        """
        self._refuse_ourselves(reference, client, "BLOB_UNKNOWN")
        digest = reference.digest
        blob = self._content.find(digest)
        if blob is None:
            arriving = self._arriving(reference, digest, client)
            if arriving:
                return TimelyBlob(arriving)
            if reference.namespace and client.may_pull:  # a node; others do not want an image exported
                self._restore(reference, {digest: 0}, client)
            blob = self._content.find(digest)  # it may have arrived since
        if blob is None:
            raise RegistryError("BLOB_UNKNOWN", f"Docker has no content {digest}")
        if self._is_manifest(blob):
            raise RegistryError("BLOB_UNKNOWN", f"{digest} is a manifest: ask for it under /manifests/")
        return TimelyBlob(blob)

    @staticmethod
    def _is_manifest(blob: Blob) -> bool:
        """True if a blob is a manifest. The first byte rules it out for everything that is not JSON."""
        return (blob.size <= MANIFEST_LIMIT and read_blob(blob, 1) == b"{"
                and manifest_type(read_blob(blob, MANIFEST_LIMIT)) is not None)

    # ---- what is adopted

    @in_time
    def contents(self, client: Client, reference: Reference, sizes: Mapping[Digest, int]) -> dict[Digest, Blob]:
        """What Docker has of the content of an image with these digests and sizes in bytes, exported if need be."""
        found: dict[Digest, Blob] = {}
        lacking: dict[Digest, int] = {}
        for digest, size in sizes.items():
            if len(lacking) > LAYERS_LIMIT:
                break  # no image of Docker's lacks so much: it is not asked for the rest
            blob = self._content.find(digest, size) or self._arriving(reference, digest, client)
            if blob:
                found[digest] = blob
            else:
                lacking[digest] = size
        if lacking and self.images.current().can_restore:
            self._restore(reference, lacking, client)
            found.update((digest, blob) for digest, size in lacking.items()
                         if (blob := self._content.find(digest, size)))
        return found

    def _arriving(self, reference: Reference, digest: Digest, client: Client) -> Transfer | None:
        """Content that a pull or a fetch is bringing for this client, or None."""
        return self.pulls.blob(digest) or self._fetches.blob(reference, digest, client)

    @in_time
    def has_content(self, client: Client, digest: Digest) -> bool:
        """True if Docker has the bytes of a digest at hand."""
        return self._content.find(digest) is not None

    @in_time
    def manifest_content(self, client: Client, digest: Digest) -> Manifest | None:
        """The manifest with a digest, if Docker has its bytes under any name, or None."""
        return self._content.manifest(digest)

    @in_time
    def image(self, client: Client, reference: Reference) -> EngineImage | None:
        """See _inspected_image."""
        return self._inspected_image(reference, client)

    # ---- lists

    @in_time
    def tags(self, client: Client, reference: Reference) -> list[str]:
        """The tags of the images that Docker has in a repository. The reference's target is not used."""
        names = {docker_name(alias.docker_repository()) for alias in self._names(reference, client)}
        return [tag for _, name, tag in self.engine.names() if docker_name(name) in names]

    @in_time
    def catalog(self, client: Client) -> set[str]:
        """The repositories of Docker's images, by the names under which they can be pulled without a namespace."""
        found: set[str] = set()
        for full in {docker_name(name) for _, name, _ in self.engine.names()}:
            host, repository = full
            short = repository.removeprefix("library/") if host == "docker.io" else repository
            named = (name for name in (short, "/".join(full)) if self._is_pulled_by(name, full, client))
            found.update(itertools.islice(named, 1))
        return found

    def _is_pulled_by(self, repository: str, full: tuple[str, str], client: Client) -> bool:
        """True if a repository without a namespace leads to the images of a registry and repository, given in full.

        A registry's port cannot be part of a repository's name.
        """
        names = self._names(Reference(repository, "latest"), client)
        return bool(REPOSITORY.fullmatch(repository)) and full in {docker_name(name.docker_repository())
                                                                   for name in names}

    def _tidy_up_soon(self) -> None:
        with contextlib.suppress(RegistryError):  # no thread can be started: there is a next time
            start_thread(self.tidy_up)

    def tidy_up(self) -> None:
        """Free the disk of exports that nobody needs any more. Failures are logged."""
        try:
            with self._store.log_freed():
                self._store.tidy_up(lambda image_id: self.engine.image(str(image_id)) is not None, time.time())
        except Exception as e:  # a boundary: the program goes on
            log.warning("store: not tidied up: %s", e)


# =====================================================================================================================
# 21. Front: which of the two registries answers
# Uses: waiting, transfers, store, writers, hosted, pulls, mirror.
# =====================================================================================================================


@dataclass
class Adoption:
    """Makes a manifest that is pushed whole in its repository: the only bridge from the mirror to what is hosted.

    A client may push a manifest that it read here, of an image that only Docker has (crane tag, say). Before that is
    answered, everything that it refers to is brought into its repository: what the store holds of Docker's is
    linked, the rest is read from Docker, verified and kept. So what was pushed stays, even if Docker removes it later.
    Content of other repositories is never taken: that is what mounts are for.
    """

    DEPTH: ClassVar[int] = 8  # indexes in indexes

    store: Store
    mirror: Mirror
    copies: Jobs                # that are under way for any request
    repository: Repository
    reference: Reference
    client: Client
    blobs: dict[Digest, Blob] = field(default_factory=dict)         # to be brought
    manifests: list[Manifest] = field(default_factory=list)         # the same, each behind those that it lists
    seen: set[Digest] = field(default_factory=set)                  # manifests that have been looked at
    unknown: int = 0                                                # how many of them nobody has

    def complete(self, manifest: Manifest) -> None:
        """Bring what a manifest refers to into its repository.

        MANIFEST_BLOB_UNKNOWN names the blobs that nobody has. Not having a layer that need not be distributed, or a
        manifest of an index with everything that it needs, is allowed (OCI Distribution Spec v1.1, "Pushing
        Manifests"). Nothing is copied before it is clear that all of it is available, and fits on the disk.
        """
        self._plan(manifest)
        self.store.check_room(sum(blob.size for digest, blob in self.blobs.items()
                                  if not self.store.docker.size(digest)))
        for digest, blob in self.blobs.items():
            self._bring(digest, blob)
        for child in self.manifests:
            self.repository.put_manifest(child, ())

    def _plan(self, manifest: Manifest, depth: int = 0) -> None:
        """Note what a manifest lacks, and what those that it lists lack."""
        required = manifest.sizes("config", "layers", "blobs")
        optional = manifest.sizes("config", "layers", "blobs", foreign=True)
        lacking = {digest: size for digest, size in {**optional, **required}.items() if not (
            digest in self.blobs or self.repository.has_blob(digest, size, self.client.deadline))}
        found = self.mirror.contents(self.client, self.reference, lacking) if lacking else {}
        missing = [digest for digest in lacking if digest in required and digest not in found]
        if missing:
            raise RegistryError("MANIFEST_BLOB_UNKNOWN", f"neither {self.repository.name} nor Docker has "
                                                         f"{some_of(missing)}: push blobs before the manifest that "
                                                         "refers to them")
        self.blobs.update(found)
        for digest, descriptor in descriptors(manifest.document, "manifests"):
            size = descriptor["size"]
            # BuildKit lists the layers of a cache as the manifests of an index.
            if digest not in self.seen and not self.repository.has_blob(digest, size, self.client.deadline):
                self.seen.add(digest)
                self._plan_child(digest, size, depth + 1)

    def _plan_child(self, digest: Digest, size: int, depth: int) -> None:
        """Note a manifest of an index, behind what it refers to; or nothing, if not all of it is available."""
        if depth > self.DEPTH:
            raise RegistryError("MANIFEST_INVALID", f"{self.reference}: indexes are nested more than {self.DEPTH} deep")
        hosted = self.repository.manifest(digest)
        child = hosted
        if hosted is None and self.unknown <= LAYERS_LIMIT:  # Docker is not asked for thousands, one by one
            child = self.mirror.manifest_content(self.client, digest)
        if child is None:
            self.unknown += 1
            return
        if len(child.data) != size:
            raise RegistryError("MANIFEST_INVALID", f"the manifest {digest} has {len(child.data)} bytes, not {size}")
        try:
            child.check()
            self._plan(child, depth)
        except RegistryError as e:
            if e.code not in ("MANIFEST_BLOB_UNKNOWN", "MANIFEST_INVALID"):
                raise
            log.info("%s: pushed without the manifest %s: %s", self.reference, digest, e.detail)
        else:
            if hosted is None:
                self.manifests.append(child)

    def _bring(self, digest: Digest, blob: Blob) -> None:
        """Make a blob belong to the repository. Requests that want the same content at the same time share one copy."""
        if not self.repository.blobs.adopt(digest, blob.size, self.client.deadline):
            job = self.copies.start(digest, lambda: self._copy(digest, blob), f"copying {digest}")
            job.outcome(self.client.deadline)
            if not self.repository.blobs.adopt(digest, blob.size):
                raise RegistryError("STORE_FAILED", f"{digest} was removed from the store a moment ago")

    def _copy(self, digest: Digest, blob: Blob) -> None:
        """Copy content out of Docker into the store."""
        if self.store.docker.adopt(digest, blob.size):
            return  # copied by a job that ended after the caller had looked
        with self.mirror.activity.task("copy", str(digest), f", {human_bytes(blob.size)}, for a push") as task, \
                BlobWriter(self.store, digest.algorithm) as writer, \
                contextlib.closing(blob.open(0, blob.size, Deadline())) as body:
            count = 0
            for piece in body:
                writer.write(piece)
                task.report_bytes(count := count + len(piece), blob.size)
            found = writer.finish()
            if found != digest:
                raise RegistryError("ENGINE_FAILED", f"Docker has the bytes of {found} for {digest}")
            writer.keep(self.store.docker)
            task.done("verified")


class Front:
    """Decides which of the two registries answers a request.

    A request with `ns` for another registry refers to Docker's images. Any other request refers to what was pushed
    here, and then to what Docker has under that very name. HEAD is different: most clients send it before a push, and
    take 200 for "you need not push this". So without `ns` it speaks only of what is hosted.
    """

    def __init__(self, hosted: Hosted, mirror: Mirror, store: Store, warm: Iterable[Reference] = ()):
        """warm are images that Docker is to have from the start: see Warming."""
        self.hosted, self.mirror, self.store = hosted, mirror, store
        self.warming = Warming(mirror.pulls, warm)
        self._copies, self._comparisons = Jobs(), Jobs(PULLS_LIMIT)
        self._hidden: Memory[tuple[Digest, Digest], bool] = Memory()  # pairs that the log has named

    def close(self) -> None:
        """Remove what is half-written."""
        self.store.close()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of this registry that Docker has told so far. Does not wait for Docker."""
        return self.mirror.engine.own_names

    @staticmethod
    def _is_ours(reference: Reference, client: Client) -> bool:
        """True if a reference may mean what was pushed here."""
        return reference.namespace is None or names_us(reference.namespace, client.names)

    def _in_docker(self, reference: Reference, client: Client) -> Reference:
        """A reference as Docker's side has to take it."""
        if reference.namespace in client.names:
            return reference.under(None)
        return reference.of_path() or reference

    def _refuse_docker(self, reference: Reference, client: Client, code: str) -> None:
        """Refuse a request that Docker sends while it pulls for us: each would wait for the other.

        Docker repeats our User-Agent to registries. It may ask us if it was told that this is a mirror of others. What
        was pushed here is not for it, but for our own requests: see Mirror._refuse_ourselves.
        """
        engine = self.mirror.engine
        if engine.token in client.user_agent and client.user_agent != engine.user_agent:
            raise RegistryError(code, f"{reference}: Docker asks for this program, which does not have it")

    def manifest(self, reference: Reference, client: Client, head: bool = False) -> Manifest | ArrivingManifest:
        """The manifest or index that a reference means now. See Mirror.manifest for the errors."""
        self._refuse_docker(reference, client, "MANIFEST_UNKNOWN")
        hosted = self._hosted(reference, client, "MANIFEST_UNKNOWN", lambda: self.hosted.manifest(reference))
        if hosted:
            if not isinstance(reference.target, Digest):
                with contextlib.suppress(RegistryError):  # the answer does not depend on it
                    self._comparisons.start((reference, client.names), lambda: self._log_hidden_image(
                        reference, hosted, Client(client.names)), "comparing")
            return hosted
        if head and reference.namespace is None:
            if not client.is_about_to_pull():
                raise RegistryError("MANIFEST_UNKNOWN", f"{reference} was not pushed here")
            client = dataclasses.replace(client, may_pull=False)
        return self.mirror.manifest(client, self._in_docker(reference, client))

    def _hosted(self, reference: Reference, client: Client, unknown: str, read: Callable[[], T]) -> T | None:
        """What read() returns of what was pushed, or None if it raises an error with this code, or is not asked for."""
        try:
            return read() if self._is_ours(reference, client) else None
        except RegistryError as e:
            if e.code != unknown:
                raise
            return None

    def _log_hidden_image(self, reference: Reference, manifest: Manifest, asking: Client) -> None:
        """Log, once for each pair, that a pushed tag hides another image of Docker's."""
        try:
            image = self.mirror.image(asking, self._in_docker(reference, asking))
            index = self.mirror.manifest_content(asking, image.id) if image else None
        except RegistryError as e:  # not worth a line above debug: what was pushed does not depend on Docker
            log.debug("%s was not compared with Docker's image: %s", reference, e.detail)
            return
        if image is None or image.id in (manifest.digest, *manifest.listed("config")) or (
                index and manifest.digest in index.listed("manifests")):
            return
        if (image.id, manifest.digest) not in self._hidden:
            self._hidden[image.id, manifest.digest] = True
            log.warning("%s is served as it was pushed, %s, and not as Docker's image of that name, %s: push it again, "
                        "or delete the tag here", reference, manifest.digest, image.id)

    def blob(self, reference: Reference, client: Client, head: bool = False) -> Blob:
        """The blob with the digest that a reference names; BLOB_UNKNOWN."""
        self._refuse_docker(reference, client, "BLOB_UNKNOWN")
        hosted = self._hosted(reference, client, "BLOB_UNKNOWN", lambda: self.hosted.blob(reference, client.deadline))
        if hosted:
            return hosted
        if head and reference.namespace is None:
            raise RegistryError("BLOB_UNKNOWN", f"{reference} was not pushed here")
        return self.mirror.blob(client, self._in_docker(reference, client))

    # ---- writing

    def put_manifest(self, reference: Reference, manifest: Manifest, tags: list[str], client: Client) -> None:
        """Take a manifest that is pushed, with its tags, and everything that it refers to.

        MANIFEST_BLOB_UNKNOWN if nobody has a blob of it: then nothing is kept.
        """
        self.adopt(reference, manifest, client)
        self.hosted.put_manifest(reference, manifest, tags)

    def adopt(self, reference: Reference, manifest: Manifest, client: Client) -> None:
        """Bring what a manifest refers to into its repository: see Adoption."""
        Adoption(self.store, self.mirror, self._copies, self.hosted.repository(reference.repository), reference, client
                 ).complete(manifest)

    def delete_manifest(self, reference: Reference, client: Client) -> None:
        """Remove a tag, or a manifest with all its tags. MANIFEST_UNKNOWN, UNSUPPORTED."""
        with self._unless_in_docker(reference, client):
            self.hosted.delete_manifest(reference)

    def delete_blob(self, reference: Reference, client: Client) -> None:
        """Remove a blob from a repository. BLOB_UNKNOWN, UNSUPPORTED."""
        with self._unless_in_docker(reference, client):
            self.hosted.delete_blob(reference)

    @contextlib.contextmanager
    def _unless_in_docker(self, reference: Reference, client: Client) -> Iterator[None]:
        """Turn "unknown" into UNSUPPORTED for what cannot be deleted because it is Docker's."""
        try:
            yield
        except RegistryError as e:
            if e.status == 404 and (self.mirror.has_content(client, reference.target) if isinstance(
                    reference.target, Digest) else self.mirror.image(client, self._in_docker(reference, client))):
                raise RegistryError("UNSUPPORTED", f"{reference} is in Docker, whose images are not deleted through "
                                                   "this registry: use docker rmi") from None
            raise

    # ---- lists

    def tags(self, reference: Reference, client: Client, after: str = "") -> Iterator[str]:
        """The tags behind a name under which images of a repository can be pulled, sorted; NAME_UNKNOWN.

        The reference's target is not used. The tags of what was pushed are read as they are taken. If Docker runs and
        cannot be asked, there is no list at all, but Engine's error: a list that lacks something cannot be told from a
        complete one.
        """
        hosted = self._hosted(reference, client, "NAME_UNKNOWN", lambda: self.hosted.tags(reference, after))
        docker = set(self._of_docker(lambda: self.mirror.tags(client, self._in_docker(reference, client)),
                                     hosted is not None))
        if hosted is None and not docker:
            raise RegistryError("NAME_UNKNOWN", f"nothing was pushed to {reference.docker_repository()}, and Docker "
                                                "has no image of that name")
        merged = heapq.merge(hosted or (), sorted(tag for tag in docker if tag > after))
        return (tag for tag, _ in itertools.groupby(merged))

    def catalog(self, client: Client) -> list[str]:
        """The repositories that can be pulled from without a namespace, sorted: those pushed here, and Docker's.

        If Docker cannot be asked, there is no list: see tags().
        """
        hosted = self.hosted.catalog()
        return sorted({*hosted, *self._of_docker(lambda: self.mirror.catalog(client), bool(hosted))})

    @staticmethod
    def _of_docker(names: Callable[[], Iterable[str]], others: bool) -> Iterable[str]:
        """Names of Docker's images. A Docker that does not run has none; if there are no others, that is an error."""
        try:
            return names()
        except RegistryError as e:
            if others and isinstance(e.__cause__, FileNotFoundError | ConnectionRefusedError):
                return ()
            raise

    def referrers(self, reference: Reference, client: Client, after: str = "") -> Iterator[dict[str, Any]]:
        """The descriptors of manifests that were pushed to a repository and have a reference's digest as subject."""
        return self.hosted.referrers(reference, after) if self._is_ours(reference, client) else iter(())

    # ---- tidying up

    def keep_tidy(self) -> None:
        """Tidy up, now and every TIDY_INTERVAL seconds while the process lives."""
        self.tidy_up()
        log.info("store: tidied up, %s", self.store.space)
        while True:
            time.sleep(TIDY_INTERVAL)
            self.tidy_up()

    def tidy_up(self) -> None:
        """Free the disk of what nothing refers to any more. Failures are logged."""
        try:
            self.store.measure()
            with self.store.log_freed():
                self.hosted.tidy_up(time.time())
        except Exception as e:  # a boundary: the program goes on
            log.warning("store: what was pushed is not tidied up: %s", e)
        self.mirror.tidy_up()


# =====================================================================================================================
# 22. Verification: what is damaged in the store, and how to get it again
# Uses: waiting, activity, transfers, store, hosted, front.
# =====================================================================================================================


@dataclass(frozen=True)
class Lack:
    """What a repository needs, and what is not there or damaged: a manifest, or a blob of a manifest."""

    what: str                   # for people
    repository: Repository
    digest: Digest
    manifest: Manifest | None = None  # the one that refers to a blob
    size: int = 0               # of a blob, in bytes


class Verification:
    """Reads the whole store, and tells what is damaged, and what each repository lacks.

    A repair gets what can be had again: from another copy in the store, from Docker, or from a registry that Docker
    got it from. What remains damaged counts as absent, so clients push it again.
    """

    def __init__(self, store: Store, registry: Front, tell: Callable[[str], None]):
        """tell is called with each line of the result."""
        self._store, self._registry, self._tell = store, registry, tell
        self._client = Client()

    def run(self, repair: bool) -> bool:
        """Verify the store, and repair it if that is wanted. True if all of it is right in the end."""
        damaged, lacks = self._damaged(), list(self._lacks())
        for path, digest in damaged:
            self._tell(f"damaged: {path} does not have the content of {digest}")
        for lack in lacks:
            self._tell(f"incomplete: {lack.what}")
        if repair and (damaged or lacks):
            self._repair(damaged, lacks)
            damaged, lacks = self._damaged(), list(self._lacks())
            for lack in lacks:
                self._tell(f"not repaired: {lack.what}: push it again")
        return not (damaged or lacks)

    # ---- what is wrong

    def _damaged(self) -> list[tuple[Path, Digest]]:
        """The files that do not have the content that their names say. Several names of one file count once."""
        files: dict[int, tuple[Path, Digest, int]] = {}
        for links in self._store.owners():
            for digest in links.digests():
                status = self._store.disk.status(links.path(digest))
                if status:
                    files.setdefault(status.st_ino, (links.path(digest), digest, status.st_size))
        total = sum(size for _, _, size in files.values())
        found, count = [], 0
        with Task("verify", f"{len(files)} files, {human_bytes(total)}") as task:
            for path, digest, size in files.values():
                if not self._store.has_content(path, digest) and self._store.disk.status(path):
                    found.append((path, digest))
                task.report_bytes(count := count + size, total)
            task.done(f"{len(found)} are damaged")
        return found

    def _lacks(self) -> Iterator[Lack]:
        """What the repositories lack: manifests of tags, and blobs of manifests."""
        for name in self._registry.hosted.names():
            repository = self._registry.hosted.repository(name)
            for tag, digest in repository.dangling_tags():
                yield Lack(f"{name}:{tag} names {digest}, which is not there", repository, digest)
            for digest in repository.manifests.digests():
                manifest = repository.manifest(digest) if self._is_right(repository.manifests, digest) else None
                if manifest is None:
                    if os.path.lexists(repository.manifests.path(digest)):  # or a server has just deleted it
                        yield Lack(f"{name} has lost the manifest {digest}", repository, digest)
                    continue
                for blob, size in manifest.sizes("config", "layers", "blobs").items():
                    if repository.blobs.size(blob) != size or not self._is_right(repository.blobs, blob):
                        what = f"{name}@{digest} lacks {blob}, {human_bytes(size)}"
                        yield Lack(what, repository, blob, manifest, size)

    def _is_right(self, links: Links, digest: Digest) -> bool:
        return self._store.has_content(links.path(digest), digest)

    # ---- repair

    def _repair(self, damaged: Iterable[tuple[Path, Digest]], lacks: Iterable[Lack]) -> None:
        for _, digest in damaged:
            self._store.is_intact(self._store.docker.path(digest), digest)  # or else that is removed: Docker has it
            self._from_other_copy(digest)
            if all(links.size(digest) is None for links in self._store.owners() if links is not self._store.blobs):
                self._move_away(self._store.blobs.path(digest), digest)
        for lack in lacks:  # manifests first: they may lack blobs
            if lack.manifest is None:
                self._bring(lack)
        for lack in list(self._lacks()):
            if lack.manifest:
                self._bring(lack)

    def _bring(self, lack: Lack) -> None:
        """Get what is lacking from Docker or a registry."""
        repository, manifest = lack.repository, lack.manifest
        try:
            if manifest and not repository.has_blob(lack.digest, lack.size):
                reference = Reference(repository.name, manifest.digest)
                self._registry.mirror.fetch_lost(self._client, reference, manifest, {lack.digest: lack.size})
                self._registry.adopt(reference, manifest, self._client)
                self._tell(f"repaired: {repository.name}@{manifest.digest}")
            elif manifest is None and repository.manifest(lack.digest) is None:
                found = self._registry.mirror.manifest_content(self._client, lack.digest)
                if found:
                    repository.put_manifest(found, ())
                    self._tell(f"repaired: {repository.name}@{lack.digest}, from Docker")
        except RegistryError as e:
            self._tell(f"not available: {lack.what}: {e.detail}")

    def _from_other_copy(self, digest: Digest) -> None:
        """Give all owners the right content, if one of them still has it in a file of its own."""
        for links in self._store.owners():
            if self._store.has_content(links.path(digest), digest):
                with disk_errors(f"repair {digest}"):
                    self._store.add(links.path(digest), digest)
                self._tell(f"repaired: {digest}, from {links.folder}")
                return

    def _move_away(self, path: Path, digest: Digest) -> None:
        """Move damaged content that belongs to nobody to the folder of damaged files."""
        with disk_errors(f"move {path}"):
            self._store.disk.move_away(path, lambda: self._store.disk.status(path) is not None
                                       and not self._store.has_content(path, digest))


# =====================================================================================================================
# 23. Status: what people and monitoring ask this program about itself
# Uses: waiting, activity, transfers, hosted, front.
# =====================================================================================================================


Details = tuple[int, tuple[str, ...]]  # of an image: its size in bytes, compressed if it was pushed, and its platforms


class Status:
    """Gathers the facts about a running registry: for the page, for /status, for /metrics.

    Nothing here waits long for Docker: what it has not said in time is shown as it was before.
    """

    IMAGES = 200        # images that are shown, of those that were pushed and of Docker's each
    PATIENCE = 1.0      # seconds that the page may wait for Docker

    def __init__(self, registry: Front, activity: Activity, address: str):
        """address is where the registry listens."""
        self._registry, self._activity, self._address = registry, activity, address
        self._jobs = Jobs()
        self._images: list[dict[str, Any]] = []         # replaced whole, as the next two
        self._has_more_images = False
        self._engine: dict[str, Any] = {"reachable": False, "problem": "it has not answered yet"}
        self._details: Memory[tuple[str, Digest], Details] = Memory()  # by source and digest

    def _refresh(self, *reads: Callable[[], None]) -> None:
        """Let something be read again, by one job for all who ask, and wait a moment for that."""
        deadline = Deadline(self.PATIENCE)
        for read in reads:
            with contextlib.suppress(RegistryError):
                self._jobs.start(read, read, "at work for the status").outcome(deadline)

    def check_ready(self, deadline: Deadline) -> None:
        """Raise UNAVAILABLE, or what Engine raises, unless Docker answers within a deadline and has the warm list."""
        ask(deadline, lambda _: self._registry.mirror.engine.info())
        missing = self._registry.warming.missing()
        if missing:
            raise RegistryError("UNAVAILABLE", f"Docker is still to pull {some_of(missing)}")

    def document(self) -> dict[str, Any]:
        """All facts, as /status gives them. Sizes are in bytes, times in seconds, or since the epoch as RFC 3339."""
        self._refresh(self._read_engine, self._read_images)
        return {
            "version": __version__, "address": self._address, "names": [*self._registry.names],
            "started": rfc3339(self._activity.started),
            "uptime_seconds": round(time.time() - self._activity.started), "engine": self._engine,
            "store": self._store(), "nodes": [{
                "address": visit.client, "last_request": rfc3339(visit.time), "user_agent": visit.user_agent}
                for visit in self._activity.nodes()],
            "under_way": self.under_way(),
            "ended": [{"kind": task.kind, "what": task.subject, "ended": rfc3339(moment),
                       "seconds": round(task.seconds or 0, 3), "bytes": task.progress()[0], "error": task.error}
                      for moment, task in self._activity.ended_tasks()],
            "images": [{**image, "last_served": self._last_served(image)} for image in self._images],
            "more_images": self._has_more_images,
            "requests": [{"repository": name, "last": [self._visit(visit) for visit in visits]}
                         for name, visits in self._activity.past().items()],
            "errors": [{"message": visit.note, "count": count, "repository": visit.repository,
                        **self._visit(visit)} for count, visit in self._activity.errors()]}

    # ---- the parts

    def _read_engine(self) -> None:
        try:
            images = self._registry.mirror.images.current()
        except RegistryError as e:
            self._engine = {**self._engine, "reachable": False, "problem": e.detail}
            return
        info = images.info
        self._engine = {
            "reachable": True, "problem": images.problem, "name": "Podman" if info.is_podman else "Docker",
            "version": info.version, "api": ".".join(map(str, info.api)), "image_store": info.store,
            "content_from": ["store", *images.sources], "advice": images.advice()}

    def _store(self) -> dict[str, Any]:
        store = self._registry.store
        try:
            free: int | None = store.space.available()
        except RegistryError:
            free = None
        return {"path": str(store.root), "used_bytes": store.space.used, "limit_bytes": store.space.limit,
                "free_bytes": free}

    def under_way(self) -> list[dict[str, Any]]:
        """The facts about all work that is going on now."""
        return [self._task(task, time.monotonic()) for task in self._activity.tasks()]

    def _task(self, task: Task, now: float) -> dict[str, Any]:
        (done, total), rate = task.progress(), task.rate(now)
        left = max(total - done, 0) / rate if total and rate else None
        return {"kind": task.kind, "what": task.subject, "seconds": round(now - task.started, 1),
                "status": task.status, "done_bytes": done, "total_bytes": total or None,
                "bytes_per_second": round(rate), "seconds_left": None if left is None else round(left),
                "parts": [{"name": name, "done_bytes": done, "total_bytes": total or None}
                          for name, (done, total) in task.parts.items()],
                "waiting": self._activity.waiting_for(task.repository) if task.repository else []}

    def _last_served(self, image: Mapping[str, Any]) -> dict[str, Any] | None:
        digest = Digest.parse(image["digest"])
        if image["source"] == "docker":
            digest = self._registry.mirror.images.last_target(digest)
        visit = self._activity.served(str(digest))
        return {"time": rfc3339(visit.time), "to": visit.client} if visit else None

    @staticmethod
    def _visit(visit: Visit) -> dict[str, Any]:
        return {"time": rfc3339(visit.time), "client": visit.client, "method": visit.method, "target": visit.target,
                "status": visit.status, "bytes": visit.size, "seconds": round(visit.seconds, 4)}

    # ---- images

    def _read_images(self) -> None:
        pushed = list(itertools.islice(self._pushed_images(), self.IMAGES + 1))
        try:
            docker = list(itertools.islice(self._docker_images(), self.IMAGES + 1))
        except RegistryError:  # the engine's part of the page says why
            docker = [image for image in self._images if image["source"] == "docker"]
        self._images = [*pushed[:self.IMAGES], *docker[:self.IMAGES]]
        self._has_more_images = len(self._images) < len(pushed) + len(docker)

    def _pushed_images(self) -> Iterator[dict[str, Any]]:
        for name in self._registry.hosted.names():
            repository = self._registry.hosted.repository(name)
            for tag in repository.tags():
                manifest = repository.manifest(tag)
                if manifest:
                    yield self._image(name, tag, "pushed", manifest.digest, functools.partial(
                        self._describe, repository, manifest))

    def _docker_images(self) -> Iterator[dict[str, Any]]:
        for listed in self._registry.mirror.engine.listed():
            for name in listed.tags:
                repository, _, tag = name.rpartition(":")
                if "@" not in repository:  # it has a tag
                    yield self._image(printable(repository), printable(tag), "docker", listed.id, functools.partial(
                        self._inspect, listed.id))

    def _image(self, repository: str, tag: str, source: str, digest: Digest, describe: Callable[[], Details]
               ) -> dict[str, Any]:
        size, platforms = self._details.get((source, digest)) or describe()
        self._details[source, digest] = size, platforms
        return {"repository": repository, "tag": tag, "source": source, "digest": str(digest), "size_bytes": size,
                "platforms": list(platforms)}

    def _inspect(self, image_id: Digest) -> Details:
        image = self._registry.mirror.engine.image(str(image_id))
        return (image.size, (printable(image.platform),)) if image else (0, ())

    def _describe(self, repository: Repository, manifest: Manifest) -> Details:
        """The size and the platforms of a manifest that was pushed. An index has those of its images."""
        children = map(repository.manifest, manifest.platforms())
        images = [child for child in children if child and not child.platforms()] or [manifest]
        platforms = (self._platform(repository, image) for image in images)
        size = sum(size for image in images for size in image.sizes("config", "layers", "blobs").values())
        return size, tuple(platform for platform in platforms if platform)

    @staticmethod
    def _platform(repository: Repository, manifest: Manifest) -> str:
        """The platform that the config of an image says, or nothing: other artifacts have none."""
        for digest in manifest.listed("config"):
            blob = repository.blobs.find(digest)
            if blob and blob.size <= MANIFEST_LIMIT:
                with contextlib.suppress(*MALFORMED_ERRORS):
                    return printable(platform_of(json.loads(read_blob(blob, MANIFEST_LIMIT))), 100)
        return ""

    # ---- metrics

    def metrics(self) -> str:
        """The numbers in Prometheus' text format (prometheus.io/docs/instrumenting/exposition_formats)."""
        self._refresh(self._read_engine)
        activity, engine, store = self._activity, self._engine, self._store()
        name = f"{engine.get('name', '')} {engine.get('version', '')}".strip()
        pulls = sum(task.kind == "pull" for task in activity.tasks())
        with activity.lock:
            metrics = (
                ("info", "gauge", "This program and its engine.", {
                    labelled(version=__version__, engine=name, store=engine.get("image_store", "")): 1}),
                ("engine_up", "gauge", "1 if the engine answers.", {"": int(engine["reachable"])}),
                ("http_requests_total", "counter", "Requests that got an answer.", {
                    labelled(method=method, code=code): count for (method, code), count in activity.requests.items()}),
                ("http_request_duration_seconds", "histogram", "Time from a request to the end of its answer.",
                 histogram(activity.request_seconds)),
                ("response_bytes_total", "counter", "Bytes of the bodies of answers.", {"": activity.response_bytes}),
                ("pulls_total", "counter", "Pulls by the engine that have ended.", {
                    labelled(registry=registry, result=result): count
                    for (registry, result), count in activity.pulls.items()}),
                ("pull_duration_seconds", "histogram", "Duration of pulls by the engine.",
                 histogram(activity.pull_seconds)),
                ("pulls_in_progress", "gauge", "Pulls by the engine now.", {"": pulls}),
                ("store_bytes", "gauge", "The store on the disk.", {
                    labelled(kind=kind): store[f"{kind}_bytes"] for kind in ("used", "free", "limit")
                    if store[f"{kind}_bytes"] is not None}))
        lines = []
        for name, kind, purpose, samples in metrics:
            full = f"k3d_registry_dockerd_{name}"
            lines += [f"# HELP {full} {purpose}", f"# TYPE {full} {kind}",
                      *(f"{full}{sample} {value}" for sample, value in samples.items())]
        return "\n".join([*lines, ""])


def rfc3339(moment: float) -> str:
    """Format a time in seconds since the epoch: 2026-11-27T06:30:00Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))


def labelled(**values: object) -> str:
    """The labels of a sample in Prometheus' text format."""
    return "{" + ",".join(f"{key}={json.dumps(printable(str(value)), ensure_ascii=False)}"
                          for key, value in values.items()) + "}"


def histogram(seconds: Histogram) -> dict[str, float]:
    """The samples of a histogram."""
    counts = itertools.accumulate(seconds.counts.values())
    found: dict[str, float] = {"_bucket" + labelled(le="+Inf" if bound == math.inf else bound): count
                               for bound, count in zip(seconds.counts, counts, strict=True)}
    return {**found, "_sum": seconds.total, "_count": sum(seconds.counts.values())}


# =====================================================================================================================
# 24. Page: the status for people, as HTML and as plain text
# =====================================================================================================================

STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #5c6370; --bar: #0b66c3; --bad: #b3261e; --good: #1a7f37;
  --card: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --soft: #a2abb6; --bar: #58a6ff; --bad: #ff8a80; --good: #56d364;
  --card: #161b22; } body { background: #0d1117; color: #e6edf3; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 70rem; }
h1 { font-size: 1.3rem; margin: 0 0 .2rem; } h2 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p { margin: .2rem 0; } .soft { color: var(--soft); } .bad { color: var(--bad); } .good { color: var(--good); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .7rem .9rem;
  margin: .5rem 0; }
.name { font-weight: 600; overflow-wrap: anywhere; }
progress { width: 100%; height: .6rem; accent-color: var(--bar); display: block; margin: .3rem 0; }
.layers { display: grid; grid-template-columns: minmax(6rem, 10rem) 1fr auto; gap: 0 .6rem; align-items: center;
  font-size: .85rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .88rem; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td { overflow-wrap: anywhere; } code, pre, .code { font: .85rem/1.45 ui-monospace, monospace; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .7rem; overflow-x: auto; }
th[class] { color: inherit; font: inherit; font-weight: 600; }
summary { cursor: pointer; } .word, .number { white-space: nowrap; } .number { text-align: right; }
@media (max-width: 40rem) { .less { display: none; } .layers { grid-template-columns: 7rem 1fr; }
  .layers .number { display: none; } }
"""

# The page is fetched again, and what has changed replaces what is shown. What a person has opened stays open.
SCRIPT = """
const refresh = async () => {
  try {
    const answer = await fetch(location.href, {headers: {Accept: "text/html"}});
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    for (const fresh of page.querySelectorAll("section")) {
      const shown = document.getElementById(fresh.id);
      for (const details of shown.querySelectorAll("details[open]"))
        fresh.querySelector(`details[data-key="${CSS.escape(details.dataset.key)}"]`)?.setAttribute("open", "");
      if (shown.innerHTML !== fresh.innerHTML) shown.innerHTML = fresh.innerHTML;
    }
    document.getElementById("lost").hidden = true;
  } catch {
    document.getElementById("lost").hidden = false;
  }
  setTimeout(refresh, document.hidden ? 5000 : 1000);
};
setTimeout(refresh, 1000);
"""

WELCOME = "No node has asked yet. Is your cluster pointed here?"
MIRRORS_YAML = """\
mirrors:
  "*":
    endpoint:
      - {url}
"""


def page_policy() -> str:
    """The Content-Security-Policy of the page: its own style and script, and nothing else from anywhere."""
    style, script = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (STYLE, SCRIPT))
    return (f"default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


# ---- both forms

Facts = Mapping[str, Any]
Row = tuple[tuple[str, str], ...]  # of a table: the text of each cell, and its classes in STYLE


def head_lines(facts: Facts) -> Row:
    """The engine and the store, and what could be better."""
    engine, store = facts["engine"], facts["store"]
    about = (f"{engine['name']} {engine['version']}, {engine['image_store']} image store; content from: "
             f"{', '.join(engine['content_from'])}" if engine["reachable"] else "Docker cannot be reached")
    limit = "" if store["limit_bytes"] is None else f" of {human_bytes(store['limit_bytes'])}"
    advice = engine.get("advice") or ""
    free = f", {human_bytes(store['free_bytes'])} of the disk are free" if store["free_bytes"] is not None else ""
    return ((about, "good" if engine["reachable"] else "bad"), (engine.get("problem") or "", "bad"),
            (advice[:1].upper() + advice[1:], "soft"),
            (f"Store: {store['path']}, {human_bytes(store['used_bytes'])}{limit} used{free}; "
             f"up for {human_seconds(facts['uptime_seconds'])}", "soft"))


def image_row(image: Facts) -> Row:
    """An image that can be pulled."""
    served = image["last_served"]
    return ((f"{image['repository']}:{image['tag']}", "name"), (image["source"], "word"),
            (human_bytes(image["size_bytes"]), "number"), (", ".join(image["platforms"]), "less"),
            (image["digest"][:19], "less code"), (served["to"] if served else "never", ""),
            (served["time"] if served else "", "less soft"))


def visit_row(visit: Facts) -> Row:
    """A request."""
    return ((visit["method"], ""), (visit["target"][:80], "code"),
            (str(visit["status"]), "bad" if visit["status"] >= 400 else "good"),
            (human_bytes(visit["bytes"]), "number less"), (human_seconds(visit["seconds"]), "number"),
            (visit["client"], ""), (visit["time"], "less soft"))


def error_row(error: Facts) -> Row:
    """What went wrong with requests."""
    times = f" ({error['count']} times)" if error["count"] > 1 else ""
    return ((str(error["status"]), "bad"), (error["message"] + times, ""), (error["client"], "less"),
            (error["time"], "less soft"))


def describe_bytes(part: Facts) -> str:
    """The bytes of a task or a part of it: "4.5 MB of 10.0 MB"."""
    total = f" of {human_bytes(part['total_bytes'])}" if part["total_bytes"] else ""
    return human_bytes(part["done_bytes"]) + total


def describe_progress(task: Facts) -> str:
    """The progress of a task, in a line."""
    left = task["seconds_left"]
    return ", ".join(filter(None, (
        describe_bytes(task), f"{human_bytes(task['bytes_per_second'])}/s",
        None if left is None else f"{human_seconds(left)} left", task["status"])))


# ---- HTML


def as_html(text: str) -> str:
    """Text, which may be from outside, as HTML shows it: what is not printable is escaped, as in the log."""
    return html.escape(printable(text))


def mirrors_for_nodes(facts: Facts, url: str) -> tuple[str, str]:
    """A registries.yaml for the nodes, and what to say about it. url is the one by which the page was asked for."""
    names = names_for_nodes(facts["names"])
    scheme, _, host = url.partition("://")
    note = "" if names else " (the name by which the nodes reach this registry may be another one)"
    mirrors = MIRRORS_YAML.format(url=f"{scheme}://{names[0] if names else host}")
    return mirrors, f"In the registries.yaml of k3d or k3s{note}:"


def count_images(facts: Facts) -> str:
    """How many images are shown, and whether there are more."""
    return f"the first {len(facts['images'])}" if facts["more_images"] else str(len(facts["images"]))


def page_html(facts: Facts, url: str) -> str:
    """The facts of Status as a page for browsers, which know this registry by a URL."""
    images, (mirrors, about) = facts["images"], mirrors_for_nodes(facts, url)
    ended = details_html("ended", f"The last that have ended ({len(facts['ended'])})", (
        ((f"{task['kind']} {task['what']}", "name"),
         (f"failed: {task['error']}", "bad") if task["error"] else ("done", ""),
         (human_bytes(task["bytes"]), "number less"), (human_seconds(task["seconds"]), "number"),
         (task["ended"], "less soft")) for task in facts["ended"]))
    errors = table_html(map(error_row, facts["errors"]), "Status", "What went wrong, and what to do", "For", "Last at")
    requests = "".join(
        details_html(group["repository"], f"{group['repository']}, {group['last'][0]['time']}",
                     map(visit_row, group["last"])) for group in facts["requests"])
    sections = {
        "engine": "".join(f'<p class="{kind}">{as_html(line)}</p>' for line, kind in head_lines(facts) if line),
        "welcome": "" if facts["nodes"] else (
            f"<h2>{WELCOME}</h2><p>{about}</p><pre tabindex=0>{html.escape(mirrors)}</pre>"),
        "under-way": "<h2>Under way</h2>" + ("".join(map(task_html, facts["under_way"])) or (
            "<p class=soft>Nothing is being pulled, fetched or exported.</p>")) + ended,
        "errors": errors and f"<h2>Errors</h2>{errors}",
        "images": f"<h2>Images ({count_images(facts)})</h2>" + (table_html(
            map(image_row, images), "Image", "From", "Size", "Platforms", "Digest", "Last served to", "At")
            or "<p class=soft>There are none.</p>"),
        "requests": f"<h2>Last requests</h2>{requests or '<p class=soft>There were none.</p>'}"}
    body = "".join(f'<section id="{name}" aria-label="{name.replace("-", " ")}">{content}</section>'
                   for name, content in sections.items())
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>k3d-registry-dockerd</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        '<noscript><meta http-equiv="refresh" content="5"></noscript>'
        f"<style>{STYLE}</style></head><body><main><h1>k3d-registry-dockerd "
        f'<span class="soft">{as_html(facts["version"])}</span></h1>'
        "<p>An OCI registry that serves the images of the local Docker daemon, and what is pushed to it. "
        "The same as <a href=/status>JSON</a>.</p>"
        '<p id="lost" class="bad" role="status" hidden>This registry does not answer any more.</p>'
        f"{body}</main><script>{SCRIPT}</script></body></html>")


def task_html(task: Facts) -> str:
    """A task under way, with a bar for all of it and one for each of its parts."""
    parts = task["parts"] if len(task["parts"]) > 1 else ()
    layers = "".join(f"<code>{as_html(part['name'][:12])}</code>{bar_html(part, part['name'])}"
                     f"<span class=number>{describe_bytes(part)}</span>" for part in parts)
    waiting = f"<p class=soft>Waiting: {as_html(', '.join(task['waiting']))}</p>" if task["waiting"] else ""
    return (f"<div class=card><p class=name>{task['kind']} {as_html(task['what'])}</p>"
            f"{bar_html(task, task['what'])}<p class=soft>{as_html(describe_progress(task))}</p>{waiting}"
            f"<div class=layers>{layers}</div></div>")


def bar_html(part: Facts, label: str) -> str:
    """The bar of a task or a part of it; without a value if its size is not known."""
    value = f"max={part['total_bytes']} value={part['done_bytes']}" if part["total_bytes"] else ""
    return f'<progress {value} aria-label="{as_html(label)}"></progress>'


def details_html(key: str, summary: str, rows: Iterable[Row]) -> str:
    """A table that a person may open, or nothing if it has no rows."""
    table = table_html(rows)
    return table and (
        f'<details data-key="{as_html(key)}"><summary>{as_html(summary)}</summary>{table}</details>')


def table_html(rows: Iterable[Row], *headings: str) -> str:
    """A table, or nothing if it has no rows."""
    body, head = "", ""
    for row in rows:
        body += "<tr>" + "".join(f'<td class="{kind}">{as_html(text)}' for text, kind in row)
        head = "".join(f'<th class="{kind}">{heading}' for heading, (_, kind) in zip(headings, row, strict=False))
    return body and f"<div class=wide><table><tr>{head}{body}</table></div>"


# ---- plain text


def page_text(facts: Facts, url: str) -> str:
    """The same for terminals."""
    lines = [f"k3d-registry-dockerd {facts['version']}; its API is under /v2/ (OCI Distribution Specification)",
             *(line for line, _ in head_lines(facts) if line)]
    if not facts["nodes"]:
        mirrors, about = mirrors_for_nodes(facts, url)
        lines += ["", f"{WELCOME} {about}", "", *mirrors.splitlines()]
    if facts["under_way"]:
        lines += ["", "UNDER WAY", *itertools.chain.from_iterable(map(task_lines, facts["under_way"]))]
    last = [((group["repository"], ""), *visit_row(group["last"][0])) for group in facts["requests"]]
    for title, rows in (("ERRORS", [*map(error_row, facts["errors"])]),
                        (f"IMAGES ({count_images(facts)})", [*map(image_row, facts["images"])]),
                        ("LAST REQUESTS", last)):
        if rows:
            lines += ["", title, *("  ".join(text for text, _ in row) for row in rows)]
    return "\n".join([*map(printable, lines), ""])


def task_lines(task: Facts, width: int = 30) -> Iterator[str]:
    """Yield the lines of a task under way, with a bar of so many characters if its size is known."""
    done, total = task["done_bytes"], task["total_bytes"]
    filled = min(width * done // total, width) if total else 0
    bar = f"[{'=' * filled}{' ' * (width - filled)}] " if total else ""
    yield f"{task['kind']} {task['what']}"
    yield f"  {bar}{describe_progress(task)}"
    if task["waiting"]:
        yield f"  waiting: {', '.join(task['waiting'])}"


# =====================================================================================================================
# 25. Requests: HTTP as values
# Uses: configuration, waiting, transfers.
# =====================================================================================================================


@dataclass
class Response:
    """A response as a value: endpoints return it, and only `Handler.reply` writes it to the socket."""

    status: int
    headers: dict[str, str]
    body: bytes | Body = b""
    length: int | None = None  # Content-Length if it is not the length of the body: for HEAD
    note: str = ""             # for the log
    lines: list[tuple[str, str]] = field(default_factory=list)  # headers that may occur several times


TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2
HOST_VALUE = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:%\[\]-]*")  # RFC 3986, 3.2
HEAD_END = re.compile(rb"[^\r\n]\r*\n\r?\n")  # an empty line after others: RFC 9112, 2.2, ignores those before


def parse_head(data: bytes) -> tuple[str, str, str, Message]:
    """Parse the bytes of a request up to the empty line (RFC 9112, 3 and 5): method, target, HTTP/1.x, headers.

    Raises REQUEST_INVALID for everything that another reader of the same bytes might take for something else,
    METHOD_UNKNOWN, VERSION_UNKNOWN and HEAD_TOO_LARGE.
    """
    text = data.decode("latin-1").lstrip("\r\n")
    first, *lines = (line.removesuffix("\r") for line in text.split("\n")[:-2])
    match = re.fullmatch(rf"({TOKEN.pattern}) ([^\0-\x20\x7f]+) (HTTP/[0-9]\.[0-9])", first)
    if not match:
        raise RegistryError("REQUEST_INVALID", "the first line is not METHOD TARGET HTTP/1.1")
    method, target, version = match.groups()
    if not version.startswith("HTTP/1."):
        raise RegistryError("VERSION_UNKNOWN", f"{version}: this is an HTTP/1.1 server")
    if method not in METHODS:
        raise RegistryError("METHOD_UNKNOWN", f"{method} is none of {', '.join(METHODS)}")
    if len(lines) > HEADERS_LIMIT:
        raise RegistryError("HEAD_TOO_LARGE", f"{len(lines)} headers; the limit is {HEADERS_LIMIT}")
    headers = Message()
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not TOKEN.fullmatch(name) or "\r" in value or "\0" in value:
            raise RegistryError("REQUEST_INVALID", "a header line is malformed")
        headers[name] = value.strip(" \t")
    hosts = headers.get_all("Host", [])
    if len(hosts) > 1 or (not hosts and version != "HTTP/1.0") or not all(map(HOST_VALUE.fullmatch, hosts)):
        raise RegistryError("REQUEST_INVALID", "there is not one valid Host header")
    if version == "HTTP/1.0" and "Transfer-Encoding" in headers:
        raise RegistryError("REQUEST_INVALID", "HTTP/1.0 has no Transfer-Encoding")
    return method, target, version, headers


class RequestBody:
    """The body of a request, decoded as it is read (RFC 9112, 6 and 7.1).

    length is in bytes, or None if the body is chunked. Malformed framing raises REQUEST_INVALID: the start of
    the next request is then unknown.
    """

    def __init__(self, headers: Message, stream: io.BufferedReader, invite: Callable[[], None]):
        """invite is called before the first read, because the client may be waiting for 100 Continue."""
        self._stream, self._invite = stream, invite
        self.length = self._parse_length(headers)
        self.at_end = self.length == 0
        self.count = 0  # bytes read so far
        self._patience: float = BODY_PATIENCE  # seconds of waiting that are left; bytes that arrive bring more
        self._pieces = self._decode()  # shared: each reader continues where the last one stopped

    @staticmethod
    def _parse_length(headers: Message) -> int | None:
        lengths, codings = (headers.get_all(name, []) for name in ("Content-Length", "Transfer-Encoding"))
        if codings:
            if lengths or [coding.lower() for coding in codings] != ["chunked"]:
                raise RegistryError("REQUEST_INVALID", "Transfer-Encoding must be chunked, without Content-Length")
            return None
        if len(set(lengths)) > 1 or not all(re.fullmatch(r"[0-9]{1,18}", length) for length in lengths):
            raise RegistryError("REQUEST_INVALID", f"Content-Length: {', '.join(lengths)} is not a valid length")
        return int(lengths[0]) if lengths else 0

    def __iter__(self) -> Iterator[bytes]:
        """Return an iterator over the pieces of the body. It yields all bytes before an error, then raises."""
        return self._pieces

    def _decode(self) -> Iterator[bytes]:
        if self.at_end:
            return
        self._receive(lambda: self._invite() or b"")
        yield from self._gather(self._chunks()) if self.length is None else self._read(self.length)
        self.at_end = True

    @staticmethod
    def _gather(pieces: Iterator[bytes]) -> Iterator[bytes]:
        """Join small pieces: each costs a write to the disk. Measured with chunks of 4 KiB, that is 2.7 times as fast.

        Before an error, what has arrived is yielded.
        """
        gathered = bytearray()
        try:
            for piece in pieces:
                gathered += piece
                if len(gathered) >= PIECE:
                    yield bytes(gathered)
                    gathered.clear()
        except RegistryError:
            if gathered:
                yield bytes(gathered)
            raise
        if gathered:
            yield bytes(gathered)

    def _read(self, count: int) -> Iterator[bytes]:
        while count:
            data = self._receive(functools.partial(self._stream.read1, min(count, PIECE)))
            if not data:
                raise RegistryError("REQUEST_INVALID", f"the body of the request ended {count} bytes too early")
            count -= len(data)
            self.count += len(data)
            yield data

    def _chunks(self) -> Iterator[bytes]:
        while True:
            size = re.fullmatch(rb"([0-9a-fA-F]{1,15})[ \t]*(?:;[^\r\n]*)?\r\n", line := self._line())
            if not size:
                raise RegistryError("REQUEST_INVALID", f"{line[:100]!r} is not a valid chunk size")
            if int(size[1], 16) == 0:
                break
            yield from self._read(int(size[1], 16))
            if self._line() != b"\r\n":
                raise RegistryError("REQUEST_INVALID", "a chunk is longer than its size")
        for _ in range(HEADERS_LIMIT):
            if self._line() == b"\r\n":
                return
        raise RegistryError("REQUEST_INVALID", "too many trailers")

    def _line(self) -> bytes:
        line = b""
        while not line.endswith(b"\n") and len(line) < CHUNK_LINE and (data := self._receive(self._stream.peek)):
            line += self._stream.readline(min(len(data), CHUNK_LINE - len(line)))
        if not line.endswith(b"\r\n"):
            raise RegistryError("REQUEST_INVALID", "a line of the chunked coding is incomplete or too long")
        return line

    def _receive(self, read: Callable[[], bytes]) -> bytes:
        """Return what a call reads from the connection. REQUEST_TIMEOUT for a client that is slower than BODY_RATE.

        Only the time of waiting for the client counts.
        """
        started = time.monotonic()
        try:
            data = read()
        except TimeoutError:
            raise RegistryError("REQUEST_TIMEOUT", "nothing more came of the body") from None
        except OSError as e:
            raise RegistryError("REQUEST_INVALID", f"the body of the request could not be read: {e}") from None
        self._patience += len(data) / BODY_RATE - (time.monotonic() - started)
        self._patience = min(self._patience, BODY_PATIENCE)
        if self._patience < 0:
            raise RegistryError("REQUEST_TIMEOUT", f"the body came at less than {BODY_RATE} bytes per second")
        return data

    def read(self, limit: int) -> bytes | None:
        """Return the whole body, or None if it is longer than limit bytes."""
        if self.length is not None and self.length > limit:
            return None
        data = bytearray()
        for piece in self:
            data += piece
            if len(data) > limit:
                return None
        return bytes(data)

    def discard(self) -> bool:
        """Read the rest of the body, up to BODY_LIMIT bytes. Returns True if that was all of it."""
        before = self.count
        with contextlib.suppress(RegistryError):
            while (self.length or 0) <= BODY_LIMIT and self.count - before <= BODY_LIMIT and next(self._pieces, b""):
                pass
        return self.at_end


@dataclass(frozen=True)
class Request:
    """A parsed request, as the endpoints get it: query values decoded, credentials parsed."""

    method: str
    path: str
    captured: tuple[str, ...]  # the parts of the path captured by the route, the repository first
    query: Mapping[str, list[str]]
    client: Client
    headers: Message
    body: RequestBody

    @property
    def namespace(self) -> str | None:
        """The `ns` parameter, by which clients tell a mirror the image's registry, or None."""
        return self.parameter("ns") or None

    def parameter(self, name: str) -> str | None:
        """Return the last value of a query parameter, or None."""
        return self.query.get(name, [None])[-1]

    def reference(self, parse: Callable[[str, str, str | None], Reference] = Reference.parse) -> Reference:
        """Return what the path names. See Reference.parse and Reference.parse_digest."""
        repository, target = self.captured
        return parse(repository, target, self.namespace)


def parse_credentials(header: str | None) -> Credentials | None:
    """Parse an Authorization header (RFC 7617). Returns None if it is missing.

    Schemes other than Basic are ignored, because Docker cannot use them. Raises REQUEST_INVALID if a
    Basic header is malformed.
    """
    scheme, _, encoded = (header or "").strip().partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        return Credentials(*base64.b64decode(encoded.strip(), validate=True).decode().split(":", 1))
    except (TypeError, ValueError):  # no colon, not base64, not UTF-8
        raise RegistryError("REQUEST_INVALID", "the Authorization header is not valid Basic authentication (RFC 7617)"
                            ) from None


RANGES_LIMIT = 100          # ranges of one request; more are ignored, and the whole content is sent


def parse_ranges(header: str | None, size: int) -> list[tuple[int, int]] | None:
    """Parse a Range header for content of size bytes (RFC 9110, 14.1.2). Returns start and length of each, in bytes.

    Returns None if the whole content is to be sent: the header is missing, malformed, or asks for more bytes than
    there are. Ranges outside of the content are left out. Raises RANGE_INVALID if no other remains, and for a single
    range that ends before its start, as the conformance tests of the distribution specification want.
    """
    match = re.fullmatch(r"(?i)\s*bytes\s*=(.+)", header or "")
    specs = [spec.strip() for spec in match[1].split(",") if spec.strip()] if match else []
    parts = [re.fullmatch(r"(?a)(\d{1,99})-(\d{0,99})|-(\d{1,99})", spec) for spec in specs[:RANGES_LIMIT + 1]]
    if not 0 < len(parts) <= RANGES_LIMIT:
        return None
    found = []
    for part in parts:
        if not part or (len(parts) > 1 and part[2] and int(part[1]) > int(part[2])):
            return None
        start = max(size - int(part[3]), 0) if part[3] else int(part[1])
        end = min(int(part[2]) + 1, size) if part[2] else size
        if start < end:
            found.append((start, end - start))
    if not found:
        raise RegistryError("RANGE_INVALID", f"the content has {size} bytes", {"Content-Range": f"bytes */{size}"})
    return found if sum(length for _, length in found) <= size else None


def content_range(start: int, length: int, size: int) -> str:
    """Return the value of Content-Range for a part of content of size bytes."""
    return f"bytes {start}-{start + length - 1}/{size}"


def multipart(blob: Blob, ranges: list[tuple[int, int]], boundary: str, deadline: Deadline) -> Body:
    """Return several ranges of a blob as the body of multipart/byteranges (RFC 9110, 14.6)."""
    heads = [(f"\r\n--{boundary}\r\nContent-Type: application/octet-stream\r\n"
              f"Content-Range: {content_range(start, length, blob.size)}\r\n\r\n").encode() for start, length in ranges]
    end = f"\r\n--{boundary}--\r\n".encode()

    def parts() -> Generator[Part, None, None]:
        for head, (start, length) in zip(heads, ranges, strict=True):
            yield head
            with contextlib.closing(blob.open(start, length, deadline.unlimited())) as body:
                yield from body.parts
        yield end

    pieces = parts()
    total = sum(map(len, [*heads, end])) + sum(length for _, length in ranges)
    return Body(pieces, total, pieces.close)


def parse_content_range(header: str | None, length: int | None) -> int | None:
    """Parse the Content-Range of an upload's chunk. Returns the start in bytes, or None without the header.

    The spec's form is <start>-<end>, both inclusive. length is that of the body in bytes, or None if unknown.
    Raises BLOB_UPLOAD_INVALID and SIZE_INVALID.
    """
    if header is None:
        return None
    match = re.fullmatch(r"(?:bytes[ =])?(\d{1,18})-(\d{1,18})(?:/(?:\d+|\*))?", header.strip(), re.ASCII)
    start, end = map(int, match.groups()) if match else (1, 0)
    if start > end:
        raise RegistryError("BLOB_UPLOAD_INVALID", f"Content-Range: {header!r} is not <start>-<end>")
    if length not in (None, end - start + 1):
        raise RegistryError("SIZE_INVALID", f"Content-Range: {header} is not a range of {length} bytes")
    return start


def page(request: Request, names: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Return the page of sorted names that `n` and `last` select, and the Link header to the next page.

    No more names are taken than the page needs. See OCI Distribution Spec v1.1, "Listing Tags". REQUEST_INVALID.
    """
    last, count = request.parameter("last"), request.parameter("n")
    rest = (name for name in names if last is None or name > last)
    if count is None:
        return list(rest), {}
    if not re.fullmatch(r"\d{1,9}", count, re.ASCII):
        raise RegistryError("REQUEST_INVALID", f"n={count!r} is not a valid number of entries")
    part = list(itertools.islice(rest, int(count)))
    if not part or next(rest, None) is None:
        return part, {}
    return part, next_page(request, n=count, last=part[-1])


def next_page(request: Request, **parameters: str | None) -> dict[str, str]:
    """Return the Link header to the page that a request with other query parameters gives (RFC 8288)."""
    query = {name: value for name, value in {**parameters, "ns": request.namespace}.items() if value is not None}
    return {"Link": f'<{request.path}?{urllib.parse.urlencode(query)}>; rel="next"'}


def page_of_referrers(request: Request, found: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return the first of some descriptors, and the Link header to the others.

    See OCI Distribution Spec v1.1, "Listing Referrers". A page ends at PAGE_LIMIT bytes, and after EARLY_ANSWER
    seconds: each descriptor costs reading a manifest, also where `artifactType` leaves it out. Annotations that are
    too large for a page of their own are left out.
    """
    wanted, deadline = request.parameter("artifactType"), request.client.deadline.within(EARLY_ANSWER)
    page: list[dict[str, Any]] = []
    size, last = 0, None
    for descriptor in found:
        digest, cost = descriptor["digest"], len(json.dumps(descriptor)) + 2  # with a comma and a space
        if cost > PAGE_LIMIT:
            descriptor = {name: value for name, value in descriptor.items() if name != "annotations"}
            cost = len(json.dumps(descriptor)) + 2
        matches = wanted in (None, descriptor.get("artifactType"))
        if last and ((matches and size + cost > PAGE_LIMIT) or not deadline.left()):
            return page, next_page(request, artifactType=wanted, last=last)
        if matches:
            page.append(descriptor)
            size += cost
        last = digest
    return page, {}


# =====================================================================================================================
# 26. End-points: the distribution specification
# Uses: waiting, writers, hosted, mirror, front, status, page, requests.
# =====================================================================================================================

HTML_TYPE, TEXT_TYPE = "text/html; charset=utf-8", "text/plain; charset=utf-8"
UNCACHED = {"Cache-Control": "no-store"}
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Endpoints:
    """One method for each endpoint of OCI Distribution Spec v1.1, "Endpoints"."""

    def __init__(self, registry: Front, status: Status, scheme: Callable[[], str]):
        """scheme returns http or https, which can change."""
        self._registry, self._status, self._scheme = registry, status, scheme

    # ---- about this program

    def page(self, request: Request) -> Response:
        """GET /: the status for people, as HTML or as plain text."""
        facts = self._status.document()
        url = f"{self._scheme()}://{next(iter(request.client.names), 'localhost:5000')}"
        if "text/html" not in request.client.accept:
            return Response(200, {"Content-Type": TEXT_TYPE, **UNCACHED}, page_text(facts, url).encode())
        return Response(200, {"Content-Type": HTML_TYPE, "Content-Security-Policy": page_policy(), **UNCACHED},
                        page_html(facts, url).encode())

    def status(self, request: Request) -> Response:
        """GET /status: the same facts as JSON. See Status.document."""
        return self._json(self._status.document(), UNCACHED)

    def metrics(self, request: Request) -> Response:
        """GET /metrics: numbers for Prometheus."""
        return Response(200, {"Content-Type": METRICS_TYPE}, self._status.metrics().encode())

    def live(self, request: Request) -> Response:
        """GET /livez and /healthz: this program works."""
        return Response(200, {"Content-Type": TEXT_TYPE}, b"ok\n")

    def ready(self, request: Request) -> Response:
        """GET /readyz: this program can serve Docker's images. UNAVAILABLE."""
        self._status.check_ready(request.client.deadline)
        return self.live(request)

    def not_docker(self, request: Request) -> Response:
        """Paths of the Docker Engine API: somebody takes this for the engine."""
        raise RegistryError("NOT_FOUND", "this is a registry, not Docker: DOCKER_HOST must not point here")

    # ---- the specification

    def version_check(self, request: Request) -> Response:
        """end-1, GET /v2/: confirm that this is a registry."""
        return Response(200, {"Content-Type": "application/json"}, b"{}")

    def blob(self, request: Request) -> Response:
        """end-2, GET and HEAD /v2/<name>/blobs/<digest>: a blob, or the requested range of it."""
        reference, is_head = request.reference(Reference.parse_digest), request.method == "HEAD"
        blob, deadline = self._registry.blob(reference, request.client, is_head), request.client.deadline
        headers = {"Content-Type": "application/octet-stream", "Docker-Content-Digest": str(reference.digest),
                   "Accept-Ranges": "bytes"}
        if is_head:
            return Response(200, headers, length=blob.size)
        # No validator is sent that a client could put into If-Range (RFC 9110, 13.1.5).
        ranges = None if request.headers.get("If-Range") else parse_ranges(request.headers.get("Range"), blob.size)
        if ranges is None:
            return Response(200, headers, blob.open(0, blob.size, deadline))
        if len(ranges) > 1:
            boundary = secrets.token_hex(16)
            headers["Content-Type"] = f"multipart/byteranges; boundary={boundary}"
            return Response(206, headers, multipart(blob, ranges, boundary, deadline))
        start, length = ranges[0]
        headers["Content-Range"] = content_range(start, length, blob.size)
        return Response(206, headers, blob.open(start, length, deadline))

    def manifest(self, request: Request) -> Response:
        """end-3, GET and HEAD /v2/<name>/manifests/<reference>: a manifest by tag or digest."""
        reference = request.reference()
        found = self._registry.manifest(reference, request.client, request.method == "HEAD")
        if isinstance(found, ArrivingManifest):
            return Response(200, {"Content-Type": found.media_type}, found.body())
        return Response(200, {"Content-Type": found.media_type, "Docker-Content-Digest": str(found.digest)}, found.data)

    # ---- uploads

    def begin_upload(self, request: Request) -> Response:
        """end-4a, end-4b, end-11, POST /v2/<name>/blobs/uploads/: begin an upload, push a whole blob, or mount it.

        If a blob cannot be mounted, an upload begins, as the spec requires.
        """
        repository = self._repository(request)
        mount, digest = request.parameter("mount"), request.parameter("digest")
        if mount is not None and self._mount(repository, mount, request.parameter("from"), request.client.deadline):
            return self._created(repository, mount)
        if digest is None or (mount is not None and request.body.length == 0):
            return self._upload_status(202, 0, repository.name, repository.begin_upload())
        self._registry.hosted.push_blob(Reference(repository.name, requested_digest(digest)), request.body.length,
                                        request.body)
        return self._created(repository, digest)

    def _mount(self, repository: Repository, digest: str, source: str | None, deadline: Deadline) -> bool:
        """Mount a blob. Returns False if there is none, or if the digest or the source is invalid, as some clients'."""
        if source is not None and not REPOSITORY.fullmatch(source):
            return False
        try:
            reference = Reference(repository.name, Digest.parse(digest))
        except ValueError:
            return False
        return self._registry.hosted.mount(reference, source, deadline)

    def upload(self, request: Request) -> Response:
        """end-13, GET /v2/<name>/blobs/uploads/<session>: the progress of an upload."""
        size = self._repository(request).upload_size(request.captured[1])
        return self._upload_status(204, size, *request.captured)

    def append_to_upload(self, request: Request) -> Response:
        """end-5, PATCH /v2/<name>/blobs/uploads/<session>: append bytes, with or without Content-Range."""
        with self._repository(request).upload(request.captured[1]) as upload:
            self._receive(request, upload)
            return self._upload_status(202, upload.size, *request.captured)

    def finish_upload(self, request: Request) -> Response:
        """end-6, PUT /v2/<name>/blobs/uploads/<session>?digest=<digest>: append the last bytes, if any, and finish."""
        repository, expected = self._repository(request), requested_digest(request.parameter("digest"))
        with repository.upload(request.captured[1]) as upload:
            self._receive(request, upload)
            upload.keep(repository.blobs, expected)
        return self._created(repository, str(expected))

    def cancel_upload(self, request: Request) -> Response:
        """end-14, DELETE /v2/<name>/blobs/uploads/<session>: cancel an upload."""
        with self._repository(request).upload(request.captured[1]) as upload:
            upload.discard()
        return Response(204, {})

    def _repository(self, request: Request) -> Repository:
        Reference.check_repository(request.captured[0], request.namespace)
        return self._registry.hosted.repository(request.captured[0])

    def _receive(self, request: Request, upload: Upload) -> None:
        """Append the body of a request. Raises RANGE_INVALID if it does not start at the end of the upload."""
        start = parse_content_range(request.headers.get("Content-Range"), request.body.length)
        if start not in (None, upload.size):
            headers = self._upload_status(416, upload.size, *request.captured).headers
            raise RegistryError("RANGE_INVALID", f"the next byte of this upload is {upload.size}, not {start}", headers)
        upload.expect(request.body.length or 0)
        for piece in request.body:
            upload.write(piece)

    @staticmethod
    def _upload_status(status: int, size: int, repository: str, session: str) -> Response:
        """Return the state of an upload. An empty one has the range 0-0, as older clients expect."""
        return Response(status, {"Location": f"/v2/{repository}/blobs/uploads/{session}",
                                 "Docker-Upload-UUID": session, "Range": f"0-{max(size - 1, 0)}"})

    @staticmethod
    def _created(repository: Repository, digest: str) -> Response:
        return Response(201, {"Location": f"/v2/{repository.name}/blobs/{digest}", "Docker-Content-Digest": digest})

    # ---- pushed manifests

    def put_manifest(self, request: Request) -> Response:
        """end-7, PUT /v2/<name>/manifests/<reference>: push a manifest. By digest, `tag` parameters add tags."""
        repository, target = request.captured
        reference = Reference.parse(repository, target, request.namespace, "MANIFEST_INVALID")
        by_digest = isinstance(reference.target, Digest)
        tags = request.query.get("tag", []) if by_digest else [target]
        if len(tags) > TAG_LIMIT:
            raise RegistryError("TOO_MANY_TAGS", f"{len(tags)} tags in one request; the limit is {TAG_LIMIT}")
        for tag in tags:
            if not TAG.fullmatch(tag):
                raise RegistryError("MANIFEST_INVALID", f"{tag!r} is not a tag")
        data = request.body.read(MANIFEST_LIMIT)
        if data is None:
            raise RegistryError("MANIFEST_TOO_LARGE", f"the limit is {MANIFEST_LIMIT} bytes")
        manifest = Hosted.accept_manifest(reference, data, request.headers.get("Content-Type"))
        # The time that the client took to send the manifest does not count.
        client = dataclasses.replace(request.client, deadline=request.client.deadline.unlimited().within(LAST_ANSWER))
        self._registry.put_manifest(reference, manifest, tags, client)
        headers = {"Location": f"/v2/{repository}/manifests/{manifest.digest}",
                   "Docker-Content-Digest": str(manifest.digest)}
        if manifest.subject:
            headers["OCI-Subject"] = str(manifest.subject)
        return Response(201, headers, lines=[("OCI-Tag", tag) for tag in tags if by_digest])

    def delete_manifest(self, request: Request) -> Response:
        """end-9, DELETE /v2/<name>/manifests/<reference>: delete a tag, or a manifest and all its tags."""
        self._registry.delete_manifest(request.reference(), request.client)
        return Response(202, {})

    def delete_blob(self, request: Request) -> Response:
        """end-10, DELETE /v2/<name>/blobs/<digest>: delete a blob."""
        self._registry.delete_blob(request.reference(Reference.parse_digest), request.client)
        return Response(202, {})

    # ---- lists

    def tags(self, request: Request) -> Response:
        """end-8, GET /v2/<name>/tags/list: the tags, in pages on request."""
        reference = Reference.parse(request.captured[0], "latest", request.namespace)
        names, headers = page(request, self._registry.tags(reference, request.client, request.parameter("last") or ""))
        return self._json({"name": reference.repository, "tags": names}, headers)

    def catalog(self, request: Request) -> Response:
        """GET /v2/_catalog: the repositories, in pages on request (not in the OCI spec, but in its predecessor)."""
        names, headers = page(request, self._registry.catalog(request.client))
        return self._json({"repositories": names}, headers)

    def referrers(self, request: Request) -> Response:
        """end-12, GET /v2/<name>/referrers/<digest>: an index of the manifests with this subject, in pages."""
        reference = request.reference(Reference.parse_digest)
        found = self._registry.referrers(reference, request.client, request.parameter("last") or "")
        descriptors, headers = page_of_referrers(request, found)
        if request.parameter("artifactType") is not None:
            headers["OCI-Filters-Applied"] = "artifactType"
        return self._json({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": descriptors},
                          {"Content-Type": OCI_INDEX, **headers})

    @staticmethod
    def _json(document: Mapping[str, Any], headers: Mapping[str, str]) -> Response:
        return Response(200, {"Content-Type": "application/json", **headers}, json.dumps(document).encode())


Endpoint = Callable[[Endpoints, Request], Response]

# Method, path, endpoint. Repository names may contain slashes, so the last keyword in a path decides.
ROUTES: tuple[tuple[str, re.Pattern[str], Endpoint], ...] = tuple(
    (method, re.compile(path, re.DOTALL), endpoint) for method, path, endpoint in (
        ("GET", r"/", Endpoints.page),
        ("GET", r"/status", Endpoints.status),
        ("GET", r"/metrics", Endpoints.metrics),
        ("GET", r"/livez|/healthz", Endpoints.live),
        ("GET", r"/readyz", Endpoints.ready),
        *((method, r"/(?:v1\.\d+/)?(?:_ping|version|info|events|(?:images|containers|build|auth)(?:/.*)?)",
           Endpoints.not_docker) for method in ("GET", "POST")),
        ("GET", r"/v2/?", Endpoints.version_check),
        ("GET", r"/v2/_catalog", Endpoints.catalog),
        ("GET", r"/v2/(.+)/blobs/([^/]+)", Endpoints.blob),
        ("DELETE", r"/v2/(.+)/blobs/([^/]+)", Endpoints.delete_blob),
        ("POST", r"/v2/(.+)/blobs/uploads/?", Endpoints.begin_upload),
        ("GET", r"/v2/(.+)/blobs/uploads/([^/]+)", Endpoints.upload),
        ("PATCH", r"/v2/(.+)/blobs/uploads/([^/]+)", Endpoints.append_to_upload),
        ("PUT", r"/v2/(.+)/blobs/uploads/([^/]+)", Endpoints.finish_upload),
        ("DELETE", r"/v2/(.+)/blobs/uploads/([^/]+)", Endpoints.cancel_upload),
        ("GET", r"/v2/(.+)/manifests/([^/]+)", Endpoints.manifest),
        ("PUT", r"/v2/(.+)/manifests/([^/]+)", Endpoints.put_manifest),
        ("DELETE", r"/v2/(.+)/manifests/([^/]+)", Endpoints.delete_manifest),
        ("GET", r"/v2/(.+)/tags/list", Endpoints.tags),
        ("GET", r"/v2/(.+)/referrers/([^/]+)", Endpoints.referrers),
    ))


def find_route(method: str, path: str) -> tuple[Endpoint, tuple[str, ...]]:
    """Return the endpoint for a request, and the captured parts of its path.

    HEAD uses the route of GET if it has none of its own. Raises NOT_FOUND if no route matches the path, and
    UNSUPPORTED with an Allow header if only routes for other methods do.
    """
    matches = {name: (endpoint, match.groups()) for name, pattern, endpoint in ROUTES
               if (match := pattern.fullmatch(path))}
    if "GET" in matches:
        matches.setdefault("HEAD", matches["GET"])
    if not matches:
        raise RegistryError("NOT_FOUND", f"no endpoint matches {path}")
    if method not in matches:
        raise RegistryError("UNSUPPORTED", f"{method} is not supported here", {"Allow": ", ".join(sorted(matches))})
    return matches[method]


# =====================================================================================================================
# 27. Admission: who may do what, and how many at a time
# Uses: waiting, requests.
# =====================================================================================================================


@dataclass(frozen=True)
class Policy:
    """Who may do what, as the settings say. Decides which pushes and deletions are allowed."""

    read_only: bool = False
    deletes: bool = True
    origins: frozenset[str] = frozenset()       # of web pages that may use this registry
    headers: tuple[tuple[str, str], ...] = ()   # sent with each response that does not have them
    max_connections: int | None = None

    def check(self, method: str, namespace: str | None, client: Client) -> None:
        """Raise UNSUPPORTED if a request that changes something is not allowed in this namespace."""
        if namespace and not names_us(namespace, client.names):
            raise RegistryError("UNSUPPORTED", f"images of {namespace} can be pulled through this registry, but not "
                                               "pushed or deleted")
        if self.read_only:
            raise RegistryError("UNSUPPORTED", "this registry is read-only: it was started with -read-only")
        if method == "DELETE" and not self.deletes:
            raise RegistryError("UNSUPPORTED", "deletion is disabled by REGISTRY_STORAGE_DELETE_ENABLED=false")


def origin_of(url: str) -> str | None:
    """Return the origin of a URL as browsers write it, http://host:port without a default port (RFC 6454), or None."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    if not host or parts.scheme not in ("http", "https"):
        return None
    name = f"[{host}]" if ":" in host else host
    default = 80 if parts.scheme == "http" else 443
    return f"{parts.scheme}://{name}" + (f":{port}" if port not in (None, default) else "")


@dataclass(frozen=True)
class Browsers:
    """Decides which web pages may use this registry, by way of the browser of somebody who can reach it.

    A browser sends requests to its own machine and network for any page. Allowed are addresses that somebody opens by
    hand, and pages of the allowed origins. The name of a server that is not allowed may have been made to resolve to
    this machine (DNS rebinding): a browser then takes its page for one of this registry, and only Host tells. Other
    clients are not affected.

    A page may hide where it comes from, if the browser does not take this registry's address for a trustworthy one (an
    IP address without TLS). It cannot read the answer then, and no request of a browser has Docker pull.
    """

    scheme: str = "http"
    allowed: frozenset[str] = frozenset()  # origins

    HEADERS: ClassVar[Mapping[str, str]] = {  # on every response: nothing that was pushed runs in a browser
        "X-Content-Type-Options": "nosniff", "Content-Security-Policy": "sandbox; default-src 'none'"}
    RESERVED: ClassVar[frozenset[str]] = frozenset({  # headers that nobody may add
        *HEADERS, "Accept-Ranges", "Allow", "Connection", "Content-Encoding", "Content-Length", "Content-Range",
        "Content-Type", "Date", "Etag", "Link", "Location", "Range", "Server", "Trailer", "Transfer-Encoding",
        "Upgrade", "Vary", "Www-Authenticate"})
    EXPOSED: ClassVar[str] = ("Content-Range, Docker-Content-Digest, Docker-Distribution-API-Version, "
                              "Docker-Upload-UUID, Link, Location, OCI-Filters-Applied, OCI-Namespace, OCI-Subject, "
                              "OCI-Tag, Range, WWW-Authenticate")
    ACCEPTED: ClassVar[str] = "Accept, Authorization, Content-Range, Content-Type, Range"

    @staticmethod
    def is_browser(headers: Message) -> bool:
        """True if a request with these headers comes from a browser."""
        signs = ("origin", "referer", "accept-language")
        return "Mozilla/" in headers.get("User-Agent", "") or any(
            name in signs or name.startswith("sec-fetch-") for name in map(str.lower, headers.keys()))

    def check(self, headers: Message) -> None:
        """Raise DENIED if a page sends a request that it may not send, whatever the method."""
        if not self.is_browser(headers):
            return
        pages = {origin_of(url) for url in (*headers.get_all("Origin", []), *headers.get_all("Referer", []))}
        if pages and pages <= self.allowed:
            return
        host = headers.get("Host", "")
        own = origin_of(f"{self.scheme}://{host}")
        if own not in self.allowed and not self._is_local(own):
            raise RegistryError("DENIED", f"browsers may not use this registry as {host!r}: use localhost or an IP "
                                          "address, or start it with -allow-origin")
        if not pages <= {own} or headers.get("Sec-Fetch-Site") not in (None, "same-origin", "none"):
            page = next(iter(pages - {own}), None) or "another site"
            raise RegistryError("DENIED", f"a page of {page} may not use this registry, unless it is started with "
                                          "-allow-origin")

    @staticmethod
    def _is_local(origin: str | None) -> bool:
        """True if the host of an origin is an IP address, or a name that no public server has."""
        host = urllib.parse.urlsplit(origin or "").hostname or "."
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return "." not in host or host.endswith(".localhost")
        return True

    def response_headers(self, headers: Message) -> dict[str, str]:
        """Return the headers that browsers need, for a response of any status."""
        found, origin = dict(self.HEADERS), origin_of(headers.get("Origin", ""))
        if self.allowed:
            found["Vary"] = "Origin"
        if origin and origin in self.allowed:
            found |= {"Access-Control-Allow-Origin": origin, "Access-Control-Expose-Headers": self.EXPOSED}
        return found

    def preflight(self, method: str, headers: Message) -> Response | None:
        """Return the answer to a CORS-preflight request (fetch.spec.whatwg.org), or None if it is none.

        The permission itself is in response_headers.
        """
        if method != "OPTIONS" or "Access-Control-Request-Method" not in headers or not self.allowed:
            return None
        return Response(204, {"Access-Control-Allow-Methods": ", ".join(METHODS), "Access-Control-Max-Age": "600",
                              "Access-Control-Allow-Headers": self.ACCEPTED})


class Connections:
    """The open connections of clients. Those that wait for a request are idle.

    When no more can be opened, new ones wait in the queue of the operating system. The connection that has been idle
    for longest is closed for them, so connections that do nothing keep nobody out.
    """

    LINE_INTERVAL = 10  # seconds between two lines in the log
    PAUSE = 0.1         # seconds until the server tries again, if no connection ends before

    def __init__(self) -> None:
        self._limit = CONNECTIONS_LIMIT
        self._change = threading.Condition()  # guards the two that follow
        self._open: set[socket.socket] = set()
        self._idle = collections.OrderedDict[socket.socket, None]()  # in the order in which they became idle
        self._next_line = 0.0  # used by the thread that accepts connections

    def set_limit(self, wanted: int | None) -> None:
        """Let as many connections be open as are wanted, if there are descriptors for them.

        This process gets more descriptors before, if the system allows it.
        """
        soft, hard = (DESCRIPTORS_LIMIT if limit == resource.RLIM_INFINITY else limit
                      for limit in resource.getrlimit(resource.RLIMIT_NOFILE))
        if soft < min(hard, DESCRIPTORS_LIMIT):
            with contextlib.suppress(OSError, ValueError):  # macOS has another limit besides
                resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, DESCRIPTORS_LIMIT), hard))
                soft = min(hard, DESCRIPTORS_LIMIT)
        self._limit = min(wanted or CONNECTIONS_LIMIT, max(soft // DESCRIPTORS_EACH, 1))
        if wanted and self._limit < wanted:
            log.warning("-max-connections is %d and not %d: this process may have only %d descriptors", self._limit,
                        wanted, soft)

    def remove(self, connection: socket.socket) -> None:
        """The connection has ended."""
        with self._change:
            self._open.discard(connection)
            self._idle.pop(connection, None)
            self._change.notify_all()

    def set_idle(self, connection: socket.socket) -> None:
        """The connection, which may be a new one, waits for a request."""
        with self._change:
            self._open.add(connection)
            self._idle.setdefault(connection)
            self._change.notify_all()

    def set_busy(self, connection: socket.socket) -> None:
        """The connection has a request."""
        with self._change:
            self._idle.pop(connection, None)

    def check_limit(self) -> None:
        """Raise OSError, after some time, if no more connections may be opened."""
        if len(self._open) >= self._limit:  # no lock is needed: only the caller's thread adds connections
            self.make_room(f"{self._limit} are open (-max-connections)")
            raise OSError(errno.EAGAIN, "too many connections")

    def make_room(self, why: str) -> None:
        """Close the connection that has been idle for longest, and wait a moment for one to end."""
        now = time.monotonic()
        if now >= self._next_line:
            self._next_line = now + self.LINE_INTERVAL
            log.warning("new connections have to wait: %s", why)
        with self._change:
            if self._idle:
                # What has arrived is still read. Not SSLSocket.shutdown: what is written then is not encrypted.
                with contextlib.suppress(OSError):  # the client has closed it
                    socket.socket.shutdown(self._idle.popitem(last=False)[0], socket.SHUT_RD)
            count = len(self._open)
            self._change.wait_for(lambda: len(self._open) < count, self.PAUSE)

    def finish_requests(self, seconds: float) -> None:
        """Wait until all connections are idle, at most for some seconds."""
        with self._change:
            if not self._change.wait_for(lambda: len(self._open) == len(self._idle), seconds):
                log.warning("%d requests were aborted", len(self._open) - len(self._idle))


# =====================================================================================================================
# 28. Server: HTTP on a socket
# Uses: waiting, activity, transfers, front, status, requests, end-points, admission.
# =====================================================================================================================


PROBE_PATHS = ("/livez", "/readyz", "/healthz")  # asked every few seconds, so not logged above debug
CHECK_AGENT = "k3d-registry-dockerd-check"       # the User-Agent of our own health check, the same


class Handler(BaseHTTPRequestHandler):
    """Handles one client connection, one request after the other.

    http.server writes the head of a response; reading requests is not left to it, because it is lenient and has no
    limit on the whole head.
    """

    server: Server
    rfile: io.BufferedReader
    protocol_version = "HTTP/1.1"
    request_version = "HTTP/1.1"            # even garbage, like a TLS handshake, gets an HTTP answer
    server_version = f"k3d-registry-dockerd/{__version__}"
    disable_nagle_algorithm = True
    rbufsize = 64 * KIB                     # many chunks of the chunked coding are read at once
    wbufsize = 64 * KIB                     # headers and a small body are sent in one packet
    timeout = IDLE_TIMEOUT

    @property
    def is_http_1_0(self) -> bool:
        """True if the client knows neither chunks nor 100 Continue. Its connection serves one request."""
        return self.request_version == "HTTP/1.0"

    @property
    def _shown_target(self) -> str:
        """The target of the request for the log, without what may be a password: http://user:password@host/."""
        return printable(re.sub(r"//[^/?#]*@", "//", self.path))

    def handle_one_request(self) -> None:
        """Wait for a request and answer it. Until its headers are there, the connection is idle."""
        self.server.connections.set_idle(self.connection)
        self.command, self.path, self.headers = "-", "", Message()
        self.close_connection = True  # unless the request is read to its end
        try:
            if self.rfile.peek():
                self._handle(time.monotonic())
        except OSError as e:
            log.debug("%s: %s", self.client_address[0], e)

    def _handle(self, started: float) -> None:
        """Answer a request. Does not raise: every exception becomes a response."""
        body = None
        self._visit = Visit(time.time(), self.client_address[0], "-")
        try:
            data = self._read_head()
            self.server.connections.set_busy(self.connection)
            self.command, self.path, self.request_version, self.headers = parse_head(data)
            options = ",".join(self.headers.get_all("Connection", [])).lower().split(",")
            self.close_connection = self.is_http_1_0 or "close" in map(str.strip, options)
            body = RequestBody(self.headers, self.rfile, self._invite_body)
            response = self._respond(body)
            response.note = f"received {human_bytes(body.count)}" if body.count else ""
        except ClientGone:
            self.close_connection = True
            self._log(Response(499, {}), 0, started, "the client went away before the answer")  # nginx's status for it
            return
        except RegistryError as e:
            response = self._error_response(e)
        except Exception as e:  # last resort: this client gets an answer, and the others are not affected
            log.exception("%s %s: a bug in this program", self.command, self._shown_target)
            response = self._error_response(RegistryError("UNKNOWN", f"{type(e).__name__}, see the log"))
        self._keep_in_step(body)
        self.reply(response, started)

    def _read_head(self) -> bytes:
        """Return the first line and the headers of a request, within HEAD_LIMIT bytes and HEAD_TIMEOUT seconds."""
        data, deadline = bytearray(), Deadline(HEAD_TIMEOUT)
        while True:
            self.connection.settimeout(max(deadline.left(), 0.001))
            try:
                piece, known = self.rfile.peek(), len(data)
            except TimeoutError:
                raise RegistryError("REQUEST_TIMEOUT", f"the headers did not come within {HEAD_TIMEOUT} s") from None
            except OSError:
                raise ClientGone from None
            finally:
                self.connection.settimeout(self.timeout)
            data += piece
            end = HEAD_END.search(data, max(known - 4, 0))
            del data[end.end() if end else len(data):]
            self.rfile.read(len(data) - known)
            first_line, *others = data[:KIB].decode("latin-1").lstrip("\r\n").split("\n")
            self.path = first_line.rstrip("\r")  # for the log
            if not piece or (first_line and not TOKEN.match(first_line)):  # a TLS handshake has no end of a line
                raise RegistryError("REQUEST_INVALID", "this is not HTTP/1.1, or ends within its headers")
            if len(data) > HEAD_LIMIT:
                code = "HEAD_TOO_LARGE" if others else "TARGET_TOO_LONG"
                raise RegistryError(code, f"the limit is {HEAD_LIMIT} bytes")
            if end:
                return bytes(data)

    def _keep_in_step(self, body: RequestBody | None) -> None:
        """Read the rest of the body, or close the connection: it would be parsed as the next request."""
        if body is None or (self.headers.get("Expect") and not body.at_end) or not body.discard():
            self.close_connection = True  # with Expect, the client waits for a 100 Continue that is never sent

    def _respond(self, body: RequestBody) -> Response:
        self.server.browsers.check(self.headers)
        if preflight := self.server.browsers.preflight(self.command, self.headers):
            return preflight
        try:  # a path may begin with two slashes, which would be a host's (RFC 9112, 3.2.1)
            url = urllib.parse.urlsplit(f"http://-{self.path}" if self.path.startswith("/") else self.path)
        except ValueError as e:
            raise RegistryError("REQUEST_INVALID", f"the request target is malformed: {e}") from None
        path = urllib.parse.unquote(url.path)
        endpoint, captured = find_route(self.command, path)
        host = self.headers.get("Host")
        client = Client(((host,) if host and is_host(host) else ()) + self.server.registry.names,
                        parse_credentials(self.headers.get("Authorization")), Deadline(LAST_ANSWER, self.connection),
                        self.headers.get("User-Agent", ""), ",".join(self.headers.get_all("Accept", [])),
                        not self.server.browsers.is_browser(self.headers))
        query = urllib.parse.parse_qs(url.query, keep_blank_values=True)
        request = Request(self.command, path, captured, query, client, self.headers, body)
        Reference.check_namespace(request.namespace)
        if self.command not in ("GET", "HEAD"):
            self.server.policy.check(self.command, request.namespace, client)
        self._begin_visit(request)
        response = endpoint(self.server.endpoints, request)
        if request.namespace:
            response.headers["OCI-Namespace"] = request.namespace
        return response

    def _begin_visit(self, request: Request) -> None:
        """Let people see that a request is under way."""
        repository, *target = request.captured or ("",)
        namespace = request.namespace if request.namespace not in request.client.names else None
        self._visit = dataclasses.replace(
            self._visit, method=request.method, user_agent=printable(request.client.user_agent, 100),
            repository=printable(f"{namespace}/{repository}" if namespace else repository, 300),
            target=printable("/".join(target), 200),
            is_node=request.namespace is not None or request.client.is_about_to_pull())
        self.server.activity.begin(self._visit)

    def _invite_body(self) -> None:
        """Send 100 Continue if the client waits for it (RFC 9110, 10.1.1)."""
        if self.headers.get("Expect", "").lower() == "100-continue" and not self.is_http_1_0:
            self.send_response_only(100)
            self.end_headers()
            self.wfile.flush()

    def _error_response(self, error: RegistryError) -> Response:
        return Response(error.status, {"Content-Type": "application/json", **error.headers},
                        error.body(self.server.named), note=f"{error.code}: {error.detail}")

    def version_string(self) -> str:
        """Return the Server header, without Python's version."""
        return self.server_version

    # ---- writing

    def reply(self, response: Response, started: float) -> None:
        """Write a response to the socket, and one line to the log."""
        body, length, sent, problem = response.body, response.length, 0, ""
        if length is None:
            length = len(body) if isinstance(body, bytes) else body.length
        try:
            self._write_head(response, length)
            if self.command != "HEAD":
                for count in self._write_body(body):
                    sent += count
                if sent < (length or 0):
                    raise RegistryError("ENGINE_FAILED", "the content ended early")
            self.wfile.flush()
        except (ConnectionError, TimeoutError, ssl.SSLError, ClientGone) as e:
            problem = f"the client went away: {e or 'it closed the connection'}"
        except (OSError, RegistryError) as e:  # such as an error of the disk
            problem = f"closed early: {e}"
        except Exception as e:  # last resort, as in _handle
            log.exception("%s %s: a bug in this program", self.command, self._shown_target)
            problem = f"closed early: {type(e).__name__}"
        finally:
            if not isinstance(body, bytes):
                body.close()
        if problem:
            self.close_connection = True
            self.connection.settimeout(0)  # finish() does not wait again for a client that reads nothing
        self._log(response, sent, started, problem or response.note)

    def _write_head(self, response: Response, length: int | None) -> None:
        self.send_response(response.status)
        own = {**self.server.browsers.response_headers(self.headers), **response.headers}
        known = {name.lower() for name in own}
        for name, value in (*own.items(), *response.lines,
                            *(line for line in self.server.policy.headers if line[0].lower() not in known)):
            self.send_header(name, value)
        if length is None and self.is_http_1_0:
            self.close_connection = True  # this is the end of the body
        elif length is None and self.command != "HEAD":
            self.send_header("Transfer-Encoding", "chunked")
        elif length is not None and response.status != 204:  # RFC 9110, 8.6
            self.send_header("Content-Length", str(length))
        self.send_header("Docker-Distribution-API-Version", "registry/2.0")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def _write_body(self, body: bytes | Body) -> Iterator[int]:
        """Write a body, and yield the number of bytes of each piece."""
        if isinstance(body, bytes):
            self.wfile.write(body)
            yield len(body)
            return
        self.connection.settimeout(STALL_TIMEOUT)
        chunked = body.length is None and not self.is_http_1_0
        self.wfile.flush()  # the first part may take long
        for part in body.parts:
            if isinstance(part, FileSlice):
                yield from self._send_file(part)
                continue
            self.wfile.write(part if not chunked else b"%x\r\n%s\r\n" % (len(part), part))
            yield len(part)
        if chunked:
            self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()
        self.connection.settimeout(self.timeout)

    def _send_file(self, part: FileSlice) -> Iterator[int]:
        self.wfile.flush()
        if isinstance(self.connection, ssl.SSLSocket):  # its sendfile would move the position of the shared file
            for data in part:
                self.connection.sendall(data)
                yield len(data)
            return
        end = part.start + part.length
        for start in range(part.start, end, SENDFILE_STEP):
            yield self.connection.sendfile(part.file, start, min(SENDFILE_STEP, end - start))

    # ---- the log

    def _log(self, response: Response, sent: int, started: float, note: str) -> None:
        """Log a request: method, path, status, bytes of the body, time, client, and what went wrong."""
        status, seconds = response.status, time.monotonic() - started
        level = logging.INFO if status < 400 else logging.WARNING if status < 500 else logging.ERROR
        if self.command == "HEAD" and status == 404:
            level = logging.INFO  # normal: clients ask before each push
        if self.path.partition("?")[0] in PROBE_PATHS or self.headers.get("User-Agent", "").startswith(CHECK_AGENT):
            level = logging.DEBUG
        if self.path.startswith("\x16\x03"):
            level, note = logging.DEBUG, "a TLS handshake on a port without TLS"
        visit = self._visit
        visit.status, visit.size, visit.seconds, visit.note = status, sent, seconds, printable(note, 500)
        if "/manifests/" in self.path:
            visit.digest = response.headers.get("Docker-Content-Digest", "")
        self.server.activity.end(visit)
        log.log(level, "%s %s %d %s %s %s%s", self.command, self._shown_target, status, human_bytes(sent),
                human_seconds(seconds), self.client_address[0], note and f" - {printable(note)}")

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Called by send_response. Does nothing, because `_log` logs the request."""


@dataclass(frozen=True)
class Address:
    """An address to listen on. An empty host means all interfaces, port 0 means any free port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Parse HOST:PORT, :PORT or [IPV6]:PORT, like the official registry image. Raises ValueError."""
        match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:/\s]*):([0-9]{1,5})", text)
        if not match or int(match[2]) > 65535:
            raise ValueError("is not an address: use HOST:PORT, :PORT or [::1]:PORT")
        host = match[1]
        if host.startswith("["):
            host = str(ipaddress.IPv6Address(host[1:-1]))
        return cls(host, int(match[2]))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Server(ThreadingHTTPServer):
    """The HTTP server of the registry, with one thread per connection."""

    request_queue_size = LISTEN_BACKLOG
    daemon_threads = True       # a running download must not keep the process alive
    block_on_close = False

    def __init__(self, address: Address, registry: Front, policy: Policy = Policy(),
                 tls: ssl.SSLContext | None = None, named: Callable[[str], str] = str,
                 activity: Activity | None = None):
        """Bind the address. Raises OSError. Serve with serve_forever, end with shutdown and server_close.

        With a tls context, all connections must use TLS. named puts the engine's name in texts for clients.
        """
        self.registry, self.named = registry, named
        self.connections, self.activity = Connections(), activity or Activity()
        self.change(policy, tls)
        self._all_interfaces = address.host == "" and socket.has_dualstack_ipv6()
        if self._all_interfaces or ":" in address.host:
            self.address_family = socket.AF_INET6
        super().__init__((address.host, address.port), Handler)
        self.status = Status(registry, self.activity, str(self.address))
        self.endpoints = Endpoints(registry, self.status, lambda: self.browsers.scheme)

    def change(self, policy: Policy, tls: ssl.SSLContext | None) -> None:
        """Apply a policy from the next request on, and what __init__ says of tls from the next connection on."""
        self._tls = tls
        self.policy, self.browsers = policy, Browsers("https" if tls else "http", policy.origins)
        self.connections.set_limit(policy.max_connections)

    def server_bind(self) -> None:
        """Bind IPv6 and IPv4 if on all interfaces. Unlike the inherited version, does not look up the host's name."""
        if self._all_interfaces:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection. The TLS handshake happens in its own thread, at the first read.

        Raises OSError if there is none, or no room for it. Then serve_forever tries again.
        """
        self.connections.check_limit()
        try:
            connection, address = super().get_request()
        except OSError as e:
            if e.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self.connections.make_room(e.strerror or str(e))
            raise
        if address[0].startswith("::ffff:") and "." in address[0]:  # an IPv4 client, as an IPv6 socket shows it
            address = (address[0][len("::ffff:"):], address[1])
        if tls := self._tls:  # which change() may replace meanwhile
            connection.settimeout(IDLE_TIMEOUT)
            connection = tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        self.connections.set_idle(connection)
        return connection, address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start the thread of a connection. Without one the connection is closed."""
        try:
            super().process_request(request, client_address)
        except RuntimeError as e:
            self.shutdown_request(request)
            self.connections.make_room(str(e))

    def close_request(self, request: Any) -> None:
        """Close a connection; called once for each."""
        super().close_request(request)
        self.connections.remove(request)

    @property
    def address(self) -> Address:
        """The address that the server listens on, with the actual port instead of 0."""
        return Address(str(self.server_address[0]), int(self.server_address[1]))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log an error outside of a request: a lost connection in one line, a bug with its traceback."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            log.debug("%s: %s", client_address[0], error)
        else:
            log.error("%s: a bug in this program", client_address[0], exc_info=error)


# =====================================================================================================================
# 29. Configurations: how others are told to use this registry
# Uses: configuration, page.
# =====================================================================================================================


class Place:
    """Where this registry is, as others reach it: HOST:PORT."""

    def __init__(self, address: str, names: Iterable[str], engine: EngineHost, root: Path, scheme: str = "http"):
        """address is where it answers on its own machine, or in its container.

        names are those by which Docker knows the registry: published ports, then the names on its networks. Without
        the latter, it runs on this machine itself, and k3d's nodes reach that as host.k3d.internal, unless it listens
        on another address only. root is Docker's data folder.
        """
        published, inside = list[str](), list[str]()
        for name in names:
            (published if is_address(name) else inside).append(name)
        here = f"localhost:{address.rpartition(':')[2]}" if is_loopback(address) else address
        self.local = published[0] if published else here  # from this machine
        self.port = self.local.rpartition(":")[2]
        self.is_anywhere = is_loopback(self.local)  # not on one address of this machine only
        # From the nodes of a cluster in Docker.
        self.nodes = inside[0] if inside else f"host.k3d.internal:{self.port}" if self.is_anywhere else self.local
        self.container = inside[0].rpartition(":")[0] if inside else None  # the name of its container, if it has one
        self.engine, self.root, self.scheme = engine, root, scheme


# {hosts} is a hosts.toml for all registries. It names no server: what is not here, nodes get from its own registry.
HOSTS_TOML = """\
[host."{scheme}://{address}"]
  capabilities = ["pull", "resolve"]
  dial_timeout = "1s"
"""

K3D = """\
# k3d.yaml, for: k3d cluster create demo --config k3d.yaml (tried by hand)
apiVersion: k3d.io/v1alpha5
kind: Simple
registries:{use}
  config: |
    mirrors:
      "*":
        endpoint:
          - {url}
"""

K3S = """\
# /etc/rancher/k3s/registries.yaml on each node; then restart k3s (not tried with k3s itself)
""" + MIRRORS_YAML

CONTAINERD_HOSTS = """\
# /etc/containerd/certs.d/_default/hosts.toml. In config.toml, config_path has to be "/etc/containerd/certs.d".
{hosts}"""

KIND = """\
#!/bin/sh
# Lets the nodes of a kind cluster use this registry. Usage: sh kind.sh [CLUSTER]
set -eu
cluster=${{1:-kind}}
{connect}
for node in $(kind get nodes --name "$cluster"); do
    docker exec "$node" mkdir -p /etc/containerd/certs.d/_default
    docker exec -i "$node" sh -c 'cat > /etc/containerd/certs.d/_default/hosts.toml' <<EOF
{hosts}EOF
done
# So that tools find it: KEP-1755.
kubectl --context "kind-$cluster" apply -f - <<EOF
apiVersion: v1
kind: ConfigMap
metadata:
  name: local-registry-hosting
  namespace: kube-public
data:
  localRegistryHosting.v1: |
    host: "{local}"
    hostFromContainerRuntime: "$address"
    hostFromClusterNetwork: "$address"
EOF
"""
# How kind's nodes reach this registry: by its container's name, by the address that it listens on, or else by the
# gateway of their network.
KIND_CONTAINER = """\
address={nodes}
docker network connect kind {container} || true  # it may be in that network already"""
KIND_ADDRESS = """\
address={nodes}"""
KIND_HOST = """\
address=$(docker network inspect kind -f '{{{{range .IPAM.Config}}}}{{{{.Gateway}}}} {{{{end}}}}' |
    tr ' ' '\\n' | grep -v : | head -n 1):{port}"""

MINIKUBE = """\
#!/bin/sh
# minikube copies these files to its nodes when it starts (not tried with minikube itself).
set -eu
for registry in _default docker.io; do
    mkdir -p "$HOME/.minikube/files/etc/containerd/certs.d/$registry"
    cat > "$HOME/.minikube/files/etc/containerd/certs.d/$registry/hosts.toml" <<'EOF'
{hosts}EOF
done
minikube start --container-runtime=containerd
"""

PODMAN = """\
# /etc/containers/registries.conf.d/k3d-registry-dockerd.conf, for Podman and CRI-O. Others are like docker.io.
[[registry]]
location = "docker.io"

[[registry.mirror]]
location = "{local}/docker.io"
insecure = true
"""

COMPOSE = """\
# compose.yaml, for: docker compose up -d
services:
  registry:
    image: k3d-registry-dockerd
    restart: unless-stopped
    ports:
      - "127.0.0.1:5000:5000"
{docker}      - registry:/var/lib/registry
volumes:
  registry: {{}}
"""
# How the container reaches Docker.
COMPOSE_SOCKET = """\
    volumes:
      - {engine.path}:/var/run/docker.sock
      - {root}:{root}:ro
"""
COMPOSE_HOST = """\
    environment:
      - DOCKER_HOST={engine}
    volumes:
"""

SYSTEMD = """\
# /etc/systemd/system/k3d-registry-dockerd.service; then: systemctl enable --now k3d-registry-dockerd
[Unit]
Description=Registry of the images of the local Docker daemon
After=docker.service network.target

[Service]
Environment=DOCKER_HOST={engine}
ExecStart=/usr/bin/python3 /usr/local/bin/k3d_registry_dockerd.py -addr {local} -store /var/lib/k3d-registry-dockerd
StateDirectory=k3d-registry-dockerd
Restart=on-failure

[Install]
WantedBy=multi-user.target
"""

PROMETHEUS = """\
# prometheus.yml
scrape_configs:
  - job_name: k3d-registry-dockerd
    scheme: {scheme}
    static_configs:
      - targets: ["{local}"]
"""

CONFIGURATIONS: Mapping[str, str] = {
    "k3d": K3D, "k3s": K3S, "kind": KIND, "minikube": MINIKUBE, "containerd": CONTAINERD_HOSTS, "podman": PODMAN,
    "compose": COMPOSE, "systemd": SYSTEMD, "prometheus": PROMETHEUS}


def configuration_for(kind: str, place: Place) -> str:
    """Return the configuration that lets something use the registry at a place. kind is one of CONFIGURATIONS."""
    # Nodes that are not in Docker (k3s and containerd on this machine, minikube) need a name that they can resolve.
    outside = place.container is None
    nodes = place.local if outside and kind in ("k3s", "containerd") else place.nodes
    if outside and kind == "minikube":
        nodes = nodes.replace("host.k3d.internal", "host.minikube.internal")
    values: dict[str, Any] = {
        "nodes": nodes, "url": f"{place.scheme}://{nodes}", "local": place.local, "container": place.container,
        "port": place.port, "scheme": place.scheme, "engine": place.engine, "root": place.root,
        "hosts": HOSTS_TOML.format(scheme=place.scheme, address="$address" if kind == "kind" else nodes),
        "use": f"\n  use:\n    - {nodes}" if place.container else ""}
    values["connect"] = (KIND_CONTAINER if place.container else KIND_HOST if place.is_anywhere else KIND_ADDRESS
                         ).format(**values)
    values["docker"] = (COMPOSE_SOCKET if place.engine.path else COMPOSE_HOST).format(**values)
    return CONFIGURATIONS[kind].format(**values)


# =====================================================================================================================
# 30. Settings: flags, variables, the settings file
# Uses: configuration, store, pulls, requests, admission, server.
# =====================================================================================================================

DEFAULT_SETTINGS_FILE = Path("/etc/k3d-registry-dockerd.env")
SETTINGS_FILE_LIMIT = MIB  # bytes
LOG_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING, "error": logging.ERROR}
OWN_VARIABLE = "K3D_REGISTRY_DOCKERD_"  # how the variables begin that the official registry does not have
HEADERS_VARIABLE = "REGISTRY_HTTP_HEADERS"
# Variables that a settings file may also have.
OTHER_VARIABLES = frozenset({
    "DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_TLS", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH", "DOCKER_CONFIG",
    "XDG_CACHE_HOME", "REGISTRY_PROXY_REMOTEURL", "REGISTRY_PROXY_USERNAME",
    "REGISTRY_PROXY_PASSWORD"})


# The functions that parse values raise ValueError with what follows the value: "is not ...: use ...".


def matching(pattern: str, problem: str, convert: Callable[[re.Match[str]], Any] = itemgetter(0)
             ) -> Callable[[str], Any]:
    """Return a function that converts texts that match a pattern, and has a problem with others."""
    def parse(text: str) -> Any:
        match = re.fullmatch(pattern, text, re.ASCII)
        if not match:
            raise ValueError(problem)
        return convert(match)
    return parse


def one_word_of(*choices: str) -> Callable[[str], Any]:
    """Return a function that parses one of some words, in capitals too, as the official registry takes them."""
    return matching("(?i)" + "|".join(choices), f"is not known: use {', '.join(choices[:-1])} or {choices[-1]}",
                    lambda match: match[0].lower())


positive = matching("0*[1-9][0-9]{0,8}", "is not a whole number above 0: use for example 100",
                    lambda match: int(match[0]))
boolean = matching("(?i)(true|t|1)|false|f|0", "is neither true nor false",  # like Go's strconv.ParseBool
                   lambda match: bool(match[1]))
registry_pattern = matching("localhost|(?=.*[.:*])[a-zA-Z0-9.:*?-]+",
                            "matches no registry: use a host (docker.io, *.corp.example)")
# Bytes: 500MB and 20GB are powers of 1000, like docker's, 20GiB of 1024.
parse_size = matching(
    r"(?i)(\d{1,9}(?:\.\d{1,3})?)(?:([kMGT])(i)?)?B?", "is not a size: use for example 20GB",
    lambda match: int(float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index((match[2] or " ").lower())))
parse_age = matching(  # seconds
    r"(\d{1,6})([smhd])", "is not an age: use for example 12h or 7d",
    lambda match: float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]])


def web_origin(text: str) -> str:
    """Parse the origin of web pages."""
    found = origin_of(text.lower())
    if found is None or not re.fullmatch(r"https?://[^/?#@\s]+", text.lower()):
        raise ValueError("is not an origin: use http://HOST:PORT or https://HOST")
    return found


def read_lines(path: Path) -> list[str]:
    """Return the lines of a file."""
    try:
        with path.open("rb") as file:
            data = file.read(SETTINGS_FILE_LIMIT + 1)
        # Not str.splitlines(), which knows more ends of lines. Like docker's --env-file, without a byte order mark.
        lines = [line.decode() for line in data.removeprefix(codecs.BOM_UTF8).splitlines()]
    except FileNotFoundError:
        raise ValueError("does not exist") from None
    except IsADirectoryError:
        raise ValueError("is a folder: Docker makes one if the file to mount does not exist") from None
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"cannot be read: {getattr(e, 'strerror', None) or e}") from None
    if len(data) > SETTINGS_FILE_LIMIT:
        raise ValueError(f"is larger than {SETTINGS_FILE_LIMIT} bytes")
    return lines


@dataclass(frozen=True)
class Setting:
    """One setting: its flag without the dash (or None), its variable, and what a value looks like.

    default is for people, unset is the value if nothing sets it. Repeated values may also be separated by commas.
    A live one can be changed while the program runs.
    """

    flag: str | None
    variable: str
    metavar: str
    help: str
    default: str
    parse: Callable[[str], Any] = str
    unset: Any = None
    repeatable: bool = False
    live: bool = False

    @property
    def name(self) -> str:
        """What it is called in the log."""
        return f"-{self.flag}" if self.flag else self.variable

    def argument(self) -> Mapping[str, Any]:
        """Return what argparse has to know of the flag."""
        text = {"help": f"{self.help} (default: {self.default}; variable: {self.variable})".replace("%", "%%")}
        if self.parse is boolean:
            return {**text, "nargs": "?", "const": "true", "metavar": "true|false"}
        return {**text, "metavar": self.metavar, **({"action": "append"} if self.repeatable else {})}


def warm_list(text: str) -> tuple[Reference, ...]:
    """Read a file with the name of an image on each line."""
    lines = (line.partition("#")[0].strip() for line in read_lines(Path(text)))
    return tuple(docker_reference(name) for name in lines if name)


SETTINGS = (
    Setting("addr", "REGISTRY_HTTP_ADDR", "HOST:PORT", "listen on this address, or on all interfaces without HOST",
            ":5000", Address.parse, Address("", 5000)),
    Setting("pull", OWN_VARIABLE + "PULL", "missing|always|never", (
        "when Docker pulls an image: if it does not have it; also if the tag has moved in its registry, which is asked "
        "each time; or never"), "missing", one_word_of(*PullPolicy.POLICIES), "missing", live=True),
    Setting("warm", OWN_VARIABLE + "WARM", "IMAGE", (
        "have Docker pull this image at the start if it lacks it, like alpine or quay.io/a/b:1; can be repeated"),
            "none", docker_reference, (), repeatable=True),
    Setting("warm-file", OWN_VARIABLE + "WARM_FILE", "FILE", "the same with each line of a file; # begins a comment",
            "none", warm_list, ()),
    Setting("docker-root", OWN_VARIABLE + "DOCKER_ROOT", "DIR", "read images from this data folder of Docker",
            "the folder that Docker reports, if it can be read", Path),
    Setting("allow", OWN_VARIABLE + "ALLOW", "PATTERN", (
        "only pull from registries that match, like docker.io or *.corp.example; can be repeated"), "pull from all",
            registry_pattern, (), repeatable=True, live=True),
    Setting("read-only", "REGISTRY_STORAGE_MAINTENANCE_READONLY_ENABLED", "", "refuse pushes and deletions", "false",
            boolean, False, live=True),
    Setting(None, "REGISTRY_STORAGE_DELETE_ENABLED", "", "false refuses deletions", "true", boolean, True, live=True),
    Setting("tls-certificate", "REGISTRY_HTTP_TLS_CERTIFICATE", "FILE", (
        "listen with TLS and this certificate chain in PEM"), "plain HTTP", live=True),
    Setting("tls-key", "REGISTRY_HTTP_TLS_KEY", "FILE", "the private key of the certificate, in PEM", "plain HTTP",
            live=True),
    Setting("store", "REGISTRY_STORAGE_FILESYSTEM_ROOTDIRECTORY", "DIR", "the folder for pushed and exported images",
            "a folder in the user's cache", Path),
    Setting("store-limit", OWN_VARIABLE + "STORE_LIMIT", "SIZE", (
        "refuse pushes when the store takes more than this, like 20GB; what can be had again goes first"), "none",
            parse_size, live=True),
    Setting("untagged-age", OWN_VARIABLE + "UNTAGGED_AGE", "AGE", (
        "remove pushed manifests that have had no tag and were not used for this long, like 7d"), "never", parse_age,
            live=True),
    Setting("no-sync", OWN_VARIABLE + "NO_SYNC", "", (
        "answer a push before it is on the disk: a bit faster, but lost if the machine loses power"), "false", boolean,
            False),
    Setting("max-connections", OWN_VARIABLE + "MAX_CONNECTIONS", "N", (
        "the most connections of clients at a time; more have to wait"), (
        f"a third of the descriptors that this process may have, at most {CONNECTIONS_LIMIT}"), positive, live=True),
    Setting("allow-origin", OWN_VARIABLE + "ALLOW_ORIGIN", "ORIGIN", (
        "let web pages of this origin use the registry, like http://localhost:8080; can be repeated"),
            "what is opened in a browser on localhost or an IP address", web_origin, (), repeatable=True, live=True),
    Setting("log-level", "REGISTRY_LOG_LEVEL", "|".join(LOG_LEVELS), "the least that is logged", "info",
            one_word_of(*LOG_LEVELS), "info", live=True),
    Setting("log-format", "REGISTRY_LOG_FORMATTER", "text|json", "how it is logged", "text",
            one_word_of("text", "json"), "text", live=True),
    Setting("env-file", OWN_VARIABLE + "ENV_FILE", "FILE", "read settings from this file of NAME=value lines",
            f"{DEFAULT_SETTINGS_FILE}, if it is there", Path),
)


class Value(NamedTuple):
    """The value of a setting, how it was written ("" for the default), and where it is from: for people."""

    value: Any
    text: str
    origin: str


def read_settings_file(path: Path) -> dict[str, tuple[int, str]]:
    """Return the values of a file of NAME=value lines, each with its line's number. Raises ValueError.

    Lines may begin with `export`, and values may be in quotes. Nothing is expanded.
    """
    try:
        lines = read_lines(path)
    except ValueError as e:
        raise ValueError(f"the settings file {path} {e}") from None
    found = {}
    for number, line in enumerate(lines, 1):
        match = re.fullmatch(r"(?:export\s+)?([A-Za-z_][\w.-]*)=([^\0]*)", line.strip(), re.ASCII)
        if match:
            quoted = re.fullmatch(r"([\"'])(.*)\1", match[2])
            found[match[1]] = number, quoted[2] if quoted else match[2]
        elif line.strip() and not line.strip().startswith("#"):
            raise ValueError(f"{path}, line {number}, is not NAME=value, nor a comment (#)")
    return found


class Sources:
    """What the command line, the environment and the settings file say. An empty variable is not set."""

    def __init__(self, arguments: argparse.Namespace, environ: Mapping[str, str]):
        """Reads the file. Raises ValueError."""
        self._arguments = arguments
        self._environ = {name: text for name, text in environ.items() if text}
        self._path, self._file = DEFAULT_SETTINGS_FILE, dict[str, tuple[int, str]]()
        path = self.value(next(setting for setting in SETTINGS if setting.flag == "env-file")).value
        if path or self._path.exists():
            self._path = path or self._path
            self._file = read_settings_file(self._path)

    @property
    def variables(self) -> dict[str, str]:
        """Return the variables of both, the environment's first."""
        return {**{name: text for name, (_, text) in self._file.items() if text}, **self._environ}

    def value(self, setting: Setting) -> Value:
        """Return the value of a setting. Raises ValueError."""
        flag = getattr(self._arguments, (setting.flag or "-").replace("-", "_"), None)
        number, line = self._file.get(setting.variable, (0, ""))
        given = [(name, text, place) for name, text, place in (
            (setting.name, ",".join(flag) if isinstance(flag, list) else flag, ""),
            (setting.variable, self._environ.get(setting.variable), ""),
            (setting.variable, line or None, f" (line {number} of {self._path})")) if text is not None]
        ignored = "".join(f", {name}={text}{place} is ignored" for name, text, place in given[1:])
        if not given:
            return Value(setting.unset, "", "from the default")
        name, text, place = given[0]
        if not text:
            raise ValueError(f"{name} is empty")
        parsed = []
        for part in filter(None, map(str.strip, text.split(","))) if setting.repeatable else [text]:
            try:
                parsed.append(setting.parse(part))
            except ValueError as e:
                raise ValueError(f"{name}{' ' if name[0] == '-' else '='}{part!r}{place} {e}") from None
        return Value(tuple(parsed) if setting.repeatable else parsed[0], text, f"from {name}{place}{ignored}")

    def unknown(self) -> Iterator[str]:
        """Yield warnings about variables that mean nothing here."""
        known = OTHER_VARIABLES | {setting.variable for setting in SETTINGS}
        for name, (number, _) in self._file.items():
            if name not in known and not name.startswith(HEADERS_VARIABLE):
                yield f"{name} (line {number} of {self._path}) is not a setting of this program"
        for name in sorted(self._environ.keys() - known):
            if name.startswith(OWN_VARIABLE):
                yield f"{name} is not a setting of this program"


def yaml_strings(text: str) -> list[str]:
    """Parse a YAML list in brackets, or a single string."""
    scalar = r"""\s*("(?:[^"\\]|\\.)*"|'(?:[^']|'')*'|[^\s,'"\[\]{}][^,\[\]{}"]*|)\s*"""
    match = re.fullmatch(rf"\s*\[({scalar}(?:,{scalar})*)\]\s*|{scalar}", text)
    if not match:
        raise ValueError('is not a list: use ["value"]')
    found = re.findall(rf"{scalar}(?:,|$)", match[1]) if match[1] else [match[4]]
    return [json.loads(part) if part[0] == '"' else part[1:-1].replace("''", "'") if part[0] == "'" else part.strip()
            for part in found if part]


def extra_headers(variables: Mapping[str, str]) -> tuple[list[tuple[str, str]], list[str], list[str]]:
    """Return the headers of REGISTRY_HTTP_HEADERS_ variables, the origins that they let in, and warnings. ValueError.

    The name of a header follows, the value is a list in YAML, as for the official registry. What this program sends
    itself is not replaced.
    """
    headers, origins, notes = [], list[str](), []
    if HEADERS_VARIABLE in variables:
        raise ValueError(f"{HEADERS_VARIABLE} is not supported: use {HEADERS_VARIABLE}_NAME='[\"value\"]' for each")
    for variable, text in sorted(variables.items()):
        if not variable.startswith(HEADERS_VARIABLE + "_"):
            continue
        name = variable.removeprefix(HEADERS_VARIABLE + "_").replace("_", "-").title()
        try:
            values = yaml_strings(text)
            if not TOKEN.fullmatch(name) or not all(value.isascii() and value.isprintable() for value in values):
                raise ValueError("is not a header: use printable characters only")
            if name == "Access-Control-Allow-Origin" and "*" not in values:
                origins += map(web_origin, values)
                continue
        except ValueError as e:
            raise ValueError(f"{variable}={text!r} {e}") from None
        if name not in Browsers.RESERVED and not name.startswith(("Access-Control-", "Docker-", "Oci-")):
            headers += [(name, value) for value in values]
        elif values != [Browsers.HEADERS.get(name)]:
            notes.append(f"{variable} is ignored: this program sends that header itself" + (
                ", for the web pages of -allow-origin" if name.startswith("Access-") else ""))
    return headers, origins, notes


class Settings:
    """All settings, validated. values has each as it was given, by the settings' names."""

    def __init__(self, arguments: argparse.Namespace, environ: Mapping[str, str]):
        """Read flags, the environment, the settings file, then defaults. Raises ValueError with a message of a line."""
        sources = Sources(arguments, environ)
        self.values = {setting.name: sources.value(setting) for setting in SETTINGS}
        given, variables = {name: found.value for name, found in self.values.items()}, sources.variables
        headers, origins, header_notes = extra_headers(variables)
        self.address: Address = given["-addr"]
        self.store: Path = given["-store"] or Path(
            variables.get("XDG_CACHE_HOME") or home_folder() / ".cache", "k3d-registry-dockerd")
        self.store_limit: int | None = given["-store-limit"]
        self.untagged_age: float | None = given["-untagged-age"]
        self.durable = not given["-no-sync"]
        self.engine = EngineHost.from_environment(variables)
        self.pulls = PullPolicy(given["-allow"], given["-pull"], DockerConfig(docker_folder(variables)))
        self.warm: tuple[Reference, ...] = given["-warm"] + given["-warm-file"]
        self.docker_root: Path | None = given["-docker-root"]
        self.policy = Policy(
            given["-read-only"], given["REGISTRY_STORAGE_DELETE_ENABLED"],
            frozenset((*given["-allow-origin"], *origins)), tuple(headers), given["-max-connections"])
        self.tls = tls_context(given["-tls-certificate"], given["-tls-key"])
        self.log_level: str = given["-log-level"]
        self.log_format: str = given["-log-format"]
        store_notes = self._store_notes() if "store" in arguments else ()  # the command may have nothing to do with it
        self.notes = [*store_notes, *proxy_notes(variables), *header_notes, *sources.unknown()]

    def origin(self, name: str) -> str:
        """Say where the value of a setting is from."""
        return self.values[name].origin

    def described(self) -> Iterator[str]:
        """Yield a line about each setting that is not the default, but for the address and the store."""
        for setting in SETTINGS:
            found = self.values[setting.name]
            if found.text and setting.flag not in ("addr", "store"):
                yield f"{setting.name}: {found.text} ({found.origin})"
        if self.policy.headers:
            yield f"headers: {some_of(name for name, _ in self.policy.headers)} (from {HEADERS_VARIABLE}_…)"

    def changes(self, new: Settings) -> Iterator[str]:
        """Yield a line about each setting that is another in new settings."""
        for setting in SETTINGS:
            old, found = self.values[setting.name], new.values[setting.name]
            if old.value != found.value:
                yield (f"{setting.name}: {old.text or setting.default} is now {found.text or setting.default} "
                       f"({found.origin})" + ("" if setting.live else ", after a restart"))
        before, after = self.policy.headers, new.policy.headers
        if before != after:
            yield f"headers: {len(before)} are now {len(after)} (from {HEADERS_VARIABLE}_…)"
        if str(self.engine) != str(new.engine):
            yield f"Docker: {self.engine} is now {new.engine}, after a restart"

    def keep_until_restart(self, old: Settings) -> None:
        """Keep what the program was started with, where a change takes effect after a restart only."""
        self.values = {setting.name: (self if setting.live else old).values[setting.name] for setting in SETTINGS}
        self.engine, self.pulls = old.engine, old.pulls

    def _store_notes(self) -> Iterator[str]:
        """Yield a warning if the store is not writable. Raises ValueError if it is no folder, and cannot become one."""
        name = f"the store {self.store} ({self.origin('-store')})"
        try:
            existing, *parts = Store.folders(self.store)
            if not existing.is_dir():
                raise ValueError(f"{name} cannot be created: {existing} is not a folder")
        except OSError as e:
            raise ValueError(f"{name} cannot be used: {e.strerror or e}") from None
        locked = [str(folder) for folder in (existing, *parts) if not os.access(folder, os.W_OK | os.X_OK)]
        if locked:  # a part of it perhaps because another user wrote it
            what = f": {some_of(locked)}" if existing == self.store else ""
            yield f"{name} is not writable{what}: pushes and exports will fail"


def tls_context(certificate: str | None, key: str | None) -> ssl.SSLContext | None:
    """Return what the server needs for TLS, or None if it is not wanted. Raises ValueError."""
    if not certificate and not key:
        return None
    if not certificate or not key:
        raise ValueError("TLS needs both -tls-certificate and -tls-key, or both REGISTRY_HTTP_TLS_CERTIFICATE and "
                         "REGISTRY_HTTP_TLS_KEY")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    with certificate_errors(f"the TLS certificate {certificate} and key {key} cannot be used"):
        context.load_cert_chain(certificate, key, refuse_passphrase)
    return context


def proxy_notes(variables: Mapping[str, str]) -> Iterator[str]:
    """Yield warnings about variables that k3d sets for the official registry image. Raises ValueError."""
    url = variables.get("REGISTRY_PROXY_REMOTEURL", "*")
    if origin_of(url) is None and url != "*":
        raise ValueError("REGISTRY_PROXY_REMOTEURL must be * or the URL of a registry")
    if url != "*":
        yield ("REGISTRY_PROXY_REMOTEURL is not used: this registry serves the images of all registries, and each "
               "request names one")
    if "REGISTRY_PROXY_USERNAME" in variables or "REGISTRY_PROXY_PASSWORD" in variables:
        yield ("REGISTRY_PROXY_USERNAME and _PASSWORD are not used: each pull sends its own credentials "
               "(imagePullSecrets)")


# =====================================================================================================================
# 31. Doctor: the usual causes, one by one
# Uses: engine, store, mirror, server, settings.
# =====================================================================================================================

GOOD, HINT, BAD = "ok", "--", "!!"


@dataclass(frozen=True)
class Finding:
    """What a check has found: GOOD; HINT, it works but could be better; or BAD. With a remedy, if there is one."""

    mark: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return printable(f"{self.text}: {self.remedy}" if self.remedy else self.text, 2000)


class Setup(NamedTuple):
    """What is examined: a registry as its settings make it. server is where a client finds it."""

    settings: Settings
    mirror: Mirror
    server: Address
    environ: Mapping[str, str] = os.environ


# ---- Docker


def check_socket(setup: Setup) -> Finding:
    """Can Docker's socket be connected to?"""
    host = setup.mirror.engine.host
    try:
        host.connect(ENGINE_TIMEOUT).close()
    except PermissionError:
        return Finding(BAD, f"permission denied on {host}", group_advice(host.path))
    except OSError as e:
        return Finding(BAD, host.advice(e))
    return Finding(GOOD, str(host))


def group_advice(path: str) -> str:
    """Say how this user gets the right to use a socket."""
    try:
        status = Path(path).stat()
    except OSError:
        return f"let this user, {os.geteuid()}, enter the folders of {path}, or run as root"
    if status.st_mode & 0o060 == 0o060:
        return (f"start the container with --group-add {status.st_gid}; without a container, add this user to the "
                "group with that number")
    return f"run as its owner, user {status.st_uid} (docker run --user {status.st_uid}); no group may use it"


def check_engine(setup: Setup) -> Finding:
    """Which engine is it?"""
    info = setup.mirror.engine.info()
    if info.api < OLDEST_API:
        return Finding(HINT, f"{info}", "older than all that were tried with this program: Docker 20.10 is the oldest")
    return Finding(GOOD, str(info))


OLDEST_API = (1, 40)
NO_IMAGE = "k3d-registry-dockerd.invalid/doctor:none"
# Calls that pulls need and that change nothing as they are here: Docker answers that there is no such image.
CALLS = (("GET", "/images/json"), ("GET", f"/images/{NO_IMAGE}/json"), ("GET", f"/images/{NO_IMAGE}/get"),
         ("POST", "/images/create?fromImage=%3A&tag=none"))


def check_calls(setup: Setup) -> Finding:
    """Does a proxy in front of the socket forbid calls?"""
    problems = []
    for method, path in CALLS:
        try:
            with setup.mirror.engine.request(method, path):
                pass
        except RegistryError as e:
            problems.append(e.detail)
    return Finding(BAD, "; ".join(problems)) if problems else Finding(GOOD, "Docker takes those that pulls need")


def check_content(setup: Setup) -> Finding:
    """How is Docker's content read?"""
    stores, info = setup.mirror.images.current(), setup.mirror.engine.info()
    text = f"{info.store} image store, content from {', '.join(stores.sources)}"
    if info.is_podman:
        return Finding(GOOD, f"Podman's, content from {', '.join(stores.sources)}")
    if stores.problem:
        return Finding(BAD, f"{text}; {stores.problem}")
    advice = stores.advice()
    return Finding(HINT, text, advice) if advice else Finding(GOOD, text)


CLOCK_TOLERANCE = 30  # seconds


def check_clock(setup: Setup) -> Finding:
    """Is it the same time here and where Docker runs?"""
    info = setup.mirror.engine.info()
    match = re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.\d+)?(Z|[+-]\d\d:\d\d)",
                         str(info.details.get("SystemTime")))
    if not match:
        return Finding(GOOD, "Docker does not tell its time")
    ahead = info.read_at - datetime.datetime.fromisoformat(match[1] + match[2].replace("Z", "+00:00")).timestamp()
    if abs(ahead) <= CLOCK_TOLERANCE:
        return Finding(GOOD, "as Docker's")
    return Finding(BAD, f"{abs(ahead):.0f} seconds {'ahead of' if ahead > 0 else 'behind'} Docker's", (
        "set both: certificates and tokens are refused when the time is wrong"))


def check_pulls(setup: Setup) -> Finding:
    """May Docker pull what it lacks, from any registry?"""
    settings, pulls = setup.settings, setup.settings.pulls
    if pulls.policy == "never":
        return Finding(HINT, f"Docker pulls nothing (-pull never, {settings.origin('-pull')})", (
            "what it lacks is 404; with -pull missing it pulls that"))
    if pulls.allowed:
        return Finding(HINT, f"only from {some_of(pulls.allowed)} (-allow, {settings.origin('-allow')})", (
            "pulls from other registries are 403"))
    return Finding(GOOD, f"{pulls.policy}, from all registries")


def check_mirrors(setup: Setup) -> Finding:
    """Is this registry a mirror of the very Docker that it answers from?"""
    info = setup.mirror.engine.info()
    registries = info.details.get("RegistryConfig") or {}
    names = info.names or (str(setup.server), f"localhost:{setup.server.port}")
    mirrors = [str(mirror) for mirror in registries.get("Mirrors") or ()]
    ours = [mirror for mirror in mirrors if leads_here(mirror, names)]
    if ours:
        return Finding(HINT, f"Docker's registry mirror {some_of(ours)} is this registry", (
            "take it out of registry-mirrors in daemon.json: Docker hears of nothing there that it does not have"))
    return Finding(GOOD, f"Docker's registry mirrors: {some_of(mirrors)}" if mirrors else "Docker has none")


def leads_here(url: str, names: Iterable[str]) -> bool:
    """Return True if a URL leads to a registry with these names, on this machine."""
    parts = urllib.parse.urlsplit(url)
    host, port = (parts.hostname or "").lower(), parts.port or (443 if parts.scheme == "https" else 80)
    is_local = host in ("localhost", socket.gethostname().lower(), "::1") or host.startswith("127.")
    return f"{'localhost' if is_local else host}:{port}" in names


def check_origin(setup: Setup) -> Finding | None:
    """Does the way to Docker Hub work through Docker? Podman cannot be asked this."""
    reference = Reference("library/hello-world", "latest", "docker.io")
    try:
        setup.settings.pulls.check(reference)
    except RegistryError:
        return None  # the settings forbid it
    try:
        if not setup.mirror.engine.info().is_podman:
            setup.mirror.engine.origin_digest(reference, setup.settings.pulls.credentials(reference, None))
            return Finding(GOOD, "it answers through Docker")
    except (PullFailed, RegistryError) as e:
        reason = e.detail if isinstance(e, RegistryError) else str(e)
        return Finding(HINT, f"Docker cannot get library/hello-world from there: {printable(reason, 300)}", (
            "images that Docker lacks cannot be pulled. See whether `docker pull hello-world` works"))
    return None


# ---- this program


def check_store(setup: Setup) -> Finding:
    """Can the store be written to, and is there room?"""
    folder = setup.settings.store
    try:
        for folder in Store.folders(setup.settings.store):
            with tempfile.TemporaryFile(dir=folder):
                free = shutil.disk_usage(folder).free
    except OSError as e:
        name = folder if setup.settings.store in folder.parents else setup.settings.store
        return Finding(BAD, f"{name} cannot be written to: {e.strerror or e}", (
            "pushes and exports fail. Mount a volume there that this user may write to, or use -store"))
    if free < MINIMUM_FREE:
        return Finding(BAD, f"{human_bytes(free)} free where {setup.settings.store} is", (
            f"pushes and exports are refused, as {human_bytes(MINIMUM_FREE)} stay free. Make room, or use -store"))
    return Finding(GOOD, f"{setup.settings.store}, {human_bytes(free)} free")


def ask_server(address: Address, tls: bool, path: str, is_guess: bool = True) -> tuple[int, Message, bytes]:
    """GET a path of a server that may be this registry. Returns the status, the headers, and a megabyte of the body.

    tls is a guess: it may have been set on the server's command line only. Raises OSError and HTTPException.
    """
    connection = http.client.HTTPConnection(address.host, address.port, timeout=ENGINE_TIMEOUT)
    if tls:  # the certificate need not name this address
        connection = http.client.HTTPSConnection(address.host, address.port, timeout=ENGINE_TIMEOUT,
                                                 context=ssl._create_unverified_context())  # noqa: S323
    with contextlib.closing(connection):
        try:
            connection.request("GET", path, headers={"Accept": "application/json", "User-Agent": CHECK_AGENT})
            response = connection.getresponse()
            return response.status, response.headers, response.read(MIB)
        except (ssl.SSLError, http.client.HTTPException, ConnectionResetError):
            if is_guess:
                return ask_server(address, not tls, path, False)
            raise


def is_from_us(headers: Message) -> bool:
    """Return True if an answer with these headers is from this program."""
    return str(headers.get("Server", "")).startswith("k3d-registry-dockerd/")


def check_port(setup: Setup) -> Finding:
    """Who listens on the port?"""
    try:
        _, headers, _ = ask_server(setup.server, setup.settings.tls is not None, "/v2/")
        if is_from_us(headers):
            return Finding(GOOD, f"this registry answers at {setup.server}")
    except ConnectionRefusedError:
        return Finding(HINT, f"nothing listens at {setup.server}", "start it, or name its address with -addr")
    except (OSError, http.client.HTTPException):
        pass  # it may be anything
    # Not the whole command: there are passwords on command lines.
    owner = next((f"pid {process} ({printable(' '.join(words[:2]), 100).strip()})"
                  for process, words, address in servers() if address.port == setup.server.port),
                 "something that is not this registry")
    return Finding(BAD, f"{setup.server} is in use by {owner}", "stop that, or choose another port with -addr")


def listening_sockets() -> dict[str, Address]:
    """Return the TCP addresses that are listened on in this network namespace, by inode. Empty if not on Linux."""
    found = {}
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        with contextlib.suppress(OSError, *MALFORMED_ERRORS):
            for fields in map(str.split, table.read_text().splitlines()[1:]):
                if fields[3] == "0A":  # TCP_LISTEN
                    host, _, port = fields[1].partition(":")  # the host in 32-bit numbers of this machine's byte order
                    words = struct.unpack(f">{len(host) // 8}I", bytes.fromhex(host))
                    packed = struct.pack(f"={len(words)}I", *words)
                    found[fields[9]] = Address(str(ipaddress.ip_address(packed)), int(port, 16))
    return found


def servers(is_wanted: Callable[[list[str]], bool] = bool) -> Iterator[tuple[str, list[str], Address]]:
    """Yield the processes that listen on this machine, or in this container, and the addresses: pid, command, address.

    is_wanted chooses by the words of the command line. Processes of other users are only seen by root.
    """
    sockets = listening_sockets()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or belongs to another user
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            for file in (process / "fd").iterdir() if is_wanted(words) else ():
                with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
                    address = sockets.get(str(file.readlink()).removeprefix("socket:[").removesuffix("]"))
                    if address:
                        yield process.name, words, address


def running_servers() -> list[Address]:
    """Return the addresses of the servers with the same script on their command line, whatever their settings are."""
    script = Path(sys.argv[0]).name
    return [address for _, _, address in servers(lambda words: script in (Path(word).name for word in words if word))]


def reachable(address: Address) -> Address:
    """The address for a client of a server that listens on an address: one on all interfaces is on this machine."""
    return Address({"": "localhost", "::": "localhost", "0.0.0.0": "127.0.0.1"}.get(address.host, address.host),  # noqa: S104
                   address.port)


def check_nodes(setup: Setup) -> Finding | None:
    """Has a node ever asked?"""
    try:
        _, _, body = ask_server(setup.server, setup.settings.tls is not None, "/status")
        if json.loads(body)["nodes"]:
            return Finding(GOOD, "nodes have asked")
    except (OSError, http.client.HTTPException, *MALFORMED_ERRORS):
        return None  # check_port says what is wrong
    return Finding(HINT, "no node has asked yet", (
        "is your cluster pointed here? `k3d-registry-dockerd config k3d` prints how (or k3s, kind, …)"))


def check_proxies(setup: Setup) -> Finding:
    """Are there variables that may lead nodes, or this program, to a proxy?"""
    values = {name.upper(): value for name, value in setup.environ.items() if value}
    names = [name for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY") if name in values]
    exempt = re.split(r"[,\s]+", values.get("NO_PROXY", ""))
    if not names:
        return Finding(GOOD, "no variables are set")
    if "*" in exempt or socket.gethostname() in exempt:
        return Finding(GOOD, f"{', '.join(names)}, and NO_PROXY names this registry")
    return Finding(HINT, f"{', '.join(names)} set", (
        "nodes and clients that have it too need this registry's name in NO_PROXY, or they ask the proxy for it"))


def check_credentials(setup: Setup) -> Finding:
    """Are the helpers here that hold the credentials of docker login?"""
    config = setup.settings.pulls.config
    if config is None or not os.path.lexists(config.path):
        return Finding(GOOD, "no config.json: pulls have those of their own, the pod's imagePullSecrets")
    try:
        document = json.loads(config.path.read_bytes())
        helpers = {str(name) for name in (document.get("credsStore"), *(document.get("credHelpers") or {}).values())
                   if name}
    except (OSError, *MALFORMED_ERRORS) as e:
        why = e.strerror if isinstance(e, OSError) else f"it is malformed ({type(e).__name__})"
        return Finding(BAD, f"{config.path} cannot be read: {why}", "let this user read it, or mend it")
    missing = sorted(f"docker-credential-{name}" for name in helpers if not shutil.which(f"docker-credential-{name}"))
    if missing:
        return Finding(BAD, f"{config.path} names {some_of(missing)}, not on PATH here", (
            "pulls without imagePullSecrets have no credentials. Put that program on PATH, or mount a config.json that "
            "holds the credentials itself: docker --config DIR login"))
    return Finding(GOOD, f"{config.path}")


# ---- all of them


class Check(NamedTuple):
    """A check, and whether it asks Docker, and whether it is cheap enough for each start of the server."""

    name: str
    run: Callable[[Setup], Finding | None]
    asks_docker: bool = False
    at_start: bool = False


CHECKS = (
    Check("socket", check_socket),
    Check("engine", check_engine, True, True),
    Check("calls", check_calls, True),
    Check("image store", check_content, True, True),
    Check("store", check_store, False, True),
    Check("clock", check_clock, True, True),
    Check("port", check_port),
    Check("nodes", check_nodes),
    Check("proxies", check_proxies),
    Check("pulls", check_pulls),
    Check("mirrors", check_mirrors, True, True),
    Check("credentials", check_credentials, False, True),
    Check("docker.io", check_origin, True),
)


def examine(setup: Setup, checks: Iterable[Check] = CHECKS) -> Iterator[tuple[str, Finding]]:
    """Run the checks. Those that ask Docker are left out once one has found that it cannot be used.

    Yields names and findings. A check that fails is a finding.
    """
    usable = True
    for name, run, asks_docker, _ in checks:
        if asks_docker and not usable:
            continue
        try:
            finding = run(setup)
        except RegistryError as e:
            finding = Finding(BAD, e.detail)
        except Exception as e:  # a boundary: the other checks go on
            finding = Finding(BAD, f"this could not be checked: {type(e).__name__}: {e}")
        usable = usable and not (name in ("socket", "engine") and finding and finding.mark == BAD)
        if finding:
            yield name, finding


def run_doctor(setup: Setup, tell: Callable[[str], None]) -> bool:
    """Run all checks, with a line for each. Returns True if none of them has found anything that is wrong."""
    right = True
    for name, finding in examine(setup):
        tell(f"{finding.mark}  {name}: {finding}")
        right = right and finding.mark != BAD
    return right


def log_improvements(setup: Setup) -> None:
    """Log in one line what could be better, if anything could, from the checks that are cheap."""
    said = (("engine", BAD), ("image store", BAD))  # the log has warnings about these
    found = [f"{name}: {finding}" for name, finding in examine(setup, (each for each in CHECKS if each.at_start))
             if finding.mark != GOOD and (name, finding.mark) not in said]
    if found:
        log.info("could be better: %s (the command doctor says more)", "; ".join(found))


# =====================================================================================================================
# 32. Command line: subcommands, signals
# Uses: waiting, engine, store, hosted, images, mirror, front, verification, page, server, doctor, configurations,
# settings.
# =====================================================================================================================


class ArgumentParser(argparse.ArgumentParser):
    """Reports errors in one line that points to -h, without the usage that argparse prints first."""

    def error(self, message: str) -> Any:
        """Print the message and exit with status 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} -h)\n")


class JsonFormatter(logging.Formatter):
    """Makes each message of the log a JSON object on a line of its own: time, level, message."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        level = next((name for name, number in LOG_LEVELS.items() if number >= record.levelno), "error")
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        message = record.getMessage() + (f"\n{record.exc_text}" if record.exc_text else "")
        return json.dumps({"time": f"{moment}.{int(record.msecs):03}Z", "level": level, "message": message})


class Console(logging.Handler):
    """Logs on standard error. On a terminal, work under way is drawn below the lines, instead of lines about it."""

    def __init__(self) -> None:
        super().__init__()
        self._bars = ""  # what is below the last line now; guarded by the handler's lock

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        try:
            if not (self._bars and hasattr(record, "is_progress")):
                self._write(f"{self.format(record)}\n", self._bars)
        except Exception:  # as in logging.StreamHandler
            self.handleError(record)

    def _write(self, text: str, bars: str) -> None:
        """Go up to the first bar, clear all from there on, and write text and other bars."""
        count = self._bars.count("\n")
        sys.stderr.write((f"\033[{count}F\033[J" if count else "") + text + bars)
        sys.stderr.flush()
        self._bars = bars

    def draw(self, lines: list[str]) -> None:
        """Draw lines on the terminal in place of those before. OSError if it is not there any more."""
        size = os.get_terminal_size(sys.stderr.fileno())
        shown = () if isinstance(self.formatter, JsonFormatter) else lines[:max(size.lines - 1, 0)]
        assert self.lock
        with self.lock:
            self._write("", "".join(f"{printable(line)[:size.columns - 1]}\n" for line in shown))

    @contextlib.contextmanager
    def drawing(self, under_way: Callable[[], Iterable[Facts]]) -> Iterator[None]:
        """Draw the tasks that are under way every second during the `with`, and nothing at its end."""
        end = threading.Event()
        thread = threading.Thread(target=self._draw_until, args=(end, under_way), daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()

    def _draw_until(self, end: threading.Event, under_way: Callable[[], Iterable[Facts]]) -> None:
        with contextlib.suppress(OSError):
            while not end.wait(WATCH_INTERVAL):
                self.draw([*itertools.chain.from_iterable(map(task_lines, under_way()))])
            self.draw([])
            sys.stderr.write("\r\033[K")  # over the ^C that the terminal shows


def configure_log(level: str, form: str) -> Console:
    """Log on standard error, from a level on, as text or json."""
    console = next((handler for handler in logging.root.handlers if isinstance(handler, Console)), None) or Console()
    console.setFormatter(JsonFormatter() if form == "json" else
                         logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
    logging.root.handlers[:] = [console]
    log.setLevel(LOG_LEVELS[level])
    return console


def log_always(message: str, *arguments: object) -> None:
    """Log a message at level info, whatever the level is set to."""
    log.handle(log.makeRecord(log.name, logging.INFO, __file__, 0, message, arguments, None))


def say(line: str) -> None:
    """Print a line, which may hold text from outside, as the log has it."""
    print(printable(line, OneLineEach.LIMIT))


def server_address(settings: Settings, arguments: argparse.Namespace) -> Address:
    """Return the address of the server that a command is about: of -addr, else of the one that runs, else as it is set.

    If several run on this machine, it is as it is set.
    """
    found = [] if arguments.addr else running_servers()
    return reachable(found[0] if len(found) == 1 else settings.address)


def uses_tls(settings: Settings, address: Address) -> bool:
    """Return True if the server at an address uses TLS. It may have been told so on its own command line only."""
    as_set = settings.tls is not None
    try:
        _, headers, _ = ask_server(address, not as_set, "/v2/", is_guess=False)
    except (OSError, http.client.HTTPException):
        return as_set
    return as_set != is_from_us(headers)


def check(settings: Settings, arguments: argparse.Namespace) -> bool:
    """Check that the registry answers, and print the result."""
    address = server_address(settings, arguments)
    try:
        status, *_ = ask_server(address, settings.tls is not None, "/v2/")
    except (OSError, http.client.HTTPException) as e:
        say(f"no answer from {address}: {e}")
        return False
    print("healthy" if status == 200 else "unhealthy")
    return status == 200


def show_status(settings: Settings, arguments: argparse.Namespace) -> bool:
    """Print what the registry does. False if it does not answer. -watch redraws that on a terminal."""
    address = server_address(settings, arguments)
    watches = arguments.watch and sys.stdout.isatty()
    try:
        while True:
            status, _, body = ask_server(address, settings.tls is not None, "/")
            if status != 200:
                raise http.client.HTTPException(f"status {status}")
            text = "\n".join(map(printable, body.decode(errors="replace").splitlines()))
            print(f"\033[H\033[J{text}" if watches else text, flush=True)
            if not watches:
                return True
            time.sleep(WATCH_INTERVAL)
    except (OSError, http.client.HTTPException) as e:
        say(f"no answer from {address}: {e}")
        return False
    except KeyboardInterrupt:
        return True


def make_registry(settings: Settings, port: int | None = None) -> Front:
    """Return the registry as it is set, on another port if one is given."""
    store = Store(settings.store, settings.durable, settings.store_limit)
    engine = Engine(settings.engine, settings.address.port if port is None else port)
    mirror = Mirror(engine, store, settings.pulls, settings.docker_root)
    return Front(Hosted(store, settings.untagged_age), mirror, store, settings.warm)


def verify(settings: Settings, arguments: argparse.Namespace) -> bool:
    """Verify the store, and print the result. True if all of it is right in the end."""
    with contextlib.closing(make_registry(settings)) as registry:
        try:
            right = Verification(registry.store, registry, say).run(arguments.repair)
        except RegistryError as e:
            say(f"the store could not be verified: {e.detail}")
            return False
    print("the store is complete and undamaged" if right else "the store has damaged or missing content")
    return right


def doctor(settings: Settings, arguments: argparse.Namespace) -> bool:
    """Go through the usual causes, and print a line for each. True if nothing is wrong."""
    log.setLevel(logging.CRITICAL)  # the lines say it
    address = server_address(settings, arguments)
    with contextlib.closing(make_registry(settings, address.port)) as registry:
        return run_doctor(Setup(settings, registry.mirror, address), print)


def print_configuration(settings: Settings, arguments: argparse.Namespace) -> bool:
    """Print a configuration for this registry. Without Docker, what Docker knows is not filled in."""
    log.setLevel(logging.CRITICAL)
    names, root = tuple[str, ...](), Path("/var/lib/docker")
    address = server_address(settings, arguments)
    with contextlib.suppress(RegistryError):
        info = Engine(settings.engine, address.port).info()
        names, root = info.names, content_root(info)
    scheme = "https" if uses_tls(settings, address) else "http"
    place = Place(str(address), names, settings.engine, root, scheme)
    print(configuration_for(arguments.kind, place), end="")
    return True


def work_in_background(settings: Settings, registry: Front, address: Address) -> None:
    """Log what Docker has to offer and what could be better, then keep the store tidy."""
    registry.mirror.introduce()
    log_improvements(Setup(settings, registry.mirror, address))
    registry.keep_tidy()


def serve(settings: Settings, arguments: argparse.Namespace) -> bool:
    """Run the registry until SIGTERM or SIGINT. False if it cannot listen."""
    if arguments.check:
        return check(settings, arguments)
    # The signals are blocked in all threads and taken by sigwait. A handler would not do: it runs in this thread,
    # which does not wake up if the signal is delivered to another thread. And a process with PID 1 and no
    # handler only receives signals that are blocked.
    endings, on_terminal = {signal.SIGTERM, signal.SIGINT}, sys.stderr.isatty()
    signal.pthread_sigmask(signal.SIG_BLOCK, {*endings, signal.SIGHUP})
    registry = make_registry(settings)

    def named(text: str) -> str:
        return call_engine(registry.mirror.engine.name, text)

    def rename(record: logging.LogRecord) -> bool:
        record.msg, record.args = named(record.getMessage()), ()
        return True

    log.addFilter(rename)
    try:
        server = Server(settings.address, registry, settings.policy, settings.tls, named, registry.mirror.activity)
    except OSError as e:
        log.error("cannot listen on %s (%s): %s", settings.address, settings.origin("-addr"), e.strerror or e)
        return False
    introduce(settings, server)
    start_thread(server.serve_forever, STOP_INTERVAL)
    start_thread(work_in_background, settings, registry, reachable(server.address))
    start_thread(registry.warming.run)
    console = configure_log(settings.log_level, settings.log_format)
    draws = on_terminal and os.environ.get("TERM") != "dumb"
    with console.drawing(server.status.under_way) if draws else contextlib.nullcontext():
        while (number := signal.sigwait({*endings, signal.SIGHUP})) not in endings:
            if on_terminal and not sys.stderr.isatty():
                break  # the terminal was closed
            settings = reload(settings, arguments, registry, server)
    log.info("ending on %s", signal.Signals(number).name)
    server.shutdown()
    server.server_close()
    server.connections.finish_requests(STOP_GRACE)
    registry.close()
    return True


def reload(settings: Settings, arguments: argparse.Namespace, registry: Front, server: Server) -> Settings:
    """Read the settings again, log what changed, apply what can be, and return them. Invalid ones change nothing."""
    try:
        new = Settings(arguments, os.environ)
    except ValueError as e:
        log.error("SIGHUP: the settings stay as they are: %s", e)
        return settings
    lines = [*settings.changes(new), *(["the TLS certificate and key were read again"] if new.tls else [])]
    settings.pulls.change(new.pulls)
    registry.store.space.limit, registry.hosted.untagged_age = new.store_limit, new.untagged_age
    server.change(new.policy, new.tls)
    configure_log(new.log_level, new.log_format)
    for line in lines or ["nothing has changed"]:
        log.info("SIGHUP: %s", line)
    for note in (note for note in new.notes if note not in settings.notes):
        log.warning("SIGHUP: %s", note)
    new.keep_until_restart(settings)
    return new


def introduce(settings: Settings, server: Server) -> None:
    """Log the version and the settings, then "listening on", which k3d waits for."""
    log.info("k3d-registry-dockerd %s, Python %s", __version__, sys.version.split()[0])
    log.info("store: %s (%s)", settings.store, settings.origin("-store"))
    for line in settings.described():
        log.info("%s", line)
    config = settings.pulls.config
    if config and os.access(config.path, os.R_OK):
        log.info("credentials for pulls without their own: %s", config.path)
    log.info("Docker is at %s (%s)", settings.engine, settings.engine.origin)
    for note in settings.notes:
        log.warning("%s", note)
    log_always("listening on %s (%s)%s", server.address, settings.origin("-addr"), " with TLS" if settings.tls else "")


@dataclass(frozen=True)
class Command:
    """A subcommand.

    run gets the settings and the arguments, and returns True if all is well: that is the exit status. example is its
    arguments in an example. flags are those of SETTINGS that it takes; own are its other flags and words, as argparse
    wants them. Settings that it has no flag for come from elsewhere.
    """

    run: Callable[[Settings, argparse.Namespace], bool]
    summary: str
    example: str
    flags: tuple[str, ...] = ()
    own: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def parser(self, name: str) -> ArgumentParser:
        """Return the parser of the arguments that follow the name."""
        program, epilog = f"{PROGRAM} {name}", f"example: {PROGRAM} {self.example}"
        if name == DEFAULT_COMMAND:
            program = PROGRAM
            epilog += ("\n\nDocker is found as by the docker command: DOCKER_HOST, DOCKER_TLS_VERIFY, DOCKER_CERT_PATH"
                       "\n\ncommands, each with its own -h:" +
                       "".join(f"\n  {other:8} {command.summary}" for other, command in COMMANDS.items()))
        parser = ArgumentParser(prog=program, allow_abbrev=False, description=self.summary, epilog=epilog,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
        flags = {f"-{each.flag}": each.argument() for each in SETTINGS if each.flag in self.flags}
        for flag, options in {**self.own, **flags}.items():
            parser.add_argument(flag, **options)
            if flag.startswith("-"):  # one dash or two, like Go's
                parser.add_argument(f"-{flag}", **{**options, "help": argparse.SUPPRESS})
        return parser


PROGRAM = "k3d-registry-dockerd"
DEFAULT_COMMAND = "serve"
SERVER_ADDRESS = {"metavar": "HOST:PORT", "help": (
    "the address of the registry (default: of the one that runs here, or else as it is set)")}
COMMANDS: Mapping[str, Command] = {
    "serve": Command(
        serve, "Serve the images of the local Docker daemon, and what is pushed (the default).",
        "-addr 127.0.0.1:5000", tuple(setting.flag for setting in SETTINGS if setting.flag),
        {"-check": {"action": "store_true", "help": "the same as the command check"},
         "-version": {"action": "version", "version": f"{PROGRAM} {__version__}"}}),
    "check": Command(
        check, "Check that the registry answers (exit status 1 if not).", "check -addr localhost:5000", own={
            "-addr": SERVER_ADDRESS}),
    "status": Command(
        show_status, "Print what the registry does: pulls under way, images, errors.", "status -watch", own={
            "-addr": SERVER_ADDRESS,
            "-watch": {"action": "store_true", "help": "redraw it every second, on a terminal"}}),
    "doctor": Command(
        doctor, "Go through the usual causes of trouble, and say what to do (exit status 1).", "doctor -addr :5000",
        ("addr", "store", "docker-root", "pull", "env-file")),
    "config": Command(
        print_configuration, "Print a configuration that lets a cluster or a tool use this registry.", "config kind",
        ("addr", "env-file"), {"kind": {"choices": tuple(CONFIGURATIONS), "help": "what is to be configured"}}),
    "verify": Command(
        verify, "Read the whole store, and say what is damaged or lacking (exit status 1).", "verify -repair",
        ("store", "docker-root", "env-file"),
        {"-repair": {"action": "store_true", "help": (
            "get again what Docker or its registry still has, and set the rest aside")}}),
}


def prepare_streams() -> None:
    """Open what the caller has closed of the standard streams, and let characters that the locale lacks be escaped."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # each gets its number, the lowest one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for as long as the process lives
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as that of standard error


def main(argv: list[str] | None = None) -> int:
    """Run the program. Returns the exit status: 0 on success, 1 on failure, 2 for invalid arguments."""
    prepare_streams()
    words = sys.argv[1:] if argv is None else argv
    name, words = (words[0], words[1:]) if words and words[0][:1] not in ("-", "") else (DEFAULT_COMMAND, words)
    if name not in COMMANDS:
        COMMANDS[DEFAULT_COMMAND].parser(DEFAULT_COMMAND).error(
            f"{printable(name)!r} is not a command: use {', '.join(COMMANDS)}")
    parser = COMMANDS[name].parser(name)
    arguments = parser.parse_args(words)
    try:
        settings = Settings(arguments, os.environ)
    except ValueError as e:
        parser.error(printable(str(e)))
    configure_log(settings.log_level, settings.log_format)
    try:
        return 0 if COMMANDS[name].run(settings, arguments) else 1
    except KeyboardInterrupt:
        return 130  # like shells
    except BrokenPipeError:  # `doctor | head`: nobody reads the rest, which Python would try to write at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
