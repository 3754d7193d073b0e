"""Where compiled kernels are kept on disk, and which places are refused.

What is kept is loaded as code. So a folder that another user can write is not used, nor one of
whose files that is true.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from numba.core import caching, config

HERE = Path(__file__).resolve().parent
BESIDE = HERE / "__pycache__"


class Folders(NamedTuple):
    """The folders in use."""

    written: Path | None
    """The first that can be written."""
    read: tuple[Path, ...]
    """Those before it, which cannot, but hold kernels: such as those of an image."""
    refused: tuple[str, ...]
    """Why others are not in use."""


@cache
def folders() -> Folders:
    """Return the folders that kernels are loaded from and kept in.

    They are NUMBA_CACHE_DIR if that is set, else the one beside the source and the user's own.
    """
    candidates = [BESIDE]
    if config.CACHE_DIR:
        candidates = [Path(config.CACHE_DIR) / "portable_softmax"]
    elif hasattr(caching, "AppDirs"):
        candidates += [
            Path(caching.AppDirs("numba", appauthor=False).user_cache_dir, "portable_softmax")
        ]
    else:
        candidates += [Path.home() / ".cache" / "portable_softmax"]
    read, refused = [], []
    for path in candidates:
        with suppress(OSError):
            path.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):
            if why := refusal(path):
                refused.append(why)
                continue
            try:
                tempfile.TemporaryFile(dir=path).close()
            except OSError:
                if next(path.glob("portable_softmax.*.nbi"), None):
                    read.append(path)
                continue
            return Folders(path, tuple(read), tuple(refused))
    return Folders(None, tuple(read), tuple(refused))


def refusal(folder: Path) -> str:
    """Return which user but this one and root could bring code into a folder; empty if none.

    Whoever can replace a folder above it can do so, too. Beside the source that tells nothing: they
    could replace the source.
    """
    folder = folder.resolve()
    above: Iterable[Path] = () if folder == BESIDE else folder.parents
    owners = {0, HERE.stat().st_uid} if folder == BESIDE else {0}
    for path in (folder, *folder.glob("portable_softmax.*.nb[ic]")):
        if why := _open_to_others(path, owners):
            return why
    for path in above:
        if not path.stat().st_mode & stat.S_ISVTX and (why := _open_to_others(path, owners)):
            return why
    return ""


def _open_to_others(path: Path, owners: set[int]) -> str:
    if not hasattr(os, "geteuid"):
        return ""  # not POSIX: modes tell nothing
    info = path.stat()
    if info.st_uid not in {os.geteuid(), *owners}:
        return f"{path} belongs to another user"
    if info.st_mode & stat.S_IWOTH:
        return f"{path} can be written by every user"
    if info.st_mode & stat.S_IWGRP and not _is_private(info.st_gid):
        return f"{path} can be written by a group"
    return ""


@cache
def _is_private(gid: int) -> bool:
    """Return whether a group is root's, or the one of this user alone."""
    import grp
    import pwd

    with suppress(KeyError):
        group, user = grp.getgrgid(gid), pwd.getpwuid(os.geteuid()).pw_name
        return gid == 0 or (group.gr_name == user and {*group.gr_mem} <= {user})
    return gid == 0
