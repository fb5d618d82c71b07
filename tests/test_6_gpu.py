"""The GPU path: on a real GPU where there is one, and on the meta device everywhere.

Tensors of the meta device have a shape, a type and a device, but no numbers. What a script reads
back from it, by item and tolist, is made up here.
"""
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import SMALL_OF, TEXT, copy_script, each_script, run_here
from scripts import load_checkpoint

COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


# --- A real GPU
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@each_script
def test_on_a_real_gpu_a_script_trains_and_generates(tmp_path, script):
    path = copy_script(tmp_path, script, **{**SMALL_OF[script], 'device': 'cuda'})
    out, err, status = run_here(path)
    assert (err, status) == ('', 0) and 'step 20' in out and len(out) > 500
    if script == 'gpt.py':  # the model opens on the CPU, too
        model = load_checkpoint(tmp_path).model
        assert {parameter.device.type for parameter in model.parameters()} == {'cpu'}


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_real_gpu_a_sample_uses_no_random_numbers_of_training(gpt):
    gpt.model, gpt.device = gpt.model.cuda(), 'cuda'
    state = torch.cuda.get_rng_state()
    gpt.report(0, 0.0)
    assert torch.equal(torch.cuda.get_rng_state(), state)


# --- The meta device in place of a GPU
class OneDevice(TorchDispatchMode):
    """Refuses an operation on tensors of two devices, as CUDA does; copies are allowed."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs))
                   if isinstance(leaf, torch.Tensor)}
        if len(devices) > 1 and operation not in COPIES:
            raise RuntimeError(f'{operation} on tensors of two devices: {devices}')
        self.seen.update((operation.overloadpacket, device) for device in devices)
        return operation(*args, **(kwargs or {}))


@pytest.fixture
def made_up(monkeypatch):
    """Makes what has no meaning without numbers harmless."""
    save = torch.save
    monkeypatch.setattr(torch.Tensor, 'item', lambda tensor: 1.0)
    monkeypatch.setattr(torch.Tensor, 'tolist', lambda tensor: [0] * tensor.numel())
    monkeypatch.setattr(sys.modules['torch.optim.adam'], '_device_dtype_check_for_fused',
                        lambda *args: None)

    def save_zeros(checkpoint, path):
        """A file cannot hold the weights of the meta device: zeros instead."""
        weights = {name: torch.zeros_like(weight, device='cpu')
                   for name, weight in checkpoint['model'].items()}
        save({**checkpoint, 'model': weights}, path)

    monkeypatch.setattr(torch, 'save', save_zeros)


@each_script
@pytest.mark.filterwarnings('ignore:.*non-meta parameter')
def test_a_script_trains_saves_loads_and_generates_on_one_device(tmp_path, made_up, script):
    sizes = {**SMALL_OF[script], 'device': 'meta', 'max_iters': 2, 'eval_interval': 1}
    few = [(f'max_new_tokens={number}', 'max_new_tokens=2') for number in (500, 80)]
    if script == 'gpt.py':
        sizes.update(n_layer=1, dropout=0.1, top_k=5)
    with OneDevice() as mode:
        out, err, status = run_here(copy_script(tmp_path, script, TEXT, *few, **sizes))
    assert (err, status) == ('', 0) and 'step 2 of 2: train loss 1.0000' in out
    assert (torch.ops.aten.multinomial, 'meta') in mode.seen
    assert (torch.ops.aten.embedding, 'cpu') not in mode.seen


def test_the_device_mode_refuses_a_mixture_and_allows_a_copy():
    """Otherwise the test above could not fail."""
    here, there = torch.zeros(2), torch.zeros(2, device='meta')
    with OneDevice():
        here.to('meta') + there
        with pytest.raises(RuntimeError, match='two devices'):
            here + there


def test_a_sample_leaves_the_random_state_of_each_gpu_as_it_was(gpt, monkeypatch):
    """On a machine that seems to have one: torch saves its state before, and restores it after."""
    calls, generate = [], gpt.model.generate
    monkeypatch.setattr(torch.accelerator, 'current_accelerator',
                        lambda *args, **options: torch.device('cuda'))
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'get_rng_state', lambda gpu: calls.append(('save', gpu)))
    monkeypatch.setattr(torch.cuda, 'set_rng_state',
                        lambda state, gpu: calls.append(('restore', gpu)))
    monkeypatch.setattr(gpt.model, 'generate', lambda *arguments, **options: (
        calls.append('sample'), generate(*arguments, **options))[1])
    gpt.report(0, 0.0)
    assert calls == [('save', 0), 'sample', ('restore', 0)]
