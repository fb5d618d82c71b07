"""tests/exercises.py: each solution still fits gpt.py, trains, and does what its exercise says."""
import math
import subprocess
import sys
import types

import pytest
import torch

import exercises
from conftest import PROJECT, SMALL, TEXT, posix_only, tokens
from exercises import EXERCISES, change, measure, solution

SOURCE = (PROJECT / 'gpt.py').read_text(encoding='utf-8')
VARIANTS = {f'{number}: {name}': variant for number, exercise in EXERCISES.items()
            for name, variant in exercise.variants.items()}
TRAINED = {name: variant for name, variant in VARIANTS.items() if variant.run == 'train'}
MUON = pytest.mark.skipif(not hasattr(torch.optim, 'Muon'), reason='torch before 2.9 has no Muon')


def small(variant):
    """The hyperparameters of a small model, but for those that the variant changes."""
    return {name: value for name, value in SMALL.items()
            if name not in ('max_iters', *variant.settings)}


def solved(folder, variant, steps=2, text=TEXT):
    """A variant's gpt.py, small, as a module."""
    folder.mkdir(exist_ok=True)
    (folder / 'input.txt').write_text(text, encoding='utf-8')
    gpt = types.ModuleType('gpt')
    gpt.__file__ = str(folder / 'gpt.py')
    source = solution(variant, SOURCE, steps, **small(variant))
    exec(compile(source, gpt.__file__, 'exec'), gpt.__dict__)
    return gpt


@pytest.mark.parametrize('name', VARIANTS)
def test_each_old_text_of_a_solution_occurs_exactly_once(name):
    compile(solution(VARIANTS[name], SOURCE), name, 'exec')


def test_an_edit_that_does_not_fit_is_reported():
    for variant in (change(('no such text', '')), change(('self', '')), change(no_such_name=1)):
        with pytest.raises(ValueError, match='not on'):
            solution(variant, SOURCE)


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=MUON if 'Muon' in name else ()) for name in TRAINED])
def test_a_solution_trains_and_makes_a_difference(name, tmp_path, capsys):
    variant, text = TRAINED[name], TEXT + TEXT
    gpt = solved(tmp_path / 'solved', variant, text=variant.text(text) if variant.text else text)
    gpt.train()
    out = capsys.readouterr().out
    assert 'step 2: train loss' in out and 'are in gpt.pt. They generate' in out
    gpt.load()[0].generate(torch.zeros((1, 1), dtype=torch.long), 20)
    plain = solved(tmp_path / 'plain', change(), text=text)
    plain.train()
    weights, others = gpt.model.state_dict(), plain.model.state_dict()
    assert weights.keys() != others.keys() or any(
        weights[key].shape != others[key].shape or not torch.equal(weights[key], others[key])
        for key in weights)


@pytest.mark.parametrize('name', [name for name in VARIANTS if VARIANTS[name].run == 'prompt'])
def test_a_sampling_setting_changes_the_text(name, tmp_path):
    texts = []
    for variant in (VARIANTS[name], change()):
        gpt = solved(tmp_path, variant)
        torch.manual_seed(0)
        texts.append(gpt.model.generate(torch.zeros((1, 1), dtype=torch.long), 50).tolist())
    assert texts[0] != texts[1]


def variant_of(title):
    """The last variant of the exercise with this title."""
    return next(list(exercise.variants.values())[-1] for exercise in EXERCISES.values()
                if exercise.title == title)


def test_the_future_is_let_in(tmp_path):
    gpt = solved(tmp_path, variant_of('Let it see the future'))
    idx = tokens(gpt, 8, batch=1)
    changed = idx.clone()
    changed[0, -1] = (idx[0, -1] + 1) % gpt.vocab_size
    first, second = (gpt.model.eval()(i)[0][0, 0] for i in (idx, changed))
    assert not torch.allclose(first, second)


def test_the_plain_mean_is_the_mean_of_the_values_so_far(tmp_path):
    gpt = solved(tmp_path, variant_of('The plain mean of the past'))
    sa, x = gpt.model.blocks[0].sa.eval(), torch.randn(2, 9, gpt.n_embd)
    v = sa.qkv(x).chunk(3, dim=-1)[2]
    mean = v.cumsum(dim=1) / torch.arange(1, 10)[:, None]
    torch.testing.assert_close(sa(x), sa.proj(mean))


def test_the_scale_is_left_out(tmp_path):
    gpt = solved(tmp_path, variant_of('Leave out the scale'))
    sa, x = gpt.model.blocks[0].sa.eval(), torch.randn(2, 9, gpt.n_embd)
    q, k, v = sa.qkv(x).chunk(3, dim=-1)  # one head
    scores = (q @ k.transpose(1, 2)).masked_fill(torch.ones(9, 9).triu(1) == 1, -math.inf)
    torch.testing.assert_close(sa(x), sa.proj(scores.softmax(-1) @ v), rtol=1e-4, atol=1e-5)


def test_pairs_lose_no_character_and_their_loss_is_per_character(tmp_path):
    gpt = solved(tmp_path, variant_of('Another tokenizer'))
    assert gpt.decode(gpt.encode(TEXT)) == TEXT and len(gpt.chars) == len(set(TEXT)) + 300
    assert len(gpt.data) < 0.7 * len(TEXT)
    gpt.model.lm_head.weight.data.zero_()
    gpt.model.lm_head.bias.data.zero_()
    per_character = math.log(len(gpt.chars)) * len(gpt.data) / len(TEXT)
    assert gpt.estimate_loss()['val'] == pytest.approx(per_character)


@MUON
def test_muon_follows_the_schedule_and_each_weight_has_one_optimizer(tmp_path, monkeypatch):
    gpt = solved(tmp_path, variant_of('Another optimizer'), steps=4)
    made, rates = [], []

    def recorded(kind):
        def make(groups, **options):
            made.append(kind(groups, **options))
            return made[-1]
        return make
    for name in ('Muon', 'AdamW'):
        monkeypatch.setattr(torch.optim, name, recorded(getattr(torch.optim, name)))
    get_batch = gpt.get_batch

    def recorded_batch(split, generator=None):
        if generator is None:  # a training step begins
            rates.append([optimizer.param_groups[0]['lr'] for optimizer in made])
        return get_batch(split, generator)
    gpt.get_batch = recorded_batch
    gpt.train()
    owned = [p for optimizer in made for group in optimizer.param_groups for p in group['params']]
    assert len(owned) == len(set(map(id, owned))) == len(list(gpt.model.parameters()))
    muon, adamw = zip(*rates)  # before each step: Muon's rate is still that of the last one
    assert len(rates) == len(set(adamw)) == 4 and muon[1:] == adamw[:-1]


@pytest.mark.parametrize('length', [1, 5])
def test_the_cache_changes_no_character_until_the_context_is_full(tmp_path, length):
    plain, cached = (solved(tmp_path, variant)
                     for variant in (change(), variant_of('A cache of keys and values')))
    for gpt in (plain, cached):
        gpt.model.lm_head.weight.data *= 20
    cached.model.load_state_dict(plain.model.state_dict())
    idx, T = tokens(plain, length), plain.block_size
    texts = [gpt.model.generate(idx, 3 * T, top_k=1) for gpt in (plain, cached)]
    full = T + 1  # one token more than the context holds: the last that saw all that came before
    assert torch.equal(texts[0][:, :full], texts[1][:, :full])
    assert texts[1].shape == (3, length + 3 * T)
    assert all(block.sa.cache is None for block in cached.model.blocks)
    x, y = cached.get_batch('train')
    torch.testing.assert_close(cached.model(x, y)[1], plain.model(x, y)[1])
    # Beyond that, each token is what the model says of the later half of the context onwards.
    new = texts[1][:, T + 1 - T // 2:T + 1]
    assert torch.equal(plain.model(new)[0][:, -1].argmax(-1), texts[1][:, T + 1])


@pytest.mark.skipif(not torch.distributed.is_available(), reason='torch without distributed')
def test_two_processes_train_one_model(tmp_path, monkeypatch, capsys):
    variant = variant_of('More than one machine')
    monkeypatch.setattr(exercises, 'read_results', lambda out, text: (out, text))
    both, text = measure(variant, SOURCE, 2, **small(variant))
    solved(tmp_path, change(), text=text).train()
    single = capsys.readouterr().out
    for line in ('characters,', 'step 0: ', 'step 2: ', 'The best weights'):
        assert both.count(line) == single.count(line) == 1  # process 0 alone prints
    step = [[line for line in out.splitlines() if line.startswith('step ')]
            for out in (both, single)]
    assert step[0][0] == step[1][0]  # the same model, judged on the same sequences
    losses = [float(lines[-1].split()[-1]) for lines in step]
    assert losses[0] == pytest.approx(losses[1], abs=0.1) and losses[0] != losses[1]


def test_measuring_reads_the_losses_and_leaves_the_learners_files_alone():
    def state():
        return {path.name: path.stat().st_mtime_ns for path in PROJECT.glob('*') if path.is_file()}
    before = state()
    variant = change(text=exercises.beginning)
    result = measure(variant, SOURCE, 2, **{**small(variant), 'eval_interval': 1})
    assert state() == before
    assert 3 < result['best'] <= result['val'] < 5 and result['best_step'] in (0, 1, 2)
    assert 3 < result['train'] < 5 and result['sample']


def test_letter_frequencies_alone_are_no_use_where_all_are_equal():
    assert exercises.read_results('', 'abcd' * 1000)['letters'] == pytest.approx(math.log(4))


def test_a_solution_is_shown_as_a_diff():
    out = subprocess.run([sys.executable, PROJECT / 'tests' / 'exercises.py', '5', '--show'],
                         capture_output=True, encoding='utf-8', check=True).stdout
    lines = [line for line in out.splitlines() if 'is_causal' in line and line[0] in '+-']
    assert [line[0] for line in lines] == ['-', '+'] and 'is_causal=False' in lines[1]


def test_a_wrong_number_gets_one_line():
    process = subprocess.run([sys.executable, PROJECT / 'tests' / 'exercises.py', '99'],
                             capture_output=True, encoding='utf-8')
    assert (process.returncode, process.stderr) == (
        1, f'exercises.py: the exercises have the numbers 1 to {len(EXERCISES)}\n')


@pytest.mark.parametrize('number', EXERCISES)
def test_the_readme_has_the_exercise(number):
    readme = (PROJECT / 'README.md').read_text(encoding='utf-8')
    assert f'**{number}. {EXERCISES[number].title}.**' in readme


def test_an_edited_script_fails_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr(exercises, 'measure', None)  # calling it would be a TypeError
    with pytest.raises(ValueError, match='unedited'):
        exercises.work(9, SOURCE.replace('nn.ReLU()', 'nn.SiLU()'))


@posix_only
def test_a_closed_pipe_ends_the_diff_in_silence():
    """As in python tests/exercises.py 15 --show | head -1"""
    process = subprocess.Popen([sys.executable, exercises.__file__, '15', '--show'],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding='utf-8')
    process.stdout.close()
    assert process.stderr.read() == '' and process.wait(timeout=60) == 130
    process.stderr.close()


def test_the_readme_has_no_other_exercises():
    readme = (PROJECT / 'README.md').read_text(encoding='utf-8')
    assert f'**{len(EXERCISES) + 1}. ' not in readme
