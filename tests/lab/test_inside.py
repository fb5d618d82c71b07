"""inside.py: what it shows in the terminal is what the model computes; what it refuses to show."""
import re

import pytest
import torch

import inside
import scripts
from conftest import PROJECT, SMALL, TEXT, exit_message, import_script, randomize_, run_here, save

PROGRAM = PROJECT / 'tests' / 'lab' / 'inside.py'
STRANGE = '</script>\'"\\\n\u2028😀'


def random_model(folder, text=TEXT + STRANGE * 3, *edits, **hyperparameters):
    gpt = import_script(folder, 'gpt.py', text, *edits, **{
        **SMALL, 'block_size': 32, **hyperparameters})
    torch.manual_seed(1)
    randomize_(gpt.model)
    save(gpt)
    return gpt


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A small gpt.py whose saved weights are random, in the folder where inside.py looks."""
    monkeypatch.setattr(scripts, 'PROJECT', tmp_path)
    monkeypatch.setenv('COLUMNS', '80')
    return random_model(tmp_path)


def show(*arguments):
    out, err, status = run_here(PROGRAM, *arguments)
    assert status == 0 and re.fullmatch('(The newest run: .*\n)?', err)
    return out


def logits_of(gpt, text):
    return gpt.model.eval()(torch.tensor([gpt.encode(text)]))[0][0, -1].detach()


def numbers_below(heading, out):
    rows = out[out.index(heading):].split('\n\n')[0].splitlines()[2:]
    return torch.tensor([[float(number) for number in row[1:].split()] for row in rows])


@pytest.mark.parametrize('edits', [
    [('F.relu(', 'F.gelu(')],
    [('scores = scores + causal_mask', 'scores = scores')],
    [('self.key = nn.', 'self.keys = nn.'), ('self.key(x)', 'self.keys(x)')],
    [('logits = self.lm_head(', 'logits = 2 * self.lm_head(')],
    [('x = x + self.sa(self.ln1(x))', 'x = x'), ('self.sa = Multi', 'self.no = Multi')],
    [('range(n_layer)', 'range(0)')],
], ids=['activation', 'mask', 'names', 'output', 'no attention', 'no blocks'])
def test_an_edited_model_is_refused_with_one_sentence(tmp_path, edits):
    gpt = random_model(tmp_path, TEXT, *edits)
    assert 'cannot show it' in exit_message(inside.look, gpt, TEXT[:9])


def test_a_tokenizer_of_pairs_is_refused(trained):
    trained.chars = ['th', *trained.chars[1:]]
    assert 'cannot show it' in exit_message(inside.look, trained, TEXT[:9])


def test_without_blocks_there_is_nothing_to_show(tmp_path):
    assert 'no attention' in exit_message(inside.look, random_model(tmp_path, n_layer=0), TEXT[:9])


def test_the_predictions_are_those_of_a_model_that_ends_there_and_their_mean_loss_is_the_loss(
        trained):
    ids = torch.tensor([trained.encode(TEXT[:9])])
    loss = trained.model.eval()(ids[:, :-1], ids[:, 1:])[1].item()
    found = inside.look(trained, TEXT[:9])
    assert found.losses.mean().item() == pytest.approx(loss, abs=1e-4)
    for layers in (2, 1, 0):
        trained.model.blocks = trained.model.blocks[:layers]
        torch.testing.assert_close(found.lens[layers, -1], logits_of(trained, TEXT[:9]))


def test_each_heads_weights_stand_under_its_name(trained):
    """Without queries, a head has equal weights: here only head 1 of layer 2."""
    trained.model.blocks[1].sa.query.weight.data[:trained.n_embd // 2] = 0
    save(trained)
    equal = torch.ones(4, 4).tril() / torch.arange(1, 5)[:, None]
    for layer, head in ((1, 1), (1, 2), (2, 1), (2, 2)):
        out = show('the ', '--layer', str(layer), '--head', str(head))
        weights = numbers_below('3. Attention weights', out)
        assert torch.allclose(weights, equal, atol=0.006) == ((layer, head) == (2, 1))


def test_a_line_per_head_says_what_the_text_costs_without_it(trained):
    """A head whose columns in proj are 0 adds nothing: switched off, it changes nothing."""
    trained.model.blocks[1].sa.proj.weight.data[:, :trained.n_embd // 2] = 0
    save(trained)
    out = show('He is the ')
    loss = float(re.search('Mean loss of this text: (.*?)[.] With', out)[1])
    lines = re.findall(r'layer (\d), head (\d): (.*?) \((.*?)\)', out)
    assert [line[:2] for line in lines] == [('1', '1'), ('1', '2'), ('2', '1'), ('2', '2')]
    for layer, head, other, rise in lines:
        assert float(rise) == pytest.approx(float(other) - loss, abs=1e-6)
        assert (float(rise) == 0) == ((layer, head) == ('2', '1'))
    trained.model.blocks[0].sa.proj.weight.data[:, trained.n_embd // 2:] = 0  # of head 2
    ids = torch.tensor([trained.encode('He is the ')])
    loss = trained.model.eval()(ids[:, :-1], ids[:, 1:])[1].item()
    assert float(lines[1][2]) == pytest.approx(loss, abs=0.006)


def test_in_the_terminal_attention_by_hand_and_bars_at_three_temperatures(trained):
    out = show('the k')
    scores, masked, weights = (numbers_below(heading, out) for heading in (
        '1. Scores', '2. After the causal mask', '3. Attention weights'))
    past = torch.ones(5, 5).tril().bool()
    assert masked[past].equal(scores[past]) and masked[~past].eq(-torch.inf).all()
    torch.testing.assert_close(weights, masked.softmax(dim=-1), atol=0.02, rtol=0)
    assert '1. Scores' not in show('the king ')  # nine characters
    logits = logits_of(trained, 'the k')
    ps = torch.stack([(logits / temperature).softmax(dim=-1) for temperature in (0.5, 1, 1.5)])
    for line, i in zip(out.splitlines()[-10:], logits.argsort(descending=True)):
        shown = [float(p) for p in re.findall(r'\d\.\d\d', line[1:])]
        assert shown == pytest.approx(ps[:, i].tolist(), abs=0.006)


@pytest.mark.parametrize('columns, titles', [('80', 2), ('31', 1), ('32', 2)])
def test_the_heads_of_a_layer_are_triangles_side_by_side_as_far_as_they_fit(
        trained, monkeypatch, columns, titles):
    monkeypatch.setenv('COLUMNS', columns)
    lines = show('He is the ').split('Weights: ')[0].splitlines()
    assert max(map(len, lines)) <= int(columns)
    assert lines[0].count('layer') == titles and '\n'.join(lines).count('head') == 4
    weights = torch.tensor([[1.0, 0, 0], [0.01, 0.99, 0], [0.5, 0.3, 0.2]])
    assert inside.picture(weights, 'abc', '') == ['     ', '  abc', 'a █  ', 'b ·█ ', 'c ▓▒▒']


def test_nearest_sorts_the_other_characters_by_cosine(trained):
    table = trained.model.token_embedding_table.weight.data
    table[trained.stoi['x']] = 3 * table[trained.stoi['e']]
    save(trained)
    cosines = [float(line.split()[1]) for line in show('--nearest', 'e').splitlines()[1:]]
    assert 'e:\nx 1.00' in show('--nearest', 'e')
    assert cosines == sorted(cosines, reverse=True) and len(cosines) == 10


@pytest.mark.parametrize('text', [None, TEXT[:90]], ids=['first', 'long'])
def test_the_page_lies_beside_its_checkpoint_and_begins_with_the_text_or_validation_text(
        trained, tmp_path, text):
    gpt = random_model(tmp_path / 'other', block_size=70)
    path = tmp_path / 'other' / 'gpt.html'
    options = '--page', '--checkpoint', str(tmp_path / 'other')
    assert str(path) in show(*([] if text is None else [text]), *options)
    all_text = TEXT + STRANGE * 3
    text = text or all_text[len(all_text) * 9 // 10:].split('\n\n', 1)[1][:32]
    assert path.read_text('utf-8') == inside.page_html(gpt, text, 1, 1)


def test_a_model_of_the_lessons_size_gets_a_page_and_a_larger_one_a_line(tmp_path, monkeypatch):
    gpt = random_model(tmp_path)
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
    (['--checkpoint', 'none.pt'], 'there is no none.pt'),
    (['--page'], 'cannot write'),
])
def test_a_mistake_gets_one_line(trained, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setenv('COLUMNS', '12')
    (tmp_path / 'gpt.html').mkdir()
    [model] = tmp_path.glob('*.pt')
    out, err, status = run_here(PROGRAM, '--checkpoint', str(model), *arguments)
    assert (out, status, err.count('\n')) == ('', 1, 1)
    assert err.startswith('Error: ') and message in err
