"""What PEFT writes beside a LoRA: alpha, ranks per module, and the options that change the mathematics.

The same fields stand in `adapter_config.json` of a PEFT folder and in the header field `lora_adapter_metadata` that
diffusers' `save_lora_adapter` writes. Source: `LoraConfig` of peft, and its `get_pattern_key` for the patterns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core import StylemuseError
from .files import quoted

READ = frozenset({"lora_alpha", "r", "alpha_pattern", "rank_pattern", "use_rslora", "base_model_name_or_path"})
HARMLESS = frozenset(
    {
        # Which modules were trained, which the tensors say themselves; how they were started and trained; provenance.
        "auto_mapping",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "megatron_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
    }
)
NEUTRAL: tuple[Any, ...] = (None, False, "none", 0)
BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that move part of the base weight into the pair, so that the pair alone is not the adapter."""


@dataclass(frozen=True)
class Scaling:
    """The numbers of a PEFT config: `factor(site, rank)` is what the product up down is multiplied by."""

    alpha: float
    rank: float
    alphas: Mapping[str, float]
    ranks: Mapping[str, float]
    rank_stabilized: bool
    base_model: str

    def factor(self, site: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) with use_rslora; an error if the tensors have another rank than the config."""
        expected = self.ranks.get(_pattern(self.ranks, site), self.rank)
        if rank != expected:
            raise StylemuseError(f"{site} has rank {rank} but its config says {expected}")
        alpha = self.alphas.get(_pattern(self.alphas, site), self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def scaling(config: Mapping[str, Any], what: str) -> Scaling:
    """Read a config; every field that would change the result and is not supported is an error naming it."""
    # Pipelines of diffusers prefix each field with the part it belongs to.
    config = {key.removeprefix("transformer."): value for key, value in config.items()}
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        raise StylemuseError(f"{what}: peft_type {kind!r} is not supported; only LORA is")
    if config.get("use_dora"):
        raise StylemuseError(f"{what}: DoRA (use_dora) is not supported; only plain LoRA is")
    if config.get("use_rslora") not in (None, False, True):
        raise StylemuseError(f"{what}: use_rslora must be true or false, not {str(config['use_rslora'])[:80]}")
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(BASE_CHANGING):
        raise StylemuseError(f"{what}: init_lora_weights {start!r} changes the base weights; convert it to plain LoRA")
    odd = {key for key, value in config.items() if key not in READ | HARMLESS and value not in (*NEUTRAL, {}, [])}
    if odd:
        raise StylemuseError(f"{what}: options {quoted(odd)} are not supported")
    return Scaling(
        alpha=_number(config.get("lora_alpha"), f"{what}: lora_alpha"),
        rank=_number(config.get("r"), f"{what}: r"),
        alphas=_numbers(config.get("alpha_pattern"), f"{what}: alpha_pattern"),
        ranks=_numbers(config.get("rank_pattern"), f"{what}: rank_pattern"),
        rank_stabilized=bool(config.get("use_rslora")),
        base_model=str(config.get("base_model_name_or_path") or ""),
    )


def _pattern(patterns: Mapping[str, object], site: str) -> str:
    """The first pattern that names the site: its whole name after "^", else its whole name or the end of it."""
    for pattern in patterns:
        if site == pattern.removeprefix("^") or (pattern[0] != "^" and site.endswith(f".{pattern}")):
            return pattern
    return ""


def _numbers(table: Any, what: str) -> dict[str, float]:
    if not isinstance(table or {}, dict):
        raise StylemuseError(f"{what} must be an object of numbers")
    for pattern in table or {}:
        # A regular expression from a file can run for ever; published files hold plain module names.
        if not pattern.removeprefix("^").replace(".", "").replace("_", "").isalnum():
            raise StylemuseError(f"{what}: {pattern[:80]!r} is not a plain module name, which is all that is supported")
    return {pattern: _number(value, f"{what} of {pattern}") for pattern, value in (table or {}).items()}


def _number(value: Any, what: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e6:
        raise StylemuseError(f"{what} must be a number above 0, not {str(value)[:80]}")
    return value
