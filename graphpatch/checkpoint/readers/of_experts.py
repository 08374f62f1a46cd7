"""Questions about the experts of a mixture: in stacks or one by one, by which names, and how many."""

from __future__ import annotations

from collections.abc import Iterator

from ..peft.moe import is_renamed
from .adapter import bare
from .case import Case, Predicate
from .experts import expert, names_of


def fused(case: Case) -> Iterator[str]:
    yield from (path for path in case.adapter.factors if path in case.adapter.fused)


def fused_outside(*kinds: str) -> Predicate:
    """Stacks of experts, for a model that the reader knows one by one."""
    return lambda case: () if case.kind.startswith(kinds) else fused(case)


def single_of(*kinds: str) -> Predicate:
    """Experts one by one, for a model that the reader knows as stacks."""

    def witnesses(case: Case) -> Iterator[str]:
        if case.kind.startswith(kinds):
            yield from (path for path in case.adapter.factors if expert(path) is not None)

    return witnesses


def half_a_pair_of(*kinds: str) -> Predicate:
    """One of the two parameters of a stack: plain `experts.lora_*` is taken for down_proj, whichever it is."""

    def witnesses(case: Case) -> Iterator[str]:
        for path in fused(case) if case.kind.startswith(kinds) else ():
            other = bare(path) if path != bare(path) else f"{path}.base_layer"
            if other not in case.adapter.factors:
                yield path

    return witnesses


def taken_for_experts(case: Case) -> Iterator[str]:
    """Linears of a dense layer that PEFT takes for those of experts, by their last name."""
    given = case.adapter.config.get("target_modules")
    named = {name.rpartition(".")[2] for name in given if isinstance(name, str)} if isinstance(given, list) else None
    for path in case.adapter.factors:
        if path in case.adapter.fused or expert(path) is not None or not is_renamed(case.kind, path):
            continue
        if named is None or path.rpartition(".")[2] in named:
            yield path


def named_as_dense(case: Case) -> Iterator[str]:
    """Experts whose projections are called as those of a dense layer are."""
    for path in case.adapter.factors:
        one = expert(path)
        if one is not None and one.name.endswith("_proj"):
            yield path


def not_as_in_the_files(case: Case) -> Iterator[str]:
    if case.tree is None:
        return
    names = names_of(case.tree)
    for path in case.adapter.factors:
        one = expert(path)
        if one is None or one.role is None:
            continue
        block = one.block
        if names.module and block.endswith(f".{names.module}"):
            block = block.removesuffix(names.module) + names.file
        wanted = f"{block}.experts.{one.number}.{names.of(one.role)}"
        if wanted != path:
            yield f"{path} is called {wanted} there"


def some_missing(case: Case) -> Iterator[str]:
    """Some of a layer's experts, where all are stacked into one tensor."""
    held: dict[tuple[str, str], set[int]] = {}
    for path in case.adapter.factors:
        if one := expert(path):
            held.setdefault((one.block, one.name), set()).add(one.number)
    most = max((max(numbers) + 1 for numbers in held.values()), default=0)
    names = {name for _, name in held}
    for (block, name), numbers in held.items():
        if len(numbers) < most:
            yield f"{block}.experts has {len(numbers)} {name} of {most}"
    if names and len(names) < 3:
        yield f"of the three projections there are only {', '.join(sorted(names))}"
