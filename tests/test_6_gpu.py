"""The GPU path: on a real GPU where there is one, and on the meta device everywhere.

Tensors of the meta device have a shape, a type and a device, but no numbers. What a script reads
back from them, by item and tolist, is made up here. (torch's FakeTensorMode would be the other way,
with a made-up 'cuda', but where torch was built without CUDA, training in it crashes Python.)
"""
from unittest.mock import Mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import SMALL_OF, TEXT, copy_script, each_script, run_here
from scripts import load_checkpoint


# --- A real GPU
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@each_script
def test_on_a_real_gpu_a_script_trains_and_generates(tmp_path, script):
    path = copy_script(tmp_path, script, **SMALL_OF[script] | {'device': 'cuda'})
    out, err, status = run_here(path)
    assert (err, status) == ('', 0) and 'step 20' in out and len(out) > 500
    if script == 'gpt.py':  # the model opens on the CPU, too
        model = load_checkpoint(tmp_path).model
        assert {parameter.device.type for parameter in model.parameters()} == {'cpu'}


# --- Without one
class OneDevice(TorchDispatchMode):
    """Refuses an operation on tensors of two devices, as CUDA does, unless it is a copy."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs))
                   if isinstance(leaf, torch.Tensor)}
        if len(devices) > 1 and 'copy' not in operation.name():
            raise RuntimeError(f'{operation} on tensors of two devices')
        return operation(*args, **(kwargs or {}))


def run_on_meta(folder, script, monkeypatch, *edits):
    """Runs a script on the meta device; its standard output and standard error."""
    item, tolist = torch.Tensor.item, torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, 'item', lambda x: 7.0 if x.is_meta else item(x))
    monkeypatch.setattr(
        torch.Tensor, 'tolist', lambda x: [7] * x.numel() if x.is_meta else tolist(x))
    options = {'device': 'meta', 'max_iters': 2, 'eval_interval': 1}
    if script == 'gpt.py':
        edits = (', fused=True', ''), *edits  # torch has no fused AdamW for the meta device
        options |= {'dropout': 0.1, 'top_k': 5}
    few = [(f'max_new_tokens={number}', 'max_new_tokens=3') for number in (80, 500)]
    path = copy_script(folder, script, TEXT, *few, *edits, **SMALL_OF[script] | options)
    with OneDevice():
        out, err, _ = run_here(path)
    return out, err


@each_script
def test_a_script_trains_saves_loads_and_generates_on_one_device(tmp_path, script, monkeypatch):
    """What it prints comes from there: a loss of 7 each time, and the character with the id 7."""
    out, err = run_on_meta(tmp_path, script, monkeypatch)
    assert err == '' and 'step 2 of 2: train loss 7.0000, val loss 7.0000' in out
    assert out.endswith(4 * sorted(set(TEXT))[7] + '\n')
    for path in tmp_path.glob('*.pt'):
        assert all(weight.is_meta for weight in torch.load(path)['model'].values())


def test_whatever_is_left_on_another_device_is_an_error(tmp_path, monkeypatch):
    """Otherwise the test above could not fail."""
    edit = (', device=x.device)', ')')  # the causal mask, on the CPU
    assert 'two devices' in run_on_meta(tmp_path, 'gpt.py', monkeypatch, edit)[1]


def test_a_sample_leaves_the_random_state_of_a_gpu_as_it_was(module, monkeypatch):
    """On a machine that seems to have one: a generator stands for its random numbers."""
    gpu = torch.Generator()
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'get_rng_state', lambda number: gpu.get_state())
    monkeypatch.setattr(torch.cuda, 'set_rng_state', lambda state, number: gpu.set_state(state))
    before = gpu.get_state()
    sample = Mock(side_effect=lambda idx, max_new_tokens: torch.randint(7, (1, 81), generator=gpu))
    monkeypatch.setattr(module.m, 'generate', sample)
    module.report(0, 0.0)
    assert sample.called and torch.equal(gpu.get_state(), before)
