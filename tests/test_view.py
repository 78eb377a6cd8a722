"""view.py: the numbers of the page, hostile completions, errors; and the page in a real browser.

The browser is a headless Chromium (browser.py). Without one these tests are skipped.
"""

import json
import math
import os
import re
import sys
import time
from html.parser import HTMLParser

import browser
import pytest
from conftest import ROOT
from small import change, write

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
OPTIONS = {
    "algo": "grpo",
    "preset": "tiny",
    "seed": 3,
    "model": "tiny",
    "data": "tiny",
    "option": {},
}
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


def write_run(folder, rows, held_out=(), **options):
    """A run's folder with these samples, three evaluations and twenty steps of a second each."""
    folder.mkdir(parents=True)
    config = {"options": OPTIONS | options, "status": "done", "versions": {"torch": "2.0"}}
    (folder / "config.json").write_text(json.dumps(config))
    metrics = []
    for step in range(21):
        metrics.append({"phase": "train", "step": step, "accuracy": step / 40})
        metrics[-1] |= {"entropy": 1 - step / 20, "length": 10.0 + step, "kl": step % 2}
        metrics[-1] |= {"reward/form": 0.5, "rollout_s": 2.0, "update_s": 1.0}
    metrics[5]["entropy"] = None
    for step in (0, 10, 20):
        metrics.append({"phase": "eval", "step": step, "accuracy": 0.25, "n": 50})
        metrics[-1] |= {"ci95": [0.15, 0.387]}
    write(folder / "metrics.jsonl", metrics)
    write(folder / "samples.jsonl", rows)
    if held_out:
        write(folder / "held_out.jsonl", held_out)
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


def page_of(run, *words):
    """What the page of a run's folder shows of it."""
    view.main([str(run), *words])
    return data_of(run / "samples.html")["runs"][0]


def names(data):
    return [method["name"] for method in data["methods"]]


# The numbers


def test_numbers_of_a_group(tmp_path, capsys):
    """Worked by hand. The rewards are 1, 0, 0: mean 1/3, std with Bessel's correction 0.57735.

    So A = (2/3, -1/3, -1/3) / 0.57745, and on policy the push is A / (3 |o_i|) under GRPO and
    A / 4 under DAPO. The ratio of the second row is exp(0.01), which multiplies its push.
    """
    run = write_run(tmp_path / "run", groups())
    data = page_of(run)
    assert f"{run / 'samples.html'}: groups of 3 steps, 0.0 MB" in capsys.readouterr().out
    assert data["name"] == "run" and data["notes"] == []
    assert names(data) == "GRPO (this run),DAPO,GSPO,TEPO,GTPO,GRPO-S,TR-GRPO".split(",")
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
    keys = {"step", "accuracy", "entropy", "length", "kl", "reward/form", "seconds"}
    assert keys <= data["curves"]["train"].keys() and "kl" not in data["curves"]["eval"]


def test_the_summary_says_what_a_report_needs(tmp_path):
    """Three seconds a step, 21 steps; the options are those that differ from the preset."""
    more = {"updates": 16, "option": {"eps_low": 0.1}, "prompt": 'a "b"\n{question}'}
    run = write_run(tmp_path / "run", groups(), device="cpu", skip_bad_rows=True, **more)
    interval = "(95%: 0.150 to 0.387; greedy, 50 held-out problems)"
    assert page_of(run)["summary"] == {
        "method": "GRPO",
        "model": "tiny",
        "data": "tiny",
        "options": "--preset tiny --skip-bad-rows --steps 20 --seed 3 "
        r'--prompt "a \"b\"\n{question}" --group-size 3 --updates 16 --option eps_low=0.1',
        "accuracy at the start": f"0.250 at step 0 {interval}",
        "accuracy at the end": f"0.250 at step 20 {interval}",
        "time": "1.1 minutes of sampling and updates; 20 of 20 steps, done",
        "versions": "torch 2.0",
        "machine": "cpu",
    }


@pytest.mark.parametrize("kept", [(), ("train",), ("eval",)])
def test_a_run_without_evaluations_or_training_steps_has_a_page(tmp_path, kept):
    run = write_run(tmp_path / "run", groups())
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines = [line for line in lines if json.loads(line)["phase"] in kept]
    (run / "metrics.jsonl").write_text("".join(lines))
    data = page_of(run)
    found = [phase for phase in ("train", "eval") if data["curves"][phase].pop("step")]
    assert found == list(kept) and len(data["groups"]) == len(STEPS)


def test_the_method_of_the_run_has_its_options_and_the_seven_their_defaults(tmp_path):
    """GSPO's own clip 0.001 takes the right row, whose ratio is 1.0002; its default 3e-4 and more
    does not take it. A KL term, and a method of more/.
    """
    rows = [row(1, ["a"], True, 2e-3), row(1, ["b"], False)]
    narrow = {"algo": "gspo", "option": {"eps_low": 0.5, "eps_high": 1e-3}}
    data = page_of(write_run(tmp_path / "narrow", rows, **narrow))
    assert names(data)[0] == "GSPO (this run, eps_low = 0.5, eps_high = 0.001)"
    assert names(data)[3] == "GSPO"
    right, wrong = data["groups"][0]["completions"]
    assert right["clipped"][0] == [0] and right["push"][0] == 0 and wrong["push"][0] < 0
    assert right["clipped"][3] == [0]  # 2e-3 is above GSPO's default 4e-4, too
    data = page_of(write_run(tmp_path / "kl", rows, option={"beta": 0.1}))
    assert names(data)[0] == "GRPO (this run)"
    assert "without its KL term" in data["methods"][0]["note"]
    data = page_of(write_run(tmp_path / "more", rows, algo="cispo"))
    assert names(data)[0] == "CISPO (this run)" and len(data["methods"]) == 8


def test_a_file_of_a_stranger_is_not_run(tmp_path, capsys):
    """config.json may come from somebody else, and name a file that is on this machine."""
    trap = tmp_path / "trap.py"
    trap.write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    data = page_of(write_run(tmp_path / "run", groups(), algo=str(trap)), "--algos", "grpo")
    assert "runs it only if --algos names it" in capsys.readouterr().out
    assert not (tmp_path / "sprung").exists()
    assert data["summary"]["method"] == "trap" and names(data) == ["GRPO"]
    data = page_of(write_run(tmp_path / "gone", groups(), algo="zzz"), "--algos", "grpo")
    assert "This version has no method zzz, the run's own" in capsys.readouterr().out
    assert data["summary"]["method"] == "zzz" and names(data) == ["GRPO"]


def test_a_file_that_is_named_runs_with_the_options_of_the_run(tmp_path):
    """A copy of dapo.py; the right row's ratio 1.1 is clipped only with the run's eps_high."""
    mine, ours = tmp_path / "mine.py", tmp_path / "grpo.py"
    mine.write_text((ROOT / "dapo.py").read_text())
    rows = [row(1, ["a"], True, math.log(1.1)), row(1, ["b"], False)]
    run = write_run(tmp_path / "run", rows, algo=str(mine), option={"eps_high": 0.05})
    data = page_of(run, "--algos", f"{mine},grpo")
    assert names(data) == ["mine (this run, eps_high = 0.05)", "GRPO", "mine"]
    assert data["groups"][0]["completions"][0]["clipped"] == [[0], [], []]
    ours.write_text((ROOT / "grpo.py").read_text())  # it has the name of one of ours
    data = page_of(write_run(tmp_path / "2", rows, algo=str(ours)), "--algos", f"grpo,{ours}")
    assert names(data) == ["grpo.py (this run)", "GRPO"]


def test_rows_that_are_not_complete_have_no_push(tmp_path):
    """Rows of a skipped update with numbers that are not finite, and an older file's rows."""
    bad = row(20, ["a", "b"], True, skipped=True)
    bad["logprobs"] = [None, float("nan")]
    old = row(10, ["a"], True)
    del old["advantages"], old["right"], old["answer"], old["completion"]
    rows = [old, row(10, ["b"], False), row(20, ["c"], True), bad]
    rows += [row(30, [], True), row(30, [], False)]
    first, second, third, empty = page_of(write_run(tmp_path / "run", rows))["groups"]
    assert first["completions"][0]["right"] is True and first["completions"][0]["text"] == "a"
    assert first["completions"][0]["advantage"] is None and first["completions"][0]["push"][0] > 0
    assert "push" not in second["completions"][0] and not second["skipped"]  # no group of one
    assert third["skipped"] and "push" not in third["completions"][0]
    assert third["completions"][0]["ratio"] is None
    assert all("push" not in found for found in empty["completions"])  # no tokens


def test_a_large_run_is_thinned_out_evenly_and_that_is_said(tmp_path, monkeypatch, capsys):
    rows = []
    for step in range(1, 42):
        rows += [row(step, ["a"] * 50, True), row(step, ["b"] * 50, False)]
    run = write_run(tmp_path / "run", rows)
    monkeypatch.setattr(view, "BUDGET", 60_000)
    data = page_of(run)
    said = "Thinned out to keep the page below 5 MB: groups of "
    printed = capsys.readouterr().out
    assert len(data["notes"]) == 1 and data["notes"][0].startswith(said) and said in printed
    steps = [group["step"] for group in data["groups"]]
    gaps = {later - step for step, later in zip(steps, steps[1:], strict=False)}
    assert 3 < len(steps) < 41 and steps[0] == 1 and steps[-1] == 41
    assert max(gaps) - min(gaps) <= 1
    size = sum(len(view.json_text(group)) for group in data["groups"])
    assert 30_000 < size <= 60_000 and f"of {len(steps)} of the 41 recorded" in printed
    monkeypatch.setattr(view, "BUDGET", 10)
    assert [group["step"] for group in page_of(run)["groups"]] == [41]  # one stays in any case


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
    data = page_of(run)
    page = (run / "samples.html").read_text(encoding="utf-8")
    template = view.TEMPLATE.read_text(encoding="utf-8")
    assert template.count("__DATA__") == 1
    assert Tags(page).found == Tags(template).found
    assert page.isascii() or not any(c in page for c in "\u2028\u202e\x00")
    tokens = [c["tokens"][0] for group in data["groups"] for c in group["completions"]]
    assert set(HOSTILE) <= set(tokens) and data["summary"]["model"] == HOSTILE[0]
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

    monkeypatch.setattr("os.replace", fail)
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
    "reward": GOOD | {"reward": None},
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
        ("good bare good", "at most two runs stand side by side"),
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


def test_a_page_is_written_again_while_the_run_goes_on(tmp_path, monkeypatch, capsys):
    """... whenever it has new lines; at the end once more, without the reloading."""
    run = write_run(tmp_path / "run", groups())
    samples = (run / "samples.jsonl").rename(run / "later")
    change(run / "config.json", status="running")
    page, seen = run / "samples.html", []

    def wait(seconds):
        seen.append(data_of(page)["reload"] if page.exists() else "no page")
        assert seconds == view.WAIT
        if len(seen) == 1:
            samples.rename(run / "samples.jsonl")
        if len(seen) != 2:
            os.utime(run / "metrics.jsonl", (len(seen), 9))
        if len(seen) == 4:
            change(run / "config.json", status="done")

    monkeypatch.setattr(view.time, "sleep", wait)
    view.main(["--watch", str(run)])
    assert seen == ["no page", 10, 10, 10] and data_of(page)["reload"] is None
    out = capsys.readouterr().out
    assert "no such file; waiting for more" in out and out.count(": written") == 1
    change(run / "config.json", status="running")

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(view.time, "sleep", interrupt)
    view.main(["--watch", str(run)])
    assert data_of(page)["reload"] is None


def test_two_runs_of_one_name_are_told_apart(tmp_path, monkeypatch):
    """And the page needs no matplotlib."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    runs = [write_run(tmp_path / name / "run", groups()) for name in "ab"]
    view.main([str(run) for run in runs])
    found = data_of(runs[0] / "beside-run.html")["runs"]
    assert [run["name"] for run in found] == [str(run) for run in runs]


# In a browser

TOKENS = "[...document.querySelectorAll('#groups .token')]"
LEGEND = "document.querySelector('.legend').textContent"
needs_browser = pytest.mark.skipif(
    browser.find() is None, reason=f"no browser: none of {', '.join(browser.NAMES)} is installed"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Pages: of plain completions; of hostile ones; of a group that is all wrong; of two runs."""
    folder = tmp_path_factory.mktemp("runs")
    rows = groups(("7", "\n", "<b>8</b>", "$"))
    rows += [row(step, ["same"], step > 1, prompt="Met thrice?") for step in STEPS]
    held_out = [row(s, ["####", f" {s}"], s > 5, prompt="Held out?") for s in (0, 10, 20)]
    plain = write_run(folder / "plain", rows, held_out)
    wrong = [row(1, ["\n"] * 96, False), row(1, ["\n\n\n", "x"], False)]
    wrong += [row(1, ["4", "2"], False)] * 3 + [row(1, ["a\n"] * 96, False)]
    wrong = write_run(folder / "wrong", wrong, algo="dapo", option={"eps_high": 0.5})
    hostile = hostile_run(folder / "hostile")
    pages = {"plain": [plain], "wrong": [wrong], "hostile": [hostile], "two": [plain, wrong]}
    for name, found in pages.items():
        view.main([*map(str, found), "--out", str(folder / f"{name}.html")])
    data = data_of(folder / "plain.html") | {"reload": 7}
    view.write_page(data, folder / "again.html")
    return {name: (folder / f"{name}.html").as_uri() for name in (*pages, "again")}


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
    tab.open("about:blank")
    tab.open(runs["plain"])
    yield tab
    tab.settle()
    assert tab.complaints() == []
    urls = [url for url in tab.requests() if url != "about:blank"]
    assert urls and all(url.startswith("file:") for url in urls)


def text(page, name):
    return page.run(f"document.getElementById('{name}').textContent")


def texts(page, selector):
    return page.run(f"[...document.querySelectorAll({selector!r})].map(e => e.textContent)")


def choose(page, element, value):
    """Choose in a <select>, or type into an <input>, as a user does."""
    page.run(f"{element}.value = {value!r}; {element}.dispatchEvent(new Event('change'))")


def tip(page):
    """The numbers of the token that is shown: {name: text}; None if there are none."""
    return page.run(
        "document.getElementById('tip').hidden ? null : Object.fromEntries("
        "[...document.querySelectorAll('#tip dt')].map(t => [t.textContent, "
        "t.nextSibling.textContent]))"
    )


@needs_browser
def test_page_shows_the_run_and_its_summary_can_be_copied(page):
    assert text(page, "title") == page.run("document.title") == "plain"
    assert texts(page, "#groups h3") == ["Right: 1 of 3", "Wrong: 2 of 3", "Right: 1 of 1"]
    assert texts(page, "#groups .token") == ["7", "↵", "<b>8</b>", "$", "same"]
    assert "GRPO" in text(page, "summary") and text(page, "step") == "Step 20"
    page.run("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    page.click("document.getElementById('copy')")
    copied = page.run("window.copied").split("\n")
    assert copied[:3] == ["| run | plain |", "| --- | --- |", "| method | GRPO |"]
    assert "| options | --preset tiny --steps 20 --seed 3 --group-size 3 |" in copied
    assert text(page, "copy") == "Copied"


@needs_browser
def test_steps_by_keys_by_slider_by_buttons_and_in_a_chart_stand_in_the_address(page):
    def is_at(step):
        return (text(page, "step"), page.run("location.hash")) == (f"Step {step}", f"#step={step}")

    assert is_at(20)
    page.press("ArrowLeft")
    assert is_at(10)
    page.press("ArrowLeft", "ArrowLeft", "ArrowLeft")
    assert is_at(1)
    page.click("document.getElementById('after')")
    assert is_at(10)
    page.run("document.getElementById('slider').focus()")
    page.press("ArrowRight")  # the slider's own key: one step, not two
    assert is_at(20)
    page.mouse(*page.place("document.querySelectorAll('svg')[1]", 0.2), "mousePressed")
    assert is_at(1)
    x, y = page.place("document.querySelectorAll('svg')[1]", 0.55)
    held = {"button": "left", "buttons": 1}
    page.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y, **held)  # drag
    page.mouse(x, y, "mouseReleased")
    page.settle()
    assert is_at(10)
    captions = texts(page, "figcaption")
    assert "0.25 at step 10 (95%: 0.15 to 0.387, n = 50)" in captions[0]
    assert captions[2] == "line: training, 20 at step 10"
    cursor = "[...document.querySelectorAll('.cursor')].map(e => e.getAttribute('x1'))"
    assert len(set(page.run(cursor))) == 1
    url = page.run("location.href")
    page.open("about:blank")
    page.open(url)  # a link
    assert is_at(10)
    page.open("about:blank")
    page.open(url.replace("=10", "=3&shade=2&chart1=kl"))  # the nearest recorded step
    assert text(page, "step") == "Step 1" and page.run(LEGEND).startswith("Entropy: ")
    assert "training, 0 at step 1" not in texts(page, "figcaption")[1]
    assert texts(page, "figcaption")[1] == "line: training, 1 at step 1"


@needs_browser
def test_any_metric_can_be_picked_and_smoothed(page):
    """kl is 0, 1, 0, ...: of 5 steps around step 10 the mean is 2/5."""
    select = "document.querySelectorAll('figure select')[1]"
    names = page.run(f"[...{select}.options].map(e => e.value)")
    more = {"kl", "reward/form", "rollout_s", "update_s", "seconds"}
    assert names[:3] == ["accuracy", "entropy", "length"] and set(names[3:]) == more
    assert page.run(f"{select}.selectedOptions[0].textContent") == "Entropy [nats per token]"
    choose(page, select, "kl")
    line = "document.querySelectorAll('figure')[1].querySelector('{}').getAttribute('d')"
    heights = [float(pair.split()[1]) for pair in page.run(line.format(".line"))[1:].split("L")]
    raw = [float(pair.split()[1]) for pair in page.run(line.format(".raw"))[1:].split("L")]
    share = (raw[0] - heights[10]) / (raw[0] - raw[1])  # raw: from 0 to 1
    assert len(raw) == 21 and share == pytest.approx(0.4, abs=0.005)
    choose(page, "document.getElementById('smooth')", "1")
    assert page.run(line.format(".line")) == page.run(line.format(".raw"))
    assert page.run("location.hash") == "#step=20&chart1=kl&smooth=1"


@needs_browser
def test_shadings_methods_and_their_scale(page):
    """Colours of the tokens 7 (right), newline and 8 (wrong), and what the legend says.

    Under DAPO each token of the group weighs the same.
    """
    style = f"{TOKENS}.slice(0, 3).map(e => e.style.backgroundColor)"
    seven, newline, eight = page.run(style)
    assert "--up" in seven and "70.0%" in seven and "--down" in newline and newline == eight
    assert page.run(LEGEND).startswith("Push, GRPO (this run): −0.38480.3848here from −0.1924")
    for key, start in (
        ("2", "Advantage: −0.250.25here from −0.125 to 0.25"),
        ("3", "Entropy: 00.85 natshere from 0.75 to 0.85 nats"),
        ("4", "Probability: 01here from 0.5 to 0.5"),
        ("5", "Ratio: 0.99011.01here from 1 to 1.01"),
    ):
        page.press(key)
        assert page.run(LEGEND) == start
        button = f"document.querySelector('#shades :nth-child({key})')"
        assert page.run(f"{button}.getAttribute('aria-pressed')") == "true"
    seven, newline, _ = page.run(style)
    assert seven == "" and "--up" in newline and "70.0%" in newline  # of the ratio
    page.click("document.querySelector('#shades :nth-child(4)')")
    assert "35.0%" in page.run(style)[0] and "--amount" in page.run(style)[0]
    page.press("m")
    assert page.run(LEGEND).startswith("Push, DAPO: −0.28860.2886here from −0.1458 to 0.2886")
    page.press("3")
    method = "document.getElementById('method')"
    assert page.run(f"{method}.options.length") == 7
    choose(page, method, "TEPO")
    assert page.run(LEGEND).startswith("Push, TEPO: ") and "TEPO: " in text(page, "meaning")


@needs_browser
def test_a_token_shows_its_numbers_on_hover_focus_and_click(page):
    page.mouse(*page.place(f"{TOKENS}[1]"), "mouseMoved")
    numbers = tip(page)
    assert numbers["Advantage"] == "−0.125" and numbers["Ratio"] == "1.01"
    assert numbers["Entropy"] == "0.75" and numbers["Probability"] == "0.5"
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
    page.press("h", "Escape")
    assert tip(page) is None
    page.press("k")
    assert page.run(label) == "Completion 1, right, 1 token, reward 1"
    page.click(f"{TOKENS}[3]")
    assert text(page, "tip").startswith('"$" token 1 of 1, wrong')
    page.mouse(2, 2, "mouseMoved")
    page.press("ArrowLeft")  # the numbers of what is no longer shown go
    assert tip(page) is None and text(page, "step") == "Step 10"


@needs_browser
def test_a_chosen_search_result_is_marked_and_its_words_on_the_page(page):
    search = "document.getElementById('search')"
    page.press("/")
    page.press(*"<B>8", "1")  # in the search a digit is no shading
    assert (
        page.run("document.activeElement.id") == "search" and text(page, "count") == "found 0 times"
    )
    page.run(f"{search}.value = ''")
    page.press(*"<b>8")
    assert text(page, "count") == "found 3 times"
    assert texts(page, "#found button") == [f"step {step}, wrong: \n<b>8</b>" for step in STEPS]
    assert texts(page, "#found mark") == ["<b>8"] * 3 and texts(page, ".hit") == []
    page.press("Enter")
    assert text(page, "step") == "Step 1"
    assert texts(page, ".hit") == ["<b>8</b>"] and texts(page, ".chosen .tokens") == ["↵\n<b>8</b>"]
    assert texts(page, "#found [aria-current]") == ["step 1, wrong: \n<b>8</b>"]
    assert page.run("document.activeElement.className") == "completion chosen"
    page.click("document.querySelectorAll('#found button')[2]")
    assert text(page, "step") == "Step 20"
    assert texts(page, "#found [aria-current]") == ["step 20, wrong: \n<b>8</b>"]
    page.run(f"{search}.value = ''")
    page.press("/", *"held")
    assert "held-out, prompt" in text(page, "found") and texts(page, ".hit") == ["<b>8</b>"]
    page.press("Enter")
    assert texts(page, ".prompt mark") == ["Held"] and texts(page, ".hit") == []
    page.press("/", "Escape", "1")
    assert page.run("document.activeElement.tagName") == "BODY"


@needs_browser
def test_the_same_problem_through_training(page):
    assert texts(page, "#problem option") == ["Held-out: Held out?", "Training: Met thrice?"]
    assert texts(page, ".through h3") == ["Step 0", "Step 10", "Step 20"]
    assert "1 · wrong · 2 tokens" in text(page, "shared")
    assert texts(page, ".here h3") == ["Step 20"]
    page.press("ArrowLeft", "ArrowLeft")
    assert texts(page, ".here h3") == ["Step 0"]  # the last one up to step 1
    style = "document.querySelector('.through .token').style.backgroundColor"
    assert page.run(style) == ""
    page.press("4")
    assert "--amount" in page.run(style)
    choose(page, "document.getElementById('problem')", "Training: Met thrice?")
    assert texts(page, ".through h3") == ["Step 1", "Step 10", "Step 20"]
    assert texts(page, ".through .token") == ["same"] * 3


@needs_browser
def test_equal_completions_are_one_card_and_a_wrong_group_is_wide_and_low(page, runs):
    page.open(runs["wrong"])
    assert texts(page, "#groups h3") == ["Wrong: 6 of 6"]
    cards = texts(page, "article > .quiet")
    equal = "3, 4, 5 · wrong · 2 tokens · reward 0 · 3 equal ones, with the numbers of the first"
    assert len(cards) == 4 and equal in cards
    assert texts(page, "#groups .token")[96:98] == ["↵↵↵", "x"]
    boxes = page.run(
        "[...document.querySelectorAll('article')].map(e => e.getBoundingClientRect().toJSON())"
    )
    assert max(box["right"] for box in boxes) > 1200  # two columns of cards
    assert boxes[0]["height"] < 200  # 96 newlines: two lines
    assert page.run("document.documentElement.scrollHeight") < 1800


@needs_browser
def test_two_runs_stand_side_by_side(page, runs):
    page.open(runs["two"])
    assert page.run("document.title") == "plain beside wrong"
    assert texts(page, "#summary tr:first-child td") == ["plain ", "wrong "]
    assert texts(page, "#summary tr:nth-child(2) td") == ["GRPO", "DAPO"]
    assert "wrong recorded nothing at step 20" in texts(page, "#groups h2")
    page.press("ArrowLeft", "ArrowLeft")
    boxes = page.run("[...document.querySelectorAll('#groups > div')].map(e => e.offsetLeft)")
    assert boxes[0] < boxes[1] and len(texts(page, "svg .line")) == 6
    legends = "[...document.querySelectorAll('#groups .legend')].map(e => e.textContent)"
    assert page.run(legends)[0].startswith("Push, GRPO (this run): ")
    assert page.run(legends)[2].startswith("Push, DAPO (this run, eps_high = 0.5): 0 for every")
    assert texts(page, "#method option")[:3] == ["each run's own method", "DAPO", "GSPO"]
    choose(page, "document.getElementById('method')", "DAPO")
    assert [legend.split(":")[0] for legend in page.run(legends)[::2]] == ["Push, DAPO"] * 2
    choose(page, "document.getElementById('method')", "GRPO")  # GRPO is the first run's own
    assert page.run(legends)[0].startswith("Push, GRPO (this run): ")


@needs_browser
def test_a_page_of_a_run_that_goes_on_reloads_itself_and_follows_it(page, runs):
    """The timer is called by hand."""
    timer = "window.setInterval = (call, wait) => { window.timer = call; window.wait = wait; }"
    added = page.send("Page.addScriptToEvaluateOnNewDocument", source=timer)
    page.open(runs["again"])
    assert page.run("location.hash") == "#step=last" and page.run("wait") == 7000
    page.press("4", "j")
    page.run("timer()")  # nothing while a completion is being read
    page.settle()
    assert page.run("document.activeElement.className") == "completion"
    page.run("document.activeElement.blur()")
    seen = len(page.events)
    page.run("setTimeout(timer)")
    while not any(e.get("method") == "Page.loadEventFired" for e in page.events[seen:]):
        page.events.append(page.receive(time.monotonic() + browser.PATIENCE))
    assert page.run("location.hash") == "#step=last&shade=3"
    assert text(page, "step") == "Step 20" and page.run(LEGEND).startswith("Probability")
    page.send("Page.removeScriptToEvaluateOnNewDocument", **added)


@needs_browser
@pytest.mark.parametrize("name", ["plain", "hostile", "two"])
def test_on_a_phone_in_dark_mode(page, runs, name):
    """390 px: nothing is wider than the screen, whatever the completions hold."""
    page.resize(390, 844)
    page.colours("dark")
    page.open(runs[name])
    assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)"
    assert page.run("document.documentElement.scrollWidth") == 390
    if name != "two":
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
    shown = texts(page, "#groups .token")
    assert HOSTILE[0] in shown and "__DATA__" in shown and "x" * 20_000 in shown
    assert "\\u{202e}reversed\\u{2066} \\u{200f}" in shown
    assert "\\u{0}\\u{1b}[31mred\\u{7f}" in shown
    assert "\\u{d800} \\u{2028}\\u{2029}\\u{feff}" in shown and "a↵\n→\tb↵" in shown
    assert HOSTILE[0] in text(page, "summary")
    page.press("/", *"onerror=")
    assert "onerror=alert(1)" in text(page, "found")
    page.press("Enter")
    for _ in HOSTILE:
        page.press("j", "l")
        assert tip(page)
    assert page.run(tags) == 0
    assert page.run("getComputedStyle(document.querySelector('.token')).unicodeBidi") == "isolate"
