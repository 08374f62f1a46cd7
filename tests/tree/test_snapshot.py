"""The tree of a live model: identity, ties, cycles, wrappers, facts."""

from __future__ import annotations

import collections
import dataclasses
import enum
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from graphpatch.lang.diagnostics import Error
from graphpatch.tree.tree import Mark, Tensor, Tree

from .scopes import hits, paths


class Block(nn.Module):
    def __init__(self, at: int = 0):
        super().__init__()
        self.layer_idx = at
        self.q_proj = nn.Linear(4, 4, bias=False)
        self.norm = nn.LayerNorm(4)


class LM(nn.Module):
    def __init__(self, layers: int = 3):
        super().__init__()
        self.embed_tokens = nn.Embedding(10, 4)
        self.layers = nn.ModuleList([Block(at) for at in range(layers)])
        self.lm_head = nn.Linear(4, 10, bias=False)


def test_the_nodes_are_those_of_named_modules_in_their_order():
    model = LM()
    tree = Tree.of(model)
    assert list(zip(tree.paths, tree.modules)) == list(model.named_modules())
    for node, module in enumerate(tree.modules):
        assert [tree.modules[c] for c in tree.children(node)] == list(module.children())
        assert tree.ends[node] - node == len(list(module.modules()))
        assert {n: (tuple(p.shape), str(p.dtype)) for n, p in module.named_parameters(recurse=False)} == {
            n: (t.shape, f"torch.{t.dtype}") for n, t in tree.signature(node).parameters.items()
        }
    assert tree.numel() == sum(p.numel() for p in model.parameters())
    assert [tree.lengths[n] for n in range(len(tree)) if tree.indices[n] >= 0] == [3, 3, 3]
    assert tree.title == "LM"


def test_modules_that_look_alike_share_a_signature():
    tree = Tree.of(nn.Sequential(*[nn.Linear(4, 4) for _ in range(5)], nn.Linear(4, 4, bias=False)))
    assert len(tree.signatures) == 3
    assert tree.signature(1).mro == ("torch.nn.modules.linear.Linear", "torch.nn.modules.module.Module")
    assert tree.signature(1).attributes == {"in_features": 4, "out_features": 4}
    # A parameter that is registered as None can be asked for: `where bias is none`.
    assert tree.signature(6).attributes["bias"] is None


def test_a_tied_parameter_is_one_parameter():
    model = LM()
    model.lm_head.weight = model.embed_tokens.weight
    tree = Tree.of(model)
    head, embed = tree.find("lm_head"), tree.find("embed_tokens")
    assert tree.ties == [((head, "weight"), (embed, "weight"))]
    assert tree.numel() == sum(p.numel() for p in model.parameters())
    assert tree.parameter_paths((embed, "weight")) == ["embed_tokens.weight", "lm_head.weight"]
    assert tree.find_parameter("lm_head.weight") == (embed, "weight")
    for path in ("lm_head.weight", "embed_tokens.weight", "weight", "{lm_head,embed_tokens}.weight"):
        assert (embed, "weight") in hits(tree, path).parameters
    assert hits(tree, "{lm_head,embed_tokens}.weight").parameters == [(embed, "weight")]


def test_a_tied_module_is_one_node_and_matches_by_any_path():
    model = nn.ModuleDict({"a": Block(), "b": nn.ModuleDict()})
    model["b"]["again"] = model["a"]
    tree = Tree.of(model)
    assert tree.paths.count("a") == 1 and tree.find("b.again") == tree.find("a")
    assert tree.all_paths(tree.find("a.q_proj")) == ["a.q_proj", "b.again.q_proj"]
    assert paths(tree, "^b.again.q_proj") == paths(tree, "q_proj") == paths(tree, r"/b\.again\.q_proj/") == ["a.q_proj"]
    assert len(tree) == len(list(model.modules()))


def test_siblings_that_are_one_module_are_one_node():
    block = Block()
    tree = Tree.of(nn.ModuleList([block, block, Block()]))
    assert tree.paths[:1] + [p for p in tree.paths if "." not in p and p] == ["", "0", "2"]
    assert [tree.lengths[n] for n in tree.children(0)] == [3, 3]
    assert hits(tree, "^{1}").nodes == [tree.find("0")]


def test_a_cycle_ends():
    model = LM(2)
    model.layers[0]._modules["parent"] = model
    model.layers[1]._modules["me"] = model.layers[1]
    tree = Tree.of(model)
    assert len(tree) == len(list(model.named_modules()))
    assert len(tree.edges) == 2 and tree.places == {}
    assert paths(tree, "layers[*].**.q_proj") == ["layers.0.q_proj", "layers.1.q_proj"]
    assert Tree.from_text(tree.to_text()).edges == tree.edges


def test_a_deep_model_does_not_recurse():
    root = at = nn.Module()
    for _ in range(3000):
        at._modules["x"] = nn.Module()
        at = at._modules["x"]
    tree = Tree.of(root)
    assert len(tree) == 3001 and tree.paths[-1].count(".") == 2999
    assert hits(tree, "x.x").nodes == list(range(2, 3001))


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner


def wrapper(name: str, child: str, inner: nn.Module) -> nn.Module:
    """A wrapper of that class name, as torch's, without a process group."""
    made = type(name, (nn.Module,), {})()
    setattr(made, child, inner)
    return made


@pytest.mark.parametrize(
    "name, child",
    [
        ("DistributedDataParallel", "module"),
        ("DataParallel", "module"),
        ("FullyShardedDataParallel", "_fsdp_wrapped_module"),
    ],
)
def test_wrappers_leave_no_segment(name, child):
    model = LM()
    inside = wrapper(name, child, model)
    tree = Tree.of(inside)
    assert tree.paths == Tree.of(model).paths and tree.modules[0] is model
    assert tree.wrappers == [name]
    assert f"wrapped:{name}" in tree.signature(0).notes
    assert tree.fingerprint == Tree.of(model).fingerprint
    nested = Tree.of(Wrapped(wrapper(name, child, model)))
    assert nested.wrappers == [] and nested.modules[1] is model
    assert paths(nested, "^inner.lm_head") == ["inner.lm_head"]


def test_torch_compile_leaves_no_segment_anywhere():
    model = LM()
    plain = Tree.of(model)
    compiled = Tree.of(torch.compile(model))
    assert compiled.paths == plain.paths and compiled.modules[0] is model
    assert compiled.wrappers == ["OptimizedModule"] and compiled.fingerprint == plain.fingerprint
    model.layers[1] = torch.compile(model.layers[1])
    inside = Tree.of(model)
    assert inside.paths == plain.paths and inside.fingerprint == plain.fingerprint
    assert paths(inside, "layers[1].q_proj") == ["layers.1.q_proj"]


def test_fsdp_classes_are_seen_through():
    FSDPModule = type("FSDPModule", (), {})
    block = Block()
    block.__class__ = type("FSDPBlock", (FSDPModule, Block), {})
    tree = Tree.of(nn.Sequential(block))
    assert "fsdp" in tree.signature(1).notes
    assert tree.signature(1).cls == "Block"
    assert tree.fingerprint == Tree.of(nn.Sequential(Block())).fingerprint


class Color(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    LOW = 1


def test_attributes_are_scalars_and_tuples():
    module = nn.Module()
    values = {
        "a": 1, "b": True, "c": 1.0, "d": None, "e": "x", "f": [1, [2, 3]], "g": (1, None),
        "h": torch.float16, "i": torch.Size([2, 3]), "j": Color.RED, "k": Level.LOW,
        "inf": math.inf, "nan": math.nan,
    }  # fmt: skip
    for name, value in values.items():
        setattr(module, name, value)
    for name, value in {
        "fn": len, "device": torch.device("cpu"), "tensor": torch.ones(2), "mapping": {"a": 1}, "_private": 3,
        "mixed": [1, object()], "long": list(range(10_000)), "set": {1},
    }.items():  # fmt: skip
        module.__dict__[name] = value
    attributes = dict(Tree.of(module).signature(0).attributes)
    assert math.isnan(attributes.pop("nan"))
    assert attributes == {
        "a": 1, "b": True, "c": 1.0, "d": None, "e": "x", "f": (1, (2, 3)), "g": (1, None),
        "h": "float16", "i": (2, 3), "j": "red", "k": 1, "inf": math.inf,
    }  # fmt: skip
    assert type(attributes["b"]) is bool and type(attributes["c"]) is float and type(attributes["k"]) is int


@pytest.mark.parametrize("one, other", [(1, True), (1, 1.0), ((1,), (True,)), (0, False), ("1", 1)])
def test_equal_values_of_different_types_are_different_facts(one, other):
    a, b = nn.Module(), nn.Module()
    a.x, b.x = one, other
    tree = Tree.of(nn.Sequential(a, b))
    assert [repr(tree.signature(n).attributes["x"]) for n in (1, 2)] == [repr(one), repr(other)]


def test_properties_and_methods_never_run():
    class Touchy(nn.Module):
        @property
        def rank(self):
            raise AssertionError("a property was read")

        def __getattr__(self, name):
            raise AssertionError(f"{name} was asked for")

        def __setattr__(self, name, value):
            object.__setattr__(self, name, value) if name == "plain" else super().__setattr__(name, value)

        def named_children(self):
            raise AssertionError("named_children was called")

        def __eq__(self, other):
            raise AssertionError("compared")

        __hash__ = nn.Module.__hash__

    touchy = Touchy()
    touchy.plain = 3
    tree = Tree.of(nn.Sequential(touchy, touchy))
    assert tree.signature(1).attributes == {"plain": 3}
    assert tree.edges == [(1, 0, "1")]


class HFConfig:
    def __init__(self):
        self.hidden_size = 8

    def to_dict(self):
        return {
            "hidden_size": self.hidden_size, "dtype": torch.bfloat16, "act": len, "color": Color.RED,
            "nested": {"rope": [1.0, 2]}, "inf": math.inf, "text_config": self.__class__ and {"a": (1, 2)},
        }  # fmt: skip


@dataclasses.dataclass
class MegatronConfig:
    num_layers: int = 2
    activation_func: object = torch.nn.functional.gelu
    params_dtype: torch.dtype = torch.float32


def test_configs_are_plain_data_and_stored_once():
    model = LM()
    model.config = HFConfig()
    for layer in model.layers:
        layer.config = model.config
    model.layers[0].q_proj.config = MegatronConfig()
    model.embed_tokens.config = {"a": 1}
    tree = Tree.of(model)
    assert tree.config_of(tree.find("lm_head")) == tree.config_of(0) == {
        "hidden_size": 8, "dtype": "bfloat16", "color": "red", "nested": {"rope": [1.0, 2]}, "inf": "inf",
        "text_config": {"a": [1, 2]},
    }  # fmt: skip
    assert tree.config_of(tree.find("layers.0.q_proj")) == {"num_layers": 2, "params_dtype": "float32"}
    assert tree.config_of(tree.find("embed_tokens")) == {"a": 1}
    assert len(tree.configs) == 3


@pytest.mark.parametrize("config", [SimpleNamespace(a=1), "text", 3, None, len, object()])
def test_what_is_no_config_is_left_out(config):
    model = nn.Module()
    model.config = config
    assert Tree.of(model).configs == []


def test_a_config_that_raises_is_no_config():
    class Broken:
        def to_dict(self):
            raise RuntimeError("no")

    model = nn.Module()
    model.config = Broken()
    assert Tree.of(model).configs == []


def test_notes_tell_of_what_stands_in_front_of_a_forward():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].forward = lambda x: x
    model[1]._hf_hook = object()
    parametrize.register_parametrization(model[2], "weight", nn.Identity())
    tree = Tree.of(model)
    notes = [set(tree.signature(tree.find(str(at))).notes) for at in range(4)]
    assert notes == [{"forward"}, {"hf_hook"}, {"parametrized"}, set()]
    assert paths(tree, "^*:Linear") == ["0", "1", "2", "3"]
    assert tree.find_parameter("2.parametrizations.weight.original") is not None


def test_lazy_modules_have_no_shape_yet():
    tree = Tree.of(nn.Sequential(nn.LazyLinear(4)))
    assert tree.signature(1).parameters["weight"] == Tensor((), "uninitialized")
    assert tree.numel() == 0


def test_odd_containers_and_names():
    model = nn.Module()
    model.plist = nn.ParameterList([nn.Parameter(torch.zeros(2)) for _ in range(11)])
    model.pdict = nn.ParameterDict({"to q": nn.Parameter(torch.zeros(3))})
    model.blocks = nn.ModuleDict({"3": nn.Linear(2, 2), "to q": nn.Linear(2, 2), "a-b": nn.Linear(2, 2)})
    model.register_buffer("table", torch.zeros(4))
    tree = Tree.of(model)
    assert paths(tree, "plist[1]") == ["plist.1"]
    assert paths(tree, "plist[-2:]") == ["plist.9", "plist.10"]
    assert paths(tree, 'pdict."to q"') == ["pdict.to q"]
    assert paths(tree, "blocks[3]") == ["blocks.3"]
    assert paths(tree, 'blocks."a-b"') == ["blocks.a-b"]
    assert tree.signature(0).buffers == {"table": Tensor((4,), "float32", False)}
    assert Tree.from_text(tree.to_text()).paths == tree.paths


def test_an_old_or_foreign_module_dict_is_read_too():
    model = LM()
    model.__dict__["_modules"] = collections.OrderedDict(model._modules)
    assert Tree.of(model).paths == Tree.of(LM()).paths
    script = torch.jit.script(nn.Sequential(nn.Linear(2, 2)))
    assert Tree.of(script).paths == ["", "0"]
    broken = nn.Module.__new__(nn.Module)
    assert len(Tree.of(nn.Sequential(nn.Linear(2, 2)))) == 2 and len(Tree.of(broken)) == 1


def test_only_modules_have_trees():
    with pytest.raises(Error) as error:
        Tree.of({"a": 1})
    assert error.value.code == "GP430"


def test_tensor_subclasses_keep_their_shapes():
    class Quantized(torch.Tensor):
        pass

    linear = nn.Linear(3, 2)
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Quantized))
    assert Tree.of(linear).signature(0).parameters["weight"] == Tensor((2, 3), "float32")


# ── patched models ──


def patched(module: nn.Module, **record) -> None:
    made = SimpleNamespace(marks=(), added=set(), attributes={}, dropped={}, original=None)
    made.__dict__.update(record)
    module.__dict__["_graphpatch"] = made


def test_the_tree_of_a_patched_model_is_the_original_tree_plus_marks():
    model = LM()
    before = Tree.of(model)
    linear = model.layers[1].q_proj
    mark = Mark("1", "lora.rules:5", "lora(rank=2)", frozenset({"lora"}))
    linear.lora_A = nn.Parameter(torch.zeros(2, 4))
    linear.extra = nn.Linear(2, 2)
    linear.register_buffer("count", torch.zeros(1))
    linear.out_features = 99
    linear.rank = 2
    linear.__class__ = type("Linear", (nn.Linear,), {"_graphpatch_base": nn.Linear})
    patched(
        linear, marks=(mark,), added={"lora_A", "extra", "count", "rank"}, attributes={"out_features": 4}
    )  # fmt: skip
    tree = Tree.of(model)
    assert tree.marks == {tree.find("layers.1.q_proj"): (mark,)}
    assert tree.fingerprint == before.fingerprint
    assert tree.signatures == before.signatures and tree.paths == before.paths
    assert Tree.from_text(tree.to_text()).marks == tree.marks


def test_a_module_that_took_a_place_shows_what_was_there():
    model = LM()
    before = Tree.of(model)
    original = model.layers[2]
    first = Mark("1", "a:1", "wrap", frozenset())
    second = Mark("2", "b:1", "lora", frozenset({"lora"}))
    patched(original, marks=(second,))
    outer = Wrapped(original)
    patched(outer, marks=(first,), original=original)
    model.layers[2] = outer
    tree = Tree.of(model)
    assert tree.paths == before.paths and tree.fingerprint == before.fingerprint
    assert tree.modules[tree.find("layers.2")] is original
    assert tree.marks == {tree.find("layers.2"): (first, second)}


def test_a_lightning_module_lends_its_anchor_to_its_model():
    class LightningModule(nn.Module):
        pass

    lit = LightningModule()
    lit.net = LM()
    lit.net.config = {"a": 1}
    lit.loss = nn.CrossEntropyLoss()
    tree = Tree.of(lit)
    assert paths(tree, "^layers[0]") == ["net.layers.0"]
    assert paths(tree, "^net.lm_head") == paths(tree, "^lm_head") == ["net.lm_head"]
    assert paths(tree, "^") == ["net"]
    assert paths(tree, "^head") == []
    lit.teacher = LM()
    lit.teacher.config = {"a": 1}
    assert paths(Tree.of(lit), "^layers[0]") == [] and paths(Tree.of(lit), "^") == [""]
