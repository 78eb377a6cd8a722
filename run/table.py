"""Runs in one table: told apart by what differs, averaged over seeds, compared with GRPO.

pandas is imported where it is used: --help does not wait for it.
"""

import itertools
import json
import math
import re
import statistics

from run.runs import COLUMNS, ORDER

CURVE = ["algo", "variant"]  # the columns of `tabulate` that tell one experiment from another
KEPT = ("phase", "step", *COLUMNS, "kl", "length_wrong")  # in a .csv, and the parts of the reward
LONG = 40  # characters of a variant; the names of the folders say more than a longer one
# Student's t at 97.5% for 1, 2, ... degrees of freedom. The last stands for all beyond it, whose
# intervals are a little too wide.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
LAST = 5  # training steps that the table's entropy and length are means over


# One table of all runs


def tabulate(runs):
    """The rows of all runs in one DataFrame, with the columns algo, variant and seed.

    algo and variant are ordered categories: algorithms in ORDER, variants by what they differ in;
    "" where there is nothing. `value` is the number of the option in which they differ, NaN if it
    is no number, or if there are several. Runs that differ in the seed alone are one curve.
    """
    import pandas as pd

    runs = told_apart(runs)
    names = differing(runs)
    titles, tables = titles_of(runs, names), []
    for run, title in zip(runs, titles, strict=True):
        about = {"algo": run["algo"], "variant": title, "seed": run["seed"]}
        value = run["settings"].get(names[0]) if len(names) == 1 else None
        about["value"] = float(value) if isinstance(value, int | float) else math.nan
        tables.append(run["rows"].assign(**about))
    table = pd.concat(tables, ignore_index=True)
    ranks = {title: rank(run, names) for run, title in zip(runs, titles, strict=True)}
    algos = dict.fromkeys([*ORDER, *(run["algo"] for run in runs)])
    table["algo"] = pd.Categorical(table["algo"], list(algos), ordered=True)
    table["variant"] = pd.Categorical(table["variant"], sorted(ranks, key=ranks.get), ordered=True)
    return table


def told_apart(runs):
    """The runs; where two are alike, they get a setting `run`, the name of their folder.

    As many folders above it as are needed belong to the name. Raises ValueError if that does not
    help: one of them would count as a second seed.
    """
    for depth in (1, 2, 3):
        unclear = [is_unclear(run, runs) for run in runs]
        runs = [dict(run) for run in runs]
        for run, is_named in zip(runs, unclear, strict=True):
            if is_named:
                run["settings"] = {**run["settings"], "run": folder_of(run, depth)}
    for run in runs:
        if is_unclear(run, runs):
            what = f"two runs of {run['algo']}, seed {run['seed']}, same settings"
            raise ValueError(f"{what}: leave one out")
    return runs


def is_unclear(run, runs):
    """Whether another run has the same experiment and seed, or the same label of another file."""
    for other in runs:
        if other is not run and other["algo"] == run["algo"]:
            is_other_file = other.get("file") != run.get("file")
            is_same = other["settings"] == run["settings"]
            if is_same and (is_other_file or other["seed"] == run["seed"]):
                return True
            if is_other_file and "run" not in run["settings"]:
                return True
    return False


def folder_of(run, depth=1):
    """The end of the run's path, without its seed: tepo-tiny-s0 -> tepo-tiny."""
    return re.sub(r"-s\d+(?=-|/|$)", "", "/".join(run["path"].resolve().parts[-depth:]))


def differing(runs):
    """The names of the settings in which runs of one algorithm differ: they make the variants."""
    names = {}
    for run, other in itertools.permutations(runs, 2):
        if other["algo"] == run["algo"] and other["settings"] != run["settings"]:
            for name, value in run["settings"].items():
                if name not in other["settings"] or other["settings"][name] != value:
                    names[name] = True
    return list(names)


def varied(run, names):
    """Those settings of a run that are among the names."""
    settings = run["settings"]
    return {name: settings[name] for name in names if name in settings}


def rank(run, names):
    """Sorts variants by number. Before the numbers come texts and settings that are missing."""
    values = [run["settings"].get(name) for name in names]
    return [(x, "") if isinstance(x, int | float) else (-math.inf, str(x)) for x in values]


def titles_of(runs, names):
    """The variant of each run in words, such as "16 updates per rollout, lr = 0.001".

    By the names of the folders if a title would be long and each variant has one name.
    """
    titles = [title(varied(run, names)) or ("defaults" if names else "") for run in runs]
    folders = [folder_of(run) for run in runs]
    pairs = set(zip(titles, folders, strict=True))
    one_to_one = len(pairs) == len(set(titles)) == len(set(folders))
    return folders if one_to_one and max(map(len, titles)) > LONG else titles


def title(values):
    """{name: value} in words."""
    words = []
    for name, value in values.items():
        if name == "updates":
            words.append(f"{value} update{'s' * (value != 1)} per rollout")
        else:
            words.append(str(value) if name == "run" else f"{name} = {value}")
    return ", ".join(words)


def write_csv(runs, path):
    """The numbers behind a figure, one line per row of a run, with four digits.

    The file is small enough to commit, and the figure can be drawn again from it. Of the settings
    it has those in which the runs differ.
    """
    import pandas as pd

    runs = told_apart(runs)
    names, tables = differing(runs), []
    for run in runs:
        values = varied(run, names)
        about = {"algo": run["algo"], "seed": run["seed"]}
        about["settings"] = json.dumps(values) if values else ""
        tables.append(run["rows"].assign(**about))
    table = pd.concat(tables)
    parts = [name for name in table if name.startswith("reward/")]
    columns = [name for name in (*KEPT, *parts) if name in table and table[name].notna().any()]
    table = table[["algo", "seed", "settings", *columns]]
    table.to_csv(path, index=False, float_format="%.4g", lineterminator="\n")


def average(table, phase, metric, smooth=1):
    """algo, variant, step, and over the seeds that have a value there: mean, min, max, count.

    smooth: each run is first averaged over so many steps, its own in the middle. Of two rows of
    one step the last counts.
    """
    part = table[table["phase"] == phase]
    part = part.drop_duplicates([*CURVE, "seed", "step"], keep="last").dropna(subset=[metric])
    if smooth > 1:
        runs = part.groupby([*CURVE, "seed"], observed=True)[metric]
        means = runs.transform(lambda x: x.rolling(smooth, center=True, min_periods=1).mean())
        part = part.assign(**{metric: means})
    found = part.groupby([*CURVE, "step"], observed=True)[metric]
    return found.agg(["mean", "min", "max", "count"]).reset_index()


# Comparisons


def mean_interval(values):
    """The mean of numbers and the half-width of its 95% t-interval, None of a single number."""
    n = len(values)
    mean = statistics.fmean(values)
    if n == 1:
        return mean, None
    t = T975[min(n - 1, len(T975)) - 1]
    return mean, t * statistics.stdev(values) / n**0.5


def cell(values, digits, sign=""):
    """Mean ± half-width of the values that are not None; a dash where all are.

    The mean alone of a single value, and of values that are all the same.
    """
    values = [value for value in values if value is not None]
    if not values:
        return "–"
    mean, half = mean_interval(values)
    text = f"{mean:{sign}.{digits}f}"
    return f"{text} ± {half:.{digits}f}" if half and half > 1e-12 else text


def per_seed(table):
    """What the comparison takes of each run: a DataFrame with the index algo, variant, seed."""
    import pandas as pd

    index = [*CURVE, "seed"]
    held_out = table[table["phase"] == "eval"].groupby(index, observed=True)
    train = table[table["phase"] == "train"].groupby(index, observed=True)
    found = pd.DataFrame(
        {
            "before": held_out["accuracy"].first(),  # each is of the known values
            "final": held_out["accuracy"].last(),
            "pass": held_out["pass_at_k"].last(),
            "entropy": train["entropy"].apply(mean_of_last),
            "length": train["length"].apply(mean_of_last),
            # The median: a step during which the machine slept does not count.
            "seconds": train["seconds"].apply(lambda x: x.median() * x.count()),
            "is_broken": train["accuracy"].apply(is_broken),
        }
    )
    is_grpo = found.index.get_level_values("algo") == "grpo"
    of_grpo = found["final"].where(is_grpo).groupby(["variant", "seed"], observed=True)
    return found.assign(less=(found["final"] - of_grpo.transform("max")).mask(is_grpo))


def mean_of_last(values):
    return values.dropna().tail(LAST).mean()


def is_broken(accuracy):
    """Whether the mean of the last rollouts is below half of the best of as many in a row."""
    means = accuracy.dropna().rolling(LAST).mean().dropna()
    return len(means) > 0 and means.iloc[-1] < 0.5 * means.max()
