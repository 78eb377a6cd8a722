"""symptoms.py: each limit from both sides, the committed runs, once per run, the page's table."""

import csv
import math
import re

import pytest
from conftest import ROOT
from small import WORDS, read, run

from run.symptoms import SYMPTOMS, WINDOW, Watch
from trainer import grading

HEALTHY = {
    "accuracy": 0.6,
    "entropy": 0.4,
    "zero_std": 0.3,
    "truncated": 0.0,
    "ratio_first_max": 0.0,
    "sampler_kl": 0.0,
    "prompts": 16,
}


def step(number, **values):
    return {"phase": "train", "step": number, **HEALTHY, **values}


def evaluation(number, strict, lenient):
    """At n = 500, where 0.3 has an interval up to 0.342."""
    line = {"phase": "eval", "step": number, "accuracy": strict, "accuracy_lenient": lenient}
    return {**line, "ci95": [strict - 0.04, strict + 0.042]}


def warnings(lines, dtype="fp32"):
    watch, said = Watch(dtype), []
    for line in lines:
        said += watch.see(line)
    return said


def name_of(warning):
    """The name of the symptom that a warning tells of."""
    for symptom in SYMPTOMS:
        pattern = re.sub(r"\\{.*?\\}", ".*", re.escape(symptom.text))
        if re.search(pattern, warning):
            return symptom.name
    raise AssertionError(warning)


def test_a_healthy_run_gives_no_warning():
    lines = [evaluation(0, 0.1, 0.1), *(step(i) for i in range(1, 40)), evaluation(39, 0.6, 0.65)]
    assert warnings(lines) == []


@pytest.mark.parametrize(
    ("name", "dtype", "within", "beyond"),
    [
        ("no signal", "fp32", {"zero_std": 0.9}, {"zero_std": 0.91}),
        ("cut off", "fp32", {"truncated": 0.3}, {"truncated": 0.31}),
        (
            "low entropy early",
            "fp32",
            {"entropy": 0.05, "accuracy": 0.2},
            {"entropy": 0.049, "accuracy": 0.2},
        ),
        (
            "low entropy early",
            "fp32",
            {"entropy": 0.01, "accuracy": 0.5},
            {"entropy": 0.01, "accuracy": 0.49},
        ),
        ("sampler differs", "fp32", {"sampler_kl": 1e-6}, {"sampler_kl": 1.1e-6}),
        ("sampler differs", "bf16", {"sampler_kl": 5e-3}, {"sampler_kl": 5.1e-3}),
        ("sampler differs", "bf16", {"sampler_kl": None}, {"sampler_kl": 1.0}),
    ],
)
def test_both_sides_of_a_limit_of_a_mean(name, dtype, within, beyond):
    """The warning comes with the fifth step, once."""
    assert warnings([step(i, **within) for i in range(1, 30)], dtype) == []
    assert warnings([step(i, **beyond) for i in range(1, WINDOW)], dtype) == []
    said = warnings([step(i, **beyond) for i in range(1, 30)], dtype)
    assert [name_of(text) for text in said] == [name]
    assert said[0].startswith("warning: step 5: ") and "\n" not in said[0]
    assert ("--dtype fp32" in said[0]) == (name == "sampler differs" and dtype == "bf16")


@pytest.mark.parametrize(
    ("dtype", "within", "beyond"), [("fp32", 9e-4, 1.1e-3), ("bf16", 0.019, 0.021)]
)
def test_both_sides_of_the_ratio(dtype, within, beyond):
    """One step is enough; nothing was run again in a step whose largest ratio is null."""
    usual = [step(1, ratio_first_max=None), step(2, ratio_first_max=within)]
    assert warnings(usual, dtype) == []
    said = warnings([*usual, step(3, ratio_first_max=beyond), step(4, ratio_first_max=1.0)], dtype)
    assert [name_of(text) for text in said] == ["ratio off 1"]
    assert said[0].startswith("warning: step 3: ") and f"{beyond:.2g}" in said[0]
    assert "nan" in warnings([step(1, ratio_first_max=math.nan)])[0]


def test_both_sides_of_strict_and_lenient():
    """A gap of more than 0.1, beyond the interval, after the start."""
    assert warnings([evaluation(0, 0.3, 0.6), evaluation(25, 0.3, 0.399)]) == []
    said = warnings([evaluation(25, 0.3, 0.41)])
    assert [name_of(text) for text in said] == ["right, but not marked"]
    assert "0.30" in said[0] and "0.41" in said[0] and "step 25" in said[0]
    few = {**evaluation(25, 0.3, 0.41), "ci95": [0.1, 0.6]}
    assert warnings([few]) == []


def test_both_sides_of_falling_accuracy():
    """By hand: with 16 prompts a mean of 5 steps of 0.5 has a standard error of 0.0559.

    Four of them are 0.2236, so 0.24 is below half of 0.5 and certain; with 11 prompts they are
    0.2697, and it is not. 0.25 is no less than half.
    """

    def run(now, prompts=16):
        lines = [step(i, accuracy=0.5, prompts=prompts) for i in range(1, 11)]
        return lines + [step(i, accuracy=now, prompts=prompts) for i in range(11, 16)]

    assert warnings(run(0.25)) == [] and warnings(run(0.24, prompts=11)) == []
    said = warnings(run(0.24))
    assert [name_of(text) for text in said] == ["accuracy falls"]
    assert "is 0.24" in said[0] and "been 0.50" in said[0] and "step 15" in said[0]


def committed(name):
    """{(algo, seed, settings): lines of metrics.jsonl} of a .csv in docs/. Steps of 16 prompts."""
    runs = {}
    with open(ROOT / "docs" / f"{name}.csv") as file:
        for row in csv.DictReader(file):
            numbers = {key: float(row[key]) for key in ("accuracy", "entropy") if row[key]}
            line = {"phase": row["phase"], "step": int(row["step"]), "prompts": 16, **numbers}
            runs.setdefault((row["algo"], row["seed"], row["settings"]), []).append(line)
    return runs


@pytest.mark.parametrize("name", ["methods", "more", "more-16", "off-policy", "eps"])
def test_no_committed_run_that_learns_gives_a_warning(name):
    for key, lines in committed(name).items():
        assert warnings(lines) == [], key


def test_the_committed_runs_that_break_give_one():
    """As symptoms.py counts them: 37 of the 42, and none of those with 1 update per rollout."""
    told = {"updates=1": 0, "updates=4": 0, "updates=16": 0}
    for (_, _, settings), lines in committed("stress").items():
        said = warnings(lines)
        assert [name_of(text) for text in said] in ([], ["accuracy falls"])
        told[settings] += len(said)
    assert told == {"updates=1": 0, "updates=4": 16, "updates=16": 21}


def test_a_resumed_run_does_not_warn_again():
    """Not even of a step after its checkpoint, which it makes again; but of what is new."""
    lines = [step(i, truncated=0.5) for i in range(1, 9)]
    first, second = Watch("fp32"), Watch("fp32")
    assert sum(len(first.see(line)) for line in lines) == 1
    second.catch_up(lines, 6)
    assert [line["step"] for line in second.steps] == [1, 2, 3, 4, 5, 6]
    assert second.see(lines[6]) == []
    assert len(second.see(step(8, ratio_first_max=0.5))) == 1


def test_a_run_prints_its_warning_once_also_across_a_resume(
    tmp_path, monkeypatch, capsys, quiet_run
):
    """No group has a signal; a torn line at the end of metrics.jsonl does not matter."""
    monkeypatch.setattr(grading, "correct", lambda *_: 1.0)
    words = "--samples-every 0 --save-every 3 --steps 7 --max-new-tokens 4".split()
    assert run(*WORDS, *words, "--out", tmp_path) == 0
    told = capsys.readouterr().out
    assert told.count("warning: step 5: 100% of the groups") == 1
    assert told.count("warning: ") == 1 + ("were cut off" in told)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"phase": "tr')
    assert run("--resume", tmp_path, "--steps", "9") == 0
    assert "warning: " not in capsys.readouterr().out
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == [0, *range(1, 10), 9]


def test_the_page_has_each_symptom_with_its_limit():
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    section = text.split("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| ")]
    table = {cells[0].strip(): cells for cells in rows if len(cells) == 4}
    for symptom in SYMPTOMS:
        limits = symptom.limit
        limits = limits.values() if isinstance(limits, dict) else [limits]
        when = table[symptom.name][1]
        for limit in limits:
            forms = f"{limit:g}", f"{limit:.0%}", f"{limit:.0e}".replace("e-0", "e-")
            assert any(form in when for form in forms), (symptom.name, when)
        assert all(cell.strip() for cell in table[symptom.name])
