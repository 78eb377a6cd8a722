"""run/runs.py and plot.py: reading runs, averaging seeds, the fit, the credit tensors.

Pictures are whole, small and coloured.
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
from run.algorithm import load_algorithm
from run.options import DEFAULTS, Options
from run.runs import COLUMNS, ORDER, average, group, read_csv, read_folder, read_runs, write_csv
from trainer.methods import ALGORITHMS, MORE, named

LIMIT = 300_000  # bytes, of a picture that is committed
STEPS = 12
CREDIT = str(ROOT / "docs" / "credit.jsonl")  # a group of TEPO


def write_run(folder, algo="tepo", seed=0, steps=STEPS, option=None, **options):
    """A run folder as train.py leaves it.

    Accuracy rises by (seed + 1) % per step, entropy falls; values are exact.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "algo": algo,
        "seed": seed,
        "updates": 4,
        "steps": steps,
        "out": str(folder),
        "option": option or {},
    } | options
    (folder / "config.json").write_text(json.dumps({"options": config, "status": "done"}))
    rows = []
    for step in range(steps + 1):
        accuracy = 0.2 + 0.01 * (seed + 1) * step
        row = {
            "phase": "train",
            "step": step,
            "accuracy": accuracy,
            "entropy": 1 / (step + 1),
            "length": 10.0 + step,
        }
        row |= {"clip_frac": 0.0, "ratio_first": None, "rollout_s": 1.5, "update_s": 0.5}
        rows += [row] if step else []
        if step % 4 == 0:
            row = {
                "phase": "eval",
                "step": step,
                "accuracy": accuracy,
                "ci95": [accuracy - 0.05, accuracy + 0.05],
            }
            rows.append(row | {"pass_at_k": 0.5, "k": 4, "n": 100})
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
                row = {
                    "step": step,
                    "prompt": "1+1? $x_",
                    "tokens": tokens,
                    "reward": float(i % 2 == 0),
                }
                row |= {"old_logprobs": old.tolist(), "logprobs": new.tolist()}
                row["entropy"] = torch.rand(length, generator=generator).tolist()
                file.write(json.dumps(row) + "\n")
    return folder


def check_picture(path, width, limit=LIMIT):
    """A whole PNG of that width in pixels, at most 300 kB; returns its colours."""
    assert path.stat().st_size <= limit
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG" and image.width == width
        colours = np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0).astype(int)
    assert not list(path.parent.glob(".*part*"))
    return colours


def shows(colours, name):
    return np.abs(colours - ImageColor.getrgb(name)).max(1).min() <= 16


# Reading


def test_torn_last_line_is_left_out(tmp_path):
    folder = write_run(tmp_path / "a")
    whole = read_folder(folder)["rows"]
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"phase": "train", "step": 13, "accur')
    assert read_folder(folder)["rows"] == whole


def test_bad_line_is_named(tmp_path):
    folder = write_run(tmp_path / "a")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    for bad in (
        '{"phase": "train"',
        "[1, 2]",
        '{"phase": "train", "accuracy": 1}',
        '{"phase": "eval", "step": "x"}',
        '{"phase": "train", "step": -1}',
        '{"phase": "train", "step": 123456789012345678901234567890}',
    ):
        (folder / "metrics.jsonl").write_text("\n".join([*lines[:2], bad, *lines[2:]]) + "\n")
        with pytest.raises(ValueError, match="line 3 is not"):
            read_runs([folder])


def test_null_and_nan_are_gaps(tmp_path):
    folder = write_run(tmp_path / "a", steps=0)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"phase": "train", "step": 1, "entropy": null, "length": NaN}\n')
        file.write('{"phase": "train", "step": 2, "entropy": 0.5, "length": 3, ')
        file.write('"rollout_s": null, "update_s": 2.0}\n')
    run = read_folder(folder)
    assert [row["entropy"] for row in run["rows"]] == [None, None, 0.5]
    assert average([run], "train", "length")[0].tolist() == [2]
    assert [row["seconds"] for row in run["rows"]] == [0, 0, 2.0]


@pytest.mark.parametrize("file", ["metrics.jsonl", "config.json"])
def test_folder_that_is_no_run(tmp_path, file):
    folder = write_run(tmp_path / "a")
    (folder / file).unlink()
    with pytest.raises(ValueError, match=file):
        read_runs([folder])


def test_csv_gives_the_runs_back(tmp_path):
    runs = read_runs(
        [write_run(tmp_path / f"{u}{s}", seed=s, updates=u) for u in (4, 16) for s in (0, 1)]
    )
    runs += read_runs([write_run(tmp_path / "e", "gspo", option={"eps_low": 3e-4})])
    write_csv(runs, tmp_path / "metrics.csv")
    again = read_csv(tmp_path / "metrics.csv")
    assert [run["settings"] for run in again] == [{"updates": 4}] * 2 + [{"updates": 16}] * 2 + [
        {"updates": 4}
    ]
    for before, after in zip(runs, again, strict=True):
        assert (before["algo"], before["seed"]) == (after["algo"], after["seed"])
        for x, y in zip(before["rows"], after["rows"], strict=True):
            assert x.keys() == y.keys() and (x["phase"], x["step"]) == (y["phase"], y["step"])
            assert all(x[c] == y[c] or x[c] == pytest.approx(y[c], rel=1e-3) for c in COLUMNS)
    assert group(again).keys() == group(runs).keys()


def test_csv_gives_any_text_back(tmp_path):
    """... also one with the ; and = that separate settings in older files."""
    texts = ['{question}; a = "b", [c]\nd', "{question} = é;"]
    folders = [write_run(tmp_path / str(i), prompt=text) for i, text in enumerate(texts)]
    write_csv(read_runs(folders), tmp_path / "metrics.csv")
    again = read_csv(tmp_path / "metrics.csv")
    assert [run["settings"] for run in again] == [{"prompt": text} for text in texts]


def test_older_csv_is_read(tmp_path):
    path = tmp_path / "metrics.csv"
    head = "algo,seed,settings,phase,step,accuracy\n"
    path.write_text(head + 'tepo,3,eps_low=0.2;prompt="x",train,1,0.5\n\ntepo,3,,train,1,\n')
    old, bare = read_csv(path)
    assert old["settings"] == {"eps_low": 0.2, "prompt": "x"} and bare["settings"] == {}
    assert (old["algo"], old["seed"], old["rows"][0]["accuracy"]) == ("tepo", 3, 0.5)
    assert bare["rows"][0]["accuracy"] is None and bare["rows"][0]["length"] is None
    path.write_text(path.read_text() + "tepo,3,,train,1,high\n")
    with pytest.raises(ValueError, match="line 5 is not"):  # the blank line is counted
        read_csv(path)


def test_bad_csv_is_named(tmp_path):
    path = tmp_path / "metrics.csv"
    write_csv(read_runs([write_run(tmp_path / "a")]), path)
    path.write_text(path.read_text() + "tepo,zero,,train,1\n")
    with pytest.raises(ValueError, match=r"line 18 is not"):
        read_runs([path])
    path.write_text("")
    with pytest.raises(ValueError, match="no metrics"):
        read_runs([path])


# Grouping and averaging


def short_run_among_three(folder):
    return read_runs(
        [write_run(folder / str(s), seed=s, steps=8 if s == 4 else STEPS) for s in (0, 1, 4)]
    )


def test_average_over_seeds(tmp_path):
    """Seeds 0, 1, 4 rise by 1, 2, 5 % a step: the mean rises by 8/3 %, their median by 2 %. Seed 4
    stops at step 8: the others go on, and from there their mean rises by 1.5 %."""
    runs = short_run_among_three(tmp_path)
    steps, mean, low, high, count = average(runs, "train", "accuracy")
    assert steps.tolist() == list(range(1, STEPS + 1))
    assert count.tolist() == [3] * 8 + [2] * 4
    rise = np.where(steps <= 8, 0.08 / 3, 0.015)
    np.testing.assert_allclose(mean, 0.2 + rise * steps)
    np.testing.assert_allclose(low, 0.2 + 0.01 * steps)
    np.testing.assert_allclose(high, 0.2 + np.where(steps <= 8, 0.05, 0.02) * steps)
    steps, *_, count = average(runs, "eval", "accuracy")
    assert (steps.tolist(), count.tolist()) == ([0, 4, 8, 12], [3, 3, 3, 2])
    waiting = read_runs([write_run(tmp_path / "w", seed=3, steps=0)])
    assert average(runs + waiting, "train", "accuracy")[4].tolist() == [3] * 8 + [2] * 4
    assert [len(x) for x in average(waiting, "train", "accuracy")] == [0] * 5


def test_band_and_mean_are_what_is_drawn(tmp_path):
    from matplotlib.figure import Figure

    runs = read_runs([write_run(tmp_path / str(s), seed=s) for s in range(3)])
    ax = Figure().add_subplot()
    plot.draw_metric(ax, "accuracy", {"tepo": runs})
    thin, markers = ax.lines[0], ax.lines[1]
    np.testing.assert_allclose(thin.get_ydata(), 0.2 + 0.02 * np.arange(1, 13))
    np.testing.assert_allclose(markers.get_ydata(), 0.2 + 0.02 * np.arange(0, 13, 4))
    ends = (
        ax.containers[0].lines[2][0].get_segments()[2]
    )  # the bar at step 8: lowest to highest seed
    np.testing.assert_allclose(ends, [[8, 0.28], [8, 0.44]])
    ax = Figure().add_subplot()
    plot.draw_metric(ax, "accuracy", {"tepo": runs[:1]})  # one seed: its own interval
    np.testing.assert_allclose(
        ax.containers[0].lines[2][0].get_segments()[2], [[8, 0.23], [8, 0.33]]
    )
    for run in runs:
        for row in run["rows"]:
            row["length"] = row["length"] and row["length"] + run["seed"]
    ax = Figure().add_subplot()
    plot.draw_metric(ax, "length", {"tepo": runs})
    band = ax.collections[0].get_paths()[0].vertices
    at_5 = band[np.isclose(band[:, 0], 5), 1]
    assert (at_5.min(), at_5.max()) == (15, 17) and ax.lines[0].get_ydata()[4] == 16


def with_values(run, phase, **values):
    """The run with these values in the rows of a phase."""
    for row in run["rows"]:
        if row["phase"] == phase:
            row.update(values)
    return run


def test_lenient_accuracy_is_drawn_where_it_is_not_the_strict_one(tmp_path):
    from matplotlib.figure import Figure

    for lenient, lines in ((0.9, ["-", ":", "-"]), (None, ["-", "-"]), (0.2, ["-", "-"])):
        run = with_values(read_folder(write_run(tmp_path / "r")), "eval", accuracy_lenient=lenient)
        for row in run["rows"]:
            row["accuracy"] = min(row["accuracy"], 0.2)
        ax = Figure().add_subplot()
        plot.draw_metric(ax, "accuracy", {"tepo": [run]})
        assert [line.get_linestyle() for line in ax.lines] == lines
        if lenient == 0.9:
            assert (ax.lines[1].get_ydata() == 0.9).all()


@pytest.mark.parametrize("lenient", [0.9, None])
def test_the_caption_names_the_dotted_line_only_where_there_is_one(tmp_path, monkeypatch, lenient):
    figures = []
    monkeypatch.setattr(plot, "save", lambda figure, out: figures.append(figure))
    run = with_values(read_folder(write_run(tmp_path / "r")), "eval", accuracy_lenient=lenient)
    plot.plot_runs([with_values(run, "eval", accuracy=0.2)], tmp_path / "out.png")
    assert ("dotted" in figures[0].get_supxlabel()) == (lenient == 0.9)


@pytest.mark.parametrize("share, panels", [(0.5, 5), (0.04, 4), (None, 4)])
@pytest.mark.parametrize("variants", [1, 2])
def test_a_panel_shows_what_the_limit_cuts_off(tmp_path, monkeypatch, share, panels, variants):
    figures = []
    monkeypatch.setattr(plot, "save", lambda figure, out: figures.append(figure))
    runs = [read_folder(write_run(tmp_path / str(u), updates=u)) for u in (1, 4)[:variants]]
    runs.append(read_folder(write_run(tmp_path / "gspo", "gspo", updates=1)))
    with_values(runs[-1], "train", truncated=share, clip_frac=0.1)
    plot.plot_runs(runs, tmp_path / "x.png")
    assert len(figures[0].axes) == panels * variants
    if panels == 5:
        lines = [line for ax in figures[0].axes for line in ax.lines]
        assert any((line.get_ydata() == 0.5).all() for line in lines)


@pytest.mark.parametrize("highest, top", [(0.45, 0.52), (0.55, 1.02)])
def test_low_accuracies_have_half_the_scale(tmp_path, highest, top):
    from matplotlib.figure import Figure

    run = with_values(read_folder(write_run(tmp_path / "r")), "train", accuracy=0.1)
    with_values(run, "eval", accuracy=0.3, ci_lo=0.2, ci_hi=highest)
    ax = Figure().add_subplot()
    plot.draw_metric(ax, "accuracy", {"tepo": [run]})
    plot.finish_panel(ax, "accuracy")
    assert ax.get_ylim() == (-0.02, top)


def test_a_value_that_one_seed_lacks_is_left_out_of_the_mean_at_that_step_alone(tmp_path):
    runs = read_runs([write_run(tmp_path / str(s), seed=s) for s in range(3)])
    next(row for row in runs[2]["rows"] if row["phase"] == "train")["accuracy"] = None
    _, mean, _, _, count = average(runs, "train", "accuracy")
    assert count.tolist() == [2] + [3] * 11
    np.testing.assert_allclose(mean[:2], [0.215, 0.24])


def test_of_two_rows_of_one_step_the_last_counts():
    """Of step 2 the last row has no value, so nothing is drawn there."""
    blank = dict.fromkeys(COLUMNS)
    steps = [(1, 0.25), (1, 0.5), (2, 0.75), (2, None), (3, 0.125)]
    rows = [{**blank, "phase": "train", "step": n, "length": x} for n, x in steps]
    found = average([{"rows": rows}], "train", "length")
    want = [[1, 3], [0.5, 0.125], [0.5, 0.125], [0.5, 0.125], [1, 1]]
    assert [column.tolist() for column in found] == want


def test_what_is_drawn_is_the_mean_over_seeds_and_no_median(tmp_path):
    from matplotlib.figure import Figure

    runs = read_runs([write_run(tmp_path / str(s), seed=s) for s in (0, 1, 4)])
    ax = Figure().add_subplot()
    plot.draw_metric(ax, "accuracy", {"tepo": runs})
    np.testing.assert_allclose(ax.lines[0].get_ydata(), 0.2 + 0.08 / 3 * np.arange(1, 13))
    np.testing.assert_allclose(ax.lines[1].get_ydata(), 0.2 + 0.08 / 3 * np.arange(0, 13, 4))
    assert "Means of 3 seeds" in plot.seeds_note({"": {"tepo": runs}})


def test_a_line_breaks_where_a_seed_ends_and_says_how_many_are_left(tmp_path):
    from matplotlib.figure import Figure

    runs = short_run_among_three(tmp_path)
    ax = Figure().add_subplot()
    plot.draw_metric(ax, "entropy", {"tepo": runs})
    assert [line.get_xdata().tolist() for line in ax.lines] == [[*range(1, 9)], [*range(9, 13)]]
    assert ax.lines[0].get_linewidth() > ax.lines[1].get_linewidth()
    assert [(text.get_text(), text.xy) for text in ax.texts] == [("n = 2", (9, 0.1))]
    ax = Figure().add_subplot()
    plot.draw_metric(ax, "accuracy", {"tepo": runs})
    full, fewer = ax.containers  # the evaluations at 0, 4, 8 and the one at 12
    assert full.lines[0].get_xdata().tolist() == [0, 4, 8]
    assert full.lines[0].get_markerfacecolor() == plot.STYLES["tepo"][1]
    assert fewer.lines[0].get_xdata().tolist() == [12]
    assert fewer.lines[0].get_markerfacecolor() == "white"
    np.testing.assert_allclose(fewer.lines[0].get_ydata(), [0.38])
    assert [text.get_text() for text in ax.texts] == ["n = 2"]


def test_a_stretch_with_one_seed_has_that_seeds_interval_as_its_bar(tmp_path):
    from matplotlib.figure import Figure

    runs = read_runs([write_run(tmp_path / str(s), seed=s, steps=(12, 8)[s]) for s in (0, 1)])
    ax = Figure().add_subplot()
    plot.draw_metric(ax, "accuracy", {"tepo": runs})
    both, alone = (bars.lines[2][0].get_segments() for bars in ax.containers)
    np.testing.assert_allclose(both[2], [[8, 0.28], [8, 0.36]])  # lowest to highest seed
    np.testing.assert_allclose(alone[0], [[12, 0.27], [12, 0.37]])  # 0.32 -+ 0.05


def test_note_says_the_seeds_of_each_stretch(tmp_path):
    short = short_run_among_three(tmp_path)
    note = plot.seeds_note({"": {"tepo": short}}).replace("\n", " ")
    assert note.startswith("Means of 3 seeds; bands and bars: lowest to highest seed.")
    assert note.endswith("Seeds (n where they are fewer): TEPO: 3 to step 8, 2 to step 12.")
    whole = read_runs([write_run(tmp_path / f"g{s}", "gspo", s) for s in (0, 1)])
    one = read_runs([write_run(tmp_path / "d", "dapo")])
    waiting = read_runs([write_run(tmp_path / "w", "gspo", 5, steps=0)])
    waiting[0]["rows"].clear()
    usual = "Means of 2 seeds; bands and bars: lowest to highest seed."
    interval = "One seed: bars are its 95% Wilson interval."
    assert plot.seeds_note({"": {"gspo": whole}}) == usual
    assert plot.seeds_note({"": {"gspo": whole + waiting}}) == usual  # a run without lines is none
    assert plot.seeds_note({"": {"dapo": one}}) == interval
    assert plot.seeds_note({"": {"gspo": waiting}}) == ""
    unlike = [whole[0] | {"rows": [r for r in whole[0]["rows"] if r["phase"] == "train"]}, whole[1]]
    assert (
        plot.seeds_note({"": {"gspo": unlike}}) == usual + " " + interval
    )  # one has no evaluation
    several = plot.seeds_note({"": {"gspo": whole, "dapo": one}})
    assert several == usual.replace("2", "1 to 2") + " " + interval
    assert "TEPO, x: 3 to step 8" in plot.seeds_note({"x": {"tepo": short}, "y": {"gspo": whole}})


def test_the_figure_carries_the_note(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plot, "save", lambda figure, out: figures.append(figure))
    plot.plot_runs(short_run_among_three(tmp_path), tmp_path / "x.png")
    assert "TEPO: 3 to step 8, 2 to step 12." in figures[0].get_supxlabel()


def test_variants_and_seeds(tmp_path):
    """Runs that differ in an option are never averaged.

    The seed, the folder and the evaluation are no such options.
    """
    folders = [
        write_run(tmp_path / f"{u}{s}", seed=s, updates=u, eval_n=s)
        for u in (16, 1, 4)
        for s in (0, 1)
    ]
    groups = group(read_runs(folders))
    variants = ["1 update per rollout", "4 updates per rollout", "16 updates per rollout"]
    assert list(groups) == variants
    assert all([run["seed"] for run in algos["tepo"]] == [0, 1] for algos in groups.values())
    eps = [
        write_run(tmp_path / f"e{e}", option={"eps_low": e, "eps_high": 0.3}) for e in (0.2, 3e-4)
    ]
    assert list(group(read_runs(eps))) == [
        "eps_low = 0.0003",
        "eps_low = 0.2",
    ]
    # an option that only tells algorithms apart, as a preset may set it, makes no variant
    two = [write_run(tmp_path / "g", "gspo", lr=1e-3), write_run(tmp_path / "t", "tepo", lr=1e-4)]
    assert {name: list(algos) for name, algos in group(read_runs(two)).items()} == {
        "": ["gspo", "tepo"]
    }
    with pytest.raises(ValueError, match="two runs of tepo, seed 0"):
        group(read_runs([folders[0], folders[0]]))


def test_an_older_run_has_the_defaults_of_its_preset(tmp_path):
    """A run from before an option existed is no variant of one that was made with its default."""
    new = {**DEFAULTS["gsm8k"], "preset": "gsm8k"}
    old = {name: value for name, value in new.items() if name not in ("warmup", "overlong_cache")}
    folders = []
    for i, values in enumerate((new, old, {**new, "warmup": 3}, {**new, "gone": 1})):
        folders.append(write_run(tmp_path / str(i), **{**values, "seed": i}))
    runs = read_runs(folders)
    assert runs[0]["settings"] == runs[1]["settings"]
    assert list(group(runs[:2])) == [""]
    assert list(group(runs[1:3])) == ["warmup = 3", "warmup = 10"]
    assert list(group(runs[::3])) == ["defaults", "gone = 1"]  # an option that exists no more


def test_each_option_says_whether_it_makes_another_experiment(tmp_path):
    """One run per option, which alone differs in it: a variant if and only if its field says so."""
    usual = {**DEFAULTS["tiny"], "preset": "tiny", "algo": "tepo", "out": "a"}
    for about in fields(Options):
        if about.name in ("algo", "seed", "steps", "option"):  # write_run sets them
            continue
        a = write_run(tmp_path / "a", **{**usual, "seed": 0})
        b = write_run(tmp_path / "b", **{**usual, "seed": 1, about.name: "other"})
        variants = 2 if about.metadata["experiment"] else 1
        assert len(group(read_runs([a, b]))) == variants, about.name


# Pictures


def test_few_evaluations_are_points_and_the_rollouts_the_curve(tmp_path):
    from matplotlib.figure import Figure

    for steps, joined in ((8, False), (12, True)):  # 3 and 4 evaluations
        run = read_folder(write_run(tmp_path / str(steps), steps=steps))
        ax = Figure().add_subplot()
        plot.draw_metric(ax, "accuracy", {"tepo": [run]})
        rollouts, markers = ax.lines[:2]
        assert (markers.get_linestyle() == "-") == joined
        assert (rollouts.get_linewidth() > 1) == (not joined)


def test_variants_of_one_method_share_their_panels(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plot, "save", lambda figure, out: figures.append(figure))
    for prompt in ("a" * 99 + "{question}", "{question}"):
        name = str(len(prompt))
        write_run(tmp_path / name, prompt=prompt, lr=1 / len(prompt))
    plot.plot_runs([tmp_path / "10", tmp_path / "109"], tmp_path / "x.png")
    names = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert len(names) == 2 and names[0].startswith("TEPO\n") and len(figures[0].axes) == 3
    lines = "\n".join(names).split("\n")
    assert max(map(len, lines)) <= 24 and any("…" in line for line in lines)
    colours = {line.get_color() for line in figures[0].axes[1].lines}
    assert len(colours) == 2 and plot.STYLES["tepo"][1] in colours


def test_a_panel_shows_the_end_of_several_methods(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plot, "save", lambda figure, out: figures.append(figure))
    methods = ("grpo", "dapo", "gspo", "tepo")
    folders = [write_run(tmp_path / f"{a}{s}", a, s) for a in methods for s in (0, 1)]
    plot.plot_runs(folders, tmp_path / "x.png")
    (end,) = [ax for ax in figures[0].axes if "end" in ax.get_title()]
    means, seeds = end.lines[::2], end.lines[1::2]
    assert [text.get_text() for text in end.get_xticklabels()] == ["GRPO", "DAPO", "GSPO", "TEPO"]
    for mean, seed in zip(means, seeds, strict=True):  # at step 12: 0.2 + 0.12 (seed + 1)
        np.testing.assert_allclose(mean.get_ydata(), 0.38)
        np.testing.assert_allclose(seed.get_ydata(), [0.32, 0.44])


@pytest.mark.parametrize("clipped, panels", [(0.0, 3), (1e-6, 4), (None, 3)])
def test_a_clip_that_never_acts_is_a_sentence_and_no_panel(tmp_path, monkeypatch, clipped, panels):
    figures = []
    monkeypatch.setattr(plot, "save", lambda figure, out: figures.append(figure))
    run = with_values(read_folder(write_run(tmp_path / "r")), "train", clip_frac=clipped)
    plot.plot_runs([run], tmp_path / "x.png")
    assert len(figures[0].axes) == panels
    told = "No token was clipped" in figures[0].get_supxlabel()
    assert told == (clipped == 0)


def test_styles_tell_all_apart():
    """By colour; in grey by dashes and marker together, the seven by each of the two."""
    assert list(plot.STYLES) == list(plot.NOTES) == list(ORDER)
    assert set(ORDER) == {*ALGORITHMS, *MORE} and len(ORDER) == 28
    styles = list(plot.STYLES.values())
    assert len({name for name, *_ in styles}) == 28
    assert len({(dashes, marker) for _, _, dashes, marker in styles}) == 28
    for column in (2, 3):
        assert len({plot.STYLES[algo][column] for algo in ALGORITHMS}) == 7
    colours = [ImageColor.getrgb(colour) for _, colour, _, _ in styles]
    assert min(math.dist(a, b) for a, b in combinations(colours, 2)) > 60


@pytest.mark.parametrize("max_bytes", [plot.MAX_BYTES, 60_000])  # 60,000: with a palette
def test_curves_of_seven_algorithms(tmp_path, monkeypatch, max_bytes):
    monkeypatch.setattr(plot, "MAX_BYTES", max_bytes)
    folders = [write_run(tmp_path / f"{a}{s}", a, s) for a in ALGORITHMS for s in range(3)]
    plot.plot_runs(folders, tmp_path / "new" / "curves.png")
    colours = check_picture(tmp_path / "new" / "curves.png", 1280)
    assert all(shows(colours, plot.STYLES[algo][1]) for algo in ALGORITHMS)
    plot.plot_runs([write_run(tmp_path / "one", "gtpo")], tmp_path / "one.png")
    colours = check_picture(tmp_path / "one.png", 1280)
    assert shows(colours, plot.STYLES["gtpo"][1]) and not shows(colours, plot.STYLES["tepo"][1])


def test_more_than_seven_methods_are_small_multiples(tmp_path, monkeypatch):
    """A cell per method, of two panels: itself in its colour, GRPO and DAPO in grey behind it."""
    figures, save = [], plot.save
    monkeypatch.setattr(plot, "save", lambda figure, out: figures.append(figure))
    folders = [write_run(tmp_path / f"{a}{s}", a, s) for a in ORDER[:8] for s in (0, 1)]
    high = folders[-1] / "metrics.jsonl"  # of clip_cov, the last
    high.write_text(high.read_text().replace('"entropy": 0.5', '"entropy": 3'))
    plot.plot_runs(folders, tmp_path / "curves.png")
    axes = np.reshape(figures[0].axes, (4, 5))  # accuracy, entropy, accuracy, entropy
    shown = {}
    for k in range(10):
        accuracy, entropy = axes[k // 5 * 2, k % 5], axes[k // 5 * 2 + 1, k % 5]
        name = accuracy.get_title()
        if not name:  # eight methods without the two in grey are six
            assert k >= 6 and not accuracy.axison and not entropy.axison
            continue
        shown[name] = entropy
        for ax in (accuracy, entropy):
            assert [line.get_color() for line in ax.lines[:2]] == list(plot.BEHIND.values())
        others = {line.get_color() for line in entropy.lines[2:]}
        assert others == {colour for label, colour, *_ in plot.STYLES.values() if label == name}
    assert list(shown) == [plot.STYLES[algo][0] for algo in ORDER[2:8]]
    tops = {ax.get_ylim()[1] for ax in shown.values()}  # one axis for all, which fits the highest
    assert len(tops) == 1 and tops.pop() > 1.75
    save(figures[0], tmp_path / "curves.png")
    check_picture(tmp_path / "curves.png", 1280)
    alone = [run for run in read_runs(folders) if run["algo"] not in plot.BEHIND]
    for algo in ("cispo", "sapo"):
        alone.append(read_folder(write_run(tmp_path / algo, algo)))
    plot.plot_runs(alone, tmp_path / "curves.png")  # neither GRPO nor DAPO: nothing in grey
    grey = [line for line in axes[0, 0].lines if line.get_color() in plot.BEHIND.values()]
    assert len(figures[1].axes) == 20
    assert len(figures[1].axes[0].lines) == len(axes[0, 0].lines) - len(grey)


def test_curves_of_variants_stand_side_by_side(tmp_path):
    folders = [
        write_run(tmp_path / f"{a}{u}", a, updates=u) for a in ("tepo", "gspo") for u in (1, 4, 16)
    ]
    plot.plot_runs(folders, tmp_path / "curves.png")
    check_picture(tmp_path / "curves.png", 1296)
    write_csv(read_runs(folders), tmp_path / "metrics.csv")
    plot.plot_runs([tmp_path / "metrics.csv"], tmp_path / "again.png")
    one, other = (
        np.asarray(Image.open(tmp_path / name).convert("RGB"), int)
        for name in ("curves.png", "again.png")
    )
    assert (
        np.abs(one - other).mean() < 0.5
    )  # four digits are kept: the same figure to less than a pixel


def test_trainer_may_draw_at_any_moment(tmp_path):
    """No lines, only nulls, an unknown algorithm: never an error.

    And quick: a training step takes longer.
    """
    folder = write_run(tmp_path / "a", "mine", steps=0)
    (folder / "metrics.jsonl").write_text("")
    plot.plot_runs([folder], folder / "curves.png")
    (folder / "metrics.jsonl").write_text(
        '{"phase": "train", "step": 1, "accuracy": null}\n{"phase": "eval", "step": 0}\n'
    )
    started = time.process_time()
    plot.plot_runs([folder], folder / "curves.png")
    assert time.process_time() - started < 3  # about 0.6 s
    check_picture(folder / "curves.png", 1280)
    assert (
        "matplotlib.pyplot"
        not in subprocess.run(
            [sys.executable, "-c", "import sys, plot; print(*sys.modules)"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        ).stdout.split()
    )


def test_picture_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    out = tmp_path / "curves.png"
    plot.plot_runs([write_run(tmp_path / "a")], out)
    with open(out, "rb") as reader:
        before = out.read_bytes()
        plot.plot_runs([write_run(tmp_path / "b", "gspo")], out)
        assert (
            reader.read() == before != out.read_bytes()
        )  # whoever is reading keeps the old one, whole
    before = out.read_bytes()

    def full_disk(self, part, **_):
        part.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full_disk)
    with pytest.raises(OSError, match="No space"):
        plot.plot_runs([tmp_path / "a"], out)
    assert out.read_bytes() == before and not list(tmp_path.glob(".*"))


# Entropy against accuracy


def test_fit_finds_known_coefficients():
    entropy = np.linspace(0.1, 1.2, 40)
    a, b = plot.fit_entropy(entropy, -0.35 * np.exp(entropy) + 1.2)
    assert (a, b) == pytest.approx((0.35, 1.2))
    noise = 0.05 * np.random.default_rng(0).normal(size=40)
    noisy = -0.35 * np.exp(entropy) + 1.2 + noise
    a, b = plot.fit_entropy(entropy, noisy)
    assert (a, b) == pytest.approx((0.35, 1.2), abs=0.05)
    rest = noisy + a * np.exp(entropy) - b
    assert rest.mean() == pytest.approx(0, abs=1e-12)
    assert rest @ np.exp(entropy) == pytest.approx(0, abs=1e-9)
    for points in ([], [1.0, 2.0], [0.5] * 9):
        assert all(map(math.isnan, plot.fit_entropy(points, points)))


def test_misfit_is_the_largest_mean_error_of_a_tenth():
    entropy = np.linspace(0, 1, 40)[::-1]  # in any order
    right = 0.9 - 0.2 * np.exp(entropy)
    assert plot.misfit(entropy, right, 0.2, 0.9) == pytest.approx(0, abs=1e-12)
    shifted = right.copy()
    shifted[:4] -= [0.1, 0.2, 0.3, 0.4]  # the tenth with the highest entropy
    shifted[20] += 0.9  # a single point counts a quarter
    assert plot.misfit(entropy, shifted, 0.2, 0.9) == pytest.approx(0.25)
    assert plot.misfit(np.array([]), np.array([]), 0.2, 0.9) == 0


def test_entropy_figure_prints_the_fit(tmp_path, capsys):
    folders = [write_run(tmp_path / f"{a}{s}", a, s) for a in ("tepo", "gspo") for s in (0, 1)]
    for folder in folders:
        rows = read_folder(folder)["rows"]
        for row in rows:
            if row["phase"] == "train":
                # of the rows that entropy covers; an older file has `accuracy` alone
                name = "accuracy_trained" if folder.name.startswith("tepo") else "accuracy"
                row[name] = 0.9 - 0.2 * math.exp(row["entropy"])
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot.plot_entropy(read_runs(folders), tmp_path / "entropy.png")
    check_picture(tmp_path / "entropy.png", 1280)
    printed = {
        line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:]
    }
    fits = {name: ["0.200", "0.900", "0.000", "24"] for name in ("GSPO", "TEPO")}
    assert printed == {**fits, "all": ["0.200", "0.900", "0.000", "48"]}
    plot.plot_entropy(read_runs([write_run(tmp_path / "w", steps=0)]), tmp_path / "empty.png")


# The credit picture


@pytest.mark.parametrize("algo", plot.STYLES)
def test_push_is_minus_the_gradient(algo, tmp_path):
    """Against autograd called by hand on the losses' own functions.

    And the sign: right rows up, wrong rows down.
    """
    rows = plot.read_group(write_samples(tmp_path))
    T, ids = max(len(row["tokens"]) for row in rows), torch.zeros(4, 7, dtype=torch.long)
    words = ["1", "$2$", " +", "\n", "words", "####", "<eos>"]  # of write_samples
    entropy, new, old = torch.zeros(3, 4, T, dtype=torch.float64)
    mask = torch.zeros(4, T)
    for i, row in enumerate(rows):
        for t in range(len(row["tokens"])):
            entropy[i, t], new[i, t], old[i, t] = (
                row["entropy"][t],
                row["logprobs"][t],
                row["old_logprobs"][t],
            )
            mask[i, t] = 1
            ids[i, t] = words.index(row["tokens"][t])
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    group = plot.tensors(rows)
    assert torch.equal(group.rewards, rewards) and torch.equal(group.mask, mask)
    push, clipped = plot.push(algo, group)

    module = load_algorithm(algo)
    more = named(module.advantages, {"completions": ids, "entropy": entropy, "mask": mask})
    advantages = module.advantages(rewards, 4, **more)
    leaf = new.clone().requires_grad_()
    torch.manual_seed(0)
    module.loss(leaf, old, advantages, mask).backward()
    torch.testing.assert_close(push, -leaf.grad, rtol=0, atol=0)
    assert (push[mask == 0] == 0).all() and not clipped[mask == 0].any()
    if algo == "ktae":  # a token may be a key to wrong answers, in a right row too
        assert (push * advantages >= 0).all() and push.any()
        return
    if algo == "kl_cov":  # one token of these 19 pays |log w|, whatever its advantage
        assert (push * advantages[:, None] < 0).sum() <= 1 and not clipped.any()
        return
    if algo == "dro":  # what has moved up in a right row is pushed back by log w, at most 1
        assert (push * advantages[:, None] < 0).any() and not clipped.any()
        return
    assert (push[[0, 2]] >= 0).all() and (push[[1, 3]] <= 0).all() and push.abs().sum() > 0
    if algo == "raft":  # its wrong rows have no advantage: nothing there is clipped
        assert not push[[1, 3]].any() and not clipped[[1, 3]].any()
        return
    assert torch.equal(
        clipped, (push == 0) & (mask == 1)
    )  # all advantages of this group are other than 0
    if algo == "gspo":  # the whole row or nothing
        assert (
            all(len(set(clipped[i][mask[i] == 1].tolist())) == 1 for i in range(4))
            and clipped.any()
        )


@pytest.mark.parametrize("algo", ["gtpo", "grpo_s"])
def test_push_takes_success_from_correctness(algo):
    """Row 1 is right, its reward 0.5 for its length: its tokens are pushed up all the same."""
    ones = torch.ones(4, 2, dtype=torch.float64)
    rewards, right = torch.tensor([[1, 0.5, 0, 0], [1, 1, 0, 0]], dtype=torch.float64)
    group = SimpleNamespace(rewards=rewards, right=right, entropy=ones, mask=ones)
    group.logprobs = group.old_logprobs = -ones
    group.completions, group.history, group.ref_logprobs = ones.long(), None, None
    push, _ = plot.push(algo, group)
    assert (push[:2] > 0).all() and (push[2:] < 0).all()


def test_rows_are_right_by_correctness_and_by_reward_only_in_older_files(tmp_path):
    folder = write_samples(tmp_path)
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [row["right"] for row in plot.read_group(folder)] == [True, False, True, False]
    for row, right in zip(lines, (True, True, False, False), strict=True):
        row["right"] = right  # row 1: right, its reward 0; row 2: wrong, its reward 1
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    assert [row["right"] for row in plot.read_group(folder)] == [True, True, False, False]
    lines[0]["right"] = "yes"
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    with pytest.raises(ValueError, match="line 1 is not a completion"):
        plot.read_group(folder)


def test_credit_picture_labels_by_correctness(tmp_path, monkeypatch):
    folder, figures = write_samples(tmp_path), []
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    for row, right in zip(lines, (True, True, True, False), strict=True):
        row["right"] = right
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    monkeypatch.setattr(plot, "save", lambda figure, out: figures.append(figure))
    plot.plot_credit(folder, tmp_path / "x.png", shown=4)
    labels = [text.get_text() for text in figures[0].axes[0].texts]
    assert labels.count("right") == 3 and labels.count("WRONG") == 1


def test_group_is_the_one_that_moved_most(tmp_path):
    folder = write_samples(tmp_path, steps=(10, 30, 20))
    assert {row["step"] for row in plot.read_group(folder)} == {30}
    assert {row["step"] for row in plot.read_group(folder, step=20)} == {20}
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    lines[4]["reward"] = 0.0  # one right of four shows less than two and two do
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    assert {row["step"] for row in plot.read_group(folder)} == {20}
    for row in lines[4:8]:
        row["reward"] = 1.0  # step 30 teaches nothing now
    stray = lines[8] | {
        "step": 40,
        "skipped": True,
        "logprobs": [float("nan")] * 5,
    }  # the trainer's note of a bad row
    (folder / "samples.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*lines, stray]) + '{"step": 5'
    )
    assert {row["step"] for row in plot.read_group(folder)} == {20}
    with pytest.raises(ValueError, match="right and wrong completions at step 30"):
        plot.read_group(folder, step=30)
    (folder / "samples.jsonl").write_text('{"step": 1, "prompt": ""}\n')
    with pytest.raises(ValueError, match="line 1 is not a completion"):
        plot.read_group(folder)


def test_credit_picture(tmp_path):
    plot.plot_credit(write_samples(tmp_path), tmp_path / "credit.png")
    colours = check_picture(tmp_path / "credit.png", 1280)
    from matplotlib import colormaps

    for end in (0.88, 0.12):  # the strongest push up and down, as the legend shows it
        assert np.abs(colours - np.array(colormaps["RdBu"](end)[:3]) * 255).max(1).min() <= 16


def test_credit_picture_of_all_28(tmp_path, monkeypatch, capsys):
    """In the order of tables; the same picture every time, and torch's random state stays."""
    plot.main(["--credit", CREDIT, "--algos", "all", "--out", str(tmp_path / "a.png")])
    check_picture(tmp_path / "a.png", 1280)
    figures = []
    monkeypatch.setattr(plot, "save", lambda figure, out: figures.append(figure))
    for words in (["--algos", "cispo,clip_cov,grpo"], []):
        plot.main(["--credit", CREDIT, *words])
    titles = [[ax.get_title(loc="left").split(":")[0] for ax in f.axes] for f in figures]
    assert titles[0] == ["Entropy", "GRPO", "Clip-Cov", "CISPO"]
    assert titles[1] == ["Entropy", *(plot.STYLES[algo][0] for algo in ORDER[:7])]
    group = plot.tensors(plot.read_group(Path(CREDIT)))
    torch.manual_seed(1)
    before, state = plot.push("clip_cov", group)[0], torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(before, plot.push("clip_cov", group)[0])
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())


def change_samples(folder, **values):
    """Give every line of a samples.jsonl these values."""
    path = folder / "samples.jsonl"
    lines = [json.loads(line) | values for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize(
    "values, told",
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
    folder = change_samples(write_samples(tmp_path), **values)
    with pytest.raises(SystemExit) as exit:
        plot.main(["--credit", str(folder)])
    assert exit.value.code == 2
    assert capsys.readouterr().err == f"plot.py: error: {folder / 'samples.jsonl'}: {told}\n"
    assert not list(folder.glob("*.png"))


def test_numbers_as_text_are_numbers(tmp_path):
    folder = change_samples(write_samples(tmp_path), tokens=["a"], entropy=["0.5"])
    change_samples(folder, logprobs=["-0.5"], old_logprobs=["-0.75"])
    assert plot.read_group(folder)[0]["logprobs"] == [-0.5]


def test_text_that_no_font_has_is_drawn(tmp_path):
    """Lone surrogates and control characters, which matplotlib or an SVG cannot have."""
    text = "a\ud800\x00\x1b[31m\ufffe b"
    folder = change_samples(write_samples(tmp_path), prompt=text, tokens=[text])
    numbers = {"entropy": [0.5], "logprobs": [-0.5], "old_logprobs": [-0.75]}
    change_samples(folder, **numbers)
    plot.plot_credit(folder, tmp_path / "a.png")
    plot.plot_credit(folder, tmp_path / "a.svg")
    ElementTree.parse(tmp_path / "a.svg")
    assert plot.cell_text(text) == "a���[31m� b"


def test_a_cell_shows_a_part_of_a_character_and_the_eos_and_no_other_special_token_as_eos():
    row = {"completion": "<b>½\n<think>", "tokens": ["<b>", "", "½", "\n", "<think>"]}
    assert plot.cell_texts(row) == ["<b>", "◌", "½", "↵", "<think>"]
    row["tokens"].append("<|endoftext|>")
    assert plot.cell_texts(row) == ["<b>", "◌", "½", "↵", "<think>", "EOS"]


def test_long_rows_are_cut_and_small(tmp_path):
    """Twenty completions of 300 tokens, letters of another script, dollars.

    The picture has 4 rows of two lines per panel, and at most 500 kB.
    """
    folder = write_samples(tmp_path)
    row = json.loads((folder / "samples.jsonl").read_text().splitlines()[0])
    row |= {k: [-0.5 - 0.001 * t for t in range(300)] for k in ("logprobs", "old_logprobs")}
    row |= {"entropy": [0.5] * 300, "tokens": ["x", "$\\frac", "é"] * 100, "prompt": "why " * 400}
    with open(folder / "samples.jsonl", "w") as file:
        file.writelines(json.dumps(row | {"reward": float(i < 9)}) + "\n" for i in range(20))
    plot.plot_credit(folder / "samples.jsonl", tmp_path / "credit.png")
    check_picture(tmp_path / "credit.png", 1280, limit=500_000)


def test_long_rows_wrap_and_end_in_an_ellipsis():
    cells = plot.cells_of(["word"] * 60)  # 4.7 wide: 23 to a line
    assert [line for line, *_ in cells] == [0] * 23 + [1] * 24
    assert cells[-1][3] == "…" and cells[22][1] == pytest.approx(22 * 4.7) and cells[23][1] == 0
    assert (plot.lines_of(["word"] * 23), plot.lines_of(["word"] * 24), plot.lines_of([])) == (
        1,
        2,
        1,
    )


# Command line


def test_command_line_draws(tmp_path, capsys):
    folder = write_samples(write_run(tmp_path / "a"))
    for flag, name in (
        ([], "curves.png"),
        (["--entropy"], "entropy.png"),
        (["--credit"], "credit.png"),
    ):
        plot.main([*flag, str(folder)])
        assert capsys.readouterr().out.split()[-1] == str(folder / name)
        check_picture(folder / name, 1280)
    plot.main([str(folder), "--out", str(tmp_path / "b" / "x.svg")])
    assert "<svg" in (tmp_path / "b" / "x.svg").read_text()


def test_help_teaches():
    text = subprocess.run(
        [sys.executable, "plot.py", "--help"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    assert text.count("python plot.py ") >= 5 and "--credit" in text and "docs/" in text


@pytest.mark.parametrize("script", ["plot.py", "compare.py"])
@pytest.mark.parametrize("word, status", [("--help", 0), ("--nonsense", 2)])
def test_help_and_a_wrong_option_import_neither_matplotlib_nor_torch(script, word, status):
    # A module that is None in sys.modules cannot be imported: whoever tries gets an ImportError.
    code = (
        "import runpy, sys; sys.modules['torch'] = sys.modules['matplotlib'] = None;"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, script, *(["x"] * (script == "plot.py")), word]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert "usage: " in done.stdout if status == 0 else "no option --nonsense" in done.stderr


@pytest.mark.parametrize(
    "args, told",
    [
        (["nowhere"], "nowhere: no such run"),
        (["empty"], "no metrics.jsonl"),
        (["torn"], "line 2 is not"),
        (["good", "--step", "3"], "--step goes with --credit"),
        (["good", "--algos", "cispo"], "--algos goes with --credit"),
        (["good", "--credit", "--algos", "cipso"], "no algorithm 'cipso'; did you mean cispo?"),
        (["good", "--credit"], "samples.jsonl: no such file"),
        (["good", "--out", "good/metrics.jsonl/x.png"], "good/metrics.jsonl is not a folder"),
        (["good", "--out", "."], "argument --out: . is a folder; add the name of a file"),
        (["good", "--out", "x.what"], "what"),
        (["--entropy", "--credit", "good"], "not allowed with"),
        ([], "RUN"),
    ],
)
def test_command_line_refuses_in_one_line(tmp_path, monkeypatch, capsys, args, told):
    write_run(tmp_path / "good")
    (tmp_path / "empty").mkdir()
    torn = write_run(tmp_path / "torn") / "metrics.jsonl"
    torn.write_text(torn.read_text().replace("\n", "\n{\n", 1))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        plot.main(args)
    told_all = capsys.readouterr().err
    assert exit.value.code == 2 and told in told_all
    assert told_all.count("\n") == 1 and told_all.startswith("plot.py: error: ")
