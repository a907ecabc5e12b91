"""Load a Hugging Face causal language model and find the sites where it can be steered.

`find_sites` works for any decoder-only model whose blocks hold one attention and one feed-forward
sublayer; what it looks for is written in the tables below. A model it does not understand is an
error that lists what was looked for, never a profile that silently does nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from steering.edit import Point, Site
from steering.template import FIXED_DATE, default_kwargs, prints_today, template_text, with_date

# Names under which the families register a block's parts, first match wins.
BLOCK_LISTS = ("layers", "h", "blocks", "block")
ATTENTION_NAMES = ("self_attn", "self_attention", "attention", "attn")
MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe", "ffn")
LAST_LINEAR_NAMES = {
    "attn_out": ("o_proj", "out_proj", "dense", "c_proj", "wo"),
    "mlp_out": ("down_proj", "fc2", "dense_4h_to_h", "c_proj", "fc_out", "w2"),
}
# Pairs (after attention, after MLP) of norms that act on what a sublayer adds. A block with only
# `post_attention_layernorm` has Llama's layout, where that name is the norm *before* the MLP.
POST_NORM_PAIRS = (
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    ("post_self_attn_layernorm", "post_mlp_layernorm"),
)


CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
# Families whose sublayers add the residual stream to their own output: what they return is not
# what they add, so `attn_out` and `mlp_out` would mean something else there.
RESIDUAL_INSIDE = ("bloom", "mpt")
LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)


class UnsupportedModelError(ValueError):
    """The model's structure is not one that can be steered; the message lists what was sought."""


def _child(module: nn.Module, names: Iterable[str]) -> nn.Module | None:
    for name in names:
        child = getattr(module, name, None)
        if isinstance(child, nn.Module):
            return child
    return None


@dataclass(frozen=True)
class Block:
    """One decoder block and the modules whose inputs and outputs are its sites."""

    module: nn.Module
    attention: nn.Module
    mlp: nn.Module
    attention_post_norm: nn.Module | None
    mlp_post_norm: nn.Module | None

    def module_at(self, point: Point) -> nn.Module:
        """The module to hook: at its input for `resid_pre`, else at its output."""
        return {
            "resid_pre": self.module,
            "attn_out": self.attention,
            "attn_add": self.attention_post_norm or self.attention,
            "mlp_out": self.mlp,
            "mlp_add": self.mlp_post_norm or self.mlp,
            "resid_post": self.module,
        }[point]


@dataclass(frozen=True)
class ModelSites:
    """The sites of one model."""

    blocks: tuple[Block, ...]
    hidden_size: int

    def module_at(self, site: Site) -> nn.Module:
        """The module whose input or output the site is. ValueError where there is no such block."""
        if site.layer >= len(self.blocks):
            raise ValueError(f"site {site}: the model has {len(self.blocks)} blocks, from 0")
        return self.blocks[site.layer].module_at(site.point)

    def last_linear(self, site: Site) -> nn.Linear | Conv1D:
        """The Linear whose output is the site `attn_out` or `mlp_out`, for folding.

        Raises ValueError where there is no single one (residual sites, mixtures of experts).
        """
        names = LAST_LINEAR_NAMES.get(site.point)
        if names is None:
            raise ValueError(f"{site}: no weight produces the residual stream; it cannot be folded")
        linear = _child(self.module_at(site), names)
        if not isinstance(linear, nn.Linear | Conv1D):
            raise ValueError(
                f"{site}: no single Linear found (looked for {', '.join(names)}), so an edit here "
                "cannot be folded into weights; serve it as a hook"
            )
        return linear

    def post_norm_gain(self, site: Site) -> Tensor | None:
        """Gain `[d]` of the norm between the sublayer's output and the residual stream, or None.

        An RMS norm maps a vector of ones to its gain whatever the family stores (`weight` or
        `1 + weight`), so that is how it is read.
        """
        block = self.blocks[site.layer]
        norm = block.attention_post_norm if site.point == "attn_out" else block.mlp_post_norm
        if norm is None or site.point not in LAST_LINEAR_NAMES:
            return None
        parameter = next(norm.parameters())
        ones = torch.ones(1, self.hidden_size, device=parameter.device, dtype=parameter.dtype)
        with torch.no_grad():
            return cast(Tensor, norm(ones))[0].float().cpu()


def find_sites(model: nn.Module) -> ModelSites:
    """Find blocks and sublayers of a decoder-only model.

    Raises UnsupportedModelError, listing what was looked for, if the model is not understood.
    """
    config = cast(Any, model).config.get_text_config()
    if config.model_type in RESIDUAL_INSIDE:
        raise UnsupportedModelError(
            f"{type(model).__name__}: its sublayers add the residual stream themselves, so that "
            "what they add cannot be read or edited"
        )
    depth = config.num_hidden_layers
    blocks = next(
        (
            child
            for name, child in model.named_modules()
            if isinstance(child, nn.ModuleList)
            and len(child) == depth
            and name.rpartition(".")[2] in BLOCK_LISTS
        ),
        None,
    )
    if blocks is None:
        raise UnsupportedModelError(
            f"{type(model).__name__}: no list of {depth} decoder blocks found (looked for a "
            f"ModuleList named {', '.join(BLOCK_LISTS)}). Only decoder-only models can be steered."
        )
    return ModelSites(
        tuple(_find_block(type(model).__name__, i, module) for i, module in enumerate(blocks)),
        config.hidden_size,
    )


def _find_block(model_name: str, index: int, module: nn.Module) -> Block:
    attention = _child(module, ATTENTION_NAMES)
    mlp = _child(module, MLP_NAMES)
    for part, found, names in (
        ("attention", attention, ATTENTION_NAMES),
        ("feed-forward", mlp, MLP_NAMES),
    ):
        if found is None:
            raise UnsupportedModelError(
                f"{model_name}: block {index} has no {part} sublayer (looked for "
                f"{', '.join(names)}; it has {', '.join(n for n, _ in module.named_children())})"
            )
    assert attention is not None and mlp is not None
    for after_attention, after_mlp in POST_NORM_PAIRS:
        if hasattr(module, after_mlp):
            after = (_child(module, [name]) for name in (after_attention, after_mlp))
            return Block(module, attention, mlp, *after)
    return Block(module, attention, mlp, None, None)


@dataclass(frozen=True)
class ModelFingerprint:
    """What a profile is bound to.

    `architecture`, `dimensions`, `tokenizer` and `template` must match; other `weights` (a
    quantised build, say) need explicit permission.
    """

    architecture: str
    dimensions: dict[str, int]
    tokenizer: str
    template: str
    weights: str

    def __post_init__(self) -> None:
        names = (self.architecture, self.tokenizer, self.template, self.weights)
        if not all(type(name) is str for name in names):
            raise TypeError("a model's fingerprint is made of text")
        if not all(type(size) is int for size in self.dimensions.values()):
            raise TypeError("a model's dimensions are whole numbers")

    def mismatch(self, other: ModelFingerprint, *, allow_derived: bool = False) -> str | None:
        """Why a profile made for `self` cannot be used on `other`, or None if it can."""
        for name in ("architecture", "dimensions", "tokenizer", "template"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"it was fitted for a model with {name} {mine}, this one has {theirs}"
        if self.weights != other.weights and not allow_derived:
            return (
                f"it was fitted on other weights (digest {self.weights[:12]}, here "
                f"{other.weights[:12]}); if this model is derived from that one (quantised, say), "
                "allow it with --allow-derived-base"
            )
        return None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def digest(self) -> str:
        return _sha256(json.dumps(self.to_json(), sort_keys=True))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _weights_digest(model: nn.Module, path: str) -> str:
    """Digest of the safetensors files where the model came from files, else of the tensors."""
    digest = hashlib.sha256()
    files = weight_files(Path(path)) if Path(path).is_dir() else []
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    if not files:
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def weight_files(directory: Path) -> list[Path]:
    """The checkpoint's own files; others, such as profiles, may lie beside them."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        return sorted(directory / shard for shard in shards)
    whole = directory / "model.safetensors"
    return [whole] if whole.is_file() else sorted(directory.glob("*.safetensors"))


def fingerprint_model(model: nn.Module, tokenizer: Any, path: str = "") -> ModelFingerprint:
    """Fingerprint of a loaded model; `path` is the local directory it was read from, if any."""
    config = cast(Any, model).config.get_text_config()
    names = ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads")
    vocabulary = sorted(tokenizer.get_vocab().items())
    return ModelFingerprint(
        architecture=str(config.model_type),
        dimensions={name: int(getattr(config, name)) for name in names},
        tokenizer=_sha256(json.dumps(vocabulary)),
        template=_sha256(str(tokenizer.chat_template)),
        weights=_weights_digest(model, path),
    )


@dataclass(frozen=True)
class LanguageModel:
    """A loaded model with everything that serving and fitting need to know about it.

    Args:
        template_kwargs: passed to the chat template with every conversation.
        system_prompt: of the prompts that `encode_prompt` makes; None for no system message.
        template_date: ISO date that templates which print today's print instead; None for today's.
    """

    name: str
    model: Any  # transformers' model classes carry no useful static types
    tokenizer: Any
    sites: ModelSites
    fingerprint: ModelFingerprint
    revision: str = ""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    system_prompt: str | None = None
    template_date: str | None = None

    @property
    def config(self) -> Any:
        return self.model.config.get_text_config()

    @property
    def device(self) -> torch.device:
        return cast(torch.device, self.model.device)

    @property
    def dtype(self) -> torch.dtype:
        return cast(torch.dtype, self.model.dtype)

    @property
    def context_length(self) -> int:
        """Longest sequence (prompt and reply) in tokens."""
        for name in CONTEXT_NAMES:
            if (length := getattr(self.config, name, None)) is not None:
                return int(length)
        raise UnsupportedModelError(
            f"{self.name} does not say how long its context is (looked for "
            f"{', '.join(CONTEXT_NAMES)} in its config)"
        )

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Ids that end a reply, from the generation config, else the tokenizer."""
        ids = self.model.generation_config.eos_token_id
        if ids is None:
            ids = self.tokenizer.eos_token_id
        if ids is None:
            return frozenset()
        return frozenset([ids] if isinstance(ids, int) else ids)

    def encode_chat(self, messages: Sequence[dict[str, Any]], **template_kwargs: Any) -> list[int]:
        """Token ids of a conversation, with the generation prompt unless `template_kwargs` say
        otherwise, straight from the template.

        Rendering to text and tokenising that would double the BOS token on Llama and Gemma.
        Raises ValueError if the model has no chat template or the template rejects the messages.
        """
        if not self.tokenizer.chat_template:
            raise ValueError(f"{self.name} has no chat template; it can only complete plain text")
        if self.template_date is not None:
            template = self.tokenizer.get_chat_template(tools=template_kwargs.get("tools"))
            template_kwargs["chat_template"] = with_date(template, self.template_date)
        try:
            encoded = self.tokenizer.apply_chat_template(
                list(messages),
                tokenize=True,
                return_dict=True,
                **{"add_generation_prompt": True, **self.template_kwargs, **template_kwargs},
            )
        except Exception as error:  # jinja raises its own types; all mean "not renderable"
            raise ValueError(f"the chat template cannot render these messages: {error}") from error
        return list(encoded["input_ids"])

    def encode_prompt(self, prompt: str) -> list[int]:
        """Token ids of a one-message conversation, as a user's chat request makes it.

        The system prompt, if there is one, comes before that message.
        """
        system = [] if self.system_prompt is None else [("system", self.system_prompt)]
        turns = [*system, ("user", prompt)]
        return self.encode_chat([{"role": role, "content": text} for role, text in turns])

    def decode(self, token_ids: Sequence[int]) -> str:
        return cast(str, self.tokenizer.decode(list(token_ids), skip_special_tokens=True))


def load_model(
    name: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
) -> LanguageModel:
    """Load a model by local directory or hub id.

    `dtype="auto"` takes the dtype the checkpoint is stored in. Templates get `DEFAULT_KWARGS` and,
    where they print today's date, `FIXED_DATE`. Raises ValueError with what to do where nothing
    can be loaded, UnsupportedModelError where the architecture is not understood.
    """
    check_directory(name)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        # Any, because the stubs do not know what `output_loading_info` makes of the result.
        from_pretrained: Any = AutoModelForCausalLM.from_pretrained
        model, loaded = from_pretrained(
            name,
            revision=revision,
            dtype=dtype,
            attn_implementation=attention_of(config),
            use_safetensors=True,
            output_loading_info=True,
        )
    except LOADING_ERRORS as error:
        raise not_loaded(name, error) from error
    if lacking := sorted([*loaded["missing_keys"], *map(str, loaded["mismatched_keys"])]):
        raise ValueError(
            f"the weights of {name!r} lack {len(lacking)} tensors that the model needs, "
            f"{', '.join(lacking[:3])} among them; they would be random. Complete the checkpoint."
        )
    model = model.to(device).eval()
    path = name if Path(name).is_dir() else snapshot_directory(name, revision)
    return assemble(name, model, tokenizer, path, getattr(config, "_commit_hash", None))


def attention_of(config: Any) -> str | None:
    """The attention implementation to ask for; None for transformers' choice.

    Before 5.20 it chooses one for Gemma-2 that leaves the soft-capping out.
    """
    softcap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return None if softcap is None else "eager"


def assemble(name: str, model: Any, tokenizer: Any, path: str, commit: str | None) -> LanguageModel:
    """Find out about a model what serving and fitting need; `path` is where its files lie."""
    template = template_text(tokenizer)
    return LanguageModel(
        name=name,
        model=model,
        tokenizer=tokenizer,
        sites=find_sites(model),
        fingerprint=fingerprint_model(model, tokenizer, path),
        revision=commit or "",
        template_kwargs=default_kwargs(template),
        template_date=FIXED_DATE if prints_today(template) else None,
    )


def check_directory(name: str) -> None:
    """Raise ValueError for what can only be a directory and is none."""
    if name.startswith(("/", "./", "../")) and not Path(name).is_dir():
        raise ValueError(f"there is no directory {name}; give a model's directory or a hub id")


def not_loaded(name: str, error: Exception) -> ValueError:
    """What to tell a user about one of `LOADING_ERRORS`."""
    return ValueError(
        f"cannot load the model {name!r}: {' '.join(str(error).split())[:500]}. Give a local "
        "directory with config.json, tokenizer files and *.safetensors, or a hub id."
    )


def snapshot_directory(name: str, revision: str | None, *, download: bool = False) -> str:
    """Where the files of a model from the hub lie on this machine."""
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"] if download else None
    return str(
        snapshot_download(
            name, revision=revision, local_files_only=not download, allow_patterns=wanted
        )
    )
