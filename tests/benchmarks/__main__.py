"""All benchmarks that can run here, or those named: `python -m tests.benchmarks engine --quick`.

`make bench-vllm` runs the one that needs vLLM, in its environment.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

FOLDER = Path(__file__).parent


def main() -> int:
    there = sorted(file.stem.removeprefix("bench_") for file in FOLDER.glob("bench_*.py"))
    names = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    options = [argument for argument in sys.argv[1:] if argument.startswith("-")]
    if unknown := set(names) - set(there):
        print(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(there)}")
        return 2
    # A process each: what one left in memory must not slow the next.
    can_run = [name for name in there if name != "vllm" or find_spec("vllm")]
    for name in names or can_run:
        print(f"== {name}", flush=True)
        module = f"tests.benchmarks.bench_{name}"
        subprocess.run([sys.executable, "-m", module, *options], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
