"""The exercises of the README, worked: each solution as edits of gpt.py, and what it leads to.

    python tests/exercises.py              lists them
    python tests/exercises.py 3            trains a copy of gpt.py with each change of exercise 3
    python tests/exercises.py 3 --show     prints the changes instead, as diffs
    python tests/exercises.py --all        measures all (about 25 minutes) and prints a table

Everything runs in temporary folders: your gpt.py and gpt.pt are never touched. It runs on the CPU,
as it did for the README's figures, and starts from the gpt.py here, which must be unedited.
--steps 100 trains for 100 steps, for a quick look at the output.
"""
import argparse
import difflib
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


@dataclass
class Variant:
    """One change of gpt.py, and how it is run."""
    edits: list = field(default_factory=list)  # (old text, new text); each old text occurs once
    settings: dict = field(default_factory=dict)  # hyperparameters, by name
    steps: int = 1000  # None: as many as gpt.py takes
    run: str = 'train'  # or 'prompt' or 'cache', with the saved gpt.pt, or 'torchrun'
    text: object = None  # makes another input.txt from the text of ours


def change(*edits, steps=1000, run='train', text=None, **settings):
    trains = run not in ('prompt', 'cache')
    return Variant(list(edits), settings, steps if trains else None, run, text)


@dataclass
class Exercise:
    title: str
    change: str  # what the learner does
    predict: str  # what to ask oneself first
    why: str  # the reason for the result
    variants: dict  # the name of a variant -> the variant
    report: str = '{val:.2f}'  # how its result is written


def beginning(text):
    """Its first 20,000 characters only (by hand: text = text[:20_000])."""
    return text[:20_000]


def python_library(text):
    """The source of Python's own library, as much of it as input.txt has characters."""
    files = sorted(Path(sysconfig.get_path('stdlib')).glob('*.py'))
    sources = (file.read_text(encoding='utf-8', errors='ignore') for file in files)
    return '\n'.join(source for source in sources if source.isascii())[:len(text)]


FUSED = 'dropout_p=dropout_p, is_causal=True)'
QKV = 'q, k, v = self.qkv(x).chunk(3, dim=-1)'
HEADS = 'q, k, v = (z.view(B, T, nh, hs).transpose(1, 2) for z in (q, k, v))'
WITHOUT_SCALE = (FUSED, 'dropout_p=dropout_p, is_causal=True, scale=1.0)')
LOWER_CASE = ("read_text(encoding='utf-8-sig')", "read_text(encoding='utf-8-sig').lower()")
PAIRS = [
    ('import argparse', 'import argparse\nimport collections'),
    ('chars = sorted(set(text))',
     'pairs = collections.Counter(map(str.__add__, text, text[1:])).most_common(300)\n'
     'chars = sorted(set(text)) + sorted(pair for pair, count in pairs)'),
    ('    return [stoi[character] for character in string]', """\
    ids, i = [], 0
    while i < len(string):
        token = string[i:i + 2] if string[i:i + 2] in stoi else string[i]  # a pair, if there is one
        ids.append(stoi[token])
        i += len(token)
    return ids"""),
    # The loss of one token is the loss of more than one character.
    ('losses[split] = sum(batch_losses) / eval_iters',
     'losses[split] = sum(batch_losses) / eval_iters * len(data) / len(text)'),
]
MUON = [
    ('    optimizer = torch.optim.AdamW([', """\
    muon = torch.optim.Muon([p for p in model.blocks.parameters() if p.dim() == 2],
                            lr=learning_rate, weight_decay=weight_decay,
                            adjust_lr_fn='match_rms_adamw')  # so that AdamW's learning rates suit
    outside = [model.token_embedding_table.weight, model.position_embedding_table.weight,
               model.lm_head.weight]
    optimizer = torch.optim.AdamW(["""),
    ('[p for p in model.parameters() if p.dim() >= 2]', 'outside'),
    ('optimizer.zero_grad()', 'model.zero_grad()'),
    ('            optimizer.step()', """\
            muon.param_groups[0]['lr'] = optimizer.param_groups[0]['lr']  # the same schedule
            muon.step()
            optimizer.step()"""),
]
CACHE = [
    # MultiHeadAttention: the new positions' keys and values join those that are kept.
    ('        self.n_head, self.head_size = n_head, head_size',
     '        self.n_head, self.head_size = n_head, head_size\n'
     '        self.cache = None  # in generate: past keys and values, (2, B, nh, positions, hs)'),
    (HEADS, HEADS + """  # of the new positions
        if self.cache is not None:
            self.cache = torch.cat((self.cache, torch.stack((k, v))), dim=3)
            k, v = self.cache"""),
    (FUSED, 'dropout_p=dropout_p, is_causal=T > 1)'),  # one new position may read all there are
    # GPTLanguageModel: the new positions come after those that are kept.
    ('positions = torch.arange(idx.shape[1], device=idx.device)', """\
past = 0 if self.blocks[0].sa.cache is None else self.blocks[0].sa.cache.shape[3]
        positions = past + torch.arange(idx.shape[1], device=idx.device)"""),
    ('        for _ in range(max_new_tokens):', """\
        kept = 0  # positions in the cache
        for _ in range(max_new_tokens):
            # When the context is full, all kept positions would have to move, so their keys and
            # values are out of date: begin again, with the later half of the context.
            if kept in (0, block_size):
                for block in self.blocks:
                    block.sa.cache = torch.empty(2, len(idx), n_head, 0, n_embd // n_head,
                                                 device=idx.device)
                new = idx[:, -block_size:] if kept == 0 else idx[:, -(block_size // 2):]
                kept = 0
            else:
                new = idx[:, -1:]
            kept += new.shape[1]"""),
    ('logits, _ = self(idx[:, -block_size:])  # (B, min(T, block_size), vocab_size)',
     'logits, _ = self(new)  # (B, new positions, vocab_size)'),
    ('        self.train(was_training)', """\
        for block in self.blocks:
            block.sa.cache = None
        self.train(was_training)"""),
]
PARALLEL = [
    ('import torch.nn.functional as F', 'import torch.nn.functional as F\n'
     'import torch.distributed as dist'),
    ('\ntorch.manual_seed(seed)', """
dist.init_process_group('gloo')  # the processes find each other; 'nccl' on GPUs
rank, processes = dist.get_rank(), dist.get_world_size()
batch_size //= processes  # each process takes its part of the batch
eval_iters *= processes  # and a loss estimate still averages as many sequences
if rank > 0:
    sys.stdout = open(os.devnull, 'w')  # process 0 prints for all
torch.manual_seed(seed)"""),
    ('    try:\n        torch.save(', '    if rank > 0:\n        return\n'
     '    try:\n        torch.save('),
    ('    losses = estimate_loss()', '    if rank > 0:\n        return best\n'
     '    losses = estimate_loss()'),
    ('    started, best = time.time(), math.inf', """\
    parallel = nn.parallel.DistributedDataParallel(model)  # averages the gradients of all
    torch.manual_seed(seed + rank)  # the weights are the same in all, the batches are not
    started, best = time.time(), math.inf"""),
    ('logits, loss = model(x, y)', 'logits, loss = parallel(x, y)'),
    ('\n        train()', """
        train()
        dist.destroy_process_group()
        if rank > 0:
            sys.exit()"""),
]

EXERCISES = dict(enumerate([
    Exercise(
        'Temperature and top-k',
        'Set `temperature` to 0.5, then to 1.5; then, at 0.8, `top_k` to 5 and to 1. Nothing is '
        'trained: run `python gpt.py --prompt "The "` each time.',
        'Which of the four texts repeats itself, and which has the most words that do not exist?',
        'The logits are divided by the temperature. Below 1 that makes the differences between '
        'them larger, so the probable characters become more probable; above 1 it makes the '
        'differences smaller, so improbable characters are drawn more often, and one wrong letter'
        ' is enough to spoil a word. With `top_k` = 1 nothing is left to chance: the most '
        'probable character is always taken, and the text tends to end in a loop. The model is '
        'the same in all cases, and so is its loss.',
        {'temperature = 0.5': change(run='prompt', temperature=0.5),
         'temperature = 1.5': change(run='prompt', temperature=1.5),
         'top_k = 5': change(run='prompt', top_k=5),
         'top_k = 1': change(run='prompt', top_k=1)},
        '{words:.0%} of the words occur in input.txt: `{sample}`'),
    Exercise(
        'Learning rate',
        'Set `learning_rate` to 1e-4, 1e-2, 1e-1 and 10.',
        'At which value does training start to fail, and what does that look like?',
        'With a small learning rate, the weights have not moved far enough when the steps run '
        'out. In a run as short as this, 1e-2 does better than our default, which suits 10,000 '
        'steps. At 1e-1, every step overshoots: the gradient only tells in which direction the '
        'loss falls nearby, not what comes after a long step. AdamW divides each gradient by '
        'the size of recent ones, so the learning rate decides how long a step is: if it is too'
        ' long, the loss stays high. At 10, weight decay adds to the trouble: each step '
        'multiplies the weight matrices by 1 - 10 * 0.3 = -2, so they grow until the numbers '
        'overflow, and `gpt.py` stops and says so.',
        {f'learning_rate = {value}': change(learning_rate=float(value))
         for value in ('1e-4', '1e-2', '1e-1', '10')}),
    Exercise(
        'Size and context',
        'Set `n_layer` to 1, then to 6. Back at the default, set `block_size` to 8 and '
        '`batch_size` to 128, then to 1 and 1024: so each step sees as many characters as before.',
        'What helps more in a run as short as this, more layers or a longer context?',
        'More layers have more room for what can be learned, but in a short run they have hardly '
        'begun to use it, and each step takes longer. A long context has little to give early in '
        'training, when the model is still learning which letters follow each other; a context of '
        '8 even has an advantage here, since its sequences come from many more places in the text. '
        'With a context of 1 the model can know no more than `bigram.py`, and ends at its loss.',
        {'n_layer = 1': change(n_layer=1),
         'n_layer = 6': change(n_layer=6),
         'block_size = 8, batch_size = 128': change(block_size=8, batch_size=128),
         'block_size = 1, batch_size = 1024': change(block_size=1, batch_size=1024)}),
    Exercise(
        'Take the positions away',
        'In `forward`, put a `#` before the line that adds the position embeddings.',
        'Can the model still know that `th` is not `ht`?',
        'Attention by itself ignores order: it takes a weighted mean, and a mean does not depend '
        'on the order of its terms. But each position still knows its own character, so `th` and '
        '`ht` differ in which comes last. And the causal mask lets the first position read one '
        'character, the second two, and so on: later layers can recover some of the order from '
        'that.',
        {'no positions': change(('x = x + self.position_embedding_table(positions)',
                                 '# x = x + self.position_embedding_table(positions)'))}),
    Exercise(
        'Let it see the future',
        'Change `is_causal=True` to `is_causal=False`.',
        'How low will the loss go, and how good will the text be?',
        'The target of each position but the last is the character at the next one. Now the model'
        ' can see it there, and learns to copy it. In generation there is no next character to '
        'copy, and it has learned nothing else. A loss that is too good to be true usually means '
        'a bug.',
        {'is_causal=False': change((FUSED, 'dropout_p=dropout_p, is_causal=False)'))},
        '{val:.2f}; it generates: `{sample}`'),
    Exercise(
        'Remove the residual paths',
        'Write `x = self.sa(self.ln1(x))`, and `return self.ffwd(self.ln2(x))` below it.',
        'Does it learn more slowly, or does it learn something else?',
        'Without the sums, what a block does not pass on is lost, and the gradient has to go '
        'through every layer on its way back. {letters:.2f} is the loss of a unigram model, '
        'which knows only how frequent each character is: a model with this loss has learned '
        'nothing about which characters follow which.',
        {'no residual paths': change(('x = x + self.sa(self.ln1(x))', 'x = self.sa(self.ln1(x))'),
                                     ('return x + self.ffwd(self.ln2(x))',
                                      'return self.ffwd(self.ln2(x))'))},
        '{val:.2f} (letter frequencies alone: {letters:.2f})'),
    Exercise(
        'Leave out the scale',
        'Give `scaled_dot_product_attention` one more argument, `scale=1.0`, so that the scores '
        'are not divided by the square root of the head size. Do it with the heads as they are, '
        'then with one wide head: `n_embd = 256`, `n_head = 1`, `n_layer = 1`.',
        'For which heads does the scale matter more, narrow or wide ones?',
        'A score is a sum of as many products as the head has channels, so its variance grows '
        'with the head size. Before training, scores are random. If they are large too, softmax'
        ' puts nearly all the weight on one arbitrary position, and there its gradient is close'
        ' to zero, so little is learned. In narrow heads the scores start out small enough to '
        'avoid this.',
        {'narrow heads, scale=1.0': change(WITHOUT_SCALE),
         'one wide head, scaled': change(n_embd=256, n_head=1, n_layer=1),
         'one wide head, scale=1.0': change(WITHOUT_SCALE, n_embd=256, n_head=1, n_layer=1)}),
    Exercise(
        'The plain mean of the past',
        'Below the line that splits `self.qkv(x)`, write `q = torch.zeros_like(q)`.',
        'What is left of attention when all scores are equal?',
        'Queries of zero make all scores zero, and softmax makes equal weights of them: each '
        'position gets the mean of the values so far. The model still knows which characters '
        'came before, but a character far back counts as much as the last one. The gap to the '
        'unchanged `gpt.py` is what learned attention weights are worth.',
        {'plain mean': change((QKV, QKV + '\n        q = torch.zeros_like(q)'))}),
    Exercise(
        'Another activation function',
        'Change `nn.ReLU()` to `nn.GELU()`, which GPT-2 uses, then to `nn.Identity()`, which does '
        'nothing.',
        'Does the shape of the activation function matter, or only that there is one?',
        'GELU is a smoother ReLU; here it makes no difference. Without any, the two linear '
        'layers of feed-forward are together one linear layer. The model is not linear even so:'
        ' attention multiplies, softmax and layer norm are not linear either.',
        {'GELU': change(('nn.ReLU()', 'nn.GELU()')),
         'no activation': change(('nn.ReLU()', 'nn.Identity()'))}),
    Exercise(
        'Weight tying',
        'At the end of `GPTLanguageModel.__init__`, put `self.lm_head.weight = '
        'self.token_embedding_table.weight` ([Press and Wolf 2016]'
        '(https://arxiv.org/abs/1608.05859)).',
        'One matrix now does the work of two: does that help, or hurt?',
        'What a character means as an input and what it means as a prediction have something in '
        'common, and GPT-2 uses one matrix for both. There it saves tens of millions of weights. '
        'Here the vocabulary is so small that there is little to save.',
        {'tied weights': change(
            ('nn.init.normal_(self.position_embedding_table.weight, std=0.1)',
             'nn.init.normal_(self.position_embedding_table.weight, std=0.1)\n'
             '        self.lm_head.weight = self.token_embedding_table.weight'))}),
    Exercise(
        'Another tokenizer',
        'Turn the text into lower case where it is read. Then, instead of that, let the 300 most '
        'frequent pairs of characters be tokens beside the single characters, and let `encode` '
        'take a pair wherever it can. Multiply the losses by `len(data) / len(text)`, tokens per '
        'character, so that they are still in nats per character.',
        'Which of the two losses can be compared with the old one?',
        'In lower case the loss is lower because the task is easier: no capital letter has to be '
        'predicted, and none is ever written. Losses compare only if the texts to be predicted '
        'are the same. With pairs they are, once the loss is counted per character; the loss per '
        'token is higher, since a token says more. Large models use tens or hundreds of thousands'
        ' of tokens, usually found by byte pair encoding: merge the most frequent pair into a new'
        ' token, count again, repeat.',
        {'lower case': change(LOWER_CASE), '300 pairs': change(*PAIRS)}),
    Exercise(
        'Overfitting, and dropout against it',
        'Cut the text down to its first 20,000 characters: `text = text[:20_000]`, above the line '
        'that makes `chars`; set `eval_interval` to 100. Then set `dropout` to 0.3.',
        'Which of the two losses, train and val, will go on falling to the end?',
        'There are many more weights than characters, so the model can memorise the training '
        'text, which does not help it with other text: the training loss falls, and the '
        'validation loss rises again. Dropout makes memorising harder. More text is the better '
        'cure.',
        {'dropout = 0.0': change(text=beginning, eval_interval=100, dropout=0.0),
         'dropout = 0.3': change(text=beginning, eval_interval=100, dropout=0.3)},
        'train {train:.2f}, val {val:.2f} (at best {best:.2f}, at step {best_step})'),
    Exercise(
        'Your own text',
        'Put another text in the place of `input.txt`, ideally a million characters or more. We '
        "used the source code of Python's standard library.",
        'Can you compare its loss with that of the plays?',
        'The loss says how predictable a text is for this model. Program code is indented by many '
        'spaces that are easy to predict, but it has more different characters than the plays, and '
        'many names that occur in one file only. So a higher or lower loss does not mean that the '
        'model is worse or better.',
        {"Python's library": change(text=python_library)},
        '{val:.2f}; it generates: `{sample}`'),
    Exercise(
        'Heads',
        'Set `n_head` to 1, then to 16, each with `max_iters = 3000`.',
        'The number of weights stays the same: is it better to look in one way, with all channels, '
        'or in sixteen ways, with eight channels each?',
        'A head has one set of attention weights for each position. With several heads, a position '
        'can read the previous character and the start of the line at the same time. But a head '
        'with few channels can only ask simple questions. Short runs favour one wide head, '
        'which learns first, so this exercise takes more steps than the others.',
        {'n_head = 1': change(steps=3000, n_head=1),
         'n_head = 16': change(steps=3000, n_head=16)}),
    Exercise(
        'Another optimizer',
        "Hand the matrices in the blocks to `torch.optim.Muon` with "
        "`adjust_lr_fn='match_rms_adamw'`, the rest to AdamW, and set `learning_rate` to 4e-3. "
        'Muon needs the same learning rate schedule.',
        'How many steps would AdamW need for the loss that Muon reaches in 1,000?',
        'AdamW needs about 2,000: with `max_iters = 2000` it reaches 1.56. It scales each '
        'number of a gradient separately. Muon treats a matrix as a whole: it makes the update '
        'nearly orthogonal, so that it changes the output by as much in every direction, the '
        'rare ones too. It is not the default here because torch computes it in bfloat16, which'
        ' is slow on processors without units for that.',
        {'Muon': change(*MUON, learning_rate=4e-3)}),
    Exercise(
        'A cache of keys and values',
        '`generate` computes the keys and values of the whole context again for each character. '
        'Keep them instead, and compute only those of the new one. Nothing is trained: with the '
        'saved model and `top_k` = 1, the first `block_size` characters must stay the same: '
        'compare what `python gpt.py --prompt "FLINT:"` writes before and after.',
        'What must happen when the context is full?',
        'The keys and values of a position depend only on it and on earlier ones, so they stay '
        'valid as long as the positions keep their numbers. Two things are easy to miss: the new '
        "character's position is the number of those kept, not 0, and with a single query "
        '`is_causal=True` would hide all keys but the first. When the context is full, it slides: '
        'each character moves one position back, gets another position embedding, and everything '
        'that was kept is out of date. The solution begins again with the later half of the '
        'context, so that from there on the text may differ. (Most newer models use rotary '
        'embeddings, which depend only on the distance between positions and so avoid this.)',
        {'cache': change(*CACHE, run='cache')},
        'the first {same} of {total} characters are the same as without the cache (at least '
        'block_size should be); generating takes {ratio:.2f} times as long'),
    Exercise(
        'More than one machine',
        "Let several processes train one model, with torch's `DistributedDataParallel`: each "
        'computes the gradients of its part of the batch, and all take the same step with the '
        'mean of the gradients. Run `python -m torch.distributed.run --nproc_per_node 2 '
        'gpt.py`, which is also called `torchrun`.',
        'What must be the same in the two processes, and what must differ?',
        'The weights must be the same, so both processes build the model with the same seed; '
        'the batches must differ, so each process draws them with a seed of its own. Process 0 '
        'alone writes and prints. The mean of the gradients of two half batches is the gradient'
        ' of the whole batch, so the loss should match that of a single process, apart from the'
        ' different random batches. On several GPUs, use `nccl` instead of `gloo` and `device ='
        " 'cuda:' + os.environ['LOCAL_RANK']`; on several machines, run the same command on "
        'each, with `--nnodes`, `--rdzv_backend c10d` and `--rdzv_endpoint` (address and port '
        'of one of them).',
        {'two processes': change(*PARALLEL, run='torchrun')}),
], start=1))


def solution(variant, source, steps=None, **settings):
    """The source of gpt.py with a variant's edits; ValueError where they do not fit."""
    for old, new in variant.edits:
        if source.count(old) != 1:
            raise ValueError('gpt.py must be unedited (undo your edits), but it has this '
                             f'{source.count(old)} times, not once: {old.strip()}')
        source = source.replace(old, new)
    steps = steps or variant.steps
    values = {**({'max_iters': steps} if steps else {}), **variant.settings, **settings}
    for name, value in values.items():
        line = rf'(?m)^{name} = [^#\n]*?(?=(  #.*)?$)'  # up to the comment
        source, found = re.subn(line, f'{name} = {value!r}', source)
        if found != 1:
            raise ValueError(f'gpt.py has {found} lines that set {name}, not one')
    return source


def measure(variant, source, steps=None, echo=False, env=None, **settings):
    """Runs a variant in a folder of its own; a dictionary of results."""
    text = (PROJECT / 'input.txt').read_text(encoding='utf-8-sig')
    if variant.text:
        text = variant.text(text)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / 'input.txt').write_text(text, encoding='utf-8')
        (folder / 'gpt.py').write_text(solution(variant, source, steps, **settings), 'utf-8')
        if variant.run in ('prompt', 'cache'):
            if not (PROJECT / 'gpt.pt').exists():
                raise ValueError('there is no gpt.pt yet: run python gpt.py first')
            shutil.copy(PROJECT / 'gpt.pt', folder)
        if variant.run == 'cache':
            (folder / 'plain.py').write_text(solution(change(), source, **settings), 'utf-8')
            return compare_caches(folder)
        torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
        command = [sys.executable, *(torchrun if variant.run == 'torchrun' else []), 'gpt.py',
                   *(['--prompt', 'The '] if variant.run == 'prompt' else [])]
        env = {**os.environ, 'PYTHONIOENCODING': 'utf-8', **(env or {}),
               'CUDA_VISIBLE_DEVICES': ''}
        out = ''
        with open(folder / 'errors', 'w+', encoding='utf-8', errors='replace') as errors:
            with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=errors,
                                  encoding='utf-8', env=env) as process:
                for line in process.stdout:
                    out += line
                    if echo:
                        print('   ', line, end='', flush=True)
            errors.seek(0)
            message = errors.read()
        if process.returncode and 'the loss is not a number' not in message:
            raise ValueError(message.strip()[-2000:])
    return read_results(out, text)


def read_results(out, text):
    """What a run on this text printed, in figures, and what letter frequencies alone score."""
    steps = re.findall(r'(?m)^step (\d+): train loss (\S+), val loss (\S+)$', out)
    generated = out.partition('They generate:\n')[2] if steps else out
    words, known = re.findall("[A-Za-z']+", generated), set(re.findall("[A-Za-z']+", text))
    result = {'sample': ' / '.join(generated.split('\n')).replace('`', "'").strip()[:60],
              'words': sum(word in known for word in words) / max(len(words), 1)}
    train, val = text[:len(text) * 9 // 10], text[len(text) * 9 // 10:]
    counts = Counter(train + ''.join(set(text)))  # no character has a count of 0
    result['letters'] = -sum(n * math.log(counts[c] / counts.total())
                             for c, n in Counter(val).items()) / len(val)
    if steps:
        result.update(train=float(steps[-1][1]), val=float(steps[-1][2]))
        result['best'], result['best_step'] = min((float(val), int(step)) for step, _, val in steps)
    return result


def compare_caches(folder):
    """Generates with the saved model, without and with the cache, and compares text and time."""
    os.environ['CUDA_VISIBLE_DEVICES'] = ''  # before torch looks for GPUs
    import torch
    torch.set_num_threads(1)
    texts, times = [], []
    for name in ('plain.py', 'gpt.py'):
        script = runpy.run_path(str(folder / name))
        model, chars = script['load']()
        start = torch.zeros((1, 1), dtype=torch.long)
        model.generate(start, 10)  # the first call is slower
        started = time.time()
        texts.append(model.generate(start, 500, top_k=1)[0, 1:].tolist())
        times.append(time.time() - started)
    same = next((i for i, (a, b) in enumerate(zip(*texts)) if a != b), 500)
    return {'same': same, 'total': 500, 'ratio': times[1] / times[0]}


def baseline_of(variant):
    """What a variant is compared with: the same run of gpt.py as it is."""
    return change(steps=variant.steps, run='prompt' if variant.run == 'prompt' else 'train')


def show(number, source):
    """Prints an exercise's variants as diffs of gpt.py."""
    for name, variant in EXERCISES[number].variants.items():
        solved = solution(variant, source)
        print(f'# {name}')
        if variant.text:
            print(f'# input.txt: {(variant.text.__doc__ or variant.text.__name__).strip()}')
        print(*difflib.unified_diff(source.splitlines(), solved.splitlines(), 'gpt.py',
                                    'gpt.py', lineterm=''), '', sep='\n')


def work(number, source, steps=None):
    """Measures an exercise's variants, and what they are compared with."""
    exercise = EXERCISES[number]
    print(f'{number}. {exercise.title}. {exercise.predict}')
    print('(It runs in temporary folders: your gpt.py and gpt.pt stay as they are.)\n')
    first = next(iter(exercise.variants.values()))
    alone = first.run == 'cache' or first.text is beginning  # there, nothing to compare with
    as_it_is = {} if alone else {'gpt.py as it is': baseline_of(first)}
    for variant in exercise.variants.values():
        solution(variant, source)  # an edited gpt.py fails here, before anything is trained
    lines = ['']
    for name, variant in {**as_it_is, **exercise.variants}.items():
        print(f'{name}:', flush=True)
        result = measure(variant, source, steps, echo=True)
        lines.append(f'{name}: {exercise.report.format(**result)}')
    if exercise.report == '{val:.2f}':
        lines[0] = '\nvalidation loss'
    if steps:
        lines.append(f'(after {steps} steps; the explanation is about the full run)')
    print(*lines, '', exercise.why.format(**result), sep='\n')


def work_all(source, steps=None):
    """Measures everything, two at a time where times do not count; prints the README's table."""
    started = time.time()
    as_it_is = {'gpt.py as it is, 1,000 steps': change(),
                'gpt.py as it is, 3,000 steps': change(steps=3000),
                'the saved model as it is': change(run='prompt')}
    jobs = [('', 'Baseline', name, variant, EXERCISES[1].report if variant.run == 'prompt'
             else '{val:.2f}') for name, variant in as_it_is.items()]
    jobs += [(number, exercise.title, name, variant, exercise.report)
             for number, exercise in EXERCISES.items()
             for name, variant in exercise.variants.items()]

    def row(job):
        number, title, name, variant, report = job
        try:
            result = report.format(**measure(variant, source, steps, env={'OMP_NUM_THREADS': '1'}))
        except ValueError as error:
            result = f'failed: {error}'
        print(number, title, name, result, sep=' | ', flush=True)
        return f'| {number} | {title} | {name} | {result} |'

    alone = [job for job in jobs if job[3].run in ('cache', 'torchrun')]
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(row, [job for job in jobs if job not in alone]))
    rows += map(row, alone)
    print('\n| | exercise | change | result |\n|---|---|---|---|', *rows, sep='\n')
    print(f'\nmeasured in {(time.time() - started) / 60:.0f} minutes')


if __name__ == '__main__':
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='replace', line_buffering=True)
    parser = argparse.ArgumentParser(description='The exercises of the README, worked.')
    parser.add_argument('number', nargs='?', type=int, help='the exercise')
    parser.add_argument('--show', action='store_true', help='print its solution as a diff')
    parser.add_argument('--all', action='store_true', help='measure all (23 minutes on two cores)')
    parser.add_argument('--steps', type=int, help='train for this many steps')
    arguments = parser.parse_args()
    source = (PROJECT / 'gpt.py').read_text(encoding='utf-8')
    try:
        if arguments.steps is not None and arguments.steps < 1:
            raise ValueError('--steps: use a whole number above 0')
        elif arguments.show and arguments.number is None:
            raise ValueError('--show needs the number of an exercise')
        elif arguments.all:
            work_all(source, arguments.steps)
        elif arguments.number is None:
            print(*(f'{number:2}. {exercise.title}' for number, exercise in EXERCISES.items()),
                  sep='\n')
        elif arguments.number not in EXERCISES:
            raise ValueError(f'the exercises have the numbers 1 to {len(EXERCISES)}')
        elif arguments.show:
            show(arguments.number, source)
        else:
            work(arguments.number, source, arguments.steps)
    except ValueError as error:
        sys.exit(f'exercises.py: {error}')
    except KeyboardInterrupt:
        sys.exit('exercises.py: stopped by Ctrl-C')
    except BrokenPipeError:  # `| head -1`, for example
        os._exit(130)
