"""Learning: the loss estimate, the training loop, and what can be learned."""
import math
import re
import runpy

import pytest
import torch
import torch.nn.functional as F

from conftest import PLAY, SMALL, fresh, load, put, run, run_all


def test_every_estimate_scores_the_same_windows(either):
    """Two estimates that differ should differ because the model does, not the questions."""
    seen = []
    get_batch = either.get_batch
    either.get_batch = lambda *args: seen.append(get_batch(*args)) or seen[-1]
    assert either.estimate_loss() == either.estimate_loss()
    assert len(seen) == 4 * either.eval_iters
    for first, second in zip(seen, seen[2 * either.eval_iters:]):
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(seen[0][0], seen[1][0])


def test_an_estimate_leaves_no_trace(either):
    """Neither in the random stream, nor in the mode, nor as gradients."""
    state = torch.get_rng_state()
    for mode in (True, False):
        either.model.train(mode)
        either.estimate_loss()
        assert either.model.training is mode
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in either.model.parameters())


def test_dropout_is_off_in_an_estimate(tmp_path):
    """With half of it silenced the model is worse than it will be when it is used."""
    without = load(tmp_path, 'gpt.py', **SMALL)
    dropped = load(tmp_path, 'gpt.py', **SMALL, dropout=0.5)
    dropped.model.load_state_dict(without.model.state_dict())
    assert dropped.estimate_loss() == without.estimate_loss()


def test_an_estimate_scores_each_split_by_its_name(tmp_path):
    """A bigram table that has counted the first part knows a, b, and has never heard of y, z."""
    bigram = load(tmp_path, 'bigram.py', 'ab' * 900 + 'yz' * 100)
    with torch.no_grad():
        for one, next_one in ('ab', 'ba'):
            bigram.model.token_embedding_table.weight[bigram.stoi[one], bigram.stoi[next_one]] = 9
    losses = bigram.estimate_loss()
    assert losses['train'] < 0.01 and losses['val'] == pytest.approx(math.log(4), abs=1e-4)


def test_the_model_can_learn_one_batch_by_heart(gpt):
    """The first thing to try with any new model: if it cannot do this, it can do nothing."""
    x, y = gpt.get_batch('train')
    optimizer = torch.optim.AdamW(gpt.model.parameters(), lr=0.01)
    for _ in range(150):
        loss = gpt.model(x, y)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_the_bigrams_trained_table_matches_the_counts_of_the_text(tmp_path, capsys):
    """Gradient descent finds what counting finds: how often each character follows each other."""
    path = put(tmp_path, 'bigram.py', PLAY)
    trained = runpy.run_path(str(path), run_name='__main__')
    data, size = trained['train_data'], trained['vocab_size']
    counts = torch.zeros(size, size)
    counts.index_put_((data[:-1], data[1:]), torch.ones(len(data) - 1), accumulate=True)
    table = trained['model'].token_embedding_table.weight.detach().cpu().softmax(dim=-1)
    often = counts.sum(dim=1) > 300
    frequencies = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    assert often.sum() > 10
    assert (table - frequencies)[often].abs().max() < 0.03
    best = -(counts * frequencies.clamp(min=1e-9).log()).sum() / counts.sum()
    assert F.cross_entropy(table.log()[data[:-1]], data[1:]) < best + 0.02


@pytest.mark.parametrize('script', ['bigram.py', 'gpt.py'])
def test_the_same_seed_gives_the_same_losses_and_the_same_text(tmp_path, script):
    small = SMALL if script == 'gpt.py' else dict(max_iters=20, eval_interval=10, eval_iters=2)
    scripts = [put(fresh(tmp_path), script, **small, seed=seed) for seed in (1, 1, 2)]
    first, second, other = [re.sub(r'\d+ ms a step, \d+ s left', '', out)
                            for out, _, _ in run_all(scripts)]
    assert 'step 20' in first and len(first) > 500
    assert first == second != other


def test_training_lowers_the_loss_and_ends_with_the_promised_text(tmp_path):
    longer = {**SMALL, 'max_iters': 100, 'eval_interval': 50}
    out, err, status = run(put(tmp_path, 'gpt.py', **longer))
    assert (err, status) == ('', 0)
    losses = [float(loss) for loss in re.findall(r'val loss (\d\.\d+)', out)]
    assert len(losses) == 4 and losses[2] < losses[1] < losses[0] and losses[3] == losses[2]
    written = out[out.index('They write:\n') + len('They write:\n'):]
    assert len(written) == 1 + 500 + 1  # the character it starts from, 500 new ones, and print's


def test_how_often_one_watches_does_not_change_what_is_learned(tmp_path):
    """Estimates and samples draw random numbers; training must not notice."""
    often, seldom = [
        re.search(r'step 20: train loss [\d.]+, val loss [\d.]+', out).group()
        for out, _, _ in run_all([
            put(fresh(tmp_path), 'gpt.py', **{**SMALL, 'eval_interval': interval, 'dropout': 0.2})
            for interval in (5, 20)])]
    assert often == seldom


def test_a_run_says_what_it_is_about_to_do_and_then_how_it_goes(tmp_path):
    out, _, _ = run(put(tmp_path, 'gpt.py', **SMALL))
    first, *rest = out.splitlines()
    gpt = load(tmp_path, 'gpt.py', **SMALL)
    parameters = sum(p.numel() for p in gpt.model.parameters())
    for fact in (f'{len(PLAY):,} characters', f'{gpt.vocab_size} different',
                 f'{parameters:,} parameters', 'cpu', '20 steps'):
        assert fact in first
    for at, step in enumerate((0, 10, 20)):
        assert re.fullmatch(rf'step {step}: train loss \d\.\d{{4}}, val loss \d\.\d{{4}}, '
                            r'\d+ ms a step, \d+ s left', rest[2 * at])
        assert rest[2 * at + 1].startswith('    ') and len(rest[2 * at + 1]) > 40
