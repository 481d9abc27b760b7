"""Fetches everything below a reference and checks it: the proof that a push is complete.

    missing = everything_below(program, "a/app", "1")     asks a running program
    walk_without_docker(store)                            starts a program on a store, without Docker
"""

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

from program import Program

INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
ABSENT = (404, 503)  # 503: not hosted, and Docker is not available


class Missing(NamedTuple):
    """The digests that a program does not have."""

    blobs: list
    manifests: list  # only manifests that an index lists


class Walk:
    """One repository of a running program. Each digest is fetched once."""

    def __init__(self, program, repository):
        self.program, self.repository = program, repository
        self.missing = Missing([], [])
        self._seen = set()

    def _get(self, kind, reference):
        """Return the response to a GET without `ns`, or None if the content is absent. The digest is verified."""
        path = f"/v2/{self.repository}/{kind}/{reference}"
        answer = self.program.get(path)
        if answer.status in ABSENT:
            return None
        assert answer.status == 200, (path, answer.status, answer.body)
        digest = reference if ":" in reference else answer.headers["Docker-Content-Digest"]
        assert digest, f"{path} has no Docker-Content-Digest"
        algorithm = digest.partition(":")[0]
        found = f"{algorithm}:{hashlib.new(algorithm, answer.body).hexdigest()}"
        assert digest == found == answer.headers["Docker-Content-Digest"], (path, found, answer.headers.items())
        return answer

    def manifest(self, reference):
        """Walk everything below a tag or digest; return the manifest's digest, or None if it is absent."""
        answer = self._get("manifests", reference)
        if answer is None:
            return None
        digest = answer.headers["Docker-Content-Digest"]
        if digest not in self._seen:
            self._seen.add(digest)
            self._below(answer.json, answer.headers["Content-Type"])
        return digest

    def _below(self, document, media_type):
        expected = document.get("mediaType", media_type)
        assert media_type == expected, (media_type, expected)
        assert (media_type in INDEXES) == ("manifests" in document), (media_type, document)
        for child in document.get("manifests", ()):
            self._child(child)
        for blob in [document.get("config"), *document.get("layers", ()), *document.get("blobs", ())]:
            if blob and blob["digest"] not in self._seen:
                self._seen.add(blob["digest"])
                self._blob(blob)

    def _child(self, descriptor):
        digest = descriptor["digest"]
        if self.manifest(digest) is None:
            if digest not in self.missing.manifests:
                self.missing.manifests.append(digest)
            return
        answer = self._get("manifests", digest)
        assert (descriptor["size"], descriptor["mediaType"]) == (len(answer.body), answer.headers["Content-Type"]), (
            descriptor, answer.headers.items())

    def _blob(self, descriptor):
        answer = self._get("blobs", descriptor["digest"])
        if answer is None:
            self.missing.blobs.append(descriptor["digest"])
        else:
            assert descriptor["size"] == len(answer.body), (descriptor, len(answer.body))


def everything_below(program, repository, reference):
    """Fetch a manifest and everything below it, without `ns`; verify digests, sizes and media types.

    Returns a Missing. Raises AssertionError if the manifest itself is absent, or for any wrong response.
    """
    walk = Walk(program, repository)
    assert walk.manifest(reference), f"{repository} {reference} is not there"
    return walk.missing


def pages(program, path, key):
    """Return all entries of a list, over all its pages, or an empty list if the list is not available."""
    found = []
    while path:
        answer = program.get(path)
        if answer.status in ABSENT:
            break
        assert answer.status == 200, (path, answer.status, answer.body)
        found += answer.json[key] or []
        following = re.match(r'<([^>]+)>; *rel="?next', answer.headers["Link"] or "")
        path = following and following[1]
    return found


def references(program, store):
    """Return every (repository, tag or digest) of a store, from the program's lists and from the store's folders.

    The lists may be unavailable without Docker, so they alone prove nothing.
    """
    root = Path(store) / "repositories"
    found = {(repository, tag) for repository in pages(program, "/v2/_catalog", "repositories")
             for tag in pages(program, f"/v2/{repository}/tags/list", "tags")}
    for folder in root.rglob("_manifests"):
        repository = str(folder.parent.relative_to(root))
        found |= {(repository, f"{path.parent.name}:{path.name}") for path in folder.glob("*/[!.]*")}
    for folder in root.rglob("_tags"):  # tags of a deleted manifest stay until the repository is tidied up
        found |= {(str(folder.parent.relative_to(root)), path.name) for path in folder.glob("[!.]*")
                  if not (folder.parent / "_deleted" / path.read_text().replace(":", "/")).exists()}
    return found


def walk_without_docker(store, expected=None, sparse=()):
    """Start a program on a store, without Docker, and walk everything that was ever pushed to it.

    expected   {"repository:tag": digest} that must be present
    sparse     digests that may be missing: manifests that an index lists, and non-distributable layers, if they are
               not available anywhere

    Returns {"repository:tag or repository@digest": digest} of what was walked. Raises AssertionError if anything
    else is missing, or if HEAD and GET disagree about a manifest.
    """
    walked, missing = {}, {}
    with Program("unix:///nowhere", store=store) as program:
        walks = {}
        for repository, reference in sorted(references(program, store)):
            walk = walks.setdefault(repository, Walk(program, repository))
            name = f"{repository}{'@' if ':' in reference else ':'}{reference}"
            digest = walk.manifest(reference)
            head = program.head(f"/v2/{repository}/manifests/{reference}")
            assert (head.status == 200, head.headers["Docker-Content-Digest"]) == (bool(digest), digest), (
                name, digest, head.status, head.headers.items())
            if digest:
                walked[name] = digest
            else:
                missing[name] = ["the manifest itself"]
        for repository, walk in walks.items():
            if lost := [digest for digest in (*walk.missing.blobs, *walk.missing.manifests) if digest not in sparse]:
                missing[repository] = lost
        assert not program.lines("a bug in this program"), program.log
    assert not missing, f"missing without Docker: {missing}"
    for name, digest in (expected or {}).items():
        assert walked.get(name) == digest, (name, digest, walked)
    return walked
