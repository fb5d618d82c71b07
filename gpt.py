"""A GPT: a transformer that learns from input.txt to write, one character at a time.

    python gpt.py                      train, save the model in gpt.pt, and generate 500 characters
    python gpt.py --prompt "FLINT:"    continue this text with the saved model

Training takes six to nine minutes on two CPU cores, to a val loss near 1.3. Read bigram.py first.
"""
import argparse
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

# --- Hyperparameters: change them, run again, and compare.
device = 'cuda' if torch.cuda.is_available() else 'cpu'  # where the model runs
gpu = str(device).startswith('cuda')  # below, `64 if gpu else 8` is 64 on a GPU and 8 on a CPU
batch_size = 64 if gpu else 8  # sequences per training step
block_size = 256 if gpu else 128  # context length: characters per sequence
max_iters = 5000 if gpu else 10_000  # training steps
eval_interval = 500  # steps from one loss estimate to the next
eval_iters = 50 if gpu else 30  # batches that one estimate averages, for each split
learning_rate = 1e-3 if gpu else 1.5e-3  # peak learning rate: how far a step moves the weights
warmup_iters = 100  # warm-up steps to the peak learning rate; linear decay to 0 spans the whole run
weight_decay = 0.1 if gpu else 0.3  # pulls weight matrices towards 0, against overfitting
n_embd = 384 if gpu else 128  # embedding dimension: how many numbers represent one position
n_head = 6 if gpu else 4  # attention heads per block, each of size n_embd / n_head
n_layer = 6 if gpu else 3  # blocks, one after another
dropout = 0.2 if gpu else 0.0  # dropout probability: fraction of activations zeroed in training
fused_attention = True  # torch's fast attention; False: the same computation, spelled out below
temperature = 0.8  # divides the logits in sampling: below 1 more predictable, above 1 more varied
top_k = None  # sample from the k most probable characters only; None: from all of them
seed = 1337  # random seed: on the same CPU, the same seed gives the same losses and text

# --- Text and tokenizer: a token is one character, and its id is its place in the vocabulary.
text, text_error = '', None
try:
    text = Path(__file__).with_name('input.txt').read_text(encoding='utf-8-sig')
except (OSError, UnicodeError) as error:
    text_error = f'cannot read input.txt ({error}): put a UTF-8 text file there'
chars = sorted(set(text))  # the vocabulary: every character that occurs in the text
vocab_size = len(chars)
stoi = {character: i for i, character in enumerate(chars)}  # string to integer, a token id


def encode(string):
    """The token ids of a string, as a list; KeyError if a character is not in the vocabulary."""
    return [stoi[character] for character in string]


def decode(ids):
    """The string that a list of token ids stands for."""
    return ''.join(chars[i] for i in ids)


data = torch.tensor(encode(text), dtype=torch.long)  # (number of characters)
train_data, val_data = data.tensor_split([len(data) * 9 // 10])  # last tenth: never trained on


def get_batch(split, generator=None):
    """Random sequences from the 'train' or 'val' split: inputs x and targets y, each (B, T).

    B = batch_size sequences, T = block_size positions in each ("time"). The target y[b, t] is the
    character after x[b, t]: T predictions to learn from, with contexts of 1 to T characters.
    """
    data = train_data if split == 'train' else val_data
    starts = torch.randint(len(data) - block_size, (batch_size, 1), generator=generator)  # (B, 1)
    positions = starts + torch.arange(block_size)  # broadcast: (B, 1) + (T) -> (B, T)
    x, y = data[positions], data[positions + 1]  # (B, T) each: y is x shifted by one
    return x.to(device), y.to(device)


@torch.no_grad()  # no gradients are needed here, and without them it takes less time and memory
def estimate_loss():
    """The model's mean loss on each split, in nats per character: {'train': ..., 'val': ...}.

    One batch gives a noisy loss, so this averages eval_iters of them, the same ones every time.
    The model never trains on val: if the val loss rises while train falls, it is overfitting.
    """
    model.eval()  # switches dropout off
    generator = torch.Generator().manual_seed(seed)
    losses = {}
    for split in ('train', 'val'):
        batch_losses = [model(*get_batch(split, generator))[1].item() for _ in range(eval_iters)]
        losses[split] = sum(batch_losses) / eval_iters
    model.train()  # switches it on again
    return losses


# --- Model, from parts to whole. Each position is represented by C = n_embd numbers, its channels.
class MultiHeadAttention(nn.Module):
    """Causal self-attention: each position reads itself and earlier ones. (B, T, C) -> (B, T, C)

    Every position makes a query (what it looks for), a key (what it offers) and a value (what it
    passes on). The better a query matches a key, the larger the weight of that value.
    Heads do this side by side, with queries, keys and values of their own. arxiv.org/abs/1706.03762
    """

    def __init__(self, n_head, head_size):
        super().__init__()
        self.n_head, self.head_size = n_head, head_size
        self.qkv = nn.Linear(n_embd, 3 * n_head * head_size, bias=False)  # for all heads at once
        self.proj = nn.Linear(n_head * head_size, n_embd)  # mixes the outputs of the heads
        # The blocks add 2 * n_layer outputs to x: this keeps x from growing with depth (GPT-2).
        self.proj.weight.data /= math.sqrt(2 * n_layer)

    def forward(self, x):
        B, T, C = x.shape  # batch, time, channels
        nh, hs = self.n_head, self.head_size  # number of heads, head size: nh * hs = C
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # (B, T, C) each
        # Split C into heads and put the head axis next to the batch: each head attends on its own.
        q, k, v = (z.view(B, T, nh, hs).transpose(1, 2) for z in (q, k, v))  # (B, nh, T, hs) each
        dropout_p = dropout if self.training else 0.0  # model.eval() sets self.training to False
        if not fused_attention:
            # scores[b, h, i, j]: how well the query at i matches the key at j, as a scaled dot
            # product. Unscaled, its variance grows with hs: softmax soon favours a single position.
            scores = q @ k.transpose(-2, -1) / math.sqrt(hs)  # (B, nh, T, T)
            # Causal mask: True where j > i, so that no position sees the answer. exp(-inf) = 0.
            causal_mask = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)  # (T, T)
            # Attention weights: each row sums to 1. If all scores were equal, the output would be
            # the mean of the values up to i; the scores turn that into a weighted mean.
            att = scores.masked_fill(causal_mask, -math.inf).softmax(dim=-1)  # (B, nh, T, T)
            out = F.dropout(att, dropout_p) @ v  # (B, nh, T, T) @ (B, nh, T, hs) -> (B, nh, T, hs)
        else:  # the same in one call, without storing a (T, T) matrix: (B, nh, T, hs)
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
        out = out.transpose(1, 2).flatten(2)  # (B, nh, T, hs) -> (B, T, nh, hs) -> (B, T, C)
        return F.dropout(self.proj(out), dropout_p)


class FeedForward(nn.Sequential):
    """Two linear layers that process each position separately. (B, T, C) -> (B, T, C)"""

    def __init__(self, n_embd):
        super().__init__(
            nn.Linear(n_embd, 4 * n_embd),  # (B, T, C) -> (B, T, 4C): 4 times as wide, as in GPT-2
            nn.ReLU(),  # without it, two linear layers could do no more than one
            nn.Linear(4 * n_embd, n_embd),  # (B, T, 4C) -> (B, T, C)
            nn.Dropout(dropout),
        )
        self[2].weight.data /= math.sqrt(2 * n_layer)  # as in MultiHeadAttention


class Block(nn.Module):
    """Attention to exchange information, then feed-forward to process it. (B, T, C) -> (B, T, C)

    Both add to x (residual connections, arxiv.org/abs/1512.03385), so that gradients flow straight
    to the first layers. Both normalise x before they read it (pre-norm, arxiv.org/abs/2002.04745).
    """

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.ln1 = nn.LayerNorm(n_embd)  # mean 0, variance 1 over C, then a learned scale and shift
        self.sa = MultiHeadAttention(n_head, n_embd // n_head)
        self.ln2 = nn.LayerNorm(n_embd)
        self.ffwd = FeedForward(n_embd)

    def forward(self, x):
        x = x + self.sa(self.ln1(x))
        return x + self.ffwd(self.ln2(x))


class GPTLanguageModel(nn.Module):
    """Predicts the next character from up to block_size before it. The layout is GPT-2's (Radford
    et al. 2019), but with ReLU, no q, k, v biases, an untied lm_head with bias, a different init.
    """

    def __init__(self, vocab_size=vocab_size):
        super().__init__()
        self.token_embedding_table = nn.Embedding(vocab_size, n_embd)  # a vector for each character
        self.position_embedding_table = nn.Embedding(block_size, n_embd)  # and for each position
        self.blocks = nn.Sequential(*[Block(n_embd, n_head) for _ in range(n_layer)])
        self.ln_f = nn.LayerNorm(n_embd)  # the last layer norm
        self.lm_head = nn.Linear(n_embd, vocab_size)  # from C numbers to a logit for each character
        # Random start: torch's std of 1 would outweigh what the blocks add, and slow down training.
        nn.init.normal_(self.token_embedding_table.weight, std=0.1)
        nn.init.normal_(self.position_embedding_table.weight, std=0.1)

    # bfloat16 (16 bits, not 32) is faster on GPUs with units for it; False: do not emulate it.
    @torch.autocast('cuda', torch.bfloat16, gpu and torch.cuda.is_bf16_supported(False))
    def forward(self, idx, targets=None):
        """Token ids (B, T) -> logits (B, T, vocab_size), and the loss if there are targets (B, T).

        The loss is the cross-entropy in nats per character: the mean of -ln(p), where p is the
        model's probability for the actual next character. 65 equally likely ones give ln 65 = 4.17.
        """
        positions = torch.arange(idx.shape[1], device=idx.device)  # (T)
        x = self.token_embedding_table(idx)  # (B, T, C): which characters these are
        x = x + self.position_embedding_table(positions)  # (B, T, C) + (T, C): and where they are
        x = self.blocks(x)  # (B, T, C)
        logits = self.lm_head(self.ln_f(x)).float()  # (B, T, vocab_size), float32 for the loss
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # mean over B * T

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=temperature, top_k=top_k):
        """Continues each row of idx by sampled tokens: (B, T) -> (B, T + max_new_tokens)."""
        was_training = self.training
        self.eval()  # switches dropout off
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -block_size:])  # (B, min(T, block_size), vocab_size)
            logits = logits[:, -1] / temperature  # (B, vocab_size): what may follow the last token
            if top_k is not None:
                kth_largest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
                logits = logits.masked_fill(logits < kth_largest, -math.inf)  # (B, vocab_size)
            idx_next = torch.multinomial(logits.softmax(dim=-1), num_samples=1)  # (B, 1)
            idx = torch.cat((idx, idx_next), dim=1)  # (B, T + 1)
        self.train(was_training)
        return idx


# --- Checks: on a bad setting, the script exits with one line that says how to fix it.
def check(condition, message):
    """If the condition is false, exits with status 1 and the message on standard error."""
    if not condition:
        sys.exit(f'{Path(__file__).name}: {message}')


def excepthook(kind, error, traceback):
    """Handles uncaught errors: no traceback for Ctrl-C, a closed pipe or too little memory."""
    if kind is KeyboardInterrupt:
        print(f'{Path(__file__).name}: stopped by Ctrl-C', file=sys.stderr)
    if kind in (KeyboardInterrupt, BrokenPipeError):  # closed pipe: `| head -1`, for example
        os._exit(130)
    check('allocate' not in str(error), 'out of memory: lower batch_size, block_size or n_embd')
    sys.__excepthook__(kind, error, traceback)


sys.excepthook = excepthook if __name__ == '__main__' else sys.excepthook
for name in ('batch_size', 'block_size', 'max_iters', 'eval_interval', 'eval_iters',
             'warmup_iters', 'n_embd', 'n_head', 'n_layer', 'top_k', 'seed'):
    value = globals()[name]
    check(type(value) is int and abs(value) < 1e9 and (value > 0 or name == 'seed')
          or name == 'top_k' and value is None,
          f'{name} = {value!r}: use a whole number above 0 and below 1e9, written like 10_000')
for name, low, high in (('learning_rate', 1e-9, 1e6), ('weight_decay', 0, 1e6),
                        ('dropout', 0, 0.99), ('temperature', 1e-6, 1e6)):
    value = globals()[name]
    check(type(value) in (int, float) and low <= value <= high,
          f'{name} = {value!r}: use a number from {low} to {high}')
check(n_embd % n_head == 0, f'n_embd = {n_embd}: use a multiple of n_head = {n_head}')
try:
    torch.zeros(1, device=torch.device(device)).item()
except Exception:  # torch raises errors of many types here
    check(False, f"device = {device!r}: torch cannot use that here, use 'cpu'")
torch.manual_seed(seed)
model = m = GPTLanguageModel(vocab_size or 1).to(device)  # or 1: --prompt works without input.txt

# --- Checkpoint: a file with the weights, and the sizes and vocabulary needed to load them.
checkpoint_path = Path(__file__).with_name('gpt.pt')
tmp_path = Path(__file__).with_name('gpt.pt.tmp')
config = {'block_size': block_size, 'n_embd': n_embd, 'n_head': n_head, 'n_layer': n_layer}


def save(path=checkpoint_path):
    """Writes a temporary file, then renames it, so path is never half-written; or exits."""
    try:
        torch.save({'model': model.state_dict(), 'config': config, 'chars': chars}, tmp_path)
        tmp_path.replace(path)
        tmp_path.unlink(missing_ok=True)  # after a test write, where path is tmp_path
    except (OSError, RuntimeError):
        check(False, f'cannot write {tmp_path}: make the folder writable, or free some disk space')


def load():
    """The model in gpt.pt and its vocabulary, a list of characters; exits if they do not fit."""
    check(checkpoint_path.exists(), 'there is no gpt.pt yet: train a model first, without --prompt')
    try:
        checkpoint = torch.load(checkpoint_path, map_location='cpu', weights_only=True)
        saved, loaded = checkpoint['config'], GPTLanguageModel(len(checkpoint['chars']))
        check(saved == config, f'gpt.pt was trained with {saved}: set these, or train again')
        loaded.load_state_dict(checkpoint['model'])
        return loaded.to(device), checkpoint['chars']
    except Exception as error:
        check(False, f'cannot use gpt.pt ({error!r:.200}): train again, without --prompt')


# --- Training
def evaluate(step, best):
    """Prints losses and a sample, saves the model if it is the best; returns the best val loss."""
    losses = estimate_loss()
    print(f"step {step}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
    check(losses['val'] < float('inf'), 'the loss is not a number: lower learning_rate')
    with torch.random.fork_rng([device] if gpu else []):  # sampling must not change the batches
        sample = model.generate(torch.zeros((1, 1), dtype=torch.long, device=device), 80)[0]
    print('    ' + decode(sample.tolist()).strip().replace('\n', ' / '))
    if step > 0 and losses['val'] < best:  # step 0 is untrained
        save()
        best = losses['val']
    return best


def train():
    """Adjusts the weights, batch by batch, to make the actual next characters more probable."""
    check(len(val_data) > block_size, text_error or f'input.txt is too short: its last tenth has '
          f'{len(val_data)} characters, and needs more than block_size = {block_size}: add text')
    check(not checkpoint_path.is_dir(), 'gpt.pt is a folder: move it away')
    save(tmp_path)  # a test write: better to fail now than after training
    print(f'{len(text):,} characters, {vocab_size} different; {max_iters:,} steps on {device}; '
          f'{sum(p.numel() for p in model.parameters()):,} parameters')
    optimizer = torch.optim.AdamW([
        {'params': [p for p in model.parameters() if p.dim() >= 2], 'weight_decay': weight_decay},
        {'params': [p for p in model.parameters() if p.dim() < 2], 'weight_decay': 0.0},
    ], lr=learning_rate, betas=(0.9, 0.99), fused=True)  # betas: averages over ~10 and ~100 steps
    # Warm up: AdamW's running averages are unreliable until they have seen enough gradients.
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup_iters, 1.0, warmup_iters)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=max_iters)
    scheduler = torch.optim.lr_scheduler.ChainedScheduler([warmup, decay])
    started, best = time.time(), math.inf
    try:
        for step in range(max_iters):
            if step % eval_interval == 0:
                best = evaluate(step, best)
            x, y = get_batch('train')  # (B, T) each
            logits, loss = model(x, y)
            optimizer.zero_grad()  # otherwise the gradients would add to those of the last step
            loss.backward()  # the gradient: how fast the loss rises with each weight
            optimizer.step()  # moves every weight a little, against its gradient
            scheduler.step()  # sets the learning rate for the next step
            if hasattr(sys.stdout, 'reconfigure') and sys.stdout.isatty():  # a real terminal
                print(f'step {step + 1} of {max_iters}, {time.time() - started:.0f} s', end='\r')
        best = evaluate(max_iters, best)
    except KeyboardInterrupt:
        if best == math.inf:  # nothing has been saved yet
            raise
        print('\nStopped by Ctrl-C.')
    print(f'The best weights, val loss {best:.4f}, are in gpt.pt. They generate:')


if __name__ == '__main__':
    if hasattr(sys.stdout, 'reconfigure'):  # not in IDLE or a notebook
        sys.stdout.reconfigure(line_buffering=True, errors='replace')  # '?' for what it cannot show
    parser = argparse.ArgumentParser(description='Trains a GPT on input.txt and generates text.')
    parser.add_argument('--prompt', help='continue this text with gpt.pt, without training')
    prompt = parser.parse_args().prompt
    if prompt is None:
        train()
    m, chars = load()  # from here on, with the vocabulary of gpt.pt
    stoi = {character: i for i, character in enumerate(chars)}
    # --- Generation, starting from the prompt, or from token 0: the newline, in our input.txt.
    if prompt is not None:
        unknown = sorted(set(prompt) - set(chars))
        check(prompt, '--prompt is empty: give it at least one character')
        check(not unknown, f'--prompt has characters that the model never saw: leave out {unknown}')
        context = torch.tensor([encode(prompt)], device=device)  # (1, T)
    else:
        context = torch.zeros((1, 1), dtype=torch.long, device=device)
    print(decode(m.generate(context, max_new_tokens=500)[0].tolist()))
