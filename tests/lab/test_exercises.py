"""exercises.py: each solution fits gpt.py, trains, and does what its exercise says."""
import math
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import exercises
import scripts
from conftest import (PROJECT, SMALL, TEXT, copy_script, edited, exit_message, load, run_here,
                      save, tokens)
from exercises import (EXERCISES, PARTS, change, measure, prepare, read_results,
                       run_python)

PROGRAM = PROJECT / 'tests' / 'lab' / 'exercises.py'
SOURCE = (PROJECT / 'gpt.py').read_text(encoding='utf-8')
VARIANTS = {f'{exercise.title}: {name}': variant for exercise in EXERCISES.values()
            for name, variant in exercise.variants.items()}
VARIANTS.update({f'without {name}': variant for name, variant in PARTS.items()
                 if name != 'nothing'})
TRAINED, SAMPLED, FASTER = ([name for name, variant in VARIANTS.items() if variant.run == run]
                            for run in ('train', 'sample', 'speed'))
PAIRS, MUON, TODAY, CACHE, PARALLEL, FUSED = (VARIANTS[name] for name in (
    'Another tokenizer: 300 pairs', 'Another optimizer: Muon', 'All of them together: all of them',
    'A cache of keys and values: cache', 'More than one process: two processes', FASTER[0]))
# A training run: what it prints.
PRINTED = """\
627,009 parameters
step 0 of 1000: train loss 4.5000, val loss 4.4000, 1 s
    xyz
step 500 of 1000: train loss 1.5000, val loss 1.7500, 21 s
    abc
step 1000 of 1000: train loss 1.2500, val loss 2.0000, 41 s
    abc / abc
The best weights generate:

The cat sits.
"""


def solved(folder, variant, steps=4):
    """A variant's gpt.py, small, with a text of 72,000 characters, as a module."""
    small = {name: value for name, value in {**SMALL, 'warmup_iters': 3}.items()
             if name not in ('max_iters', 'device', *variant.settings)}
    folder.mkdir(exist_ok=True)
    prepare(folder, variant, SOURCE, TEXT * 9, steps, **small)
    return load(folder / 'gpt.py') if variant.run != 'torchrun' else None


def loss_after_training(gpt):
    """The validation loss of the saved weights, in nats per character."""
    gpt.model.generate = lambda context, max_new_tokens: context  # samples would take seconds
    gpt.train()
    return min(val for step, _, val in gpt.history if step > 0)


def greedy(gpt, idx, length):
    """The text that continues idx if nothing is left to chance."""
    gpt.top_k = 1
    return gpt.model.generate(idx, length)


@pytest.fixture(scope='module')
def plain_loss(tmp_path_factory):
    return loss_after_training(solved(tmp_path_factory.mktemp('plain'), change()))


@pytest.mark.parametrize('name', TRAINED)
def test_a_solution_trains_and_makes_a_difference(name, tmp_path, plain_loss):
    loss = loss_after_training(solved(tmp_path, VARIANTS[name]))
    assert math.isfinite(loss) and loss != plain_loss


@pytest.mark.parametrize('name', SAMPLED)
def test_a_sampling_setting_changes_the_text(name, tmp_path):
    save(solved(tmp_path, change()))
    program = PROJECT / 'tests' / 'lab' / 'sample.py'
    one, other = (run_here(program, *exercises.sample_arguments(variant), '--length', '40',
                           '--checkpoint', str(tmp_path))
                  for variant in (change(run='sample'), VARIANTS[name]))
    assert one[2] == other[2] == 0
    assert one[0].startswith('The ') and other[0].startswith('The ') and one[0] != other[0]


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


def test_all_parts_together_are_the_parts_of_the_exercises_before(tmp_path):
    gpt = solved(tmp_path, TODAY)
    names = [name for name, _ in gpt.model.named_parameters()]
    assert not any('bias' in name for name in names)
    kinds = Counter(type(module).__name__ for module in gpt.model.modules())
    assert kinds['RMSNorm'] == 2 * gpt.n_layer + 1 and 'LayerNorm' not in kinds
    block, (x, y) = gpt.model.blocks[0], gpt.get_batch('train')
    assert block.ffwd.proj.in_features == 8 * gpt.n_embd // 3
    gpt.model(x, y)[1].backward()
    assert gpt.model.position_embedding_table.weight.grad is None
    x = torch.randn(1, 9, gpt.n_embd)
    before = block(x)
    swapped = block(x[:, [1, 0, *range(2, 9)]])  # the last position reads the same, in another order
    assert not torch.allclose(swapped[:, -1], before[:, -1], atol=1e-4)
    with torch.no_grad():
        block.sa.query.weight *= 3
        block.sa.key.weight *= 3  # queries and keys are normed, so that nothing changes
    torch.testing.assert_close(block(x), before, rtol=1e-3, atol=1e-4)


def test_the_cache_changes_no_character_until_the_context_is_full(tmp_path):
    plain, cached = solved(tmp_path, change()), solved(tmp_path, CACHE)
    cached.model.load_state_dict(plain.model.state_dict())
    idx, full = tokens(plain, 5), plain.block_size + 1  # the last token that saw all before it
    texts = [greedy(gpt, idx, 40) for gpt in (plain, cached)]
    assert torch.equal(texts[0][:, :full], texts[1][:, :full])
    # The next one is what the model says of the later half of the context.
    later_half = texts[1][:, full - plain.block_size // 2:full]
    assert torch.equal(plain.model(later_half)[0][:, -1].argmax(-1), texts[1][:, full])
    x, y = plain.get_batch('train')
    torch.testing.assert_close(cached.model(x, y)[1], plain.model(x, y)[1])  # no cache is left


def test_torchs_own_attention_gives_the_same_loss_and_gradients_up_to_rounding(tmp_path):
    plain, fused = solved(tmp_path, change()), solved(tmp_path, FUSED)
    x, y = plain.get_batch('train')
    losses = [gpt.model(x, y)[1] for gpt in (plain, fused)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for one, other in zip(plain.model.parameters(), fused.model.parameters()):
        torch.testing.assert_close(one.grad, other.grad)


def test_torchs_own_attention_drops_attention_weights_in_training_only(tmp_path):
    gpt = load(copy_script(tmp_path, 'gpt.py', TEXT, *FUSED.edits, **{**SMALL, 'dropout': 0.5}))
    attention = gpt.model.blocks[0].sa
    attention.dropout = torch.nn.Identity()  # on the output; only the weights are dropped now
    x = torch.randn(2, 16, gpt.n_embd)
    assert not torch.equal(attention(x), attention(x))
    attention.eval()
    assert torch.equal(attention(x), attention(x))


def test_the_time_of_a_step_is_compared_with_the_same_settings(tmp_path, monkeypatch):
    """With each context: the two versions differ by the attention alone."""
    (tmp_path / 'input.txt').write_text(TEXT * 9, encoding='utf-8')
    monkeypatch.setattr(exercises, 'PROJECT', tmp_path)
    small = {name: SMALL[name] for name in ('n_embd', 'n_head', 'n_layer')}
    for name in FASTER:
        result = measure(VARIANTS[name], SOURCE, 2, **small)
        assert result['difference'] < 1e-5 and 0 < result['ratio'] < 10


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


def test_an_exercise_runs_on_the_cpu_and_leaves_the_project_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(exercises, 'PROJECT', tmp_path)
    files = {'input.txt': TEXT.encode(), 'gpt.pt': b'my model'}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    source = edited(SOURCE, device='meta')  # a device with which gpt.py does not even start
    small = {name: value for name, value in SMALL.items() if name not in ('max_iters', 'device')}
    result = measure(change(), source, 2, **{**small, 'eval_interval': 1})
    assert 3 < result['best'] <= result['val'] < 5 and result['best_step'] in (0, 1, 2)
    assert 3 < result['train'] < 5 and result['sample'] and 0 <= result['words'] <= 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_the_results_are_read_from_what_a_training_run_prints():
    result = read_results(PRINTED, 'The dog sits. ' * 100)
    assert (result['train'], result['val']) == (1.25, 2.0)
    assert (result['best'], result['best_step']) == (1.75, 500)
    assert result['sample'] == '/ The cat sits. /' and result['words'] == pytest.approx(2 / 3)


def test_a_training_run_that_prints_no_losses_is_an_error():
    with pytest.raises(ValueError, match='no losses: 627,009 parameters'):
        read_results(PRINTED.replace('loss', 'error'), TEXT)


def test_a_loss_that_is_not_finite_is_a_result(tmp_path):
    """gpt.py ends with an error, and the exercise says what it printed."""
    edit = ('F.cross_entropy(', 'math.nan * F.cross_entropy(')
    out, err, status = run_here(copy_script(tmp_path, 'gpt.py', TEXT, edit, **SMALL))
    script = tmp_path / 'same.py'  # prints the same, and fails, but starts faster
    script.write_text(f'import sys\nprint({out!r})\nsys.exit({err!r})', encoding='utf-8')
    assert status == 1 and math.isnan(read_results(run_python([script]), TEXT)['val'])


def test_a_gpt_that_fails_in_another_way_is_an_error(tmp_path):
    script = tmp_path / 'gpt.py'
    script.write_text("assert False, 'something else'", encoding='utf-8')
    with pytest.raises(ValueError, match='AssertionError: something else'):
        run_python([script])


@pytest.mark.parametrize('run', ['sample', 'cache'])
def test_an_exercise_for_the_saved_model_says_what_to_do_without_one(run, tmp_path, monkeypatch):
    monkeypatch.setattr(exercises, 'PROJECT', tmp_path)
    assert 'train with python gpt.py' in exit_message(measure, change(run=run), SOURCE)


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
    ([], {'n_layer': 2}), ([], {'learning_rate': 1e-2}), ([], {'top_k': 5}),
    ([('F.relu(out)', 'F.silu(out)')], {})])
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
    loss_after_training(solved(tmp_path, VARIANTS['Rotary position embeddings: rotary']))
    losses = [float(loss) for loss in exercises.longer_contexts(tmp_path).split(', ')]
    assert len(losses) == 3 and all(0 < loss < 5 for loss in losses)


def test_a_text_in_which_all_characters_are_equally_frequent():
    assert read_results(PRINTED, 'abcd' * 1000)['letters'] == pytest.approx(math.log(4))


def test_a_solution_is_shown_as_a_diff():
    out = run_here(PROGRAM, '1', '--show')[0]
    old, new = (line for line in out.splitlines() if '+ causal_mask' in line and line[0] in '-+')
    assert new[1:] == old[1:].replace('scores = ', '# scores = ')


def test_an_exercise_for_the_page_sends_to_its_text():
    out, err, status = run_here(PROGRAM, '0')
    assert (err, status) == ('', 0) and 'do exercise 0 as tests/lab/README.md says' in out


def test_the_solution_of_an_exercise_without_edits_is_a_command():
    assert run_here(PROGRAM, '6', '--show')[0].splitlines()[:2] == [
        '# temperature = 0.5', 'python tests/lab/sample.py "The " --temperature 0.5']


@pytest.mark.parametrize('arguments', [
    ['99'], ['3', '--steps', '0'], ['--show'], ['0', '--show'], ['three']])
def test_a_wrong_argument_is_refused(arguments):
    out, err, status = run_here(PROGRAM, *arguments)
    assert (out, status) == ('', 2) and 'exercises.py: error: ' in err
