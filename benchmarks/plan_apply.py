"""What planning and applying LoRA costs on a model of 75,000 modules, beside the least it could cost, and PEFT.

    python benchmarks/plan_apply.py [--peft] [--layers 61]

All figures are CPU seconds, the least of several runs; ratios are within this run. PEFT takes a minute or two.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from time import process_time

import torch
from deepseek import LAYERS, build
from table import least, row
from torch import nn

import graphpatch
from graphpatch import Patch, RuleSet

RANK = 8
LORA = f"patch ^model.layers[*].**:Linear with lora(rank={RANK})\nfreeze ** except @new\n"


def main() -> None:
    options = arguments()
    if options.memory:
        print(peak_of_plan_and_apply(options.layers))
        return
    model = build(options.layers)
    targets = sum(isinstance(module, nn.Linear) for module in model.model.modules())  # type: ignore[union-attr]
    print(f"{sum(1 for _ in model.modules()):,} modules, {targets:,} targets, torch {torch.__version__}\n")
    whole = plan_and_apply(model)
    planning(model)
    second_adapter(model)
    scaling(options.layers)
    memory(options.layers)
    if options.peft:
        peft(model, whole)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peft", action="store_true", help="time PEFT on the same model, too")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)  # the fresh process of `memory`
    return parser.parse_args()


def plan_and_apply(model: nn.Module) -> float:
    """Plan + apply against a walk that registers two factors a target by hand; returns its seconds."""
    rules = graphpatch.parse(LORA)
    floor = least(lambda: register_by_hand(model), after=lambda: unregister(model))
    whole, undo = timed_patch(lambda: graphpatch.apply(model, rules))
    row("walk and register two meta parameters a target, by hand", floor)
    row("plan + apply", whole)
    row("  plan + apply / by hand", whole / floor, "x", "at most 1.3")
    row("revert", undo)
    return whole


def planning(model: nn.Module) -> None:
    """A plan against a bare list of the modules, and a hundred rules against one."""
    walk = least(lambda: list(model.named_modules()))
    one = least(lambda: graphpatch.parse(LORA).plan(model))
    hundred_rules = many_rules(100)
    hundred = least(lambda: hundred_rules.plan(model))
    row("list(named_modules())", walk)
    row("plan, one rule", one)
    row("  plan / list(named_modules())", one / walk, "x", "at most 4")
    row("plan, 100 rules", hundred)
    row("  100 rules / one rule", hundred / one, "x", "at most 1.5")


def second_adapter(model: nn.Module) -> None:
    """A second adapter on a model that has one; PEFT's cost is quadratic here."""
    rules = graphpatch.parse(LORA)
    first, _ = timed_patch(lambda: rules.plan(model, adapter="a").apply(model))
    patch = rules.plan(model, adapter="a").apply(model)
    second, _ = timed_patch(lambda: rules.plan(model, adapter="b").apply(model))
    patch.revert()
    row("first adapter, plan + apply", first)
    row("second adapter, plan + apply", second)
    row("  second / first", second / first, "x", "about 1")


def scaling(layers: int) -> None:
    """Twice the targets, twice the time."""
    rules = graphpatch.parse(LORA)
    seconds = []
    for part in (layers // 4, layers // 2):
        model = build(part)
        seconds.append(timed_patch(lambda model=model: rules.plan(model).apply(model))[0] / count(model))  # type: ignore[misc]
    row("seconds a target: half the layers / a quarter", seconds[1] / seconds[0], "x", "about 1: linear")


def memory(layers: int) -> None:
    """Peak memory that plan + apply add to a process which holds the model."""
    command = [sys.executable, __file__, "--memory", "--layers", str(layers)]
    peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    row("peak memory above the model, fresh process", peak, "MiB", "at most 150")


def peft(model: nn.Module, ours: float) -> None:
    from peft import LoraConfig, get_peft_model

    names = sorted({name.rpartition(".")[2] for name, m in model.model.named_modules() if isinstance(m, nn.Linear)})  # type: ignore[union-attr]
    start = process_time()
    get_peft_model(model, LoraConfig(r=RANK, target_modules=names), low_cpu_mem_usage=True)  # type: ignore[arg-type]
    theirs = process_time() - start
    row("PEFT, get_peft_model(low_cpu_mem_usage=True)", theirs)
    row("  PEFT / plan + apply", theirs / ours, "x", "at least 50")


def register_by_hand(model: nn.Module) -> None:
    """The least that any tool must do, in the calls that anyone would write."""
    for _, module in model.model.named_modules():  # type: ignore[union-attr]
        if isinstance(module, nn.Linear):
            module.register_parameter("lora_A", nn.Parameter(torch.empty(RANK, module.in_features, device="meta")))
            module.register_parameter("lora_B", nn.Parameter(torch.empty(module.out_features, RANK, device="meta")))


def unregister(model: nn.Module) -> None:
    for module in model.modules():
        module._parameters.pop("lora_A", None)
        module._parameters.pop("lora_B", None)


def timed_patch(patch: Callable[[], Patch], repeats: int = 5) -> tuple[float, float]:
    """Least seconds to patch, and to take it back."""
    made: list[Patch] = []
    reverts: list[float] = []

    def undo() -> None:
        start = process_time()
        made.pop().revert()
        reverts.append(process_time() - start)

    return least(lambda: made.append(patch()), after=undo, repeats=repeats), min(reverts)


def many_rules(rules: int) -> RuleSet:
    """Rules that share the experts among them: the first takes experts 0 and 1 of every layer, and so on."""
    edges = [256 * i // rules for i in range(rules + 1)]
    return graphpatch.parse(
        "".join(f"patch experts[{a}:{b}].**:Linear with lora(rank={RANK})\n" for a, b in pairwise(edges))
        + "freeze ** except @new\n"
    )


def count(model: nn.Module) -> int:
    return sum(isinstance(module, nn.Linear) for module in model.modules())


def peak_of_plan_and_apply(layers: int) -> float:
    """MiB between what the process holds once the model is built, and its peak after planning and applying."""
    model = build(layers)
    before = mebibytes("VmRSS")
    patch = graphpatch.parse(LORA).plan(model).apply(model)
    del patch
    return mebibytes("VmHWM") - before


def mebibytes(field: str) -> float:
    """A figure of Linux's /proc/self/status: unlike getrusage's, its peak is of this process alone."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field))


if __name__ == "__main__":
    main()
