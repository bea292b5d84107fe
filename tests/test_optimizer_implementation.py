"""`optimizer.implementation: apex`: its state in torch's form and back, what is refused without it, and, where it is installed, the real thing."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

from vpgtrans.engine.back_ends import check_back_ends
from vpgtrans.engine.checkpoint import load_checkpoint, save_checkpoint
from vpgtrans.engine.loop import run
from vpgtrans.engine.optim import (
    apex_unsupported_reason,
    build_adamw,
    set_learning_rate,
    steps_by_group,
    steps_by_parameter,
    take_step,
)
from vpgtrans.engine.recipe import Optimizer, RecipeError, load_recipe
from vpgtrans.kernels.checks import assert_within_budget

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NO_APEX = apex_unsupported_reason(DEVICE)
needs_apex = pytest.mark.skipif(NO_APEX is not None, reason=str(NO_APEX))
SHAPES = [(3, 5), (7,), (2, 3, 4), (40, 30)]


def drawn(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def make(implementation="fused", dtype=torch.float32):
    named = [(f"p{i}", nn.Parameter(drawn(shape, i).to(dtype))) for i, shape in enumerate(SHAPES)]
    return dict(named), build_adamw(named, Optimizer(implementation=implementation, weight_decay=0.05))


def update(parameters, optimizer, number, clip_norm=1.0, scale=1.0):
    set_learning_rate(optimizer, 1e-2 / (1 + number))
    for i, parameter in enumerate(parameters.values()):
        parameter.grad = drawn(parameter.shape, 100 * number + i).to(parameter.dtype) * scale
    result = take_step(optimizer, clip_norm, torch.tensor(1.0, device=DEVICE))
    optimizer.zero_grad(set_to_none=True)
    return result


def moments(optimizer):
    return {(i, k): v for i, entry in optimizer.state_dict()["state"].items() for k, v in entry.items()}


def test_steps_by_group_and_back():
    parameters, optimizer = make()
    for number in range(3):
        update(parameters, optimizer, number)
    before = optimizer.state_dict()
    apexs = steps_by_group(before)
    assert [group["step"].tolist() for group in apexs["param_groups"]] == [[3], [3]]
    assert apexs["param_groups"][0]["step"].dtype == torch.int32
    assert all(set(entry) == {"exp_avg", "exp_avg_sq"} for entry in apexs["state"].values())
    after = steps_by_parameter(apexs)
    assert after["param_groups"] == before["param_groups"] and after["state"].keys() == before["state"].keys()
    for index, entry in before["state"].items():
        assert set(after["state"][index]) == set(entry)
        for name, tensor in entry.items():
            assert after["state"][index][name].dtype == tensor.dtype and torch.equal(
                after["state"][index][name], tensor
            )
    _, resumed = make()
    resumed.load_state_dict(after)
    assert moments(resumed).keys() == moments(optimizer).keys()


def test_a_fresh_optimizer_has_taken_no_step():
    _, optimizer = make()
    apexs = steps_by_group(optimizer.state_dict())
    assert [group["step"].tolist() for group in apexs["param_groups"]] == [[0], [0]] and apexs["state"] == {}
    assert steps_by_parameter(apexs) == optimizer.state_dict()


def test_different_steps_in_a_group_are_refused():
    parameters, optimizer = make()
    update(parameters, optimizer, 0)
    optimizer.state[parameters["p0"]]["step"] += 1
    with pytest.raises(ValueError, match=r"one number of steps .* got \[1, 2\]; go on with implementation: fused"):
        steps_by_group(optimizer.state_dict())


def test_a_rate_in_a_tensor_is_filled():
    _, optimizer = make()
    rates = [torch.zeros(()) for _ in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    set_learning_rate(optimizer, 0.25)
    assert all(group["lr"] is rate and rate == 0.25 for group, rate in zip(optimizer.param_groups, rates, strict=True))


@pytest.mark.skipif(NO_APEX is None, reason="apex can run here")
def test_without_apex_it_is_refused_at_once(tiny_recipe, tmp_path):
    folder = tmp_path / "nothing"
    wanted = r"stages\.1\.optimizer\.implementation: expected fused here, got apex: .*github\.com/NVIDIA/apex"
    given = [f"output.folder={folder}", "stages.1.optimizer.implementation=apex"]
    with pytest.raises(RecipeError, match=wanted):
        run(load_recipe(tiny_recipe, given))
    assert not folder.exists()
    with pytest.raises(ValueError, match=r"optimizer\.implementation: expected fused, got apex"):
        make("apex")


@pytest.mark.skipif(NO_APEX is None, reason="apex can run here")
def test_a_package_of_the_same_name_is_not_taken_for_it(tmp_path, monkeypatch):
    for name in ("apex", "amp_C"):
        (tmp_path / f"{name}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert "cannot be imported (ModuleNotFoundError: No module named 'apex.optimizers'" in apex_unsupported_reason(
            DEVICE
        )
    finally:
        for name in ("apex", "amp_C"):
            sys.modules.pop(name, None)


def test_two_implementations_are_not_both_asked_for(tiny_recipe):
    with pytest.raises(
        RecipeError, match=r"stages\.0\.optimizer\.implementation, kernels\.adamw_step: .* got 'apex' and 'kernel'"
    ):
        load_recipe(tiny_recipe, ["stages.0.optimizer.implementation=apex", "kernels.adamw_step=kernel"])
    check_back_ends(load_recipe(tiny_recipe, ["kernels.adamw_step=kernel"]))


@needs_apex
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_updates_are_torchs(clip_norm):
    """Five updates, the third of them bad: parameters, moments and steps against float64, beside torch's fused AdamW."""
    runs = {"ours": make("apex"), "exact": make(dtype=torch.float64), "plain": make()}
    for number in range(5):
        scale = float("inf") if number == 2 else 1.0
        assert all(update(*run, number, clip_norm, scale).skipped == (number == 2) for run in runs.values())
    ours, exact, plain = ({**parameters, **moments(optimizer)} for parameters, optimizer in runs.values())
    assert ours.keys() == exact.keys() and all(tensor == 4 for key, tensor in ours.items() if key[1] == "step")
    for key, tensor in ours.items():
        assert_within_budget(str(key), tensor.detach(), exact[key].detach().double(), plain[key].detach())


@needs_apex
def test_a_first_update_that_is_bad_is_not_counted():
    parameters, optimizer = make("apex")
    before = copy.deepcopy(parameters)
    assert update(parameters, optimizer, 0, scale=float("nan")).skipped == 1
    assert all(torch.equal(parameters[name], tensor) for name, tensor in before.items())
    assert all(tensor == 0 for (_, name), tensor in moments(optimizer).items() if name == "step")


@needs_apex
@pytest.mark.parametrize("first, then", [("apex", "fused"), ("fused", "apex"), ("apex", "apex")])
def test_a_checkpoint_goes_on_with_either(first, then, tmp_path):
    parameters, optimizer = make(first)
    for number in range(3):
        update(parameters, optimizer, number)
    save_checkpoint(tmp_path, 3, parameters, optimizer, {}, keep=1)
    resumed, other = make(then)
    load_checkpoint(tmp_path / "step-00000003", resumed, other)
    for number in range(3, 5):
        update(parameters, optimizer, number)
        update(resumed, other, number)
    for name, tensor in parameters.items():
        assert torch.allclose(resumed[name], tensor, rtol=1e-5, atol=1e-7)
