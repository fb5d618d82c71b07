"""exercises.py: each solution fits gpt.py, trains, and does what its exercise says."""
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import exercises
import measure
from conftest import (PROJECT, SMALL, TEXT, copy_script, exit_message, load, run_here, save, tokens)
from measure import DEFAULTS, prepare, read_results, run_python
from solutions import EXERCISES, GROUPS, PARTS, change
from watch import attention

VARIANTS = {f'{exercise.title}: {name}': variant for exercise in EXERCISES.values()
            for name, variant in exercise.variants.items()}
VARIANTS.update({f'without {name}': variant for name, variant in PARTS.items()
                 if name != 'nothing'})


def names_of(*measures):
    return [name for name, variant in VARIANTS.items() if variant.measure in measures]


PAIRS, MUON, TODAY, CLIPPED, CACHE, PARALLEL, FUSED = (VARIANTS[name] for name in (
    'Another tokenizer: 300 pairs', 'Another optimizer: Muon', 'All of them together: all of them',
    'Gradient clipping: clipped, learning_rate = 1.5e-3', 'A cache of keys and values: cache',
    'More than one process: two processes', "Torch's own attention: block_size = 128"))
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


@pytest.fixture
def project(tmp_path):
    """A project with gpt.py and a text of 72,000 characters."""
    copy_script(tmp_path / 'project', 'gpt.py', TEXT * 9)
    return tmp_path / 'project'


@pytest.fixture
def solved(project, tmp_path):
    """A variant's gpt.py, small, as a module."""
    def solved(variant, steps=4, **settings):
        small = {name: value for name, value in {**SMALL, 'warmup_iters': 3, **settings}.items()
                 if name not in ('max_iters', *variant.settings)}
        folder = tmp_path / f'solved {len(list(tmp_path.iterdir()))}'
        folder.mkdir()
        prepare(folder, variant, project, steps, **small)
        return load(folder / 'gpt.py')
    return solved


@pytest.fixture
def before_each_step():
    """Registers what is called before each step of any optimizer, until the test ends."""
    hooks = []
    yield lambda function: hooks.append(register_optimizer_step_pre_hook(function))
    for hook in hooks:
        hook.remove()


def greedy(gpt, idx, length):
    """The text that continues idx if nothing is left to chance."""
    gpt.top_k = 1
    return gpt.model.generate(idx, length)


# --- The solutions
@pytest.mark.parametrize('name', names_of(measure.train, measure.train_and_read_further))
def test_a_solution_fits_trains_and_writes(name, solved):
    gpt = solved(VARIANTS[name], steps=2)
    gpt.report = lambda step, started: None  # estimates and samples would take seconds
    gpt.train()
    assert math.isfinite(gpt.model(*gpt.get_batch('val'))[1].item())
    assert gpt.model.generate(tokens(gpt, 3), 2).shape == (3, 5)


@pytest.mark.parametrize('name', names_of(measure.sample))
def test_a_sampling_setting_changes_the_text(name, solved, project):
    save(solved(change()))
    for path in project.parent.glob('solved*/gpt-*.pt'):
        path.rename(project / path.name)
    one, other = (measure.sample(variant, project, length=40)['sample']
                  for variant in (change(), VARIANTS[name]))
    assert one.startswith('The ') and other.startswith('The ') and one != other


def test_pairs_lose_no_character_and_their_loss_is_per_character(solved):
    gpt = solved(PAIRS)
    assert gpt.decode(gpt.encode(TEXT)) == TEXT and len(gpt.data) < len(gpt.text)
    for parameter in gpt.model.lm_head.parameters():
        parameter.data.zero_()  # equal logits: a loss of ln(vocab_size) per token
    assert gpt.estimate_loss()['val'] == pytest.approx(
        math.log(gpt.vocab_size) * len(gpt.data) / len(gpt.text))


def test_less_to_learn_from_leaves_the_validation_text_as_it_is(solved):
    plain = solved(change())
    name = 'Overfitting, and dropout against it: 20,000 characters'
    less = solved(VARIANTS[name])
    assert torch.equal(less.train_data, plain.train_data[:20_000])
    assert torch.equal(less.val_data, plain.val_data)


def test_muon_and_adamw_divide_the_weights_and_share_the_schedule(solved, before_each_step):
    gpt, owned, rates = solved(MUON), set(), []

    def note(optimizer, *_):
        owned.update((type(optimizer).__name__, parameter)
                     for group in optimizer.param_groups for parameter in group['params'])
        rates.append(optimizer.param_groups[0]['lr'])
    before_each_step(note)
    gpt.train()
    inside = {p for p in gpt.model.blocks.parameters() if p.dim() == 2}
    assert owned == {('Muon' if p in inside else 'AdamW', p) for p in gpt.model.parameters()}
    assert rates[::2] == rates[1::2] and len(set(rates)) == 4


def test_all_parts_together_are_the_parts_of_the_exercises_before(solved):
    gpt = solved(TODAY)
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
    swapped = block(x[:, [1, 0, *range(2, 9)]])  # the last position reads them in another order
    assert not torch.allclose(swapped[:, -1], before[:, -1], atol=1e-4)
    with torch.no_grad():
        attention(gpt, 1).query.weight *= 3
        attention(gpt, 1).key.weight *= 3  # queries and keys are normed, so that nothing changes
    torch.testing.assert_close(block(x), before, rtol=1e-3, atol=1e-4)


def test_the_cache_changes_no_character_until_the_context_is_full(solved):
    plain, cached = solved(change()), solved(CACHE)
    cached.model.load_state_dict(plain.model.state_dict())
    idx, full = tokens(plain, 5), plain.block_size + 1  # the last token that saw all before it
    texts = [greedy(gpt, idx, 40) for gpt in (plain, cached)]
    assert torch.equal(texts[0][:, :full], texts[1][:, :full])
    # The next one is what the model says of the later half of the context.
    later_half = texts[1][:, full - plain.block_size // 2:full]
    assert torch.equal(plain.model(later_half)[0][:, -1].argmax(-1), texts[1][:, full])
    x, y = plain.get_batch('train')
    torch.testing.assert_close(cached.model(x, y)[1], plain.model(x, y)[1])  # no cache is left


def test_torchs_own_attention_gives_the_same_loss_and_gradients_up_to_rounding(solved):
    plain, fused = solved(change()), solved(FUSED)
    x, y = plain.get_batch('train')
    losses = [gpt.model(x, y)[1] for gpt in (plain, fused)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for one, other in zip(plain.model.parameters(), fused.model.parameters()):
        torch.testing.assert_close(one.grad, other.grad)


def test_torchs_own_attention_drops_attention_weights_in_training_only(solved):
    gpt = solved(FUSED, dropout=0.5)
    layer = attention(gpt, 1)
    layer.dropout = torch.nn.Identity()  # on the output; only the weights are dropped now
    x = torch.randn(2, 16, gpt.n_embd)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_gradients_are_clipped_once_in_each_step(solved, before_each_step, monkeypatch):
    """If gpt.py itself clips already, this fails: then nothing is left of exercise 20."""
    gpt, calls, norms, clip = solved(CLIPPED), [], [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_',
                        lambda *arguments: calls.append(arguments) or clip(*arguments))
    before_each_step(lambda *_: norms.append(torch.nn.utils.get_total_norm(
        [p.grad for p in gpt.model.parameters() if p.grad is not None]).item()))
    gpt.model.lm_head.weight.data *= 100  # so that the gradients are long
    gpt.train()
    assert len(calls) == 4 and norms == pytest.approx([1.0] * 4, rel=1e-4)


def test_one_process_of_the_parallel_version_trains_as_gpt_does(solved, project, monkeypatch):
    """In this process: two of them, and torchrun, would take ten seconds to start."""
    gpt = solved(change())
    torch.manual_seed(gpt.seed)
    gpt.train()
    small = {name: value for name, value in {**SMALL, 'warmup_iters': 3}.items()
             if name != 'max_iters'}
    prepare(project.parent, PARALLEL, project, 4, **small)
    for name, value in dict(RANK=0, WORLD_SIZE=1, MASTER_ADDR='127.0.0.1', MASTER_PORT=0).items():
        monkeypatch.setenv(name, str(value))
    out, err, status = run_here(project.parent / 'gpt.py')
    assert (err, status) == ('', 0)
    assert read_results(out, TEXT)['val'] == pytest.approx(gpt.history[-1][2], abs=1e-4)


# --- Measuring
def settings(**more):
    return {**{name: value for name, value in SMALL.items() if name != 'max_iters'}, **more}


def test_an_exercise_leaves_the_project_as_it_is_whatever_its_settings_are(project):
    """They are set in a copy: here for a device on which gpt.py does not even start."""
    copy_script(project, 'gpt.py', TEXT * 9, (
        '\n# --- Text', "\nn_layer, device, max_iters = 50, 'meta', 10**9\n\n# --- Text"))
    files = {path.name: path.read_bytes() for path in project.iterdir()}
    result = measure.train(change(), project, 2, **settings(eval_interval=1))
    assert 3 < result['best'] <= result['val'] < 5 and result['best_step'] in (0, 1, 2)
    assert 3 < result['train'] < 5 and result['sample'] and 0 <= result['words'] <= 1
    assert {path.name: path.read_bytes() for path in project.iterdir()} == files


def test_the_figures_are_those_of_the_default_settings(project, tmp_path):
    copy_script(project, 'gpt.py', TEXT * 9, n_embd=64, seed=5, eval_iters=7, temperature=1.5)
    prepare(tmp_path, change(steps=3000, n_layer=6), project)
    gpt = load(tmp_path / 'gpt.py')
    expected = {**DEFAULTS, 'max_iters': 3000, 'n_layer': 6}
    assert {name: getattr(gpt, name) for name in expected} == expected


def test_changed_code_is_named_and_only_where_an_exercise_edits_it(project, tmp_path):
    copy_script(project, 'gpt.py', TEXT * 9, ('F.relu(out)', 'F.silu(out)'))
    with pytest.raises(ValueError, match=r'0 times, not once: out = F\.relu\(out\)\): put that'):
        prepare(tmp_path, VARIANTS['Another activation function: GELU'], project)
    prepare(tmp_path, VARIANTS['Weight tying: tied weights'], project)
    no_positions = VARIANTS['Take the positions away: no positions']
    copy_script(project, 'gpt.py', TEXT * 9, *no_positions.edits)
    with pytest.raises(ValueError, match='0 times'):  # it is a comment there already
        prepare(tmp_path, no_positions, project)


def test_the_time_of_a_step_is_compared_with_the_same_settings(project):
    """With each context: the two versions differ by the attention alone."""
    small = {name: SMALL[name] for name in ('n_embd', 'n_head', 'n_layer')}
    for name in names_of(measure.compare_steps):
        result = measure.compare_steps(VARIANTS[name], project, 10, **small)
        assert result['difference'] < 1e-5 and result['ratio'] > 0
    gelu = VARIANTS['Another activation function: GELU']
    assert measure.compare_steps(gelu, project, 10, **small)['difference'] > 1e-3


def test_the_caches_are_compared_with_the_newest_run(project, solved):
    save(solved(change()))
    for path in project.parent.glob('solved*/gpt-*.pt'):
        path.rename(project / path.name)
    result = measure.compare_caches(CACHE, project)
    assert SMALL['block_size'] <= result['same'] < 500  # then the two begin again elsewhere


def test_the_results_are_read_from_what_a_training_run_prints():
    result = read_results(PRINTED, 'The dog sits. ' * 100)
    assert (result['train'], result['val']) == (1.25, 2.0)
    assert (result['best'], result['best_step']) == (1.75, 500)
    assert result['sample'] == '/ The cat sits. /' and result['words'] == pytest.approx(2 / 3)


def test_a_training_run_that_prints_no_losses_is_an_error():
    with pytest.raises(ValueError, match='no losses: 627,009 parameters'):
        read_results(PRINTED.replace('loss', 'error'), TEXT)


def test_a_training_run_that_was_stopped_is_no_result():
    """gpt.py itself ends well after Ctrl-C."""
    stopped = PRINTED.replace('step 1000 of', 'step 900 of')
    with pytest.raises(ValueError, match='stopped after step 900 of 1000'):
        read_results(stopped, TEXT)


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


@pytest.mark.parametrize('run', [measure.sample, measure.compare_caches])
def test_an_exercise_for_the_saved_model_says_what_to_do_without_one(run, project):
    assert 'train with python gpt.py' in exit_message(run, change(), project)


def test_a_longer_context_than_in_training_is_measured(project, monkeypatch):
    monkeypatch.setattr(measure, 'run_python', lambda arguments, _: run_here(*arguments)[0])
    variant = VARIANTS['Rotary position embeddings: rotary']
    result = measure.train_and_read_further(variant, project, 2, **settings())
    assert all(0 < float(loss) < 5 for loss in result['further'].split(', '))


def test_a_text_in_which_all_characters_are_equally_frequent():
    assert read_results(PRINTED, 'abcd' * 1000)['unigram'] == pytest.approx(math.log(4))


def test_the_mean_of_the_weights_is_that_of_the_last_five_reports(solved, monkeypatch):
    variant = GROUPS['full length']['the mean of the weights at the last five reports']
    gpt, weights = solved(replace(variant, text=None), steps=7, eval_interval=1), []
    save = gpt.save
    monkeypatch.setattr(gpt, 'save', lambda step, *others: (
        weights.append(gpt.model.lm_head.weight.detach().clone()), save(step, *others)))
    gpt.train()
    assert len(weights) == 8
    assert torch.allclose(gpt.best['weights']['lm_head.weight'], sum(weights[-5:]) / 5, atol=1e-7)
    assert not torch.allclose(weights[-1], sum(weights[-5:]) / 5, atol=1e-7)


# --- The program
def test_it_prints_title_result_and_where_to_read_on(project, monkeypatch, capsys):
    for variant in EXERCISES[4].variants.values():
        monkeypatch.setattr(variant, 'measure', lambda *_, **__: {'val': 1.5, 'unigram': 3.25})
    monkeypatch.setattr(exercises, 'train', lambda *_, **__: {'val': 1.25, 'unigram': 3.25})
    exercises.main(['4'], project)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == '4. Remove the residual connections'
    assert 'gpt.py as it is: 1.25 (character frequencies alone: 3.25)' in lines
    assert 'no residual connections: 1.50 (character frequencies alone: 3.25)' in lines
    assert lines[-1] == 'What to expect, and why: exercise 4 in tests/lab/README.md'


def test_all_are_measured_also_if_one_fails(in_one_process, project, monkeypatch, tmp_path, capsys):
    def fail(*_, **__):
        raise ValueError('it does not fit')
    monkeypatch.setattr(exercises, 'EXERCISES', {n: EXERCISES[n] for n in (1, 13, 24)})
    for group in ('plain', 1, 13, 24, 'full length'):
        for variant in GROUPS[group].values():
            monkeypatch.setattr(variant, 'text', None)
            monkeypatch.setattr(variant, 'measure', lambda *_, **__: {
                'val': 1.5, 'exact': 1.5, 'sample': '', 'ratio': 0.5, 'difference': 1e-6})
    monkeypatch.setattr(EXERCISES[13].variants['GELU'], 'measure', fail)
    exercises.main(['--all'], project, tmp_path / 'results.json')
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 * 3 + 1 + 2 + 4 + 2 + 1
    assert [line for line in lines if 'failed' in line] == [
        '13. GELU, seed 1337: failed: it does not fit']


def test_the_parts_are_measured_with_several_seeds_in_a_table(
        in_one_process, project, monkeypatch, tmp_path, capsys):
    losses = {1337: 1.5, 1: 1.25, 2: 1.6}
    for variant in PARTS.values():
        monkeypatch.setattr(variant, 'measure', lambda *_, seed: {'val': losses[seed]})
    exercises.main(['--parts'], project, tmp_path / 'results.json')
    rows = capsys.readouterr().out.splitlines()[-len(PARTS):]
    assert rows == [f'| {part} | 1.450 | 1.500, 1.250, 1.600 |' for part in PARTS]


def test_a_solution_is_shown_as_a_diff(project, capsys):
    exercises.main(['1', '--show'], project)
    old, new = (line for line in capsys.readouterr().out.splitlines()
                if '+ causal_mask' in line and line[0] in '-+')
    assert new[1:] == old[1:].replace('scores = ', '# scores = ')


def test_an_exercise_for_the_page_sends_to_its_text(project, capsys):
    exercises.main(['0'], project)
    assert 'do exercise 0 as tests/lab/README.md says' in capsys.readouterr().out


def test_the_solution_of_an_exercise_without_edits_is_a_command(project, capsys):
    exercises.main(['6', '--show'], project)
    assert capsys.readouterr().out.splitlines()[:2] == [
        '# temperature = 0.5', 'python tests/lab/sample.py "The " --temperature 0.5']


@pytest.mark.parametrize('arguments', [
    ['99'], ['3', '--steps', '0'], ['--show'], ['0', '--show'], ['three']])
def test_a_wrong_argument_is_refused(arguments, capsys):
    with pytest.raises(SystemExit, match='2'):
        exercises.main(arguments)
    assert 'error: ' in capsys.readouterr().err
