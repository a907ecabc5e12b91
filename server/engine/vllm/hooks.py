"""Where a site is in vLLM's modules, and how a program gets between them.

Most of vLLM's decoder blocks pass on `(hidden_states, residual)`, whose sum is the residual stream.
A program changes the first and leaves the second alone, which vLLM's norms update in place. Blocks
that are built otherwise are refused: the self-test could not tell, as it compares what happens at a
hook, not whether the hook is in the right place.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from server.engine.vllm.program import SiteProgram
from steering.edit import Point, Site
from steering.models import POST_NORM_PAIRS


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of a model's decoder blocks, those of other pipeline stages as placeholders.

    Raises ValueError for models built otherwise.
    """
    for path in ("model.layers", "language_model.model.layers"):
        found: Any = model
        for name in path.split("."):
            found = getattr(found, name, None)
        if isinstance(found, nn.ModuleList):
            return found
    raise ValueError(
        f"{type(model).__name__} keeps its blocks where this server does not look for them, so "
        "vLLM cannot be made to steer it; use --engine local"
    )


def attach(block: nn.Module, programs: Mapping[Site, SiteProgram]) -> None:
    """Put programs into a block, those at one module in the order of the forward pass.

    Raises ValueError for blocks whose insides are not known.
    """
    _check_residual(block)
    by_point = {site.point: program for site, program in programs.items()}
    for site, program in programs.items():
        block.add_module(f"pilothouse_{site.point}", program)
    if "resid_pre" in by_point:
        at = _place_of_arguments(block)
        block.register_forward_pre_hook(_before(by_point["resid_pre"], at), with_kwargs=True)
    for points in (("attn_out", "attn_add"), ("mlp_out", "mlp_add")):
        if not by_point.keys() & set(points):
            continue  # a block whose sublayers are not known may be edited elsewhere
        inner, outer = _sublayer(block, points)
        here: dict[nn.Module, list[SiteProgram]] = {}
        for point, module in zip(points, (inner, outer), strict=True):
            if point in by_point:
                here.setdefault(module, []).append(by_point[point])
        for module, chain in here.items():
            module.register_forward_hook(_after_sublayer(chain))
    if "resid_post" in by_point:
        block.register_forward_hook(_after_block(by_point["resid_post"]))


def _check_residual(block: nn.Module) -> None:
    """Raise ValueError for a block that adds the residual itself, and passes on what it was.

    Those that leave the sum to the next block must know the first, which gets none; the others
    (Cohere's, EXAONE-4's, HyperCLOVA X's) never ask. No shape or value tells them apart.
    """
    _place_of_arguments(block)
    try:
        source = inspect.getsource(type(block).forward)
    except OSError:
        source = ""
    if not re.search(r"\bresidual is (not )?None\b", source):
        raise ValueError(
            f"{type(block).__name__} does not leave the residual to the next block, so that vLLM "
            "cannot be made to steer it; use --engine local"
        )
    # DeepSeek's way to keep float16 from overflowing: from there on, all states are smaller.
    half = any(parameter.dtype == torch.float16 for parameter in block.parameters())
    if half and re.search(r"\bresidual \*=", source):
        raise ValueError(
            f"{type(block).__name__} scales the residual stream in float16, so that edits and "
            "probes would meet other states than they were fitted on; use --dtype bfloat16"
        )


def _sublayer(block: nn.Module, points: tuple[Point, Point]) -> tuple[nn.Module, nn.Module]:
    """The module that gives a sublayer's output, and the one that gives what is added."""
    attention = "attn_out" in points
    inner = getattr(block, "self_attn" if attention else "mlp", None)
    if not isinstance(inner, nn.Module):
        raise ValueError(
            f"{type(block).__name__} has no self_attn and mlp, so that vLLM cannot be made to "
            "steer it; use --engine local"
        )
    for after_attention, after_mlp in POST_NORM_PAIRS:
        if hasattr(block, after_mlp):
            return inner, getattr(block, after_attention if attention else after_mlp)
    return inner, inner


def _place_of_arguments(block: nn.Module) -> tuple[int, int]:
    names = list(inspect.signature(block.forward).parameters)
    try:
        return names.index("hidden_states"), names.index("residual")
    except ValueError:
        raise ValueError(
            f"{type(block).__name__} does not take hidden_states and residual, so that vLLM cannot "
            "be made to steer it; use --engine local"
        ) from None


def _before(program: SiteProgram, at: tuple[int, int]) -> Callable[..., Any]:
    state, rest = at

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        residual = args[rest] if rest < len(args) else kwargs["residual"]
        if state < len(args):
            edited = program(args[state], residual)
            return (*args[:state], edited, *args[state + 1 :]), kwargs
        return args, {**kwargs, "hidden_states": program(kwargs["hidden_states"], residual)}

    return hook


def _after_block(program: SiteProgram) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: Any, output: tuple[Tensor, Tensor]) -> Any:
        hidden, residual = output
        return program(hidden, residual), residual

    return hook


def _after_sublayer(chain: list[SiteProgram]) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        for program in chain:
            output = program(output)
        return output

    return hook
