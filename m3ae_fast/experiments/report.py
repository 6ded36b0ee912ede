"""The tables beside the paper's, what agrees with it and what does not, and plots."""

from __future__ import annotations

import statistics
from pathlib import Path

from m3ae_fast._drawing import new_figure, save_figure
from m3ae_fast._files import read_json, replacing, write_json
from m3ae_fast.experiments.plan import CLAIMS, TABLES, Claim, Scale, Table, runs_of

Scores = dict[str, list[dict[str, float]]]  # run -> its scores, a seed each


def write_report(out: Path, tables: list[str], seeds: int, scale: Scale) -> Path:
    """Write `out/experiments.md`, experiments.json and a plot for each table.

    Args:
        out: where every run that the tables need has its folder with scores.json.
        tables: keys of TABLES. seeds: of each run. scale: of the runs, as the report says it.
    Returns:
        The path of experiments.md.
    """
    out = Path(out)
    scores = {
        name: [read_json(out / f"{name}-{seed}" / "scores.json")["scores"] for seed in range(seeds)]
        for name in runs_of(tables)
    }
    parts = [_about(seeds, scale)]
    for name in tables:
        picture = out / f"{name}.png"
        _plot(picture, TABLES[name], scores)
        parts += [f"## {TABLES[name].title}", _table(TABLES[name], scores), f"![{TABLES[name].title}]({picture.name})"]
        claims = [f"- {_verdict(claim, scores)}" for claim in CLAIMS if claim.table == name]
        if claims:
            parts.append("\n".join(claims))
    write_json(out / "experiments.json", {"seeds": seeds, "steps": scale.steps, "scores": scores})
    path = out / "experiments.md"
    with replacing(path) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _about(seeds: int, scale: Scale) -> str:
    return (
        "# The paper's tables in miniature\n\n"
        f"Made by `m3ae-fast experiments`: {seeds} {'seeds' if seeds > 1 else 'seed'} of data, weights and masks, "
        f"{scale.steps:,} steps of {scale.batch_size} images of `cluttered`. Figures are means over seeds, in percent, "
        "+/- the standard deviation over seeds. Linear classification: a closed-form probe on frozen CLS features of "
        f"{scale.train:,} whole images, scored on {scale.test:,} others; no word is read; chance is about 8 %. Below "
        "each table, the paper's claims: the mean difference, seed by seed, and its standard error; significant where "
        "Student's 95 % interval leaves out 0, so one in twenty is by chance. All runs are scored on the same images."
    )


def _table(table: Table, scores: Scores) -> str:
    papers = any(row.paper is not None for row in table.rows)
    header = ["", *table.scores, *(["the paper's"] if papers else [])]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in table.rows:
        cells = [row.label, *(_figure([each[score] for each in scores[row.run]]) for score in table.scores)]
        lines.append(f"| {' | '.join([*cells, *([str(row.paper or '-')] if papers else [])])} |")
    return "\n".join([*lines, "", f"{table.note}."])


def _figure(values: list[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.1f} +/- {statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"


def _verdict(claim: Claim, scores: Scores) -> str:
    """Of differences seed by seed."""
    from scipy.stats import t

    high, low = ([each[claim.score] for each in scores[run]] for run in (claim.high, claim.low))
    differences = [a - b for a, b in zip(high, low, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return f"{claim.text}: {mean:+.1f} in one seed, from which nothing follows"
    error = statistics.stdev(differences) / len(differences) ** 0.5
    word = "agrees" if mean > 0 else "**disagrees**"
    if abs(mean) <= t.ppf(0.975, len(differences) - 1) * error:
        word = "not significant"
    return f"{claim.text}: {word} ({mean:+.1f}, standard error {error:.1f})"


def _plot(path: Path, table: Table, scores: Scores) -> None:
    figure = new_figure(7, 3.2)
    axes, width = figure.subplots(), 0.8 / len(table.scores)
    places = range(len(table.rows))
    for i, score in enumerate(table.scores):
        values = [[each[score] for each in scores[row.run]] for row in table.rows]
        at = [place + (i - (len(table.scores) - 1) / 2) * width for place in places]
        axes.bar(at, list(map(statistics.fmean, values)), width * 0.9, label=score, zorder=2)
        for x, of in zip(at, values, strict=True):
            axes.plot([x] * len(of), of, "k.", markersize=4, zorder=3)
    papers = [(place, row.paper) for place, row in enumerate(table.rows) if row.paper is not None]
    if papers:
        axes.plot(*zip(*papers, strict=True), "D", color="tab:red", label="the paper's", zorder=3)
    axes.set(xticks=list(places), xticklabels=[row.label for row in table.rows], ylabel="percent", title=table.title)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=7)
    save_figure(figure, path)
