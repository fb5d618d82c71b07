"""The transformer, part by part: what each promises, and the proof."""
import math

import pytest
import torch
import torch.nn as nn
from torch.nn import functional as F

from conftest import SMALL, load


def tokens(module, length, batch=3):
    """A batch of random token ids (batch, length)."""
    return torch.randint(module.vocab_size, (batch, length))


def stir(model):
    """Gives every weight, the zero ones too, a value of its own, so that no part can hide."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def test_logits_keep_their_shape_with_and_without_targets(either):
    x, y = tokens(either, 7), tokens(either, 7)
    logits, loss = either.model(x)
    assert logits.shape == (3, 7, either.vocab_size) and loss is None
    with_targets, loss = either.model(x, y)
    assert torch.equal(logits, with_targets) and loss.shape == ()


def test_the_loss_is_the_mean_of_minus_ln_of_the_right_answers_probability(either):
    x, y = tokens(either, 7), tokens(either, 7)
    logits, loss = stir(either.model)(x, y)
    right = logits.softmax(dim=-1).gather(-1, y[..., None])
    assert loss.item() == pytest.approx(-right.log().mean().item(), abs=1e-5)


def test_a_fresh_model_is_about_as_wrong_as_chance(tmp_path):
    """It knows nothing. A loss far above ln(vocab_size) would be a claim, wrongly made.

    The bigram's table of zeros claims nothing at all. The GPT's random last layer has some mild
    opinions, logits of size 0.6 or so, and those cost up to 0.3 nats.
    """
    bigram = load(tmp_path, 'bigram.py')
    assert bigram.estimate_loss()['val'] == pytest.approx(math.log(bigram.vocab_size), abs=1e-4)
    gpt = load(tmp_path, 'gpt.py', eval_iters=2)
    assert gpt.estimate_loss()['val'] == pytest.approx(math.log(gpt.vocab_size), abs=0.35)


@pytest.mark.parametrize('fused_attention', [True, False])
def test_the_future_never_reaches_the_past(tmp_path, fused_attention):
    """Change one token: what the model says before it stays, from there on it changes."""
    gpt = load(tmp_path, 'gpt.py', **SMALL, fused_attention=fused_attention)
    model = stir(gpt.model).eval()
    x = tokens(gpt, gpt.block_size)
    changed = x.clone()
    changed[:, 9] = (x[:, 9] + 1) % gpt.vocab_size
    before, after = model(x)[0], model(changed)[0]
    assert torch.allclose(before[:, :9], after[:, :9], atol=1e-6)
    for place in range(9, gpt.block_size):
        assert not torch.allclose(before[:, place], after[:, place], atol=1e-4)


def test_the_fused_attention_equals_the_spelled_out_one_in_values_and_gradients(gpt):
    attention = stir(gpt.MultiHeadAttention())
    results = []
    for gpt.fused_attention in (True, False):
        torch.manual_seed(0)
        x = torch.randn(3, gpt.block_size, gpt.n_embd, requires_grad=True)
        out = attention(x)
        out.square().sum().backward()
        results.append([out, x.grad] + [p.grad.clone() for p in attention.parameters()])
        attention.zero_grad()
    for fused, spelled_out in zip(*results):
        assert torch.allclose(fused, spelled_out, rtol=1e-4, atol=1e-4)


def test_attention_drops_out_as_much_fused_as_spelled_out(tmp_path):
    """With half of the weights silenced and the rest doubled, the mean of many stays the same."""
    gpt = load(tmp_path, 'gpt.py', **SMALL, dropout=0.5)
    attention = stir(gpt.MultiHeadAttention())
    x = torch.randn(1, 6, gpt.n_embd).expand(20_000, -1, -1)
    quiet = attention.eval()(x[:1])
    attention.train()
    for gpt.fused_attention in (True, False):
        noisy = attention(x)
        assert torch.allclose(noisy.mean(dim=0), quiet[0], atol=0.1)
        assert noisy.std(dim=0).min() > 0.1


def test_block_equals_torchs_own_transformer_layer(gpt):
    """Two residual paths, normalised before, ReLU between: torch's layer with the same weights."""
    ours = stir(gpt.Block())
    theirs = nn.TransformerEncoderLayer(
        gpt.n_embd, gpt.n_head, dim_feedforward=4 * gpt.n_embd, dropout=0.0, activation='relu',
        batch_first=True, norm_first=True)
    with torch.no_grad():
        theirs.self_attn.in_proj_weight.copy_(ours.sa.qkv.weight)
        theirs.self_attn.in_proj_bias.zero_()
    for mine, torchs in [(ours.sa.proj, theirs.self_attn.out_proj), (ours.ffwd[0], theirs.linear1),
                         (ours.ffwd[2], theirs.linear2), (ours.ln1, theirs.norm1),
                         (ours.ln2, theirs.norm2)]:
        torchs.load_state_dict(mine.state_dict())
    x = torch.randn(3, gpt.block_size, gpt.n_embd)
    mask = nn.Transformer.generate_square_subsequent_mask(gpt.block_size)
    assert torch.allclose(ours(x), theirs(x, src_mask=mask, is_causal=True), atol=1e-4)


def test_the_same_character_means_something_else_at_another_place(gpt):
    """Without position embeddings, a row of equal tokens would get equal predictions."""
    logits, _ = stir(gpt.model)(torch.zeros(1, gpt.block_size, dtype=torch.long))
    assert not torch.allclose(logits[:, 3], logits[:, 4], atol=1e-3)


def test_dropout_silences_in_training_and_not_in_eval(tmp_path):
    gpt = load(tmp_path, 'gpt.py', **SMALL, dropout=0.5)
    x = tokens(gpt, 8)
    stir(gpt.model).train()
    assert not torch.allclose(gpt.model(x)[0], gpt.model(x)[0])
    gpt.model.eval()
    assert torch.equal(gpt.model(x)[0], gpt.model(x)[0])


def test_the_bigram_looks_at_one_character_only(tmp_path):
    bigram = load(tmp_path, 'bigram.py')
    x = tokens(bigram, 9)
    assert torch.equal(stir(bigram.model)(x)[0][:, -1:], bigram.model(x[:, -1:])[0])
    assert F.softmax(bigram.model(x)[0], dim=-1).sum(-1).allclose(torch.ones(3, 9))
