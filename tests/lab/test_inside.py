"""inside.py: it watches the model, edited or not, and shows in the terminal what that computes."""
import re

import pytest
import torch

import inside
from conftest import TEXT, exit_message, random_model, save
from solutions import EXERCISES
from watch import attention, watch

STRANGE = '</script>\'"\\\n\u2028😀'


def saved_model(folder, text=TEXT + STRANGE * 3, *edits, **hyperparameters):
    gpt = random_model(folder, text, *edits, **{'block_size': 32, **hyperparameters})
    save(gpt)
    return gpt


@pytest.fixture
def gpt(tmp_path):
    return saved_model(tmp_path)


@pytest.fixture
def show(tmp_path, monkeypatch, capsys):
    """What inside.py prints with these arguments."""
    monkeypatch.setenv('COLUMNS', '80')

    def show(*arguments):
        capsys.readouterr()
        inside.main(list(arguments), tmp_path)
        return capsys.readouterr().out
    return show


def logits_of(gpt, text):
    return gpt.model.eval()(torch.tensor([gpt.encode(text)]))[0][0, -1].detach()


def table_below(title, out):
    """The numbers of the table with this title."""
    rows = out[out.index(title):].split('\n\n')[0].splitlines()[2:]
    return torch.tensor([[float('-inf' if number == '-' else number) for number in row[1:].split()]
                         for row in rows])


def probabilities(line):
    return [float(p) for p in re.findall(r'\d\.\d\d', line)]


# --- Edited models
def edits_of(number, name):
    return EXERCISES[number].variants[name].edits


@pytest.mark.parametrize('edits', [
    edits_of(21, 'all of them'),
    edits_of(14, 'tied weights'),
    [('-math.inf, device', '-1e9, device')],
    [('out = F.relu(out)', 'out = F.gelu(out) * out.softmax(dim=-1)'),
     ('logits = self.lm_head(x)', 'logits = 2 * self.lm_head(x)')],
], ids=['today', 'tied weights', 'finite mask', 'another softmax and output'])
def test_what_is_shown_of_an_edited_model_is_what_that_model_computes(tmp_path, show, edits):
    """Attention weights are measured here in another way: with a value at one position only, what
    attention passes on is its weight. So they are those of the forward that runs.
    """
    gpt, text = saved_model(tmp_path, TEXT, *edits), TEXT[:9]
    seen = watch(gpt, text)
    p = watch(gpt, 'the k').logits[-1].softmax(dim=-1).max().item()
    ids = torch.tensor([gpt.encode(text)])
    assert torch.equal(seen.logits, gpt.model(ids)[0][0])
    assert seen.weights.shape == (gpt.n_layer, gpt.n_head, 9, 9)
    passed_on = []
    attention(gpt, 1).value.register_forward_hook(
        lambda linear, inputs, out: torch.eye(9, out.shape[-1]).expand_as(out))
    attention(gpt, 1).proj.register_forward_pre_hook(
        lambda proj, inputs: passed_on.append(inputs[0][0]))
    gpt.model(ids)
    hs = gpt.n_embd // gpt.n_head  # the channels of head 1: the weights of positions 0 to hs - 1
    torch.testing.assert_close(passed_on[0][:, :hs], seen.weights[0, 0, :, :hs])
    out = show('the k')
    assert 'nobody reads what comes later' in out and 'With one head switched off' in out
    assert probabilities(out.splitlines()[-10])[1] == pytest.approx(p, abs=0.006)


@pytest.mark.parametrize('edit, words', [
    ('', "the row's query and the column's key\n"),
    ('scores = scores.tanh()', 'what softmax is given\n')])
def test_what_the_scores_are_is_said_only_as_far_as_it_is_true(tmp_path, show, edit, words):
    saved_model(tmp_path, TEXT, ('scores = scores / math.sqrt(hs)', edit))
    assert words in show('the k')


def test_a_model_without_a_mask_is_shown_whole(tmp_path, show):
    saved_model(tmp_path, TEXT, *edits_of(1, 'no mask'))
    out = show('the k')
    assert 'There is no causal mask' in out and '2. After' not in out and '-inf' not in out
    assert (table_below('3. Attention weights', out) > 0.005).triu(1).any()


def test_torchs_own_attention_shows_no_scores_and_the_rest_is_shown(tmp_path, show):
    saved_model(tmp_path, TEXT, *edits_of(24, 'block_size = 128'))
    out = show('the k')
    assert 'No pictures: not each block of this model has one softmax' in out
    assert 'With one head switched off' in out and 'and its probability' in out


def test_without_a_softmax_in_each_block_no_weights_are_shown(gpt):
    gpt.model.blocks[0].forward = lambda x: x
    assert watch(gpt, TEXT[:9]).weights is None


@pytest.mark.parametrize('edits, argument, words', [
    ([('self.sa = ', 'self.attention = '), ('self.sa(', 'self.attention(')], 'e',
     "'sa'): if yours has another name"),
    ([('self.ln_f = ', 'self.norm = '), ('self.ln_f(', 'self.norm(')], 'e',
     "'ln_f'): if yours has another name"),
    ([('range(n_layer)', 'range(0)')], 'e', 'index 0 is out of range): if yours has another name'),
    ([('self.token_embedding_table = ', 'self.wte = '),
      ('self.token_embedding_table(', 'self.wte('),
      ('nn.init.normal_(self.token_embedding_table.weight, std=0.1)', 'pass')], '--nearest=e',
     "'token_embedding_table'): if yours has another name"),
    (edits_of(12, '300 pairs'), 'e', 'one column for each')])
def test_a_model_that_cannot_be_watched_gets_one_sentence(tmp_path, edits, argument, words):
    saved_model(tmp_path, TEXT, *edits)
    assert words in exit_message(inside.main, [argument], tmp_path)


# --- What is shown
def test_the_predictions_are_those_of_a_model_that_ends_there_and_their_mean_loss_is_the_loss(gpt):
    ids = torch.tensor([gpt.encode(TEXT[:9])])
    loss = gpt.model.eval()(ids[:, :-1], ids[:, 1:])[1].item()
    seen = watch(gpt, TEXT[:9])
    assert seen.losses.mean().item() == pytest.approx(loss, abs=1e-4)
    for layers in (2, 1, 0):
        gpt.model.blocks = gpt.model.blocks[:layers]
        torch.testing.assert_close(seen.lens[layers, -1], logits_of(gpt, TEXT[:9]))


def test_layer_by_layer_the_most_probable_characters_are_named(gpt, show):
    lines = show('the k').split('if the model stopped early\n')[1].splitlines()[:3]
    for line, logits in zip(lines, watch(gpt, 'the k').lens[:, -1]):
        ps, ids = logits.softmax(dim=-1).topk(5)
        assert probabilities(line) == pytest.approx(ps.tolist(), abs=0.006)
        assert line.split(': ')[1].startswith(gpt.chars[ids[0]].replace(' ', '_'))


def test_watching_leaves_the_model_as_it_was_and_sees_it_without_dropout(tmp_path):
    gpt = saved_model(tmp_path, dropout=0.5)
    before = watch(gpt, TEXT[:9])
    watch(gpt, TEXT[:9], [(1, 1), (2, 2)])
    assert torch.equal(watch(gpt, TEXT[:9]).logits, before.logits)
    assert not any(module._forward_hooks or module._forward_pre_hooks
                   for module in gpt.model.modules())


def test_each_heads_weights_stand_under_its_name(gpt, show):
    """Without queries, a head has equal weights: here only head 1 of layer 2."""
    attention(gpt, 2).query.weight.data[:gpt.n_embd // 2] = 0
    save(gpt)
    equal = torch.ones(4, 4).tril() / torch.arange(1, 5)[:, None]
    for layer, head in ((1, 1), (1, 2), (2, 1), (2, 2)):
        out = show('the ', '--layer', str(layer), '--head', str(head))
        weights = table_below('3. Attention weights', out)
        assert torch.allclose(weights, equal, atol=0.006) == ((layer, head) == (2, 1))


def test_a_line_per_head_says_what_the_text_costs_without_it(gpt, show):
    """A head whose columns in proj are 0 adds nothing: switched off, it changes nothing."""
    attention(gpt, 2).proj.weight.data[:, :gpt.n_embd // 2] = 0
    save(gpt)
    out = show('He is the ')
    loss = float(re.search('Mean loss of this text: (.*?)[.] With', out)[1])
    lines = re.findall(r'layer (\d), head (\d): (.*?) \((.*?)\)', out)
    assert [line[:2] for line in lines] == [('1', '1'), ('1', '2'), ('2', '1'), ('2', '2')]
    for layer, head, other, rise in lines:
        assert float(rise) == pytest.approx(float(other) - loss, abs=1e-6)
        assert (float(rise) == 0) == ((layer, head) == ('2', '1'))
    attention(gpt, 1).proj.weight.data[:, gpt.n_embd // 2:] = 0  # of head 2
    ids = torch.tensor([gpt.encode('He is the ')])
    loss = gpt.model.eval()(ids[:, :-1], ids[:, 1:])[1].item()
    assert float(lines[1][2]) == pytest.approx(loss, abs=0.006)


def test_in_the_terminal_attention_by_hand_and_bars_at_three_temperatures(gpt, show):
    out = show('the k')
    assert "1. Scores: dot product of the row's query and the column's key, / sqrt(8)" in out
    scores, masked, weights = (table_below(title, out) for title in (
        '1. Scores', '2. After the causal mask', '3. Attention weights'))
    assert masked.equal(scores) and masked.isinf().equal(torch.ones(5, 5).triu(1).bool())
    assert out.count('-inf') == 10  # in the second table only
    torch.testing.assert_close(weights, masked.softmax(dim=-1), atol=0.02, rtol=0)
    assert '1. Scores' not in show('the king ')  # nine characters
    logits = logits_of(gpt, 'the k')
    ps = torch.stack([(logits / temperature).softmax(dim=-1) for temperature in (0.5, 1, 1.5)])
    for line, i in zip(out.splitlines()[-10:], logits.argsort(descending=True)):
        assert probabilities(line[1:]) == pytest.approx(ps[:, i].tolist(), abs=0.006)


@pytest.mark.parametrize('columns, titles', [('31', 1), ('32', 2)])
def test_the_heads_of_a_layer_are_triangles_side_by_side_as_far_as_they_fit(
        gpt, show, monkeypatch, columns, titles):
    monkeypatch.setenv('COLUMNS', columns)
    lines = show('He is the ').split('Weights: ')[0].splitlines()
    assert max(map(len, lines)) <= int(columns)
    assert lines[0].count('layer') == titles and '\n'.join(lines).count('head') == 4
    weights = torch.tensor([[1.0, 0, 0], [0.01, 0.99, 0], [0.5, 0.3, 0.2]])
    assert inside.picture(weights, 'abc', '') == [
        '     ', '  abc', 'a █  ', 'b ·█ ', 'c ▓▒▒']


def test_nearest_sorts_the_other_characters_by_cosine(gpt, show):
    table = gpt.model.token_embedding_table.weight.data
    table[gpt.stoi['x']] = 3 * table[gpt.stoi['e']]
    save(gpt)
    cosines = [float(line.split()[1]) for line in show('--nearest', 'e').splitlines()[1:]]
    assert 'e:\nx 1.00' in show('--nearest', 'e')
    assert cosines == sorted(cosines, reverse=True) and len(cosines) == 10


@pytest.mark.parametrize('text', [None, TEXT[:90]], ids=['first', 'long'])
def test_the_page_lies_beside_its_checkpoint_and_begins_with_the_text_or_validation_text(
        gpt, show, tmp_path, text):
    other = saved_model(tmp_path / 'other', block_size=70)
    path = tmp_path / 'other' / 'gpt.html'
    options = '--page', '--checkpoint', str(tmp_path / 'other')
    assert str(path) in show(*([] if text is None else [text]), *options)
    all_text = TEXT + STRANGE * 3
    text = text or all_text[len(all_text) * 9 // 10:].split('\n\n', 1)[1][:32]
    runs = inside.comparable_runs(next((tmp_path / 'other').glob('*.pt')))
    assert path.read_text('utf-8') == inside.page_html(other, text, 1, 1, runs)


def test_a_model_of_the_lessons_size_gets_a_page_and_a_larger_one_a_line(tmp_path, monkeypatch):
    gpt = saved_model(tmp_path)
    monkeypatch.setattr(inside, 'page_html', lambda *_: 'page')
    gpt.model.more = torch.nn.Parameter(torch.empty(19_900_000, device='meta'))
    inside.write_page(gpt, tmp_path / 'gpt.html', 'the', 1, 1)
    gpt.model.more = torch.nn.Parameter(torch.empty(20_000_000, device='meta'))
    message = exit_message(inside.write_page, gpt, tmp_path / 'gpt.html', 'the', 1, 1)
    assert 'parameters' in message and 'leave out --page' in message


@pytest.mark.parametrize('arguments, message', [
    (['He €'], "the model does not know ['€']"),
    ([''], 'no text'),
    (['a' * 33], '33 characters: use at most 32'),
    (['a' * 11], 'a terminal 13 columns wide: this one has 12'),
    (['--layer', '3'], '--layer is a number from 1 to 2'),
    (['--nearest', 'ab'], "'ab' is not one of the characters"),
    (['--checkpoint', 'none.pt'], 'no saved model in none.pt'),
])
def test_a_mistake_gets_one_line(gpt, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setenv('COLUMNS', '12')
    assert message in exit_message(inside.main, arguments, tmp_path)
