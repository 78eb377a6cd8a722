"""--algo FILE.py: docs/own.md's example does what it says; names, errors, resume, figures."""

import json
import math
import re
import shutil

import child
import pytest
import torch
from conftest import ROOT
from small import change, own_file, read, refused, run, timeless
from test_plot import write_run

import compare
import grpo
import plot
from run import origin, style
from run.algorithm import load_algorithm, option_defaults
from run.checks import fill
from run.commandline import command
from run.names import algorithm_names, method
from run.parser import parse
from run.runs import read_csv, read_folder, read_runs
from run.table import tabulate
from tools import credit
from trainer import data, grading
from trainer.methods import label

pytestmark = pytest.mark.usefixtures("quiet_run")
SMALL = """--preset tiny --prompts 2 --group-size 4 --updates 2 --max-new-tokens 12 --eval-n 2
    --eval-every 0 --k 0 --save-every 1""".split()
PAGE = (ROOT / "docs" / "own.md").read_text(encoding="utf-8")
SECTION = PAGE.split("\n## Add a method in ten minutes\n")[1].split("\n## ")[0]
LOSS = "def loss(logprobs, old_logprobs, advantages, mask):\n"
GRPO_LOSS = "from grpo import loss\n"


@pytest.fixture
def soft_length(tmp_path):
    """The file of docs/own.md, saved as it says."""
    path = tmp_path / "soft_length.py"
    path.write_text(re.search(r"```python\n(.*?)```", SECTION, re.DOTALL)[1])
    return path


@pytest.fixture
def half_right(monkeypatch):
    """A reward that differs within the groups."""
    monkeypatch.setattr(grading, "correct", child.parity)


# The example


def slow_loss(logp, old, A, mask, power, eps_low, eps_high):
    """The formula of its docstring, in Python's numbers."""
    total = Z = 0.0
    for i, row in enumerate(mask.tolist()):
        length = sum(row)
        Z += length ** (1 - power)
        for t in range(len(row)):
            if row[t]:
                w = math.exp(logp[i, t].item() - old[i, t].item())
                clipped = min(max(w, 1 - eps_low), 1 + eps_high)
                total += length**-power * min(w * A[i].item(), clipped * A[i].item())
    return -total / Z


@pytest.mark.parametrize("power", [0.5, 0.0, 0.25, 1.0])
def test_its_loss_is_the_formula(soft_length, power):
    module = load_algorithm(str(soft_length))
    torch.manual_seed(0)
    logp, old = -torch.rand(4, 5, dtype=torch.float64), -torch.rand(4, 5, dtype=torch.float64)
    A = torch.randn(4, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([[5], [1], [3], [2]])
    logp.requires_grad_()
    args = (logp, old, A, mask)
    loss = module.loss(*args, power=power, eps_low=0.1, eps_high=0.3)
    assert loss.item() == pytest.approx(slow_loss(*args, power, 0.1, 0.3), rel=1e-12)
    (got,) = torch.autograd.grad(loss, logp)
    for i, t in ((0, 0), (0, 4), (1, 0), (2, 1), (3, 1), (3, 3)):
        sides = []
        for step in (1e-6, -1e-6):
            moved = logp.detach().clone()
            moved[i, t] += step
            sides.append(slow_loss(moved, old, A, mask, power, 0.1, 0.3))
        assert got[i, t].item() == pytest.approx((sides[0] - sides[1]) / 2e-6, abs=1e-7)
    if power == 1:
        want = grpo.loss(*args, eps_low=0.1, eps_high=0.3)
        assert loss.item() == pytest.approx(want.item(), rel=1e-12)
    if power == 0:
        u = grpo.clip_term((logp - old).exp(), A[:, None], 0.1, 0.3)
        assert loss.item() == pytest.approx(-grpo.token_mean(u, mask).item(), rel=1e-12)


def test_it_is_short_and_takes_grpos_advantages(soft_length):
    lines = soft_length.read_text().splitlines()
    assert len(lines) <= 25 and max(map(len, lines)) <= 100
    module = load_algorithm(str(soft_length))
    assert option_defaults(module) == {"power": 0.5, "eps_low": 0.2, "eps_high": 0.2}
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert torch.equal(module.advantages(rewards, 4), grpo.advantages(rewards, 4))


def test_readmes_four_commands_with_fewer_steps(
    soft_length, tmp_path, monkeypatch, capsys, few_problems
):
    """In another folder than ours. The comparison starts train.py itself."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "TINY_TRAIN", few_problems)  # as that process has it
    lines = [line.split() for line in SECTION.splitlines() if line.startswith("    python ")]
    assert [line[1] for line in lines] == ["train.py", "train.py", "compare.py", "plot.py"]
    for line in lines[:2]:
        assert run(*line[2:], *SMALL, "--steps", "2") == 0
    first, second = read_folder(tmp_path / "runs/soft_length-tiny-s0"), tmp_path / "runs/soft25"
    assert first["algo"] == "soft_length" and len(first["rows"]) == 4
    config = json.loads((second / "config.json").read_text())
    assert config["options"]["option"] == {"power": 0.25}
    assert config["options"]["algo"] == str(soft_length)
    assert {str(soft_length), "grpo.py"} <= config["code"].keys()
    assert "tepo.py" not in config["code"]

    assert compare.main([*lines[2][2:], "--seeds", "0", "--", *SMALL, "--steps", "1"]) == 0
    out = tmp_path / "runs/compare"
    assert {path.name for path in out.glob("*-s0")} == {"tepo-s0", "soft_length-s0"}
    assert [run["algo"] for run in read_csv(out / "methods.csv")] == ["tepo", "soft_length"]
    table = (out / "methods.md").read_text()
    assert "| soft_length | 1 |" in table and "| TEPO | 1 |" in table
    assert (out / "methods.png").read_bytes().startswith(b"\x89PNG")

    figures = []
    monkeypatch.setattr(credit, "save", lambda figure, out: figures.append(figure))
    words = [word.replace("docs/", f"{ROOT}/docs/") for word in lines[3][2:]]
    plot.main([*words, "--out", str(tmp_path / "credit.png")])
    titles = [ax.get_title(loc="left").split(":")[0] for ax in figures[0].axes]
    assert titles[1:] == ["GRPO", "DAPO", "soft_length"]

    # Another version of the file: the run is not taken for one of this version.
    capsys.readouterr()
    soft_length.write_text(soft_length.read_text() + "\n")
    assert compare.main([*lines[2][2:], "--seeds", "0", "--", *SMALL, "--steps", "1"]) == 2
    assert f"other code or versions ({soft_length})" in capsys.readouterr().err


# Names


def test_a_file_is_named_by_a_path_that_no_current_folder_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert method("tepo") == "tepo" and label("tepo") == "tepo"
    assert parse(["--algo", "mine.py"])["algo"] == method("./mine.py") == f"{tmp_path}/mine.py"
    assert label(f"{tmp_path}/mine.py") == "mine" and label(f"{tmp_path}/gspo.py") == "gspo.py"
    # the path of one of ours is that method
    assert method(f"{ROOT}/gspo.py") == "gspo" and method(f"{ROOT}/more/cispo.py") == "cispo"
    monkeypatch.chdir(ROOT)
    assert method("more/cispo.py") == "cispo"


def test_several_methods_with_files_among_them(tmp_path):
    mine, other = own_file(tmp_path, GRPO_LOSS), own_file(tmp_path / "b", GRPO_LOSS)
    grpo_copy = own_file(tmp_path, GRPO_LOSS, "grpo.py")
    assert algorithm_names(f"tepo,{mine},grpo,{grpo_copy}") == [
        *("tepo", str(mine), "grpo", str(grpo_copy))
    ]
    assert len(algorithm_names(f"All,{mine}")) == 29
    with pytest.raises(Exception, match=r"/mine.py and .*/b/mine.py have one name: rename"):
        algorithm_names(f"{mine},{other}")
    with pytest.raises(Exception, match="did you mean tepo"):
        algorithm_names(f"{mine},tpo")


def test_a_name_without_its_ending_is_suggested(tmp_path, monkeypatch):
    own_file(tmp_path, GRPO_LOSS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no algorithm 'mine'; did you mean mine.py\?"):
        fill(parse(["--algo", "mine"]))


def test_a_copy_of_grpo_is_grpo_under_another_name(tmp_path, monkeypatch, half_right):
    """The same metrics; its own folder, curve and colour."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "grpo.py", tmp_path / "grpo.py")
    for algo in ("grpo.py", "grpo"):
        assert run("--algo", algo, *SMALL, "--steps", "2") == 0
    folders = [tmp_path / "runs" / name for name in ("grpo.py-tiny-s0", "grpo-tiny-s0")]
    copy, ours = map(timeless, folders)
    for mine, theirs in zip(copy, ours, strict=True):  # a file's rows are all measured: rounding
        for key in {"accuracy", "reward", "length", "entropy", "grad_norm"} & mine.keys():
            assert mine[key] == pytest.approx(theirs[key], rel=1e-5), key
        assert mine["phase"] == "eval" or mine["grad_norm"] > 0
    assert sorted(set(tabulate(read_runs(folders))["algo"])) == ["grpo", "grpo.py"]
    assert style.style("grpo.py")[0] == "grpo.py" != style.style("grpo")[0]


def test_own_methods_have_colours_of_their_own(monkeypatch):
    monkeypatch.setattr(style, "own", {})
    looks = [style.style(name) for name in ("a", "b", "c", "d", "e", "f")]
    colours = {look[1] for look in looks} | {look[1] for look in style.STYLES.values()}
    assert len(colours) == 6 + 28 and style.style("b") == looks[1]


def test_two_files_of_one_name_are_two_curves(tmp_path):
    """Seeds 0 and 1 are of one file, 2 of another; their folders tell them apart."""
    for seed, checksum in enumerate(("aa", "aa", "bb")):
        folder = write_run(tmp_path / f"{checksum}-s{seed}", f"/{seed}/mine.py", seed)
        change(folder / "config.json", code={f"/{seed}/mine.py": checksum})
    found = tabulate(read_runs([tmp_path])).groupby("variant", observed=True)["seed"]
    assert {name: set(seeds) for name, seeds in found} == {"aa": {0, 1}, "bb": {2}}


# Errors: one line each, with the file and the line

BACKWARD = """\
import torch
class Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sum()
    @staticmethod
    def backward(ctx, g):
        raise ValueError("no way back")
def loss(logprobs, old_logprobs, advantages, mask):
    return Sum.apply(logprobs)
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import torch\n\ndef loss(:\n", "mine.py:3: SyntaxError: "),
        ("x = 1\nimport no_such_module\n", "mine.py:2: ModuleNotFoundError: No module named"),
        ("\n\n1 / 0\n", "mine.py:3: ZeroDivisionError: division by zero"),
        ("import sys\nsys.exit('no')\n", "mine.py:2: SystemExit: no"),
        ("def los(): pass\n", "mine.py: a method is a function loss(logprobs, old_logprobs,"),
        ("loss = 3\n", "mine.py: a method is a function loss(logprobs"),
        ("advantages = 3\n" + GRPO_LOSS, "mine.py: a method is a function advantages(rewards"),
        ("\ndef loss(logprobs, mask): pass\n", "mine.py:2: it cannot be called: too many"),
        (
            "def loss(a, b, c, d, eps=0.2): pass\n",
            "mine.py:1: put * before eps: inputs and options are keyword-only",
        ),
        ("def loss(a, b, c, d, *, eps): pass\n", "mine.py:1: it cannot be called: missing"),
        (
            "def loss(a, b, c, d, *, entropie=None): pass\n",
            "mine.py:1: entropie is no option, whose default is a number, bool or text, and "
            "nothing that is filled in (mask, completions, right,",
        ),
        (
            "def advantages(rewards): pass\n" + GRPO_LOSS,
            "mine.py:1: it cannot be called: too many positional arguments; a method is a "
            "function advantages(rewards, group_size, *, ...)",
        ),
        (LOSS + "    return 0.5\n", "mine.py:1: loss must return a tensor of one number, not a"),
        (LOSS + "    return logprobs\n", "mine.py:1: loss must return one number, and not a"),
        (LOSS + "    return mask.sum() * 1.0\n", "mine.py:1: loss must depend on logprobs"),
        (
            "import torch\n" + LOSS + "    return torch.ones((), requires_grad=True) * 2\n",
            "mine.py:2: loss must depend on logprobs",
        ),
        (LOSS + "    return (0 * logprobs / 0).sum()\n", "mine.py:1: loss gave nan for a batch"),
        (
            LOSS + "    return (logprobs - old_logprobs).abs().sqrt().sum()\n",
            "mine.py:1: loss has a gradient that is not finite",
        ),
        (
            LOSS + "    x = 1\n    return (logprobs * advantages).sum()\n",
            "mine.py:3: RuntimeError: The size of tensor a (3) must match",
        ),
        (
            "def advantages(rewards, group_size):\n    return rewards[:2]\n" + GRPO_LOSS,
            "mine.py:1: advantages must return [B] or [B, T], for B = 4 and T = 3; it returned [2]",
        ),
        (
            "def advantages(rewards, group_size):\n    return rewards.repeat(5, 1).T\n" + GRPO_LOSS,
            "mine.py:1: advantages must return [B] or [B, T], for B = 4 and T = 3; it ret",
        ),
        (
            "def advantages(rewards, group_size):\n    return rewards.tolist()\n" + GRPO_LOSS,
            "mine.py:1: advantages must return a tensor, [B] or [B, T], not a list",
        ),
        (
            "def advantages(rewards, group_size):\n    return rewards / 0\n" + GRPO_LOSS,
            "mine.py:1: advantages gave [inf, nan, nan, inf] for rewards of 1, 0, 0, 1",
        ),
        (
            LOSS + "    w = logprobs.exp()\n    s = (w * w).sum()\n    w += 1\n    return s\n",
            "mine.py:1: the gradient of loss: RuntimeError: one of the variables needed for grad",
        ),
        (BACKWARD, "mine.py:8: the gradient of loss: ValueError: no way back"),
    ],
)
def test_what_is_wrong_with_a_file(text, message, tmp_path, capsys):
    line = refused(capsys, "--algo", own_file(tmp_path, text), *SMALL, "--out", tmp_path / "run")
    assert f"{tmp_path}/{message}" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.py", "none.py: no such file"),
        ("folder.py", "folder.py: not a file"),
        ("./folder", "folder: not a file"),
        ("a b.py", "a b.py: its runs and curves are named after the file, so"),
        ("_mine.py", "_mine.py: its runs"),
        ("mine.txt", "no algorithm 'mine.txt'"),
    ],
)
def test_what_is_no_file_of_a_method(name, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("folder", "folder.py"):
        (tmp_path / folder).mkdir()
    for file in ("a b.py", "_mine.py", "mine.txt"):
        own_file(tmp_path, GRPO_LOSS, file)
    assert message in refused(capsys, "--algo", name, *SMALL)
    with pytest.raises(SystemExit) as stopped:
        plot.main(["--credit", "x", "--algos", name])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_options_of_a_file_are_typed_and_known(tmp_path):
    path = str(own_file(tmp_path, LOSS.replace("mask", "mask, *, a=0.5, b=True") + GRPO_BODY))
    given = fill(parse(["--algo", path, "--option", "a=2", "--option", "b=false"]))
    assert given.option == {"a": 2.0, "b": False}
    for words, message in (
        ("c=1", "mine has no option 'c'; it has a=0.5, b=True"),
        ("a=x", "a=x: a finite number is required"),
    ):
        with pytest.raises(ValueError, match=message):
            fill(parse(["--algo", path, "--option", words]))
    path = str(own_file(tmp_path / "without", LOSS + GRPO_BODY))
    with pytest.raises(ValueError, match="mine has no option 'a'; it has none"):
        fill(parse(["--algo", path, "--option", "a=1"]))


GRPO_BODY = "    import grpo\n    return grpo.loss(logprobs, old_logprobs, advantages, mask)\n"


# Training


ALL_INPUTS = """
import grpo
NEEDS_ALL_ROWS = True
SEEN = []

def advantages(rewards, group_size, *, entropy, mask, right, history, completions, scale=2.0):
    a = grpo.advantages(rewards, group_size)
    return scale * a[:, None] * (1 + entropy) * mask

def loss(logprobs, old_logprobs, advantages, mask, *, entropy, old_entropy, completions,
         max_length, ref_logprobs=None, beta=0.0):
    SEEN.append((ref_logprobs is not None, max_length))
    weight = (entropy - old_entropy).abs() + completions.ne(0)
    ratio = (logprobs - old_logprobs).exp()
    return -(ratio * weight * advantages).sum() / mask.sum()
"""


def test_inputs_are_filled_in_and_all_rows_are_run(tmp_path, half_right):
    """Keyword inputs need no default; step 2 may learn from the pass that measures, or not."""
    path = own_file(tmp_path, ALL_INPUTS)
    words = ["--algo", str(path), "--option", "scale=3", "--micro-batch", "2", *SMALL]
    assert run(*words, "--steps", "2", "--out", tmp_path / "a") == 0
    assert run(*words, "--steps", "1", "--beta", "0.1", "--out", tmp_path / "b") == 0
    for folder in ("a", "b"):
        lines = read(tmp_path / folder / "metrics.jsonl")
        assert all(line["grad_norm"] > 0 for line in lines if line["phase"] == "train")
    seen = load_algorithm(str(path)).SEEN
    assert (False, 12) in seen and seen[-1] == (True, 12)


KL_BY_DEFAULT = """\
import grpo
def loss(logprobs, old_logprobs, advantages, mask, *, beta=0.5, ref_logprobs=None):
    return grpo.loss(logprobs, old_logprobs, advantages, mask, beta=beta, ref_logprobs=ref_logprobs)
"""


def test_a_kl_term_is_on_if_its_default_is_above_0(tmp_path):
    rows = []
    for algo in (str(own_file(tmp_path, KL_BY_DEFAULT)), "grpo --beta 0.5", "grpo"):
        out = tmp_path / str(len(rows))
        words = [*SMALL, "--steps", "3", "--lr", "1e-3", "--out", out, "--algo", *algo.split()]
        assert run(*words) == 0
        rows.append(timeless(out))
    assert rows[0] == rows[1] != rows[2]


def test_step_2_may_learn_early_only_where_the_loss_allows_it(tmp_path, half_right):
    """A loss with another gradient at other log-probabilities, and one that needs the entropy."""
    body = "    w = (logprobs - old_logprobs).exp()\n    return -(w * A * ({}) * mask).mean()\n"
    head = "def loss(logprobs, old_logprobs, A, mask, *, entropy=None):\n    A = A[:, None]\n"
    for name, weight in (("old", "old_logprobs.exp()"), ("entropy", "1 + entropy")):
        path = own_file(tmp_path, head + body.format(weight), f"{name}.py")
        metrics = []
        for size in ("1", "8"):
            out = tmp_path / f"{name}{size}"
            words = ["--algo", str(path), "--micro-batch", size, *SMALL, "--steps", "3"]
            assert run(*words, "--lr", "0.001", "--out", out) == 0
            metrics.append([row.get("grad_norm") for row in read(out / "metrics.jsonl")])
        small, whole = metrics
        assert small[1:-1] == pytest.approx(whole[1:-1], rel=1e-3) and all(small[1:-1])


FAILS = """from grpo import loss as grpo_loss
calls = []

def loss(logprobs, old_logprobs, advantages, mask):
    calls.append(1)
    if len(calls) > 4:
        raise KeyError("late")
    return grpo_loss(logprobs, old_logprobs, advantages, mask)
"""


def test_an_error_during_training_is_a_line_that_says_where(tmp_path, capsys):
    path, out = own_file(tmp_path, FAILS), tmp_path / "run"
    line = refused(capsys, "--algo", path, *SMALL, "--steps", "9", "--out", out)
    assert line.startswith(f"{path}:7: KeyError: 'late'; when that is mended: ")
    assert line.endswith(command("train.py", "--resume", out))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "import torch, grpo\n"
            + LOSS
            + "    if mask.shape == (4, 3):  # the batch that a file is tried out on\n"
            + "        return grpo.loss(logprobs, old_logprobs, advantages, mask)\n"
            + "    return torch.ones((), requires_grad=True) * 2\n",
            ":2: loss must depend on logprobs",
        ),
        (
            "from grpo import loss\n\n"
            + "def advantages(rewards, group_size, *, mask):\n"
            + "    A = rewards[:, None] - 0.5\n"
            + "    return A.expand(mask.shape) if len(mask) == 4 else A.expand(len(mask), 2)\n",
            ":3: advantages must return [B] or [B, T], for B = 8 and T = ",
        ),
    ],
)
def test_what_shows_only_on_real_batches_is_a_line_too(text, message, tmp_path, capsys):
    path = own_file(tmp_path, text)
    line = refused(capsys, "--algo", path, *SMALL, "--steps", "2", "--out", tmp_path / "run")
    assert line.startswith(f"{path}{message}")


def test_resume_from_another_folder_and_of_a_changed_or_moved_file(tmp_path, monkeypatch, capsys):
    path = own_file(tmp_path / "a", LOSS + GRPO_BODY)
    monkeypatch.chdir(tmp_path / "a")
    assert run("--algo", "mine.py", *SMALL, "--steps", "1", "--out", tmp_path / "run") == 0
    resume = ["--resume", tmp_path / "run", "--steps"]
    monkeypatch.chdir(tmp_path)
    assert run(*resume, "2") == 0
    assert run(*resume, "2", "--algo", "a/mine.py") == 0
    assert "note:" not in capsys.readouterr().out
    path.write_text(path.read_text() + "\n")
    assert run(*resume, "3") == 0
    assert f"note: changed since the run began: {path}\n" in capsys.readouterr().out
    path.rename(tmp_path / "b.py")
    assert f"--algo {path}: no such file" in refused(capsys, *resume, "4")


def test_code_checksums_follow_what_a_file_imports(tmp_path):
    """Ours, and those beside it."""
    own_file(tmp_path, "two = 2\n", "beside.py")
    text = "from beside import two\nfrom torch import exp\n"
    text += "from more.cispo import loss\nfrom gtpo import advantages\n"
    path = own_file(tmp_path, text)
    files = origin.code_checksums(str(path)).keys()
    others = {name for name in files if not name.startswith(("trainer/", "run/"))}
    assert others - {"train.py", "rewards.py", "tiny/problems.py"} == {
        *(str(path), str(tmp_path / "beside.py"), "more/cispo.py", "gtpo.py", "dapo.py", "grpo.py")
    }
