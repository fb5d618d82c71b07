"""Training: the loss estimate, the optimizer and its schedule, and what can be learned."""
import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F

from conftest import (SMALL, SMALL_BIGRAM, SMALL_OF, TEXT, copy_script, import_script, new_folder,
                      randomize_, run)


# --- The loss estimate
def test_an_estimate_is_the_mean_loss_of_eval_iters_batches_and_they_are_always_the_same(module):
    """Two estimates should differ only because the model has changed."""
    splits, batches = [], []
    get_batch = module.get_batch

    def recording_get_batch(split, *arguments):
        batch = get_batch(split, *arguments)
        splits.append(split)
        batches.append(batch)
        return batch

    module.get_batch = recording_get_batch
    randomize_(module.model)  # so that batches differ in their losses
    first, second = module.estimate_loss(), module.estimate_loss()
    assert first == second
    n = module.eval_iters
    assert splits == 2 * (n * ['train'] + n * ['val'])
    for (x, y), (x_again, y_again) in zip(batches[:2 * n], batches[2 * n:]):
        assert torch.equal(x, x_again) and torch.equal(y, y_again)
    assert not torch.equal(batches[0][0], batches[1][0])
    for split, its_batches in [('train', batches[:n]), ('val', batches[n:2 * n])]:
        losses = [module.model(x, y)[1].item() for x, y in its_batches]
        assert first[split] == pytest.approx(sum(losses) / n)


def test_an_estimate_gives_each_split_its_own_loss(tmp_path):
    """A bigram model that knows what follows a and b, but has never seen y and z."""
    bigram = import_script(tmp_path, 'bigram.py', 'ab' * 900 + 'yz' * 100, **SMALL_BIGRAM)
    with torch.no_grad():
        table = bigram.model.token_embedding_table.weight
        table[bigram.stoi['a'], bigram.stoi['b']] = 9
        table[bigram.stoi['b'], bigram.stoi['a']] = 9
    losses = bigram.estimate_loss()
    assert losses['train'] < 0.01
    assert losses['val'] == pytest.approx(math.log(4), abs=1e-4)


def test_an_estimate_does_not_affect_training(module):
    """It uses no random numbers of training, leaves no gradients, and the model in train mode."""
    state = torch.get_rng_state()
    module.estimate_loss()
    assert torch.equal(torch.get_rng_state(), state)
    assert module.model.training
    assert all(parameter.grad is None for parameter in module.model.parameters())


def test_an_estimate_computes_no_gradients(module):
    needs_gradients = []
    module.model.register_forward_hook(
        lambda model, inputs, outputs: needs_gradients.append(outputs[1].requires_grad))
    module.estimate_loss()
    assert needs_gradients == [False] * 2 * module.eval_iters


def test_dropout_is_off_in_an_estimate(tmp_path):
    """It should tell how good the model is when it is used, and then dropout is off."""
    without = import_script(tmp_path, 'gpt.py', **SMALL)
    with_dropout = import_script(tmp_path, 'gpt.py', **SMALL, dropout=0.5)
    with_dropout.model.load_state_dict(without.model.state_dict())
    assert with_dropout.estimate_loss() == without.estimate_loss()


# --- The optimizer
@pytest.fixture
def optimizers(monkeypatch):
    """A list of the AdamW optimizers that train() makes, with the learning rates of their steps."""
    created = []

    class RecordingAdamW(torch.optim.AdamW):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.learning_rates = []
            created.append(self)

        def step(self, *arguments, **options):
            self.learning_rates.append([group['lr'] for group in self.param_groups])
            return super().step(*arguments, **options)

    monkeypatch.setattr(torch.optim, 'AdamW', RecordingAdamW)
    return created


def test_the_learning_rate_of_the_bigram_falls_linearly_from_its_peak_to_0(tmp_path, optimizers):
    bigram = import_script(tmp_path, 'bigram.py', **SMALL_BIGRAM, learning_rate=0.5)
    bigram.train()
    [optimizer] = optimizers
    rates = [rate for [rate] in optimizer.learning_rates]
    assert rates == pytest.approx([0.5 * (1 - step / 20) for step in range(20)])
    assert optimizer.param_groups[0]['lr'] == pytest.approx(0, abs=1e-9)  # when training ends


def test_the_learning_rate_of_the_gpt_warms_up_and_then_falls_linearly_to_0(tmp_path, optimizers):
    """It is the product of a warm-up, from 1 / warmup_iters to 1, and a decay from 1 to 0."""
    sizes = {**SMALL, 'max_iters': 40, 'warmup_iters': 8}
    gpt = import_script(tmp_path, 'gpt.py', **sizes, learning_rate=0.01)
    gpt.train()
    [optimizer] = optimizers
    rates = []
    for group_rates in optimizer.learning_rates:
        assert group_rates[0] == group_rates[1]  # the same for matrices and vectors
        rates.append(group_rates[0])
    assert len(rates) == 40
    assert rates[0] == pytest.approx(0.01 / 8)
    assert rates[:9] == sorted(rates[:9]) and max(rates) == rates[8]  # the warm-up
    assert rates[8:] == pytest.approx([0.01 * (1 - step / 40) for step in range(8, 40)])
    for group in optimizer.param_groups:
        assert group['lr'] == pytest.approx(0, abs=1e-9)  # when training ends


def test_weight_decay_is_for_matrices_and_not_for_vectors(tmp_path, optimizers):
    """The vectors, biases and layer norms, are few and hardly overfit: they may grow."""
    gpt = import_script(tmp_path, 'gpt.py', **SMALL, weight_decay=0.3)
    gpt.train()
    [optimizer] = optimizers
    decay_of = {}
    for group in optimizer.param_groups:
        for parameter in group['params']:
            assert parameter not in decay_of
            decay_of[parameter] = group['weight_decay']
    for name, parameter in gpt.model.named_parameters():
        is_vector = name.endswith('bias') or '.ln' in name or name.startswith('ln')
        assert parameter.dim() == (1 if is_vector else 2)
        assert decay_of[parameter] == (0.0 if is_vector else 0.3), name


def test_the_training_of_the_gpt_is_torchs_adamw_step_by_step(tmp_path):
    """The same steps by hand: the same batches and dropout, from the same seed, the learning rate
    computed with a formula. At the end, all weights are the same.
    """
    sizes = {**SMALL, 'max_iters': 8, 'eval_interval': 3, 'warmup_iters': 4}
    gpt = import_script(
        tmp_path, 'gpt.py', **sizes, learning_rate=0.01, weight_decay=0.5, dropout=0.2)
    model = copy.deepcopy(gpt.model)
    torch.manual_seed(2)
    gpt.train()

    torch.manual_seed(2)
    optimizer = torch.optim.AdamW([
        {'params': [p for p in model.parameters() if p.dim() == 2], 'weight_decay': 0.5},
        {'params': [p for p in model.parameters() if p.dim() == 1], 'weight_decay': 0},
    ], betas=(0.9, 0.99))
    for step in range(8):
        warmup = 1 / 4 + min(step / 4, 1) * 3 / 4
        for group in optimizer.param_groups:
            group['lr'] = 0.01 * warmup * (1 - step / 8)
        x, y = gpt.get_batch('train')
        loss = model(x, y)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for trained, by_hand in zip(gpt.model.parameters(), model.parameters()):
        assert torch.allclose(trained, by_hand, atol=1e-5)


def test_the_training_of_the_bigram_is_torchs_adamw_step_by_step(tmp_path):
    sizes = {**SMALL_BIGRAM, 'max_iters': 8, 'eval_interval': 3}
    bigram = import_script(tmp_path, 'bigram.py', **sizes, learning_rate=0.5)
    model = copy.deepcopy(bigram.model)
    torch.manual_seed(2)
    bigram.train()

    torch.manual_seed(2)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0)  # betas are torch's
    for step in range(8):
        optimizer.param_groups[0]['lr'] = 0.5 * (1 - step / 8)
        x, y = bigram.get_batch('train')
        loss = model(x, y)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained, by_hand = bigram.model.token_embedding_table, model.token_embedding_table
    assert torch.allclose(trained.weight, by_hand.weight, atol=1e-5)


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
    bigram = import_script(tmp_path, 'bigram.py', device='cpu')
    bigram.train()
    current, following = bigram.train_data[:-1], bigram.train_data[1:]
    counts = torch.zeros(bigram.vocab_size, bigram.vocab_size)
    for i, j in zip(current.tolist(), following.tolist()):
        counts[i, j] += 1
    totals = counts.sum(dim=1, keepdim=True)
    frequencies = counts / totals.clamp(min=1)
    logits = bigram.model.token_embedding_table.weight.detach()
    frequent = totals[:, 0] > 300
    assert frequent.sum() > 10
    assert (logits.softmax(dim=-1) - frequencies)[frequent].abs().max() < 0.03
    # No bigram model can do better on this text than the frequencies themselves.
    lowest_loss = -frequencies[current, following].log().mean()
    assert lowest_loss < F.cross_entropy(logits[current], following) < lowest_loss + 0.02


# --- Whole runs
def test_the_gpt_prints_its_size_then_losses_and_samples_and_then_generated_text(tmp_path):
    out, err, status = run(copy_script(tmp_path, 'gpt.py', **SMALL))
    assert (err, status) == ('', 0)
    gpt = import_script(tmp_path, 'gpt.py', **SMALL)
    parameters = sum(p.numel() for p in gpt.model.parameters())
    progress, generated = out.split('They generate:\n')
    lines = progress.splitlines()
    assert lines[0] == (f'{len(TEXT):,} characters, {gpt.vocab_size} different; 20 steps on cpu; '
                        f'{parameters:,} parameters')
    assert len(lines) == 1 + 3 * 2 + 1
    for step, losses, sample in zip((0, 10, 20), lines[1:7:2], lines[2:7:2]):
        assert re.fullmatch(rf'step {step}: train loss \d\.\d{{4}}, val loss \d\.\d{{4}}', losses)
        assert sample.startswith('    ') and 40 < len(sample) <= 4 + 3 * 81
    val_losses = re.findall(r'val loss (\d\.\d{4})$', progress, re.MULTILINE)
    assert lines[-1].startswith(f'The best weights, val loss {min(val_losses)}, are in gpt.pt.')
    assert len(generated) == 1 + 500 + 1  # token 0, 500 new characters, and the end of print
    assert generated[0] == gpt.chars[0] == '\n'


def test_the_bigram_prints_losses_and_then_generated_text(tmp_path):
    out, err, status = run(copy_script(tmp_path, 'bigram.py', **SMALL_BIGRAM))
    assert (err, status) == ('', 0)
    lines = out.split('\n', maxsplit=3)
    for step, line in zip((0, 10, 20), lines):
        assert re.fullmatch(rf'step {step}: train loss \d\.\d{{4}}, val loss \d\.\d{{4}}', line)
    generated = lines[3]
    assert len(generated) == 1 + 500 + 1 and generated[0] == '\n'


@pytest.mark.parametrize('script', ['bigram.py', 'gpt.py'])
def test_training_lowers_both_losses(tmp_path, capsys, script):
    hyperparameters = {**SMALL_OF[script], 'max_iters': 100, 'eval_interval': 50}
    import_script(tmp_path, script, **hyperparameters).train()
    out = capsys.readouterr().out
    for split in ('train', 'val'):
        losses = [float(x) for x in re.findall(rf'step.* {split} loss (\d\.\d+)', out)]
        assert len(losses) == 3 and losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize('script', ['bigram.py', 'gpt.py'])
def test_the_same_seed_gives_the_same_losses_and_the_same_text(tmp_path, capsys, script):
    outputs = []
    for seed in (1, 1, 2):
        module = import_script(new_folder(tmp_path), script, **SMALL_OF[script], seed=seed)
        module.train()
        context = torch.zeros((1, 1), dtype=torch.long)
        print(module.decode(module.m.generate(context, max_new_tokens=500)[0].tolist()))
        outputs.append(capsys.readouterr().out)
    first, second, other = outputs
    assert 'step 20' in first and len(first) > 500
    assert first == second != other


@pytest.mark.parametrize('script', ['bigram.py', 'gpt.py'])
def test_how_often_the_loss_is_estimated_does_not_change_what_is_learned(tmp_path, script):
    """Estimates and samples use random numbers too, but never those of training."""
    weights = []
    for eval_interval in (3, 20):
        hyperparameters = {**SMALL_OF[script], 'eval_interval': eval_interval}
        if script == 'gpt.py':
            hyperparameters['dropout'] = 0.2
        module = import_script(new_folder(tmp_path), script, **hyperparameters)
        module.train()
        weights.append(torch.cat([p.flatten() for p in module.model.parameters()]))
    assert torch.equal(weights[0], weights[1])
