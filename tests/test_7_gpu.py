"""The GPU path: on a real GPU where there is one, and on the meta device everywhere.

Tensors of the meta device have a shape, a type and a device, but no numbers. What a script reads
back from it, by item and tolist, is made up here.
"""
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import (SMALL, SMALL_OF, TEXT, copy_script, each_script, import_script, run_here)
from scripts import PROJECT, edited

each_attention = pytest.mark.parametrize('fused_attention', [True, False])
COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


# --- A real GPU
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('script, options', [
    ('bigram.py', {}), ('gpt.py', {'bfloat16': False}), ('gpt.py', {'bfloat16': True})])
def test_on_a_real_gpu_a_script_trains_and_generates(tmp_path, script, options):
    path = copy_script(tmp_path, script, **{**SMALL_OF[script], **options, 'device': 'cuda'})
    out, err, status = run_here(path)
    assert (err, status) == ('', 0) and 'step 20' in out and len(out) > 500
    if script == 'gpt.py':
        assert run_here(path, '--prompt', 'The king')[1:] == ('', 0)
        cpu = copy_script(tmp_path, script, **SMALL)  # the model opens without a GPU, too
        assert run_here(cpu, '--prompt', 'The king')[1:] == ('', 0)


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
def random_states(monkeypatch):
    """Makes what has no meaning without a GPU harmless; the GPUs whose random state was saved and
    restored.
    """
    saved, restored, save = [], [], torch.save
    monkeypatch.setattr(torch.Tensor, 'item', lambda tensor: 1.0)
    monkeypatch.setattr(torch.Tensor, 'tolist', lambda tensor: [0] * tensor.numel())
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda *args, **kwargs: None)
    monkeypatch.setattr(torch.cuda, 'get_rng_state', saved.append)
    monkeypatch.setattr(torch.cuda, 'set_rng_state', lambda state, device: restored.append(device))
    monkeypatch.setattr(sys.modules['torch.optim.adam'], '_device_dtype_check_for_fused',
                        lambda *args: None)

    def save_zeros(checkpoint, path):
        """A file cannot hold the weights of the meta device: zeros instead."""
        weights = {name: torch.zeros_like(weight, device='cpu')
                   for name, weight in checkpoint['model'].items()}
        save({**checkpoint, 'model': weights}, path)

    monkeypatch.setattr(torch, 'save', save_zeros)
    return saved, restored


@each_attention
@pytest.mark.filterwarnings('ignore:.*(CUDA is not available|non-meta parameter)')
def test_gpt_trains_saves_loads_and_generates_on_one_device(tmp_path, random_states, fused_attention):
    path = copy_script(tmp_path, 'gpt.py', TEXT, ('max_new_tokens=500', 'max_new_tokens=5'), **{
        **SMALL, 'device': 'meta', 'gpu': True, 'fused_attention': fused_attention,
        'max_iters': 2, 'eval_interval': 1, 'n_layer': 1, 'dropout': 0.1, 'top_k': 5})
    # The check of the device reads a number back, which the meta device lets us make up.
    with OneDevice() as mode:
        out, err, status = run_here(path)
        assert (err, status) == ('', 0) and 'step 2: train loss 1.0000' in out
        # The sample of each evaluation leaves the GPU's random state as it was.
        assert random_states == (['meta'] * 3, ['meta'] * 3)
        assert run_here(path, '--prompt', 'The king')[1:] == ('', 0)
    assert (torch.ops.aten.multinomial, 'meta') in mode.seen
    assert (torch.ops.aten.embedding, 'cpu') not in mode.seen


def test_bigram_trains_and_generates_on_one_device(tmp_path, random_states):
    path = copy_script(tmp_path, 'bigram.py', **{**SMALL_OF['bigram.py'], 'device': 'meta'})
    with OneDevice() as mode:
        out, err, status = run_here(path)
    assert (err, status) == ('', 0) and 'step 20: train loss 1.0000' in out
    assert (torch.ops.aten.multinomial, 'meta') in mode.seen
    assert (torch.ops.aten.embedding, 'cpu') not in mode.seen


def test_the_device_mode_refuses_a_mixture_and_allows_a_copy():
    """Otherwise the tests above could not fail."""
    here, there = torch.zeros(2), torch.zeros(2, device='meta')
    with OneDevice():
        here.to('meta') + there
        with pytest.raises(RuntimeError, match='two devices'):
            here + there


# --- bfloat16, on a CPU that autocast takes for a GPU
@pytest.mark.parametrize('fused_attention, has_units', [(True, True), (False, True), (True, False)])
def test_on_a_gpu_bfloat16_reaches_the_matrices_and_not_the_loss(
        tmp_path, monkeypatch, fused_attention, has_units):
    """Where the GPU has units for bfloat16: one that emulates it is faster without."""
    autocast = torch.autocast
    monkeypatch.setattr(torch, 'autocast', lambda kind, **options: autocast('cpu', **options))
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported',
                        lambda including_emulation=True: has_units or including_emulation)
    gpt = import_script(tmp_path, 'gpt.py', **SMALL, gpu=True, fused_attention=fused_attention)
    matrices = []
    for part in gpt.model.modules():
        if isinstance(part, torch.nn.Linear):
            part.register_forward_hook(lambda part, inputs, output: matrices.append(output.dtype))
    logits, loss = gpt.model(*gpt.get_batch('train'))
    loss.backward()
    assert len(matrices) == 4 * SMALL['n_layer'] + 1
    assert set(matrices) == {torch.bfloat16 if has_units else torch.float32}
    weights = {p.dtype for p in gpt.model.parameters()} | {p.grad.dtype
                                                           for p in gpt.model.parameters()}
    assert weights | {logits.dtype, loss.dtype} == {torch.float32}


def test_on_a_cpu_everything_is_float32(gpt):
    outputs = [*gpt.model(*gpt.get_batch('train'))]
    for part in gpt.model.modules():
        if isinstance(part, torch.nn.Linear):
            part.register_forward_hook(lambda part, inputs, output: outputs.append(output))
    gpt.model(*gpt.get_batch('train'))
    assert len(outputs) > 2 and {output.dtype for output in outputs} == {torch.float32}


def test_every_cuda_device_takes_the_gpu_values_and_every_other_the_cpu_values():
    source = (PROJECT / 'gpt.py').read_text(encoding='utf-8')

    def sizes(device):
        section = edited(source, bfloat16=False).partition('\ndevice = ')[2].partition('\n# ---')[0]
        values = {'device': device}
        exec(section.partition('\n')[2], values)
        return values['n_embd'], values['batch_size']

    for device in ('cuda', 'cuda:0', 'cuda:1', torch.device('cuda:1')):
        assert sizes(device) == (384, 64)
    for device in ('cpu', 'mps', 'cpu:0', torch.device('cpu'), 'CUDA', None, 0, 1.5, ''):
        assert sizes(device) == (128, 8)
