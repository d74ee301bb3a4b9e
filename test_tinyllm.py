"""The tests of tinyllm.py, in the order of the file. Each says which idea it pins; break the idea and
it fails.

    python -m pytest                    within a minute and a half on two quiet cores
    TINYLLM_SLOW=1 python -m pytest     also the long tests
"""

import copy
import dataclasses
import doctest
import functools
import http.client
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from xml.etree import ElementTree

import pytest

import tinyllm                                       # before torch: it sets how idle threads wait
import torch
import torch.nn.functional as F
from tinyllm import Config, InputError, TinyLLM, decode, encode

tinyllm.N_PROBLEMS = 3                              # its rows are not what most tests look at
HERE = Path(__file__).parent
SOURCE = (HERE / "tinyllm.py").read_text(encoding="utf-8")
SLOW = bool(os.environ.get("TINYLLM_SLOW"))
slow = pytest.mark.skipif(not SLOW, reason="set TINYLLM_SLOW=1 to run the long tests")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")
PROGRAM = [sys.executable, str(HERE / "tinyllm.py")]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
SMALL = dict(n_layer=2, n_head=2, head_dim=24, n_embd=32, block_size=128)
TINY = ["--n_layer", "1", "--n_embd", "16", "--n_head", "2", "--batch_tokens", "128"]

def small_model(**changes):
    """An untrained model with random weights everywhere: fresh blocks add nothing, which would hide mistakes."""
    torch.manual_seed(0)
    model = TinyLLM(Config(**{**SMALL, **changes})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model

def lines(kind, count, seed=0):
    """Lines as they are drawn, in turn from the training's side and from the other."""
    rng = random.Random(seed)
    problems = [tinyllm.draw_problem(kind, rng, held_out=i % 2 == 0) for i in range(count)]
    return [tinyllm.solve_by_rules(problem) for problem in problems]

def batches(config, count, step=0, **helpers):
    """The first batches of a run, or those from a later step on."""
    stream = tinyllm.stream_batches(config, {**tinyllm.new_progress(), "step": step}, **helpers)
    return list(itertools.islice(stream, count))

def train(config, path, model=None, report=lambda text: None):
    """A new run whose rows go to `report`."""
    torch.manual_seed(config.seed)
    model = model or TinyLLM(config)
    tinyllm.fit(model, tinyllm.make_optimizers(model, config), tinyllm.new_progress(), str(path), report)
    return model

def command(*args, stdin="", **environment):
    """Run the program as a person does, in the folder of the test: exit status, stdout, stderr."""
    done = subprocess.run([*PROGRAM, *map(str, args)], timeout=120, input=stdin.encode("utf-8"), capture_output=True,
                          env={**os.environ, **environment})
    return done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8")

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.pt"
    tinyllm.save_checkpoint(path, small_model(block_size=64))
    return path

@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """No test sees the folder in which they were started, where a trained model may lie: each has its own."""
    monkeypatch.chdir(tmp_path)

######## The file ########

def test_the_file_can_be_read():
    """The tutorial stays short, the file too, and no line is too wide for a screen."""
    rows = SOURCE.split("\n")
    code = rows[:next(i for i, row in enumerate(rows) if row.startswith('PAGE = r"""'))]
    end = next(i for i, row in enumerate(rows) if "The tutorial ends here" in row)
    assert end <= 920 and len(rows) <= 2243
    assert [row for row in code if len(row) > 100] == []

def test_every_example_in_the_file_is_true():
    """Documentation that is run cannot be wrong: all doctests, Step 1's five facts among them."""
    result = doctest.testmod(tinyllm)
    assert result.attempted > 40 and result.failed == 0

def test_numpy_shares_memory():
    """Fact 2, where NumPy is installed: neither way of turning one into the other copies anything."""
    numpy = pytest.importorskip("numpy")
    tensor = torch.ones(2)
    array = tensor.numpy()
    array += 1
    assert tensor.tolist() == torch.from_numpy(array).tolist() == numpy.array([2.0, 2.0]).tolist()

######## Step 3: the model ########

@pytest.mark.parametrize("ones_first", [True, False])
def test_tokenizer_round_trip(ones_first):
    """Nothing is lost between text and tokens; numbers are read from the ones place, or not."""
    for line in (line for kind in tinyllm.KINDS for line in lines(kind, 200)):
        assert decode(encode(line, ones_first), ones_first) == line
    assert [tinyllm.VOCAB[i] for i in encode("-408*(12-7)")] == list("-804*(21-7)")
    assert [tinyllm.VOCAB[i] for i in encode("3(48x^2-xy+12)")] == list("3(2^x84-yx+21)")
    assert encode("408", ones_first=False) == encode("804")

def test_addresses_know_no_future():
    """An address depends on what stands before it alone, and no two tokens of a line share one."""
    for line in (line for kind in tinyllm.KINDS for line in lines(kind, 50)):
        addresses = tinyllm.find_addresses(encode(line))
        assert addresses[:10] == tinyllm.find_addresses(encode(line)[:9])[:len(addresses)]
        assert len({address[1:] for address in addresses}) == len(line) + 1

def test_places_have_gaps_in_training():
    """Each line numbers its places in its own way: equal ones stay equal, higher ones higher; some have no gaps."""
    rng = random.Random(0)
    addresses = tinyllm.find_addresses(encode("1234+12345"))
    new = [[place for *_, place in tinyllm.with_gaps(addresses, 3, rng)] for _ in range(3000)]
    assert all(row[:5] == row[5:10] and row[0] == 1 for row in new)
    assert {b - a for row in new for a, b in zip(row[5:], row[6:])} == {1, 2, 3}
    assert 0.33 < sum(row[5:] == [1, 2, 3, 4, 5, 6] for row in new) / 3000 < 0.45
    assert tinyllm.with_gaps(addresses, 1, rng) == addresses

def test_rope_depends_on_distance_alone():
    """Moving query and key by the same number of columns does not change how well they agree."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 32).expand(2, 1, 50, 1, 32)
    turns = tinyllm.rotations(torch.arange(50)[None], 16, 1000).unsqueeze(2)
    scores = tinyllm.rotate(q, turns)[0, :, 0] @ tinyllm.rotate(k, turns)[0, :, 0].T             # (50, 50)
    for distance in (0, 1, 7):
        diagonal = scores.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4)
    assert not torch.allclose(scores[0, 0], scores[0, 7], atol=1e-2)

def test_attention_is_pytorchs():
    """The formula of Step 3-3, which the model runs, is PyTorch's; for one cached token as well."""
    q, k, v = torch.randn(3, 2, 4, 9, 16)
    y, weights = tinyllm.attention(q, k, v)
    assert torch.allclose(y, F.scaled_dot_product_attention(q, k, v, is_causal=True), atol=1e-5)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 4, 9)) and weights.triu(1).max() == 0
    last = F.scaled_dot_product_attention(q[:, :, -1:], k, v)
    assert torch.allclose(tinyllm.attention(q[:, :, -1:], k, v)[0], last, atol=1e-5)

@pytest.mark.parametrize("place", [True, False])
def test_causality(place):
    """A later token changes no earlier logit: the model cannot read the answer it is asked for."""
    model = small_model(place=place)
    ids = torch.tensor([encode("12*34=12*30+12*4")])
    changed = ids.clone()
    changed[0, 9] = encode("7")[0]
    before, after = model(ids), model(changed)
    assert torch.allclose(before[:, :9], after[:, :9], atol=1e-5)
    assert not torch.allclose(before[:, 9:], after[:, 9:], atol=1e-2)

######## Step 4: the data ########

def second_opinion(text):
    """The exact worth by Python's own parser, at nine points (x, y). That proves it for all x and y, as no
    letter stands in it to a higher power than 2."""
    python = re.sub(r"(?<=[0-9xy)])(?=[xy(])", "*", text.replace("^2", "**2"))
    python = re.sub(r"(?<![0-9])(?<!\*\*)([0-9]+)", r"F(\1)", python)
    points = [(x, y) for x in range(3) for y in range(3)] if re.search("[xy]", text) else [(0, 0)]
    return [eval(python, {"F": Fraction, "x": x, "y": y}) for x, y in points]

@pytest.mark.parametrize("kind", tinyllm.KINDS)
def test_every_generated_line_is_true(kind):
    """Every stage is worth what the problem is worth, by a second opinion; the last one is an answer;
    the line fits the model; and no problem that is drawn is called outside of what is drawn."""
    for line in lines(kind, 10_000 if SLOW else 1_000):
        problem, *stages = line.split("=")
        difference = [second_opinion(f"({stage})-({problem})") for stage in stages]
        assert stages and not any(map(any, difference)), line
        assert tinyllm.check(line) == (True, True) and len(line) < Config().block_size, line
        assert tinyllm.kind_of(problem) == kind and not tinyllm.is_outside(problem, Config()), line

@pytest.mark.parametrize("line", [
    "(12+3)*4-6=15*4-6=60-6=54", "345*27=345*20+345*7=6000+900+(2100+315)=6900+2415=9315",
    "27*345=20*345+7*345=6000+900+(2100+315)=6900+2415=9315", "2345*7=14000+(2100+315)=14000+2415=16415", "16*8=128",
    "-12*34=-(12*34)=-(12*30+12*4)=-(360+48)=-408", "-3*(-4)=3*4=12", "5-(-9)=5+9=14", "-(-4)=4", "0*(-7)=0",
    "1831/23=70+(1831-1610)/23=70+221/23=70+8+(221-184)/23=78+37/23=78+1+(37-23)/23=79+14/23=79+2*7/23=79+14/23",
    "56/7=8+(56-56)/7=8+0/7=8", "23/23=1",
    "5-1831/23=5-70-(1831-1610)/23=-65-221/23=-65-8-(221-184)/23=-73-37/23=-73-1-(37-23)/23=-74-14/23=-74-2*7/23=-74-14/23",
    "10/4=2+(10-8)/4=2+2/4=2+2/(2*2)=2+1/2", "-7/2=-(7/2)=-3-(7-6)/2=-3-1/2",
    "48/84=2*2*2*2*3/(2*2*3*7)=2*2*2*3/(2*3*7)=2*2*3/(3*7)=2*2/7=4/7", "-4/6=-2*2/(2*3)=-2/3", "3/8=3/(2*2*2)=3/8", "3/7=3/7",
    "5=5", "2*(4-7)=2*(-3)=-(2*3)=-6", "8x+3-5y+2x-7=8x+2x-5y+3-7=10x-5y-4", "3(2x-1)-2(x+4)=6x-3-2x-8=6x-2x-3-8=4x-11",
    "(x+1)-2=x+1-2=x-1", "(2x-1)^2=4x^2-2x-2x+1=4x^2-4x+1", "3x-3x=0x=0", "5x-5x+2x-y+1=0x+2x-y+1=2x-y+1", "8x-(-5x)=8x+5x=13x",
    "x+2=x+2", "(x+y)(y-x)=xy-x^2+y^2-xy=-x^2+xy-xy+y^2=-x^2+0xy+y^2=-x^2+y^2"])
def test_the_notebook(line):
    """The working a pupil would write, for each rule."""
    assert tinyllm.solve_by_rules(line.split("=")[0]) == line

@pytest.mark.parametrize("a, b", [
    ("12+39", "39+12"), ("7*8", "8*7"), ("5-3", "-3+5"), ("(1+2)*3+4", "4+3*(2+1)"), ("12-39", "39-12"), ("6/3+1", "1+6/3"),
    ("5-3x", "-3x+5"), ("(x+2)(x-3)", "(-3+x)(2+x)"), ("(x+1)^2", "(1+x)(x+1)")])
def test_twins_share_their_side(a, b):
    """A problem and its mirror image are never on different sides, whatever the numbers are."""
    for shift in range(60):
        moved = [re.sub("[0-9]+", lambda n: str(int(n[0]) + shift), text.replace("^2", "^")) for text in (a, b)]
        assert len({tinyllm.is_held_out(text.replace("^", "^2")) for text in moved}) == 1

def test_training_never_sees_a_held_out_problem():
    """The stream itself, as it goes into the model, holds no problem of the evaluation, nor its twin."""
    def twin(problem):
        written_out = re.sub(r"(\([^()]*\)|[xy])\^2", r"\1\1", problem)
        return tuple(sorted(re.findall("[0-9]+|[^0-9()+]", written_out)))

    asked = [problem for kind in tinyllm.KINDS for problem in tinyllm.held_out_problems(kind, 200)]
    held_out = set(map(twin, asked))
    seen = {decode(row).split("=")[0] for x, _, _ in batches(Config(), 64) for row in x.tolist()}
    assert len(set(asked)) == 1200 and len(seen) > 2000
    assert not any(map(tinyllm.is_held_out, seen)) and not held_out & set(map(twin, seen))

def test_lengths_are_even():
    """Short numbers are as common as long ones, and one problem in ten is held out."""
    rng = random.Random(0)
    problems = [tinyllm.KINDS["sub"].draw(rng, 10) for _ in range(5000)]
    lengths = [len(re.findall("[0-9]+", problem)[0]) for problem in problems]
    assert all(400 < lengths.count(n) < 600 for n in range(2, 11))
    assert 0.08 < sum(map(tinyllm.is_held_out, problems)) / 5000 < 0.12

@pytest.mark.parametrize("kind", ["expr", "algebra"])
def test_practice_is_harder_than_the_test(kind):
    """Training draws more of what is hard than the evaluation asks."""
    size, rng = tinyllm.KINDS[kind].size, random.Random(0)
    practised, asked = [sum(size(tinyllm.draw_problem(kind, rng, held_out)) for _ in range(1000)) / 1000
                        for held_out in (False, True)]
    assert practised > asked + 0.1

def test_a_kind_of_your_own(monkeypatch, tmp_path):
    """Step 4-1's example, switched on, is all: lines are drawn and checked, a spoilt one is caught, a batch is learned."""
    monkeypatch.setattr(tinyllm, "KINDS", {})
    comment = SOURCE[SOURCE.index("# def draw_fractions"):SOURCE.index("######## Step 4-2")]
    exec(re.sub("^# ?", "", comment, flags=re.M), vars(tinyllm))
    rng = random.Random(0)
    for _ in range(100):
        problem = tinyllm.draw_problem("frac", rng, held_out=False)
        line = tinyllm.solve_by_rules(problem)
        assert tinyllm.check(line) == (True, True) and second_opinion(line.split("=")[-1]) == second_opinion(problem)
        assert tinyllm.check(re.sub("[0-9]$", lambda d: str((int(d[0]) + 1) % 10), line))[0] is False, line
    assert tinyllm.solve_by_rules("1/2+1/3") == "1/2+1/3=3/6+2/6=5/6"
    train(Config(**SMALL, kinds="frac", steps=2), tmp_path / "frac.pt")

def test_x_y_and_what_counts():
    """y is x one token later, and only what stands behind the first = counts."""
    x, y = tinyllm.to_example("12*34=360+48=408")
    whole = encode("12*34=360+48=408\n")
    assert x == whole[:-1] and y == [-100] * 5 + whole[6:]

def test_batches_hold_whole_lines_and_little_padding():
    """Rows of a batch are of like length, about batch_tokens in all, each with its addresses."""
    n_tokens = n_padding = 0
    for x, addresses, y in batches(Config(gap=1, batch_tokens=2048), 64, step=6400):
        assert x.shape == y.shape and addresses.shape == (len(x), x.shape[1] + 1, 4)
        row = decode(x[0].tolist()).split("\n")[0]
        assert addresses[0, :len(row) + 1].tolist() == [list(a) for a in tinyllm.find_addresses(encode(row))]
        n_tokens += x.numel()
        n_padding += sum(x.shape[1] - len(decode(ids).split("\n")[0]) for ids in x.tolist())
    assert 0.9 * 2048 < n_tokens / 64 <= 2048 and n_padding / n_tokens < 0.1

def test_small_problems_come_first():
    """The curriculum: batches early in the run hold mostly short lines, later ones all lengths."""
    def mean_length(step):
        return sum(x.shape[1] for x, _, _ in batches(Config(batch_tokens=2048), 64, step)) / 64
    assert mean_length(0) < 0.8 * mean_length(3200)

def test_the_stream_can_start_anywhere():
    """Batch n is the same whether the run got there in one go or was resumed; another seed is another."""
    config = Config(batch_tokens=1024)
    expected, resumed = batches(config, 70)[-1], batches(config, 1, step=69)[0]
    other = batches(dataclasses.replace(config, seed=1), 1, step=69)[0]
    assert all(torch.equal(a, b) for a, b in zip(expected, resumed))
    assert expected[0].shape != other[0].shape or not torch.equal(expected[0], other[0])

def test_helpers_change_nothing():
    """Two processes that make the data hand on the same batches in the same order as none; so the run is the same."""
    pair = [batches(Config(batch_tokens=128), 70, step=50, **helpers) for helpers in ({}, {**tinyllm.HELPERS, "num_workers": 2})]
    assert all(torch.equal(a, b) for batch, other in zip(*pair) for a, b in zip(batch, other))

######## Step 5: training ########

def test_an_untrained_model_knows_nothing():
    """The first loss is ln 21: each token is as likely as any other. Half the bits change little."""
    torch.manual_seed(0)
    x, addresses, y = batches(Config(batch_tokens=1024), 1)[0]
    model = TinyLLM(Config())
    loss = tinyllm.loss_of(model, x, addresses, y).item()
    exact = F.cross_entropy(model(x, addresses).flatten(0, 1), y.flatten(), ignore_index=-100).item()
    assert abs(loss - math.log(21)) < 0.15 and abs(loss / exact - 1) < 0.02

def test_one_batch_is_learned_by_heart():
    """The first thing to try with any network: if it cannot overfit one batch, something is broken."""
    torch.manual_seed(0)
    config = Config(n_layer=2, n_head=2, n_embd=64, batch_tokens=256)
    model = TinyLLM(config)
    optimizers = tinyllm.make_optimizers(model, config)
    batch = batches(config, 1)[0]
    assert any(tinyllm.learn(model, optimizers, *batch) < 0.02 for _ in range(200))

def test_every_weight_is_trained_once():
    """Muon and AdamW share the weights: none twice, none forgotten; without Muon AdamW has all."""
    for config in (Config(**SMALL), Config(**SMALL, muon=False)):
        model = TinyLLM(config)
        trained = [p for optimizer in tinyllm.make_optimizers(model, config)
                   for group in optimizer.param_groups for p in group["params"]]
        assert len(trained) == len(set(map(id, trained))) == len(list(model.parameters()))

def test_muon_is_pytorchs():
    """Our Muon takes the steps of torch.optim.Muon, which rounds to bfloat16; zeros stay zeros."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((24, 8), (8, 24), (8, 8))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    before = [p.detach().clone() for p in ours]
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2}
    optimizers = tinyllm.Muon(ours, **settings), torch.optim.Muon(theirs, **settings)
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, start in zip(ours, theirs, before):
        assert (a - b).norm() < 0.02 * (b - start).norm()
    assert not tinyllm.orthogonal(torch.zeros(4, 6)).any()

@pytest.fixture
def only_short_sums(monkeypatch):
    """Sums of two numbers of one or two digits, and nothing else."""
    def draw(rng, top):
        return f"{rng.randrange(10 ** top)}+{rng.randrange(10 ** top)}"
    kind = dataclasses.replace(tinyllm.KINDS["add"], draw=draw, sizes=range(1, 3), practice={})
    monkeypatch.setattr(tinyllm, "KINDS", {"add": kind})

def test_a_small_model_learns_addition(only_short_sums, tmp_path):
    """From nothing to 100% of the held-out one-digit sums, which it never saw."""
    config = Config(n_layer=2, n_head=4, head_dim=16, n_embd=64, steps=400, batch_tokens=512, kinds="add")
    problems = tinyllm.held_out_problems("add", 10, size=1)
    before = tinyllm.evaluate(TinyLLM(config).eval(), problems)
    after = tinyllm.evaluate(train(config, tmp_path / "model.pt"), problems)
    assert len(problems) > 3 and before["answers"] == 0
    assert after["answers"] == after["workings"] == len(problems), after["wrong"]

@slow
def test_the_default_model_learns_every_kind(tmp_path):
    """A fifth of the default run answers most held-out sums, many longer than any it saw, and something of every kind."""
    model = train(Config(steps=1200), tmp_path / "model.pt")
    asked = {kind: tinyllm.held_out_problems(kind, 200) for kind in tinyllm.KINDS}
    asked["12 digits"] = tinyllm.held_out_problems("add", 200, size=12)
    right = {name: tinyllm.evaluate(model, problems)["answers"] / 200 for name, problems in asked.items()}
    assert right["add"] > 0.7 and right["12 digits"] > 0.4 and min(right.values()) > 0.1, right

def test_resume_is_the_same_run(only_short_sums, tmp_path):
    """Resumed from what was saved at step 20 of 40, a run ends with bit for bit the same weights."""
    config, path, saved = Config(**SMALL, steps=40, batch_tokens=128, kinds="add"), tmp_path / "model.pt", []
    whole = train(config, path, report=lambda text: saved.append(path.exists() and path.read_bytes()))
    path.write_bytes(saved[6])                      # after the head line 0, 4 ... 24; a row comes before its save
    assert tinyllm.load_checkpoint(path)[1]["progress"]["step"] == 20
    assert tinyllm.main(["train", "--resume", "--device", "cpu", "--out", str(path)]) == 0
    resumed = tinyllm.load_checkpoint(path)[0].state_dict()
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed[name]), name

def test_saved_and_loaded_it_gives_the_same_answers(tmp_path):
    """A checkpoint is the whole model, and any user may read it who may read other new files."""
    model, path = small_model(), tmp_path / "model.pt"
    tinyllm.save_checkpoint(path, model)
    (tmp_path / "other").write_bytes(b"")
    problems = [line.split("=")[0] for line in lines("mul", 20)]
    assert tinyllm.solve(tinyllm.load_checkpoint(path)[0], problems) == tinyllm.solve(model, problems)
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    assert sorted(os.listdir(tmp_path)) == ["model.pt", "other"]

class Evil:
    """Unpickling this would create a folder."""
    def __reduce__(self):
        return os.mkdir, ("ran",)

def test_what_is_no_checkpoint_is_refused(checkpoint, tmp_path):
    """Missing, empty, cut off anywhere, foreign, newer, of other shapes, or a pickle that would run
    code: a sentence each, and no code is run."""
    bad, data, state = tmp_path / "bad.pt", checkpoint.read_bytes(), torch.load(checkpoint)
    no_numbers = {name: tensor * float("nan") for name, tensor in state["model"].items()}
    files = [b"", b"hello" * 100, *(data[:len(data) * i // 11] for i in range(1, 11))]
    for value in ([1, 2, 3], {**state, "config": {"n_layer": "many"}}, {"x": Evil()}, {**state, "model": no_numbers},
                  {**state, "config": {**state["config"], "n_embd": 64}}, {**state, "model": {}}):
        torch.save(value, bad)
        files.append(bad.read_bytes())
    for file in files:
        bad.write_bytes(file)
        with pytest.raises(InputError, match="damaged"):
            tinyllm.load_checkpoint(bad)
    torch.save({**state, "format": 99, "config": {"a_new_idea": 1}}, bad)
    for path, words in ((bad, "another version"), (tmp_path / "missing.pt", "is not there"), (tmp_path, "may not be read")):
        with pytest.raises(InputError, match=words):
            tinyllm.load_checkpoint(path)
    assert not os.path.exists("ran")

def test_weights_that_are_no_numbers_are_never_saved(tmp_path):
    """A run that blows up stops with a sentence, and the file keeps the last good state."""
    path, model = tmp_path / "model.pt", small_model()
    tinyllm.save_checkpoint(path, model)
    before = path.read_bytes()
    model.output.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match="keeps the last good state"):
        tinyllm.save_checkpoint(path, model)
    with pytest.raises(InputError, match="keeps the last good state"):
        train(Config(**SMALL, steps=50, batch_tokens=128, lr=1e30, adam_lr=1e30), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["model.pt"]

@pytest.mark.skipif(os.name == "nt", reason="limits the size of files as Linux and macOS do")
def test_a_full_disk_loses_nothing(tmp_path):
    """No room for the new file: a sentence, status 2, and the old file is whole."""
    path = tmp_path / "model.pt"
    tinyllm.save_checkpoint(path, small_model())
    before = path.read_bytes()
    limited = ["sh", "-c", 'ulimit -f 40; exec "$@"', "sh", *PROGRAM, "train", "--force", "--steps", "1", "--out", str(path)]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and done.stderr.startswith("tinyllm: cannot write") and done.stderr.count("\n") == 1
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["model.pt"]

@slow
def test_killed_at_any_moment_the_file_is_whole(tmp_path):
    """SIGKILL at 15 random moments of a run that saves all the time: each time the file loads."""
    path, rng = tmp_path / "model.pt", random.Random(0)
    program = [*PROGRAM, "train", "--force", "--out", str(path), "--steps", "10", "--kinds", "add", *TINY]
    for _ in range(15):
        process = subprocess.Popen(program, stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(2 * rng.random())
        process.kill()
        process.wait()
        assert tinyllm.load_checkpoint(path)[1]["progress"]["step"] <= 10

@pytest.mark.skipif(os.name == "nt", reason="sends Ctrl-C as Linux and macOS do")
def test_ctrl_c_elsewhere_is_a_plain_line(checkpoint):
    """Only `train` says that it saved something."""
    process = subprocess.Popen([*PROGRAM, "ask", "--plain", "--checkpoint", str(checkpoint)], text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdin.write("1+2\n")
    process.stdin.flush()
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and err.strip() == "tinyllm: stopped"

@pytest.mark.skipif(os.name == "nt", reason="sends Ctrl-C as Linux and macOS do")
@pytest.mark.parametrize("presses", [1, 3])
def test_ctrl_c_saves(tmp_path, presses):
    """Ctrl-C while it trains, and again and again: saved, status 130, the exact command to go on with,
    nothing left behind; and --resume goes on with the same budget."""
    path = tmp_path / "my model \u6a21.pt"
    program = [*PROGRAM, "train", "--out", str(path), "--minutes", "5", "--kinds", "add", *TINY]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONIOENCODING": "cp1252"})       # cannot print that path
    while not process.stdout.readline().lstrip().startswith("step"):
        pass
    time.sleep(1)
    for _ in range(presses):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    _, err = process.communicate(timeout=60)
    progress = tinyllm.load_checkpoint(path)[1]["progress"]
    assert process.returncode == 130 and "train --resume --out '" in err and "Traceback" not in err
    assert progress["step"] > 0 and progress["minutes"] == 5 and os.listdir(tmp_path) == [path.name]
    assert tinyllm.main(["train", "--resume", "--steps", str(progress["step"] + 1), "--out", str(path)]) == 0
    assert tinyllm.load_checkpoint(path)[1]["progress"]["step"] == progress["step"] + 1

PART = """import sys, tinyllm, torch
fit, learn, seen = tinyllm.fit, tinyllm.learn, []
def note(model, optimizers, *batch):
    seen.append(batch)
    return learn(model, optimizers, *batch)
def fit_and_keep(model, *rest):
    fit(model, *rest)
    torch.save((model.state_dict(), seen), f"rank{tinyllm.RANK}.pt")
tinyllm.fit, tinyllm.learn = fit_and_keep, note
sys.exit(tinyllm.main())"""

@slow
def test_two_processes_are_one_run_with_a_larger_batch(tmp_path):
    """torchrun and `train`: both end with the same weights, those of one process that learns from both batches, and they
    learn from different problems, none of them held out; one prints and saves, and its checkpoint is like any other."""
    (tmp_path / "part.py").write_text(PART, encoding="utf-8")
    program = [*TORCHRUN, "part.py", "train", "--steps", "3", "--out", "model.pt", *TINY, "--batch_tokens", "512"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=200, cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(HERE)})
    assert done.returncode == 0 and done.stdout.count("Before training") == 1, done.stderr
    (a, seen_a), (b, seen_b) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    saved, state = tinyllm.load_checkpoint(tmp_path / "model.pt")
    assert state["progress"]["step"] == len(seen_a) == len(seen_b) == 3
    assert all(torch.equal(a[name], b[name]) and torch.equal(a[name], state["model"][name]) for name in a)
    problems = [{decode(row).split("=")[0] for x, _, _ in seen for row in x.tolist()} for seen in (seen_a, seen_b)]
    assert not any(map(tinyllm.is_held_out, problems[0] | problems[1]))
    assert len(problems[0] & problems[1]) < 0.1 * len(problems[0])
    torch.manual_seed(0)
    one = TinyLLM(saved.config)
    optimizers = tinyllm.make_optimizers(one, saved.config)
    for step, pair in enumerate(zip(seen_a, seen_b)):
        one.zero_grad()
        for batch in pair:
            (tinyllm.loss_of(one, *batch) / 2).backward()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * tinyllm.lr_factor(step, step / 3, saved.config)
            optimizer.step()
    assert all(torch.allclose(one.state_dict()[name], a[name], atol=2e-4) for name in a)

@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
def test_a_recorded_step_is_the_plain_step(device, monkeypatch):
    """30 steps as a GPU takes them, on lines of all lengths and at rates that change: the same losses to rounding (in
    float32, which rounds less), also when the optimizers go on from what was saved."""
    monkeypatch.setattr(tinyllm, "has_fast_bfloat16", lambda device: False)
    config = Config(**SMALL, batch_tokens=512 if device == "cpu" else 4096)

    def run(make_step, saved):
        torch.manual_seed(0)
        model = TinyLLM(config).to(device)
        optimizers = tinyllm.make_optimizers(model, config)
        for optimizer, state in zip(optimizers, copy.deepcopy(saved)):       # what is loaded is changed in place
            optimizer.load_state_dict(state)
        step, losses = make_step(model, optimizers), []
        for i, batch in enumerate(batches(config, 30)):
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * (1 + i / 30)
            losses.append(step(*(tensor[i % 3:].to(device) for tensor in batch)).item())         # not all rows
        tinyllm.save_checkpoint("model.pt", model, optimizers)
        return losses, torch.load("model.pt", map_location="cpu")["optimizers"]

    plain = functools.partial(functools.partial, tinyllm.learn)
    losses, saved = run(plain, [])
    assert losses == pytest.approx(run(tinyllm.RecordedStep, [])[0], rel=1e-3) and losses[29] < 0.95 * losses[0]
    assert run(plain, saved)[0] == pytest.approx(run(tinyllm.RecordedStep, saved)[0], rel=1e-3)

@on_gpu
def test_a_gpu_gives_the_same_answers(tmp_path):
    """Trained on a GPU in bfloat16, saved, and asked on both: the same text."""
    model = train(Config(steps=30), tmp_path / "model.pt", model=TinyLLM(Config(steps=30)).cuda())
    problems = tinyllm.held_out_problems("add", 50, size=2)
    other = tinyllm.solve(tinyllm.load_checkpoint(tmp_path / "model.pt")[0], problems)
    assert sum(a == b for a, b in zip(tinyllm.solve(model, problems), other)) >= 45

######## Step 6: evaluation ########

def test_greedy_decoding_in_a_batch():
    """With a cache, in a batch that shrinks, the same is written as by the plain loop, which takes the likeliest token."""
    model = small_model()
    prompts = [encode(text) for text in ("1+2=", "12*34=", "7=", "99999-1=")]
    assert tinyllm.generate_batch(model, prompts, 40) == [tinyllm.generate(model, prompt, 40) for prompt in prompts]
    ids = prompts[0]
    for token in tinyllm.generate(model, prompts[0], 40)[len(ids):]:
        assert model(torch.tensor([ids]))[0, -1].argmax() == token != tinyllm.END
        ids = [*ids, token]

def test_answers_do_not_depend_on_company_or_order():
    """A problem gets the same line alone, among others, and in any order."""
    model = small_model()
    problems = [line.split("=")[0] for kind in tinyllm.KINDS for line in lines(kind, 6) if len(line) < 90]
    together = tinyllm.solve(model, problems)
    assert together == [tinyllm.solve(model, [problem])[0] for problem in problems]
    assert together[::-1] == tinyllm.solve(model, problems[::-1], batch_size=7)
    assert all(line.startswith(problem + "=") for line, problem in zip(together, problems))

def test_no_calculator(monkeypatch):
    """Writing never touches the rules: without any of them, the model writes the same line."""
    model, problems = small_model(), ["12*34", "7/2", "5-9"]
    expected = tinyllm.solve(model, problems)
    for name in ("read", "KINDS", "solve_by_rules", "exact_value", "is_true", "check"):
        monkeypatch.setattr(tinyllm, name, None)
    assert tinyllm.solve(model, problems) == expected

@pytest.mark.parametrize("line", [
    "12+39=41", "12+39=", "12+39", "12+39=50+1", "12+39=51=", "10/4=5/2", "12+39=51=51+", "1/0=0", "796-801=-05",
    "970-970=-0", "7=007", "3+1/2=03+1/2", "0-1/2=-0+1/2", "1-3/10=1-3/10", "1-5/7=1-5/7", "x+x=2x+0", "x-y=1x-y",
    "x-x=0x", "3-x=3-x", "6/4=1+2/4"])
def test_check_is_strict(line):
    """An answer is right only if it is simple and equal; a working only if every stage is."""
    assert tinyllm.check(line)[0] is False
    assert tinyllm.check("12+39=50=51") == (True, False) and tinyllm.check("1-3/10=7/10") == (True, True)

######## Step 7: going further ########

def test_look_shows_the_weights_of_the_model():
    """Each row of the picture is the look of one head, at the characters before; long lines come in blocks."""
    model, line = small_model(), "12+39=51"
    rows = tinyllm.look(model, line).splitlines()
    layer, head = map(int, re.findall("[0-9]+", rows[0])[:2])
    assert rows[1].strip() == "21+93=15" and len(rows) == 5
    weights = tinyllm.watch(model, line)[1][layer - 1, head - 1]                       # (T, T) of that head
    for t, row in enumerate(rows[2:], start=5):
        shades = [" .:-=+*#%@"[min(9, int(10 * w))] for w in weights[t, :t + 1].tolist()]
        assert row[5:] == "".join(shades).rstrip()
    assert max(map(len, tinyllm.look(model, "1+1=" + "1" * 100).splitlines())) < 80

@pytest.mark.parametrize("stage, latex", [
    ("-408", "-408"), ("12*34", r"12 \times 34"), ("1831/23", r"1831 \div 23"), ("14/23", r"\frac{14}{23}"),
    ("-2/3", r"-\frac{2}{3}"), ("79+14/23", r"79+\frac{14}{23}"), ("-3-1/2", r"-3-\frac{1}{2}"),
    ("5-3+1/2", r"5-3+\frac{1}{2}"), ("5-1/2", r"5-\frac{1}{2}"), ("70+221/23", r"70+221 \div 23"),
    ("70+(1831-1610)/23", r"70+(1831-1610) \div 23"), ("(36/9)-31", r"(36 \div 9)-31"), ("5*(-3)", r"5 \times (-3)"),
    ("2*(3+1/2)", r"2 \times \left(3+\frac{1}{2}\right)"), ("2*2*3/(3*7)", r"\frac{2 \times 2 \times 3}{3 \times 7}"),
    ("3x^2-xy", "3x^{2}-xy"), ("(2x-1)^2", "(2x-1)^{2}"), ("2(x+3)(y-1)", "2(x+3)(y-1)"), ("-(x-2)", "-(x-2)")])
def test_latex_of_every_construct(stage, latex):
    """What a teacher would write on the board, for each construct."""
    assert tinyllm.typeset(stage, tinyllm.LATEX) == latex

def test_latex_and_mathml_are_well_formed():
    """600 workings and some nonsense: braces and tags balance, no raw * or /, no number is lost."""
    for line in [*(line for kind in tinyllm.KINDS for line in lines(kind, 100)), "1+2=3+^=)3(=x^3"]:
        latex = tinyllm.to_latex(line)
        assert latex.count("{") == latex.count("}") and latex.count(r"\left(") == latex.count(r"\right)") or "^" in line
        assert not re.search("[*/]", latex.replace("{align*}", "")) and latex.count("&=") == line.count("=")
        for stage in line.split("="):
            root = ElementTree.fromstring(f"<math>{tinyllm.typeset(stage, tinyllm.MATHML)}</math>")
            numbers = [node.text for node in root.iter("mn")]
            assert numbers == re.findall("[0-9]+", stage) or "^" in stage

@pytest.mark.parametrize("text, problem", [
    (" 12 * 34 = ", "12*34"), ("12\u00d734", "12*34"), ("\uff11\uff12\uff0a\uff13\uff14\uff1d", "12*34"), ("012*0034", "12*34"),
    ("3\u00b74", "3*4"), ("3\u22174", "3*4"), ("1\u20442", "1/2"), ("3\u20132", "3-2"), ("\ufeff1+1", "1+1"), ("6:3", "6/3"),
    ("[1+2]*{3-1}", "(1+2)*(3-1)"), ("6,358+1", "6358+1"), ("+5", "5"), ("5--3", "5-(-3)"), ("5+-3", "5+(-3)"),
    ("((38+47)-71)", "(38+47)-71"), ("2(3+4)", "2*(3+4)"), ("(1+2)(3+4)", "(1+2)*(3+4)"), ("-5+3", "-5+3"), ("2*x", "2x"),
    ("x*2", "2x"), ("3 x", "3x"), ("X\u00b2 + \uff58", "x^2+x"), ("x**2", "x^2"), ("(x+1)*3", "3(x+1)"),
    ("(x+2)*(x-3)", "(x+2)(x-3)"), ("x*y", "xy"), ("6/2*x", "6/2*x"), ("3x*4x", "3x*4x"), ("(36/9)-31", "(36/9)-31")])
def test_forgiving_input(text, problem):
    """What leaves no doubt is asked in the form that was learned, and what is asked is worth the same."""
    assert tinyllm.prepare(text, small_model()) == problem

@pytest.mark.parametrize("text, words", [
    ("12+a", "unknown character 'a'.*; write"), ("12+x\u00b3", "SUPERSCRIPT THREE"), ("3\u00bd", "FRACTION ONE HALF"),
    ("(1+2", "bracket its partner"), ("1+2)", "bracket its partner"), ("1+", "two sides"), ("1++2", "two sides"),
    ("x2", "3x for x3"), ("3^2", "only letters"), ("(1+2)\u00b2", "only letters"), ("(2)^2+x", "only letters"),
    ("x^3", "x\\^2 for a square"), ("2**3", "x\\^2 for a square"), ("x*x*x", "up to x\\^2"), ("(x^2)^2", "up to x\\^2"),
    ("(2x+4)/2", "letters cannot be divided"), ("(1/2)*x", "letters cannot be divided"), ("6/2(1+2)", "behind a division"),
    ("6/2x", "behind a division"), ("6/((1+1))(1+2)", "behind a division"), ("2\u02e3", "MODIFIER LETTER"),
    ("0,125*8", "decimals"), ("", "one problem"), ("1 2+3", "space inside"), ("1 1/2", "1\\+1/2"), ("3,5", "decimals"),
    ("3.5*2", "unknown"), ("1/0", "division by zero"), ("3*(1/(2-2))", "division by zero"), ("1=1", "without ="),
    ("9" * 10_000, "parts"), ("(" * 150 + "1" + ")" * 150, "parts"), ("\u0661+1", "ARABIC-INDIC"), ("\ud800", "ud800")])
def test_bad_input_is_a_sentence(text, words):
    """What cannot be read is refused with the reason and the place, in ASCII."""
    with pytest.raises(InputError, match=words) as refusal:
        tinyllm.prepare(text, small_model(block_size=900))
    assert str(refusal.value).isascii() and "\n" not in str(refusal.value)

def test_nothing_that_a_person_types_keeps_it_busy():
    """Sizes are bounded before anything is computed, and the note never works a problem out: nested
    squares, long primes and long workings would take for ever."""
    model, began = small_model(block_size=900), time.perf_counter()
    for text in ("(" * 24 + "9" + ")^2" * 24 + "+x", "(" * 24 + "x-x+9" + ")^2" * 24, "(1+1)" * 30 + "x", "(x+1)(1+1)" * 9):
        with pytest.raises(InputError):
            tinyllm.prepare(text, model)
            raise InputError("it was read")
    for problem in ("1/(9999*9999*9999-1)", "3163*5766*8700*7952", f"1/{10 ** 15 + 37}", f"{10 ** 15 + 39}/{10 ** 15 + 37}"):
        assert tinyllm.prepare(problem, model) == problem
        assert tinyllm.is_outside(problem, Config()) in (True, False)
    assert time.perf_counter() - began < 1

@pytest.mark.parametrize("problem", [
    "1/2+1/3", "3/4-1/2", "1/2/2", "2*(1/2)", "2(x+(y-1))", "3(x+1)(x+2)", "123x+4x", "1234*5678", "12/345", "1+2+3+4+5+6+7+8",
    "12345678901+1", "5", "123*456+789", "7/2+5/2", "5000/500+1", "(34x+56)(78x-99)", "34x*56y", "3(x^2+xy)"])
def test_what_was_never_drawn_is_said_to_be_outside(problem):
    """The note comes from what the kinds draw. (That nothing drawn carries it is tested with the lines.)"""
    assert tinyllm.is_outside(problem, Config()) and not tinyllm.is_outside("12+3", Config())
    assert tinyllm.is_outside("12+3", Config(kinds="sub mul"))

def test_after_a_slip_only_the_first_false_stage_is_called_false():
    """What follows from a slip is said to follow, and a true stage that could be simpler is no answer."""
    words, sentence = tinyllm.explain("2*(3+4)-1=2*8-1=16-1=15")
    assert words == ["NOT TRUE: it should be 13", "follows from that", "follows from that"] and "NOT the right" in sentence
    assert tinyllm.explain("52/65=2*2*13/(5*13)=52/65") == (
        ["true", "true"], "it is true but could be simpler, so this is NOT AN ANSWER")
    assert tinyllm.explain("2x+3x=6x=7x=5x")[0] == ["NOT TRUE: it should be 5x", "NOT TRUE: another slip", "true"]
    assert tinyllm.explain("-7/2=3")[0] == ["NOT TRUE: it should be -3-1/2"]
    assert tinyllm.explain("2+3=5") == (["true"], "the answer is right")
    assert "true" not in tinyllm.explain("1/0=1/0")[0]

def random_text(rng):
    """What nobody should type: any Unicode, near-misses of real problems, very long ones."""
    alphabet = "0123456789+-*/()=xy^. ,\t\0\u00d7\u00b2\uff11\u0661\u2460\ud800\U0001f600"
    dice = rng.random()
    if dice < 0.3:
        return "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(30)))
    if dice < 0.6:
        return "".join(rng.choices(alphabet[:23], k=rng.randrange(14)))
    text = list(tinyllm.draw_problem(rng.choice(list(tinyllm.KINDS)), rng, held_out=False))
    for _ in range(rng.randrange(4)):
        text[rng.randrange(len(text))] = rng.choice(alphabet)
    return "".join(text) * (rng.choice((100, 10_000)) if dice > 0.999 else 1)

def test_any_text_is_a_problem_or_a_sentence():
    """Random texts become a problem that is read again, worth what was typed, or an InputError; nothing else."""
    rng, model, problems = random.Random(0), small_model(), []
    for text in [random_text(rng) for _ in range(20_000 if SLOW else 3_000)] + ["(" * 10_000, "-" * 100_000, "\0"]:
        try:
            problem = tinyllm.prepare(text, model)
        except InputError as error:
            assert "\n" not in str(error) and str(error).isascii() and len(str(error)) < 300
            continue
        typed = tinyllm.normalize(text)
        assert tinyllm.prepare(problem, model) == problem
        assert tinyllm.exact_value(problem) == tinyllm.exact_value(typed), text
        problems.append(problem)
    assert len(problems) > 500
    for problem, line in zip(problems, tinyllm.solve(model, problems[:100])):
        assert line.startswith(problem + "=") and len(line) <= 128
        tinyllm.check(line), tinyllm.explain(line), tinyllm.to_latex(line), tinyllm.is_outside(problem, Config())

@pytest.fixture(scope="module")
def page():
    """A served page with a small untrained model, on a free port: (host:port, request function)."""
    history = [{"step": i, "seconds": 6.0 * i, "loss": 2 / i, "right": {kind: i / 10 for kind in tinyllm.KINDS}}
               for i in range(1, 11)]
    with tinyllm.Server(small_model(), history, port=0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"

        def request(method, path, body=None, **headers):
            connection = http.client.HTTPConnection(address, timeout=60)
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read().decode("utf-8")
        yield address, request
        server.shutdown()

def body(problem):
    return json.dumps({"problem": problem})

def test_the_page_loads_nothing_from_elsewhere(page):
    """One document with a nonce for its own script and style; every other source is forbidden."""
    status, headers, text = page[1]("GET", "/?q=12%2B34")
    nonce = re.search("script-src 'nonce-([^']+)'", headers["Content-Security-Policy"])[1]
    assert status == 200 and text.count(f'nonce="{nonce}"') == 2 and "default-src 'none'" in headers["Content-Security-Policy"]
    assert not re.search("(src|href)=|https?://|@import|NONCE|DATA", text) and "12%2B34" not in text
    assert page[1]("GET", "/")[1]["Content-Security-Policy"] != headers["Content-Security-Policy"]

def test_the_page_answers_a_problem(page):
    """What the page shows is the model's line, its exact check, and the weights and likeliest tokens."""
    status, _, text = page[1]("POST", "/solve", body("48x \u2212 53x"))
    reply = json.loads(text)
    line = tinyllm.solve(small_model(), ["48x-53x"])[0]
    assert status == 200 and tinyllm.reverse_numbers(reply["read"]) == line and reply["right"] is False
    assert len(reply["stages"]) == line.count("=") and len(reply["tokens"]) == len(line) + 1 - reply["start"]
    for t, token in enumerate(reply["tokens"], reply["start"]):
        assert [len(head) for head in token["heads"]] == [t] * 4
        assert t == len(line) or token["next"][0][0] == reply["read"][t]               # greedy

@pytest.mark.parametrize("method, path, text, headers, status", [
    ("GET", "/etc/passwd", None, {}, 404), ("POST", "/", "{}", {}, 404), ("PUT", "/", "{}", {}, 404),
    ("GET", "/", None, {"Host": "evil.example:8000"}, 403), ("GET", "/", None, {"Host": "evil.example"}, 403),
    ("GET", "/", None, {"Host": ""}, 403), ("GET", "/", None, {"Host": "localhost"}, 403),
    ("POST", "/solve", '{"problem": ["1"]}', {}, 400), ("POST", "/solve", "{}", {"Origin": "http://evil.example"}, 403),
    ("POST", "/solve", "{}", {"Origin": "null"}, 403), ("POST", "/solve", body("1+1") + " " * 10000, {}, 413),
    ("POST", "/solve", "[" * 4000, {}, 400), ("POST", "/solve", "12+34", {}, 400),
    ("POST", "/solve", '{"problem": 12}', {}, 400), ("POST", "/solve", "{}", {"Content-Length": "-1"}, 413),
    ("POST", "/solve", b"\xff\xfe", {}, 400), ("POST", "/solve", body("12+"), {}, 422),
    ("POST", "/solve", body("1+" * 150 + "1"), {}, 422), ("POST", "/solve", body("<script>"), {}, 422),
    ("POST", "/solve", body("1/0"), {}, 422)])
def test_the_page_refuses(page, method, path, text, headers, status):
    """Foreign hosts and origins, other paths, long or broken requests, and what is no problem."""
    found, answer_headers, answer = page[1](method, path, text, **headers)
    assert found == status and set(json.loads(answer)) == {"error"} and "<" not in answer.replace("'<'", "")
    assert answer_headers["X-Content-Type-Options"] == "nosniff"

def test_the_page_serves_many_at_once_and_survives_garbage(page):
    """32 clients at once get their own answers, while others stall, go away or send noise."""
    host, port = page[0].split(":")
    stalled = [socket.create_connection((host, int(port))) for _ in range(8)]
    stalled[0].sendall(b"POST /solve HTTP/1.1\r\nHost: " + page[0].encode() + b"\r\nContent-Length: 50\r\n\r\nabc")
    with ThreadPoolExecutor(32) as pool:
        replies = list(pool.map(lambda i: json.loads(page[1]("POST", "/solve", body(f"{i}+{i}"))[2]), range(32)))
    assert [reply["read"].split("=")[0] for reply in replies] == [tinyllm.reverse_numbers(f"{i}+{i}") for i in range(32)]
    rng = random.Random(0)
    for _ in range(100):
        with socket.create_connection((host, int(port))) as client:
            client.sendall(rng.randbytes(rng.randint(1, 300)) + b"\r\n\r\n")
    assert page[1]("POST", "/solve", body("1+1"))[0] == 200
    for client in stalled:
        client.close()

def test_the_page_in_a_real_browser(page, tmp_path, monkeypatch):
    """Of two quick questions the second one's answer is shown: MathML, tokens, the grid, the chart; and
    the right arrow key chooses the next token that was written."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    chromium = chromium or pytest.skip("there is no Chromium here")
    act = """ask("1234*567"); ask("12+34");
setInterval(() => { if (reply && !window.done) { window.done = true;
  $("tokens").dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"})); } }, 20);
</script>"""
    monkeypatch.setattr(tinyllm, "PAGE", tinyllm.PAGE.replace("</script>", act))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path}"]
    dom = subprocess.run([chromium, *flags, "--virtual-time-budget=8000", "--dump-dom", f"http://{page[0]}/?q=7+8"],
                         capture_output=True, timeout=100).stdout.decode("utf-8")
    line = tinyllm.solve(small_model(), ["12+34"])[0]
    tokens = re.findall("<span(.*?)>(.*?)</span>", dom.split('id="tokens"')[1].split("</div>")[0])
    assert [text for _, text in tokens] == [*tinyllm.reverse_numbers(line), "end"]
    assert ["chosen" in how for how, _ in tokens].index(True) == line.index("=") + 2
    assert "<math" in dom.split('id="answer"')[1] and "<title>12+34" in dom and "this is NOT" in dom
    assert dom.split("<script")[0].count("<polyline") == 2 * (1 + len(tinyllm.KINDS))
    assert dom.count("<b>head ") == 4

def test_a_pipe_is_answered_line_by_line(checkpoint):
    """One line in, one line out, as it comes; an empty or wrong one is an error there, others go on."""
    status, out, _ = command("ask", "--plain", "--checkpoint", checkpoint, stdin="1+2\n1/0\n\n\uff13\u00d74\nz\n5-6")
    rows = out.splitlines()
    assert status == 2 and [row.split("=")[0].split(":")[0] for row in rows] == ["1+2", "error", "error", "3*4", "error", "5-6"]
    process = subprocess.Popen([*PROGRAM, "ask", "--plain", "--checkpoint", str(checkpoint)], text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    for problem in ("1+2", "3+4"):
        process.stdin.write(problem + "\n")
        process.stdin.flush()
        assert process.stdout.readline().startswith(problem + "=")
    process.communicate("")
    assert process.returncode == 0

def test_ask_shows_and_checks_each_stage(checkpoint):
    """A stage a row, each with a check that is labelled as one; LaTeX says so on stderr, and an error is one line there."""
    status, out, _ = command("ask", "-5+3", "12+39", "--checkpoint", checkpoint)
    assert status == 0 and out.startswith("-5+3 = ") and "check: NOT TRUE" in out and "\x1b" not in out
    status, out, err = command("ask", "--latex", "12+39", "--checkpoint", checkpoint)
    assert status == 0 and out.startswith(r"\begin{align*}") and "NOT the right answer: 12+39=" in err
    status, out, err = command("ask", "12+\u00b3", "--checkpoint", checkpoint, PYTHONIOENCODING="cp1252")
    assert status == 2 and not out and "SUPERSCRIPT" in err and err.count("\n") == 1

@pytest.mark.parametrize("args, words", [
    ("ask 12+\u00b3", "SUPERSCRIPT THREE"), ("ask (1+2", "bracket its partner"), ("ask 1/(2-2)", "division by zero"),
    ("ask 1 --checkpoint no.pt", "is not there"), ("train --minutes 0", "--minutes"), ("train --steps 0", "--steps 0"),
    ("frobnicate", "invalid choice"), ("train --out no/such/folder/x.pt", "cannot write"),
    ("train --steps many", "invalid int"), ("train --seed 99999999999999999999", "--seed"),
    ("train --weight_decay nan", "--weight_decay"), ("train --flat 1", "--flat"),
    ("train --kinds add,calculus", "add sub mul div expr algebra"), ("train --head_dim 20", "multiple of 8"),
    ("train --out .", "file"), ("train --block_size 32", "too short"), ("eval --problems 0", "--problems"),
    ("train --batch_tokens 64", "--batch_tokens 64 is too short"), ("train --n_embd 1000000000000", "no memory"),
    ("eval --target 95", "0 to 1"), ("data --count -1", "--count"), ("serve --host no.such.host", "no.such.host"),
    ("serve --host a..b", "cannot serve"), ("train --out /dev/null --force", "plain file"), ("ask 1 --device cuda:7", "no such device")])
def test_errors_are_sentences(args, words, checkpoint, capsys):
    """Bad input: one line on stderr that says what to do; status 2, and nothing is written."""
    args = args.split()
    if args[0] in ("ask", "eval", "serve") and "--checkpoint" not in args:
        args += ["--checkpoint", str(checkpoint)]
    assert tinyllm.main(args) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and err.isascii() and os.listdir() == []

def test_train_and_eval_as_a_person_runs_them(tmp_path, capsys):
    """A tiny run through the command line: before, rows, table, after, next commands; the same numbers
    again; resume; eval and its target; and no model is silently replaced."""
    path, size = tmp_path / "tiny.pt", [*TINY, "--block_size", 128, "--no-working", "--kinds", "sub mul", "--device", "cpu"]
    status, out, err = command("train", "--steps", 10, "--out", path, *size)
    assert status == 0 and out.isascii() and "\r" not in out and max(map(len, out.splitlines())) < 80 + len(str(path)), err
    for words in ("Before training", "weights on cpu", "100%", "answers right", "Now it answers", "Now try", "tiny.pt"):
        assert words in out
    losses = [point["loss"] for point in tinyllm.load_checkpoint(path)[1]["progress"]["history"]]
    (tmp_path / "link.pt").symlink_to(path)

    def status_of(*args):
        return tinyllm.main([str(arg) for arg in args])
    assert status_of("train", "--steps", 10, "--out", path, *size) == 2
    assert status_of("train", "--steps", 10, "--out", path, "--force", *size) == 0
    assert losses == [point["loss"] for point in tinyllm.load_checkpoint(path)[1]["progress"]["history"]]
    assert status_of("train", "--out", path, "--resume") == 2
    assert status_of("train", "--out", tmp_path / "link.pt", "--force", *size) == 2
    assert status_of("train", "--steps", 12, "--out", path, "--resume") == 0
    assert tinyllm.load_checkpoint(path)[1]["progress"]["step"] == 12
    capsys.readouterr()
    assert status_of("eval", "--checkpoint", path, "--problems", 3, "--target", 0.99) == 1
    out = capsys.readouterr().out
    assert "sub 20*" in out and "mul 4*" in out and "sub near" in out and "below the target" in out

def test_data_and_help(capsys):
    """`data` prints true lines of the side and kind that was asked for; --help explains each flag."""
    assert tinyllm.main(["data", "--kind", "mul", "--split", "test", "--count", "5"]) == 0
    rows = capsys.readouterr().out.split()
    assert len(rows) == 5 and all(tinyllm.is_true(row) and tinyllm.is_held_out(row.split("=")[0]) for row in rows)
    with pytest.raises(SystemExit):
        tinyllm.main(["train", "--help"])
    out = capsys.readouterr().out
    assert all(f"--{field.name}" in out for field in dataclasses.fields(Config)) and "None" not in out and "blocks, one after" in out

@slow
def test_the_first_minute(tmp_path):
    """`train --quick` learns sums in seconds, and says how to ask for one."""
    status, out, err = command("train", "--quick", "--out", tmp_path / "quick.pt")
    share = float(re.search(r"^add .*?([0-9.]+)%", out, re.M)[1])
    assert status == 0 and share > 80 and '"123+456"' in out, err
