"""The GPU path, tested without a GPU.

The meta device stands for the GPU: its tensors have a shape, a type and a device, but no numbers.
What a script reads back from it, by item and tolist, is made up here.
"""
import sys
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from conftest import (PROJECT, SMALL, SMALL_BIGRAM, copy_script, generate_less, import_script,
                      run_here)

COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class OneDevice(TorchDispatchMode):
    """Refuses an operation on tensors of two devices, as CUDA does; copies are allowed."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        tensors = [value for value in tree_flatten((args, kwargs))[0]
                   if isinstance(value, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        if len(devices) > 1 and operation not in COPIES:
            raise RuntimeError(f'{operation} on tensors of two devices: {devices}')
        self.seen.update((operation.overloadpacket, device) for device in devices)
        return operation(*args, **(kwargs or {}))


@pytest.fixture
def pretend_gpu(monkeypatch):
    """Makes what has no meaning without a GPU harmless; records the random states of the GPU."""
    record = types.SimpleNamespace(saved=[], restored=[])
    monkeypatch.setattr(torch.Tensor, 'item', lambda tensor: 1.0)
    monkeypatch.setattr(torch.Tensor, 'tolist', lambda tensor: [0] * tensor.numel())
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda *args, **kwargs: None)
    monkeypatch.setattr(torch.cuda, 'get_rng_state',
                        lambda device='cuda': record.saved.append(device))
    monkeypatch.setattr(torch.cuda, 'set_rng_state',
                        lambda state, device='cuda': record.restored.append(device))
    monkeypatch.setattr(sys.modules['torch.optim.adam'], '_device_dtype_check_for_fused',
                        lambda *args: None)
    real_save = torch.save

    def save_numbers(checkpoint, path):
        """A file cannot hold the weights of the meta device: zeros, of the same shapes, instead."""
        assert all(weight.device.type == 'meta' for weight in checkpoint['model'].values())
        weights = {name: torch.zeros_like(weight, device='cpu')
                   for name, weight in checkpoint['model'].items()}
        real_save({**checkpoint, 'model': weights}, path)

    monkeypatch.setattr(torch, 'save', save_numbers)
    return record


@pytest.mark.parametrize('fused_attention', [True, False])
@pytest.mark.filterwarnings('ignore:.*CUDA is not available')
def test_gpt_trains_saves_loads_and_generates_on_one_device(
        tmp_path, pretend_gpu, fused_attention):
    script = copy_script(tmp_path, 'gpt.py', **{
        **SMALL, 'device': 'meta', 'gpu': True, 'fused_attention': fused_attention,
        'max_iters': 2, 'eval_interval': 1, 'eval_iters': 1, 'n_layer': 1, 'dropout': 0.1,
        'top_k': 5})
    with OneDevice() as mode:
        out, err, status = run_here(generate_less(script))
        assert (err, status) == ('', 0)
        assert 'steps on meta' in out and 'step 2: train loss 1.0000' in out
        assert (tmp_path / 'gpt.pt').exists()
        # The sample of each evaluation leaves the GPU's random state as it was.
        assert pretend_gpu.saved == pretend_gpu.restored == ['meta'] * 3
        assert run_here(script, '--prompt', 'The king')[1:] == ('', 0)
    assert (torch.ops.aten.multinomial, 'meta') in mode.seen
    assert (torch.ops.aten.embedding, 'cpu') not in mode.seen


def test_bigram_trains_and_generates_on_one_device(tmp_path, pretend_gpu):
    script = copy_script(tmp_path, 'bigram.py', **{
        **SMALL_BIGRAM, 'device': 'meta', 'max_iters': 2, 'eval_interval': 1})
    with OneDevice() as mode:
        out, err, status = run_here(generate_less(script))
    assert (err, status) == ('', 0) and 'step 2: train loss 1.0000' in out
    assert (torch.ops.aten.multinomial, 'meta') in mode.seen
    assert (torch.ops.aten.embedding, 'cpu') not in mode.seen


def test_the_device_mode_refuses_a_mixture_and_allows_a_copy():
    """Otherwise the tests above could not fail."""
    here, there = torch.zeros(2), torch.zeros(2, device='meta')
    with OneDevice():
        here.to('meta') + there
        with pytest.raises(RuntimeError, match='two devices'):
            here + there


def types_on_a_gpu(folder, monkeypatch, has_bfloat16_units, fused_attention=True):
    """The types of what each part gives, on a CPU that autocast takes for a GPU."""
    real_autocast, questions = torch.autocast, []

    def autocast(device_type, *args, **kwargs):
        assert device_type == 'cuda'
        return real_autocast('cpu', *args, **kwargs)

    def is_bf16_supported(including_emulation=True):
        questions.append(including_emulation)
        return has_bfloat16_units or including_emulation

    monkeypatch.setattr(torch, 'autocast', autocast)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', is_bf16_supported)
    gpt = import_script(folder, 'gpt.py', **SMALL, gpu=True, fused_attention=fused_attention)
    linear = {}
    for name, part in gpt.model.named_modules():
        if isinstance(part, torch.nn.Linear):
            part.register_forward_hook(
                lambda part, inputs, output, name=name: linear.update({name: output.dtype}))
    x, y = gpt.get_batch('train')
    logits, loss = gpt.model(x, y)
    assert len(linear) == 4 * SMALL['n_layer'] + 1
    loss.backward()
    weights = {p.dtype for p in gpt.model.parameters()} | {p.grad.dtype
                                                           for p in gpt.model.parameters()}
    return set(linear.values()), {logits.dtype, gpt.model(x)[0].dtype, loss.dtype}, weights


@pytest.mark.parametrize('fused_attention', [True, False])
def test_on_a_gpu_bfloat16_reaches_the_matrices_and_not_the_loss(
        tmp_path, monkeypatch, fused_attention):
    linear, results, weights = types_on_a_gpu(tmp_path, monkeypatch, True, fused_attention)
    assert linear == {torch.bfloat16}
    assert results == weights == {torch.float32}


def test_on_a_gpu_that_only_emulates_bfloat16_everything_is_float32(tmp_path, monkeypatch):
    linear, results, weights = types_on_a_gpu(tmp_path, monkeypatch, False)
    assert linear == results == weights == {torch.float32}


def test_on_a_cpu_everything_is_float32(gpt):
    outputs = []
    for part in gpt.model.modules():
        if isinstance(part, torch.nn.Linear):
            part.register_forward_hook(lambda part, inputs, output: outputs.append(output))
    outputs += gpt.model(*gpt.get_batch('train'))
    assert len(outputs) > 2 and {output.dtype for output in outputs} == {torch.float32}


def hyperparameters_with(device):
    """The hyperparameters of gpt.py as they are with this device."""
    source = (PROJECT / 'gpt.py').read_text(encoding='utf-8')
    section = source.split('# --- Hyperparameters', 1)[1].split('\n# --- ', 1)[0]
    _, _, after_device = section.partition('\ndevice = ')
    values = {'device': device}
    exec(after_device.partition('\n')[2], values)
    return {name: value for name, value in values.items()
            if name not in ('device', '__builtins__')}


def test_every_cuda_device_takes_the_gpu_values_and_every_other_the_cpu_values():
    gpu, cpu = hyperparameters_with('cuda'), hyperparameters_with('cpu')
    assert gpu['gpu'] is True and cpu['gpu'] is False and gpu['n_embd'] > cpu['n_embd']
    for device in ('cuda:0', 'cuda:1', torch.device('cuda:1')):
        assert hyperparameters_with(device) == gpu
    for device in ('mps', 'cpu:0', torch.device('cpu'), 'CUDA', None, 0, 1.5, ''):
        assert hyperparameters_with(device) == cpu
