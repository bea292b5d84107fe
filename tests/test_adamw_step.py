"""adamw_step: torch's lines and the kernels against float64, update after update; skipped updates, checkpoints, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vpgtrans.engine.optim import build_adamw, clip_, set_learning_rate
from vpgtrans.engine.recipe import Optimizer
from vpgtrans.kernels.adamw_step import adamw_step, adamw_step_unsupported_reason, launch_config
from vpgtrans.kernels.checks import assert_within_budget, poisoned_memory
from vpgtrans.kernels.triton_support import triton_unsupported_reason

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CANNOT_RUN = triton_unsupported_reason(DEVICE)
needs_kernel = pytest.mark.skipif(CANNOT_RUN is not None, reason=str(CANNOT_RUN))
SHAPES = [(3, 5), (7,), (1,), (), (2, 3, 4), (130, 130), (0, 4)]  # 16,900 elements are two chunks


def drawn(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def make(dtype=torch.float32, shapes=SHAPES, **settings):
    named = [(f"p{i}", nn.Parameter(drawn(shape, i, dtype))) for i, shape in enumerate(shapes)]
    optimizer = build_adamw(named, Optimizer(**({"weight_decay": 0.05} | settings)))
    return [p for _, p in named], optimizer


def give(parameters, update, scale=1.0, without=()):
    for i, parameter in enumerate(parameters):
        parameter.grad = None if i in without else drawn(parameter.shape, 100 * update + i).to(parameter.dtype) * scale


def tensors_of(parameters, optimizer):
    return {
        f"{i}.{name}": tensor.detach()
        for i, p in enumerate(parameters)
        for name, tensor in {"value": p, **optimizer.state[p]}.items()
    }


@needs_kernel
@pytest.mark.parametrize("clip_norm", [None, 1.0, 1e6])
def test_five_updates(clip_norm):
    """Against torch's fused AdamW in float64; gradients, as `grad` after zero_grad has it, are in other memory each time."""
    runs = {
        name: make(dtype)
        for name, dtype in (("exact", torch.float64), ("plain", torch.float32), ("ours", torch.float32))
    }
    with poisoned_memory():
        for update in range(5):
            results = {}
            for name, (parameters, optimizer) in runs.items():
                set_learning_rate(optimizer, 1e-2 / (1 + update))
                give(parameters, update, scale=10.0 ** (update - 2))
                loss = torch.tensor(1.5, device=DEVICE)
                impl = "triton" if name == "ours" else "reference"
                results[name] = adamw_step(optimizer, clip_norm, loss, impl=impl)
                optimizer.zero_grad(set_to_none=True)
            assert_within_budget("norm", *(results[name].norm for name in ("ours", "exact", "plain")))
            assert results["ours"].skipped == 0
    exact, plain, ours = (tensors_of(*runs[name]) for name in ("exact", "plain", "ours"))
    assert ours.keys() == exact.keys() and all(float(t) == 5 for name, t in ours.items() if name.endswith("step"))
    for name, tensor in ours.items():
        assert_within_budget(name, tensor, exact[name].double(), plain[name])


@needs_kernel
@pytest.mark.parametrize("where", ["loss", "gradient", "overflow"])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_bad_update_changes_nothing(where, impl):
    parameters, optimizer = make()
    set_learning_rate(optimizer, 1e-2)
    give(parameters, 0)
    adamw_step(optimizer, 1.0, impl=impl)
    before = copy.deepcopy(tensors_of(parameters, optimizer))
    give(parameters, 1)
    loss = torch.tensor(1.0, device=DEVICE)
    if where == "loss":
        loss.fill_(torch.nan)
    else:
        parameters[5].grad[77, 3] = torch.inf if where == "gradient" else 1e30
    result = adamw_step(optimizer, 1.0, loss, impl=impl)
    assert result.skipped == 1 and (where == "loss" or not result.norm.isfinite())
    after = tensors_of(parameters, optimizer)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    give(parameters, 2)
    assert adamw_step(optimizer, 1.0, loss.fill_(1.0), impl=impl).skipped == 0
    assert float(optimizer.state[parameters[0]]["step"]) == 2 and not torch.equal(parameters[0], before["0.value"])


@needs_kernel
def test_the_same_every_time():
    found = []
    for _ in range(2):
        parameters, optimizer = make()
        set_learning_rate(optimizer, 1e-2)
        give(parameters, 0)
        norm = adamw_step(optimizer, 1.0, impl="triton").norm
        found.append([norm, *tensors_of(parameters, optimizer).values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@needs_kernel
def test_gradients_and_frozen_parameters_stay():
    """Who has no gradient is neither decayed nor counted; gradients are read only, other ones may come at any update."""
    parameters, optimizer = make()
    theirs, reference = make()
    for update, without in enumerate([(), (1, 5), (0,)]):
        for mine, chosen, impl in ((parameters, optimizer, "triton"), (theirs, reference, "reference")):
            set_learning_rate(chosen, 1e-2)
            give(mine, update, without=without)
            kept = [p.grad.clone() for p in mine if p.grad is not None]
            adamw_step(chosen, 1e-3, impl=impl)
            if impl == "triton":
                assert all(
                    torch.equal(k, p.grad) for k, p in zip(kept, [p for p in mine if p.grad is not None], strict=True)
                )
    for (name, ours), wanted in zip(
        tensors_of(parameters, optimizer).items(), tensors_of(theirs, reference).values(), strict=True
    ):
        assert torch.allclose(ours, wanted, rtol=1e-5, atol=1e-7), name
    assert [float(optimizer.state[p]["step"]) for p in parameters[:3]] == [2, 2, 3]


@needs_kernel
def test_state_is_torchs_and_survives_a_checkpoint():
    """Two updates, saved and loaded into a new optimizer (so every tensor moves), and one more; torch's own step goes on from it too."""
    parameters, optimizer = make()
    set_learning_rate(optimizer, 1e-2)
    for update in range(2):
        give(parameters, update)
        adamw_step(optimizer, 1.0, impl="triton")
    others, loaded = make()
    for theirs, mine in zip(others, parameters, strict=True):
        theirs.data.copy_(mine.detach())
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    thirds, torchs = copy.deepcopy(others), make()[1]
    for group, source in zip(torchs.param_groups, loaded.param_groups, strict=True):
        group["params"] = [thirds[next(i for i, p in enumerate(others) if p is q)] for q in source["params"]]
    torchs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for mine, chosen, impl in (
        (parameters, optimizer, "triton"),
        (others, loaded, "triton"),
        (thirds, torchs, "reference"),
    ):
        give(mine, 2)
        adamw_step(chosen, 1.0, impl=impl)
    first, second, third = (tensors_of(*run) for run in ((parameters, optimizer), (others, loaded), (thirds, torchs)))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.allclose(first[name], third[name], rtol=1e-5, atol=1e-7) for name in first)


@needs_kernel
def test_groups_with_settings_of_their_own():
    def run(impl):
        first, second = nn.Parameter(drawn((4, 5), 0)), nn.Parameter(drawn((6,), 1))
        groups = [
            {"params": [first], "lr": 1e-2, "weight_decay": 0.5},
            {"params": [second], "lr": 1e-3, "betas": (0.0, 0.5), "eps": 1e-3},
        ]
        optimizer = torch.optim.AdamW(groups, fused=True)
        for update in range(3):
            give([first, second], update)
            adamw_step(optimizer, impl=impl)
        return first.detach(), second.detach()

    for ours, theirs in zip(run("triton"), run("reference"), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-7)


@needs_kernel
def test_autograd_sees_the_update():
    parameter = nn.Parameter(drawn((4, 4), 0))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    stale = (parameter * parameter).sum()
    parameter.grad = drawn((4, 4), 1)
    adamw_step(optimizer, impl="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


def test_the_reference_is_the_engines_update():
    """`clip_`, the finite check and the fused step as engine/loop.py has them, bit for bit."""
    (ours, optimizer), (theirs, loops) = make(), make()
    for update in range(2):
        give(ours, update)
        give(theirs, update)
        set_learning_rate(optimizer, 1e-2)
        set_learning_rate(loops, 1e-2)
        result = adamw_step(optimizer, 0.5, torch.tensor(2.0, device=DEVICE), impl="reference")
        norm = clip_(theirs, 0.5)
        loops.found_inf, loops.grad_scale = 1.0 - torch.isfinite(norm + 2.0).float(), None
        loops.step()
        assert torch.equal(result.norm, norm) and torch.equal(result.skipped, loops.found_inf)
    found, wanted = tensors_of(ours, optimizer), tensors_of(theirs, loops)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not hasattr(optimizer, "found_inf")


def test_errors():
    parameters, optimizer = make()
    with pytest.raises(ValueError, match="expected a parameter with a gradient, found none; call backward first"):
        adamw_step(optimizer)
    give(parameters, 0)
    loss = torch.zeros(2, device=DEVICE)
    for call, error, message in [
        (lambda: adamw_step(optimizer, impl="apex"), ValueError, r"impl: .* got 'apex'"),
        (lambda: adamw_step(torch.optim.SGD(parameters)), TypeError, r"expected a torch.optim.AdamW, got SGD"),
        (lambda: adamw_step(torch.optim.AdamW(parameters)), ValueError, r"made with fused=True"),
        (lambda: adamw_step(optimizer, 0.0), ValueError, r"clip_norm: expected a number above 0, .* got 0.0"),
        (lambda: adamw_step(optimizer, float("nan")), ValueError, r"clip_norm: .* got nan"),
        (lambda: adamw_step(optimizer, None, loss), ValueError, r"loss: expected a floating scalar on .* got \(2,\)"),
        (lambda: adamw_step(optimizer, None, loss[0].to("meta")), ValueError, r"loss: expected .* on meta"),
        (lambda: adamw_step(optimizer, None, loss[0].long()), ValueError, r"loss: expected a floating scalar .*int64"),
    ]:
        with pytest.raises(error, match=message):
            call()


def given(parameter, **settings):
    optimizer = torch.optim.AdamW([parameter], fused=True, **settings)
    parameter.grad = torch.ones_like(parameter)
    return optimizer


@needs_kernel
def test_what_the_kernels_leave_to_torch():
    for optimizer, message in [
        (given(nn.Parameter(drawn((3,), 0, torch.float64))), "a tensor that is not dense float32"),
        (given(nn.Parameter(drawn((4, 6), 0).t())), "a tensor of shape (6, 4) whose memory is not contiguous"),
        (
            given(nn.Parameter(drawn((9,), 0)[1:])),
            "a tensor of shape (8,) that does not start at a multiple of 16 bytes",
        ),
        (given(nn.Parameter(drawn((3,), 0)), amsgrad=True), "amsgrad, maximize or a learning rate in a tensor"),
    ]:
        assert adamw_step_unsupported_reason(optimizer).startswith(message)
        with pytest.raises(RuntimeError, match="impl='triton' cannot run here: a"):
            adamw_step(optimizer, impl="triton")
        assert adamw_step(optimizer).skipped == 0  # torch takes it


def test_launch_settings():
    config = launch_config(108_314_880)
    assert config.chunk % config.block == 0 and config.block % (config.num_warps * 32 * 8) == 0


def test_compiled_within_budgets(compiled_kernels):
    found = compiled_kernels("adamw_step")
    assert len(found) == 6
    for kernel in found:
        assert kernel["spill_bytes"] == 0 and kernel["local_accesses"] == 0, kernel
        assert kernel["registers"] <= 64 and kernel["shared_bytes"] <= 16 * 1024, (
            kernel
        )  # 8 warps of 64: four programs a multiprocessor
        # 8 elements of each array a thread: two wide accesses each, of the gradient alone or of four and three arrays; more where unrolled.
        loads, stores = {"partial_norms": (2, 0), "finish": (0, 0), "update": (8, 6)}[kernel["name"]]
        assert kernel["wide_loads"] >= loads and kernel["wide_stores"] >= stores, kernel
