"""claims/biased_advantage.py: its sums against simulation, grpo.py and more/ha_dw.py."""

import itertools
import math

import pytest
import torch

import grpo
from claims import biased_advantage as biased
from more import ha_dw


@pytest.mark.parametrize("G", biased.GROUPS)
def test_the_advantage_of_a_right_completion_is_that_of_grpo(G):
    for k in range(1, G):
        rewards = torch.tensor([1.0] * k + [0.0] * (G - k), dtype=torch.float64)
        A = grpo.advantages(rewards, G)
        assert A[0].item() == pytest.approx(biased.right_advantage(G, k), rel=1e-9)
        # HA-DW beside the mirrored group: the mean of all rewards is 0.5
        both = torch.cat([rewards, 1 - rewards])
        weighted = ha_dw.advantages(both, G, window=1)[:G] / biased.SCALE
        up, down = biased.hadw_weights(G, k)
        assert weighted[0].item() == pytest.approx(A[0].item() * up, rel=1e-9)
        assert weighted[-1].item() == pytest.approx(A[-1].item() * down, rel=1e-9)


@pytest.mark.parametrize("G", biased.GROUPS)
@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9])
def test_the_baseline_of_mixed_groups(G, p):
    """(p - p^G) / (1 - p^G - (1 - p)^G), above p for a hard problem, below it for an easy one."""
    found = biased.exact(G, p)["baseline"]
    assert found == pytest.approx((p - p**G) / (1 - p**G - (1 - p) ** G), rel=1e-9)
    assert (found > p) == (p < 0.5) or p == 0.5


@pytest.mark.parametrize("p", [0.1, 0.5, 0.85])
def test_the_sums_are_what_simulated_groups_show(p):
    g = torch.Generator().manual_seed(0)
    rewards = (torch.rand(1, 160_000, generator=g, dtype=torch.float64) < p).double()
    (row,) = biased.observed(rewards, 8)
    want = biased.exact(8, p)
    assert row["baseline"] == pytest.approx(want["baseline"], abs=0.01)
    assert row["right_std"] == pytest.approx(want["right_std"], rel=0.03)
    anchor = rewards.mean().item()

    def hadw(k):
        return biased.right_advantage(8, k) * biased.hadw_weights(8, k, anchor)[0]

    assert row["right_hadw"] == pytest.approx(biased.given_mixed(8, p, hadw), rel=0.03)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.85])
def test_the_weight_of_the_gradient_by_enumeration(p):
    """A policy of one logit x, p = sigmoid(x): grad log pi is 1 - p or -p, grad p is p (1 - p)."""
    G = 4
    expected = {"plain": 0.0, "grpo": 0.0, "hadw": 0.0}
    for outcome in itertools.product([0.0, 1.0], repeat=G):
        r = torch.tensor(outcome, dtype=torch.float64)
        chance = math.prod(p if x else 1 - p for x in outcome)
        A = grpo.advantages(r, G)
        weighted = ha_dw.advantages(torch.cat([r, 1 - r]), G, window=1)[:G] / biased.SCALE
        for name, values in (("plain", r - r.mean()), ("grpo", A), ("hadw", weighted)):
            expected[name] += chance * (values * (r - p)).mean().item()
    row = biased.exact(G, p)
    for name, value in expected.items():
        assert row[name] == pytest.approx(value / (p * (1 - p)), rel=1e-9)
    assert row["plain"] == pytest.approx((G - 1) / G, rel=1e-9)  # the same for every p


def test_miniature(tmp_path):
    sizes = {"steps": 0, "problems": 4, "draws": 32}
    rows = biased.run((0, sizes, ()))
    assert len(rows) == 4 * len(biased.GROUPS)
    for row in rows:
        assert 0 <= row["groups"] <= 16 // row["G"]
        assert row["baseline"] is None or 0 < row["baseline"] < 1
    rows = [{**biased.EMPTY, **biased.exact(G, p)} for G in biased.GROUPS for p in (0.05, 0.5)]
    for p in (0.1, 0.12, 0.5):  # and problems of known p, two of them in one bin
        g = torch.Generator().manual_seed(1)
        (row,) = biased.observed((torch.rand(1, 128, generator=g) < p).double(), 8)
        rows.append({**biased.EMPTY, "kind": "measured", "first": p, **row})
    assert len(biased.biases(biased.measured(rows, 8, "hard"))) == 2
    biased.draw(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert any("2 problems" in line for line in biased.say(rows))
