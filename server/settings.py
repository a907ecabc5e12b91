"""What an operator can set: by flag, else `PILOTHOUSE_*` variable, else TOML file.

Each field is all three: `max_num_seqs` is `--max-num-seqs`, `PILOTHOUSE_MAX_NUM_SEQS` and
`max_num_seqs` in the file; its description is the flag's help.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
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

from server.engine_choice import LOCAL_SEQS, VLLM_SEQS, check_engine, parse_vllm_args
from server.experiments.definitions import Experiment
from server.logs import LogFormat
from server.tool_parsers import ToolParserSetting
from server.validation import (
    MOST_MESSAGES,
    TemplateValue,
    describe,
    field_path,
    parse_template_kwargs,
    telling,
)

ENV_PREFIX = "PILOTHOUSE_"
MAX_BODY_BYTES = 4 * 2**20
MAX_PROFILE_BYTES = 256 * 2**20
MAX_MESSAGES = 1024
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#@]+")


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
    monitor_read: Literal["always", "when-free", "off"] = Field(
        "always",
        description="the monitor's probes: always, with a second pass over the prompt where a "
        "profile edits before the benign probe; when-free: null there; off: none",
    )
    chat_template_kwargs: Annotated[dict[str, TemplateValue], NoDecode] = Field(
        {},
        description="JSON passed to the chat template unless a request says otherwise; a template "
        "that knows enable_thinking gets false",
    )
    allow_derived_base: bool = Field(
        False, description="accept profiles fitted on other weights of the same model"
    )
    engine: Literal["local", "vllm"] = Field(
        "local", description="what computes; vllm needs the extra of that name"
    )
    device: str = Field("auto", description="torch device; auto: a GPU if there is one")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of weights and activations; auto: as stored (demo model: float32)"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of torch")
    max_num_seqs: int | None = Field(
        None,
        ge=1,
        description=f"requests computed at once; default: {LOCAL_SEQS}, with vllm {VLLM_SEQS} per "
        "replica",
    )
    max_model_len: int | None = Field(
        None, ge=2, description="prompt plus reply in tokens; default: the model's, at most 4096"
    )
    max_waiting: int = Field(256, ge=0, description="requests that may wait; more get a 429")
    prefill_chunk: int = Field(256, ge=1, description="prompt tokens of a request per step")
    max_unsplit_prompt: int | None = Field(
        None, ge=1, description="longest prompt for profiles whose gate reads all of it"
    )
    prefix_cache_mib: int = Field(
        256,
        ge=0,
        description="MiB for what prompts that begin alike share; 0 switches it off (vllm: only "
        "that, its size is the cache's)",
    )
    tensor_parallel_size: int = Field(1, ge=1, description="vllm: GPUs that share each layer")
    pipeline_parallel_size: int = Field(
        1, ge=1, description="vllm: groups of GPUs that hold some of the layers each"
    )
    data_parallel_size: int = Field(1, ge=1, description="vllm: replicas of the whole model")
    max_site_rank: int = Field(
        256,
        ge=1,
        description="vllm: rank at each edited site, over all profiles; a site's cost is linear in "
        "it",
    )
    steer_site: Annotated[list[str], NoDecode] = Field(
        [],
        description="vllm: site, as 12.resid_post or *.attn_out for every layer, to keep room at "
        "for profiles registered at run time; may be repeated (as a variable: separated by blanks)",
    )
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="vllm: share of each GPU's memory to take"
    )
    enforce_eager: bool = Field(False, description="vllm: neither compile nor capture graphs")
    vllm_args: Annotated[dict[str, Any], NoDecode] = Field(
        {}, description="vllm: further arguments of its engine, as JSON"
    )
    max_body_bytes: int = Field(
        MAX_BODY_BYTES, ge=1024, description="longest request body; longer ones get a 413"
    )
    tool_parser: ToolParserSetting = Field(
        "auto",
        description="how the model writes tool calls; auto: as its chat template does; none: leave "
        "them in the text",
    )
    request_timeout: float = Field(
        600.0, gt=0, description="seconds for a request, waiting and computing; then it is a 504"
    )
    shutdown_timeout: float = Field(
        30.0, ge=0, description="seconds for replies under way after SIGTERM; then they are ended"
    )
    profile_dir: Path | None = Field(
        None, description="folder from which profiles may be registered by path at run time"
    )
    max_profiles: int = Field(64, ge=1, description="profiles served at once, `raw` included")
    max_profile_bytes: int = Field(
        MAX_PROFILE_BYTES, ge=1024, description="largest profile registered at run time"
    )
    max_messages: int = Field(
        MAX_MESSAGES, ge=1, le=MOST_MESSAGES, description="messages per request, at most"
    )
    max_prompt_chars: int | None = Field(
        None, ge=1, description="characters per prompt, at most; default: what the model may hold"
    )
    keys: str | None = Field(
        None,
        min_length=1,
        description="file of keys (`pilothouse keys`), or keys as JSON; read again at SIGHUP",
    )
    protect_metrics: bool = Field(
        False, description="let only keys with the scope metrics read /metrics"
    )
    audit_log: Path | None = Field(
        None, description="file to append a JSON line to for each request; opened again at SIGHUP"
    )
    audit_prompts: bool = Field(False, description="keep prompts and replies in the audit log")
    experiments_journal: Path | None = Field(
        None,
        description="folder, of this server alone, for the records of experiments; without it none "
        "are kept",
    )
    experiments_db: str | None = Field(
        None,
        min_length=1,
        description="database of these records, sqlite:///FILE or postgresql://USER@HOST/NAME; "
        "default: SQLite in the folder",
    )
    experiments_retention_days: float | None = Field(
        None, gt=0, description="days that answers in experiments are kept; default: for ever"
    )
    experiments_text: bool = Field(
        False, description="keep prompts and replies in the records of experiments"
    )
    experiments_fsync: bool = Field(
        False, description="wait for the disk at each record; slower, survives a loss of power"
    )
    cors_origin: Annotated[list[str], NoDecode] = Field(
        [],
        description="origin of web pages that may use the API; may be repeated (as a variable: "
        "separated by blanks)",
    )
    experiments: Annotated[list[Experiment], NoDecode] = Field(
        [],
        description="A/B tests of profiles: [[experiments]] tables in the --config file (here, or "
        "as a variable: JSON)",
    )
    default_experiment: str | None = Field(
        None, description="experiment of requests that name neither a profile nor an experiment"
    )
    experiments_state: Path | None = Field(
        None,
        description="folder for what must survive a restart: experiments made by the API, arms "
        "stopped",
    )
    allow_red_team_arms: bool = Field(
        False,
        description="let experiments of the settings, and of the local user, have red-team arms",
    )
    judge: str = Field(
        "phrases",
        pattern=r"^(phrases|hf:.+)$",
        description="of replies: phrases, or hf:ID of a classifier, which judges for metrics and "
        "records after the answer is sent",
    )
    judge_device: str = Field("cpu", description="torch device of a classifier that judges")
    log_format: LogFormat = Field("text", description="of the log on stderr")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    insecure: bool = Field(
        False, description="without keys, listen on an address that others can reach"
    )
    config: Path | None = Field(None, description="TOML file with any of these settings")

    @field_validator("profile", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [part for part in value.split(os.pathsep) if part] if type(value) is str else value

    @field_validator("chat_template_kwargs", mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        try:
            return parse_template_kwargs(value) if isinstance(value, str) else value
        except ValueError as error:
            raise ValueError(f"chat_template_kwargs, --chat-template-kwargs: {error}") from None

    @field_validator("experiments", mode="before")
    @classmethod
    def _parse_experiments(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except ValueError as error:
            raise ValueError(f"experiments, --experiments is not JSON: {error}") from None

    @field_validator("cors_origin", "steer_site", mode="before")
    @classmethod
    def _split_words(cls, value: Any) -> Any:
        return value.split() if type(value) is str else value

    @field_validator("vllm_args", mode="before")
    @classmethod
    def _parse_arguments(cls, value: Any) -> Any:
        return parse_vllm_args(value) if isinstance(value, str) else value

    @field_validator("cors_origin")
    @classmethod
    def _check_origins(cls, value: list[str]) -> list[str]:
        return [_check_origin(origin) for origin in value]

    @model_validator(mode="after")
    def _only_this_machine(self) -> Settings:
        if not (self.keys or self.insecure or is_loopback(self.host)):
            raise ValueError(
                f"host, --host {self.host} can be reached by others, and there are no keys; name "
                "a file of them with --keys (see `pilothouse keys create`), listen on 127.0.0.1, "
                "or add --insecure if you mean it"
            )
        return self

    @model_validator(mode="after")
    def _only_what_the_engine_knows(self) -> Settings:
        changed = {
            name
            for name in self.model_fields_set
            if getattr(self, name) != type(self).model_fields[name].default
        }
        check_engine(self.engine, changed, prefix_caching=self.prefix_cache_mib > 0)
        return self

    @model_validator(mode="after")
    def _journal_before_database(self) -> Settings:
        if self.experiments_db is not None and self.experiments_journal is None:
            raise ValueError(
                "experiments_db, --experiments-db needs --experiments-journal DIR, a folder of "
                "this server alone where records wait for the database"
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
        raise SettingsError("; ".join(map(_explain, telling(error.errors())))) from None


def flag(name: str) -> str:
    """`max_num_seqs` as `--max-num-seqs`."""
    return "--" + name.replace("_", "-")


def is_loopback(host: str) -> bool:
    """True where only this machine can connect."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_origin(origin: str) -> str:
    """The origin, if browsers could ever send it. Raises ValueError."""
    if origin != "*" and not _ORIGIN.fullmatch(origin):
        raise ValueError(
            f"origin, --cors-origin {origin} is none: write scheme://host or scheme://host:port "
            "in small letters, without a path, or *"
        )
    return origin


def _explain(error: Any) -> str:
    location = [part for part in error["loc"] if isinstance(part, str)]
    name = location[0] if location else ""
    if len(error["loc"]) > 1 and name == "experiments":
        path = field_path(error["loc"])
        told = describe(error, path)
        return told if path in told else f"{path}: {told}"
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
