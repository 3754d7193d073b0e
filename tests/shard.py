"""Which slow tests a run of a part of them takes."""

from __future__ import annotations

import hashlib
import re
import subprocess
from functools import cached_property
from pathlib import Path

SHARDS = 8
# What a backend's or a test's name says of where its code lies, and the words of no room.
ROOMS = {"strict": "portable", "dask": "chunks", "cubed": "chunks", "semantics": "portable"}
COMMON = {"softmax", "kernels", "test", "tests", "init", "py", "cross", "options"}


class Shard:
    """One slow test in eight, by the commit and the test's name, and those of changed rooms.

    A room changed if a commit of the day before touched a file of the package that shares a word of
    its path with the test's file, or with the backend of its contract. A slow test that is edited
    is run by who edits it: what touches many tests would run them all.
    """

    def __init__(self, root: Path, commit: str) -> None:
        self.root, self.commit = root, self._git(root, "rev-parse", commit) if commit else ""

    def holds(self, nodeid: str) -> bool:
        """Whether the test is in this shard; each is if no commit was named."""
        if not self.commit:
            return True
        digest = hashlib.sha256(f"{self.commit} {nodeid}".encode()).digest()
        return bool(self.words & words(nodeid_words(nodeid))) or digest[0] % SHARDS == 0

    @cached_property
    def changed(self) -> set[str]:
        """The files that changed in the day before the commit."""
        when = int(self._git(self.root, "show", "-s", "--format=%ct", self.commit)) - 24 * 3600
        before = self._git(self.root, "rev-list", "-1", f"--before={when}", self.commit)
        if not before:
            return set()
        return {*self._git(self.root, "diff", "--name-only", before, self.commit).splitlines()}

    @cached_property
    def words(self) -> set[str]:
        """The words of the paths of the package's files that changed."""
        package = "portable_softmax/"
        inside = [p.removeprefix(package) for p in self.changed if p.startswith(package)]
        return words(" ".join(inside))

    @staticmethod
    def _git(root: Path, *arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()


def nodeid_words(nodeid: str) -> str:
    """Return a test's file, the backend of a contract, and the rooms that they stand for."""
    file, _, test = nodeid.partition("::")
    found = Path(file).stem
    if found == "test_contract":
        _, _, backend = test.partition("[")
        found += f" {re.split(r'[^a-z-]', backend, maxsplit=1)[0]}"
    return " ".join([found, *(room for word, room in ROOMS.items() if word in found)])


def words(text: str) -> set[str]:
    """Return the words that tell rooms apart."""
    return {*re.findall(r"[a-z]+", text)} - COMMON
