"""A new adapter from a weighted combination of those that are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..lang.diagnostics import ApplyError, Diagnostic, did_you_mean
from ..ops.lora import Lora
from ..ops.op import Op
from ..plan.plan import Plan
from ..plan.ruleset import parse
from ..rewrites.combining import (
    METHODS,
    Majority,
    Method,
    Prune,
    Update,
    at_random,
    concatenated,
    largest,
    on_factors,
    on_products,
)
from ..rewrites.stacks import shares, stacked, unstacked
from ..tree.compress import compress
from ..tree.tree import Tree
from .adapters import Adapters, Name, quoted
from .apply import apply_plan
from .drift import unwrapped
from .original import original_plan
from .over_ranks import refuse_parts
from .patch import Patch, adapter_changes
from .refuse import refuse_selected


def combine(
    model: nn.Module,
    weights: Mapping[Name, float],
    name: str,
    *,
    method: str = "cat",
    rank: int | None = None,
    density: float | None = None,
    majority: Majority | None = None,
    seed: int | None = None,
) -> Patch:
    """Add an adapter called `name` that is the weighted combination of others, and return its patch.

    `weights` are by name, may be negative, and stand for those of `adapters(model).weights()`. `method`:

    - `cat`: their sum exactly; its rank is the sum of theirs.
    - `svd`: the best approximation of their sum by `rank`, which is the largest of theirs where none is given.
    - `linear`: sums A and B apart, for adapters of one rank. Cheap, and rough: each A meets every B.
    - `magnitude_prune`, `ties` (Yadav et al., arXiv:2306.01708), `dare_linear`, `dare_ties` (Yu et al.,
      arXiv:2311.03099): as `linear`, after pruning each factor to a share of `density`, by magnitude or, in DARE, at
      random (`seed`, else PyTorch's generator); in TIES values that disagree in sign with the `majority` ("total" of
      the values, or "frequency" of the signs) are left out.
    - these four with `_svd`: the same on the products B A, brought to `rank` as `svd` does.

    They are PEFT's, and equal what its `add_weighted_adapter` gives. A module that some of the adapters have gets a
    combination of those. The new adapter is off until it is activated, and no flag changes; its rules are plain `lora`
    rules, so it is saved, loaded and exported as any other.

    Raises `ApplyError`: GP525 for arguments, GP526 for ranks that differ, GP527 for adapters that cannot be combined
    (DoRA's magnitudes, a trained bias), GP528 where the name is taken, GP545 for an unknown adapter, GP953 where this
    process has a part of the model; nothing has changed then.
    """
    refuse_selected(model)
    refuse_parts(model, "a combination of adapters is")
    how = _How.checked(method, rank, density, majority, seed)
    found = Adapters(model)
    if not weights or not isinstance(weights, Mapping):
        raise _wrong("there is nothing to combine", "combine(model, {name: weight, ...}, new_name)")
    if not isinstance(name, str):
        raise _wrong(f"{name!r} is no name for the new adapter", "combine(model, {name: weight, ...}, new_name)")
    found.check_weights(weights)
    if name in found.names:
        fix = f"adapters(model).delete({name!r}) takes that off"
        raise ApplyError(Diagnostic("GP528", f"there is an adapter called {quoted(name)} already", fixes=(fix,)))
    tree, targets = _sources(found, weights)
    with torch.no_grad():
        results = {
            (node, parameter): _combined(tree.paths[node], tree.modules[node], held, how)  # type: ignore[index]
            for (node, parameter), held in targets.items()
        }
    root = (tree.modules or [model])[0]
    return _added(model if unwrapped(model) is root else root, name, tree, results)


Target = tuple[int, str | None]
"""A node of the tree, and the parameter's name where that is the target."""


class _Source(NamedTuple):
    """One adapter on one target."""

    op: Lora
    updates: list[Update]
    """One; of a fused linear one for each part."""


class _Result(NamedTuple):
    op: Lora
    factors: list[tuple[Tensor, Tensor]]
    """A and B for each part, as stacks of matrices."""


class _How(NamedTuple):
    """The arguments, found to agree."""

    name: str
    method: Method
    rank: int | None
    prune: Prune
    majority: Majority

    @classmethod
    def checked(cls, name: str, rank: Any, density: Any, majority: Any, seed: Any) -> _How:
        """Raises `ApplyError` (GP525)."""
        method = METHODS.get(name) if isinstance(name, str) else None
        if method is None:
            near = did_you_mean(str(name), METHODS)
            raise _wrong(f"no method is called {name!r}", *filter(None, [near]), f"there are {', '.join(METHODS)}")
        takes = {
            "rank": (rank, method.dense),
            "density": (density, bool(method.prune)),
            "majority": (majority, method.elects),
            "seed": (seed, method.prune == "random"),
        }
        for argument, (value, used) in takes.items():
            if value is not None and not used:
                raise _wrong(f"`{argument}` has no effect with method={name!r}", "leave it out")
        if method.prune and not (_number(density) and 0 < density <= 1):
            raise _wrong(f"method={name!r} needs a `density` above 0 and at most 1: the share of values that is kept")
        if rank is not None and not (type(rank) is int and rank > 0):
            raise _wrong(f"`rank` is a positive integer, and not {rank!r}")
        if majority not in (None, "total", "frequency"):
            raise _wrong(f'`majority` is "total" or "frequency", and not {majority!r}')
        if seed is not None and type(seed) is not int:
            raise _wrong(f"`seed` is an integer, and not {seed!r}")
        return cls(name, method, rank, _pruning(method, density, seed), majority or "total")


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _pruning(method: Method, density: Any, seed: int | None) -> Prune:
    if not method.prune or density == 1:
        return lambda tensor: tensor
    if method.prune == "magnitude":
        return largest(density)
    made: dict[torch.device, torch.Generator] = {}

    def generator(device: torch.device) -> torch.Generator | None:
        if seed is not None and device not in made:
            made[device] = torch.Generator(device).manual_seed(seed)
        return made.get(device)

    return at_random(density, generator)


# ── what there is ──


def _sources(found: Adapters, weights: Mapping[Name, float]) -> tuple[Tree, dict[Target, list[_Source]]]:
    """The adapters by target, in the order of the model's modules. Raises `ApplyError` (GP527)."""
    targets: dict[Target, list[_Source]] = {}
    tree: Tree | None = None
    for name, weight in weights.items():
        for patch in found.patches(name):
            plan = original_plan(patch)
            modules = plan.tree.modules or []
            if tree is not None and tree.modules is not None and modules[0] is not tree.modules[0]:
                raise _not(name, "it was applied to another part of the model than the first one")
            tree = plan.tree
            entries = {
                (module, change.added): change.entry
                for change in adapter_changes(patch._journal)
                for module in change.modules
                if change.entry.adapter == name
            }
            for step in plan.steps:
                for node in step.nodes:
                    entry = entries.pop((modules[node], tuple(step.adds)), None)
                    if entry is not None:
                        op = _plain(step.op, name, plan.tree.paths[node])
                        updates = _updates(modules[node], entry, weight)
                        targets.setdefault((node, step.parameter), []).append(_Source(op, updates))
            if entries:
                raise _not(name, "what its rules mean has changed since it was applied")
    assert tree is not None
    return tree, dict(sorted(targets.items(), key=lambda item: (item[0][0], item[0][1] or "")))


def _plain(op: Op, name: Name, path: str) -> Lora:
    if not isinstance(op, Lora):
        raise _not(name, f"`{op.op}` on `{path}` is no sum of products")
    if op.dora:
        raise _not(name, f"on `{path}` it is DoRA: its magnitudes are of its own sum, and of no other")
    if op.bias:
        raise _not(name, f"on `{path}` it trains a bias too")
    return op


def _updates(module: nn.Module, entry: Any, weight: float) -> list[Update]:
    """In float32 at least."""

    def get(name: str) -> Tensor:
        tensor = getattr(module, name).detach()
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

    pairs = [entry.factors(get)] if entry.started else entry.apart(get)
    return [Update(*stacked(a, b, module), entry.scale, weight) for a, b in pairs]


# ── what becomes of it ──


def _combined(path: str, module: nn.Module, held: Sequence[_Source], how: _How) -> _Result:
    kinds = [source.op.model_dump(exclude=_FREE) for source in held]
    if any(kind != kinds[0] for kind in kinds):
        texts = ", ".join(source.op.text() for source in held)
        raise _not(None, f"on `{path}` they are of different kinds: {texts}")
    parts = [_one(path, module, updates, how) for updates in zip(*(source.updates for source in held))]
    rank = parts[0][0].shape[1] * shares(module)
    dropouts, dtypes = {source.op.dropout for source in held}, {source.op.dtype for source in held}
    op = Lora(
        **kinds[0],
        rank=rank,
        dropout=held[0].op.dropout if len(dropouts) == 1 else 0.0,
        dtype=held[0].op.dtype if len(dtypes) == 1 else "float32",
    )
    return _Result(op, parts)


_FREE = {"rank", "alpha", "use_rslora", "init", "iterations", "dropout", "dtype", "adapter"}
"""The arguments in which adapters that are combined may differ. The new one has theirs where they agree, and else what
is neutral."""


def _one(path: str, module: nn.Module, updates: Sequence[Update], how: _How) -> tuple[Tensor, Tensor]:
    groups, ranks = shares(module), [update.a.shape[1] for update in updates]
    if how.name == "cat":
        return concatenated(updates)
    if how.method.dense:
        rank = how.rank or max(ranks) * groups
        if rank % groups:
            raise _wrong(f"`{path}` has {groups} groups, which split the rank among them, and {rank} is no multiple")
        return on_products(updates, rank // groups, how.method, how.prune, how.majority)
    if len(set(ranks)) > 1:
        raise ApplyError(
            Diagnostic(
                "GP526",
                f"method={how.name!r} adds factors of one rank, and on `{path}` they are of "
                f"{', '.join(str(rank * groups) for rank in ranks)}",
                fixes=('method="cat" sums exactly, "svd" to a rank of your own', "or give the method with `_svd`"),
            )
        )
    return on_factors(updates, how.method, how.prune, how.majority)


def _added(model: nn.Module, name: str, tree: Tree, results: Mapping[Target, _Result]) -> Patch:
    groups: dict[str, list[Target]] = {}
    for target, result in results.items():
        groups.setdefault(result.op.text(), []).append(target)
    lines = []
    for text, targets in groups.items():
        nodes, parameters = [n for n, p in targets if p is None], [(n, p) for n, p in targets if p is not None]
        lines.append(f"patch {' | '.join(compress(tree, nodes, parameters))} with {text} expect {len(targets)}")
    rules = parse("\n".join([*lines, "freeze ** except @new"]))
    plan = rules.plan(model, adapter=name)
    # The rules stand by themselves where they are loaded; here, what trains goes on as it did.
    patch = apply_plan(replace(plan, grads=None), model, initialise=False)
    try:
        for change in adapter_changes(patch._journal):
            change.active = False
            change.show()
        _fill(patch, plan, results)
    except BaseException:
        patch.revert()
        raise
    return patch


def _fill(patch: Patch, plan: Plan, results: Mapping[Target, _Result]) -> None:
    modules = plan.tree.modules or []
    entries = {
        (module, change.added): change.entry for change in adapter_changes(patch._journal) for module in change.modules
    }
    with torch.inference_mode(False), torch.no_grad():
        for step in plan.steps:
            for node in step.nodes if step.adds else ():  # a tied weight's second use has the factors of the first
                module, result = modules[node], results[node, step.parameter]
                entry = entries[module, tuple(step.adds)]
                for (own_a, own_b), (new_a, new_b) in zip(entry.apart(partial(getattr, module)), result.factors):
                    own_a.copy_(unstacked(new_a, module, own_a.shape))
                    own_b.copy_(new_b.reshape(own_b.shape))


def _wrong(title: str, *fixes: str) -> ApplyError:
    return ApplyError(Diagnostic("GP525", title, fixes=fixes))


def _not(name: Name, why: str) -> ApplyError:
    what = "these adapters" if name is None else quoted(name)
    fixes = ("combine others, or have them summed as they are: adapters(model).activate(...)",)
    return ApplyError(Diagnostic("GP527", f"{what} cannot be combined", text=(why,), fixes=fixes))
