"""A GPT: a transformer that learns to write from one text file, a character at a time.

    python gpt.py                      train on input.txt, then write 500 characters
    python gpt.py --prompt "ROMEO:"    go on from these words with the model in gpt.pt

Expect about five minutes on two CPU cores. The loss starts a little above 4.17, which is blind
guessing among 65 characters (ln 65), and ends near 1.4; the samples on the way turn from noise
into words. The best weights so far are always in gpt.pt, so Ctrl-C loses nothing: it stops, and
lets them write. Read bigram.py first: `diff bigram.py gpt.py` shows what a transformer adds to it.
"""
import argparse
import math
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

# --- Hyperparameters: change them, run again, and see.
device = 'cuda' if torch.cuda.is_available() else 'cpu'  # where the arithmetic happens
gpu = device == 'cuda'  # where a line has two values, the first is for a GPU, the second for a CPU
batch_size = 64 if gpu else 8  # how many pieces of text one training step looks at
block_size = 256 if gpu else 128  # how many characters long each piece is: as far as it looks back
max_iters = 5000 if gpu else 7200  # training steps
eval_interval = 500 if gpu else 400  # steps from one loss estimate to the next
eval_iters = 50 if gpu else 30  # batches that one estimate averages, for each split
learning_rate = 1e-3 if gpu else 1.5e-3  # size of the largest steps
warmup_iters = 100  # steps in which the learning rate rises to that; then it falls to 0
n_embd = 384 if gpu else 128  # numbers that describe a character on its way through the model
n_head = 6 if gpu else 4  # attention heads in a block, each n_embd / n_head numbers wide
n_layer = 6 if gpu else 3  # blocks, one after another
dropout = 0.2 if gpu else 0.0  # share of the numbers silenced in training, against memorising
fused_attention = True  # torch's fast attention; False: the same thing, spelled out
temperature = 0.8  # below 1 it writes more carefully, above 1 more wildly
top_k = None  # draw from the k likeliest characters only; None: from all of them
seed = 1337  # same seed, same machine: same losses, same text


# --- Settings that cannot work end the run here, with one line that says what to do.
def need(fact, remedy):
    """Unless fact is true, exits with status 1 and the remedy on standard error."""
    if not fact:
        sys.exit(f'{Path(__file__).name}: {remedy}')


for name in ('batch_size', 'block_size', 'max_iters', 'eval_interval', 'eval_iters',
             'warmup_iters', 'n_embd', 'n_head', 'n_layer', 'top_k'):
    value = globals()[name]
    need(isinstance(value, int) and value > 0 or (name == 'top_k' and value is None),
         f'{name} = {value}: use a whole number above 0')
need(learning_rate > 0, f'learning_rate = {learning_rate}: use a number above 0')
need(temperature > 0, f'temperature = {temperature}: use a number above 0')
need(0 <= dropout <= 1, f'dropout = {dropout}: use a number from 0 to 1')
need(n_embd % n_head == 0, f'n_embd = {n_embd}: use a multiple of n_head, {n_head}')
need(device != 'cuda' or torch.cuda.is_available(), "device = 'cuda': there is none, use 'cpu'")
torch.manual_seed(seed)

# --- The text, and a tokenizer that turns it into numbers.
try:
    text = Path(__file__).with_name('input.txt').read_text(encoding='utf-8-sig')
except (OSError, UnicodeError) as problem:
    need(False, f'cannot read input.txt ({problem}): put a UTF-8 text file of that name beside me')
need(text, 'input.txt is empty: put some text into it')

chars = sorted(set(text))  # the vocabulary: every character that occurs
vocab_size = len(chars)
itos = dict(enumerate(chars))  # integer to string
stoi = {character: i for i, character in itos.items()}  # string to integer


def encode(string):
    """The token ids of a string, as a list; KeyError for a character that the text lacks."""
    return [stoi[character] for character in string]


def decode(ids):
    """The string that a list of token ids stands for."""
    return ''.join(itos[i] for i in ids)


# Nothing trains on the last tenth. How well it is predicted tells learning from memorising.
data = torch.tensor(encode(text), dtype=torch.long)
boundary = len(data) * 9 // 10
train_data, val_data = data[:boundary], data[boundary:]


def get_batch(split, generator=None):
    """Random pieces of the 'train' or 'val' text: inputs x, targets y, (batch_size, block_size).

    y is x moved on by one: y[b, t] is what comes after x[b, :t + 1]. So one piece is block_size
    exercises in prediction, from a context of one character up to block_size of them.
    """
    windows = (train_data if split == 'train' else val_data).unfold(0, block_size + 1, 1)
    starts = torch.randint(len(windows), (batch_size,), generator=generator)
    pieces = windows[starts].to(device)  # (batch_size, block_size + 1)
    return pieces[:, :-1], pieces[:, 1:]


@torch.no_grad()
def estimate_loss():
    """The loss of the model below, in nats per character: {'train': ..., 'val': ...}.

    One batch is a noisy witness; this is the mean over eval_iters. They are the same ones each
    time, from a generator of their own, so that estimates compare and training is not disturbed.
    """
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    losses = {}
    for split in ('train', 'val'):
        batches = [get_batch(split, generator) for _ in range(eval_iters)]
        losses[split] = sum(model(x, y)[1].item() for x, y in batches) / eval_iters
    model.train(was_training)
    return losses


# --- The model, from its smallest part to the whole.
class MultiHeadAttention(nn.Module):
    """Every position gathers what it needs from itself and the positions before it.

    It makes three vectors of its own: a query (what I look for), a key (what I have) and a value
    (what I tell). The better a query fits a key, the more of that value it takes in. Heads do so
    side by side, each for a relation of its own. Vaswani et al. 2017, arxiv.org/abs/1706.03762
    """

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)  # queries, keys, values of all heads
        self.proj = nn.Linear(n_embd, n_embd)  # mixes what the heads found

    def forward(self, x):
        """(B, T, n_embd) to (B, T, n_embd)."""
        B, T, C = x.shape
        head_size = C // n_head
        q, k, v = self.qkv(x).view(B, T, 3, n_head, head_size).permute(2, 0, 3, 1, 4)
        silenced = dropout if self.training else 0.0
        if fused_attention:
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=silenced, is_causal=True)
        else:
            # Each of q, k, v is (B, n_head, T, head_size). A dot product of head_size terms grows
            # with their root; unscaled, softmax would put all on one position and stop learning.
            scores = q @ k.transpose(-2, -1) / math.sqrt(head_size)  # (B, n_head, T, T)
            future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(diagonal=1)
            scores = scores.masked_fill(future, -math.inf)  # nobody sees what is to be predicted
            weights = F.dropout(scores.softmax(dim=-1), silenced)  # each row says whom to hear
            out = weights @ v  # (B, n_head, T, head_size)
        out = out.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return F.dropout(self.proj(out), silenced)


class FeedForward(nn.Sequential):
    """Every position thinks over, on its own, what it gathered: (B, T, n_embd) to the same."""

    def __init__(self):
        super().__init__(
            nn.Linear(n_embd, 4 * n_embd),
            nn.ReLU(),
            nn.Linear(4 * n_embd, n_embd),
            nn.Dropout(dropout),
        )


class Block(nn.Module):
    """Gather, then think, each added to what was there before.

    The sums (residual connections, He et al. 2015, arxiv.org/abs/1512.03385) give the gradient a
    straight way down through any number of blocks. Only what enters a part is normalised, never
    the sum, which keeps that way clear (pre-norm, Xiong et al. 2020, arxiv.org/abs/2002.04745).
    """

    def __init__(self):
        super().__init__()
        self.ln1 = nn.LayerNorm(n_embd)
        self.sa = MultiHeadAttention()
        self.ln2 = nn.LayerNorm(n_embd)
        self.ffwd = FeedForward()

    def forward(self, x):
        """(B, T, n_embd) to (B, T, n_embd)."""
        x = x + self.sa(self.ln1(x))
        x = x + self.ffwd(self.ln2(x))
        return x


class GPTLanguageModel(nn.Module):
    """Predicts the next character from up to block_size characters before it.

    The design is GPT-2's, Radford et al. 2019, "Language Models are Unsupervised Multitask
    Learners": learned positions, pre-norm blocks, one more normalisation before the output.
    """

    def __init__(self, vocab_size=vocab_size):
        super().__init__()
        self.token_embedding_table = nn.Embedding(vocab_size, n_embd)  # which character it is
        self.position_embedding_table = nn.Embedding(block_size, n_embd)  # where it stands
        self.blocks = nn.Sequential(*[Block() for _ in range(n_layer)])
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size)  # a logit for each character
        # Where the weights start decides how fast they learn. Embeddings of size 1, as torch makes
        # them, would drown what the blocks add. And each adds little, so that the sum stays small.
        nn.init.normal_(self.token_embedding_table.weight, std=0.1)
        nn.init.normal_(self.position_embedding_table.weight, std=0.1)
        for block in self.blocks:
            for last in (block.sa.proj, block.ffwd[2]):
                last.weight.data /= math.sqrt(2 * n_layer)

    @torch.autocast('cuda', dtype=torch.bfloat16, enabled=gpu)  # matrix work at half the bits
    def forward(self, idx, targets=None):
        """Token ids (B, T) to logits (B, T, vocab_size), and with targets (B, T) to the loss too.

        The loss is the cross-entropy in nats per character: the mean of -ln(p), p being the
        probability that the right character got. Blind guessing costs ln(vocab_size), and least
        of all costs to give every character the share of cases in which it really comes next.
        """
        positions = torch.arange(idx.shape[1], device=idx.device)
        x = self.token_embedding_table(idx)  # (B, T, n_embd)
        x = x + self.position_embedding_table(positions)  # the same (T, n_embd) for every piece
        x = self.blocks(x)  # (B, T, n_embd)
        logits = self.lm_head(self.ln_f(x)).float()  # (B, T, vocab_size)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # B * T cases

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=temperature, top_k=top_k):
        """Writes on from idx (B, T), one character at a time: (B, T + max_new_tokens)."""
        was_training = self.training
        self.eval()
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -block_size:])  # never more than it was trained on
            logits = logits[:, -1]  # scores for what follows the last one: (B, vocab_size)
            logits = logits / temperature  # a low one widens the gaps, so that the likeliest win
            if top_k is not None:
                least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
                logits = logits.masked_fill(logits < least, -math.inf)
            drawn = torch.multinomial(logits.softmax(dim=-1), num_samples=1)  # (B, 1)
            idx = torch.cat((idx, drawn), dim=1)
        self.train(was_training)
        return idx


model = GPTLanguageModel()
m = model.to(device)

# --- The model on disk.
kept = Path(__file__).with_name('gpt.pt')
unfinished = Path(__file__).with_name('gpt.pt.tmp')
config = {'block_size': block_size, 'n_embd': n_embd, 'n_head': n_head, 'n_layer': n_layer}


def save():
    """Writes the model beside gpt.pt; moved there when whole, it replaces that at a stroke."""
    try:
        torch.save({'model': model.state_dict(), 'config': config, 'chars': chars}, unfinished)
    except (OSError, RuntimeError):
        need(False, f'cannot write {unfinished}: make the folder writable, or room on the disk')


def load():
    """The model in gpt.pt and the characters it knows; exits if they do not fit this script."""
    need(kept.exists(), 'there is no gpt.pt yet: run me without --prompt, to train one')
    warnings.simplefilter('ignore')  # of a foreign file, torch would say more than one line
    try:
        saved = torch.load(kept, map_location=device, weights_only=True)
        differing = [f'{name} = {saved["config"][name]}, here it is {config[name]}'
                     for name in config if saved['config'][name] != config[name]]
        need(not differing, f'gpt.pt has {", ".join(differing)}: make them equal, or train anew')
        loaded = GPTLanguageModel(len(saved['chars'])).to(device)
        loaded.load_state_dict(saved['model'])
        return loaded, saved['chars']
    except Exception:
        need(False, 'gpt.pt is damaged, or no model of mine: move it away, and train anew')


# --- Training: guess, see how wrong, change every weight a little for the better; then again.
if __name__ == '__main__':
    parser = argparse.ArgumentParser(description='Trains a GPT on input.txt and lets it write.')
    parser.add_argument('--prompt', help='train nothing; go on from this text with gpt.pt')
    prompt = parser.parse_args().prompt
    # Show each line at once, and a ? for a letter that the terminal does not have.
    sys.stdout.reconfigure(line_buffering=True, errors='replace')

    if prompt is not None:
        m, chars = load()
        itos = dict(enumerate(chars))  # input.txt may have changed since
        stoi = {character: i for i, character in itos.items()}
        unknown = sorted(set(prompt) - set(chars))
        need(prompt, '--prompt is empty: give me a character or more to go on from')
        need(not unknown, f'--prompt has {unknown}, which the model never saw: leave that out')
        context = torch.tensor([encode(prompt)], device=device)
        print(decode(m.generate(context, max_new_tokens=500)[0].tolist()))
        sys.exit()

    need(min(len(train_data), len(val_data)) > block_size,
         f'input.txt is too short: its last tenth has {len(val_data)} characters; block_size = '
         f'{block_size} needs one more than that: add text, or lower block_size')
    best = math.inf
    try:
        n_parameters = sum(p.numel() for p in model.parameters())
        print(f'{len(text):,} characters, {vocab_size} different ones; '
              f'{n_parameters:,} parameters; {max_iters:,} steps on {device}')
        save()  # if the folder cannot be written to, now is the time to know
        unfinished.unlink()
        # Weight decay keeps matrices small, against memorising; biases and norms are left alone.
        matrices = [p for p in model.parameters() if p.dim() == 2]
        vectors = [p for p in model.parameters() if p.dim() == 1]
        optimizer = torch.optim.AdamW(
            [{'params': matrices, 'weight_decay': 0.1}, {'params': vectors, 'weight_decay': 0.0}],
            lr=learning_rate, betas=(0.9, 0.99), fused=True)
        # The first gradients are wild, so the step size rises from almost 0; then down, to settle.
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup_iters, 1 - step / max_iters))
        started = time.time()

        for step in range(max_iters + 1):
            if step % eval_interval == 0 or step == max_iters:
                pace = (time.time() - started) / max(step, 1)
                losses = estimate_loss()
                print(f"step {step}: train loss {losses['train']:.4f}, "
                      f"val loss {losses['val']:.4f}, "
                      f'{1000 * pace:.0f} ms a step, {(max_iters - step) * pace:.0f} s left')
                need(losses['val'] < math.inf, 'the loss is not a number: lower learning_rate')
                if step > 0 and losses['val'] < best:
                    best = losses['val']
                    save()
                    unfinished.replace(kept)
                with torch.random.fork_rng([device] if gpu else []):  # to watch is not to disturb
                    context = torch.zeros((1, 1), dtype=torch.long, device=device)
                    sample = decode(m.generate(context, max_new_tokens=80)[0].tolist())
                print('    ' + sample.strip().replace('\n', ' / '))
            if step == max_iters:
                break
            x, y = get_batch('train')
            logits, loss = model(x, y)
            optimizer.zero_grad()  # or the gradients would add to those of the last batch
            loss.backward()  # how the loss would change with each weight: the gradients
            optimizer.step()  # every weight a little, against its gradient
            schedule.step()
            if sys.stdout.isatty():
                print(f'step {step + 1} of {max_iters}', end='\r', flush=True)  # rewritten
    except KeyboardInterrupt:
        print('\nStopped by Ctrl-C.')
    need(best < math.inf, 'stopped before the first evaluation: there is nothing to keep yet')
    print(f'The best weights, val loss {best:.4f}, are in gpt.pt. They write:')
    m, chars = load()

    # --- Generation: from a single first character, token 0.
    context = torch.zeros((1, 1), dtype=torch.long, device=device)
    print(decode(m.generate(context, max_new_tokens=500)[0].tolist()))
