// The model of gpt.py, told a second time: in JavaScript, with no library, as it runs in gpt.html.
//
// The names are those of gpt.py and of the weights that it saves. One thing differs: gpt.py
// computes all positions of a text at once, and this file one after another. Each position leaves
// its keys and values in a list, `past`, where the later ones find them. Nobody can read a position
// that is not there yet, so no causal mask is needed.
'use strict';

/** The sum of a list of numbers. */
const sum = numbers => numbers.reduce((total, number) => total + number, 0);  // (n) -> ()

/** The sum of two lists of numbers: with a bias, for instance, or in a residual connection. */
const add = (x, y) => x.map((number, i) => number + y[i]);  // (n), (n) -> (n)

/** The dot product of two lists of numbers. */
function dot(x, y) {  // (n), (n) -> ()
  let total = 0;
  for (let i = 0; i < x.length; i++) total += x[i] * y[i];
  return total;
}

/** One of several parts of equal size, n: a row of a matrix, or the numbers of one head. */
const part = (numbers, i, n) => numbers.subarray(i * n, (i + 1) * n);  // (... * n) -> (n)

/** A linear layer: each output is the dot product of x and a row of weights, plus a bias. */
function linear(weights, name, x) {  // (in) -> (out)
  const weight = weights[`${name}.weight`], bias = weights[`${name}.bias`];  // (out, in), (out)
  const out = new Float32Array(weight.length / x.length)
    .map((_, row) => dot(x, part(weight, row, x.length)));
  return bias ? add(out, bias) : out;  // queries, keys and values have no bias
}

/** A layer norm: x with mean 0 and variance 1, then a learned scale and shift. */
function layerNorm(weights, name, x) {  // (C) -> (C)
  const weight = weights[`${name}.weight`], bias = weights[`${name}.bias`];  // (C), (C)
  const mean = sum(x) / x.length;
  const variance = sum(x.map(number => (number - mean) ** 2)) / x.length;
  const size = Math.sqrt(variance + 1e-5);  // never 0, so that we can divide by it
  return x.map((number, i) => (number - mean) / size * weight[i] + bias[i]);
}

/** Positive numbers that sum to 1: exp(score), divided by the sum of all of them. */
function softmax(scores) {  // (n) -> (n)
  const largest = Math.max(...scores);
  // Without the largest subtracted, exp could become infinite. The result is the same.
  const powers = scores.map(score => Math.exp(score - largest));
  const total = sum(powers);
  return powers.map(power => power / total);
}

/**
 * Self-attention: the position reads the values of itself and of the past, in each head. It leaves
 * its keys, values and attention weights in `block`. A head that is switched off passes on 0.
 */
function attention(model, layer, x, past, block, off) {  // (C) -> (C)
  const C = x.length, hs = C / model.n_head;  // head size
  const name = `blocks.${layer}.sa`;
  const q = linear(model.weights, `${name}.query`, x);  // (C): of all heads, one after another
  block.k = linear(model.weights, `${name}.key`, x);  // (C)
  block.v = linear(model.weights, `${name}.value`, x);  // (C)
  const readable = [...past.map(position => position.blocks[layer]), block];  // T of them
  const out = new Float32Array(C);  // (C): the outputs of all heads, one after another
  block.att = [];
  for (let head = 0; head < model.n_head; head++) {
    const ofHead = numbers => part(numbers, head, hs);  // (C) -> (hs)
    const scores = Float32Array.from(readable, ({k}) =>  // (T): how well the query matches each key
      dot(ofHead(q), ofHead(k)) / Math.sqrt(hs));
    const att = softmax(scores);  // (T): the attention weights
    block.att.push(att);
    if (off.has(layer * model.n_head + head)) continue;
    readable.forEach(({v}, j) => {  // the weighted mean of the values
      for (let i = head * hs; i < (head + 1) * hs; i++) out[i] += att[j] * v[i];
    });
  }
  return linear(model.weights, `${name}.proj`, out);  // (C) -> (C)
}

/** A small network that processes the position on its own. */
function feedForward(weights, name, x) {  // (C) -> (C)
  const out = linear(weights, `${name}.fc`, x).map(number => Math.max(number, 0));  // (4C): ReLU
  return linear(weights, `${name}.proj`, out);  // (4C) -> (C)
}

/**
 * The position of one more token id, after those in `past`, with the heads in `off` switched off
 * (layer * n_head + head, both counted from 0). It has
 *   x: its C numbers after the embeddings and after each block, (n_layer + 1) lists;
 *   blocks: its keys k, values v and attention weights att (n_head, T), of each block;
 *   logits: a score for each character of the vocabulary, (vocab_size): which one comes next?
 *   loss: what this character cost, by the logits of the position before; the first has none.
 */
function forward(model, id, past, off) {
  const {weights, n_embd} = model;
  const row = (table, i) => part(weights[`${table}.weight`], i, n_embd);
  let x = row('token_embedding_table', id);  // (C): which character this is
  x = add(x, row('position_embedding_table', past.length));  // (C): where it is
  const position = {id, x: [x], blocks: []};
  for (let layer = 0; layer < model.n_layer; layer++) {
    const name = `blocks.${layer}`, block = {};
    x = add(x, attention(model, layer, layerNorm(weights, `${name}.ln1`, x), past, block, off));
    x = add(x, feedForward(weights, `${name}.ffwd`, layerNorm(weights, `${name}.ln2`, x)));
    position.x.push(x);
    position.blocks.push(block);
  }
  position.logits = logitsOf(model, x);
  if (past.length > 0) position.loss = crossEntropy(past.at(-1).logits, id);
  return position;
}

/** The last two layers, from C numbers to logits. Applied early, they show what is known then. */
function logitsOf(model, x) {  // (C) -> (vocab_size)
  return linear(model.weights, 'lm_head', layerNorm(model.weights, 'ln_f', x));
}

/** The loss: -ln of the probability of this id. In 64 bits, in which a tiny one is not yet 0. */
const crossEntropy = (logits, id) => -Math.log(softmax([...logits])[id]);

/** The probabilities from which generate in gpt.py draws the next character. */
function probabilities(logits, temperature, top_k) {  // (vocab_size) -> (vocab_size)
  const scaled = logits.map(logit => logit / temperature);  // in 32 bits, as in torch: ties stay
  const kthLargest = scaled.slice().sort().at(-Math.min(top_k, scaled.length));
  return softmax(scaled.map(logit => logit < kthLargest ? -Infinity : logit));
}

/** The id in whose share a random number from 0 to 1 falls, if the shares lie end to end. */
function draw(ps, random) {
  let left = random;
  const id = ps.findIndex(p => (left -= p) < 0);
  return id >= 0 ? id : ps.lastIndexOf(Math.max(...ps));  // if the shares sum to 0.9999999
}
