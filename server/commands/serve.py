"""`pilothouse serve`: host a model and its profiles."""

from __future__ import annotations

import argparse
import gc
import logging
import signal
import socket
import sys
from threading import Thread
from typing import Any, get_args

from server import logs
from server.settings import Settings, SettingsError, flag, load_settings

SUMMARY = "host a model and its profiles behind an OpenAI-compatible API"

_REPEATED = {"profile": "PATH", "cors_origin": "ORIGIN", "steer_site": "SITE"}

logger = logging.getLogger(__name__)


def register(parser: argparse.ArgumentParser) -> None:
    """One flag per setting."""
    for name, field in Settings.model_fields.items():
        text = (field.description or "").replace("%", "%%")
        if field.default not in (None, False, [], {}):
            text += f" (default: {field.default})"
        options: dict[str, Any] = {"dest": name, "help": text, "default": argparse.SUPPRESS}
        if field.annotation is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif name in _REPEATED:
            options.update(action="append", metavar=_REPEATED[name])
        elif choices := [c for c in get_args(field.annotation) if isinstance(c, str)]:
            options["choices"] = choices
        else:
            options["metavar"] = name.rpartition("_")[2].upper()
        parser.add_argument(flag(name), **options)


def run(arguments: argparse.Namespace) -> int:
    flags = {k: v for k, v in vars(arguments).items() if k in Settings.model_fields}
    settings = load_settings(flags)
    logs.configure(settings.log_format)
    # uvicorn raises the signal that stopped it once more when it is done; by then, or while the
    # model loads, it is no failure.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if settings.keys or settings.audit_log:
        # Means "read again" here, and until there is something to read again, nothing. A server
        # that has neither ends with its terminal, as any program does.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # Before the model is loaded: that takes long, and a port in use is found at once.
    with listen(settings) as listener:
        _serve(settings, listener)
    return 0


def listen(settings: Settings) -> socket.socket:
    """A socket bound as the settings ask. Raises SettingsError where that is impossible."""
    where = f"{settings.host}:{settings.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise SettingsError(f"cannot listen on {where}: {error.strerror}; see --host") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise SettingsError(
            f"cannot listen on {where}: {error.strerror}. Choose another --port (0 finds a free "
            "one) or end what uses it."
        ) from None
    return listener


def url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _serve(settings: Settings, listener: socket.socket) -> None:
    import uvicorn

    from server.app import create_app
    from server.draining import DrainingServer
    from server.hosting import open_host
    from server.version import VERSION

    if settings.log_format == "json":
        logs.adopt_transformers()
    host = open_host(settings)
    try:
        # Before uvicorn's own start, whose failures are tracebacks.
        host.start()
        if settings.keys or settings.audit_log:
            # In a thread: a handler runs inside whatever the event loop does just then.
            signal.signal(signal.SIGHUP, lambda *_: Thread(target=host.access.reload).start())
        config = uvicorn.Config(create_app(host), log_config=None)
        if host.access.keys is None:
            logger.warning("there are no keys: whoever can connect may use every profile")
        else:
            logger.info("%d keys may use this server", len(host.access.keys))
        listener.listen()  # from here on connections wait instead of being refused
        logger.info(
            "pilothouse %s serves %s at %s/v1 with the profiles %s (default: %s)",
            VERSION,
            host.profiles.served_name,
            url(listener),
            ", ".join(host.profiles.names),
            host.profiles.default_name,
        )
        logger.info("the page is at %s/", url(listener))
        # The libraries' and the model's half a million objects stay: looking through them for
        # garbage would stop every thread for some 0.3 s, time and again.
        gc.collect()
        gc.freeze()
        DrainingServer(config, host, settings.shutdown_timeout).run(sockets=[listener])
    except KeyboardInterrupt:
        pass  # uvicorn stops gracefully and then raises the signal again
    finally:
        host.close()
