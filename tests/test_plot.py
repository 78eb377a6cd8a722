"""run/runs.py, table.py, style.py, curves.py, plot.py and tools/credit.py: reading runs, averaging
seeds, the fit, the pushes. Pictures are whole, small and coloured.
"""

import json
import math
import subprocess
import sys
import time
from dataclasses import fields
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageColor

import plot
from run import curves, style
from run.algorithm import load_algorithm
from run.curves import plot_runs
from run.options import DEFAULTS, Options
from run.runs import COLUMNS, ORDER, read_csv, read_folder, read_runs
from run.style import STYLES
from run.table import average, differing, tabulate, write_csv
from tools import credit
from trainer.methods import ALGORITHMS, MORE, named

LIMIT = 300_000  # bytes, of a picture that is committed
STEPS = 12
CREDIT = str(ROOT / "docs" / "credit.jsonl")  # a group of TEPO


def write_run(folder, algo="tepo", seed=0, steps=STEPS, option=None, more=None, **options):
    """A run folder as train.py leaves it.

    Accuracy rises by (seed + 1) % per step, entropy falls; values are exact. more: of each step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    about = {"algo": algo, "seed": seed, "updates": 4, "steps": steps, "out": str(folder)}
    config = {**about, "option": option or {}, **options}
    (folder / "config.json").write_text(json.dumps({"options": config, "status": "done"}))
    rows = []
    for step in range(steps + 1):
        accuracy = 0.2 + 0.01 * (seed + 1) * step
        row = {"phase": "train", "step": step, "accuracy": accuracy, "entropy": 1 / (step + 1)}
        row |= {"length": 10.0 + step, "clip_frac": 0.0, "ratio_first": None}
        rows += [row | {"rollout_s": 1.5, "update_s": 0.5} | (more or {})] if step else []
        if step % 4 == 0:
            row = {"phase": "eval", "step": step, "accuracy": accuracy, "pass_at_k": 0.5, "k": 4}
            rows.append(row | {"ci95": [accuracy - 0.05, accuracy + 0.05], "n": 100})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_samples(folder, steps=(10,), drift=0.3):
    """samples.jsonl with one group of 4 per step, of which 2 are right, of ragged lengths.

    The two policies are further apart at later steps.
    """
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "samples.jsonl", "w") as file:
        for step in steps:
            for i, length in enumerate((5, 3, 7, 4)):
                old = -torch.rand(length, generator=generator).double()
                new = old + drift * step / 10 * torch.randn(length, generator=generator).double()
                tokens = ["1", "$2$", " +", "\n", "words", "####", "<eos>"][-length:]
                row = {"step": step, "prompt": "1+1? $x_", "tokens": tokens}
                row |= {"reward": float(i % 2 == 0)}
                row |= {"old_logprobs": old.tolist(), "logprobs": new.tolist()}
                row["entropy"] = torch.rand(length, generator=generator).tolist()
                file.write(json.dumps(row) + "\n")
    return folder


def change_lines(path, change):
    """Rewrite a .jsonl file: change(i, line) returns the new line i."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [change(i, line) for i, line in enumerate(lines)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path.parent


def check_picture(path, width, limit=LIMIT):
    """A whole PNG of that width in pixels, at most 300 kB; returns its colours."""
    assert path.stat().st_size <= limit
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG" and image.width == width
        colours = np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0).astype(int)
    assert not list(path.parent.glob(".*part*"))
    return colours


@pytest.fixture
def figures(monkeypatch):
    """The figures that would be saved."""
    found = []
    for module in (curves, credit, plot):
        monkeypatch.setattr(module, "save", lambda figure, out: found.append(figure))
    return found


def titles(figure):
    return [ax.get_title() for ax in figure.axes]


def names(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def groups(runs):
    """{variant: {algo: seeds}} of the table of some runs."""
    found = {}
    for (variant, algo), part in tabulate(runs).groupby(["variant", "algo"], observed=True):
        found.setdefault(variant, {})[algo] = sorted(set(part["seed"]))
    return found


# Reading


def test_bad_line_is_named_and_a_torn_last_one_left_out(tmp_path):
    folder = write_run(tmp_path / "a")
    whole = read_folder(folder)["rows"]
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"phase": "train", "step": 13, "accur')
    assert read_folder(folder)["rows"].equals(whole)
    lines = (folder / "metrics.jsonl").read_text().splitlines()[:-1]
    for bad in (
        '{"phase": "train"',
        "[1, 2]",
        '{"phase": "train", "accuracy": 1}',
        '{"phase": "nap", "step": 1}',
        '{"phase": "eval", "step": "x"}',
        '{"phase": "train", "step": 3, "kl": "high"}',
        '{"phase": "train", "step": -1}',
        '{"phase": "train", "step": 123456789012345678901234567890}',
    ):
        (folder / "metrics.jsonl").write_text("\n".join([*lines[:2], bad, *lines[2:]]) + "\n")
        with pytest.raises(ValueError, match="line 3 is not"):
            read_runs([folder])


def test_null_and_nan_are_gaps_and_any_number_is_a_metric(tmp_path):
    folder = write_run(tmp_path / "a", steps=0)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"phase": "train", "step": 1, "entropy": null, "length": NaN, "new": 3}\n')
        file.write('{"phase": "train", "step": 2, "entropy": 0.5, "reward/format": 1e999, ')
        file.write('"rollout_s": null, "update_s": 2.0, "completions": ["a"]}\n')
    rows = read_folder(folder)["rows"].astype(object).where(lambda x: x.notna(), None)
    assert rows["entropy"].tolist() == [None, None, 0.5] and set(rows["length"]) == {None}
    assert rows["seconds"].tolist() == [None, None, 2.0]
    assert rows["new"].tolist() == [None, 3, None] and set(rows["reward/format"]) == {None}
    assert "completions" not in rows


def test_csv_gives_the_runs_back(tmp_path):
    """... with any text in their settings, and the parts of a reward."""
    text, extra = '{question}; a = "b", [c]\nd', {"kl": 1e-5, "reward/x": 0.25}
    write_run(tmp_path / "r" / "4", prompt=text, more=extra)
    write_run(tmp_path / "r" / "16", updates=16, prompt="{question} = é;")
    write_run(tmp_path / "r" / "e", "gspo", seed=2, option={"eps_low": 3e-4})
    runs = read_runs([tmp_path / "r"])
    write_csv(runs, tmp_path / "metrics.csv")
    again = read_csv(tmp_path / "metrics.csv")
    settings = [{"updates": 16, "prompt": "{question} = é;"}, {"updates": 4, "prompt": text}]
    assert [run["settings"] for run in again] == [*settings, {"updates": 4}]
    for before, after in zip(runs, again, strict=True):
        assert (before["algo"], before["seed"]) == (after["algo"], after["seed"])
        assert (before["rows"][["phase", "step"]] == after["rows"][["phase", "step"]]).all(
            axis=None
        )
        for name in (*COLUMNS, "kl", "reward/x"):
            want = before["rows"].get(name, np.full(len(before["rows"]), np.nan))
            np.testing.assert_allclose(after["rows"][name], want, rtol=1e-3)


def test_older_and_bad_csv(tmp_path):
    path = tmp_path / "metrics.csv"
    head = "algo,seed,settings,phase,step,accuracy\n"
    path.write_text(head + 'tepo,3,eps_low=0.2;prompt="x",train,1,0.5\n\ntepo,3,,train,1,\n')
    old, bare = read_csv(path)
    assert old["settings"] == {"eps_low": 0.2, "prompt": "x"} and bare["settings"] == {}
    assert (old["algo"], old["seed"], old["rows"]["accuracy"][0]) == ("tepo", 3, 0.5)
    assert bare["rows"][["accuracy", "length"]].isna().all(axis=None)
    good = path.read_text()
    for bad in ("tepo,3,,train,1,high", "tepo,zero,,train,1,", "tepo,3,,train,1,1,1", "tepo,3,,tr"):
        path.write_text(good + bad + "\n")
        with pytest.raises(ValueError, match="line 5 is not"):  # the blank line is counted
            read_csv(path)
    path.write_text(head)
    with pytest.raises(ValueError, match="no metrics"):
        read_runs([path])


def test_a_log_of_minimal_py_is_a_run(tmp_path, figures):
    about = {"algo": "tepo", "seed": 3}
    lines = [{**about, "step": 0, "phase": "eval", "accuracy": 0.1, "ci95": [0, 0.2], "n": 9}]
    for step in (1, 2):
        metrics = {"accuracy": 0.1, "entropy": 0.5, "kl": 0.0, "completions": ["a\nb"]}
        lines.append({**about, "step": step, "phase": "train", **metrics})
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run,) = read_runs([log])
    assert (run["algo"], run["seed"], len(run["rows"])) == ("minimal.py tepo", 3, 3)
    plot_runs([log, write_run(tmp_path / "run")], tmp_path / "x.png", ["kl", "accuracy"])
    assert names(figures[0]) == ["TEPO", "minimal.py tepo"]
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"phase": "train", "step": 1, "reward": 0.5}\n')
    assert read_runs([bare])[0]["algo"] == "bare.jsonl"


# Telling runs apart


def test_runs_that_differ_in_an_option_are_never_averaged(tmp_path):
    """The seed, the folder and the evaluation are no such options."""
    for u in (16, 1, 4):
        for s in (0, 1):
            write_run(tmp_path / "u" / f"{u}{s}", seed=s, updates=u, eval_n=s)
    seeds = {"tepo": [0, 1]}
    ways = ["1 update per rollout", "4 updates per rollout", "16 updates per rollout"]
    assert groups(read_runs([tmp_path / "u"])) == dict.fromkeys(ways, seeds)
    for e in (0.2, 3e-4):
        write_run(tmp_path / "e" / str(e), option={"eps_low": e, "eps_high": 0.3})
    assert list(groups(read_runs([tmp_path / "e"]))) == ["eps_low = 0.0003", "eps_low = 0.2"]
    # an option that only tells algorithms apart, as a preset may set it, makes no variant
    two = [write_run(tmp_path / "g", "gspo", lr=1e-3), write_run(tmp_path / "t", "tepo", lr=1e-4)]
    assert groups(read_runs(two)) == {"": {"gspo": [0], "tepo": [0]}}


def test_runs_with_equal_options_are_told_apart_by_their_folders(tmp_path):
    """Own code may have changed between them; averaged, they would be a seed too many."""
    folders = [write_run(tmp_path / f"{w}-s{s}", seed=s) for w in ("old", "new") for s in (0, 1)]
    assert groups(read_runs(folders)) == {"new": {"tepo": [0, 1]}, "old": {"tepo": [0, 1]}}
    deep = [write_run(tmp_path / w / "tepo-s0") for w in ("before", "after")]
    assert list(groups(read_runs(deep))) == ["after/tepo", "before/tepo"]
    assert len(read_runs([deep[0], deep[0], tmp_path / "before"])) == 1  # the same run
    write_csv(read_runs(folders), tmp_path / "x.csv")
    assert list(groups(read_csv(tmp_path / "x.csv"))) == ["new", "old"]
    one = read_runs([folders[0]])
    with pytest.raises(ValueError, match="two runs of tepo, seed 0, same settings"):
        tabulate([*one, *one])


def test_a_long_variant_gets_the_name_of_its_folder(tmp_path):
    for name, prompt in (("short", "{question}"), ("long", "think " * 20 + "{question}")):
        for seed in (0, 1):
            write_run(tmp_path / f"{name}-s{seed}", seed=seed, prompt=prompt)
    assert groups(read_runs([tmp_path])) == {"long": {"tepo": [0, 1]}, "short": {"tepo": [0, 1]}}
    write_run(tmp_path / "long-again", seed=2, prompt="think " * 20 + "{question}")
    assert "prompt = {question}" in groups(read_runs([tmp_path]))  # two names say nothing


def test_an_older_run_has_the_defaults_of_its_preset(tmp_path):
    """A run from before an option existed is no variant of one that was made with its default."""
    new = {**DEFAULTS["gsm8k"], "preset": "gsm8k"}
    old = {name: value for name, value in new.items() if name not in ("warmup", "overlong_cache")}
    folders = []
    for i, values in enumerate((new, old, {**new, "warmup": 3}, {**new, "gone": 1})):
        folders.append(write_run(tmp_path / str(i), **{**values, "seed": i}))
    runs = read_runs(folders)
    assert runs[0]["settings"] == runs[1]["settings"]
    assert list(groups(runs[:2])) == [""]
    assert list(groups(runs[1:3])) == ["warmup = 3", "warmup = 10"]
    assert list(groups(runs[::3])) == ["defaults", "gone = 1"]  # an option that exists no more


def test_each_option_says_whether_it_makes_another_experiment(tmp_path):
    """One run per option, which alone differs in it: a variant if and only if its field says so."""
    usual = {**DEFAULTS["tiny"], "preset": "tiny", "algo": "tepo", "steps": 0}
    a = read_folder(write_run(tmp_path / "a", **usual))
    for about in fields(Options):
        if about.name in ("algo", "seed", "steps", "option"):  # write_run sets them
            continue
        b = write_run(tmp_path / "b", **{**usual, "seed": 1, about.name: "other"})
        assert differing([a, read_folder(b)]) == [about.name] * about.metadata["experiment"]


# Averaging


def short_run_among_three(folder):
    """Seeds 0, 1, 4 rise by 1, 2, 5 % a step; seed 4 stops at step 8."""
    for s in (0, 1, 4):
        write_run(folder / str(s), seed=s, steps=8 if s == 4 else STEPS)
    return read_runs([folder])


def test_average_over_seeds(tmp_path):
    """The mean rises by 8/3 %, their median by 2 %; without seed 4 the mean rises by 1.5 %."""
    runs = tabulate(short_run_among_three(tmp_path / "r"))
    found = average(runs, "train", "accuracy")
    steps = found["step"].to_numpy()
    assert steps.tolist() == list(range(1, STEPS + 1))
    assert found["count"].tolist() == [3] * 8 + [2] * 4
    np.testing.assert_allclose(found["mean"], 0.2 + np.where(steps <= 8, 0.08 / 3, 0.015) * steps)
    np.testing.assert_allclose(found["min"], 0.2 + 0.01 * steps)
    np.testing.assert_allclose(found["max"], 0.2 + np.where(steps <= 8, 0.05, 0.02) * steps)
    found = average(runs, "eval", "accuracy")
    assert (found["step"].tolist(), found["count"].tolist()) == ([0, 4, 8, 12], [3, 3, 3, 2])
    waiting = read_runs([write_run(tmp_path / "w", seed=3, steps=0)])
    assert len(average(tabulate(waiting), "train", "accuracy")) == 0


def test_each_run_is_smoothed_before_the_seeds_are_averaged(tmp_path):
    """Of 1/2, 1/3, ..., 1/13 over three steps, its own in the middle; two at the ends."""
    runs = tabulate(short_run_among_three(tmp_path))
    y = 1 / np.arange(2, 14)
    want = [np.mean(y[max(0, i - 1) : i + 2]) for i in range(12)]
    found = average(runs, "train", "entropy", 3)
    short_end = np.mean(y[6:8])  # of seed 4 at its last step
    np.testing.assert_allclose(found["min"], want)
    np.testing.assert_allclose(found["max"], [*want[:7], short_end, *want[8:]])
    np.testing.assert_allclose(found["mean"][7], (2 * want[7] + short_end) / 3)


def test_a_missing_value_and_a_step_that_comes_twice(tmp_path):
    """The value is left out at its step alone; of two rows of one step the last counts."""
    runs = read_runs([write_run(tmp_path / str(s), seed=s) for s in range(3)])
    runs[2]["rows"].loc[1, "accuracy"] = math.nan  # step 1
    found = average(tabulate(runs), "train", "accuracy")
    assert found["count"].tolist() == [2] + [3] * 11
    np.testing.assert_allclose(found["mean"][:2], [0.215, 0.24])
    path = tmp_path / "0" / "metrics.jsonl"
    pairs = [(1, 0.25), (1, 0.5), (2, 0.75), (2, None), (3, 0.125)]
    lines = [{"phase": "train", "step": n, "length": x} for n, x in pairs]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = average(tabulate(read_runs([tmp_path / "0"])), "train", "length")
    assert (found["step"].tolist(), found["mean"].tolist()) == ([1, 3], [0.5, 0.125])


# Curves


def drawn(name, runs, smooth=1):
    """The panel of one metric of one curve."""
    from matplotlib.figure import Figure

    ax = Figure().add_subplot()
    draw = curves.draw_accuracy if name == "accuracy" else curves.draw_line
    draw(ax, tabulate(runs), name, STYLES["tepo"], smooth, 3)
    curves.finish_panel(ax, name)
    return ax


def bars_of(container):
    return container.lines[2][0].get_segments()


def test_band_and_mean_are_what_is_drawn(tmp_path):
    runs = read_runs([write_run(tmp_path / str(s), seed=s) for s in (0, 1, 4)])
    ax = drawn("accuracy", runs)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), 0.2 + 0.08 / 3 * np.arange(1, 13))
    markers = ax.lines[1].get_ydata().astype(float)
    np.testing.assert_allclose(markers, 0.2 + 0.08 / 3 * np.arange(0, 13, 4))
    # the bar at step 8: lowest to highest seed; of one seed, its own interval
    np.testing.assert_allclose(bars_of(ax.containers[0])[2], [[8, 0.28], [8, 0.6]])
    ax = drawn("accuracy", runs[:1])
    np.testing.assert_allclose(bars_of(ax.containers[0])[2], [[8, 0.23], [8, 0.33]])
    for run in runs:
        run["rows"]["length"] += run["seed"]
    ax = drawn("length", runs)
    band = ax.collections[0].get_paths()[0].vertices
    at_5 = band[np.isclose(band[:, 0], 5), 1]
    assert (at_5.min(), at_5.max()) == (15, 19)
    assert ax.lines[0].get_ydata()[4] == pytest.approx(15 + 5 / 3)


def test_a_smoothed_line_has_the_steps_faint_beside_it(tmp_path):
    runs = read_runs([write_run(tmp_path / "a")])
    faint, line = drawn("entropy", runs, smooth=3).lines
    np.testing.assert_allclose(faint.get_ydata(), 1 / np.arange(2, 14))
    assert faint.get_alpha() < 0.5 < line.get_linewidth()
    assert line.get_ydata()[1] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
    faint, line = drawn("entropy", runs, smooth=999).lines  # one mean of all
    assert faint.get_ydata()[0] == 1 / 2 and np.ptp(line.get_ydata()) < 1e-12


def test_a_line_breaks_where_a_seed_ends(tmp_path):
    runs = short_run_among_three(tmp_path)
    lines = drawn("entropy", runs).lines
    assert [line.get_xdata().tolist() for line in lines] == [[*range(1, 9)], [*range(9, 13)]]
    assert lines[0].get_linewidth() > lines[1].get_linewidth()
    full, fewer = drawn("accuracy", runs).containers  # the evaluations at 0, 4, 8 and the one at 12
    assert full.lines[0].get_xdata().tolist() == [0, 4, 8]
    assert fewer.lines[0].get_xdata().tolist() == [12]
    assert [bars.lines[0].get_markerfacecolor() for bars in (full, fewer)] == ["#D55E00", "white"]
    assert fewer.lines[0].get_ydata()[0] == pytest.approx(0.38)
    del runs[1]  # of one seed that is left, the bar is its own interval
    both, alone = drawn("accuracy", runs).containers
    np.testing.assert_allclose(bars_of(both)[2], [[8, 0.28], [8, 0.6]])
    np.testing.assert_allclose(bars_of(alone)[0], [[12, 0.27], [12, 0.37]])


@pytest.mark.parametrize(("lenient", "shown"), [(0.9, True), (None, False), (0.2, False)])
def test_lenient_accuracy_is_drawn_where_it_is_another(tmp_path, figures, lenient, shown):
    run = read_folder(write_run(tmp_path / "r"))
    run["rows"]["accuracy"] = 0.2
    run["rows"].loc[run["rows"]["phase"] == "eval", "accuracy_lenient"] = lenient
    styles = [line.get_linestyle() for line in drawn("accuracy", [run]).lines]
    assert styles == (["-", ":", "-"] if shown else ["-", "-"])
    plot_runs([run], tmp_path / "x.png")
    assert ("dotted" in figures[0].get_supxlabel()) == shown


@pytest.mark.parametrize(("highest", "top"), [(0.08, 0.1), (0.45, 0.5), (0.55, 1)])
def test_low_accuracies_have_a_shorter_scale(tmp_path, highest, top):
    run = read_folder(write_run(tmp_path / "r"))
    run["rows"][["accuracy", "ci_lo", "ci_hi"]] = 0.05, 0.01, highest
    assert drawn("accuracy", [run]).get_ylim() == pytest.approx((-0.02 * top, 1.02 * top))


def test_note_says_the_seeds_of_each_stretch(tmp_path):
    def note(*runs):
        return curves.note(tabulate(runs), ["accuracy"], 1).replace("\n", " ")

    short = short_run_among_three(tmp_path / "r")
    assert "Means of 2 to 3 seeds; bands and bars: lowest to highest seed." in note(*short)
    assert note(*short).endswith("(thinner where they are fewer): TEPO: 3 to step 8, 2 to step 12.")
    whole = read_runs([write_run(tmp_path / f"g{s}", "gspo", s) for s in (0, 1)])
    (one,) = read_runs([write_run(tmp_path / "d", "dapo")])
    usual = "Means of 2 seeds; bands and bars: lowest to highest seed."
    interval = "One seed: bars are its 95% Wilson interval."
    assert note(*whole).endswith(usual)
    assert note(one).endswith(interval) and "Means" not in note(one)
    assert note(*whole, one).endswith(usual.replace("2", "1 to 2") + " " + interval)
    assert "No token was clipped." in note(one)
    assert "each step" in curves.note(tabulate([one]), ["kl"], 5)


@pytest.mark.parametrize(
    ("more", "panels"),
    [
        ({}, []),
        ({"clip_frac": 1e-6}, ["Clip fraction"]),
        ({"truncated": 0.04}, []),
        ({"truncated": 0.5}, ["Cut off at the limit"]),
        ({"reward": 0.5, "reward/a": 0.5, "reward/b": 0.0}, ["reward", "reward/a", "reward/b"]),
    ],
)
def test_panels_are_those_that_have_something_to_show(tmp_path, figures, more, panels):
    plot_runs([write_run(tmp_path / "r", more=more)], tmp_path / "x.png")
    assert titles(figures[0]) == ["Accuracy", "Entropy", "Completion length", *panels]


def test_any_metric_is_a_panel(tmp_path, figures):
    """... of training steps, else of evaluations; eval/NAME is of evaluations."""
    folder = write_run(tmp_path / "r", more={"kl": 1e-4, "reward/x": 1.0})
    wanted = ["kl", "reward/x", "pass_at_k", "eval/accuracy", "accuracy"]
    plot_runs([folder], tmp_path / "x.png", wanted, smooth=1)
    assert titles(figures[0]) == ["KL(old ‖ current)", *wanted[1:4], "Accuracy"]
    of_axes = {ax.get_title(): ax.lines[0] for ax in figures[0].axes}
    assert len(of_axes["reward/x"].get_xdata()) == 12
    for name in ("pass_at_k", "eval/accuracy"):
        assert of_axes[name].get_xdata().tolist() == [0, 4, 8, 12]
    for name in ("lk", "eval/kl", "eval/lk", "value", ""):  # evaluations have no kl
        with pytest.raises(ValueError, match=f"no run has a metric '{name}'; there are accuracy, "):
            plot_runs([folder], tmp_path / "x.png", [name])


def test_variants_share_their_panels_and_differ_in_colour_and_marker(tmp_path, figures, capsys):
    for u in (1, 2, 4, 8, 16, 32):
        write_run(tmp_path / "one" / str(u), updates=u, option={"eps_low": 0.2})
    plot_runs([tmp_path / "one"], tmp_path / "x.png")
    assert len(figures[0].axes) == 4  # three metrics, and the ends
    assert names(figures[0])[0] == "TEPO\n1 update per rollout"
    for algo, u in (("tepo", 1), ("tepo", 4), ("gspo", 4)):
        write_run(tmp_path / "two" / f"{algo}{u}", algo, updates=u)
    for folder, count in (("one", 6), ("two", 3)):
        looks = list(style.looks_of(tabulate(read_runs([tmp_path / folder]))).values())
        assert len({str(colour) for _, colour, _, _ in looks}) == count
        assert len({marker for *_, marker in looks}) == count
    _, *of_tepo, of_gspo = sorted(looks, key=lambda look: "GSPO" in look[0])
    assert of_gspo[1] == STYLES["gspo"][1]  # it has one variant
    plot.plot_entropy(read_runs([tmp_path / "one"]), tmp_path / "x.png")
    points = figures[1].axes[0].collections
    assert len({tuple(dots.get_facecolor()[0]) for dots in points}) == 6
    assert "TEPO, 16 updates per rollout" in capsys.readouterr().out


def test_the_ends_have_intervals(tmp_path, figures):
    """Four methods; of two seeds 0.32 and 0.44 at step 12: 0.38 ± 12.706 x 0.06."""
    folders = [write_run(tmp_path / f"{a}{s}", a, s) for a in ORDER[:4] for s in (0, 1)]
    plot_runs(folders, tmp_path / "x.png")
    (end,) = [ax for ax in figures[0].axes if "end" in ax.get_title()]
    assert [text.get_text() for text in end.get_yticklabels()] == ["GRPO", "DAPO", "GSPO", "TEPO"]
    for i, bars in enumerate(end.containers):
        (interval,) = bars.lines[2][0].get_segments()
        np.testing.assert_allclose(interval, [[0.38 - 0.76236, i], [0.38 + 0.76236, i]])
    dots = [line for line in end.lines if line.get_marker() == "."]
    np.testing.assert_allclose([dot.get_xdata() for dot in dots], [[0.32, 0.44]] * 4)


def test_many_methods_are_sorted_by_their_difference_to_grpo(tmp_path, figures):
    """Eight methods; method i ends i % below GRPO at both seeds."""
    for i, algo in enumerate(ORDER[:8]):
        for s in (0, 1):
            path = write_run(tmp_path / f"{algo}{s}", algo, s) / "metrics.jsonl"
            change_lines(path, lambda _, row, i=i: {**row, "accuracy": row["accuracy"] - i / 100})
    plot_runs([tmp_path], tmp_path / "x.png")
    (ax,) = figures[0].axes
    assert [text.get_text() for text in ax.get_yticklabels()] == [
        STYLES[algo][0] for algo in reversed(ORDER[1:8])
    ]
    np.testing.assert_allclose([bars.lines[0].get_xdata()[0] for bars in ax.containers][0], -0.07)
    for s in (0, 1):
        (tmp_path / f"grpo{s}" / "metrics.jsonl").unlink()
    write_run(tmp_path / "cispo", "cispo")
    plot_runs([tmp_path], tmp_path / "x.png")
    assert figures[1].axes[0].get_title() == "Greedy accuracy at the last evaluation"


def test_many_variants_are_drawn_against_their_option(tmp_path, figures):
    """Three methods x three numbers; GSPO's accuracy with 16 falls to a quarter of its best."""
    for algo in ("grpo", "gspo", "tepo"):
        for u in (4, 1, 16):
            write_run(tmp_path / f"{algo}{u}", algo, updates=u)
    path = tmp_path / "gspo16" / "metrics.jsonl"
    change_lines(path, lambda _, row: {**row, "accuracy": 0.4 if row["step"] < 7 else 0.1})
    plot_runs([tmp_path], tmp_path / "x.png")
    (ax,) = figures[0].axes
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1", "4", "16"]
    crosses = [line.get_xdata() for line in ax.lines if line.get_marker() == "x"]
    assert [len(x) for x in crosses] == [0, 1, 0] and crosses[1][0] == pytest.approx(2)
    assert "×" in figures[0].get_supxlabel()
    plot_runs([tmp_path], tmp_path / "x.png", ["entropy"])  # asked for: curves all the same
    assert len(names(figures[1])) == 9


def test_styles_tell_all_apart():
    """By colour; in grey by dashes and marker together, the seven by each of the two."""
    assert list(STYLES) == list(style.NOTES) == list(ORDER)
    assert set(ORDER) == {*ALGORITHMS, *MORE} and len(ORDER) == 28
    styles = list(STYLES.values())
    assert len({name for name, *_ in styles}) == 28
    assert len({(str(dashes), marker) for _, _, dashes, marker in styles}) == 28
    for column in (2, 3):
        assert len({str(STYLES[algo][column]) for algo in ALGORITHMS}) == 7
    colours = [ImageColor.getrgb(colour) for _, colour, _, _ in styles]
    assert min(math.dist(a, b) for a, b in combinations(colours, 2)) > 60


def test_curves_of_seven_algorithms(tmp_path, monkeypatch):
    """A picture that would be too large gets a palette, in which every method keeps its colour."""
    monkeypatch.setattr(style, "MAX_BYTES", 60_000)
    folders = [write_run(tmp_path / f"{a}{s}", a, s) for a in ALGORITHMS for s in range(2)]
    plot_runs(folders, tmp_path / "new" / "curves.png")
    colours = check_picture(tmp_path / "new" / "curves.png", 1280)
    assert len(colours) <= 256
    for algo in ALGORITHMS:
        assert np.abs(colours - ImageColor.getrgb(STYLES[algo][1])).max(1).min() <= 16


def test_the_csv_gives_the_same_figure(tmp_path, figures):
    """... with four digits."""
    folders = [write_run(tmp_path / f"{a}{u}", a, updates=u) for a in ORDER[2:4] for u in (1, 4)]
    write_csv(read_runs(folders), tmp_path / "metrics.csv")
    plot_runs(folders, "")
    plot_runs([tmp_path / "metrics.csv"], "")
    one, other = ([line for ax in f.axes for line in ax.lines] for f in figures)
    assert names(figures[0]) == names(figures[1]) and len(one) > 20
    for pair in zip(one, other, strict=True):
        a, b = (np.asarray(line.get_ydata(), float) for line in pair)
        np.testing.assert_allclose(a, b, rtol=1e-3)


def test_trainer_may_draw_at_any_moment(tmp_path):
    """No lines, only nulls, an unknown algorithm: never an error.

    And quick: a training step takes longer.
    """
    folder = write_run(tmp_path / "a", "mine", steps=0)
    (folder / "metrics.jsonl").write_text("")
    plot_runs([folder], folder / "curves.png")
    (folder / "metrics.jsonl").write_text(
        '{"phase": "train", "step": 1, "accuracy": null}\n{"phase": "eval", "step": 0}\n'
    )
    started = time.process_time()
    plot_runs([folder], folder / "curves.png")
    assert time.process_time() - started < 3  # about 0.6 s
    check_picture(folder / "curves.png", 1280)
    code = "import sys, plot; print(*sys.modules)"
    how = {"cwd": ROOT, "capture_output": True, "text": True}
    modules = subprocess.run([sys.executable, "-c", code], **how).stdout.split()
    assert "run.curves" in modules and "matplotlib" not in modules and "pandas" not in modules


def test_picture_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    figure, out = style.new_figure(1, 1), tmp_path / "curves.png"
    style.save(figure, out)
    before = out.read_bytes()
    figure.text(0.5, 0.5, "x")
    with open(out, "rb") as reader:
        style.save(figure, out)
        # whoever is reading keeps the old one, whole
        assert reader.read() == before != out.read_bytes()
    before = out.read_bytes()

    def full_disk(part, **_):
        part.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", full_disk)
    with pytest.raises(OSError, match="No space"):
        style.save(figure, out)
    assert out.read_bytes() == before and not list(tmp_path.glob(".*"))


# Entropy against accuracy


def test_fit_finds_known_coefficients():
    entropy = np.linspace(0.1, 1.2, 40)
    assert plot.fit_entropy(entropy, -0.35 * np.exp(entropy) + 1.2) == pytest.approx((0.35, 1.2, 0))
    noise = 0.05 * np.random.default_rng(0).normal(size=40)
    noisy = -0.35 * np.exp(entropy) + 1.2 + noise
    a, b, _ = plot.fit_entropy(entropy, noisy)
    assert (a, b) == pytest.approx((0.35, 1.2), abs=0.05)
    rest = noisy + a * np.exp(entropy) - b
    assert rest.mean() == pytest.approx(0, abs=1e-12)
    assert rest @ np.exp(entropy) == pytest.approx(0, abs=1e-9)
    for points in ([], [1.0, 2.0], [0.5] * 9):
        assert all(map(math.isnan, plot.fit_entropy(np.array(points), np.array(points))))


def test_off_is_the_largest_mean_error_of_a_tenth():
    """The errors of a tenth of 40 points are +-e, so orthogonal to the line: the fit stays."""
    entropy = np.linspace(0, 1, 40)
    wrong = np.zeros(40)
    wrong[20] = 0.2  # a single point of the sixth tenth counts a quarter
    order = np.random.default_rng(0).permutation(40)
    a, b, off = plot.fit_entropy(entropy[order], (0.9 - 0.2 * np.exp(entropy) + wrong)[order])
    error = 0.9 - 0.2 * np.exp(entropy) + wrong - (b - a * np.exp(entropy))
    assert off == pytest.approx(error.reshape(10, 4).mean(1).max(), abs=1e-12) and off > 0.04


def test_entropy_figure_prints_the_fit(tmp_path, capsys):
    for algo in ("tepo", "gspo"):
        # of the rows that entropy covers; an older file has `accuracy` alone
        name = "accuracy_trained" if algo == "tepo" else "accuracy"

        def change(_, row, name=name):
            fit = {name: 0.9 - 0.2 * math.exp(row["entropy"])} if row["phase"] == "train" else {}
            return {**row, **fit}

        for s in (0, 1):
            change_lines(write_run(tmp_path / f"{algo}{s}", algo, s) / "metrics.jsonl", change)
    plot.plot_entropy(read_runs([tmp_path]), tmp_path / "entropy.png")
    check_picture(tmp_path / "entropy.png", 1280)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    fits = {name: ["0.200", "0.900", "0.000", "24"] for name in ("GSPO", "TEPO")}
    assert {name: fit for name, *fit in lines} == {**fits, "all": [*fits["TEPO"][:3], "48"]}


def test_points_that_determine_no_line_have_no_fit(tmp_path, figures):
    for steps, labels in ((0, []), (1, []), (4, ["fit"])):
        plot.plot_entropy(read_runs([write_run(tmp_path / str(steps), steps=steps)]), "")
        words = " ".join(text.get_text() for text in figures[-1].axes[0].get_legend().texts)
        assert ("fit" in words) == bool(labels) and "nan" not in words


# The credit picture


@pytest.mark.parametrize("algo", STYLES)
def test_push_is_minus_the_gradient(algo, tmp_path):
    """Against autograd called by hand on the losses' own functions.

    And the sign: right rows up, wrong rows down.
    """
    rows = credit.read_group(write_samples(tmp_path))
    words = ["1", "$2$", " +", "\n", "words", "####", "<eos>"]  # of write_samples
    entropy, new, old, mask, ids = torch.zeros(5, 4, 7, dtype=torch.float64)
    for i, row in enumerate(rows):
        n = len(row["tokens"])
        numbers = torch.tensor(
            [row[name] for name in ("entropy", "logprobs", "old_logprobs")], dtype=torch.float64
        )
        entropy[i, :n], new[i, :n], old[i, :n] = numbers
        mask[i, :n], ids[i, :n] = 1, torch.tensor([words.index(t) for t in row["tokens"]]).double()
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    push, clipped = credit.push(algo, credit.tensors(rows))
    module = load_algorithm(algo)
    more = {"completions": ids.long(), "entropy": entropy, "mask": mask.float()}
    advantages = module.advantages(rewards, 4, **named(module.advantages, more))
    leaf = new.clone().requires_grad_()
    torch.manual_seed(0)
    module.loss(leaf, old, advantages, mask.float()).backward()
    torch.testing.assert_close(push, -leaf.grad, rtol=0, atol=0)
    # KTAE: a token may be a key to wrong answers, in a right row too. KL-Cov: one token of these 19
    # pays |log w|, whatever its advantage. DRO: what has moved up in a right row is pushed back.
    of_rows = advantages.reshape(4, -1) * mask
    most = {"kl_cov": 1, "dro": 19}.get(algo, 0)
    assert (push * of_rows < 0).sum() <= most and push.any()
    assert torch.equal(clipped, (push == 0) & (of_rows != 0))
    if algo == "gspo":  # the whole row or nothing
        whole = [len(set(clipped[i][mask[i] == 1].tolist())) == 1 for i in range(4)]
        assert all(whole) and clipped.any()


@pytest.mark.parametrize("algo", ["gtpo", "grpo_s"])
def test_push_takes_success_from_correctness(algo):
    """Row 1 is right, its reward 0.5 for its length: its tokens are pushed up all the same."""
    ones = torch.ones(4, 2, dtype=torch.float64)
    rewards, right = torch.tensor([[1, 0.5, 0, 0], [1, 1, 0, 0]], dtype=torch.float64)
    group = SimpleNamespace(rewards=rewards, right=right, entropy=ones, mask=ones)
    group.logprobs = group.old_logprobs = -ones
    group.completions, group.history, group.ref_logprobs = ones.long(), None, None
    push, _ = credit.push(algo, group)
    assert (push[:2] > 0).all() and (push[2:] < 0).all()


def test_rows_are_right_by_correctness_and_by_reward_only_in_older_files(tmp_path, figures):
    folder = write_samples(tmp_path)
    path = folder / "samples.jsonl"
    assert [row["right"] for row in credit.read_group(folder)] == [True, False, True, False]
    change_lines(path, lambda i, row: {**row, "right": i < 3})  # row 1: right, its reward 0
    assert [row["right"] for row in credit.read_group(folder)] == [True, True, True, False]
    credit.plot_credit(folder, tmp_path / "x.png", shown=4)
    labels = [text.get_text() for text in figures[0].axes[0].texts]
    assert labels.count("right") == 3 and labels.count("WRONG") == 1
    change_lines(path, lambda i, row: {**row, "right": "yes"})
    with pytest.raises(ValueError, match="line 1 is not a completion"):
        credit.read_group(folder)


def test_group_is_the_one_that_moved_most(tmp_path):
    folder = write_samples(tmp_path, steps=(10, 30, 20))
    path = folder / "samples.jsonl"

    def step(**how):
        (found,) = {row["step"] for row in credit.read_group(folder, **how)}
        return found

    assert step() == 30 and step(step=20) == 20
    # one right of four shows less than two and two do
    change_lines(path, lambda i, row: {**row, "reward": 0.0 if i == 4 else row["reward"]})
    assert step() == 20
    # step 30 teaches nothing now; a row that the trainer noted as bad, and a torn line
    change_lines(path, lambda i, row: {**row, "reward": 1.0 if 4 <= i < 8 else row["reward"]})
    stray = json.loads(path.read_text().splitlines()[8])
    stray |= {"step": 40, "skipped": True, "logprobs": [float("nan")] * 5}
    path.write_text(path.read_text() + json.dumps(stray) + '\n{"step": 5')
    assert step() == 20
    with pytest.raises(ValueError, match="finite numbers, at step 30; at 10, 20 it has one"):
        credit.read_group(folder, step=30)


def test_credit_picture(tmp_path):
    """Its colours, and the same picture every time; torch's random state stays."""
    credit.plot_credit(write_samples(tmp_path), tmp_path / "credit.png")
    colours = check_picture(tmp_path / "credit.png", 1280)
    from matplotlib import colormaps

    for end in (0.88, 0.12):  # the strongest push up and down, as the legend shows it
        assert np.abs(colours - np.array(colormaps["RdBu"](end)[:3]) * 255).max(1).min() <= 16
    group = credit.tensors(credit.read_group(Path(CREDIT)))
    torch.manual_seed(1)
    before, state = credit.push("clip_cov", group)[0], torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(before, credit.push("clip_cov", group)[0])
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())


def test_credit_panels_are_in_the_order_of_tables_and_equal_methods_share_one(figures):
    for words in (["--algos", "cispo,clip_cov,grpo,dapo"], []):
        plot.main(["--credit", CREDIT, *words])
    found = [[ax.get_title(loc="left").split(":")[0] for ax in f.axes[1:]] for f in figures]
    assert found[0] == ["GRPO", "DAPO = CISPO", "Clip-Cov"]
    assert found[1] == [STYLES[algo][0] for algo in ORDER[:7]]


def test_all_28_fit_into_one_picture(figures):
    """A right and a wrong completion; names on the left, which touch neither cells nor others."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    plot.main(["--credit", CREDIT, "--algos", "all"])
    renderer = FigureCanvasAgg(figures[0]).get_renderer()
    figures[0].draw_without_rendering()
    assert figures[0].get_figheight() * 160 < 1600
    last, found = None, []
    for ax in figures[0].axes:
        name, *grades = [text for text in ax.texts if text.get_position()[0] < 0]
        assert sorted(text.get_text() for text in grades) == ["WRONG", "right"]
        box = name.get_window_extent(renderer)
        assert 0 < box.x0 and box.x1 < min(x.get_window_extent(renderer).x0 for x in grades)
        assert last is None or box.y1 <= last
        last = box.y0
        found += name.get_text().replace("\n", " ").split(" (full")[0].split(" = ")
    assert len(found) == 29 and {STYLES[algo][0] for algo in ORDER} < set(found)


def test_a_long_title_never_runs_into_its_number(tmp_path, figures):
    """Both are one text, which wraps: every title is inside the figure, above its cells."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    rows, one = [{"tokens": ["a"], "completion": "a", "right": True}], torch.ones(1, 1)
    credit.draw_panels(rows, [("word " * 60, one, one > 1), ("GRPO: x", one, one > 1)], "", "x")
    canvas, found = FigureCanvasAgg(figures[0]), figures
    found[0].draw_without_rendering()
    titles = [ax._left_title for ax in found[0].axes]
    for title, ax in zip(titles, found[0].axes, strict=True):
        box = title.get_window_extent(canvas.get_renderer())
        assert box.x1 < found[0].bbox.x1 and box.y0 >= ax.bbox.y1 - 1
        assert title.get_text().endswith("(full colour: 1)")
    boxes = [title.get_window_extent(canvas.get_renderer()) for title in titles]
    assert "\n" in titles[0].get_text() and boxes[1].y1 < found[0].axes[0].bbox.y0


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"tokens": [1, 2, 3]}, "line 1 is not a completion with tokens and numbers"),
        ({"reward": "abc"}, "line 1 is not a completion with tokens and numbers"),
        ({"reward": None}, "line 1 is not a completion with tokens and numbers"),
        ({"prompt": ["a"]}, "line 1 is not a completion with tokens and numbers"),
        (
            dict.fromkeys(("tokens", "logprobs", "old_logprobs", "entropy"), []),
            "no group with both right and wrong completions, with tokens and finite numbers",
        ),
    ],
)
def test_damaged_samples_are_refused_in_one_line(tmp_path, capsys, values, told):
    path = write_samples(tmp_path) / "samples.jsonl"
    change_lines(path, lambda _, row: {**row, **values})
    with pytest.raises(SystemExit) as exit:
        plot.main(["--credit", str(tmp_path)])
    assert exit.value.code == 2
    assert capsys.readouterr().err == f"plot.py: error: {path}: {told}\n"
    assert not list(tmp_path.glob("*.png"))


def test_text_that_no_font_has_is_drawn(tmp_path):
    """Lone surrogates and control characters, which matplotlib or an SVG cannot have.

    And numbers that are written as text.
    """
    text = "a\ud800\x00\x1b[31m\ufffe b"
    values = {"prompt": text, "tokens": [text], "entropy": ["0.5"]}
    values |= {"logprobs": ["-0.5"], "old_logprobs": [-0.75]}
    change_lines(write_samples(tmp_path) / "samples.jsonl", lambda _, row: {**row, **values})
    assert credit.read_group(tmp_path)[0]["logprobs"] == [-0.5]
    credit.plot_credit(tmp_path, tmp_path / "a.svg")
    ElementTree.parse(tmp_path / "a.svg")
    assert credit.cell_text(text) == "a���[31m� b"


def test_a_cell_shows_a_part_of_a_character_and_the_eos_and_no_other_special_token_as_eos():
    row = {"completion": "<b>½\n<think>", "tokens": ["<b>", "", "½", "\n", "<think>"]}
    assert credit.cell_texts(row) == ["<b>", "◌", "½", "↵", "<think>"]
    row["tokens"].append("<|endoftext|>")
    assert credit.cell_texts(row) == ["<b>", "◌", "½", "↵", "<think>", "EOS"]


def test_long_rows_wrap_and_end_in_an_ellipsis(tmp_path):
    """Twenty completions of 300 tokens, letters of another script, dollars."""
    cells = credit.cells_of(["word"] * 60)  # 4.7 wide: 23 to a line
    assert [line for line, *_ in cells] == [0] * 23 + [1] * 24
    assert cells[-1][3] == "…" and cells[22][1] == pytest.approx(22 * 4.7) and cells[23][1] == 0
    row = json.loads((write_samples(tmp_path) / "samples.jsonl").read_text().splitlines()[0])
    row |= {k: [-0.5 - 0.001 * t for t in range(300)] for k in ("logprobs", "old_logprobs")}
    row |= {"entropy": [0.5] * 300, "tokens": ["x", "$\\frac", "é"] * 100, "prompt": "why " * 400}
    with open(tmp_path / "samples.jsonl", "w") as file:
        file.writelines(json.dumps(row | {"reward": float(i < 9)}) + "\n" for i in range(20))
    how = {"algos": ("grpo", "gspo")}
    credit.plot_credit(tmp_path / "samples.jsonl", tmp_path / "credit.png", **how)
    check_picture(tmp_path / "credit.png", 1280)


# Command line


def test_command_line_draws(tmp_path, capsys, monkeypatch):
    saved = []
    for module in (curves, credit, plot):
        monkeypatch.setattr(module, "save", lambda figure, out: saved.append((figure, out)))
    folder = write_samples(write_run(tmp_path / "a", more={"kl": 0.5}))
    kinds = ([], "curves.png"), (["--entropy"], "entropy.png"), (["--credit"], "credit.png")
    for flag, name in kinds:
        plot.main([*flag, str(folder)])
        assert capsys.readouterr().out.split()[-1] == str(folder / name)
        assert saved[-1][1] == folder / name
    plot.main([str(folder), "--metrics", "kl,entropy", "--smooth", "2", "--out", "x.svg"])
    assert titles(saved[-1][0])[0].startswith("KL") and saved[-1][1] == Path("x.svg")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("nowhere", "nowhere: no such run"),
        ("empty", "no metrics.jsonl"),
        ("bare", "config.json is missing or does not say algo and seed"),
        ("good bare --credit", "--credit draws one RUN"),
        ("bare --credit", "samples.jsonl: no group with both right and wrong completions, with"),
        ("torn", "line 2 is not"),
        ("good --step 3", "--step goes with --credit"),
        ("good --algos cispo", "--algos goes with --credit"),
        ("good --credit --metrics kl", "--metrics goes with curves"),
        ("good --entropy --smooth 3", "--smooth goes with curves"),
        ("good --smooth 0", "--smooth 0: the least is 1"),
        ("good --metrics lk,", "no run has a metric 'lk'"),
        ("begun", "error: no metrics so far in what is to be drawn"),
        ("good --credit --algos cipso", "no algorithm 'cipso'; did you mean cispo?"),
        ("good --credit", "samples.jsonl: no such file"),
        ("good --out good/metrics.jsonl/x.png", "good/metrics.jsonl is not a folder"),
        ("good --out .", "argument --out: . is a folder; add the name of a file"),
        ("good --out x.what", "what"),
        ("--entropy --credit good", "not allowed with"),
        ("", "RUN"),
    ],
)
def test_command_line_refuses_in_one_line(tmp_path, monkeypatch, capsys, words, told):
    write_run(tmp_path / "good")
    (tmp_path / "empty").mkdir()
    (write_run(tmp_path / "begun") / "metrics.jsonl").write_text("")
    (write_run(tmp_path / "bare") / "config.json").unlink()
    none = dict.fromkeys(("tokens", "logprobs", "old_logprobs", "entropy"), [])
    change_lines(write_samples(tmp_path / "bare") / "samples.jsonl", lambda _, row: {**row, **none})
    torn = write_run(tmp_path / "torn") / "metrics.jsonl"
    torn.write_text(torn.read_text().replace("\n", "\n{\n", 1))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        plot.main(words.split())
    told_all = capsys.readouterr().err
    assert exit.value.code == 2 and told in told_all
    assert told_all.count("\n") == 1 and told_all.startswith("plot.py: error: ")
    assert not list(tmp_path.rglob("*.png"))
