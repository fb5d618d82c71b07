"""Exercises 25 to 29: counted pairs, losses by position, addition, fine-tuning, a reward."""
import copy
import math
import statistics
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

import inside
import measure
import sample
from conftest import SMALL, TEXT, copy_script, load, random_model, run_here, save
from exact_loss import exact_loss, load_with_text, ngram_loss, table_loss
from solutions import CLASSIC, EXERCISES, RESULTS, sums

COUNTED, POSITIONS, ADDITION, FINE_TUNING, REWARD = (EXERCISES[n].variants for n in range(25, 30))
# The steps are given to the measurement.
SMALLER = {name: value for name, value in SMALL.items() if name != 'max_iters'}
TRAINED = {name: value for name, value in SMALLER.items()
           if name not in ('learning_rate', 'temperature', 'block_size')}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with both scripts; what is measured runs in this process, which is faster."""
    monkeypatch.setattr(measure, 'run_python', lambda arguments, *_: run_here(*arguments)[0])
    copy_script(tmp_path / 'project', 'bigram.py', TEXT * 9)
    copy_script(tmp_path / 'project', 'gpt.py', TEXT * 9 + '\nletthere\n')
    return tmp_path / 'project'


@pytest.fixture
def newest_run(project, tmp_path):
    """The file of a run in the project: of a small model with random weights."""
    path = save(random_model(tmp_path / 'random', TEXT * 9, block_size=64))
    return path.rename(project / path.name)


def test_counted_pairs_predict_as_the_table_of_counts_does(project):
    learned, counted = (measure.train_bigram(variant, project, max_iters=2)
                        for variant in COUNTED.values())
    bigram = load(project / 'bigram.py')
    expected = table_loss(bigram.train_data, bigram.val_data, bigram.vocab_size)
    assert counted['before'] == pytest.approx(expected, abs=1e-5)
    assert learned['before'] == pytest.approx(math.log(bigram.vocab_size), abs=1e-5)
    assert learned['exact'] < learned['before']


def test_the_loss_at_a_position_is_that_of_a_model_that_has_read_so_much(project, newest_run):
    result = measure.measure_positions(None, project, stride=400)
    gpt = load_with_text(newest_run)
    starts = range(0, len(gpt.val_data) - gpt.block_size, 400)
    for n in (1, 4, 64):
        losses = [F.cross_entropy(gpt.model(gpt.val_data[None, i:i + n])[0][0, -1],
                                  gpt.val_data[i + n]).item() for i in starts]
        assert result[f'position {n}'] == pytest.approx(statistics.mean(losses), abs=1e-4)
    assert list(result) == [f'position {n}' for n in (1, 2, 4, 8, 16, 32, 64)]


# --- The results in the main README
def test_the_results_are_exact_losses_on_both_texts(project, tmp_path, monkeypatch):
    counts, gpt = [name for name in CLASSIC if 'ngram' in name or 'default' in name]
    monkeypatch.setattr('solutions.PROJECT', tmp_path)
    with pytest.raises(ValueError, match='put the classic corpus into .*try.classic.txt'):
        measure.count_ngrams(CLASSIC[counts], project)
    (tmp_path / 'try').mkdir()
    classic = 'To be, or not to be?\n' * 99 + 'That is it.\n' * 9
    (tmp_path / 'try/classic.txt').write_text(classic, encoding='utf-8')
    n_train = len(classic) * 9 // 10
    assert measure.count_ngrams(CLASSIC[counts], project)['exact'] == pytest.approx(
        ngram_loss(classic[:n_train], classic[n_train:]))
    ours = TEXT * 9 + '\nletthere\n'
    assert measure.count_ngrams(RESULTS[counts], project)['exact'] == pytest.approx(
        ngram_loss(ours[:len(ours) * 9 // 10], ours[len(ours) * 9 // 10:]))
    loaded = []
    monkeypatch.setattr(measure, 'load_with_text', lambda path: (
        loaded.append(load_with_text(path)) or loaded[0]))
    result = measure.train_exactly(CLASSIC[gpt], project, 2, **SMALLER)
    assert loaded[0].text == classic
    assert result['exact'] == exact_loss(loaded[0].model, loaded[0].val_data, 16)


# --- Addition
@pytest.mark.parametrize('name', [
    'usual order', 'three digits, reversed', 'reversed, with numbers never seen'])
def test_sums_are_right_and_no_two_numbers_are_added_twice(name):
    text = ADDITION[name].text(TEXT)
    lines = text.splitlines()
    assert len(lines) == (900 * 901 if 'three' in name else 90 * 91) / 2
    lines = [line.split('=') for line in lines[:4095]]
    pairs = [tuple(map(int, terms.split('+'))) for terms, _ in lines]
    assert all(a + b == int(answer[::-1] if 'reversed' in name else answer)
               for (a, b), (_, answer) in zip(pairs, lines))
    assert len({frozenset(pair) for pair in pairs}) == len(pairs)
    larger_first = sum(a > b for a, b in pairs) / len(pairs)
    assert 0.45 < larger_first < 0.55
    smaller = [min(pair) for pair in pairs]
    assert smaller != sorted(smaller)


def test_numbers_that_are_left_out_are_in_the_last_tenth_only():
    text = ADDITION['reversed, with numbers never seen'].text(TEXT)
    known, new = ({number for line in part.splitlines()[1:-1]
                   for number in line.partition('=')[0].split('+')}
                  for part in (text[:len(text) * 9 // 10], text[len(text) * 9 // 10:]))
    assert len(new - known) == 4
    asked = [line.partition('=')[0].split('+') for line in text.splitlines()[-300:]]
    assert all(new - known & set(terms) for terms in asked)


def test_a_sum_counts_if_all_its_digits_are_right_and_no_more_follow(project, monkeypatch):
    def load_oracle(path):
        """A model that knows all answers but three."""
        gpt = load_with_text(path)
        answers = dict(line.split('=') for line in gpt.text.splitlines())

        def generate(idx, length):
            assert gpt.top_k == 1
            questions = [gpt.decode(ids) for ids in idx.tolist()]
            written = [f'{question}{answers[question[1:-1]]}\n12+34' for question in questions]
            written[0] = questions[0] + '\n12+34=56'
            written[1] = written[1].replace('\n12', '7\n1')
            written[2] = questions[2] + '1\n2+34=56'
            return torch.tensor([gpt.encode(text[:idx.shape[1] + length]) for text in written])
        gpt.model.generate = generate
        return gpt
    monkeypatch.setattr(measure, 'load_with_text', load_oracle)
    result = measure.train_and_add(ADDITION['reversed'], project, 1, **SMALLER)
    assert (result['right'], result['asked']) == (297, 300)


def test_sums_that_were_trained_on_are_not_asked(project, monkeypatch):
    """Here each is in the text twice, the second time the other way round."""
    def twice(text):
        lines = sums(text).splitlines()
        turned = ['{1}+{0}={2}'.format(*line.replace('=', '+').split('+')) for line in lines]
        return '\n'.join(lines + turned)
    monkeypatch.setattr(ADDITION['usual order'], 'text', twice)
    with pytest.raises(AssertionError):
        measure.train_and_add(ADDITION['usual order'], project, 1, **SMALLER)


# --- Fine-tuning
def test_the_text_for_fine_tuning_has_the_vocabulary_of_the_model():
    ours = TEXT * 9 + 'é'
    text = FINE_TUNING['fine-tuned'].text(ours)
    assert sorted(set(text)) == sorted(set(ours)) and 'return' in text


def test_fine_tuning_begins_with_the_weights_of_the_newest_run(project, newest_run):
    """With a learning rate of 0, it ends with them, too."""
    settings = {**TRAINED, 'learning_rate': 0.0}
    tuned, alone = (measure.fine_tune(variant, project, 1, **settings)
                    for variant in FINE_TUNING.values())
    gpt = load_with_text(newest_run)
    expected = exact_loss(gpt.model, gpt.val_data, gpt.block_size)
    for results in (tuned, alone):
        assert results['old_before'] == pytest.approx(expected)
        assert results['new_before'] != pytest.approx(expected)
    assert (tuned['old'], tuned['new']) == (tuned['old_before'], tuned['new_before'])
    assert alone['old'] != pytest.approx(tuned['old'], abs=0.1)


def test_fine_tuning_learns_from_20_000_characters(project, tmp_path):
    for variant in FINE_TUNING.values():
        measure.prepare(tmp_path, variant, project)
        assert len(load(tmp_path / 'gpt.py').train_data) == 20_000


# --- A reward
@pytest.fixture
def rewarded(project, tmp_path):
    """gpt.py for 'known words, with a KL term', small, as a module."""
    measure.prepare(tmp_path, REWARD['known words, with a KL term'], project,
                    **{**TRAINED, 'block_size': 64})
    return load(tmp_path / 'gpt.py')


def test_the_loss_weights_each_text_with_how_far_it_is_above_the_mean(rewarded, tmp_path):
    start_model = random_model(tmp_path / 'other', TEXT * 9, block_size=64).model
    idx = torch.randint(rewarded.vocab_size, (3, 6))
    of_text = dict(zip([rewarded.decode(ids) for ids in idx[:, 1:].tolist()], [2.0, 3.0, 7.0]))
    rewarded.write = lambda count: idx
    rewarded.reward = of_text.__getitem__  # of what the model wrote, without the start token
    advantages = [(value - 4.0) / statistics.stdev([2.0, 3.0, 7.0]) for value in (2.0, 3.0, 7.0)]
    now, before = (Categorical(logits=model(idx[:, :-1])[0])
                   for model in (rewarded.model, start_model))
    expected = rewarded.kl_weight * kl_divergence(now, before).mean()
    for advantage, log_probs in zip(advantages, now.log_prob(idx[:, 1:])):
        expected = expected - advantage * log_probs.mean() / 3
    loss = rewarded.reward_loss(start_model)
    torch.testing.assert_close(loss, expected)
    weight = rewarded.model.lm_head.weight
    torch.testing.assert_close(*(torch.autograd.grad(value, weight)[0]
                                 for value in (loss, expected)))


def test_equal_rewards_teach_nothing(rewarded):
    rewarded.reward = lambda text: 0.5
    rewarded.reward_loss(rewarded.model).backward()
    assert all(p.grad.abs().max() < 1e-6 for p in rewarded.model.parameters() if p.grad is not None)


def test_a_reward_is_for_words_of_the_training_text(rewarded):
    assert rewarded.reward('xyz And the xyz the') == pytest.approx(2 / 3)  # without both ends
    assert rewarded.reward('.') == 0
    assert rewarded.reward('a letthere b') == 0  # only the validation text has that


def test_the_kl_term_measures_from_the_model_at_the_start(rewarded, monkeypatch):
    first = copy.deepcopy(rewarded.model.state_dict())
    reward_loss, started_from = rewarded.reward_loss, []
    rewarded.reward_loss = lambda start_model: (
        started_from.append(start_model) or reward_loss(start_model))
    rewarded.report = lambda *_: None
    rewarded.max_iters, rewarded.learning_rate = 2, 1e-2
    clip = Mock(wraps=torch.nn.utils.clip_grad_norm_)
    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', clip)
    rewarded.train()
    assert not torch.equal(rewarded.model.lm_head.weight, first['lm_head.weight'])
    assert clip.call_count >= 2
    for name, weight in started_from[-1].state_dict().items():
        assert torch.equal(weight, first[name])


def test_letters_are_rewarded(project, tmp_path):
    measure.prepare(tmp_path, REWARD['letters e'], project, **TRAINED)
    gpt = load(tmp_path / 'gpt.py')
    assert gpt.reward('e and E') == pytest.approx(1 / 7) and gpt.kl_weight == 0


def test_training_raises_the_reward_from_that_of_the_newest_run(project, newest_run):
    settings = {**TRAINED, 'learning_rate': 3e-2, 'eval_iters': 1, 'eval_interval': 8}
    result = measure.train_with_reward(REWARD['letters e'], project, 8, count=60, **settings)
    gpt = load_with_text(newest_run)
    gpt.temperature, gpt.top_k = 1.0, None
    torch.manual_seed(0)
    idx = gpt.model.generate(torch.zeros((60, 1), dtype=torch.long), 64)[:, 1:]
    share = statistics.mean(gpt.decode(ids).count('e') / 64 for ids in idx.tolist())
    assert result['reward_before'] == pytest.approx(share)
    assert result['reward'] > 2 * share + 0.1
    assert result['exact_before'] == pytest.approx(exact_loss(gpt.model, gpt.val_data, 64))
    assert result['exact'] > result['exact_before'] + 0.1


def test_the_last_weights_are_saved_since_the_loss_rises(project, newest_run):
    settings = {**TRAINED, 'learning_rate': 3e-2, 'eval_iters': 1, 'eval_interval': 1}
    with measure.trained(REWARD['letters e'], project, 3, start=newest_run,
                         **settings) as (results, path):
        assert results['best_step'] < 3
        gpt = load_with_text(path)
        assert gpt.estimate_loss()['val'] == pytest.approx(results['val'], abs=1e-3)


# --- What they save
@pytest.mark.parametrize('variant', [
    ADDITION['reversed'], FINE_TUNING['fine-tuned'], REWARD['known words']])
def test_the_other_programs_open_it(variant, project, newest_run, capsys):
    with measure.trained(variant, project, 1, start=newest_run, **TRAINED) as (_, path):
        assert (path.parent / 'start.pt').exists()
        sample.main(['--checkpoint', str(path.parent), '--length', '5'])
        inside.main(['--checkpoint', str(path.parent)])
    assert 'layer 1' in capsys.readouterr().out
