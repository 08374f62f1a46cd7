"""An adapter's files, of a model that stands on several ranks: written as those of the whole, read at any layout.

Every function here is called on all ranks. Names are those of the whole model (layer 5 is layer 5 on any stage), and
tensors are whole, so the files are what one process would have written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import NamedTuple

from torch import Tensor, nn

from ..checkpoint.base import check_base
from ..checkpoint.fill import fill, random_state_kept, warn_of_moved
from ..checkpoint.intact import refuse_outgrown
from ..checkpoint.load import is_of, renamed
from ..checkpoint.moved import brought
from ..checkpoint.save import write_adapter
from ..checkpoint.saved import Saved
from ..checkpoint.tensors import Named, added_tensors, check, journal_of, moved_tensors, refuse_names, tensor_at
from ..patch.original import original_rules, unmarked
from ..patch.over_ranks import parts
from ..patch.patch import Patch, patches
from ..plan.plan import Plan
from ..plan.ruleset import RuleSet
from ..tree.tree import Tree
from .experts import experts_of, stack_of
from .over_ranks import apply, part_of, whole_tree
from .ranks import all_or_none, gathered, needs_whole, rank, told
from .sharding import share_of
from .unsharded import unsharded
from .weights import EMBEDDING
from .whole import expert_rank, numbered


class Whole(NamedTuple):
    """An adapter as one process would have it. Tensors are there on the first rank alone."""

    plan: Plan
    """On the whole model, as it was before any patch."""
    added: Named
    moved: Named


def save_adapter(patch: Patch | Sequence[Patch], directory: str | PathLike[str], hash_base: bool = False) -> None:
    """`graphpatch.save_adapter`; the first rank writes."""
    if hash_base:
        raise needs_whole("a hash of the base's bytes is")
    whole = whole_adapter(patch)
    all_or_none(lambda: write_adapter(whole.plan, whole.added, whole.moved, directory) if rank() == 0 else None)


def whole_adapter(patch: Patch | Sequence[Patch]) -> Whole:
    """What the patch (or those of this rank's virtual chunks) added to the whole model, put together.

    Raises what `save_adapter` does, on all ranks.
    """
    every = parts(patch)
    rules, trees = all_or_none(lambda: _original(every))
    first = every[0].record
    options = {"adapter": first["adapter"], "allow_import": first["allow_import"]}
    here, whole_one = whole_tree(trees), whole_tree([unsharded(tree) for tree in trees])
    as_here, plan = all_or_none(lambda: (rules.plan(here, **options), rules.plan(whole_one, **options)))

    def mine() -> dict[str, _Live]:
        found: dict[str, _Live] = {}
        for one, tree in zip(every, trees):
            added = {live.key: live for live in _added(one)}
            found |= added
            found |= _moved(one, part_of(as_here, tree), set(added))
        return found

    found = all_or_none(mine)
    whole = {key: live.whole().cpu() for key, live in found.items()}
    # Ranks of tensor parallelism have the same by now, as those of data parallelism had before: each is told once.
    names = told(list(whole))
    once = {key: value for key, value in whole.items() if next(at for at, n in enumerate(names) if key in n) == rank()}
    said = gathered((once, {key for key, live in found.items() if live.added}))
    tensors = {key: value for one, _ in said for key, value in one.items()}
    new = {key for _, one in said for key in one}
    tensors = {key: tensors[key] for key in _in_order(plan, list(tensors))}
    added = {key: value for key, value in tensors.items() if key in new}

    def look() -> None:
        for one in every if rank() == 0 else ():
            refuse_outgrown(one, plan, added)

    all_or_none(look)
    return Whole(plan, added, {key: value for key, value in tensors.items() if key not in new})


class _Live(NamedTuple):
    """A tensor of this rank."""

    key: str
    """Its name in the whole model."""
    module: nn.Module
    name: str
    """There."""
    tensor: Tensor
    added: bool = True

    def whole(self) -> Tensor:
        share = share_of(self.module, self.name)
        return self.tensor.detach() if share is None else share.whole(self.tensor)

    def cut(self, value: Tensor) -> Tensor:
        """This rank's part; of another shape than the whole has, all of it, which is told of where it is put in."""
        share = share_of(self.module, self.name)
        return value if share is None or tuple(value.shape) != share.shape else share.own(value)


def _original(every: Sequence[Patch]) -> tuple[RuleSet, list[Tree]]:
    for one in every:
        journal_of(one)
    found = [original_rules(one) for one in every]
    return found[0][0], [numbered(tree, expert_rank()) for _, tree in found]


def _added(patch: Patch) -> Iterator[_Live]:
    """Under the names of the whole model, as a patch over ranks gives them."""
    tree = Tree.of(patch.model, as_patched=True)
    here = dict(zip(numbered(tree, expert_rank()).paths, tree.paths))
    for key, tensor in added_tensors(patch).items():
        path, _, name = key.rpartition(".")
        yield _Live(key, patch.model.get_submodule(here.get(path, path)), name, tensor)


def _moved(patch: Patch, plan: Plan, taken: set[str]) -> dict[str, _Live]:
    """`plan` is this rank's part of the patch's."""
    found: dict[str, _Live] = {}
    assert plan.tree.modules is not None
    for key, tensor in moved_tensors(plan, patch.model, taken, _global(plan.tree, patch, brought(patch))).items():
        path, _, name = key.removeprefix("^").rpartition(".")
        node = plan.tree.find(path)
        assert node is not None
        module = plan.tree.modules[node]
        if path == "output_layer" and _is_copy(module, name):
            continue  # of what the first stage has
        experts = experts_of(module)
        if experts is not None and experts.group.size() > 1 and stack_of(module, name) is None:
            raise needs_whole(f"`{key}`, which trains and has another expert's number on other ranks, is")
        found[key] = _Live(key, module, name, tensor, added=False)
    return found


def _is_copy(module: nn.Module, name: str) -> bool:
    """Whether it is the weight by which the embedding and the output layer compute, on whatever stage each is."""
    return bool(getattr(module._parameters.get(name), "shared_embedding", False))


def _global(tree: Tree, patch: Patch, keys: frozenset[str]) -> frozenset[str]:
    """Names of base weights on this rank, as those of the whole model."""
    names = dict(zip(Tree.of(patch.model).paths, tree.paths))
    return frozenset(f"{names.get(path, path)}.{name}" for path, _, name in (key.rpartition(".") for key in keys))


def _in_order(plan: Plan, keys: Sequence[str]) -> list[str]:
    """In the order of the whole model's modules, as one process has them; of one module, as they are."""
    order = {path: at for at, path in enumerate(plan.tree.paths)}

    def place(key: str) -> int:
        path = key.removeprefix("^").rpartition(".")[0]
        while path not in order:  # of a module that was added to one of these
            path = path.rpartition(".")[0]
        return order[path]

    return sorted(keys, key=place)


# ── in ──


def load_adapter(
    model: nn.Module | Sequence[nn.Module],
    directory: str | PathLike[str],
    adapter: str | None = None,
    allow_import: str | Sequence[str] = (),
) -> Patch | list[Patch]:
    """`graphpatch.load_adapter`: a patch for a model, a list for a list of chunks."""
    several = isinstance(model, (list, tuple, nn.ModuleList))
    chunks: list[nn.Module] = list(model) if several else [model]  # type: ignore[arg-type, list-item]
    allowed = [allow_import] if isinstance(allow_import, str) else list(allow_import)

    def read() -> tuple[Saved, list[Tree]]:
        saved = Saved.read(directory)
        if saved.manifest.base.content is not None:
            raise needs_whole("the hash of a base's bytes that this adapter has is")
        return saved, [unsharded(numbered(Tree.of(chunk), expert_rank())) for chunk in chunks]

    saved, trees = all_or_none(read)
    whole = whole_tree(trees)
    name = saved.manifest.adapter if adapter is None else adapter

    def checked() -> Named:
        check_base(saved.made_on, whole, saved.keys, saved.folder)
        clean = unmarked(whole)
        recorded = saved.plan(clean, saved.manifest.adapter, allowed)
        saved.check_changes(recorded)
        return renamed(saved, recorded, clean, name)

    tensors = all_or_none(checked)
    same = [next((one for one in patches(c) if is_of(one, saved.manifest, name)), None) for c in chunks]
    there = [one for one in same if one is not None]
    if all(told(len(there) == len(chunks))):
        _fill(there, tensors, saved, remember=False)
        return there if several else there[0]
    with random_state_kept(chunks[0]):
        done = apply(chunks, saved.rules, adapter=name, allow_import=allowed, initialise=False)
    try:
        _fill(done, tensors, saved, remember=True)
    except BaseException:
        for one in reversed(done):
            one.revert()
        raise
    return done if several else done[0]


def load_weights(patch: Sequence[Patch], directory: str | PathLike[str], fit: bool) -> None:
    """`graphpatch.load_weights` of an adapter, for the patches of this rank's chunks, which are of the same rules."""

    def read() -> Saved:
        saved = Saved.read(directory)
        record = patch[0].record
        if fit or record["rules"] != saved.manifest.rules or record["adapter"] != saved.manifest.adapter:
            raise needs_whole("an adapter that is fitted into a patch of other rules is")
        return saved

    saved = all_or_none(read)
    _fill(patch, saved.tensors, saved, remember=False)


def _fill(every: Sequence[Patch], tensors: Mapping[str, Tensor], saved: Saved, remember: bool) -> None:
    """Put in what this rank has of it: on all ranks, or on none."""
    live = [{one.key: (name, one) for name, one in _places(patch, saved)} for patch in every]
    known = {key for rank_said in told([key for chunk in live for key in chunk]) for key in rank_said}

    def look() -> list[Named]:
        refuse_names(sorted(known - tensors.keys()), [key for key in tensors if key not in known], saved.folder)
        found = []
        for places in live:
            found.append({name: one.cut(tensors[key]) for key, (name, one) in places.items()})
            check(found[-1], {name: one.tensor for name, one in places.values()}, saved.folder)
        return found

    def put() -> None:
        for patch, places, mine in zip(every, live, cuts):
            moved = [name for name, one in places.values() if not one.added]
            if remember and moved and len(patches(patch.model)) > 1:
                warn_of_moved(saved.folder, moved)
            fill(patch, mine, saved.folder, remember=moved if remember else ())

    cuts = all_or_none(look)
    all_or_none(put)


def _places(patch: Patch, saved: Saved) -> Iterator[tuple[str, _Live]]:
    """What this rank has of the adapter's tensors, with the names by which `fill` knows them."""
    yield from ((one.key, one) for one in _added(patch))
    tree = unmarked(Tree.of(patch.model))
    whole = numbered(tree, expert_rank())
    assert tree.modules is not None
    for key in saved.manifest.tensors.base:
        path, _, name = key.removeprefix("^").rpartition(".")
        node, last = whole.find(path), whole.find("output_layer")
        if node is None and last is not None and f"{path}.{name}" == EMBEDDING and _is_copy(tree.modules[last], name):
            node = last
        if node is not None and (held := tensor_at((tree.modules[node], name))) is not None:
            mine = f"{tree.paths[node]}.{name}" if node else name
            yield f"^{mine}" if key[0] == "^" else mine, _Live(key, tree.modules[node], name, held, added=False)
