"""claims/rare_tokens_of.py in miniature, on the embedded model in place of a real one."""

import pytest

from claims import kit, rare_tokens_of


def test_the_parts_are_sorted_and_their_shares_add_up(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rare_tokens_of, "FLAGS", ["--max-new-tokens", "24"])
    out = tmp_path / "x.csv"
    assert rare_tokens_of.main(["tiny", "--data", "tiny", "--out", str(out)]) == 0
    rows = kit.read_rows(out)
    assert sum(row["share"] for row in rows) == pytest.approx(1, abs=1e-3)
    p = [row["p"] for row in rows]
    assert p == sorted(p) and p[0] < 0.5 < p[-1]
    assert rows[0]["norm"] > 10 * rows[-1]["norm"]
    assert capsys.readouterr().out.count("part ") == len(rows) == 10


def test_a_missing_model_is_refused_in_a_line(tmp_path, capsys):
    assert rare_tokens_of.main([str(tmp_path / "none"), "--data", "tiny"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
