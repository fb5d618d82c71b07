"""benchmark.py: it compares the same model, and waits for the GPU."""
import subprocess

import pytest
import torch

import scripts
from conftest import PROJECT, SMALL, SMALL_BIGRAM, copy_script, import_script, run_here, tokens

benchmark = pytest.importorskip('benchmark')  # Windows has no `resource`
PROGRAM = PROJECT / 'tests' / 'lab' / 'benchmark.py'


def test_head_by_head_is_the_same_model(tmp_path, gpt):
    other = import_script(tmp_path / 'other', 'gpt.py', **SMALL)
    benchmark.head_by_head(other)
    weights = gpt.model.state_dict()
    for i in range(gpt.n_layer):
        parts = weights.pop(f'blocks.{i}.sa.qkv.weight').chunk(3)
        for name, part in zip(('query', 'key', 'value'), parts):
            for h, rows in enumerate(part.chunk(gpt.n_head)):
                weights[f'blocks.{i}.sa.heads.{h}.{name}.weight'] = rows
    missing, unexpected = other.model.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.endswith('.past') for name in missing)
    idx = tokens(gpt, gpt.block_size)
    torch.testing.assert_close(other.model(idx)[0], gpt.model(idx)[0])
    assert other.model.generate(idx, 7).shape == gpt.model.generate(idx, 7).shape


@pytest.mark.parametrize('program', benchmark.PROGRAMS)
def test_the_figures_are_plausible(tmp_path, monkeypatch, program):
    script, sizes = ('bigram.py', SMALL_BIGRAM) if program == 'bigram.py' else ('gpt.py', SMALL)
    copy_script(tmp_path, script, **sizes)
    monkeypatch.setattr(benchmark, 'PROJECT', tmp_path)
    figures = benchmark.measure(program, seconds=0, characters=5, block_size=8)
    assert 0.01 < figures['step'] < 1000 and 0.01 < figures['char'] < 1000  # milliseconds
    assert figures['batch'] == 4 * 8 and 50 < figures['memory'] < 50_000  # MiB


def test_it_waits_for_any_gpu(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, 'synchronize', waited.append)
    for device in ('cpu', 'cuda', 'cuda:1'):
        benchmark.synchronize(device)
    assert waited == ['cuda', 'cuda:1']


@pytest.mark.parametrize('arguments, status', [
    (['--help'], 0), (['ngram'], 2), (['--program', 'nanogpt'], 2), (['--context', 'long'], 2)])
def test_help_works_and_unknown_arguments_are_refused(monkeypatch, arguments, status):
    monkeypatch.setattr(subprocess, 'run', None)  # nothing is measured
    out, err, got = run_here(PROGRAM, *arguments)
    assert got == status and 'usage: benchmark.py' in out + err
