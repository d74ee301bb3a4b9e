"""tinyllm: how an LLM works, in one file that you can read from top to bottom.

It trains a small GPT from scratch, on an ordinary CPU, until it does school arithmetic and writes
out its working as a pupil does:

    (12+3)*4-6=15*4-6=60-6=54

You give it the problem, up to the first "=". The model writes the rest, one character at a time. No
calculator stands between the model and its answer. All the parts between "=" are worth the same,
so a line can be checked exactly: when training data are made, and after the model has answered.

    python tinyllm.py train --quick        a first taste: sums, in seconds
    python tinyllm.py train                learn everything (the README says how long that takes)
    python tinyllm.py eval                 how good is it on problems that it never saw?
    python tinyllm.py ask "12*34"          ask it something
    python tinyllm.py look "12+39"         see which characters it looked at while it wrote
    python tinyllm.py serve                ask and look, as a page in the browser
    python tinyllm.py data --kind mul      look at what it learns from

The tutorial needs Python and a little linear algebra, and no machine learning. Its map:

    Step 1  PyTorch in five facts     tensors, NumPy, gradients, modules, the optimizer
    Step 2  What an LLM is            it predicts the next token
    Step 3  The model                 tokenizer, embeddings, attention, the Transformer
    Step 4  The data                  problems and their working, and what is learned from a line
    Step 5  Training                  the loss, the optimizers, the loop, saving
    Step 6  Evaluation                writing an answer, and what "right" means
    Behind it: Step 7 (pictures, LaTeX, the page, the commands) and the school arithmetic.

Glossary, to come back to when a name is new, each with an example:

    problem    "345*7"                     what is asked; it has no "=" in it
    line       "345*7=2100+315=2415"       the problem and its working
    stage      "2100+315"                  a part of a line, cut at "="; the last is the answer
    kind       "mul"                       add, sub, mul, div, expr (longer), algebra (letters)
    ids        [8, 11, 9, 17]              a text as numbers, one for each token: "7+8="
    B, T, C    128, 32, 128                rows of a batch, tokens of a row, numbers for each token
    H, D       6, 32                       attention heads, and numbers for each token in a head
    V          21                          how many different tokens there are
    logits     (B, T, V)                   a score for each token that might come next
"""

import dataclasses
import functools
import itertools
import math
import os
import pickle
import random
import re
import signal
import sys
import time
import warnings
import zlib

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")     # NumPy is not needed
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)     # Ctrl-C ends it quietly while torch is loaded
os.environ.setdefault("GOMP_SPINCOUNT", "1000")      # idle threads soon sleep, for other programs
import torch                                                                      # noqa: E402
import torch.nn as nn                                                             # noqa: E402
import torch.nn.functional as F                                                   # noqa: E402
from torch.utils.data import DataLoader, Dataset                                  # noqa: E402

######## Step 1: PyTorch in five facts #############################################################

def five_facts():
    """PyTorch computes with tensors and finds gradients. What you need of it, or nearly:

    Fact 1. A tensor is a block of numbers with a shape, one type (dtype) and a device (CPU or GPU).

    >>> a = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    >>> a.shape, a.dtype, torch.zeros(2, dtype=torch.long)       # long: whole numbers, such as ids
    (torch.Size([2, 3]), torch.float32, tensor([0, 0]))
    >>> (a @ a.T).shape         # matrix product, of the last two axes: (2, 3) @ (3, 2) -> (2, 2)
    torch.Size([2, 2])
    >>> a + torch.tensor([10.0, 0.0, 0.0])      # broadcasting: shapes are aligned at the right
    tensor([[11.,  2.,  3.],
            [14.,  5.,  6.]])
    >>> (a * torch.ones(2, 1)).shape                  # and an axis of size 1 is repeated
    torch.Size([2, 3])
    >>> a.transpose(0, 1).shape, a.flatten().shape, a.unsqueeze(1).shape    # a new axis 1
    (torch.Size([3, 2]), torch.Size([6]), torch.Size([2, 1, 3]))
    >>> torch.tensor([1.0, 2.0, 3.0]).softmax(-1)     # each e^x over their sum; -1: the last axis
    tensor([0.0900, 0.2447, 0.6652])
    >>> a.add_(1).sum()                               # a name that ends in _ changes the tensor
    tensor(27.)

    Fact 2. A tensor and a NumPy array can share their memory: torch.from_numpy(array) and
    tensor.numpy() copy nothing. (Nothing below needs NumPy.)

    Fact 3. Of a tensor with requires_grad, PyTorch records all that is done with it, except under
    no_grad() and inference_mode(). backward() follows the record back and finds the gradient: how
    the result changes when the tensor changes a little. By hand: the derivative of w^2 + 3w is
    2w + 3, which is 7 at w = 2.

    >>> w = torch.tensor(2.0, requires_grad=True)
    >>> (w ** 2 + 3 * w).backward()
    >>> w.grad
    tensor(7.)

    Fact 4. A network is a class, an nn.Module. What its __init__ assigns to self, layers or
    Parameters, holds the weights, which are learned: mostly random numbers at first. You write its
    forward(x); module(x) calls it. Two layers do most of the work:

    >>> layer = nn.Linear(3, 2, bias=False)           # y = x W^T, with W of shape (2, 3)
    >>> table = nn.Embedding(21, 128)                 # a table: number i becomes row i
    >>> layer(a).shape, table(torch.tensor([8, 11])).shape, [p.shape for p in layer.parameters()]
    (torch.Size([2, 2]), torch.Size([2, 128]), [torch.Size([2, 3])])

    Fact 5. A loss says how wrong the network is. An optimizer moves each weight a little against
    its gradient, so that the loss gets smaller. The learning rate (lr) says how far.

    >>> optimizer = torch.optim.SGD([w], lr=0.1)      # plain gradient descent
    >>> loss = (w - 5) ** 2                           # w is 2 and should be 5
    >>> optimizer.zero_grad()                  # backward adds to w.grad, so the old 7 must go
    >>> loss.backward()
    >>> optimizer.step()
    >>> round(w.item(), 2)                            # the gradient is -6, so w moves up by 0.6
    2.6
    """

######## Step 2: what an LLM is ####################################################################
# A text is cut into tokens; here a token is one character. The vocabulary is the list of all
# tokens. A language model does one thing: it reads the tokens so far and gives each token of the
# vocabulary a probability to come next. The probability of a whole text is the product of these:
#
#     P(t1 t2 t3) = P(t1) * P(t2 after t1) * P(t3 after t1 t2)
#
# To write, it takes the likeliest token, appends it, and asks again. That is greedy decoding.
#
# To train it, we show it some texts at a time, a batch, and look, at each position, how probable it
# found the token that really came next. The loss is -ln P, averaged over the positions (the
# logarithm turns the product into a sum). It is called cross-entropy, and its unit is the nat. If P
# is 1, the loss is 0. A model that knows nothing gives each of our 21 tokens P = 1/21, and its loss
# is ln 21 = 3.04. Training changes the weights against the gradient of the loss, batch after batch.
#
# Writing goes one token at a time, because the next one is not known yet. In training the whole
# text is known. So all positions are predicted at once, and a mask hides from each what follows.
#
# What happens inside, with the shape of the numbers at each place:
#
#     ids    (B, T)      B texts of T tokens each: "7+8=" is 8, 11, 9, 17
#       |
#     embedding          Each id becomes a vector of C numbers, a row of a table. The rows are
#       |                learned: tokens that behave alike end up with vectors that are alike.
#     block  x n_layer   Attention: a token LOOKS at itself and at earlier ones and takes what it
#       |                needs. It asks a query ("I write the tens: where are the tens?"). A token
#       |                shows a key ("I am a tens digit") and a value ("I am a 7"). Where query and
#       |                key agree, the value flows to the asker. All three are D numbers: the
#       |                token's vector times a learned matrix each. (A fourth leads back to C.)
#       |                MLP (multi-layer perceptron): then each token THINKS about it, by itself.
#       |                Both ADD their result to the token's vector: x = x + attention(x), then
#       |                x = x + mlp(x). This sum through all blocks is the residual stream.
#     output layer       C numbers become V scores, the logits. Softmax makes them probabilities.
#       |
#     logits (B, T, V)   at every position
#
# This is a decoder-only Transformer: it only continues a text. (GPT: generative pre-trained
# Transformer.) A model of n_layer blocks has n_layer moments of thought for each token. What takes
# more must be written down and read again. So our model writes its working.
#
# A chat model such as ChatGPT is the same machine, first trained with the same loss. But its tokens
# are pieces of words, some 100,000 of them; it has many thousand times more weights and data; it is
# trained again on instructions and on what people liked; and it draws the next token at random by
# its probability (sampling), where ours takes the likeliest.

######## Step 3-1: the tokenizer ###################################################################
# encode and decode reverse each number, and nothing else does: the model reads and writes 408 as 8,
# 0, 4. A carry runs from the ones upward. So each digit of a sum is written when all that it
# depends on is known. (Lee et al. 2023, "Teaching Arithmetic to Small Transformers".) Letters are
# reversed with their number: 48x is x, 8, 4. So when the 8 is read, it is known to count x.

VOCAB = "\n0123456789+-*/()=xy^"        # the newline, token 0, ends a line and fills up short ones
ID = {character: i for i, character in enumerate(VOCAB)}
END = ID["\n"]
EQUALS = ID["="]
DIGITS = range(ID["0"], ID["9"] + 1)

def reverse_numbers(text):
    """Reverse each number, with the letters after it. Doing it twice gives the text back.

    >>> reverse_numbers("12*34=408"), reverse_numbers("48x^2-7x")
    ('21*43=804', '2^x84-x7')
    """
    return re.sub("[0-9xy^]+", lambda match: match[0][::-1], text)

def encode(text, ones_first=True):
    """Text to a list of token ids.

    >>> encode("7+8="), encode("12+3")                # 12 is read as 2, 1
    ([8, 11, 9, 17], [3, 2, 11, 4])
    """
    return [ID[character] for character in (reverse_numbers(text) if ones_first else text)]

def decode(ids, ones_first=True):
    """Token ids to text, the inverse of encode."""
    text = "".join(VOCAB[i] for i in ids)
    return reverse_numbers(text) if ones_first else text

######## Step 3-2: embeddings: what a token is, and where it stands ################################
# Attention sees order by its mask alone (what is hidden), so it must be told where tokens stand.
# Most LLMs number the tokens of a text: 0, 1, 2, 3. We call that number the column. They bring it
# into attention by RoPE, rotary position embedding (Su et al. 2021, "RoFormer"). Attention asks by
# a dot product how well a key and a query agree. A key k at column a is turned by a rotation R_a, a
# query q at column b by R_b. Turning both back by R_a changes neither lengths nor the angle, so
#
#     (R_a k) . (R_b q)  =  k . (R_(b-a) q)
#
# depends on the distance b - a alone. Which distance agrees best, q and k have to learn. To turn a
# vector, its numbers are taken in pairs, each pair as a point of the plane, that is a complex
# number, and multiplied by e^(i * angle), where the angle is column * speed. Each pair has its own
# speed: fast ones tell neighbours apart but soon come round again, slow ones near from far.

def rotations(where, n_pairs, base):
    """The turns of RoPE: where (B, T) -> (B, T, n_pairs), complex. Speeds: 2 towards 2 / base."""
    speed = 2 * base ** (-torch.arange(n_pairs, device=where.device) / n_pairs)   # (n_pairs,)
    angle = where.unsqueeze(-1) * speed                                           # (B, T, n_pairs)
    return torch.polar(torch.ones_like(angle), angle)                             # e^(i * angle)

def rotate(x, turns):
    """Turn the vectors of all H heads (Step 3-3) alike: x (B, T, H, D), turns (B, T, 1, D/2) ->
    (B, T, H, D).
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))    # (B, T, H, D/2)
    return torch.view_as_real(pairs * turns).flatten(-2).type_as(x)              # (B, T, H, D)

# For a calculation there is something better than a column: an address, like a cell of a table.
#
#     stage   how many "=" stand before the token
#     slot    how many tokens other than digits stand before it in its stage: each ends a slot
#     place   which character of its slot it is: in a number the ones have place 1, the tens place 2
#             (McLeish et al. 2024, "Transformers Can Do Arithmetic with the Right Embeddings")
#
# An address depends on the tokens to the left. So nothing leaks from the future, and the address of
# the token that comes next is known before that token is written. We carry the column along for the
# option --no-place, which uses it alone.

def next_address(address, token):
    """A token's address (column, stage, slot, place) and its id -> the next token's address."""
    column, stage, slot, place = address
    if token == EQUALS:
        return column + 1, stage + 1, 0, 1
    if token in DIGITS:
        return column + 1, stage, slot, place + 1
    return column + 1, stage, slot + 1, 1

def find_addresses(ids):
    """The address of each token and of the one to come: T ids -> T + 1 addresses.

    >>> addresses = find_addresses(encode("12+345=357"))
    >>> for name, numbers in zip(("column", "stage", "slot", "place"), zip(*addresses)):
    ...     print(f"{name:6}", *(f"{n:2}" for n in numbers))     # 2 1 + 5 4 3 = 7 5 3 and the next
    column  0  1  2  3  4  5  6  7  8  9 10
    stage   0  0  0  0  0  0  0  1  1  1  1
    slot    0  0  0  1  1  1  1  0  0  0  0
    place   1  2  3  1  2  3  4  1  2  3  4
    """
    addresses = [(0, 0, 0, 1)]
    for token in ids:
        addresses.append(next_address(addresses[-1], token))
    return addresses

# The model uses addresses in two ways, and both ask about the NEXT token, as that one must be
# found. First, slot and place have embeddings: those of the next token's address are added to each
# token's vector. Second, RoPE: a key is turned by the address of its own token, a query by that of
# the next token. Of its pairs, some turn by stage, some by slot, some by place. To write the 5 of
# 357, the query has place 2, and so have the keys of the tens, 1 and 4: they are at distance 0.
# (The stage has no embedding: all that matters of it is a distance, "one stage earlier".)
#
# A model that has only seen up to ten digits learns that a number ends at place 10, and fails at
# place 11. So in training each line numbers its places in its own way, with gaps: 1, 2, 3 or 1, 3,
# 4 or 1, 3, 5. Ten digits then reach up to place 19, and a place means little but "the same" and
# "higher". That is enough: digits of the same place are added, and the carry comes from the nearest
# lower place, the one just written. (Ruoss et al. 2023, "Randomized Positional Encodings".)

def with_gaps(addresses, gap, rng):
    """Number the places of a line anew, for all its numbers alike: each 1 to `largest` above the
    one before. `largest` is drawn for each line, from 1 (no gaps, as when it answers) to `gap`.
    """
    largest = rng.randint(1, gap)
    new = [0, 1]                                      # there is no place 0, and place 1 stays 1
    for _ in range(max(place for *_, place in addresses)):
        new.append(new[-1] + rng.randint(1, largest))
    return [(column, stage, slot, new[place]) for column, stage, slot, place in addresses]

######## Step 3-3: attention, MLP, block ###########################################################

def attention(q, k, v):
    """Causal attention: queries q (..., T, D), keys k and values v (..., S, D) -> y (..., T, D) and
    attention weights (..., T, S). Without a cache (see below) S is T.

    The score of a query and a key is their dot product: how well they agree. As a sum of D products
    of either sign it grows like sqrt(D), so it is divided by that: with large scores a token would
    look at one alone. A causal mask sets the scores of later tokens to minus infinity. Softmax
    turns a row of scores into weights with the sum 1 (computed, not learned), and the values are
    mixed by these. (Vaswani et al. 2017, "Attention Is All You Need".) Three tokens, D = 2:

    >>> q = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0]])
    >>> k = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    >>> v = torch.tensor([[10.0, 0.0], [0.0, 10.0], [5.0, 5.0]])
    >>> q @ k.T / math.sqrt(2)                        # scores: query 1 likes key 1, query 2 key 0
    tensor([[0.0000, 0.0000, 0.0000],
            [0.0000, 1.4142, 0.0000],
            [2.8284, 0.0000, 0.0000]])
    >>> torch.full((3, 3), float("-inf")).triu(1)     # the mask; triu(1): zeros up to the diagonal
    tensor([[0., -inf, -inf],
            [0., 0., -inf],
            [0., 0., 0.]])
    >>> y, weights = attention(q, k, v)
    >>> weights                                       # token 0 can only look at itself
    tensor([[1.0000, 0.0000, 0.0000],
            [0.1956, 0.8044, 0.0000],
            [0.8943, 0.0529, 0.0529]])
    >>> y
    tensor([[10.0000,  0.0000],
            [ 1.9557,  8.0443],
            [ 9.2071,  0.7929]])

    With a cache (Step 6-1) q is of the newest token, and k and v also of the S - T before it, which
    were kept. So the mask starts that much further right.
    """
    T, S = q.shape[-2], k.shape[-2]
    scores = q / math.sqrt(q.shape[-1]) @ k.transpose(-2, -1)                     # (..., T, S)
    scores += scores.new_full((T, S), float("-inf")).triu(S - T + 1)       # new_full: of its type
    weights = scores.softmax(-1)                                                  # (..., T, S)
    return weights @ v, weights                                                   # (..., T, D)

class CausalSelfAttention(nn.Module):
    """Tokens look at themselves and before: x (B, T, C), turns (B, T + 1, 1, D/2) -> (B, T, C).

    This happens H times side by side, each time with queries, keys and values of its own. Each is a
    head: one may find the tens, another the sign.
    cache: None, or a list, empty at first, that keeps the keys and values of earlier tokens, so
    that each is computed once (the key/value cache).
    """

    def __init__(self, config):
        super().__init__()
        inner = config.n_head * config.head_dim       # H * D; it need not be C
        self.n_head = config.n_head
        self.query = nn.Linear(config.n_embd, inner, bias=False)
        self.key = nn.Linear(config.n_embd, inner, bias=False)
        self.value = nn.Linear(config.n_embd, inner, bias=False)
        self.out = nn.Linear(inner, config.n_embd, bias=False)   # what was found, as C numbers
        self.gain = nn.Parameter(torch.full((1, config.n_head, 1), 2.0))         # used below
        nn.init.zeros_(self.out.weight)               # a new block adds 0

    def forward(self, x, turns, cache=None):
        q = self.query(x).unflatten(-1, (self.n_head, -1))              # (B, T, H, D); -1: the rest
        k = self.key(x).unflatten(-1, (self.n_head, -1))
        v = self.value(x).unflatten(-1, (self.n_head, -1))
        # layer_norm brings the D numbers of a vector (the last axis) to mean 0 and spread 1, so to
        # the length sqrt(D); no score can run away (QK-norm, Henry et al. 2020). How sharply a head
        # looks is then one learned number, its gain.
        q = self.gain * rotate(F.layer_norm(q, q.shape[-1:]), turns[:, 1:])       # next address
        k = rotate(F.layer_norm(k, k.shape[-1:]), turns[:, :-1])                  # own address
        if cache:                                     # not empty
            k, v = torch.cat((cache[0], k), dim=1), torch.cat((cache[1], v), dim=1)
        if cache is not None:
            cache[:] = k, v                                                       # (B, S, H, D)
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))           # (B, H, T or S, D)
        y, weights = attention(q, k, v)                                           # (B, H, T, D)
        self.weights = None if self.training else weights  # training ends at model.eval()
        return self.out(y.transpose(1, 2).flatten(2))                             # (B, T, C)

class Block(nn.Module):
    """Look, then think: x (B, T, C) -> (B, T, C).

    The MLP lets each token think by itself: two layers, and between them ReLU, which sets to 0 what
    is below 0, and a square (So et al. 2021, "Primer"). Without something like that, two layers
    could do no more than one: a product of matrices is a matrix. The 3 C numbers in the middle
    detect things, such as "a 9 and a carry". LayerNorm brings each token's vector to mean 0 and
    spread 1, then applies a learned scale and shift to each of its numbers. So a layer reads
    numbers of one size, however much was added before. (Pre-norm, Xiong et al. 2020.)
    """

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attention = CausalSelfAttention(config)
        self.wide, self.narrow = nn.Linear(C, 3 * C, bias=False), nn.Linear(3 * C, C, bias=False)
        nn.init.zeros_(self.narrow.weight)            # a new block adds 0, as above

    def forward(self, x, turns, cache=None):
        x = x + self.attention(self.norm1(x), turns, cache)
        detected = self.wide(self.norm2(x)).relu().square()                       # (B, T, 3 C)
        return x + self.narrow(detected)

######## Step 3-4: the model #######################################################################

@dataclasses.dataclass
class Config:
    """All that defines a run. Each is a flag of `train`: --n_layer 2, --no-place ..."""
    n_layer: int = 4            # blocks, one after the other
    n_head: int = 6             # attention heads H of a block
    head_dim: int = 32          # numbers D for each token in a head
    n_embd: int = 128           # numbers C for each token
    block_size: int = 448       # longest line, in tokens (it has nothing to do with blocks)
    n_place: int = 64           # places that have an embedding: ones, tens, hundreds ...
    n_slot: int = 40            # slots that have an embedding
    place: bool = True          # tell the model stage, slot and place; --no-place: the column alone
    gap: int = 2                # in training each place is 1 to this above the last
    ones_first: bool = True     # write numbers from the ones place
    working: bool = True        # learn to write the working; --no-working: the answer alone
    muon: bool = True           # train the matrices with Muon (Step 5-1); --no-muon: all with AdamW
    kinds: str = "add sub mul div expr algebra"      # kinds of problem to learn
    steps: int = 7500           # optimizer steps
    batch_tokens: int = 4096    # tokens of a batch, about; a batch is one optimizer step
    lr: float = 0.02            # highest learning rate of Muon
    adam_lr: float = 0.003      # highest learning rate of AdamW
    weight_decay: float = 0.01  # how strongly the weights are pulled towards zero
    warmup: int = 100           # steps in which the learning rates rise
    flat: float = 0.4           # part of the run after which the learning rates fall
    seed: int = 0               # chooses the first weights and the training problems

class TinyLLM(nn.Module):
    """A decoder-only Transformer: ids (B, T) -> logits (B, T, V). One example all the way: 4 tokens
    become 4 vectors of C = 128 numbers, a block keeps the shape, and each becomes 21 scores.

    >>> model = TinyLLM(Config())
    >>> ids = torch.tensor([encode("7+8=")])
    >>> addresses = torch.tensor([find_addresses(ids[0].tolist())])
    >>> x, turns = model.embed(ids, addresses), model.turns(addresses)
    >>> [list(tensor.shape) for tensor in (ids, x, model.blocks[0](x, turns), model(ids))]
    [[1, 4], [1, 4, 128], [1, 4, 128], [1, 4, 21]]

    The last row of scores is for the token after "=": a 5, the ones of 15. A new model guesses:

    >>> logits = model(ids)[0, -1]                    # (V,)
    >>> loss = F.cross_entropy(logits, torch.tensor(ID["5"]))          # -ln of the softmax at "5"
    >>> 0.01 < logits.softmax(-1)[ID["5"]].item() < 0.15, 2 < loss.item() < 4     # 1/21 and ln 21
    (True, True)
    >>> sum(p.numel() for p in model.parameters())    # weights in all
    807448
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.token = nn.Embedding(len(VOCAB), config.n_embd)
        self.place = nn.Embedding(config.n_place, config.n_embd)
        self.slot = nn.Embedding(config.n_slot, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd)
        self.output = nn.Linear(config.n_embd, len(VOCAB), bias=False)
        for layer in (self.token, self.place, self.slot, self.output):
            nn.init.normal_(layer.weight, std=0.02)   # small first logits

    def embed(self, ids, addresses):
        """What each token is and where the next one goes: ids (B, T) -> x (B, T, C)."""
        x = self.token(ids)                                                       # (B, T, C)
        if self.config.place:
            _, _, slot, place = addresses[:, 1:].unbind(-1)                       # (B, T) each
            # beyond the tables, the last row stands for all
            x = x + self.slot(slot.clamp(max=self.config.n_slot - 1))
            x = x + self.place(place.clamp(max=self.config.n_place - 1))
        return x

    def turns(self, addresses):
        """How keys and queries turn: addresses (B, T + 1, 4) -> (B, T + 1, 1, D/2), complex."""
        column, stage, slot, place = addresses.unbind(-1)                         # (B, T + 1) each
        n_pairs = self.config.head_dim // 2
        if not self.config.place:
            return rotations(column, n_pairs, 1000).unsqueeze(2)
        # Of 16 pairs: place 4, slot 6, stage 6. This and the bases are choices.
        n = 3 * n_pairs // 8
        by_place, by_slot = rotations(place, n_pairs - 2 * n, 100), rotations(slot, n, 16)
        return torch.cat((by_place, by_slot, rotations(stage, n, 16)), dim=-1).unsqueeze(2)

    def forward(self, ids, addresses=None, cache=None):
        """ids (B, T) -> logits (B, T, V). addresses (B, T + 1, 4); None: they are counted here.

        cache: a list for each block; then ids and addresses are of the tokens after those in it.
        """
        if addresses is None:
            addresses = [find_addresses(row) for row in ids.tolist()]
            addresses = torch.tensor(addresses, device=ids.device)                # (B, T + 1, 4)
        x = self.embed(ids, addresses)                                            # (B, T, C)
        turns = self.turns(addresses)                                      # (B, T + 1, 1, D/2)
        for i, block in enumerate(self.blocks):
            x = block(x, turns, cache[i] if cache else None)                      # (B, T, C)
        return self.output(self.norm(x))                                          # (B, T, V)

######## Step 4-1: making the data #################################################################
# The model learns from lines such as these, one of each kind. They are drawn at random, and worked
# by rules. (The rules are school arithmetic and stand in the appendix.)
#     add      48213+51786=99999
#     sub      150-144=6
#     mul      345*27=345*20+345*7=6000+900+(2100+315)=6900+2415=9315
#     div      162/7=20+(162-140)/7=20+22/7=20+3+(22-21)/7=23+1/7
#     expr     (12+3)*4-6=15*4-6=60-6=54
#     algebra  3(2x-1)-2(x+4)=6x-3-2x-8=6x-2x-3-8=4x-11
#
# A problem has a size: the digits of its longest number in the first four kinds, its operators in
# the others. Lengths are drawn evenly, not values: nine in ten numbers below 10^10 have ten digits,
# so that short ones would hardly ever come.

def draw_number(rng, n_digits):
    """A number of n digits (one digit: 0 to 9)."""
    return rng.randrange(10 ** (n_digits - 1) if n_digits > 1 else 0, 10 ** n_digits)

def draw_sum(op, rng, top):
    """A sum or difference; each number has up to `top` digits. Some are hard on purpose."""
    a = draw_number(rng, rng.randint(1, top))
    b = draw_number(rng, rng.randint(1, top))
    dice, digits = rng.random(), str(a)
    keep = rng.randrange(len(digits))
    if dice < 0.3:                                    # two numbers of one length
        b = draw_number(rng, len(digits))
    if dice < 0.1:                                    # of these, some begin alike: 48213-48179
        b = int(digits[:keep] + str(draw_number(rng, len(digits) - keep)))
    elif dice > 0.9:                                  # 48213+51786 is all nines, +51787 all carries
        b = int("".join(str(9 - int(d)) for d in digits[keep:])) + rng.randint(0, 1)
    return f"{'-' if rng.random() < 0.05 else ''}{a}{op}{b}"

def draw_product(rng, top):
    return f"{draw_number(rng, rng.randint(1, top))}*{draw_number(rng, rng.randint(1, top))}"

def draw_quotient(rng, top):
    """Three in ten, or more, are fractions below 1; half of the others have no remainder."""
    a = draw_number(rng, rng.randint(1, top))
    b = draw_number(rng, rng.randint(1, 2)) or 1
    if rng.random() < 0.3:
        return draw_fraction(rng, top)                # in the appendix
    if rng.random() < 0.5:
        a = a // b * b or b
    return f"{a}/{b}"

@dataclasses.dataclass
class Kind:
    """All that this program knows of a kind of problem. (A lambda may name what comes later.)"""
    draw: callable              # draw(rng, top) -> a problem of about size top or less
    looks: str                  # a pattern for its problems; the first kind that fits counts
    sizes: range                # the sizes to train on
    beyond: tuple = ()          # larger sizes, which eval asks as well
    share: float = 1.0          # how often it is drawn, compared with the others (tried out)
    practice: dict = dataclasses.field(default_factory=dict)     # name -> (part, draw): appendix
    size: callable = lambda problem: longest_number(problem)     # problem -> its size
    stage: callable = lambda text: rewrite(text)                 # the next stage; at the end, text
    worth: callable = lambda text: exact_value(text)     # the right answer to text, as a text
    is_drawn: callable = lambda problem: True                    # False: training never draws it

SECOND = r"([0-9]+|\(-[0-9]+\))"                      # a second number: 7 or (-7)
LONG = (11, 12, 14, 16, 18, 20)
KINDS = {
    "add": Kind(functools.partial(draw_sum, "+"), rf"-?[0-9]+\+{SECOND}", range(1, 11), LONG, 0.5),
    "sub": Kind(functools.partial(draw_sum, "-"), rf"-?[0-9]+-{SECOND}", range(1, 11), LONG, 1.95),
    "mul": Kind(draw_product, rf"-?[0-9]+\*{SECOND}", range(1, 4), (4,), 0.9),
    "div": Kind(draw_quotient, rf"-?[0-9]+/{SECOND}", range(1, 6), (6,), 1.9),
}                                                     # the appendix adds expr and algebra

def kind_of(problem):
    """The name of a problem's kind.

    >>> kind_of("123*45"), kind_of("12-(-7)"), kind_of("1+2*3"), kind_of("2x+3x-1")
    ('mul', 'sub', 'expr', 'algebra')
    """
    return next(name for name, kind in KINDS.items() if re.fullmatch(kind.looks, problem))

# One problem in ten is held out: never given in training, so that we can ask what the model cannot
# have learned by heart. (As a stage of a longer line it may turn up, which is rare except for small
# numbers.) A number computed from the text decides, the same for every seed.

def is_held_out(problem):
    """Is this problem kept for evaluation? 12+39 and 39+12 are both held out, or both not.

    >>> is_held_out("12+60"), is_held_out("60+12"), is_held_out("12+61")
    (True, True, False)
    """
    written_out = re.sub(r"(\([^()]*\)|[xy])\^2", r"\1\1", problem)    # (x+1)^2 is (x+1)(x+1)
    parts = sorted(re.findall("[0-9]+|[^0-9()+]", written_out))          # brackets and + left out
    return zlib.crc32(" ".join(parts).encode("utf-8")) % 10 == 0

def draw_problem(kind, rng, held_out, top=None):
    """Draw a problem of a kind, of about size top or less. Training also draws what is hard, from
    kind.practice, as a pupil practises it; what is held out comes from kind.draw alone.
    """
    of_kind = KINDS[kind]
    practice = [] if held_out else list(of_kind.practice.values())
    draws = [of_kind.draw] + [draw for _, draw in practice]
    shares = [1 - sum(share for share, _ in practice)] + [share for share, _ in practice]
    while True:
        problem = rng.choices(draws, shares)[0](rng, top or of_kind.sizes[-1])
        if is_held_out(problem) == held_out:
            return problem

# A kind of your own, to skip at first: sums of two fractions (Fraction is imported below). Take
# away the "# " of these lines, and try `train --kinds frac --minutes 2`.
#
# def draw_fractions(rng, top):
#     b, d = rng.randint(2, 6 * top), rng.randint(2, 6 * top)
#     return f"{rng.randrange(1, b)}/{b}+{rng.randrange(1, d)}/{d}"
#
# def add_fractions(text):
#     numbers = [int(n) for n in re.findall("[0-9]+", text)]
#     if len(numbers) < 4:
#         return text
#     a, b, c, d = numbers
#     common = math.lcm(b, d)
#     if b != d:                                      # 1/2+1/3=3/6+2/6
#         return f"{a * common // b}/{common}+{c * common // d}/{common}"
#     whole, rest = divmod(Fraction(a + c, b), 1)     # 3/6+2/6=5/6, and 3/4+2/4=1+1/4
#     return "+".join(str(part) for part in (whole, rest) if part)
#
# KINDS["frac"] = Kind(draw_fractions, "[0-9]+/[0-9]+[+][0-9]+/[0-9]+", range(1, 4),
#                      stage=add_fractions)

######## Step 4-2: from a line to x and y ##########################################################

def to_example(line, ones_first=True):
    """A line to (x, y): two lists of ids. y is x one token later, or -100, which the loss skips.

    At each position the model reads x up to there and should say y. Only what it must write counts:
    everything behind the first "=". Nothing leaks: what it should say it has not read yet.

    >>> x, y = to_example("7+8=15")
    >>> for i, (a, b) in enumerate(zip(x, y)):
    ...     wanted = repr(VOCAB[b]) if b >= 0 else "(not counted)"
    ...     print(i, "reads", repr(VOCAB[a]), "should say", wanted)
    0 reads '7' should say (not counted)
    1 reads '+' should say (not counted)
    2 reads '8' should say (not counted)
    3 reads '=' should say '5'
    4 reads '5' should say '1'
    5 reads '1' should say '\\n'
    """
    ids = encode(line + "\n", ones_first)
    n_given = ids.index(EQUALS) + 1
    return ids[:-1], [-100] * (n_given - 1) + ids[n_given:]

######## Step 4-3: the data loader #################################################################

def new_progress(minutes=None):
    """How far a run has come. minutes: how long to train; None: for config.steps steps."""
    return {"step": 0, "seconds": 0.0, "minutes": minutes, "history": []}

def part_done(progress, config):
    """The part of a run that is over, 0 to 1."""
    if progress["minutes"]:
        return min(1.0, progress["seconds"] / 60 / progress["minutes"])
    return min(1.0, progress["step"] / config.steps)

class ProblemPools(Dataset):
    """pools[n] is pool n, a list of batches: x (B, T), addresses (B, T + 1, 4), y (B, T).

    The rows of a batch are computed together, so they must be equally long. Short lines are filled
    up at the right, where no token of theirs looks and y is -100: that is padding, and wasted work.
    So a pool of 64 batches is drawn and sorted by length first. In a run of a set number of steps,
    pool n depends on n and config alone, so that a run that was stopped goes on as it would have.
    """
    POOL = 64

    def __init__(self, config, progress):
        self.config, self.progress = config, progress

    def draw_example(self, rng, done):
        kinds = self.config.kinds.split()
        kind = rng.choices(kinds, [KINDS[name].share for name in kinds])[0]
        # Curriculum (Bengio et al. 2009): in the first fifth of a run nine in ten start small
        sizes = KINDS[kind].sizes
        n_open = len(sizes) if rng.random() < 0.1 else int(5 * done * len(sizes)) + 1
        problem = draw_problem(kind, rng, False, sizes[:n_open][-1])
        line = solve_by_rules(problem, self.config.working)      # in the appendix
        x, y = to_example(line, self.config.ones_first)
        return x, with_gaps(find_addresses(x), self.config.gap, rng), y

    def __getitem__(self, n):
        # on several GPUs (Step 7-5) each has pools of its own; on one these are 1 and 0
        rng = random.Random(f"{self.config.seed}/{n * WORLD_SIZE + RANK}")
        done = part_done({**self.progress, "step": n * self.POOL}, self.config)
        examples, n_tokens = [], 0
        while n_tokens < 1.05 * self.POOL * self.config.batch_tokens:          # some are not used
            examples.append(self.draw_example(rng, done))
            n_tokens += len(examples[-1][0])
        examples.sort(key=lambda example: len(example[0]), reverse=True)
        batches = []
        while examples:
            T = math.ceil(len(examples[0][0]) / 4) * 4           # a multiple of 4: fewer shapes
            rows = examples[:max(1, self.config.batch_tokens // T)]
            examples = examples[len(rows):]
            xs = [x + [END] * (T - len(x)) for x, _, _ in rows]
            addresses = [where + where[-1:] * (T + 1 - len(where)) for _, where, _ in rows]
            ys = [y + [-100] * (T - len(y)) for _, _, y in rows]
            batches.append((torch.tensor(xs), torch.tensor(addresses), torch.tensor(ys)))
        rng.shuffle(batches)
        return batches[:self.POOL]

def stream_batches(config, progress, **helpers):
    """The batches of a run, from progress["step"] on. PyTorch's DataLoader asks for pools[first],
    pools[first + 1] ... and has them made by helper processes, if it is given some (Step 7-6).
    """
    first, skip = divmod(progress["step"], ProblemPools.POOL)
    pools = DataLoader(ProblemPools(config, progress), batch_size=None,          # a pool as it is
                       sampler=itertools.count(first), **helpers)
    pools = map(pickle.loads, pools) if helpers else pools       # helpers send bytes
    return itertools.islice(itertools.chain.from_iterable(pools), skip, None)

######## Step 5-1: the loss and the optimizers #####################################################

def loss_of(model, x, addresses, y):
    """Cross-entropy: the mean of -ln P(y) over the tokens that count."""
    # autocast: matrix products with half the bits, where that is faster
    with torch.autocast(x.device.type, torch.bfloat16, enabled=has_fast_bfloat16(x.device.type)):
        logits = model(x, addresses)                                              # (B, T, V)
    return F.cross_entropy(logits.float().flatten(0, 1), y.flatten())   # y (B*T,); -100 is skipped

# Adam (Kingma and Ba 2014) improves on plain gradient descent in two ways. It follows the mean of
# the last gradients, called momentum, so that the accident of one batch is averaged out. And it
# divides by how large a weight's gradients usually are, so that all weights move at a like pace.
# AdamW (Loshchilov and Hutter 2017) adds weight decay: each step shrinks all weights, so that one
# of no use fades away.
#
# Muon (Jordan et al. 2024) is for matrices. A matrix stretches space along certain directions, and
# so does its gradient, which is strong along the few that most examples ask for. Muon makes the
# step equally strong along all, for what is rare must be learned, too.

def orthogonal(matrix):
    """A matrix of the same directions, all stretched about equally: (rows, columns) -> the same.

    (Orthogonal means that all are stretched by 1.) Its singular values s say how much it stretches
    along each. Five times, each s becomes 3.4445 s - 4.775 s^3 + 2.0315 s^5, and ends between 0.7
    and 1.2, if it was not tiny. Matrix products suffice for that: x stretches by s, x.T (back
    again) by s, and x once more, so x @ x.T @ x has s^3 (Newton-Schulz iteration). You may take
    this function on trust.

    >>> matrix = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.1, 0.0]])      # singular values 3 and 0.1
    >>> [round(s, 1) for s in orthogonal(matrix).diagonal().tolist()]
    [0.7, 1.1]
    """
    if len(matrix) > matrix.shape[1]:
        return orthogonal(matrix.T).T
    x = matrix / (matrix.norm() + 1e-7)    # norm: the root of the sum of squares; no s is above 1
    for _ in range(5):
        # addmm(a, b, c, beta=m, alpha=n) is m a + n b @ c, in one call
        gram = x @ x.T                                                            # (rows, rows)
        both = torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.addmm(x, both, x, beta=3.4445, alpha=1)
    return x

class Muon(torch.optim.Optimizer):
    """Gradient descent with momentum and orthogonal steps. (torch.optim's is slow on many CPUs.)"""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:               # what was given to __init__, here one group
            for p in group["params"]:
                # state: what the optimizer keeps for each Parameter, at first zeros
                mean = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])        # a.lerp(b, w): (1 - w) a + w b
                ahead = p.grad.lerp(mean, group["momentum"])     # the newest counts more (Nesterov)
                p.mul_(1 - group["lr"] * group["weight_decay"])          # weight decay
                size = max(1, len(p) / p.shape[1]) ** 0.5        # more rows than columns: longer
                rate = torch.as_tensor(-group["lr"] * size, device=p.device)     # for Step 7-6
                p.addcmul_(orthogonal(ahead), rate)              # p + rate * orthogonal(ahead)

def make_optimizers(model, config):
    """Muon for the matrices of the blocks, AdamW for the rest: embeddings, norms, gains, output."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2 and config.muon]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    decay = config.weight_decay
    # betas: how much of its two means, of gradients and of their squares, stays at each step
    adam = torch.optim.AdamW(others, config.adam_lr, betas=(0.9, 0.98), weight_decay=decay)
    return [adam, Muon(matrices, config.lr, weight_decay=decay)] if matrices else [adam]

def lr_factor(step, done, config):
    """What the learning rates are multiplied by, when the part `done` (0 to 1) of the run is over.

    They rise while the optimizers' means are still empty (warm-up), stay, then fall in a straight
    line to 2%: small steps settle what large ones leave shaking.

    >>> [round(lr_factor(step, step / 1000, Config()), 2) for step in (0, 49, 99, 400, 700, 1000)]
    [0.01, 0.5, 1.0, 1.0, 0.51, 0.02]
    """
    fall = min(1.0, (1 - done) / (1 - config.flat))
    return min(1.0, (step + 1) / config.warmup) * (0.02 + 0.98 * fall)

######## Step 5-2: the training loop ###############################################################

def learn(model, optimizers, x, addresses, y):
    """One optimizer step on one batch: the five lines that are all of deep learning. -> the loss"""
    loss = loss_of(model, x, addresses, y)
    model.zero_grad()                                 # forget the gradients of the last batch
    loss.backward()                                   # the gradient of the loss for every weight
    for optimizer in optimizers:
        optimizer.step()                              # every weight moves a little against it
    return loss.detach()                              # without its record

def fit(model, optimizers, progress, out, report=None):
    """Train until the run is over. batches_of_run (Step 7-5) takes batches from stream_batches and
    counts each in `progress` when it is learned. At every hundredth of the run it averages `losses`
    and empties it; at every tenth it prints a row by `report` and saves to `out`.
    """
    losses = []
    step = fastest_step(model, optimizers)            # learn for these two; on a GPU faster
    for x, addresses, y in batches_of_run(model, optimizers, progress, losses, out, report):
        factor = lr_factor(progress["step"], part_done(progress, model.config), model.config)
        for optimizer in optimizers:                  # defaults: what it was made with
            optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * factor
        losses.append(step(x, addresses, y))

######## Step 5-3: watching it learn ###############################################################
# At every tenth of a run a row is printed:
#
#       step done   loss tokens/s  min    add    sub    mul    div   expr algebra
#        750  10% 0.3086   10,647  4.7    78%    41%    17%    16%    22%     19%
#
# It shows the loss, the speed, the minutes so far, and which part of 100 held-out problems of each
# kind is answered right. The loss falls first: for an answer, every token must be right.

######## Step 5-4: saving ##########################################################################

FORMAT = 7                              # of the file; raised when its meaning changes

def save_checkpoint(path, model, optimizers=(), progress=None):
    """Write all that is needed to ask the model, and to go on training it. Raises InputError."""
    write_whole(path, {                               # under another name first, then renamed
        "format": FORMAT, "vocabulary": VOCAB, "config": dataclasses.asdict(model.config),
        "model": {name: tensor.cpu() for name, tensor in model.state_dict().items()},
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "progress": progress or new_progress()})

# load_checkpoint (Step 7-5) reads it again: path -> (model, all that is in the file).

######## Step 6-1: writing an answer ###############################################################

@torch.inference_mode()
def generate(model, prompt, max_tokens=None):
    """Greedy decoding: continue a list of ids with the likeliest token, again and again, until END.

    This function knows nothing of arithmetic. max_tokens counts the prompt, too.
    """
    ids = list(prompt)
    while len(ids) < (max_tokens or model.config.block_size):
        logits = model(torch.tensor([ids], device=model.output.weight.device))    # (1, T, V)
        token = logits[0, -1].argmax().item()
        if token == END:
            break
        ids.append(token)
    return ids

# That computes the whole line again for every token. The next function writes the same for many
# prompts at once and keeps the keys and values of earlier tokens. Each step gives each row one
# token more: the next one of its prompt or, when the prompt is over, the likeliest one.

@torch.inference_mode()
def generate_batch(model, prompts, max_tokens=None):
    """generate for many prompts: lists of ids -> lists of ids."""
    device = model.output.weight.device
    rows = [list(prompt) for prompt in prompts]
    addresses = [find_addresses(row[:1]) for row in rows]        # of the newest token and the next
    going = list(range(len(rows)))                               # the rows that have not ended
    cache = [[] for _ in model.blocks]                           # keys and values of each block
    for t in range((max_tokens or model.config.block_size) - 1):
        ids = torch.tensor([[rows[i][t]] for i in going], device=device)          # (B, 1)
        where = torch.tensor([addresses[i] for i in going], device=device)        # (B, 2, 4)
        likeliest = model(ids, where, cache)[:, -1].argmax(-1).tolist()           # B tokens
        kept = []
        for j, i in enumerate(going):
            if t + 1 == len(rows[i]):                            # the prompt is over
                if likeliest[j] == END:
                    continue
                rows[i].append(likeliest[j])
            addresses[i] = [addresses[i][1], next_address(addresses[i][1], rows[i][t + 1])]
            kept.append(j)
        if not kept:
            break
        if len(kept) < len(going):                               # rows that have ended leave
            going = [going[j] for j in kept]
            cache = [[k[kept], v[kept]] for k, v in cache]
    return rows

def solve(model, problems, batch_size=500, max_tokens=None):
    """The full line that the model writes for each problem, in the same order."""
    order = sorted(range(len(problems)), key=lambda i: len(problems[i]))
    lines = [""] * len(problems)
    for start in range(0, len(order), batch_size):               # like lengths side by side
        batch = order[start:start + batch_size]
        prompts = [encode(problems[i] + "=", model.config.ones_first) for i in batch]
        for i, ids in zip(batch, generate_batch(model, prompts, max_tokens)):
            lines[i] = decode(ids, model.config.ones_first)
    return lines

######## Step 6-2: what "right" means ##############################################################

def check(line):
    """Was a line that the model wrote right? -> (answer, working).

    The answer is right if it is what the problem is worth (see Kind), written in the one form that
    an answer has; the working is right if the answer is and all stages are worth the same.

    >>> check("2+3*4=2+12=14"), check("2+3*4=5*4=14"), check("2+3*4=2+12"), check("7-7=-0")
    ((True, True), (True, False), (False, False), (False, False))
    """
    first, *others = worths(line)         # the right answer to each part (in the appendix)
    answer = others[-1:] == [first] and line.endswith(f"={first}")
    return answer, answer and set(others) == {first}

def evaluate(model, problems):
    """Ask problems: how many answers and workings are right, the mean length, the wrong lines.

    A model that has learned nothing does not end: it is stopped at twice the longest right line.
    """
    longest = max((len(solve_by_rules(problem)) for problem in problems), default=0)
    lines = solve(model, problems, max_tokens=min(model.config.block_size, 2 * longest))
    checks = [check(line) for line in lines]
    return {"answers": sum(answer for answer, _ in checks),
            "workings": sum(working for _, working in checks),
            "length": sum(map(len, lines)) / max(1, len(lines)),
            "wrong": [line for line, (_, working) in zip(lines, checks) if not working]}

####################################################################################################
#
#   The tutorial ends here. What follows are views, commands and school arithmetic: you may stop.
#
####################################################################################################

######## Step 7-1: what the model looked at ########################################################

import argparse                                                                   # noqa: E402
import ast                                                                        # noqa: E402
import contextlib                                                                 # noqa: E402
import inspect                                                                    # noqa: E402
import json                                                                       # noqa: E402
import secrets                                                                    # noqa: E402
import shlex                                                                      # noqa: E402
import socketserver                                                               # noqa: E402
import threading                                                                  # noqa: E402
import unicodedata                                                                # noqa: E402
import wsgiref.simple_server                                                      # noqa: E402
from fractions import Fraction                                                    # noqa: E402
import torch.distributed as dist                                                  # noqa: E402

class InputError(ValueError):
    """What a person gave cannot be used. The message says what was wrong, and what to do."""

def watch(model, line):
    """What happened while a line was written: the line as the model reads it (T characters), the
    attention weights (n_layer, H, T, T) and the probabilities of the next token (T, V).
    """
    ids = encode(line, model.config.ones_first)
    with torch.inference_mode():
        logits = model(torch.tensor([ids], device=model.output.weight.device))[0]
    weights = torch.stack([block.attention.weights[0] for block in model.blocks])
    return "".join(VOCAB[i] for i in ids), weights.cpu(), logits.softmax(-1).cpu()

def shades(weights, marks):
    """Weights of 0 to 1 as one of ten marks each: 0, 0.15, 1 is "019" with "0123456789"."""
    return "".join(marks[min(9, int(10 * weight))] for weight in weights.tolist())

def look(model, line, width=74):
    """A picture of the head that looks sharply at most places: a row for each character that was
    written, a column for each before it. Long lines come in blocks of `width` columns.
    """
    text, weights, _ = watch(model, line)
    start = text.index("=")
    # tril(-2): a look at itself or at its neighbour does not count
    sharpness = weights.tril(-2)[:, :, start:].amax(2).sum(-1)                    # (n_layer, H)
    layer, head = divmod(sharpness.argmax().item(), sharpness.shape[1])
    rows = [f"layer {layer + 1}, head {head + 1}; a weight of 0 to 1 is one of these: ' .:-=+*#%@'"]
    for left in range(0, len(text), width):
        rows.append("     " + text[left:left + width])
        for t in range(max(start, left), len(text)):
            row = shades(weights[layer, head, t, :t + 1], " .:-=+*#%@")[left:left + width]
            rows.append(f"{(text + ' ')[t + 1]:>3}  {row}".rstrip())
    return "\n".join(rows)

######## Step 7-2: mathematics as it is printed ####################################################
# LaTeX, for papers, and MathML, for browsers, are two views of a line. Each is a list of
# replacements, made one after the other; {1|2} is a fraction by then.

BAR = str.maketrans("/", "|", "()")                   # 2*7/(3*5) -> 2*7|3*5
LATEX = [("{", r"\\frac{"), (r"\|", "}{"), (r"\*", r" \\times "), ("/", r" \\div "),
         ("\u00b2", "^{2}")]
MATHML = [("/", "\u00f7"), (r"\*", "\u00d7"), ("-", "\u2212"), ("[0-9]+", r"<mn>\g<0></mn>"),
          ("[xy]", r"<mi>\g<0></mi>"), ("[+()=^\u00f7\u00d7\u2212]", r"<mo>\g<0></mo>"),
          ("(<m.>[^<]+</m.>)\u00b2", r"<msup>\1<mn>2</mn></msup>"),
          ("{", "<mfrac><mrow>"), (r"\|", "</mrow><mrow>"), ("}", "</mrow></mfrac>")]

def typeset(text, language):
    """A stage as LaTeX or MathML."""
    text = text.replace("^2", "\u00b2")
    shown = each_fraction(lambda fraction: f"{{{fraction.translate(BAR)}}}", text)
    for pattern, replacement in language:
        shown = re.sub(pattern, replacement, shown)
    return shown.replace("(", r"\left(").replace(")", r"\right)") if r"\frac" in shown else shown

def to_latex(line):
    """A line as an align* block of LaTeX."""
    problem, *stages = [typeset(stage, LATEX) for stage in line.split("=")]
    rows = " \\\\\n".join("&=" + stage for stage in stages)
    return "\\begin{align*}\n" + problem + rows + "\n\\end{align*}"

######## Step 7-3: what a person types, and what is said about the answer ##########################

LOOKALIKES = str.maketrans("\u00d7\u22c5\u00b7\u2217\u00f7\u2215\u2044:"
                           "\u2212\u2010\u2011\u2013\u2014[{]}", "****////-----(())", "\ufeff")

def normalize(text):
    """What people type, in the characters of VOCAB. Raises InputError for what cannot be meant."""
    text = text.replace("\u00b2", "^2").replace("**", "^")
    clean = unicodedata.normalize("NFKC", text).translate(LOOKALIKES).lower()
    unknown = [c for c in text if unicodedata.category(c) in ("No", "Lm")]       # raised
    unknown += [c for c in clean if c not in ID and c != "," and not c.isspace()]
    if unknown:
        name = unicodedata.name(unknown[0], "")
        raise InputError(f"unknown character {ascii(unknown[0])} {name}; write these: {VOCAB[1:]}")
    if re.search(r"[0-9]\s+[0-9]", clean):
        raise InputError("there is a space inside a number; write 1 1/2 as 1+1/2")
    clean = re.sub(r"^\+|\s|=$", "", clean.strip())              # +5 is 5
    thousands = r"\b[1-9][0-9]{0,2}(,[0-9]{3})+\b"
    clean = re.sub(thousands, lambda match: match[0].replace(",", ""), clean)
    if not clean or "=" in clean or "," in clean:
        raise InputError("write one problem, such as 12*34, without = and decimals in it")
    clean = re.sub("(?<![0-9])0+(?=[0-9])", "", clean).replace("(+", "(")        # 007 is 7
    return re.sub(r"(?<=[-+*/])-((?:[0-9]|[xy](?:\^2)?)+)", r"(-\1)", clean)      # 5--3 is 5-(-3)

def prepare(text, model):
    """What a person typed, as a problem that the model can be asked. Raises InputError."""
    problem = normalize(text)
    room = model.config.block_size // 2 - 2
    if len(problem) > room:
        raise InputError(f"the problem is longer than {room} characters; write it in parts")
    KINDS[kind_of(problem)].worth(problem)            # raises where it cannot be read
    while re.fullmatch(r"\(.*\)", problem) and is_true(f"{problem}={problem[1:-1]}"):
        problem = problem[1:-1]                       # brackets round the whole
    if not re.search("[xy]", problem):
        return re.sub(r"(?<=[0-9)])\(", "*(", problem)           # 2(3+4) is asked as 2*(3+4)
    if "/" not in problem:                            # x*2 and 2*x are asked as 2x
        item = r"(?:\([^()]*\)|[xy])(?:\^2)?"
        problem = re.sub(rf"(?<![0-9xy)^*])({item})\*([0-9]+)(?![0-9xy(^*])", r"\2\1", problem)
        problem = re.sub(r"(?<=[0-9xy)])\*(?=[xy(])", "", problem)
    return problem

def is_outside(problem, config):
    """Is this problem of a kind that was not learned, or one that could not have been drawn?"""
    kind = kind_of(problem)
    return kind not in config.kinds.split() or not KINDS[kind].is_drawn(problem)

RIGHT = "the answer is right"
OUTSIDE = "this problem is outside the range that the model was trained on"

def explain(line):
    """The exact check in words: of each stage, and of the answer."""
    first, *others = worths(line)
    words = []
    for before, worth in zip([first, *others], others):
        if worth is not None and worth == first:
            words.append("true")
        elif worth is not None and worth == before:   # after a slip, right but for the slip
            words.append("follows from that")
        elif set(words) <= {"true"}:
            words.append(f"NOT TRUE: it should be {first}")
        else:
            words.append("NOT TRUE: another slip")
    if check(line)[0]:
        return words, RIGHT
    if words[-1:] == ["true"]:
        return words, "it is true but could be simpler, so this is NOT AN ANSWER"
    return words, "this is NOT the right answer"

######## Step 7-4: the page ########################################################################

EXAMPLES = ("12+39", "(12+3)*4-6", "345*27", "1831/23", "48213-51786", "3(2x-1)-2(x+4)",
            "(x+2)(x-3)", "1/2+1/3", "99999*99999")

def reply_to(model, text):
    """What the page shows for a problem, as a dict for JSON. Raises InputError."""
    problem = prepare(text, model)
    line = solve(model, [problem])[0]
    read, weights, probabilities = watch(model, line)
    start = read.index("=")
    words, sentence = explain(line)
    note = OUTSIDE if is_outside(problem, model.config) else ""
    shown, *stages = [typeset(stage, MATHML) for stage in line.split("=")]
    tokens = []                                       # what happened at each token that was written
    for t in range(start, len(read)):
        values, ids = probabilities[t].topk(3)
        likeliest = [VOCAB[i].replace("\n", "end") for i in ids.tolist()]
        heads = [shades(head[t, :t + 1], "0123456789") for head in weights.flatten(0, 1)]
        tokens.append({"next": list(zip(likeliest, values.tolist())), "heads": heads})
    return {"problem": shown, "stages": list(zip(stages, words)), "latex": to_latex(line),
            "right": sentence == RIGHT, "sentence": sentence, "note": note,
            "read": read, "start": start + 1, "tokens": tokens}

HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
           "Cache-Control": "no-store", "Content-Security-Policy":
           "default-src 'none'; base-uri 'none'; frame-ancestors 'none'; form-action 'none'; "
           "connect-src 'self'; style-src 'nonce-NONCE'; script-src 'nonce-NONCE'"}

class Handler(wsgiref.simple_server.WSGIRequestHandler):
    timeout = 10                                      # seconds that a client may stall

    def log_message(self, *_):
        pass

class Server(socketserver.ThreadingMixIn, wsgiref.simple_server.WSGIServer):
    """Serves PAGE (at the end) for a model; port 0 takes a free one. Raises InputError."""
    request_queue_size, daemon_threads = 128, True
    allow_reuse_address = os.name != "nt"             # on Windows two servers could share a port

    def __init__(self, model, history=(), host="127.0.0.1", port=8000):
        self.model, self.host, self.lock = model, host, threading.Lock()
        kinds = model.config.kinds.split()
        examples = [problem for problem in EXAMPLES if kind_of(problem) in kinds]
        lines = solve(model, examples, max_tokens=160)
        marks = ["" if check(line)[0] else " (it fails here)" for line in lines]
        self.data = json.dumps({"examples": list(zip(examples, marks)), "history": history,
                                "heads": model.config.n_head}).replace("<", "\\u003c")
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError, TypeError, ValueError) as error:
            raise InputError(f"cannot serve on --host {host} --port {port}: {error}") from error
        self.set_app(self.respond)

    def handle_error(self, request, client_address):
        pass                                          # a client that went away harms no other

    def answer(self, request):
        """GET / is the page, and POST /solve {"problem": text} is answered in JSON. All else is
        refused, also what comes from another page (Origin) or by another name than ours (Host).
        request: a dict, as WSGI makes it. Returns the status and the text.
        """
        host, port = request.get("HTTP_HOST", ""), self.server_port
        names = rf"(localhost|[0-9.]+|{re.escape(self.host)})(:{port}){'?' * (port == 80)}"
        origin = request.get("HTTP_ORIGIN", f"http://{host}")
        if not re.fullmatch(names, host) or origin != f"http://{host}":
            return 403, "open the address that the server printed, in a page of its own"
        asked = request["REQUEST_METHOD"], request["PATH_INFO"]
        if asked == ("GET", "/"):
            return 200, PAGE.replace("DATA", self.data)
        if asked != ("POST", "/solve"):
            return 404, "there is nothing here; the page is at /, problems go to /solve"
        if not re.fullmatch("[0-9]{1,4}", request["CONTENT_LENGTH"]):
            return 413, "a problem is sent with its length, of 9999 bytes at most"
        try:
            body = request["wsgi.input"].read(int(request["CONTENT_LENGTH"]))
            problem = str.strip(json.loads(body)["problem"])
            with self.lock:                           # one problem at a time; the others wait
                return 200, json.dumps(reply_to(self.model, problem))
        except InputError as error:
            return 422, str(error)
        except (ValueError, TypeError, KeyError, RecursionError, OSError):
            return 400, 'the request is not of the form {"problem": "12*34"}'

    def respond(self, request, start):
        status, text = self.answer(request)
        text = text if status == 200 else json.dumps({"error": text})
        kind = "text/html" if text.startswith("<") else "application/json"
        nonce = secrets.token_urlsafe(16)
        headers = {"Content-Type": f"{kind}; charset=utf-8", **HEADERS}
        start(f"{status} {'OK' if status == 200 else 'Refused'}",
              [(name, value.replace("NONCE", nonce)) for name, value in headers.items()])
        return [text.replace("NONCE", nonce).encode("utf-8")]

######## Step 7-5: a run, its files and its terminal ###############################################

def held_out_problems(kind, count, size=None, draw=None, seed=1):
    """Up to `count` different held-out problems of a kind and size; fewer if there are no more."""
    rng = random.Random(f"{seed}/{kind}/{size}")
    draw = draw or KINDS[kind].draw
    found = {}                                        # keeps the order, as a set does not
    for _ in range(200 * count):
        problem = draw(rng, size or KINDS[kind].sizes[-1])
        if is_held_out(problem) and size in (None, KINDS[kind].size(problem)):
            found[problem] = True
        if len(found) == count:
            break
    return list(found)

def are_finite(state):
    return all(tensor.isfinite().all() for tensor in state["model"].values())

def write_whole(path, state):
    """Save beside `path`, then rename, so that the file is always whole. Raises InputError."""
    if not are_finite(state):
        raise InputError(f"weights are no numbers: {path} keeps the last good state; lower --lr")
    beside = f"{path}.{os.getpid()}.tmp"
    try:
        with open(beside, "wb") as file:
            torch.save(state, file)
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:          # torch reports a full disk as a RuntimeError
        raise InputError(f"cannot write {path} ({type(error).__name__}); give --out a file in a "
                         "folder that exists and that you may write to") from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(beside)

def load_checkpoint(path, device="cpu"):
    """Read a checkpoint: path -> (model, all that is in the file). Raises InputError."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)           # runs no code
        model = TinyLLM(Config(**state["config"]))
        model.load_state_dict(state["model"])
        is_ours = (state["format"], state["vocabulary"]) == (FORMAT, VOCAB)
        if not (is_ours and are_finite(state)) or set(model.config.kinds.split()) - set(KINDS):
            raise ValueError
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        reason = f"may not be read ({error.strerror})" if os.path.exists(path) else "is not there"
        raise InputError(f"the checkpoint {path} {reason}; give another, or train one") from error
    except Exception as error:                        # a damaged file fails in a dozen ways
        raise InputError(f"{path} is damaged, no checkpoint, or written by another version of "
                         "tinyllm; train again") from error
    return model.to(device).eval(), state

def show_live(text):
    """On a terminal, show a line that the next one replaces, cut to the width."""
    if sys.stdout.isatty():
        print("\r" + text.ljust(60)[:os.get_terminal_size().columns - 1], end="\r", flush=True)

def quoted(path):
    """A path as a terminal takes it."""
    return f'"{path}"' if os.name == "nt" else shlex.quote(path)

RANK = int(os.environ.get("RANK", 0))                 # torchrun: which process this is, of how many
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
N_PROBLEMS = 100                                      # held-out problems of each kind, for a row

def batches_of_run(model, optimizers, progress, losses, out, report):
    """For fit (see there): batches until the run is over or Ctrl-C is pressed.

    `torchrun --nproc_per_node=2 tinyllm.py train` starts two processes. Each learns from batches of
    its own, and their gradients are averaged (Li et al. 2020, "PyTorch Distributed"). So all take
    the same step and stay equal: one run with a batch twice as large.
    """
    presses = []                                      # of Ctrl-C, which waits for the end of a step
    def wait(*_):
        presses.append(1)
        os.write(2, b" stopping ...\n")
    previous = signal.signal(signal.SIGINT, wait)
    model.train()
    config, device = model.config, model.output.weight.device
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        for weight in model.parameters():             # its gradient becomes the mean over all
            weight.register_post_accumulate_grad_hook(
                lambda weight: dist.all_reduce(weight.grad.div_(WORLD_SIZE)))
    if report:
        asked = {kind: held_out_problems(kind, N_PROBLEMS) for kind in config.kinds.split()}
        report("  step done   loss tokens/s  min" + "".join(f"{kind:>8}" for kind in asked))
    # a GPU needs helpers; but they do not know the time, if the run is given one
    helpers = HELPERS if device.type == "cuda" and not progress["minutes"] else {}
    n_tokens, resumed_at = 0, progress["seconds"]
    began = time.perf_counter()
    for batch in stream_batches(config, progress, **helpers):
        stop = len(presses)
        if WORLD_SIZE > 1:                            # one clock, of process 0, and one decision
            clock = progress["seconds"] if RANK == 0 else 0.0
            sums = torch.tensor([clock, stop], dtype=torch.float64).to(device)
            dist.all_reduce(sums)
            progress["seconds"], stop = sums.tolist()
        before = part_done(progress, config)
        if stop or before == 1:
            break
        yield [tensor.to(device) for tensor in batch]
        progress["step"] += 1
        progress["seconds"] += time.perf_counter() - began
        n_tokens += batch[0].numel()
        done = part_done(progress, config)
        if report and int(100 * done) > int(100 * before):
            loss = sum(tensor.item() for tensor in losses) / len(losses)
            minutes = progress["seconds"] / 60
            losses.clear()
            point = {"step": progress["step"], "seconds": progress["seconds"], "loss": loss}
            progress["history"].append(point)
            speed = n_tokens / (progress["seconds"] - resumed_at)
            row = f"{progress['step']:6} {done:4.0%} {loss:6.4f} {speed:8,.0f} {minutes:4.1f}"
            show_live(f"{row}  {minutes * (1 - done) / done:.1f} minutes left")
            if int(10 * done) > int(10 * before):
                show_live(f"{row}  measuring ...")
                right = {kind: evaluate(model, problems)["answers"] / max(1, len(problems))
                         for kind, problems in asked.items() if not presses}
                if not presses:
                    point["right"] = right
                    show_live("")
                    report(row + "".join(f"{part:8.0%}" for part in right.values()))
                save_checkpoint(out, model, optimizers, progress)
        began = time.perf_counter()                   # measuring does not count as training
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
    if stop and report:                               # a second Ctrl-C still spoils nothing
        save_checkpoint(out, model, optimizers, progress)
        more = f"; go on with: python tinyllm.py train --resume --out {quoted(out)}"
        raise KeyboardInterrupt("saved" + more * (before < 1))
    signal.signal(signal.SIGINT, previous)

######## Step 7-6: on a GPU ########################################################################
# A GPU computes a step faster than Python can name its parts. So a step is recorded once for each
# length T of lines, as a CUDA graph, and replayed with other numbers in the same memory.

class RecordedStep:
    """`learn` for a GPU: step(x, addresses, y) -> the loss. On a CPU, for tests, it does all but
    the recording. The learning rates are in tensors, which each replay reads anew.
    """

    def __init__(self, model, optimizers):
        device = model.output.weight.device
        self.model, self.optimizers, self.on_gpu = model, optimizers, device.type == "cuda"
        self.rates = [torch.zeros((), device=device) for _ in optimizers]
        self.held, self.graphs, self.memory = {}, {}, None
        self.stream = torch.cuda.Stream() if self.on_gpu else None
        for optimizer in optimizers:
            optimizer.param_groups[0]["capturable"] = self.on_gpu          # AdamW asks for it
            for state in optimizer.state.values():    # of a resumed run: AdamW's count of steps
                state.update({name: tensor.to(device) for name, tensor in state.items()})

    def __call__(self, *batch):
        for optimizer, rate in zip(self.optimizers, self.rates):
            rate.fill_(optimizer.param_groups[0]["lr"])
            optimizer.param_groups[0]["lr"] = rate
        B, T = batch[0].shape
        if T not in self.held:                        # room for a whole batch
            rows = max(1, self.model.config.batch_tokens // T)
            self.held[T] = [tensor.new_zeros(rows, *tensor.shape[1:]) for tensor in batch]
        held = self.held[T]
        for room, tensor in zip(held, batch):
            room[:B] = tensor
        held[2][B:] = -100                            # rows that are left over do not count
        if not self.on_gpu:
            return learn(self.model, self.optimizers, *held)
        if T in self.graphs:
            graph, loss = self.graphs[T]
            graph.replay()
            return loss.clone()
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):          # once as it is, as PyTorch asks for
            first_loss = learn(self.model, self.optimizers, *held)
        torch.cuda.synchronize()
        self.model.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self.memory, self.stream):      # this computes nothing
            loss = learn(self.model, self.optimizers, *held)
        self.memory, self.graphs[T] = graph.pool(), (graph, loss)
        return first_loss

def fastest_step(model, optimizers):
    """A function step(x, addresses, y) -> the loss."""
    if model.output.weight.device.type == "cuda" and WORLD_SIZE == 1:
        return RecordedStep(model, optimizers)
    for optimizer in optimizers:                      # what a GPU saved may go on here
        optimizer.param_groups[0]["capturable"] = False
    return functools.partial(learn, model, optimizers)

def ignore_ctrl_c(_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)      # it is the main process that saves

# Helpers send bytes, as tensors need shared memory, of which a container has little.
HELPERS = {"num_workers": min(8, os.cpu_count() or 1), "collate_fn": pickle.dumps,
           "worker_init_fn": ignore_ctrl_c}

######## Step 7-7: the commands ####################################################################

def check_config(config):
    """Raises InputError for numbers that cannot work."""
    for name, value in dataclasses.asdict(config).items():
        may_be_0 = isinstance(value, bool) or name in ("seed", "weight_decay", "flat")
        if name != "kinds" and not (0 < value < 2 ** 63 or may_be_0 and value == 0):
            raise InputError(f"--{name} {value} must be more than 0, and not too large")
    kinds = config.kinds.split()
    if not kinds or len(set(kinds)) < len(kinds) or set(kinds) - set(KINDS):
        raise InputError(f"--kinds '{config.kinds}' must name some of: {' '.join(KINDS)}")
    if config.head_dim % 8 or config.flat >= 1:
        raise InputError("--head_dim must be a multiple of 8, and --flat below 1")
    rng = random.Random(0)
    problems = [draw_problem(kind, rng, False) for kind in kinds for _ in range(200)]
    longest = max(len(solve_by_rules(problem, config.working)) for problem in problems)
    for name, given in (("block_size", config.block_size), ("batch_tokens", config.batch_tokens)):
        if longest >= given:
            raise InputError(f"--{name} {given} is too short for a line of {longest}")

def command_train(out: str = "", minutes: float = None, quick: bool = False,
                  resume: bool = False, force: bool = False, device: str = "auto", **config):
    """Train a model from scratch.

    out: checkpoint to write (default: tinyllm.pt)
    minutes: train for a given time instead of a number of steps
    quick: a first taste: one layer learns sums, in seconds, into quick.pt, which it may replace
    resume: go on with the run in --out
    force: replace --out if it exists
    """
    if quick:
        config = {"n_layer": 1, "kinds": "add", "steps": 300, "batch_tokens": 2048, **config}
        out, force = out or "quick.pt", force or not out
    out = out or "tinyllm.pt"
    model, state = None, {"config": {}, "progress": new_progress(), "optimizers": []}
    if resume:
        model, state = load_checkpoint(out)
    if resume and set(config) - {"steps"}:
        raise InputError("--resume goes on with the run as it was: give only --steps or --minutes")
    if minutes is not None and not 0 < minutes < 1e6:
        raise InputError(f"--minutes {minutes} must be more than 0")
    if "steps" not in config:
        minutes = minutes or state["progress"]["minutes"]
    progress = {**state["progress"], "minutes": minutes}
    config = Config(**{**state["config"], **config})
    check_config(config)
    device = pick_device(device)
    if part_done(progress, config) == 1:
        raise InputError(f"{out} has had all its steps; give more --steps or --minutes")
    if os.path.exists(out) and (not os.path.isfile(out) or os.path.islink(out)):
        raise InputError(f"--out {out} is no plain file; give it the name of a file")
    if os.path.exists(out) and not (resume or force or RANK > 0):
        raise InputError(f"{out} exists: give --resume to go on, --force to replace it, or --out")
    torch.manual_seed(config.seed)
    try:
        model = (model or TinyLLM(config)).to(device)
    except RuntimeError as error:
        raise InputError("there is no memory for such a model; make it smaller") from error
    model.config = config                             # --steps may be new
    optimizers = make_optimizers(model, config)
    for optimizer, saved in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(saved)
    if RANK > 0:                                      # process 0 speaks and saves
        return fit(model, optimizers, progress, out)
    some = [held_out_problems(kind, 1)[0] for kind in config.kinds.split()]
    if not resume:
        save_checkpoint(out, model)                   # now, not in ten minutes, is the time to fail
        print("Before training, the model answers:", *solve(model.eval(), some, max_tokens=40),
              sep="\n    ")
    until = f"{minutes:g} minutes" if minutes else f"{config.steps:,} steps"
    print(f"{sum(p.numel() for p in model.parameters()):,} weights on {device}, threads: "
          f"{torch.get_num_threads()}, from step {progress['step']:,} to {until}, seed "
          f"{config.seed}, torch {torch.__version__}")
    fit(model, optimizers, progress, out, print)
    print(f"Trained in {progress['seconds'] / 60:.1f} minutes, saved as {out}. Measuring ...")
    measure(model, {kind: held_out_problems(kind, 500, seed=2) for kind in config.kinds.split()})
    print("Now it answers:", *solve(model, some), sep="\n    ")
    problem = "123+456" if quick else some[-1]
    print(f'Now try:\n    python tinyllm.py ask --checkpoint {quoted(out)} "{problem}"')
    print(f"    python tinyllm.py eval --checkpoint {quoted(out)}")

def measure(model, asked):
    """Ask lists of problems by name; print a row for each when it is ready. Returns the results."""
    print(f"{'':26} problems  answers right  workings right  length")
    results = {}
    for name, problems in asked.items():
        result = results[name] = evaluate(model, problems)
        n = max(1, len(problems))
        print(f"{name:26} {len(problems):8}  {result['answers'] / n:13.2%}  "
              f"{result['workings'] / n:14.2%} {result['length']:7.1f}")
    return results

def command_eval(checkpoint: str = "tinyllm.pt", problems: int = 1000, target: float = 0.0,
                 device: str = "auto"):
    """Measure a model on held-out problems.

    problems: held-out problems of each kind
    target: exit with status 1 if the part of right answers, 0 to 1, is smaller for a kind
    """
    if problems < 1 or not 0 <= target <= 1:
        raise InputError("--problems must be at least 1, and --target a part from 0 to 1")
    model, _ = load_checkpoint(checkpoint, pick_device(device))
    kinds = model.config.kinds.split()
    asked = {kind: held_out_problems(kind, problems) for kind in kinds}
    some = max(1, problems // 5)
    for kind in kinds:
        for size in [*KINDS[kind].sizes, *KINDS[kind].beyond]:
            name = f"{kind} {size}" + "*" * (size in KINDS[kind].beyond)
            asked[name] = held_out_problems(kind, some, size)
        for name, (_, draw) in KINDS[kind].practice.items():
            asked[f"{kind} {name}"] = held_out_problems(kind, some, draw=draw)
    print(f"Held-out problems, greedy decoding, {checkpoint}: by kind, size, and what it practised."
          "\n* is larger than what is asked above, and rare or unknown in training.")
    results = measure(model, asked)
    for line in [line for kind in kinds for line in results[kind]["wrong"][:2]]:
        words, sentence = explain(line)
        first = next((said for said in words if said != "true"), sentence)
        print(f"wrong: {line[:300]}\n       {first}")
    low = [kind for kind in kinds if results[kind]["answers"] / len(asked[kind]) < target]
    if low:
        print(f"below the target of {target}: {', '.join(low)}")
    return 1 if low else 0

def command_ask(*problem, checkpoint: str = "tinyllm.pt", plain: bool = False,
                latex: bool = False, device: str = "auto"):
    """Ask the model.

    problem: such as "12*34"; none: a prompt, or a pipe with a problem a line
    plain: one line in, one full line out
    latex: the working as LaTeX
    """
    model, _ = load_checkpoint(checkpoint, pick_device(device))
    status = 0
    for texts in [problem] if problem else lines_of_input():
        asked = []                                    # for each text a problem, or an error
        for text in texts:
            try:
                asked.append(prepare(text, model))
            except InputError as error:
                asked.append(error)
                status = 2
        lines = iter(solve(model, [one for one in asked if isinstance(one, str)]))
        for one in asked:
            if plain:
                print(f"error: {one}" if isinstance(one, InputError) else next(lines))
            elif isinstance(one, InputError):
                print(f"tinyllm: {one}", file=sys.stderr)
            else:
                show(next(lines), model.config, latex)
    return status

def show(line, config, latex):
    """Print a line as LaTeX, or as a notebook shows it: a stage a row, with the check of each."""
    problem, *stages = line.split("=")
    words, sentence = explain(line)
    note = f"note: {OUTSIDE}" if is_outside(problem, config) else ""
    if latex:
        print(to_latex(line))
        if {*words, sentence} != {"true", RIGHT} or note:
            said = ", ".join(words)
            print(f"check: {said}; {sentence}: {line}\n{note}".strip(), file=sys.stderr)
        return
    width = max(map(len, stages), default=0)
    left = problem
    for stage, said in zip(stages, words):
        if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
            said = f"\x1b[{32 if said == 'true' else 31}m{said}\x1b[0m"
        print(f"{left:{len(problem)}} = {stage:{width}}   check: {said}")
        left = ""
    if sentence != RIGHT:
        print(f"check: {sentence}")
    if note:
        print(note)

def lines_of_input():
    """Lists of lines: typed at a prompt until an empty one, or from a pipe all that wait."""
    if not sys.stdin.isatty():
        rest = b""
        for data in iter(lambda: os.read(sys.stdin.fileno(), 1 << 14), b""):
            *lines, rest = (rest + data).split(b"\n")
            yield [line.decode("utf-8", "replace") for line in lines]
        yield [rest.decode("utf-8", "replace")] if rest else []
        return
    with contextlib.suppress(ImportError):
        __import__("readline")                        # line editing, where it exists
    with contextlib.suppress(EOFError):
        for text in iter(lambda: input("problem (Enter ends): ").strip(), ""):
            if text in ("q", "quit", "exit"):
                return
            yield [text]

def command_look(*problem, checkpoint: str = "tinyllm.pt", device: str = "auto"):
    """See what the model looked at while it wrote."""
    model, _ = load_checkpoint(checkpoint, pick_device(device))
    for line in solve(model, [prepare(text, model) for text in problem or ["12+39"]]):
        print(f"{line}\nThe line stands as the model reads it.\n{look(model, line)}")

def command_serve(checkpoint: str = "tinyllm.pt", port: int = 8000, host: str = "127.0.0.1",
                  device: str = "auto"):
    """Serve a page for the browser.

    port: port to listen on
    host: address to listen on; any other than 127.0.0.1 lets other machines in
    """
    model, state = load_checkpoint(checkpoint, pick_device(device))
    with Server(model, state["progress"]["history"], host, port) as server:
        if host not in ("127.0.0.1", "localhost"):
            print("warning: everyone who can reach this machine can use this page")
        name = "127.0.0.1" if host == "0.0.0.0" else host
        print(f"http://{name}:{server.server_port}/ (Ctrl-C ends it)")
        server.serve_forever()

def command_data(kind: str = "", split: str = "train", count: int = 10, seed: int = 0):
    """Print examples of what the model learns from.

    kind: kind of problem; none: all of them
    split: train or test
    count: lines to print
    seed: chooses the problems
    """
    if kind not in ("", *KINDS) or split not in ("train", "test") or count < 1:
        raise InputError(f"--kind is one of {' '.join(KINDS)}, --split train or test, --count 1 up")
    rng = random.Random(seed)
    for _ in range(count):
        print(solve_by_rules(draw_problem(kind or rng.choice(list(KINDS)), rng, split == "test")))

def has_fast_bfloat16(device):
    """Does this device multiply bfloat16, numbers of half the bits, faster than float32?"""
    able = torch.cpu.get_capabilities()
    is_fast = able.get("avx512_bf16") or able.get("amx_bf16") or False
    return device == "cuda" or device == "cpu" and is_fast

def pick_device(name):
    """'auto' is a CUDA GPU where there is one, else the CPU. Raises InputError."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(),
             "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if there["cuda"] else "cpu"
    if not there.get(name):
        raise InputError(f"--device {name}: there is no such device here; use --device cpu")
    if name == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))      # one for each process
    return name

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; see {self.prog} --help")

COMMANDS = {"train": command_train, "eval": command_eval, "ask": command_ask, "look": command_look,
            "serve": command_serve, "data": command_data}

def make_parser():
    """A command for each function, a flag for each parameter, help from docstrings and comments."""
    parser = Parser(prog="tinyllm.py", description="A small GPT that learns school arithmetic.")
    parser.set_defaults(function=parser.print_help)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    common = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(Config), re.M),
                  device="auto, cpu, cuda or mps", checkpoint="file of the model",
                  problem='such as "12+39"')
    for command, function in COMMANDS.items():
        text = inspect.getdoc(function)
        sub = commands.add_parser(command, help=text.split("\n")[0])
        sub.set_defaults(function=function)
        texts = {**common, **dict(re.findall(r"^(\w+): (.*)", text, re.M))}
        flags = dict(inspect.signature(function).parameters)
        if flags.pop("problem", None):
            sub.add_argument("problem", nargs="*", help=texts["problem"])
        if flags.pop("config", None):                 # **config: every field of Config
            flags.update(inspect.signature(Config).parameters)
        for name, flag in flags.items():
            how = {"type": flag.annotation}
            if flag.annotation is bool:
                how = {"action": argparse.BooleanOptionalAction}
            about = texts[name]
            if flag.default not in (None, ""):
                about += f" (default: {flag.default})"
            sub.add_argument(f"--{name}", default=argparse.SUPPRESS, help=about, **how)
    return parser

def main(argv=None):
    """Run a command; returns the exit status: 0 fine, 1 below --target, 2 bad input, 130 Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # each line goes out at once, and what a console cannot show is a "?"
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    argv = sys.argv[1:] if argv is None else argv
    argv = [re.sub("^(?=-[0-9xy(])", " ", text) for text in argv]    # -5+3 is a problem, no flag
    try:
        args = vars(make_parser().parse_args(argv))
        return args.pop("function")(*args.pop("problem", []), **args) or 0
    except InputError as error:
        print(f"tinyllm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # once is enough
        print(f"\ntinyllm: stopped; {stop}".rstrip("; "), file=sys.stderr)
        return 130
    except OSError as error:                          # a full disk, or a reader that has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):        # as `head -1` does
            return 0
        print(f"tinyllm: input or output failed: {error}", file=sys.stderr)
        return 2

######## Appendix 1: what a stage is worth #########################################################

SIGNS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.MatMult: "*", ast.Div: "/", ast.Pow: "^2",
         ast.USub: "-"}
NONSENSE = r"[-+*/]{2}|[xy)][0-9]|\^(?!2(?![0-9^]))"          # 5--3, x3, x^3
UNREADABLE = ("this cannot be read; see that each sign has two sides and each bracket its partner, "
              "and write 3x for x3, x^2 for a square, and a * behind a division")
DIVIDED = "letters cannot be divided here; write it without the division"

def read(text, make, combine):
    """Read a text by school precedence, which is Python's own. make(token) makes something of a
    number or a letter, and combine(sign, a, b) of two such things; b is None for a minus in front
    and for "^2". So one reader serves the check and the working. Raises InputError.
    """
    def walk(node):                                   # Python's tree of the text, leaves first
        if isinstance(node, ast.BinOp):
            first = getattr(node.left, "op", None)
            if isinstance(node.op, ast.MatMult) and isinstance(first, ast.Div):
                if node.left.col_offset == node.col_offset:      # no bracket: 6/2(1+2), 6/2x
                    raise SyntaxError
            b = None if isinstance(node.op, ast.Pow) else walk(node.right)
            return combine(SIGNS[type(node.op)], walk(node.left), b)
        if isinstance(node, ast.UnaryOp):
            return combine(SIGNS[type(node.op)], walk(node.operand), None)
        return make(node.value if isinstance(node, ast.Constant) else node.id)

    if len(text) > 400 or text.count("(") > 80:
        raise InputError("the problem is too long, or has too many brackets; write it in parts")
    try:
        if re.search(NONSENSE, text):
            raise SyntaxError
        # 3(x+1) becomes 3@(x+1), where @ binds as * does
        python = re.sub(r"(?<=[0-9xy)])(?=[xy(])", "@", text).replace("^2", "**2")
        return walk(ast.parse(python, mode="eval").body)
    except (SyntaxError, KeyError, AttributeError) as error:
        raise InputError(UNREADABLE) from error

def make_terms(token):
    return [(token, "")] if isinstance(token, int) else [(1, token)]

def combine_terms(sign, a, b):
    """Two sums, as lists of terms: 3x-2 is [(3, "x"), (-2, "")]. What they are combined to."""
    if sign == "^2":
        if not any(letters for _, letters in a):
            raise InputError("only letters, and brackets with letters, can be squared; write 3*3")
        return combine_terms("*", a, a)
    if b is None:
        return [(-n, letters) for n, letters in a]
    if sign in ("+", "-"):
        return a + (b if sign == "+" else combine_terms("-", b, None))
    for terms in (a, b):                              # without letters a factor is one number
        if not any(letters for _, letters in terms):
            terms[:] = [(sum(n for n, _ in terms), "")]
    if sign == "/":
        if len(a) > 1 or len(b) > 1 or a[0][1] or b[0][1]:
            raise InputError(DIVIDED)
        if b[0][0] == 0:
            raise InputError("a division by zero has no answer; change the divisor")
        return [(Fraction(a[0][0]) / b[0][0], "")]
    if max(len(some + more) for _, some in a for _, more in b) > 2:
        raise InputError("only products up to x^2, xy and y^2 are known; write fewer letters")
    return [(n * m, "".join(sorted(some + more))) for n, some in a for m, more in b]

MONOMIALS = ("xx", "xy", "yy", "x", "y", "")          # in the order in which an answer has them

def join_terms(terms):
    """Terms to text: [(1, "xx"), (-1, "x")] is x^2-x, and [] is 0."""
    text = "".join(f"{'' if n < 0 else '+'}{n}{letters}" for n, letters in terms)
    text = text.replace("xx", "x^2").replace("yy", "y^2")
    return re.sub("(?<=[+-])1(?=[xy])", "", text).removeprefix("+") or "0"

def exact_value(text):
    """What a text is worth, for all x and y, in the one form of an answer. Raises InputError.

    >>> exact_value("2*11/8"), exact_value("-7/2"), exact_value("(x+1)^2-x^2")
    ('2+3/4', '-3-1/2', '2x+1')
    """
    total = dict.fromkeys(MONOMIALS, 0)
    for n, letters in read(text, make_terms, combine_terms):
        total[letters] += n
    number = total.pop("")
    if any(n % 1 for n in total.values()):
        raise InputError(DIVIDED)
    terms = [(n, letters) for letters, n in total.items()]
    terms += [(int(number), ""), (number - int(number), "")]
    return join_terms(term for term in terms if term[0])

def worths(line):
    """What each part of a line is worth; None if it cannot be read."""
    parts, found = line.split("="), []
    worth = KINDS[kind_of(parts[0])].worth
    for part in parts:
        try:
            found.append(worth(part))
        except InputError:
            found.append(None)
    return found

def is_true(line):
    """Are all parts of a line worth the same? What cannot be read is not true."""
    first, *others = worths(line)
    return first is not None and set(others) == {first}

######## Appendix 2: the next stage of the working #################################################

@dataclasses.dataclass
class Part:
    """A part of a stage while it is written again."""
    text: str                   # how it is written
    binds: int = 3              # 1 a sum, 2 a product or quotient, 3 what stands by itself
    rest: str = ""              # what is written behind the first factor
    is_given: bool = False      # is it a plain number that stood there already?
    summands: list = None       # of a product or quotient just done: the sum that it became

def combine_parts(sign, a, b):
    """The operation done, if both sides stand there as plain numbers; else written as it was."""
    if b is None:
        return negate(a)
    if not (a.is_given and b.is_given):
        return join_parts(sign, a, b)
    m, n = int(a.text), int(b.text)
    if sign in ("+", "-"):
        signed = n if sign == "+" else -n             # signs are a stage of their own: 5-(-3)=5+3
        return Part(f"{m}{signed:+}", 1) if n < 0 else Part(str(m + signed))
    if m * n and min(m, n) < 0:                       # -4*27=-(4*27), -3*(-4)=3*4
        unsigned = Part(f"{abs(m)}{sign}{abs(n)}", 2)
        return unsigned if m * n > 0 else negate(unsigned)
    summands = multiply(abs(m), abs(n)) if sign == "*" else divide(abs(m), abs(n))
    if len(summands) > 1:
        return Part("+".join(summands), 1, summands=summands)
    text = "".join(summands) or "0"
    return Part(text, 2 if "/" in text else 3, summands=summands)

def join_parts(sign, a, b):
    """The operation as it is written, with the brackets that it needs."""
    is_sum = sign in ("+", "-")
    if is_sum and b.summands == []:                   # 8+0/7 is 8
        return Part(a.text, a.binds, a.rest)
    if is_sum and b.summands and not all(map(str.isdigit, b.summands)):
        return Part(sign.join([a.text, *b.summands]), 1)         # 70+8+37/23
    binds = 1 if is_sum else 2
    left = a.text if a.binds >= binds else f"({a.text})"
    right = b.text if b.binds > binds else f"({b.text})"
    if right.startswith("-"):                         # 5+(-3)*4
        right = f"({right.removesuffix(b.rest)}){b.rest}"
    return Part(left + sign + right, binds, a.rest + sign + right)

def negate(a):
    if re.fullmatch("-?[0-9]+", a.text):
        return Part(str(-int(a.text)), is_given=a.is_given)
    if a.summands and "/" in a.text:                  # -(70+221/23) is -70-221/23
        return Part("-" + "-".join(a.summands), 1)
    return Part(f"-{a.text}" if sides(a.text) else f"-({a.text})")

def places(n):
    """345 -> [300, 40, 5], and 306 -> [300, 6]"""
    return [int(digit) * 10 ** i for i, digit in enumerate(str(n)[::-1]) if digit != "0"][::-1]

def multiply(a, b):
    """The summands of a product. One digit times two, with zeros behind or not, is done at once;
    the rest is split by place: 345*27 is 345*20+345*7, and 345*20 is 6000+900.
    """
    first, second = places(a), places(b)
    few, many = sorted((first, second), key=len)
    if not few or len(few) == 1 and (len(many) <= 2 or str(few[0])[0] == "1"):
        return [str(a * b)]
    if len(few) == 1:
        rest = multiply(sum(many[1:]), few[0])
        return [str(many[0] * few[0]), rest[0] if len(rest) == 1 else f"({'+'.join(rest)})"]
    if len(first) < len(second):
        return [f"{part}*{b}" for part in first]
    return [f"{a}*{part}" for part in second]

def divide(a, b):
    """The summands of a quotient. A multiple of the divisor is taken off, a digit with zeros:
    1831/23 is 70+(1831-1610)/23. (From 11 on nobody knows the tables: a pupil takes 25 for 23.)
    """
    if a < b:
        return [simplify(f"{a}/{b}")] if a else []
    if a == b or b == 1:
        return [str(a // b)]
    unit = 5 if b < 50 else 10
    rounded = b if b <= 10 else (b // unit + 1) * unit
    digits = str(max(1, a // rounded))
    taken = int(digits[0]) * 10 ** (len(digits) - 1)
    return [str(taken), f"({a}-{taken * b})/{b}"]

FACTORS = r"[0-9]+(?:\*[0-9]+)*"
FRACTION = rf"(?<![0-9*/)]){FACTORS}/(?:[0-9]+|\({FACTORS}\))(?![0-9*/(])"       # 3/7, 2*3/(3*3)

def sides(text):
    """The factors above and below the line of a fraction below 1; None for all else, as 7/2."""
    if not re.fullmatch(FRACTION, text):
        return None
    above, below = ([int(n) for n in re.findall("[0-9]+", side)] for side in text.split("/"))
    return (above, below) if 0 < math.prod(above) < math.prod(below) else None

def each_fraction(change, text):
    """The text with change(fraction) for each fraction below 1; 7/2 stays a division."""
    return re.sub(FRACTION, lambda match: change(match[0]) if sides(match[0]) else match[0], text)

def prime_factors(n):
    """84 -> [2, 2, 3, 7], 1 -> []. What has no factor below 10,000 stays whole."""
    p = next((p for p in range(2, min(n, 10_000)) if n % p == 0), n)
    return [p, *prime_factors(n // p)] if n > 1 else []

def simplify(fraction):
    """Take a fraction apart into primes, or cancel one that is above and below, or multiply out:
    12/18 is 2*2*3/(2*3*3) is 2*3/(3*3) is 2/3.
    """
    above, below = sides(fraction)
    common = [p for p in above if p in below]
    if len(above) == len(below) == 1:
        above, below = prime_factors(above[0]), prime_factors(below[0])
    elif common:
        above.remove(min(common))
        below.remove(min(common))
    else:
        above, below = [math.prod(above)], [math.prod(below)]
    top, bottom = ("*".join(map(str, side)) for side in (above or [1], below))
    return f"{top}/({bottom})" if len(below) > 1 else f"{top}/{bottom}"

def rewrite(text):
    """The next stage of working with numbers; the same text at the end."""
    def make(token):                                  # a number, or a fraction in quotes
        if isinstance(token, int):
            return Part(str(token), is_given=True)
        return Part(simplify(token), 2)
    return read(each_fraction(repr, text), make, combine_parts).text

def rewrite_letters(text):
    """The next stage with letters: multiply out, or sort, or add what is alike; the first that
    changes anything. Of terms that are alike two are added: 5x-5x+2x is 0x+2x. A lone 0x goes.
    """
    terms = read(text, make_terms, combine_terms)
    in_order, added = [], []
    for letters in MONOMIALS:
        numbers = [n for n, some in terms if some == letters]
        in_order += [(n, letters) for n in numbers]
        if numbers not in ([], [0]):
            added += [(n, letters) for n in (sum(numbers[:2]), *numbers[2:])]
    return next((new for new in map(join_terms, (terms, in_order, added)) if new != text), text)

@functools.lru_cache(maxsize=8)                       # who draws a problem asks for its line, too
def solve_by_rules(problem, working=True):
    """The line that the model should write. This makes training data; no answer passes through it.

    >>> solve_by_rules("36/84"), solve_by_rules("7-(-5)"), solve_by_rules("12*34", working=False)
    ('36/84=2*2*3*3/(2*2*3*7)=2*3*3/(2*3*7)=3*3/(3*7)=3/7', '7-(-5)=7+5=12', '12*34=408')
    """
    kind = KINDS[kind_of(problem)]
    stages = [problem, kind.stage(problem)]
    while stages[-1] not in stages[:-1]:
        stages.append(kind.stage(stages[-1]))
    if len(stages) > 2 and (stages[-1] == stages[-2] or "*" in stages[-1]):      # 4/7 was 2*2/7
        stages.pop()
    return "=".join(stages if working else [problem, stages[-1]])

######## Appendix 3: problems with brackets ########################################################

def longest_number(problem):
    return max(map(len, re.findall("[0-9]+", problem)), default=0)

def count_signs(problem):
    """How many operators stand between two things: 2 in -1+2*(-3)."""
    return len(re.findall("(?<=[0-9)xy])[-+*/]", problem))

def drawn_value(sign, a, b):
    """The value of an operation. Infinite means that it is never drawn: the value has more than
    four digits, the divisor more than two, or the division does not come out even.
    """
    if b is None:
        return -a
    if sign == "/":
        return a // b if 0 < abs(b) < 100 and a % b == 0 else math.inf
    value = {"+": a + b, "-": a - b, "*": a * b}[sign]
    return value if abs(value) <= 9999 else math.inf

def draw_tree(rng, n, signs, lengths, negative):
    """n operators: (Part, value). lengths: how often a number has 1, 2, 3, 4 digits."""
    if n == 0:
        value = draw_number(rng, rng.choices((1, 2, 3, 4), lengths)[0])
        value *= -1 if rng.random() < negative else 1
        return Part(str(value)), value
    while True:
        sign, n_left = rng.choice(signs), rng.randrange(n)
        left, a = draw_tree(rng, n_left, signs, lengths, negative)
        right, b = draw_tree(rng, n - 1 - n_left, signs, lengths, negative)
        if sign == "/" and n_left == 0:               # choose the dividend to suit the divisor
            a = b * draw_number(rng, rng.choice((1, 1, 2)))
            left = Part(str(a))
        elif sign == "/" and n_left == n - 1:         # or the divisor to suit the dividend
            b = rng.choice([d for d in range(1, 100) if a % d == 0])
            right = Part(str(b))
        value = drawn_value(sign, a, b)
        if math.isfinite(value):
            break
    needed = 1 if sign in ("+", "-") else 2
    if needed <= left.binds < 3 and rng.random() < 0.06:         # people write more than are needed
        left = Part(f"({left.text})")
    if needed < right.binds < 3 and rng.random() < 0.06:
        right = Part(f"({right.text})")
    part = join_parts(sign, left, right)
    return (negate(part), -value) if rng.random() < 0.03 else (part, value)

def is_expression(problem):
    """Could draw_expression have drawn it? (Brackets more or less do not count.)"""
    if not 2 <= count_signs(problem) <= 6 or longest_number(problem) > 4:
        return False
    return math.isfinite(read(problem, int, drawn_value))

def draw_expression(rng, top, draws=1, more=0, signs="+-*/", lengths=(48, 39, 11, 2),
                    negative=0.04):
    """2 to `top` operators, the most of so many draws, and `more`."""
    while True:
        n = max(rng.randint(2, top) for _ in range(draws)) + more
        problem = draw_tree(rng, n, signs, lengths, negative)[0].text
        line = solve_by_rules(problem)
        if len(line) <= 160 and re.search("=-?[0-9]+$", line):
            return problem

KINDS["expr"] = Kind(draw_expression, "[^xy]*", range(2, 5), (5, 6), 2.0, size=count_signs,
                     is_drawn=is_expression, practice={
    "many": (0.6, functools.partial(draw_expression, draws=2)),
    "5 and 6": (0.06, functools.partial(draw_expression, draws=2, more=2)),
    "sums": (0.1, functools.partial(draw_expression, more=1, signs="++-", lengths=(1, 1, 3, 0))),
    "negatives": (0.14, functools.partial(draw_expression, lengths=(4, 4, 2, 0), negative=0.5))})

######## Appendix 4: problems with letters #########################################################

def draw_term(rng, letters, largest=9):
    """A term, such as (-7, "x")."""
    return rng.choice((-1, 1)) * rng.randint(1, largest), letters

def draw_like_terms(rng, top, hard):
    """8x+3-5y+2x-7; one term in twelve cancels an earlier one, or in practice nearly."""
    mixtures = [("x", ""), ("x", "y"), ("x", "y", ""), ("xx", "x", "")]
    letters = rng.choice(mixtures + [MONOMIALS] * (3 if hard else 1))
    largest = rng.choice((9, 99) if hard else (9, 9, 99))
    n_terms = max(rng.randint(2, top + 1) for _ in range(1 + hard))
    terms = [draw_term(rng, rng.choice(letters), largest) for _ in range(n_terms)]
    for i in range(1, n_terms):
        if rng.random() < 0.08:
            n, alike = rng.choice(terms[:i])
            terms[i] = -n + rng.choice((0, 0, 1, -1)) * hard or 1, alike
    return join_terms(terms)

def draw_bracket(rng, hard):
    """(2x-1), (x+y), (5-3x)"""
    pairs = ("x", ""), ("x", ""), ("y", ""), ("x", "y"), ("", "x"), ("y", "x")
    (a, first), second = (draw_term(rng, letters) for letters in rng.choice(pairs))
    a = a if rng.random() < (0.2 if hard else 0.1) else abs(a)
    return f"({join_terms([(a, first), second])})"

def draw_brackets(rng, top, hard):
    """3(2x-1)-2(x+4)-(x-2)+7"""
    n_brackets = rng.randint(1, 3)
    factors = ["", *"23456789"] + ["", ""] * hard
    parts = [rng.choice("++-") + rng.choice(factors) + draw_bracket(rng, hard)
             for _ in range(n_brackets)]
    if n_brackets < 3 and rng.random() < 0.3:
        n, letters = draw_term(rng, rng.choice(("x", "y", "")))
        parts.insert(rng.randint(0, n_brackets), "-+"[n > 0] + join_terms([(abs(n), letters)]))
    return "".join(parts).removeprefix("+")

def draw_two_brackets(rng, top, hard):
    return draw_bracket(rng, hard) + ("^2" if rng.random() < 0.3 else draw_bracket(rng, hard))

def draw_algebra(rng, top, hard=False):
    """Draw until there is a letter and at most `top` signs."""
    draws = draw_like_terms, draw_brackets, draw_two_brackets
    while True:
        draw = rng.choices(draws, (10, 6, 4) if hard else (4, 4, 3))[0]
        problem = draw(rng, top, hard)
        if re.search("[xy]", problem) and count_signs(problem) <= top:
            return problem

TERM = r"(?:(?:[0-9]{0,2}|10[0-9])(?:x\^2|y\^2|xy|x|y)|[0-9]{1,2}|10[0-9])"
BRACKET = r"\(-?(?:[0-9]?[xy]|[0-9]{1,2})(?:[-+](?:[0-9]?[xy]|[0-9]{1,2}))?\)"
ITEM = rf"(?:[0-9]{{0,2}}[xy]?{BRACKET}|{TERM})"
SMALL = BRACKET.replace("{1,2}", "")                  # the same with one digit
ALGEBRA = re.compile(rf"-?{ITEM}(?:[-+]{ITEM}){{0,5}}|{SMALL}(?:{SMALL}|\^2)|"
                     r"[0-9]?[xy]?\*[0-9]?[xy]?")

KINDS["algebra"] = Kind(draw_algebra, ".*[xy].*", range(1, 6), (6, 7), 3.2, size=count_signs,
                        stage=rewrite_letters, practice={
    "many": (0.74, functools.partial(draw_algebra, hard=True))},
    is_drawn=lambda problem: count_signs(problem) <= 5 and ALGEBRA.fullmatch(problem))

######## Appendix 5: what is practised #############################################################

def draw_near(sign, rng, top):
    """Numbers that begin alike, or whose leading digits are one apart: 150-144, 2015-1993"""
    a = draw_number(rng, rng.randint(1, top))
    difference = draw_number(rng, rng.randint(1, len(str(a))))
    b = abs(a + rng.choice((-1, 1)) * difference)
    b = b if len(str(b)) <= top else abs(a - difference)
    return f"{'-' if rng.random() < 0.15 else ''}{a}{sign}{b}"

def draw_signed(draw, rng, top):
    """One or both numbers negative: -12+5, 5-(-9), -3*(-4)"""
    a, sign, b = re.fullmatch("-?([0-9]+)(.)([0-9]+)", draw(rng, top)).groups()
    return rng.choice((f"-{a}{sign}{b}", f"{a}{sign}(-{b})", f"-{a}{sign}(-{b})"))

def draw_fraction(rng, top, largest=24):
    """A fraction below 1; half of them are to be cancelled, by up to `largest`."""
    common = rng.choice((1, rng.randint(2, largest)))
    b = rng.randint(2, max(2, 99 // common))
    return f"{rng.randrange(1, b) * common}/{b * common}"

def draw_primes(rng, top):
    """A prime of two digits below, and above one of its multiples, or what only ends like it."""
    prime = rng.choice((11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47))
    b = prime * rng.randint(2, 99 // prime)
    multiple = prime * rng.randint(1, b // prime - 1)
    return f"{rng.choice((multiple, 10 * rng.randint(0, b // 10) + prime % 10))}/{b}"

def draw_shape(shapes, rng, top):
    """One of some shapes, with something for each of its letters: a, b 2 to 9; c, d 1 to 9; A, B, C
    two digits; m up to `top` digits; M four, if `top` allows; R a round one; T 11 to 19; v, w the
    letters x and y; s, t a sign.
    """
    values = dict(zip("vw", rng.sample("xy", 2)))
    values.update((letter, rng.choice("+-")) for letter in "st")
    for letters, least, most in (("ab", 2, 9), ("cd", 1, 9), ("ABC", 10, 99), ("T", 11, 19)):
        values.update((letter, rng.randint(least, most)) for letter in letters)
    values["m"] = draw_number(rng, rng.randint(1, top))
    values["M"] = draw_number(rng, 4 if top > 2 else top)
    values["R"] = draw_number(rng, 1) * 10 ** rng.randint(0, top - 1)
    return re.sub("[A-Za-z]", lambda match: str(values[match[0]]), rng.choice(shapes.split()))

PRACTICE = (                                          # kind, name, share, shapes
    ("mul", "4 by 1 and 2", 0.15, "M*a a*M M*A A*M"),
    ("mul", "round", 0.2, "R*m m*R R*A A*R"),
    ("div", "small", 0.22, "A/a A/T m/T Aa/B cd/T A/B A/B a/A"),
    ("algebra", "products", 0.08, "(-avsc)(-bvtd) (-avsc)(bvtd) (avsc)(-bvtd) (v+c)(v-c) "
                                  "(v-c)(v+c) (av+d)(av-d) (av-d)(av+d) (c+v)(c-v)"),
    ("algebra", "large numbers", 0.06, "a(vsB) -a(vsB) -(vsB) a(vsB)tb(vsC) (vsA)t(vsB) a(vsB)tAw"),
    ("algebra", "factors", 0.05, "v(vsc) -v(vsc) v(wsc) v(avsd) v(vsc)tw(wsd) A(vsc) -A(vsc) "
                                 "A(avsd) A(vsc)tB(wsd) av(vsc) av(bwsd) v(vsB)"),
    ("algebra", "single terms", 0.03, "av-(-bv) av+(-bv) -av-(-bw) (av)^2 av*bw av*bv a*bv av*b"))
for name, shape, share, shapes in PRACTICE:
    KINDS[name].practice[shape] = share, functools.partial(draw_shape, shapes)
KINDS["add"].practice["near"] = 0.2, functools.partial(draw_near, "+")
KINDS["sub"].practice["near"] = 0.45, functools.partial(draw_near, "-")
KINDS["div"].practice["fractions"] = 0.2, functools.partial(draw_fraction, largest=49)
KINDS["div"].practice["primes"] = 0.08, draw_primes

KINDS["add"].is_drawn = KINDS["sub"].is_drawn = lambda problem: longest_number(problem) <= 10
KINDS["mul"].is_drawn = re.compile(
    r"\D*(\d{1,3}\D+\d{1,3}|\d{4}\D+\d{1,2}|\d{1,2}\D+\d{4})\D*").fullmatch
KINDS["div"].is_drawn = re.compile(r"\D*\d{1,5}\D+\d{1,2}\D*").fullmatch
for name in ("add", "sub", "mul", "div"):
    KINDS[name].practice["signs"] = 0.16, functools.partial(draw_signed, KINDS[name].draw)

######## The page of Step 7-4 ######################################################################

PAGE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>tinyllm</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style nonce="NONCE">
:root { color-scheme: light dark; --soft: light-dark(#5c5c63, #a5a7ae); --look: light-dark(#8a4b00, #ffb347); }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 50rem; font: 1rem/1.4 system-ui, sans-serif; overflow-wrap: anywhere; }
h1, h2 { font-size: 1.1rem; margin: .8rem 0 .2rem; } p, figure { margin: .2rem 0; } .scroll { overflow: auto hidden; padding: .3rem 0; }
.soft, figcaption { color: var(--soft); font-size: .9rem; } .true { color: light-dark(#17652a, #7fd193); }
.false { color: light-dark(#a8161b, #ff9a94); font-weight: 700; } .waiting { opacity: .4; } #answer { font-size: 1.7rem; }
form, .few { display: flex; flex-wrap: wrap; gap: .4rem; margin: .5rem 0; } input { flex: 1; min-width: 0; }
input, button { font: inherit; color: inherit; background: none; border: 1px solid var(--soft); padding: .3rem .6rem; }
button, .written { cursor: pointer; } :focus-visible, .chosen { outline: 2px solid LinkText; }
td { padding: .1rem .3rem; white-space: nowrap; }
@media (max-width: 40rem) { tr { display: block; } td { display: inline-block; } td:last-child { display: block; } }
#tokens { font: 1.1rem ui-monospace, monospace; } #tokens span { display: inline-block; min-width: 1.5rem; padding: .2rem 0;
  text-align: center; } #tokens .written { border-bottom: 2px solid var(--soft); }
#grid { font: .75rem ui-monospace, monospace; color: var(--soft); } #grid div { display: flex; }
#grid i { flex: none; width: 1.5rem; height: .75rem; border: 1px solid color-mix(in srgb, var(--soft) 30%, transparent); } #grid .sharp { color: var(--look); }
#grid b { flex: none; width: 4.2rem; position: sticky; left: 0; background: Canvas; }
svg { width: 100%; font: 14px system-ui; fill: currentColor; } polyline { fill: none; stroke: LinkText; stroke-width: 2; }
</style>
<h1>tinyllm</h1>
<p class="soft">A small language model that learned school arithmetic from examples. It writes one character after
another, and no calculator helps it. The check of each step is made afterwards.</p>
<form id="form"><input id="problem" aria-label="Problem" autocomplete="off" autocapitalize="off" spellcheck="false"
  maxlength="400" autofocus><button id="ask">Ask</button></form>
<div class="few" id="examples"></div>
<p id="message" role="alert" class="false"></p>
<main id="result" hidden aria-live="polite">
  <div id="answer" class="scroll"></div>
  <p><span id="sentence"></span> <span id="note" class="soft"></span></p>
  <div class="scroll" tabindex="0" role="region" aria-label="Working"><table id="working"></table></div>
  <h2>How it wrote this</h2>
  <p class="soft">Choose a token that it wrote (in the order in which it reads and writes), or step with the arrow keys: below are the likeliest
    there, and where each head looked. Heads that looked at one place stand out. Point at a row to see it above.</p>
  <div id="tokens" tabindex="0" role="group" aria-label="Tokens"></div><div id="next" class="few" role="status"></div>
  <div class="scroll" id="grid" tabindex="0" role="region" aria-label="Heads"></div>
  <p><button id="copy" type="button">Copy as LaTeX</button></p>
</main>
<h2>How it learned</h2><div id="learned"></div>
<script nonce="NONCE">
const data = DATA, $ = id => document.getElementById(id);
const address = () => new URLSearchParams(location.search.replaceAll("+", "%2B")).get("q");
const names = {add: "sums", sub: "differences", mul: "products", div: "quotients", expr: "brackets", algebra: "letters"};
let reply, chosen, asked = 0;

function add(parent, tag, text, properties = {}) {
  const element = Object.assign(document.createElement(tag), {textContent: text}, properties);
  parent.append(element);
  return element;
}
const math = content => `<math displaystyle="true">${content}</math>`;
const paint = (element, digit) => element.style.background = `color-mix(in srgb, var(--look) ${9 * digit}%, transparent)`;

async function ask(problem, remember = true) {
  const turn = ++asked;
  $("problem").value = problem;
  $("ask").textContent = "It writes ...";
  $("result").className = "waiting";
  let found = {error: "The server does not answer; start it again: python tinyllm.py serve"};
  try { found = await (await fetch("/solve", {method: "POST", body: JSON.stringify({problem})})).json(); } catch {}
  if (turn !== asked) return;                          // a later question has been asked
  for (const [id, text] of [["ask", "Ask"], ["message", found.error]]) $(id).textContent = text || "";
  Object.assign($("result"), {className: "", hidden: "error" in found});
  if (remember && problem !== address()) history.pushState(null, "", "/?q=" + encodeURIComponent(problem));
  document.title = `${problem} - tinyllm`;
  if (!found.error) show(reply = found);
}

function show({problem, stages, sentence, right, note, read, start}) {
  $("answer").innerHTML = math(`${problem}<mo>=</mo>${stages.length ? stages.at(-1)[0] : ""}`);
  Object.assign($("sentence"), {textContent: `Check: ${sentence}.`, className: right});
  $("note").textContent = note && `Note: ${note}.`;
  $("working").innerHTML = stages.map(([stage, check], i) => `<tr><td>${math(i ? "" : problem)}<td>${math("<mo>=</mo>")}
    <td>${math(stage)}<td class="${{t: "true", f: "soft"}[check[0]] || "false"}">${check}`).join("");
  $("tokens").replaceChildren();
  [...read, "end"].forEach((token, t) =>
    add($("tokens"), "span", token, t < start ? {} : {className: "written", onclick: () => choose(t)}));
  choose(start);
}

function choose(t) {
  const i = (chosen = t) - reply.start, spans = [...$("tokens").children];
  spans.forEach((span, s) => { span.classList.toggle("chosen", s === t); paint(span, 0); });
  for (const id of ["next", "grid"]) $(id).replaceChildren();
  for (const [token, p] of reply.tokens[i].next)
    add(add($("next"), "label", `${token} ${(100 * p).toFixed(1)}% `), "meter", "", {value: p});
  reply.tokens[i].heads.forEach((digits, n) => {
    const row = add($("grid"), "div", "", {className: /[89]/.test(digits) ? "sharp" : ""});
    add(row, "b", `head ${Math.floor(n / data.heads) + 1}.${n % data.heads + 1}`);
    for (const digit of digits) paint(add(row, "i", ""), digit);
    row.onmouseenter = row.onclick = () => spans.forEach((span, s) => paint(span, digits[s] || 0));
  });
}

function chart(title, top, series) {                   // series: name -> points [minutes, 0 to top]
  const width = Math.max(...Object.values(series).flat().map(([x]) => x)) || 1;
  const lines = Object.entries(series).map(([name, points], i) => {
    const at = points.map(([x, y]) => `${40 + 420 * x / width},${170 - 160 * y / top}`), y = 16 + 22 * i;
    const dashes = i ? `${2 * i} 3` : "none", line = at => `<polyline points="${at}" stroke-dasharray="${dashes}"/>`;
    return line(at.join(" ")) + line(`474,${y} 510,${y}`) + `<text x="516" y="${y + 4}">${name}</text>`;
  });
  add($("learned"), "figure", "", {innerHTML: `<figcaption>${title}</figcaption><svg viewBox="0 0 620 190">${lines.join("")}
    <text x="4" y="16">${top}</text><text x="4" y="172">0</text><text x="390" y="188">${width.toFixed(1)} minutes</text></svg>`});
}

$("form").onsubmit = event => { event.preventDefault(); ask($("problem").value); };
$("copy").onclick = () => navigator.clipboard.writeText(reply.latex);
$("tokens").onkeydown = event => {
  const t = chosen + ({ArrowRight: 1, ArrowLeft: -1}[event.key] || 0);
  if (t !== chosen && t >= reply.start && t <= reply.read.length) { event.preventDefault(); choose(t); }
};
for (const [problem, mark] of data.examples) add($("examples"), "button", problem + mark, {onclick: () => ask(problem)});
const minutes = point => point.seconds / 60, rows = data.history.filter(point => point.right);
if (rows.length) {
  chart("Loss, in nats", 1, {loss: data.history.map(point => [minutes(point), Math.min(1, point.loss)])});
  chart("Held-out answers right, in %", 100, Object.fromEntries(Object.keys(rows[0].right).map(
    kind => [names[kind] || kind, rows.map(point => [minutes(point), 100 * point.right[kind]])])));
}
(window.onpopstate = () => address() ? ask(address(), false) : $("result").hidden = true)();
</script></html>
"""

if __name__ == "__main__":
    sys.exit(main())
