#!/usr/bin/env python3
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
                              +-- ContainerdImages    content directory | content service | pulls under way
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
     4 configuration     where Docker is (DOCKER_HOST), the credentials of docker login
     5 waiting           the deadline of a request; jobs that many wait for
     6 engine            the Docker Engine API
     7 transfers         what a provider gives; content on its way
     8 store             content by digest, on our own disk
     9 hosted            repositories, uploads, tags, referrers
    10 content service   Docker's content by way of its socket: HTTP/2, gRPC, protobuf
    11 layers            the files of Docker's classic store
    12 export            the tar of docker save
    13 origin            an image's own registry
    14 images            how Docker's image stores differ
    15 pulls             images that Docker pulls, and content that is fetched because Docker lacks it
    16 mirror            names to content: look up, pull, recover
    17 front             who answers; adoption
    18 requests          parsed requests, responses as values
    19 end-points        one method for each end-point of the specification
    20 server            connections, the log's lines
    21 command line      settings, signals
"""

from __future__ import annotations

import argparse
import base64
import binascii
import contextlib
import dataclasses
import fnmatch
import functools
import gzip
import hashlib
import http.client
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import re
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
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Protocol, TypeVar

__version__ = "0.9"
__all__ = ["Digest", "Engine", "EngineHost", "Front", "Hosted", "Mirror", "Reference", "RegistryError", "Server",
           "Store", "main"]

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
TAG_LIMIT = 100             # tags that one push of a manifest may set; the spec's development version asks for 10
SIZE_LIMIT = 2**63          # bytes of content: sizes have to be smaller
BLOBS_LIMIT = 1000          # blobs fetched for one manifest; Docker's own images have at most 127 layers
JSON_LIMIT = 64 * MIB       # bytes of an answer of the engine (lists of images can be long)
PIECE = 256 * KIB           # bytes per read or write of a stream
SENDFILE_STEP = 16 * MIB    # bytes per system call when a file is sent
BODY_LIMIT = 16 * MIB       # bytes of an unused request body that are read, so that the client gets the answer
CHUNK_LINE = 4 * KIB        # bytes of a line of the chunked coding: a chunk size with extensions, or a trailer
TRAILER_LIMIT = 100         # trailer lines after a chunked body

ENGINE_TIMEOUT = 15         # seconds Docker may take to begin an answer; nodes give up after 30
PULL_TIMEOUT = 300          # seconds without data from a pull or an export
EARLY_ANSWER = 5            # seconds that a request waits for the result of a pull; most failures occur within
LAST_ANSWER = 18            # seconds after which a request gets an answer in any case, from what is known then
ARRIVAL_INTERVAL = 0.2      # seconds between two checks for content of a running pull
IDLE_TIMEOUT = 120          # seconds after which an idle client connection is closed
STALL_TIMEOUT = 300         # seconds for which a client may read nothing of a body; the kubelet has a similar limit
ORIGIN_TIMEOUT = 30         # seconds without data from an image's own registry
ENGINE_FRESH = 10           # seconds for which the engine's description is cached
PRESENCE_FRESH = 5          # seconds for which content that was found is assumed to exist
PROGRESS_INTERVAL = 5       # seconds between two progress lines
STOP_GRACE = 5              # seconds that running requests get to finish on shutdown
EVICTION_AGE = 3600         # seconds that unreferenced content is kept after its last use
FETCHED_AGE = 7 * 24 * 3600  # seconds that fetched content, which Docker lacks, is kept after its last use
UPLOAD_AGE = 24 * 3600      # seconds that an upload is kept after its last byte, and a blob without a manifest
TIDY_INTERVAL = 3600        # seconds between two cleanups of the store

FETCHES = 10                # fetches of blobs of one manifest that are started at once
MEMORY_LIMIT = 1000         # entries of what is remembered for a while
MANIFEST_REMEMBERED = 32 * KIB  # bytes of the largest manifest that is cached
LISTEN_BACKLOG = 512        # connections waiting to be accepted: many nodes start at the same time
IDLE_CALLS = 8              # idle connections to the content service that are kept for reuse

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
    """Format a number of seconds: 0.4 ms, 23 ms, 1.3 s."""
    if seconds < 0.01:
        return f"{seconds * 1000:.1f} ms"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def printable(text: str) -> str:
    """Escape control characters in text from outside and shorten it, for one line of the log."""
    escaped = repr(text)[1:-1]
    return escaped if len(escaped) <= 1000 else f"{escaped[:1000]}…"


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
    "RANGE_INVALID":         (416, "the requested range cannot be satisfied"),
    "UPLOAD_BUSY":           (409, "another request writes to this upload"),
    "MANIFEST_TOO_LARGE":    (413, "the manifest is too large"),
    "TOO_MANY_TAGS":         (414, "too many tags at once"),
    "UNKNOWN":               (500, "internal error"),
    "STORE_FAILED":          (500, "this registry's own store failed"),
    "ENGINE_FAILED":         (502, "Docker failed"),
    "ORIGIN_UNAVAILABLE":    (502, "Docker could not get the image from its registry"),
    "UNAVAILABLE":           (503, "the service is unavailable"),
}


class RegistryError(Exception):
    """An error with a code of ERRORS and a reason. Raised anywhere, converted to a response in Handler.

    detail tells the user what went wrong and, if known, what to do about it. It goes to the client and to the
    log, so it must never contain a credential. headers are additional HTTP headers.
    """

    def __init__(self, code: str, detail: str, headers: Mapping[str, str] | None = None):
        super().__init__(f"{code}: {detail}")
        self.code, self.detail, self.headers = code, detail, dict(headers or {})
        self.status, self.message = ERRORS[code]

    def body(self) -> bytes:
        """Return the error as JSON (OCI Distribution Spec v1.1, "Error Codes")."""
        # Most clients only show the message, so it includes the detail.
        error = {"code": self.code, "message": f"{self.message}: {self.detail}", "detail": self.detail}
        return json.dumps({"errors": [error]}).encode()


# =====================================================================================================================
# 2. References: what a request names
# Uses: vocabulary.
# =====================================================================================================================

# OCI Distribution Spec v1.1, "Pulling manifests": <name> and <reference>. A name without its registry's host has at
# most 255 characters (github.com/distribution/reference).
REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")
NAME_LENGTH = 255

# OCI Image Spec v1.1, "Digests": algorithm ":" encoded, and the registered algorithms.
DIGEST = re.compile(r"[a-z0-9]+(?:[+._-][a-z0-9]+)*:[a-zA-Z0-9=_-]+")
HEX_LENGTH = {"sha256": 64, "sha512": 128}
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
        algorithm, _, encoded = text.partition(":")
        length = HEX_LENGTH.get(algorithm)
        if length is None and DIGEST.fullmatch(text):
            raise ValueError(f"digest algorithm {algorithm!r} is not supported")
        if length is None or not re.fullmatch(f"[0-9a-f]{{{length}}}", encoded):
            raise ValueError(f"{text!r} is not a digest")
        return cls(algorithm, encoded)

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


def names_us(namespace: str, own_name: str | None) -> bool:
    """Return True if a namespace probably is this registry, whose name in the Host header is own_name.

    The registry has several names. k3d maps its port, so that nodes reach k3d-x:12345 as k3d-x:5000. And pods
    may use the name localhost:12345, to which a developer has pushed.
    """
    name, own = (re.sub(r":\d+$", "", text) for text in (namespace, own_name or ""))
    return name == own or name in LOOPBACK


def docker_name(name: str) -> tuple[str, str]:
    """Split an image name as Docker shows it into registry and repository: alpine is docker.io, library/alpine."""
    host, slash, rest = name.partition("/")
    if slash and is_host(host):
        return host, rest
    return "docker.io", name if slash else f"library/{name}"


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
    def parse(cls, repository: str, target: str, namespace: str | None = None) -> Reference:
        """Validate the parts of a request for a manifest.

        Raises NAME_INVALID for an invalid repository or namespace, DIGEST_INVALID for an invalid digest, and
        MANIFEST_UNKNOWN for an invalid tag, because no manifest can have it.
        """
        if ":" in target:
            return cls.parse_digest(repository, target, namespace)
        cls.check_repository(repository, namespace)
        if not TAG.fullmatch(target):
            raise RegistryError("MANIFEST_UNKNOWN", f"{target!r} is not a tag")
        return cls(repository, target, namespace)

    @classmethod
    def parse_pushed(cls, repository: str, target: str, namespace: str | None = None) -> Reference:
        """Validate the parts of a push of a manifest. Like parse(), but MANIFEST_INVALID for an invalid tag."""
        if ":" not in target and not TAG.fullmatch(target):
            raise RegistryError("MANIFEST_INVALID", f"{target!r} is not a tag")
        return cls.parse(repository, target, namespace)

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

    def aliases(self, own_name: str | None) -> Iterator[Reference]:
        """Yield the references by which Docker may know this image, the most likely first.

        Without a namespace, the image is one of this registry, or one that Docker shows by the same name.
        """
        if self.written:
            yield from Reference(self.written, self.target).aliases(own_name)
            return
        yield from (self.under(host) for host in self._hosts(self.namespace or own_name, own_name))
        if self.namespace is None:
            yield self

    def _hosts(self, name: str | None, own_name: str | None) -> Iterator[str]:
        if name is None:
            return
        yield name
        if names_us(name, own_name):
            port = re.search(r":\d+$", name)
            yield from (host for host in (f"{loopback}{port[0] if port else ''}" for loopback in LOOPBACK[:2])
                        if host != name)

    def under(self, namespace: str | None) -> Reference:
        """Return the same repository and target in another namespace."""
        return Reference(self.repository, self.target, namespace)

    def __str__(self) -> str:
        separator = "@" if isinstance(self.target, Digest) else ":"
        return f"{self.docker_repository()}{separator}{self.target}"


# =====================================================================================================================
# 3. Manifests: what an image consists of
# Uses: vocabulary, references.
# =====================================================================================================================


def manifest_type(data: bytes) -> str | None:
    """Return the media type of a manifest or an index, or None if data is neither.

    It is the `mediaType` in the JSON, or is derived from the other properties if that is missing, as OCI Image
    Spec v1.1 allows.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict):
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


def descriptors(document: Mapping[str, Any], *names: str) -> Iterator[Mapping[str, Any]]:
    """Yield the descriptors in the named properties of a parsed manifest or index."""
    for name in names:
        value = document.get(name)
        for descriptor in value if isinstance(value, list) else [value]:
            if isinstance(descriptor, dict) and isinstance(descriptor.get("digest"), str):
                yield descriptor


def platform_of(platform: Any) -> str:
    """Return an object with os, architecture and variant as Docker writes it: linux/arm64/v8. Empty if it has none."""
    parts = [platform.get(key) for key in ("os", "architecture", "variant")] if isinstance(platform, dict) else []
    return "/".join(str(part) for part in parts if part)


def same_platform(one: str, other: str) -> bool:
    """Return True if two platforms have the same operating system and architecture, whatever the variant."""
    return one.split("/")[:2] == other.split("/")[:2]


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
        declared = (content_type or "").partition(";")[0].strip()
        own = manifest_type(data)
        media_type = declared or own
        if media_type is None or not MEDIA_TYPE.fullmatch(media_type):
            raise RegistryError("MANIFEST_INVALID", f"Content-Type: {declared!r} is not a manifest's media type")
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
            document = json.loads(self.data)
        except (ValueError, RecursionError) as e:
            raise RegistryError("MANIFEST_INVALID", f"the manifest is not JSON: {e}") from None
        if not isinstance(document, dict):
            raise RegistryError("MANIFEST_INVALID", "the manifest is not a JSON object")
        return document

    def check(self) -> None:
        """Raise MANIFEST_INVALID if a property that holds descriptors is malformed."""
        for name in ("config", "subject", "layers", "blobs", "manifests"):
            value = self.document.get(name)
            many = name in ("layers", "blobs", "manifests")
            if value is None:
                continue
            if isinstance(value, list) != many:
                raise RegistryError("MANIFEST_INVALID", f"{name} is not {'a list' if many else 'a descriptor'}")
            for descriptor in value if many else [value]:
                self._check_descriptor(name, descriptor)
        self._check_referrer()

    def _check_referrer(self) -> None:
        """Raise MANIFEST_INVALID if a property that lists of referrers show has the wrong type."""
        config, annotations = self.document.get("config"), self.document.get("annotations")
        kinds = (self.document.get("artifactType"), config.get("mediaType") if isinstance(config, dict) else None)
        if not all(kind is None or isinstance(kind, str) for kind in kinds):
            raise RegistryError("MANIFEST_INVALID", "artifactType or the config's mediaType is not a string")
        if annotations is not None and not (isinstance(annotations, dict) and all(
                isinstance(value, str) for value in annotations.values())):
            raise RegistryError("MANIFEST_INVALID", "annotations are not an object of strings")

    @staticmethod
    def _check_descriptor(name: str, descriptor: Any) -> None:
        """Raise MANIFEST_INVALID if a descriptor is malformed (OCI Image Spec v1.1, "Properties")."""
        fields = descriptor if isinstance(descriptor, dict) else {}
        try:
            Digest.parse(fields["digest"])
        except MALFORMED_ERRORS as e:
            raise RegistryError("MANIFEST_INVALID", f"{name} has a descriptor without a valid digest: {e}") from None
        size = fields.get("size")
        if type(size) is not int or not 0 <= size < SIZE_LIMIT:
            raise RegistryError("MANIFEST_INVALID", f"{name} has a descriptor without a valid size: {size!r}")

    def sizes(self, *names: str, foreign: bool = False) -> dict[Digest, int]:
        """Return the digests in the named properties with their sizes in bytes: of distributable content, or the rest.

        Malformed descriptors are ignored: unlike pushed manifests, those of Docker are not validated.
        """
        found = {}
        for descriptor in descriptors(self.document, *names):
            elsewhere = descriptor.get("urls") or NON_DISTRIBUTABLE.search(str(descriptor.get("mediaType")))
            size = descriptor.get("size")
            if bool(elsewhere) == foreign and type(size) is int and 0 <= size < SIZE_LIMIT:
                with contextlib.suppress(ValueError):
                    found[Digest.parse(descriptor["digest"])] = size
        return found

    def undistributed(self) -> dict[Digest, int]:
        """Return the layers that a registry need not have, because they have other sources, with their sizes."""
        required = self.sizes("config", "layers", "blobs")
        return {digest: size for digest, size in self.sizes("layers", "blobs", foreign=True).items()
                if digest not in required}

    def platforms(self) -> list[Digest]:
        """Return the manifests of an index that are images. Attestations have an unknown platform.

        See docs.docker.com/build/metadata/attestations/attestation-storage.
        """
        found = []
        for descriptor in descriptors(self.document, "manifests"):
            platform = descriptor.get("platform")
            if not isinstance(platform, dict) or platform.get("os") != "unknown":
                with contextlib.suppress(ValueError):
                    found.append(Digest.parse(descriptor["digest"]))
        return found

    def listed(self, *names: str) -> list[Digest]:
        """Return the digests in the named properties, each once. Malformed ones are ignored."""
        found: dict[Digest, None] = {}
        for descriptor in descriptors(self.document, *names):
            with contextlib.suppress(ValueError):
                found[Digest.parse(descriptor["digest"])] = None
        return list(found)

    def child(self, digest: Digest) -> Mapping[str, Any] | None:
        """Return the descriptor by which an index lists a manifest, or None."""
        return next((descriptor for descriptor in descriptors(self.document, "manifests")
                     if descriptor["digest"] == str(digest)), None)

    @property
    def subject(self) -> Digest | None:
        """The digest of the `subject`, or None."""
        return next((Digest.parse(descriptor["digest"]) for descriptor in descriptors(self.document, "subject")), None)

    def referrer(self) -> dict[str, Any]:
        """Return the descriptor for a list of referrers (OCI Distribution Spec v1.1, "Listing Referrers")."""
        config = self.document.get("config")
        fallback = config.get("mediaType") if isinstance(config, dict) else None
        artifact_type = self.document.get("artifactType") or fallback
        descriptor = {"mediaType": self.media_type, "digest": str(self.digest), "size": len(self.data)}
        if artifact_type:
            descriptor["artifactType"] = artifact_type
        if isinstance(self.document.get("annotations"), dict):
            descriptor["annotations"] = self.document["annotations"]
        return descriptor


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
# 4. Configuration: where Docker is, and the credentials of docker login
# Uses: vocabulary, references.
# =====================================================================================================================

DEFAULT_SOCKET = "/var/run/docker.sock"


@dataclass(frozen=True)
class EngineHost:
    """The address of the Docker daemon: a unix socket, or a host and a port, with or without TLS.

    Follows the rules of the docker CLI for DOCKER_HOST, DOCKER_TLS_VERIFY and DOCKER_CERT_PATH
    (docs.docker.com/reference/cli/docker/#environment-variables).
    """

    path: str = ""
    host: str = ""
    port: int = 0
    tls: ssl.SSLContext | None = None

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> EngineHost:
        """Read the DOCKER_ variables. Raises ValueError if one is invalid."""
        text = environ.get("DOCKER_HOST") or f"unix://{DEFAULT_SOCKET}"
        scheme, separator, rest = text.partition("://")
        if not separator or scheme not in ("unix", "tcp"):
            raise ValueError(f"DOCKER_HOST={text!r} is not supported: use unix:///path or tcp://host:port")
        if scheme == "unix":
            return cls(path=rest or DEFAULT_SOCKET)
        tls = cls._tls(environ) if environ.get("DOCKER_TLS_VERIFY") else None
        try:
            parts = urllib.parse.urlsplit(f"//{rest}")
            port = parts.port
        except ValueError as e:
            raise ValueError(f"DOCKER_HOST={text!r} is malformed: {e}") from None
        if parts.path.strip("/") or parts.query or parts.username is not None:
            raise ValueError("DOCKER_HOST must be tcp://host:port, without user, path or query")
        return cls(host=parts.hostname or "127.0.0.1", port=port or (2376 if tls else 2375), tls=tls)

    @staticmethod
    def _tls(environ: Mapping[str, str]) -> ssl.SSLContext:
        folder = Path(environ.get("DOCKER_CERT_PATH") or Path.home() / ".docker")
        try:
            context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
            context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
        except OSError as e:  # includes ssl.SSLError
            raise ValueError("DOCKER_TLS_VERIFY is set, but ca.pem, cert.pem and key.pem cannot be read "
                             f"from DOCKER_CERT_PATH={folder}: {e.strerror or e}") from None
        return context

    def connect(self, timeout: float) -> socket.socket:
        """Open a connection. timeout, in seconds, applies to each socket operation. Raises OSError."""
        if self.path:
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.settimeout(timeout)
                sock.connect(self.path)
            except BaseException:
                sock.close()
                raise
            return sock
        sock = socket.create_connection((self.host, self.port), timeout)
        return self.tls.wrap_socket(sock, server_hostname=self.host) if self.tls else sock

    def advice(self, error: Exception) -> str:
        """Explain to the user why Docker cannot be reached, and what to do about it."""
        if isinstance(error, FileNotFoundError):
            return (f"{self.path} does not exist: is Docker running? In a container, mount it with "
                    f"-v {DEFAULT_SOCKET}:{self.path}")
        if isinstance(error, PermissionError):
            return f"permission denied on {self.path}: run as root or as a member of the group that owns it"
        if isinstance(error, ConnectionRefusedError):
            return f"connection refused at {self}: Docker is not running, or listens on another address"
        if isinstance(error, TimeoutError):
            return f"no answer from {self} in time"
        if isinstance(error, http.client.IncompleteRead | ConnectionError):
            return f"the connection to {self} was lost: Docker is restarting or was stopped"
        return f"{self}: {error}"

    def __str__(self) -> str:
        return f"unix://{self.path}" if self.path else f"tcp://{self.host}:{self.port}"


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
            if found:
                found.for_http()  # fail here rather than later if they cannot be encoded
            return found
        except FileNotFoundError:
            return None
        except (OSError, subprocess.SubprocessError, *MALFORMED_ERRORS) as e:
            log.warning("ignoring the credentials in %s, which cannot be used: %s", self.path, type(e).__name__)
            return None

    @staticmethod
    def _host(key: str) -> str:
        """Return the host of a key of `auths`, which may be a URL."""
        return key.partition("://")[2].partition("/")[0] if "://" in key else key.partition("/")[0]

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
# 5. Waiting: deadlines, and work that many wait for
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

    def __init__(self, seconds: float = math.inf, connection: socket.socket | None = None):
        """seconds are from now on. connection is the client's, or None if no client waits."""
        self._moment, self._connection = time.monotonic() + seconds, connection
        self._cancelled = False

    def left(self) -> float:
        """The seconds that are left; 0 when the moment has passed."""
        return max(self._moment - time.monotonic(), 0)

    def within(self, seconds: float) -> Deadline:
        """A deadline for the same client, at most this many seconds from now."""
        return Deadline(min(seconds, self.left()), self._connection)

    def unlimited(self) -> Deadline:
        """A deadline for the same client that never passes: for a body, which may take its time."""
        return Deadline(math.inf, self._connection)

    def cancel(self) -> None:
        """End every wait, as if the client had gone: it has its answer."""
        self._cancelled = True

    def wait(self, wait_for: Callable[[float], T]) -> T:
        """Wait for something: the one function that waits on behalf of a client.

        wait_for waits for some seconds, as threading.Event.wait does, and returns a true value if it happened. That
        value is returned, or the last false one when the deadline has passed. Raises ClientGone.
        """
        while True:
            left = self.left()
            value = wait_for(min(left, self.CHECK_INTERVAL))
            if value or not left:
                return value
            self._check_client()

    def _check_client(self) -> None:
        if self._cancelled:
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

    own_name is the name by which it knows this registry: its Host header.
    """

    own_name: str | None = None
    credentials: Credentials | None = None
    deadline: Deadline = field(default_factory=Deadline)
    user_agent: str = ""
    accept: str = ""

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


@contextlib.contextmanager
def on_failure(action: Callable[[], Any]) -> Iterator[None]:
    """Call an action if the body of the `with` raises."""
    try:
        yield
    except BaseException:
        action()
        raise


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
        self._result: Any = None
        self.error: Exception | None = None

    def run(self, work: Callable[[], Any]) -> None:
        """Do the work, and keep its result or its error."""
        try:
            self._result = work()
        except Exception as e:  # a boundary: the waiting threads raise it
            self.error = without_frames(e)

    def outcome(self, deadline: Deadline) -> Any:
        """Wait for the end, and return the result or raise the error. STILL_PULLING when the deadline passes before."""
        if not deadline.wait(self.done.wait):
            raise RegistryError("STILL_PULLING", f"Docker is still {self.what}: ask again")
        if self.error:
            raise self.error.with_traceback(None)
        return self._result


class Jobs:
    """Runs at most one job for a key at a time; whoever asks meanwhile gets the same job.

    The key has to hold everything that changes the outcome. A job goes on when the client that started it has
    gone, and a retry joins it or finds its work done.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _jobs
        self._jobs: dict[Hashable, Job] = {}

    def start(self, key: Hashable, work: Callable[[], Any], what: str) -> Job:
        """The job under way for a key, or a new one that does this work."""
        with self._lock:
            job = self._jobs.get(key)
            if job is None:
                job = self._jobs[key] = Job(what)
                with on_failure(lambda: self._jobs.pop(key)):
                    start_thread(self._run, key, job, work)
        return job

    def _run(self, key: Hashable, job: Job, work: Callable[[], Any]) -> None:
        job.run(work)
        with self._lock:
            del self._jobs[key]
        job.done.set()


class ProgressLog:
    """Logs the beginning and the end of some long work, and a line every PROGRESS_INTERVAL seconds in between."""

    def __init__(self, what: str):
        self._what, self._next = what, time.monotonic() + PROGRESS_INTERVAL
        self.started = time.monotonic()
        log.info("%s: started", what)

    def __enter__(self) -> ProgressLog:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error:
            self.failed(error)

    def tell(self, line: Callable[[float], str]) -> None:
        """Log a line if it is time for one: line(seconds of the monotonic clock) returns the text."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + PROGRESS_INTERVAL
            log.info("%s: %s", self._what, line(now))

    def tell_rate(self, count: int) -> None:
        """Tell how many bytes have been read so far."""
        self.tell(lambda now: f"{human_bytes(count)}, {human_bytes(count / (now - self.started))}/s")

    def done(self, how: str) -> None:
        """Log the last line of work that succeeded."""
        log.info("%s: done in %s, %s", self._what, human_seconds(time.monotonic() - self.started), how)

    def failed(self, error: BaseException) -> None:
        """Log the last line of work that failed; leaving the `with` by an exception calls this."""
        log.warning("%s: failed after %s: %s", self._what, human_seconds(time.monotonic() - self.started),
                    printable(str(error)))


# =====================================================================================================================
# 6. Engine: the Docker Engine API
# Uses: configuration.
# =====================================================================================================================


class EngineConnection(http.client.HTTPConnection):
    """An HTTP connection to the Docker daemon at an EngineHost."""

    def __init__(self, host: EngineHost, timeout: float):
        super().__init__("docker", timeout=timeout)
        self._engine_host, self._seconds = host, timeout

    def connect(self) -> None:
        """Open the socket. Called by http.client before the first request."""
        self.sock = self._engine_host.connect(self._seconds)


@dataclass(frozen=True)
class EngineInfo:
    """A description of an engine: its versions, its image store ("containerd" or "classic"), its data folder."""

    version: str
    api: tuple[int, int]
    store: str
    root: Path
    identity: str
    indexes: tuple[tuple[str, bool], ...] = ()  # configured registry, True if it is secure
    insecure_networks: tuple[str, ...] = ()
    platform: str = ""          # linux/amd64
    is_podman: bool = False
    user_agent: str = ""        # how it begins, when the engine asks registries for anything

    def __str__(self) -> str:
        name = "Podman" if self.is_podman else "Docker"
        return f"{name} {self.version}, API {self.api[0]}.{self.api[1]}, {self.store} image store"


@dataclass(frozen=True)
class EngineImage:
    """An image as `docker inspect` shows it. size is the unpacked size in bytes.

    id is the digest of the manifest or index on the containerd store, and of the config on the classic store.
    layers are the diff IDs of the root file system. origins are the image's RepoDigests: name@digest.
    """

    id: Digest
    size: int
    layers: tuple[str, ...]
    origins: tuple[str, ...] = ()
    platform: str = ""      # linux/arm64/v8
    details: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)  # all that inspect shows

    # What a container runtime takes from a config (OCI Image Spec v1.1, "Image Configuration", and Docker's additions).
    CONFIG: ClassVar[tuple[str, ...]] = (
        "User", "ExposedPorts", "Env", "Entrypoint", "Cmd", "Volumes", "WorkingDir", "Labels", "StopSignal",
        "ArgsEscaped", "Healthcheck", "OnBuild", "Shell")

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> EngineImage:
        """Parse an answer of inspect. Raises one of MALFORMED_ERRORS."""
        root = document.get("RootFS") or {}
        platform = {"os": document.get("Os"), "architecture": document.get("Architecture"),
                    "variant": document.get("Variant")}
        return cls(Digest.parse(document["Id"]), int(document.get("Size") or 0), tuple(root.get("Layers") or ()),
                   tuple(str(name) for name in document.get("RepoDigests") or ()), platform_of(platform), document)

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


class PullProgress:
    """The progress of a pull, computed from Docker's JSON messages."""

    def __init__(self, now: float):
        self._started = now
        self._done: dict[str, int] = {}
        self._total: dict[str, int] = {}
        self.status = "waiting for Docker"

    def update(self, message: Mapping[str, Any]) -> None:
        """Process one message of `POST /images/create`."""
        layer, status, detail = message.get("id"), message.get("status"), message.get("progressDetail")
        if not isinstance(status, str):
            return
        self.status = printable(status.lower())
        if not isinstance(layer, str) or not isinstance(detail, dict):
            return
        current, total = detail.get("current"), detail.get("total")
        if status == "Downloading" and isinstance(current, int) and isinstance(total, int) and total > 0:
            self._done[layer], self._total[layer] = current, total
        elif status in ("Download complete", "Pull complete", "Extracting") and layer in self._total:
            self._done[layer] = self._total[layer]

    def line(self, now: float) -> str:
        """Format as "45%, 12.3 MB of 27.1 MB, 4.1 MB/s, downloading". now is in seconds, as in the constructor."""
        total, done = sum(self._total.values()), sum(self._done.values())
        if not total:
            return self.status
        rate = done / max(now - self._started, 0.001)
        return (f"{100 * done // total}%, {human_bytes(done)} of {human_bytes(total)}, "
                f"{human_bytes(rate)}/s, {self.status}")


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
    ("NAME_INVALID", ("invalid reference format",)),
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

    def __init__(self, host: EngineHost):
        self.host = host
        # Docker repeats the User-Agent of its caller to registries, and so perhaps to us. Nobody can guess this one.
        self.token = secrets.token_hex(16)
        self.user_agent = f"k3d-registry-dockerd/{__version__} {self.token}"
        self._described: tuple[float, EngineInfo] | None = None  # replaced atomically: needs no lock

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
    def _request(self, method: str, path: str, headers: Mapping[str, str] | None = None, *, body: bytes | None = None,
                 timeout: float = ENGINE_TIMEOUT) -> Iterator[http.client.HTTPResponse]:
        """Send a request. The response must be read within the `with`. timeout is in seconds, per read."""
        connection = EngineConnection(self.host, timeout)
        with self.connection_errors(), contextlib.closing(connection):
            connection.request(method, path, body, {"User-Agent": self.user_agent, **(headers or {})})
            with connection.getresponse() as response:
                self._check_refusal(method, path, response.status, response.headers.get("Content-Type", ""))
                yield response

    @staticmethod
    def _check_refusal(method: str, path: str, status: int, content_type: str) -> None:
        """Raise ENGINE_FAILED if something in front of Docker, and not Docker, refuses a call.

        Docker's own errors are JSON, and none is 403. The advice is for docker-socket-proxy and its like.
        """
        if status < 300 or status == 500 or (status != 403 and content_type.split(";")[0] in ("", "application/json")):
            return
        call = re.sub(r"^/v[\d.]+|\?.*$", "", path)
        section = call.split("/")[1].upper()
        raise RegistryError("ENGINE_FAILED", (
            f"{method} {call} was answered with status {status}, not by Docker but by a proxy in front of its socket: "
            f"allow that call (docker-socket-proxy: {section}=1{' POST=1' if method == 'POST' else ''})"))

    def _get(self, path: str, headers: Mapping[str, str] | None = None) -> tuple[int, Any]:
        """Return the status and the parsed JSON of a GET."""
        with self._request("GET", path, headers) as response:
            data = response.read(JSON_LIMIT)
            if response.length:  # read(limit) does not detect a body that is too short
                raise http.client.IncompleteRead(data, response.length)
        try:
            return response.status, json.loads(data)
        except (ValueError, RecursionError):
            raise RegistryError("ENGINE_FAILED", f"Docker answered {path} with status {response.status} and "
                                                 f"a body that is not JSON: {data[:200]!r}") from None

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
        """Return the JSON object at a path, or None if the status is 404."""
        status, document = self._get(path)
        if status == 404:
            return None
        if status != 200:
            raise RegistryError("ENGINE_FAILED", f"Docker answered {path}: {self._message(status, document)}")
        if not isinstance(document, dict) or any(not document.get(key) for key in required):
            raise RegistryError("ENGINE_FAILED", f"Docker's answer to {path} lacks {' or '.join(required)}")
        return document

    # ---- the description of the engine

    def info(self) -> EngineInfo:
        """Return the engine's description, at most ENGINE_FRESH seconds old.

        It is not cached for longer because a restart can change all of it, even the image store.
        """
        described = self._described
        if described is None or time.monotonic() - described[0] > ENGINE_FRESH:
            described = (time.monotonic(), self._describe())
            self._described = described
        return described[1]

    def _describe(self) -> EngineInfo:
        version = self._get_object("/version", "Version", "ApiVersion") or {}
        info = self._get_object("/info", "ID") or {}
        with self._malformed_answers("/version and /info"):
            api = tuple(int(part) for part in version["ApiVersion"].split("."))
            major, minor = min(api, API_VERSION)
            snapshotter = ["driver-type", "io.containerd.snapshotter.v1"] in (info.get("DriverStatus") or [])
            registries = info.get("RegistryConfig") or {}
            indexes = (registries.get("IndexConfigs") or {}).items()
            components = [component.get("Name") for component in version.get("Components") or ()]
            names = ("Version", "GoVersion", "GitCommit", "KernelVersion", "Os", "Arch")
            return EngineInfo(str(version["Version"]), (major, minor), "containerd" if snapshotter else "classic",
                              Path(info.get("DockerRootDir") or "/var/lib/docker"), str(info["ID"]),
                              tuple((str(name), bool(index.get("Secure"))) for name, index in indexes),
                              tuple(str(network) for network in registries.get("InsecureRegistryCIDRs") or ()),
                              platform_of({"os": version.get("Os"), "architecture": version.get("Arch")}),
                              "Podman Engine" in components,
                              "docker/{} go/{} git-commit/{} kernel/{} os/{} arch/{}".format(*map(version.get, names)))

    def is_insecure(self, registry: str) -> bool:
        """Return True if Docker accepts plain HTTP and any certificate from a registry.

        Docker's own rule (docs.docker.com/reference/cli/dockerd/#insecure-registries): the configured value
        for this host; otherwise True if one of its addresses is in an insecure network.
        """
        info = self.info()
        configured = dict(info.indexes).get(registry)
        if configured is not None:
            return not configured
        try:
            networks = [ipaddress.ip_network(network) for network in info.insecure_networks]
            host = urllib.parse.urlsplit(f"//{registry}").hostname or ""
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            addresses = [ipaddress.ip_address(str(address[4][0]).partition("%")[0]) for address in found]
            return any(address in network for address in addresses for network in networks)
        except (OSError, ValueError):  # the name does not resolve or is invalid
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
        """Return the IDs of all images that Docker has in some repositories.

        The classic store only matches the short form of a name: alpine, not docker.io/library/alpine.
        """
        full = ["/".join(docker_name(name)) for name in repositories]
        names = [name.removeprefix(prefix) for name in full for prefix in ("", "docker.io/", "docker.io/library/")]
        path = self._path("/images/json?filters=" + urllib.parse.quote(json.dumps({"reference": names})))
        with self._malformed_answers(path):
            return [Digest.parse(image["Id"]) for image in self._list_images(path)]

    def image_ids(self) -> list[Digest]:
        """Return the IDs of all images that have a name."""
        path = self._path("/images/json?filters=" + urllib.parse.quote(json.dumps({"dangling": ["false"]})))
        with self._malformed_answers(path):
            return [Digest.parse(image["Id"]) for image in self._list_images(path)]

    def _list_images(self, path: str) -> list[Any]:
        status, document = self._get(path)
        if status != 200 or not isinstance(document, list):
            raise RegistryError("ENGINE_FAILED", f"Docker cannot list images: {self._message(status, document)}")
        return document

    def listed(self) -> list[ListedImage]:
        """Return all images that Docker lists."""
        path = self._path("/images/json")
        document = self._list_images(path)
        with self._malformed_answers(path):
            return [ListedImage(Digest.parse(image["Id"]), *(tuple(str(name) for name in image.get(key) or ())
                                                             for key in ("RepoTags", "RepoDigests")))
                    for image in document]

    def names(self) -> list[tuple[Digest, str, str]]:
        """Return the ID, the name and the tag of every tagged image, as Docker shows them."""
        named = ((image.id, *tag.rpartition(":")[::2]) for image in self.listed() for tag in image.tags)
        return [(image_id, name, tag) for image_id, name, tag in named if TAG.fullmatch(tag)]

    def origin_digest(self, reference: Reference, credentials: Credentials | None) -> Digest:
        """Return the current digest of an image in its own registry. Raises PullFailed.

        Docker sends a request to that registry, which counts towards its rate limit.
        """
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
        with self._request("POST", self._path(f"/images/create?{query}"), headers, timeout=PULL_TIMEOUT) as response:
            for message in self._good_messages(response, repository):
                tell(message)

    def _good_messages(self, response: http.client.HTTPResponse, repository: str) -> Iterator[dict[str, Any]]:
        """Yield the messages of a pull. Raises PullFailed if one reports a failure."""
        for message in self._messages(response):
            error = self._error(message) or (response.status >= 300 and self._message(response.status, message))
            if error:
                raise PullFailed(pull_failure(str(error), response.status, repository), str(error))
            yield message
        if response.status >= 300:
            raise PullFailed(pull_failure("", response.status, repository), f"status {response.status}")

    @staticmethod
    def _error(message: Mapping[str, Any]) -> Any:
        """Return the error in a message of a pull; a false value if there is none."""
        detail = message.get("errorDetail")
        return message.get("error") or (isinstance(detail, dict) and detail.get("message"))

    @staticmethod
    def _messages(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
        """Yield the JSON objects of a stream that has one per line."""
        pending = b""
        while data := response.read1(PIECE):
            *lines, pending = (pending + data).split(b"\n")
            if len(pending) > MANIFEST_LIMIT:
                raise RegistryError("ENGINE_FAILED", f"Docker sent a line of more than {MANIFEST_LIMIT} bytes")
            yield from (Engine._parse_message(line) for line in lines if line.strip())
        if pending.strip():
            yield Engine._parse_message(pending)

    @staticmethod
    def _parse_message(line: bytes) -> dict[str, Any]:
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise RegistryError("ENGINE_FAILED", f"Docker sent a line that is not JSON: {line[:200]!r}")
        return message

    @contextlib.contextmanager
    def export(self, image_id: Digest) -> Iterator[http.client.HTTPResponse]:
        """Stream the tar of `docker save`. It must be read within the `with`."""
        with self._request("GET", self._path(f"/images/{image_id}/get"), timeout=PULL_TIMEOUT) as response:
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
            sock = self.host.connect(ENGINE_TIMEOUT)
            try:
                sock.sendall(f"POST {path} HTTP/1.1\r\nHost: docker\r\nUser-Agent: {self.user_agent}\r\n"
                             "Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n".encode())
                status, content_type = self._parse_head(self._read_head(sock))
                if status == 101:
                    return sock
                self._check_refusal("POST", path, status, content_type)
                sock.close()
                return self.host.connect(ENGINE_TIMEOUT)
            except BaseException:
                sock.close()
                raise

    @staticmethod
    def _parse_head(head: bytes) -> tuple[int, str]:
        """Return the status and the Content-Type of an HTTP response; 0 if it is not one."""
        status = re.match(rb"HTTP/1\.\d (\d{3}) ", head)
        content_type = re.search(rb"(?mi)^content-type:\s*(\S+)", head)
        return int(status[1]) if status else 0, content_type[1].decode("latin-1") if content_type else ""

    @staticmethod
    def _read_head(sock: socket.socket) -> bytes:
        """Read an HTTP response up to the empty line, byte by byte: the bytes after it belong to HTTP/2."""
        head = bytearray()
        while not head.endswith(b"\r\n\r\n"):
            byte = sock.recv(1)
            if not byte or len(head) > 16 * KIB:
                raise ConnectionResetError("the connection was closed during an answer")
            head += byte
        return bytes(head)


# =====================================================================================================================
# 7. Transfers: what a provider gives, and content on its way
# Uses: waiting.
# =====================================================================================================================


# ---- what a provider gives


class FileBody:
    """A slice of an open file, length bytes from start: the server sends it with sendfile."""

    waits = False

    def __init__(self, file: BinaryIO, start: int, length: int):
        self.file, self.start, self.length = file, start, length

    def parts(self) -> Iterator[FileBody]:
        """Itself: there is only one part."""
        yield self

    def __iter__(self) -> Iterator[bytes]:
        position, end = self.start, self.start + self.length
        while position < end and (data := os.pread(self.file.fileno(), min(end - position, PIECE), position)):
            position += len(data)
            yield data

    def close(self) -> None:
        """Close the file; an open one survives its deletion."""
        self.file.close()


Data = bytes | memoryview
Part = Data | FileBody


class StreamBody:
    """length bytes as an iterator of pieces, some of which may be slices of files. It has to be closed.

    length is None if it is not known yet. waits says that the first piece may take long, so headers should be sent
    before it is asked for.
    """

    def __init__(self, parts: Iterator[Part], length: int | None, close: Callable[[], None],
                 waits: bool = False):
        self._parts, self.length, self.close, self.waits = parts, length, close, waits

    def parts(self) -> Iterator[Part]:
        """The pieces. A slice of a file is valid until the next piece is taken."""
        return self._parts

    def __iter__(self) -> Iterator[Data]:
        for part in self._parts:
            if isinstance(part, FileBody):
                yield from part
            else:
                yield part


Body = FileBody | StreamBody


class Blob(Protocol):
    """Content that a provider has. size is in bytes."""

    size: int

    def open(self, start: int, length: int, deadline: Deadline) -> Body:
        """length bytes from start on, for the client of a deadline.

        Raises RegistryError: where possible here, and not while the body is read.
        """


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
        """Raises OSError if there is no such file."""
        self.path, self.size = path, path.stat().st_size

    def open(self, start: int, length: int, deadline: Deadline) -> Body:
        """See Blob."""
        try:
            return FileBody(open(self.path, "rb"), start, length)
        except FileNotFoundError as e:
            raise RegistryError("BLOB_UNKNOWN", f"{self.path.name} was removed a moment ago") from e
        except OSError as e:
            raise RegistryError("STORE_FAILED", f"cannot read {self.path}: {e.strerror or e}") from e


class BytesBlob:
    """Content that is in memory."""

    def __init__(self, data: bytes):
        self._data, self.size = data, len(data)

    def open(self, start: int, length: int, deadline: Deadline) -> Body:
        """See Blob."""
        return StreamBody(iter([self._data[start:start + length]]), length, lambda: None)


class FolderProvider:
    """Files named by digest: our store, or the content folder of Docker's containerd.

    containerd's local content store puts a file under its final name only when it is complete and
    verified (github.com/containerd/containerd, plugins/content/local), and so does our store.
    """

    def __init__(self, name: str, path_of: Callable[[Digest], Path]):
        self.name, self._path_of = name, path_of

    def find(self, digest: Digest) -> Blob | None:
        """See Provider. A file that this process may not read counts as absent."""
        path = self._path_of(digest)
        try:
            return FileBlob(path) if os.access(path, os.R_OK) else None
        except OSError:
            return None


# ---- content on its way


@contextlib.contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn errors of the operating system about our own disk into STORE_FAILED; what continues "cannot"."""
    try:
        yield
    except OSError as e:
        raise RegistryError("STORE_FAILED", f"cannot {what}: {e.strerror or e}") from e


def write_all(write: Callable[[memoryview], int | None], data: Data) -> Iterator[memoryview]:
    """Write with a call that may take less than all at a time; yields each part when it is written."""
    rest = memoryview(data)
    while rest:
        count = write(rest) or 0
        yield rest[:count]
        rest = rest[count:]


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
        # Not the exception itself: its traceback would keep this transfer, and so the file, alive.
        self._error: tuple[str, str, Mapping[str, str]] | None = None

    # ---- for the source

    def begin(self, file: BinaryIO) -> None:
        """The content has begun to arrive, and will grow in this file, which is closed when nobody needs it."""
        weakref.finalize(self, file.close)
        with self._change:
            self._file = file
            self._change.notify_all()

    def begin_at(self, path: Path) -> None:
        """The same with a path. The file may be renamed or removed later. STORE_FAILED."""
        with disk_errors(f"read {path}"):
            self.begin(open(path, "rb"))  # noqa: SIM115 - closed when nobody needs it

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

    def end(self, error: BaseException | None = None) -> None:
        """All of it has arrived and is verified, or no more will. The first end counts.

        Errors other than RegistryError are UNKNOWN to readers.
        """
        known = error if error is None or isinstance(error, RegistryError) else (
            RegistryError("UNKNOWN", type(error).__name__))
        with self._change:
            if known is None and self._blob is None and self.count != self.size:
                known = RegistryError("ENGINE_FAILED", f"the content ended {self.size - self.count} bytes early")
            if not self._ended:
                self._ended, self._error = True, (known.code, known.detail, known.headers) if known else None
                self._change.notify_all()

    # ---- for readers

    @property
    def failed(self) -> bool:
        """True if it has ended with an error."""
        with self._change:
            return self._error is not None

    @property
    def started(self) -> bool:
        """True if the content has begun to arrive, and nothing has gone wrong so far."""
        with self._change:
            return self._file is not None and self._error is None

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
        return StreamBody(parts, length, parts.close, waits=True)

    def follow(self, start: int, length: int, deadline: Deadline) -> Generator[Part, None, None]:
        """length bytes from start on, as they arrive, for as long as the client of a deadline is there."""
        position, end = start, start + length
        while position < end:
            part = self._await(position, deadline.unlimited())
            if not isinstance(part, FileBody):
                with contextlib.closing(part.open(position, end - position, deadline)) as body:
                    yield from body.parts()
                return
            count = min(part.length, end - position)
            yield FileBody(part.file, position, count)
            position += count

    def _await(self, position: int, deadline: Deadline) -> FileBody | Blob:
        """What has arrived from a position on, as soon as there is something; or the blob that has all of it."""
        with self._change:
            self._wait(deadline, lambda: self._readable() > position or self._ended)
            self._raise()
            if self._blob:
                return self._blob
            assert self._file is not None
            return FileBody(self._file, position, self._readable() - position)

    def _wait(self, deadline: Deadline, condition: Callable[[], bool]) -> bool:
        return deadline.wait(lambda seconds: self._change.wait_for(condition, seconds))

    def _raise(self) -> None:
        if self._error:
            raise RegistryError(*self._error)

    def _readable(self) -> int:
        return self.count if self._ended else min(self.count, self.size - 1)


class Transfers:
    """The transfers that are under way, by a key that holds everything that changes what they bring."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _transfers
        self._transfers: dict[Hashable, Transfer] = {}

    def get(self, key: Hashable) -> Transfer | None:
        """The transfer under way for a key, or None."""
        with self._lock:
            return self._transfers.get(key)

    def join(self, key: Hashable, size: int, fill: Callable[[Transfer], None]) -> Transfer:
        """The transfer under way for a key, or a new one that fill() fills in a thread of its own."""
        with self._lock:
            transfer = self._transfers.get(key)
            if transfer is None:
                transfer = self._transfers[key] = Transfer(size)
                with on_failure(lambda: self._transfers.pop(key)):
                    start_thread(self._run, key, transfer, fill)
        return transfer

    def _run(self, key: Hashable, transfer: Transfer, fill: Callable[[Transfer], None]) -> None:
        error: Exception | None = None
        try:
            fill(transfer)
        except Exception as e:  # a boundary: the readers raise it
            error = e
        with self._lock:
            del self._transfers[key]
        transfer.end(error)  # last, so a reader that sees the end no longer finds it in the table


def in_turn(*actions: Callable[[], None]) -> Callable[[], None]:
    """One action out of several. Each is called, even if one before it raises."""

    def run() -> None:
        with contextlib.ExitStack() as stack:
            for action in reversed(actions):
                stack.callback(action)

    return run


@dataclass
class SharedRead:
    """Content that is being read: how many readers there are, and what they follow once there is a second one."""

    readers: int = 0
    transfer: Transfer | None = None


class SharedReads:
    """Shares reads of a source among simultaneous readers of the same content.

    The first reader has the source to itself: most content has one reader at a time, and needs no file. When a
    second one comes, the source is read once more, into a file without a name, and the first follows that file too,
    from where it is. If the file fails, each reader continues from the source at its own position.
    """

    WORTHWHILE = MIB    # bytes of content from which on it is shared
    STEP = MIB          # bytes after which readers are told that the file has grown: that wakes up all of them

    def __init__(self, folder: Path):
        """folder is where the files are. It is made when it is needed."""
        self._folder = folder
        self._lock = threading.Lock()  # guards _reads, and what is in it
        self._reads: dict[Digest, SharedRead] = {}

    def open(self, digest: Digest, size: int, read: Callable[[int, int], StreamBody], deadline: Deadline) -> Body:
        """All of some content, whose size is in bytes. read(start, length) reads it from its source."""
        if size < self.WORTHWHILE:
            return read(0, size)
        with self._lock:
            shared = self._reads.setdefault(digest, SharedRead())
            first, begins = shared.readers == 0, None
            shared.readers += 1
            if not first and (shared.transfer is None or shared.transfer.failed):
                begins = shared.transfer = Transfer(size)
        leave = functools.partial(self._leave, digest, shared)
        with on_failure(leave):
            if begins:
                self._begin(shared, begins, read)
            if not first:
                parts = self._follow(shared, read, size, 0, deadline)
                return StreamBody(parts, size, in_turn(parts.close, leave), waits=True)
            source = read(0, size)
        parts = self._first(shared, source, read, size, deadline)
        return StreamBody(parts, size, in_turn(parts.close, source.close, leave))

    def _leave(self, digest: Digest, shared: SharedRead) -> None:
        with self._lock:
            shared.readers -= 1
            if not shared.readers:
                del self._reads[digest]

    def _first(self, shared: SharedRead, source: StreamBody, read: Callable[[int, int], StreamBody], size: int,
               deadline: Deadline) -> Generator[Part, None, None]:
        """The content for the first reader: out of the source, until there is something to follow."""
        position = 0
        for piece in source:
            yield piece
            position += len(piece)
            if shared.transfer:
                source.close()
                yield from self._follow(shared, read, size, position, deadline)
                return

    @staticmethod
    def _follow(shared: SharedRead, read: Callable[[int, int], StreamBody], size: int, position: int,
                deadline: Deadline) -> Generator[Part, None, None]:
        """The content from a position on, out of the file; or from the source if that fails."""
        assert shared.transfer is not None
        try:
            for part in shared.transfer.follow(position, size - position, deadline):
                yield part
                position += part.length if isinstance(part, FileBody) else len(part)
        except RegistryError as e:
            log.warning("the readers of some content do not share it: %s", e.detail)
            with contextlib.closing(read(position, size - position)) as body:
                yield from body.parts()

    def _begin(self, shared: SharedRead, transfer: Transfer, read: Callable[[int, int], StreamBody]) -> None:
        try:
            start_thread(self._fill, shared, transfer, read)
        except RegistryError as e:
            transfer.end(e)

    def _fill(self, shared: SharedRead, transfer: Transfer, read: Callable[[int, int], StreamBody]) -> None:
        """Read all of the content into a file, for as long as there are readers."""
        try:
            with contextlib.closing(read(0, transfer.size)) as source, disk_errors(f"write to {self._folder}"):
                self._folder.mkdir(parents=True, exist_ok=True)
                file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115 - the transfer closes it
                transfer.begin(file)
                self._copy(source, file.fileno(), shared, transfer)
            transfer.end()
        except Exception as e:  # a boundary: the readers go on by themselves
            transfer.end(e)

    @staticmethod
    def _write_before(file: int, end: int, rest: memoryview) -> int:
        return os.pwrite(file, rest, end - len(rest))

    def _copy(self, source: StreamBody, file: int, shared: SharedRead, transfer: Transfer) -> None:
        position = 0
        for piece in source:
            end = position + len(piece)
            # Not with write(): sendfile moves the file's own position about.
            for part in write_all(functools.partial(self._write_before, file, end), piece):
                position += len(part)
            if position - transfer.count >= self.STEP or position == transfer.size:
                transfer.advance(position - transfer.count)
            if not shared.readers:
                raise RegistryError("UNAVAILABLE", "nobody reads the content any more")


# =====================================================================================================================
# 8. Store: content by digest, on our own disk
# Uses: transfers.
# =====================================================================================================================


@dataclass(frozen=True)
class Record:
    """What is kept about one image: its manifest's digest, and the size in bytes of everything that it needs."""

    target: Digest
    content: Mapping[Digest, int]

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read a record. OSError if it cannot be read, ValueError if it is malformed."""
        try:
            document = json.loads(path.read_bytes())
            content = {Digest.parse(digest): int(size) for digest, size in document["content"].items()}
            return cls(Digest.parse(document["target"]), content)
        except MALFORMED_ERRORS as e:
            raise ValueError(f"not a record of an image: {e}") from e

    def dump(self) -> bytes:
        """The record as bytes that load() understands."""
        content = {str(digest): size for digest, size in self.content.items()}
        return json.dumps({"target": str(self.target), "content": content}).encode()


def make_link(source: Path, target: Path) -> None:
    """Give a file a second name, unless a file of its size has that name. FileNotFoundError without the file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            return os.link(source, target)
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):  # removed a moment ago: then there is room now
                if target.stat().st_size == source.stat().st_size:
                    return None
                target.unlink()  # a crash of the machine cut it short


def list_folder(folder: Path) -> list[str]:
    """The names in a folder, none if there is no such folder. STORE_FAILED if it cannot be read."""
    with disk_errors(f"read {folder}"):
        try:
            return [path.name for path in folder.iterdir()]
        except FileNotFoundError:
            return []


class Links:
    """The content that belongs to one owner, by digest: a folder of hard links to the store's content.

    The bytes are stored once, however many owners they have. The file system counts the owners: content with no
    link but the store's own belongs to nobody. Linking is atomic, so no reader and no killed process ever sees half
    of it, and no lock is needed.
    """

    def __init__(self, store: Store, folder: Path):
        self._store, self._folder = store, folder

    def path(self, digest: Digest) -> Path:
        """Where the content is, if it belongs here."""
        return self._folder / digest.algorithm / digest.hex

    def size(self, digest: Digest) -> int | None:
        """The size of the content in bytes, or None if it does not belong here."""
        with disk_errors(f"read {self.path(digest)}"):
            try:
                return self.path(digest).stat().st_size
            except FileNotFoundError:
                return None

    def digests(self) -> Iterator[Digest]:
        """The digests of everything that belongs here; STORE_FAILED if not all of it can be listed."""
        for algorithm in list_folder(self._folder):
            for name in list_folder(self._folder / algorithm):
                if not name.startswith("."):
                    yield Digest(algorithm, name)

    def touch(self, digest: Digest) -> bool:
        """Mark content as used now, if that is possible. True if it belongs here."""
        with contextlib.suppress(OSError):  # a read-only file system, say
            os.utime(self.path(digest))
        return self.size(digest) is not None

    def adopt(self, digest: Digest, size: int | None = None) -> bool:
        """Make content of the store belong here too, as used now. True if the store has it.

        Content of another size than the given one, in bytes, counts as lost: a machine may have crashed.
        """
        source = self._store.blob_path(digest)
        with disk_errors(f"link {source}"):
            try:
                os.utime(source)
                if size is not None and source.stat().st_size != size:
                    return False
                make_link(source, self.path(digest))
            except FileNotFoundError:
                return False
            return True

    def take(self, file: Path, digest: Digest) -> None:
        """Make a finished file, whose digest was verified, belong here under its digest. The file stays.

        It is linked here first, so the store's own link never looks like content that nobody needs.
        """
        with disk_errors(f"write to {self._folder}"):
            os.utime(file)
            if not self.adopt(digest, file.stat().st_size):
                make_link(file, self.path(digest))
                make_link(file, self._store.blob_path(digest))

    def drop(self, digest: Digest) -> bool:
        """Make content no longer belong here, and free it if it belongs to nobody else. True if it did belong here."""
        with disk_errors(f"remove {digest}"):
            try:
                self.path(digest).unlink()
            except FileNotFoundError:
                return False
            self._store.release(digest)
            return True


class Store:
    """Our own disk: content by digest, and its owners.

        blobs/sha256/<hex>          content, whole and verified
        docker/sha256/<hex>         links to what came from Docker, or was fetched because Docker lacks it
        exports/sha256/<hex>        the record of one exported image, named by the image's ID
        fetched/sha256/<hex>        the record of what Docker lacked of an image, named by its manifest
        repositories/<name>/...     what was pushed: see Repository
        .../.<random>               any of them while it is being written

    The folder is made at the first write: a program that only reads Docker's containerd image store needs none. Every
    write goes to a temporary name in the same folder, and is renamed or linked when it is whole and verified, so a
    reader never sees part of a blob. A record holds the size of every blob it needs, and counts only while all of
    them are there in that size: a crash of the machine may have cut one short.
    """

    def __init__(self, root: Path):
        self.root, self.repositories = root, root / "repositories"
        self.docker = Links(self, root / "docker")
        # The size and the hash of uploads between two requests. Only whoever has reserved the path touches its entry.
        self.hashes: dict[Path, tuple[int, Any]] = {}
        # Held while a manifest is pushed or deleted: it is several small files, and two such changes must not mix.
        self.changing = threading.Lock()
        self._recording = threading.Lock()  # held while a record of fetched content, a small file, is read and written
        self._lock = threading.Lock()  # guards _unfinished and _reserved
        self._unfinished: set[Path] = set()
        self._reserved: set[Path] = set()

    def blob_path(self, digest: Digest) -> Path:
        """Where content is, if the store has it."""
        return self.root / "blobs" / digest.algorithm / digest.hex

    def release(self, digest: Digest) -> int:
        """Free content that belongs to nobody. The number of bytes freed: 0 if it is still needed."""
        path = self.blob_path(digest)
        try:
            status = path.stat()
            if status.st_nlink > 1:
                return 0
            path.unlink()
        except FileNotFoundError:
            return 0
        return status.st_size

    def check_space(self, needed: int) -> None:
        """STORE_FAILED unless this many bytes can be written."""
        if not needed:
            return
        with disk_errors(f"write to {self.root}"):
            self.root.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.root).free
        if free < needed:
            raise RegistryError("STORE_FAILED", f"{human_bytes(needed)} are needed in {self.root}, and only "
                                                f"{human_bytes(free)} are free")

    # ---- writing

    def begin(self, folder: Path) -> Path:
        """A temporary name in a folder, to be renamed when the file is whole; end() has to follow in any case."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f".{secrets.token_hex(8)}"
        with self._lock:
            self._unfinished.add(path)
        return path

    def end(self, path: Path) -> None:
        """Remove what is left under a temporary name."""
        path.unlink(missing_ok=True)
        with self._lock:
            self._unfinished.discard(path)

    def write(self, path: Path, data: bytes) -> None:
        """Write a small file, whole or not at all."""
        with disk_errors(f"write {path}"):
            temporary = self.begin(path.parent)
            try:
                temporary.write_bytes(data)
                temporary.rename(path)
            finally:
                self.end(temporary)

    def remove(self, path: Path) -> bool:
        """Remove a file. True if there was one."""
        with disk_errors(f"remove {path}"):
            try:
                path.unlink()
            except FileNotFoundError:
                return False
            return True

    @contextlib.contextmanager
    def reserved(self, path: Path) -> Iterator[None]:
        """Reserve a path for one request; UPLOAD_BUSY if another one has it."""
        with self._lock:
            if path in self._reserved:
                raise RegistryError("UPLOAD_BUSY", "another request is writing to this upload: ask for its state, and "
                                                   "continue from there")
            self._reserved.add(path)
        try:
            yield
        finally:
            with self._lock:
                self._reserved.discard(path)

    def close(self) -> None:
        """Remove everything half-written, at the end of the process."""
        with self._lock:
            unfinished = list(self._unfinished)
        for path in unfinished:
            self.end(path)

    # ---- records: what was exported, and what was fetched

    def _record_path(self, image_id: Digest) -> Path:
        return self.root / "exports" / image_id.algorithm / image_id.hex

    def record_export(self, image_id: Digest, target: Digest, content: Iterable[Digest]) -> None:
        """Note an exported image: the digest of its manifest, and the content that it needs, which is here."""
        with disk_errors(f"read {self.root}"):
            sizes = {digest: self.docker.path(digest).stat().st_size for digest in content}
        self.write(self._record_path(image_id), Record(target, sizes).dump())

    def noted_target(self, image_id: Digest) -> Digest | None:
        """The digest of the manifest that an image had when it was exported, or None if it never was."""
        try:
            return Record.load(self._record_path(image_id)).target
        except (OSError, ValueError):
            return None

    def exported(self, image_id: Digest) -> Digest | None:
        """The digest of an exported image's manifest, or None unless everything it needs is here."""
        path = self._record_path(image_id)
        try:
            record = Record.load(path)
            os.utime(path)  # what is freed depends on the last use
        except (OSError, ValueError):
            return None
        whole = all(self.docker.size(digest) == size for digest, size in record.content.items())
        return record.target if whole else None

    def _fetched_path(self, manifest: Digest) -> Path:
        return self.root / "fetched" / manifest.algorithm / manifest.hex

    def record_fetch(self, manifest: Digest, content: Mapping[Digest, int]) -> None:
        """Note that content, with its size in bytes, stays here for a manifest for as long as that is in use.

        Some of it may be elsewhere now: it stays once it is here.
        """
        path, known = self._fetched_path(manifest), {}
        with self._recording:
            with contextlib.suppress(OSError, ValueError):
                known = dict(Record.load(path).content)
            if content.items() <= known.items():
                os.utime(path)
            else:
                self.write(path, Record(manifest, {**known, **content}).dump())

    def touch_fetch(self, manifest: Digest, content: Mapping[Digest, int]) -> None:
        """If anything was fetched for a manifest, mark it as used now, and all of its content as needed."""
        if self._fetched_path(manifest).exists():
            self.record_fetch(manifest, content)

    # ---- tidying up

    def is_old(self, path: Path, now: float, age: float) -> bool:
        """True if a file was last used more than `age` seconds before now, and no request is writing to it."""
        with self._lock:
            if path in self._unfinished or path in self._reserved:
                return False
        try:
            return path.stat().st_mtime < now - age
        except FileNotFoundError:
            return False

    def tidy_up(self, in_docker: Callable[[Digest], bool], now: float) -> None:
        """Remove what nothing refers to any more. now is in seconds since the epoch.

        That is: exports of images that Docker no longer has, what was fetched and not used for FETCHED_AGE
        seconds, content without an owner, and what a killed process left half-written. What was used within the
        last EVICTION_AGE seconds stays: a node may be in the middle of a pull, and an export or a push may still be
        arriving.
        """
        with disk_errors(f"tidy up {self.root}"):
            needed = self._needed("exports", now, EVICTION_AGE, in_docker)
            needed |= self._needed("fetched", now, FETCHED_AGE, lambda _: False)
            for digest in set(self.docker.digests()) - needed:
                if self.is_old(self.docker.path(digest), now, EVICTION_AGE):
                    self.docker.drop(digest)
            for path in self.root.rglob(".*"):
                if self.is_old(path, now, EVICTION_AGE):
                    path.unlink(missing_ok=True)
            for digest in self.contents():
                if self.is_old(self.blob_path(digest), now, EVICTION_AGE):
                    self.release(digest)

    @contextlib.contextmanager
    def log_freed(self) -> Iterator[None]:
        """Log how many bytes the body of the `with` has freed."""
        before = self.contents()
        yield
        after = self.contents()
        freed = sum(size for digest, size in before.items() if digest not in after)
        if freed:
            log.info("store: freed %s that nothing refers to any more", human_bytes(freed))

    def contents(self) -> dict[Digest, int]:
        """All content of the store, and its size in bytes."""
        found = {}
        for path in self.root.glob("blobs/*/[0-9a-f]*"):
            with contextlib.suppress(FileNotFoundError):  # it was deleted a moment ago
                found[Digest(path.parent.name, path.name)] = path.stat().st_size
        return found

    def _needed(self, folder: str, now: float, age: float, is_needed: Callable[[Digest], bool]) -> set[Digest]:
        """Remove the old records that nobody needs, and return the content of the others."""
        needed: set[Digest] = set()
        for path in self.root.glob(f"{folder}/*/[0-9a-f]*"):
            try:
                record = Record.load(path)
            except ValueError as e:
                log.warning("store: %s is %s", path, e)
                record = None
            gone = self.is_old(path, now, age) and (
                record is None or not is_needed(Digest(path.parent.name, path.name)))
            if gone:
                path.unlink(missing_ok=True)
            elif record:
                needed.update(record.content)
        return needed


class BlobWriter:
    """Content that is being written to a store. Unless it is kept, nothing of it remains."""

    def __init__(self, store: Store, algorithm: str = "sha256"):
        self._store, self._hash = store, hashlib.new(algorithm)
        self._folder = store.root / "blobs" / algorithm
        with disk_errors(f"write to {self._folder}"):
            self.path = store.begin(self._folder)
            self._file = open(self.path, "wb", buffering=0)  # noqa: SIM115 - closed by finish()

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.discard()

    def write(self, data: Data) -> None:
        """Append bytes. Readers of the file see them immediately. STORE_FAILED if the disk does not take them."""
        with disk_errors(f"write to {self._folder}"):
            for part in write_all(self._file.write, data):
                self._hash.update(part)

    def finish(self) -> Digest:
        """Close the file, and return the digest of everything that was written."""
        with disk_errors(f"write to {self._folder}"):
            self._file.close()
        return Digest(self._hash.name, self._hash.hexdigest())

    def keep(self, owner: Links) -> Digest:
        """Finish, and make the content belong to an owner under its digest, which is returned."""
        digest = self.finish()
        owner.take(self.path, digest)
        self._store.end(self.path)
        return digest

    def discard(self) -> None:
        """Forget the content, unless it was kept."""
        with contextlib.suppress(OSError):  # a full disk says so again here
            self._file.close()
        self._store.end(self.path)


# =====================================================================================================================
# 9. Hosted: the registry of what was pushed
# Uses: transfers, store.
# =====================================================================================================================


class Upload:
    """An upload during one request: a file that grows, and the hash of what is in it.

    The hash is kept in the store's memory from one request to the next. After a restart it is computed again
    from the file.
    """

    def __init__(self, store: Store, path: Path):
        self._store, self._path = store, path
        with disk_errors(f"write {path}"):
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
            self.size = self._file.tell()
        size, self._hash = store.hashes.pop(path, (0, None))
        if self._hash is None or size != self.size:
            self._hash = self._hash_file("sha256")

    def _hash_file(self, algorithm: str) -> Any:
        digest = hashlib.new(algorithm)
        with disk_errors(f"read {self._path}"), open(self._path, "rb") as file:
            while data := file.read(MIB):
                digest.update(data)
        return digest

    def write(self, data: bytes) -> None:
        """Append bytes; STORE_FAILED if the disk does not take them."""
        with disk_errors(f"write {self._path}"):
            for part in write_all(self._file.write, data):
                self._hash.update(part)
                self.size += len(part)

    def keep(self, expected: Digest, owner: Links) -> None:
        """End the upload, and make its content belong to an owner. DIGEST_INVALID, and then nothing of it is kept."""
        algorithm = expected.algorithm
        content = self._hash if algorithm == self._hash.name else self._hash_file(algorithm)
        try:
            if content.hexdigest() != expected.hex:
                raise RegistryError("DIGEST_INVALID", f"the {self.size} bytes that arrived have the digest "
                                                      f"{algorithm}:{content.hexdigest()}, not {expected}")
            owner.take(self._path, expected)
        finally:
            self.cancel()

    def cancel(self) -> None:
        """End the upload, and forget what has arrived."""
        self._store.remove(self._path)
        self._hash = None

    def close(self) -> None:
        """Close the file, at the end of each request."""
        self._file.close()
        if self._hash is not None:
            self._store.hashes[self._path] = (self.size, self._hash)


class Repository:
    """What was pushed under one name: blobs, manifests and tags.

        <name>/_blobs/sha256/<hex>                  a link to a blob
        <name>/_manifests/sha256/<hex>              a link to a manifest: from then on the manifest exists
        <name>/_types/sha256/<hex>                  its media type, if the manifest itself does not say it
        <name>/_tags/<tag>                          the digest of a manifest
        <name>/_referrers/sha256/<hex>/<digest>     an empty file: this manifest has that subject
        <name>/_uploads/<session>                   what has arrived of an upload

    Path components of a repository's name never begin with an underscore, so nested names do not clash.
    A tag or a referrer counts only while its manifest exists. So the order of two writes is enough for a push
    to be there whole or not at all, whenever the process is killed.
    """

    def __init__(self, store: Store, name: str):
        self._store, self.name = store, name
        self.folder = store.repositories / name
        self.blobs = Links(store, self.folder / "_blobs")
        self.manifests = Links(store, self.folder / "_manifests")

    # ---- manifests

    def _type_path(self, digest: Digest) -> Path:
        return self.folder / "_types" / digest.algorithm / digest.hex

    def _referrers_folder(self, subject: Digest) -> Path:
        return self.folder / "_referrers" / subject.algorithm / subject.hex

    def manifest(self, target: str | Digest) -> Manifest | None:
        """The manifest that a tag or a digest names here, or None."""
        digest = target if isinstance(target, Digest) else self.tag(target)
        if digest is None:
            return None
        data = self._read(self.manifests.path(digest))
        if data is None:
            return None
        media_type = (self._read(self._type_path(digest)) or b"").decode(errors="replace")
        if not MEDIA_TYPE.fullmatch(media_type):
            media_type = manifest_type(data) or OCI_MANIFEST
        return Manifest(digest, media_type, data)

    @staticmethod
    def _read(path: Path) -> bytes | None:
        """The bytes of a small file, or None if there is none. STORE_FAILED if it cannot be read."""
        with disk_errors(f"read {path}"):
            try:
                return path.read_bytes()
            except FileNotFoundError:
                return None

    def put_manifest(self, manifest: Manifest, tags: Iterable[str]) -> None:
        """Keep a manifest, and then its tags. STORE_FAILED."""
        digest = manifest.digest
        with self._store.changing:
            if manifest.media_type != manifest_type(manifest.data):
                self._store.write(self._type_path(digest), manifest.media_type.encode())
            else:
                self._store.remove(self._type_path(digest))  # of an earlier push of the same bytes
            if manifest.subject:
                self._store.write(self._referrers_folder(manifest.subject) / str(digest), b"")
            with BlobWriter(self._store, digest.algorithm) as writer:
                writer.write(manifest.data)
                writer.keep(self.manifests)
            for tag in tags:
                self._store.write(self.folder / "_tags" / tag, str(digest).encode())

    def delete_manifest(self, digest: Digest) -> bool:
        """Remove a manifest with all its tags. True if it was here."""
        with self._store.changing:
            manifest = self.manifest(digest)
            if manifest is None:
                return False
            for tag in self.tags():
                if self.tag(tag) == digest:
                    self.delete_tag(tag)
            gone = self.manifests.drop(digest)
            self._store.remove(self._type_path(digest))
            if manifest.subject:
                self._store.remove(self._referrers_folder(manifest.subject) / str(digest))
            return gone

    def referrers(self, subject: Digest) -> Iterator[Manifest]:
        """The manifests here that have this subject, in the order of their own digests."""
        for path in sorted(self._referrers_folder(subject).glob("sha*:*")):
            manifest = self.manifest(Digest.parse(path.name))
            if manifest:
                yield manifest

    def has_blob(self, digest: Digest, size: int) -> bool:
        """True if a blob is here in its size, in bytes. It counts as used now."""
        return self.blobs.touch(digest) and self.blobs.size(digest) == size

    # ---- tags

    def tag(self, tag: str) -> Digest | None:
        """The digest of the manifest that a tag names, or None if there is no such tag or manifest."""
        try:
            digest = Digest.parse((self._read(self.folder / "_tags" / tag) or b"").decode())
        except ValueError:
            return None
        return digest if self.manifests.size(digest) is not None else None

    def tags(self) -> list[str]:
        """All tags, sorted."""
        return sorted(path.name for path in (self.folder / "_tags").glob("[!.]*") if self.tag(path.name))

    def delete_tag(self, tag: str) -> bool:
        """Remove a tag. True if there was one. Its manifest stays."""
        return self._store.remove(self.folder / "_tags" / tag)

    # ---- uploads

    def begin_upload(self) -> str:
        """Begin an upload, and return its session: a name that nobody can guess."""
        session = secrets.token_hex(16)
        path = self.folder / "_uploads" / session
        with disk_errors(f"write {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return session

    def upload_size(self, session: str) -> int:
        """The bytes of an upload that have arrived, even while a request writes to it. BLOB_UPLOAD_UNKNOWN."""
        try:
            if re.fullmatch(r"[0-9a-f]{32}", session):
                return (self.folder / "_uploads" / session).stat().st_size
        except FileNotFoundError:
            pass
        raise RegistryError("BLOB_UPLOAD_UNKNOWN", f"{self.name} has no upload {session!r}")

    @contextlib.contextmanager
    def upload(self, session: str) -> Iterator[Upload]:
        """An upload to write to, for one request at a time. BLOB_UPLOAD_UNKNOWN, UPLOAD_BUSY."""
        path = self.folder / "_uploads" / session
        unknown = RegistryError("BLOB_UPLOAD_UNKNOWN", f"{self.name} has no upload {session!r}")
        if not re.fullmatch(r"[0-9a-f]{32}", session):
            raise unknown
        with self._store.reserved(path):
            if not path.exists():
                raise unknown
            if path.stat().st_nlink > 1:  # it is a blob already: the process was killed before it removed this name
                self._store.remove(path)
                raise unknown
            with contextlib.closing(Upload(self._store, path)) as upload:
                yield upload

    # ---- tidying up

    def tidy_up(self, now: float) -> None:
        """Remove abandoned uploads, and blobs that no manifest here refers to any more."""
        for path in self.folder.glob("_uploads/*"):
            if self._store.is_old(path, now, UPLOAD_AGE):
                self._store.remove(path)
                self._store.hashes.pop(path, None)
        unused = set(self.blobs.digests())
        for digest in self.manifests.digests():
            manifest = self.manifest(digest)  # or an error, and then nothing is removed: its blobs are not known
            unused.difference_update(manifest.listed("config", "layers", "blobs") if manifest else ())
        for digest in unused:
            if self._store.is_old(self.blobs.path(digest), now, UPLOAD_AGE):
                self.blobs.drop(digest)


class Hosted:
    """The registry of what was pushed here: a complete one, which knows nothing of Docker.

    Each method takes a reference whose namespace, if it has one, names this registry.
    """

    def __init__(self, store: Store):
        self._store = store

    def repository(self, name: str) -> Repository:
        """The repository of that name, whether or not anything is in it. The name has to be valid."""
        return Repository(self._store, name)

    def names(self) -> list[str]:
        """The names of the repositories that anything was ever pushed to, sorted."""
        found = []
        for folder, names, _ in os.walk(self._store.repositories):
            if any(name in ("_manifests", "_blobs", "_uploads") for name in names):
                found.append(str(Path(folder).relative_to(self._store.repositories)))
            names[:] = [name for name in names if not name.startswith("_")]
        return sorted(found)

    # ---- reading

    def manifest(self, reference: Reference) -> Manifest:
        """The manifest that a reference names; MANIFEST_UNKNOWN."""
        manifest = self.repository(reference.repository).manifest(reference.target)
        if manifest is None:
            raise RegistryError("MANIFEST_UNKNOWN", f"{reference} was not pushed here")
        return manifest

    def blob(self, reference: Reference) -> Blob:
        """The blob whose digest a reference names; BLOB_UNKNOWN.

        It counts as used now: a client that was told that it is here may rely on that for UPLOAD_AGE seconds.
        """
        blobs, digest = self.repository(reference.repository).blobs, reference.digest
        blob = FolderProvider("hosted", blobs.path).find(digest)
        if blob is None or not blobs.touch(digest):
            raise RegistryError("BLOB_UNKNOWN", f"{digest} was not pushed to {reference.repository}")
        return blob

    def tags(self, reference: Reference) -> list[str]:
        """The tags of a repository, sorted; NAME_UNKNOWN. The reference's target is not used."""
        repository = self.repository(reference.repository)
        if not (repository.folder / "_manifests").exists():
            raise RegistryError("NAME_UNKNOWN", f"nothing was pushed to {reference.repository}")
        return repository.tags()

    def referrers(self, reference: Reference) -> list[dict[str, Any]]:
        """The descriptors of the manifests in a repository that have the digest of a reference as their subject."""
        manifests = self.repository(reference.repository).referrers(reference.digest)
        return [manifest.referrer() for manifest in manifests]  # one at a time: they may be large

    def catalog(self) -> list[str]:
        """The names of the repositories that have tags, sorted."""
        return [name for name in self.names() if self.repository(name).tags()]

    # ---- writing

    def push_blob(self, reference: Reference, pieces: Iterable[bytes]) -> None:
        """Take the whole content of a blob in one go. DIGEST_INVALID, and then nothing of it is kept."""
        expected = reference.digest
        with BlobWriter(self._store, expected.algorithm) as writer:
            for piece in pieces:
                writer.write(piece)
            found = writer.finish()
            if found != expected:
                raise RegistryError("DIGEST_INVALID", f"the bytes that arrived have the digest {found}, not {expected}")
            writer.keep(self.repository(reference.repository).blobs)

    def mount(self, reference: Reference, source: str | None) -> bool:
        """Make a blob of another repository belong to this one too. True if that repository has it.

        Without a source, any repository will do (OCI Distribution Spec v1.1, "Mounting a blob from another
        repository").
        """
        digest = reference.digest
        sources = self.names() if source is None else [source]
        owned = any(self.repository(name).blobs.size(digest) is not None for name in sources)
        return owned and self.repository(reference.repository).blobs.adopt(digest)

    @staticmethod
    def accept_manifest(reference: Reference, data: bytes, content_type: str | None) -> Manifest:
        """Check the bytes of a manifest that is pushed. MANIFEST_INVALID; DIGEST_INVALID if the reference has another
        digest."""
        expected = reference.target if isinstance(reference.target, Digest) else None
        manifest = Manifest.accept(data, content_type, expected.algorithm if expected else "sha256")
        if expected not in (None, manifest.digest):
            raise RegistryError("DIGEST_INVALID", f"the manifest that arrived has the digest {manifest.digest}")
        return manifest

    def put_manifest(self, reference: Reference, manifest: Manifest, tags: Iterable[str]) -> None:
        """Keep a manifest with its tags. MANIFEST_BLOB_UNKNOWN if its repository lacks a blob: then nothing is kept."""
        repository = self.repository(reference.repository)
        sizes = manifest.sizes("config", "layers", "blobs")
        missing = [str(digest) for digest, size in sizes.items() if not repository.has_blob(digest, size)]
        if missing:
            raise RegistryError("MANIFEST_BLOB_UNKNOWN", f"{reference.repository} lacks {', '.join(missing)}: push "
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
                self.repository(name).tidy_up(now)
            except RegistryError as e:
                log.warning("store: %s is not tidied up: %s", name, e.detail)


# =====================================================================================================================
# 10. Content service: Docker's content by way of its socket
# Uses: waiting, engine, transfers.
# =====================================================================================================================


# ---- HTTP/2, the part that one gRPC call at a time needs (RFC 9113)


FRAME_DATA, FRAME_HEADERS, FRAME_RESET, FRAME_SETTINGS = 0x0, 0x1, 0x3, 0x4
FRAME_PING, FRAME_GOAWAY, FRAME_WINDOW_UPDATE, FRAME_CONTINUATION = 0x6, 0x7, 0x8, 0x9
END_STREAM, ACK, END_HEADERS, PADDED = 0x1, 0x1, 0x4, 0x8
SETTING_HEADER_TABLE_SIZE, SETTING_ENABLE_PUSH, SETTING_INITIAL_WINDOW, SETTING_MAX_FRAME = 0x1, 0x2, 0x4, 0x5
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAME_LIMIT = 64 * KIB          # bytes of a frame that we accept: larger frames need more memory and are no faster
WINDOW = 2**31 - 1              # bytes: the maximum; the socket itself slows down a fast sender
WINDOW_STEP = 16 * MIB          # bytes consumed before the window is enlarged again
MESSAGE_LIMIT = 16 * MIB        # bytes of a gRPC message; containerd sends 1 MiB at a time

# `grpc-status` in HPACK's Huffman coding (RFC 7541, 5.2). We announce a header table of size 0, so the server
# cannot replace the name with a reference, and no HPACK decoder is needed to find it.
GRPC_STATUS = bytes.fromhex("9acac8b21234da8f")
GRPC_OK, GRPC_NOT_FOUND, GRPC_UNIMPLEMENTED = 0, 5, 12


class Http2Error(Exception):
    """The server closed the connection, or violated HTTP/2, gRPC or protobuf."""


class GrpcError(Exception):
    """A call ended with a status other than OK (github.com/grpc/grpc, doc/statuscodes.md)."""

    def __init__(self, status: int):
        super().__init__(f"gRPC status {status}")
        self.status = status


class Payload:
    """A reader for bytes that arrive in pieces of any size. Long pieces are not copied.

    The methods raise Http2Error if the bytes end too early.
    """

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
            if byte < 0x80:
                return number
        raise Http2Error(f"{self._what} has a varint of more than 64 bits")


class Http2Connection:
    """A connection to a gRPC server that carries one call at a time. Methods raise Http2Error and OSError.

    One call at a time keeps flow control simple: a slow reader blocks the server through the socket, and no
    other call has to wait behind it. The cost is one connection per stream, which is very cheap on a unix
    socket.
    """

    def __init__(self, sock: socket.socket):
        self._sock, self._reader = sock, sock.makefile("rb", FRAME_LIMIT)
        self._stream = -1
        self._unacknowledged = 0  # bytes consumed since the connection's window was enlarged
        settings = struct.pack(">HIHIHIHI", SETTING_HEADER_TABLE_SIZE, 0, SETTING_ENABLE_PUSH, 0,
                               SETTING_INITIAL_WINDOW, WINDOW, SETTING_MAX_FRAME, FRAME_LIMIT)
        sock.sendall(HTTP2_PREFACE + self._frame(FRAME_SETTINGS, 0, 0, settings)
                     + self._frame(FRAME_WINDOW_UPDATE, 0, 0, struct.pack(">I", WINDOW - 65535)))
        kind, flags, _, payload = self._read_frame()
        if kind != FRAME_SETTINGS:
            raise Http2Error("the server did not send its settings first")
        self._serve_connection(kind, flags, payload)

    def close(self) -> None:
        """Close the connection."""
        self._reader.close()
        self._sock.close()

    def call(self, path: str, message: bytes) -> Iterator[Payload]:
        """Send one message to a gRPC method and yield each message of the answer as soon as it starts to arrive.

        The unread rest of a message is skipped before the next one. Raises GrpcError if the call ends with a
        status other than OK. The connection can only be reused after the iterator is exhausted or GrpcError.
        """
        self._stream += 2
        headers = b"".join(self._literal(name, value) for name, value in (
            (b":method", b"POST"), (b":scheme", b"http"), (b":path", path.encode()), (b":authority", b"docker"),
            (b"content-type", b"application/grpc"), (b"te", b"trailers")))
        self._sock.sendall(self._frame(FRAME_HEADERS, END_HEADERS, self._stream, headers)
                           + self._frame(FRAME_DATA, END_STREAM, self._stream,
                                         struct.pack(">BI", 0, len(message)) + message))
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

    @staticmethod
    def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload

    def _read_exactly(self, count: int) -> bytes:
        data: bytes = self._reader.read(count)
        if len(data) < count:
            raise Http2Error("the connection was closed")
        return data

    def _read_frame(self) -> tuple[int, int, int, bytes]:
        """Read the next frame. Returns kind, flags, stream and payload."""
        head = self._read_exactly(9)
        length = int.from_bytes(head[:3], "big")
        if length > FRAME_LIMIT:
            raise Http2Error("the frame is too large, or the server does not speak HTTP/2")
        kind, flags, stream = struct.unpack(">BBI", head[3:])
        return kind, flags, stream & WINDOW, self._read_exactly(length)

    def _serve_connection(self, kind: int, flags: int, payload: bytes) -> None:
        """Handle a frame that belongs to the connection rather than to the current stream."""
        if kind == FRAME_SETTINGS and not flags & ACK:
            self._sock.sendall(self._frame(FRAME_SETTINGS, ACK, 0, b""))
        elif kind == FRAME_PING and not flags & ACK:
            self._sock.sendall(self._frame(FRAME_PING, ACK, 0, payload))
        elif kind == FRAME_GOAWAY:
            raise Http2Error("Docker is closing the connection")

    def _data(self) -> Iterator[bytes]:
        """Yield the data of the current stream as it arrives, then check the status in its trailers."""
        unacknowledged = 0
        while True:
            kind, flags, stream, payload = self._read_frame()
            if stream != self._stream:
                self._serve_connection(kind, flags, payload)
            elif kind == FRAME_RESET:
                raise Http2Error(f"Docker reset the stream, code {int.from_bytes(payload, 'big')}")
            elif kind == FRAME_DATA:
                unacknowledged = self._consumed(unacknowledged + len(payload), self._stream)
                self._unacknowledged = self._consumed(self._unacknowledged + len(payload), 0)
                if flags & END_STREAM:
                    raise Http2Error("the stream ended without a status")
                yield payload[1:len(payload) - payload[0]] if flags & PADDED else payload
            elif kind == FRAME_HEADERS:
                headers = payload
                while not flags & END_HEADERS:
                    _, more, _, payload = self._read_frame()
                    headers, flags = headers + payload, flags | more & END_HEADERS
                if flags & END_STREAM:
                    return self._check_status(headers)

    def _consumed(self, count: int, stream: int) -> int:
        """Enlarge a window by count bytes if that is worth a frame. Returns the bytes still unacknowledged."""
        if count < WINDOW_STEP:
            return count
        self._sock.sendall(self._frame(FRAME_WINDOW_UPDATE, 0, stream, struct.pack(">I", count)))
        return 0

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
    while not message.at_end():
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


def decode_fields(message: Payload) -> dict[int, list[Any]]:
    """Decode a small message into lists of integers and bytes by field number."""
    found: dict[int, list[Any]] = {}
    for number, value in read_fields(message):
        found.setdefault(number, []).append(value if isinstance(value, int) else b"".join(value))
    return found


# ---- the content service


class ContentService:
    """Docker's content store, read through Docker's own socket: nothing has to be mounted or copied.

    The engine serves containerd's Content API (github.com/containerd/containerd,
    api/services/content/v1/content.proto) next to BuildKit's API. It is only useful with the containerd image
    store; `problem` tests it. Connections come from a pool and return to it after a complete call.
    """

    name = "content service"
    PREFIX = "/containerd.services.content.v1.Content/"

    def __init__(self, engine: Engine, folder: Path):
        """folder holds temporary files for content that several readers share."""
        self._engine, self._reads = engine, SharedReads(folder)
        self._lock = threading.Lock()  # guards _idle
        self._idle: list[Http2Connection] = []

    def problem(self) -> str | None:
        """Return the reason why this engine's service cannot be used, or None if it can."""
        self.close()
        try:
            self.find(Digest.of(b""))
        except RegistryError as e:
            return e.detail
        return None

    def find(self, digest: Digest) -> Blob | None:
        """See Provider."""
        info = self._info(digest)
        size = info.get(2, [0])[-1] if info else None
        return ServiceBlob(self, digest, size) if isinstance(size, int) else None

    def origins(self, digest: Digest) -> list[str]:
        """Return the names of the repositories that a blob was pulled from: containerd notes them in its labels.

        See github.com/containerd/containerd, pkg/labels: containerd.io/distribution.source.<host>.
        """
        prefix, found = b"containerd.io/distribution.source.", []
        for entry in (self._info(digest) or {}).get(5, []):
            fields = decode_fields(Payload(iter([entry]), "a label"))
            label, value = (b"".join(fields.get(number, [b""])[-1:]) for number in (1, 2))
            if label.startswith(prefix):
                host = label.removeprefix(prefix).decode(errors="replace")
                found += [f"{host}/{name}" for name in value.decode(errors="replace").split(",")]
        return found

    def _info(self, digest: Digest) -> dict[int, list[Any]] | None:
        """Return the fields of the service's description of a blob, or None if it does not have the blob."""
        call = self._call("Info", encode_fields((1, str(digest))))
        try:
            with contextlib.closing(call), self._errors(f"reading {digest}"):
                answers = [decode_fields(message) for message in call]  # to the end, so the connection can be reused
                if not answers:
                    raise Http2Error("the answer is empty")
                return decode_fields(Payload(iter(answers[-1].get(1, [b""])), "a protobuf message"))
        except GrpcError as e:
            if e.status == GRPC_NOT_FOUND:
                return None
            raise RegistryError("ENGINE_FAILED", f"Docker's content service cannot find {digest}: {e}") from e

    def share(self, digest: Digest, size: int, deadline: Deadline) -> Body:
        """Return all of a blob of size bytes. Simultaneous readers share one call."""
        return self._reads.open(digest, size, functools.partial(self.read, digest), deadline)

    def read(self, digest: Digest, start: int, length: int) -> StreamBody:
        """Return length bytes from start on. Errors before the first byte, like BLOB_UNKNOWN, are raised here."""
        if not length:
            return StreamBody(iter(()), 0, lambda: None)
        pieces = self._read(digest, start, length)
        first = next(pieces, b"")
        return StreamBody(itertools.chain([first], pieces), length, pieces.close)

    def _read(self, digest: Digest, start: int, length: int) -> Generator[Data, None, None]:
        call = self._call("Read", encode_fields((1, str(digest)), (2, start), (3, length)))
        left = length
        try:
            with contextlib.closing(call), self._errors(f"reading {digest}"):
                for piece in (piece for message in call for piece in self._data(message)):
                    piece = piece[:left]
                    left -= len(piece)
                    yield piece
        except GrpcError as e:
            raise RegistryError("BLOB_UNKNOWN", f"Docker's content service cannot read {digest}: {e}") from e
        if left:
            raise RegistryError("ENGINE_FAILED", f"Docker's content service sent {left} bytes too few of {digest}")

    @staticmethod
    def _data(message: Payload) -> Iterator[memoryview]:
        """Yield the content in a ReadContentResponse."""
        for number, value in read_fields(message):
            if number == 2 and not isinstance(value, int):
                yield from value

    def _call(self, method: str, message: bytes) -> Generator[Payload, None, None]:
        """Make a call, on an idle connection if there is one. Closing the generator aborts the call."""
        connection, fresh = self._take()
        try:
            with self._errors(f"calling {method}"):
                try:
                    answer = connection.call(self.PREFIX + method, message)
                    first = next(answer, None)
                except (OSError, Http2Error):
                    if fresh:
                        raise
                    # An idle connection breaks when Docker restarts: try a new one.
                    connection.close()
                    connection = self._connect()
                    answer = connection.call(self.PREFIX + method, message)
                    first = next(answer, None)
                if first is not None:
                    yield first
                    yield from answer
        except GrpcError:
            self._give_back(connection)
            raise
        except BaseException:
            connection.close()
            raise
        self._give_back(connection)

    def _take(self) -> tuple[Http2Connection, bool]:
        """Return a connection, and True if it is new."""
        with self._lock:
            if self._idle:
                return self._idle.pop(), False
        return self._connect(), True

    def _connect(self) -> Http2Connection:
        sock = self._engine.open_grpc()
        with self._errors("connecting"):
            try:
                return Http2Connection(sock)
            except BaseException:
                sock.close()
                raise

    def _give_back(self, connection: Http2Connection) -> None:
        with self._lock:
            keep = len(self._idle) < IDLE_CALLS
            if keep:
                self._idle.append(connection)
        if not keep:
            connection.close()

    @contextlib.contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        try:
            with self._engine.connection_errors():
                yield
        except Http2Error as e:
            raise RegistryError("ENGINE_FAILED", f"Docker's content service failed while {doing}: {e}") from e

    def close(self) -> None:
        """Close the idle connections."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()


class ServiceBlob:
    """A blob in Docker's content store."""

    def __init__(self, service: ContentService, digest: Digest, size: int):
        self._service, self._digest, self.size = service, digest, size

    def open(self, start: int, length: int, deadline: Deadline) -> Body:
        """See Blob. Only reads of the whole blob are shared."""
        if length == self.size:
            return self._service.share(self._digest, length, deadline)
        return self._service.read(self._digest, start, length)


# =====================================================================================================================
# 11. Layers: Docker's classic image store, read from its own folder
# Uses: waiting, engine, transfers.
# =====================================================================================================================


class LayerFiles:
    """Opens files in the folder of a layer by their names in the tar, without ever leaving the folder.

    A layer is untrusted: a symbolic link in a path may point anywhere. So each component of a path is opened
    on its own, without following links. The last folder is kept open because a tar lists files by folder.
    """

    STEP = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    # O_NONBLOCK: do not block if the file is a pipe.
    FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

    def __init__(self, folder: Path, newest: float):
        """newest is a time in seconds since the epoch. A file that was changed later is refused."""
        self._newest = newest
        self._root = os.open(folder, self.STEP)
        self._parent, self._parent_name = self._root, b""

    def close(self) -> None:
        """Close the folders."""
        self._leave()
        os.close(self._root)

    def _leave(self) -> None:
        if self._parent != self._root:
            os.close(self._parent)
        self._parent, self._parent_name = self._root, b""

    def _enter(self, parent: bytes) -> None:
        self._leave()
        folder = os.dup(self._root)
        try:
            for step in parent.split(b"/"):
                if step in (b"", b"."):
                    continue
                if step == b"..":
                    raise ValueError(f"{parent!r} has a .. component")
                following = os.open(step, self.STEP, dir_fd=folder)
                os.close(folder)
                folder = following
        except BaseException:
            os.close(folder)
            raise
        self._parent, self._parent_name = folder, parent

    def _locate(self, name: bytes) -> bytes:
        """Open the folder of a file. Returns the last component of its name."""
        parent, _, last = name.rpartition(b"/")
        if last in (b"", b".", b".."):
            raise ValueError(f"{name!r} is not the name of a file")
        if parent != self._parent_name:
            self._enter(parent)
        return last

    def check(self, name: bytes, size: int) -> None:
        """Raise OSError or ValueError if a file has changed since the layer was made. size is in bytes."""
        self._check(name, size, os.stat(self._locate(name), dir_fd=self._parent, follow_symlinks=False))

    def _check(self, name: bytes, size: int, status: os.stat_result) -> None:
        if not stat.S_ISREG(status.st_mode) or status.st_size != size or status.st_ctime > self._newest:
            raise ValueError(f"{name!r} has changed")

    def _open(self, name: bytes, size: int) -> int:
        file = os.open(self._locate(name), self.FILE, dir_fd=self._parent)
        try:
            self._check(name, size, os.fstat(file))
            return file
        except BaseException:
            os.close(file)
            raise

    def open(self, name: bytes, size: int) -> BinaryIO:
        """Open a file unbuffered. Checks it and raises like check()."""
        return open(self._open(name, size), "rb", buffering=0)

    def read(self, name: bytes, size: int, first: int, last: int) -> bytes:
        """Return the bytes from first up to, not including, last. Checks the file and raises like check()."""
        file = self._open(name, size)
        try:
            data = os.pread(file, last - first, first)
        finally:
            os.close(file)
        if len(data) != last - first:
            raise ValueError(f"{name!r} has become shorter")
        return data


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
    SLACK = 60              # seconds for which Docker may change files of a layer after writing its metadata

    def __init__(self, metadata: Path, files: Path, fail: Callable[[str], RegistryError]):
        """metadata and files are folders. fail records a problem and returns it as an error."""
        self._split, self._files, self._fail = metadata / "tar-split.json.gz", files, fail
        with self._errors():
            self._newest = self._split.stat().st_ctime + self.SLACK
            self.size = self._measure()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, zlib.error, *MALFORMED_ERRORS, OSError) as e:
            raise self._fail(f"{e or type(e).__name__}") from e

    def _segments(self) -> Iterator[tuple[bytes | None, int, str]]:
        """Yield (name, size, "") for each file in the tar, and (None, size, base64) for each piece between them."""
        for entry in self._entries():
            if entry["type"] == 2:
                text = entry["payload"]
                yield None, len(text) // 4 * 3 - text[-2:].count("="), text
            elif entry.get("size"):
                raw = entry.get("name_raw")
                yield binascii.a2b_base64(raw) if raw else entry["name"].encode(), entry["size"], ""

    def _entries(self) -> Iterator[dict[str, Any]]:
        """Yield the parsed lines of the metadata. Parsing many at once is three times as fast."""
        with gzip.open(self._split) as unzipped, io.BufferedReader(unzipped, PIECE) as file:
            while lines := file.readlines(PIECE):
                yield from json.loads(b"[%s]" % b",".join(lines))

    def _measure(self) -> int:
        """Return the size of the tar in bytes. Raises ValueError or OSError if a file has changed."""
        size = 0
        with contextlib.closing(LayerFiles(self._files, self._newest)) as files:
            for name, length, text in self._segments():
                if name is not None:
                    files.check(name, length)
                elif length >= self.EXTENDED and self.SPARSE in binascii.a2b_base64(text):
                    raise ValueError("sparse files are not supported")
                size += length
        return size

    def open(self, start: int, length: int, deadline: Deadline) -> Body:
        """See Blob."""
        parts = self._parts(start, start + length)
        return StreamBody(parts, length, parts.close)

    def _parts(self, start: int, end: int) -> Generator[Part, None, None]:
        """Yield the tar from position start up to end. Small parts are joined."""
        position, pending = 0, bytearray()
        with self._errors(), contextlib.closing(LayerFiles(self._files, self._newest)) as files:
            for name, size, text in self._segments():
                first, last = max(start - position, 0), min(end - position, size)
                if first < last:
                    if name is None:
                        pending += binascii.a2b_base64(text)[first:last]
                    elif last - first < self.SENDFILE:
                        pending += files.read(name, size, first, last)
                    else:
                        with files.open(name, size) as file:
                            yield bytes(pending)
                            pending.clear()
                            yield FileBody(file, first, last - first)
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
        self._lock = threading.Lock()  # guards all attributes below
        self._index: tuple[float, dict[str, Path]] = (0, {})
        self._measured: dict[tuple[Path, float], Layer] = {}
        self._failed: dict[tuple[Path, float], str] = {}
        self._manifests: dict[Digest, bytes] = {}

    def manifest(self, image: EngineImage) -> Digest:
        """Make the manifest of an image and return its digest. Raises ENGINE_FAILED if a part is not available here."""
        config = self._config(image.id)
        layers = [(Digest.parse(diff_id), self._layer(diff_id)) for diff_id in image.layers]
        missing = [str(digest) for digest, layer in layers if layer is None]
        if missing or config is None:
            raise RegistryError("ENGINE_FAILED", f"{self.name} does not have all of {image.id}")
        data = make_manifest((image.id, config.size), *((digest, layer.size) for digest, layer in layers if layer))
        digest = Digest.of(data)
        with self._lock:
            self._manifests[digest] = data
        return digest

    def find(self, digest: Digest) -> Blob | None:
        """See Provider."""
        with self._lock:
            manifest = self._manifests.get(digest)
        if manifest:
            return BytesBlob(manifest)
        try:
            return self._config(digest) or self._layer(str(digest))
        except RegistryError:  # already logged by _fail
            return None

    def _config(self, digest: Digest) -> FileBlob | None:
        try:
            return FileBlob(self._configs / digest.algorithm / digest.hex)
        except OSError:
            return None

    def _layer(self, diff_id: str) -> Layer | None:
        """Return the layer with a digest, measured only once, or None. Raises ENGINE_FAILED if it is not readable."""
        folder = self._folders().get(diff_id)
        if folder is None:
            return None
        try:
            key = (folder, (folder / "tar-split.json.gz").stat().st_mtime)
            cache = (folder / "cache-id").read_text().strip()
        except OSError:
            return None  # Docker has removed it
        if not re.fullmatch(r"[\w-]+", cache):
            return None
        with self._lock:
            failure, layer = self._failed.get(key), self._measured.get(key)
        if failure:
            raise RegistryError("ENGINE_FAILED", failure)
        if layer is None:
            layer = Layer(folder, self._overlay / cache / "diff", functools.partial(self._fail, key, diff_id))
            with self._lock:
                self._measured[key] = layer
        return layer

    def _fail(self, key: tuple[Path, float], diff_id: str, problem: str) -> RegistryError:
        failure = f"the layer {diff_id} cannot be read from {key[0]}: {printable(problem)}"
        log.warning("%s; its images will be exported", failure)
        with self._lock:
            self._failed[key] = failure
        return RegistryError("ENGINE_FAILED", failure)

    def _folders(self) -> dict[str, Path]:
        """Return the folders of layers by digest. Reads them again after Docker has added or removed a layer."""
        with self._lock:
            made, folders = self._index
        try:
            changed = self._layers.stat().st_mtime
            if changed != made:
                folders = {path.read_text().strip(): path.parent for path in self._layers.glob("*/diff")}
                with self._lock:
                    self._index = (changed, folders)
        except OSError:
            return {}
        return folders


# =====================================================================================================================
# 12. Export: images copied out of Docker
# Uses: waiting, engine, store.
# =====================================================================================================================


class ExportStream:
    """The tar of an export as a forward-only file. It counts the bytes and keeps the last ones.

    tarfile uses it as an ordinary file, because tarfile's stream mode copies all content three times. Content is
    read here, bypassing tarfile, which then only has to be told where the next header is.
    """

    TAIL = 64 * KIB

    def __init__(self, source: http.client.HTTPResponse, progress: Callable[[int], None]):
        self._source, self._progress = source, progress
        self._buffer = memoryview(bytearray(MIB))
        self._tail = b""
        self.count = 0

    def read(self, size: int) -> bytes:
        """Return up to size bytes; none at the end."""
        return bytes(self._read(size))

    def _read(self, size: int) -> memoryview:
        """Return up to size bytes in the buffer, valid until the next call."""
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
        while self.read(PIECE):  # tarfile stopped at the first invalid header
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
        self._present: set[Digest] = set()      # in the store already
        self._names: dict[str, Digest] = {}     # members of a docker-archive
        self._links: dict[str, str] = {}
        self._documents: dict[str, bytes] = {}  # index.json, manifest.json

    def unpack(self, stream: ExportStream) -> None:
        """Read a whole export. tarfile.TarError if it is cut off in the middle of a file."""
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
            self._present.add(expected)
            return expected
        writer = BlobWriter(self._store, expected.algorithm if expected else "sha256")
        with on_failure(writer.discard):
            for piece in stream.content(size):
                writer.write(piece)
            digest = writer.finish()
            if expected not in (None, digest):
                raise RegistryError("ENGINE_FAILED", f"Docker exported {expected} with the bytes of {digest}")
        self._add(digest, writer)
        return digest

    def _add(self, digest: Digest, writer: BlobWriter) -> None:
        if digest in self._new:
            writer.discard()
        else:
            self._new[digest] = writer

    # ---- which manifest is the image's

    def target(self) -> Digest:
        """The digest of the image's manifest or index; LookupError if the export has none."""
        if "index.json" in self._documents:
            return self._find_target(json.loads(self._documents["index.json"]))
        if "manifest.json" in self._documents:
            return self._make_manifest(json.loads(self._documents["manifest.json"])[0])
        raise LookupError("the export ended before its index")

    def _find_target(self, index: Mapping[str, Any]) -> Digest:
        """The image's ID is the manifest's own digest on the containerd store, its config's on the classic one."""
        listed = [Digest.parse(descriptor["digest"]) for descriptor in descriptors(index, "manifests")]
        for digest in listed:
            if digest == self._image_id or (self._has(digest) and self._is_of_config(self._document(digest))):
                return digest
        raise LookupError("the export has no manifest for this image" if listed else "the export lists nothing")

    def _is_of_config(self, document: Mapping[str, Any]) -> bool:
        config = document.get("config")
        return isinstance(config, dict) and config.get("digest") == str(self._image_id)

    def _make_manifest(self, entry: Mapping[str, Any]) -> Digest:
        """A manifest for a docker-archive: what `manifest.json` lists, checked against the config's diff_ids."""
        config, *layers = (self._names[self._links.get(name, name)] for name in (entry["Config"], *entry["Layers"]))
        if config != self._image_id:
            raise LookupError(f"the export holds the config {config}, not that of the image")
        if [str(layer) for layer in layers] != self._document(config)["rootfs"]["diff_ids"]:
            raise LookupError("the layers of the export are not those that the config names")
        writer = BlobWriter(self._store)
        writer.write(make_manifest(*((digest, self._path(digest).stat().st_size) for digest in (config, *layers))))
        digest = writer.finish()
        self._add(digest, writer)
        return digest

    def _has(self, digest: Digest) -> bool:
        return digest in self._new or digest in self._present

    def _path(self, digest: Digest) -> Path:
        return self._new[digest].path if digest in self._new else self._store.docker.path(digest)

    def _document(self, digest: Digest) -> dict[str, Any]:
        """A manifest, index or config that has arrived, parsed."""
        with open(self._path(digest), "rb") as file:
            document = json.loads(file.read(MANIFEST_LIMIT))
        if not isinstance(document, dict):
            raise LookupError(f"{digest} is not a JSON object")
        return document

    # ---- whether all of it has arrived

    def closure(self, target: Digest) -> set[Digest]:
        """All content that is needed to serve target, itself included. LookupError names what is missing.

        Of an index, the platforms that Docker does not have may be missing, but not all of them.
        """
        if not self._has(target):
            raise LookupError(f"the export lacks the manifest {target}")
        document = self._document(target)
        needed = [Digest.parse(d["digest"]) for d in descriptors(document, "config", "layers") if not d.get("urls")]
        missing = [str(digest) for digest in needed if not self._has(digest)]
        if missing:
            raise LookupError(f"the export lacks {len(missing)} of {len(needed)} blobs: {', '.join(missing)}")
        children, errors = self._children(document)
        if errors and not children:
            raise LookupError("; ".join(errors))
        return {target, *needed, *children}

    def _children(self, document: Mapping[str, Any]) -> tuple[set[Digest], list[str]]:
        """What the complete platforms of an index need, and what is wrong with the others."""
        complete: set[Digest] = set()
        errors = []
        for descriptor in descriptors(document, "manifests"):
            try:
                complete |= self.closure(Digest.parse(descriptor["digest"]))
            except LookupError as e:
                errors.append(str(e))
        return complete, errors

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

    def __init__(self, engine: Engine, store: Store, done: Callable[[], None]):
        """done is called after each export."""
        self._engine, self._store, self._done = engine, store, done
        self._jobs = Jobs()

    def manifest(self, image: EngineImage, deadline: Deadline) -> Digest:
        """The digest of an image's manifest, which is in the store with everything it needs, exported if need be."""
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
        with ProgressLog(f"export {image.id}, about {human_bytes(image.size)}") as lines:
            target = self._export(image.id, lines.tell_rate)
            lines.done(f"manifest {target}")
        self._done()
        return target

    def _make_bare(self, image: EngineImage) -> Digest:
        """Make the config and the manifest of an image without layers (FROM scratch), which Docker cannot export.

        Docker gives the config of an image only as part of an export, so a config with the same meaning is made.
        """
        config = image.bare_config()
        kept = []
        for data in (config, make_manifest((Digest.of(config), len(config)))):
            with BlobWriter(self._store) as writer:
                writer.write(data)
                kept.append(writer.keep(self._store.docker))
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
# 13. Origin: an image's own registry
# Uses: configuration, engine.
# =====================================================================================================================


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, with credentials only to the same server. Adds 308, which Python 3.10 does not support."""

    def http_error_302(self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any) -> Any:
        """See urllib.request, which would read the whole body, whatever its length."""
        fp.read = lambda *_: b""
        return super().http_error_302(req, fp, code, msg, headers)

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

    def __init__(self, reference: Reference, credentials: Credentials | None, trusted: ssl.SSLContext | None):
        """trusted holds the trusted certificate authorities. None means that the registry may be insecure."""
        assert reference.namespace
        self._host = self.DOCKER_HUB if reference.namespace == "docker.io" else reference.namespace
        self._repository, self._credentials = reference.repository, credentials
        self._schemes = ["https"] if trusted else ["https", "http"]
        self._authorization: str | None = None
        self._opener = self._make_opener(trusted or ssl._create_unverified_context())  # noqa: S323

    def _make_opener(self, context: ssl.SSLContext) -> urllib.request.OpenerDirector:
        """Build urllib.request's opener without the file and FTP handlers, which a redirect could reach."""
        local = self._host.rpartition(":")[0] in LOOPBACK or self._host in LOOPBACK  # needs no proxy
        opener = urllib.request.OpenerDirector()
        for handler in (urllib.request.ProxyHandler({} if local else None), urllib.request.HTTPHandler(),
                        urllib.request.HTTPSHandler(context=context), Redirects(), urllib.request.UnknownHandler(),
                        urllib.request.HTTPErrorProcessor(), urllib.request.HTTPDefaultErrorHandler()):
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
        except (OSError, http.client.HTTPException) as e:
            raise PullFailed("ORIGIN_UNAVAILABLE", f"{self._host}: {getattr(e, 'reason', None) or e!r}") from None

    def _is_own(self, url: str) -> bool:
        """Return True if a URL is one of the registry itself."""
        return urllib.parse.urlsplit(url)[:2] == (self._schemes[0], self._host)

    def _get(self, path: str) -> http.client.HTTPResponse:
        """Send a GET, and repeat it with authentication if the registry demands that."""
        try:
            return self._try(path)
        except urllib.error.HTTPError as e:
            ours = self._is_own(e.url)  # no redirect
            self._authorization = self._answer(e.headers) if ours and e.code == 401 else None
            if self._authorization is None:
                raise
            e.close()
        return self._try(path)

    def _try(self, path: str) -> http.client.HTTPResponse:
        """Send a GET with the first scheme that the registry supports. Later requests use only that one."""
        for scheme in self._schemes:
            request = urllib.request.Request(f"{scheme}://{self._host}{path}", headers={"Accept": MANIFEST_TYPES})
            if self._authorization:
                request.add_unredirected_header("Authorization", self._authorization)
            try:
                response = self._send(request)
            except urllib.error.HTTPError:
                self._schemes = [scheme]
                raise
            except OSError:
                if scheme == self._schemes[-1]:
                    raise
            else:
                self._schemes = [scheme]
                return response
        raise AssertionError("there is at least one scheme")

    def _send(self, request: urllib.request.Request, body: bytes | None = None) -> http.client.HTTPResponse:
        request.add_header("User-Agent", f"k3d-registry-dockerd/{__version__}")
        try:
            response: http.client.HTTPResponse = self._opener.open(request, body, ORIGIN_TIMEOUT)
        except ValueError as e:  # the Location is not a valid URL
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
            with self._send(*self._token_request(fields["realm"], query)) as response:
                answer = json.loads(response.read(MANIFEST_LIMIT))
            token = answer.get("token") or answer["access_token"]
            if re.fullmatch(r"[\x21-\x7e]+", token):
                return str(token)
            raise ValueError("not a token")
        except MALFORMED_ERRORS as e:
            raise PullFailed("ORIGIN_UNAVAILABLE", f"{self._host} did not return a token: {type(e).__name__}") from None

    def _token_request(self, realm: str, query: dict[str, str]) -> tuple[urllib.request.Request, bytes | None]:
        """Return the request for a token and its body, which only OAuth 2.0 has (for an identity token)."""
        if urllib.parse.urlsplit(realm).scheme not in {"https", *self._schemes}:
            raise PullFailed("ORIGIN_UNAVAILABLE", f"{self._host} demands a token from {printable(realm)}, without TLS")
        if self._credentials and self._credentials.username == IDENTITY_TOKEN:
            form = {"grant_type": "refresh_token", "client_id": "k3d-registry-dockerd",
                    "refresh_token": self._credentials.password, **query}
            return urllib.request.Request(realm), urllib.parse.urlencode(form).encode()
        separator = "&" if urllib.parse.urlsplit(realm).query else "?"
        request = urllib.request.Request(realm + separator + urllib.parse.urlencode(query))
        if self._credentials:
            request.add_unredirected_header("Authorization", self._credentials.for_http())
        return request, None


# =====================================================================================================================
# 14. Images: the image stores of Docker
# Uses: waiting, engine, transfers, store, content service, layers, export.
# =====================================================================================================================


def content_folder(root: Path) -> Path | None:
    """containerd's content folder, or None where it can't be read from here.

    It is under Docker's data folder, unless Docker uses the system's containerd, or is Docker Desktop.
    """
    folders = (root / "containerd/daemon", root, root / "daemon", Path("/var/lib/containerd"),
               Path("/var/lib/desktop-containerd/daemon"))
    found = (folder / "io.containerd.content.v1.content/blobs" for folder in folders)
    return next((folder for folder in found if os.access(folder / "sha256", os.R_OK | os.X_OK)), None)


class Content:
    """The question content(digest) -> bytes, asked of our own store and of the providers that the engine has now."""

    def __init__(self, store: Store, providers: Callable[[], Iterable[Provider]]):
        self._store, self._providers = FolderProvider("store", store.docker.path), providers
        self._lock = threading.Lock()  # guards what follows
        self._seen: dict[Digest, tuple[float, int]] = {}  # content that was here: until when that holds, and its size
        self._manifests: dict[Digest, Manifest] = {}

    def find(self, digest: Digest, size: int | None = None) -> Blob | None:
        """The content, from the first provider that has it in this size, in bytes: a crash may have cut a file short.

        The store answers even without Docker.
        """
        blob = self._store.find(digest)
        if blob and size in (None, blob.size):
            return blob
        for provider in self._providers():
            blob = provider.find(digest)
            if blob and size in (None, blob.size):
                return blob
        return None

    def has(self, digest: Digest, size: int) -> bool:
        """True if the content is here with its size in bytes.

        A good answer holds for a few seconds: one pull asks for the same again and again, which costs Docker as much as
        an inspect.
        """
        now = time.monotonic()
        with self._lock:
            until, known = self._seen.get(digest, (0.0, 0))
        if now < until and known == size:
            return True
        if self.find(digest, size) is None:
            return False
        self._remember(self._seen, digest, (now + PRESENCE_FRESH, size))
        return True

    def _remember(self, memory: dict[Digest, T], digest: Digest, value: T) -> None:
        with self._lock:
            if len(memory) >= MEMORY_LIMIT:
                memory.clear()
            memory[digest] = value

    def manifest(self, digest: Digest) -> Manifest | None:
        """The manifest or index with a digest; None if there is none, or if the content is something else."""
        with self._lock:
            known = self._manifests.get(digest)
        if known and self.has(digest, len(known.data)):
            return known
        manifest = self._read_manifest(digest)
        if manifest and len(manifest.data) <= MANIFEST_REMEMBERED:
            self._remember(self._manifests, digest, manifest)
        return manifest

    def _read_manifest(self, digest: Digest) -> Manifest | None:
        blob = self.find(digest)
        if blob is None or blob.size > MANIFEST_LIMIT:
            return None
        data = read_blob(blob, MANIFEST_LIMIT)
        media_type = manifest_type(data)
        if media_type is None:
            return None
        if Digest.of(data, digest.algorithm) != digest:
            raise RegistryError("ENGINE_FAILED", f"the bytes of the manifest {digest} do not match its digest")
        return Manifest(digest, media_type, data)


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
    """One of Docker's image stores: the questions that they answer differently.

    As it stands, this one is the containerd store, where an image's ID is the digest of its manifest or index.

    providers are where content is read from, after our own store; sources names for people where it comes from, and
    problem what could be better, or None. flows says that content can be read while a pull brings it. made_type is
    the media type of every manifest, for a store whose manifests are made here.
    """

    flows = False
    made_type: str | None = None

    def __init__(self, info: EngineInfo, content: Content, providers: Iterable[Provider | None], problem: str | None):
        """Providers that are None do not count."""
        self.info, self.problem, self._content = info, problem, content
        self.providers = tuple(provider for provider in providers if provider)
        self.sources = tuple(provider.name for provider in self.providers)

    def target(self, image: EngineImage, deadline: Deadline) -> Digest:
        """The digest of an image's manifest, made or exported if need be."""
        return image.id

    def includes(self, image: EngineImage, digest: Digest, deadline: Deadline, explore: bool) -> bool:
        """True if a digest is that of an image's manifest, or of one that its index lists.

        Unless explore is set, that is answered only from what is known without an export.
        """
        if image.id == digest:
            return True
        index = self._content.manifest(self.target(image, deadline) if explore else image.id)
        return index is not None and digest in index.listed("manifests")

    def restore(self, images: Iterable[EngineImage], blobs: Iterable[Digest], deadline: Deadline) -> None:
        """Bring blobs here again that belong to one of these images, if this store can."""

    def origins(self, digest: Digest) -> list[str]:
        """The names of the repositories that Docker got some content from, as far as this store remembers."""
        return []


class ContainerdImages(ImageStore):
    """Docker's containerd image store, whose content can be read as it is."""

    flows = True

    def __init__(self, info: EngineInfo, content: Content, files: Provider | None, service: ContentService | None,
                 problem: str | None):
        super().__init__(info, content, (files, service), problem)
        self._service = service

    def origins(self, digest: Digest) -> list[str]:
        """See ImageStore. containerd notes them with the content."""
        return self._service.origins(digest) if self._service else []


class ExportedImages(ImageStore):
    """Docker's containerd image store when its content cannot be read: each image is exported once."""

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

    made_type = OCI_MANIFEST

    def __init__(self, info: EngineInfo, content: Content, store: Store, exports: Exports,
                 layers: LayerDirectory | None, problem: str | None):
        super().__init__(info, content, (layers,), problem)
        self._store, self._exports, self._layers = store, exports, layers
        self.sources = (*self.sources, "export")

    def target(self, image: EngineImage, deadline: Deadline) -> Digest:
        """See ImageStore."""
        return self._made(image) or self._exports.manifest(image, deadline)

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
        self._chosen: ImageStore | None = None  # replaced whole: needs no lock

    def close(self) -> None:
        """Close what is kept open."""
        self._service.close()

    def current(self) -> ImageStore:
        """The image store of the engine as it is now, logged whenever that changes."""
        info, known = self._engine.info(), self._chosen
        if known and (info is known.info or (info == known.info and not known.problem)):
            return known
        chosen = self._choose(info)
        if not known or (info, chosen.sources, chosen.problem) != (known.info, known.sources, known.problem):
            log.info("%s; content from: %s", info, ", ".join(("store", *chosen.sources)))
            if chosen.problem:
                log.warning("%s", chosen.problem)
        self._chosen = chosen
        return chosen

    def _choose(self, info: EngineInfo) -> ImageStore:
        root = self._root or info.root
        if info.store == "classic":
            layers = LayerDirectory(root) if os.access(root / "image/overlay2/layerdb/sha256", os.R_OK) else None
            problem = self._folder_problem(layers, root, info)
            return ClassicImages(info, self.content, self._store, self._exports, None if problem else layers, problem)
        folder = content_folder(root)
        files = FolderProvider(f"content directory {folder}", lambda digest: folder / digest.algorithm / digest.hex
                               ) if folder else None
        problem = self._folder_problem(files, root, info)
        unserved = self._service.problem()
        if unserved is None:
            return ContainerdImages(info, self.content, None if problem else files, self._service, problem)
        if files and not problem:
            return ContainerdImages(info, self.content, files, None, None)
        return ExportedImages(info, self.content, self._exports, (
            f"images are exported one by one: Docker's content cannot be read: {unserved}"))

    def _folder_problem(self, files: Provider | None, root: Path, info: EngineInfo) -> str | None:
        """Why files that may be this engine's are not used, or None if they are (or if there are none by default).

        Another engine's folder would do no harm, for content is found by its digest; but a person wants to know.
        """
        if files is None:
            return f"nothing of Docker's {info.store} image store can be read in {root}" if self._root else None
        try:
            identity = (root / "engine-id").read_text().strip()
        except OSError:
            identity = ""  # engines before 23 have no such file; the folder of the system's containerd has none either
        if identity and identity != info.identity:
            return f"{root} is the data folder of another Docker: it is not used"
        images = self._engine.image_ids()
        found = sum(files.find(image) is not None for image in images)
        enough = (found > 0 or not images) if identity else (found == len(images) > 0)
        return None if enough else f"{root} does not hold the images of this Docker: it is not used"


# =====================================================================================================================
# 15. Pulls: what comes from registries, by way of Docker or without it
# Uses: configuration, waiting, engine, transfers, store, origin, images.
# =====================================================================================================================


@dataclass(frozen=True)
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

    def check(self, reference: Reference) -> None:
        """MANIFEST_UNKNOWN or DENIED unless the registry of a reference may be asked."""
        if reference.namespace is None:
            raise RegistryError("MANIFEST_UNKNOWN", f"Docker has no image {reference}, and the request names no "
                                                    "registry (ns) to pull it from")
        if self.policy == "never":
            raise RegistryError("MANIFEST_UNKNOWN", f"Docker does not have {reference}, or not all of it, and no "
                                                    "registry is asked for it (-pull never)")
        if self.allowed and not any(fnmatch.fnmatchcase(reference.namespace, pattern) for pattern in self.allowed):
            raise RegistryError("DENIED", f"{reference.namespace} is not among the registries to pull from: "
                                          f"{', '.join(self.allowed)} (-allow)")

    def credentials(self, reference: Reference, own: Credentials | None) -> Credentials | None:
        """A request's own credentials, or else those of this machine for the registry of a reference."""
        if own is None and self.config and reference.namespace:
            return self.config.credentials(reference.namespace)
        return own


def pull_error(failure: PullFailed, reference: Reference, credentials: Credentials | None) -> RegistryError:
    """The answer for a failed pull, to a request with these credentials.

    Registries hide private images from anonymous clients, so without credentials "not found" can mean "log in": a
    401 with a challenge makes the node come again with the pod's secret. Wrong credentials get a 401 without the
    challenge, or the node would try them again.
    """
    detail = f"Docker could not pull {reference}: {failure}"
    if failure.code == "TOOMANYREQUESTS":
        detail += ". The registry limits the rate: log in (imagePullSecrets), or wait and try again"
    if failure.code == "DENIED" or (failure.code == "MANIFEST_UNKNOWN" and not credentials):
        challenge = {} if credentials else {"WWW-Authenticate": f'Basic realm="{reference.namespace}"'}
        if failure.code == "MANIFEST_UNKNOWN":
            detail += ". The image may be private: a request without credentials gets 401 (imagePullSecrets)"
        return RegistryError("UNAUTHORIZED", detail, challenge)
    return RegistryError(failure.code, detail)


@dataclass(frozen=True)
class Promised:
    """A blob that was promised with a manifest: its size in bytes, and where it comes from with whose credentials."""

    size: int
    source: Reference
    credentials: Credentials | None


class Fetches:
    """Gets content that Docker does not give from an image's own registry into the store.

    Requests for the same content with the same credentials share one transfer, and read it while it arrives. What
    was promised to one client's credentials is not shown to other clients until it is in the store.
    """

    def __init__(self, engine: Engine, store: Store, policy: PullPolicy):
        self._engine, self._store, self._policy = engine, store, policy
        self._transfers = Transfers()
        self._lock = threading.Lock()  # guards _promised
        self._promised: dict[Hashable, Promised] = {}  # blobs that are not in the store yet

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
        return Origin(reference, credentials, None if insecure else self._trusted)

    def manifest(self, reference: Reference, digest: Digest, credentials: Credentials | None) -> Manifest:
        """Fetch a manifest, verify and keep it. Raises what PullPolicy.check() and pull_error() do."""
        used = self._policy.credentials(reference, credentials)
        try:
            with self._origin(reference, used).open("manifests", digest) as response:
                data = response.read(MANIFEST_LIMIT + 1)
            media_type = manifest_type(data)
            if Digest.of(data, digest.algorithm) != digest or media_type is None:
                raise PullFailed("ORIGIN_UNAVAILABLE", f"{reference.namespace} answered with something else")
        except PullFailed as e:
            raise pull_error(e, reference, credentials) from None
        with BlobWriter(self._store, digest.algorithm) as writer:
            writer.write(data)
            writer.keep(self._store.docker)
        self._store.record_fetch(digest, {digest: len(data)})
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
        promised = {self._key(reference, digest, client.credentials): Promised(size, source, used)
                    for digest, size in blobs.items()}
        with self._lock:
            self._promised.update(promised)
        with on_failure(functools.partial(self._forget, promised)):
            digests = list(blobs)
            for start in range(0, len(digests), FETCHES):
                self._wait_for_start([self._join(reference, digest, client)
                                      for digest in digests[start:start + FETCHES]], client.deadline)

    def _forget(self, promised: Mapping[Hashable, Promised]) -> None:
        """Take back promises, unless their blobs are arriving."""
        with self._lock:
            for key, promise in promised.items():
                if self._promised.get(key) is promise and not self._transfers.get(key):
                    del self._promised[key]

    @staticmethod
    def _wait_for_start(transfers: Iterable[Transfer | None], deadline: Deadline) -> None:
        """Wait until each transfer has begun or failed, so that none is taken for one that will bring its blob. Raises
        the first error."""
        errors = []
        for transfer in transfers:
            try:
                if transfer:
                    transfer.wait_for_start(deadline)
            except RegistryError as e:
                errors.append(e)
        if errors:
            raise errors[0]

    def is_fetching(self, reference: Reference, digest: Digest, client: Client) -> bool:
        """True if a blob has begun to arrive for clients with these credentials."""
        transfer = self._transfers.get(self._key(reference, digest, client.credentials))
        return transfer is not None and transfer.started

    def blob(self, reference: Reference, digest: Digest, client: Client) -> Transfer | None:
        """A promised blob once it has begun to arrive, fetched again if need be; None if it was not promised.

        Raises what PullPolicy.check() and pull_error() do, and STILL_PULLING.
        """
        transfer = self._join(reference, digest, client)
        if transfer:
            transfer.wait_for_start(client.deadline)
        return transfer

    def _join(self, reference: Reference, digest: Digest, client: Client) -> Transfer | None:
        key = self._key(reference, digest, client.credentials)
        with self._lock:
            promised = self._promised.get(key)
        if promised is None:
            return None
        return self._transfers.join(key, promised.size, functools.partial(
            self._fill, key, digest, promised, client.credentials))

    def _fill(self, key: Hashable, digest: Digest, promised: Promised, asked_with: Credentials | None,
              transfer: Transfer) -> None:
        """Fetch a blob into the store, once; errors are those of pull_error()."""
        keep_promise = False
        try:
            with ProgressLog(f"fetch {digest} of {promised.source}, {human_bytes(promised.size)}") as lines:
                self._fetch(digest, promised, transfer, lines)
                lines.done("verified")
        except PullFailed as e:
            keep_promise = transfer.count > 0  # what broke off may be begun again
            raise pull_error(e, promised.source, asked_with) from None
        except RegistryError:
            keep_promise = transfer.count > 0
            raise
        finally:
            with self._lock:
                if not keep_promise and self._promised.get(key) is promised:
                    del self._promised[key]

    def _fetch(self, digest: Digest, promised: Promised, transfer: Transfer, lines: ProgressLog) -> None:
        with BlobWriter(self._store, digest.algorithm) as writer, \
                self._origin(promised.source, promised.credentials).open("blobs", digest) as response:
            transfer.begin_at(writer.path)
            while transfer.count <= transfer.size and (data := response.read1(PIECE)):
                writer.write(data)
                transfer.advance(len(data))
                lines.tell_rate(transfer.count)
            found = writer.finish()
            if (found, transfer.count) != (digest, transfer.size):
                raise PullFailed("ORIGIN_UNAVAILABLE",
                                 f"{promised.source.namespace} gave {transfer.count} bytes of {found}")
            writer.keep(self._store.docker)


class Pulls:
    """Has Docker pull images: one pull for all requests for the same image. Knows what the pulls under way will bring.

    What a pull will bring is known on Docker's containerd store, where content can be read as it arrives.
    """

    def __init__(self, engine: Engine, images: ImageStores, policy: PullPolicy):
        self._engine, self._images, self._policy = engine, images, policy
        self._content = images.content
        self._jobs = Jobs()
        self._transfers = Transfers()
        self._lock = threading.Lock()  # guards _expected
        self._expected: dict[Digest, tuple[int, Job]] = {}  # what a pull will bring: its size in bytes, and the pull

    def pull(self, reference: Reference, client: Client, old: EngineImage | None = None,
             on_slow: Callable[[], None] = lambda: None) -> Manifest | None:
        """Have Docker pull an image; requests for the same image with the same credentials share one pull.

        If it takes long, and content can be read while it arrives, the manifest is returned as soon as it is here,
        and the rest is on its way. Otherwise the result is None at the end of the pull. old is what Docker has under
        that name, to be replaced. on_slow is called if the pull has not failed early. Raises what
        PullPolicy.check() and pull_error() do.
        """
        self._policy.check(reference)
        used = self._policy.credentials(reference, client.credentials)
        pull = self._jobs.start(("pull", reference, used), lambda: self._run(reference, used, old),
                                f"pulling {reference}")
        try:
            if not client.deadline.within(EARLY_ANSWER).wait(pull.done.wait):
                on_slow()
                if self._images.current().flows:
                    return self._early_manifest(pull, reference, used, client.deadline)
            pull.outcome(client.deadline)
        except PullFailed as e:
            raise pull_error(e, reference, client.credentials) from None
        return None

    def _run(self, reference: Reference, credentials: Credentials | None, old: EngineImage | None) -> None:
        image = self._engine.image(str(reference))
        if image and (old is None or image.id != old.id):
            return  # pulled by a job that ended after the caller had looked
        with ProgressLog(f"pull {reference}" + (f" as {credentials.username!r}" if credentials else "")) as lines:
            progress = PullProgress(lines.started)

            def tell(message: Mapping[str, Any]) -> None:
                progress.update(message)
                lines.tell(progress.line)

            self._engine.pull(reference, credentials, tell)
            lines.done(progress.line(time.monotonic()))

    def _look_up(self, reference: Reference, credentials: Credentials | None) -> Job:
        """The question to an image's registry which digest a tag has there now."""
        return self._jobs.start(("digest", reference, credentials),
                                lambda: self._engine.origin_digest(reference, credentials), f"looking up {reference}")

    def is_outdated(self, reference: Reference, image: EngineImage, client: Client) -> bool:
        """True if a tag names another image at its registry than in Docker, as far as that can be found out."""
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

    def _early_manifest(self, pull: Job, reference: Reference, credentials: Credentials | None,
                        deadline: Deadline) -> Manifest | None:
        """The manifest that a pull has brought already, or None if it has ended; errors are those of the pull."""
        digest = reference.target
        if not isinstance(digest, Digest):
            look_up = self._look_up(reference, credentials)
            deadline.wait(lambda seconds: look_up.done.wait(min(seconds, ARRIVAL_INTERVAL)) or pull.done.is_set())
            digest = look_up.outcome(deadline) if look_up.done.is_set() and not look_up.error else ""
        manifest = self._await_manifest(pull, digest, deadline) if isinstance(digest, Digest) else None
        if manifest is None:
            pull.outcome(deadline)
            return None
        log.info("pull %s: answered with the manifest %s while the rest arrives", reference, digest)
        self._expect(pull, manifest)
        return manifest

    def _await_manifest(self, pull: Job, digest: Digest, deadline: Deadline) -> Manifest | None:
        """A manifest as soon as a pull has brought it, or None if the pull has ended without it."""

        def arrived(seconds: float) -> Manifest | bool | None:
            ended = pull.done.wait(min(seconds, ARRIVAL_INTERVAL))
            return self._content.manifest(digest) or ended

        found = deadline.wait(arrived)
        return found if isinstance(found, Manifest) else None

    def manifest(self, digest: Digest, deadline: Deadline) -> Manifest | None:
        """A manifest that a pull under way will bring, as soon as it is here; None if no pull will bring it.

        What it refers to is expected from then on.
        """
        _, pull = self._coming(digest)
        manifest = self._await_manifest(pull, digest, deadline) if pull else None
        if pull and manifest:
            self._expect(pull, manifest)
        return manifest

    def _expect(self, pull: Job, manifest: Manifest) -> None:
        """Remember what a manifest says of the content that a pull will bring."""
        with self._lock:
            self._expected = {digest: (size, job) for digest, (size, job) in self._expected.items()
                              if not job.done.is_set()}
            sizes = manifest.sizes("config", "layers", "manifests")
            self._expected.update((digest, (size, pull)) for digest, size in sizes.items())

    def _coming(self, digest: Digest) -> tuple[int, Job | None]:
        """The size of some content in bytes, and the pull under way that will bring it, if there is one."""
        with self._lock:
            size, pull = self._expected.get(digest, (0, None))
        return size, pull if pull and not pull.done.is_set() else None

    def is_bringing(self, digest: Digest) -> bool:
        """True if a pull under way will bring some content."""
        return self._coming(digest)[1] is not None

    def blob(self, digest: Digest) -> Transfer | None:
        """Content that a pull under way will bring, or None."""
        size, pull = self._coming(digest)
        if pull is None:
            return None
        return self._transfers.join(digest, size, functools.partial(self._await_blob, digest, pull))

    def _await_blob(self, digest: Digest, pull: Job, transfer: Transfer) -> None:
        """Lead the readers of a transfer to content as soon as Docker has it."""
        while True:
            ended = pull.done.wait(ARRIVAL_INTERVAL)
            blob = self._content.find(digest)
            if blob:
                return transfer.found(blob)
            if ended:
                _, other = self._coming(digest)
                if other is None:
                    raise RegistryError("ORIGIN_UNAVAILABLE", f"the pull ended without {digest}: {pull.error}")
                pull = other


# =====================================================================================================================
# 16. Mirror: the registry of what Docker has, or gets
# Uses: waiting, engine, transfers, store, export, images, pulls.
# =====================================================================================================================


@dataclass(frozen=True)
class ArrivingManifest:
    """A manifest of which only the media type is known until it is here; wait() returns it, or raises."""

    media_type: str
    wait: Callable[[], Manifest]

    def body(self) -> StreamBody:
        """Its bytes, as soon as they are here."""
        pieces = (self.wait().data for _ in range(1))
        return StreamBody(pieces, None, pieces.close, waits=True)


class Mirror:
    """The registry of what Docker has, or gets now. It knows nothing of what was pushed.

    It answers two questions: which content does a name mean right now, and who has these bytes?
    """

    def __init__(self, engine: Engine, store: Store, policy: PullPolicy | None = None,
                 docker_root: Path | None = None):
        """docker_root is where Docker's data folder is mounted, if that is not the place that Docker names."""
        self.engine, self._store, self._policy = engine, store, policy or PullPolicy()
        self._exports = Exports(engine, store, self._tidy_up_soon)
        self.images = ImageStores(engine, store, self._exports, docker_root)
        self._content = self.images.content
        self._pulls = Pulls(engine, self.images, self._policy)
        self._fetches = Fetches(engine, store, self._policy)
        self._jobs = Jobs()
        self._warned: set[Digest] = set()  # images for another platform that the log has named; needs no lock

    def close(self) -> None:
        """Close what is kept open."""
        self.images.close()

    def is_docker_on_our_behalf(self, client: Client) -> bool:
        """True if Docker sent a request because this program had asked it for something, for example a pull.

        Docker repeats our User-Agent to registries. It may ask us, if it was told that this is a mirror of others.
        """
        return self.engine.token in client.user_agent

    def _is_docker(self, client: Client) -> bool:
        """True if the client is the engine itself: its User-Agent names its version, its commit and its kernel."""
        return client.user_agent.startswith("docker/") and client.user_agent.startswith(self.engine.info().user_agent)

    def _refuse_own_engine(self, reference: Reference, client: Client, code: str) -> None:
        """Raise an error if the engine itself asks for an image of another registry, as of a mirror.

        It does when somebody runs `docker pull`. Told what it has already, it would never see that a tag has moved;
        and a pull that this program has it do may wait for that one.
        """
        if reference.namespace and self._is_docker(client):
            raise RegistryError(code, f"{reference}: Docker has it itself, or pulls it")

    def _ask(self, client: Client, question: Callable[[Client], T], late: Callable[[Job], T] | None = None) -> T:
        """Ask Docker something in a thread of its own, so no sum of delays outlasts the client's deadline.

        Whatever waits in there waits without a limit, for as long as the client waits here. When the deadline has
        passed, the answer is late(the job), or else STILL_PULLING.
        """
        inner = client.deadline.unlimited()
        asking = dataclasses.replace(client, deadline=inner)
        job = self._jobs.start(object(), lambda: question(asking), "at work for this request")
        with on_failure(inner.cancel):
            if late and not client.deadline.wait(job.done.wait):
                return late(job)
            answer: T = job.outcome(client.deadline)
        return answer

    # ---- which content does a name mean?

    def manifest(self, reference: Reference, client: Client, may_pull: bool = True) -> Manifest | ArrivingManifest:
        """The manifest or index that a reference means right now, all of whose content is here or on its way.

        An image that Docker lacks is pulled by Docker, if the reference says from where and may_pull is set; the
        client's credentials are used with that registry, and for nothing else. If that takes longer than the client's
        deadline, the answer is what is known by then. Raises MANIFEST_UNKNOWN, UNAUTHORIZED, DENIED,
        TOOMANYREQUESTS, ORIGIN_UNAVAILABLE, STILL_PULLING, and what Engine raises.
        """
        made_types: list[str | None] = []  # of the manifest to come, once Docker is known to have the image

        def late(job: Job) -> Manifest | ArrivingManifest:
            made_type = made_types[-1] if made_types else None
            if made_type is None:
                raise RegistryError("STILL_PULLING", f"Docker is still getting {reference}: ask again")
            log.info("%s: answered while Docker is still getting it", reference)
            return ArrivingManifest(made_type, lambda: job.outcome(client.deadline.unlimited()))

        def find(asking: Client) -> Manifest | ArrivingManifest:
            return self._find_manifest(reference, asking, may_pull,
                                       lambda: made_types.append(self.images.current().made_type))

        return self._ask(client, find, late)

    def _find_manifest(self, reference: Reference, client: Client, may_pull: bool,
                       on_image_known: Callable[[], None]) -> Manifest:
        """The manifest of an image that Docker has, or gets now; takes as long as it takes.

        on_image_known is called when Docker has the image, as far as that can be known, and only the digest of its
        manifest is not known.
        """
        self._refuse_own_engine(reference, client, "MANIFEST_UNKNOWN")
        if isinstance(reference.target, Digest):
            manifest = self._manifest_by_digest(reference, reference.target, client, may_pull)
        else:
            manifest = self._manifest_by_tag(reference, client, may_pull, on_image_known)
        self._promise(reference, manifest, client)
        return manifest

    def _manifest_by_tag(self, reference: Reference, client: Client, may_pull: bool,
                         on_image_known: Callable[[], None]) -> Manifest:
        image = self._local_image(reference, client)
        if image is None or (may_pull and self._is_to_be_replaced(reference, image, client)):
            try:
                arriving = self._pull(reference, client, may_pull, image, on_image_known)
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
        on_image_known()
        self._check_platform(image)
        digest = self.images.current().target(image, client.deadline)
        return self._content.manifest(digest) or self._lost_manifest(reference, digest, client)

    def _check_platform(self, image: EngineImage) -> None:
        """Warn once of an image for another platform than Docker's own: its containers may not run on the nodes."""
        ours = self.engine.info().platform
        if image.platform and ours and not same_platform(image.platform, ours) and image.id not in self._warned:
            if len(self._warned) >= MEMORY_LIMIT:
                self._warned.clear()
            self._warned.add(image.id)
            log.warning("the image %s is for %s, and this Docker is %s: on a node like that its containers end with "
                        "\"exec format error\"; get the other with docker pull --platform %s", image.id,
                        printable(image.platform), printable(ours), printable(ours))

    def _pull(self, reference: Reference, client: Client, may_pull: bool, old: EngineImage | None = None,
              on_slow: Callable[[], None] = lambda: None) -> Manifest | None:
        if not may_pull:
            raise RegistryError("MANIFEST_UNKNOWN", f"Docker has no image {reference}")
        return self._pulls.pull(reference, client, old, on_slow)

    def _is_to_be_replaced(self, reference: Reference, image: EngineImage, client: Client) -> bool:
        """True if Docker is to pull an image that it has: one of another registry, whose tag has moved there."""
        return (self._policy.policy == "always" and reference.namespace is not None
                and self._pulls.is_outdated(reference, image, client))

    def _names(self, reference: Reference, client: Client) -> list[Reference]:
        """The names under which Docker may have what a reference means, the likeliest first."""
        found = list(reference.aliases(client.own_name))
        if reference.namespace in (None, "docker.io") and self.engine.info().is_podman:
            found.append(dataclasses.replace(reference, repository=reference.repository.removeprefix("library/"),
                                             namespace="localhost"))  # where Podman keeps what it builds
        return found

    def _local_image(self, reference: Reference, client: Client) -> EngineImage | None:
        names = self._names(reference, client)
        return self._inspected_image(names) or self._listed_image(names)

    def _inspected_image(self, names: Iterable[Reference]) -> EngineImage | None:
        images = (self.engine.image(str(name)) for name in names)
        return next((image for image in images if image), None)

    def _listed_image(self, names: Iterable[Reference]) -> EngineImage | None:
        """An image that Docker lists under a name by which it does not find it: one that is not fully qualified."""
        wanted = {(docker_name(name.docker_repository()), name.target) for name in names}
        for image_id, name, tag in self.engine.names():
            if (docker_name(name), tag) in wanted:
                return self.engine.image(str(image_id))
        return None

    def _manifest_by_digest(self, reference: Reference, digest: Digest, client: Client, may_pull: bool) -> Manifest:
        if reference.namespace is None:
            return self._manifest_here(reference, digest, client)
        manifest = self._pulls.manifest(digest, client.deadline) or self._content.manifest(digest)
        if manifest:
            return manifest
        if self.images.current().made_type:
            return self._fetched_by_digest(reference, digest, client, may_pull)
        return self._pulled_by_digest(reference, digest, client, may_pull)

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
        """A manifest by digest for a client that names no registry: only what Docker has in this very repository."""
        manifest = self._included(reference, digest, client, False)
        if manifest is None and not self._is_docker(client):  # nothing is exported for a `docker pull`
            manifest = self._included(reference, digest, client, True)
        if manifest is None:
            raise RegistryError("MANIFEST_UNKNOWN", f"Docker has no image {digest} in {reference.repository}")
        return manifest

    def _fetched_by_digest(self, reference: Reference, digest: Digest, client: Client, may_pull: bool) -> Manifest:
        """A manifest that an earlier process made of an image, or one that only the image's registry has."""
        manifest = self._included(reference, digest, client, False)
        if manifest:
            return manifest
        if not may_pull:
            raise RegistryError("MANIFEST_UNKNOWN", f"Docker does not have {reference}")
        try:
            return self._fetches.manifest(reference, digest, client.credentials)
        except RegistryError as e:
            manifest = self._included(reference, digest, client, True)
            if manifest:
                return manifest
            if e.code not in ("MANIFEST_UNKNOWN", "ORIGIN_UNAVAILABLE"):
                raise
            raise RegistryError("MANIFEST_UNKNOWN", f"{reference}: Docker's classic image store does not keep these "
                                                    f"bytes, and its registry does not give them: {e.detail}") from None

    def _pulled_by_digest(self, reference: Reference, digest: Digest, client: Client, may_pull: bool) -> Manifest:
        """A manifest that Docker's containerd store does not have yet, or has lost."""
        self._refuse_missing_platform(reference, digest, client)
        image = self.engine.image(str(reference))
        if image is None:
            arriving = self._pull(reference, client, may_pull)
            if arriving:
                return arriving
            image = self.engine.image(str(reference))
        if image:
            self.images.current().target(image, client.deadline)
        manifest = self._content.manifest(digest)
        if manifest is None:
            return self._lost_manifest(reference, digest, client)
        return manifest

    def _refuse_missing_platform(self, reference: Reference, digest: Digest, client: Client) -> None:
        """MANIFEST_UNKNOWN for a platform of an index that Docker has without that platform.

        Docker was told which platforms to get, so the node has to look for others elsewhere. Attestations are not
        platforms, and Docker's own platform is one that it has lost.
        """
        for image in self._images_of(reference, client):
            index = self._content.manifest(image.id)
            child = index.child(digest) if index else None
            if child and index and digest in index.platforms() and not self._is_for_docker(child):
                raise RegistryError("MANIFEST_UNKNOWN", f"Docker has the index {image.id} in its repository "
                                    f"{reference.docker_repository()}, but not the platform "
                                    f"{platform_of(child.get('platform')) or digest} of it: "
                                    "get it with docker pull --platform")

    def _is_for_docker(self, descriptor: Mapping[str, Any]) -> bool:
        """True if a manifest of an index is for Docker's own platform."""
        ours = self.engine.info().platform
        return bool(ours) and same_platform(platform_of(descriptor.get("platform")), ours)

    # ---- what a manifest refers to

    def _promise(self, reference: Reference, manifest: Manifest, client: Client) -> None:
        """See that all blobs of a manifest are here or on their way; MANIFEST_UNKNOWN says which are not available."""
        if self._missing(reference, manifest, client):
            job = self._jobs.start(("recover", reference, manifest.digest, client.credentials, client.own_name),
                                   lambda: self._recover(reference, manifest, dataclasses.replace(
                                       client, deadline=Deadline())), f"getting what it lacks of {reference}")
            job.outcome(client.deadline)
        self._store.touch_fetch(manifest.digest, manifest.sizes("config", "layers"))

    def _missing(self, reference: Reference, manifest: Manifest, client: Client) -> dict[Digest, int]:
        """The blobs of a manifest that are neither here nor on their way, with their sizes in bytes.

        Only what Docker itself fetches counts: config and layers. Of an index one whole platform will do: what it
        needs of others is seen when they are asked for.
        """
        # In this order: what is no longer on its way when it is asked for has arrived by then.
        missing = {digest: size for digest, size in manifest.sizes("config", "layers").items()
                   if not (self._pulls.is_bringing(digest) or self._fetches.is_fetching(reference, digest, client)
                           or self._content.has(digest, size))}
        for digest in dict.fromkeys(manifest.platforms()):
            if self._pulls.is_bringing(digest):
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
        missing, errors = self._missing(reference, manifest, client), []
        for source in itertools.chain([None], self._other_names(manifest.digest, missing, manifest)):
            if not missing:
                return
            try:
                self._fetch(reference, manifest, missing, client, source)
            except RegistryError as e:
                errors.append(e)
            missing = self._missing(reference, manifest, client)
        if missing:
            some = ", ".join(map(str, [*missing][:3]))
            raise self._not_recovered(errors, f"Docker has {reference}, but lacks {len(missing)} of its blobs: {some}")

    @staticmethod
    def _not_recovered(errors: list[RegistryError], what: str) -> RegistryError:
        """The error about something that Docker has lost: that of the registry that was asked first, if it refuses."""
        if errors and errors[0].code in ("UNAUTHORIZED", "TOOMANYREQUESTS", "DENIED"):
            return errors[0]
        reasons = "; ".join(dict.fromkeys(error.detail for error in errors))
        return RegistryError("MANIFEST_UNKNOWN", f"{what}. Remove the image from Docker, and pull or build it again. "
                                                 f"It could not be fetched: {reasons}")

    def _restore(self, reference: Reference, blobs: Mapping[Digest, int], client: Client) -> None:
        """Have Docker give content of an image again: a node may know its manifest from before our store was lost."""
        if blobs:
            self.images.current().restore(self._images_of(reference, client), blobs, client.deadline)

    def _fetch(self, reference: Reference, manifest: Manifest, missing: Mapping[Digest, int], client: Client,
               source: Reference | None) -> None:
        for digest, size in missing.items():
            if self._store.docker.size(digest) not in (None, size):
                self._store.docker.drop(digest)  # a crash cut it short
        self._fetches.begin(reference, missing, client, source)
        self._store.record_fetch(manifest.digest, {**missing, **manifest.sizes("config", "layers")})

    def _lost_manifest(self, reference: Reference, digest: Digest, client: Client) -> Manifest:
        """A manifest that Docker lists and has lost, by any name that leads to it."""
        errors = []
        for source in itertools.chain([reference], self._other_names(digest, {})):
            try:
                return self._fetches.manifest(source, digest, client.credentials if source is reference else None)
            except RegistryError as e:
                errors.append(e)
        raise self._not_recovered(errors, f"Docker lists {reference} as {digest}, but that content is missing from its "
                                          "store")

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
        return image_id == target or (found is not None and found.child(target) is not None) or any(
            not blobs.keys().isdisjoint(one.sizes("config", "layers")) for one in (found, *children) if one)

    # ---- who has these bytes?

    def blob(self, reference: Reference, client: Client) -> Blob:
        """The blob with the digest that a reference names.

        Docker does not keep its content apart by repository, so the repository does not matter. BLOB_UNKNOWN if
        nobody has it, and for manifests too: to a node, 200 means that the digest is not one.
        """
        return self._ask(client, lambda asking: self._find_blob(reference, asking))

    def _find_blob(self, reference: Reference, client: Client) -> Blob:
        self._refuse_own_engine(reference, client, "BLOB_UNKNOWN")
        digest = reference.digest
        blob = self._content.find(digest)
        if blob is None:
            arriving = self._arriving(reference, digest, client)
            if arriving:
                return arriving
            if reference.namespace:  # a node; a client that pushes does not want an image exported
                self._restore(reference, {digest: 0}, client)
            blob = self._content.find(digest)  # it may have arrived since
        if blob is None:
            raise RegistryError("BLOB_UNKNOWN", f"Docker has no content {digest}")
        if self._is_manifest(blob):
            raise RegistryError("BLOB_UNKNOWN", f"{digest} is a manifest: ask for it under /manifests/")
        return blob

    @staticmethod
    def _is_manifest(blob: Blob) -> bool:
        """True if a blob is a manifest. The first byte rules it out for everything that is not JSON."""
        return (blob.size <= MANIFEST_LIMIT and read_blob(blob, 1) == b"{"
                and manifest_type(read_blob(blob, MANIFEST_LIMIT)) is not None)

    # ---- what is adopted

    def contents(self, reference: Reference, sizes: Mapping[Digest, int], client: Client) -> dict[Digest, Blob]:
        """What Docker has of the content of an image with these digests and sizes in bytes, exported if need be."""
        return self._ask(client, lambda asking: self._find_contents(reference, sizes, asking))

    def _find_contents(self, reference: Reference, sizes: Mapping[Digest, int], client: Client) -> dict[Digest, Blob]:
        found = {digest: blob for digest, size in sizes.items() if (
            blob := self._content.find(digest, size) or self._arriving(reference, digest, client))}
        lacking = {digest: size for digest, size in sizes.items() if digest not in found}
        if lacking:
            self._restore(reference, lacking, client)
            found.update((digest, blob) for digest, size in lacking.items()
                         if (blob := self._content.find(digest, size)))
        return found

    def _arriving(self, reference: Reference, digest: Digest, client: Client) -> Transfer | None:
        """Content that a pull or a fetch is bringing for this client, or None."""
        return self._pulls.blob(digest) or self._fetches.blob(reference, digest, client)

    def has_content(self, digest: Digest, client: Client) -> bool:
        """True if Docker has the bytes of a digest at hand."""
        return self._ask(client, lambda _: self._content.find(digest)) is not None

    def manifest_content(self, digest: Digest, client: Client) -> Manifest | None:
        """The manifest with a digest, if Docker has its bytes under any name, or None."""
        return self._ask(client, lambda _: self._content.manifest(digest))

    def image(self, reference: Reference, client: Client) -> EngineImage | None:
        """The image that Docker finds under a name now, or under another name for the same, or None."""
        return self._ask(client, lambda _: self._inspected_image(self._names(reference, client)))

    # ---- lists

    def tags(self, reference: Reference, client: Client) -> list[str]:
        """The tags of the images that Docker has in a repository. The reference's target is not used."""
        names = {docker_name(alias.docker_repository()) for alias in self._names(reference, client)}
        return [tag for _, name, tag in self._all_names(client) if docker_name(name) in names]

    def catalog(self, client: Client) -> set[str]:
        """The repositories of Docker's images, by the names under which they can be pulled without a namespace."""
        found = set()
        for _, name, _ in self._all_names(client):
            host, repository = docker_name(name)
            if host == "docker.io":
                repository = repository.removeprefix("library/")
            elif not names_us(host, client.own_name):
                repository = name
            if REPOSITORY.fullmatch(repository):  # a registry's port cannot be part of a repository's name
                found.add(repository)
        return found

    def _all_names(self, client: Client) -> list[tuple[Digest, str, str]]:
        return self._ask(client, lambda _: self.engine.names())

    def _tidy_up_soon(self) -> None:
        with contextlib.suppress(RegistryError):  # no thread can be started: there is a next time
            start_thread(self.tidy_up)

    def tidy_up(self) -> None:
        """Free the disk of exports that nobody needs any more. Failures are logged."""
        try:
            with self._store.log_freed():
                self._store.tidy_up(lambda image_id: self.engine.image(str(image_id)) is not None, time.time())
        except Exception as e:  # a boundary: the program goes on
            log.warning("store: not tidied up: %s", printable(str(e)))


# =====================================================================================================================
# 17. Front: which of the two registries answers
# Uses: waiting, engine, transfers, store, hosted, mirror.
# =====================================================================================================================


@dataclass
class AdoptionPlan:
    """What has to be brought into a repository for a manifest to be whole there: blobs, and manifests of an index.

    Each manifest comes behind those that it lists. seen are the manifests that have been looked at.
    """

    reference: Reference
    repository: Repository
    client: Client
    blobs: dict[Digest, Blob] = field(default_factory=dict)
    manifests: list[Manifest] = field(default_factory=list)
    seen: set[Digest] = field(default_factory=set)

    def has(self, digest: Digest, size: int) -> bool:
        """True if a blob of this size, in bytes, is in the repository or will be brought there."""
        return digest in self.blobs or self.repository.has_blob(digest, size)


class Adoption:
    """Makes what is pushed whole: the only bridge from the mirror to what is hosted.

    A client may push a manifest that it read here, of an image that only Docker has (crane tag, say). Before that is
    answered, everything that it refers to is brought into its repository: what the store holds of Docker's is
    linked, the rest is read from Docker, verified and kept. So what was pushed stays, even if Docker removes it later.
    Content of other repositories is never taken: that is what mounts are for.
    """

    DEPTH = 8  # indexes in indexes

    def __init__(self, store: Store, hosted: Hosted, mirror: Mirror):
        self._store, self._hosted, self._mirror = store, hosted, mirror
        self._jobs = Jobs()

    def complete(self, reference: Reference, manifest: Manifest, client: Client) -> None:
        """Bring what a manifest refers to into its repository.

        MANIFEST_BLOB_UNKNOWN names the blobs that nobody has. Not having a layer that need not be distributed, or a
        manifest of an index with everything that it needs, is allowed (OCI Distribution Spec v1.1, "Pushing
        Manifests"). Nothing is copied before it is clear that all of it is available, and fits on the disk.
        """
        plan = AdoptionPlan(reference, self._hosted.repository(reference.repository), client)
        self._plan(plan, manifest)
        self._store.check_space(sum(blob.size for digest, blob in plan.blobs.items()
                                    if not self._store.docker.size(digest)))
        for digest, blob in plan.blobs.items():
            self._bring(plan.repository, digest, blob, client)
        for child in plan.manifests:
            plan.repository.put_manifest(child, ())

    def _plan(self, plan: AdoptionPlan, manifest: Manifest, depth: int = 0) -> None:
        """Add what a manifest lacks, and what those that it lists lack, to a plan."""
        required = manifest.sizes("config", "layers", "blobs")
        lacking = {digest: size for digest, size in {**manifest.undistributed(), **required}.items()
                   if not plan.has(digest, size)}
        found = self._mirror.contents(plan.reference, lacking, plan.client) if lacking else {}
        missing = [str(digest) for digest in lacking if digest in required and digest not in found]
        if missing:
            raise RegistryError("MANIFEST_BLOB_UNKNOWN", f"neither {plan.repository.name} nor Docker has "
                                                         f"{', '.join(missing)}: push blobs before the manifest that "
                                                         "refers to them")
        plan.blobs.update(found)
        for digest in manifest.listed("manifests"):
            self._plan_child(plan, digest, depth)

    def _plan_child(self, plan: AdoptionPlan, digest: Digest, depth: int) -> None:
        """Add a manifest of an index, behind what it refers to; or nothing, if not all of it is available."""
        if digest in plan.seen:
            return
        plan.seen.add(digest)
        if depth == self.DEPTH:
            raise RegistryError("MANIFEST_INVALID", f"{plan.reference}: indexes are nested more than {self.DEPTH} deep")
        hosted = plan.repository.manifest(digest)
        child = hosted or self._mirror.manifest_content(digest, plan.client)
        if child is None:
            return
        try:
            child.check()
            self._plan(plan, child, depth + 1)
        except RegistryError as e:
            if e.code not in ("MANIFEST_BLOB_UNKNOWN", "MANIFEST_INVALID"):
                raise
            log.info("%s: pushed without the manifest %s: %s", plan.reference, digest, e.detail)
        else:
            if hosted is None:
                plan.manifests.append(child)

    def _bring(self, repository: Repository, digest: Digest, blob: Blob, client: Client) -> None:
        """Make a blob belong to a repository. Requests that want the same content at the same time share one copy."""
        if not repository.blobs.adopt(digest, blob.size):
            job = self._jobs.start(digest, lambda: self._copy(digest, blob), f"copying {digest}")
            job.outcome(client.deadline)
            if not repository.blobs.adopt(digest, blob.size):
                raise RegistryError("STORE_FAILED", f"{digest} was removed from the store a moment ago")

    def _copy(self, digest: Digest, blob: Blob) -> None:
        """Copy content out of Docker into the store."""
        if self._store.docker.adopt(digest, blob.size):
            return  # copied by a job that ended after the caller had looked
        with ProgressLog(f"copy {digest}, {human_bytes(blob.size)}, for a push") as lines, \
                BlobWriter(self._store, digest.algorithm) as writer, \
                contextlib.closing(blob.open(0, blob.size, Deadline())) as body:
            count = 0
            for piece in body:
                writer.write(piece)
                lines.tell_rate(count := count + len(piece))
            found = writer.finish()
            if found != digest:
                raise RegistryError("ENGINE_FAILED", f"Docker has the bytes of {found} for {digest}")
            writer.keep(self._store.docker)
            lines.done("verified")


class Front:
    """Decides which of the two registries answers a request.

    A request with `ns` for another registry refers to Docker's images. Any other request refers to what was pushed
    here, and then to what Docker has under that very name. HEAD is different: most clients send it before a push, and
    take 200 for "you need not push this". So without `ns` it speaks only of what is hosted.
    """

    def __init__(self, hosted: Hosted, mirror: Mirror, store: Store):
        self.hosted, self.mirror, self._store = hosted, mirror, store
        self._adoption = Adoption(store, hosted, mirror)
        self._jobs = Jobs()
        self._hidden: set[tuple[Digest, Digest]] = set()  # pairs that the log has named; one operation each: no lock

    def close(self) -> None:
        """Close what is kept open, and remove what is half-written."""
        self.mirror.close()
        self._store.close()

    @staticmethod
    def _is_ours(reference: Reference, client: Client) -> bool:
        """True if a reference may mean what was pushed here."""
        return reference.namespace is None or names_us(reference.namespace, client.own_name)

    def _in_docker(self, reference: Reference, client: Client) -> Reference:
        """A reference as Docker's side has to take it."""
        if reference.namespace is not None and reference.namespace == client.own_name:
            return reference.under(None)
        return reference.of_path() or reference

    def _refuse_docker(self, reference: Reference, client: Client, code: str) -> None:
        """Refuse what Docker asks while it works for this program: it would wait for itself."""
        if self.mirror.is_docker_on_our_behalf(client):
            raise RegistryError(code, f"{reference}: Docker asks for this program, which does not have it")

    def manifest(self, reference: Reference, client: Client, head: bool = False) -> Manifest | ArrivingManifest:
        """The manifest or index that a reference means now. See Mirror.manifest for the errors."""
        self._refuse_docker(reference, client, "MANIFEST_UNKNOWN")
        hosted = self._hosted_manifest(reference, client)
        if hosted:
            return hosted
        before_pull = head and reference.namespace is None
        if before_pull and not client.is_about_to_pull():
            raise RegistryError("MANIFEST_UNKNOWN", f"{reference} was not pushed here")
        return self.mirror.manifest(self._in_docker(reference, client), client, may_pull=not before_pull)

    def _hosted_manifest(self, reference: Reference, client: Client) -> Manifest | None:
        if not self._is_ours(reference, client):
            return None
        manifest = self.hosted.repository(reference.repository).manifest(reference.target)
        if manifest and not isinstance(reference.target, Digest):
            with contextlib.suppress(RegistryError):  # the answer does not depend on it
                self._jobs.start((reference, client.own_name), lambda: self._log_hidden_image(
                    reference, manifest, client.own_name), "comparing")
        return manifest

    def _log_hidden_image(self, reference: Reference, manifest: Manifest, own_name: str | None) -> None:
        """Log, once for each pair, that a pushed tag hides another image of Docker's."""
        asking = Client(own_name)
        try:
            image = self.mirror.image(self._in_docker(reference, asking), asking)
            same = image is None or self._is_same(image, manifest, asking)
        except RegistryError as e:  # not worth a line above debug: what was pushed does not depend on Docker
            log.debug("%s was not compared with Docker's image: %s", reference, e.detail)
            return
        if same or image is None or (image.id, manifest.digest) in self._hidden:
            return
        if len(self._hidden) >= MEMORY_LIMIT:
            self._hidden.clear()
        self._hidden.add((image.id, manifest.digest))
        log.warning("%s is served as it was pushed, %s, and not as Docker's image of that name, %s: push it again, or "
                    "delete the tag here", reference, manifest.digest, image.id)

    def _is_same(self, image: EngineImage, manifest: Manifest, client: Client) -> bool:
        """True if a manifest is that of an image, or one that its index lists."""
        index = self.mirror.manifest_content(image.id, client)
        return image.id in (manifest.digest, *manifest.listed("config")) or (
            index is not None and manifest.digest in index.listed("manifests"))

    def blob(self, reference: Reference, client: Client, head: bool = False) -> Blob:
        """The blob with the digest that a reference names; BLOB_UNKNOWN."""
        self._refuse_docker(reference, client, "BLOB_UNKNOWN")
        if self._is_ours(reference, client):
            try:
                return self.hosted.blob(reference)
            except RegistryError as e:
                if e.code != "BLOB_UNKNOWN" or (head and reference.namespace is None):
                    raise
        return self.mirror.blob(self._in_docker(reference, client), client)

    # ---- writing

    def put_manifest(self, reference: Reference, manifest: Manifest, tags: list[str], client: Client) -> None:
        """Take a manifest that is pushed, with its tags, and everything that it refers to.

        MANIFEST_BLOB_UNKNOWN if nobody has a blob of it: then nothing is kept.
        """
        self._adoption.complete(reference, manifest, client)
        self.hosted.put_manifest(reference, manifest, tags)

    def delete_manifest(self, reference: Reference, client: Client) -> None:
        """Remove a tag, or a manifest with all its tags. MANIFEST_UNKNOWN, UNSUPPORTED."""
        with self._unless_in_docker(reference, lambda: self._has_manifest(reference, client)):
            self.hosted.delete_manifest(reference)

    def _has_manifest(self, reference: Reference, client: Client) -> bool:
        target = reference.target
        if isinstance(target, Digest):
            return self.mirror.manifest_content(target, client) is not None
        return self.mirror.image(self._in_docker(reference, client), client) is not None

    def delete_blob(self, reference: Reference, client: Client) -> None:
        """Remove a blob from a repository. BLOB_UNKNOWN, UNSUPPORTED."""
        with self._unless_in_docker(reference, lambda: self.mirror.has_content(reference.digest, client)):
            self.hosted.delete_blob(reference)

    @staticmethod
    @contextlib.contextmanager
    def _unless_in_docker(reference: Reference, in_docker: Callable[[], bool]) -> Iterator[None]:
        """Turn "unknown" into UNSUPPORTED for what cannot be deleted because it is Docker's."""
        try:
            yield
        except RegistryError as e:
            if e.status == 404 and in_docker():
                raise RegistryError("UNSUPPORTED", f"{reference} is in Docker, whose images are not deleted through "
                                                   "this registry: use docker rmi") from None
            raise

    # ---- lists

    def tags(self, reference: Reference, client: Client) -> list[str]:
        """The tags under which images of a repository can be pulled, sorted; NAME_UNKNOWN. The target is not used."""
        known, found = False, set()
        if self._is_ours(reference, client):
            with contextlib.suppress(RegistryError):  # NAME_UNKNOWN
                found.update(self.hosted.tags(reference))
                known = True
        found.update(self._docker_list(known, lambda: self.mirror.tags(self._in_docker(reference, client), client)))
        if not known and not found:
            raise RegistryError("NAME_UNKNOWN", f"nothing was pushed to {reference.docker_repository()}, and Docker "
                                                "has no image of that name")
        return sorted(found)

    def catalog(self, client: Client) -> list[str]:
        """The repositories that can be pulled from without a namespace, sorted: those pushed here, and Docker's."""
        found = set(self.hosted.catalog())
        return sorted(found.union(self._docker_list(bool(found), lambda: self.mirror.catalog(client))))

    @staticmethod
    def _docker_list(others: bool, names: Callable[[], Iterable[str]]) -> Iterable[str]:
        """Names of Docker's. If Docker fails, none if there are others to show, or else its error."""
        try:
            return names()
        except RegistryError as e:
            if not others:
                raise
            log.warning("the list lacks Docker's images: %s", e.detail)
            return []

    def referrers(self, reference: Reference, client: Client) -> list[dict[str, Any]]:
        """The descriptors of manifests that were pushed to a repository and have a reference's digest as subject."""
        return self.hosted.referrers(reference) if self._is_ours(reference, client) else []

    # ---- tidying up

    def keep_tidy(self) -> None:
        """Tidy up every TIDY_INTERVAL seconds, for as long as the process lives."""
        while True:
            time.sleep(TIDY_INTERVAL)
            self.tidy_up()

    def tidy_up(self) -> None:
        """Free the disk of what nothing refers to any more. Failures are logged."""
        try:
            with self._store.log_freed():
                self.hosted.tidy_up(time.time())
        except Exception as e:  # a boundary: the program goes on
            log.warning("store: what was pushed is not tidied up: %s", printable(str(e)))
        self.mirror.tidy_up()


# =====================================================================================================================
# 18. Requests: HTTP as values
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


FIELD_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2


class RequestBody:
    """The body of a request, decoded as it is read (RFC 9112, 6 and 7.1).

    length is in bytes, or None if the body is chunked. Malformed framing raises REQUEST_INVALID: the start of
    the next request is then unknown.
    """

    def __init__(self, headers: Message, stream: io.BufferedIOBase, invite: Callable[[], None]):
        """invite is called before the first read, because the client may be waiting for 100 Continue."""
        self._stream, self._invite = stream, invite
        self.length = self._parse_length(headers)
        self.at_end = self.length == 0
        self.count = 0  # bytes read so far
        self._pieces = self._decode()  # shared: each reader continues where the last one stopped

    @staticmethod
    def _parse_length(headers: Message) -> int | None:
        lengths, codings = (headers.get_all(name, []) for name in ("Content-Length", "Transfer-Encoding"))
        if codings:
            if lengths or [coding.strip().lower() for coding in codings] != ["chunked"]:
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
        with self._connection_errors():
            self._invite()
        yield from self._chunks() if self.length is None else self._read(self.length)
        self.at_end = True

    def _read(self, count: int) -> Iterator[bytes]:
        while count:
            with self._connection_errors():
                data = self._stream.read1(min(count, PIECE))
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
        for _ in range(TRAILER_LIMIT):
            if self._line() == b"\r\n":
                return
        raise RegistryError("REQUEST_INVALID", "too many trailers")

    def _line(self) -> bytes:
        with self._connection_errors():
            line = self._stream.readline(CHUNK_LINE)
        if not line.endswith(b"\r\n"):
            raise RegistryError("REQUEST_INVALID", "a line of the chunked coding is incomplete or too long")
        return line

    @staticmethod
    @contextlib.contextmanager
    def _connection_errors() -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise RegistryError("REQUEST_INVALID", f"the body of the request could not be read: {e}") from None

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
        count = 0
        with contextlib.suppress(RegistryError):
            while (self.length or 0) <= BODY_LIMIT and count <= BODY_LIMIT and (piece := next(self._pieces, b"")):
                count += len(piece)
        return self.at_end


@dataclass(frozen=True)
class Request:
    """A parsed request, as the endpoints get it: query values decoded, credentials parsed."""

    method: str
    path: str
    captured: tuple[str, ...]  # the parts of the path captured by the route, the repository first
    query: Mapping[str, list[str]]
    client: Client
    range: str | None
    content_range: str | None
    content_type: str | None
    body: RequestBody

    @property
    def namespace(self) -> str | None:
        """The `ns` parameter, by which clients tell a mirror the image's registry, or None."""
        return self.parameter("ns") or None

    def parameter(self, name: str) -> str | None:
        """Return the last value of a query parameter, or None."""
        values = self.query.get(name)
        return values[-1] if values else None


def parse_credentials(header: str | None) -> Credentials | None:
    """Parse an Authorization header (RFC 7617). Returns None if it is missing.

    Schemes other than Basic are ignored, because Docker cannot use them. Raises REQUEST_INVALID if a
    Basic header is malformed.
    """
    scheme, _, encoded = (header or "").strip().partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        username, colon, password = base64.b64decode(encoded.strip(), validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        colon = ""
    if not colon:
        raise RegistryError("REQUEST_INVALID", "the Authorization header is not valid Basic authentication (RFC 7617)")
    return Credentials(username, password)


RANGES_LIMIT = 100          # ranges of one request; more are ignored, and the whole content is sent


def parse_ranges(header: str | None, size: int) -> list[tuple[int, int]] | None:
    """Parse a Range header for content of size bytes (RFC 9110, 14.1.2). Returns start and length of each, in bytes.

    Returns None if the whole content is to be sent: the header is missing, malformed, or asks for more bytes than
    there are. Ranges outside of the content are left out. Raises RANGE_INVALID if no other remains, and for a single
    range that ends before its start, as the conformance tests of the distribution specification want.
    """
    unit, equals, text = (header or "").partition("=")
    specs = [spec.strip().partition("-") for spec in text.split(",") if spec.strip()]
    if unit.strip().lower() != "bytes" or not specs or not equals or len(specs) > RANGES_LIMIT or not all(
            re.fullmatch(r"\d{1,99}-\d{0,99}|-\d{1,99}", "".join(spec), re.ASCII) for spec in specs):
        return None
    if len(specs) > 1 and any(first and last and int(first) > int(last) for first, _, last in specs):
        return None
    found = [part for part in (clip_range(first, last, size) for first, _, last in specs) if part]
    if not found:
        raise RegistryError("RANGE_INVALID", f"the content has {size} bytes", {"Content-Range": f"bytes */{size}"})
    return found if sum(length for _, length in found) <= size else None


def clip_range(first: str, last: str, size: int) -> tuple[int, int] | None:
    """Return start and length of one range of content of size bytes, or None if there are no such bytes."""
    if first:
        start, end = int(first), min(int(last) if last else size - 1, size - 1)
    else:
        start, end = max(size - int(last), 0), size - 1
    return (start, end - start + 1) if start <= end else None


def content_range(start: int, length: int, size: int) -> str:
    """Return the value of Content-Range for a part of content of size bytes."""
    return f"bytes {start}-{start + length - 1}/{size}"


def multipart(blob: Blob, ranges: list[tuple[int, int]], boundary: str, deadline: Deadline) -> StreamBody:
    """Return several ranges of a blob as the body of multipart/byteranges (RFC 9110, 14.6)."""
    heads = [(f"\r\n--{boundary}\r\nContent-Type: application/octet-stream\r\n"
              f"Content-Range: {content_range(start, length, blob.size)}\r\n\r\n").encode() for start, length in ranges]
    end = f"\r\n--{boundary}--\r\n".encode()

    def parts() -> Generator[Part, None, None]:
        for head, (start, length) in zip(heads, ranges, strict=True):
            yield head
            with contextlib.closing(blob.open(start, length, deadline)) as body:
                yield from body.parts()
        yield end

    pieces = parts()
    total = sum(map(len, heads)) + sum(length for _, length in ranges) + len(end)
    return StreamBody(pieces, total, pieces.close, waits=True)


def parse_content_range(header: str | None, length: int | None) -> int | None:
    """Parse the Content-Range of an upload's chunk. Returns the start in bytes, or None without the header.

    The spec's form is <start>-<end>, both inclusive. length is that of the body in bytes, or None if unknown.
    Raises BLOB_UPLOAD_INVALID and SIZE_INVALID.
    """
    if header is None:
        return None
    match = re.fullmatch(r"(?:bytes[ =])?(\d{1,18})-(\d{1,18})(?:/(?:\d+|\*))?", header.strip(), re.ASCII)
    if not match or int(match[1]) > int(match[2]):
        raise RegistryError("BLOB_UPLOAD_INVALID", f"Content-Range: {header!r} is not <start>-<end>")
    start, end = int(match[1]), int(match[2])
    if length not in (None, end - start + 1):
        raise RegistryError("SIZE_INVALID", f"Content-Range: {header} is not a range of {length} bytes")
    return start


def page(request: Request, names: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return the page of a sorted list that `n` and `last` select, and the Link header to the next page.

    See OCI Distribution Spec v1.1, "Listing Tags". Raises REQUEST_INVALID.
    """
    last, count = request.parameter("last"), request.parameter("n")
    rest = [name for name in names if last is None or name > last]
    if count is None:
        return rest, {}
    if not re.fullmatch(r"\d{1,9}", count, re.ASCII):
        raise RegistryError("REQUEST_INVALID", f"n={count!r} is not a valid number of entries")
    part = rest[:int(count)]
    if not part or len(part) == len(rest):
        return part, {}
    query = {"n": count, "last": part[-1], **({"ns": request.namespace} if request.namespace else {})}
    return part, {"Link": f'<{request.path}?{urllib.parse.urlencode(query)}>; rel="next"'}


# =====================================================================================================================
# 19. End-points: the distribution specification
# Uses: transfers, hosted, mirror, front, requests.
# =====================================================================================================================

ABOUT = f"""k3d-registry-dockerd {__version__}

This is an OCI registry that serves the images of the local Docker daemon, and images that are pushed to it.
Its API is under /v2/ (OCI Distribution Specification).
"""


class Endpoints:
    """One method for each endpoint of OCI Distribution Spec v1.1, "Endpoints"."""

    def __init__(self, registry: Front):
        self._registry = registry

    def about(self, request: Request) -> Response:
        """GET /: a description for browsers."""
        return Response(200, {"Content-Type": "text/plain; charset=utf-8"}, ABOUT.encode())

    def version_check(self, request: Request) -> Response:
        """end-1, GET /v2/: confirm that this is a registry."""
        return Response(200, {"Content-Type": "application/json"}, b"{}")

    def blob(self, request: Request) -> Response:
        """end-2, GET /v2/<name>/blobs/<digest>: a blob, or the requested range of it."""
        blob, headers = self._find_blob(request)
        ranges, deadline = parse_ranges(request.range, blob.size), request.client.deadline
        if ranges is None:
            return Response(200, headers, blob.open(0, blob.size, deadline))
        if len(ranges) > 1:
            boundary = secrets.token_hex(16)
            headers["Content-Type"] = f"multipart/byteranges; boundary={boundary}"
            return Response(206, headers, multipart(blob, ranges, boundary, deadline))
        start, length = ranges[0]
        headers["Content-Range"] = content_range(start, length, blob.size)
        return Response(206, headers, blob.open(start, length, deadline))

    def blob_head(self, request: Request) -> Response:
        """end-2, HEAD /v2/<name>/blobs/<digest>: the existence and size of a blob."""
        blob, headers = self._find_blob(request)
        return Response(200, headers, length=blob.size)

    def _find_blob(self, request: Request) -> tuple[Blob, dict[str, str]]:
        repository, digest = request.captured
        reference = Reference.parse_digest(repository, digest, request.namespace)
        return self._registry.blob(reference, request.client, request.method == "HEAD"), {
            "Content-Type": "application/octet-stream", "Docker-Content-Digest": digest, "Accept-Ranges": "bytes"}

    def manifest(self, request: Request) -> Response:
        """end-3, GET and HEAD /v2/<name>/manifests/<reference>: a manifest by tag or digest."""
        repository, target = request.captured
        reference = Reference.parse(repository, target, request.namespace)
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
        if mount is not None and self._mount(repository, mount, request.parameter("from")):
            return self._created(repository, mount)
        if digest is None or (mount is not None and request.body.length == 0):
            return self._upload_status(202, repository, repository.begin_upload(), 0)
        self._registry.hosted.push_blob(Reference(repository.name, requested_digest(digest)), request.body)
        return self._created(repository, digest)

    def _mount(self, repository: Repository, digest: str, source: str | None) -> bool:
        """Mount a blob. Returns False if there is none, or if the digest or the source is invalid, as some clients'."""
        if source is not None and not REPOSITORY.fullmatch(source):
            return False
        try:
            reference = Reference(repository.name, Digest.parse(digest))
        except ValueError:
            return False
        return self._registry.hosted.mount(reference, source)

    def upload(self, request: Request) -> Response:
        """end-13, GET /v2/<name>/blobs/uploads/<session>: the progress of an upload."""
        repository, session = self._repository(request), request.captured[1]
        return self._upload_status(204, repository, session, repository.upload_size(session))

    def append_to_upload(self, request: Request) -> Response:
        """end-5, PATCH /v2/<name>/blobs/uploads/<session>: append bytes, with or without Content-Range."""
        repository, session = self._repository(request), request.captured[1]
        with repository.upload(session) as upload:
            self._receive(request, repository, session, upload)
            return self._upload_status(202, repository, session, upload.size)

    def finish_upload(self, request: Request) -> Response:
        """end-6, PUT /v2/<name>/blobs/uploads/<session>?digest=<digest>: append the last bytes, if any, and finish."""
        repository, session = self._repository(request), request.captured[1]
        expected = requested_digest(request.parameter("digest"))
        with repository.upload(session) as upload:
            self._receive(request, repository, session, upload)
            upload.keep(expected, repository.blobs)
        return self._created(repository, str(expected))

    def cancel_upload(self, request: Request) -> Response:
        """end-14, DELETE /v2/<name>/blobs/uploads/<session>: cancel an upload."""
        with self._repository(request).upload(request.captured[1]) as upload:
            upload.cancel()
        return Response(204, {})

    def _repository(self, request: Request) -> Repository:
        Reference.check_repository(request.captured[0], request.namespace)
        return self._registry.hosted.repository(request.captured[0])

    def _receive(self, request: Request, repository: Repository, session: str, upload: Upload) -> None:
        """Append the body of a request. Raises RANGE_INVALID if it does not start at the end of the upload."""
        start = parse_content_range(request.content_range, request.body.length)
        if start not in (None, upload.size):
            headers = self._upload_status(416, repository, session, upload.size).headers
            raise RegistryError("RANGE_INVALID", f"the next byte of this upload is {upload.size}, not {start}", headers)
        for piece in request.body:
            upload.write(piece)

    @staticmethod
    def _upload_status(status: int, repository: Repository, session: str, size: int) -> Response:
        """Return the state of an upload. An empty one has the range 0-0, as older clients expect."""
        return Response(status, {"Location": f"/v2/{repository.name}/blobs/uploads/{session}",
                                 "Docker-Upload-UUID": session, "Range": f"0-{max(size - 1, 0)}"})

    @staticmethod
    def _created(repository: Repository, digest: str) -> Response:
        return Response(201, {"Location": f"/v2/{repository.name}/blobs/{digest}", "Docker-Content-Digest": digest})

    # ---- pushed manifests

    def put_manifest(self, request: Request) -> Response:
        """end-7, PUT /v2/<name>/manifests/<reference>: push a manifest. By digest, `tag` parameters add tags."""
        repository, target = request.captured
        reference = Reference.parse_pushed(repository, target, request.namespace)
        tags = request.query.get("tag", []) if isinstance(reference.target, Digest) else [target]
        if len(tags) > TAG_LIMIT:
            raise RegistryError("TOO_MANY_TAGS", f"{len(tags)} tags in one request; the limit is {TAG_LIMIT}")
        for tag in tags:
            if not TAG.fullmatch(tag):
                raise RegistryError("MANIFEST_INVALID", f"{tag!r} is not a tag")
        data = request.body.read(MANIFEST_LIMIT)
        if data is None:
            raise RegistryError("MANIFEST_TOO_LARGE", f"the limit is {MANIFEST_LIMIT} bytes")
        manifest = Hosted.accept_manifest(reference, data, request.content_type)
        # The time that the client took to send the manifest does not count.
        client = dataclasses.replace(request.client, deadline=request.client.deadline.unlimited().within(LAST_ANSWER))
        self._registry.put_manifest(reference, manifest, tags, client)
        headers = {"Location": f"/v2/{repository}/manifests/{manifest.digest}",
                   "Docker-Content-Digest": str(manifest.digest)}
        if manifest.subject:
            headers["OCI-Subject"] = str(manifest.subject)
        by_digest = isinstance(reference.target, Digest)
        return Response(201, headers, lines=[("OCI-Tag", tag) for tag in tags if by_digest])

    def delete_manifest(self, request: Request) -> Response:
        """end-9, DELETE /v2/<name>/manifests/<reference>: delete a tag, or a manifest and all its tags."""
        repository, target = request.captured
        reference = Reference.parse(repository, target, request.namespace)
        self._registry.delete_manifest(reference, request.client)
        return Response(202, {})

    def delete_blob(self, request: Request) -> Response:
        """end-10, DELETE /v2/<name>/blobs/<digest>: delete a blob."""
        repository, digest = request.captured
        self._registry.delete_blob(Reference.parse_digest(repository, digest, request.namespace), request.client)
        return Response(202, {})

    # ---- lists

    def tags(self, request: Request) -> Response:
        """end-8, GET /v2/<name>/tags/list: the tags, in pages on request."""
        Reference.check_repository(request.captured[0], request.namespace)
        reference = Reference(request.captured[0], "latest", request.namespace)
        names, headers = page(request, self._registry.tags(reference, request.client))
        return self._json({"name": request.captured[0], "tags": names}, headers)

    def catalog(self, request: Request) -> Response:
        """GET /v2/_catalog: the repositories, in pages on request (not in the OCI spec, but in its predecessor)."""
        names, headers = page(request, self._registry.catalog(request.client))
        return self._json({"repositories": names}, headers)

    def referrers(self, request: Request) -> Response:
        """end-12, GET /v2/<name>/referrers/<digest>: an index of the manifests with this subject."""
        repository, subject = request.captured
        reference = Reference.parse_digest(repository, subject, request.namespace)
        wanted = request.parameter("artifactType")
        found = self._registry.referrers(reference, request.client)
        if wanted is not None:
            found = [descriptor for descriptor in found if descriptor.get("artifactType") == wanted]
        headers = {"Content-Type": OCI_INDEX, **({"OCI-Filters-Applied": "artifactType"} if wanted is not None else {})}
        return self._json({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": found}, headers)

    @staticmethod
    def _json(document: Mapping[str, Any], headers: dict[str, str]) -> Response:
        return Response(200, {"Content-Type": "application/json", **headers}, json.dumps(document).encode())


Endpoint = Callable[[Endpoints, Request], Response]

# Method, path, endpoint. Repository names may contain slashes, so the last keyword in a path decides.
ROUTES: tuple[tuple[str, re.Pattern[str], Endpoint], ...] = tuple(
    (method, re.compile(path, re.DOTALL), endpoint) for method, path, endpoint in (
        ("GET", r"/", Endpoints.about),
        ("GET", r"/v2/?", Endpoints.version_check),
        ("GET", r"/v2/_catalog", Endpoints.catalog),
        ("HEAD", r"/v2/(.+)/blobs/([^/]+)", Endpoints.blob_head),
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
# 20. Server: HTTP on a socket
# Uses: waiting, transfers, front, requests, end-points.
# =====================================================================================================================


@dataclass(frozen=True)
class Policy:
    """Decides which pushes and deletions are allowed."""

    read_only: bool = False
    deletes: bool = True

    def check(self, method: str, namespace: str | None, own_name: str | None) -> None:
        """Raise UNSUPPORTED if a request that changes something is not allowed in this namespace."""
        if namespace and not names_us(namespace, own_name):
            raise RegistryError("UNSUPPORTED", f"images of {namespace} can be pulled through this registry, but not "
                                               "pushed or deleted")
        if self.read_only:
            raise RegistryError("UNSUPPORTED", "this registry is read-only: it was started with -read-only")
        if method == "DELETE" and not self.deletes:
            raise RegistryError("UNSUPPORTED", "deletion is disabled by REGISTRY_STORAGE_DELETE_ENABLED=false")


class Handler(BaseHTTPRequestHandler):
    """Handles one client connection. It outlives the requests, so it keeps no state of a request."""

    server: Server
    raw_requestline: bytes
    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.1"    # even garbage, like a TLS handshake, gets an HTTP answer
    server_version = f"k3d-registry-dockerd/{__version__}"
    sys_version = ""
    disable_nagle_algorithm = True
    wbufsize = 64 * KIB                     # headers and a small body are sent in one packet
    timeout = IDLE_TIMEOUT

    def handle_any(self) -> None:
        """Handle a request of any method. Does not raise: every exception becomes a response."""
        with self.server.request_under_way():
            self._handle(time.monotonic())

    def _handle(self, started: float) -> None:
        body = None
        try:
            self._check_headers()
            body = RequestBody(self.headers, self.rfile, self._invite_body)
            response = self._respond(body)
            response.note = f"received {human_bytes(body.count)}" if body.count else ""
        except ClientGone:
            self._log_gone(started)
            return
        except RegistryError as e:
            response = self._error_response(e)
        except Exception as e:  # last resort: this client gets an answer, and the others are not affected
            log.exception("%s %s: a bug in this program", self.command, printable(self.path))
            response = self._error_response(RegistryError("UNKNOWN", f"{type(e).__name__}, see the log"))
        self._keep_in_step(body)
        self.reply(response, started)

    def _check_headers(self) -> None:
        """Raise REQUEST_INVALID if a header line is malformed (RFC 9112, 5.1).

        The parser skips that line and all that follow, possibly a Content-Length.
        """
        names_good = all(FIELD_NAME.fullmatch(name) for name in self.headers)
        if self.headers.defects or self.headers.get_payload() or not names_good:
            raise RegistryError("REQUEST_INVALID", "a header line is malformed")

    def _keep_in_step(self, body: RequestBody | None) -> None:
        """Read the rest of the body, or close the connection: it would be parsed as the next request."""
        waiting = self.headers.get("Expect") and body and not body.at_end  # for a 100 Continue that is never sent
        if body is None or waiting or not body.discard():
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = handle_any

    def _respond(self, body: RequestBody) -> Response:
        try:
            url = urllib.parse.urlsplit(self.path)
        except ValueError as e:
            raise RegistryError("REQUEST_INVALID", f"the request target is malformed: {e}") from None
        path = urllib.parse.unquote(url.path)
        endpoint, captured = find_route(self.command, path)
        host = self.headers.get("Host")
        client = Client(host if host and is_host(host) else None,
                        parse_credentials(self.headers.get("Authorization")), Deadline(LAST_ANSWER, self.connection),
                        self.headers.get("User-Agent", ""), ",".join(self.headers.get_all("Accept", [])))
        query = urllib.parse.parse_qs(url.query, keep_blank_values=True)
        namespace = query.get("ns", [""])[-1] or None
        Reference.check_namespace(namespace)
        if self.command not in ("GET", "HEAD"):
            self.server.policy.check(self.command, namespace, client.own_name)
        request = Request(
            self.command, path, captured, query, client,
            None if self.headers.get("If-Range") else self.headers.get("Range"), self.headers.get("Content-Range"),
            self.headers.get("Content-Type"), body)
        response = endpoint(self.server.endpoints, request)
        if request.namespace:
            response.headers["OCI-Namespace"] = request.namespace
        return response

    def _invite_body(self) -> None:
        """Send 100 Continue if the client waits for it (RFC 9110, 10.1.1)."""
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
            self.wfile.flush()

    def handle_expect_100(self) -> bool:
        """Called by http.server before the request is handled. 100 Continue is sent later, by _invite_body."""
        return True

    @staticmethod
    def _error_response(error: RegistryError) -> Response:
        return Response(error.status, {"Content-Type": "application/json", **error.headers}, error.body(),
                        note=f"{error.code}: {error.detail}")

    def version_string(self) -> str:
        """Return the Server header, without the trailing space of the inherited version."""
        return self.server_version

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Called by http.server for a request that it cannot parse. Sends an error like any other, as JSON."""
        error = RegistryError("REQUEST_INVALID", message or "bad request")
        self.close_connection = True
        self.command = getattr(self, "command", None) or "GET"
        response = self._error_response(error)
        response.status = code
        self.reply(response, time.monotonic())

    # ---- writing

    def reply(self, response: Response, started: float) -> None:
        """Write a response to the socket, and one line to the log."""
        body = response.body
        length = response.length
        if length is None:
            length = len(body) if isinstance(body, bytes) else body.length
        sent, problem = 0, ""
        try:
            self._write_head(response, length)
            if self.command != "HEAD":
                for count in self._write_body(body):
                    sent += count
                if sent < (length or 0):
                    raise RegistryError("ENGINE_FAILED", "the content ended early")
            self.wfile.flush()
        except (OSError, ClientGone) as e:
            problem = f"the client went away: {e or 'it closed the connection'}"
        except RegistryError as e:
            problem = f"closed early: {e}"
        except Exception as e:  # last resort, as in _handle
            log.exception("%s %s: a bug in this program", self.command, printable(self.path))
            problem = f"closed early: {type(e).__name__}"
        finally:
            if not isinstance(body, bytes):
                body.close()
        if problem:
            self.close_connection = True
        self._log(response, sent, time.monotonic() - started, problem or response.note)

    def _write_head(self, response: Response, length: int | None) -> None:
        self.send_response(response.status)
        for name, value in (*response.headers.items(), *response.lines):
            self.send_header(name, value)
        if length is None and self.command != "HEAD":
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
        if body.waits:
            self.wfile.flush()
        for part in body.parts():
            if isinstance(part, FileBody):
                yield from self._send_file(part)
                continue
            data = part if body.length is not None else b"%x\r\n%s\r\n" % (len(part), part)
            if len(data) < self.wbufsize // 4:
                self.wfile.write(data)
            else:  # bypass the buffer, which would copy the data
                self.wfile.flush()
                self.connection.sendall(data)
            yield len(part)
        if body.length is None:
            self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()
        self.connection.settimeout(self.timeout)

    def _send_file(self, part: FileBody) -> Iterator[int]:
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

    def _log(self, response: Response, sent: int, seconds: float, note: str) -> None:
        """Log a request: method, path, status, bytes of the body, time, client, and what went wrong."""
        level = logging.INFO if response.status < 400 else logging.WARNING if response.status < 500 else logging.ERROR
        if self.command == "HEAD" and response.status == 404:
            level = logging.INFO  # normal: clients ask before each push
        if self.raw_requestline.startswith(b"\x16\x03"):
            level, note = logging.DEBUG, "a TLS handshake on a port without TLS"
        log.log(level, "%s %s %d %s %s %s%s", self.command, printable(getattr(self, "path", "")), response.status,
                human_bytes(sent), human_seconds(seconds), self.client_address[0], note and f" - {printable(note)}")

    def _log_gone(self, started: float) -> None:
        """Log a request whose client did not wait for the answer, with the status that nginx uses for that."""
        self.close_connection = True
        self._log(Response(499, {}), 0, time.monotonic() - started, "the client went away before the answer")

    def log_message(self, format: str, *args: Any) -> None:
        """Called by http.server, for example when an idle connection times out. Logged for debugging only."""
        log.debug("%s: %s", self.client_address[0], printable(format % args))

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
            raise ValueError(f"{text!r} is not an address: use HOST:PORT, :PORT or [::1]:PORT")
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

    def __init__(self, address: Address, registry: Front, policy: Policy | None = None,
                 tls: ssl.SSLContext | None = None):
        """Bind the address. Raises OSError. Serve with serve_forever, end with shutdown and server_close.

        With a tls context, all connections must use TLS.
        """
        self.endpoints, self.policy, self._tls = Endpoints(registry), policy or Policy(), tls
        self._change = threading.Condition()  # guards _under_way
        self._under_way = 0
        self._all_interfaces = address.host == "" and socket.has_dualstack_ipv6()
        if self._all_interfaces or ":" in address.host:
            self.address_family = socket.AF_INET6
        super().__init__((address.host, address.port), Handler)

    def server_bind(self) -> None:
        """Bind IPv6 and IPv4 if on all interfaces. Unlike the inherited version, does not look up the host's name."""
        if self._all_interfaces:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection. The TLS handshake happens in its own thread, at the first read."""
        connection, address = super().get_request()
        if self._tls:
            connection.settimeout(IDLE_TIMEOUT)
            connection = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    @contextlib.contextmanager
    def request_under_way(self) -> Iterator[None]:
        """Count a request as running during the `with`."""
        with self._change:
            self._under_way += 1
        try:
            yield
        finally:
            with self._change:
                self._under_way -= 1
                self._change.notify_all()

    def finish_requests(self, seconds: float) -> None:
        """Wait until all running requests are answered, at most for some seconds."""
        with self._change:
            if not self._change.wait_for(lambda: not self._under_way, seconds):
                log.warning("%d requests were aborted", self._under_way)

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
# 21. Command line: arguments, environment, signals
# Uses: configuration, waiting, engine, store, hosted, pulls, mirror, front, server.
# =====================================================================================================================

DEFAULT_ADDRESS = ":5000"


class ArgumentParser(argparse.ArgumentParser):
    """Reports errors in one line, without the usage that argparse prints first."""

    def error(self, message: str) -> Any:
        """Print the message and exit with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def argument_parser() -> ArgumentParser:
    """Return the parser. Options take one dash or two, like Go's flags."""
    parser = ArgumentParser(prog="k3d-registry-dockerd", allow_abbrev=False, description=(
        "An OCI registry that serves the images of the local Docker daemon. Like the docker command, it finds Docker "
        "through DOCKER_HOST, DOCKER_TLS_VERIFY and DOCKER_CERT_PATH."))
    parser.add_argument("-addr", "--addr", metavar="ADDRESS", help=(
        "listen on HOST:PORT, or on :PORT for all interfaces (default: REGISTRY_HTTP_ADDR or :5000)"))
    parser.add_argument("-store", "--store", metavar="DIR", help=(
        "the folder for pushed and exported images (default: REGISTRY_STORAGE_FILESYSTEM_ROOTDIRECTORY, or a folder in "
        "the user's cache)"))
    parser.add_argument("-docker-root", "--docker-root", metavar="DIR", help=(
        "read images from this data folder of Docker (default: the folder that Docker reports, if it is readable)"))
    parser.add_argument("-allow", "--allow", metavar="PATTERN", action="append", default=[], help=(
        "only pull from registries that match, like docker.io or *.corp.example; can be repeated (default: pull from "
        "all)"))
    parser.add_argument("-pull", "--pull", choices=PullPolicy.POLICIES, default="missing", help=(
        "when to pull an image: if Docker does not have it (missing), also if its tag has changed in its registry, "
        "which is asked each time (always), or never (default: missing)"))
    parser.add_argument("-read-only", "--read-only", action="store_true", help=(
        "refuse pushes and deletions (default: REGISTRY_STORAGE_MAINTENANCE_READONLY_ENABLED)"))
    parser.add_argument("-tls-certificate", "--tls-certificate", metavar="FILE", help=(
        "listen with TLS and this certificate chain in PEM (default: REGISTRY_HTTP_TLS_CERTIFICATE)"))
    parser.add_argument("-tls-key", "--tls-key", metavar="FILE", help=(
        "the private key of the certificate, in PEM (default: REGISTRY_HTTP_TLS_KEY)"))
    parser.add_argument("-check", "--check", action="store_true", help=(
        "check that a registry answers at this address; exit with 0 if it does, 1 if not"))
    parser.add_argument("-version", "--version", action="version", version=f"k3d-registry-dockerd {__version__}")
    return parser


def first_set(*candidates: tuple[str, str | None]) -> tuple[str, str]:
    """Return the first value that is set, and a text that names its source and the ignored values."""
    (source, value), *rest = [(source, value) for source, value in candidates if value]
    ignored = [f"{name}={other} is ignored" for name, other in rest if name != "the default"]
    return value or "", ", ".join([f"from {source}", *ignored])


def boolean(environ: Mapping[str, str], name: str, default: bool) -> bool:
    """Parse a boolean variable like Go's strconv.ParseBool. Raises ValueError."""
    text = environ.get(name, "")
    if text.lower() not in ("", "true", "false", "1", "0", "t", "f"):
        raise ValueError(f"{name}={text!r} is neither true nor false")
    return text.lower() in ("true", "1", "t") if text else default


@dataclass(frozen=True)
class Settings:
    """All settings, validated."""

    address: Address
    address_origin: str
    store: Path
    store_origin: str
    engine: EngineHost
    pulls: PullPolicy
    docker_root: Path | None
    policy: Policy
    tls: ssl.SSLContext | None
    notes: tuple[str, ...]

    @classmethod
    def read(cls, arguments: argparse.Namespace, environ: Mapping[str, str]) -> Settings:
        """Read flags, then the environment, then defaults. Raises ValueError with a message of one line."""
        empty = [name for name, value in vars(arguments).items() if value == ""]
        if empty:
            raise ValueError(f"-{empty[0].replace('_', '-')} is empty")
        address, address_origin = first_set(("-addr", arguments.addr), ("REGISTRY_HTTP_ADDR", environ.get(
            "REGISTRY_HTTP_ADDR")), ("the default", DEFAULT_ADDRESS))
        cache = environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        store, store_origin = first_set(("-store", arguments.store), (
            "REGISTRY_STORAGE_FILESYSTEM_ROOTDIRECTORY", environ.get("REGISTRY_STORAGE_FILESYSTEM_ROOTDIRECTORY")),
            ("the default", str(Path(cache) / "k3d-registry-dockerd")))
        try:
            parsed = Address.parse(address)
        except ValueError as e:
            raise ValueError(f"{e} ({address_origin})") from None
        store_note = cls._check_store(Path(store), store_origin)
        read_only = arguments.read_only or boolean(environ, "REGISTRY_STORAGE_MAINTENANCE_READONLY_ENABLED", False)
        policy = Policy(read_only, boolean(environ, "REGISTRY_STORAGE_DELETE_ENABLED", True))
        tls = cls._tls(arguments.tls_certificate or environ.get("REGISTRY_HTTP_TLS_CERTIFICATE"),
                       arguments.tls_key or environ.get("REGISTRY_HTTP_TLS_KEY"))
        config = DockerConfig(Path(environ.get("DOCKER_CONFIG") or Path.home() / ".docker"))
        return cls(parsed, address_origin, Path(store), store_origin, EngineHost.from_environment(environ),
                   PullPolicy(cls._patterns(arguments.allow), arguments.pull, config),
                   Path(arguments.docker_root) if arguments.docker_root else None, policy, tls,
                   tuple(filter(None, [store_note, *cls._proxy_notes(environ)])))

    @staticmethod
    def _patterns(patterns: list[str]) -> tuple[str, ...]:
        for pattern in patterns:
            if not re.fullmatch(r"localhost|(?=.*[.:*])[a-zA-Z0-9.:*?-]+", pattern):
                raise ValueError(f"-allow {pattern!r} matches no registry: use a host (docker.io, *.corp.example)")
        return tuple(patterns)

    @staticmethod
    def _tls(certificate: str | None, key: str | None) -> ssl.SSLContext | None:
        if not certificate and not key:
            return None
        if not certificate or not key:
            raise ValueError("TLS needs both -tls-certificate and -tls-key, or both REGISTRY_HTTP_TLS_CERTIFICATE and "
                             "REGISTRY_HTTP_TLS_KEY")
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(certificate, key)
        except OSError as e:  # includes ssl.SSLError
            raise ValueError(f"the TLS certificate {certificate} and key {key} cannot be used: "
                             f"{e.strerror or e}") from None
        return context

    @staticmethod
    def _check_store(store: Path, origin: str) -> str | None:
        """Return a warning, or None. Raises ValueError if the store is not a folder and cannot be created."""
        try:
            existing = next(path for path in (store.absolute(), *store.absolute().parents) if path.exists())
            if not existing.is_dir():
                raise ValueError(f"the store {store} ({origin}) cannot be created: {existing} is not a folder")
        except OSError as e:
            raise ValueError(f"the store {store} ({origin}) cannot be used: {e.strerror or e}") from None
        if not os.access(existing, os.W_OK | os.X_OK):
            return f"the store {store} ({origin}) is not writable: pushes and exports will fail"
        return None

    @staticmethod
    def _proxy_notes(environ: Mapping[str, str]) -> Iterator[str]:
        """Yield warnings about variables that k3d sets for the official registry image."""
        url = environ.get("REGISTRY_PROXY_REMOTEURL", "")
        if url and url != "*":
            parts = urllib.parse.urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("REGISTRY_PROXY_REMOTEURL must be * or the URL of a registry")
            yield ("REGISTRY_PROXY_REMOTEURL is not used: this registry serves the images of all registries, "
                   "and each request names one")
        if environ.get("REGISTRY_PROXY_USERNAME") or environ.get("REGISTRY_PROXY_PASSWORD"):
            yield ("REGISTRY_PROXY_USERNAME and _PASSWORD are not used: each pull sends its own credentials "
                   "(imagePullSecrets)")


def check(address: Address, tls: bool) -> int:
    """Check the registry at an address, print the result, and return 0 if it is healthy, 1 if not."""
    host = address.host or "localhost"
    connection = http.client.HTTPConnection(host, address.port, timeout=ENGINE_TIMEOUT)
    if tls:  # the certificate need not name this address
        connection = http.client.HTTPSConnection(host, address.port, timeout=ENGINE_TIMEOUT,
                                                 context=ssl._create_unverified_context())  # noqa: S323
    try:
        connection.request("GET", "/v2/")
        healthy = connection.getresponse().status == 200
    except (OSError, http.client.HTTPException) as e:
        print(f"no answer from {address}: {e}")
        return 1
    finally:
        connection.close()
    print("healthy" if healthy else "unhealthy")
    return 0 if healthy else 1


def serve(settings: Settings) -> int:
    """Run the registry until SIGTERM or SIGINT, and return the exit status."""
    # The signals are blocked in all threads and taken by sigwait. A handler would not do: it runs in this thread,
    # which does not wake up if the signal is delivered to another thread. And a process with PID 1 and no
    # handler only receives signals that are blocked.
    endings = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, endings)
    store = Store(settings.store)
    mirror = Mirror(Engine(settings.engine), store, settings.pulls, settings.docker_root)
    registry = Front(Hosted(store), mirror, store)
    try:
        server = Server(settings.address, registry, settings.policy, settings.tls)
    except OSError as e:
        log.error("cannot listen on %s (%s): %s", settings.address, settings.address_origin, e.strerror or e)
        return 1
    start_thread(server.serve_forever, 0.1)  # seconds that the end may wait for
    start_thread(registry.keep_tidy)
    introduce(settings, registry, server)
    log.info("ending on %s", signal.Signals(signal.sigwait(endings)).name)
    server.shutdown()
    server.server_close()
    server.finish_requests(STOP_GRACE)
    registry.close()
    return 0


def introduce(settings: Settings, registry: Front, server: Server) -> None:
    """Log the version, the settings and the sources, then "listening on", which k3d waits for."""
    log.info("k3d-registry-dockerd %s, Python %s", __version__, sys.version.split()[0])
    log.info("store: %s (%s)", settings.store, settings.store_origin)
    config = settings.pulls.config
    if config and config.path.exists():
        log.info("credentials for pulls without their own: %s", config.path)
    for note in settings.notes:
        log.warning("%s", note)
    try:
        registry.mirror.images.current()
    except RegistryError as e:
        log.error("%s; this is tried again on each request", e.detail)
    else:
        registry.tidy_up()
    log.info("listening on %s (%s)%s", server.address, settings.address_origin, " with TLS" if settings.tls else "")


def main(argv: list[str] | None = None) -> int:
    """Run the program. Returns the exit status: 0 on success, 1 on failure, 2 for invalid arguments."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-7s %(message)s", stream=sys.stderr)
    parser = argument_parser()
    arguments = parser.parse_args(argv)
    try:
        settings = Settings.read(arguments, os.environ)
    except ValueError as e:
        parser.error(str(e))
    return check(settings.address, settings.tls is not None) if arguments.check else serve(settings)


if __name__ == "__main__":
    sys.exit(main())
