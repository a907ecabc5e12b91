"""Files that clients name by a path: read from one folder, and from nowhere else."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from server.errors import BodyTooLargeError, InvalidRequestError


def read_inside(folder: Path, path: str, max_bytes: int) -> bytes:
    """The content of a `.safetensors` file inside `folder`.

    Links may point anywhere inside the folder. They are followed once, before the file is opened
    step by step without following any, so that nobody can swap one in between.

    Args:
        path: relative to the folder.

    Raises InvalidRequestError, or BodyTooLargeError for a file of more than `max_bytes`.
    """
    if not path.endswith(".safetensors"):
        raise _refused("profiles are files named *.safetensors; nothing else is read")
    if "\0" in path or os.path.isabs(path) or ".." in Path(path).parts:
        raise _refused("it must be relative to the folder of profiles and stay inside it")
    try:
        root = folder.resolve(strict=True)
        real = (root / path).resolve(strict=True)
        if not real.is_relative_to(root):
            raise _refused("it leads out of the folder of profiles")
        with _open(root, real.relative_to(root).parts) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise _refused("it is no regular file")
            # Read in any case no more than this: the file may grow.
            data = file.read(max_bytes + 1) if status.st_size <= max_bytes else None
    except (OSError, RuntimeError, ValueError):  # no file, no permission, a loop, half a surrogate
        raise _refused("there is no such file in the folder of profiles") from None
    if data is None or len(data) > max_bytes:
        raise BodyTooLargeError(
            f"The profile is larger than {max_bytes} bytes (--max-profile-bytes).", param="path"
        )
    return data


def _open(root: Path, parts: tuple[str, ...]) -> BinaryIO:
    here = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    for i, part in enumerate(parts):
        last = i + 1 == len(parts)
        # Without O_NONBLOCK, opening a pipe waits for a writer.
        flags = os.O_RDONLY | os.O_NOFOLLOW | (os.O_NONBLOCK if last else os.O_DIRECTORY)
        try:
            below = os.open(part, flags, dir_fd=here)
        finally:
            os.close(here)
        here = below
    return os.fdopen(here, "rb")


def _refused(reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"'path' cannot be read: {reason}.", param="path")
