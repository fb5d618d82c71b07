"""A GPT: a transformer that learns to write from input.txt, one character at a time.

    python gpt.py                      train, save the model in gpt.pt, generate 500 characters
    python gpt.py --prompt "FLINT:"    continue this text with gpt.pt, or with --checkpoint FILE

Read bigram.py first. A transformer reads its whole context, not only the last character.
On our input.txt, training takes four to nine minutes on two CPU cores: val loss near 1.3.
"""
import argparse
import math
import os
import sys
import time
from datetime import datetime
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

# --- Hyperparameters: change them, run again, and compare.
device = 'cuda' if torch.cuda.is_available() else 'cpu'  # where the model runs
gpu = str(device).startswith('cuda')  # without it: a smaller model, which trains in minutes
batch_size = 64 if gpu else 8  # sequences per training step
block_size = 256 if gpu else 128  # context length: characters per sequence
max_iters = 5000 if gpu else 10_000  # training steps
eval_interval = 500  # steps between loss estimates
eval_iters = 50 if gpu else 30  # batches averaged in each loss estimate, for each split
learning_rate = 1e-3 if gpu else 1.5e-3  # peak learning rate: how far a step moves a weight
warmup_iters = 100  # warm-up: steps in which the learning rate rises; then it decays to 0
weight_decay = 0.1 if gpu else 0.3  # how strongly each step pulls weight matrices towards 0
n_embd = 384 if gpu else 128  # embedding dimension: how many numbers represent one position
n_head = 6 if gpu else 4  # attention heads per block, each of size n_embd / n_head
n_layer = 6 if gpu else 3  # blocks, one after another
dropout = 0.2 if gpu else 0.0  # dropout probability: fraction of numbers set to 0 in training
fused_attention = True  # torch's fast attention; False: the spelled-out one, which you can edit
bfloat16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)  # 16 bits: faster
temperature = 0.8  # in generation: below 1 for more predictable text, above 1 for more varied
top_k = None  # in generation: only the k most probable characters may follow; None: all
seed = 1337  # random seed: the same run again, on the same machine with the same torch

# --- Text and tokenizer: a token is one character, and its id is its place in the vocabulary.
folder = Path(globals().get('__file__', '')).parent  # the script's folder, or the notebook's
try:
    text = (folder / 'input.txt').read_text(encoding='utf-8-sig')
except (OSError, UnicodeError):
    text = ''  # the last section reports it
chars = sorted(set(text))  # the vocabulary: every character that occurs in the text
vocab_size = len(chars)
stoi = {character: i for i, character in enumerate(chars)}  # string to integer: its id


def encode(string):
    """The token ids of a string, as a list; KeyError for a character not in the vocabulary."""
    return [stoi[character] for character in string]


def decode(ids):
    """The reverse of encode: the string for a list of token ids."""
    return ''.join(chars[i] for i in ids)


data = torch.tensor(encode(text), dtype=torch.long)  # a tensor (array): (number of characters)
n_train = len(data) * 9 // 10
train_data, val_data = data[:n_train], data[n_train:]  # val, the last tenth: never trained on


def get_batch(split, generator=None):
    """Random sequences from the 'train' or 'val' split: inputs x and targets y, each (B, T).

    B = batch_size sequences of T = block_size positions ("time"). The target y[b, t] is the
    character that follows x[b, t] in the text: each position is one prediction to learn from.
    """
    ids = train_data if split == 'train' else val_data
    start = torch.randint(len(ids) - block_size, (batch_size, 1), generator=generator)  # (B, 1)
    positions = start + torch.arange(block_size)  # (B, 1) + (T) -> (B, T): start + 0, 1, ...
    x, y = ids[positions], ids[positions + 1]  # (B, T) each: y is x shifted by one
    return x.to(device), y.to(device)


@torch.no_grad()  # records nothing for backward(), which only training needs
def estimate_loss():
    """The model's mean loss on each split, {'train': ..., 'val': ...}, in nats per character.

    It averages eval_iters batches, always the same ones, so that estimates can be compared.
    If the train loss falls while the val loss rises, the model memorises: it is overfitting.
    """
    model.eval()  # to evaluation mode: dropout off
    generator = torch.Generator().manual_seed(seed)
    losses = {}
    for split in ('train', 'val'):
        batches = [get_batch(split, generator) for _ in range(eval_iters)]
        losses[split] = sum(model(x, y)[1].item() for x, y in batches) / eval_iters
    model.train()  # back to training mode: dropout on
    return losses


# --- Model
# A module knows the weights of all its parts, and model(x, y) calls its forward. Torch records
# the operations on them, so that backward() can go back and give each weight its gradient.
# Parts first, then the whole. x has C = n_embd numbers (channels) for each position.
class MultiHeadAttention(nn.Module):
    """Causal self-attention: each position reads itself and the past. (B, T, C) -> (B, T, C)

    Each position makes a query (what it looks for), a key (what it offers) and a value (what it
    passes on). The better a query matches a key, the more it reads of the value at that key's
    position. Each head has its own queries, keys and values. (Vaswani et al. 2017)
    """

    def __init__(self, n_head, head_size):
        super().__init__()
        self.n_head, self.head_size = n_head, head_size
        self.qkv = nn.Linear(n_embd, 3 * n_head * head_size, bias=False)  # q, k, v of all heads
        self.proj = nn.Linear(n_head * head_size, n_embd)  # mixes the outputs of the heads
        # Each block adds two such outputs to x, 2 * n_layer in all. A sum of n random numbers
        # grows like sqrt(n): this keeps a deep model's x from starting out large (GPT-2).
        self.proj.weight.data /= math.sqrt(2 * n_layer)

    def forward(self, x):
        B, T, C = x.shape  # batch, time, channels
        nh, hs = self.n_head, self.head_size  # number of heads, head size: together C
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # (B, T, nh * hs) each
        # Split them into heads, and put the heads before T. @, the matrix product, works on the
        # last two axes: for each head, it takes the dot products of rows and columns.
        q = q.view(B, T, nh, hs).transpose(1, 2)  # (B, T, nh, hs) -> (B, nh, T, hs)
        k = k.view(B, T, nh, hs).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, nh, hs).transpose(1, 2)  # (B, nh, T, hs)
        if fused_attention:  # one fast call for what the lines below spell out: read those
            dropout_p = dropout if self.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
        else:  # to edit these lines, set fused_attention = False: otherwise they do not run
            # scores[b, h, i, j]: how well the query at i matches the key at j, a dot product.
            # A sum of hs random products of size 1 is about sqrt(hs) in size: divide by that.
            # With large scores, softmax gives nearly 1 to one position and 0 to the rest: its
            # gradient is then close to 0, and queries and keys hardly learn.
            scores = q @ k.transpose(-2, -1) / math.sqrt(hs)  # (B, nh, T, T)
            # The causal mask is True above the diagonal, where j > i: without it, position i
            # could read the answer. A score of -inf becomes a weight of exp(-inf) = 0.
            causal_mask = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)  # (T, T)
            # Attention weights: row i sums to 1. Equal scores would give the plain mean of the
            # values up to i; the scores turn that into a weighted mean.
            att = scores.masked_fill(causal_mask, -math.inf).softmax(dim=-1)  # (B, nh, T, T)
            out = F.dropout(att, dropout, self.training) @ v  # (B, nh, T, hs): means of v
        out = out.transpose(1, 2).flatten(2)  # (B, nh, T, hs) -> (B, T, nh * hs): heads joined
        return F.dropout(self.proj(out), dropout, self.training)  # (B, T, C)


class FeedForward(nn.Module):
    """A small network that processes each position on its own. (B, T, C) -> (B, T, C)"""

    def __init__(self, n_embd):
        super().__init__()
        self.fc = nn.Linear(n_embd, 4 * n_embd)  # 4 times as wide is the usual choice
        self.proj = nn.Linear(4 * n_embd, n_embd)
        self.proj.weight.data /= math.sqrt(2 * n_layer)  # as in MultiHeadAttention

    def forward(self, x):
        # ReLU sets negative numbers to 0. Without it, two layers could do no more than one.
        out = F.relu(self.fc(x))  # (B, T, 4C)
        return F.dropout(self.proj(out), dropout, self.training)  # (B, T, 4C) -> (B, T, C)


class Block(nn.Module):
    """Attention reads other positions, then feed-forward processes each. (B, T, C) -> (B, T, C)

    Both add to x (residual connections, He et al. 2015): a sum passes gradients on unchanged,
    so that even the first of many blocks learns. Both read a normalised copy of x
    (Xiong et al. 2020).
    """

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.ln1 = nn.LayerNorm(n_embd)  # mean 0, variance 1 over C; learned scale and shift
        self.sa = MultiHeadAttention(n_head, n_embd // n_head)  # self-attention
        self.ln2 = nn.LayerNorm(n_embd)
        self.ffwd = FeedForward(n_embd)

    def forward(self, x):
        x = x + self.sa(self.ln1(x))
        return x + self.ffwd(self.ln2(x))


class GPTLanguageModel(nn.Module):
    """Predicts the next character from at most the last block_size characters.

    The layout is GPT-2's (Radford et al. 2019), but with ReLU, no biases in q, k and v, no
    dropout on embeddings, other initial weights, and an untied output layer with a bias.
    """

    def __init__(self, vocab_size=vocab_size):
        super().__init__()
        self.token_embedding_table = nn.Embedding(vocab_size, n_embd)  # a vector per character
        self.position_embedding_table = nn.Embedding(block_size, n_embd)  # and one per position
        self.blocks = nn.Sequential(*[Block(n_embd, n_head) for _ in range(n_layer)])
        self.ln_f = nn.LayerNorm(n_embd)  # last layer norm: x has grown in the blocks
        self.lm_head = nn.Linear(n_embd, vocab_size)  # output layer: from C numbers to logits
        # With torch's standard deviation of 1, what the blocks add would hardly count at first.
        nn.init.normal_(self.token_embedding_table.weight, std=0.1)
        nn.init.normal_(self.position_embedding_table.weight, std=0.1)

    # Multiplies matrices in bfloat16 where that is enabled; weights and loss keep 32 bits.
    @torch.autocast('cuda', dtype=torch.bfloat16, enabled=bfloat16)
    def forward(self, idx, targets=None):
        """Token ids (B, T) -> logits (B, T, vocab_size); with targets (B, T), the loss as well.

        The loss is the cross-entropy in nats per character: the mean of -ln(p), where p is the
        probability of the actual next character. For 65 equally likely ones it is ln 65 = 4.17.
        """
        positions = torch.arange(idx.shape[1], device=idx.device)  # (T)
        x = self.token_embedding_table(idx)  # (B, T, C): which characters these are
        x = x + self.position_embedding_table(positions)  # (B, T, C) + (T, C): where they are
        x = self.blocks(x)  # (B, T, C)
        logits = self.lm_head(self.ln_f(x)).float()  # (B, T, vocab_size), in 32 bits again
        if targets is None:
            return logits, None
        # cross_entropy applies the softmax; it takes (B * T, vocab_size) and (B * T).
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=temperature, top_k=top_k):
        """Appends sampled tokens to each row of idx: (B, T) -> (B, T + max_new_tokens)."""
        was_training = self.training
        self.eval()  # dropout off
        for _ in range(max_new_tokens):
            context = idx[:, -block_size:]  # there is no position beyond block_size
            logits, _ = self(context)  # (B, length of the context, vocab_size)
            logits = logits[:, -1] / temperature  # (B, vocab_size): for the next token
            if top_k is not None:
                kth_largest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
                logits = logits.masked_fill(logits < kth_largest, -math.inf)  # ties stay
            idx_next = torch.multinomial(logits.softmax(dim=-1), num_samples=1)  # (B, 1), drawn
            idx = torch.cat((idx, idx_next), dim=1)  # (B, T + 1)
        self.train(was_training)
        return idx


# --- Training
def train():
    """Adjusts the weights, step by step, to make the actual next characters more probable."""
    global best_val_loss
    best_val_loss = math.inf  # of the weights that this run has saved; inf: none yet
    # Weight decay is for matrices: the few vectors hardly overfit, and the scale of a layer
    # norm, pulled to 0, would switch its channel off.
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]  # biases and layer norms
    # betas: AdamW averages about 10 gradients for the direction of a step, and the squares of
    # about 100 for its size.
    optimizer = torch.optim.AdamW(
        [{'params': matrices, 'weight_decay': weight_decay}, {'params': vectors}],
        lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    # A factor of learning_rate: warm-up until the averages rest on enough batches, then decay.
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup_iters, 1 - step / max_iters))
    started = time.time()
    for step in range(max_iters + 1):
        if step % eval_interval == 0 or step == max_iters:
            losses = estimate_loss()
            print(f"step {step}: train loss {losses['train']:.4f}, "
                  f"val loss {losses['val']:.4f}, {time.time() - started:.0f} s")
            check(sum(losses.values()) < float('inf'),
                  'the loss is not finite: lower learning_rate')
            context = torch.zeros((1, 1), dtype=torch.long, device=device)
            with torch.random.fork_rng([device] if gpu else []):  # restores the random state
                sample = decode(model.generate(context, max_new_tokens=80)[0].tolist())
            print('    ' + sample.strip().replace('\n', ' / '))
            if step > 0 and losses['val'] < best_val_loss:  # step 0: still untrained
                save(first=best_val_loss == math.inf)  # the first keeps an older model
                best_val_loss = losses['val']
        if step == max_iters:
            break
        x, y = get_batch('train')  # (B, T) each
        logits, loss = model(x, y)
        optimizer.zero_grad()  # otherwise the gradients would add to those of earlier steps
        loss.backward()  # the gradient of each weight: how fast the loss rises with it
        optimizer.step()  # moves each weight against its gradient, about learning_rate at most
        scheduler.step()  # sets the learning rate for the next step
        if in_terminal:  # a line that the next one overwrites
            seconds_left = (time.time() - started) / (step + 1) * (max_iters - step - 1)
            print(f'step {step + 1} of {max_iters}, {seconds_left:.0f} s left  ', end='\r')


# --- Housekeeping. On a first reading, skip to the last section.
def check(condition, message):
    """Exits with status 1 and this message, unless the condition is true."""
    if not condition:
        sys.exit(f'Error: {message}')


def excepthook(kind, error, traceback):
    """Ends the script: no traceback for Ctrl-C, a closed pipe or too little memory."""
    if kind is KeyboardInterrupt:
        print('Stopped by Ctrl-C.', file=sys.stderr)
    if kind in (KeyboardInterrupt, BrokenPipeError):  # a closed pipe, as in `... | head -1`
        os._exit(130)  # not sys.exit: it would flush stdout, into the closed pipe
    if kind in (MemoryError, torch.OutOfMemoryError) or 'DefaultCPUAllocator' in str(error):
        check(False, 'out of memory: lower batch_size, block_size or n_embd')
    sys.__excepthook__(kind, error, traceback)


for name in ('batch_size', 'block_size', 'max_iters', 'eval_interval', 'eval_iters',
             'warmup_iters', 'n_embd', 'n_head', 'n_layer'):
    value = globals()[name]
    check(type(value) is int and 0 < value < 1e9,
          f'{name} = {value!r}: use a whole number above 0, and below 1e9')
check(top_k is None or (type(top_k) is int and 0 < top_k < 1e9),
      f'top_k = {top_k!r}: use a whole number above 0, or None')
check(type(seed) is int and abs(seed) < 1e9, f'seed = {seed!r}: use a whole number')
check(temperature != 0, 'temperature = 0: use top_k = 1, for the most probable character only')
for name, low, high in (('learning_rate', 1e-9, 1000), ('weight_decay', 0, 1000),
                        ('dropout', 0, 0.99), ('temperature', 0.01, 100)):
    value = globals()[name]
    check(type(value) in (int, float) and low <= value <= high,
          f'{name} = {value!r}: use a number from {low} to {high}')
check(n_embd % n_head == 0, f'n_embd = {n_embd}: use a multiple of n_head = {n_head}')
try:
    torch.zeros(1, device=torch.device(device)).item()
except Exception:  # torch raises errors of many types here
    check(False, f"device = {device!r}: torch cannot use that here; use 'cpu'")
if __name__ == '__main__':
    if not sys.flags.interactive:  # after `python -i`, Ctrl-C must not end the session
        sys.excepthook = excepthook
    if hasattr(sys.stdout, 'reconfigure'):  # not in IDLE or a notebook
        # Print each line at once, and ? for a character that the terminal cannot show.
        sys.stdout.reconfigure(line_buffering=True, errors='replace')

in_terminal = sys.stdout is sys.__stdout__ and sys.stdout.isatty()  # not in IDLE
checkpoint_path = folder / 'gpt.pt'


def save(first=True):
    """Saves the weights, and what load needs. The first save of a run keeps an older gpt.pt."""
    new_path = folder / 'gpt.pt.new'  # renamed when complete, so gpt.pt is never half a file
    kept_path = folder / f'gpt-{datetime.now():%Y-%m-%d-%H%M%S-%f}.pt'
    try:
        torch.save({'model': model.state_dict(), 'chars': chars,
                    'sizes': (block_size, n_embd, n_head, n_layer)}, new_path)
        if first and checkpoint_path.exists():
            kept_path.write_bytes(checkpoint_path.read_bytes())
            print(f'The model of an earlier run is now in {kept_path.name}')
        new_path.replace(checkpoint_path)
    except (OSError, RuntimeError) as error:
        check(False, f'cannot save {checkpoint_path} ({error!r:.200}): is the disk full?')


def load(path):
    """Loads the model, the sizes and the vocabulary of a checkpoint; exits if it cannot."""
    global model, m, chars, vocab_size, stoi, block_size, n_embd, n_head, n_layer
    check(path.exists(), f'there is no {path}: correct the name, or train with python gpt.py')
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        block_size, n_embd, n_head, n_layer = checkpoint['sizes']
        chars, vocab_size = checkpoint['chars'], len(checkpoint['chars'])
        stoi = {character: i for i, character in enumerate(chars)}
        model = m = GPTLanguageModel(vocab_size).to(device)
        model.load_state_dict(checkpoint['model'])
    except Exception as error:  # a damaged file, or a model of another design
        check(False, f'cannot use {path} ({error!r:.200}): undo your edits, or train again')


# --- Build the model, train it, and let it write.
torch.manual_seed(seed)
model = m = GPTLanguageModel(vocab_size or 1).to(device)  # or 1: --prompt needs no input.txt

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description='Trains a GPT on input.txt, and generates.')
    parser.add_argument('--prompt', help='continue this text with gpt.pt, without training')
    parser.add_argument('--checkpoint', type=Path, help='generate with this file, not gpt.pt')
    # In a notebook, where there is no __file__, the arguments are the notebook's own.
    arguments = parser.parse_args(None if '__file__' in globals() else [])
    if arguments.prompt is None and arguments.checkpoint is None:
        check(os.access(folder, os.W_OK), f'cannot write into {folder}: make it writable')
        check(len(val_data) > block_size, 'put a UTF-8 text of more than '
              f'{10 * block_size} characters into {folder / "input.txt"}')
        try:
            train()
        except KeyboardInterrupt:
            print()  # a new line below the terminal's ^C
            if best_val_loss == math.inf:  # nothing is saved yet
                raise
        print(f'The best weights, val loss {best_val_loss:.4f}, are in gpt.pt. They generate:')
    load(arguments.checkpoint or checkpoint_path)
    if arguments.prompt is not None:
        unknown = sorted(set(arguments.prompt) - set(chars))
        check(arguments.prompt, '--prompt is empty: give it at least one character')
        check(not unknown, f'--prompt: the model does not know {unknown}; leave them out')
        context = torch.tensor([encode(arguments.prompt)], device=device)  # (1, T)
    else:  # start from token 0: in our input.txt, that is the newline
        context = torch.zeros((1, 1), dtype=torch.long, device=device)
    print(decode(m.generate(context, max_new_tokens=500)[0].tolist()))
