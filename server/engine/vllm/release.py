"""Which vLLM is installed, asked before anything of it is used. Needs no vLLM itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from server.engine.vllm.engine import VllmEngine

SUPPORTED = ((0, 32), (0, 33))
"""vLLM from the first of these releases on, and before the second."""


def check_version(version: str) -> None:
    """Raise ValueError unless this release of vLLM is known to do what the workers count on."""
    first, beyond = SUPPORTED
    known = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if not first <= known < beyond:
        raise ValueError(
            f"vLLM {version} is installed; its insides change from release to release, and this "
            f"server knows those of {first[0]}.{first[1]}: pip install "
            f"'vllm>={first[0]}.{first[1]},<{beyond[0]}.{beyond[1]}'"
        )


def import_engine() -> type[VllmEngine]:
    """`VllmEngine`, which cannot be imported without vLLM. Raises ValueError, saying why, for
    another release, whose modules may lie elsewhere, or one that does not work here."""
    try:
        import vllm

        check_version(vllm.__version__)
        from server.engine.vllm.engine import VllmEngine
    except ImportError as error:
        raise ValueError(
            f"vLLM is installed and cannot be imported ({error}): is its build for this machine "
            "and this torch? (--engine local needs none)"
        ) from error
    return VllmEngine
