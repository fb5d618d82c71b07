"""The models: first the loss, then the transformer from its parts to the whole."""
import math
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from conftest import SMALL, SMALL_BIGRAM, copy_script, import_script, randomize_, run, tokens

both_forms_of_attention = pytest.mark.parametrize('fused_attention', [True, False])


# --- Logits and loss
def test_there_is_a_logit_for_each_next_character_and_a_loss_if_there_are_targets(module):
    x, y = tokens(module, 7), tokens(module, 7)
    logits, loss = module.model(x)
    assert logits.shape == (3, 7, module.vocab_size) and loss is None
    same_logits, loss = module.model(x, y)
    assert torch.equal(logits, same_logits) and loss.shape == ()


def test_the_loss_is_the_mean_of_minus_ln_of_the_probability_of_the_target(module):
    x, y = tokens(module, 7), tokens(module, 7)
    logits, loss = randomize_(module.model)(x, y)
    probabilities = logits.softmax(dim=-1)
    terms = [-math.log(probabilities[b, t, y[b, t]].item()) for b in range(3) for t in range(7)]
    assert loss.item() == pytest.approx(sum(terms) / len(terms), abs=1e-5)


def test_a_new_bigram_model_finds_all_characters_equally_probable(tmp_path):
    bigram = import_script(tmp_path, 'bigram.py', **SMALL_BIGRAM)
    x, y = tokens(bigram, 9), tokens(bigram, 9)
    logits, loss = bigram.model(x, y)
    assert torch.equal(logits, torch.zeros(3, 9, bigram.vocab_size))
    assert loss.item() == pytest.approx(math.log(bigram.vocab_size))


def test_a_new_gpt_is_about_as_good_as_guessing(tmp_path):
    """A loss far above ln(vocab_size) would mean that it starts out sure of wrong predictions.

    The random weights of its output layer do make some characters a little more probable than
    others. That costs up to 0.3 nats.
    """
    gpt = import_script(tmp_path, 'gpt.py', device='cpu', eval_iters=2)
    assert gpt.estimate_loss()['val'] == pytest.approx(math.log(gpt.vocab_size), abs=0.35)


def test_the_bigram_model_sees_only_the_current_character(tmp_path):
    """Row i of its table holds the logits of what follows character i, whatever came before."""
    bigram = import_script(tmp_path, 'bigram.py', **SMALL_BIGRAM)
    x = tokens(bigram, 9)
    logits, _ = randomize_(bigram.model)(x)
    assert torch.equal(logits, bigram.model.token_embedding_table.weight[x])


# --- Attention
@both_forms_of_attention
def test_the_future_never_reaches_the_past(tmp_path, fused_attention):
    """Change the character at position 9: predictions before it stay, from there on they change."""
    gpt = import_script(tmp_path, 'gpt.py', **SMALL, fused_attention=fused_attention)
    model = randomize_(gpt.model)
    x = tokens(gpt, gpt.block_size)
    changed = x.clone()
    changed[:, 9] = (x[:, 9] + 1) % gpt.vocab_size
    before, after = model(x)[0], model(changed)[0]
    assert torch.allclose(before[:, :9], after[:, :9], atol=1e-6)
    for position in range(9, gpt.block_size):
        assert not torch.allclose(before[:, position], after[:, position], atol=1e-4)


@both_forms_of_attention
def test_with_equal_scores_attention_is_the_running_mean_of_the_values(tmp_path, fused_attention):
    """Zero queries and keys make all scores 0: every position weighs its past equally."""
    gpt = import_script(tmp_path, 'gpt.py', **SMALL, fused_attention=fused_attention)
    C, T = gpt.n_embd, gpt.block_size
    attention = gpt.MultiHeadAttention(gpt.n_head, C // gpt.n_head)
    with torch.no_grad():
        attention.qkv.weight[:2 * C] = 0  # the rows that make queries and keys
        attention.proj.weight.copy_(torch.eye(C))
        attention.proj.bias.zero_()
    x = torch.randn(3, T, C)
    values = x @ attention.qkv.weight[2 * C:].T
    running_mean = values.cumsum(dim=1) / torch.arange(1, T + 1)[:, None]
    assert torch.allclose(attention(x), running_mean, atol=1e-5)


def one_head(q, k, v):
    """Attention of one head, position by position; q, k and v are (T, hs)."""
    outputs = []
    for i in range(len(q)):
        scores = torch.stack([q[i] @ k[j] / math.sqrt(len(q[i])) for j in range(i + 1)])
        weights = scores.softmax(dim=0)  # how much of each position up to i is taken
        outputs.append(sum(weights[j] * v[j] for j in range(i + 1)))
    return torch.stack(outputs)


@both_forms_of_attention
def test_multi_head_attention_is_single_heads_side_by_side(tmp_path, fused_attention):
    """Each head has its own slice of queries, keys and values; proj mixes what they return."""
    gpt = import_script(tmp_path, 'gpt.py', **SMALL, fused_attention=fused_attention)
    C, hs = gpt.n_embd, gpt.n_embd // gpt.n_head
    attention = randomize_(gpt.MultiHeadAttention(gpt.n_head, hs))
    x = torch.randn(1, gpt.block_size, C)
    queries, keys, values = attention.qkv(x)[0].split(C, dim=-1)  # (T, C) each
    heads = []
    for head in range(gpt.n_head):
        channels = slice(head * hs, (head + 1) * hs)
        heads.append(one_head(queries[:, channels], keys[:, channels], values[:, channels]))
    expected = attention.proj(torch.cat(heads, dim=-1))
    assert torch.allclose(attention(x)[0], expected, atol=1e-5)


def test_fused_attention_equals_the_spelled_out_one_in_outputs_and_gradients(gpt):
    attention = randomize_(gpt.MultiHeadAttention(gpt.n_head, gpt.n_embd // gpt.n_head))
    x = torch.randn(3, gpt.block_size, gpt.n_embd, requires_grad=True)
    results = {}
    for fused in (True, False):
        gpt.fused_attention = fused
        out = attention(x)
        gradients = torch.autograd.grad(out.square().sum(), [x, *attention.parameters()])
        results[fused] = [out, *gradients]
    for fused, spelled_out in zip(results[True], results[False]):
        assert torch.allclose(fused, spelled_out, rtol=1e-4, atol=1e-4)


# --- Feed-forward and blocks
def test_the_feed_forward_layer_processes_each_position_separately(gpt):
    ffwd = randomize_(gpt.FeedForward(gpt.n_embd))
    x = torch.randn(3, 8, gpt.n_embd)
    for t in range(8):
        assert torch.allclose(ffwd(x)[:, t], ffwd(x[:, t]), atol=1e-5)


def test_a_block_whose_projections_are_zero_is_the_identity(tmp_path):
    """The residual path carries x past both parts unchanged: not even dropout touches it."""
    gpt = import_script(tmp_path, 'gpt.py', **SMALL, dropout=0.5)
    block = randomize_(gpt.Block(gpt.n_embd, gpt.n_head)).train()
    for layer in (block.sa.proj, block.ffwd[2]):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    x = torch.randn(3, gpt.block_size, gpt.n_embd)
    assert torch.equal(block(x), x)


def torch_layer(gpt):
    """torch's own version of Block."""
    return nn.TransformerEncoderLayer(
        gpt.n_embd, gpt.n_head, dim_feedforward=4 * gpt.n_embd, dropout=0.0, activation='relu',
        batch_first=True, norm_first=True)


def same_parameters(block, layer):
    """Pairs of parameters that have the same role in a Block and in torch's layer."""
    pairs = [(block.sa.qkv.weight, layer.self_attn.in_proj_weight)]
    for ours, torchs in [(block.ln1, layer.norm1), (block.sa.proj, layer.self_attn.out_proj),
                         (block.ln2, layer.norm2), (block.ffwd[0], layer.linear1),
                         (block.ffwd[2], layer.linear2)]:
        pairs += [(ours.weight, torchs.weight), (ours.bias, torchs.bias)]
    return pairs


def copy_parameters(pairs):
    """The second of each pair gets the values of the first."""
    with torch.no_grad():
        for ours, torchs in pairs:
            torchs.copy_(ours)


def test_a_block_equals_torchs_own_transformer_layer(gpt):
    block, layer = randomize_(gpt.Block(gpt.n_embd, gpt.n_head)), torch_layer(gpt)
    copy_parameters(same_parameters(block, layer))
    nn.init.zeros_(layer.self_attn.in_proj_bias)  # ours has none
    x = torch.randn(3, gpt.block_size, gpt.n_embd)
    mask = nn.Transformer.generate_square_subsequent_mask(gpt.block_size)
    assert torch.allclose(block(x), layer(x, src_mask=mask, is_causal=True), atol=1e-4)


# --- Dropout
@both_forms_of_attention
def test_dropout_reaches_the_attention_weights_and_the_attention_output(tmp_path, fused_attention):
    """With one position and one head there is one attention weight for each sequence, and it is 1.

    Where it is dropped, the whole output is 0 (proj has no bias here). In the other sequences,
    single numbers of the output are dropped. What is kept is divided by 1 - dropout each time, so
    that the mean stays the same.
    """
    gpt = import_script(tmp_path, 'gpt.py', **SMALL, dropout=0.3, fused_attention=fused_attention)
    attention = gpt.MultiHeadAttention(1, gpt.n_embd)
    nn.init.zeros_(attention.proj.bias)
    x = torch.randn(gpt.n_embd).expand(20_000, 1, gpt.n_embd)
    out = attention.train()(x)
    weight_dropped = (out == 0).all(dim=-1)
    assert weight_dropped.float().mean().item() == pytest.approx(0.3, abs=0.02)
    others = out[~weight_dropped]
    assert (others == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
    without_dropout = attention.eval()(x[:1])[0, 0]
    kept = others.abs().max(dim=0).values
    assert torch.allclose(kept, without_dropout.abs() / 0.7 / 0.7, atol=1e-4)


def test_dropout_reaches_the_feed_forward_output(tmp_path):
    gpt = import_script(tmp_path, 'gpt.py', **SMALL, dropout=0.3)
    ffwd = gpt.FeedForward(gpt.n_embd)
    x = torch.randn(1000, 8, gpt.n_embd)
    out = ffwd.train()(x)
    assert (out == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
    without_dropout = ffwd.eval()(x)
    assert torch.allclose(out[out != 0], without_dropout[out != 0] / 0.7, atol=1e-5)


@both_forms_of_attention
def test_dropout_is_random_in_training_and_off_in_eval_mode(tmp_path, fused_attention):
    gpt = import_script(tmp_path, 'gpt.py', **SMALL, dropout=0.5, fused_attention=fused_attention)
    without = import_script(tmp_path, 'gpt.py', **SMALL, fused_attention=fused_attention)
    without.model.load_state_dict(randomize_(gpt.model).state_dict())
    x = tokens(gpt, 8)
    gpt.model.train()
    assert not torch.allclose(gpt.model(x)[0], gpt.model(x)[0])
    gpt.model.eval()
    assert torch.equal(gpt.model(x)[0], without.model(x)[0])


# --- The whole
def test_the_same_character_is_different_at_another_position(gpt):
    """Without position embeddings, a row of equal characters would get equal predictions."""
    logits, _ = randomize_(gpt.model)(torch.zeros(1, gpt.block_size, dtype=torch.long))
    assert not torch.allclose(logits[:, 3], logits[:, 4], atol=1e-3)


def test_there_is_no_position_beyond_block_size(gpt):
    gpt.model(tokens(gpt, gpt.block_size))
    with pytest.raises(IndexError):
        gpt.model(tokens(gpt, gpt.block_size + 1))


@both_forms_of_attention
def test_the_whole_gpt_equals_the_same_network_of_torchs_own_modules(tmp_path, fused_attention):
    """With the same weights, it has the same logits and the same gradients for all parameters."""
    gpt = import_script(tmp_path, 'gpt.py', **SMALL, fused_attention=fused_attention)
    model = randomize_(gpt.model)

    token_embedding = nn.Embedding(gpt.vocab_size, gpt.n_embd)
    position_embedding = nn.Embedding(gpt.block_size, gpt.n_embd)
    encoder = nn.TransformerEncoder(torch_layer(gpt), gpt.n_layer, norm=nn.LayerNorm(gpt.n_embd),
                                    enable_nested_tensor=False)
    output_layer = nn.Linear(gpt.n_embd, gpt.vocab_size)

    pairs = [(model.token_embedding_table.weight, token_embedding.weight),
             (model.position_embedding_table.weight, position_embedding.weight),
             (model.ln_f.weight, encoder.norm.weight), (model.ln_f.bias, encoder.norm.bias),
             (model.lm_head.weight, output_layer.weight), (model.lm_head.bias, output_layer.bias)]
    for block, layer in zip(model.blocks, encoder.layers):
        pairs += same_parameters(block, layer)
        nn.init.zeros_(layer.self_attn.in_proj_bias)
    assert len(pairs) == len(list(model.parameters()))  # none is left out
    copy_parameters(pairs)

    x, y = tokens(gpt, gpt.block_size), tokens(gpt, gpt.block_size)
    logits, loss = model(x, y)
    mask = nn.Transformer.generate_square_subsequent_mask(gpt.block_size)
    embedded = token_embedding(x) + position_embedding(torch.arange(gpt.block_size))
    torchs_logits = output_layer(encoder(embedded, mask=mask, is_causal=True))
    assert torch.allclose(logits, torchs_logits, atol=1e-4)

    loss.backward()
    F.cross_entropy(torchs_logits.reshape(-1, gpt.vocab_size), y.reshape(-1)).backward()
    for ours, torchs in pairs:
        assert torch.allclose(ours.grad, torchs.grad, atol=1e-5)


# --- Size and initial weights
def test_nearly_all_parameters_are_in_the_blocks_about_12_times_C_squared_in_each(tmp_path):
    """The number of parameters, from the hyperparameters alone. A Linear has C_in * C_out weights
    and C_out biases, a LayerNorm has C of each.
    """
    gpt = import_script(tmp_path, 'gpt.py', device='cpu')
    C, vocab_size = gpt.n_embd, gpt.vocab_size
    embeddings = vocab_size * C + gpt.block_size * C
    attention = C * 3 * C + C * C + C  # qkv without biases, proj with
    feed_forward = C * 4 * C + 4 * C + 4 * C * C + C
    block = 2 * C + attention + 2 * C + feed_forward
    output = 2 * C + C * vocab_size + vocab_size
    parameters = sum(p.numel() for p in gpt.model.parameters())
    assert parameters == embeddings + gpt.n_layer * block + output
    assert block == pytest.approx(12 * C * C, rel=0.01)
    assert gpt.n_layer * block > 0.9 * parameters


def test_initial_weights_are_torchs_except_embeddings_and_the_ends_of_residual_branches(tmp_path):
    """Embeddings start with std 0.1. A Linear starts uniform in +-1/sqrt(C_in), and that has std
    1/sqrt(3 * C_in). The last layer of each branch that is added to x gets less, by sqrt(2 *
    n_layer): that many branches are added up, and their variances with them.
    """
    gpt = import_script(tmp_path, 'gpt.py', **{**SMALL, 'n_embd': 64, 'n_layer': 3})

    def std(weight):
        return pytest.approx(weight.std().item(), rel=0.06)

    model = gpt.model
    assert std(model.token_embedding_table.weight) == 0.1
    assert std(model.position_embedding_table.weight) == 0.1
    assert std(model.lm_head.weight) == 1 / math.sqrt(3 * 64)
    assert len(model.blocks) == 3
    for block in model.blocks:
        assert std(block.sa.qkv.weight) == 1 / math.sqrt(3 * 64)
        assert std(block.ffwd[0].weight) == 1 / math.sqrt(3 * 64)
        assert std(block.sa.proj.weight) == 1 / math.sqrt(3 * 64) / math.sqrt(2 * 3)
        assert std(block.ffwd[2].weight) == 1 / math.sqrt(3 * 4 * 64) / math.sqrt(2 * 3)
    for layer in model.modules():
        if isinstance(layer, nn.LayerNorm):
            assert torch.equal(layer.weight, torch.ones(64))
            assert torch.equal(layer.bias, torch.zeros(64))


def test_every_layer_and_every_block_starts_with_weights_of_its_own(gpt):
    weights = [p for p in gpt.model.parameters() if p.dim() == 2]
    for i, weight in enumerate(weights):
        for other in weights[:i]:
            assert weight.shape != other.shape or not torch.equal(weight, other)


# --- Your own parts
OWN_FEED_FORWARD = '''
class FeedForward(nn.Module):
    def __init__(self, n_embd):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(n_embd, 2 * n_embd), nn.GELU(), nn.Linear(2 * n_embd, n_embd))

    def forward(self, x):
        return self.net(x)
'''

OWN_BLOCK = '''
class Block(nn.Module):
    def __init__(self, n_embd, n_head):
        super().__init__()
        self.norm = nn.LayerNorm(n_embd)
        self.attention = MultiHeadAttention(n_head, n_embd // n_head)
        self.feed_forward = FeedForward(n_embd)

    def forward(self, x):
        normalised = self.norm(x)
        return x + self.attention(normalised) + self.feed_forward(normalised)
'''


@pytest.mark.parametrize('name, own', [('FeedForward', OWN_FEED_FORWARD), ('Block', OWN_BLOCK)])
def test_a_class_of_your_own_can_take_the_place_of_ours(tmp_path, name, own):
    """Nothing else in the file has to change: it trains, saves, loads and generates."""
    script = copy_script(tmp_path, 'gpt.py', **SMALL)
    source = script.read_text(encoding='utf-8')
    edited, found = re.subn(rf'(?ms)^class {name}\(.*?(?=^class )', lambda _: own + '\n\n', source)
    assert found == 1
    script.write_text(edited, encoding='utf-8')
    out, err, status = run(script)
    assert (err, status) == ('', 0)
    losses = [float(loss) for loss in re.findall(r'train loss (\d\.\d+)', out)]
    assert losses[-1] < losses[0]
    assert len(out.split('They generate:\n')[1]) > 500
