"""`pilothouse chat`: talk to several profiles at once, side by side."""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.commands import remote

if TYPE_CHECKING:
    from rich.console import Console

    from server.terminal.columns import Conversation
    from server.terminal.show import Tint
    from server.terminal.sources import Source

SUMMARY = "talk to several profiles at once, side by side in the terminal"

HELP = """\
/retry              ask the last question again
/strength NAME X    set a profile's strength (NAME may be a column's number); X may be 'own'
/tint SCORE         tint tokens by answer, benign, edit or none
/clear              begin a new conversation
/quit               leave (so does Ctrl-D); Ctrl-C stops the replies under way"""
_USUAL = 4
"""Profiles shown unless they are named."""


def register(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profiles",
        metavar="NAME[=STRENGTH],...",
        help=f"the columns; default: the first {_USUAL} that are not red-team",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--model", help="directory or hub id; without it, the demo model")
    where.add_argument("--url", help="of a running server, in place of a model in this process")
    remote.add_key(parser)
    parser.add_argument(
        "--profile",
        action="append",
        default=[],
        type=Path,
        metavar="PATH",
        help="profile file, or directory of them, of --model; may be repeated",
    )
    parser.add_argument("--prompt", metavar="TEXT", help="ask this and leave")
    parser.add_argument("--json", action="store_true", help="a line of JSON per turn")
    parser.add_argument(
        "--tint",
        choices=("answer", "benign", "edit", "none"),
        default="answer",
        help="score that tokens are tinted by, where there is colour (default: answer)",
    )
    parser.add_argument("--max-tokens", type=int, help="of a reply (default: the server's)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="(default: 0, so that only profiles differ)"
    )
    parser.add_argument("--seed", type=int, help="the same for every column")
    parser.add_argument("--device", default="auto", help="torch device (default: auto)")
    parser.add_argument("--dtype", default="auto", help="of weights and activations")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    wanted = None if arguments.profiles is None else parse_profiles(arguments.profiles)
    console = Console(highlight=False, soft_wrap=False)
    with _quiet(console), closing(_source(arguments)) as source:
        conversation = _conversation(arguments, source, wanted)
        session = Session(source, conversation, console, arguments.tint, arguments.json)
        if arguments.prompt is not None:
            return 0 if session.ask(arguments.prompt) else 1
        return session.converse()


def parse_profiles(text: str) -> list[tuple[str, float | None]]:
    """`raw,llm-va=0.5`: names and strengths. Raises ValueError."""
    found: list[tuple[str, float | None]] = []
    for part in filter(None, (each.strip() for each in text.split(","))):
        name, equals, strength = part.partition("=")
        found.append((name, _number(strength) if equals else None))
    if not found:
        raise ValueError("--profiles: name at least one")
    return found


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{text!r} is no strength; write a number")
    return number


@contextmanager
def _quiet(console: Console) -> Iterator[None]:
    """Leave the terminal to the replies: only warnings are logged, above what is shown."""
    from rich.logging import RichHandler

    root, audit = logging.getLogger(), logging.getLogger("server.audit")
    before = root.handlers, root.level, audit.level
    if console.is_terminal:
        handler = RichHandler(console=console, show_time=False, show_path=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
        root.handlers = [handler]
    root.setLevel(logging.WARNING)
    # Without an audit log, each use of a red-team profile is a warning to whoever runs a server.
    # Here that is who asked.
    audit.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.handlers = before[0]
        root.setLevel(before[1])
        audit.setLevel(before[2])


def _source(arguments: argparse.Namespace) -> Source:
    from server.terminal.sources import Local, Remote

    if arguments.url is not None:
        if arguments.profile:
            raise ValueError("--profile is for --model; a server has profiles of its own")
        return Remote(arguments.url, arguments.key)
    from server.hosting import open_host
    from server.settings import load_settings

    names = ("model", "profile", "device", "dtype", "threads")
    given = {name: getattr(arguments, name) for name in names}
    return Local(open_host(load_settings(given)))


def _conversation(
    arguments: argparse.Namespace, source: Source, wanted: list[tuple[str, float | None]] | None
) -> Conversation:
    from server.terminal.columns import Column, Conversation

    there = source.profiles()
    usual = [name for name, red_team in there if not red_team][:_USUAL]
    columns = wanted or [(name, None) for name in usual]
    known = dict(there)
    for name, _ in columns:
        if name not in known:
            raise ValueError(f"there is no profile {name}; there are {', '.join(known)}")
    options: dict[str, Any] = {"trace": True, "temperature": arguments.temperature}
    for name in ("seed", "max_tokens"):
        if getattr(arguments, name) is not None:
            options[name] = getattr(arguments, name)
    return Conversation(
        [Column(name, strength, known[name]) for name, strength in columns], options
    )


class Session:
    """Asks, shows, and does what lines that begin with a slash say.

    Args:
        as_json: a line of JSON per turn, whatever the terminal.
    """

    def __init__(
        self,
        source: Source,
        conversation: Conversation,
        console: Console,
        tint: Tint,
        as_json: bool,
    ) -> None:
        self._source = source
        self._conversation = conversation
        self._console = console
        self._tint: Tint = tint
        self._json = as_json
        self._interactive = sys.stdin.isatty() and console.is_terminal

    def converse(self) -> int:
        """Turn by turn until the input ends; the exit status."""
        whole = True
        if self._interactive:
            import readline  # noqa: F401  # lines can be edited, and come back

            self._print("Ask all of them something. /help says what else there is.")
        while True:
            try:
                line = input("\n> " if self._interactive else "").strip()
                if line in ("/quit", "/exit"):
                    raise EOFError
                whole = self._obey(line) and whole
            except EOFError:
                return 0 if whole or self._interactive else 1
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                # Meant for replies that ended a moment before, or for the line.
            except ValueError as error:
                whole = False
                print(f"error: {error}", file=sys.stderr, flush=True)

    def _obey(self, line: str) -> bool:
        """False if a reply failed. Raises ValueError."""
        match line.split():
            case []:
                return True
            case ["/help"]:
                self._print(HELP)
            case ["/retry"]:
                prompt = self._conversation.take_back()
                if prompt is None:
                    raise ValueError("there is nothing to ask again")
                return self.ask(prompt)
            case ["/strength", name, strength]:
                own = strength == "own"
                self._conversation.set_strength(name, None if own else _number(strength))
            case ["/tint", ("answer" | "benign" | "edit" | "none") as tint]:
                self._tint = tint
            case ["/clear"]:
                self._conversation.clear()
            case [word, *_] if word.startswith("/"):
                raise ValueError(f"{word} is no command, or lacks something; /help lists them")
            case _:
                return self.ask(line)
        return True

    def ask(self, prompt: str) -> bool:
        """One turn; False if a reply failed. Raises ValueError where none began."""
        from server.terminal import show

        live = self._console.is_terminal and not self._json
        showing = self._growing() if live else nullcontext()
        body = self._conversation.ask(prompt)
        try:
            with showing, closing(self._source.compare(body)) as events:
                for event in events:
                    self._conversation.take(event)
        except KeyboardInterrupt:
            if not self._interactive:
                raise
        self._conversation.end()
        columns = self._conversation.columns
        if self._json:
            self._print(show.as_json(self._conversation))
        elif live:
            self._console.print(show.table(columns, self._tint, self._console))
        else:
            self._print("\n".join(show.plain(self._conversation)))
        return all(column.reply.error is None for column in columns)

    def _growing(self) -> AbstractContextManager[Any]:
        """Shows the replies while they grow, and in the end takes that away."""
        from rich.live import Live

        from server.terminal import show

        console, columns = self._console, self._conversation.columns

        def now() -> Any:
            return show.table(columns, self._tint, console, rows=console.height - 2)

        return Live(get_renderable=now, console=console, transient=True, refresh_per_second=12)

    def _print(self, text: str) -> None:
        print(text, flush=True)
