"""view.py: the numbers of the page, hostile completions, errors; and the page in a real browser.

The browser is a headless Chromium (browser.py). Without one these tests are skipped.
"""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import browser
import pytest
from conftest import ROOT

from tools import view

HOSTILE = (
    "</script><img src=x onerror=alert(1)><script>alert(2)</script>",
    "\"'`${document.title}\\",
    "<!--<script> &lt;b&gt; &amp;",
    "--></title></style><img src=y onerror=alert(3)>",
    "\u202ereversed\u2066 \u200f",
    "\x00\x1b[31mred\x7f",
    "\ud800 \u2028\u2029\ufeff",
    "__DATA__",
    "a\n\tb\n",
    "x" * 20_000,
)
OPTIONS = {"algo": "grpo", "preset": "tiny", "seed": 3, "model": "tiny", "option": {}}
OPTIONS |= {"group_size": 3, "steps": 20}
STEPS = 1, 10, 20


def row(step, tokens, right, log_ratio=0.0, **more):
    """A line of samples.jsonl, whose every token has probability 1/2 and log-ratio log_ratio."""
    n = len(tokens)
    found = {"step": step, "prompt": f"{step} apples & <b>pears</b>?", "answer": "<i>7</i>"}
    found |= {"completion": "".join(tokens), "tokens": tokens, "right": right}
    found |= {"reward": float(right), "advantages": [0.25 if right else -0.125] * n}
    found |= {"logprobs": [math.log(0.5)] * n, "entropy": [0.75 + 0.1 * i for i in range(n)]}
    return found | {"old_logprobs": [math.log(0.5) - log_ratio] * n} | more


def lines(*rows):
    return "".join(json.dumps(found) + "\n" for found in rows)


def write_run(folder, rows, held_out=(), **options):
    """A run's folder with these samples, three evaluations and twenty steps."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"options": OPTIONS | options}))
    metrics = []
    for step in range(21):
        metrics.append({"phase": "train", "step": step, "accuracy": step / 40})
        metrics[-1] |= {"entropy": 1 - step / 20, "length": 10.0 + step}
    metrics[5]["entropy"] = None
    for step in (0, 10, 20):
        metrics.append({"phase": "eval", "step": step, "accuracy": 0.25, "n": 50})
        metrics[-1] |= {"ci95": [0.15, 0.387]}
    (folder / "metrics.jsonl").write_text(lines(*metrics))
    (folder / "samples.jsonl").write_text(lines(*rows))
    if held_out:
        (folder / "held_out.jsonl").write_text(lines(*held_out))
    return folder


def groups(tokens=("a", "b", "c", "d")):
    """At each of STEPS one right completion of one token and two wrong ones of two and one."""
    found = []
    for step in STEPS:
        found += [row(step, [tokens[0]], True), row(step, [tokens[1], tokens[2]], False, 0.01)]
        found += [row(step, [tokens[3]], False)]
    return found


def data_of(page):
    """The data that a page has."""
    text = page.read_text(encoding="utf-8")
    start = '<script id="data" type="application/json">'
    return json.loads(text.split(start)[1].split("</script>")[0])


# The numbers


def test_numbers_of_a_group(tmp_path, capsys):
    """Worked by hand. The rewards are 1, 0, 0: mean 1/3, std with Bessel's correction 0.57735.

    So A = (2/3, -1/3, -1/3) / 0.57745, and on policy the push is A / (3 |o_i|) under GRPO and
    A / 4 under DAPO. The ratio of the second row is exp(0.01), which multiplies its push.
    """
    run = write_run(tmp_path / "run", groups())
    view.main([str(run)])
    assert f"{run / 'samples.html'}: groups of 3 steps, 0.0 MB" in capsys.readouterr().out
    data = data_of(run / "samples.html")
    assert data["algo"] == "GRPO" and data["name"] == "run" and data["notes"] == []
    names = [method["name"] for method in data["methods"]]
    assert names == "GRPO (this run),DAPO,GSPO,TEPO,GTPO,GRPO-S,TR-GRPO".split(",")
    assert [group["step"] for group in data["groups"]] == list(STEPS)
    right, wrong, short = data["groups"][0]["completions"]
    a = 1 / 3 / (math.sqrt(1 / 3) + 1e-4)
    w = math.exp(0.01)
    assert right["push"][0] == pytest.approx(2 * a / 3, rel=5e-4)
    assert wrong["push"][0] == pytest.approx(-a * w / 6, rel=5e-4)
    assert short["push"][0] == pytest.approx(-a / 3, rel=5e-4)
    assert right["push"][1] == pytest.approx(2 * a / 4, rel=5e-4)
    assert wrong["push"][1] == pytest.approx(-a * w / 4, rel=5e-4)
    assert right["clipped"][2] == [] and wrong["clipped"][2] == []  # 1.01 raises a wrong row's loss
    assert wrong["ratio"] == 1.01 and wrong["probability"] == 0.5 and wrong["logprob"] == -0.6931
    assert wrong["entropy"] == [0.75, 0.85] and wrong["advantage"] == -0.125
    assert [right["right"], wrong["right"]] == [True, False]
    assert data["curves"]["train"]["entropy"][4:7] == [0.8, None, 0.7]
    assert data["curves"]["eval"]["ci_hi"] == [0.387] * 3


def test_the_method_of_the_run_has_its_options_and_the_seven_their_defaults(tmp_path):
    """GSPO's own clip 0.001 takes the right row, whose ratio is 1.0002; its default 3e-4 and more
    does not take it. A KL term, and a method of more/.
    """
    rows = [row(1, ["a"], True, 2e-3), row(1, ["b"], False)]
    for name, algo, option in (
        ("narrow", "gspo", {"eps_low": 0.5, "eps_high": 1e-3}),
        ("kl", "grpo", {"beta": 0.1}),
        ("more", "cispo", {}),
    ):
        write_run(tmp_path / name, rows[:], algo=algo, option=option)
        view.main([str(tmp_path / name)])
    data = data_of(tmp_path / "narrow" / "samples.html")
    names = [method["name"] for method in data["methods"]]
    assert names[0] == "GSPO (this run, eps_low = 0.5, eps_high = 0.001)" and names[3] == "GSPO"
    right, wrong = data["groups"][0]["completions"]
    assert right["clipped"][0] == [0] and right["push"][0] == 0 and wrong["push"][0] < 0
    assert right["clipped"][3] == [0]  # 2e-3 is above GSPO's default 4e-4, too
    data = data_of(tmp_path / "kl" / "samples.html")
    assert data["methods"][0]["name"] == "GRPO (this run)"
    assert "without its KL term" in data["methods"][0]["note"]
    data = data_of(tmp_path / "more" / "samples.html")
    assert data["methods"][0]["name"] == "CISPO (this run)" and len(data["methods"]) == 8


def test_a_file_of_a_stranger_is_not_run(tmp_path, capsys):
    """config.json may come from somebody else, and name a file that is on this machine."""
    trap = tmp_path / "trap.py"
    trap.write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    run = write_run(tmp_path / "run", groups(), algo=str(trap))
    view.main([str(run), "--algos", "grpo"])
    assert "runs it only if --algos names it" in capsys.readouterr().out
    assert not (tmp_path / "sprung").exists()
    data = data_of(run / "samples.html")
    assert data["algo"] == "trap" and [m["name"] for m in data["methods"]] == ["GRPO"]


def test_a_file_that_is_named_runs_with_the_options_of_the_run(tmp_path):
    """A copy of dapo.py; the right row's ratio 1.1 is clipped only with the run's eps_high."""
    mine = tmp_path / "mine.py"
    mine.write_text((ROOT / "dapo.py").read_text())
    rows = [row(1, ["a"], True, math.log(1.1)), row(1, ["b"], False)]
    run = write_run(tmp_path / "run", rows, algo=str(mine), option={"eps_high": 0.05})
    view.main([str(run), "--algos", f"{mine},grpo"])
    data = data_of(run / "samples.html")
    names = [method["name"] for method in data["methods"]]
    assert names == ["mine (this run, eps_high = 0.05)", "GRPO", "mine"]
    assert data["groups"][0]["completions"][0]["clipped"] == [[0], [], []]


def test_a_file_with_the_name_of_one_of_ours_has_another_name_on_the_page(tmp_path):
    mine = tmp_path / "grpo.py"
    mine.write_text((ROOT / "grpo.py").read_text())
    run = write_run(tmp_path / "run", groups(), algo=str(mine))
    view.main([str(run), "--algos", f"grpo,{mine}"])
    data = data_of(run / "samples.html")
    names = [method["name"] for method in data["methods"]]
    assert data["algo"] == "grpo.py" and names == ["grpo.py (this run)", "GRPO"]


def test_a_method_of_another_version_is_not_called_a_file(tmp_path, capsys):
    run = write_run(tmp_path / "run", groups(), algo="zzz")
    view.main([str(run), "--algos", "grpo"])
    assert "This version has no method zzz, the run's own" in capsys.readouterr().out
    data = data_of(run / "samples.html")
    assert data["algo"] == "zzz" and [m["name"] for m in data["methods"]] == ["GRPO"]


def test_rows_that_are_not_complete_have_no_push(tmp_path):
    """Rows of a skipped update with numbers that are not finite, and an older file's rows."""
    bad = row(20, ["a", "b"], True, skipped=True)
    bad["logprobs"] = [None, float("nan")]
    old = row(10, ["a"], True)
    del old["advantages"], old["right"], old["answer"], old["completion"]
    run = write_run(tmp_path / "run", [old, row(10, ["b"], False), row(20, ["c"], True), bad])
    view.main([str(run)])
    first, second, third = data_of(run / "samples.html")["groups"]
    assert first["completions"][0]["right"] is True and first["completions"][0]["text"] == "a"
    assert first["completions"][0]["advantage"] is None and first["completions"][0]["push"][0] > 0
    assert "push" not in second["completions"][0] and not second["skipped"]  # no group of one
    assert third["skipped"] and "push" not in third["completions"][0]
    assert third["completions"][0]["ratio"] is None


def test_completions_without_tokens_have_no_push(tmp_path):
    run = write_run(tmp_path / "run", [row(1, [], True), row(1, [], False)])
    view.main([str(run)])
    (group,) = data_of(run / "samples.html")["groups"]
    assert all("push" not in found for found in group["completions"])


def test_a_large_run_is_thinned_out_evenly_and_that_is_said(tmp_path, monkeypatch, capsys):
    rows = []
    for step in range(1, 42):
        rows += [row(step, ["a"] * 50, True), row(step, ["b"] * 50, False)]
    run = write_run(tmp_path / "run", rows)
    monkeypatch.setattr(view, "BUDGET", 60_000)
    view.main([str(run)])
    said = "Thinned out to keep the page below 5 MB: groups of "
    printed = capsys.readouterr().out
    data = data_of(run / "samples.html")
    assert len(data["notes"]) == 1 and data["notes"][0].startswith(said) and said in printed
    steps = [group["step"] for group in data["groups"]]
    gaps = {later - step for step, later in zip(steps, steps[1:], strict=False)}
    assert 3 < len(steps) < 41 and steps[0] == 1 and steps[-1] == 41
    assert max(gaps) - min(gaps) <= 1
    size = sum(len(view.json_text(group)) for group in data["groups"])
    assert 30_000 < size <= 60_000 and f"of {len(steps)} of the 41 recorded" in printed
    monkeypatch.setattr(view, "BUDGET", 10)
    view.main([str(run)])  # one step stays in any case
    assert [group["step"] for group in data_of(run / "samples.html")["groups"]] == [41]


# Hostile text


class Tags(HTMLParser):
    """The start tags of a page, with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, attributes))


def hostile_run(folder):
    """Every hostile text is a token, a prompt, an answer, and a held-out completion."""
    rows = groups(HOSTILE[:4])
    for text in HOSTILE:
        more = {"prompt": text, "answer": text}
        rows += [row(20, [text, "y"], True, **more), row(20, ["z", text], False, **more)]
    held_out = []
    for step in (0, 10, 20):
        for text in HOSTILE:
            held_out.append(row(step, [text], step > 5, prompt=f"held {text}"))
    return write_run(folder, rows, held_out, model=HOSTILE[0])


def test_hostile_text_never_becomes_markup(tmp_path):
    """Its page has the tags of an empty template, and every text as it was."""
    run = hostile_run(tmp_path / "run")
    view.main([str(run)])
    page = (run / "samples.html").read_text(encoding="utf-8")
    template = view.TEMPLATE.read_text(encoding="utf-8")
    assert template.count("__DATA__") == 1
    assert Tags(page).found == Tags(template).found
    data = data_of(run / "samples.html")
    assert page.isascii() or not any(c in page for c in "\u2028\u202e\x00")
    tokens = [c["tokens"][0] for group in data["groups"] for c in group["completions"]]
    assert set(HOSTILE) <= set(tokens) and data["about"]["model"] == HOSTILE[0]
    prompts = [group["prompt"] for group in data["held_out"]]
    assert prompts == [f"held {text}" for _ in range(3) for text in HOSTILE]


def test_the_script_writes_no_markup_and_the_page_asks_for_nothing():
    template = view.TEMPLATE.read_text(encoding="utf-8")
    for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "fetch("):
        assert word not in template
    urls = re.findall(r"https?://[^\s\"'<]+", template)
    assert urls == ["http://www.w3.org/2000/svg"]  # a name space, which nothing loads
    assert "default-src 'none'" in template


# Command line


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run", groups())
    view.main([str(run), "--out", str(tmp_path / "page.html")])
    before = (tmp_path / "page.html").read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(view.os, "replace", fail)
    with pytest.raises(SystemExit):
        view.main([str(run), "--out", str(tmp_path / "page.html")])
    error = capsys.readouterr().err
    assert error == f"view.py: error: cannot write {tmp_path}/page.html: No space left on device\n"
    assert (tmp_path / "page.html").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "run"]


GOOD = row(1, ["a"], True)
BAD_ROWS = {
    "list": [1],
    "tokens": GOOD | {"tokens": [1]},
    "short": GOOD | {"logprobs": []},
    "text": GOOD | {"entropy": ["x"]},
    "right": GOOD | {"right": "yes"},
    "prompt": GOOD | {"prompt": None},
    "step": GOOD | {"step": float("inf")},
}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("nowhere", "nowhere: no such run"),
        ("good/metrics.jsonl", "good/metrics.jsonl: no such run"),
        ("empty", "empty: no metrics.jsonl in it"),
        ("bare", "bare/samples.jsonl: no such file"),
        ("none", "none/samples.jsonl: no completions in it: was it trained with --samples-every"),
        *((name, f"{name}/samples.jsonl: line 2 is not ") for name in BAD_ROWS),
        ("held", "held/held_out.jsonl: line 1 is not a completion with tokens and numbers"),
        (
            "good --out good/metrics.jsonl/x.html",
            "argument --out: good/metrics.jsonl is not a folder",
        ),
        ("good --out nowhere/x.html", "cannot write nowhere/x.html: No such file or directory"),
        ("good --out good", "argument --out: good is a folder; add the name of a file"),
        ("good --out .", "argument --out: . is a folder; add the name of a file"),
        ("good --algos cipso", "no algorithm 'cipso'; did you mean cispo?"),
        ("good --algo cispo", "no option --algo; did you mean --algos?"),
        ("", "RUN"),
    ],
)
def test_errors_are_one_line(words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("good", "none", "held", "bare", *BAD_ROWS):
        rows = [] if name == "none" else [GOOD, BAD_ROWS.get(name, GOOD)]
        write_run(tmp_path / name, rows, [{"step": 1}] if name == "held" else ())
    (tmp_path / "bare" / "samples.jsonl").unlink()
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stopped:
        view.main(words.split())
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and told in printed
    assert printed.startswith("view.py: error: ") and printed.count("\n") == 1
    assert not list(tmp_path.rglob("*.part"))


def test_matplotlib_is_not_imported(tmp_path):
    run = write_run(tmp_path / "run", groups())
    code = "import sys; sys.modules['matplotlib'] = None; "
    code += "from tools import view; view.main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, str(run)], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr


# In a browser

TOKENS = "[...document.querySelectorAll('#groups .token')]"
TEXT = "document.getElementById('{}').textContent"
needs_browser = pytest.mark.skipif(
    browser.find() is None, reason=f"no browser: none of {', '.join(browser.NAMES)} is installed"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The pages of a run with plain completions, and of one with hostile ones."""
    folder = tmp_path_factory.mktemp("runs")
    rows = groups(("7", "\n", "<b>8</b>", "$"))
    rows += [row(step, ["same"], step > 1, prompt="Met thrice?") for step in STEPS]
    held_out = [row(s, ["####", f" {s}"], s > 5, prompt="Held out?") for s in (0, 10, 20)]
    plain = write_run(folder / "plain", rows, held_out)
    pages = {"plain": plain, "hostile": hostile_run(folder / "hostile")}
    for run in pages.values():
        view.main([str(run)])
    return {name: (run / "samples.html").as_uri() for name, run in pages.items()}


@pytest.fixture(scope="module")
def tab():
    with browser.Page() as opened:
        yield opened


@pytest.fixture
def page(tab, runs):
    """The plain page, newly opened; at the end it must have no complaint and no request."""
    tab.events.clear()
    tab.resize(1280, 900)
    tab.colours("light")
    tab.open(runs["plain"])
    yield tab
    tab.settle()
    assert tab.complaints() == []
    assert tab.requests() and all(url.startswith("file:") for url in tab.requests())


def text(page, name):
    return page.run(TEXT.format(name))


def tip(page):
    """The numbers of the token that is shown: {name: text}; None if there are none."""
    return page.run(
        "document.getElementById('tip').hidden ? null : Object.fromEntries("
        "[...document.querySelectorAll('#tip dt')].map(t => [t.textContent, "
        "t.nextSibling.textContent]))"
    )


@needs_browser
def test_page_shows_the_run_and_the_last_step(page):
    assert text(page, "title") == "GRPO: plain" and "model tiny" in text(page, "about")
    assert page.run("document.title") == "plain: samples"
    assert text(page, "step") == "Step 20"
    titles = page.run("[...document.querySelectorAll('#groups h3')].map(e => e.textContent)")
    assert titles == ["Right: 1", "Wrong: 2", "Right: 1", "Wrong: 0"]
    shown = page.run(f"{TOKENS}.map(e => e.textContent)")
    assert shown == ["7", "↵", "<b>8</b>", "$", "same"]
    captions = page.run("[...document.querySelectorAll('figcaption')].map(e => e.textContent)")
    assert captions[0].startswith("Thin line, training rollouts: 0.5 at step 20")
    assert "0.25 at step 20 (95%: 0.15 to 0.387, n = 50)" in captions[0]
    assert captions[1].endswith("0 at step 20") and captions[2].endswith("30 at step 20")
    label = "document.querySelector('svg').getAttribute('aria-label')"
    assert page.run(label).startswith("Accuracy over training steps. Training: 0 at step 0, 0.5 ")


@needs_browser
def test_steps_by_keys_by_slider_by_buttons_and_in_a_chart(page):
    page.press("ArrowLeft")
    assert text(page, "step") == "Step 10"
    page.press("ArrowLeft", "ArrowLeft", "ArrowLeft")
    assert text(page, "step") == "Step 1"
    page.click("document.getElementById('after')")
    assert text(page, "step") == "Step 10"
    page.run("document.getElementById('slider').focus()")
    page.press("ArrowRight")  # the slider's own key: one step, not two
    assert text(page, "step") == "Step 20"
    page.mouse(*page.place("document.querySelectorAll('svg')[1]", 0.2), "mousePressed")
    assert text(page, "step") == "Step 1"
    x, y = page.place("document.querySelectorAll('svg')[1]", 0.55)
    held = {"button": "left", "buttons": 1}
    page.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y, **held)  # drag
    page.mouse(x, y, "mouseReleased")
    page.settle()
    assert text(page, "step") == "Step 10"
    captions = page.run("[...document.querySelectorAll('figcaption')].map(e => e.textContent)")
    assert "0.25 at step 10" in captions[0] and captions[2].endswith("20 at step 10")
    cursor = "[...document.querySelectorAll('.cursor')].map(e => e.getAttribute('x1'))"
    assert len(set(page.run(cursor))) == 1


@needs_browser
def test_shadings_and_their_scale(page):
    """Colours of the tokens 7 (right), newline and 8 (wrong), and what the legend says."""
    style = f"{TOKENS}.slice(0, 3).map(e => e.style.backgroundColor)"
    legend = "document.querySelector('.legend').textContent"
    seven, newline, eight = page.run(style)
    assert "--up" in seven and "70.0%" in seven and "--down" in newline and newline == eight
    assert page.run(legend).startswith("Push, GRPO (this run): −0.3848+0.3848here from −0.1924")
    for key, start in (
        ("2", "Advantage: −0.25+0.25here from −0.125 to 0.25"),
        ("3", "Entropy: 00.85 natshere from 0.75 to 0.85 nats"),
        ("4", "Probability: 01here from 0.5 to 0.5"),
        ("5", "Ratio: 0.99011.01here from 1 to 1.01"),
    ):
        page.press(key)
        assert page.run(legend) == start
        button = f"document.querySelector('#shades :nth-child({key})')"
        assert page.run(f"{button}.getAttribute('aria-pressed')") == "true"
    seven, newline, _ = page.run(style)
    assert seven == "" and "--up" in newline and "70.0%" in newline  # of the ratio
    page.click("document.querySelector('#shades :nth-child(4)')")
    assert "35.0%" in page.run(style)[0] and "--amount" in page.run(style)[0]


@needs_browser
def test_methods(page):
    """Under DAPO each token of the group weighs the same, under GSPO the ratio 1.01 is clipped."""
    legend = "document.querySelector('.legend').textContent"
    page.press("m")
    assert page.run(legend).startswith("Push, DAPO: −0.2886+0.2886here from −0.1458 to 0.2886")
    page.press("m")
    assert "GSPO: " in text(page, "meaning")
    page.press("M", "M")
    assert "GRPO (this run)" in page.run(legend)
    options = "document.getElementById('method').options"
    assert page.run(f"{options}.length") == 7
    page.press("3")
    page.run(
        "document.getElementById('method').selectedIndex = 3;"
        "document.getElementById('method').dispatchEvent(new Event('change'))"
    )
    assert page.run(legend).startswith("Push, TEPO: ")  # it shows what was chosen


@needs_browser
def test_a_token_shows_its_numbers_on_hover_focus_and_click(page):
    page.mouse(*page.place(f"{TOKENS}[1]"), "mouseMoved")
    numbers = tip(page)
    assert numbers["Advantage"] == "−0.125" and numbers["Ratio"] == "1.01"
    assert numbers["Entropy (nats)"] == "0.75" and numbers["Probability"] == "0.5"
    assert numbers["push, GRPO (this run)"].startswith("−0.097") and len(numbers) == 12
    assert text(page, "tip").startswith('"\\n" token 1 of 2, wrong')
    page.mouse(2, 2, "mouseMoved")
    page.press("j")
    assert tip(page) is None
    label = "document.activeElement.getAttribute('aria-label')"
    assert page.run(label) == "Completion 1, right, 1 token, reward 1"
    assert page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.press("j")
    assert page.run(label) == "Completion 2, wrong, 2 tokens, reward 0"
    page.press("l", "l")
    assert text(page, "tip").startswith('"<b>8</b>" token 2 of 2')
    page.press("h")
    assert text(page, "tip").startswith('"\\n" token 1 of 2')
    page.press("Escape")
    assert tip(page) is None
    page.press("k")
    assert page.run(label) == "Completion 1, right, 1 token, reward 1"
    page.click(f"{TOKENS}[3]")
    assert text(page, "tip").startswith('"$" token 1 of 1, wrong')
    page.mouse(2, 2, "mouseMoved")
    page.press("ArrowLeft")  # the numbers of what is no longer shown go
    assert tip(page) is None and text(page, "step") == "Step 10"


@needs_browser
def test_search(page):
    page.press("/")
    assert page.run("document.activeElement.id") == "search"
    page.press(*"<B>8", "1")  # in the search a digit is no shading
    assert text(page, "count") == "not found"
    page.run("document.getElementById('search').value = ''")
    page.press(*"<b>8")
    assert text(page, "count") == "found 3 times at 3 steps"
    found = page.run("[...document.querySelectorAll('#found button')].map(e => e.textContent)")
    assert found == [f"step {step}, wrong: \n<b>8</b>" for step in STEPS]
    assert page.run("document.querySelector('#found mark').textContent") == "<b>8"
    page.press("Enter")
    assert text(page, "step") == "Step 1"
    inside = "document.activeElement.querySelector('.tokens').textContent"
    assert page.run(inside) == "↵\n<b>8</b>"
    page.press("/")
    page.run("document.getElementById('search').value = ''")
    page.press(*"held")
    assert "held-out" in text(page, "found")
    page.press("Escape", "1")
    assert page.run("document.activeElement.tagName") == "BODY"
    assert page.run("document.getElementById('search').value") in ("held", "")


@needs_browser
def test_the_same_problem_through_training(page):
    names = "[...document.getElementById('problem').options].map(e => e.textContent)"
    assert page.run(names) == ["Held-out: Held out?", "Training: Met thrice?"]
    titles = "[...document.querySelectorAll('#through h3')].map(e => e.textContent)"
    assert page.run(titles) == ["Step 0", "Step 10", "Step 20"]
    assert "1 · wrong · 2 tokens" in text(page, "through")
    here = "document.querySelector('#through .here h3').textContent"
    assert page.run(here) == "Step 20"
    page.press("ArrowLeft", "ArrowLeft")
    assert page.run(here) == "Step 0"  # the last one up to step 1
    style = "document.querySelector('#through .token').style.backgroundColor"
    assert page.run(style) == ""
    page.press("4")
    assert "--amount" in page.run(style)
    page.run(
        "document.getElementById('problem').selectedIndex = 1;"
        "document.getElementById('problem').dispatchEvent(new Event('change'))"
    )
    assert page.run(titles) == ["Step 1", "Step 10", "Step 20"]
    assert text(page, "through").count("same") == 3


@needs_browser
def test_help_and_themes(page):
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.run(background) == "rgb(255, 255, 255)"
    page.press("?")
    assert page.run("document.getElementById('help').open")
    page.press("ArrowLeft")
    assert text(page, "step") == "Step 20"  # keys rest while the help is open
    page.press("Escape")
    assert not page.run("document.getElementById('help').open")
    page.click("document.getElementById('theme')")
    assert page.run(background) == "rgb(21, 24, 28)" and text(page, "theme") == "Light"
    page.click("document.getElementById('theme')")
    assert page.run(background) == "rgb(255, 255, 255)"


@needs_browser
@pytest.mark.parametrize("name", ["plain", "hostile"])
def test_on_a_phone_in_dark_mode(page, runs, name):
    """390 px: nothing is wider than the screen, whatever the completions hold."""
    page.resize(390, 844)
    page.colours("dark")
    page.open(runs[name])
    assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)"
    assert text(page, "theme") == "Light"
    assert page.run("document.documentElement.scrollWidth") == 390
    page.click(f"{TOKENS}[0]")
    box = page.run("document.getElementById('tip').getBoundingClientRect().toJSON()")
    assert tip(page) and box["left"] == 0 and box["right"] == 390 and box["bottom"] == 844


@needs_browser
def test_hostile_completions_in_the_browser(page, runs):
    """They are seen as text, at every step, under every shading and method, and in the search."""
    page.open(runs["hostile"])
    tags = "document.querySelectorAll('img, iframe, main script, main b, main i').length"
    for key in "12345mmmmmmm":
        page.press(key)
    for _ in range(3):
        assert page.run(tags) == 0 and page.run("document.scripts.length") == 2
        page.press("ArrowLeft")
    page.press("ArrowRight", "ArrowRight", "ArrowRight")
    shown = page.run(f"{TOKENS}.map(e => e.textContent)")
    assert HOSTILE[0] in shown and "__DATA__" in shown and "x" * 20_000 in shown
    assert "\\u{202e}reversed\\u{2066} \\u{200f}" in shown
    assert "\\u{0}\\u{1b}[31mred\\u{7f}" in shown
    assert "\\u{d800} \\u{2028}\\u{2029}\\u{feff}" in shown and "a↵\n→\tb↵" in shown
    assert HOSTILE[0] in text(page, "about")
    page.press("/", *"onerror=")
    assert "onerror=alert(1)" in text(page, "found")
    page.press("Enter")
    for _ in HOSTILE:
        page.press("j", "l")
        assert tip(page)
    assert page.run(tags) == 0
    assert page.run("getComputedStyle(document.querySelector('.token')).unicodeBidi") == "isolate"
