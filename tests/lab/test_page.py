"""gpt.html: in a real browser, the page computes what gpt.py computes, and shows no other model.

The browser starts once, with all pages side by side in frames. A script at the end of each page
types, clicks and writes, and reports what it finds. The tests compare that with torch.
"""
import html
import json
import re
import shutil
import subprocess

import pytest
import torch

import inside
from conftest import SMALL, TEXT, import_script, randomize_

BROWSER = next(filter(None, map(shutil.which, (
    'chromium', 'chromium-browser', 'google-chrome', 'msedge'))), None)
pytestmark = pytest.mark.skipif(not BROWSER, reason='needs Chromium, Chrome or Edge')

STRANGE = '</script>"\\\'&\n\u2028\u202e😀א\u0301'
STRANGE_NAMES = [*'</script>"\\\'&', '↵', 'U+2028', 'U+202E', '😀', 'א', '◌\u0301']
SCRIPT = '</script><script>find("error").hidden = false</script><!--'
LONG = 'He was a ram at home, and at the House it rained and he ran. I call him now a cloud.'
# In each page: the first text, then two others that begin like it, the second of which is long.
TEXTS = {'small': [STRANGE, STRANGE[:8] + 'the', LONG],
         'large': [SCRIPT, SCRIPT[:30] + LONG, LONG]}
LOGITS = [2.5, -1.0, 4.0, 3.25, 3.25, 0.0, 3.25, -7.5]  # with three that are equal
HEAD = 4  # the head to switch off, of six: the second of layer 2 with three heads in each layer

ROTARY = ('        scores = q @ k.transpose(-2, -1)', '''
        angle = torch.arange(T)[:, None] / 10 ** torch.arange(hs // 2)  # (T, hs / 2)
        turn = torch.polar(torch.ones_like(angle), angle)  # (T, hs / 2)
        q, k = (torch.view_as_real(torch.view_as_complex(z.unflatten(-1, (-1, 2))) * turn)
                .flatten(-2) for z in (q, k))
        scores = q @ k.transpose(-2, -1)''')
EDITS = {
    'GELU': [('F.relu(', 'F.gelu(')],
    'RMSNorm': [(f'self.{name} = nn.LayerNorm', f'self.{name} = nn.RMSNorm')
                for name in ('ln1', 'ln2', 'ln_f')],
    'rotary': [ROTARY],
    'no positions': [('x = x + self.position_embedding_table(positions)', 'x = x')],
    'one position': [  # the page would compute nan, for every position but the first
        ('_table = nn.Embedding(block_size, n_embd)', '_table = nn.Embedding(1, n_embd)'),
        ('position_embedding_table(positions)', 'position_embedding_table(0 * positions)')],
    'no mask': [('scores = scores + causal_mask', 'scores = scores')],
}

# What the scripts in the pages use.
TOOLS = """
const report = value => parent.postMessage(JSON.stringify({page: PAGE, ...value}), '*');
const frame = () => new Promise(done => requestAnimationFrame(() => setTimeout(done)));
const wait = milliseconds => new Promise(done => setTimeout(done, milliseconds));
const set = (id, value, event = 'input') => {
  find(id).value = value;
  find(id).dispatchEvent(new Event(event, {bubbles: true}));
};
const type = async text => { set('field', text); await frame(); };
const computed = () => ({
  ids: positions.map(({id}) => id),
  logits: positions.map(({logits}) => [...logits]),
  weights: positions.map(({blocks}) => blocks.map(({att}) => att.map(row => [...row]))),
  losses: positions.slice(1).map(({loss}) => loss),
  early: positions.map(({x}) => x.map(numbers => [...logitsOf(model, numbers)])),
});
const texts = selector => [...document.querySelectorAll(selector)].map(e => e.textContent);
"""
DRIVE = """
(async () => {
  if (document.querySelector('main').hidden) return report({refused: computed()});
  const found = {computed: [computed()]};
  found.first = {names: texts('#surprise b').slice(0, positions.length),
                 caption: find('lens').caption.textContent, error: find('error').hidden};
  for (const text of TEXTS.slice(1)) { await type(text); found.computed.push(computed()); }

  await type(LONG.slice(0, 14) + STRANGE);  // what is drawn
  document.querySelectorAll('#reading button')[12].click();
  found.shown = {names: texts('#surprise button b').slice(0, 15),
                 losses: texts('#surprise small').slice(1, 15), reads: texts('#reading small'),
                 lens: texts('#lens td'), bars: texts('#bars th, #bars td:nth-child(2)'),
                 loss: find('loss').textContent, most: find('reads').textContent};
  while (rises.size < heads.length) await wait(20);
  found.rises = [...rises.entries()];
  found.numbers = texts('#heads small');

  document.querySelectorAll('#heads button')[HEAD].click();
  find('off').click();
  await frame();
  found.off = {...computed(), bars: texts('#bars td:nth-child(2)')};
  while (rises.size < heads.length) await wait(20);
  found.risesOff = [...rises.entries()];
  find('all-on').click();
  await frame();
  found.on = computed();

  scrollTo(0, 1900);
  const stands = scrollY;
  find('field').scrollIntoView({block: 'nearest'});  // as a browser does at every key
  found.scrolled = [stands, scrollY];

  set('top_k', 1);
  await type(START);
  found.top1 = texts('#bars td:nth-child(2)');
  for (let i = 0; i < 150; i++) find('one').click();
  await frame();
  found.written = {text: find('field').value, scrolled: find('field').scrollTop, ...computed()};
  await type('');
  found.empty = [computed().ids, ...texts('#heads small')];
  find('one').click();
  found.fromEmpty = find('field').value;
  find('go').click();
  const live = () => find('status').getAttribute('aria-live');
  await wait(300);
  found.wentOn = [find('field').value.length, live()];
  await type('the');
  await wait(300);
  found.stopped = [find('field').value, live(), find('go').textContent];
  find('go').click();
  find('field').dispatchEvent(new Event('compositionstart'));
  found.composing = find('go').textContent;

  await type('a€b’c\U0001F98A€');
  found.unknown = [computed().ids, find('status').textContent];
  let frames = 0;
  new MutationObserver(() => frames++).observe(find('lens'), {childList: true});
  for (const last of 'abcdefghix') set('field', 'the king '.repeat(11112) + last);
  await frame();
  found.paste = [computed().ids, find('field').value.length, find('status').textContent, frames];
  found.loaded = performance.getEntriesByType('resource').length;

  found.ps = {};
  for (const [temperature, top_k] of [[0.8, null], [1.7, 3], [0.001, null], [0.3, 1]]) {
    const ps = probabilities(Float32Array.from(LOGITS), temperature, top_k ?? Infinity);
    found.ps[`${temperature} ${top_k === null ? 'None' : top_k}`] = [...ps];
  }
  found.draws = [0, 0.249, 0.251, 0.9, 0.99999].map(x => draw([0, 0.25, 0, 0.7499, 0], x));
  report(found);
})();
"""
REFUSED = """
report({hidden: document.querySelector('main').hidden, about: find('about').textContent});
"""


def model(folder, *edits, more='', **sizes):
    """A gpt.py with random weights, in which the epsilon of the first layer norm matters."""
    gpt = import_script(folder, 'gpt.py', TEXT + STRANGE * 3 + SCRIPT + more, *edits, **{
        **SMALL, 'n_embd': 24, 'n_head': 3, **sizes})
    torch.manual_seed(1)
    randomize_(gpt.model)
    with torch.no_grad():
        gpt.model.token_embedding_table.weight *= 0.01
        gpt.model.position_embedding_table.weight *= 0.01
    return gpt


def browse(folder, pages):
    """Opens pages, {name: (html, script)}, in frames. Returns {name: what its script reports}."""
    frames = ''
    for name, (page, script) in pages.items():
        path = folder / f'{name}.html'
        tools = TOOLS.replace('PAGE', json.dumps(name))
        path.write_text(f'{page}<script>{{{tools}{script}}}</script>', encoding='utf-8')
        frames += f'<iframe src="{path.name}" width=400 height=300></iframe>'
    # The browser ends when the page is loaded: an open document in it, closed by the last report,
    # holds that up.
    (folder / 'all.html').write_text(f"""<pre></pre><iframe id="open"></iframe><script>
        const open = document.getElementById('open').contentDocument;
        open.open();
        let missing = {len(pages)};
        onmessage = event => {{
          document.querySelector('pre').append(event.data + '\\n');
          if (--missing === 0) open.close();
        }};
        setTimeout(() => open.close(), 60_000);
        </script>{frames}""")
    run = subprocess.run(
        [BROWSER, '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic',
         '--no-first-run', '--disable-background-networking', '--disable-component-update',
         '--disable-sync', f'--user-data-dir={folder / "profile"}', '--window-size=1700,1300',
         '--enable-logging=stderr', '--dump-dom', (folder / 'all.html').as_uri()],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding='utf-8', errors='replace',
        timeout=100)
    assert 'CONSOLE' not in run.stderr, run.stderr
    lines = html.unescape(re.search('(?s)<pre>(.*?)</pre>', run.stdout)[1]).split('\n')
    reports = {report.pop('page'): report for report in map(json.loads, filter(None, lines))}
    assert reports.keys() == pages.keys()
    return reports


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """The two models, {name: gpt}, and what the browser found on all pages."""
    folder = tmp_path_factory.mktemp('pages')
    models = {'small': model(folder / 'small'),
              'large': model(folder / 'large', more='’', block_size=128, n_embd=30, n_layer=3)}
    pages = {}
    for name, gpt in models.items():
        script = DRIVE
        for marker, value in (('TEXTS', TEXTS[name]), ('LONG', LONG), ('START', LONG[:10]),
                              ('STRANGE', '<'), ('HEAD', HEAD), ('LOGITS', LOGITS)):
            script = script.replace(marker, json.dumps(value).replace('<', r'\u003c'))
        pages[name] = inside.page_html(gpt, TEXTS[name][0], 1, 1), script
    for name, edits in EDITS.items():
        gpt = model(folder / name, *edits)
        pages[name] = inside.page_html(gpt, TEXT[:16], 1, 1), REFUSED
    return models, browse(folder, pages)


@pytest.fixture(params=['small', 'large'])
def pair(world, request):
    """A model as a module, its page's context, and what the browser found on its page."""
    models, found = world
    gpt = models[request.param]
    assert 'refused' not in found[request.param], 'the page finds other logits than torch'
    return gpt, min(gpt.block_size, 64), found[request.param]


@torch.no_grad()
def torch_computes(gpt, ids, off=()):
    """The same as the page's `computed`, by gpt.py itself, with the output of some heads at 0."""
    weights, stream, hooks = [], [], []

    def switch_off(layer, out):  # (B, T, C) -> (B, T, C)
        out = out.clone().unflatten(-1, (gpt.n_head, -1))  # (B, T, nh, hs)
        out[:, :, [head % gpt.n_head for head in off if head // gpt.n_head == layer]] = 0
        return out.flatten(2)

    for layer, block in enumerate(gpt.model.eval().blocks):
        hooks.append(block.register_forward_pre_hook(
            lambda _, inputs: stream.append(inputs[0][0])))
        hooks.append(block.sa.dropout.register_forward_pre_hook(  # it gets the attention weights
            lambda _, inputs: weights.append(inputs[0][0]) if inputs[0].dim() == 4 else None))
        hooks.append(block.sa.proj.register_forward_pre_hook(
            lambda _, inputs, layer=layer: (switch_off(layer, inputs[0]),)))
    hooks.append(gpt.model.ln_f.register_forward_pre_hook(
        lambda _, inputs: stream.append(inputs[0][0])))
    ids = torch.tensor(ids)
    logits = gpt.model(ids[None])[0][0]
    for hook in hooks:
        hook.remove()
    return {
        'logits': logits,
        'weights': [[[w[head, t, :t + 1].tolist() for head in range(gpt.n_head)] for w in weights]
                    for t in range(len(ids))],
        'losses': torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction='none'),
        'early': gpt.model.lm_head(gpt.model.ln_f(torch.stack(stream, 1)))}


def flat(numbers):
    """All numbers of nested lists."""
    if not isinstance(numbers, list):
        return [numbers]
    return [number for part in numbers for number in flat(part)]


def assert_equal(found, gpt, off=()):
    for name, expected in torch_computes(gpt, found['ids'], off).items():
        expected = expected if isinstance(expected, list) else expected.tolist()
        assert flat(found[name]) == pytest.approx(flat(expected), abs=1e-4), name


def test_the_page_computes_what_gpt_computes_for_each_text(pair):
    gpt, context, found = pair
    for text, computed in zip(TEXTS['large' if gpt.n_layer == 3 else 'small'], found['computed']):
        assert computed['ids'] == gpt.encode(text)[-context:]
        assert_equal(computed, gpt)


def drawn(gpt, ids):
    names = {' ': '␣', **dict(zip(STRANGE, STRANGE_NAMES))}
    return [names.get(gpt.chars[i], gpt.chars[i]) for i in ids]


def test_the_pictures_and_numbers_are_those_of_the_typed_text(pair):
    gpt, context, found = pair
    ids = gpt.encode(LONG[:14] + '<')
    expected, shown = torch_computes(gpt, ids), found['shown']
    assert shown['names'] == drawn(gpt, ids)
    assert [float(loss) for loss in shown['losses']] == pytest.approx(
        expected['losses'].tolist(), abs=0.051)
    weights = [float(weight or 0) for weight in shown['reads'][:15]]  # of the marked character, 13
    assert weights == pytest.approx(expected['weights'][12][0][0] + [0, 0], abs=0.006)
    most = max(range(13), key=expected['weights'][12][0][0].__getitem__)
    where = {12: 'itself', 11: 'the one before'}.get(most, f'{12 - most} before')
    assert f"{drawn(gpt, ids)[most]}\u2069” ({where}: {shown['reads'][most]})" in shown['most']
    assert f"“\u2068{drawn(gpt, ids)[12]}" in shown['loss']
    assert f"= {expected['losses'][11]:.2f}." in shown['loss']
    for step, logits in enumerate(expected['early'][12]):
        ps, best = logits.softmax(dim=-1).topk(5)
        cells = shown['lens'][5 * step:5 * step + 5]
        assert [cell[:-4] for cell in cells] == drawn(gpt, best)
        assert [float(cell[-4:]) for cell in cells] == pytest.approx(ps.tolist(), abs=0.006)
    ps, best = expected['logits'][-1].div(gpt.temperature).softmax(dim=-1).sort(descending=True)
    assert shown['bars'][:30:2] == drawn(gpt, best[:15])
    assert [float(p) for p in shown['bars'][1::2]] == pytest.approx(
        [*ps[:15].tolist(), ps[15:].sum().item()], abs=0.0006)


def test_strange_characters_get_a_name_and_a_script_in_the_text_is_only_text(world):
    _, found = world
    assert found['small']['first']['names'] == STRANGE_NAMES[-16:]
    assert ''.join(found['large']['first']['names']) == SCRIPT.replace(' ', '␣')
    assert SCRIPT[-13:-1] in found['large']['first']['caption']
    for name in ('small', 'large'):
        assert found[name]['first']['error'] and found[name]['loaded'] == 0


def test_a_head_that_is_switched_off_counts_as_0_until_it_is_on_again(pair):
    gpt, context, found = pair
    assert_equal(found['off'], gpt, {HEAD})
    assert_equal(found['on'], gpt)
    assert found['off']['bars'] != found['shown']['bars'][1::2]


@pytest.mark.parametrize('name, off', [('rises', set()), ('risesOff', {HEAD})])
def test_beside_each_head_stands_how_much_the_loss_rises_without_it(pair, name, off):
    """Also while another head is off, and for a head that is off."""
    gpt, context, found = pair
    ids = gpt.encode(LONG[:14] + '<')
    losses = [[head, [torch_computes(gpt, ids, heads)['losses'].mean().item()
                      for heads in (off - {head}, off | {head})]]
              for head in range(gpt.n_layer * gpt.n_head)]
    assert flat(found[name]) == pytest.approx(flat(losses), abs=1e-4)
    if not off:
        assert [float(number.replace('−', '-')) for number in found['numbers']] == pytest.approx(
            [without - shown for _, (shown, without) in losses], abs=0.011)


def test_with_top_k_1_it_writes_what_generate_writes(pair, monkeypatch):
    gpt, context, found = pair
    for name, value in dict(block_size=context, top_k=1).items():
        monkeypatch.setattr(gpt, name, value)
    expected = gpt.model.generate(torch.tensor([gpt.encode(LONG[:10])]), 150)[0].tolist()
    assert found['written']['text'] == gpt.decode(expected)
    assert found['written']['ids'] == expected[-context:] and found['written']['scrolled'] > 0
    assert len(set(expected[-150:])) > 3  # not the same character again and again
    assert_equal(found['written'], gpt)


def test_it_starts_like_gpt_without_a_text_and_goes_on_until_something_is_typed(pair):
    gpt, context, found = pair
    assert found['empty'] == [[0], *'–' * gpt.n_layer * gpt.n_head]
    assert found['fromEmpty'][0] == gpt.chars[0] and len(found['fromEmpty']) == 2
    length, live = found['wentOn']
    assert length >= 4 and live == 'off'
    assert found['stopped'] == ['the', 'polite', 'Go on'] and found['composing'] == 'Go on'


def test_typing_does_not_scroll_the_page(pair):
    before, after = pair[2]['scrolled']
    assert before == after > 500


def test_characters_that_top_k_forbids_have_no_number(pair):
    assert pair[2]['top1'] == ['1.000', *'–' * 15]


@pytest.mark.parametrize('temperature, top_k', [(0.8, None), (1.7, 3), (0.001, None), (0.3, 1)])
def test_the_probabilities_are_those_from_which_generate_draws(
        world, monkeypatch, temperature, top_k):
    """Also where logits are equal, and where exp would be infinite."""
    models, found = world
    gpt, seen = models['small'], []
    logits = torch.tensor(LOGITS).expand(1, 1, -1)
    monkeypatch.setattr(gpt.model, 'forward', lambda idx: (logits, None))
    monkeypatch.setattr(gpt, 'temperature', temperature)
    monkeypatch.setattr(gpt, 'top_k', top_k)
    monkeypatch.setattr(torch, 'multinomial', lambda ps, num_samples: (
        seen.append(ps[0].tolist()) or torch.zeros(1, 1, dtype=torch.long)))
    gpt.model.generate(torch.zeros(1, 1, dtype=torch.long), 1)
    assert found['small']['ps'][f'{temperature} {top_k}'] == pytest.approx(seen[0], abs=1e-6)


def test_a_draw_finds_the_share_in_which_a_number_falls_and_never_an_empty_one(world):
    assert world[1]['small']['draws'] == [1, 1, 3, 3, 3]


def test_unknown_characters_are_named_and_left_out(world):
    models, found = world
    for name, text in (('small', "ab'c"), ('large', 'ab’c')):  # only one model knows this one
        ids, status = found[name]['unknown']
        assert ids == models[name].encode(text)
        assert re.findall('“\u2068(.*?)\u2069”', status) == ['€', '🦊']


def test_a_large_paste_shows_its_end_and_many_keys_are_drawn_once(pair):
    gpt, context, found = pair
    ids, length, status, frames = found['paste']
    text = 'the king ' * 11112 + 'x'
    assert (ids, length, frames) == (gpt.encode(text[-context:]), len(text), 1)
    assert f'The last {context} of {len(text)} characters' in status


@pytest.mark.parametrize('name', EDITS)
def test_the_page_of_an_edited_model_shows_nothing_and_says_why(world, name):
    _, found = world
    assert found[name]['hidden'] and 'only the unedited model' in found[name]['about']
