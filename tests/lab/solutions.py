"""The solutions of the exercises in tests/lab/README.md, as edits of gpt.py."""
import random
import sysconfig
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from measure import (Variant, compare_caches, compare_steps, count_ngrams, fine_tune,
                     measure_positions, sample, train, train_and_add, train_and_read_further,
                     train_bigram, train_exactly, train_in_two_processes, train_with_reward)
from scripts import PROJECT


def change(*edits, steps=1000, measure=train, text=None, script='gpt.py', **settings):
    """A variant of a script: with edits, pairs of an old text and a new one, and with settings."""
    return Variant(edits, settings, steps, measure, text, script)


def without(line):
    """An edit: a # before this line of a method. (Where there is one already, it does not fit.)"""
    return (f'        {line}', f'        # {line}')


@dataclass
class Exercise:
    title: str
    variants: dict  # the name of a variant -> the variant
    report: str = '{val:.2f}'  # how its result is written; losses are in nats per character
    compare: bool = True  # whether exercises.py runs gpt.py as it is, too


def python_library(text):
    """the source of Python's own library, as much of it as input.txt has characters"""
    files = sorted(Path(sysconfig.get_path('stdlib')).glob('*.py'))
    sources = (file.read_text(encoding='utf-8', errors='ignore') for file in files)
    return '\n'.join(source for source in sources if source.isascii())[:len(text)]


def sums(text, numbers=range(10, 100), reverse=False, left_out=frozenset()):
    """sums such as 57+28=85, of each two numbers once, those with numbers left out at the end"""
    chance = random.Random(1)
    pairs = [chance.sample((a, b), 2) for a in numbers for b in numbers if a <= b]
    chance.shuffle(pairs)
    pairs.sort(key=lambda pair: not left_out.isdisjoint(pair))
    return ''.join(f'{a}+{b}={str(a + b)[::-1 if reverse else 1]}\n' for a, b in pairs)


def classic_corpus(text):
    """the classic corpus, from try/classic.txt"""
    path = PROJECT / 'try/classic.txt'
    if not path.exists():
        raise ValueError(f'put the classic corpus into {path}: the README says where it is')
    return path.read_text(encoding='utf-8')


def library_in_our_characters(text):
    """Python's library without the characters that input.txt does not have, and first of all each
    that it has, so that the vocabulary stays the same
    """
    chars = sorted(set(text))
    return ''.join(chars) + ''.join(c for c in python_library(text) if c in chars)


SCORES = '        scores = q @ k.transpose(-2, -1)'
MASKING = '        scores = scores + causal_mask'
RELU = 'out = F.relu(out)'
POSITIONS = '        x = x + self.position_embedding_table(positions)'
WITHOUT_POSITIONS = without(POSITIONS.strip())
WITHOUT_MASK = without(MASKING.strip())
WITHOUT_SCALE = without('scores = scores / math.sqrt(hs)')
WITHOUT_RESIDUALS = [('x = x + self.sa(self.ln1(x))', 'x = self.sa(self.ln1(x))'),
                     ('x = x + self.ffwd(self.ln2(x))', 'x = self.ffwd(self.ln2(x))')]
PLAIN_MEAN = (MASKING, '        scores = torch.zeros_like(scores)\n' + MASKING)
LOWER_CASE = ("read_text(encoding='utf-8-sig')", "read_text(encoding='utf-8-sig').lower()")
PAIRS = [
    ('import math', 'import collections\nimport math'),
    ('chars = sorted(set(text))',
     'pairs = collections.Counter(a + b for a, b in zip(text, text[1:])).most_common(300)\n'
     'chars = sorted(set(text)) + [pair for pair, count in pairs]'),
    ('    return [stoi[character] for character in string]', """\
    ids, i = [], 0
    while i < len(string):
        token = string[i:i + 2] if string[i:i + 2] in stoi else string[i]  # a pair, if there is one
        ids.append(stoi[token])
        i += len(token)
    return ids"""),
    # The loss of one token is the loss of more than one character.
    ('/ eval_iters', '/ eval_iters * len(data) / len(text)'),
]
TIED = [
    ('        nn.init.normal_(self.position_embedding_table.weight, std=0.1)', """\
        nn.init.normal_(self.position_embedding_table.weight, std=0.1)
        self.lm_head.weight = self.token_embedding_table.weight"""),
]
MUON = [
    ('    matrices = [p for p in model.parameters() if p.dim() >= 2]', """\
    muon = torch.optim.Muon([p for p in model.blocks.parameters() if p.dim() == 2],
                            lr=learning_rate, weight_decay=weight_decay,
                            adjust_lr_fn='match_rms_adamw')  # AdamW's learning rates suit it
    matrices = [model.lm_head.weight,  # for AdamW: those outside the blocks
                model.token_embedding_table.weight, model.position_embedding_table.weight]"""),
    ('optimizer.zero_grad()', 'model.zero_grad()'),
    ('        optimizer.step()', """\
        muon.param_groups[0]['lr'] = optimizer.param_groups[0]['lr']  # the same schedule
        muon.step()
        optimizer.step()"""),
]
CACHE = [
    # MultiHeadAttention: the new positions' keys and values join those that are kept.
    ('        self.n_head = n_head', """\
        self.n_head = n_head
        self.cache = None  # in generate: past keys and values, (2, B, nh, positions, hs)"""),
    (SCORES, """\
        if self.cache is not None:  # k and v are those of the new positions
            self.cache = torch.cat((self.cache, torch.stack((k, v))), dim=3)
            k, v = self.cache  # (B, nh, all positions, hs) each
""" + SCORES),
    # GPTLanguageModel: the new positions come after those that are kept.
    (POSITIONS, """\
        if self.blocks[0].sa.cache is not None:
            positions = positions + self.blocks[0].sa.cache.shape[3]
""" + POSITIONS),
    ('        for _ in range(max_new_tokens):', """\
        kept = 0  # positions in the cache
        for _ in range(max_new_tokens):
            new = 1  # how many of the last tokens the model has to read
            # When the context is full, all kept positions would have to move, so their keys and
            # values are out of date: begin again, with the later half of the context.
            if kept in (0, block_size):
                new = min(block_size, idx.shape[1]) if kept == 0 else (block_size + 1) // 2
                kept = 0
                for block in self.blocks:
                    block.sa.cache = torch.empty(2, len(idx), n_head, 0, n_embd // n_head,
                                                 device=idx.device)
            kept += new"""),
    ('idx[:, -block_size:]', 'idx[:, -new:]'),
    ('        self.train(was_training)', """\
        for block in self.blocks:
            block.sa.cache = None
        self.train(was_training)"""),
]
PARALLEL = [
    ('import math', 'import math\nimport os\nimport sys'),
    ('import torch.nn.functional as F', 'import torch.distributed as dist\n'
     'import torch.nn.functional as F'),
    ('\ntorch.manual_seed(seed)', """
dist.init_process_group('gloo')  # the processes find each other; 'nccl' on GPUs
rank, processes = dist.get_rank(), dist.get_world_size()
batch_size //= processes  # each process takes its part of the batch
eval_iters *= processes  # and a loss estimate still averages as many sequences
if rank > 0:
    sys.stdout = open(os.devnull, 'w')  # process 0 prints for all
torch.manual_seed(seed)"""),
    ('    losses = estimate_loss()', """\
    if rank > 0:
        return  # process 0 estimates the losses, and saves
    losses = estimate_loss()"""),
    ('    started = time.time()', """\
    parallel = nn.parallel.DistributedDataParallel(model)  # averages the gradients of all
    torch.manual_seed(seed + rank)  # the weights are the same in all, the batches are not
    started = time.time()"""),
    ('\n        logits, loss = model(x, y)', '\n        logits, loss = parallel(x, y)'),
    ('\n        train()', """
        train()
        dist.destroy_process_group()
        if rank > 0:
            os._exit(0)  # at once: sys.exit could fail while the threads of gloo end"""),
]
FUSED = [
    *(without(line) for line in (
        SCORES.strip(), 'scores = scores / math.sqrt(hs)',
        'causal_mask = torch.full((T, T), -math.inf, device=x.device).triu(1)', MASKING.strip(),
        'att = scores.softmax(dim=-1)', 'att = self.dropout(att)')),
    ('        out = att @ v', """\
        dropout_p = dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
        # out = att @ v"""),
]


def train_on(count):
    """An edit: the training text is only the first characters; the validation text stays."""
    return ('train_data, val_data = data[:n_train]', f'train_data, val_data = data[:{count:_}]')


def no_biases(*sizes):
    """Edits that take the bias away from linear layers with these sizes."""
    return [(f'nn.Linear({size})', f'nn.Linear({size}, bias=False)') for size in sizes]


def norms(replacement, names=('ln1', 'ln2', 'ln_f')):
    """Edits that put another module in the place of layer norms."""
    return [(f'self.{name} = nn.LayerNorm(n_embd)', f'self.{name} = {replacement}')
            for name in names]


ROTARY = [
    ('class MultiHeadAttention(nn.Module):', '''\
def rotate(z):
    """Turns pairs of channels by angles that grow with the position. (B, nh, T, hs), the same"""
    T, hs = z.shape[-2:]
    speeds = 10_000 ** (-torch.arange(0, hs, 2, device=z.device) / hs)  # (hs / 2)
    angles = torch.arange(T, device=z.device)[:, None] * speeds  # (T, hs / 2)
    a, b = z.chunk(2, dim=-1)  # (B, nh, T, hs / 2) each: channel i makes a pair with i + hs / 2
    return torch.cat((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()),
                     dim=-1)


class MultiHeadAttention(nn.Module):'''),
    (SCORES, '        q, k = rotate(q), rotate(k)\n' + SCORES),
    WITHOUT_POSITIONS,
]
SWIGLU = [  # three matrices of C * 8/3 C have as many weights as two of C * 4 C
    ('nn.Linear(n_embd, 4 * n_embd)', 'nn.Linear(n_embd, 2 * (8 * n_embd // 3))'),
    ('nn.Linear(4 * n_embd, n_embd)', 'nn.Linear(8 * n_embd // 3, n_embd)'),
    (RELU, """\
gate, out = out.chunk(2, dim=-1)  # (B, T, 8/3 C) each
        out = F.silu(gate) * out"""),
]
QK_NORM = (SCORES, '        q, k = F.rms_norm(q, (hs,)), F.rms_norm(k, (hs,))\n' + SCORES)
TODAY = [  # the layers of SwiGLU have other sizes; queries and keys are scaled, then turned
    *norms('nn.RMSNorm(n_embd)'), *SWIGLU, QK_NORM, *ROTARY,
    *no_biases('n_embd, n_embd', 'n_embd, 2 * (8 * n_embd // 3)', '8 * n_embd // 3, n_embd',
               'n_embd, vocab_size')]
CLIPPING = ('        optimizer.step()',
            '        nn.utils.clip_grad_norm_(model.parameters(), 1.0)\n        optimizer.step()')
MEAN_OF_FIVE = [  # in the place of the best weights
    ('best = {}', 'recent = []  # the weights at the last five reports\nbest = {}'),
    ("elif losses['val'] < best.get('val', math.inf):", 'else:'),
    ("        best.update(val=losses['val'], weights=copy.deepcopy(model.state_dict()))", """\
        recent.append(copy.deepcopy(model.state_dict()))
        del recent[:-5]
        best.update(weights={name: sum(weights[name] for weights in recent) / len(recent)
                             for name in recent[-1]})"""),
]
COUNTED = ('model = m = BigramLanguageModel().to(device)', """\
model = m = BigramLanguageModel().to(device)
counts = torch.ones(vocab_size, vocab_size)  # one more than there are: no probability is 0
counts.index_put_((train_data[:-1], train_data[1:]), torch.tensor(1.0), accumulate=True)
model.token_embedding_table.weight.data.copy_(counts.log())""")
FROM_START = ('    try:\n        train()', """\
    start = torch.load(folder / 'start.pt', map_location=device, weights_only=True)
    model.load_state_dict(start['model'])
    try:
        train()""")
WORDS = """\
    words = re.findall("[A-Za-z']+", sample)[1:-1]  # the first and the last may be cut off
    return sum(word in known_words for word in words) / max(len(words), 1)"""
LETTERS = """\
    return sample.count('e') / len(sample)"""


def rewarded(reward, kl_weight):
    """Edits that train the model with a reward, the body of a function of a text."""
    return [
        FROM_START,
        ('import math', 'import math\nimport re'),
        ('def train():', f'''\
kl_weight = {kl_weight}  # how much it costs to predict otherwise than the model at the start
known_words = set(re.findall("[A-Za-z']+", text[:n_train]))


def reward(sample):
    """How good a text is, a number: the model learns to write texts for which it is high."""
{reward}


def write(count):
    """Token ids of texts that the model writes, (count, 1 + 64): the start token, then 64."""
    start = torch.zeros((count, 1), dtype=torch.long, device=device)
    return model.generate(start, 64)


def reward_loss(start_model):
    """A loss whose gradient makes texts with a high reward more probable (Williams 1992)."""
    idx = write(48)  # (B, 1 + T)
    rewards = torch.tensor([reward(decode(ids)) for ids in idx[:, 1:].tolist()],
                           device=device)  # (B)
    print(f'    mean reward {{rewards.mean():.3f}}', flush=True)
    # Better than the other texts of the batch: above 0. Worse: below 0.
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)  # (B)
    log_probs = model(idx[:, :-1])[0].log_softmax(dim=-1)  # (B, T, vocab_size)
    drawn = log_probs.gather(-1, idx[:, 1:, None]).squeeze(-1)  # (B, T): of the drawn tokens
    with torch.no_grad():
        start_log_probs = start_model(idx[:, :-1])[0].log_softmax(dim=-1)  # (B, T, vocab_size)
    # The KL divergence: how far, on average, the model has moved from the one at the start.
    kl = (log_probs.exp() * (log_probs - start_log_probs)).sum(dim=-1).mean()
    return kl_weight * kl - (advantages[:, None] * drawn).mean()


def train():'''),
        ('    started = time.time()', """\
    start_model = copy.deepcopy(model)  # stays as it is
    started = time.time()"""),
        ("""\
        x, y = get_batch('train')  # (B, T) each
        logits, loss = model(x, y)
        optimizer""", """\
        loss = reward_loss(start_model)
        optimizer"""),
        CLIPPING,
        # The loss on the text rises: the last weights count, not those with the lowest loss.
        ("elif losses['val'] < best.get('val', math.inf):", 'else:'),
    ]


# The hyperparameters of bigram.py with which the figures were measured.
BIGRAM = dict(device='cpu', batch_size=64, block_size=32, max_iters=800, eval_interval=200,
              eval_iters=10, learning_rate=0.1, seed=1337)
SUMS = dict(steps=1500, measure=train_and_add, block_size=64, batch_size=16)
FINE_TUNING = dict(text=library_in_our_characters, measure=fine_tune, steps=200, eval_interval=20,
                   learning_rate=3e-4, warmup_iters=20)
REWARD = dict(steps=40, measure=train_with_reward, eval_interval=10, learning_rate=2e-4,
              warmup_iters=0, weight_decay=0.0, temperature=1.0)

# gpt.py as it is, with which the others are compared.
PLAIN = {f'{steps:,} steps': change(steps=steps) for steps in (1000, 2000, 3000)}
VAL = '{val:.2f}'

# What each part is worth: gpt.py without it. What one learns from each row is in README.md.
PARTS = {
    'nothing': change(steps=3000),
    'attention': change(('x = x + self.sa(self.ln1(x))', 'pass'), steps=3000),
    'attention weights: the plain mean of the past instead': change(PLAIN_MEAN, steps=3000),
    'positions': change(WITHOUT_POSITIONS, steps=3000),
    'the causal mask': change(WITHOUT_MASK, steps=3000),
    'feed-forward': change(('x = x + self.ffwd(self.ln2(x))', 'pass'), steps=3000),
    'residual connections': change(*WITHOUT_RESIDUALS, steps=3000),
    'layer norms, all of them': change(*norms('nn.Identity()'), steps=3000),
    'the last layer norm': change(*norms('nn.Identity()', ['ln_f']), steps=3000),
    'the scale (division by √hs), heads of 32': change(WITHOUT_SCALE, steps=3000),
    'several heads: one head of 128 instead': change(n_head=1, steps=3000),
    'several heads and the scale': change(WITHOUT_SCALE, n_head=1, steps=3000),
    'our initial weights: those of torch instead': change(
        ('nn.init.normal_(self.token_embedding_table.weight, std=0.1)', 'pass'),
        ('nn.init.normal_(self.position_embedding_table.weight, std=0.1)', 'pass'), steps=3000),
    'decay of the learning rate': change(('1 - step / max_iters))', '1))'), steps=3000),
    'warm-up': change(warmup_iters=0, steps=3000),
    'weight decay': change(weight_decay=0.0, steps=3000),
}

EXERCISES = dict(enumerate([
    Exercise('Watch your own model', {}),  # with inside.py: nothing is edited
    # Break it.
    Exercise('Let it see the future', {
        'no mask': change(WITHOUT_MASK),
    }, '{val:.2f}; it generates: `{sample}`'),
    Exercise('Take the positions away', {
        'no positions': change(WITHOUT_POSITIONS)}),
    Exercise('The plain mean of the past', {
        'plain mean': change(PLAIN_MEAN)}),
    Exercise('Remove the residual connections', {
        'no residual connections': change(*WITHOUT_RESIDUALS),
    }, '{val:.2f} (character frequencies alone: {unigram:.2f})'),
    Exercise('Leave out the scale', {
        'narrow heads, not scaled': change(WITHOUT_SCALE),
        'one wide head, scaled': change(n_embd=256, n_head=1, n_layer=1),
        'one wide head, not scaled': change(WITHOUT_SCALE, n_embd=256, n_head=1, n_layer=1)}),
    # Change its hyperparameters and its text.
    Exercise('Temperature and top-k', {
        'temperature = 0.5': change(steps=None, measure=sample, temperature=0.5),
        'temperature = 1.5': change(steps=None, measure=sample, temperature=1.5),
        'top_k = 5': change(steps=None, measure=sample, top_k=5),
        'top_k = 1': change(steps=None, measure=sample, top_k=1),
    }, '{words:.0%} of the words occur in input.txt: `{sample}`'),
    Exercise('Learning rate', {
        f'learning_rate = {value}': change(learning_rate=float(value))
        for value in ('1e-4', '1e-2', '1e-1', '10')}),
    Exercise('Size and context', {
        'n_layer = 1': change(n_layer=1),
        'n_layer = 6': change(n_layer=6),
        'block_size = 8, batch_size = 128': change(block_size=8, batch_size=128),
        'block_size = 1, batch_size = 1024': change(block_size=1, batch_size=1024)}),
    Exercise('Heads', {
        'n_head = 1': change(steps=3000, n_head=1),
        'n_head = 16': change(steps=3000, n_head=16)}),
    Exercise('Overfitting, and dropout against it', {
        '20,000 characters': change(train_on(20_000), eval_interval=100),
        'with dropout': change(train_on(20_000), eval_interval=100, dropout=0.3),
        'with three times the steps': change(train_on(20_000), eval_interval=100, steps=3000),
        'with three times the text': change(train_on(60_000), eval_interval=100),
    }, 'train {train:.2f}, val {val:.2f} (at best {best:.2f}, at step {best_step})'),
    Exercise('Your own text', {"Python's library": change(text=python_library)},
             '{val:.2f}; it generates: `{sample}`'),
    # Replace a part.
    Exercise('Another tokenizer', {'lower case': change(LOWER_CASE), '300 pairs': change(*PAIRS)}),
    Exercise('Another activation function', {
        'GELU': change((RELU, 'out = F.gelu(out)')),
        'no activation': change(without(RELU))}),
    Exercise('Weight tying', {'tied weights': change(*TIED)}),
    Exercise('Another optimizer', {
        'Muon': change(*MUON, learning_rate=3e-3),
        'Muon, 5,500 steps': change(*MUON, learning_rate=3e-3, steps=5500)}),
    # Put in the parts of today's models.
    Exercise('RMSNorm and no biases', {
        'RMSNorm, no biases': change(*norms('nn.RMSNorm(n_embd)'), *no_biases(
            'n_embd, n_embd', 'n_embd, 4 * n_embd', '4 * n_embd, n_embd', 'n_embd, vocab_size'),
            steps=3000)}),
    Exercise('Rotary position embeddings', {
        'rotary': change(*ROTARY, steps=3000, measure=train_and_read_further)},
        '{val:.2f}; exact loss with one, two and four times block_size characters at once: '
        '{further}'),
    Exercise('SwiGLU', {'SwiGLU': change(*SWIGLU, steps=3000)}),
    Exercise('Query-key norm', {
        f'{name}, learning_rate = {rate}': change(*edits, steps=3000, learning_rate=float(rate))
        for rate in ('1.5e-3', '1e-2', '3e-2')
        for name, edits in (('plain', []), ('query-key norm', [QK_NORM]))
        if (name, rate) != ('plain', '1.5e-3')}),
    Exercise('Gradient clipping', {
        f'{name}, learning_rate = {rate}': change(*edits, steps=3000, learning_rate=float(rate))
        for rate in ('1.5e-3', '1e-2', '3e-2', '1e-1')
        for name, edits in (('plain', []), ('clipped', [CLIPPING]))
        if (name, rate) != ('plain', '1.5e-3')}),
    Exercise('All of them together', {
        'all of them': change(*TODAY, steps=3000),
        'with Muon, 5,000 steps': change(*TODAY, *MUON, learning_rate=3e-3, steps=5000)}),
    # Extend it.
    Exercise('A cache of keys and values', {
        'cache': change(*CACHE, steps=None, measure=compare_caches)},
             'the first {same} of {total} characters are the same as without the cache (at least '
             'block_size should be); generating takes {ratio:.2f} times as long', compare=False),
    Exercise('More than one process', {
        'two processes': change(*PARALLEL, measure=train_in_two_processes)}),
    Exercise("Torch's own attention", {
        'block_size = 128': change(*FUSED, steps=None, measure=compare_steps),
        'block_size = 1024, batch_size = 1': change(
            *FUSED, steps=None, measure=compare_steps, block_size=1024, batch_size=1),
    }, 'a training step takes {ratio:.2f} times as long; before training, the logits differ by at '
       'most {difference:.0e}', compare=False),
    # Two short ones.
    Exercise('Count the pairs', {
        'learned': change(steps=None, measure=train_bigram, script='bigram.py', **BIGRAM),
        'counted': change(COUNTED, steps=None, measure=train_bigram, script='bigram.py', **BIGRAM),
    }, 'exact loss {before:.3f} before training, {exact:.3f} after it', compare=False),
    Exercise('The loss at each position', {
        'the newest run': change(steps=None, measure=measure_positions),
    }, ', '.join(f'{{position {2 ** n}:.2f}}' for n in range(8)), compare=False),
    # Train it further.
    Exercise('Addition', {
        'usual order': change(text=sums, **SUMS),
        'reversed': change(text=partial(sums, reverse=True), **SUMS),
        'three digits, usual order': change(text=partial(sums, numbers=range(100, 1000)), **SUMS),
        'three digits, reversed': change(
            text=partial(sums, numbers=range(100, 1000), reverse=True), **SUMS),
        'reversed, with numbers never seen': change(
            text=partial(sums, reverse=True, left_out=frozenset({23, 47, 58, 91})), **SUMS),
    }, '{right} of {asked} sums right; validation loss {val:.2f}', compare=False),
    Exercise('Fine-tuning', {
        'fine-tuned': change(FROM_START, train_on(20_000), **FINE_TUNING),
        'trained on these alone': change(train_on(20_000), **{**FINE_TUNING, **dict(
            learning_rate=1.5e-3, steps=1000, eval_interval=100)}),
    }, 'exact loss: {old:.2f} on the old text ({old_before:.2f} before), {new:.2f} on the new one '
       '({new_before:.2f} before)', compare=False),
    Exercise('A reward', {
        f'{name}{with_kl}': change(*rewarded(reward, kl_weight), **REWARD)
        for name, reward in (('known words', WORDS), ('letters e', LETTERS))
        for with_kl, kl_weight in (('', 0.0), (', with a KL term', 0.1))
    }, 'reward {reward:.2f} ({reward_before:.2f} before), exact loss {exact:.2f} '
       '({exact_before:.2f} before); it writes: `{sample}`', compare=False),
]))


def row(label, *cells, form=VAL):
    """A row of a table: each cell a variant, or a pair of a variant and which of its results."""
    return label, [(cell, form) if isinstance(cell, str) else cell for cell in cells]


def rows(names, *forms):
    """Rows for several variants, with the same results of each."""
    return [row(name, *((name, form) for form in forms)) for name in names]


# The tables in tests/lab/README.md, by exercise.
TABLES = {
    5: [row('four heads of 32', '1,000 steps', 'narrow heads, not scaled'),
        row('one head of 256', 'one wide head, scaled', 'one wide head, not scaled')],
    8: [row('none: 3 layers, context 128', '1,000 steps'),
        row('`n_layer = 1`', 'n_layer = 1'),
        row('`n_layer = 6`', 'n_layer = 6'),
        row('`block_size = 8`', 'block_size = 8, batch_size = 128'),
        row('`block_size = 1`', 'block_size = 1, batch_size = 1024')],
    10: [row(label, *((name, form) for form in (
             '{train:.2f}', VAL, '{best:.2f}, at step {best_step:,}')))
         for label, name in [*((name, name) for name in EXERCISES[10].variants),
                             ('all of the text, a million characters', '1,000 steps')]],
    19: [row('unchanged', '3,000 steps',
             *(f'plain, learning_rate = {rate}' for rate in ('1e-2', '3e-2'))),
         row('with query-key norm',
             *(f'query-key norm, learning_rate = {rate}' for rate in ('1.5e-3', '1e-2', '3e-2')))],
    20: [row('unchanged', '3,000 steps',
             *(f'plain, learning_rate = {rate}' for rate in ('1e-2', '3e-2', '1e-1'))),
         row('with clipping', *(f'clipped, learning_rate = {rate}'
                                for rate in ('1.5e-3', '1e-2', '3e-2', '1e-1')))],
    26: [row('loss', *(('the newest run', f'{{position {2 ** n}:.2f}}') for n in range(8)))],
    27: rows(EXERCISES[27].variants, '{right}', VAL),
    28: [row('before', ('fine-tuned', '{old_before:.2f}'), ('fine-tuned', '{new_before:.2f}')),
         *rows(EXERCISES[28].variants, '{old:.2f}', '{new:.2f}')],
    29: rows(EXERCISES[29].variants,
             '{reward_before:.2f}', '{reward:.2f}', '{exact_before:.2f}', '{exact:.2f}'),
}

# The table of results in the main README: each row, on our text and on the classic corpus.
RESULTS = {
    '`bigram.py`': change(steps=None, measure=train_bigram, script='bigram.py', **BIGRAM),
    'counts of what followed the same four characters before, or fewer if these are rare: '
    '`exact_loss.py ngram`': change(steps=None, measure=count_ngrams),
    '`gpt.py` with two layers, trained for a minute or two': change(
        steps=2700, measure=train_exactly, n_layer=2, batch_size=16, block_size=64,
        learning_rate=4e-3),
    '`gpt.py`, the default': change(steps=None, measure=train_exactly),
}
CLASSIC = {name: replace(variant, text=classic_corpus) for name, variant in RESULTS.items()}

# What could make it better, at full length, on the classic corpus: the table of exercise 21.
FULL_LENGTH = {
    name: replace(variant, measure=train_exactly, text=classic_corpus) for name, variant in {
        'all four parts': change(*TODAY, steps=None),
        '`n_layer = 6`': change(steps=None, n_layer=6),
        '`dropout = 0.1`': change(steps=None, dropout=0.1),
        'the mean of the weights at the last five reports': change(*MEAN_OF_FIVE, steps=None),
    }.items()}

# All variants that are measured, by exercise.
GROUPS = {'plain': PLAIN, 'parts': PARTS, 'our text': RESULTS, 'classic corpus': CLASSIC,
          'full length': FULL_LENGTH,
          **{number: exercise.variants for number, exercise in EXERCISES.items()}}
