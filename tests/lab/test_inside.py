"""inside.py: what it shows is what the model computes, in the terminal and in a browser."""
import html
import math
import re
import shutil
import subprocess

import pytest
import torch

import inside
import scripts
from conftest import PROJECT, SMALL, TEXT, exit_message, import_script, randomize_, run_here

PROGRAM = PROJECT / 'tests' / 'lab' / 'inside.py'
BROWSER = next(filter(None, map(shutil.which, (
    'chromium', 'chromium-browser', 'google-chrome', 'msedge'))), None)
STRANGE = '</script><b>\'"&\\\n\u2028\u202e😀א\u0301$`'
# Moves the sliders, presses a key, clicks on a character, again a key, moves the mouse in and out.
ACTIONS = """<script>
  find('temperature').value = 1.7; find('top_k').value = 3; find('top_k').oninput();
  const cell = find('reading').querySelectorAll('button')[STRANGE];
  const press = key => cell.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}));
  press('End'); cell.click(); press('ArrowRight');
  cell.dispatchEvent(new Event('pointerenter'));
  find('reading').dispatchEvent(new Event('pointerleave'));
</script>""".replace('STRANGE', str(len(STRANGE) + 4))


def random_model(folder, text=TEXT + STRANGE * 3, **hyperparameters):
    gpt = import_script(folder, 'gpt.py', text, **{**SMALL, 'block_size': 32, **hyperparameters})
    torch.manual_seed(1)
    randomize_(gpt.model)
    gpt.save()
    return gpt


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A small gpt.py whose saved weights are random, in the folder where inside.py looks."""
    monkeypatch.setattr(scripts, 'PROJECT', tmp_path)
    monkeypatch.setenv('COLUMNS', '80')
    return random_model(tmp_path)


def show(*arguments):
    out, err, status = run_here(PROGRAM, *arguments)
    assert (err, status) == ('', 0)
    return out


def logits_of(gpt, text):
    return gpt.model.eval()(torch.tensor([gpt.encode(text)]))[0][0, -1].detach()


def numbers_below(heading, out):
    rows = out[out.index(heading):].split('\n\n')[0].splitlines()[2:]
    return torch.tensor([[float(number) for number in row[1:].split()] for row in rows])


def test_the_attention_weights_reproduce_the_modules_output(gpt):
    sa, x = randomize_(gpt.model.eval()).blocks[0].sa, torch.randn(2, 11, gpt.n_embd)
    torch.testing.assert_close(inside.attention(sa, x)[2], sa(x))


@pytest.mark.parametrize('edits', [
    [('scores = scores + causal_mask', 'pass')],
    [('self.qkv = nn.', 'self.all = nn.'), ('self.qkv(x)', 'self.all(x)')],
    [('self.lm_head(x)', '2 * self.lm_head(x)')],
    [('x = x + self.sa(self.ln1(x))', 'pass')],
], ids=['mask', 'names', 'output', 'no attention'])
def test_an_edited_model_is_refused(tmp_path, edits):
    gpt = import_script(tmp_path, 'gpt.py', TEXT, *edits, **SMALL)
    assert 'gpt.py is edited' in exit_message(inside.look, gpt, TEXT[:9])


def test_the_predictions_are_those_of_a_model_that_ends_there_and_the_mean_surprise_is_the_loss(
        trained):
    ids = torch.tensor([trained.encode(TEXT[:9])])
    loss = trained.model.eval()(ids[:, :-1], ids[:, 1:])[1].item()
    data = inside.page_data(trained, TEXT[:9], 1, 1)
    assert (data['mean_loss'], sum(data['losses']) / 8) == pytest.approx((loss, loss), abs=1e-3)
    for layers in (2, 1, 0):
        trained.model.blocks = trained.model.blocks[:layers]
        p, i = logits_of(trained, TEXT[:9]).softmax(dim=-1).max(dim=-1)
        name = inside.page_name(trained.chars[i])
        assert data['guesses'][layers][-1][0] == [name, round(1000 * p.item())]


def test_each_heads_weights_stand_under_its_name(trained):
    """Without queries, a head has equal weights: here only head 1 of layer 2."""
    trained.model.blocks[1].sa.qkv.weight.data[:trained.n_embd // 2] = 0
    trained.save()
    equal = torch.ones(4, 4).tril() / torch.arange(1, 5)[:, None]
    for head in inside.page_data(trained, 'the ', 1, 1)['heads']:
        expected = (head['layer'], head['head']) == (2, 1)
        assert (head['weights'] == [[round(1000 / n)] * n for n in range(1, 5)]) == expected
        out = show('the ', '--layer', str(head['layer']), '--head', str(head['head']))
        weights = numbers_below('3. Attention weights', out)
        assert torch.allclose(weights, equal, atol=0.006) == expected


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
    assert inside.picture(weights, 'abc', '', '01234') == [
        '     ', '  abc', 'a 4  ', 'b 04 ', 'c 322']


@pytest.mark.parametrize('encoding', ['ascii', 'cp1252'])
def test_a_terminal_without_shades_gets_ascii(trained, encoding):
    triangles = run_here(PROGRAM, 'He is\n', encoding=encoding)[0].split('The next')[0]
    assert triangles.isascii() and '?' not in triangles and '  He_is/' in triangles


def test_nearest_sorts_the_other_characters_by_cosine(trained):
    table = trained.model.token_embedding_table.weight.data
    table[trained.stoi['x']] = 3 * table[trained.stoi['e']]
    trained.save()
    cosines = [float(line.split()[1]) for line in show('--nearest', 'e').splitlines()[1:]]
    assert 'e:\nx 1.00' in show('--nearest', 'e')
    assert cosines == sorted(cosines, reverse=True) and len(cosines) == 10


def test_the_page_lies_beside_its_checkpoint_and_shows_validation_text(trained, tmp_path):
    gpt = random_model(tmp_path / 'other', block_size=70)
    options = '--page', '--checkpoint', str(tmp_path / 'other' / 'gpt.pt')
    page = tmp_path / 'other' / 'gpt.html'
    assert str(page) in show(*options)
    text = gpt.decode(gpt.val_data.tolist()).split('\n\n', 1)[1][:64]
    assert page.read_text('utf-8') == inside.page_html(inside.page_data(gpt, text, 2, 2))
    assert '65 characters: use at most 64' in run_here(PROGRAM, 'a' * 65, *options)[1]


@pytest.mark.parametrize('layers, heads, shown', [
    (16, 3, 48), (2, 25, 25), (1, 49, 1), (20, 1, 20)])
def test_the_page_stays_small_whatever_the_vocabulary_and_the_size(tmp_path, layers, heads, shown):
    text = ''.join(map(chr, range(0x20000, 0x20000 + 5000)))  # rare Chinese characters
    gpt = import_script(tmp_path, 'gpt.py', text, **{
        **SMALL, 'block_size': 64, 'n_embd': heads, 'n_head': heads, 'n_layer': layers})
    data = inside.page_data(gpt, text[-64:], layers, heads)
    chosen = data['heads'][data['chosen']]
    assert len(inside.page_html(data)) < 500_000 and len(data['heads']) == shown
    assert (chosen['layer'], chosen['head'], data['steps'][-1]) == (layers, heads, layers)


@pytest.mark.skipif(not BROWSER, reason='needs Chromium, Chrome or Edge')
@pytest.mark.parametrize('actions, vocabulary, temperature, top_k, at', [
    ('', 5000, 0.8, None, -2), (ACTIONS, 0, 1.7, 3, -3)], ids=['start', 'moved'])
def test_a_browser_draws_every_picture_and_the_probabilities_that_generate_draws_from(
        trained, tmp_path, monkeypatch, actions, vocabulary, temperature, top_k, at):
    more = ''.join(map(chr, range(20000, 20000 + vocabulary)))  # Chinese
    gpt = random_model(tmp_path, TEXT + STRANGE * 3 + more)
    text = STRANGE + 'the <b>k'
    show(text, '--page')
    with (tmp_path / 'gpt.html').open('a') as file:
        file.write(actions)
    page = subprocess.run(
        [BROWSER, '--headless', '--no-sandbox', '--disable-gpu', '--no-first-run',
         '--disable-background-networking', f'--user-data-dir={tmp_path / "profile"}',
         '--virtual-time-budget=3000', '--dump-dom', (tmp_path / 'gpt.html').as_uri()],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding='utf-8', timeout=100).stdout
    assert '<p id="error" role="alert" hidden=""></p>' in page  # no error was logged
    assert '&lt;b' in re.search('<caption>(.*?)</caption>', page)[1]
    for strip in ('reading', 'asking', 'surprise'):
        cells = re.findall(r'<button(.*?)><b>(.*?)</b>', page.split(f'id="{strip}"')[1])[:len(text)]
        assert [html.unescape(name) for _, name in cells] == list(map(inside.page_name, text))
        marked, = [i for i, (cell, _) in enumerate(cells) if 'current="true"' in cell]
        assert marked == len(text) + at
    loss = inside.look(gpt, text).losses[at + 1].item()
    p, shown = re.search(r'probability of (.*?), so its loss is −ln \1 = (.*?)\.<', page).groups()
    assert (float(p), float(shown)) == pytest.approx((math.exp(-loss), loss), rel=0.01)
    rows = re.findall(r'<th scope="row">((?:before|after) layer .*?)<', page)
    assert rows == ['before layer 1', 'after layer 1', 'after layer 2: its prediction']
    triangles = page.split('<svg')[1:]
    assert len(triangles) == 5 and all(svg.count('d="M') > 2 for svg in triangles)  # in shades

    seen = []
    monkeypatch.setattr(torch, 'multinomial', lambda probabilities, num_samples: (
        seen.append(probabilities[0]) or torch.zeros(1, 1, dtype=torch.long)))
    gpt.temperature, gpt.top_k = temperature, top_k
    gpt.model.generate(torch.tensor([gpt.encode(text)]), 1)
    expected, ids = seen[0].sort(descending=True)
    bars = re.findall(r'<th scope="row">([^<]*)</th><td>(.*?)</td><td><div', page)
    expected = [*expected[:15].tolist(), expected[15:].sum().item()]
    assert [float(p) for _, p in bars] == pytest.approx(expected, abs=0.0006)
    assert [html.unescape(name) for name, _ in [*bars[:3], bars[15]]] == [
        *(inside.page_name(gpt.chars[i]) for i in ids[:3]), f'{gpt.vocab_size - 15} others']


@pytest.mark.parametrize('arguments, message', [
    (['He €'], "the model does not know ['€']"),
    ([''], 'no text'),
    (['a' * 33], '33 characters: use at most 32'),
    (['a' * 11], 'a terminal 13 columns wide: this one has 12'),
    (['--layer', '3'], '--layer is a number from 1 to 2'),
    (['--nearest', 'ab'], "'ab' is not one of the characters"),
    (['--checkpoint', 'none.pt'], 'there is no none.pt: train with'),
    (['--page'], 'cannot write'),
])
def test_a_mistake_gets_one_line(trained, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setenv('COLUMNS', '12')
    (tmp_path / 'gpt.html').mkdir()
    out, err, status = run_here(PROGRAM, *arguments)
    assert (out, status, err.count('\n')) == ('', 1, 1)
    assert err.startswith('Error: ') and message in err
