"""The seven methods side by side: how hard each pushes a token, in a table and in a figure.

    python claims/pushes.py              # writes claims/pushes.png and claims/pushes.csv
    python claims/pushes.py --table      # prints the table of CLAIMS.md

The push on a token is -dL/dlogp: L is the loss of the mini-batch, logp the token's log-probability.
Where it is above 0, the update makes the token more likely. Each method is three words, a row of
METHODS, and `push` is its closed form, without autograd; of TR-GRPO for both readings of its
weight. tests/test_claims.py holds it against the gradient of the method's own `loss`.

The figure shows a completion of 20 tokens in which one token has moved.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, when run as a script

from claims import kit
from run.algorithm import load_algorithm, option_defaults
from run.commandline import Parser, output_file
from run.style import new_figure, save, style

OUT = Path(__file__).with_suffix(".png")
LENGTH = 20  # tokens of the completion in the figure
MOVED = 6  # the place of the token whose ratio is not 1
RATIO = 3.0  # its ratio in the bars of the figure
PROBABILITY = 0.5  # of every token in the figure; TR-GRPO's weight needs one

METHODS = {  # the ratio that the clip looks at, the average, and one advantage per what
    "grpo": ("token", "sequence", "completion"),
    "dapo": ("token", "token", "completion"),
    "gspo": ("geometric", "sequence", "completion"),
    "tepo": ("geometric", "token", "completion"),
    "gtpo": ("token", "token", "token"),
    "grpo_s": ("arithmetic", "sequence", "completion"),
    "trgrpo": ("token", "sequence", "completion"),
}
SYMBOLS = {"token": "w_{i,t}", "geometric": "s_i", "arithmetic": r"\hat w_i"}


def push(algo, w, t, A, B, N, p, reading="shifted"):
    """-dL/dlogp of token t of a completion, by hand.

    w: the ratios pi_theta / pi_old of the completion's tokens. A: the token's advantage. B: number
    of completions of the mini-batch, N: of their tokens. p: the token's probability. reading: of
    TR-GRPO's weight.
    """
    kind, average, _ = METHODS[algo]
    ratio = ratios(w, t)[kind]
    low, high = clip_range(algo)
    if A > 0 and ratio > 1 + high or A < 0 and ratio < 1 - low:
        return 0.0  # clipped
    # d ratio / dlogp, times |o| if the ratio is a mean over the completion's tokens
    slope = ratio if kind == "geometric" else w[t]
    divisor = N if average == "token" else B * len(w)
    v = weight(p, reading) if algo == "trgrpo" else 1.0
    return v * slope * A / divisor


def ratios(w, t):
    """{kind: ratio} at token t of a completion with the token ratios w."""
    return {
        "token": w[t],
        "geometric": math.exp(sum(math.log(x) for x in w) / len(w)),
        "arithmetic": sum(w) / len(w),
    }


def clip_range(algo):
    """(eps_low, eps_high), the defaults of the method's file."""
    defaults = option_defaults(load_algorithm(algo))
    return defaults["eps_low"], defaults["eps_high"]


def weight(p, reading):
    """TR-GRPO's v at probability p: clip(2 sigmoid(9 (p - 0.25)), 1, 1.4), or "outside"."""
    if reading == "shifted":
        v = 2 / (1 + math.exp(-9 * (p - 0.25)))
    else:
        v = 2 * (1 / (1 + math.exp(-9 * p)) - 0.25)
    return min(max(v, 1.0), 1.4)


def objective(algo, w, t, A):
    """min(ratio A, clip(ratio) A), which the method averages, at token t."""
    ratio = ratios(w, t)[METHODS[algo][0]]
    low, high = clip_range(algo)
    return min(ratio * A, min(max(ratio, 1 - low), 1 + high) * A)


def completion(ratio):
    """The token ratios of the figure's completion: one token has moved."""
    w = [1.0] * LENGTH
    w[MOVED] = ratio
    return w


def table():
    """The lines of CLAIMS.md's table."""
    lines = [
        "| method | ratio | average over | advantage per | clip range | on policy | off policy |",
        "|---|---|---|---|---|---|---|",
    ]
    weights = [(algo, "") for algo in METHODS]
    weights[-1:] = [("trgrpo", "v_{i,t}\\,"), ("trgrpo", "v'_{i,t}\\,")]
    for algo, v in weights:
        kind, average, per = METHODS[algo]
        A = "A_{i,t}" if per == "token" else "A_i"
        divisor = "N" if average == "token" else "B\\,\\lvert o_i \\rvert"
        slope = SYMBOLS["geometric" if kind == "geometric" else "token"]
        on, off = f"{v}{A}", f"{v}{slope}\\,{A}"
        cells = [
            f"[{style(algo)[0]}]({algo}.py)" + (", `reading=outside`" if "'" in v else ""),
            f"${SYMBOLS[kind]}$",
            f"{average}s",
            per,
            "{} / {}".format(*clip_range(algo)),
            f"$\\frac{{{on}}}{{{divisor}}}$",
            f"$\\frac{{{off}}}{{{divisor}}}$",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def curves():
    """Rows of the .csv: objective and relative push against the moved token's ratio.

    The push is divided by the push on policy at the same advantage, so 1 is "as on policy".
    """
    rows = []
    for algo in METHODS:
        for A in (1.0, -1.0):
            for i in range(281):
                ratio = 0.2 + i / 100
                w = completion(ratio)
                rows.append(
                    {
                        "method": algo,
                        "A": A,
                        "ratio": round(ratio, 2),
                        "objective": objective(algo, w, MOVED, A),
                        "relative_push": relative_push(algo, w, MOVED, A),
                    }
                )
    return rows


def relative_push(algo, w, t, A):
    """The push on token t divided by the push on policy; 0 where the clip acts."""
    size = {"B": 1, "N": len(w), "p": PROBABILITY}
    return push(algo, w, t, A, **size) / abs(push(algo, [1.0] * len(w), t, A, **size))


def draw(rows, out):
    """Three rows of panels, a column per method: objective, push, and the push on 20 tokens."""
    figure = new_figure(13, 7.2)
    axes = figure.subplots(3, len(METHODS), sharey="row", sharex=False)
    for column, algo in zip(axes.T, METHODS, strict=True):
        name, colour, _, _ = style(algo)
        for A, dashes in ((1.0, "-"), (-1.0, "--")):
            part = [row for row in rows if row["method"] == algo and row["A"] == A]
            x = [row["ratio"] for row in part]
            label = "A > 0" if A > 0 else "A < 0"
            for ax, key in zip(column, ("objective", "relative_push"), strict=False):
                ax.plot(x, [row[key] for row in part], color=colour, ls=dashes, label=label)
                ax.axvline(1, color="0.8", lw=0.8, zorder=0)
                ax.axhline(0, color="0.8", lw=0.8, zorder=0)
        pushes = [relative_push(algo, completion(RATIO), t, 1.0) for t in range(LENGTH)]
        colours = ["#444444" if t == MOVED else "#BBBBBB" for t in range(LENGTH)]
        column[2].bar(range(1, LENGTH + 1), pushes, color=colours, width=0.8)
        column[2].set_xticks([1, MOVED + 1, LENGTH])
        column[0].set_title(name)
        column[1].set_xlabel("ratio of the one token")
        column[2].set_xlabel("token")
        if not any(pushes):
            column[2].text(10.5, 1.5, "all clipped", ha="center")
    axes[0, 0].set_ylabel("objective,\nmin(ratio A, clip A)")
    axes[1, 0].set_ylabel("push on that token\n(on policy: ±1)")
    axes[2, 0].set_ylabel(f"push on each token,\nA > 0, its ratio {RATIO:g}")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle(
        f"A completion of {LENGTH} tokens: one has moved, the ratio of the others is 1",
        fontsize=11,
    )
    save(figure, out)


def main(argv=None):
    parser = Parser(
        description=__doc__.split("\n")[0], epilog="It runs in seconds, without a model."
    )
    parser.add_argument("--table", action="store_true", help="print the table and stop")
    parser.add_argument(
        "--out", type=output_file, default=OUT, help=f"the figure (default {OUT.name})"
    )
    args = parser.parse_args(argv)
    if args.table:
        print("\n".join(table()))
        return 0
    return kit.status_of(lambda: write(args.out))


def write(out):
    """The figure, and the .csv with every fifth point."""
    rows, numbers = curves(), out.with_suffix(".csv")
    draw(rows, out)
    kit.write_rows(numbers, [row for row in rows if round(row["ratio"] * 100) % 5 == 0])
    print(f"wrote {out} and {numbers}")


if __name__ == "__main__":
    sys.exit(main())
