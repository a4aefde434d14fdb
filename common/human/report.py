"""The report of a study, from the dict of human.analyse, as Markdown."""

import re

from common.human.analysis import MAX_FAILED, PRIOR, SCORES


def report(study):
    """human.analyse's dict -> Markdown text, for a reader who has not seen the code."""
    blocks = [
        "## Human evaluation",
        _counts(study),
        *_comparison(study),
        _agreement(study["agreement"]),
        _biases(study),
    ]
    scored = [[name, *map(_mean, map(columns.get, SCORES))] for name, columns in study["scores"].items()]
    if scored:
        blocks += ["Scores of the preferred answer, where only one was:", _table(["preferred", *SCORES], scored)]
    raters = [[row["rater_id"], str(row["items"]), f"{row['failed']} of {row['checks']}",
               f"{row['same']} of {row['twice']}"] for row in study["raters"]]  # fmt: skip
    blocks.append(_table(["rater", "items", "failed checks", "duplicates alike"], raters))
    return "\n\n".join(blocks) + "\n"


def _counts(study):
    rows = [row for row in study["raters"] if row["rater_id"] in study["excluded"]]
    why = "; ".join(f"{_plain(row['rater_id'])} ({row['failed']} of {row['checks']} checks failed)" for row in rows)
    return (
        f"{study['items']} items, {len(study['raters']) - len(rows)} raters, {study['ratings']} ratings counted; "
        f"{study['replaced']} replaced by a later rating of the same rater. Excluded, by the rule fixed before the "
        f"study (more than {MAX_FAILED} failed check): {why or 'nobody'}. With {study['items']} items a win rate near "
        f"50 % is known to ±{100 * study['half_width']:.1f} points: a smaller difference cannot be seen here."
    )


def _comparison(study):
    """Win matrix, win rates and strengths, the strongest first."""
    names, ranked = study["systems"], sorted(study["bradley_terry"].items(), key=lambda pair: -pair[1]["strength"])
    wins = [[name, *(f"{value:g}" for value in row)] for name, row in zip(names, study["wins"])]
    rates = [[f"{row['first']} : {row['second']}", _share(row, "rate"), f"{row['n']:g}"] for row in study["win_rates"]]
    yield "Wins of the row over the column, ties half:"
    yield _table(["", *names], wins)
    yield _table(["pair", "win rate of the first", "comparisons"], rates)
    yield _table(["system", "Bradley-Terry strength"], [[name, _figure(row, "strength")] for name, row in ranked])
    yield "Strengths are log odds with mean 0; 95 % intervals (in brackets) are over items."
    if not study["strengths_finite"]:
        yield (
            "Some system won or lost everything against others, so its strength has no bound: the strengths are those "
            f"with {PRIOR} wins added each way to every pair, and have no intervals."
        )


def _agreement(study):
    raw = "" if study["raw"] is None else f" {100 * study['raw']:.1f} % of the pairs of ratings of an item are alike."
    if study["reason"]:
        return f"Agreement: {study['reason']}.{raw}"
    return (
        f"Agreement on {study['items']} items that two or more rated: Krippendorff's alpha {_figure(study, 'alpha')}, "
        f"Fleiss' kappa {study['kappa']:.3f}.{raw}"
    )


def _biases(study):
    same, position, length = study["self_consistency"], study["position_bias"], study["length_bias"]
    p = "" if position["p"] is None else f", p = {position['p']:.2g} (exact binomial test)"
    return (
        f"The same rater on the same item with other slots: {_share(same)} alike, n = {same['n']}. "
        f"First slot preferred: {_share(position)} of n = {position['n']} single preferences, "
        f"{100 * position['expected']:.1f} % expected{p}. "
        f"Longer answer preferred: {_share(length)}, n = {length['n']}, 50 % without a length bias."
    )


def _table(header, rows):
    first, *rest = [f"| {' | '.join(map(_plain, row))} |" for row in (header, *rows)]
    return "\n".join([first, "|---" * len(header) + "|", *rest])


def _plain(text):
    """A name that a user chose, as one line of plain text."""
    return re.sub(r"([\\|<>*`\[\]])", r"\\\1", " ".join(text.split()))


def _mean(score):
    return "-" if score is None else f"{score['mean']:.2f} (n = {score['n']})"


def _share(row, name="share"):
    return _figure(row, name, 100, ".1f", " %")


def _figure(row, name, scale=1, shown=".3f", unit=""):
    """A figure with its interval."""
    if row[name] is None:
        return "-"
    bounds = "no interval" if row["low"] is None else f"{scale * row['low']:{shown}}, {scale * row['high']:{shown}}"
    return f"{scale * row[name]:{shown}}{unit} ({bounds})"
