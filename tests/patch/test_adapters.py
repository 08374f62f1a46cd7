"""Several adapters on one model: which are summed, how much of each, and which of them train."""

from __future__ import annotations

import copy
import pickle
import warnings

import peft
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import graphpatch
from tests.patch.common import patch, refused, state
from tests.toys import LM

IDS = torch.arange(12).view(2, 6) % 32
QV = "patch {q,v}_proj with lora(rank=%d, alpha=8)\nfreeze ** except @new"


def lm() -> LM:
    torch.manual_seed(0)
    return LM(layers=2).eval()


def fill(handle: graphpatch.Patch, seed: int) -> graphpatch.Patch:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in handle.adapter_state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return handle


def several(model: nn.Module, names=(None, "math", "code")) -> graphpatch.Adapters:
    for at, name in enumerate(names):
        fill(patch(model, QV % (2 + at), adapter=name), at)
    return graphpatch.adapters(model)


def refusal(code: str, call) -> str:
    with pytest.raises(graphpatch.ApplyError) as caught:
        call()
    assert caught.value.code == code, str(caught.value)
    return str(caught.value)


# ── which are summed ──


def test_the_active_ones_are_summed_and_no_others():
    model = lm()
    base, adapters = model(IDS), several(model)
    assert adapters.names == adapters.active == (None, "math", "code")
    every = model(IDS)
    for names in [("math",), (None, "code"), ()]:
        adapters.activate(*names)
        assert adapters.active == names
        alone = lm()
        for at, name in enumerate(adapters.names):
            if name in names:
                fill(patch(alone, QV % (2 + at), adapter=name), at)
        assert torch.equal(model(IDS), alone(IDS) if names else base)
    # In whatever order they are named, the sum is the same to the last bit.
    adapters.activate("code", None, "math")
    assert torch.equal(model(IDS), every)
    adapters.deactivate("math")
    assert adapters.active == (None, "code")
    adapters.deactivate()
    assert adapters.active == () and torch.equal(model(IDS), base)


def test_they_equal_those_of_peft():
    def built():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()

    theirs, mine = peft.get_peft_model(built(), peft.LoraConfig(r=3, target_modules=["0", "2"]), "math"), built()
    theirs.add_adapter("code", peft.LoraConfig(r=2, lora_alpha=5, target_modules=["2"]))
    rules = {"math": "patch ^{0,2} with lora(rank=3, alpha=8)", "code": "patch ^2 with lora(rank=2, alpha=5)"}
    for seed, (name, text) in enumerate(rules.items()):
        handle = fill(patch(mine, text, adapter=name), seed)
        for key, tensor in handle.adapter_state_dict().items():
            path, _, factor = key.removesuffix(f"_{name}").partition(".")
            getattr(theirs.base_model.model[int(path)], factor)[name].weight.data.copy_(tensor)
    theirs.eval()
    x, adapters = torch.randn(5, 8), graphpatch.adapters(mine)
    for names in ["math"], ["code"], ["math", "code"]:
        theirs.base_model.set_adapter(names)
        adapters.activate(*names)
        torch.testing.assert_close(mine(x), theirs(x))
    theirs.base_model.model[2].set_scale("code", 0.25)
    adapters.weights({"code": 0.25})
    torch.testing.assert_close(mine(x), theirs(x))
    rows = ["math", "code", "__base__", "code", "math"]
    with adapters.per_sample([None if row == "__base__" else row for row in rows]):
        mixed = mine(x)
    torch.testing.assert_close(mixed, theirs(x, adapter_names=rows))
    theirs.delete_adapter("math")
    adapters.delete("math")
    theirs.base_model.set_adapter("code")
    torch.testing.assert_close(mine(x), theirs(x))


def test_weights_multiply_updates_and_touch_no_factor():
    model = lm()
    adapters = several(model, ("math", "code"))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert adapters.weights({"math": 0.5}) == {"math": 0.5, "code": 1.0} == adapters.weights()
    halved = lm()
    fill(patch(halved, QV.replace("alpha=8", "alpha=4") % 2, adapter="math"), 0)
    fill(patch(halved, QV % 3, adapter="code"), 1)
    torch.testing.assert_close(model(IDS), halved(IDS))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    adapters.weights({"math": 0.0})
    adapters.deactivate("code")
    assert torch.equal(model(IDS), lm()(IDS))  # 0 is off
    adapters.weights({"math": 1})
    adapters.activate("math", "code")
    assert torch.equal(model(IDS), several_output())


def several_output() -> torch.Tensor:
    model = lm()
    several(model, ("math", "code"))
    return model(IDS)


def test_the_state_survives_deepcopy_and_pickle_and_is_the_copys_own():
    model = lm()
    adapters = several(model)
    adapters.activate("math")
    adapters.weights({"math": -2.0})
    for twin in copy.deepcopy(model), pickle.loads(pickle.dumps(model)):
        of_twin = graphpatch.adapters(twin)
        assert of_twin.active == ("math",) and of_twin.weights() == adapters.weights()
        assert torch.equal(twin(IDS), model(IDS))
        of_twin.activate(*of_twin.names)
        assert not torch.equal(twin(IDS), model(IDS)) and adapters.active == ("math",)
        for handle in reversed(graphpatch.patches(twin)):
            handle.revert()
        assert torch.equal(twin(IDS), lm()(IDS))


def test_disabled_nests_with_activate():
    model = lm()
    base = model(IDS)
    math, code = (fill(patch(model, QV % 2, adapter=name), at) for at, name in enumerate(("math", "code")))
    adapters = graphpatch.adapters(model)
    both = model(IDS)
    adapters.activate("math")
    alone = model(IDS)
    adapters.activate("math", "code")
    with math.disabled():
        adapters.activate("math")
        assert torch.equal(model(IDS), base) and adapters.active == ("math",)
        with code.disabled():
            adapters.activate("math", "code")
            assert torch.equal(model(IDS), base)
        adapters.activate("math")
    assert torch.equal(model(IDS), alone)
    with code.disabled():
        adapters.activate("code", "math")
        assert torch.equal(model(IDS), alone)
    assert torch.equal(model(IDS), both)
    with math.disabled():
        code.revert()  # what is off keeps its mixin
    assert torch.equal(model(IDS), alone)


def test_a_patch_that_is_off_reverts_and_is_saved(tmp_path):
    model = lm()
    before = state(model)
    math, code = (fill(patch(model, QV % 2, adapter=name), at) for at, name in enumerate(("math", "code")))
    adapters = graphpatch.adapters(model)
    expected = math.adapter_state_dict()
    adapters.deactivate()
    adapters.weights({"math": 3.0})
    graphpatch.save_adapter(math, tmp_path / "math")
    fresh = lm()
    loaded = graphpatch.load_adapter(fresh, tmp_path / "math")
    for key, tensor in loaded.adapter_state_dict().items():
        assert torch.equal(tensor, expected[key])
    code.revert()
    math.revert()
    assert state(model) == before


def test_what_adds_to_an_adapter_that_is_off_is_off_too():
    model = lm()
    base = model(IDS)
    patch(model, "patch q_proj with lora(rank=2)", adapter="math")
    graphpatch.adapters(model).deactivate("math")
    fill(patch(model, "patch o_proj with lora(rank=2)", adapter="math"), 1)
    adapters = graphpatch.adapters(model)
    assert adapters.names == ("math",) and adapters.active == () and torch.equal(model(IDS), base)
    assert len(adapters.patches("math")) == 2
    adapters.activate("math")
    assert not torch.equal(model(IDS), base)
    adapters.delete("math")
    assert graphpatch.patches(model) == [] and torch.equal(model(IDS), base)


def test_only_adapters_are_switched_and_one_patch_may_bring_two():
    model = lm()
    handle = patch(
        model,
        'patch q_proj with lora(rank=2, adapter="a")\npatch v_proj with lora(rank=2, adapter="b")\n'
        "patch o_proj with scale.output(2.0)",
    )
    fill(handle, 0)
    adapters = graphpatch.adapters(model)
    assert adapters.names == ("a", "b")
    scaled = lm()
    patch(scaled, "patch o_proj with scale.output(2.0)")
    adapters.activate()
    assert torch.equal(model(IDS), scaled(IDS))
    message = refusal("GP546", lambda: adapters.delete("a"))
    assert "`a` came with `b` in one patch" in message
    adapters.delete("a", "b")
    assert torch.equal(model(IDS), lm()(IDS))


def test_merged_ones_stay_until_they_are_taken_out():
    model = lm()
    base, adapters = model(IDS), several(model, ("math", "code"))
    adapters.weights({"math": 0.5})
    both = model(IDS)
    math = adapters.patches("math")[0]
    math.merge()
    torch.testing.assert_close(model(IDS), both)
    before = state(model)
    for call in (
        lambda: adapters.activate("code"),
        lambda: adapters.weights({"code": 0.1, "math": 2}),
        lambda: adapters.per_sample(["math", "code"]).__enter__(),
    ):
        assert "`math` is merged into the weights" in refusal("GP546", call)
    assert state(model) == before
    adapters.activate("math", "code")
    adapters.deactivate("code")
    merged = model(IDS)
    math.unmerge()
    torch.testing.assert_close(model(IDS), merged)
    adapters.deactivate("math")
    assert torch.equal(model(IDS), base)
    refusal("GP531", math.merge)
    adapters.activate("code")
    with adapters.per_sample(["math", "code"]):
        refusal("GP549", math.merge)


# ── names ──


@pytest.mark.parametrize("name", ["mlp", "default", "lora", "A", "lora_A", "weight", "q_proj", "class", "_"])
def test_a_name_clashes_with_nothing(name, tmp_path):
    """PEFT loses weights of `default` when it saves beside an adapter that is called like a segment of a path."""
    model = lm()
    first, second = fill(patch(model, QV % 2), 0), fill(patch(model, QV % 2, adapter=name), 1)
    adapters = graphpatch.adapters(model)
    assert adapters.names == (None, name)
    expected = {}
    for handle, each in (first, None), (second, name):
        adapters.activate(each)
        expected[each] = model(IDS)
        graphpatch.save_adapter(handle, tmp_path / str(each))
        assert len(handle.adapter_state_dict()) == 8
    for each, output in expected.items():
        fresh = lm()
        graphpatch.load_adapter(fresh, tmp_path / str(each))
        assert torch.equal(fresh(IDS), output)
    adapters.delete(name)
    adapters.activate(None)
    assert torch.equal(model(IDS), expected[None])


@pytest.mark.parametrize("name", ["a.b", "my-x", "", "1", "a b", "../up"])
def test_what_could_not_end_a_parameters_name_is_no_name(name):
    assert "cannot name an adapter" in refused("GP423", lm(), QV % 2, adapter=name)


def test_an_unknown_name_says_which_there_are():
    model = lm()
    adapters = several(model, ("math", "code"))
    before = state(model)
    for call in (
        lambda: adapters.activate("code", "mth"),
        lambda: adapters.deactivate("mth"),
        lambda: adapters.weights({"code": 0.5, "mth": 1}),
        lambda: adapters.delete("code", "mth"),
        lambda: adapters.per_sample(["code", "mth"]).__enter__(),
        lambda: adapters.patches("mth"),
    ):
        message = refusal("GP545", call)
        assert "there: `math`, `code`" in message and "did you mean `math`?" in message
    assert "no unnamed adapter" in refusal("GP545", lambda: adapters.activate(None))
    refusal("GP545", lambda: adapters.activate(["math"]))
    refusal("GP546", lambda: adapters.weights(["math"]))
    for weight in float("nan"), float("inf"), "1", None, True:
        refusal("GP546", lambda weight=weight: adapters.weights({"code": 0.5, "math": weight}))
    assert state(model) == before
    assert graphpatch.adapters(lm()).names == ()
    assert "there: none" in refusal("GP545", lambda: graphpatch.adapters(lm()).activate("math"))


def test_a_module_says_all_that_computes_on_it():
    model = nn.Sequential(nn.Linear(4, 4))
    patch(model, "patch ^0 with lora(rank=2) then scale.output(2.0)", adapter="math")
    patch(model, "patch ^0 with lora(rank=3)", adapter="code")
    said = 'lora(rank=2, adapter="math"), lora(rank=3, adapter="code"), scale.output(by=2)'
    assert said in repr(model)
    graphpatch.adapters(model).deactivate("math")
    assert said.partition(", lora")[0] not in repr(model) and 'adapter="code"), scale.output(by=2)' in repr(model)


def test_wrappers_are_seen_through():
    model = lm()
    several(model, ("math", "code"))
    for wrapped in torch.compile(model, backend="eager"), nn.ModuleDict({"inner": model}):
        graphpatch.adapters(wrapped).activate("code")
        assert graphpatch.adapters(model).active == ("code",)
        graphpatch.adapters(model).activate("math")
        assert graphpatch.adapters(wrapped).active == ("math",)
    assert repr(graphpatch.adapters(model)) == "<Adapters `math`, `code` off>"


# ── training ──


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


def test_a_second_adapter_trains_alone_where_its_rules_freeze_the_rest():
    model = lm()
    math = patch(model, QV % 2, adapter="math")
    before = flags(model)
    code = patch(model, QV % 2, adapter="code")
    assert {name for name, on in flags(model).items() if on} == set(code.adapter_state_dict())
    assert len(code.trainable_parameters()) == 8
    code.revert()
    assert flags(model) == before and {name for name, on in before.items() if on} == set(math.adapter_state_dict())
    # Rules that freeze nothing leave the first as it is.
    both = patch(model, "patch {q,v}_proj with lora(rank=2)", adapter="code")
    assert {name for name, on in flags(model).items() if on} == {*math.adapter_state_dict(), *both.adapter_state_dict()}


def test_a_patch_that_froze_an_adapter_says_nothing_of_one_that_takes_its_name():
    model = lm()
    math = patch(model, QV % 2, adapter="math")
    code = patch(model, QV % 2, adapter="code")
    math.revert()
    again = patch(model, "patch {q,v}_proj with lora(rank=2)\nfreeze **", adapter="math")
    code.revert()
    assert not any(p.requires_grad for n, p in model.named_parameters() if n in again.adapter_state_dict())


def test_what_is_off_keeps_its_flags_and_gets_no_gradient():
    """PEFT's `disable_adapter` turns gradients on again that somebody turned off."""
    model = lm()
    patch(model, QV % 2, adapter="math")
    patch(model, "patch {q,v}_proj with lora(rank=2)", adapter="code")
    adapters = graphpatch.adapters(model)
    model.model.layers[0].self_attn.q_proj.lora_A_math.requires_grad = False
    before = flags(model)
    adapters.activate("code")
    model(IDS).sum().backward()
    graded = {name for name, p in model.named_parameters() if p.grad is not None}
    assert graded and all(name.endswith("_code") for name in graded)
    adapters.activate()
    adapters.activate("math", "code")
    assert flags(model) == before


def test_new_adapters_follow_the_mode():
    """PEFT's dropout is live in a model that is in eval mode."""
    model = lm()
    for name in "math", "code":
        fill(patch(model, "patch {q,v}_proj with lora(rank=2, dropout=0.5)", adapter=name), 0)
    assert torch.equal(model(IDS), model(IDS))
    model.train()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.eval()
    assert not torch.equal(model(IDS), model(IDS))
    graphpatch.adapters(model).deactivate()
    assert torch.equal(model(IDS), model(IDS))


# ── what it costs ──


def test_the_hundredth_adapter_costs_what_the_second_does(monkeypatch):
    """Counted in calls of Python functions."""
    import sys

    model, counts = nn.Sequential(*(nn.Linear(4, 4) for _ in range(50))), []
    for at in range(40):
        rules, calls = graphpatch.parse("patch :Linear with lora(rank=1)\nfreeze ** except @new"), [0]

        def count(frame, event, arg, calls=calls):
            calls[0] += 1

        sys.setprofile(count)
        try:
            graphpatch.apply(model, rules, adapter=f"a{at}")
        finally:
            sys.setprofile(None)
        counts.append(calls[0])
    # A module that has n adapters shows n entries, which no call is made for.
    assert counts[-1] < 1.6 * counts[2], counts


# ── compiled ──


def test_a_compiled_model_follows():
    model = lm()
    base = model(IDS)
    adapters, counter = several(model, ("math", "code")), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for names in [("math", "code"), ("math",), (), ("code",)]:
            adapters.activate(*names)
            assert torch.allclose(compiled(IDS), model(IDS), atol=1e-6)
        assert not torch.allclose(compiled(IDS), base)
        adapters.weights({"code": 0.5})
        assert torch.allclose(compiled(IDS), model(IDS), atol=1e-6)
        with adapters.per_sample(["math", "code"]):
            assert torch.allclose(compiled(IDS), model(IDS), atol=1e-6)
        adapters.activate("math", "code")
        assert torch.allclose(compiled(IDS), model(IDS), atol=1e-6)
    torch._dynamo.reset()


def test_other_weights_of_the_same_shapes_compile_nothing(tmp_path):
    model = lm()
    handle = fill(patch(model, QV % 2, adapter="math"), 0)
    other = lm()
    graphpatch.save_adapter(fill(patch(other, QV % 2, adapter="math"), 5), tmp_path / "other")
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        first = compiled(IDS)
        frames = counter.frame_count
        graphpatch.load_weights(handle, tmp_path / "other")
        second = compiled(IDS)
        assert frames == counter.frame_count == 1
        assert not torch.allclose(first, second)
        torch.testing.assert_close(second, other(IDS))
    torch._dynamo.reset()


def test_warnings_are_none():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapters = several(lm(), ("math", "code"))
        adapters.activate("math")
        with adapters.per_sample(["math", None]):
            pass
