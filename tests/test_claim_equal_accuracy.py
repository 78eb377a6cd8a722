"""claims/equal_accuracy.py: the ways to read a run, on made-up runs of known truth."""

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from claims import equal_accuracy as claim


def made_up(speed, seed, noise=0.06):
    """A run of 100 steps whose entropy depends on its true accuracy alone, not on its speed.

    Each step's problems move accuracy by noise and entropy by none, as hard problems do.
    """
    step = np.arange(1, 101)
    truth = 0.85 * (1 - np.exp(-speed * step))
    drawn = np.random.default_rng(seed).normal(0, noise, 100)
    return truth + drawn, 0.5 * (0.95 - truth)


def mean_over_seeds(read):
    return np.mean([read(seed) for seed in range(40)])


def test_the_crossing_gives_equal_entropies_where_the_truth_is_equal_and_the_band_does_not():
    def crossing(speed):
        def read(seed):
            accuracy, entropy = made_up(speed, seed)
            return claim.at(entropy, claim.crossing(accuracy, 0.7))

        return mean_over_seeds(read)

    def band(speed):
        return mean_over_seeds(lambda seed: claim.in_band(*made_up(speed, seed), 0.7))

    fast, slow = 0.06, 0.025
    assert crossing(fast) == pytest.approx(crossing(slow), abs=0.01)
    assert band(fast) < band(slow) - 0.01


def test_without_noise_every_way_reads_the_truth():
    accuracy = np.linspace(0.1, 0.9, 81)
    entropy = 0.4 - 0.3 * accuracy
    place = claim.crossing(accuracy, 0.5)
    assert place == pytest.approx(40)
    assert claim.at(entropy, place) == pytest.approx(0.25)
    assert claim.in_band(accuracy, entropy, 0.5) == pytest.approx(0.25)
    assert claim.crossing(accuracy, 0.95) is None
    assert claim.at(entropy, None) is None


def test_held_out_reads_between_two_evaluations():
    rows = [(0, 0.1), (25, 0.5), (50, 0.9)]
    rows = [{"phase": "eval", "step": step, "accuracy": value} for step, value in rows]
    assert claim.held_out({"rows": pd.DataFrame(rows)}, 0.6) == pytest.approx(25 + 6.25 - 1)


def test_the_difference_pairs_the_seeds():
    rows = []
    for seed, shift in enumerate((0.0, 0.1, 0.2)):
        for method, value in (("grpo", 0.3), ("grpo_s", 0.4), ("trgrpo", 0.5)):
            rows.append({"method": method, "seed": seed, "entropy": value + shift})
        for method in ("dapo", "tepo", "gtpo"):
            rows.append({"method": method, "seed": seed, "entropy": 0.1 + shift})
    rows = [{**row, "level": 0.5, "way": "crossing", "length": 10.0, "step": 1} for row in rows]
    assert claim.difference(rows, 0.5, "crossing", "entropy") == pytest.approx((0.3, 0.0))
    assert claim.difference(rows, 0.5, "crossing", "per completion") == pytest.approx((3, 0))
    rows[0]["entropy"] = None
    assert claim.difference(rows, 0.5, "crossing", "entropy") == (None, None)


def test_the_command_writes_the_committed_numbers(tmp_path, capsys):
    assert claim.main(["--out", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    new, old = (claim.kit.read_rows(path) for path in (tmp_path / "a.csv", committed()))
    assert len(new) == len(old)
    for a, b in zip(new, old, strict=True):
        for key, value in b.items():
            is_number = isinstance(value, float)
            assert a[key] == (pytest.approx(value, rel=1e-3) if is_number else value)
    assert "0.75: " in capsys.readouterr().out


def committed():
    return ROOT / "claims" / "equal_accuracy.csv"
