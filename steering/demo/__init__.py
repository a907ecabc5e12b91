"""The demo model: its corpus, its training recipe and its committed weights."""

from pathlib import Path

DEMO_NAME = "demo"
"""What its profiles call the model they belong to, and clients unless told otherwise."""

DEMO = Path(__file__).parent
"""Holds the folders `model` and `profiles`."""
