"""Training: the loss estimate, the optimizer and its schedule, and what can be learned."""
import copy
import math
import random
import re
import time
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector
from torch.testing import assert_close

from conftest import (SMALL, SMALL_BIGRAM, SMALL_OF, TEXT, copy_script, each_script,
                      import_script, load, randomize_, run_here)

# With dropout, so that a model in the wrong mode shows.
SMALL_WITH_DROPOUT = {'bigram.py': SMALL_BIGRAM, 'gpt.py': SMALL | {'dropout': 0.2}}


# --- The loss estimate
@each_script
def test_an_estimate_is_the_mean_loss_of_the_same_batches_of_each_split_every_time(
        tmp_path, script):
    """Two estimates should differ only because the model has changed. It is measured as it will be
    used, without dropout. This text is in small letters for training, in capitals held out.
    """
    text = TEXT[:5400].lower() + TEXT[:600].upper()
    module = import_script(tmp_path, script, text, **SMALL_WITH_DROPOUT[script])
    model = randomize_(module.model)  # so that batches differ in their losses
    batches = []
    hook = model.register_forward_pre_hook(lambda model, inputs: batches.append(inputs))
    estimate = module.estimate_loss()
    assert module.estimate_loss() == estimate
    hook.remove()

    n = module.eval_iters
    assert len(batches) == 4 * n
    for (x, y), (x_again, y_again) in zip(batches[:2 * n], batches[2 * n:]):
        assert torch.equal(x, x_again) and torch.equal(y, y_again)
    assert not torch.equal(batches[0][0], batches[1][0])
    model.eval()
    for split, its_batches in [('train', batches[:n]), ('val', batches[n:2 * n])]:
        letters = module.decode(torch.cat([x.flatten() for x, _ in its_batches]).tolist())
        assert letters.islower() if split == 'train' else letters.isupper()
        losses = [model(x, y)[1].item() for x, y in its_batches]
        assert estimate[split] == pytest.approx(sum(losses) / n)


@each_script
def test_models_of_all_seeds_are_judged_on_the_same_batches(tmp_path, script):
    one, other = (import_script(tmp_path, script, **SMALL_WITH_DROPOUT[script] | {'seed': seed})
                  for seed in (1, 2))
    randomize_(one.model)
    other.model.load_state_dict(one.model.state_dict())
    assert one.estimate_loss() == other.estimate_loss()


def test_a_report_leaves_training_as_it_was(module):
    """It computes no gradients, is made without dropout, and uses no random numbers of training."""
    calls = []
    module.model.register_forward_hook(lambda model, inputs, outputs: calls.append(
        (outputs[0].requires_grad, model.training)))
    state = torch.get_rng_state()
    module.estimate_loss()
    assert calls == [(False, False)] * 2 * module.eval_iters
    assert module.model.training
    module.report(0, 0.0)
    assert torch.equal(torch.get_rng_state(), state) and module.model.training


@each_script
@pytest.mark.parametrize('split, value', [('train', math.nan), ('val', math.inf)])
def test_a_loss_that_is_not_finite_ends_training_and_is_not_saved(tmp_path, script, split, value):
    """One of the two is enough. Here it happens in the second estimate, the first with a save."""
    module = import_script(tmp_path, script, **SMALL_WITH_DROPOUT[script])
    good = {'train': 1.0, 'val': 1.0}
    module.estimate_loss = Mock(side_effect=[good, {**good, split: value}])
    with pytest.raises(AssertionError, match='not finite: lower learning_rate'):
        module.train()
    assert list(tmp_path.glob('gpt*.pt*')) == []


# --- The optimizer
@pytest.mark.parametrize('script, options, eighths', [
    ('bigram.py', {'learning_rate': 0.5}, (8, 7, 6, 5, 4, 3, 2, 1)),
    ('gpt.py', {'learning_rate': 0.01, 'warmup_iters': 4, 'weight_decay': 0.5},
     (2, 4, 6, 8, 4, 3, 2, 1)),
    ('gpt.py', {'learning_rate': 0.01, 'warmup_iters': 0}, (8, 7, 6, 5, 4, 3, 2, 1)),
], ids=['bigram.py', 'gpt.py', 'gpt.py without warm-up'])
def test_training_is_torchs_adamw_step_by_step(tmp_path, script, options, eighths):
    """The same steps by hand: the same batches and dropout, from the same seed, lead to the same
    weights. So the estimates and samples between them change nothing.

    The learning rate of each step, here in eighths of its peak, falls linearly towards 0. In the
    GPT it first rises, by a quarter of the peak in each of 4 steps. Weight decay is for matrices.
    """
    module = import_script(tmp_path, script, **SMALL_WITH_DROPOUT[script] | options | {
        'max_iters': 8, 'eval_interval': 3})
    model = copy.deepcopy(module.model)
    torch.manual_seed(2)
    module.train()

    torch.manual_seed(2)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{'params': matrices, 'weight_decay': getattr(module, 'weight_decay', 0.0)},
         {'params': vectors, 'weight_decay': 0.0}])
    for eighth in eighths:
        for group in optimizer.param_groups:
            group['lr'] = options['learning_rate'] * eighth / 8
        loss = model(*module.get_batch('train'))[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for trained, by_hand in zip(module.model.parameters(), model.parameters()):
        assert_close(trained, by_hand)


# --- What can be learned
def test_the_gpt_can_learn_one_batch_by_heart(gpt):
    """A good first check of any new model: one that cannot overfit a batch has an error."""
    x, y = gpt.get_batch('train')
    optimizer = torch.optim.AdamW(gpt.model.parameters(), lr=0.01)
    for _ in range(150):
        loss = gpt.model(x, y)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_the_trained_bigram_table_matches_the_counts_of_the_text(tmp_path):
    """Training finds what counting finds: how often each character follows each other one."""
    words = random.Random(1).choices(['to', 'be', 'or', 'not', 'that', 'this', 'is'], k=2000)
    bigram = import_script(tmp_path, 'bigram.py', ' '.join(words), **SMALL_BIGRAM | {
        'batch_size': 64, 'block_size': 32, 'max_iters': 800, 'eval_interval': 800})
    bigram.train()
    current, following = bigram.train_data[:-1], bigram.train_data[1:]
    counts = torch.zeros(bigram.vocab_size, bigram.vocab_size)
    for i, j in zip(current.tolist(), following.tolist()):
        counts[i, j] += 1
    frequencies = counts / counts.sum(dim=1, keepdim=True)
    logits = bigram.model.token_embedding_table.weight.detach()
    assert_close(logits.softmax(dim=-1), frequencies, rtol=0, atol=0.03)
    # No bigram model can do better on this text than the frequencies themselves.
    lowest_loss = -frequencies[current, following].log().mean()
    assert lowest_loss < F.cross_entropy(logits[current], following) < lowest_loss + 0.02


# --- Whole runs
@each_script
def test_a_run_prints_falling_losses_with_samples_and_then_500_characters(tmp_path, script):
    """The last estimate is of the trained model, even if eval_interval does not divide max_iters.
    The generated text starts with token 0, a line break in this input.txt.
    """
    path = copy_script(tmp_path, script, **SMALL_WITH_DROPOUT[script] | {'eval_interval': 8})
    out, err, status = run_here(path)
    assert (err, status) == ('', 0)
    losses = re.findall(r'step .* train loss (\d\.\d{4}), val loss (\d\.\d{4}), \d+ s\n', out)
    assert losses[-1][0] < losses[0][0] and losses[-1][1] < losses[0][1]

    n_parameters = sum(parameter.numel() for parameter in load(path).model.parameters())
    expected = f'{n_parameters:,} parameters\n'
    for step, (train, val) in zip((0, 8, 16, 20), losses, strict=True):
        expected += rf'step {step} of 20: train loss {train}, val loss {val}, \d+ s\n'
        if script == 'gpt.py' and step == 0:
            expected += r'    from the next report on, saved in gpt-[\d-]+\.pt\n'
        expected += '    .{40,240}\n'
    expected += r'\nThe best weights generate:\n' if script == 'gpt.py' else ''
    assert re.fullmatch(expected + r'\n(?s:.{500})\n', out)


def test_a_report_is_of_the_losses_of_the_two_splits(module, capsys):
    randomize_(module.model)
    losses = module.estimate_loss()
    module.report(0, time.time() - 3.2)
    line = capsys.readouterr().out.splitlines()[0]
    assert line == (f'step 0 of 20: train loss {losses["train"]:.4f}, '
                    f'val loss {losses["val"]:.4f}, 3 s')
    assert losses['train'] != losses['val']


@each_script
@pytest.mark.parametrize('text', [161 * 'x', '\ufeff' + 60 * '子曰:學而時習之\r\n😀 café\r\n'],
                         ids=['one character, just long enough', 'Chinese, emoji, of Windows'])
def test_any_text_trains_and_generates(tmp_path, script, text):
    out, err, status = run_here(copy_script(tmp_path, script, text, **SMALL_OF[script]))
    assert (err, status) == ('', 0)
    assert set(out[-501:-1]) <= set(text) - {'\ufeff', '\r'}


@each_script
def test_the_seed_repeats_a_run(tmp_path, script):
    """And another seed changes each part of it: initial weights, batches, training, the text."""
    def random_parts(seed):
        module = import_script(tmp_path, script, **SMALL_WITH_DROPOUT[script] | {'seed': seed})
        initial = parameters_to_vector(module.model.parameters())
        parts = []
        hook = module.model.register_forward_pre_hook(
            lambda model, inputs: parts.append(inputs[0])
            if model.training and len(inputs) == 2 else None)  # with targets: not for a sample
        module.train()
        hook.remove()
        assert len(parts) == module.max_iters
        parts.append(parameters_to_vector(module.model.parameters()))
        parts.append(module.m.generate(torch.zeros((1, 1), dtype=torch.long), 100))
        return parts if script == 'bigram.py' else [initial, *parts]  # a bigram starts with zeros

    for first, again, other in zip(random_parts(1), random_parts(1), random_parts(2)):
        assert torch.equal(first, again) and not torch.equal(first, other)
