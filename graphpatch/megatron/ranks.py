"""What all ranks must agree on: each tells the others, so that one that cannot go on stops all, and none waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from ..lang.diagnostics import ApplyError, Diagnostic, Error

T = TypeVar("T")


def rank() -> int:
    return torch.distributed.get_rank() if _several() else 0


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def alone() -> bool:
    """Whether there is one rank."""
    return not _several() or torch.distributed.get_world_size() == 1


def told(value: Any) -> list[Any]:
    """What every rank says, by rank."""
    if not _several():
        return [value]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def gathered(value: Any) -> list[Any]:
    """What every rank says, on the first; nothing on the others."""
    if not _several():
        return [value]
    size = torch.distributed.get_world_size()
    found: list[Any] | None = [None] * size if rank() == 0 else None
    torch.distributed.gather_object(value, found)
    return found or []


def all_or_none(work: Callable[[], T]) -> T:
    """What `work` gives on this rank, where it raises on none. On all others it is then told (GP930) which failed."""
    try:
        result, error = work(), None
    except Exception as raised:
        result, error = None, raised
    agree(error)
    return result  # type: ignore[return-value]


def agree(error: Exception | None) -> None:
    """Go on where no rank has an error. Called by all."""
    failed = {at: text for at, text in enumerate(told(None if error is None else _text(error))) if text is not None}
    if error is not None:
        raise error
    if failed:
        at, text = next(iter(failed.items()))
        others = f", and so did {len(failed) - 1} more" if len(failed) > 1 else ""
        raise ApplyError(
            Diagnostic(
                "GP930",
                f"rank {at} cannot go on{others}, so nothing was changed on any",
                text=tuple(text.splitlines()),
            )
        )


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, Error) else f"{type(error).__name__}: {error}"


def refuse_different(what: str, said: Sequence[str], fix: str) -> None:
    """Raise `ApplyError` (GP931), on all ranks the same, where they do not say the same."""
    odd = {text: [at for at, other in enumerate(said) if other == text] for text in said}
    if len(odd) == 1:
        return
    usual, *others = sorted(odd.items(), key=lambda item: -len(item[1]))
    ranks = [at for _, held in others for at in held]
    named = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, sorted(ranks)))}"
    raise ApplyError(
        Diagnostic(
            "GP931",
            f"{named} and rank {usual[1][0]} do not have the same {what}, so nothing was changed on any",
            text=(f"rank {usual[1][0]}: {usual[0][:300]}", *(f"rank {held[0]}: {text[:300]}" for text, held in others)),
            fixes=(fix,),
        )
    )


def whole() -> bool:
    """Whether this rank has all of a model, as any of data parallelism has."""
    return not _split()


def _split() -> list[str]:
    """The sizes of parallelism that give each rank a part of a model."""
    from megatron.core import parallel_state

    if not parallel_state.is_initialized():
        return []
    sizes = {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "expert": parallel_state.get_expert_model_parallel_world_size(),
        "expert tensor": parallel_state.get_expert_tensor_parallel_world_size(),
    }
    return [f"{name} {size}" for name, size in sizes.items() if size > 1]


def refuse_parts(what: str) -> None:
    """Raise `ApplyError` (GP953) where this rank has a part of a model: `what` is of a whole one."""
    if not whole():
        raise needs_whole(what)


def needs_whole(what: str) -> ApplyError:
    split = _split()
    return ApplyError(
        Diagnostic(
            "GP953",
            f"this rank has a part of the model, and {what} of a whole one",
            text=(f"the sizes of parallelism are {', '.join(split)}",) if split else (),
            fixes=(
                "graphpatch.save_adapter(patch, DIR) and to_peft, called on every rank, write the whole adapter",
                "checkpoints of MegatronStrategy, or of model.sharded_state_dict(), hold what trains, and load at "
                "any layout, one process too",
            ),
        )
    )
