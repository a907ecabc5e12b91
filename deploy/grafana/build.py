"""Write the dashboards: `python deploy/grafana/build.py [DIRECTORY]`. Edit the Python, never the JSON.

panels.py                 what dashboards are made of
refusals.py ...           one file per dashboard
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from experiments import experiments
from profiles import profiles
from refusals import refusals
from serving import serving

OUT = Path(__file__).parent / "dashboards"


def build() -> dict[str, str]:
    """The files' text by name."""
    made = {
        "refusals": refusals(),
        "experiments": experiments(),
        "serving": serving(),
        "profiles": profiles(),
    }
    return {f"{name}.json": json.dumps(value, indent=1) + "\n" for name, value in made.items()}


if __name__ == "__main__":
    out = Path(sys.argv[1]) if sys.argv[1:] else OUT
    for name, text in build().items():
        (out / name).write_text(text, "utf-8")
