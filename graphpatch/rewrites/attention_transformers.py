"""Attention of Transformers, which asks a registry for the function that computes it.

The function registered here, `graphpatch`, is what a changed module is given for whatever `config._attn_implementation`
says; it changes mask, factor and scores, and goes on to the one that is meant. So `set_attn_implementation` means what
it meant, before a patch and after.
"""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..lang.diagnostics import ApplyError, Diagnostic
from ..ops.op import Refusal
from .attention import Attention, Wish, Wishes, allowed, as_bias, narrowed, scored, with_causality

NAME = "graphpatch"
_PLAIN = {"module", "query", "key", "value", "attention_mask", "scaling", "dropout", "softcap", "kwargs"}
_OURS = ("eager", "sdpa", "flex_attention")
_WORDS = frozenset(
    "torch nn functional F matmul transpose size softmax float float32 dtype to type dropout training contiguous tanh"
    " head_dim repeat_kv num_key_value_groups getattr hasattr".split()
)
"""What an eager attention names that computes no more than `_capped_attention` does; sinks, for one, are more."""


class Redirected:
    """A config, for a module whose attention is changed."""

    def __init__(self, config: Any):
        self._config = config

    @property
    def _attn_implementation(self) -> str:
        return NAME

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_config"], name)


class TransformersAttention(Attention):
    """Sends the module's attention through `attend`."""

    is_causal: bool
    num_key_value_groups: int

    @classmethod
    def check(cls, entry: Wish, module: nn.Module) -> None:
        name = type(module).__name__
        if "config" not in module.__dict__ or not _asks_the_registry(_base(module)):
            raise Refusal(
                f"{name} does not ask Transformers' attention interface how to attend",
                "target the module that holds q_proj, k_proj and v_proj",
                "`graphpatch match` shows what a selector reaches",
                code="GP550",
            )
        backend = module.__dict__["config"]._attn_implementation
        _refuse_backend(name, backend, entry.name)
        if entry.name == "cap":
            eager = _eager(module)
            odd = sorted(set(inspect.signature(eager).parameters) - _PLAIN)
            if odd:
                raise Refusal(f"{name} adds {', '.join(odd)} to its scores, which capping would not know", code="GP550")
            odd = sorted(set(eager.__code__.co_names) - _WORDS)
            if odd:
                raise Refusal(
                    f"the attention of {name} computes more than softmax(q k^T + mask) v ({', '.join(odd)}), "
                    "which capping would leave out",
                    "leave these modules out",
                    code="GP550",
                )
            if backend == "sdpa":
                warnings.warn(
                    f"graphpatch: `sdpa` cannot cap attention scores: {name} computes as `eager` does from now on",
                    stacklevel=2,
                )
        _register()

    @property
    def config(self) -> Any:
        held = self.__dict__["config"]
        return Redirected(held) if self._attention_wishes else held

    @config.setter
    def config(self, value: Any) -> None:
        self.__dict__["config"] = value


def _refuse_backend(name: str, backend: str | None, wish: str) -> None:
    """Scores are capped, and masks made, in the backends that are known; a factor is an argument of all of them."""
    if wish == "by" or backend in (*_OURS, None):
        return
    raise Refusal(
        f"the backend `{backend}` of {name} cannot be given what `{_OP_OF[wish]}` asks for",
        'model.set_attn_implementation("eager"), or "sdpa"',
        code="GP551",
    )


_OP_OF = {"cap": "softcap.attention", "size": "attention.window", "causal": "attention.causal", "by": "attention.scale"}


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """In the place of a backend: query (batch x heads x queries x width), key and value (batch x key heads x keys x
    width), a mask as the backend has it. Returns (batch x queries x heads x width), and the weights if it has them."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    wishes: Wishes = module.wishes
    backend = module.__dict__["config"]._attn_implementation or "eager"
    for wish in module._attention_wishes:
        try:
            _refuse_backend(type(module).__name__, backend, wish.name)
        except Refusal as refusal:
            raise ApplyError(Diagnostic(refusal.code, str(refusal), fixes=refusal.fixes)) from None
    scaling = wishes.by if wishes.by is not None else scaling
    causal = _is_causal(module, kwargs)
    if wishes.masks:
        attention_mask = _masked(causal, query, key, attention_mask, wishes, backend)
        kwargs["is_causal"] = False
    elif wishes.cap is not None and backend == "sdpa" and attention_mask is None and causal and query.shape[2] > 1:
        places = torch.arange(query.shape[2], device=query.device)
        attention_mask = allowed(places, key.shape[2], Wishes(causal=True))[None, None]
    if backend == "flex_attention" and wishes.cap is not None:
        kwargs["softcap"] = wishes.cap
    elif wishes.cap is not None:
        return _capped_attention(module, query, key, value, attention_mask, scaling, dropout, wishes.cap)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(backend, _eager(module))
    return function(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)  # type: ignore[no-any-return]


def _capped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    cap: float,
) -> tuple[Tensor, Tensor]:
    """Transformers' eager attention of Gemma 2, with its roundings."""
    from transformers.integrations.sdpa_attention import repeat_kv

    groups = query.shape[1] // key.shape[1]
    products = torch.matmul(query, repeat_kv(key, groups).transpose(2, 3))
    scores = scored(products, query.shape[-1] ** -0.5 if scaling is None else scaling, cap, mask)
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    output = torch.matmul(weights, repeat_kv(value, groups))
    return output.transpose(1, 2).contiguous(), weights


# ── masks ──


def _is_causal(module: Any, kwargs: dict[str, Any]) -> bool:
    """As `sdpa` decides it: CLIP's text tower, for one, says it with every call, and its modules say otherwise."""
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _masked(causal: bool, query: Tensor, key: Tensor, mask: Any, wishes: Wishes, backend: str) -> Any:
    """The mask with what is asked for in it, of the kind that the backend takes."""
    queries, keys = query.shape[2], key.shape[2]
    if wishes.causal is None and causal and not isinstance(mask, Tensor) and backend != "eager":
        wishes = with_causality(wishes, True)  # where the mask leaves it to the backend
    if type(mask).__name__ == "BlockMask" or backend == "flex_attention":
        return _block_mask(mask, queries, keys, wishes, query.device)
    # Without a mask a backend aligns queries with the first keys, and a single one with the last.
    first = keys - 1 if queries == 1 and mask is None else 0
    places = torch.arange(queries, device=query.device) + first
    if mask is None:
        if wishes.causal is False and wishes.size is None:
            return None
        seen = allowed(places, keys, wishes)[None, None]
        return seen if backend == "sdpa" else as_bias(seen, query.dtype)
    sees = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    if queries != keys:
        # A step of generation: its own place is the last that a query may see.
        places = torch.where(sees, torch.arange(keys, device=mask.device), -1).amax(-1)
    if wishes.causal is False and causal:
        mask, sees = (m[..., -1:, :].expand(*m.shape[:-2], queries, keys) for m in (mask, sees))
    return narrowed(mask, allowed(places, keys, wishes))


def _block_mask(mask: Any, queries: int, keys: int, wishes: Wishes, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import and_masks, create_block_mask, noop_mask

    if wishes.causal is False:
        raise ApplyError(
            Diagnostic(
                "GP551",
                "the backend `flex_attention` hands on no mask from which causality could be taken out",
                fixes=('model.set_attn_implementation("eager"), or "sdpa"',),
            )
        )

    def seen(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        distance = q + (keys - queries) - k
        inside = distance >= 0 if wishes.causal else distance == distance
        return inside if wishes.size is None else inside & (distance < wishes.size) & (distance > -wishes.size)

    before = noop_mask if mask is None else mask.mask_mod
    batch = None if mask is None else mask.shape[0]
    return create_block_mask(and_masks(before, seen), batch, None, queries, keys, device=str(device))


# ── the library ──


@lru_cache(maxsize=1)
def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)


def _base(module: nn.Module) -> type:
    return getattr(type(module), "_graphpatch_base", type(module))  # type: ignore[no-any-return]


def _eager(module: nn.Module) -> Any:
    """The family's own."""
    for cls in _base(module).__mro__:
        found = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    raise ApplyError(Diagnostic("GP550", f"{type(module).__name__} has no eager attention"))


@lru_cache
def _asks_the_registry(cls: type) -> bool:
    try:
        source = inspect.getsource(cls.forward)  # type: ignore[attr-defined]
    except (OSError, TypeError):
        return False
    return bool(re.search(r"get_interface\(\s*self\.config\._attn_implementation", source))
