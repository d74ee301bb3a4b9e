"""The tests of tinyllm.py, in the order of the file. Each says which idea it pins; break the idea and it fails.

    python -m pytest                    within a minute on two quiet cores
    TINYLLM_SLOW=1 python -m pytest     also the long tests
"""

import contextlib, dataclasses, doctest, html, http.client, importlib.util, itertools, json, math, os, random, re
import shutil, signal, socket, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from urllib.parse import quote, unquote
from xml.etree import ElementTree

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""             # the CPU is tested
import tinyllm                                      # before torch: it sets how idle threads wait
import torch
import torch.nn.functional as F
from tinyllm import KINDS, Config, InputError, TinyLLM, decode, encode, is_held_out, is_outside, prepare, work_out

HERE = Path(__file__).parent
SOURCE = (HERE / "tinyllm.py").read_text(encoding="utf-8")
SLOW = bool(os.environ.get("TINYLLM_SLOW"))
slow = pytest.mark.skipif(not SLOW, reason="set TINYLLM_SLOW=1 to run the long tests")
PROGRAM = [sys.executable, str(HERE / "tinyllm.py")]
SMALL = dict(n_layer=2, n_head=2, head_dim=24, n_embd=32, block_size=128)
TINY = "--n_layer 1 --n_embd 16 --n_head 2 --block_size 64 --batch_tokens 128".split()

def small_model(**changes):
    """An untrained model with random weights everywhere: fresh blocks add nothing, which would hide mistakes."""
    torch.manual_seed(0)
    model = TinyLLM(Config(**{**SMALL, **changes})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model

def lines(kind, count):
    """Lines as they are drawn, in turn from the training's side and from the other."""
    rng = random.Random(0)
    return [work_out(tinyllm.draw_problem(kind, rng, held_out=i % 2 == 0)) for i in range(count)]

def batches(count, first_step=0, **changes):
    return list(itertools.islice(tinyllm.stream_batches(Config(**changes), first_step), count))

def train(config):
    torch.manual_seed(config.seed)
    model = TinyLLM(config)
    tinyllm.fit(model, tinyllm.make_optimizers(model, config), 0, [], "model.pt")
    return model.eval()

def load():
    return tinyllm.load_checkpoint("model.pt")

def main(*args):
    return tinyllm.main([str(arg) for arg in args])

def command(*args, script="", stdin="", **environment):
    """Run the program, or a shell script in which "$@" is the program: exit status, stdout, stderr."""
    program = [*(["sh", "-c", script, "sh"] if script else []), *PROGRAM, *map(str, args)]
    done = subprocess.run(program, input=stdin.encode(), capture_output=True, timeout=120, env=os.environ | environment)
    return done.returncode, done.stdout.decode(), done.stderr.decode()

@contextlib.contextmanager
def running(*args):
    """The program while it runs, with its streams."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    listen = None if os.name == "nt" else lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)      # also in nohup
    with subprocess.Popen([*PROGRAM, *map(str, args)], encoding="utf-8", preexec_fn=listen, **pipes) as process:
        yield process
        process.kill()

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.pt"
    tinyllm.save_checkpoint(path, small_model(block_size=64))
    return path

@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """No test sees the folder in which they were started, where a trained model may lie: each has its own."""
    monkeypatch.chdir(tmp_path)

@pytest.fixture
def only_short_sums(monkeypatch):
    """Sums of two numbers of one or two digits, and nothing else."""
    draw = lambda rng, top: f"{rng.randrange(10 ** top)}+{rng.randrange(10 ** top)}"
    monkeypatch.setattr(tinyllm, "KINDS", {"add": tinyllm.Kind(draw=draw, top=2, share=1)})

######## The file ########
def test_the_file_can_be_read():
    """The tutorial stays short, the file too, and no line is too wide for a screen."""
    rows = SOURCE.split("\n")
    assert next(i for i, row in enumerate(rows) if "The tutorial ends here" in row) <= 940 and len(rows) <= 2020
    assert [row for row in rows if len(row) > 100] == []

def test_every_example_in_the_file_is_true():
    """Documentation that is run cannot be wrong: all doctests, Step 1's facts among them; fact 2 where NumPy is."""
    result, tensor = doctest.testmod(tinyllm), torch.ones(2)
    assert result.attempted > 40 and result.failed == 0
    array = pytest.importorskip("numpy") and tensor.numpy()
    array += 1                                       # they share their memory
    assert tensor.tolist() == torch.from_numpy(array).tolist() == [2, 2]

# The experiments of the README: a name, an edit, and what is true of the edited file alone
EXPERIMENTS = [
    ("no working", 'return "=".join(stages)', 'return f"{problem}={stages[-1]}"', "work_out('12*34') == '12*34=408'"),
    ("numbers as people write them", '\n    return re.sub("[0-9xy^]+", lambda match: match[0][::-1], text)',
     '\n    return text', "encode('12') == [2, 3]"),
    ("no addresses", "stage, slot, place = address\n", "stage, slot, place = address\n    return 0, 0, place + 1\n",
     "find_addresses(encode('1+2='))[-1] == (0, 0, 5)"),
    ("AdamW alone", "Muon(matrices, **muon)", "torch.optim.AdamW(matrices, **adam)",
     "all(type(o) is torch.optim.AdamW for o in make_optimizers(TinyLLM(Config()), Config()))"),
    ("no causal mask", "    scores = scores + mask.triu(S - T + 1)\n", "",
     "attention(*torch.ones(3, 3, 2))[1][0, 2] > 0")]

@pytest.mark.parametrize("name, old, new, proof", EXPERIMENTS)
def test_the_experiments_can_be_made(name, old, new, proof):
    """Each is an edit of one place, does what it says, and leaves a program that learns and answers."""
    assert SOURCE.count(old) == 1 and not eval(proof, vars(tinyllm))
    Path("edited.py").write_text(SOURCE.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("edited", "edited.py")
    edited = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(edited)
    model = edited.TinyLLM(edited.Config(**SMALL, batch_tokens=256))
    optimizers, batch = edited.make_optimizers(model, model.config), next(edited.stream_batches(model.config, 0))
    losses = [edited.learn(model, optimizers, *batch).item() for _ in range(10)]
    assert eval(proof, vars(edited)) and losses[-1] < losses[0]
    assert edited.solve(model.eval(), ["12+39"])[0].startswith("12+39=")

######## Step 3: the model ########
def test_tokenizer_round_trip():
    """Nothing is lost between text and tokens; numbers are read from the ones place."""
    assert all(decode(encode(line)) == line for kind in KINDS for line in lines(kind, 200))
    assert [tinyllm.VOCAB[i] for i in encode("-408*(12-7)=3(48x^2-xy)")] == list("-804*(21-7)=3(2^x84-yx)")

def test_addresses_know_no_future():
    """An address depends on what stands before it alone, and no two tokens of a line share one."""
    for line in (line for kind in KINDS for line in lines(kind, 50)):
        addresses = tinyllm.find_addresses(encode(line))
        assert addresses[:10] == tinyllm.find_addresses(encode(line)[:9])[:len(addresses)]
        assert len(set(addresses)) == len(line) + 1

def test_places_have_gaps_in_training():
    """Each line numbers its places in its own way: equal ones stay equal, higher ones higher; some have no gaps."""
    rng, addresses = random.Random(0), tinyllm.find_addresses(encode("1234+12345"))
    new = [[place for *_, place in tinyllm.with_gaps(addresses, 3, rng)] for _ in range(3000)]
    assert all(row[:5] == row[5:10] and row[0] == 1 for row in new)
    assert {b - a for row in new for a, b in zip(row[5:], row[6:])} == {1, 2, 3}
    assert 0.33 < sum(row[5:] == [1, 2, 3, 4, 5, 6] for row in new) / 3000 < 0.45
    assert tinyllm.with_gaps(addresses, 1, rng) == addresses

def test_rope_depends_on_distance_alone():
    """Moving query and key by the same number of places does not change how well they agree."""
    q, k = torch.randn(2, 1, 32, generator=torch.manual_seed(0)).expand(2, 50, 32)
    angle = tinyllm.angles(torch.arange(50), 16, base=1000)                            # (50, 16)
    turns = torch.stack((angle.cos(), angle.sin()))
    scores = tinyllm.rotate(q, turns) @ tinyllm.rotate(k, turns).T                     # (50, 50)
    assert all(torch.allclose(scores.diagonal(n), scores[0, n], atol=1e-4) for n in (0, 1, 7))
    assert not torch.allclose(scores[0, 0], scores[0, 7], atol=1e-2)

def test_attention_is_pytorchs():
    """The formula of Step 3-3, which the model runs, is PyTorch's; for one cached token as well."""
    q, k, v = torch.randn(3, 2, 4, 9, 16)
    y, looks = tinyllm.attention(q, k, v)
    assert torch.allclose(y, F.scaled_dot_product_attention(q, k, v, is_causal=True), atol=1e-5)
    assert torch.allclose(looks.sum(-1), torch.ones(2, 4, 9)) and looks.triu(1).max() == 0
    assert torch.allclose(tinyllm.attention(q[:, :, -1:], k, v)[0], y[:, :, -1:], atol=1e-5)

def test_causality():
    """A later token changes no earlier logit: the model cannot read the answer it is asked for."""
    model, ids, changed = small_model(), *torch.tensor([encode("12*34=12*30+12*4")]).repeat(2, 1, 1)
    changed[0, 9] = tinyllm.ID["7"]
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

@pytest.mark.parametrize("kind", KINDS)
def test_every_generated_line_is_true(kind):
    """Every stage is worth what the problem is, by a second opinion; the last is an answer; no problem is "outside"."""
    for line in lines(kind, 10_000 if SLOW else 1_000):
        problem, *stages = line.split("=")
        assert stages and not any(any(second_opinion(f"({stage})-({problem})")) for stage in stages), line
        assert tinyllm.check(line) == (True, [True] * len(stages)) and len(line) < Config().block_size, line
        assert tinyllm.kind_of(problem) == kind and not is_outside(problem, Config()), line

@pytest.mark.parametrize("a, b", {
    "12+39": "39+12", "7*8": "8*7", "5-3": "-3+5", "(1+2)*3+4": "4+3*(2+1)", "12-39": "39-12", "6/3+1": "1+6/3",
    "5-3x": "-3x+5", "(x+2)(x-3)": "(-3+x)(2+x)", "(x+1)^2": "(1+x)(x+1)"}.items())
def test_mirror_images_stay_together(a, b):
    """A problem and its mirror image are never on different sides, whatever the numbers are."""
    for shift in range(60):
        moved = [re.sub(r"(?<!\^)[0-9]+", lambda n: str(int(n[0]) + shift), text) for text in (a, b)]
        assert is_held_out(moved[0]) == is_held_out(moved[1])

def test_training_never_sees_a_held_out_problem():
    """The stream itself, as it goes into the model, holds no problem of the evaluation, nor its twin."""
    def twin(problem):
        written_out = re.sub(r"(\([^()]*\)|[xy])\^2", r"\1\1", problem)
        return tuple(sorted(re.findall("[0-9]+|[^0-9()+]", written_out)))
    asked = {problem for kind in KINDS for problem in tinyllm.held_out_problems(kind, 200)}
    seen = {decode(row).split("=")[0] for x, _, _ in batches(64) for row in x.tolist()}
    assert len(asked) == 1200 and len(seen) > 2000
    assert not any(map(is_held_out, seen)) and not set(map(twin, asked)) & set(map(twin, seen))

def test_lengths_are_even():
    """Short numbers are as common as long ones, and one problem in ten is held out."""
    rng = random.Random(0)
    problems = [KINDS["sub"].draw(rng, 10) for _ in range(5000)]
    lengths = [len(re.search("[0-9]+", problem)[0]) for problem in problems]
    assert all(400 < lengths.count(n) < 600 for n in range(2, 11))
    assert 0.08 < sum(map(is_held_out, problems)) / 5000 < 0.12

def test_batches_hold_whole_lines_and_little_padding():
    """Rows of a batch are of like length, batch_tokens or a little less in all, each with its addresses."""
    n_tokens = n_padding = 0
    for x, addresses, y in batches(64, 6400, gap=1, batch_tokens=2048):
        B, T = x.shape
        assert x.shape == y.shape and addresses.shape == (B, T + 1, 3) and B == 2048 // T and T % 8 == 0
        rows = [decode(ids).split("\n")[0] for ids in x.tolist()]
        expected = tinyllm.find_addresses(encode(rows[0]))
        assert addresses[0, :len(expected)].tolist() == list(map(list, expected))
        n_tokens += x.numel()
        n_padding += x.numel() - sum(map(len, rows))
    assert 0.9 * 2048 < n_tokens / 64 <= 2048 and n_padding / n_tokens < 0.1

def test_batches_come_in_few_shapes():
    """What is kept for each shape costs memory and time. Lines that are too long are not drawn, nor cut."""
    assert len({x.shape for x, _, _ in batches(128, 3200)}) <= 40
    for x, _, y in batches(64, 6400, block_size=32, batch_tokens=512):
        assert x.shape[1] <= 32 and all(tinyllm.END in row for row in y.tolist())

def test_small_problems_come_first():
    """The curriculum: batches early in the run hold mostly short lines, later ones all lengths."""
    early, late = (sum(x.shape[1] for x, _, _ in batches(64, step, batch_tokens=2048)) for step in (0, 3200))
    assert early < 0.8 * late

######## Step 5: training ########
def test_an_untrained_model_knows_nothing():
    """The first loss is ln 21: each token is as likely as any other. Half the bits change little."""
    torch.manual_seed(0)
    (x, addresses, y), model = batches(1, batch_tokens=1024)[0], TinyLLM(Config())
    loss = tinyllm.loss_of(model, x, addresses, y).item()
    exact = F.cross_entropy(model(x, addresses).flatten(0, 1), y.flatten(), ignore_index=-100).item()
    assert abs(loss - math.log(21)) < 0.15 and abs(loss / exact - 1) < 0.02

def test_one_batch_is_learned_by_heart():
    """The first thing to try with any network: if it cannot overfit one batch, something is broken."""
    torch.manual_seed(0)
    model, batch = TinyLLM(Config(n_layer=2, n_head=2, n_embd=64)), batches(1, batch_tokens=256)[0]
    optimizers = tinyllm.make_optimizers(model, model.config)
    assert any(tinyllm.learn(model, optimizers, *batch) < 0.02 for _ in range(200))

def test_every_weight_is_trained_once():
    """Muon and AdamW share the weights: none twice, none forgotten."""
    model = small_model()
    groups = [group for optimizer in tinyllm.make_optimizers(model, model.config) for group in optimizer.param_groups]
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(map(id, model.parameters()))

def test_a_small_model_learns_addition(only_short_sums):
    """From nothing to 100% of the held-out one-digit sums, which it never saw."""
    size = dict(n_layer=2, n_head=4, head_dim=16, n_embd=64, block_size=32, batch_tokens=512)
    config = Config(**size, steps=400, kinds="add")
    problems = tinyllm.held_out_problems("add", 10, size=1)
    before, after = (tinyllm.evaluate(model, problems) for model in (TinyLLM(config).eval(), train(config)))
    assert len(problems) == before["problems"] > 3 and before["answers"] == 0
    assert after["answers"] == after["workings"] == 1 and after["wrong"] == []

@slow
def test_the_default_model_learns_every_kind():
    """A short default run answers most held-out sums, many longer than any it saw, and something of every kind."""
    model = train(Config(steps=1200))
    right = {kind: result["answers"] for kind, result in tinyllm.measure(model, 200).items()}
    longer = tinyllm.evaluate(model, tinyllm.held_out_problems("add", 200, size=12))["answers"]
    assert right["add"] > 0.7 and longer > 0.4 and min(right.values()) > 0.1, (right, longer)

def test_stopped_and_resumed_it_is_the_same_run(only_short_sums, monkeypatch, capsys):
    """Ctrl-C costs at most a hundredth of the run; --resume, as the message says, gives bit for bit the same run."""
    run, learn, n_learned = ["train", "--steps", 200, "--kinds", "add", *TINY], tinyllm.learn, itertools.count()

    def learn_until_a_key_is_pressed(*args):
        if next(n_learned) == 51:
            raise KeyboardInterrupt
        return learn(*args)
    assert main(*run, "--out", "whole.pt") == 0
    monkeypatch.setattr(tinyllm, "learn", learn_until_a_key_is_pressed)
    assert main(*run, "--out", "model.pt") == 130 and load()[1]["step"] == 50
    assert 'tinyllm.py train --resume --out "model.pt"' in capsys.readouterr().err
    assert main("train", "--resume", "--out", "model.pt") == 0
    whole, resumed = tinyllm.load_checkpoint("whole.pt")[1], load()[1]
    assert all(torch.equal(weight, resumed["model"][name]) for name, weight in whole["model"].items())
    losses, others = ([(point["step"], point["loss"]) for point in state["history"]] for state in (whole, resumed))
    assert losses == others and len(losses) == 100

def test_saved_and_loaded_it_gives_the_same_answers():
    """A checkpoint is the whole model, and any user may read it who may read other new files."""
    model, problems = small_model(), [line.split("=")[0] for line in lines("mul", 20)]
    tinyllm.save_checkpoint("model.pt", model, step=7, history=[{"loss": 1.0}])
    Path("other").touch()
    loaded, state = load()
    assert tinyllm.solve(loaded, problems) == tinyllm.solve(model, problems) and loaded.config == model.config
    assert state["step"] == 7 and state["history"] == [{"loss": 1.0}] and sorted(os.listdir()) == ["model.pt", "other"]
    assert os.stat("model.pt").st_mode == os.stat("other").st_mode

Evil = type("Evil", (), {"__reduce__": lambda self: (os.mkdir, ("ran",))})              # unpickling it makes a folder

def test_what_is_no_checkpoint_is_refused(checkpoint):
    """Missing, cut off, foreign, newer, of other shapes, or a pickle with code: a sentence, and no code is run."""
    data, state = checkpoint.read_bytes(), torch.load(checkpoint)
    pytest.raises(InputError, load).match("is not there")
    for value in (*(data[:len(data) * i // 11] for i in range(11)), b"hello" * 100, [1, 2, 3], {"x": Evil()},
                  *({**state, "config": {**state["config"], **new}} for new in ({"n_embd": 64}, {"a_new_idea": 1})),
                  {**state, "config": {"n_layer": "many"}}, {**state, "model": {}}):
        if isinstance(value, bytes):
            Path("model.pt").write_bytes(value)
        else:
            torch.save(value, "model.pt")
        pytest.raises(InputError, load).match("damaged")
    assert not os.path.exists("ran")

@pytest.mark.parametrize("name, edited", {
    "reverse_numbers": lambda text: text, "next_address": lambda address, token: (0, 0, address[2] + 1),
    "attention": lambda q, k, v: (v, v)}.items())
def test_a_model_of_another_file_is_refused(name, edited, monkeypatch):
    """Who edits what a model is and goes back must train again: the old weights would answer, but nonsense."""
    with monkeypatch.context() as experiment:
        experiment.setattr(tinyllm, name, edited)
        tinyllm.save_checkpoint("model.pt", small_model())
        load()
    pytest.raises(InputError, load).match("trained by another tinyllm.py")

@pytest.mark.parametrize("lr", [1e30, float("inf")])
def test_weights_that_are_no_numbers_are_never_saved(lr):
    """A run that blows up stops with a sentence, and the file keeps a state that can be loaded."""
    tinyllm.save_checkpoint("model.pt", small_model())
    config = Config(**SMALL, kinds="add", steps=50, batch_tokens=128, lr=lr, adam_lr=lr)
    pytest.raises(InputError, train, config).match("lower --lr")
    load()

@pytest.mark.parametrize("n, status", [(1, 2), (4, 0), (11, 2)])
def test_a_save_may_fail_in_the_middle(n, status, monkeypatch, only_short_sums, capsys):
    """A disk that is away for a moment costs nothing. Only the first save, before the work, and the last must work."""
    replace, failures = os.replace, iter([None] * (n - 1) + [OSError("the disk is away")] + [None] * 20)

    def fail_once(*args):
        if error := next(failures):
            raise error
        replace(*args)
    monkeypatch.setattr(os, "replace", fail_once)
    assert main("train", "--steps", 10, "--kinds", "add", "--out", "model.pt", *TINY) == status
    assert "cannot write model.pt" in capsys.readouterr().err
    assert n == 1 or load()[1]["step"] == (10 if n == 4 else 9)

def test_a_full_disk_loses_nothing():
    """No room for the new file: a sentence, status 2, and the old file is whole."""
    tinyllm.save_checkpoint("model.pt", small_model())
    before = Path("model.pt").read_bytes()
    status, _, err = command("train", "--force", "--steps", 1, "--out", "model.pt", script='ulimit -f 40; exec "$@"')
    assert status == 2 and err.startswith("tinyllm: cannot write") and err.count("\n") == 1
    assert Path("model.pt").read_bytes() == before and os.listdir() == ["model.pt"]

######## Step 6: evaluation ########
def test_greedy_decoding_in_a_batch():
    """With a cache, in any company and order, it writes what the plain loop writes: always the likeliest token."""
    model, problems = small_model(block_size=40), ["1+2", "7", "12*34", "99999-1", "x+3", "8/3", "1+2"]
    written = [tinyllm.generate(model, encode(problem + "="), 40) for problem in problems]
    assert tinyllm.solve(model, problems) == list(map(decode, written)) and len(written[0]) > 4
    assert tinyllm.solve(model, problems[::-1], batch_size=2) == list(map(decode, written[::-1]))
    for t in range(4, len(written[0])):
        assert model(torch.tensor([written[0][:t]]))[0, -1].argmax() == written[0][t] != tinyllm.END

def test_no_calculator(monkeypatch):
    """Writing never touches the rules: without any of them, the model writes the same line."""
    model, problems = small_model(), ["12*34", "7/2", "5-9"]
    expected = tinyllm.solve(model, problems)
    for name in ("read", "KINDS", "work_out", "next_stage", "exact_value", "is_worth", "check"):
        monkeypatch.setattr(tinyllm, name, None)
    assert tinyllm.solve(model, problems) == expected

@pytest.mark.parametrize("line", """12+39=41 12+39= 12+39 12+39=50+1 12+39=51= 10/4=5/2 12+39=51=51+ 1/2=0/0
    796-801=-05 970-970=-0 7=007 3+1/2=03+1/2 0-1/2=-0+1/2 1-3/10=1-3/10 1-5/7=1-5/7 x+x=2x+0 x-y=1x-y x-x=0x 3-x=3-x
    6/4=1+2/4""".split())
def test_check_is_strict(line):
    """An answer is right only if it is equal and in the one form of an answer; each stage is judged by itself."""
    assert tinyllm.check(line)[0] is False
    assert tinyllm.check("12+39=50=51") == (True, [False, True]) and tinyllm.check("1-3/10=7/10") == (True, [True])

######## Step 7: views and commands ########
def test_look_shows_the_looks_of_the_model():
    """Each row of the picture is the look of one head, at the characters before; long lines come in blocks."""
    model = small_model()
    rows = tinyllm.draw_looks(model, "12+39=51").splitlines()
    layer, head = map(int, re.findall("[0-9]+", rows[0])[:2])
    assert rows[1].strip() == "21+93=15" and len(rows) == 5
    looks = tinyllm.watch(model, "12+39=51")[1][layer - 1, head - 1].tolist()          # (T, T) of that head
    for t, row in enumerate(rows[2:], start=5):
        assert row[5:] == "".join(" .:-=+*#%@"[min(9, int(10 * look))] for look in looks[t][:t + 1]).rstrip()
    assert max(map(len, tinyllm.draw_looks(model, "1+1=" + "1" * 100).splitlines())) < 80

@pytest.mark.parametrize("stage, latex", {
    "-408": "-408", "12*34": r"12 \times 34", "1831/23": r"1831 \div 23", "14/23": r"\frac{14}{23}",
    "-2/3": r"-\frac{2}{3}", "79+14/23": r"79+\frac{14}{23}", "-3-1/2": r"-3-\frac{1}{2}", "5-1/2": r"5-\frac{1}{2}",
    "70+221/23": r"70+221 \div 23", "70+(1831-1610)/23": r"70+(1831-1610) \div 23", "(36/9)-31": r"(36 \div 9)-31",
    "5*(-3)": r"5 \times (-3)", "2*(3+1/2)": r"2 \times \left(3+\frac{1}{2}\right)", "-(x-2)": "-(x-2)",
    "2*2*3/(3*7)": r"\frac{2 \times 2 \times 3}{3 \times 7}", "3x^2-xy": "3x^{2}-xy", "(2x-1)^2": "(2x-1)^{2}"}.items())
def test_latex_of_every_construct(stage, latex):
    """What a teacher would write on the board, for each construct."""
    assert tinyllm.typeset(stage, tinyllm.LATEX) == latex

def test_latex_and_mathml_are_well_formed():
    """600 workings and some nonsense: braces and tags balance, no raw * or /, no number is lost."""
    for line in [*(line for kind in KINDS for line in lines(kind, 100)), "1+2=3+^=)3(=x^3"]:
        latex = tinyllm.to_latex(line)
        assert latex.count("{") == latex.count("}") and latex.count(r"\left(") == latex.count(r"\right)") or "^" in line
        assert not re.search("[*/]", latex.replace("{align*}", "")) and latex.count("&=") == line.count("=")
        for stage in line.split("="):
            root = ElementTree.fromstring(f"<math>{tinyllm.typeset(stage, tinyllm.MATHML)}</math>")
            assert [node.text for node in root.iter("mn")] == re.findall("[0-9]+", stage) or "^" in stage

@pytest.mark.parametrize("text, problem", {
    " 12 * 34 = ": "12*34", "12\u00d734": "12*34", "\uff11\uff12\uff0a\uff13\uff14\uff1d": "12*34", "012*0034": "12*34",
    "3\u00b74": "3*4", "3\u22174": "3*4", "1\u20442": "1/2", "3\u20132": "3-2", "\ufeff1+1": "1+1", "6:3": "6/3",
    "[1+2]*{3-1}": "(1+2)*(3-1)", "6,358+1": "6358+1", "5--3": "5-(-3)", "5+-3": "5+(-3)", "((38+47)-71)": "(38+47)-71",
    "2(3+4)": "2*(3+4)", "(1+2)(3+4)": "(1+2)*(3+4)", "-5+3": "-5+3", "2*x": "2x", "x*2": "2x", "3 x": "3x", "+5": "5",
    "X\u00b2 + \uff58": "x^2+x", "(x+1)*3": "3(x+1)", "(x+2)*(x-3)": "(x+2)(x-3)", "x*y": "xy", "6/2*x": "6/2*x",
    "3x*4x": "3x*4x", "(36/9)-31": "(36/9)-31", "(98)+74+57": "98+74+57", "5-(3)+2": "5-3+2", "-(8)-6": "-8-6",
    "9*((3+8))-3": "9*(3+8)-3", "(7)(2)(8)": "7*2*8", "(-8)+6": "-8+6", "(6x)(3y)": "6x*3y", "7(8y)+5x": "7*8y+5x",
    "x*x": "x^2", "1x+4": "x+4", "y*x": "xy", r"3 \times 4": "3*4", r"\frac{1}{2}": "1/2", "x^{2}+1": "x^2+1",
    r"\left(1+2\right)\cdot 3": "(1+2)*3", r"6 \div 2": "6/2", "1\u200b2+\u2060\u200e3": "12+3", "x**2": "x^2",
    "5\u2011\u20103": "5-(-3)", "5\u22123": "5-3", "5\u20143": "5-(-3)", "5-(-3)": "5-(-3)", "-X+3": "-x+3",
    "3\u00d7x": "3x", "(x)^2": "x^2"}.items())
def test_forgiving_input(text, problem):
    """What leaves no doubt is asked in the form that was learned."""
    assert prepare(text, small_model()) == problem

@pytest.mark.parametrize("text, words", [(text, words) for words, texts in {
    "unknown character 'a'.*; write": "12+a", "SUPERSCRIPT THREE": "12+x\u00b3", "FRACTION ONE HALF": "3\u00bd",
    "a bracket is not closed": "(1+2", "bracket has its partner": "1+2)", r"before \+2;.*two sides": "1++2",
    "two sides": "1+|1+()", "3x for x3": "x2", "only letters": "3^2|(1+2)\u00b2|(2)^2+x", "decimals": "3,5|0,125*8",
    r"only x\^2 as a power": "x^3|2**3", r"up to x\^2": "x*x*x|(x^2)^2", "letters cannot be divided": "(2x+4)/2",
    "letters with fractions": "(1/2)*x", "behind a division": "6/2(1+2)|6/2x|6/((1+1))(1+2)", "without =": "1=1",
    "one problem": "|  |=", "space inside": "1 2+3", r"1\+1/2": r"1 1/2|5\frac{1}{2}", "unknown": "3.5*2|\0",
    "division by zero": "1/0|3*(1/(2-2))", r"write \* for times": "3 x (4+5)|12x39|(1+2)x3|(3+4)2", "ud800": "\ud800",
    "parts": "9" * 10_000 + "|" + "(" * 150 + "1" + ")" * 150, "ARABIC-INDIC": "\u0661+1", "MODIFIER LETTER": "2\u02e3",
    }.items() for text in texts.split("|")])
def test_bad_input_is_a_sentence(text, words):
    """What cannot be read is refused with the reason and the place, in ASCII."""
    refusal = pytest.raises(InputError, prepare, text, small_model(block_size=900))
    assert re.search(words, str(refusal.value)) and str(refusal.value).isascii() and "\n" not in str(refusal.value)

def test_nothing_that_a_person_types_keeps_it_busy():
    """Sizes are bounded before anything is computed: nested squares or long primes would take for ever."""
    model, began = small_model(block_size=900), time.perf_counter()
    for text in ("(" * 24 + "9" + ")^2" * 24 + "+x", "(" * 24 + "x-x+9" + ")^2" * 24, "(x+1)(1+1)" * 9,
                 "(1+1)" * 30 + "x", "(" * 79 + "1" + ")" * 79, "(1)" * 130, "((1)+" * 40 + "1" + ")" * 40,
                 "-" * 399 + "1", "1/(9999*9999*9999-1)", "3163*5766*8700*7952", f"{10 ** 15 + 39}/{10 ** 15 + 37}"):
        with contextlib.suppress(InputError):
            is_outside(prepare(text, model), Config())
    assert time.perf_counter() - began < 1

def random_text(rng):
    """What nobody should type: any Unicode, near-misses of real problems, very long ones."""
    signs, dice = "0123456789+-*/()=xy^. ,\t\0\u00d7\u00b2\uff11\u0661\u2460\ud800\u200b\u2014\U0001f600", rng.random()
    if dice < 0.3:
        return "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(30)))
    if dice < 0.6:
        return "".join(rng.choices(signs[:23], k=rng.randrange(14)))
    text = list(tinyllm.draw_problem(rng.choice(list(KINDS)), rng, held_out=False))
    for _ in range(rng.randrange(4)):
        text[rng.randrange(len(text))] = rng.choice(signs)
    return "".join(text) * (rng.choice((100, 10_000)) if dice > 0.999 else 1)

def test_any_text_is_a_problem_or_a_sentence():
    """Random texts become a problem that is read again, worth what was typed, or an InputError; nothing else."""
    rng, model, problems = random.Random(0), small_model(), []
    for text in [random_text(rng) for _ in range(20_000 if SLOW else 3_000)] + ["(" * 10_000, "-" * 100_000, "\0"]:
        try:
            problem = prepare(text, model)
        except InputError as error:
            assert "\n" not in str(error) and str(error).isascii() and len(str(error)) < 300
            continue
        assert prepare(problem, model) == problem, text
        assert tinyllm.exact_value(problem) == tinyllm.exact_value(tinyllm.normalize(text)), text
        problems.append(problem)
    assert len(problems) > 500
    for problem, line in zip(problems, tinyllm.solve(model, problems[:100])):
        assert line.startswith(problem + "=") and len(line) <= 128
        tinyllm.check(line), tinyllm.explain(line), tinyllm.to_latex(line), is_outside(problem, Config())

@pytest.mark.parametrize("line, words, sentence", [
    ("2*(3+4)-1=2*8-1=16-1=15", ["NOT TRUE: it should be 13", "", ""], "this is NOT the right answer"),
    ("2x+3x=5x=6x=5x", ["true", "NOT TRUE: it should be 5x", ""], "the answer is right"),
    ("52/65=2*2*13/(5*13)=52/65", ["true"] * 2, "it is true but not in its form, 4/5, so this is NOT AN ANSWER"),
    ("-7/2=1/0", ["NOT TRUE: it should be -3-1/2"], "this is NOT the right answer"),
    ("2+3=5", ["true"], "the answer is right"), ("2+3", [], "this is NOT the right answer")])
def test_after_a_slip_nothing_is_said(line, words, sentence):
    """Stages are true up to the first slip, which is told what it should be; a true stage may still be no answer."""
    assert tinyllm.explain(line) == (words, sentence)

@pytest.fixture(scope="module")
def page():
    """A served page with a small untrained model, on a free port: its address, and a function that asks it."""
    history = [{"minutes": i / 10, "loss": 2 / i, "right": dict.fromkeys(KINDS, i / 10)} for i in range(1, 11)]
    with tinyllm.make_server(small_model(block_size=32), history, port=0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def request(path, method="GET", **headers):
            connection = http.client.HTTPConnection(*server.server_address, timeout=60)
            connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return answer.status, {**answer.headers, "Date": ""}, answer.read().decode("utf-8")
        yield server.server_address, request
        server.shutdown()

def test_the_page_loads_nothing_from_elsewhere(page):
    """One document, whose links are problems; the browser is told that nothing may come from the network."""
    status, headers, text = page[1]("/?q=12%2B34")
    policy, links = headers["Content-Security-Policy"], re.findall('href="([^"]*)"', text)
    assert status == 200 and "default-src 'none'" in policy and not re.search("http|[*]", policy)
    assert not re.search(r"\bsrc=|https?://|@import|url\(|fetch\(", text) and len(links) > 4
    assert all(link.startswith("/?q=") and page[1](link)[0] == 200 for link in links)

def test_the_page_draws_how_it_learned(page):
    """A chart of the loss, and one with each kind."""
    charts = [ElementTree.fromstring(chart) for chart in re.findall("<svg.*?</svg>", page[1]("/")[2], re.S)]
    assert len(charts) == 2 and {"loss", *KINDS} < {node.text for chart in charts for node in chart.iter("text")}

def test_the_page_answers_a_problem(page):
    """It shows the model's line, its exact check, each token, and the looks and likeliest tokens there."""
    status, _, text = page[1]("/?q=" + quote("(48x \u2212 53x)*2"))
    line, start = tinyllm.solve(small_model(block_size=32), ["2(48x-53x)"])[0], len("2(48x-53x)=")
    assert status == 200 and f"<title>2(48x-53x)={line.split('=')[-1]} - " in text and f"<pre>{line}</pre>" in text
    formulas = [ElementTree.fromstring(formula) for formula in re.findall("<math.*?</math>", text)]
    assert len(formulas) == 2 + line.count("=") and formulas[1].find("mn").text == "2"
    assert "Check: this is NOT the right answer" in text and "NOT TRUE: it should be -10x" in text
    tokens = re.findall(r'class="token"[^>]*>(?:<input[^>]*>)?([^<]*)<', text)
    moments = re.findall('class="moment".*?</pre>', text, re.S)
    assert tokens == [*tinyllm.reverse_numbers(line), "end"] and len(moments) == len(tokens) - start
    for t, moment in enumerate(moments, start):
        assert [len(look) for look in re.findall(r"head \d\.\d: ([0-9]+)", moment)] == [t] * 4
        assert t == len(line) or re.search(r"<span>(\S+) [0-9.]+%", moment)[1] == tokens[t]          # greedy

@pytest.mark.parametrize("query, read", {"1+2": "1+2", "12+%2B+34": "12+34", "12%2B34": "12+34", "(1+2)*3": "(1+2)*3",
                         "%281%2B2%29+*+3": "(1+2)*3", "3+*+4": "3*4", "x%C2%B2%2B1": "x^2+1"}.items())
def test_an_address_is_a_problem(page, query, read):
    """As a form writes it, with %2B for a plus and + for a blank, and as a person types it."""
    status, _, text = page[1](f"/?q={query}")
    assert status == 200 and f"<title>{read}=" in text

OURS = [("Host", name) for name in "localhost LOCALHOST localhost.:80 127.0.0.1:9999 [::1]:80".split()]
THEIRS = [("Host", name) for name in ("evil.example:80", "", "localhost.evil.example", "127.0.0.1.evil.example")]
OURS += [("Sec_Fetch_Site", site) for site in ("same-origin", "none")]
THEIRS += [("Sec_Fetch_Site", site) for site in ("same-site", "cross-site")]

@pytest.mark.parametrize("path, header, status", [
    *[("/", header, 200) for header in OURS], *[("/?q=1", header, 403) for header in THEIRS],
    *[(path, OURS[0], 404) for path in ("/etc/passwd", "/favicon.ico", "/solve")], ("/?q=" + "1" * 3000, OURS[0], 414),
    *[(f"/?q={typed}", OURS[0], 422) for typed in ("1%2B", "%00%ff", "1/0", "(" * 300, "%22%3E%3Cscript%3E")]])
def test_what_the_page_allows_and_refuses(page, path, header, status):
    """Other hosts, sites and paths are refused; what is no problem stays in the form as text. HEAD is like GET."""
    found, answer, text = page[1](path, **dict([header]))
    assert found == status and answer["X-Content-Type-Options"] == "nosniff" and "<script" not in text
    assert page[1](path, "HEAD", **dict([header])) == (status, answer, "")
    if status == 422:
        typed = re.search('name="q" value="(.*?)"', text)[1]
        assert html.unescape(typed) == unquote(path[4:]) and re.search('role="alert"[^>]*>[a-z0-9]', text)

def test_the_page_serves_many_at_once_and_survives_garbage(page):
    """32 clients at once get their own answers, while others stall, go away or send noise."""
    began, rng = time.perf_counter(), random.Random(0)
    stalled = [socket.create_connection(page[0]) for _ in range(8)]
    stalled[0].sendall(b"GET /?q=1 HTTP/1.1\r\nHost: ")
    with ThreadPoolExecutor(32) as pool:
        pages = list(pool.map(lambda i: page[1](f"/?q={i}%2B{i}")[2], range(32)))
    assert all(f"<title>{i}+{i}=" in text for i, text in enumerate(pages))
    for i in range(100):
        with socket.create_connection(page[0]) as client:
            client.sendall(rng.randbytes(rng.randint(1, 300)) + b"\r\n\r\n" if i % 9 else b"GET /?q=7 HTTP/1.0\r\n\r\n")
    assert page[1]("/?q=1%2B1")[0] == 200
    assert time.perf_counter() - began < 10              # none waits long for its turn to connect
    [client.close() for client in stalled]

def test_the_page_in_a_real_browser(page, tmp_path):
    """The form asks; an arrow key chooses the next token, and the grid shows each head's looks there; Back works."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    (ear, to_it), (from_it, mouth), session = os.pipe(), os.pipe(), {}
    pipes = lambda: [os.dup2(*pair) for pair in ((ear, 103), (mouth, 104), (103, 3), (104, 4))]      # it wants 3 and 4
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path}", "--remote-debugging-pipe"]

    def call(method, **params):
        os.write(to_it, json.dumps({"id": 1, "method": method, "params": params, **session}).encode() + b"\0")
        while "result" not in (answer := json.loads(b"".join(iter(lambda: os.read(from_it, 1) or b"\0", b"\0")))):
            pass
        return answer["result"]

    def wait_for(expression):
        end = time.monotonic() + 30
        while not call("Runtime.evaluate", expression=f"!!({expression})")["result"].get("value"):
            assert time.monotonic() < end, expression
    ask = "document.forms[0].q.value = '{}', document.querySelector('form button').click(), true"
    grid = "document.title.startsWith('12+34=') && document.querySelectorAll('#grid i').length == {}"
    with subprocess.Popen([program or pytest.skip("there is no Chromium here"), *flags], preexec_fn=pipes,
                          close_fds=False, stderr=subprocess.DEVNULL):
        os.close(mouth)
        target = call("Target.createTarget", url="http://{}:{}/".format(*page[0]))
        session["sessionId"] = call("Target.attachToTarget", flatten=True, **target)["sessionId"]
        wait_for("document.readyState == 'complete' && document.forms[0]")
        wait_for(ask.format("12 + 34"))
        wait_for(grid.format(4 * len("12+34=")))
        wait_for("document.querySelector('input:checked').focus() || document.activeElement.checked")
        for kind in ("rawKeyDown", "keyUp"):
            call("Input.dispatchKeyEvent", type=kind, key="ArrowRight", windowsVirtualKeyCode=39)
        wait_for(grid.format(4 * len("12+34=7")) + " && document.querySelectorAll('label input')[1].checked")
        wait_for(ask.format("1/0"))
        wait_for("document.querySelector('[role=alert]') && document.forms[0].q.value == '1/0'")
        call("Runtime.evaluate", expression="history.back()")
        wait_for(grid.replace("== {}", "> 0"))
        call("Browser.close")

def test_muon_is_pytorchs():
    """Our Muon takes the steps of torch.optim.Muon, which rounds to bfloat16; zeros stay zeros."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((24, 8), (8, 24), (8, 8))]
    theirs, before = ([torch.nn.Parameter(p.detach().clone()) for p in ours] for _ in range(2))
    optimizers = [muon(p, lr=0.1, momentum=0.9, weight_decay=0.2)
                  for muon, p in ((tinyllm.Muon, ours), (torch.optim.Muon, theirs))]
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert all((a - b).norm() < 0.02 * (b - start).norm() for a, b, start in zip(ours, theirs, before))
    assert not tinyllm.orthogonal(torch.zeros(4, 6)).any()

PART = """import sys, tinyllm, torch
learn, seen = tinyllm.learn, []
tinyllm.learn = lambda model, optimizers, *batch: seen.append(batch) or learn(model, optimizers, *batch)
fit, models = tinyllm.fit, []
tinyllm.fit = lambda model, *rest: models.append(model) or fit(model, *rest)
tinyllm.main()
torch.save((models[0].state_dict(), seen), f"rank{tinyllm.RANK}.pt")"""

@slow
def test_two_processes_are_one_run_with_a_larger_batch():
    """torchrun: both end with the weights of one process that learns from both batches, which differ; one saves."""
    Path("part.py").write_text(PART)
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "part.py", "train"]
    done = subprocess.run([*program, "--steps", "3", "--out", "model.pt", *TINY, "--batch_tokens", "512"], timeout=200,
                          capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(HERE)})
    assert done.returncode == 0 and done.stdout.count("Before training") == 1, done.stderr
    (a, seen_a), (b, seen_b), (saved, state) = torch.load("rank0.pt"), torch.load("rank1.pt"), load()
    assert state["step"] == len(seen_a) == len(seen_b) == 3
    assert all(torch.equal(a[name], b[name]) and torch.equal(a[name], state["model"][name]) for name in a)
    some, others = ({decode(row).split("=")[0] for x, *_ in seen for row in x.tolist()} for seen in (seen_a, seen_b))
    assert not any(map(is_held_out, some | others)) and len(some & others) < 0.1 * len(some)
    torch.manual_seed(0)
    one = TinyLLM(saved.config)
    optimizers = tinyllm.make_optimizers(one, saved.config)
    for step, pair in enumerate(zip(seen_a, seen_b)):
        one.zero_grad()
        for batch in pair:
            (tinyllm.loss_of(one, *batch) / 2).backward()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * tinyllm.lr_factor(step, saved.config)
            optimizer.step()
    assert all(torch.allclose(weight, a[name], atol=2e-4) for name, weight in one.state_dict().items())

def test_ctrl_c(tmp_path, checkpoint):
    """Ctrl-C in `train`: status 130, how to go on, and a file at most a hundredth old. Elsewhere it is a plain line."""
    path = tmp_path / "my model \u6a21.pt"
    with running("train", "--out", path, "--steps", 1000, "--kinds", "add", *TINY) as process:
        while " 10% " not in process.stdout.readline():
            pass
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and f'train --resume --out "{path}"' in err and "Traceback" not in err
    assert tinyllm.load_checkpoint(path)[1]["step"] >= 90
    with running("ask", "--plain", "--checkpoint", checkpoint) as process:
        print("1+2", file=process.stdin, flush=True)
        assert process.stdout.readline().startswith("1+2=")      # it is answered at once
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[1].strip() == "tinyllm: stopped" and process.returncode == 130

def test_a_pipe_is_answered_line_by_line(checkpoint):
    """One line in, one line out; an empty or wrong one is an error there, with its number, and others go on."""
    status, out, err = command("ask", "--plain", "--checkpoint", checkpoint, stdin="1+2\n1/0\n\n\uff13\u00d74\nz\n5-6")
    assert status == 2 and re.findall("^[^=:]+", out, re.M) == ["1+2", "error", "error", "3*4", "error", "5-6"]
    assert re.findall("tinyllm: line ([0-9]+): ", err) == ["2", "3", "5"]

def test_ask_shows_and_checks_each_stage(checkpoint, capsys):
    """A stage a row, with a check that is labelled as one. A problem may begin with a minus; an error is one line."""
    assert main("ask", "-5+3", "-X+3", "-[1+2]+5", "--checkpoint", checkpoint) == 0
    out, err = capsys.readouterr()
    assert re.findall("^([^ ]+) = ", out, re.M) == ["-5+3", "-x+3", "-(1+2)+5"] and "check: NOT TRUE" in out
    assert "\x1b" not in out and "problem 1: check: this is NOT the right answer" in err
    assert main("ask", "--latex", "12+39", "--checkpoint", checkpoint) == 0
    out, err = capsys.readouterr()
    assert out.startswith(r"\begin{align*}") and "NOT the right answer" in err
    status, out, err = command("ask", "12+\u00b3", "--checkpoint", checkpoint, PYTHONIOENCODING="cp1252")
    assert status == 2 and not out and "SUPERSCRIPT" in err and err.count("\n") == 1

@pytest.mark.parametrize("script, args, out", [
    ('exec "$@" >&-', "data --count 1", ""), ('exec "$@" --checkpoint "$MODEL" <&-', "ask", ""),
    ('"$@" | head -1 | wc -l', "data --count 20000", "1")])
def test_a_stream_may_be_closed(script, args, out, checkpoint):
    """No traceback where there is no input or output, or where the reader of a pipe has seen enough."""
    status, found, err = command(*args.split(), script=script, MODEL=str(checkpoint))
    assert (status, found.strip(), err) == (0, out, "")

@pytest.mark.parametrize("environment", [{"RANK": "1", "PYTHONOPTIMIZE": "2"}, {"RANK": "", "WORLD_SIZE": "2"}])
def test_the_environment_changes_nothing(environment, capsys):
    """Only torchrun makes several processes one run, not a variable that was left over. It runs without docstrings."""
    assert main("data", "--count", 1) == 0
    assert command("data", "--count", 1, **environment) == (0, capsys.readouterr().out, "")

@pytest.mark.parametrize("args, words", {
    "ask 12+\u00b3": "SUPERSCRIPT THREE", "ask (1+2": "a bracket is not closed", "ask 1/(2-2)": "division by zero",
    "ask 1 --plain --latex": "not both", "ask 1 --checkpoint no.pt": "is not there", "look 1+": "two sides",
    "eval --problems 0": "--problems", "eval --size 0": "--size", "data --count -1": "--count", "train --lr -1": "--lr",
    "data --kind calculus": "invalid choice", "frobnicate": "invalid choice", "train --steps many": "invalid int",
    "train --steps 0": "--steps 0", "train --seed 99999999999999999999": "--seed", "train --weight_decay nan": "nan",
    "train --flat 1": "--flat", "serve --port 99999": "--port", "train --kinds add,calculus": "add sub mul div expr",
    "train --head_dim 21": "must be even", "train --block_size 16": "at least 32", "train --out .": "--out",
    "train --batch_tokens 64": "--batch_tokens", "train --n_embd 1000000000000": "no memory",
    "train --resume": "is not there", "train --out no/such/folder/x.pt": "cannot write",
    "train --out /dev/null --force": "/dev/null"}.items())
def test_errors_are_sentences(args, words, checkpoint, capsys):
    """Bad input: one line on stderr that says what to do; status 2, and nothing is written."""
    model = ["--checkpoint", checkpoint] if re.match("(ask|look|eval|serve)(?!.*--checkpoint)", args) else []
    assert main(*args.split(), *model) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and err.isascii() and os.listdir() == []

def test_train_and_eval_as_a_person_runs_them(capsys):
    """Rows, tables, next commands; the same numbers again; resume; eval; and no model is silently replaced."""
    def losses():
        return [point["loss"] for point in load()[1]["history"]]
    run = ["train", "--out", "model.pt", "--steps", 40, *TINY, "--kinds", "sub mul"]
    status, out, err = command(*run)
    assert status == 0 and out.isascii() and "\r" not in out and max(map(len, out.splitlines())) < 100, err
    words = ("Before training", "weights on cpu", "100%", "answers right", "Now it answers", "Now try", "model.pt")
    assert [word for word in words if word not in out] == []
    before = losses()
    os.symlink("model.pt", "link.pt")
    resume = ["train", "--out", "model.pt", "--resume"]
    assert main(*run) == main(*run, "--out", "link.pt") == main(*resume) == main(*resume, "--lr", 1) == 2
    assert main(*run, "--force") == 0 and losses() == before and len(before) == 40
    assert main(*resume, "--steps", 42) == 0 and len(losses()) > 40
    capsys.readouterr()
    assert main("eval", "--checkpoint", "model.pt", "--problems", 3, "--size", 2) == 0
    out = capsys.readouterr().out
    assert re.search("^sub +3 +[0-9.]+% +[0-9.]+%$", out, re.M) and "\nmul " in out and "wrong: " in out

def test_data_and_help(capsys):
    """`data` prints true lines of the side and kind that was asked for; --help explains each flag."""
    assert main("data", "--kind", "mul", "--split", "test", "--count", 5) == 0
    rows = capsys.readouterr().out.split()
    assert len(rows) == 5 and all(tinyllm.check(row)[0] and is_held_out(row.split("=")[0]) for row in rows)
    status, out, _ = command("train", "--help", PYTHONOPTIMIZE="2")
    assert status == 0 and all(f"--{field.name}" in out for field in dataclasses.fields(Config))
    assert "None" not in out and "blocks, one after" in out

@slow
def test_the_first_minute():
    """`train --quick` learns sums in seconds, and says how to ask for one."""
    status, out, err = command("train", "--quick")
    assert status == 0 and float(re.search(r"^add .*?([0-9.]+)%", out, re.M)[1]) > 80 and '"123+456"' in out, err

######## Appendix: the rules ########
@pytest.mark.parametrize("line", """(12+3)*4-6=15*4-6=60-6=54 345*27=345*20+345*7=6000+900+(2100+315)=6900+2415=9315
    27*345=20*345+7*345=6000+900+(2100+315)=6900+2415=9315 2345*7=14000+(2100+315)=14000+2415=16415 16*8=128 5=5 0/7=0
    -12*34=-(12*30+12*4)=-(360+48)=-408 -3*(-4)=3*4=12 5-(-9)=5+9=14 -(-4)=4 0*(-7)=0*7=0 56/7=8+(56-56)/7=8+0/7=8
    1831/23=70+(1831-1610)/23=70+221/23=70+8+(221-184)/23=78+37/23=78+1+(37-23)/23=79+14/23=79+2*7/23=79+14/23 23/23=1
   5-1831/23=5-70-(1831-1610)/23=-65-221/23=-65-8-(221-184)/23=-73-37/23=-73-1-(37-23)/23=-74-14/23=-74-2*7/23=-74-14/23
    10/4=2+(10-8)/4=2+2/4=2+2/(2*2)=2+1/2 -7/2=-3-(7-6)/2=-3-1/2 6/3*2=(2+(6-6)/3)*2=(2+0/3)*2=2*2=4 3/8=3/(2*2*2)=3/8
    48/84=2*2*2*2*3/(2*2*3*7)=2*2*2*3/(2*3*7)=2*2*3/(3*7)=2*2/7=4/7 -4/6=-2*2/(2*3)=-2/3 3/7=3/7 2*(4-7)=-2*3=-6
    (2+3)*(4-6)=5*(-2)=-5*2=-10 5*(-12)=-5*12=-60 8x+3-5y+2x-7=8x+2x-5y+3-7=10x-5y-4 (2x-1)^2=4x^2-2x-2x+1=4x^2-4x+1
    3(2x-1)-2(x+4)=6x-3-2x-8=6x-2x-3-8=4x-11 (x+1)-2=x+1-2=x-1 3x-3x=0x=0 5x-5x+2x-y+1=0x+2x-y+1=2x-y+1 300*27=8100
    8x-(-5x)=8x+5x=13x x+2=x+2 (x+y)(y-x)=xy-x^2+y^2-xy=-x^2+xy-xy+y^2=-x^2+0xy+y^2=-x^2+y^2""".split())
def test_the_notebook(line):
    """The working a pupil would write, for each rule."""
    assert work_out(line.split("=")[0]) == line

@pytest.mark.parametrize("problem", """1/2+1/3 3/4-1/2 1/2/2 2*(1/2) 2(x+(y-1)) 3(x+1)(x+2) 123x+4x 1234*5678 12/345
    1+2+3+4+5+6+7+8 12345678901+1 5 123*456+789 7/2+5/2 5000/500+1 (34x+56)(78x-99) 34x*56y 3(x^2+xy)""".split())
def test_what_was_never_drawn_is_said_to_be_outside(problem):
    """The note comes from what the kinds draw. (That nothing drawn carries it is tested with the lines.)"""
    assert is_outside(problem, Config()) and not is_outside("12+3", Config())
    assert is_outside("12+3", Config(kinds="sub mul"))

def test_a_new_word_is_a_new_shape(monkeypatch):
    """One word more in the grammar is all: the shape is drawn, worked, checked, and no longer outside."""
    assert is_outside("3(x+y+5)", Config())
    monkeypatch.setitem(tinyllm.GRAMMAR, "O", [*tinyllm.GRAMMAR["O"], "d(v+w+c)"])
    monkeypatch.setattr(tinyllm, "algebra_pattern", tinyllm.algebra_pattern.__wrapped__)         # not the kept one
    assert not is_outside("3(x+y+5)", Config()) and is_outside("3(x+y-5)", Config())
    rng = random.Random(0)
    drawn = {tinyllm.draw_problem("algebra", rng, held_out=False) for _ in range(4000)}
    new = [problem for problem in drawn if re.fullmatch(r"[2-9]\((x\+y|y\+x)\+[1-9]\)", problem)]
    assert len(new) > 3 and all(tinyllm.check(work_out(problem))[0] for problem in new)
    assert work_out("3(y+x+5)") == "3(y+x+5)=3y+3x+15=3x+3y+15"
