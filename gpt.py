"""A GPT: a transformer that learns from input.txt, and then writes one character at a time.

Read bigram.py first: a transformer reads its whole context, not only the last character.

Run it with: python gpt.py
It trains, saves its best weights in gpt-DATE.pt, and generates 500 characters with them. With
the input.txt here, the val loss falls to about 1.3, in about eight minutes on two CPU cores.
(If there is a GPU, it runs there; not measured.)
"""
import copy
import math
import time
from datetime import datetime
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

# --- Hyperparameters: change them, run again, and compare.
device = 'cuda' if torch.cuda.is_available() else 'cpu'  # where the model runs
batch_size = 8  # sequences per training step
block_size = 128  # context length: characters per sequence
max_iters = 10_000  # training steps
eval_interval = 500  # steps between loss estimates
eval_iters = 30  # batches averaged in each loss estimate, for each split
learning_rate = 1.5e-3  # peak learning rate: a step moves a weight by about this or less
warmup_iters = 100  # warm-up: steps in which the learning rate rises (0: none); then it decays
weight_decay = 0.3  # a step shrinks matrices by this * learning_rate; 0.3 * 1.5e-3 = 0.045 %
n_embd = 128  # embedding dimension: how many numbers represent one position
n_head = 4  # attention heads per block, each of size n_embd / n_head
n_layer = 3  # blocks, one after another
dropout = 0.0  # dropout probability: the share that training sets to 0, enlarging the rest
temperature = 0.8  # above 0; in generation, below 1: more predictable; above 1: more varied
top_k = None  # draw from the k most probable characters; 1: the most probable only; None: all
seed = 1337  # random seed: repeats the script's run (same CPU, number of threads, torch)

# --- Text and tokenizer: a token is one character, and its id is its place in the vocabulary.
# To train on a text of your own, put it into input.txt.
folder = Path(globals().get('__file__', '')).parent  # in a notebook: the current folder
text = (folder / 'input.txt').read_text(encoding='utf-8-sig')  # -sig: without a byte order mark
chars = sorted(set(text))  # the vocabulary: every character that occurs in the text
vocab_size = len(chars)
stoi = {character: i for i, character in enumerate(chars)}  # string to integer: its id


def encode(string):
    """The token ids of a string, as a list; KeyError for a character not in the vocabulary."""
    return [stoi[character] for character in string]


def decode(ids):
    """The reverse of encode: the string for a list of token ids."""
    return ''.join(chars[i] for i in ids)


# --- Batches. A tensor is torch's array. A remark such as (B, T) shows the shape of one.
data = torch.tensor(encode(text), dtype=torch.long)  # (len(text))
n_train = len(data) * 9 // 10
train_data, val_data = data[:n_train], data[n_train:]  # val, the last tenth: never trained on
assert len(val_data) > block_size, f'put more than {10 * block_size} characters into input.txt'


def get_batch(split, generator=None):
    """Random sequences from the 'train' or 'val' split: inputs x and targets y, each (B, T).

    B = batch_size sequences of T = block_size positions ("time"). The target y[b, t] is the
    character that follows x[b, t] in the text: each position is one prediction to learn from.
    generator: the source of random numbers; None: torch's own, for which seed is set below.
    """
    ids = train_data if split == 'train' else val_data
    starts = torch.randint(len(ids) - block_size, (batch_size, 1),
                           generator=generator)  # (B, 1)
    indices = starts + torch.arange(block_size)  # (B, 1) + (T) -> (B, T): start + 0, 1, ...
    x, y = ids[indices], ids[indices + 1]  # (B, T) each: y is x shifted by one
    return x.to(device), y.to(device)


# --- Model
# A module holds the weights of all its parts, and model(idx, targets) calls its forward. Torch
# records each operation in it, so that training can go back from the loss to the weights.
# Parts first, then the whole. What flows through the parts is x: C = n_embd numbers (channels)
# for each position.
class MultiHeadAttention(nn.Module):
    """Causal self-attention: each position reads itself and the past. (B, T, C) -> (B, T, C)

    Each position makes a query (what it looks for), a key (what it offers) and a value (what it
    passes on). The better a query matches a key, the more it reads of the value at that key's
    position. Each head has its own queries, keys and values. (Vaswani et al. 2017)
    """

    def __init__(self, n_embd, n_head):
        super().__init__()
        assert n_embd % n_head == 0, f'n_embd = {n_embd}: use a multiple of n_head = {n_head}'
        self.n_head = n_head
        self.query = nn.Linear(n_embd, n_embd, bias=False)  # the queries of all heads
        self.key = nn.Linear(n_embd, n_embd, bias=False)  # their keys
        self.value = nn.Linear(n_embd, n_embd, bias=False)  # their values
        self.proj = nn.Linear(n_embd, n_embd)  # mixes the outputs of the heads
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        B, T, C = x.shape  # batch, time, channels
        nh, hs = self.n_head, C // self.n_head  # number of heads, head size: nh * hs = C
        q, k, v = self.query(x), self.key(x), self.value(x)  # (B, T, C) each
        # Split the C channels into heads, and put the heads before T.
        q = q.view(B, T, nh, hs).transpose(1, 2)  # (B, T, nh, hs) -> (B, nh, T, hs)
        k = k.view(B, T, nh, hs).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, nh, hs).transpose(1, 2)  # (B, nh, T, hs)
        # scores[b, h, i, j]: how well the query at i matches the key at j, a dot product.
        # @, the matrix product, works on the last two axes: for each head, it takes the dot
        # product of each row on its left and each column on its right. transpose swaps these
        # axes, so that each key becomes a column.
        scores = q @ k.transpose(-2, -1)  # (B, nh, T, hs) @ (B, nh, hs, T) -> (B, nh, T, T)
        # A sum of hs independent products of mean 0 is about sqrt(hs) times as large as one:
        # divide by that. If scores differ much, softmax gives nearly 1 to one position and 0 to
        # the rest: its gradient is then close to 0, and queries and keys hardly learn.
        scores = scores / math.sqrt(hs)  # (B, nh, T, T)
        # The causal mask is -inf above the diagonal, where j > i, and 0 elsewhere, by triu(1):
        # without it, position i could read the answer. A score of -inf becomes a weight of
        # exp(-inf) = 0.
        causal_mask = torch.full((T, T), -math.inf, device=x.device).triu(1)  # (T, T)
        scores = scores + causal_mask  # (B, nh, T, T) + (T, T)
        # Softmax turns row i into the attention weights of position i: exp(score) / the sum of
        # all exp(score) of the row, so they sum to 1. Equal scores would give the plain mean of
        # the values up to i; the scores turn that into a weighted mean.
        att = scores.softmax(dim=-1)  # (B, nh, T, T)
        att = self.dropout(att)  # in training, if dropout is above 0: the sum is 1 on average
        out = att @ v  # (B, nh, T, T) @ (B, nh, T, hs) -> (B, nh, T, hs): weighted sum
        out = out.transpose(1, 2).flatten(2)  # (B, nh, T, hs) -> (B, T, C): heads joined
        out = self.proj(out)  # (B, T, C)
        return self.dropout(out)


class FeedForward(nn.Module):
    """Two linear layers and a ReLU, for each position on its own. (B, T, C) -> (B, T, C)"""

    def __init__(self, n_embd):
        super().__init__()
        self.fc = nn.Linear(n_embd, 4 * n_embd)  # 4 times as wide is the usual choice
        self.proj = nn.Linear(4 * n_embd, n_embd)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        out = self.fc(x)  # (B, T, 4C)
        # ReLU sets negative numbers to 0. Without it, two layers could do no more than one.
        out = F.relu(out)
        out = self.proj(out)  # (B, T, C)
        return self.dropout(out)


class Block(nn.Module):
    """Attention reads the text so far, feed-forward processes it. (B, T, C) -> (B, T, C)

    Each of the two adds its output to x (residual connections, He et al. 2015): a sum passes
    gradients on unchanged, so that even the first of many blocks learns. Each reads a copy of x
    that is normalised (Xiong et al. 2020): numbers of the same size, however large x has grown.
    """

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.ln1 = nn.LayerNorm(n_embd)  # mean 0, variance 1 over C; learned scale and shift
        self.sa = MultiHeadAttention(n_embd, n_head)  # self-attention
        self.ln2 = nn.LayerNorm(n_embd)
        self.ffwd = FeedForward(n_embd)

    def forward(self, x):
        x = x + self.sa(self.ln1(x))
        x = x + self.ffwd(self.ln2(x))
        return x


class GPTLanguageModel(nn.Module):
    """Predicts the next character from at most the last block_size characters.

    The layout is GPT-2's (Radford et al. 2019), but with ReLU, no biases in q, k and v, no
    dropout on embeddings, other initial weights, and an output layer with a bias and weights of
    its own (GPT-2's shares those of the token embeddings).
    """

    def __init__(self):
        super().__init__()
        self.token_embedding_table = nn.Embedding(vocab_size, n_embd)  # a vector per character
        self.position_embedding_table = nn.Embedding(block_size, n_embd)  # and one per position
        self.blocks = nn.Sequential(*[Block(n_embd, n_head) for _ in range(n_layer)])
        self.ln_f = nn.LayerNorm(n_embd)  # last layer norm: x has grown in the blocks
        self.lm_head = nn.Linear(n_embd, vocab_size)  # output layer: C numbers to logits
        # Random start values of about 0.1. Torch's own, of about 1, would make x so large that
        # what the blocks add to it would hardly count at first.
        nn.init.normal_(self.token_embedding_table.weight, std=0.1)
        nn.init.normal_(self.position_embedding_table.weight, std=0.1)

    def forward(self, idx, targets=None):
        """Token ids (B, T) -> logits (B, T, vocab_size); with targets (B, T), the loss as well.

        The loss is the cross-entropy in nats per character: the mean of -ln(p), where p is the
        probability of the actual next character. For 65 equally likely ones it is ln 65 = 4.17.
        (Random logits favour some characters for no reason, and cost a little more on average.)
        """
        positions = torch.arange(idx.shape[1], device=idx.device)  # (T): 0, 1, ... T - 1
        x = self.token_embedding_table(idx)  # (B, T, C): which characters these are
        x = x + self.position_embedding_table(positions)  # (B, T, C) + (T, C): where they are
        x = self.blocks(x)  # (B, T, C)
        x = self.ln_f(x)  # (B, T, C)
        logits = self.lm_head(x)  # (B, T, vocab_size)
        if targets is None:
            return logits, None
        # cross_entropy applies the softmax; it takes (B * T, vocab_size) and (B * T).
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()  # torch records nothing: only training needs that
    def generate(self, idx, max_new_tokens):
        """Appends sampled tokens to each row of idx: (B, T) -> (B, T + max_new_tokens)."""
        was_training = self.training
        self.eval()  # evaluation mode: dropout off
        for _ in range(max_new_tokens):
            # The table of positions has block_size rows, so the model can read no more tokens.
            logits, _ = self(idx[:, -block_size:])  # (B, at most block_size, vocab_size)
            logits = logits[:, -1] / temperature  # (B, vocab_size): for the next token
            if top_k is not None:
                kth_largest = logits.topk(min(top_k, vocab_size)).values[:, -1:]  # (B, 1)
                logits = logits.masked_fill(logits < kth_largest, -math.inf)  # ties stay
            probs = logits.softmax(dim=-1)  # (B, vocab_size): probabilities, which sum to 1
            idx_next = torch.multinomial(probs, num_samples=1)  # (B, 1): drawn at random
            idx = torch.cat((idx, idx_next), dim=1)  # (B, T + 1): one longer each time
        self.train(was_training)  # back to the mode that it was in
        return idx


torch.manual_seed(seed)
model = m = GPTLanguageModel().to(device)  # m: for short


# --- Training
@torch.no_grad()
def estimate_loss():
    """An estimate of the loss on each split, {'train': ..., 'val': ...}, in nats per character.

    It averages eval_iters batches, always the same ones, so that the estimates of a run can be
    compared, and those of two runs with the same batch_size, block_size, eval_iters and text.
    If the train loss falls while the val loss rises, the model memorises: it is overfitting.
    """
    model.eval()  # evaluation mode: no dropout, in models that use it
    generator = torch.Generator().manual_seed(1)  # whatever seed is, the same batches
    losses = {}
    for split in ('train', 'val'):
        total = 0.0
        for _ in range(eval_iters):
            x, y = get_batch(split, generator)  # (B, T) each
            logits, loss = model(x, y)
            total += loss.item()  # the number in a tensor that holds one number
        losses[split] = total / eval_iters
    model.train()  # training mode: dropout on
    return losses


history = []  # of this run: (step, train loss, val loss) of each report
best = {}  # of this run: the lowest val loss after step 0, and the weights that had it


def save(step, losses, started):
    """Keeps the losses and best weights of this run, and saves them in a file of its own."""
    settings = dict(  # if you add a hyperparameter, add it here, too
        batch_size=batch_size, block_size=block_size, max_iters=max_iters,
        eval_iters=eval_iters, learning_rate=learning_rate, warmup_iters=warmup_iters,
        weight_decay=weight_decay, n_embd=n_embd, n_head=n_head, n_layer=n_layer,
        dropout=dropout, seed=seed, text_length=len(text))
    path = folder / f'gpt-{datetime.fromtimestamp(started):%Y-%m-%d-%H%M%S-%f}.pt'
    if step == 0:  # a run begins: its weights are not worth a file yet
        history.clear()
        best.clear()
        print(f'    from the next report on, saved in {path.name}')
    elif losses['val'] < best.get('val', math.inf):
        # a copy: what state_dict returns changes with every further step
        best.update(val=losses['val'], weights=copy.deepcopy(model.state_dict()))
    history.append((step, losses['train'], losses['val']))
    if best:
        new_path = path.with_suffix('.pt.new')  # renamed when complete: never half a .pt
        torch.save({'model': best['weights'], 'chars': chars,
                    'settings': settings, 'history': history}, new_path)
        new_path.replace(path)


def report(step, started):
    """Prints losses and a sample of the text; AssertionError for a loss that is not finite."""
    losses = estimate_loss()
    print(f"step {step} of {max_iters}: train loss {losses['train']:.4f}, "
          f"val loss {losses['val']:.4f}, {time.time() - started:.0f} s", flush=True)
    assert math.isfinite(sum(losses.values())), 'the loss is not finite: lower learning_rate'
    save(step, losses, started)
    # start from token 0: the first of chars, a new line in most texts
    context = torch.zeros((1, 1), dtype=torch.long, device=device)
    with torch.random.fork_rng():  # restores the random state, so that samples change no run
        sample = decode(m.generate(context, max_new_tokens=80)[0].tolist())
    print('    ' + sample.strip().replace('\n', ' / '), flush=True)


def train():
    """Adjusts the weights, step by step, to make the actual next characters more probable."""
    # AdamW moves a weight against the average of its recent gradients, divided by their usual
    # size: so it mostly moves by less than learning_rate, however small they are.
    # Weight decay is for matrices: the few vectors hardly overfit, and the scale of a layer
    # norm, pulled to 0, would switch its channel off.
    matrices = [p for p in model.parameters() if p.dim() >= 2]  # embeddings, too
    vectors = [p for p in model.parameters() if p.dim() < 2]  # biases and layer norms
    optimizer = torch.optim.AdamW([
        {'params': matrices, 'weight_decay': weight_decay},
        {'params': vectors, 'weight_decay': 0.0},
    ], lr=learning_rate, fused=True)  # fused: all weights in one call, which is faster
    # learning_rate is multiplied by a number that rises to 1 in the warm-up, while AdamW's
    # averages rest on few batches, and then falls to 0, so that the weights settle instead of
    # following each batch.
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (
        (step + 1) / warmup_iters if step < warmup_iters else 1 - step / max_iters))

    print(f'{sum(p.numel() for p in model.parameters()):,} parameters')
    started = time.time()
    for step in range(max_iters):
        if step % eval_interval == 0:
            report(step, started)
        x, y = get_batch('train')  # (B, T) each
        logits, loss = model(x, y)
        optimizer.zero_grad()  # otherwise the gradients would add to those of earlier steps
        loss.backward()  # the gradient of each weight: how fast the loss rises with it
        optimizer.step()  # moves each weight a little, so that the loss should fall
        scheduler.step()  # sets the learning rate for the next step
    report(max_iters, started)


# --- Train, and let it write.
if __name__ == '__main__':
    try:
        train()
    except KeyboardInterrupt:  # Ctrl-C ends the training; the rest goes on
        pass
    if best:
        model.load_state_dict(best['weights'])
    print(f"\nThe {'best' if best else 'last, unsaved'} weights generate:")
    context = torch.zeros((1, 1), dtype=torch.long, device=device)
    print(decode(m.generate(context, max_new_tokens=500)[0].tolist()))
