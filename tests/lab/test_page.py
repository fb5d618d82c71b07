"""gpt.html in a real browser: it computes what gpt.py computes, and shows no other model."""
import json
import os
import re
import shutil

import pytest
import torch

import inside
from conftest import TEXT, random_model
from solutions import EXERCISES
from watch import watch

NEEDS = ('needs playwright (python -m pip install playwright), and Chrome, Edge or Chromium (on '
         'Debian: apt install chromium)')
STRANGE = '</script>"\\\'&\n\u2028\u202e😀א\u0301'
STRANGE_NAMES = [*'</script>"\\\'&', '↵', 'U+2028', 'U+202E', '😀', 'א', '◌\u0301']
SCRIPT = '</script><script>find("error").hidden = false</script><!--'
LONG = 'He was a ram at home, and at the House it rained and he ran. I call him now a cloud.'
WORDS = 'He was a ram a<'
AT = 12  # the position in WORDS that is marked
HEAD = 4  # the head to switch off, of six or nine: with three in each layer, layer 2, head 2
LOGITS = [2.5, -1.0, 4.0, 3.25, 3.25, 0.0, 3.25, -7.5]  # with three that are equal

# What the page has computed, with zeros where the causal mask hides attention weights. As JSON, in
# which many numbers travel faster.
COMPUTED = """JSON.stringify({
  ids: positions.map(({id}) => id),
  logits: positions.map(({logits}) => [...logits]),
  weights: [...Array(n_layer * n_head).keys()].map(head =>
    rowsOf(head).map(row => positions.map((_, j) => row[j] ?? 0))),
  lens: positions.map(({x}) => x.map(numbers => [...logitsOf(model, numbers)])),
  losses: positions.slice(1).map(({loss}) => loss),
})"""

EDITS = {f'exercise {number}': next(iter(EXERCISES[number].variants.values())).edits
         for number in (1, 2, 13, 16, 17, 18, 19)}
EDITS['one position'] = [  # the page would compute nan, for every position but the first
    ('_table = nn.Embedding(block_size, n_embd)', '_table = nn.Embedding(1, n_embd)'),
    ('position_embedding_table(positions)', 'position_embedding_table(0 * positions)')]

OWN = {'name': 'gpt-own.pt', 'path': 'try/gpt-own.pt', 'history': [
    [0, 4.42, 4.41], [500, 2.1, 2.15], [1000, 1.8, 1.9], [1500, 1.6, 1.8], [2000, 1.4, 1.85]]}
OTHERS = [{'name': '<img src=x> & "a".pt', 'history': [[0, 4.5, 4.5], [300, 2.5, 2.6]]},
          {'name': 'gpt-better.pt', 'history': [[0, 4.4, 4.4], [1250, 1.7, 1.75],
                                                [2500, 1.6, 1.7]]}]


# --- Models, and their pages in the browser
def page_model(folder, *edits, more='', **sizes):
    """A random model in which the epsilon of the first layer norm matters."""
    gpt = random_model(folder, TEXT + STRANGE * 3 + SCRIPT + more, *edits, **{
        'n_embd': 24, 'n_head': 3, **sizes})
    with torch.no_grad():
        gpt.model.token_embedding_table.weight *= 0.01
        gpt.model.position_embedding_table.weight *= 0.01
    return gpt


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """A small model, and one that can read more than the page shows; only that one knows ’."""
    folder = tmp_path_factory.mktemp('models')
    return {'small': page_model(folder / 'small'),
            'large': page_model(folder / 'large', more='’', block_size=128, n_embd=30,
                                  n_layer=3)}


@pytest.fixture(scope='module')
def tab():
    """A tab of a browser that is on PATH, or else of an installed Chrome or Edge; what it reports.

    Without one, the tests skip. But where CI is set, they fail: no broken page may pass unseen.
    """
    lacking = pytest.fail if os.environ.get('CI') else pytest.skip
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        lacking(NEEDS)
    paths = filter(None, map(shutil.which, ('google-chrome', 'chromium', 'chromium-browser')))
    choices = [*({'executable_path': path} for path in paths),
               {'channel': 'chrome'}, {'channel': 'msedge'}]
    problems = []
    with sync_playwright() as playwright:
        for choice in choices:
            try:
                browser = playwright.chromium.launch(**choice)
                break
            except Error as error:
                problems.append(str(error).splitlines()[0])
        else:
            lacking('; '.join([NEEDS, *problems]))
        tab, seen = browser.new_page(), []
        tab.on('console', lambda message: seen.append(message.text))
        tab.on('pageerror', lambda error: seen.append(error.message))
        tab.on('request', lambda request: seen.append(request.url))
        yield tab, seen
        browser.close()


@pytest.fixture
def open_page(tab, tmp_path, models):
    """Opens the page of a model. The test fails if the page has an error, or loads anything."""
    path, (tab, seen) = tmp_path / 'gpt.html', tab
    seen.clear()

    def open_page(gpt=models['small'], text=WORDS, runs=(), shown=True):
        path.write_text(inside.page_html(gpt, text, 1, 1, runs), encoding='utf-8')
        resize(tab, 1280)
        tab.goto(path.as_uri())
        assert tab.is_visible('main') == shown, tab.inner_text('#about')
        return tab

    yield open_page
    assert set(seen) == {path.as_uri()}


@pytest.fixture(params=['small', 'large'])
def gpt(models, request):
    """Each of the two models in turn."""
    return models[request.param]


@pytest.fixture
def page(gpt, open_page):
    """The page of that model."""
    return open_page(gpt)


@pytest.fixture
def small(open_page):
    """The page of the small model, for what does not depend on the size."""
    return open_page()


def resize(page, width):
    page.set_viewport_size({'width': width, 'height': 720})


def wait_for(page, condition):
    """Waits until a condition holds. (The page's security policy forbids wait_for_function.)"""
    page.evaluate("""async () => {
        for (let i = 0; !(CONDITION); i++) {
          if (i === 1000) throw Error('waited in vain');
          await pause(10);
        }
    }""".replace('CONDITION', condition))


def drawn(page):
    """Waits for the animation frame in which the page shows what was typed last."""
    page.evaluate('new Promise(requestAnimationFrame)')


def enter(page, text):
    """Replaces the text in the field."""
    page.fill('#field', text)
    drawn(page)


def texts(page, selector):
    return page.locator(selector).all_text_contents()


def numbers(page, selector):
    return [float(text.replace('−', '-') or 0) for text in texts(page, selector)]


def computed(page):
    return json.loads(page.evaluate(COMPUTED))


def read_part(gpt, text):
    """The end of a text, as much of it as the page reads."""
    return text[-min(gpt.block_size, inside.CONTEXT):]


def names(gpt, ids):
    """What the page should show for these ids."""
    known = {' ': '␣', **dict(zip(STRANGE, STRANGE_NAMES))}
    return [known.get(gpt.chars[i], gpt.chars[i]) for i in ids]


def assert_computes(page, gpt, text, off=()):
    """Whether the page has computed for a text what gpt.py's own model computes, in torch."""
    found, seen = computed(page), watch(gpt, text, off)
    assert found['ids'] == gpt.encode(text)
    for name, expected in dict(logits=seen.logits, weights=seen.weights.flatten(0, 1),
                               lens=seen.lens.transpose(0, 1), losses=seen.losses).items():
        torch.testing.assert_close(torch.tensor(found[name]), expected, atol=1e-4, rtol=0)


# --- What it computes
def test_it_computes_what_gpt_computes_for_each_text(gpt, page):
    """Also for texts that begin like the one before: the page keeps what it has read of it."""
    for text in (STRANGE, STRANGE[:8] + 'the', SCRIPT, SCRIPT[:30] + LONG, LONG):
        enter(page, text)
        assert_computes(page, gpt, read_part(gpt, text))


@pytest.mark.parametrize('temperature, top_k', [(0.8, None), (1.7, 3), (0.001, None), (0.3, 1)])
def test_the_probabilities_are_those_from_which_generate_draws(
        models, small, monkeypatch, temperature, top_k):
    """Also where logits are equal, and where exp would be infinite."""
    gpt, seen = models['small'], []
    logits = torch.tensor(LOGITS).expand(1, 1, -1)
    monkeypatch.setattr(gpt.model, 'forward', lambda idx: (logits, None))
    monkeypatch.setattr(gpt, 'temperature', temperature)
    monkeypatch.setattr(gpt, 'top_k', top_k)
    monkeypatch.setattr(torch, 'multinomial', lambda ps, num_samples: (
        seen.append(ps[0].tolist()) or torch.zeros(1, 1, dtype=torch.long)))
    gpt.model.generate(torch.zeros(1, 1, dtype=torch.long), 1)
    found = small.evaluate("""([logits, temperature, top_k]) =>
        [...probabilities(Float32Array.from(logits), temperature, top_k ?? Infinity)]
        """, [LOGITS, temperature, top_k])
    assert found == pytest.approx(seen[0], abs=1e-6)


def test_a_draw_finds_the_share_in_which_a_number_falls_and_never_an_empty_one(small):
    assert small.evaluate('[0, 0.249, 0.251, 0.9, 0.99999].map(x => draw([0, 0.25, 0, 0.7499, 0], '
                          'x))') == [1, 1, 3, 3, 3]


def test_with_top_k_1_it_writes_what_generate_writes(gpt, page, monkeypatch):
    monkeypatch.setattr(gpt, 'block_size', min(gpt.block_size, inside.CONTEXT))
    monkeypatch.setattr(gpt, 'top_k', 1)
    expected = gpt.decode(gpt.model.generate(torch.tensor([gpt.encode(WORDS)]), 150)[0].tolist())
    assert len(set(expected[-150:])) > 3  # not the same character again and again
    page.fill('#top_k', '1')
    assert texts(page, '#bars td:nth-child(2)') == ['1.000', *'–' * 15]
    page.evaluate("for (let i = 0; i < 150; i++) find('one').click()")
    drawn(page)
    assert page.input_value('#field') == expected
    assert page.evaluate("find('field').scrollTop") > 0  # it shows the end
    assert_computes(page, gpt, read_part(gpt, expected))


# --- What it shows
def test_strange_characters_get_a_name(open_page):
    page = open_page(text=STRANGE)
    assert texts(page, '#surprise button:visible b') == STRANGE_NAMES[-16:]


def test_a_script_in_the_text_is_only_text(models, open_page):
    page = open_page(models['large'], SCRIPT)
    assert ''.join(texts(page, '#surprise button:visible b')) == SCRIPT.replace(' ', '␣')
    assert SCRIPT[-13:-1] in page.inner_text('#lens caption')
    assert page.is_hidden('#error')


def test_the_marked_character_has_the_weights_with_which_it_reads(gpt, page):
    page.click(f'#reading button >> nth={AT}')
    ids, weights = gpt.encode(WORDS), watch(gpt, WORDS).weights[0, 0, AT]
    assert numbers(page, '#reading button:visible small') == pytest.approx(
        weights.tolist(), abs=0.006)
    most = weights.argmax().item()
    where = {AT: 'itself', AT - 1: 'the one before'}.get(most, f'{AT - most} before')
    weight = texts(page, '#reading small')[most]
    assert f'{names(gpt, ids)[most]}\u2069” ({where}: {weight})' in page.inner_text('#reads')


def test_each_layer_has_its_five_most_probable_characters(gpt, page):
    page.click(f'#asking button >> nth={AT}')
    cells, lens = texts(page, '#lens td'), watch(gpt, WORDS).lens
    assert len(cells) == 5 * len(lens)
    for step, logits in enumerate(lens[:, AT]):
        ps, best = logits.softmax(dim=-1).topk(5)
        five = cells[5 * step:5 * step + 5]
        assert [cell[:-4] for cell in five] == names(gpt, best)
        assert [float(cell[-4:]) for cell in five] == pytest.approx(ps.tolist(), abs=0.006)


def test_below_each_character_stands_what_it_cost(gpt, page):
    page.click(f'#surprise button >> nth={AT}')
    ids, losses = gpt.encode(WORDS), watch(gpt, WORDS).losses
    assert texts(page, '#surprise button:visible b') == names(gpt, ids)
    first, *others = numbers(page, '#surprise button:visible small')
    assert first == 0 and others == pytest.approx(losses.tolist(), abs=0.051)
    sentence = page.inner_text('#loss')
    assert f'“\u2068{names(gpt, ids)[AT]}' in sentence and f'= {losses[AT - 1]:.2f}.' in sentence


def test_the_longest_bars_are_the_most_probable_characters_and_one_is_the_rest(gpt, page):
    logits = watch(gpt, WORDS).logits[-1]
    ps, best = logits.div(gpt.temperature).softmax(dim=-1).sort(descending=True)
    assert texts(page, '#bars th')[:15] == names(gpt, best[:15])
    assert numbers(page, '#bars td:nth-child(2)') == pytest.approx(
        [*ps[:15].tolist(), ps[15:].sum().item()], abs=0.0006)


# --- Heads
def test_a_head_that_is_switched_off_counts_as_0_until_it_is_on_again(gpt, page):
    bars = texts(page, '#bars td:nth-child(2)')
    page.click(f'#heads button >> nth={HEAD}')
    page.check('#off')
    assert_computes(page, gpt, WORDS, [(2, 2)])
    assert texts(page, '#bars td:nth-child(2)') != bars
    page.click('#all-on')
    assert_computes(page, gpt, WORDS)
    assert texts(page, '#bars td:nth-child(2)') == bars


@pytest.mark.parametrize('off', [set(), {HEAD}], ids=['all on', 'one off'])
def test_below_each_head_stands_how_much_the_loss_rises_without_it(gpt, page, off):
    """Also while another head is off, and for a head that is off."""
    for head in off:
        page.click(f'#heads button >> nth={head}')
        page.check('#off')
    wait_for(page, 'rises.size === heads.length')

    def loss(heads):
        pairs = [(head // gpt.n_head + 1, head % gpt.n_head + 1) for head in heads]
        return watch(gpt, WORDS, pairs).losses.mean().item()

    expected = [(loss(off - {head}), loss(off | {head}))
                for head in range(gpt.n_layer * gpt.n_head)]
    found = page.evaluate('heads.map(({n}) => rises.get(n))')
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-4, rtol=0)
    assert numbers(page, '#heads small') == pytest.approx(
        [without - with_head for with_head, without in expected], abs=0.011)


# --- The text field
def test_without_a_text_it_starts_like_gpt(models, small):
    enter(small, '')
    assert computed(small)['ids'] == [0]
    assert texts(small, '#heads small') == [*'–' * 6]
    small.click('#one')
    written = small.input_value('#field')
    assert written[0] == models['small'].chars[0] and len(written) == 2


@pytest.mark.parametrize('stop', [
    lambda page: page.keyboard.press('a'),
    lambda page: page.dispatch_event('#field', 'compositionstart'),
    lambda page: page.click('#go')], ids=['a key', 'composition', 'the button'])
def test_it_goes_on_until_it_is_stopped(small, stop):
    """By a key, also the first of many that together make a character, or by the button."""
    small.click('#go')
    small.focus('#field')
    wait_for(small, f"find('field').value.length >= {len(WORDS) + 4}")
    assert (small.inner_text('#go'), small.get_attribute('#status', 'aria-live')) == ('Stop', 'off')
    stop(small)
    text = small.input_value('#field')
    small.wait_for_timeout(300)
    assert small.input_value('#field') == text
    assert small.inner_text('#go') == 'Go on'
    assert small.get_attribute('#status', 'aria-live') == 'polite'


@pytest.mark.parametrize('width', [390, 1280])
def test_typing_does_not_scroll_the_page(small, width):
    resize(small, width)
    small.focus('#field')
    small.evaluate('scrollTo(0, 900)')
    small.keyboard.type('the')
    drawn(small)
    assert small.input_value('#field') == WORDS + 'the'
    assert small.evaluate('scrollY') == 900


def test_unknown_characters_are_named_and_left_out(gpt, page):
    enter(page, 'a€b’c\U0001F98A€')
    known = 'ab’c' if '’' in gpt.chars else "ab'c"
    assert computed(page)['ids'] == gpt.encode(known)
    assert re.findall('“\u2068(.*?)\u2069”', page.inner_text('#status')) == ['€', '🦊']


def test_a_large_paste_shows_its_end_and_many_keys_are_drawn_once(gpt, page):
    text = 'the king ' * 11112
    frames = page.evaluate("""async text => {
        let frames = 0;
        new MutationObserver(() => frames++).observe(find('lens'), {childList: true});
        for (const last of 'abcdefghix') {
          find('field').value = text + last;
          find('field').dispatchEvent(new Event('input'));
        }
        await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
        return frames;
    }""", text)
    assert frames == 1
    end = read_part(gpt, text + 'x')
    assert computed(page)['ids'] == gpt.encode(end)
    assert f'The last {len(end)} of {len(text) + 1} characters' in page.inner_text('#status')


# --- How it learned
def scale(page, axis):
    """What turns a value into pixels along an axis, x or y, by the first and last of its ticks."""
    (a, at_a), *_, (b, at_b) = page.evaluate("""axis =>
        [...document.querySelectorAll(`#curves .${axis}`)].map(label =>
          [Number(label.textContent.replace(',', '')), label.previousSibling.getBBox()[axis]])
        """, axis)
    return lambda value: at_a + (value - a) / (b - a) * (at_b - at_a)


def circles(page, selector):
    return page.locator(f'#curves {selector}').evaluate_all(
        'circles => circles.map(({cx, cy}) => [cx.baseVal.value, cy.baseVal.value])')


@pytest.mark.parametrize('width', [390, 1280])
@pytest.mark.parametrize('history, best, others, cut', [
    (OWN['history'], 3, OTHERS, 'Losses above 3.0 are cut off: the highest is 4.50.'),
    ([[0, 4.4, 4.41]], 0, [], ''),
    ([[500, 2.1, 2.1]], 0, [], ''),
    ([[0, 2.1, 2.1], [500, 2.2, 2.2]], 1, [], '')], ids=['runs', 'step 0', 'step 500', 'both'])
def test_the_points_of_the_curves_stand_where_the_axes_say(
        open_page, history, best, others, cut, width):
    page = open_page(runs=[{**OWN, 'history': history}, *others])
    resize(page, width)
    wait_for(page, "find('ring').cx.baseVal.value < find('curves').clientWidth")  # drawn anew
    x, y = scale(page, 'x'), scale(page, 'y')

    def points(history, column):
        return [pytest.approx([x(report[0]), y(report[column])], abs=0.1) for report in history]

    assert circles(page, 'circle.train') == points(history, 1)
    assert circles(page, 'circle.val') == points(history, 2)
    assert circles(page, '#ring') == points(history, 2)[best:best + 1]
    for i, run in enumerate(others):
        line = page.locator('#curves .thin').nth(i).get_attribute('d')
        found = re.findall(r'([\d.]+) (-?[\d.]+)', line)[1:]  # the first point stands there twice
        assert [[float(number) for number in pair] for pair in found] == points(run['history'], 2)
    assert x(0) < x(1) and y(1) < y(0)
    right, bottom = page.evaluate("[find('curves').clientWidth, find('curves').clientHeight]")
    for step, _, val in [history[-1], *(run['history'][-1] for run in others)]:
        assert 0 < x(step) < right and 0 < y(val) < bottom
    assert page.inner_text('#cut') == cut
    assert page.is_visible('#runs') == bool(others)
    assert page.evaluate('document.documentElement.scrollWidth <= innerWidth')


def test_each_other_run_has_its_name_as_text_and_the_best_comes_first(open_page):
    own = {**OWN, 'name': '<i>own</i>.pt'}
    page = open_page(runs=[own, *OTHERS, {'name': 'gpt.pt', 'history': []}])
    assert texts(page, '#runs tr') == [
        'runlowestat step', 'gpt-better.pt1.7002,500', '<i>own</i>.pt (this model)1.8001,500',
        OTHERS[0]['name'] + '2.600300']
    assert texts(page, '#curves .other title') == [run['name'] for run in OTHERS]
    assert page.locator('img').count() == 0


def test_a_name_and_its_curve_stand_out_together(open_page):
    page = open_page(runs=[OWN, *OTHERS])
    x, y = scale(page, 'x'), scale(page, 'y')
    for target in ({'selector': '#runs button >> nth=0'},
                   {'selector': '#curves', 'position': {'x': x(2500), 'y': y(1.7)}}):
        page.hover(**target)
        assert texts(page, '#runs .at') == texts(page, '#curves .at title') == ['gpt-better.pt']
        page.hover('#h-learned')
        assert texts(page, '#learned .at') == []


@pytest.mark.parametrize('runs', [[], [{'name': 'gpt.pt', 'history': []}, OWN]])
def test_a_model_without_a_history_has_no_picture_of_it(open_page, runs):
    page = open_page(runs=runs)
    assert page.is_visible('#h-write') and page.is_hidden('#learned')


# --- Another model
@pytest.mark.parametrize('name', EDITS)
def test_the_page_of_an_edited_model_shows_nothing_and_says_why(tmp_path, open_page, name):
    page = open_page(page_model(tmp_path, *EDITS[name]), runs=[OWN], shown=False)
    why = page.inner_text('#about')
    assert 'only the unedited model' in why and \
        'python tests/lab/inside.py --checkpoint try/gpt-own.pt in' in why
    assert re.findall(r'\.(?!pt|py)', why) == ['.']  # one sentence
