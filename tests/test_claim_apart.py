"""claims/apart.py: the statistics by hand, and the table, lines and figure of made-up runs."""

import itertools

import numpy as np
import pytest
from scipy import stats

from claims import apart, kit

ALL = (*apart.METHODS, apart.WIDE)


def made_up(effect=0.1, seeds=range(4)):
    """Rows of runs whose accuracy is a method's level plus a seed's, plus noise; DAPO is better."""
    noise = np.random.default_rng(0).normal(0, 0.01, (len(ALL), 10))
    rows = []
    for i, seed, step in itertools.product(range(len(ALL)), seeds, (0, 5, 10)):
        accuracy = 0.5 + effect * (ALL[i] == "dapo") + 0.02 * seed + noise[i, seed] * (step == 10)
        row = {"method": ALL[i], "lr": apart.LR, "seed": seed, "step": step, "accuracy": accuracy}
        jitter = noise[i, seed]
        rows.append({**row, "pass_at_k": 0.9 + jitter, "length_wrong": 20.0 + i + jitter})
    return rows


def test_the_pooled_residual_is_that_of_a_slow_loop():
    values = np.random.default_rng(1).normal(size=(3, 4))
    total = 0.0
    for i, j in itertools.product(range(3), range(4)):
        method, seed = values[i].mean(), values[:, j].mean()
        total += (values[i, j] - method - seed + values.mean()) ** 2
    assert apart.residual(values) == (pytest.approx(total / 6), 6)


def test_an_effect_of_the_seed_alone_leaves_no_residual():
    assert apart.residual(np.array([[1.0, 2, 4], [3.0, 4, 6]]))[0] == pytest.approx(0)


def test_holm_by_hand():
    """Sorted 0.01, 0.02, 0.03 times 3, 2, 1; none is smaller than the one before it."""
    assert kit.holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert kit.holm([0.9, 0.5]) == [1.0, 1.0]


def test_a_contrast_is_the_difference_of_means_with_the_pooled_error():
    rows = made_up()
    methods, values = apart.table(rows, "final")
    s2, freedom = apart.residual(values)
    text, difference, half, p = apart.contrasts(rows, "final")[0]
    expected = (values[methods.index("dapo")] - values[methods.index("tepo")]).mean()
    assert difference == pytest.approx(expected) and abs(difference - 0.1) < 0.03
    assert half == pytest.approx(stats.t.ppf(0.975, freedom) * (2 * s2 / 4) ** 0.5)
    assert p < 0.001 and "DAPO - TEPO" in text


def test_only_seeds_of_all_methods_count():
    rows = [row for row in made_up() if not (row["method"] == "gtpo" and row["seed"] == 3)]
    assert apart.table(rows, "final")[1].shape == (len(ALL), 3)


def test_an_endpoint_of_a_run():
    run = [{"accuracy": a, "pass_at_k": a / 2, "length_wrong": 9 * a} for a in (0.1, 0.4, 0.6)]
    values = [apart.endpoint(run, name) for name in apart.ENDPOINTS]
    assert values == pytest.approx([0.6, 0.5, 0.3, 5.4])


def test_the_figure_and_the_lines(tmp_path):
    path = tmp_path / "apart.csv"
    kit.write_rows(path, made_up())
    assert apart.main(["--redraw", "--out", str(tmp_path / "apart.png")]) == 0
    assert (tmp_path / "apart.png").stat().st_size > 10_000
    said = "\n".join(apart.say(kit.read_rows(path)))
    assert "means of 4 seeds" in said and "by Holm" in said
