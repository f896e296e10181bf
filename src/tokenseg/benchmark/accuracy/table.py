"""Tables of accuracy rows: everything in them is computed from the two CSV files."""

from __future__ import annotations

from collections.abc import Sequence

from tokenseg.benchmark.accuracy.bootstrap import CaseScore, case_means, mean_interval, paired_difference
from tokenseg.benchmark.accuracy.budget import REFERENCE
from tokenseg.benchmark.rows import KEY_COLUMNS, Row, key_of
from tokenseg.evaluation.metrics import Interval

_GROUP_COLUMNS = tuple(name for name in KEY_COLUMNS if name not in ("network", "seed"))
_TITLES = (
    *("network", "parameters", "steps", "learning rate", "seeds", "Dice (95 % interval)"),
    *(f"less {REFERENCE}, points (95 % interval)", "HD95", "NSD 1 mm", "missed"),
)


def accuracy_table(rows: Sequence[Row], cases: Sequence[Row]) -> str:
    """Markdown: one table for each dataset, fold, budget and place, the best network first.

    Of rows of the same training the newest counts. Dice is the mean over cases of the mean over labels and seeds;
    intervals are over cases. The difference is taken case by case against the reference network, where it has rows.

    Args:
        rows: Of trainings, oldest first.
        cases: Dice of each case and label of these trainings.
    """
    # Dictionaries keep the newest of equal keys; a failure counts only where nothing ever succeeded.
    newest = {key_of(row): row for row in rows} | {key_of(row): row for row in rows if row["dice"]}
    scores = {(*key_of(row), row["case"], row["label"]): row for row in cases}
    by_training: dict[tuple[str, ...], list[CaseScore]] = {}
    for row in scores.values():
        dice = float(row["dice"]) if row["dice"] else float("nan")
        by_training.setdefault(key_of(row), []).append(CaseScore(int(row["seed"]), row["case"], row["label"], dice))
    groups: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for row in newest.values():
        group = tuple(row[name] for name in _GROUP_COLUMNS)
        groups.setdefault(group, {}).setdefault(row["network"], []).append(row)
    return "\n\n".join(_table(networks, by_training) for networks in groups.values())


def _table(networks: dict[str, list[Row]], scores: dict[tuple[str, ...], list[CaseScore]]) -> str:
    trained = {name: [row for row in rows if row["dice"]] for name, rows in networks.items()}
    means = {
        name: case_means(score for row in rows for score in scores.get(key_of(row), ()))
        for name, rows in trained.items()
        if rows
    }
    intervals = {name: mean_interval(values) for name, values in means.items()}
    best_first = sorted(means, key=lambda name: -intervals[name].mean)
    lines = [_line(_TITLES), _line(["---"] * len(_TITLES))]
    for name in best_first:
        compared = name != REFERENCE and REFERENCE in means
        difference = paired_difference(means[name], means[REFERENCE]) if compared else None
        lines.append(_line(_cells(name, trained[name], intervals[name], difference)))
    for name, rows in networks.items():
        if name not in means:
            lines.append(_line([name, f"failed: {rows[-1]['error']}", *[""] * (len(_TITLES) - 2)]))
    first = next(iter(networks.values()))[0]
    threads = first["threads"] + (" thread" if first["threads"] == "1" else " threads")
    num_cases = len(next(iter(means.values()), {}))
    where = f"{first['dataset']}, fold {first['fold']} ({num_cases} cases)"
    return f"{where}, {first['budget']}, {threads}, {first['device']}, {first['precision']}:\n\n" + "\n".join(lines)


def _cells(name: str, rows: Sequence[Row], dice: Interval, difference: Interval | None) -> list[str]:
    steps, rates = (_range([row[column] for row in rows]) for column in ("steps", "learning_rate"))
    hd95_mm, nsd = (sum(float(row[column]) for row in rows) / len(rows) for column in ("hd95_mm", "nsd_1mm"))
    points = ""
    if difference is not None:
        points = f"{difference.mean:+.2f} ({difference.low:+.2f} to {difference.high:+.2f})"
    return [
        *(name, f"{rows[0]['parameters_m']} M", steps, rates, str(len(rows))),
        *(f"{dice.mean:.4f} ({dice.low:.4f} to {dice.high:.4f})", points),
        *(f"{hd95_mm:.2f} mm", f"{nsd:.4f}", str(sum(int(row["missed"]) for row in rows))),
    ]


def _range(texts: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(texts))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
