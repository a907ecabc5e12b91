"""What an operator can set: by flag, else `PILOTHOUSE_*` variable, else TOML file.

Each field is all three: `max_num_seqs` is `--max-num-seqs`, `PILOTHOUSE_MAX_NUM_SEQS` and
`max_num_seqs` in the file; its description is the flag's help.
"""

from __future__ import annotations

import ipaddress
import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from server.tool_parsers import ToolParserSetting
from server.validation import describe

ENV_PREFIX = "PILOTHOUSE_"
MAX_BODY_BYTES = 4 * 2**20


class SettingsError(ValueError):
    """A setting that makes no sense; the message names it and says what to do."""


class Settings(BaseSettings):
    """Settings of `pilothouse serve`."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, extra="forbid", frozen=True, env_ignore_empty=True
    )

    model: str | None = Field(
        None, description="directory or hub id of the model; without it, the demo model"
    )
    revision: str | None = Field(None, description="revision of a model from the hub")
    served_name: str | None = Field(
        None, min_length=1, description="name clients call the model by; default: its last part"
    )
    profile: Annotated[list[Path], NoDecode] = Field(
        [],
        description="profile file, or directory of them; may be repeated (as a variable: "
        f"separated by {os.pathsep!r})",
    )
    default_profile: str | None = Field(
        None, description="profile of requests that name none; default: raw"
    )
    fold: str | None = Field(
        None, description="fold this profile into the weights, and serve no other"
    )
    monitor: Path | None = Field(
        None,
        description="the model's probes; default: monitor.safetensors beside its profiles",
    )
    allow_derived_base: bool = Field(
        False, description="accept profiles fitted on other weights of the same model"
    )
    engine: Literal["local"] = Field("local", description="what computes")
    device: str = Field("auto", description="torch device; auto: a GPU if there is one")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of weights and activations; auto: as stored (demo model: float32)"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of torch")
    max_num_seqs: int = Field(16, ge=1, description="requests computed at once")
    max_model_len: int | None = Field(
        None, ge=2, description="prompt plus reply in tokens; default: the model's, at most 4096"
    )
    max_waiting: int = Field(256, ge=0, description="requests that may wait; more get a 429")
    prefill_chunk: int = Field(256, ge=1, description="prompt tokens of a request per step")
    max_unsplit_prompt: int | None = Field(
        None, ge=1, description="longest prompt for profiles whose gate reads all of it"
    )
    max_body_bytes: int = Field(
        MAX_BODY_BYTES, ge=1024, description="longest request body; longer ones get a 413"
    )
    tool_parser: ToolParserSetting = Field(
        "auto",
        description="how the model writes tool calls; auto: as its chat template does; none: leave "
        "them in the text",
    )
    shutdown_timeout: float = Field(
        30.0, ge=0, description="seconds for replies under way after SIGTERM; then they are ended"
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    insecure: bool = Field(
        False, description="listen on an address others can reach, without any access control"
    )
    config: Path | None = Field(None, description="TOML file with any of these settings")

    @field_validator("profile", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [part for part in value.split(os.pathsep) if part] if type(value) is str else value

    @model_validator(mode="after")
    def _only_this_machine(self) -> Settings:
        if not (self.insecure or is_loopback(self.host)):
            raise ValueError(
                f"host, --host {self.host} can be reached by others, and there is no access "
                "control; listen on 127.0.0.1, or add --insecure if you mean it"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        assert isinstance(init_settings, InitSettingsSource)
        path = init_settings.init_kwargs.get("config") or os.environ.get(f"{ENV_PREFIX}CONFIG")
        values = _read_toml(Path(path)) if path else {}
        return init_settings, env_settings, InitSettingsSource(settings_cls, values)


def load_settings(flags: dict[str, Any] | None = None) -> Settings:
    """Settings from flags, environment and file. Raises SettingsError with one line."""
    try:
        return Settings(**(flags or {}))
    except ValidationError as error:
        raise SettingsError("; ".join(map(_explain, error.errors()))) from None


def flag(name: str) -> str:
    """`max_num_seqs` as `--max-num-seqs`."""
    return "--" + name.replace("_", "-")


def is_loopback(host: str) -> bool:
    """True where only this machine can connect."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _explain(error: Any) -> str:
    location = [part for part in error["loc"] if isinstance(part, str)]
    name = location[0] if location else ""
    if error["type"] == "extra_forbidden":
        known = ", ".join(Settings.model_fields)
        return f"unknown setting {name!r} in the configuration file; known are {known}"
    return describe(error, flag(name))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise SettingsError(f"cannot read --config {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config {path} is not TOML: {error}") from None
