"""What SGLang wants otherwise than the portable profile: in `target_modules`, the names that it has itself.

It renames the keys of experts, w1, w3 and w2, and not the list (sglang 0.5.23, lora/lora.py `_rename_expert_w_to_proj`
and lora/utils.py `get_normalized_target_modules`).
"""

from __future__ import annotations

from .experts import ROLES, Names
from .portable import Written

_OLD = frozenset(name for name in ROLES if name.startswith("w"))


def for_sglang(portable: Written) -> Written:
    """The same adapter for SGLang."""
    names = (Names().of(ROLES[name]) if name in _OLD else name for name in portable.config["target_modules"])
    return portable._replace(config={**portable.config, "target_modules": sorted(set(names))})
