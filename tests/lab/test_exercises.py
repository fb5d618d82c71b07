"""exercises.py: each solution fits gpt.py, trains, and does what its exercise says."""
import math
import os
import subprocess
import sys

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import exercises
import scripts
from conftest import PROJECT, SMALL, TEXT, copy_script, edited, load, run_here, tokens
from exercises import EXERCISES, PARTS, change, measure, prepare, read_results

PROGRAM = PROJECT / 'tests' / 'lab' / 'exercises.py'
SOURCE = (PROJECT / 'gpt.py').read_text(encoding='utf-8')
VARIANTS = {f'{exercise.title}: {name}': variant for exercise in EXERCISES.values()
            for name, variant in exercise.variants.items()}
VARIANTS.update({f'without {name}': variant for name, variant in PARTS.items()
                 if name != 'nothing'})
TRAINED, SAMPLED = ([name for name, variant in VARIANTS.items() if variant.run == run]
                    for run in ('train', 'prompt'))
PAIRS, MUON, CACHE, PARALLEL = (VARIANTS[name] for name in (
    'Another tokenizer: 300 pairs', 'Another optimizer: Muon', 'A cache of keys and values: cache',
    'More than one process: two processes'))


def solved(folder, variant, steps=4):
    """A variant's gpt.py, small, with a text of 72,000 characters, as a module."""
    small = {name: value for name, value in SMALL.items()
             if name not in ('max_iters', 'device', *variant.settings)}
    folder.mkdir(exist_ok=True)
    prepare(folder, variant, SOURCE, TEXT * 9, steps, **small)
    return load(folder / 'gpt.py') if variant.run != 'torchrun' else None


def loss_after_training(gpt):
    """The validation loss of the saved weights, in nats per character."""
    gpt.train()
    gpt.load(gpt.checkpoint_path)
    return gpt.estimate_loss()['val']


@pytest.fixture(scope='module')
def plain_loss(tmp_path_factory):
    return loss_after_training(solved(tmp_path_factory.mktemp('plain'), change()))


@pytest.mark.parametrize('name', TRAINED)
def test_a_solution_trains_and_makes_a_difference(name, tmp_path, plain_loss):
    loss = loss_after_training(solved(tmp_path, VARIANTS[name]))
    assert math.isfinite(loss) and loss != plain_loss


@pytest.mark.parametrize('name', SAMPLED)
def test_a_sampling_setting_changes_the_text(name, tmp_path):
    context = torch.zeros((1, 1), dtype=torch.long)
    one, other = (solved(tmp_path, variant).model.generate(context, 50)  # from the same seed
                  for variant in (VARIANTS[name], change()))
    assert not torch.equal(one, other)


def test_pairs_lose_no_character_and_their_loss_is_per_character(tmp_path):
    gpt = solved(tmp_path, PAIRS)
    assert gpt.decode(gpt.encode(TEXT)) == TEXT and len(gpt.data) < len(gpt.text)
    for parameter in gpt.model.lm_head.parameters():
        parameter.data.zero_()  # equal logits: a loss of ln(vocab_size) per token
    assert gpt.estimate_loss()['val'] == pytest.approx(
        math.log(gpt.vocab_size) * len(gpt.data) / len(gpt.text))


def test_less_to_learn_from_leaves_the_validation_text_as_it_is(tmp_path):
    plain = solved(tmp_path / 'plain', change())
    name = 'Overfitting, and dropout against it: 20,000 characters'
    less = solved(tmp_path / 'less', VARIANTS[name])
    assert torch.equal(less.train_data, plain.train_data[:20_000])
    assert torch.equal(less.val_data, plain.val_data)


def test_muon_and_adamw_divide_the_weights_and_share_the_schedule(tmp_path):
    gpt, owned, rates = solved(tmp_path, MUON), set(), []

    def note(optimizer, *_):
        owned.update((type(optimizer).__name__, parameter)
                     for group in optimizer.param_groups for parameter in group['params'])
        rates.append(optimizer.param_groups[0]['lr'])
    hook = register_optimizer_step_pre_hook(note)
    gpt.train()
    hook.remove()
    inside = {p for p in gpt.model.blocks.parameters() if p.dim() == 2}
    assert owned == {('Muon' if p in inside else 'AdamW', p) for p in gpt.model.parameters()}
    assert rates[::2] == rates[1::2] and len(set(rates)) == 4


def test_the_cache_changes_no_character_until_the_context_is_full(tmp_path):
    plain, cached = solved(tmp_path, change()), solved(tmp_path, CACHE)
    cached.model.load_state_dict(plain.model.state_dict())
    idx, full = tokens(plain, 5), plain.block_size + 1  # the last token that saw all before it
    texts = [gpt.model.generate(idx, 40, top_k=1) for gpt in (plain, cached)]
    assert torch.equal(texts[0][:, :full], texts[1][:, :full])
    # The next one is what the model says of the later half of the context.
    later_half = texts[1][:, full - plain.block_size // 2:full]
    assert torch.equal(plain.model(later_half)[0][:, -1].argmax(-1), texts[1][:, full])
    x, y = plain.get_batch('train')
    torch.testing.assert_close(cached.model(x, y)[1], plain.model(x, y)[1])  # no cache is left


def test_one_process_of_the_parallel_version_trains_as_gpt_does(tmp_path, monkeypatch):
    """In this process: two of them, and torchrun, would take ten seconds to start."""
    gpt = solved(tmp_path, change())
    torch.manual_seed(gpt.seed)
    expected = loss_after_training(gpt)
    solved(tmp_path, PARALLEL)
    for name, value in dict(RANK=0, WORLD_SIZE=1, MASTER_ADDR='127.0.0.1', MASTER_PORT=0).items():
        monkeypatch.setenv(name, str(value))
    out, err, status = run_here(tmp_path / 'gpt.py')
    assert (err, status) == ('', 0)
    assert read_results(out, TEXT)['val'] == pytest.approx(expected, abs=1e-4)


def test_an_exercise_runs_on_the_cpu_whatever_gpt_py_says(tmp_path, monkeypatch):
    monkeypatch.setattr(exercises, 'PROJECT', tmp_path)
    (tmp_path / 'input.txt').write_text(TEXT, encoding='utf-8')
    source = edited(SOURCE, device='meta')  # a device with which gpt.py does not even start
    small = {name: value for name, value in SMALL.items() if name not in ('max_iters', 'device')}
    result = measure(change(), source, 2, **{**small, 'eval_interval': 1})
    assert 3 < result['best'] <= result['val'] < 5 and result['best_step'] in (0, 1, 2)
    assert 3 < result['train'] < 5 and result['sample'] and 0 <= result['words'] <= 1
    assert [path.name for path in tmp_path.iterdir()] == ['input.txt']


def test_it_prints_title_result_and_where_to_read_on(tmp_path, monkeypatch, capsys):
    copy_script(tmp_path, 'gpt.py', device='meta')
    monkeypatch.setattr(exercises, 'PROJECT', tmp_path)
    monkeypatch.setattr(exercises, 'measure', lambda *_, **__: {'val': 1.5, 'letters': 3.25})
    monkeypatch.setattr(sys, 'argv', ['exercises.py', '4'])
    exercises.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == '4. Remove the residual connections'
    assert 'no residual connections: 1.50 (character frequencies alone: 3.25)' in lines
    assert lines[-1] == 'What to expect, and why: exercise 4 in tests/lab/README.md'


@pytest.mark.parametrize('argument', ['9', '--all'])
@pytest.mark.parametrize('edits, hyperparameters', [
    ([], {'n_layer': 2}), ([], {'learning_rate': 1e-2}), ([], {'fused_attention': False}),
    ([('F.relu(self.fc(x))', 'F.silu(self.fc(x))')], {})])
def test_an_edited_gpt_py_is_refused_before_anything_is_trained(
        tmp_path, monkeypatch, argument, edits, hyperparameters):
    copy_script(tmp_path, 'gpt.py', TEXT, *edits, **hyperparameters)
    monkeypatch.setattr(scripts, 'PROJECT', tmp_path)
    monkeypatch.setattr(subprocess, 'Popen', None)  # to call it would be an error
    out, err, status = run_here(PROGRAM, argument)
    assert (out, status, err.count('\n')) == ('', 1, 1)
    assert err.startswith('Error: gpt.py must be unedited: undo your edits')


def test_the_parts_are_measured_with_several_seeds_in_a_table(tmp_path, monkeypatch, capsys):
    losses = {1337: 1.5, 1: 1.25, 2: 1.75}
    monkeypatch.setattr(exercises, 'measure', lambda *_, seed: {'val': losses[seed]})
    monkeypatch.setattr(os, 'environ', {})
    exercises.work_parts(SOURCE)
    rows = capsys.readouterr().out.splitlines()[2:-2]
    assert rows == [f'| {part} | 1.500 | 1.500, 1.250, 1.750 |' for part in PARTS]


def test_a_longer_context_than_in_training_is_measured(tmp_path):
    gpt = solved(tmp_path, VARIANTS['Rotary position embeddings: rotary'])
    gpt.train()
    losses = [float(loss) for loss in exercises.longer_contexts(tmp_path).split(', ')]
    assert len(losses) == 3 and all(0 < loss < 5 for loss in losses)


def test_a_text_in_which_all_characters_are_equally_frequent():
    assert read_results('', 'abcd' * 1000)['letters'] == pytest.approx(math.log(4))


def test_a_solution_is_shown_as_a_diff():
    out = run_here(PROGRAM, '1', '--show')[0]
    old, new = (line for line in out.splitlines() if 'is_causal=' in line and line[0] in '-+')
    assert new[1:] == old[1:].replace('is_causal=True', 'is_causal=False')


@pytest.mark.parametrize('arguments', [['99'], ['3', '--steps', '0'], ['--show'], ['three']])
def test_a_wrong_argument_is_refused(arguments):
    out, err, status = run_here(PROGRAM, *arguments)
    assert (out, status) == ('', 2) and 'exercises.py: error: ' in err
