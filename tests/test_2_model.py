"""The models: first the loss, then the transformer from its parts to the whole."""
import itertools
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.testing import assert_close

from conftest import import_script, randomize_, tokens


# --- Logits and loss
def test_the_loss_is_the_mean_of_minus_ln_of_the_probability_of_the_target(module):
    x, y = tokens(module, 7), tokens(module, 7)
    logits, loss = randomize_(module.model)(x, y)
    probabilities = logits.softmax(dim=-1)
    terms = [-math.log(probabilities[b, t, y[b, t]].item()) for b in range(3) for t in range(7)]
    assert loss.item() == pytest.approx(sum(terms) / len(terms), abs=1e-5)
    logits_without_targets, no_loss = module.model(x)
    assert torch.equal(logits_without_targets, logits) and no_loss is None


@pytest.mark.parametrize('script, difference', [('bigram.py', 1e-5), ('gpt.py', 0.5)])
def test_a_new_model_is_about_as_good_as_guessing(tmp_path, script, difference):
    """A loss far above ln(vocab_size) would mean that it starts out sure of wrong predictions.

    The GPT's random output layer makes some characters a little more probable than others.
    """
    module = import_script(tmp_path, script)
    ln_vocab_size = math.log(module.vocab_size)
    assert module.estimate_loss()['val'] == pytest.approx(ln_vocab_size, abs=difference)


def test_the_bigram_model_sees_only_the_current_character(bigram):
    """Row i of its table holds the logits of what follows character i, whatever came before."""
    x = tokens(bigram, 9)
    logits, _ = randomize_(bigram.model)(x)
    assert torch.equal(logits, bigram.model.token_embedding_table.weight[x])


# --- The transformer
def test_the_future_never_reaches_the_past(gpt):
    """Change the character at position 9: predictions before it stay, from there on they change."""
    model = randomize_(gpt.model)
    x = tokens(gpt, gpt.block_size)
    changed = x.clone()
    changed[:, 9] = (x[:, 9] + 1) % gpt.vocab_size
    difference = (model(x)[0] - model(changed)[0]).abs().amax(dim=-1)  # (B, T)
    assert difference[:, :9].max() < 1e-6 and difference[:, 9:].min() > 1e-4


def test_an_embedding_that_the_heads_do_not_divide_is_refused(tmp_path):
    with pytest.raises(AssertionError, match='n_embd = 16: use a multiple of n_head = 3'):
        import_script(tmp_path, 'gpt.py', n_head=3)


class TorchsGPT(nn.Module):
    """The same network as gpt.model, with the same weights, of torch's own modules."""

    def __init__(self, gpt):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            gpt.n_embd, gpt.n_head, dim_feedforward=4 * gpt.n_embd, dropout=gpt.dropout,
            activation='relu', batch_first=True, norm_first=True)
        layer.dropout.p = 0.0  # torch's layer has one more dropout than ours, of the hidden layer
        self.token_embedding_table = nn.Embedding(gpt.vocab_size, gpt.n_embd)
        self.position_embedding_table = nn.Embedding(gpt.block_size, gpt.n_embd)
        self.encoder = nn.TransformerEncoder(
            layer, gpt.n_layer, norm=nn.LayerNorm(gpt.n_embd), enable_nested_tensor=False)
        self.lm_head = nn.Linear(gpt.n_embd, gpt.vocab_size)

        missing, unexpected = self.load_state_dict(
            in_torchs_names(gpt.model.state_dict()), strict=False)
        assert unexpected == [] and len(missing) == gpt.n_layer
        for name in missing:  # ours has no biases in queries, keys and values
            assert name.endswith('self_attn.in_proj_bias')
            nn.init.zeros_(self.get_parameter(name))

    def forward(self, idx):
        T = idx.shape[1]
        x = self.token_embedding_table(idx) + self.position_embedding_table(torch.arange(T))
        mask = nn.Transformer.generate_square_subsequent_mask(T)
        return self.lm_head(self.encoder(x, mask=mask, is_causal=True))


def in_torchs_names(tensors):
    """The tensors of gpt.model under their names in TorchsGPT, which has q, k and v in one."""
    parts = {}
    for name, tensor in tensors.items():
        for ours, torchs in [('blocks', 'encoder.layers'), ('ln_f', 'encoder.norm'), ('ln', 'norm'),
                             *((f'sa.{part}.', 'self_attn.in_proj_')
                               for part in ('query', 'key', 'value')),
                             ('sa.proj', 'self_attn.out_proj'), ('ffwd.fc', 'linear1'),
                             ('ffwd.proj', 'linear2')]:
            name = name.replace(ours, torchs)
        parts.setdefault(name, []).append(tensor)
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def test_the_gpt_equals_the_same_network_of_torchs_own_modules(tmp_path):
    """With the same weights, it has the same logits and the same gradients for all parameters.

    And dropout in the same places, in training only: then the same seed zeroes the same numbers.
    (With several sequences, torch's layer has them in another order, and zeroes others.)
    """
    gpt = import_script(tmp_path, 'gpt.py', dropout=0.3)
    model = randomize_(gpt.model).eval()
    torchs_gpt = TorchsGPT(gpt).eval()
    x, y = tokens(gpt, gpt.block_size), tokens(gpt, gpt.block_size)
    logits, loss = model(x, y)
    torchs_logits = torchs_gpt(x)
    assert_close(logits, torchs_logits, rtol=1e-4, atol=1e-4)

    loss.backward()
    F.cross_entropy(torchs_logits.flatten(0, 1), y.flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, gradient in in_torchs_names(gradients).items():
        assert_close(gradient, torchs_gpt.get_parameter(name).grad, rtol=1e-4, atol=1e-5)

    torch.manual_seed(0)
    logits, _ = model.train()(x[:1])
    torch.manual_seed(0)
    assert_close(logits, torchs_gpt.train()(x[:1]), rtol=1e-4, atol=1e-4)


# --- Initial weights and sizes
def test_initial_weights_are_torchs_but_embeddings_start_with_a_tenth(tmp_path):
    """A Linear starts uniform in +-1/sqrt(C_in), and that has std 1/sqrt(3 * C_in)."""
    gpt = import_script(tmp_path, 'gpt.py', n_embd=64, n_layer=3)
    for layer in gpt.model.modules():
        if isinstance(layer, nn.Embedding):
            assert layer.weight.std().item() == pytest.approx(0.1, rel=0.06)
        elif isinstance(layer, nn.Linear):
            std = 1 / math.sqrt(3 * layer.in_features)
            for parameter in layer.parameters():
                rel = 0.06 if parameter.dim() == 2 else 0.25  # a bias has few numbers
                assert parameter.std().item() == pytest.approx(std, rel=rel)


def test_a_new_model_takes_the_sizes_of_this_moment(gpt, bigram):
    """So that a notebook can change one, and make another model."""
    bigram.vocab_size = 7
    assert bigram.BigramLanguageModel()(tokens(bigram, 2))[0].shape == (3, 2, 7)
    gpt.n_embd, gpt.n_head, gpt.n_layer, gpt.block_size = 24, 3, 4, 9
    model = gpt.GPTLanguageModel()
    assert model(tokens(gpt, 9))[0].shape == (3, 9, gpt.vocab_size)
    assert len(model.blocks) == 4 and model.blocks[0].sa.n_head == 3
    assert model.position_embedding_table.weight.shape == (9, 24)


def test_every_layer_and_every_block_starts_with_weights_of_its_own(gpt):
    # Of state_dict, because parameters() names each only once, even if two layers share it.
    matrices = [weight for weight in gpt.model.state_dict().values() if weight.dim() == 2]
    for one, other in itertools.combinations(matrices, 2):
        assert not torch.equal(one, other)
