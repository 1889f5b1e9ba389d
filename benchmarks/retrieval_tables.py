"""The Markdown of ``retrieval.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from retrieval_routing import RATES, TWINS


def percent(share: float, digits: int = 2) -> str:
    """A share in percent."""
    return f"{100 * share:.{digits}f}%"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, numbers to the right."""
    lines = ["", f"| {' | '.join(header)} |", "|---|" + "---:|" * (len(header) - 1)]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def routing_tables(results: Mapping[str, Any]) -> list[str]:
    """Routing, other routers, and where rows went."""
    columns = ("15", "22", "20", "22, 16 examples")
    lines = [
        "## Routing",
        "",
        "Misrouted test rows, mean over the tasks (20: without rte and cb, mnli's twins).",
    ]
    rows = []
    for name, found in ((n, r["routing"]) for n, r in results.items() if "routing" in r):
        rows.append([name, str(found["channels"]), *(percent(found[c]) for c in columns)])
        bare = found["without runoff"]
        rows.append([f"{name}, without runoff", "", *(percent(bare[c]) for c in columns)])
    lines += table(("reading", "channels", "15 tasks", "22 tasks", "20 tasks", "22 tasks, 16 examples"), rows)
    whole = {n: r["all rows"] for n, r in results.items() if "all rows" in r}
    if whole:
        sizes = sorted({count for own in whole.values() for count in own["rows"]})
        lines += [f"The same with all training rows, {sizes[0]} to {sizes[-1]:,} a task."]
        lines += table(
            ("reading", "15 tasks", "22 tasks", "20 tasks"),
            [
                [title, *(percent(of[s]) for s in ("15", "22", "20"))]
                for n, own in whole.items()
                for title, of in ((n, own), (f"{n}, without runoff", own["without runoff"]))
            ],
        )
    for name, found in results.items():
        if "alternatives" not in found:
            continue
        others = [
            [t, *(percent(own[s]) for s in ("15", "22", "20"))] for t, own in found["alternatives"].items()
        ]
        lines += [f"Other routers on the queries of {name}."]
        lines += table(("router", "15 tasks", "22 tasks", "20 tasks"), others)
        pairs = [
            (count, f"{task} → {other} {count}")
            for task, others_ in found["routing"]["confusions"].items()
            for other, count in others_.items()
        ]
        lines += [
            "Where the misrouted of 22 tasks went: "
            + ", ".join(t for _, t in sorted(pairs, reverse=True))
            + "."
        ]
        lines += ["", f"The paper's form and plain baselines on the queries of {name}, 15 tasks."]
        cosine = [
            [
                r["name"],
                percent(r["misrouting"], 1),
                "-" if r["false_refusals"] is None else percent(r["false_refusals"]),
            ]
            for r in found["cosine"]
        ]
        lines += table(("keys", "misrouted", "own rows refused at 1%"), cosine)
    return lines


def abstention_tables(results: Mapping[str, Any]) -> list[str]:
    """Abstention and calibration."""
    own = {n: r["abstention"] for n, r in results.items() if "abstention" in r}
    lines = ["## Abstention", "", "A third of the tasks left out in turn: AUROC of the relative distance."]
    rows = []
    for name, found in own.items():
        worst, area = found["worst without twins"]
        twins = ", ".join(f"{t} {found['auroc'][t]:.2f}" for t in TWINS if t in found["auroc"])
        rows.append([name, f"{found['mean without twins']:.3f}", f"{worst} {area:.3f}", twins])
    lines += table(("reading", "mean without twins", "worst", "twins"), rows)
    own = {name: found for name, found in own.items() if "by size" in found}
    lines += [
        "Stores of a size, at a stated rate of false refusals, with the background and without: own rows "
        "refused (in brackets the worst task), and rows of tasks that are not in the store, nor have a twin "
        "there, let in."
    ]
    for name, found in own.items():
        rows = []
        for one, bare in zip(found["by size"]["with"], found["by size"]["without"], strict=True):
            cells = [
                cell
                for f in (one, bare)
                for cell in (
                    f"{percent(f['refused'])} ({f['worst'][0]} {percent(f['worst'][1], 1)})",
                    "-" if f["let in"] is None else percent(f["let in"], 1),
                )
            ]
            rows.append([f"{name}, {one['tasks']} at {100 * one['rate']:g}%", *cells])
        lines += table(("store", "refused", "let in", "refused without", "let in without"), rows)
    lines += ["Strangers let in, a third of the tasks left out in turn, at a stated rate."]
    lines += table(
        ("reading", *(f"{100 * r:g}%" for r in RATES)),
        [[n, *(percent(s, 1) for s in found["strangers let in"])] for n, found in own.items()],
    )
    errors = {n: r["calibration error"] for n, r in results.items() if "calibration error" in r}
    lines += [
        "## Reliability",
        "",
        "Expected calibration error of a row's largest weight, by temperature, 22 tasks.",
    ]
    for name in errors:
        lines += ["", f"![reliability, {name}](reliability_{name}.png)"]
        lines += [f"![abstention, {name}](abstention_{name}.png)"] if name in own else []
    return lines + table(
        ("reading", *next(iter(errors.values()))),
        [[n, *(percent(e) for e in own.values())] for n, own in errors.items()],
    )


def cost_tables(found: Mapping[str, Any]) -> list[str]:
    """What confusions cost."""
    names = ("own knowledge", "K = 1", "K = 2", "mixed rows")
    lines = [
        "## What a confusion costs",
        "",
        "MiniLM, 15 tasks, nothing refused: accuracy by whose knowledge answers.",
    ]
    tasks = found["tasks"]
    mean = {n: sum(own[n] for own in tasks.values()) / len(tasks) for n in names}
    lines += table(
        ("task", *names),
        [[t, *(percent(own[n], 1) for n in names)] for t, own in {**tasks, "mean": mean}.items()],
    )
    lines += ["Rows that were nearest to another task: how many each knowledge answers right."]
    pairs = sorted(found["confusions"].items(), key=lambda item: -item[1]["rows"])
    return lines + table(
        ("confusion", "rows", "own", "the other's (K = 1)", "mixed (K = 2)"),
        [[t, *(str(p[n]) for n in ("rows", "own", "one", "two"))] for t, p in pairs],
    )


def overlap_table(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What mixing gives where it should."""
    lines = [
        "## Where tasks overlap",
        "",
        "Each data set cut at random into two tasks of 200 training rows, three times; nothing refused: "
        "accuracy, and what mixing adds with its standard error over rows.",
    ]
    rows = [
        [
            task,
            f"{own['rows']:.0f}",
            percent(own["K = 1"], 1),
            percent(own["K = 2"], 1),
            f"{100 * (own['K = 2'] - own['K = 1']):+.1f} ± {100 * own['error']:.1f}",
            percent(own["mixed rows"], 1),
        ]
        for task, own in found.items()
    ]
    return lines + table(("data", "rows", "K = 1", "K = 2", "difference", "mixed rows"), rows)


def versions_table(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is found of a second version's common rows, and what refusing costs."""
    lines = [
        "## Versions of one task",
        "",
        "Two tasks of like texts beside five others of 200 rows; of the rows of the smaller the larger has "
        "all, three quarters, half or none. The share that is told from the stored statistics, smallest and "
        "largest of the data sets; and, where it has all, requests that are refused (wanted: 1%) if only the "
        "larger is there, if common rows count once, and if they count twice.",
    ]
    rows = []
    for reading, sizes in found.items():
        for size, own in sizes.items():
            told = [f"{low:.2f} to {high:.2f}" for low, high in own["estimates"].values()]
            refused = [percent(share, 1) for share in own["refused"].values()]
            rows.append([reading, size.replace(", ", " and "), *told, *refused])
    header = (
        "reading",
        "rows",
        "told: of all",
        "of ¾",
        "of ½",
        "of none",
        "refused: larger alone",
        "once",
        "twice",
    )
    return lines + table(header, rows)


def rounding_table(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Decisions in company and alone."""
    lines = [
        "## Rows in company",
        "",
        "A backbone rounds a row differently in a batch of 16 than alone. Changes of a difference of "
        "relative distances, near a tie or a threshold, in units of the epsilon of its numbers; rows within "
        "what is allowed for are read once more by themselves.",
    ]
    rows = [
        [
            name,
            own["dtype"],
            str(own["rows"]),
            f"{own['largest change of a near tie']:.3g}",
            f"{own['largest change near a threshold']:.3g}",
            f"{own['allowed']:g}",
            str(own["changed"]),
            percent(own["reread"]),
            str(own["changed where reread"]),
        ]
        for name, own in found.items()
    ]
    head = ("backbone, form", "numbers", "rows", "largest change, ties", "thresholds", "allowed")
    return lines + table((*head, "other decisions", "read again", "other decisions then"), rows)


def tables(results: Mapping[str, Any], num_train: int, num_test: int) -> str:
    """Markdown of everything measured."""
    lines = [
        "<!-- written by benchmarks/retrieval.py -->",
        "# Retrieval",
        "",
        f"{num_train} training rows and up to {num_test} test rows a task, 128 tokens, single rows, no "
        "task-ID, gaussian form, one key a task, unless said otherwise. Readings without a suffix are the "
        "defaults.",
        "",
    ]
    if results.get("readings"):
        lines += routing_tables(results["readings"]) + abstention_tables(results["readings"])
    if "costs" in results:
        lines += cost_tables(results["costs"])
    if "overlap" in results:
        lines += overlap_table(results["overlap"])
    if "versions" in results:
        lines += versions_table(results["versions"])
    if "reading cost" in results:
        lines += [
            "## Reading the query",
            "",
            "A prefill of 128 tokens that also reads the query, over one that does not.",
        ]
        rows = [
            [n, f"{c['ratio']:.3f}", f"{c['low']:.3f}..{c['high']:.3f}"]
            for n, c in results["reading cost"].items()
        ]
        lines += table(("backbone and batch", "median ratio", "quartiles"), rows)
    if "rounding" in results:
        lines += rounding_table(results["rounding"])
    return "\n".join(lines).replace("\n\n\n", "\n\n").rstrip() + "\n"
