"""From the steps of a plan to changes ready to be made: whatever can be refused is refused here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from ..lang.diagnostics import ApplyError, Diagnostic, Error
from ..ops.op import Refusal
from ..plan.freeze import FREEZE, LEAVE, TRAIN, Grads
from ..rewrites.quantised import is_quantised
from ..rewrites.rewrite import Attributes, InPlace, Removal, Replacement, Weights, overrides
from ..tree.tree import Mark, Signature, Tree
from .change import AttributeChange, Change, DropChange, ModuleChange, WeightChange
from .config_change import ConfigChange
from .drift import drifted
from .fast_path import FastPathChange
from .imports import brief, load_permitted, load_rewrite
from .in_place import Factory, InPlaceChange
from .in_the_way import refuse_taken, refuse_uncalled, step_error, uncalled_already, uncalled_by
from .over_ranks import over_ranks
from .refuse import refuse_bypassed, refuse_class, refuse_offloaded

if TYPE_CHECKING:
    from ..plan.plan import Step


class Preflight:
    """Turns steps into changes, against one live tree."""

    def __init__(
        self,
        plan_id: str,
        tree: Tree,
        grads: Grads | None,
        allowed: Sequence[str],
        fresh: bool = False,
        initialise: bool = True,
    ):
        """`fresh`: the tree was taken of the model just now, so what a signature says holds for all its modules.
        `initialise`: what is added shall get values."""
        assert tree.modules is not None
        self.plan_id, self.tree, self.grads, self.allowed = plan_id, tree, grads, allowed
        self.modules: list[nn.Module] = tree.modules
        self.bare = fresh and not tree.marks
        """Fresh, and without a patch."""
        self.initialise = initialise
        self._device: torch.device | None = None

    def changes(self, steps: Sequence[Step]) -> list[Change]:
        """Raises `ApplyError` where a step cannot be carried out."""
        refuse_taken(self.tree, steps, self.bare)
        refuse_uncalled(self.tree, steps, {} if self.bare else uncalled_already(self.tree))
        changes: list[Change] = []
        for step in steps:
            rewrite = load_rewrite(step.rewrite, step.rule)
            mark = Mark(self.plan_id, step.rule, step.op.text(), step.slots, step.op.exclusive)
            if step.parameter is not None and not issubclass(rewrite, InPlace):
                raise step_error("GP515", f"`{step.op.op}` has no way to act on a parameter", step)
            if issubclass(rewrite, InPlace):
                changes += self._in_place(step, rewrite, mark)
            elif issubclass(rewrite, Attributes):
                changes.append(self._attributes(step, rewrite, mark))
            elif issubclass(rewrite, Weights):
                changes.append(self._weights(step, rewrite, mark))
            elif issubclass(rewrite, Removal):
                modules = [self.modules[node] for node in step.nodes]
                changes.append(DropChange(mark, step.nodes, modules, step.drops))
            elif issubclass(rewrite, Replacement):
                changes += self._replacement(step, rewrite, mark)
            else:
                raise step_error("GP515", f"{step.rewrite} is no rewrite", step)
        refuse_uncalled(self.tree, steps, uncalled_by(changes))
        # What is another module's parameter must be there first.
        return sorted(changes, key=lambda change: isinstance(change, InPlaceChange) and bool(change.shared))

    # ── in place ──
    def _in_place(self, step: Step, mixin: type[InPlace], mark: Mark) -> list[Change]:
        signature = self.tree.signature(step.nodes[0])
        modules = [self.modules[node] for node in step.nodes]
        kinds: set[type] = set()
        look = partial(self._look, step, modules, kinds)
        # On a large model each look at a module costs more than what is done to it. So where its signature says enough,
        # one of each class is looked at here, and what is left to ask is asked when a module's turn comes: a refusal
        # then takes back what was done.
        later = self.bare and "weight" in signature.parameters and not signature.notes and step.parameter is None
        some = dict(zip(map(type, modules), range(len(modules)))).values() if later else range(len(modules))
        devices = [look(at) for at in some]
        fast = all(_registers_plainly(cls) for cls in kinds)
        shared = () if step.adds else step.op.shares
        entry = mixin.entry(step.op) if step.parameter is None else mixin.entry(step.op, step.parameter)
        for at, module in enumerate(modules) if overrides(mixin, "check") else ():
            try:
                mixin.check(entry, module)
            except Refusal as refusal:
                raise self._refused(step, at, refusal) from None
        children = self._children(step, mixin, entry, modules)
        changes: list[Change] = []
        for trainable, members in self._by_flags(step).items():
            factories = [
                Factory(name, tuple(t.shape), getattr(torch, t.dtype), flag, t.buffer)
                for (name, t), flag in zip(step.adds.items(), trainable)
            ]
            changes.append(
                InPlaceChange(
                    mark,
                    [step.nodes[i] for i in members],
                    [modules[i] for i in members],
                    mixin,
                    entry,
                    tuple(step.adds),
                    factories,
                    self.initialise,
                    [] if later else [devices[i] for i in members],
                    fast,
                    _nth(look, members) if later else None,
                    shared=shared,
                    owners=[self._owner(step.nodes[i]) for i in members] if shared else (),
                    children=children,
                )
            )
        if overrides(mixin, "config_values"):
            changes += [ConfigChange(mark, module, mixin.config_values(entry, module)) for module in modules]
        return changes + self._fast_paths(step, mark)

    def _children(self, step: Step, mixin: type[InPlace], entry: Any, modules: Sequence[nn.Module]) -> tuple[str, ...]:
        """The names of the modules that each target gains; raises where one has something of that name."""
        with torch.device("meta"):
            names = tuple(mixin.submodules(entry, modules[0]))
        for at, module in enumerate(modules) if names else ():
            taken = [name for name in names if hasattr(module, name)]
            if taken:
                raise self._taken(step, at, taken[0])
        return names

    def _look(self, step: Step, modules: Sequence[nn.Module], kinds: set[type], at: int) -> torch.device:
        """Whether a module can be changed in place, and the device for what it gets."""
        module = modules[at]
        signature = self.tree.signature(step.nodes[at])
        own = module.__dict__
        if module.__class__ not in kinds:
            kinds.add(module.__class__)
            self._check_class(module, step, at, signature)
        held, buffers, children = own["_parameters"], own["_buffers"], own["_modules"]
        name = step.parameter or "weight"
        weight = held.get(name)
        if weight is not None:
            if weight.__class__ is not nn.Parameter:
                self._refuse_sharded(weight, step, at)
            if name not in signature.parameters or weight.shape != signature.parameters[name].shape:
                raise drifted(self.tree, Tree.of(self.modules[0]))
        if "forward" in own or "_hf_hook" in own:
            refuse_bypassed(module, self._path(step, at), step.rule)
            refuse_offloaded(module, self._path(step, at), step.rule)
        for added in step.adds or step.op.shares:
            if added in held or added in own or added in buffers or added in children:
                raise self._taken(step, at, added)
        return self._device_of(module) if weight is None else weight.device

    def _owner(self, node: int) -> nn.Module:
        """The module that has the weight of this one first."""
        return self.modules[self.tree.first_of[node, "weight"][0]]

    def _by_flags(self, step: Step) -> dict[tuple[bool, ...], Sequence[int]]:
        """The targets by which of their new parameters shall train."""
        born = tuple(t.trainable for t in step.adds.values())
        if self.grads is None or not born:
            return {born: range(len(step.nodes))}
        state = self.grads.added
        flags = {LEAVE: born, FREEZE: (False,) * len(born), TRAIN: (True,) * len(born)}
        said = set(map(state.__getitem__, step.nodes))
        if len(said) == 1:
            return {flags[said.pop()]: range(len(step.nodes))}
        groups: dict[tuple[bool, ...], list[int]] = defaultdict(list)
        for i, node in enumerate(step.nodes):
            groups[flags[state[node]]].append(i)
        return dict(groups)

    def _check_class(self, module: nn.Module, step: Step, at: int, signature: Signature) -> None:
        refuse_class(module, partial(self._path, step, at), step.rule)
        cls = type(module)
        for name in step.adds:
            if hasattr(cls, name):
                raise self._taken(step, at, name)
        base = getattr(cls, "_graphpatch_base", cls)
        if signature.mro and f"{base.__module__}.{base.__qualname__}" != signature.mro[0]:
            raise drifted(self.tree, Tree.of(self.modules[0]))

    def _refuse_sharded(self, weight: Any, step: Step, at: int) -> None:
        if "DTensor" in (c.__name__ for c in type(weight).__mro__):
            raise step_error(
                "GP511",
                f"the weight of `{self._path(step, at)}` is a DTensor, already sharded",
                step,
                fix="patch before fully_shard or parallelize_module",
            )

    def _fast_paths(self, step: Step, mark: Mark) -> list[Change]:
        """The encoders and their layers above the targets, which must be kept from computing past their children."""
        if not any(_is_of_encoder(s) for s in self.tree.signatures):
            return []
        layers: dict[int, nn.Module] = {}
        for node in step.nodes:
            above = node
            while above >= 0:
                if _is_of_encoder(self.tree.signature(above)):
                    layers[above] = self.modules[above]
                above = self.tree.parents[above]
        return [FastPathChange(mark, list(layers), list(layers.values()))] if layers else []

    # ── the other two ──
    def _attributes(self, step: Step, rewrite: type[Attributes], mark: Mark) -> Change:
        modules = [self.modules[node] for node in step.nodes]
        values = [rewrite.values(step.op, module) for module in modules]
        originals: list[Mapping[str, Any]] = []
        for at, (module, mine) in enumerate(zip(modules, values)):
            missing = [name for name in mine if name not in module.__dict__]
            if missing:
                raise step_error("GP516", f"`{self._path(step, at)}` holds no plain attribute `{missing[0]}`", step)
            originals.append({name: module.__dict__[name] for name in mine})
        return AttributeChange(mark, step.nodes, modules, values, originals)

    def _weights(self, step: Step, rewrite: type[Weights], mark: Mark) -> Change:
        modules = [self.modules[node] for node in step.nodes]
        for at in range(len(modules)):
            if self._look(step, modules, set(), at).type == "meta":
                why = f"`{self._path(step, at)}` is on the meta device, and has no values"
                raise step_error("GP542", why, step, fix="load the base's weights first; a plan needs none")
            weight = modules[at]._parameters.get("weight")
            if is_quantised(weight):  # a tree has only the dtype that it computes in
                why = f"the weight of `{self._path(step, at)}` is quantised already ({type(weight).__name__})"
                raise step_error(
                    "GP462", why, step, fix="leave it out: lora(...) alone takes a quantised base as it is"
                )
        return WeightChange(mark, step.nodes, modules, partial(rewrite.values, step.op), rewrite.keeps(step.op))

    def _replacement(self, step: Step, rewrite: type[Replacement], mark: Mark) -> list[Change]:
        path = rewrite.imports(step.op)
        cls = load_permitted(path, self.allowed, step.rule) if path else None
        originals = [self.modules[node] for node in step.nodes]
        guard = over_ranks(self.modules[0], "replacing")
        new: list[nn.Module] = []
        for at, module in enumerate(originals):
            refuse_bypassed(module, self._path(step, at), step.rule)
            refuse_offloaded(module, self._path(step, at), step.rule)
            try:
                made = rewrite.build(step.op, cls, module, self._device_of(module))
                if guard is not None and isinstance(made, nn.Module):
                    guard(module, made)
            except Error:
                raise
            except Refusal as refusal:
                raise self._refused(step, at, refusal) from None
            except Exception as error:
                raise step_error(
                    "GP506", f"{path} could not be built for `{self._path(step, at)}`", step, brief(error)
                ) from error
            if not isinstance(made, nn.Module):
                raise step_error("GP506", f"{path} makes {type(made).__name__}, no torch.nn.Module", step)
            new.append(made)
        places = self._places(step.nodes)
        changes: list[Change] = [ModuleChange(mark, step.nodes, originals, new, places)]
        for at, (node, module) in enumerate(zip(step.nodes, originals)):
            around = self._configured(node)
            if around is not None:
                try:
                    values = rewrite.config_values(step.op, module, around.__dict__["config"])
                except Refusal as refusal:
                    raise self._refused(step, at, refusal) from None
                changes.append(ConfigChange(mark, around, values))
        return changes

    def _configured(self, node: int) -> nn.Module | None:
        """The outermost module that has the config which is nearest around a node."""
        above = [self.modules[n] for n in self.tree.ancestors(node)[:-1]]
        configs = [module.__dict__["config"] for module in above if "config" in module.__dict__]
        return next(m for m in above if m.__dict__.get("config") is configs[-1]) if configs else None

    def _places(self, nodes: list[int]) -> list[list[tuple[nn.Module, str]]]:
        tree, places = self.tree, {node: [(self.tree.parents[node], self.tree.names[node])] for node in nodes}
        for node, parent, name in tree.edges:
            if node in places:
                places[node].append((parent, name))
        return [[(self.modules[parent], name) for parent, name in places[node]] for node in nodes]

    def _taken(self, step: Step, at: int, name: str) -> ApplyError:
        return step_error("GP502", f"`{self._path(step, at)}` has something called `{name}` already", step)

    def _refused(self, step: Step, at: int, refusal: Refusal) -> ApplyError:
        title = f"`{self._path(step, at)}` cannot take {step.op.op}"
        text = (f"{step.rule}   {step.op.text()}", str(refusal))
        return ApplyError(Diagnostic(refusal.code, title, text=text, fixes=refusal.fixes))

    def _path(self, step: Step, at: int) -> str:
        return self.tree.paths[step.nodes[at]] or "^"

    def _device_of(self, module: nn.Module) -> torch.device:
        """Of the module's own first tensor, else of the model's."""
        for tensors in (module.parameters(), module.buffers()):
            for tensor in tensors:
                return tensor.device
        if self._device is None:
            self._device = next((p.device for p in self.modules[0].parameters()), torch.get_default_device())
        return self._device


def _nth(look: Callable[[int], Any], members: Sequence[int]) -> Callable[[int], Any]:
    return lambda at: look(members[at])


def _registers_plainly(cls: Any) -> bool:
    """Whether registering a parameter comes down to writing it into `_parameters`."""
    return (
        cls.__setattr__ is nn.Module.__setattr__
        and cls.register_parameter is nn.Module.register_parameter
        and not torch_module._global_parameter_registration_hooks
    )


def _is_of_encoder(signature: Signature) -> bool:
    return not _ENCODERS.isdisjoint(signature.mro)


_ENCODERS = frozenset(f"torch.nn.modules.transformer.TransformerEncoder{layer}" for layer in ("", "Layer"))
