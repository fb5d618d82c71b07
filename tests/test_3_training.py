"""Training: the loss estimate, the optimizer and its schedule, and whole runs."""
import copy
import math
import re
from unittest.mock import Mock

import pytest
import torch
from torch.testing import assert_close

from conftest import (SMALL, SMALL_BIGRAM, SMALL_OF, TEXT, copy_script, each_script,
                      import_script, load, randomize_, run_here)

# With dropout, so that a model in the wrong mode shows.
SMALL_WITH_DROPOUT = {'bigram.py': SMALL_BIGRAM, 'gpt.py': SMALL | {'dropout': 0.2}}


# --- The loss estimate
@each_script
def test_an_estimate_is_the_mean_loss_of_the_same_batches_of_each_split_every_time(
        tmp_path, script):
    """Two estimates should differ only because the model has changed, even if the seeds differ. It
    is measured as it will be used, without dropout. This text is in small letters for training,
    in capitals held out.
    """
    text = TEXT[:5400].lower() + TEXT[:600].upper()
    module = import_script(tmp_path, script, text, **SMALL_WITH_DROPOUT[script])
    model = randomize_(module.model)  # so that batches differ in their losses
    calls = []
    hook = model.register_forward_pre_hook(
        lambda model, inputs: calls.append((*inputs, torch.is_grad_enabled())))
    estimate = module.estimate_loss()
    hook.remove()
    module.seed += 1
    assert module.estimate_loss() == estimate

    n = module.eval_iters
    assert len(calls) == 2 * n and not torch.equal(calls[0][0], calls[1][0])
    assert not any(with_gradients for _, _, with_gradients in calls)
    model.eval()
    for split, its_calls in [('train', calls[:n]), ('val', calls[n:])]:
        characters = module.decode(torch.cat([x.flatten() for x, _, _ in its_calls]).tolist())
        assert characters.islower() if split == 'train' else characters.isupper()
        losses = [model(x, y)[1].item() for x, y, _ in its_calls]
        assert estimate[split] == pytest.approx(sum(losses) / n)


@pytest.mark.parametrize('split, value', [('train', math.nan), ('val', math.inf)])
def test_a_loss_that_is_not_finite_ends_training_and_is_not_saved(module, tmp_path, split, value):
    """One of the two is enough. Here it happens in the second estimate, the first with a save."""
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


# --- Whole runs
@each_script
def test_a_run_prints_falling_losses_with_samples_and_then_500_characters(tmp_path, script):
    """The last estimate is of the trained model, even if eval_interval does not divide max_iters.
    The generated text starts with token 0, a line break in this input.txt.
    """
    path = copy_script(tmp_path, script, **SMALL_WITH_DROPOUT[script] | {'eval_interval': 8})
    out, err, status = run_here(path)
    assert (err, status) == ('', 0)
    losses = re.findall(r'train loss (\d\.\d{4}), val loss (\d\.\d{4}), \d{1,3} s\n', out)
    assert losses[-1][0] < losses[0][0] and losses[-1][1] < losses[0][1]

    module = load(path)  # the model before training
    assert losses[0] == tuple(f'{loss:.4f}' for loss in module.estimate_loss().values())
    n_parameters = sum(parameter.numel() for parameter in module.model.parameters())
    expected = f'{n_parameters:,} parameters\n'
    for step, (train, val) in zip((0, 8, 16, 20), losses, strict=True):
        expected += rf'step {step} of 20: train loss {train}, val loss {val}, \d+ s\n'
        if script == 'gpt.py' and step == 0:
            expected += r'    from the next report on, saved in gpt-[\d-]+\.pt\n'
        expected += '    .{40,240}\n'
    expected += r'\nThe best weights generate:\n' if script == 'gpt.py' else ''
    assert re.fullmatch(expected + r'\n(?s:.{500})\n', out)


@each_script
@pytest.mark.parametrize('text', [161 * 'x', '\ufeff' + 60 * '子曰:學而時習之\r\n😀 café\r\n'],
                         ids=['one character, just long enough', 'Chinese, emoji, of Windows'])
def test_any_text_trains_and_generates(tmp_path, script, text):
    """A byte order mark and the line ends of Windows do not become tokens."""
    out, err, status = run_here(copy_script(tmp_path, script, text, **SMALL_OF[script]))
    assert (err, status) == ('', 0)
    assert set(out[-501:-1]) <= set(text) - {'\ufeff', '\r'}


@each_script
def test_the_seed_repeats_a_run(tmp_path, script):
    def text_of_a_run(seed):
        options = SMALL_WITH_DROPOUT[script] | {'seed': seed}
        return run_here(copy_script(tmp_path, script, **options))[0][-501:]

    assert text_of_a_run(1) == text_of_a_run(1) != text_of_a_run(2)
