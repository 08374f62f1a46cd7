"""`LoRA`: the packaged rule, in the form that NeMo's users know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..lang.diagnostics import RuleError, refusal
from ..plan.check import check
from ..plan.ruleset import RuleSet, parse
from .base import Base
from .peft import PEFT

DEFAULT = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""The four linears of a transformer layer, by megatron-core's names."""
_ROLES = {
    "linear_qkv": "@layers[*].**.@qkv",
    "linear_proj": "@layers[*].**.@attention_output",
    "linear_fc1": "@mlp_input",
    "linear_fc2": "@mlp_output",
}
"""The same parts in other families."""


class LoRA(PEFT):
    """LoRA on linears named as in NeMo: `LoRA(target_modules=["linear_qkv", "linear_proj"], dim=32, dropout=0.0)`.

    The four names `linear_qkv`, `linear_proj`, `linear_fc1` and `linear_fc2` mean these parts of a layer whatever the
    family calls them; they are the default. Any other is a name (`q_proj`), a path, or a wildcard over paths, where `*`
    crosses dots (`*.layers.0.*.linear_qkv`). `dim` is the rank, the update is scaled by `alpha / dim`. Everything else
    is frozen. Every name must be found.

    The rules it stands for: `print(LoRA(...).text)`. Raises `RuleError` for values that a rule file may
    not have, `ApplyError` (GP819) for targets that are no names.
    """

    def __init__(
        self,
        target_modules: Sequence[str] = DEFAULT,
        dim: int = 32,
        alpha: float = 32,
        dropout: float = 0.0,
        base_checkpoint: Base | None = None,
        adapter: str | None = None,
    ):
        super().__init__(base_checkpoint=base_checkpoint, adapter=adapter)
        self.target_modules = [target_modules] if isinstance(target_modules, str) else list(target_modules)
        self.dim, self.alpha, self.dropout = dim, alpha, dropout
        if not self.target_modules or not all(isinstance(name, str) for name in self.target_modules):
            raise refusal(
                "GP819", f"target_modules is {target_modules!r}", 'names of modules: ["linear_qkv", "q_proj"]'
            )
        # What no rule file could say is told of here, and not when training starts.
        wrong = check(self.rule_set())
        if wrong:
            raise RuleError(wrong)

    @property
    def text(self) -> str:
        """The rules, as a file would have them."""
        roles = [name for name in self.target_modules if name in _ROLES]
        aliases = "".join(f"alias any_{name} = {name} | {_ROLES[name]}\n" for name in roles)
        named = " | ".join(f"@any_{name}" if name in _ROLES else _selector(name) for name in self.target_modules)
        return (
            f"use roles\n{aliases}\npatch {named}\n"
            f"  with lora(rank={self.dim!r}, alpha={self.alpha!r}, dropout={self.dropout!r})\n  except @tower\n\n"
            "freeze ** except @new\n"
        )

    def rule_set(self) -> RuleSet:
        return parse(self.text)

    def __repr__(self) -> str:
        return f"LoRA({self.target_modules}, dim={self.dim}, alpha={self.alpha}, dropout={self.dropout})"

    def transform(self, module: Any, name: str | None = None, prefix: str | None = None) -> Any:
        raise NotImplementedError("LoRA is made of rules: see LoRA.text")


def _selector(name: str) -> str:
    """A target of NeMo's as a selector."""
    return ".".join("**" if part == "*" else part for part in name.split("."))
